"""The examples do what they say they do."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import zoopt

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.insert(1, str(EXAMPLES))

from sentiment import pace  # noqa: E402

#: Unit roundoff of float32.
U = 2.0**-24


def main_of(name: str) -> Callable[..., dict[str, float]]:
    main: Callable[..., dict[str, float]] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


def test_mlp_learns() -> None:
    figures = main_of("01_mlp")(steps=500)
    assert figures["loss"] < figures["loss_before"] / 3
    assert figures["accuracy"] > 0.95 > figures["accuracy_before"]


def test_mlp_changes_five_lines() -> None:
    source = (EXAMPLES / "01_mlp.py").read_text(encoding="utf-8")
    assert re.findall(r"# changed, (\d) of 5$", source, re.MULTILINE) == list("12345")


def test_int8_adamw_learns_as_torch_does_in_a_third_of_the_state() -> None:
    figures = main_of("02_int8_adamw")(steps=150)
    assert figures["loss_int8"] < figures["loss_before"] / 10
    assert figures["loss_int8"] < 2 * figures["loss_torch"]
    assert figures["state_int8"] < 0.4 * figures["state_torch"]


def test_planner_knows_what_the_optimizer_will_keep() -> None:
    module = runpy.run_path(str(EXAMPLES / "07_planner.py"))
    figures = module["main"]()
    assert list(figures) == list(module["METHODS"])  # the smallest peak first
    model = module["Network"]().bfloat16()
    optimizer = zoopt.AdamW(model.named_parameters(), lr=1e-3, state_dtype="int8")
    model(**module["inputs"](2, 8)).backward()
    optimizer.step()
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert figures["zoopt.AdamW, int8 state"]["state"] == kept
    assert figures["MeZO"]["peak"] == figures["inference"]["peak"] < figures["AdamW"]["peak"]
    assert figures["MeZO"]["fits"]
    assert not figures["AdamW"]["fits"]


def test_the_path_names_every_example() -> None:
    """examples/README.md and the documentation's page list what there is, in order."""
    programs = sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))
    assert [name[:2] for name in programs] == [f"{i:02d}" for i in range(1, len(programs) + 1)]
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"`(\d\d_\w+\.py)`", text) == programs


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_lora_learns_and_leaves_the_base_alone() -> None:
    figures = main_of("06_lora")(steps=300)
    assert figures["loss"] < figures["loss_before"] - 1.0
    assert figures["changed_base_weights"] == 0
    assert 0 < figures["trained"] < figures["frozen"]


def test_accuracy_rises_in_training_and_held_out() -> None:
    figures = main_of("05_accuracy")(steps=200)
    for part in ("train", "held_out"):
        assert figures[part] > 0.9
        assert figures[f"{part}_before"] < 0.5


def test_evolution_earns_its_reward_in_training_and_held_out() -> None:
    figures = main_of("09_evolution")(steps=60)
    for part in ("reward", "held_out"):
        assert figures[part] > 2 * figures[f"{part}_before"]
        assert figures[part] > 0.5


def test_runs_are_files_that_can_be_merged() -> None:
    figures = main_of("12_trajectory")(steps=200)
    assert figures["same_bits"] == 1.0
    assert figures["bytes"] < 5000
    assert abs(figures["reverted_one"] - figures["base_one"]) < 1e-3
    for name in ("one", "two"):
        assert figures[f"trained_{name}"] < figures[f"base_{name}"] / 2
        assert figures[f"merged_{name}"] < figures[f"base_{name}"] / 2


def test_accumulation_learns_like_whole_batches() -> None:
    figures = main_of("04_accumulation")(steps=200)
    assert figures["loss"] < figures["loss_before"] / 2
    assert figures["loss"] == pytest.approx(figures["loss_whole"], rel=1e-3)
    assert figures["difference"] < 1e-3 * figures["distance"]


@pytest.mark.parametrize("micro_batches", [2, 4, 64])
def test_one_accumulated_step_is_the_step_of_the_whole_batch(micro_batches: int) -> None:
    figures = main_of("04_accumulation")(steps=1, micro_batches=micro_batches)
    # A loss near 1 is the mean of 64 squares of sums of 32 terms: taken in another order it is off
    # by fewer than (64 + 2 * 32) roundings, relative to it. g divides the difference of two such
    # losses by 2 zo_eps, lr g z moves a weight (|z| < 5 here), and the weight itself is rounded.
    lr, zo_eps, batch_loss, largest_z, largest_weight = 5e-3, 1e-3, 1.5, 5.0, 1.0
    off = (64 + 2 * 32) * U * batch_loss
    tolerance = lr * largest_z * (2 * off / (2 * zo_eps)) + 2 * U * largest_weight
    assert figures["difference"] <= tolerance
    assert figures["distance"] > 10 * tolerance


def test_hybrid_learns_more_than_its_halves_at_a_third_of_backprops_memory() -> None:
    figures = main_of("08_hybrid")(steps=500)
    assert figures["loss_hybrid"] < 0.3 * min(figures["loss_mezo"], figures["loss_head"])
    # Beside MeZO's: the head's gradient, Adam's two moments, the logits with theirs.
    head, logits = (32 * 2 + 2) * 4, 256 * 2 * 4
    assert figures["bytes_hybrid"] <= figures["bytes_mezo"] + 3 * head + 2 * logits
    assert figures["bytes_hybrid"] < figures["bytes_backprop"] / 3


def test_fused_backward_holds_one_gradient_and_changes_no_bit() -> None:
    figures = main_of("03_fused_backward")(steps=40)
    assert figures["difference"] == 0.0
    assert figures["loss"] == figures["loss_unfused"] < figures["loss_before"] / 2
    assert figures["gradient_bytes"] == figures["largest_gradient_bytes"]
    assert figures["gradient_bytes"] < figures["gradient_bytes_unfused"] / 3


WORDS = ("great", "terrible", "Just", "the", "film", "plot", "cast", "was", "is", "and")
WORDS += ("dull", "bright", "warm", "slow", "clever", "clumsy", "ending", "music")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with random weights and a tokenizer that knows whole words."""
    vocabulary = {word: i for i, word in enumerate(("[UNK]", *WORDS))}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(path)
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Sixty labelled sentences."""
    good, bad = ("bright", "warm", "clever"), ("dull", "slow", "clumsy")
    lines = []
    for noun in ("film", "plot", "cast", "ending", "music"):
        for i in range(3):
            for verb in ("was", "is"):
                for rating, words in ((2.5, good), (-1.5, bad)):
                    text = f"the {noun} {verb} {words[i]} and {words[i - 1]}"
                    lines.append(f"{len(lines)}\t{rating}\t{text}")
    path = tmp_path / "reviews.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_several_processes_can_train_the_demos_model(model_dir: Path, reviews: Path) -> None:
    """Here one of them: a test with two runs the small network, by the same loop."""
    demo = runpy.run_path(str(EXAMPLES / "11_distributed.py"))["demo"]
    options = ("--dtype", "float32", "--lr", "1e-3", "--batch-size", "16", "--steps", "100")
    figures = demo(["--model", str(model_dir), "--data", str(reviews), *options])
    assert figures["ranks"] == 1
    assert figures["loss"] < figures["loss_before"]


def finetune(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune_sentiment.py"), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def numbers(value: Any) -> Iterator[float]:
    """All numbers in a decoded JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_sentiment_run_writes_a_chart_and_finite_figures(
    model_dir: Path, reviews: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = finetune(
        *("--model", model_dir, "--data", reviews, "--output", output),
        *("--steps", "3", "--batch-size", "8", "--no-memory"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((output / "figures.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(number) for number in numbers(figures))
    training = figures["training"]
    assert len(training["losses"]) == len(training["projected_grads"]) == 3
    assert all(loss > 0 for loss in training["losses"])
    assert sum(figures["sentences"].values()) <= 60
    assert figures["parameters"]["trained"] == figures["parameters"]["all"]
    assert figures["memory"] is None
    [chart] = output.glob("*.png")
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_sentiment_run_ends_in_time(model_dir: Path, reviews: Path, tmp_path: Path) -> None:
    """Of more steps than a second pays for some are made; the rate ends where it would have."""
    output = tmp_path / "out"
    done = finetune(
        *("--model", model_dir, "--data", reviews, "--output", output, "--no-memory"),
        *("--batch-size", "8", "--steps", "100000", "--seconds", "1"),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((output / "figures.json").read_text(encoding="utf-8"))
    made = figures["steps"]["done"]
    # Loading alone takes more than the second: what is needed to know a step's time, and no more.
    assert made == pace.WARM_UP + pace.TIMED
    assert figures["steps"]["planned"] == 100000
    assert len(figures["training"]["losses"]) == made
    assert figures["training"]["validation"][-1]["step"] == made
    assert f"{made} of 100000 steps" in done.stdout
    first_line = done.stdout.splitlines()[0]
    assert first_line.startswith("loading torch and transformers")


def test_steps_that_fit() -> None:
    # The first step is slow, the next three take 2 s: 10 more fit into 21 s.
    assert pace.steps_that_fit([30.0, 2.0, 2.0, 2.0], 200, 21.0) == 14
    assert pace.steps_that_fit([30.0, 2.0, 2.0, 2.0], 10, 21.0) == 10
    assert pace.steps_that_fit([30.0, 2.0, 2.0, 2.0], 200, -5.0) == 4
    assert pace.steps_that_fit([30.0, 2.0, 2.0, 2.0], 200, math.inf) == 200
    # A neighbour came: only the last ten tell.
    assert pace.steps_that_fit([9.0] + [1.0] * 20 + [4.0] * 10, 200, 40.0) == 41


def test_a_run_whose_steps_grow_slow_ends_at_its_deadline(
    model_dir: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that a step moves by 1 s, and by 5 s from the thirtieth on."""
    from sentiment import data, model, training

    clock = [0.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    classifier = model.load_classifier(
        str(model_dir), "float32", 0, "{} Just", (" terrible", " great")
    )
    examples = classifier.encode(data.split(data.read_sentences(reviews, 12)).train)
    rates = []

    def step(optimizer: Any, *_: Any) -> float:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        clock[0] += 1.0 if len(rates) < 30 else 5.0
        return 0.5

    monkeypatch.setattr(training, "step", step)
    weight = torch.nn.Parameter(torch.zeros(2))
    options = {"steps": 200, "batch_size": 4, "schedule": "linear", "evaluations": 5, "seed": 0}
    history = training.train(
        *(classifier, training.make_optimizer("adamw", [("weight", weight)], lr=1.0)),
        *(examples, examples),
        **options,
        deadline=100.0,
    )
    # 29 steps of 1 s leave 71 s, hence 14 of 5 s; what was chosen last holds for at most ten steps.
    assert 29 + 14 - 10 <= len(rates) <= 29 + 14 + 1
    assert clock[0] <= 105.0
    assert history.validation[-1]["step"] == len(rates)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(rates[-2] / 2)


def test_a_run_whose_evaluations_grow_slow_leaves_time_for_those_to_come(
    model_dir: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look at the validation set takes 1 s, all others 4 s; a step takes 1 s."""
    from sentiment import data, evaluation, model, training

    clock, looks = [0.0], [0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    classifier = model.load_classifier(
        str(model_dir), "float32", 0, "{} Just", (" terrible", " great")
    )
    examples = classifier.encode(data.split(data.read_sentences(reviews, 12)).train)

    def step(optimizer: Any, *_: Any) -> float:
        optimizer.step()
        clock[0] += 1.0
        return 0.5

    def look(*_: Any) -> evaluation.Metrics:
        looks[0] += 1
        clock[0] += 4.0 if looks[0] > 1 else 1.0
        return evaluation.Metrics(1, 0.5, 0.5, 0.7, 0.7)

    monkeypatch.setattr(training, "step", step)
    monkeypatch.setattr(training, "evaluate", look)
    weight = torch.nn.Parameter(torch.zeros(2))
    options = {"steps": 200, "batch_size": 4, "schedule": "linear", "evaluations": 5, "seed": 0}
    training.train(
        *(classifier, training.make_optimizer("adamw", [("weight", weight)], lr=1.0)),
        *(examples, examples),
        **options,
        deadline=100.0,
        after_training=10.0,
    )
    # What follows will take 40 s and not 10; ten steps are made between two choices.
    assert 50.0 <= clock[0] <= 60.0 + 10.0


def test_memory_is_measured_as_long_as_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, killed at the deadline, and not begun; by a clock on which each takes 0.2 s."""
    from sentiment import memory

    clock, limits, run = [0.0], [], subprocess.run

    def measured(command: list[str], *, timeout: float, **options: Any) -> Any:
        limits.append(timeout)
        clock[0] += 0.2
        return run(command, timeout=timeout if command[-1] == "mezo" else None, **options)

    monkeypatch.setattr(memory.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(memory.subprocess, "run", measured)
    script = (
        "import sys, time; method = sys.argv[-1]; time.sleep(600 if method == 'mezo' else 0); "
        f"print('{memory.MARKER}{{\"method\": \"' + method + '\"}}')"
    )
    command = [sys.executable, "-S", "-c", script]
    results = memory.measure_all(command, seconds_each=0.01, deadline=0.5)
    assert limits == [0.5, 0.5 - 0.2]
    assert results["inference"] == {"method": "inference"}
    assert results["left_out"] == ["mezo", "adamw"]
    assert not {"mezo", "adamw"} & {*results}
    results = memory.measure_all(command, seconds_each=0.01, deadline=clock[0])
    assert results["left_out"] == ["inference", "mezo", "adamw"]
    assert not {"inference", "mezo", "adamw"} & {*results}


@pytest.mark.parametrize("measured", [0, 1, 2])
def test_a_report_says_what_was_not_measured(
    measured: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sentiment import memory, report

    row = {"peak_mib": 600.0, "weights_mib": 500.0}
    rows = dict.fromkeys(memory.METHODS[:measured], row)
    figures = {
        "settings": {"optimizer": "mezo", "lora": 0},
        "test": dict.fromkeys(("before", "after"), dict.fromkeys(report.METRICS, 0.5)),
        "training": {"losses": [0.7, 0.6], "validation": [{"step": 2, "cross_entropy": 0.6}]},
        "memory": {**rows, "left_out": list(memory.METHODS[measured:])},
        "steps": {"done": 2},
        "seconds": {"training": 2.0, "total": 3.0},
    }
    figures["test"]["before"]["sentences"] = 4
    report.print_summary(figures)
    text = " ".join(capsys.readouterr().out.split())
    left_out = ", ".join(report.NAMES[method] for method in memory.METHODS[measured:])
    assert f"peak memory not measured, for want of time: {left_out};" in text
    assert ("times inference" in text) == (measured > 0)
    report.draw(figures, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size


@pytest.mark.parametrize("missing", ["--data", "--model"])
def test_sentiment_run_says_what_is_wrong_in_one_line(
    missing: str, model_dir: Path, reviews: Path, tmp_path: Path
) -> None:
    paths = {"--model": model_dir, "--data": reviews, missing: tmp_path / "nowhere.tsv"}
    (tmp_path / "nowhere.tsv").mkdir()  # a directory, but neither a model nor a file
    options = [part for pair in paths.items() for part in pair]
    done = finetune(*options, "--steps", "3", "--no-memory", "--output", tmp_path / "out")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nowhere.tsv" in line
    assert not list((tmp_path / "out").glob("*"))


def test_trainer_resumes_to_the_same_model_and_figures(
    model_dir: Path,
    reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    main = main_of("10_trainer")
    output = tmp_path / "out"
    options = ["--model", str(model_dir), "--data", str(reviews), "--output", str(output)]
    options += ["--steps", "5", "--batch-size", "8", "--micro-batches", "2", "--every", "3"]
    assert main([*options, "--resume"]) == 2
    expected = f"error: there is no checkpoint in {output}; leave out --resume\n"
    assert capsys.readouterr().err == expected

    runs = []
    for resume in ([], ["--resume"]):
        assert main([*options, *resume]) == 0
        weights = (output / "checkpoint-5" / "model.safetensors").read_bytes()
        figures = json.loads((output / "figures.json").read_text(encoding="utf-8"))
        assert all(math.isfinite(number) for number in numbers(figures))
        keys = ("step", "loss", "grad_norm", "eval_loss")
        log = [{key: entry[key] for key in keys if key in entry} for entry in figures["log"]]
        log = [entry for entry in log if len(entry) > 1]
        runs.append((weights, figures["after"]["test_loss"], log))
        shutil.rmtree(output / "checkpoint-5")
    assert runs[0] == runs[1]
    assert [entry["step"] for entry in log] == [1, 2, 3, 3, 4, 5, 5]
    # An untrained model tosses a coin; micro-batches each have their share of that.
    assert all(0.5 < entry.get("loss", 0.7) < 1.0 for entry in log)
