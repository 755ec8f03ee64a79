"""First-order optimizers in little memory, one file for each method."""

from zoopt.first_order.adafactor import GaLoreAdafactor
from zoopt.first_order.adamw import AdamW
from zoopt.first_order.apollo import Apollo, ApolloMini
from zoopt.first_order.fira import Fira
from zoopt.first_order.frugal import Frugal
from zoopt.first_order.fused_backward import fuse_backward
from zoopt.first_order.galore import GaLoreAdamW
from zoopt.first_order.gradnormlorp import GradNormLoRP
from zoopt.first_order.ldadam import LDAdamW
from zoopt.first_order.owlore import OwLore
from zoopt.first_order.qgalore import QGaLoreAdamW
from zoopt.first_order.sm3 import SM3

__all__ = [
    "SM3",
    "AdamW",
    "Apollo",
    "ApolloMini",
    "Fira",
    "Frugal",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GradNormLoRP",
    "LDAdamW",
    "OwLore",
    "QGaLoreAdamW",
    "fuse_backward",
]
