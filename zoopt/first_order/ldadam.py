"""LDAdam: Adam in a subspace that moves every step, its moments moving along."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor

from zoopt.checks import check_bool, check_choice, check_number
from zoopt.distributed.sharding import Rows, broadcast_, is_owner, local_like, whole
from zoopt.dtypes import NARROW, RoundingMode, accumulator_dtype
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.galore import INSIDE
from zoopt.first_order.projected.core import windows
from zoopt.first_order.projected.geometry import Geometry, matrix
from zoopt.first_order.projected.moments_of_rows import (
    load_all_moments,
    load_moments,
    store_all_moments,
    store_moments,
)
from zoopt.first_order.projected.moving_basis import (
    Part,
    lost_factors,
    next_basis,
    over_rows,
    rotated,
)
from zoopt.first_order.projected.residuals import OneSided, Residual, Terms
from zoopt.first_order.projected.rules import adam_numbers
from zoopt.first_order.projected.sharded import rows_of
from zoopt.first_order.projected.state import count
from zoopt.first_order.projected.subspace import (
    silence_rounding_,
    subspace,
)
from zoopt.first_order.site import Site, betas_of, gradient_of, operand
from zoopt.kernels import dispatch
from zoopt.kernels.adam.moments import Format, Moment
from zoopt.kernels.adam.op import adam_
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import (
    all_known,
    known,
)
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register


def ldadam(
    a: Sequence[Part],
    m: Tensor,
    v: Tensor,
    p: Tensor,
    p_next: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    geo: Geometry,
    rows: Rows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of LDAdam between the next basis and Adam: R, m' and v'.

    Args:
        a: matrices (m, n) whose sum is A = G + E.
        m, v: moments (channels, r) of the steps before, in the basis P.
        p: P, (n, r), on the left (m, r).
        p_next: P+, of P's shape.
        rows: where the matrices, and on the right m and v, have some of the rows.

    Of e matrices at once as `next_basis`.
    """
    c1, c2 = (1.0 - beta ** (step - 1) or 1.0 for beta in betas)  # nothing to correct at first
    left, greatest = geo.side == "left", None if rows is None else rows.greatest_
    r = over_rows(a, rows.mine(p_next) if rows and left else p_next, rows, transposed=left)
    m_next, v_next = rotated(m, v, p.mT @ p_next, (c1, c2))
    # E has the rounding of b1 / (1 - b1) (up(m) - up+(m')) in it, beside that of A.
    for values in (r, m_next):
        silence_rounding_(values, geo, roundings=2.0 / (1.0 - betas[0]), greatest=greatest)
    return r, m_next, v_next


@register("ldadamw", "low-rank")
class LDAdamW(AdamFamily):
    r"""LDAdam (Robert et al., 2024): the subspace moves every step, and the moments with it.

    With A = G + E the gradient and the error that earlier steps have left, P the last basis, for
    m >= n (projected on the right; on the left the same of the transposes):

        P+ <- orth(B^T (B P)),  B = rho mhat P^T + (1 - rho) A       one step of power iteration
        R  =  A P+,  C = P^T P+
        m' =  m C,   v' = |(vhat - mhat^2) C^2 + (mhat C)^2| (1 - b2^(t-1))    elementwise squares
        E  <- A - R P+^T + b1 / (1 - b1) (m P^T - m' P+^T)            what the step leaves out
        m  <- b1 m' + (1 - b1) R,    v <- b2 v' + (1 - b2) R^2
        theta <- (1 - lr weight_decay) theta - lr mhat / (sqrt(vhat) + eps) P+^T

    So in the whole space the first moment obeys Adam's own recursion, up to (1 - b1) E. The
    first basis is a randomised SVD of G. Parameters of groups with `rank=None`, and those of fewer
    than two dimensions, get AdamW.

    State, in bytes of a matrix with k = max(m, n), l = min(m, n): 4 l r (basis) + 8 k r (moments)
    + 8 (`step`), and with error feedback m n times the size of the parameter's element. AdamW's
    on other parameters.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; default 1e-3 (the authors' code).
        betas: decay of the moments; default (0.908, 0.99) (the paper's, for all experiments).
        eps: added to the denominator; default 1e-8.
        weight_decay: decoupled; default 0.0 (the authors' code).
        rank: of the subspace, cut to the matrix's own; None: AdamW. Default 16 (the authors' code).
        rho: how much of B is the moving average, in [0, 1); default 0.908 (the paper: b1).
        error_feedback: whether E is kept; default True (the paper). Without it, no buffer of the
            parameter's size.
        proj_type: the side, as for `GaLoreAdamW`, but not "full"; default "std", the short one.
        state_dtype: how moments are stored, `"float32"`, `"bfloat16"`, `"int8"` or `"int4"`;
            default float32.
        state_rounding, rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: a hyperparameter out of range.

    Differs from the authors' code: E has a buffer of its own, where theirs is what stays in `.grad`
    (`zero_grad` leaves it there, and clipping clips it); it is rounded once a step, as weights are.
    Of a square matrix the authors project the left side, `"std"` the right one (`proj_type="left"`
    for theirs). Bases and moments are float32. The first basis is a randomised SVD, not a full one.
    Biases are corrected by each parameter's own steps. A gradient whose norm is not finite leaves
    its parameter and all state as they are: E would keep it for good. Directions of R and of m'
    that are nothing but rounding (below 2 / (1 - b1) eps sqrt(max(m, n)) of the largest, for E has
    as much) count as 0: see `GaLoreAdamW`.

    Example:
        >>> opt = zoopt.LDAdamW(model.parameters(), lr=1e-3, rank=16)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    shards = True
    #: In a step, the bases that follow, until their updates.
    _following: dict[Tensor, Tensor] | None = None

    kinds_last = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 16,
        rho: float = 0.908,
        error_feedback: bool = True,
        proj_type: OneSided = "std",
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def _residual(self, group: Group) -> Residual:
        return INSIDE

    def _declared(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """As GaLore's, but a basis in the accumulator's dtype, for it is turned in every step; and
        `error`, of the parameter's shape and dtype."""
        declared, geo = super()._declared(param, group), self._geometry(param, group)
        if geo is None:
            return declared
        declared |= {
            name: TensorSpec(shape, accumulator_dtype(param.dtype))
            for name, shape in geo.bases.items()
        }
        if group["error_feedback"]:
            declared["error"] = TensorSpec(tuple(param.shape), param.dtype)
        return declared

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("rho", group["rho"], low=0.0, high=1.0, open_high=True)
        check_bool("error_feedback", group["error_feedback"])
        check_choice("proj_type", group["proj_type"], get_args(OneSided))

    def _step_sites(self, sites: Sequence[Site]) -> None:
        self._following = {}
        try:
            self._follow(sites)
            super()._step_sites(sites)
        finally:
            self._following = None

    def _follow(self, sites: Sequence[Site]) -> None:
        """Make the next bases of matrices on a GPU, of those of one kind at once, from gradients
        that are finite. First bases are made one by one, when they are prepared."""
        assert self._following is not None
        alike: dict[Hashable, list[Site]] = {}
        for site in sites:
            kind = self._kind(site, gradient_of(site))
            known_one = self._geometry(site.param, site.group) is not None
            if kind is not None and known_one and int(self.state[site.param]["step"]):
                alike.setdefault(kind, []).append(site)
        for every in alike.values():
            geo = self._geometry(every[0].param, every[0].group)
            assert geo is not None
            norms = torch._foreach_norm([gradient_of(site) for site in every], math.inf)
            finite = all_known(torch.stack(norms).isfinite(), True)
            members = [site for site, there in zip(every, finite, strict=True) if there]
            for part in windows(len(members), math.prod(geo.reduced_shape)):
                own = members[part]
                grads = [matrix(operand(gradient_of(site))) for site in own]
                made = self._next_bases(own, grads, geo).unbind()
                self._following.update(zip([site.param for site in own], made, strict=True))

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        """Make the next basis, by linear algebra, which can fail; it is kept apart until the
        update, whose moments turn from the last one to it."""
        geo = self._geometry(site.param, site.group)
        if geo is None:
            return True
        if self._reduce(site, gradient) is None:
            return False
        if self._following is not None and site.param not in self._following:
            self._following[site.param] = self._next_basis(site, matrix(gradient), geo)
        return True

    def _reduce_together(
        self, sites: Sequence[Site], gradients: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        return gradients

    def _apply_together(
        self,
        sites: Sequence[Site],
        reduced: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
    ) -> None:
        self._update_together(sites, reduced)

    def _next_bases(
        self, sites: Sequence[Site], gradients: Sequence[Tensor], geo: Geometry
    ) -> Tensor:
        """P+ of several matrices, of which none is at its first step, (e, n, r) or (e, m, r)."""
        states, group = [self.state[site.param] for site in sites], sites[0].group
        average, _ = load_all_moments(sites, states, geo)
        average = average / (1.0 - betas_of(group)[0] ** int(states[0]["step"]) or 1.0)
        basis = torch.stack([state["basis"] for state in states])
        return next_basis(_parts_of(gradients, states), average, basis, group["rho"], geo)

    def _prepared_bases(
        self, sites: Sequence[Site], gradients: Sequence[Tensor], geo: Geometry
    ) -> Tensor:
        """The bases that follow; they are made here where none have been prepared."""
        prepared, first = self._following or {}, not int(self.state[sites[0].param]["step"])
        if first or any(site.param in prepared for site in sites):
            pairs = zip(sites, gradients, strict=True)
            return torch.stack([self._prepared_basis(site, own, geo) for site, own in pairs])
        return self._next_bases(sites, gradients, geo)

    def _update_matrices(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """As `_turn`, of several matrices."""
        geo = self._geometry(sites[0].param, sites[0].group)
        assert geo is not None
        states, group = [self.state[site.param] for site in sites], sites[0].group
        step, grads = int(states[0]["step"]) + 1, [matrix(gradient) for gradient in gradients]
        following = kept(self._prepared_bases, sites, grads, geo)
        basis = kept(torch.stack, [state["basis"] for state in states])
        average, square = kept(load_all_moments, sites, states, geo)
        projected, moved, square = kept(
            ldadam,
            *(_parts_of(grads, states), average, square, basis, following),
            step=step,
            betas=betas_of(group),
            geo=geo,
        )
        lost = None
        if "error" in states[0]:
            moments = projected, average, moved
            lost = kept(lost_factors, *moments, basis, following, betas_of(group)[0], geo)
        direction = kept(_adam_together, projected, moved, square, sites, step)
        if lost is not None:
            keys = [site.key.shifted(site.whole.numel()) for site in sites]
            add_product_(
                Batch([matrix(state["error"]) for state in states], keys),
                *(_rounded_on_a_gpu(factor, sites[0].param).unbind() for factor in lost),
                gradient=grads,
                channel_scale=[projected.new_ones(1, 1)] * len(sites),
                rounding_draw=sites[0].rounding_draw(step),
            )
        once(torch._foreach_copy_, [state["basis"] for state in states], following.unbind())
        store_all_moments(sites, states, (moved, square), step)
        up = _rounded_on_a_gpu(following, sites[0].param).unbind()
        self._write(sites, Terms(direction), None, [{"basis": own} for own in up], geo, step)
        count(states)

    def _next_basis(self, site: Site, gradient: Tensor, geo: Geometry) -> Tensor:
        """P+, (n, r), on the left (m, r)."""
        state, group = self._state(site.param, site.group), site.group
        completed = int(state["step"])
        if not completed:
            return self._first_basis(site, gradient, geo)
        average, _ = load_moments(site, state, geo, {})
        average = average / (1.0 - betas_of(group)[0] ** completed or 1.0)
        return next_basis(_parts(gradient, state), average, state["basis"], group["rho"], geo)

    def _keeps_gradient(self, site: Site) -> bool:
        return True

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        """The gradient itself: the basis is one of the whole step's, and so is the error."""
        known_finite = self._following is not None and site.param in self._following
        if known_finite or self._geometry(site.param, site.group) is None:
            return gradient
        norm = torch.linalg.vector_norm(gradient, dtype=accumulator_dtype(gradient.dtype))
        return gradient if known(norm.isfinite(), True) else None

    def _update(self, site: Site, gradient: Tensor) -> None:
        self._apply(site, gradient, gradient)

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        param, group = site.param, site.group
        geo = self._geometry(param, group)
        if geo is None:
            super()._apply(site, reduced, gradient)
            return
        state, grad = self._state(param, group), matrix(reduced)
        following = kept(self._prepared_basis, site, grad, geo)
        self._turn(site, grad, state, following, geo)

    def _prepared_basis(self, site: Site, gradient: Tensor, geo: Geometry) -> Tensor:
        """The basis that follows; it is made here where none has been prepared."""
        following = (self._following or {}).get(site.param)
        return self._next_basis(site, gradient, geo) if following is None else following

    def _turn(
        self,
        site: Site,
        grad: Tensor,
        state: dict[str, Tensor],
        following: Tensor,
        geo: Geometry,
    ) -> None:
        """Step a matrix, or the rows of one that are here, and turn its moments to the basis that
        follows."""
        group, step = site.group, int(state["step"]) + 1
        rows, units = site.rows, self._coded(site)
        average, square = kept(load_moments, site, state, geo, units)
        projected, moved, square = kept(
            ldadam,
            *(_parts(grad, state), average, square, state["basis"], following),
            step=step,
            betas=betas_of(group),
            geo=geo,
            rows=rows,
        )
        lost = None
        if "error" in state:
            bases = state["basis"], following
            lost = kept(*(lost_factors, projected, average, moved, *bases, betas_of(group)[0], geo))
            if rows is not None and geo.side == "left":
                lost = rows.mine(lost[0]), lost[1]
        direction = kept(_adam, projected, moved, square, site, step)
        # All has been computed: what follows are writes.
        if lost is not None:
            add_product_(
                matrix(state["error"]),
                *lost,
                gradient=grad,
                channel_scale=projected.new_ones(1, 1),
                # The bits after those of the weights.
                key=site.key.shifted(site.whole.numel()),
                rounding_draw=site.rounding_draw(step),
            )
        once(state["basis"].copy_, following)
        store_moments(site, state, (moved, square), geo, units, step)
        up = {"basis": following}
        if site.sharded is not None:
            up = rows_of(up, site.sharded, geo)
        self._write([site], Terms(direction.unsqueeze(0)), None, [up], geo, step)
        count([state])

    def _coded(self, site: Site) -> Mapping[str, int]:
        """`coded_units` of a shard."""
        return {} if site.sharded is None else self._units(site.sharded, site.group)

    def _step_shard(self, site: Site, gradient: Tensor) -> None:
        param, group = site.param, site.group
        geo = self._geometry(param, group)
        if geo is None:
            super()._step_shard(site, gradient)
            return
        state = self._local_state(site)
        grad, rows = matrix(local_like(gradient, param)), Rows(param)
        # In float64: the sum of squares does not overflow before the norm itself does.
        norm = rows.norm(torch.linalg.vector_norm(grad, dtype=torch.float64))
        if not norm.to(accumulator_dtype(grad.dtype)).isfinite():
            return
        following = kept(torch.empty_like, state["basis"])
        once(self._make_following, site, gradient, state, following, geo)
        # One process's: another machine's linear algebra may round in another way.
        broadcast_(following, param, site.position)
        self._turn(site.shard, grad, state, following, geo)

    def _make_following(
        self,
        site: Site,
        gradient: Tensor,
        state: dict[str, Tensor],
        following: Tensor,
        geo: Geometry,
    ) -> None:
        """Make the basis that follows from the gradient, sharded like its parameter."""
        param, group = site.param, site.group
        if int(state["step"]):
            grad = matrix(local_like(gradient, param))
            average, _ = kept(load_moments, site.shard, state, geo, self._coded(site.shard))
            average = average / (1.0 - betas_of(group)[0] ** int(state["step"]) or 1.0)
            parts = _parts(grad, state)
            made = next_basis(parts, average, state["basis"], group["rho"], geo, Rows(param))
            once(following.copy_, made)
            return
        every = matrix(whole(gradient))
        if is_owner(param, site.position):
            once(following.copy_, self._first_basis(site, every, geo))

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        return name == "error" or super()._follows_rows(name, spec, param, group)

    def _first_basis(self, site: Site, gradient: Tensor, geo: Geometry) -> Tensor:
        return subspace(
            gradient,
            geo.rank,
            right=geo.side == "right",
            projector="randomized",
            previous=None,
            seed=site.seed,
            stream=site.stream,
            draw=0,
        )


def _adam(
    projected: Tensor,
    average: Tensor,
    square: Tensor,
    site: Site,
    step: int,
) -> Tensor:
    """mhat / (sqrt(vhat) + eps), and the moments (channels, r) in place: they are stored later, and
    so rounded once a step, though they are rotated and averaged."""
    group, key = site.group, NoiseKey(site.seed, site.stream)
    scale, eps = adam_numbers(group, step)
    return adam_(
        projected,
        Moment(average, None, average.numel(), signed=True),
        Moment(square, None, square.numel(), signed=False),
        betas=betas_of(group),
        scale=scale,
        eps=eps,
        key=key,
    )


def _adam_together(
    projected: Tensor, average: Tensor, square: Tensor, sites: Sequence[Site], step: int
) -> Tensor:
    """`_adam` of several matrices, (e, channels, r)."""
    group, numel = sites[0].group, projected[0].numel()
    scale, eps = adam_numbers(group, step)
    out = kept(torch.empty_like, projected)
    adam_(
        Batch(projected.unbind(), [NoiseKey(site.seed, site.stream) for site in sites]),
        [Moment(own, None, numel, signed=True) for own in average],
        [Moment(own, None, numel, signed=False) for own in square],
        betas=betas_of(group),
        scale=scale,
        eps=eps,
        out=out.unbind(),
    )
    return out


def _rounded_on_a_gpu(factors: Tensor, param: Tensor) -> Tensor:
    """Factors in the dtype to which the kernels would round them, matrix by matrix."""
    return factors.to(param.dtype) if dispatch.on_gpu(param) and param.dtype in NARROW else factors


def _parts_of(
    gradients: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]
) -> list[Sequence[Tensor]]:
    """`_parts` of several matrices."""
    if "error" not in states[0]:
        return [gradients]
    return [gradients, [matrix(state["error"]) for state in states]]


def _parts(gradient: Tensor, state: Mapping[str, Tensor]) -> list[Tensor]:
    """Matrices whose sum is A = G + E."""
    return [gradient, matrix(state["error"])] if "error" in state else [gradient]
