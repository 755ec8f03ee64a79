"""SpIEL's growth: which entries become active, and with what state."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoopt.kernels.dispatch import is_fake, known
from zoopt.kernels.journal import once
from zoopt.nn.initial import CHUNK
from zoopt.nn.largest import Largest, largest
from zoopt.optimizer import Group, TensorSpec

State = dict[str, Tensor]


def active_count(numel: int, group: Group) -> int:
    """k: how many entries of a tensor are active."""
    density: float = group["density"]
    return min(numel, max(1, int(density * numel)))


def candidate_count(count: int, numel: int, group: Group) -> int:
    """How many candidates there are of `numel` entries, `count` of them active: one for every four
    active ones, less one, or more if more are replaced. At density 1 % the state is then at most
    0.2 bytes per float32 parameter."""
    if not group["drop_fraction"]:
        return 0
    return min(max(count // 4 - 1, moving_count(count, group, 0)), numel - count)


def moving_count(count: int, group: Group, step: int) -> int:
    """p k: how many entries are replaced after that step."""
    total, share = group["total_steps"], group["drop_fraction"]
    left = 1.0 if total is None else max(0.0, 1.0 - step / total)
    moving: int = round(share * left * count)
    return moving


def growth_state(
    count: int, shape: tuple[int, ...], wide: torch.dtype, group: Group
) -> dict[str, TensorSpec]:
    """What growth keeps for a tensor of that shape with `count` active entries."""
    others = candidate_count(count, math.prod(shape), group)
    if not others:
        return {}
    if group["growth"] == "momentum":
        m, n = matrix_shape(shape)
        return {"rows": TensorSpec((m,), wide), "columns": TensorSpec((n,), wide)}
    # A sum of few gradients loses little in 16 bits.
    sums = TensorSpec((others,), torch.bfloat16 if wide == torch.float32 else wide)
    return {
        "candidates": TensorSpec((others,), torch.int32),
        "gradient_sum": sums,
        "gradient_sq_sum": sums,
    }


def window_place(step: int, group: Group) -> int:
    """The step's place in the window before a change: 0 selects candidates, later ones sum their
    gradients, and a negative one does nothing."""
    place: int = (step - 1) % group["update_gap"] - (group["update_gap"] - group["window"])
    return place


def select(state: State, candidates: Tensor, finite: bool) -> None:
    """Begin the sums of these candidates; NaN sums, which no entries grow from, if the gradient
    that selected them was not finite."""
    once(state["candidates"].copy_, candidates)
    once(state["gradient_sum"].fill_, 0.0 if finite else torch.nan)
    once(state["gradient_sq_sum"].zero_)


def seeded(total: Tensor, squares: Tensor, count: int, betas: tuple[float, float]) -> State:
    """Adam's state for entries whose gradients were summed over `count` steps. It is the state
    after `count` steps that each had the mean gradient and the mean squared gradient."""
    return {
        "exp_avg": total / count * (1.0 - betas[0] ** count),
        "exp_avg_sq": squares / count * (1.0 - betas[1] ** count),
        "age": torch.full_like(total, count, dtype=torch.int16),
    }


def products(rows: Tensor, columns: Tensor, active: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest r_i c_j among inactive entries, ascending. Rows are
    processed in chunks, so that the full product never exists."""
    n = columns.numel()
    step = max(1, CHUNK // n)
    if is_fake(rows):
        return active[:count].long()
    best = Largest(count, rows, without=active)
    for first in range(0, rows.numel(), step):
        best.add(torch.outer(rows[first : first + step], columns).view(-1), first * n)
    return best.positions


def grown(
    state: State, active: Tensor, numel: int, group: Group, step: int, betas: tuple[float, float]
) -> tuple[Tensor, State] | None:
    """The positions, int64, that become active after that step, and their moments and ages; None
    if there are none. Without seeds moments and ages are 0."""
    moving = moving_count(active.numel(), group, step)
    if "rows" in state:
        moving = min(moving, numel - active.numel())
        if not moving or not finite(state["rows"]):
            return None
        positions, zeros = products(state["rows"], state["columns"], active, moving), {}
        for name in ("exp_avg", "exp_avg_sq", "age"):
            zeros[name] = state[name].new_zeros(moving)
        return positions, zeros
    wide = state["exp_avg"].dtype
    total, squares = state["gradient_sum"].to(wide), state["gradient_sq_sum"].to(wide)
    moving = min(moving, total.numel())
    if not moving or not finite(total):
        return None
    best = largest(total.abs(), moving)
    fresh = seeded(total[best], squares[best], group["window"] - 1, betas)
    return state["candidates"][best].long(), fresh


def finite(tensor: Tensor) -> bool:
    """Whether all values are."""
    return known(torch.linalg.vector_norm(tensor, math.inf).isfinite(), True)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as a matrix's, its first axis the rows."""
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
