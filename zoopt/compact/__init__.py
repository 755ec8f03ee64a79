"""Compact state: second moments in a few numbers a row and column."""

from zoopt.compact.sm3 import SM3

__all__ = ["SM3"]
