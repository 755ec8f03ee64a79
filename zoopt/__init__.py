"""Memory-efficient optimizers for PyTorch.

Zeroth order (the memory of inference): `MeZO`.
"""

from zoopt import kernels, noise
from zoopt.zeroth_order import MeZO

__all__ = ["MeZO", "kernels", "noise"]
__version__ = "0.1.0"
