"""Linear layers whose weight is a function of fewer numbers, for training in less memory."""

from zoopt.nn.foreign import adopt_quantised
from zoopt.nn.gradnorm import GradNormLinear, convert_to_gradnorm
from zoopt.nn.linear import ReparametrisedLinear, merge
from zoopt.nn.lora_sb import LoRASBLinear, adapt_lora_to_sb, convert_to_lora_sb
from zoopt.nn.quantised import QuantisedLinear, convert_to_quantised, train_scales
from zoopt.nn.sltrain import SLTrainLinear, convert_to_sltrain
from zoopt.nn.sparse_delta import (
    SparseDeltaLinear,
    convert_to_sparse_delta,
    remove_sparse_delta,
)

#: The name of `convert_to_sltrain` in release 0.1.
convert = convert_to_sltrain

__all__ = [
    "GradNormLinear",
    "LoRASBLinear",
    "QuantisedLinear",
    "ReparametrisedLinear",
    "SLTrainLinear",
    "SparseDeltaLinear",
    "adapt_lora_to_sb",
    "adopt_quantised",
    "convert",
    "convert_to_gradnorm",
    "convert_to_lora_sb",
    "convert_to_quantised",
    "convert_to_sltrain",
    "convert_to_sparse_delta",
    "merge",
    "remove_sparse_delta",
    "train_scales",
]
