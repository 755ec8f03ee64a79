"""Plans from a few of the repeated layers, against plans that run every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zoopt.memory import plan
from zoopt.memory.depth import shortened, stacks_of
from zoopt.memory.methods import methods
from zoopt.memory.simulate import Simulation, fake
from zoopt.memory.spec import ModelSpec
from zoopt.memory.transformers_models import from_config

TEXT = {"num_attention_heads": 4, "vocab_size": 512}
ENCODER_DECODER = {
    "d_model": 64,
    "vocab_size": 512,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
#: Model type and configuration; layers enough for all methods of the table below.
DEEP: dict[str, dict[str, Any]] = {
    "llama": {**TEXT, **WIDTHS, "num_hidden_layers": 10, "num_key_value_heads": 2},
    # As many encoder layers as decoder layers are one family of stacks, others are two.
    "t5": {"d_model": 64, "d_ff": 128, "num_layers": 7, "num_heads": 4, "vocab_size": 512},
    "bart": {**ENCODER_DECODER, "encoder_layers": 6, "decoder_layers": 8},
}
FEW = {**TEXT, **WIDTHS, "num_hidden_layers": 4, "num_key_value_heads": 2}
METHODS = ["inference", "LOZO", "zoopt.AdamW, int8 state", "Fira", "SM3, fused backward"]
#: These treat some of the layers apart, or adapt them.
UNEVEN = ["MeZO, in place", "AdamW", "LoRA + AdamW", "OwLore, five layers"]
HYBRID = ["Hybrid, last two layers"]


def quiet(kind: str, content: dict[str, Any]) -> Any:
    return from_config(kind, kind, {"bos_token_id": 0, "eos_token_id": 0, **content})


def both(
    kind: str,
    content: dict[str, Any],
    names: list[str],
    dtype: torch.dtype = torch.bfloat16,
    *,
    checkpointing: bool = False,
    processes: int = 1,
) -> Simulation:
    """Compare the estimates, and return the shortened simulation."""
    with fake(dtype):
        spec = quiet(kind, content)
        short = Simulation(spec, checkpointing, 8, processes=processes)
        whole = Simulation(spec, checkpointing, 8, processes=processes, whole=True)
        for method in methods(8, 4):
            if method.name in names:
                assert short.estimate(method, 2) == whole.estimate(method, 2), method.name
    return short


@pytest.mark.parametrize(
    ("kind", "names"),
    [("llama", METHODS), ("llama", UNEVEN), ("llama", HYBRID), ("t5", METHODS), ("bart", METHODS)],
)
def test_few_layers_tell_the_whole_models_memory_to_the_byte(kind: str, names: list[str]) -> None:
    short = both(kind, DEEP[kind], names)
    assert short._whole is None, "every layer has run"


def test_few_layers_tell_it_with_checkpoints_in_float32() -> None:
    content = DEEP["llama"]
    assert both("llama", content, METHODS, torch.float32, checkpointing=True)._whole is None


def test_few_layers_tell_it_of_shards() -> None:
    # MeZO in fewer layers; others' copies go where their updates allocate, so every layer runs.
    assert both("llama", DEEP["llama"], ["MeZO"], processes=3)._whole is None
    both("llama", DEEP["llama"], ["LOZO", "ZOAdam"], processes=3)


def test_a_model_of_few_layers_runs_whole() -> None:
    assert both("llama", FEW, ["inference", "SGD"])._whole is not None


def test_stacks_are_found_by_pattern_and_cut_in_copies() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pattern = [nn.Linear(4, 4) if i % 3 else nn.Linear(4, 4, bias=False) for i in range(21)]
            self.layers = nn.ModuleList([nn.Linear(4, 8), *pattern, nn.Linear(8, 4)])
            self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(7))
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    model = Model()
    [family] = stacks_of(model, least=5)
    assert [(s.name, s.start, s.period, s.units) for s in family] == [
        ("layers", 1, 3, 7),
        ("norms", 0, 1, 7),
    ]
    few = shortened(model, [(stack, 3) for stack in family])
    assert len(few.layers) == 2 + 9
    assert len(few.norms) == 3
    assert few.layers[0].weight.shape == (8, 4)
    assert few.layers[-1].weight.shape == (4, 8)
    assert len(model.layers) == 23
    assert not stacks_of(model, least=8)


#: What transformers builds: a decoder with experts, encoders, encoder-decoders, images, audio.
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {**FEW, "num_local_experts": 4},
    "t5": {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 512},
    "bart": {**ENCODER_DECODER, "encoder_layers": 2, "decoder_layers": 2},
    "whisper": {**ENCODER_DECODER, "vocab_size": 51865, "encoder_layers": 2, "decoder_layers": 1},
    "vit": {**WIDTHS, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16},
    "deit": {**WIDTHS, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16},
    "wav2vec2": {**WIDTHS, "num_hidden_layers": 2, "conv_dim": (32,) * 7},
    "audio-spectrogram-transformer": {**WIDTHS, "num_hidden_layers": 2, "max_length": 128},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_builds_can_be_planned(kind: str, dtype: str) -> None:
    planned = plan(
        quiet(kind, KINDS[kind]), optimizers=["inference", "MeZO", "AdamW"], seq=16, dtype=dtype
    )
    assert planned["AdamW"].state >= 2 * planned["AdamW"].categories["parameters"] * 0.95
    assert planned["inference"].peak <= planned["MeZO"].peak < planned["AdamW"].peak
    grows = planned["AdamW"].per_token["backward"] != (0.0, 0.0)
    assert planned.sequential == (kind not in ("vit", "deit"))
    assert grows or kind in ("vit", "deit", "audio-spectrogram-transformer", "whisper")


def test_a_method_that_cannot_be_planned_is_a_row_with_its_reason() -> None:
    """GaLore's group wants linear layers, which this model has none of."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input * self.weight

    spec = ModelSpec("scale", lambda _: Scale(), lambda b, s: {"input": torch.ones(b, s, 8)})
    planned = plan(spec, seq=4)
    assert planned["MeZO"].peak
    assert "GaLoreAdamW" in planned.left_out
    assert "linear layer" in planned.left_out["GaLoreAdamW"]
    with pytest.raises(ValueError, match="linear layer"):
        plan(spec, seq=4, optimizers=["GaLoreAdamW"])


def test_the_default_sequence_is_no_longer_than_the_model() -> None:
    spec = quiet("gpt2", {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 100})
    assert plan(spec, optimizers=["inference"]).seq == 100
    with pytest.raises(ValueError, match="seq must be at most 100 for gpt2, got 101"):
        plan(spec, optimizers=["inference"], seq=101)
