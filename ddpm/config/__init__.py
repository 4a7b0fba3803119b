"""Settings: every field with its check beside it, and how flags and JSON become them."""
