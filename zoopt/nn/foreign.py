"""Reads the frozen weights of linear layers: ours, plain ones, torchao's and bitsandbytes'.

Neither package is imported unless a layer of its is there.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from zoopt.checks import check_choice
from zoopt.nn.linear import check_inside, check_no_hooks
from zoopt.nn.modules import Target, foreign_kind, linear_layers
from zoopt.nn.quantised import FORMS, Codes, Form, QuantisedLinear

#: torchao's tensors with a code of 8 bits in memory for each weight, and a scale for each block.
_TORCHAO = ("Int8Tensor", "IntxUnpackedToInt8Tensor")


def _kind(layer: nn.Module) -> str:
    """What a layer is: "ours", "4bit" or "8bit" (bitsandbytes), "torchao", "plain"."""
    if isinstance(layer, QuantisedLinear):
        return "ours"
    if (kind := foreign_kind(layer)) is not None:
        return kind
    if isinstance(layer, nn.Linear):
        return "plain"
    raise TypeError(
        f"a layer must be an nn.Linear or a quantised one of zoopt, torchao or bitsandbytes, got "
        f"{type(layer).__name__}"
    )


def is_quantised(layer: nn.Module) -> bool:
    """Whether it is a quantised linear layer of zoopt, torchao or bitsandbytes."""
    return (isinstance(layer, nn.Linear | QuantisedLinear)) and _kind(layer) != "plain"


def frozen_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that a layer's weight had before it was quantised."""
    kind, own = _kind(layer), _attributes(layer)
    if kind == "4bit":
        dtype: torch.dtype = _quant_state(layer).dtype
    elif kind == "8bit":
        dtype = torch.float16 if own.bias is None else own.bias.dtype
    else:
        dtype = own.dtype if kind == "ours" else own.weight.dtype
    return dtype


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """A copy of a layer's weight, (out, in), dequantised."""
    kind, own = _kind(layer), _attributes(layer)
    if kind == "ours":
        made: Tensor = own.weight_of(own.scale, dtype)
    elif kind == "4bit":
        functional = importlib.import_module("bitsandbytes.functional")
        made = functional.dequantize_4bit(own.weight.data, _quant_state(layer))
    elif kind == "8bit":
        codes, scale = _int8(layer)
        made = codes.to(scale.dtype) * scale.unsqueeze(1)
    elif kind == "torchao":
        made = own.weight.dequantize()
    else:
        return own.weight.detach().to(dtype, copy=True)  # type: ignore[no-any-return]
    return made.detach().to(dtype)


def codes_of(layer: nn.Module) -> Codes:
    """The codes, scales and zero points of a quantised layer of torchao or bitsandbytes.

    Raises:
        TypeError: it has another format, or none.
        ValueError: its blocks do not divide its rows, or it has not been quantised yet.
    """
    kind, own = _kind(layer), _attributes(layer)
    if kind == "4bit":
        return _codes_4bit(layer)
    if kind == "8bit":
        codes, scale = _int8(layer)
        made, zero = _unsigned(codes, torch.zeros_like(scale, dtype=torch.int8), 8)
        n = codes.shape[1]
        return Codes(made, scale.unsqueeze(1), zero.unsqueeze(1), 8, n, frozen_dtype(layer))
    if kind != "torchao" or type(own.weight.data).__name__ not in _TORCHAO:
        what = type(own.weight.data).__name__ if kind == "torchao" else type(layer).__name__
        raise TypeError(
            f"a layer must be quantised by torchao with {' or '.join(_TORCHAO)} weights, or by "
            f"bitsandbytes, got {what}; quantise by IntxWeightOnlyConfig(weight_dtype=torch.int4)"
        )
    weight = own.weight.data
    target = str(getattr(weight, "target_dtype", torch.int8))  # "torch.int4"
    bits, n = int(target.rpartition("int")[2]), weight.shape[1]
    points = weight.zero_point
    if points is None:
        points = torch.zeros_like(weight.scale, dtype=torch.int8)
    codes, zero = _unsigned(weight.qdata, points, bits)
    size = int(weight.block_size[-1])
    if n % size:
        raise ValueError(f"blocks must divide a row of {n} weights, got blocks of {size}")
    shape = (weight.shape[0], n // size)
    scale = weight.scale.float().reshape(shape)
    return Codes(codes, scale, zero.reshape(shape), bits, size, weight.dtype)


def adopt_quantised(
    model: nn.Module, target: Target = "linear", *, form: Form = "linear"
) -> nn.Module:
    """Replace quantised linear layers of torchao and bitsandbytes by `QuantisedLinear` layers with
    their codes and scales, so that the scales can train (PEQA, QZO).

    The weights stay the same. Integer codes become packed ones. bitsandbytes' 4-bit codes (NF4,
    FP4) keep their table of values, and their scales, if these are quantised too, become float32.

    Args:
        model: changed in place.
        target: which layers; as for `zoopt.lowrank.param_groups`. Layers that are not quantised
            stay as they are.
        form: as for `QuantisedLinear`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: an argument is out of range, no quantised layer matches, or one has
            an unknown format. The model is then unchanged.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(name, quantization_config=bnb_config)
        >>> zoopt.nn.adopt_quantised(model, form="log")
        >>> opt = zoopt.MeZO(zoopt.nn.train_scales(model), lr=2e-2, zo_eps=1e-2)
    """
    check_choice("form", form, FORMS)
    layers = linear_layers(model, target)
    layers = {name: layer for name, layer in layers.items() if is_quantised(layer)}
    if not layers:
        raise ValueError(
            "model must have quantised layers of torchao or bitsandbytes, got none; quantise a "
            "float model by zoopt.nn.convert_to_quantised(model)"
        )
    check_inside(layers)
    check_no_hooks(layers)
    built = {}
    for name, layer in layers.items():
        bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
        built[name] = QuantisedLinear(codes_of(layer), bias, form=form)
    for name, made in built.items():
        model.set_submodule(name, made.train(layers[name].training))
    return model


def _attributes(layer: nn.Module) -> Any:
    return layer


def _unsigned(codes: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Signed codes and zero points as uint8 of that many bits."""
    offset = 1 << (bits - 1)
    return tuple((each.short() + offset).to(torch.uint8) for each in (codes, zero))  # type: ignore[return-value]


def _int8(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The codes, int8 (out, in), and the scale of each row of an 8-bit layer of bitsandbytes."""
    own = _attributes(layer)
    largest = own.weight.SCB if getattr(own.weight, "SCB", None) is not None else own.state.SCB
    codes = own.weight.data
    if codes.dtype != torch.int8 or largest is None:
        raise ValueError(
            f"an 8-bit layer of bitsandbytes must be quantised, got a weight of {codes.dtype}; "
            f"make it with has_fp16_weights=False, and move it to its device first"
        )
    return codes, largest.float() / 127.0


def _quant_state(layer: nn.Module) -> Any:
    state = getattr(_attributes(layer).weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        what = "without" if state is None else "repacked for inference"
        raise ValueError(
            f"a 4-bit layer of bitsandbytes must be quantised, got one {what}; move it to its "
            f"device first, and convert it before a forward pass in evaluation mode"
        )
    return state


def _codes_4bit(layer: nn.Module) -> Codes:
    state, own = _quant_state(layer), _attributes(layer)
    (m, n), size = tuple(state.shape), int(state.blocksize)
    if n % size:
        raise ValueError(
            f"blocks must divide a row of {n} weights, got blocks of {size}; choose layers by "
            f"target without it"
        )
    scale = state.absmax
    if state.nested:
        functional = importlib.import_module("bitsandbytes.functional")
        scale = functional.dequantize_blockwise(scale, state.state2) + state.offset
    packed = own.weight.data.view(torch.uint8).view(-1)
    # The first of two codes is in the high half of a byte.
    codes = torch.stack((packed >> 4, packed & 15), -1).view(m, n)
    return Codes(codes, scale.float().view(m, -1), None, 4, size, state.dtype, state.code.float())
