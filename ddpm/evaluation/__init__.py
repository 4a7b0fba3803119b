"""A model and real images in; metrics, comparisons and plots out."""
