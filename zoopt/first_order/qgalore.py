"""Q-GaLore: GaLore with bases in four bits, refreshed less often once they settle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import check_bool, check_choice, check_number, check_positive_int
from zoopt.dtypes import RoundingMode
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.galore import INSIDE
from zoopt.first_order.projected.basis import refresh, refresh_due
from zoopt.first_order.projected.geometry import Geometry
from zoopt.first_order.projected.residuals import Residual
from zoopt.first_order.site import Site
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.dispatch import known
from zoopt.kernels.journal import kept, once
from zoopt.optimizer import MOST_STEPS, Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register

BasisDtype = Literal["float32", "int4"]
#: The most doublings: a longer gap would not fit an int64.
_MOST_DOUBLINGS = 62
#: Projectors whose basis depends on the gradient alone, not on the last basis.
FreshProjector = Literal["svd", "gram", "randomized"]


def agreement(previous: Tensor, basis: Tensor) -> Tensor:
    """How close two subspaces are, from their bases (n, r): 1 if equal, 0 on average if random.

    The root of the mean squared cosine of their principal angles, (1 / r) ||previous^T basis||^2,
    in excess of r / n, its mean for random subspaces: for r = 1 and a large n, |cos| of the angle.
    """
    n, rank = basis.shape
    if rank == n:
        return basis.new_ones(())
    overlap = (previous.t() @ basis).square().sum() / rank
    return ((overlap - rank / n) / (1.0 - rank / n)).clamp_min(0.0).sqrt()


def settle(state: dict[str, Tensor], group: Group, changes: list[tuple[Tensor, Tensor]]) -> None:
    """Count refreshes in a row whose bases all agreed with the last ones; from the
    `queue_size`-th on, each doubles the gap."""
    found = torch.stack([agreement(previous, basis) for previous, basis in changes]).amin()
    if known(found < group["cos_threshold"], True):
        once(state["agreements"].zero_)
        return
    agreements = kept(int, state["agreements"]) + 1
    once(state["agreements"].fill_, agreements)
    if agreements >= group["queue_size"]:
        # Not `add_`: a signal can come when that is done and not noted yet.
        doublings = kept(int, state["doublings"]) + 1
        once(state["doublings"].fill_, doublings)


@register("qgalore-adamw", "low-rank")
class QGaLoreAdamW(AdamFamily):
    r"""Q-GaLore (Zhang et al., 2024): GaLore with int4 bases, int8 moments and a lazy refresh.

    For a matrix of m >= n (else transposed), with P (n, r) a basis of leading right singular
    vectors of a past G, and N = mhat / (sqrt(vhat) + eps), Adam's direction of R:

        R = G P,    W <- (1 - lr weight_decay) W - lr scale N P^T
        P: codes c in [-7, 7] of c s, s = max|P| / 7 in each 256 elements

    P is computed every T steps. If each of the last k new bases agreed with the one before, T
    doubles for this parameter. They agree if

        cos^2 = (||P_old^T P_new||^2 / r - r/n) / (1 - r/n) >= cos_threshold^2

    (1 / r) ||P_old^T P_new||^2 is the mean squared cosine of the principal angles between the two
    subspaces, and r / n is its mean for random ones. Vectors, and groups with `rank=None`, get
    AdamW.

    State, in bytes of a matrix with m >= n: 0.516 n r for the basis, 2.03 m r for int8 moments
    (those of fewer than 4096 elements stay float32: 8), 8 for `step`, 8 for the refresh's counters.

    Args:
        params: parameters, named parameters, or param groups.
        lr: learning rate; default 1e-3 (the authors' code; their pre-training takes 1.5e-2).
        betas: decay of the moments; default (0.9, 0.999) (Adam).
        eps: added to the denominator; default 1e-8 (the authors' code).
        weight_decay: decoupled; default 0 (the authors' scripts).
        rank: r; default 128 (GaLore).
        update_proj_gap: T, at first; default 200 (paper).
        scale: alpha; default 0.25 (the authors' scripts).
        cos_threshold: above it bases agree; default 0.4 (paper). None: T never changes.
        queue_size: k; default 5 (the authors' code).
        basis_dtype: `"int4"`, or `"float32"` for bases as they are.
        projector: `"randomized"` (default), `"gram"` or `"svd"` (the paper's), as for
            `GaLoreAdamW`. Not `"warm"`: a basis made from the last one agrees with it, on gradients
            of pure noise too (0.64 or more, while bases made afresh have 0.15 or less).
        stagger: whether the parameters' bases change at different steps; default True.
        state_dtype: default `"int8"` (paper).
        state_rounding, rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from the paper: weights keep their dtype (INT8 weights are not the optimizer's business
    here; bfloat16 ones are rounded stochastically, as everywhere in zoopt). Codes are symmetric,
    without a zero point. Directions of R that are nothing but rounding count as 0, as for
    `GaLoreAdamW` (codes of 4 bits leave none of that kind). Bases are refreshed at different steps,
    after Halko et al.'s randomised SVD. Differs from the authors' code: that compares the *signed*
    cosine of the first singular vector alone, whose sign an SVD chooses arbitrarily; takes the mean
    of the last k; stores a 4-bit code in a byte; and decays last.

    Example:
        >>> opt = zoopt.QGaLoreAdamW(model.named_parameters(), lr=1e-3, rank=128)
        >>> model(**batch).loss.backward()
        >>> opt.step()
    """

    shards = True

    kinds_last = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        cos_threshold: float | None = 0.4,
        queue_size: int = 5,
        basis_dtype: BasisDtype = "int4",
        projector: FreshProjector = "randomized",
        stagger: bool = True,
        state_dtype: Format = "int8",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()) | {"proj_type": "std"}, seed=seed)

    def _residual(self, group: Group) -> Residual:
        return INSIDE

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        if group["cos_threshold"] is not None:
            check_number("cos_threshold", group["cos_threshold"], low=0.0, high=1.0)
        check_positive_int("queue_size", group["queue_size"])
        check_choice("basis_dtype", group["basis_dtype"], get_args(BasisDtype))
        check_choice("projector", group["projector"], get_args(FreshProjector))

    def _basis_specs(
        self, geo: Geometry, group: Group, dtype: torch.dtype
    ) -> Mapping[str, TensorSpec]:
        """With `cos_threshold`, also two counters: `agreements`, refreshes in a row whose basis
        agreed with the last one, and `doublings`, of the gap."""
        specs = super()._basis_specs(geo, group, dtype)
        if group["cos_threshold"] is None:
            return specs
        agreements = TensorSpec((), torch.float32, most=MOST_STEPS)
        doublings = TensorSpec((), torch.float32, most=_MOST_DOUBLINGS)
        return {**specs, "agreements": agreements, "doublings": doublings}

    def _refresh_due(self, site: Site, state: dict[str, Tensor]) -> bool:
        gap, completed = site.group["update_proj_gap"], int(state["step"])
        if site.group["cos_threshold"] is None or not refresh_due(site, completed, gap):
            return refresh_due(site, completed, gap)
        # To read the number waits for a GPU, so it is read when a refresh can be due.
        return refresh_due(site, completed, gap << int(state["doublings"]))

    def _refresh(
        self, site: Site, state: dict[str, Tensor], geo: Geometry, gradient: Tensor
    ) -> None:
        changes = refresh(site, state, gradient, geo)
        if changes and site.group["cos_threshold"] is not None:
            settle(state, site.group, changes)
