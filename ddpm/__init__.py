"""Train, publish and sample diffusion models; docs/architecture.md has the map of the packages."""
