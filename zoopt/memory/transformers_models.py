"""Models that transformers builds from a configuration, and their inputs.

Decoders, encoders, encoder-decoders, and models of images and of audio.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoopt.memory.spec import ModelSpec

#: Encoders that transformers can also build as decoders.
_ENCODERS = ("bert", "roberta", "electra", "deberta", "deberta-v2", "distilbert")
#: For each main input, the classes with which a model is trained; the first possible one is used.
_HEADS = {
    "input_ids": ("CausalLM", "MaskedLM", "ImageTextToText"),
    "pixel_values": ("ImageClassification", "MaskedImageModeling"),
    "input_values": ("CTC", "AudioClassification"),
    "input_features": ("AudioClassification",),
}
_ENCODER_DECODER_HEADS = ("SpeechSeq2Seq", "Seq2SeqLM")
#: Settings that need values are switched off: random masks of frames, layers skipped at random.
_SETTINGS = {
    "apply_spec_augment": False,
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
}
_LARGEST_TARGETS = ("max_target_positions", "n_positions", "max_position_embeddings")


def from_config(name: str, kind: str, content: Mapping[str, Any]) -> ModelSpec:
    """The model of a configuration.

    Args:
        name: what the user called it.
        kind: the configuration's model_type.
        content: the rest of it.

    Raises:
        ValueError: transformers does not know the model_type, or cannot build the model.
        ImportError: transformers is not installed.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.for_model(kind, **content)
    except ValueError:
        raise ValueError(
            f"MODEL {name!r} has model_type {kind!r}, which this version of transformers "
            f"({transformers.__version__}) does not know; upgrade it"
        ) from None
    config.use_cache = False
    text = config.get_text_config()
    for setting, value in _SETTINGS.items():
        if getattr(config, setting, None) is not None:
            setattr(config, setting, value)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    factory, main_input = _factory(transformers, config, kind)

    def build(checkpointing: bool) -> nn.Module:
        model: nn.Module = factory.from_config(config)
        if checkpointing:
            enable_checkpointing(model)
        return model

    limit = _longest(config, text, kind)
    make = _INPUTS[main_input]

    def inputs(batch: int, seq: int) -> Mapping[str, Any]:
        if limit is not None and seq > limit:
            raise ValueError(f"seq must be at most {limit} for {name}, got {seq}")
        return make(config, text, batch, seq)

    return ModelSpec(name, build, inputs, limit, sequential=main_input != "pixel_values")


def enable_checkpointing(model: nn.Module) -> None:
    """Switch a transformers model's activation checkpointing on."""
    # The second is the older name.
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ImportError(
            "planning a transformers model needs transformers; pip install 'zoopt-torch[demo]'"
        ) from None


def _factory(transformers: Any, config: Any, kind: str) -> tuple[Any, str]:
    """The class that builds the model with its training head, and the model's main input."""
    heads = [head for choices in _HEADS.values() for head in choices]
    if config.is_encoder_decoder:
        heads = [*_ENCODER_DECODER_HEADS, *heads]
    for head in heads:
        factory = getattr(transformers, f"AutoModelFor{head}")
        if head == "CausalLM" and kind in _ENCODERS:
            continue
        if type(config) in factory._model_mapping:
            model = factory._model_mapping[type(config)]
            if isinstance(model, tuple):
                # A saved configuration lists its architectures, which decides between several
                # classes.
                model = model[0]
                config.architectures = config.architectures or [model.__name__]
            main_input = model.main_input_name
            if main_input in _INPUTS:
                return factory, main_input
    raise ValueError(
        f"MODEL must be a model of text, images or audio that transformers can train, got "
        f"model_type {kind!r}; pass module:function, which returns the model and its inputs"
    )


def _longest(config: Any, text: Any, kind: str) -> int | None:
    """The longest sequence that the model has positions for."""
    names = _LARGEST_TARGETS if config.is_encoder_decoder else ("max_position_embeddings",)
    for name in names:
        limit: int | None = getattr(text, name, None)
        if limit is not None:
            # The positions of these begin at 2.
            return limit - 2 if kind in ("roberta", "xlm-roberta") else limit
    return None


def _ids(vocabulary: int, batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).remainder(vocabulary).view(batch, length)


def _text(config: Any, text: Any, batch: int, seq: int) -> Mapping[str, Any]:
    ids = _ids(text.vocab_size, batch, seq)
    return {"input_ids": ids, "labels": ids}


def _image(config: Any, text: Any, batch: int, seq: int) -> Mapping[str, Any]:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    return {
        "pixel_values": torch.zeros(batch, channels, height, width),
        "labels": torch.zeros(batch, dtype=torch.int64),
    }


def _waveform(config: Any, text: Any, batch: int, seq: int) -> Mapping[str, Any]:
    """`seq` frames of samples; for models that read spectrograms, one of the whole window."""
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None:
        return {"input_values": torch.zeros(batch, config.max_length, bins)}
    stride = math.prod(getattr(config, "conv_stride", (320,)))
    return {"input_values": torch.zeros(batch, seq * stride + stride)}


def _spectrogram(config: Any, text: Any, batch: int, seq: int) -> Mapping[str, Any]:
    """`seq` frames; for an encoder-decoder, the whole window of audio and `seq` tokens of text."""
    bins = getattr(config, "num_mel_bins", 80)
    if not config.is_encoder_decoder:
        return {"input_features": torch.zeros(batch, seq, bins)}
    frames = 2 * getattr(config, "max_source_positions", 1500)
    features = torch.zeros(batch, bins, frames)
    return {"input_features": features, "labels": _ids(config.vocab_size, batch, seq)}


_INPUTS: dict[str, Callable[[Any, Any, int, int], Mapping[str, Any]]] = {
    "input_ids": _text,
    "pixel_values": _image,
    "input_values": _waveform,
    "input_features": _spectrogram,
}
