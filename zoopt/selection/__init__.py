"""Which parameters train."""

from zoopt.selection.half_fine_tuning import HalfFineTuning

__all__ = ["HalfFineTuning"]
