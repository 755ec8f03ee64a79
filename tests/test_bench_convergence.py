"""The comparison of methods at one budget: what it counts, chooses, keeps and concludes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from bench.convergence import command
from bench.convergence import plan as planner
from bench.convergence import run as runner
from bench.convergence.methods import METHODS, TABLE, Method
from bench.convergence.run import Run
from bench.convergence.task import PROMPT, WORDS, Settings, Task, load_classifier
from bench.runs import finite, pack, store
from bench.selection import run as selection
from bench.selection.methods import METHODS as SELECTION

AVAILABLE = [method for method in TABLE if method.available]
GOOD, BAD = ("bright", "warm", "clever"), ("dull", "slow", "clumsy")
NOUNS, VERBS = ("film", "plot", "cast", "ending", "music"), ("was", "is")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A tiny LLaMA of six layers with random weights, sixty sentences, and few forward passes."""
    folder = tmp_path_factory.mktemp("convergence")
    words = ("[UNK]", "great", "terrible", "Just", "the", "and", *GOOD, *BAD, *NOUNS, *VERBS)
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder / "model")
    lines = [
        f"0\t{rating}\tthe {noun} {verb} {words[i]} and {words[i - 1]}"
        for noun in NOUNS
        for i in range(3)
        for verb in VERBS
        for rating, words in ((2.5, GOOD), (-1.5, BAD))
    ]
    (folder / "reviews.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Settings(
        model=str(folder / "model"),
        data=str(folder / "reviews.tsv"),
        batch_size=4,
        forwards=20,
        grid_forwards=10,
        seeds=2,
        extensions=1,
    )


@pytest.fixture(scope="module")
def task(settings: Settings) -> Task:
    return Task(settings)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def arguments(settings: Settings, folder: Path, *more: str) -> list[str]:
    values = dataclasses.asdict(settings)
    names = ("model", "data", "batch_size", "forwards", "grid_forwards", "seeds", "extensions")
    options = [f"--{name.replace('_', '-')}={values[name]}" for name in names]
    files = [f"--runs={folder / 'runs'}", f"--json={folder / 'a.json'}", f"--plot={folder}/a.png"]
    return [*options, *files, *more]


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}


@pytest.mark.parametrize("method", AVAILABLE, ids=lambda method: method.name)
def test_a_step_costs_what_the_table_says(method: Method, settings: Settings, task: Task) -> None:
    """Passes through the trained layers are counted in the model, not where they are asked for."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += method.passes_per_call

    task.reset()
    optimizer = method.build(task.parameters(), 1e-4, 0, steps=10)
    sign = -1.0 if method.maximizes else 1.0
    costs = []
    hook = task.classifier.model.base_model.register_forward_hook(count)
    try:
        for batch, _ in zip(task.batches(0), range(4), strict=False):
            before = passes
            optimizer.step(lambda batch=batch: sign * task.loss(batch))
            costs.append(passes - before)
    finally:
        hook.remove()
    # The first evaluation of a run is repeated by some, to check the closure.
    assert costs[0] - method.forwards_per_step in (0, method.passes_per_call)
    assert costs[1:] == [method.forwards_per_step] * 3


@pytest.mark.parametrize("method", AVAILABLE, ids=lambda method: method.name)
def test_budgets_are_equal(method: Method, settings: Settings, task: Task) -> None:
    run = Run(method.name, method.lrs[1], 0, settings.forwards)
    result = runner.execute(run, settings, task)
    assert settings.forwards - method.forwards_per_step < result["forwards"] <= settings.forwards
    assert len(result["losses"]) == method.steps(settings.forwards)
    assert all(map(math.isfinite, result["losses"]))
    assert result["validation"][-1]["forwards"] == result["forwards"]
    assert result["validation"][-1] != result["validation"][0]
    # At the comparison's own budgets, what is left over is less than a hundredth.
    full = Settings()
    for forwards in (full.forwards, full.grid_forwards):
        spent = method.steps(forwards) * method.forwards_per_step
        assert 0.97 * forwards <= spent <= forwards


def test_a_run_depends_on_its_key_alone(settings: Settings, task: Task) -> None:
    run = Run("mezo", 1e-3, 1, 20)
    first = runner.execute(run, settings, task)
    runner.execute(Run("sign", 1e-3, 0, 20), settings, task)
    again = runner.execute(run, settings, task)
    other = runner.execute(dataclasses.replace(run, seed=2), settings, task)
    for key in ("losses", "validation", "test", "config_hash"):
        assert first[key] == again[key]
        assert first[key] != other[key]


def test_the_trained_layers_compute_what_the_whole_model_does(settings: Settings) -> None:
    exact = dataclasses.replace(settings, dtype="float32")
    task = Task(exact)
    whole = load_classifier(exact.model, "float32", 0, PROMPT, WORDS)
    batch = task.train[:7]
    with torch.no_grad():
        expected = whole.logit_difference(whole.collate(batch))
        got = task.classifier.logit_difference(task.classifier.collate(batch))
    assert len(expected.unique()) > 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    names = [name for name, _ in task.parameters()]
    assert {name.split(".")[2] for name in names if "layers" in name} == set("01234")
    assert {name for name in names if "layers" not in name} == {"model.norm.weight"}


def test_finished_runs_are_kept(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(settings, tmp_path, "--methods", "mezo", "sign")
    assert command.main(argv) == 0
    ran, _, table = capsys.readouterr().out.partition("\n\n")
    assert " runs in " in ran
    for label in ("untrained", "MeZO", "ZOSignSGD, elementwise", "reference"):
        assert label in table
    summary = json.loads((tmp_path / "a.json").read_text())
    assert [record["method"] for record in summary["records"]] == ["mezo", "sign"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    first = files(tmp_path)
    # Two methods: three or four learning rates, and two seeds.
    assert 2 * (3 + 2) <= len(first) <= 2 * (4 + 2)
    assert ran.startswith(f"{len(first)} runs")

    def refuse(*_: Any) -> Any:
        raise AssertionError("nothing is left to run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "executor", refuse)
        assert command.main(argv) == 0
    assert capsys.readouterr().out == table
    assert files(tmp_path) == first

    # One more seed is one more run a method; a run that was lost is done again.
    lost = next(iter(first))
    (tmp_path / "runs" / lost).unlink()
    more = dataclasses.replace(settings, seeds=3)
    assert command.main(arguments(more, tmp_path, "--methods", "mezo", "sign")) == 0
    third = files(tmp_path)
    assert len(third) == len(first) + 2
    assert all(third[name] == when for name, when in first.items() if name != lost)


def test_another_configuration_is_not_taken_for_this_one(
    settings: Settings, task: Task, tmp_path: Path
) -> None:
    run = Run("mezo", 1e-3, 0, 10)
    store(runner.execute(run, settings, task), tmp_path / run.file)
    assert command.open_store(tmp_path, settings)(run) is not None
    other = dataclasses.replace(settings, batch_size=8)
    assert command.open_store(tmp_path, other)(run) is None
    (tmp_path / run.file).write_text("{")
    assert command.open_store(tmp_path, settings)(run) is None


def test_a_method_that_fails_leaves_the_others_alone(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute = runner.execute

    def fail(run: Run, *rest: Any) -> Any:
        if run.method == "sign":
            raise RuntimeError("out of luck")
        return execute(run, *rest)

    monkeypatch.setattr(runner, "execute", fail)
    assert command.main(arguments(settings, tmp_path, "--methods", "sign")) == 1
    captured = capsys.readouterr()
    assert "error: sign: RuntimeError: out of luck" in captured.err
    assert "MeZO" in captured.out
    assert not [name for name in files(tmp_path) if name.startswith("sign")]


def grid_by(loss: Any, extensions: int) -> tuple[list[float], float | None, list[float]]:
    """MeZO's grid by a loss for each learning rate, its best, and the rates in order of trial."""
    settings, tried = Settings(grid_forwards=240, extensions=extensions), {}

    def results(run: Run) -> Mapping[str, Any] | None:
        return tried.get(run)

    order = []
    while True:
        plan = planner.plan(METHODS["mezo"], settings, results)
        runs = [run for run in plan.missing() if run.forwards == settings.grid_forwards]
        if not runs:
            return *plan.grid(), order
        for run in runs:
            order.append(run.lr)
            tried[run] = {"validation": [{"cross_entropy": loss(run.lr)}]}


def test_a_grid_is_extended_beyond_its_edge() -> None:
    low, middle, high = METHODS["mezo"].lrs
    ratio = middle / low

    def around(best: float) -> Any:
        return lambda lr: abs(math.log(lr / best))

    assert grid_by(around(middle), 2) == ([low, middle, high], middle, [low, middle, high])
    # The best is the upper edge: one more turns out worse, and that is all.
    lrs, best, order = grid_by(around(high), 2)
    assert (len(lrs), best, order[3:]) == (4, high, [lrs[3]])
    assert lrs[3] / high == pytest.approx(ratio, rel=0.05)
    # It goes on as often as allowed, and what is at the edge then is told by the record's flag.
    lrs, best, _ = grid_by(lambda lr: -lr, 2)
    assert (len(lrs), best) == (5, lrs[-1])
    lrs, best, _ = grid_by(lambda lr: lr, 1)
    assert (len(lrs), best) == (4, lrs[0])
    assert lrs == sorted(lrs)
    # Divergence is worse than any loss; if all diverge, lower ones are tried.
    assert grid_by(lambda lr: None if lr >= high else -lr, 2)[1] == middle
    lrs, best, _ = grid_by(lambda lr: None, 1)
    assert (best, lrs[1]) == (lrs[0], low)


def test_a_grid_of_the_full_budget_is_the_first_seed() -> None:
    settings = Settings(forwards=100, grid_forwards=100, seeds=3)
    done: dict[Run, Mapping[str, Any]] = {}
    left = []
    plan = planner.plan(METHODS["mezo"], settings, done.get)
    while runs := plan.missing():
        left.append(plan.left())
        loss = float(runs[0].lr != METHODS["mezo"].lrs[1])
        done[runs[0]] = {"validation": [{"cross_entropy": loss}]}
    assert left == [5, 4, 3, 2, 1]
    assert sorted(run.seed for run in done) == [0, 0, 0, 1, 2]


def test_edges_and_divergence_reach_the_record(settings: Settings, task: Task) -> None:
    done: dict[Run, dict[str, Any]] = {}

    def results(run: Run) -> Mapping[str, Any] | None:
        if run not in done:
            done[run] = json.loads(
                json.dumps(
                    finite(runner.execute(run, settings, task)),
                    allow_nan=False,
                )
            )
            done[run]["validation"][-1]["cross_entropy"] = None if run.method == "sign" else run.lr
        return done[run]

    records = planner.summarise([METHODS["mezo"], METHODS["sign"]], settings, results)
    assert [record["lr_at_edge"] for record in records] == [True, True]
    assert [record["verdict"] for record in records][:1] == ["reference"]
    assert records[0]["time_per_forward_of_mezo"] == pytest.approx(1.0)
    assert records[1]["validation_cross_entropy"]["mean"] is None
    assert set(records[1]["grid_validation_cross_entropy"].values()) == {None}


@pytest.mark.parametrize(
    ("values", "reference", "expected"),
    [
        # Standard error of the difference: sqrt(0.01^2 / 3 + 0.01^2 / 3), 0.00816.
        ([0.49, 0.50, 0.51], [0.516, 0.526, 0.536], "beats"),
        ([0.49, 0.50, 0.51], [0.506, 0.516, 0.526], "ties"),
        ([0.516, 0.526, 0.536], [0.49, 0.50, 0.51], "does not beat"),
        ([0.506, 0.516, 0.526], [0.49, 0.50, 0.51], "ties"),
        ([0.5, 0.5], [0.5, 0.5], "ties"),
        ([0.4, 0.4], [0.5, 0.5], "beats"),
        ([0.4, None], [0.5, 0.5], "does not beat"),
        ([0.4, math.nan], [0.5, 0.5], "does not beat"),
        ([0.4], [0.5, 0.5], "too few runs"),
        ([0.4, 0.4], [0.5], "too few runs"),
        ([0.4, 0.4], [0.5, None], "too few runs"),
    ],
)
def test_verdict(values: list[Any], reference: list[Any], expected: str) -> None:
    assert planner.verdict(values, reference) == expected


def test_only_report_starts_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments(settings, tmp_path, "--only-report")) == 0
    assert "no method has finished" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_every_method_has_a_grid_that_can_be_extended() -> None:
    assert len(METHODS) == len(TABLE)
    for method in TABLE:
        assert list(method.lrs) == sorted(set(method.lrs))
        assert len(method.lrs) >= 3
        assert method.lrs[1] / method.lrs[0] > 1.5


def test_packed_runs_are_read(settings: Settings, task: Task, tmp_path: Path) -> None:
    folder, run = tmp_path / "runs", Run("mezo", 1e-3, 0, 10)
    folder.mkdir()
    result = runner.execute(run, settings, task)
    store(result, folder / run.file)
    loose = command.open_store(folder, settings)(run)
    assert pack(folder) == 1
    assert not list(folder.iterdir())
    assert command.open_store(folder, settings)(run) == loose
    # Another configuration's run of the same name replaces it, and what is broken is no run.
    other = dataclasses.replace(settings, batch_size=8)
    assert command.open_store(folder, other)(run) is None
    store(runner.execute(run, other, task), folder / run.file)
    (folder / "broken.json").write_text("{")
    assert command.open_store(folder, settings)(run) == loose
    assert pack(folder) == 1
    assert command.open_store(folder, other)(run) is not None
    assert command.open_store(folder, settings)(run) is None


def test_the_committed_summary_is_that_of_the_committed_runs() -> None:
    summary = json.loads((command.RESULTS / "summary.json").read_text())
    store = command.open_store(command.RESULTS / "runs", Settings())
    records = planner.summarise(
        [METHODS[r["method"]] for r in summary["records"]], Settings(), store
    )
    assert json.loads(json.dumps(finite(records))) == summary["records"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SELECTION)
def test_method_of_selection_trains_and_has_a_cost(name: str, task: Task) -> None:
    """Two steps train; the task stays as it was; the peak holds at least weights and state."""
    before = {name: p.detach().clone() for name, p in task.parameters()}
    run = selection.Run(name, SELECTION[name].lr, 0, 2)
    result = selection.execute(run, Settings(), task, final=False)
    assert len(result["losses"]) == 2
    assert all(map(math.isfinite, result["losses"]))
    cost = selection.cost(run, task)
    assert cost["peak_bytes"] > cost["state_bytes"]
    assert cost["trained"] > 0
    for key, param in task.parameters():
        assert torch.equal(param, before[key])
