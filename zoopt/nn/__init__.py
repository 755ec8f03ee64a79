"""Linear layers whose weight is a function of fewer numbers, for training in less memory."""

from zoopt.nn.gradnorm import GradNormLinear, convert_to_gradnorm
from zoopt.nn.linear import ReparametrisedLinear, merge
from zoopt.nn.quantised import QuantisedLinear, convert_to_quantised, train_scales
from zoopt.nn.sltrain import SLTrainLinear, convert_to_sltrain

#: The name of `convert_to_sltrain` in release 0.1.
convert = convert_to_sltrain

__all__ = [
    "GradNormLinear",
    "QuantisedLinear",
    "ReparametrisedLinear",
    "SLTrainLinear",
    "convert",
    "convert_to_gradnorm",
    "convert_to_quantised",
    "convert_to_sltrain",
    "merge",
    "train_scales",
]
