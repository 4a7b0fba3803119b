"""The published pipeline, and everything that draws with it."""
