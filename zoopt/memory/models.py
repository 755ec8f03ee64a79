"""Finds a user's MODEL: a named architecture, a directory or config.json, or module:function."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zoopt.memory.spec import ModelSpec
from zoopt.memory.transformers_models import from_config

#: name -> model type and configuration, from the published config.json files.
_OPT = {
    "opt-125m": (768, 12, 12, 3072),
    "opt-1.3b": (2048, 24, 32, 8192),
    "opt-2.7b": (2560, 32, 32, 10240),
    "opt-6.7b": (4096, 32, 32, 16384),
    "opt-13b": (5120, 40, 40, 20480),
    "opt-30b": (7168, 48, 56, 28672),
    "opt-66b": (9216, 64, 72, 36864),
}
_GPT2 = {
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
#: width, layers, heads, key-value heads, inner width, vocabulary, tied embeddings.
_LLAMA = {
    "llama-60m": (512, 8, 8, 8, 1376, 32000, False),
    "llama-130m": (768, 12, 12, 12, 2048, 32000, False),
    "llama-350m": (1024, 24, 16, 16, 2736, 32000, False),
    "llama-1b": (2048, 24, 32, 32, 5461, 32000, False),
    "llama-7b": (4096, 32, 32, 32, 11008, 32000, False),
    "llama-13b": (5120, 40, 40, 40, 13824, 32000, False),
    "llama-30b": (6656, 60, 52, 52, 17920, 32000, False),
    "llama-65b": (8192, 80, 64, 64, 22016, 32000, False),
    "llama-70b": (8192, 80, 64, 8, 28672, 32000, False),
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256, False),
    "llama-3.2-1b": (2048, 16, 32, 8, 8192, 128256, True),
    "mistral-7b": (4096, 32, 32, 8, 14336, 32000, False),
    "smollm2-135m": (576, 30, 9, 3, 1536, 49152, True),
}
_QWEN = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 4864, 151936, True),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 8960, 151936, True),
    "qwen2.5-7b": (3584, 28, 28, 4, 18944, 152064, False),
}
_BERT = {
    "bert-base": ("bert", 768, 12, 12, 30522, 512),
    "bert-large": ("bert", 1024, 24, 16, 30522, 512),
    "roberta-base": ("roberta", 768, 12, 12, 50265, 514),
    "roberta-large": ("roberta", 1024, 24, 16, 50265, 514),
}


def names() -> list[str]:
    """The named architectures."""
    return [*_GPT2, *_OPT, *_LLAMA, *_QWEN, *_BERT]


def resolve(model: str) -> ModelSpec:
    """The model of that name, directory, config.json or module:function.

    A function takes (batch, seq) and returns any nn.Module and the keyword arguments of its call.

    Raises:
        ValueError: there is no such model.
        ImportError: transformers is not installed.
    """
    if ":" in model and not os.path.exists(model):
        return _from_function(model)
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"MODEL must be a JSON configuration, got {path}: {error}") from None
        kind = content.pop("model_type", None)
        if kind is None:
            raise ValueError(
                f"MODEL must be the config.json of a transformers model, got {path}, "
                f"which has no 'model_type'"
            )
        return from_config(model, kind, content)
    kind, content = _named(model.lower())
    return from_config(model, kind, content)


def _named(name: str) -> tuple[str, dict[str, Any]]:
    if name in _GPT2:
        width, layers, heads = _GPT2[name]
        return "gpt2", {"n_embd": width, "n_layer": layers, "n_head": heads}
    if name in _OPT:
        width, layers, heads, inner = _OPT[name]
        return "opt", {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "ffn_dim": inner,
            "word_embed_proj_dim": width,
        }
    if name in _LLAMA or name in _QWEN:
        kind = "llama" if name in _LLAMA else "qwen2"
        width, layers, heads, kv_heads, inner, vocabulary, tied = {**_LLAMA, **_QWEN}[name]
        return kind, {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": inner,
            "vocab_size": vocabulary,
            "tie_word_embeddings": tied,
        }
    if name in _BERT:
        kind, width, layers, heads, vocabulary, positions = _BERT[name]
        return kind, {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "vocab_size": vocabulary,
            "max_position_embeddings": positions,
        }
    raise ValueError(
        f"MODEL must be a directory, a config.json, module:function or one of "
        f"{', '.join(names())}; got {name!r}"
    )


def _from_function(name: str) -> ModelSpec:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"MODEL must be module:function that can be imported from here, got {name!r}: {error}"
        ) from None
    finally:
        sys.path.pop(0)

    def build(checkpointing: bool) -> nn.Module:
        if checkpointing:
            raise ValueError(f"--checkpointing needs a transformers model, got {name!r}")
        model: nn.Module = function(1, 1)[0]
        return model

    def inputs(batch: int, seq: int) -> Mapping[str, Any]:
        arguments: Mapping[str, Any] = function(batch, seq)[1]
        return arguments

    return ModelSpec(name, build, inputs)
