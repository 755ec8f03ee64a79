"""SpIEL: a fixed number of entries per tensor train; the least changed are regularly replaced."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import check_betas, check_choice, check_number, check_positive_int
from zoopt.distributed.seed import several_ranks
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.site import Site, batch_kind
from zoopt.kernels.journal import kept
from zoopt.nn.sparse_delta import Tap, Wanted, gathered_together, tap_of
from zoopt.optimizer import STEP, Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register
from zoopt.selection.entries import step_entries
from zoopt.selection.growth import (
    active_count,
    candidate_count,
    finite,
    growth_state,
    window_place,
)

Growth = Literal["accumulated", "momentum"]
#: With betas up to this the bias correction of the greatest age, `OLDEST`, is 1 in float32.
_MOST_BETA = 0.9994


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
    dense gradient is stored. In a window, candidates come from the first backward pass of a step's
    gradient.

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
        if missing or (wanted.at is not None and not tap.has_gathered):
            raise RuntimeError(
                f"the gradient of {site.name!r} must come from a backward pass since the last "
                f"step, got another one; run loss.backward() after the optimizer has been made or "
                f"loaded"
            )

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        """There must be entries, and at first a gradient that can select them."""
        if not gradient.numel():
            return False
        return int(self._state(site.param, site.group)["step"]) > 0 or finite(gradient)

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        if not self._prepare(site, gradient):
            return None
        return self._reduce_together([site], [gradient])[0]

    def _reduce_together(
        self, sites: Sequence[Site], gradients: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """The gradients, each of a delta followed by that of the candidates in a window."""
        pairs = zip(gradients, _of_candidates(sites, gradients), strict=True)
        return [own if more is None else torch.cat((own, more)) for own, more in pairs]

    def _kind(self, site: Site, gradient: Tensor) -> Hashable:
        state = self._state(site.param, site.group)
        kind = batch_kind(site, gradient, state["step"])
        return None if kind is None else (kind, tap_of(site.param) is None)

    def _update(self, site: Site, gradient: Tensor) -> None:
        self._update_together([site], [gradient])

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        others = kept(_of_candidates, sites, gradients)
        step_entries(sites, [self.state[site.param] for site in sites], gradients, others)

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        self._apply_together([site], [reduced], None)

    def _apply_together(
        self,
        sites: Sequence[Site],
        reduced: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
    ) -> None:
        own, others = list(reduced), list[Tensor | None]([None] * len(reduced))
        for i, site in enumerate(sites):
            count = site.param.numel()
            if own[i].numel() > count:
                own[i], others[i] = own[i][:count], own[i][count:]
        step_entries(sites, [self.state[site.param] for site in sites], own, others)

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


def _of_candidates(sites: Sequence[Site], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """In a window, the gradients of the candidates beside each delta."""
    taps = [tap for site in sites if (tap := tap_of(site.param)) is not None]
    return gathered_together(taps, gradients) if taps else [None] * len(sites)
