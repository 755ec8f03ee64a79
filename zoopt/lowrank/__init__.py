"""The projected optimizers, and `param_groups`.

Modules of release 0.1 stay importable under `zoopt.lowrank`; they live in `zoopt.first_order`.
"""

import importlib
import sys

from zoopt.first_order.adafactor import GaLoreAdafactor
from zoopt.first_order.adamw import AdamW
from zoopt.first_order.apollo import Apollo, ApolloMini
from zoopt.first_order.fira import Fira
from zoopt.first_order.frugal import Frugal
from zoopt.first_order.galore import GaLoreAdamW
from zoopt.first_order.gradnormlorp import GradNormLoRP
from zoopt.first_order.ldadam import LDAdamW
from zoopt.first_order.owlore import OwLore
from zoopt.first_order.projected.selection import param_groups
from zoopt.first_order.qgalore import QGaLoreAdamW

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

_METHODS = (
    *("adafactor", "adamw", "apollo", "fira", "frugal", "galore", "gradnormlorp", "ldadam"),
    *("owlore", "qgalore"),
)
_PARTS = (
    *("basis", "basis_codec", "codecs", "core", "geometry", "residuals", "rules", "selection"),
    *("sharded", "subspace"),
)
for _home, _names in (("zoopt.first_order", _METHODS), ("zoopt.first_order.projected", _PARTS)):
    for _name in _names:
        _module = importlib.import_module(f"{_home}.{_name}")
        sys.modules[f"{__name__}.{_name}"] = _module
        globals()[_name] = _module
