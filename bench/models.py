"""Models of known sizes with random weights, built from their configurations alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers


@dataclasses.dataclass(frozen=True)
class Spec:
    summary: str
    config: Callable[[int], Any]


def _gpt2(seq: int, **sizes: Any) -> Any:
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2Config(n_positions=max(seq, 1024), **dropout, **sizes)


def _tiny(seq: int) -> Any:
    return _gpt2(
        seq, n_layer=2, n_embd=64, n_head=2, vocab_size=512, bos_token_id=0, eos_token_id=0
    )


def _llama(seq: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=max(seq, 2048),
        tie_word_embeddings=True,
    )


MODELS = {
    "gpt2": Spec("124M parameters, 12 layers, d 768, vocabulary 50257", _gpt2),
    "llama-1b": Spec("1.24B parameters, 16 layers, d 2048, vocabulary 128256", _llama),
    "tiny": Spec(
        "for a trial run",
        _tiny,
    ),
}


def build(name: str, seq: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The model for sequences of `seq` tokens, without dropout and without a cache of keys."""
    # It would warn that the configuration names no loss; the default one is meant.
    transformers.logging.set_verbosity_error()
    config = MODELS[name].config(seq)
    config.use_cache = False
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(device).eval()


@contextlib.contextmanager
def checkpointing(model: Any) -> Iterator[None]:
    """The model computes its layers' activations again in the backward pass."""
    # The second is the older name.
    enable, disable = (
        getattr(model, f"activation_checkpointing_{what}", None)
        or getattr(model, f"gradient_checkpointing_{what}")
        for what in ("enable", "disable")
    )
    enable({"use_reentrant": False})
    # transformers does so in training only; there is no dropout that this would turn on.
    model.train()
    try:
        yield
    finally:
        model.eval()
        disable()
