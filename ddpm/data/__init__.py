"""A dataset id, a folder or a file in; uint8 pixels, batches and a data report out."""
