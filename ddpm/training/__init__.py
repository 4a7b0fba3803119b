"""A config in; checkpoints, previews and a finished run folder out."""
