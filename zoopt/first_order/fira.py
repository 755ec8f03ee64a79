"""Fira: GaLore's step, and the rest of the gradient scaled as Adam scales the projected part."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from zoopt.checks import check_bool, check_choice
from zoopt.dtypes import RoundingMode
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.projected.residuals import (
    OneSided,
    Residual,
    Step,
    Terms,
    channel_norms,
    check_channels,
    energy_outside,
    limited,
    norm_over_channels,
    norm_specs,
    quotient,
    times_norm,
)
from zoopt.kernels.adam.moments import Format
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import register

#: Bases with orthonormal columns, of which P P^T G is the gradient's part.
OrthonormalProjector = Literal["svd", "gram", "randomized", "warm"]


def fira(step: Step) -> None:
    """Fira's step, for a gradient G (m, n) and a basis P (n, r) of its row space:

        R     = G P                (m, r); for a wide matrix G^T P (n, r), with P (m, r)
        N     = adam(R)            of R's shape
        phi_j = ||N_j|| / ||R_j||
        S_j = phi_j (G_j - R_j P^T)
        S <- S min(1, gamma ||S_prev|| / ||S||)
        theta <- theta - lr (alpha N P^T + S)

    S is not formed. Its norm is that of the phi_j (||G_j||^2 - ||R_j||^2)^(1/2), P's columns being
    orthonormal, and S + alpha N P^T is phi_j G_j plus (alpha N_j - phi_j R_j) P^T.
    """
    group, alpha = step.group, step.group["scale"]
    R = step.down()  # (k, channels, r)
    N, (n, r) = step.rule_and_norms(R)  # and ||N_j||, ||R_j||: (k, channels)
    phi = quotient(n, r)
    if group["norm_growth_limit"] is not None and step.gradients is not None:
        g = channel_norms(step.gradients, step.geo, phi.dtype, step.sharded)
        s = norm_over_channels(times_norm(phi, energy_outside(g, r).sqrt()), step)
        phi = phi * limited(s, step.states, group).unsqueeze(1)
    inner = N * alpha - phi.unsqueeze(2) * R
    step.descend(Terms(inner, channel_scale=phi))


#: The part outside the subspace, its channels scaled as the rule scales R's.
COMPLEMENT = Residual(norm_specs, fira, needs_gradient=True)


@register("fira", "low-rank")
class Fira(AdamFamily):
    r"""Fira (Chen et al., 2024): full-rank steps from low-rank moments.

    For a matrix of m >= n (else transposed), with P (n, r) a basis of leading right singular
    vectors of G, and N = mhat / (sqrt(vhat) + eps), Adam's direction of R:

        R = G P,    phi_j = ||N_j|| / ||R_j||,    S_j = phi_j (G_j - R_j P^T),    j a row
        S <- S min(1, gamma ||S_prev|| / ||S||)
        W <- (1 - lr weight_decay) W - lr (scale N P^T + S)

    S is not formed: its norm follows from ||G_j||^2 - ||R_j||^2, and it is added to W as a
    multiple of each row of G, and a product. Vectors, and groups with `rank=None`, get AdamW.

    State, in bytes of a matrix with m >= n: 4 n r for the basis (2 n r where weights are
    bfloat16), 8 m r for float32 moments (float64: twice as many; by `state_dtype`: bfloat16 4 m r,
    int8 2.03, int4 1.06), 8 for `step`
    and 4 for ||S||.

    Args:
        params: parameters, named parameters, or param groups.
        lr: learning rate; default 1e-3 (the authors' code; their pre-training takes 1e-2).
        betas: decay of the moments; default (0.9, 0.999) (Adam).
        eps: added to the denominator; default 1e-6 (the authors' code).
        weight_decay: decoupled; default 0 (the authors' code).
        rank: r; default 128 (the paper's 60M model; a quarter of the width for larger ones).
        update_proj_gap: steps from one basis to the next; default 200 (paper).
        scale: alpha, of the first term alone; default 0.25 (the authors' scripts up to 350M;
            0.0625 from 1B on).
        norm_growth_limit: gamma, or None for no limit; default 1.01 (paper).
        proj_type: which side is projected, as for `GaLoreAdamW`, but for `"full"`.
        projector: how a basis is made, as for `GaLoreAdamW`; default `"warm"`. Not `"random"`,
            whose P P^T G is not a part of the gradient.
        stagger: whether the parameters' bases change at different steps; default True.
        state_dtype, state_rounding, rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from the paper: bases are refreshed at different steps, by one step of orthogonal
    iteration (`stagger=False, projector="svd"` for the paper's). A norm of 0 sets no limit; the
    last one that was not 0 does. Directions of R that are nothing but rounding count as 0, as for
    `GaLoreAdamW`. So does the part of a channel outside the subspace where its squared norm is
    within the rounding of ||G_j||^2 - ||R_j||^2, 32 eps ||G_j||^2; the limiter would not let the
    next norms grow from it. Differs from the authors' code: S there is of G - scale P P^T G, which
    has some of the projected part in it again unless scale is 1; the limiter sees S before the
    biases of N's moments are corrected; channels run along the longer side of R, not along the side
    that is kept, which is the same for `"std"`; decay comes last.

    Example:
        >>> opt = zoopt.Fira(model.named_parameters(), lr=1e-2, rank=128)
        >>> model(**batch).loss.backward()
        >>> opt.step()
    """

    shards = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        norm_growth_limit: float | None = 1.01,
        proj_type: OneSided = "std",
        projector: OrthonormalProjector = "warm",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def _residual(self, group: Group) -> Residual:
        return COMPLEMENT

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        check_channels(group)
        check_choice("projector", group["projector"], get_args(OrthonormalProjector))
