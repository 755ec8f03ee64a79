"""Low-rank projected and quantised Adam: projector x rule x codec."""

from zoopt.lowrank.adamw import AdamW
from zoopt.lowrank.galore import GaLoreAdamW
from zoopt.lowrank.selection import param_groups

__all__ = ["AdamW", "GaLoreAdamW", "param_groups"]
