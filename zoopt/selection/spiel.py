"""SpIEL: a fixed number of entries per tensor train; the least changed are regularly replaced."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import check_betas, check_choice, check_number, check_positive_int
from zoopt.distributed.seed import several_ranks
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.site import Site, betas_of, descent_rate
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.philox import PURPOSE_ROUNDING, words
from zoopt.kernels.noise.reference import round_stochastic
from zoopt.nn.largest import largest
from zoopt.nn.sparse_delta import Tap, Wanted, tap_of
from zoopt.optimizer import STEP, Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register
from zoopt.selection.growth import (
    State,
    accumulate,
    active_count,
    candidate_count,
    finite,
    grown,
    growth_state,
    select,
    sm3,
    window_place,
)

Growth = Literal["accumulated", "momentum"]
#: The greatest age. With betas up to `_MOST_BETA` the bias correction is then 1 in float32.
_OLDEST = 2**15 - 1
_MOST_BETA = 0.9994


def adam_entries(gradient: Tensor, state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """mhat / (sqrt(vhat) + eps) of entries (k,), each corrected for its own age. Moments and ages
    are updated in place."""
    beta1, beta2 = betas
    age, m, v = kept(_averages, gradient, state, betas)
    for name, values in (("age", age), ("exp_avg", m), ("exp_avg_sq", v)):
        once(state[name].copy_, values)
    # In float64, because 1 - b2^age has only a few correct bits in float32 while age is small.
    exponent = age.double()
    mhat = m / (1.0 - beta1**exponent).to(m.dtype)
    vhat = v / (1.0 - beta2**exponent).to(v.dtype)
    return mhat / (vhat.sqrt() + eps)


def _averages(
    gradient: Tensor, state: State, betas: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The next ages and moments."""
    beta1, beta2 = betas
    age = state["age"].clamp(max=_OLDEST - 1).add_(1)
    m = (state["exp_avg"] * beta1).add_(gradient * (1.0 - beta1))
    v = (state["exp_avg_sq"] * beta2).add_(gradient.square() * (1.0 - beta2))
    return age, m, v


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
    and 0.16 per parameter at density 1 %. "accumulated" adds 8 bytes per candidate: an index, and
    two sums in bfloat16 (float64 for float64). There is one candidate for every four entries: 0.20
    and 0.18 in all. "momentum" adds 4 (m + n) for a tensor (m, n). `step` takes 8 bytes.

    Over a frozen base, quantised or not, the parameters are the deltas of `SparseDeltaLinear`
    layers (`zoopt.nn.convert_to_sparse_delta`), and the layer adds them to the weight it computes.
    `density` is then the layer's. The bytes are the same: 4 for a delta take the place of W0. No
    dense gradient is stored. In a window, candidates come from the first backward pass since the
    last step.

    Args:
        params: the parameters to change, for example the matrices of a model's layers; freeze the
            others. Groups with `density=1` train in full. Or the deltas of layers, as above.
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
        RuntimeError: in `step`, a sparse gradient, or one of a delta that was computed before the
            optimizer was made. Nothing has changed then.

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for all optimizers; the group's layers with sparse deltas report to this one."""
        super().add_param_group(param_group)
        self._listen()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._listen()

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`step`; `index`, `base`, moments and `age` of active entries; and the state of growth.

        For the delta of a `SparseDeltaLinear`, the layer has the indices, and the base is 0.
        """
        tap, wide = tap_of(param), accumulator_dtype(param.dtype)
        count = active_count(param.numel(), group) if tap is None else param.numel()
        number = TensorSpec((count,), wide)
        specs = {"step": STEP}
        if tap is None:
            specs["index"] = TensorSpec((count,), torch.int32)
            specs["base"] = TensorSpec((count,), param.dtype)
        specs |= {"exp_avg": number, "exp_avg_sq": number}
        specs["age"] = TensorSpec((count,), torch.int16)
        shape = tuple(param.shape) if tap is None else tap.shape
        return specs | growth_state(count, shape, wide, group)

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
            if several_ranks() and tap_of(param) is not None:
                raise ValueError(
                    "params must be the weights themselves in several processes, got the delta of "
                    "a SparseDeltaLinear: each process would choose entries of its own"
                )
            if param.numel() >= 2**31:
                raise ValueError(
                    f"a parameter must have fewer than 2^31 elements, got {param.numel()}: indices "
                    f"are int32; split it, or leave it out"
                )

    def _check_gradient(self, site: Site) -> None:
        super()._check_gradient(site)
        tap = tap_of(site.param)
        if tap is None or site.param.grad is None:
            return
        wanted = self._wanted(site.param, tap, site.group)
        if wanted is None or not tap.layer.placed:
            return
        missing = wanted.largest and tap.picked is None
        if missing or (wanted.at is not None and tap.gathered(site.param.grad) is None):
            raise RuntimeError(
                f"the gradient of {site.name!r} must come from a backward pass since the last "
                f"step, got another one; run loss.backward() after the optimizer has been made or "
                f"loaded"
            )

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        state = self._state(site.param, site.group)
        if not gradient.numel():
            return None
        if int(state["step"]) == 0 and not finite(gradient):
            return None  # There are no entries yet, and this gradient cannot select any.
        tap = tap_of(site.param)
        others = None if tap is None else tap.gathered(gradient)
        return gradient if others is None else torch.cat((gradient, others))

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        state, tap = self.state[site.param], tap_of(site.param)
        if tap is None:
            _step_in_place(site, state, reduced.reshape(-1))
        else:
            _step_beside(site, state, reduced, tap)
        once(state["step"].add_, 1)

    def _listen(self) -> None:
        """Have the layers with sparse deltas ask this optimizer what it wants of a gradient."""
        own = weakref.ref(self)
        for group in self.param_groups:
            for param in group["params"]:
                tap = tap_of(param)
                if tap is not None:
                    tap.asks = functools.partial(_asked, own, weakref.ref(param))

    def _wanted(self, param: Tensor, tap: Tap, group: Group) -> Wanted | None:
        """What the next step needs of the gradient of the whole weight beside a delta."""
        if group["growth"] == "momentum":
            return None
        state, count = self.state.get(param, {}), param.numel()
        others = candidate_count(count, math.prod(tap.shape), group)
        place = window_place(int(state["step"]) + 1 if state else 1, group)
        if place < 0 or not others:
            return None
        return Wanted(largest=others) if place == 0 else Wanted(at=state["candidates"])


def _asked(optimizer: weakref.ref[SparseDeltaAdamW], param: weakref.ref[Tensor]) -> Wanted | None:
    own, delta = optimizer(), param()
    tap = None if delta is None else tap_of(delta)
    if own is None or delta is None or tap is None:
        return None
    [group] = [g for g in own.param_groups if any(p is delta for p in g["params"])]
    return own._wanted(delta, tap, group)


def _step_in_place(site: Site, state: State, grad: Tensor) -> None:
    """Step the active entries of a parameter (n,), and change them when it is time."""
    param, group, step = site.param, site.group, int(state["step"]) + 1
    theta = kept(param.detach().reshape, -1)
    if step == 1:
        first = kept(largest, grad.abs(), state["index"].numel())
        once(state["base"].copy_, kept(theta.__getitem__, first))
        once(state["index"].copy_, first)
    active = kept(state["index"].long)
    own = grad[active].to(state["exp_avg"].dtype)
    direction = adam_entries(own, state, betas_of(group), group["eps"])
    weights = kept(theta.__getitem__, active).to(direction.dtype)
    decay = float(group["lr"]) * group["weight_decay"]
    change = (state["base"].to(direction.dtype) - weights) * decay
    moved = weights + change + direction * descent_rate(group)
    once(theta.__setitem__, active, _rounded(moved, site, active, step))
    place = window_place(step, group)
    if "rows" in state:
        sm3(state, own, active)
    elif "candidates" in state and place == 0:
        sizes = grad.abs().nan_to_num_(0.0)
        sizes[active] = -1.0
        select(state, largest(sizes, state["candidates"].numel()), finite(grad))
    elif "candidates" in state and place > 0:
        accumulate(state, grad[state["candidates"].long()].to(own.dtype))
    if step % group["update_gap"] == 0 and ("rows" in state or "candidates" in state):
        changes = kept(_changes, state, theta, active, group, step)
        if changes is not None:
            places, dropped, before, new = changes
            once(theta.__setitem__, dropped, before)
            for name, values in new.items():
                once(state[name].__setitem__, places, values)
    if not param.is_contiguous():
        once(param.copy_, theta.view(param.shape))


def _changes(
    state: State, theta: Tensor, active: Tensor, group: Group, step: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]] | None:
    """The places of the entries that are dropped, their positions and what they were before, and
    the state of those that become active. None if there are none."""
    found = grown(state, active, theta.numel(), group, step, betas_of(group))
    if found is None:
        return None
    base, wide = state["base"], state["exp_avg"].dtype
    changes = (theta[active].to(wide) - base.to(wide)).abs()
    places = largest(-changes, found[0].numel())
    new = {"index": found[0].to(state["index"].dtype), "base": theta[found[0]], **found[1]}
    return places, active[places], base[places], new


def _step_beside(site: Site, state: State, reduced: Tensor, tap: Tap) -> None:
    """Step the entries of a layer's delta (k,), and change them when it is time.

    Args:
        reduced: the gradient of the delta and, in a window, of the candidates.
    """
    group, step, layer = site.group, int(state["step"]) + 1, tap.layer
    delta, index = site.param.detach(), layer.index
    own, others = reduced[: delta.numel()], reduced[delta.numel() :]
    direction = adam_entries(own, state, betas_of(group), group["eps"])
    decay = float(group["lr"]) * group["weight_decay"]
    once(delta.add_, direction * descent_rate(group) - delta * decay)
    place = window_place(step, group)
    picked, finite_here = kept(lambda: (tap.picked, tap.picked_finite))
    if "rows" in state:
        sm3(state, own, index.long())
    elif "candidates" in state and place == 0 and picked is not None:
        select(state, picked, finite_here)
    elif "candidates" in state and place > 0:
        accumulate(state, others)
    once(tap.stepped)
    if step % group["update_gap"] == 0 and ("rows" in state or "candidates" in state):
        numel = math.prod(tap.shape)
        found = kept(grown, state, index, numel, group, step, betas_of(group))
        if found is not None:
            places = kept(largest, -delta.abs(), found[0].numel())
            once(delta.__setitem__, places, 0.0)
            once(index.__setitem__, places, found[0].to(index.dtype))
            for name, values in found[1].items():
                once(state[name].__setitem__, places, values)


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
