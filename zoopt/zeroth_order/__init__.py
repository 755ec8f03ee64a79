"""Zeroth-order optimizers: gradients estimated from forward passes, directions from seeds."""

from zoopt.zeroth_order.adam import ZOAdam
from zoopt.zeroth_order.conmezo import ConMeZO
from zoopt.zeroth_order.conservative import ZOConservativeSGD
from zoopt.zeroth_order.engine.probe import StepRecord
from zoopt.zeroth_order.evolution import EvolutionStrategy
from zoopt.zeroth_order.forward_grad import ForwardGrad
from zoopt.zeroth_order.fzoo import FZOO
from zoopt.zeroth_order.hizoo import HiZOO
from zoopt.zeroth_order.hybrid import Hybrid
from zoopt.zeroth_order.lozo import LOZO
from zoopt.zeroth_order.mezo import MeZO
from zoopt.zeroth_order.muon import ZOMuon
from zoopt.zeroth_order.sign import ZOSignSGD
from zoopt.zeroth_order.subzero import SubZero

__all__ = [
    "FZOO",
    "LOZO",
    "ConMeZO",
    "EvolutionStrategy",
    "ForwardGrad",
    "HiZOO",
    "Hybrid",
    "MeZO",
    "StepRecord",
    "SubZero",
    "ZOAdam",
    "ZOConservativeSGD",
    "ZOMuon",
    "ZOSignSGD",
]
