"""Arithmetic of recorded runs: differences, merges, reverts, and where two runs part."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import nn

import zoopt
from tests.compare import same
from tests.optimizer_table import closure_of, mlp
from zoopt.cli import main
from zoopt.trajectory import TrajectoryError, delta, diff, drop, merge, replay, revert


def run(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> list[nn.Module]:
    """The model before a recorded run of 6 steps, and after each of them."""
    states = [mlp(dtype)]
    model = copy.deepcopy(states[0])
    options = {"lr": 1e-2, "seed": 3, **options}
    optimizer = zoopt.MeZO(model.named_parameters(), **options)
    recorder = optimizer.record(path, model)
    for _ in range(6):
        optimizer.step(closure_of(model, dtype))
        states.append(copy.deepcopy(model))
    recorder.close()
    return states


def moved(after: nn.Module, before: nn.Module) -> dict[str, torch.Tensor]:
    old = dict(before.named_parameters())
    return {n: p.detach().float() - old[n].detach().float() for n, p in after.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_leaves_the_base_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    states = run(tmp_path / "run", dtype)
    model = copy.deepcopy(states[0])
    next(model.parameters()).requires_grad_(False)
    found = delta(model, tmp_path / "run", until=4)
    assert same(model, states[0])
    assert not next(model.parameters()).requires_grad
    expected = moved(states[4], states[0])
    assert found.keys() == {name for name, value in expected.items() if value.any()}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_runs_add_up_with_weights(tmp_path: Path) -> None:
    """In float32: two products and two sums, each rounded, and one rounding of the weight."""
    first, second = run(tmp_path / "a"), run(tmp_path / "b", seed=4)
    model = copy.deepcopy(first[0])
    merge(model, [tmp_path / "a", tmp_path / "b"], [0.7, -0.2])
    one, two = moved(first[-1], first[0]), moved(second[-1], second[0])
    for name, param in first[0].named_parameters():
        expected = param.double() + 0.7 * one[name].double() - 0.2 * two[name].double()
        got = model.get_parameter(name).double()
        assert (got - expected).abs().max() <= 4 * 2.0**-24 * (param.abs().max() + 1)
    model = copy.deepcopy(first[0])
    merge(model, [tmp_path / "a"])
    for p, q in zip(model.parameters(), first[-1].parameters(), strict=True):
        # theta_0 + (theta_T - theta_0), of which both sums round.
        torch.testing.assert_close(p, q, atol=2.0**-22, rtol=0)


def test_merging_refuses_what_it_cannot_weigh(tmp_path: Path) -> None:
    states = run(tmp_path / "a")
    model = copy.deepcopy(states[0])
    for paths, weights in (([], None), ([tmp_path / "a"], [1.0, 2.0])):
        with pytest.raises(ValueError, match="weights must have a number for each run"):
            merge(model, paths, weights)
    with pytest.raises(ValueError, match=r"weights\[0\]"):
        merge(model, [tmp_path / "a"], [math.nan])
    with pytest.raises(ValueError, match="p must be"):
        merge(model, [tmp_path / "a"], p=1.0)
    assert same(model, states[0])
    other = copy.deepcopy(states[1])
    with pytest.raises(TrajectoryError, match="weights are not those"):
        merge(other, [tmp_path / "a"])
    merge(other, [tmp_path / "a"], check_base=False)
    assert not same(other, states[1])


def test_dropping_has_the_statistics_of_pefts_pruning() -> None:
    """Over n elements of a difference x: kept elements are x / (1 - p) to the bit in both, and
    their number and the mean lie within 5 sigma of their expectations, in peft's as in ours."""
    n, p = 1 << 16, 0.75
    x = torch.randn(n, generator=torch.Generator().manual_seed(1)) + 1.0
    ours = drop(x, p, seed=5, name="weight")
    theirs = merge_utils.prune(x, 1 - p, method="random", rescale=True)
    sigma_mean = math.sqrt(p / (1 - p) * x.double().square().mean() / n)
    for pruned in (ours, theirs):
        kept = pruned != 0
        assert torch.equal(pruned[kept], x[kept] / (1 - p))
        assert abs(int(kept.sum()) - n * (1 - p)) <= 5 * math.sqrt(n * p * (1 - p))
        assert abs(pruned.double().mean() - x.double().mean()) <= 5 * sigma_mean
    assert torch.equal(ours, drop(x, p, seed=5, name="weight"))
    for other in ({"seed": 6}, {"name": "bias"}, {"draw": 1}):
        both = (ours != 0) & (drop(x, p, **{"seed": 5, "name": "weight", **other}) != 0)
        assert abs(int(both.sum()) - n * (1 - p) ** 2) <= 5 * math.sqrt(n * (1 - p) ** 2)
    assert torch.equal(drop(x, 0.0, seed=5, name="weight"), x)


@pytest.mark.parametrize("mode", ["inplace", "virtual"])
def test_trained_weights_go_back_to_any_step(mode: str, tmp_path: Path) -> None:
    """With the base to the bit; without, up to rounding: each of 6 steps rounds weights below 4 up
    to three times, by 2^-23, and to take it away rounds twice more."""
    states = run(tmp_path / "run", perturbation=mode, weight_decay=0.1)
    base = states[0].state_dict()
    for until in (0, 4, 6):
        model = copy.deepcopy(states[-1])
        revert(model, tmp_path / "run", until, base=base)
        assert same(model, states[until])
        model = copy.deepcopy(states[-1])
        revert(model, tmp_path / "run", until)
        for p, q in zip(model.parameters(), states[until].parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=20 * 2.0**-22, rtol=0)
    model = copy.deepcopy(states[-1])
    with pytest.raises(ValueError, match=r"until must be in \[0, 6\]"):
        revert(model, tmp_path / "run", 7)
    with pytest.raises(ValueError, match=r"base and model must have '0\.weight'"):
        revert(model, tmp_path / "run", 3, base={})
    wrong = {name: value + 1 for name, value in base.items()}
    with pytest.raises(TrajectoryError, match="weights are not those"):
        revert(model, tmp_path / "run", 3, base=wrong)
    assert same(model, states[-1])


def test_where_runs_part(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", lr=2e-2)
    run(tmp_path / "c")
    found = diff(tmp_path / "a", tmp_path / "b")
    assert ("lr of group 0", 0.01, 0.02) in found.settings
    assert found.common == 1  # The first step's losses are those of the same base.
    assert found.first != found.second
    assert diff(tmp_path / "a", tmp_path / "c").same


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = run(tmp_path / "a")
    run(tmp_path / "b", seed=4)
    names = [str(tmp_path / name) for name in ("a", "b", "base", "tuned", "out")]
    a, b, base, tuned, out = names
    save_file(states[0].state_dict(), base)
    save_file(states[-1].state_dict(), tuned)

    def written() -> dict[str, torch.Tensor]:
        return load_file(out)

    assert main(["trajectory", "merge", a, b, "--base", base, "--out", out, "--drop", "0.5"]) == 0
    model = copy.deepcopy(states[0])
    merge(model, [a, b], p=0.5)
    assert all(torch.equal(written()[name], p) for name, p in model.named_parameters())
    options = ["merge", a, "--weights", "1", "--base", base, "--out", out, "--delta"]
    assert main(["trajectory", *options]) == 0
    assert written().keys() == delta(copy.deepcopy(states[0]), a).keys()
    options = ["revert", a, "--trained", tuned, "--until", "3", "--out", out]
    assert main(["trajectory", *options]) == 0
    model = copy.deepcopy(states[-1])
    revert(model, a, 3)
    assert all(torch.equal(written()[name], p) for name, p in model.named_parameters())
    capsys.readouterr()
    assert main(["trajectory", "diff", a, a]) == 0
    assert "one run: 6 steps" in capsys.readouterr().out
    assert main(["trajectory", "diff", a, b]) == 1
    assert "seed of group 0" in capsys.readouterr().out
    assert main(["trajectory", "merge", a, "--base", tuned, "--out", out]) == 2
    message = capsys.readouterr().err
    assert "weights are not those" in message
    assert "pass --other-base" in message
    with pytest.raises(SystemExit):
        main(["trajectory", "merge", a, "--base", base, "--out", out, "--drop", "1.5"])
    assert "expected a number in [0, 1), got '1.5'" in capsys.readouterr().err
    replay(states[0], a)
    assert same(states[0], states[-1])
