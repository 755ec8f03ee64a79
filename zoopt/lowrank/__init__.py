"""Low-rank projected and quantised Adam: projector x rule x codec."""

from zoopt.lowrank.adamw import AdamW
from zoopt.lowrank.galore import GaLoreAdamW

__all__ = ["AdamW", "GaLoreAdamW"]
