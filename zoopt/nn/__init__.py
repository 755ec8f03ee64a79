"""Linear layers whose weight is made of fewer numbers, for training in less memory."""

from zoopt.nn.gradnorm import GradNormLinear
from zoopt.nn.linear import ReparametrisedLinear, merge
from zoopt.nn.sltrain import SLTrainLinear, convert

__all__ = ["GradNormLinear", "ReparametrisedLinear", "SLTrainLinear", "convert", "merge"]
