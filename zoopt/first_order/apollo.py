"""APOLLO: the gradient itself, scaled as Adam scales a random projection of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from zoopt.checks import check_bool
from zoopt.dtypes import RoundingMode
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.projected.residuals import (
    Residual,
    Step,
    Terms,
    channel_norms,
    check_channels,
    limited,
    norm_over_channels,
    norm_specs,
    quotient,
    times_norm,
)
from zoopt.first_order.projected.selection import param_groups
from zoopt.first_order.projected.subspace import Projector
from zoopt.kernels.adam.moments import Format
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import Recipe, Variant, register


def apollo(step: Step, *, mini: bool = False) -> None:
    """Algorithm 1 of APOLLO, for a gradient G (m, n) and a random projection P (n, r):

        R   = G P                      (m, r); for a wide matrix G^T P (n, r), with P (m, r)
        N   = adam(R)                  of R's shape
        s_j = ||N_j|| / ||R_j||        of each row; for mini, of all of them, s = ||N|| / ||R||
        U_j = s_j G_j
        U <- U min(1, gamma ||U_prev|| / ||U||)
        theta <- theta - lr alpha U

    U is not formed: its norm is that of the s_j ||G_j||, and it is a multiple of each channel of G.
    """
    group, alpha = step.group, step.group["scale"]
    R = step.down()  # (k, channels, r)
    _, (n, r) = step.rule_and_norms(R)  # ||N_j|| and ||R_j||: (k, channels)
    if mini:
        n, r = (norm_over_channels(norms, step).unsqueeze(1) for norms in (n, r))
    s = quotient(n, r)
    if group["norm_growth_limit"] is not None and step.gradients is not None:
        g = channel_norms(step.gradients, step.geo, s.dtype, step.sharded)
        u = norm_over_channels(times_norm(s, g), step)
        s = s * limited(u, step.states, group).unsqueeze(1)
    step.descend(Terms(None, channel_scale=s * alpha))


#: The gradient itself, its channels, or the whole of it, scaled as the rule scales R.
CHANNELS = Residual(norm_specs, apollo, needs_gradient=True, needs_reduced=False)
TENSOR = CHANNELS._replace(algorithm=functools.partial(apollo, mini=True))


class GradientScaling(AdamFamily):
    """Methods that descend the gradient itself, scaled."""

    shards = True
    _remedies: ClassVar[Mapping[str, str]] = {
        "proj": "say projector='random' or 'svd'",
        "scale_type": "zoopt.Apollo scales channels, zoopt.ApolloMini the tensor",
    }

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        check_channels(group)


@register("apollo", "low-rank")
class Apollo(GradientScaling):
    r"""APOLLO (Zhu et al., 2024): a learning rate for each channel, learnt in a small projection.

    For a matrix of m >= n (else transposed), with P (n, r) of entries N(0, 1/r) drawn anew every
    `update_proj_gap` steps, and N = mhat / (sqrt(vhat) + eps), Adam's direction of R:

        R = G P,    s_j = ||N_j|| / ||R_j||,    U_j = s_j G_j,    j a row
        U <- U min(1, gamma ||U_prev|| / ||U||)
        W <- (1 - lr weight_decay) W - lr scale U

    Vectors, and groups with `rank=None`, get AdamW.

    State, in bytes of a matrix with m >= n: 8 m r for float32 moments (float64: 16; by
    `state_dtype`: bfloat16 4, int8 2.03, int4 1.06), 8 for `step` and 4 for ||U||. The random
    basis is not stored: the seed remakes it. Other projectors keep a basis, 4 n r more
    (2 n r where weights are bfloat16).

    Args:
        params: parameters, named parameters, or param groups.
        lr: learning rate; default 1e-2 (the paper's, for pre-training at all sizes).
        betas: decay of the moments; default (0.9, 0.999) (Adam).
        eps: added to the denominator; default 1e-6 (GaLore's code; the paper gives none).
        weight_decay: decoupled; default 0 (the paper's pre-training).
        rank: r; default 256 (the paper's from 1B weights on; a quarter of the width below).
        update_proj_gap: steps from one basis to the next; default 200 (paper).
        scale: alpha; default 1 (paper).
        norm_growth_limit: gamma, or None for no limit; default 1.01 (paper).
        projector: `"random"` (paper), or the leading directions of the gradient by `"svd"` (its
            ablation), `"gram"`, `"randomized"`, `"warm"` or `"orthogonal"`, as for `GaLoreAdamW`.
        stagger: whether the parameters' bases change at different steps; default True.
        state_dtype, state_rounding, rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from the paper: bases of different parameters change at different steps
    (`stagger=False` for the same ones). A norm of 0 sets no limit; the last one that was not 0
    does. The limiter's norm is that of U without alpha, which changes nothing as long as alpha is
    constant. With a basis from the gradient, directions that are nothing but rounding count as 0,
    as for `GaLoreAdamW`. The authors' code, whose licence is not free, has not been consulted.
    Runs of apollo-torch differ: it adds eps to sqrt(v) before its bias is corrected, which shortens
    early steps where eps counts (here to sqrt(vhat), as Adam does); its limiter compares norms
    before biases are corrected, and so holds early steps down; and it holds a step down after one
    of norm 0.

    Example:
        >>> opt = zoopt.Apollo(model.named_parameters(), lr=1e-2, rank=256)
        >>> model(**batch).loss.backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 256,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        norm_growth_limit: float | None = 1.01,
        projector: Projector = "random",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()) | {"proj_type": "std"}, seed=seed)

    def _residual(self, group: Group) -> Residual:
        return CHANNELS


@register(
    "apollo-mini",
    "low-rank",
    Variant(fused=True),
    recipe=Recipe(lambda model, _: ApolloMini(param_groups(model, rank=1))),
)
class ApolloMini(GradientScaling):
    r"""APOLLO-Mini (Zhu et al., 2024): one learning rate for each matrix, learnt at rank 1.

    As `Apollo`, with one factor for the whole of a matrix (m >= n, P (n, 1)):

        R = G P,    s = ||N|| / ||R||,    U = s G,    U <- U min(1, gamma ||U_prev|| / ||U||)
        W <- (1 - lr weight_decay) W - lr scale U

    State, in bytes of a matrix with m >= n: 8 m for float32 moments, 8 for `step`, 4 for ||U||.
    That is SGD's but for a column.

    Args:
        rank: default 1 (paper).
        scale: alpha; default sqrt(128) (paper): s is that much too small at rank 1.
        params, lr, betas, eps, weight_decay, update_proj_gap, norm_growth_limit, projector,
            stagger, state_dtype, state_rounding, rounding, maximize, seed: as for `Apollo`.

    Raises:
        TypeError, ValueError, RuntimeError: as for `Apollo`.

    Differs from the paper: as `Apollo`.

    Example:
        >>> opt = zoopt.ApolloMini(model.named_parameters(), lr=1e-2)
        >>> model(**batch).loss.backward()
        >>> opt.step()
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 1,
        update_proj_gap: int = 200,
        scale: float = 128**0.5,
        norm_growth_limit: float | None = 1.01,
        projector: Projector = "random",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()) | {"proj_type": "std"}, seed=seed)

    def _residual(self, group: Group) -> Residual:
        return TENSOR
