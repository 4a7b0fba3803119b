"""How good a model is: features, metrics, memorization, comparisons."""
