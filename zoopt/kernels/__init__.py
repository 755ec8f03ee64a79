"""Fused kernels: the PyTorch reference, numba on the CPU and Triton on the GPU, with equal bits."""

from zoopt.kernels.dispatch import available_impls
from zoopt.kernels.ops import perturb, perturb_rows
from zoopt.kernels.ops_adam import adam_, adamw_
from zoopt.kernels.ops_product import add_product_
from zoopt.kernels.ops_sm3 import sm3_
from zoopt.kernels.ops_update import adam_window_, add_, apply_, momentum_

__all__ = [
    "adam_",
    "adam_window_",
    "adamw_",
    "add_",
    "add_product_",
    "apply_",
    "available_impls",
    "momentum_",
    "perturb",
    "perturb_rows",
    "sm3_",
]
