"""Fused kernels: the PyTorch reference, numba on the CPU and Triton on the GPU, with equal bits."""

from zoopt.kernels.adam.op import adam_, adamw_
from zoopt.kernels.adam.op_average import average_, lerp_, store_
from zoopt.kernels.dispatch import available_impls
from zoopt.kernels.noise.key import Distribution, NoiseKey
from zoopt.kernels.noise.op import perturb, perturb_rows
from zoopt.kernels.noise.op_update import adam_window_, add_, apply_, momentum_, write_each_
from zoopt.kernels.noise.writes import Write
from zoopt.kernels.product.op import add_product_, squares
from zoopt.kernels.sm3.op import sm3_

__all__ = [
    "Distribution",
    "NoiseKey",
    "Write",
    "adam_",
    "adam_window_",
    "adamw_",
    "add_",
    "add_product_",
    "apply_",
    "available_impls",
    "average_",
    "lerp_",
    "momentum_",
    "perturb",
    "perturb_rows",
    "sm3_",
    "squares",
    "store_",
    "write_each_",
]
