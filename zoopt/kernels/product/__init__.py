"""Writes of a low-rank product to a weight: theta <- round(decay theta + alpha L R^T)."""
