"""A run folder in; a commit on the Hub out, downloaded again and compared."""
