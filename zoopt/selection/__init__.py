"""Which parameters train."""

from zoopt.selection.cofitune import CoFiTune
from zoopt.selection.delta import apply_delta, remove_delta, sparse_delta
from zoopt.selection.ggpo import LoRAGGPO
from zoopt.selection.green_trainer import GreenTrainer
from zoopt.selection.half_fine_tuning import HalfFineTuning
from zoopt.selection.qes import QES
from zoopt.selection.spiel import SparseDeltaAdamW

__all__ = [
    "QES",
    "CoFiTune",
    "GreenTrainer",
    "HalfFineTuning",
    "LoRAGGPO",
    "SparseDeltaAdamW",
    "apply_delta",
    "remove_delta",
    "sparse_delta",
]
