"""SpIEL: a fixed number of entries per tensor train; the least changed are regularly replaced."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import check_betas, check_choice, check_number, check_positive_int
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.base import (
    FirstOrderOptimizer,
    Site,
    betas_of,
    descent_rate,
)
from zoopt.kernels.dispatch import is_fake, known
from zoopt.kernels.noise.philox import PURPOSE_ROUNDING, words
from zoopt.kernels.noise.reference import round_stochastic
from zoopt.optimizer import STEP, Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register

State = dict[str, Tensor]
Growth = Literal["accumulated", "momentum"]
#: The greatest age. With betas up to `_MOST_BETA` the bias correction is then 1 in float32.
_OLDEST = 2**15 - 1
_MOST_BETA = 0.9994
#: How many scores are computed or compared at a time.
_CHUNK = 1 << 20


def adam_entries(gradient: Tensor, state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """mhat / (sqrt(vhat) + eps) of entries (k,), each corrected for its own age. Moments and ages
    are updated in place."""
    beta1, beta2 = betas
    age, m, v = state["age"], state["exp_avg"], state["exp_avg_sq"]
    age.clamp_(max=_OLDEST - 1).add_(1)
    m.mul_(beta1).add_(gradient * (1.0 - beta1))
    v.mul_(beta2).add_(gradient.square() * (1.0 - beta2))
    # In float64, because 1 - b2^age has only a few correct bits in float32 while age is small.
    exponent = age.double()
    mhat = m / (1.0 - beta1**exponent).to(m.dtype)
    vhat = v / (1.0 - beta2**exponent).to(v.dtype)
    return mhat / (vhat.sqrt() + eps)


def largest(scores: Tensor, count: int) -> Tensor:
    """The positions of the `count` largest scores (n,), ascending. Ties go to the first ones."""
    if is_fake(scores):
        return torch.topk(scores, count).indices
    top = torch.topk(scores, count).values
    least = top[-1]
    wanted = count - int((top > least).sum())  # How many of the tied scores to take.
    found = []
    for start in range(0, scores.numel(), _CHUNK):
        run = scores[start : start + _CHUNK]
        above = (run > least).nonzero().squeeze(1)
        equal = (run == least).nonzero().squeeze(1)[:wanted]
        wanted -= equal.numel()
        found.append(torch.cat((above, equal)).add_(start))
    return torch.cat(found).sort().values


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
    step = max(1, _CHUNK // n)
    if is_fake(rows):
        return active[:count].long()
    best = rows.new_empty(0)
    where = active.new_empty(0, dtype=torch.int64)
    ordered = active.long().sort().values
    for first in range(0, rows.numel(), step):
        run = torch.outer(rows[first : first + step], columns).view(-1)
        start, stop = first * n, first * n + run.numel()
        inside = ordered[(ordered >= start) & (ordered < stop)] - start
        run[inside] = -1.0
        own = largest(run, min(count, run.numel()))
        best, where = torch.cat((best, run[own])), torch.cat((where, own + start))
        kept = largest(best, min(count, best.numel()))
        best, where = best[kept], where[kept]
    return where


@register("sparse-delta-adamw", "compact", Variant(), Variant("momentum", {"growth": "momentum"}))
class SparseDeltaAdamW(FirstOrderOptimizer):
    r"""SpIEL (Ansell et al., 2024): Adam on a fixed number of entries of each tensor.

    arXiv:2401.16405. k = density numel entries i of a tensor are active. W0 is an entry's weight
    when it became active. Each active entry has its own moments and age a:

        m_i <- b1 m_i + (1 - b1) g_i,    v_i <- b2 v_i + (1 - b2) g_i^2
        W_i <- W_i - lr weight_decay (W_i - W0_i) - lr mhat_i / (sqrt(vhat_i) + eps)

    with mhat_i = m_i / (1 - b1^a). Every `update_gap` steps the p k active entries with the
    smallest |W_i - W0_i| are dropped: W_i <- W0_i, bit for bit. As many others become active:

        growth="accumulated": those with the largest |sum g|. The sum is over the last `window`
            steps before. The first of these takes the entries with the largest |g| as candidates.
            The other n sum their g and g^2. Then m = (sum g / n)(1 - b1^n),
            v = (sum g^2 / n)(1 - b2^n), a = n.
        growth="momentum": those with the largest r_i c_j. r and c are SM3's accumulators of rows
            and columns over the active entries' gradients: for (i, j), nu = min(r_i, c_j) + g^2,
            r_i = max_j nu, c_j = max_i nu. m = v = a = 0.

    The first active entries are those with the largest |g| in the first gradient. Weights are
    changed in place, so nothing has to be merged for inference. `sparse_delta` extracts what the
    run has changed, a few MB. `zoopt.selection.apply_delta` and `remove_delta` apply it to the base
    and remove it, bit for bit.

    State, in bytes per active entry: 4 for its index, the size of a weight for W0, 8 for moments
    (16 in float64) and 2 for the age. This is 18 for float32 weights and 16 for bfloat16, or 0.18
    and 0.16 per parameter at density 1 %. "accumulated" adds 12 bytes per candidate, and there is
    one candidate for every three entries: 0.22 and 0.20 in all. "momentum" adds 4 (m + n) for a
    tensor (m, n). `step` takes 8 bytes.

    Args:
        params: the parameters to change, for example the matrices of a model's layers; freeze the
            others. Groups with `density=1` train in full.
        lr: learning rate; default 1e-3.
        betas: decay of the moments; default (0.9, 0.999). The second is at most 0.9994.
        eps: added to the denominator; default 1e-8.
        weight_decay: decoupled decay of the change W - W0; default 0.
        density: share of active entries, in (0, 1]; default 0.01. At least one entry is active.
        update_gap: S, steps from one change of the active entries to the next; default 20 (the
            authors' code).
        window: gamma, the number of steps that "accumulated" uses; default 5 (the authors' code).
        drop_fraction: p; default 0.2 (the authors' code).
        total_steps: T; p is then drop_fraction (1 - t / T) (the authors' code). Default None: p is
            constant.
        growth: "accumulated" (default; SpIEL-AG) or "momentum" (SpIEL-MA).
        rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from the paper: there the first entries are random and all of them are replaced the
    first time, and there are as many candidates as entries, which may be active already. The
    paper's "momentum" form uses SM3 throughout; here entries have Adam's moments in both forms.
    Differs from the authors' code: there ages stay at 1 in bfloat16, and r c^T is computed in full.
    A gradient that is not finite selects no candidates, and no entries are replaced if the sums are
    not finite.

    Example:
        >>> opt = zoopt.SparseDeltaAdamW(model.model.layers.named_parameters(), lr=1e-4)
        >>> model(**batch).loss.backward()
        >>> opt.step()
        >>> torch.save(zoopt.selection.sparse_delta(opt), "delta.pt")
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.01,
        update_gap: int = 20,
        window: int = 5,
        drop_fraction: float = 0.2,
        total_steps: int | None = None,
        growth: Growth = "accumulated",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`step`; `index`, `base`, moments and `age` of active entries; and the state of growth."""
        count, wide = active_count(param.numel(), group), accumulator_dtype(param.dtype)
        number, entry = TensorSpec((count,), wide), TensorSpec((count,), torch.int32)
        specs = {
            "step": STEP,
            "index": entry,
            "base": TensorSpec((count,), param.dtype),
            "exp_avg": number,
            "exp_avg_sq": number,
            "age": TensorSpec((count,), torch.int16),
        }
        others = candidate_count(param.numel(), group)
        if not others:
            return specs
        if group["growth"] == "momentum":
            m, n = _matrix_shape(param)
            return specs | {"rows": TensorSpec((m,), wide), "columns": TensorSpec((n,), wide)}
        return specs | {
            "candidates": TensorSpec((others,), torch.int32),
            "gradient_sum": TensorSpec((others,), wide),
            "gradient_sq_sum": TensorSpec((others,), wide),
        }

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_number("betas[1]", group["betas"][1], high=_MOST_BETA)
        check_number("eps", group["eps"], low=0.0)
        check_number("density", group["density"], low=0.0, high=1.0, open_low=True)
        check_positive_int("update_gap", group["update_gap"])
        check_positive_int("window", group["window"])
        if group["total_steps"] is not None:
            check_positive_int("total_steps", group["total_steps"])
        check_number("drop_fraction", group["drop_fraction"], low=0.0, high=1.0)
        check_choice("growth", group["growth"], get_args(Growth))
        if not 2 <= group["window"] <= group["update_gap"]:
            raise ValueError(
                f"window must be from 2 to update_gap={group['update_gap']}, got "
                f"{group['window']}: its first step takes candidates and the others sum over them"
            )
        for param in group["params"]:
            if param.numel() >= 2**31:
                raise ValueError(
                    f"a parameter must have fewer than 2^31 elements, got {param.numel()}: indices "
                    f"are int32; split it, or leave it out"
                )

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        state = self._state(site.param, site.group)
        if not gradient.numel():
            return None
        if int(state["step"]) == 0 and not _finite(gradient):
            return None  # There are no entries yet, and this gradient cannot select any.
        return gradient

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        param, group, grad = site.param, site.group, reduced.reshape(-1)
        state = self.state[param]
        theta = param.detach().reshape(-1)
        state["step"] += 1
        step = int(state["step"])
        if step == 1:
            first = largest(grad.abs(), state["index"].numel())
            state["index"].copy_(first)
            state["base"].copy_(theta[first])
        active = state["index"].long()
        own = grad[active].to(state["exp_avg"].dtype)
        direction = adam_entries(own, state, betas_of(group), group["eps"])
        weights = theta[active].to(direction.dtype)
        decay = float(group["lr"]) * group["weight_decay"]
        change = (state["base"].to(direction.dtype) - weights) * decay
        moved = weights + change + direction * descent_rate(group)
        theta[active] = _rounded(moved, site, active, step)
        if "rows" in state:
            _sm3(state, own, active)
        elif "candidates" in state:
            _accumulate(state, grad, active, group, step)
        if step % group["update_gap"] == 0 and ("rows" in state or "candidates" in state):
            _change_places(state, theta, group, step)
        if not param.is_contiguous():
            param.copy_(theta.view(param.shape))


def active_count(numel: int, group: Group) -> int:
    """k: how many entries of a tensor are active."""
    density: float = group["density"]
    return min(numel, max(1, int(density * numel)))


def candidate_count(numel: int, group: Group) -> int:
    """How many candidates there are: a third of the entries, or more if more are replaced."""
    count = active_count(numel, group)
    most = max(math.ceil(count / 3), _moving(count, group, 0))
    return min(most, numel - count) if group["drop_fraction"] else 0


def _moving(count: int, group: Group, step: int) -> int:
    """p k: how many entries are replaced after that step."""
    total, share = group["total_steps"], group["drop_fraction"]
    left = 1.0 if total is None else max(0.0, 1.0 - step / total)
    moving: int = round(share * left * count)
    return moving


def _accumulate(state: State, grad: Tensor, active: Tensor, group: Group, step: int) -> None:
    """Select candidates in the window's first step; sum their gradients in the others."""
    place = (step - 1) % group["update_gap"] - (group["update_gap"] - group["window"])
    if place < 0:
        return
    candidates = state["candidates"]
    if place == 0:
        sizes = grad.abs().nan_to_num_(0.0)
        sizes[active] = -1.0
        candidates.copy_(largest(sizes, candidates.numel()))
        state["gradient_sum"].zero_()
        state["gradient_sq_sum"].zero_()
        if not _finite(grad):
            state["gradient_sum"].fill_(torch.nan)
        return
    own = grad[candidates.long()].to(state["gradient_sum"].dtype)
    state["gradient_sum"].add_(own)
    state["gradient_sq_sum"].add_(own.square())


def _sm3(state: State, own: Tensor, active: Tensor) -> None:
    """Update SM3-II's accumulators with the active entries' gradients, (k,)."""
    rows, columns = state["rows"], state["columns"]
    i, j = active // columns.numel(), active % columns.numel()
    nu = torch.minimum(rows[i], columns[j]) + own.square()
    rows.scatter_reduce_(0, i, nu, "amax")
    columns.scatter_reduce_(0, j, nu, "amax")


def _change_places(state: State, theta: Tensor, group: Group, step: int) -> None:
    """Drop the entries that have changed least, and activate as many others."""
    index, base = state["index"], state["base"]
    moving, fresh = _moving(index.numel(), group, step), {}
    if "rows" in state:
        if not _finite(state["rows"]):
            return
        moving = min(moving, theta.numel() - index.numel())
        grown = products(state["rows"], state["columns"], index, moving) if moving else None
    else:
        total = state["gradient_sum"]
        if not _finite(total):
            return
        moving = min(moving, total.numel())
        best = largest(total.abs(), moving) if moving else index[:0].long()
        grown = state["candidates"][best].long()
        fresh = seeded(
            total[best], state["gradient_sq_sum"][best], group["window"] - 1, betas_of(group)
        )
    if not moving or grown is None:
        return
    wide = state["exp_avg"].dtype
    changes = (theta[index.long()].to(wide) - base.to(wide)).abs()
    places = largest(-changes, moving)
    theta[index[places].long()] = base[places]
    index[places], base[places] = grown.to(index.dtype), theta[grown]
    for name in ("exp_avg", "exp_avg_sq", "age"):
        state[name][places] = fresh[name] if fresh else 0


def _rounded(values: Tensor, site: Site, index: Tensor, step: int) -> Tensor:
    """Round entries to the weights' dtype; if stochastically, with the bits of their positions."""
    draw = site.rounding_draw(step)
    if draw is None or is_fake(values):
        return values.to(site.param.dtype)
    block, place = index // 8, index % 8
    key = site.key
    made = words(block, seed=key.seed, stream=key.stream, draw=draw, purpose=PURPOSE_ROUNDING)
    word = made.gather(1, (place // 2).unsqueeze(1)).squeeze(1)
    bits = torch.where(place % 2 == 0, word & 0xFFFF, word >> 16)
    return round_stochastic(values, site.param.dtype, bits)


def _finite(tensor: Tensor) -> bool:
    return known(torch.linalg.vector_norm(tensor, math.inf).isfinite(), True)


def _matrix_shape(param: Tensor) -> tuple[int, int]:
    if param.dim() < 2:
        return 1, param.numel()
    return param.shape[0], math.prod(param.shape[1:])
