"""A published pipeline, a folder or a checkpoint in; images, each a function of its seed, out."""
