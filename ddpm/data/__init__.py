"""Data: a dataset id, folder or file becomes uint8 pixels, and these become batches."""
