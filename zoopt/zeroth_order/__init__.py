"""Zeroth-order optimizers: gradients estimated from forward passes, directions from seeds."""

from zoopt.zeroth_order.mezo import MeZO
from zoopt.zeroth_order.probe import StepRecord

__all__ = ["MeZO", "StepRecord"]
