"""Arithmetic with recorded runs: their difference from the base, merging, reverting, comparing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoopt import noise
from zoopt.checks import check_number
from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.noise.key import NoiseKey
from zoopt.trajectory.format import Contents, Event, read, steps_of
from zoopt.trajectory.header import rebuild
from zoopt.trajectory.replay import check_until, replay, script_of

#: Called with the number of a step and the number of steps.
Progress = Callable[[int, int], None]


def delta(
    model: Any,
    path: str | Path,
    *,
    until: int | None = None,
    exact: bool = True,
    check_base: bool = True,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The difference that a run makes to its base: trained - base, by name.

    Args:
        model: holds the base weights, which are restored afterwards.
        path, until, exact, check_base, progress: as for `zoopt.replay`.

    Returns:
        name -> difference, for each parameter that the run changed. The dtype is float32, or
        float64 for float64 parameters.

    Raises:
        TrajectoryError, ValueError: as for `zoopt.replay`.
    """
    params = dict(model.named_parameters())
    names = [param["name"] for param in read(path).header["params"]]
    before = {name: params[name].detach().clone() for name in names if name in params}
    flags = {name: params[name].requires_grad for name in before}
    try:
        replay(model, path, until=until, exact=exact, check_base=check_base, progress=progress)
        moved = {name: _wide(params[name]) - _wide(old) for name, old in before.items()}
    finally:
        for name, old in before.items():
            params[name].detach().copy_(old)
            params[name].requires_grad_(flags[name])
    return {name: difference for name, difference in moved.items() if difference.any()}


def drop(values: Tensor, p: float, *, seed: int, name: str, draw: int = 0) -> Tensor:
    """Drop elements at random and rescale the others (DARE; Yu et al., 2024, arXiv:2311.03099).

    Each element becomes 0 with probability p and is divided by 1 - p otherwise, so its expectation
    does not change. The mask comes from the noise generator: it is the same for the same seed, name
    and draw.

    Args:
        values: a floating tensor of any shape.
        p: from 0 to 1 - 2^-16. 1 - p is rounded to a multiple of 2^-16, and the kept elements are
            divided by the rounded value.
        seed: 64 bits.
        name: the name of the parameter; parameters have independent masks.
        draw: 32 bits; gives each of several merged runs its own mask.

    Returns:
        A new tensor.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """
    check_number("p", p, low=0.0, high=1.0 - 2.0**-16)
    key = NoiseKey(seed, noise.stream(name), density=1.0 - float(p))
    if key.threshold is None or not values.numel():
        return values.clone()
    kept = noise.mask(
        values.numel(),
        seed=seed,
        stream=key.stream,
        draw=draw,
        density=key.density,
        device=values.device,
    ).view(values.shape)
    return torch.where(kept, values / key.density, torch.zeros_like(values))


def merge(
    model: Any,
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    p: float = 0.0,
    seed: int = 0,
    exact: bool = True,
    check_base: bool = True,
    progress: Progress | None = None,
) -> None:
    """Add several runs to one base (task arithmetic; Ilharco et al., 2023, arXiv:2212.04089):

        theta <- round(theta_0 + sum_i weights[i] drop(theta_i - theta_0))

    Args:
        model: holds the base weights, which are changed in place.
        paths: the files of the runs.
        weights: one for each run; default 1 / the number of runs.
        p: drop each element of a run's difference with this probability, and divide the others by
            1 - p (see `drop`, with the run's number as the draw); default 0.
        seed: seed of the masks, 64 bits; default 0.
        exact, check_base, progress: as for `zoopt.replay`. Pass check_base=False if the runs did
            not start from the model's weights.

    Sums are in float32 (float64 for float64 parameters) and rounded once, to nearest.

    Raises:
        TrajectoryError, ValueError: as for `zoopt.replay`; or there are no runs, or the number of
            weights is not that of the runs. The model is then unchanged.
    """
    if isinstance(paths, str | Path):
        raise TypeError(f"paths must be a sequence of files, got {paths!r}; pass [{paths!r}]")
    weights = [1.0 / max(1, len(paths))] * len(paths) if weights is None else list(weights)
    if not paths or len(weights) != len(paths):
        raise ValueError(
            f"weights must have a number for each run, and there must be a run, got "
            f"{len(weights)} weights and {len(paths)} runs"
        )
    for i, weight in enumerate(weights):
        check_number(f"weights[{i}]", weight)
    check_number("p", p, low=0.0, high=1.0 - 2.0**-16)
    total: dict[str, Tensor] = {}
    for i, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        moved = delta(model, path, exact=exact, check_base=check_base, progress=progress)
        for name, difference in moved.items():
            part = drop(difference, p, seed=seed, name=name, draw=i).mul_(float(weight))
            total[name] = total[name].add_(part) if name in total else part
    params = dict(model.named_parameters())
    for name, part in total.items():
        param = params[name].detach()
        param.copy_(_wide(param) + part)


def revert(
    model: Any,
    path: str | Path,
    until: int,
    *,
    base: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Return trained weights to an earlier step.

    Args:
        model: holds the weights after the run's last step, which are changed in place.
        path: the file.
        until: the step to go back to; 0 is the base.
        base: the base weights by name. With them the result is bit for bit the run's weights at
            that step. Without them the sum of all later steps is subtracted in one pass, and the
            result is equal up to rounding.
        progress: as for `zoopt.replay`.

    Raises:
        TrajectoryError, ValueError: as for `zoopt.replay`; or base lacks a parameter; or, without
            a base, the method's steps are not sums of directions. The model is then unchanged.
    """
    contents = read(path)
    if type(until) is not int:
        raise TypeError(f"until must be an int, the step to go back to, got {until!r}")
    check_until(contents, path, until)
    if base is None:
        steps = list(steps_of(contents.events))
        later = reversed(script_of(rebuild(contents.header, model), steps, until))
        undone = [(kind, [write.undone() for write in writes]) for kind, writes in later]
        for kind, writes in undone:
            kind.make(writes)
        return
    params = dict(model.named_parameters())
    names = [param["name"] for param in contents.header["params"]]
    missing = [name for name in names if name not in base or name not in params]
    if missing:
        raise ValueError(f"base and model must have {missing[0]!r}, got none of that name")
    trained = {name: params[name].detach().clone() for name in names}
    try:
        for name in names:
            params[name].detach().copy_(base[name])
        replay(model, path, until=until, progress=progress)
    except BaseException:
        for name, old in trained.items():
            params[name].detach().copy_(old)
        raise


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two runs differ.

    Attributes:
        settings: the settings that differ: (name, value in the first, value in the second).
        steps: the number of steps of each.
        common: how many steps from the start are the same in both.
        first, second: the events of the next step of each; empty if there is none.
    """

    settings: list[tuple[str, Any, Any]]
    steps: tuple[int, int]
    common: int
    first: list[Event]
    second: list[Event]

    @property
    def same(self) -> bool:
        """Whether settings and steps are all equal."""
        return not self.settings and self.steps == (self.common, self.common)


def diff(first: str | Path, second: str | Path) -> Difference:
    """Compare two runs: their settings, and the first step whose events differ.

    Args:
        first, second: the files.

    Raises:
        TrajectoryError: as for `zoopt.replay`.
    """
    contents = read(first), read(second)
    steps = [list(steps_of(own.events)) for own in contents]
    # Events are compared as text, because NaN is not equal to itself.
    common = 0
    for pair in zip(*steps, strict=False):
        if repr(pair[0]) != repr(pair[1]):
            break
        common += 1
    settings = _settings(contents[0]), _settings(contents[1])
    names = [*settings[0], *(name for name in settings[1] if name not in settings[0])]
    parted = [own[common] if common < len(own) else [] for own in steps]
    return Difference(
        [
            (name, settings[0].get(name), settings[1].get(name))
            for name in names
            if settings[0].get(name) != settings[1].get(name)
        ],
        (contents[0].steps, contents[1].steps),
        common,
        *parted,
    )


def _settings(contents: Contents) -> dict[str, Any]:
    """The settings in a header, as a flat mapping from name to value."""
    header = copy.deepcopy(contents.header)
    flat: dict[str, Any] = {}
    for number, group in enumerate(header.pop("groups")):
        for name, value in group["options"].items():
            flat[f"{name} of group {number}"] = value
        flat[f"parameters of group {number}"] = group["count"]
    for param in header.pop("params"):
        flat[f"parameter {param['name']}"] = f"{param['dtype']} {tuple(param['shape'])}"
    return {**{name: value for name, value in header.items() if name != "trained"}, **flat}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(accumulator_dtype(tensor.dtype))
