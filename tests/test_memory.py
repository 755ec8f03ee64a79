"""The planner, the meter, and that they agree."""

from __future__ import annotations

import functools
import gc
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import zoopt
from bench import paper_memory
from zoopt.cli import main
from zoopt.first_order.projected import core
from zoopt.memory import measure, plan, simulate
from zoopt.memory.measure import measure_here
from zoopt.memory.meter import StorageMeter
from zoopt.memory.methods import Method, methods
from zoopt.memory.models import names, resolve
from zoopt.memory.spec import ModelSpec
from zoopt.zeroth_order.engine.windows import WINDOW_BYTES

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 1000,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 512,
        "vocab_size": 1000,
        "word_embed_proj_dim": 128,
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 344,
        "vocab_size": 1000,
    },
    "bert": {
        "model_type": "bert",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 1000,
    },
}
#: Each with each model: forward passes only, plain and projected Adam, codes, factors, adapters.
METHODS = [
    *("inference", "MeZO", "MeZO, in place", "LOZO", "ZOAdam"),
    *("SGD", "AdamW", "zoopt.AdamW", "zoopt.AdamW, int8 state", "GaLoreAdamW", "SM3"),
    *("Apollo", "Fira", "SM3, fused backward", "LoRA + AdamW", "PEQA int4 + AdamW"),
    *("Hybrid, last two layers", "SparseDeltaAdamW over int4", "LoRA-SB + AdamW"),
]
#: What chooses which parameters train, and what wraps optimizers; with the steps after which all
#: that trains in turn has state.
CHOOSING = {
    "MeZO, QZO int4": 2,
    "QES int4": 2,
    "SparseDeltaAdamW": 2,
    "HalfFineTuning + zoopt.AdamW": 8,
    "GreenTrainer + zoopt.AdamW": 8,
    "CoFiTune + zoopt.AdamW": 2,
    "LoRA-GGPO + zoopt.AdamW": 2,
}
BATCH, SEQ, RANK = 2, 32, 16


@pytest.fixture(scope="module")
def _unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _imports_are_not_collected(_unfrozen: None) -> None:
    """Each measurement collects garbage, which walks over all that torch and transformers made."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("torch._dynamo")
    gc.collect()
    gc.freeze()


@pytest.fixture
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS[request.param]))
    return resolve(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("spec", "steps"),
    [*((kind, dict.fromkeys(METHODS, 2)) for kind in CONFIGS), ("llama", CHOOSING)],
    indirect=["spec"],
    ids=[*CONFIGS, "llama-choosing"],
)
def test_planned_peaks_are_measured_ones(
    spec: ModelSpec, steps: dict[str, int], dtype: str
) -> None:
    """Within 5 %, and the optimizer's state to the byte."""
    known = {method.name: method for method in methods(RANK, 8)}
    planned = plan(spec, optimizers=[*steps], batch=BATCH, seq=SEQ, dtype=dtype, rank=RANK)
    for name, count in steps.items():
        real = measure_here(
            spec, known[name], batch=BATCH, seq=SEQ, dtype=getattr(torch, dtype), steps=count
        )
        estimate = planned[name]
        assert estimate.state == real.state, name
        # A model of few layers takes most while it is quantised, before the steps.
        later = max(peak for phase, peak in real.phases.items() if phase != "load")
        assert estimate.peak == pytest.approx(later if name in CHOOSING else real.peak, rel=0.05), (
            name
        )
        assert sum(estimate.categories.values()) == estimate.peak
        assert sum(real.categories.values()) == real.peak


@pytest.mark.parametrize("spec", ["llama"], indirect=True)
def test_every_method_can_be_planned(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is allocated: no operator falls back to real tensors of the same shapes."""
    strict = functools.partial(FakeTensorMode, allow_fallback_kernels=False)
    monkeypatch.setattr(simulate, "FakeTensorMode", strict)
    planned = plan(spec, batch=1, seq=16, rank=8)
    assert {estimate.name for estimate in planned.estimates} == {m.name for m in methods()}
    assert not planned.left_out
    peaks = [estimate.peak for estimate in planned.estimates]
    assert peaks == sorted(peaks)
    forward = planned["inference"].peak
    assert planned["MeZO"].peak == pytest.approx(forward, rel=0.01)
    assert planned["AdamW"].peak > planned["GaLoreAdamW, int8 state"].peak > 1.5 * forward
    with pytest.raises(KeyError, match="'Adam' is not in the plan"):
        planned["Adam"]


@pytest.mark.parametrize("spec", ["llama"], indirect=True)
def test_a_gpu_updates_the_matrices_of_a_shape_together(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projected ones, in windows, with what is made of them; where backward is fused, those of a
    layer, whose gradients are there."""
    alone = ["AdamW", "zoopt.AdamW, int8 state", "SM3", "SM3, fused backward"]
    options: dict[str, Any] = {"seq": 4, "rank": RANK, "optimizers": [*alone, "Fira"]}
    cpu, gpu = (plan(spec, gpu=gpu, **options) for gpu in (False, True))
    for name in alone:
        assert gpu[name].phases["update"] <= cpu[name].phases["update"]
        assert gpu[name].state == cpu[name].state
    fused = "SM3, fused backward"
    with torch.device("meta"):
        model = spec.build(False)
    names = [name for name, _ in model.named_parameters() if ".layers.0." in name]
    layer = sum(model.get_parameter(name).numel() for name in names) * 2
    assert gpu[fused].categories["gradients"] == layer
    assert 0 < gpu[fused].peak - cpu[fused].peak < layer
    window = gpu["Fira"].phases["update"]
    assert sum(gpu["Fira"].categories.values()) == gpu["Fira"].peak
    monkeypatch.setattr(core, "WINDOW", 1)
    single = plan(spec, gpu=True, **options)["Fira"].phases["update"]
    # Two layers have four matrices of (344, 128): R and its direction of three more, float32, and
    # what else is made of them, such as factors and bases.
    more = 3 * 344 * RANK * 4
    assert 2 * more <= window - single <= 6 * more


@pytest.mark.parametrize(
    ("spec", "limit"), [("llama", WINDOW_BYTES), ("opt", 100_000)], indirect=["spec"]
)
def test_a_gpu_has_buffers_of_perturbed_weights(
    spec: ModelSpec, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, or two that meet at an operator of several parameters; in methods that are perturbed
    virtually and by independent elements, in their forward passes."""
    monkeypatch.setattr(simulate, "WINDOW_BYTES", limit)
    names = [method.name for method in methods() if method.kind == "zeroth-order"]
    options: dict[str, Any] = {"seq": 4, "rank": RANK, "optimizers": [*names, "AdamW"]}
    cpu, gpu = (plan(spec, gpu=gpu, **options) for gpu in (False, True))
    assert (cpu.gpu, gpu.gpu) == (False, True)
    with torch.device("meta"):
        params = list(spec.build(False).parameters())
    small = sum(2 * param.numel() for param in params if 2 * param.numel() < limit)
    buffers = min(limit * (1 if spec.name.startswith("llama") else 2), small)
    grown = {}
    for name in names:
        before, after = cpu[name], gpu[name]
        assert sum(after.categories.values()) == after.peak == max(after.phases.values())
        grown[name] = {phase: peak - before.phases[phase] for phase, peak in after.phases.items()}
        assert after.state == before.state
        for phase, more in grown[name].items():
            assert more == 0 or phase.startswith("forward"), name
    assert grown["MeZO"]["forward -"] == buffers
    workspace = gpu["MeZO"].categories["workspace"] - cpu["MeZO"].categories["workspace"]
    assert workspace == buffers
    assert 0 < max(grown["LOZO"].values()) <= buffers  # vectors, if any, have whole directions
    assert gpu["AdamW"] == cpu["AdamW"]
    in_place = Method(
        "in place",
        "zeroth-order",
        lambda model: zoopt.MeZO(model.parameters(), 1e-3, perturbation="inplace"),
    )
    assert plan(spec, seq=4, optimizers=[in_place], gpu=True)["in place"].peak < gpu["MeZO"].peak


@pytest.mark.parametrize("spec", ["llama"], indirect=True)
def test_checkpointing_saves_activations(spec: ModelSpec) -> None:
    plain, less = (
        plan(spec, optimizers=["SGD"], batch=8, seq=128, checkpointing=checkpointing)["SGD"]
        for checkpointing in (False, True)
    )
    assert less.categories["activations"] < 0.8 * plain.categories["activations"]


@pytest.mark.parametrize("spec", ["gpt2"], indirect=True)
def test_the_largest_batch_and_sequence_fit_and_the_next_do_not(spec: ModelSpec) -> None:
    """Nearly: batches grow in proportion, sequences by a parabola through three short ones."""
    for name in ("MeZO", "AdamW", "SM3, fused backward"):
        one = plan(spec, optimizers=[name], batch=1, seq=64)[name]
        budget = 3 * one.peak
        batch, seq = one.largest_batch(budget, 1), one.largest_seq(budget, 64)
        at_batch = plan(spec, optimizers=[name], batch=batch, seq=64)[name].peak
        beyond = plan(spec, optimizers=[name], batch=batch + 1, seq=64)[name].peak
        assert at_batch <= 1.02 * budget
        assert beyond >= 0.98 * budget
        at_seq = plan(spec, optimizers=[name], batch=1, seq=seq)[name].peak
        assert 0.8 * budget <= at_seq <= 1.05 * budget
        assert one.fits(one.peak)
        assert not one.fits(one.peak - 1)
        assert one.largest_batch(1, 1) == 0


def test_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["gpt2"]))
    measured = measure(str(path), "AdamW", batch=2, seq=16, dtype="float32")
    assert measured.state == 8 * (measured.categories["parameters"] // 4) + 4 * 28
    assert measured.resident is not None
    assert measured.resident > 0.5 * measured.peak
    assert list(measured.phases) == ["load", "forward", "backward", "update"]
    phases = measure(str(path), "MeZO", batch=2, seq=16, dtype="float32").phases
    assert list(phases) == ["load", "perturb", "forward +", "forward -", "update"]


def test_the_meter_follows_storages() -> None:
    with StorageMeter() as meter:
        a = torch.zeros(1000)
        view = a[:10]
        meter.enter_phase("forward")
        b = a + 1
        del a
        assert meter.total == 8000
        del view
        assert meter.total == 4000
        meter.track([b], "parameters")
    assert meter.live["parameters"] == 4000
    assert meter.peak == 8000
    assert meter.at_peak["activations"] == 4000
    assert meter.at_peak["workspace"] == 4000


def function_of_a_module(batch: int, seq: int) -> tuple[nn.Module, dict[str, Any]]:
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), {"input": torch.ones(batch, seq, 8)}


def test_any_module_by_its_function() -> None:
    planned = plan(f"{__name__}:function_of_a_module", batch=3, seq=8, dtype="float32")
    assert planned.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert planned["zoopt.AdamW"].state == 8 * planned.parameters + 8 * 4


def test_named_architectures_have_the_parameters_they_are_named_for() -> None:
    """In billions; OPT's names count no embeddings of positions, LLaMA's are rounded."""
    sizes = {"gpt2": 0.124, "opt-1.3b": 1.316, "llama-7b": 6.738, "roberta-large": 0.355}
    for name, billions in sizes.items():
        planned = plan(name, optimizers=["inference"], seq=8)
        assert planned.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert {*sizes} < {*names()}


@pytest.mark.parametrize("model", ["opt-1.3b", "opt-13b"])
def test_the_plan_explains_the_mezo_papers_table(model: str) -> None:
    """Within 10 %, with the framework's own memory, for the algorithm that the paper ran."""
    published, ours, adam = paper_memory.rows_of(model)
    assert published["ratio"] == pytest.approx(1.0, abs=0.1)
    assert ours["median"] < published["median"]
    categories = adam["categories"]
    assert categories["optimizer state"] == pytest.approx(2 * categories["parameters"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "MODEL must be a directory, a config.json, module:function or one of"),
        (["gpt2", "--optimizer", "Adam"], "optimizers must be 'all' or some of inference, MeZO"),
        (
            ["gpt2", "--optimizer", "AdamW", "--processes", "2"],
            "processes must be 1 for AdamW, got more",
        ),
        (["gpt2", "--seq", "5000"], "seq must be at most 1024 for gpt2, got 5000"),
        (["zoopt:nothing"], "MODEL must be module:function that can be imported from here"),
    ],
)
def test_errors_take_a_line_and_exit_by_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ("24XB", "0GB", "-3GB", "much"):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", "gpt2", f"--gpu={bad}"])
        assert stopped.value.code == 2
        assert "expected a size such as 24GB" in capsys.readouterr().err


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--optimizer", "MeZO", "AdamW", "--seq", "16", "--gpu", "1GB"]
    assert main(["plan", "gpt2", *arguments]) == 0
    table = capsys.readouterr().out
    assert "largest batch" in table
    assert "\x1b[" not in table
    assert main(["plan", "gpt2", *arguments, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [estimate["name"] for estimate in document["estimates"]] == ["MeZO", "AdamW"]
    assert document["parameters"] == 124439808
    assert document["gpu"]
    assert main(["plan", "gpt2", "--optimizer", "MeZO", "--seq", "16", "--processes", "4"]) == 0
    assert "on each of 4 processes" in capsys.readouterr().out.replace("\n", " ")
