"""Memory-efficient optimizers for PyTorch."""
