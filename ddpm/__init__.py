"""Train, publish and sample diffusion models; docs/architecture.md has the map of the packages."""

__version__ = "0.4.0"
"""Also in CITATION.cff and CHANGELOG.md."""
