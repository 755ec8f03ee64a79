"""Models to measure on: built from their configurations alone, with random weights."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from zoopt.memory.models import names, resolve
from zoopt.memory.spec import ModelSpec

#: A model for a trial run.
TINY = "tiny"
_TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512}


def spec(name: str) -> ModelSpec:
    """The model of that name, as `zoopt plan` takes it, or the tiny one.

    Raises:
        ValueError: there is no such model.
        ImportError: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is not None:
        transformers: Any = importlib.import_module("transformers")
        # It would warn that the configuration names no loss; the default one is intended.
        transformers.logging.set_verbosity_error()
    if name != TINY:
        return resolve(name)
    transformers = importlib.import_module("transformers")
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**_TINY, **ids, use_cache=False)

    def inputs(batch: int, seq: int) -> dict[str, Any]:
        tokens = torch.arange(batch * seq).remainder(config.vocab_size).view(batch, seq)
        return {"input_ids": tokens, "labels": tokens}

    def tiny(checkpointing: bool) -> nn.Module:
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        return model

    return ModelSpec(TINY, tiny, inputs, config.n_positions)


def add_argument(arguments: argparse.ArgumentParser, default: str) -> None:
    """`--model`: any name that `spec` accepts."""

    def known(text: str) -> str:
        try:
            spec(text)
        except (ImportError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    choice = f"a directory or config.json, module:function, {TINY}, {', '.join(names())}"
    arguments.add_argument("--model", type=known, default=default, help=choice)


def build(model: ModelSpec, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The model on the device, without dropout."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            built = model.build(False)
    finally:
        torch.set_default_dtype(default)
    for module in built.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            # Layers that call the function keep its probability in this attribute.
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    # A buffer that was computed from a list is on the CPU.
    return built.to(device).eval()


def inputs_on(model: ModelSpec, batch: int, seq: int, device: torch.device | str) -> dict[str, Any]:
    """The model's inputs, on the device."""
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in model.inputs(batch, seq).items()
    }


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Switch activation checkpointing on.

    Raises:
        ValueError: the model offers no activation checkpointing.
    """
    # The second is the older name.
    enable, disable = (
        getattr(model, f"activation_checkpointing_{what}", None)
        or getattr(model, f"gradient_checkpointing_{what}", None)
        for what in ("enable", "disable")
    )
    if enable is None or disable is None:
        raise ValueError(f"{type(model).__name__} offers no activation checkpointing")
    enable({"use_reentrant": False})
    # transformers checkpoints in training mode only. The model has no dropout to be turned on.
    model.train()
    try:
        yield
    finally:
        model.eval()
        disable()
