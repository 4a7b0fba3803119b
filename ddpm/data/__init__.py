"""A dataset id, folder or file -> uint8 pixels -> batches."""
