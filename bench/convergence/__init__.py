"""Zeroth-order methods at one budget of forward passes: `python -m bench.convergence`."""
