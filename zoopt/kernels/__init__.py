"""Fused kernels: the PyTorch reference, numba on the CPU and Triton on the GPU, with equal bits."""

from zoopt.kernels.dispatch import available_impls
from zoopt.kernels.ops import apply_, momentum_, perturb, perturb_rows

__all__ = ["apply_", "available_impls", "momentum_", "perturb", "perturb_rows"]
