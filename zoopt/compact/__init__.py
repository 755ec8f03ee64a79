"""The former home of SM3, kept importable."""

from zoopt.first_order.sm3 import SM3

__all__ = ["SM3"]
