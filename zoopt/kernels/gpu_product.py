"""theta plus a low-rank product on the GPU."""

from zoopt.kernels.reference_product import add_product

__all__ = ["add_product"]
