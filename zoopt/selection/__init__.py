"""Which parameters train."""

from zoopt.selection.delta import apply_delta, remove_delta, sparse_delta
from zoopt.selection.half_fine_tuning import HalfFineTuning
from zoopt.selection.spiel import SparseDeltaAdamW

__all__ = ["HalfFineTuning", "SparseDeltaAdamW", "apply_delta", "remove_delta", "sparse_delta"]
