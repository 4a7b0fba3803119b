"""A run folder -> a verified commit on the Hub."""
