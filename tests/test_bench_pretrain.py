"""The pretraining comparison on a made-up corpus: it resumes, counts and reports what it did."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import zoopt.lowrank
from bench.pretrain import command, data
from bench.pretrain import plan as planner
from bench.pretrain import report as reporter
from bench.pretrain import run as runner
from bench.pretrain.methods import METHODS, TABLE, Method, find, state_bytes
from bench.pretrain.run import Run
from bench.pretrain.task import MODELS, Model, Settings, Task, matrices
from bench.runs import finite

TINY = Model(width=16, layers=1, heads=2, mlp_width=24, steps=8, grid_steps=4, seeds=2)
NOUNS, VERBS = ("the king", "a river", "the engine", "an author"), ("was", "saw", "made")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A LLaMA of two thousand weights, eighty documents of two collections, and few steps."""
    documents = tmp_path_factory.mktemp("pretrain") / "documents.jsonl"
    lines = [
        {
            "source": "wikipedia" if i % 4 else "shakespeare",
            "title": str(i),
            "text": " ".join(
                f"{NOUNS[(i + j) % 4]} {VERBS[(i * j) % 3]} {NOUNS[(i * i + j) % 4]} of {i}."
                for j in range(12)
            ),
        }
        for i in range(80)
    ]
    documents.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", TINY)
        yield Settings(
            "tiny",
            TINY.steps,
            TINY.grid_steps,
            TINY.seeds,
            str(documents),
            vocab_size=320,
            seq_len=16,
            batch_size=4,
            update_proj_gap=3,
            validation_rows=10,
            evaluations=2,
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
    names = ("documents", "vocab_size", "seq_len", "batch_size", "update_proj_gap")
    values = {**dataclasses.asdict(settings), "runs": folder / "runs"}
    options = [f"--{name.replace('_', '-')}={values[name]}" for name in (*names, "runs")]
    budget = ["--model=tiny", "--validation-rows=10", "--extensions=1"]
    files = [f"--json={folder / 'a.json'}", f"--plot={folder / 'a.png'}"]
    return [*options, *budget, *files, *more]


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}


def test_documents_are_split_encoded_and_kept(settings: Settings) -> None:
    path = Path(settings.documents)
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    train, validation = data.split(documents)
    # Of 60 and 20 documents, every twentieth.
    assert (len(train), len(validation)) == (76, 4)
    assert not set(train) & set(validation)
    tokenizer = data.train_tokenizer(train, settings.vocab_size)
    tokens = data.encode(tokenizer, validation)
    end = tokenizer.token_to_id(data.END_OF_TEXT)
    assert (tokens == end).sum() == 4
    assert tokenizer.decode(tokens.tolist()) == "".join(validation)
    corpus = data.load_corpus(path, settings.vocab_size)
    assert corpus.validation.tolist() == tokens.tolist()
    assert len(list(path.parent.glob("tokens-320-*.npz"))) == 1
    assert data.load_corpus(path, settings.vocab_size).train.equal(corpus.train)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(settings: Settings) -> None:
    factors = [settings.lr_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.55)
    # The last step but one of 90: the cosine's end is where step 100 would be.
    assert factors[99] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_rows_batches_and_models_are_functions_of_the_seed(settings: Settings, task: Task) -> None:
    first = [next(batches) for batches in [task.batches(1)] for _ in range(3)]
    again = [next(batches) for batches in [task.batches(1)] for _ in range(3)]
    other = [next(batches) for batches in [task.batches(2)] for _ in range(3)]
    assert torch.stack(first).equal(torch.stack(again))
    assert not torch.stack(first).equal(torch.stack(other))
    assert first[0].shape == (settings.batch_size, settings.seq_len)
    assert task.validation.shape == (10, settings.seq_len)
    models = [dict(task.model(seed).named_parameters()) for seed in (1, 1, 2)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert models[0][name].equal(models[1][name])
    assert not models[0][name].equal(models[2][name])
    sizes = task.sizes()
    # Four of attention, three of the MLP; besides them the embedding and three norms.
    assert sizes["matrix_parameters"] == 4 * 16 * 16 + 3 * 16 * 24
    assert sizes["parameters"] == sizes["matrix_parameters"] + 320 * 16 + 3 * 16


def test_perplexity_is_of_all_rows_alike(task: Task) -> None:
    model = task.model(0)
    with torch.no_grad():
        logits = model(input_ids=task.validation).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), task.validation[:, 1:].reshape(-1)
    )
    found = task.validate(model)
    # Sums of 150 float32 losses in another order.
    assert found["cross_entropy"] == pytest.approx(float(expected), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["cross_entropy"]))


def test_a_run_depends_on_its_key_alone(settings: Settings, task: Task) -> None:
    run = Run("tiny", "adamw", 1e-2, 1, 8)
    first = runner.execute(run, settings, task)
    runner.execute(Run("tiny", "zoopt-adamw", 1e-2, 0, 4), settings, task)
    again = runner.execute(run, settings, task)
    other = runner.execute(dataclasses.replace(run, seed=2), settings, task)
    for key in ("losses", "validation", "config_hash"):
        assert first[key] == again[key]
        assert first[key] != other[key]
    assert [look["step"] for look in first["validation"]] == [4, 8]
    assert len(first["losses"]) == 8
    assert first["losses"][-1] < first["losses"][0]


def test_equal_rules_train_alike(settings: Settings, task: Task) -> None:
    """zoopt.AdamW is torch.optim.AdamW, on the same tokens, from the same weights."""
    runs = [Run("tiny", method, 1e-2, 0, 8) for method in ("adamw", "zoopt-adamw")]
    torchs, ours = (runner.execute(run, settings, task) for run in runs)
    # Eight steps of float32 arithmetic in another order, of losses around 5.
    assert ours["losses"] == pytest.approx(torchs["losses"], abs=1e-4)
    # Moments of 4 bytes each and a step of 4 bytes a tensor.
    tensors = 7 + 1 + 3
    assert torchs["state_bytes"] == 8 * torchs["trained_parameters"] + 4 * tensors
    assert ours["state_bytes"] == ours["declared_state_bytes"]
    # The count of steps is an int64 number, where torch has a float32 one.
    assert ours["state_bytes"] == torchs["state_bytes"] + 4 * tensors
    assert torchs["matrix_state_bytes"] == 8 * task.sizes()["matrix_parameters"] + 4 * 7


def is_there(method: Method) -> bool:
    """Whether this version has the method's classes."""
    try:
        for path in filter(None, (method.optimizer, method.convert, method.groups)):
            find(path)
    except LookupError:
        return False
    return True


@pytest.mark.parametrize(
    "method", [m for m in TABLE if is_there(m)], ids=lambda method: method.name
)
def test_every_method_trains(method: Method, settings: Settings, task: Task) -> None:
    run = Run("tiny", method.name, method.lrs[0], 0, 6)
    result = runner.execute(run, settings, task)
    assert all(map(math.isfinite, result["losses"]))
    declared = result["declared_state_bytes"]
    assert declared is None or declared == result["state_bytes"]
    assert 0 < result["matrix_state_bytes"] < result["state_bytes"]
    json.dumps(runner.configuration(run, settings), allow_nan=False)


def test_matrices_are_what_is_projected(task: Task) -> None:
    model = task.model(0)
    projected, others = zoopt.lowrank.param_groups(model, rank=4)
    assert dict(projected["params"]) == matrices(model)
    assert others["rank"] is None


def test_finished_runs_are_kept(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(settings, tmp_path, "--methods=zoopt-adamw")
    assert command.main(argv) == 0
    ran, _, table = capsys.readouterr().out.partition("\n\n")
    assert " runs in " in ran
    summary = json.loads((tmp_path / "a.json").read_text())
    assert [record["method"] for record in summary["records"]] == ["adamw", "zoopt-adamw"]
    for record in summary["records"]:
        assert record["label"] in table
        assert record["seeds"] == 2
        assert len(record["curve"]) == 8
    assert summary["settings"]["rank"] == 4
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    first = files(tmp_path)
    # Two methods: the grid's learning rates and perhaps one beyond it, and two seeds.
    grid = len(METHODS["adamw"].lrs)
    assert 2 * (grid + 2) <= len(first) <= 2 * (grid + 1 + 2)
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
    assert command.main([*argv, "--seeds=3"]) == 0
    third = files(tmp_path)
    assert len(third) == len(first) + 2
    assert all(third[name] == when for name, when in first.items() if name != lost)


def test_a_class_that_is_missing_is_named(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = dataclasses.replace(METHODS["galore"], optimizer="zoopt.NoSuchOptimizer")
    monkeypatch.setitem(METHODS, "galore", absent)
    monkeypatch.setattr(command, "TABLE", tuple(METHODS.values()))
    assert command.main(arguments(settings, tmp_path, "--methods=galore", "--seeds=1")) == 1
    captured = capsys.readouterr()
    assert "there is no zoopt.NoSuchOptimizer in this version" in captured.err
    assert "torch.optim.AdamW" in captured.out
    with pytest.raises(SystemExit):
        command.main(arguments(settings, tmp_path, "--methods=adamw,nothing"))
    assert "got 'nothing'" in capsys.readouterr().err


def test_a_run_that_diverges_ends_and_is_told(settings: Settings, task: Task) -> None:
    run = Run("tiny", "adamw", 1e30, 0, 8)
    result = finite(runner.execute(run, settings, task))
    assert len(result["losses"]) < 8
    assert result["losses"][-1] is None
    assert planner.grid_score(result) == math.inf
    json.dumps(result, allow_nan=False)


def result(loss: float | None, state: int, seconds: float) -> dict[str, Any]:
    perplexity = None if loss is None else math.exp(loss)
    return {
        "config": {"options": {}},
        "losses": [3.0, loss],
        "validation": [{"step": 2, "cross_entropy": loss, "perplexity": perplexity}],
        "trained_parameters": 10,
        "state_bytes": state,
        "matrix_state_bytes": state // 2,
        "declared_state_bytes": state,
        "cpu_seconds": {"median_step": seconds, "mean_step": seconds, "mean_optimizer": seconds},
    }


def test_the_report_says_what_the_runs_did(settings: Settings) -> None:
    methods = [METHODS["adamw"], METHODS["galore"], METHODS["sm3"]]
    low, middle, high = METHODS["galore"].lrs

    def results(run: Run) -> dict[str, Any] | None:
        if run.method == "sm3":
            return result(None, 4, 0.1)
        if run.steps == settings.grid_steps:
            return result(abs(math.log(run.lr / METHODS[run.method].lrs[1])), 0, 0)
        galore = run.method == "galore"
        return result(math.log(20 + 2 * run.seed) if galore else 3.0, 100 - 75 * galore, 1 + galore)

    adamw, galore, sm3 = planner.summarise(methods, settings, results)
    assert (galore["lr"], galore["lr_at_edge"], galore["seeds"]) == (middle, False, 2)
    assert set(galore["grid_validation_cross_entropy"]) == {f"{lr:g}" for lr in (low, middle, high)}
    # Perplexities 20 and 22: mean 21, standard deviation sqrt(2).
    assert galore["validation_perplexity"]["mean"] == pytest.approx(21)
    assert galore["validation_perplexity"]["std"] == pytest.approx(math.sqrt(2))
    assert galore["of_reference"] == {
        "state_bytes": 0.25,
        "matrix_state_bytes": 12 / 50,
        "mean_step": 2.0,
    }
    assert galore["curve"] == [3.0, pytest.approx((math.log(20) + math.log(22)) / 2)]
    assert adamw["of_reference"]["state_bytes"] == 1.0
    assert (sm3["validation_perplexity"]["mean"], sm3["lr_at_edge"]) == (None, True)
    assert sm3["curve"] == [3.0, None]
    content = {
        "settings": settings.as_dict(),
        "sizes": dict.fromkeys(
            ("parameters", "matrix_parameters", "train_tokens", "validation_tokens"), 1
        ),
        "records": [adamw, galore, sm3],
    }
    table = reporter.text(content)
    row = next(line for line in table.splitlines() if line.startswith("GaLoreAdamW"))
    assert "21.0 +- 1.4" in row
    assert "25.0%" in row
    assert "diverged" in table


def test_curves_are_means_of_whole_stretches() -> None:
    ends, means = reporter.smooth([*range(1, 11), *[None] * 10, 5.0])
    assert ends == [10, 20]
    assert means[0] == 5.5
    assert math.isnan(means[1])
    assert planner.mean_curve([[1.0, 2.0, 3.0], [3.0, None]]) == [2.0, None, None]


def test_only_report_starts_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments(settings, tmp_path, "--only-report")) == 0
    assert "no method has finished" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_state_is_counted_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    assert state_bytes(optimizer) == 0
    weight.grad = torch.ones(8)
    optimizer.step()
    assert state_bytes(optimizer) == 32
    optimizer.state[weight]["view"] = optimizer.state[weight]["momentum_buffer"][:2]
    assert state_bytes(optimizer) == 32
    assert state_bytes(optimizer, []) == 0


def test_matrices_can_have_a_rate_of_their_own(settings: Settings, task: Task) -> None:
    model, optimizer = METHODS["adamw-quarter"].build(task.model(0), 4e-3, 0, settings)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    slow = set(matrices(model).values())
    assert set(rates) == set(model.parameters())
    assert {rates[p] for p in slow} == {1e-3}
    assert {rates[p] for p in rates if p not in slow} == {4e-3}


def test_the_larger_model_is_offered_what_was_best_for_the_smaller(settings: Settings) -> None:
    larger = dataclasses.replace(settings, model="6m")
    for method in TABLE:
        lrs, extensions = method.grid(larger)
        # Learning rates have two digits.
        assert lrs == pytest.approx((method.best_lr / 2, method.best_lr), rel=0.05)
        assert extensions == 0
        assert method.grid(settings) == (method.lrs, settings.extensions)


@pytest.mark.parametrize("model", MODELS)
def test_the_committed_summary_is_that_of_the_committed_runs(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = json.loads((command.RESULTS / f"summary_{model}.json").read_text())
    # The text itself is not there; its name in the results is.
    monkeypatch.setattr(
        "bench.pretrain.task.fingerprint", lambda path: summary["settings"]["documents"]
    )
    shape = MODELS[model]
    own = Settings(model, shape.steps, shape.grid_steps, shape.seeds)
    store = command.open_store(command.RESULTS / "runs", own)
    methods = [METHODS[record["method"]] for record in summary["records"]]
    records = planner.summarise(methods, own, store)
    assert json.loads(json.dumps(finite(records))) == summary["records"]
