"""Low-rank projected and quantised Adam: projector x rule x codec."""

from zoopt.lowrank.adafactor import GaLoreAdafactor
from zoopt.lowrank.adamw import AdamW
from zoopt.lowrank.apollo import Apollo, ApolloMini
from zoopt.lowrank.fira import Fira
from zoopt.lowrank.frugal import Frugal
from zoopt.lowrank.galore import GaLoreAdamW
from zoopt.lowrank.gradnormlorp import GradNormLoRP
from zoopt.lowrank.ldadam import LDAdamW
from zoopt.lowrank.owlore import OwLore
from zoopt.lowrank.qgalore import QGaLoreAdamW
from zoopt.lowrank.selection import param_groups

__all__ = [
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
    "param_groups",
]
