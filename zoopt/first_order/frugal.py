"""FRUGAL: a rule with state inside a subspace, signs of the gradient outside."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from zoopt.checks import (
    check_betas,
    check_bool,
    check_choice,
    check_number,
    check_positive_int,
)
from zoopt.distributed.sharding import Rows, anywhere, local_like
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.adamw import StateRounding
from zoopt.first_order.projected.basis import age
from zoopt.first_order.projected.columns import columns_of, reduced_to, write_columns
from zoopt.first_order.projected.core import ProjectedOptimizer
from zoopt.first_order.projected.geometry import Geometry, Side, matrix
from zoopt.first_order.projected.residuals import (
    OneSided,
    Residual,
    Step,
    Terms,
    energy_outside,
    no_specs,
)
from zoopt.first_order.projected.rules import ADAM, LION, MOMENTUM, Rule
from zoopt.first_order.projected.state import count
from zoopt.first_order.projected.subspace import BLIND
from zoopt.first_order.site import Site
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.dispatch import all_known, launches
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.registry import register

FrugalRule = Literal["adam", "lion", "momentum"]
FrugalProjector = Literal["columns", "orthogonal", "svd", "gram", "randomized", "warm"]

#: Projectors whose bases can span more than the gradient does.
SPANNING = ("columns", "orthogonal")

RULES: dict[str, Rule] = {"adam": ADAM, "lion": LION, "momentum": MOMENTUM}


def sign_rate(group: Group, geo: Geometry) -> float:
    """The step of the signs: none where no dimension is outside, whose rounding has signs too."""
    dim = geo.m if geo.side == "left" else geo.n
    return 0.0 if geo.rank == dim else float(group["lr"]) * group["sign_lr_scale"]


def frugal(step: Step) -> None:
    """Algorithm 1 of FRUGAL, for a gradient G (m, n) and a basis P (n, r) of a part of the space:

        R      = G P               (m, r); for a wide matrix G^T P (n, r), with P (m, r)
        N      = rule(R)           of R's shape
        theta <- theta - lr N P^T - lr sign_lr_scale sign(G - R P^T)

    without the signs where the part outside, by its norm, is nothing but rounding. Where P is
    columns of the identity, `Frugal._step_matrices` does the same without a product.
    """
    R = step.down()  # (k, channels, r)
    N = step.rule(R)
    rate = sign_rate(step.group, step.geo)
    rates = [rate] * len(N)
    assert step.gradients is not None
    if rate and step.group["projector"] not in BLIND:
        whole, inside = _norms(step.gradients, R.dtype), _norms(R.unbind(), R.dtype)
        if step.sharded is not None:
            whole = Rows(step.sharded).norm(whole)
            inside = Rows(step.sharded).norm(inside) if step.geo.side == "right" else inside
        outside = energy_outside(whole, inside) > 0.0
        rates = [rate * heard for heard in all_known(outside, True)]
    step.descend(Terms(N, sign_steps=rates, reduced=R))


def _norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The norm of each of k tensors, in that dtype: (k,); on a GPU in one pass, with the bits of
    each alone."""
    if len(tensors) == 1 and not launches(tensors[0]):
        alone: Tensor = torch.linalg.vector_norm(tensors[0], dtype=dtype)
        return alone.unsqueeze(0)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


#: Of the part outside, the signs.
SIGNS = Residual(no_specs, frugal, needs_gradient=True)


@register("frugal", "low-rank")
class Frugal(ProjectedOptimizer):
    r"""FRUGAL (Zmushko et al., 2024): Adam, Lion or momentum on a part of each matrix, and on all
    the rest signSGD, which keeps no state.

    With P (n, r), r = density n, a basis of a part of the space, made anew every `update_proj_gap`
    steps, from which on moments are those of zero steps (for matrices of m >= n; on the left the
    same of the transposes):

        R = G P,    N = rule(R)                                   Adam: mhat / (sqrt(vhat) + eps)
        theta <- (1 - lr weight_decay) theta - lr N P^T - lr sign_lr_scale sign(G - R P^T)

    With `projector="columns"` P is r columns of the identity: N is of those columns of G alone, and
    the signs are those of all others.

    State, in bytes of a matrix (m, n): 8 density m n (Adam; Lion and momentum 4) + 8 (`step`); the
    columns are those of the seed. Other projectors keep a basis: with l = min(m, n), 4 density l^2
    more (2 where weights are bfloat16). The rule's own on other parameters.

    Args:
        params: parameters, or groups of them.
        lr: learning rate; default 1e-3 (the paper's pre-training, with Adam).
        rule: `"adam"`, `"lion"` or `"momentum"` (buffer <- momentum buffer + g, descended itself);
            default adam (paper). Lion wants a lower lr.
        betas: of Adam or Lion; default (0.9, 0.999) or (0.9, 0.99), as their papers.
        eps: Adam's; default 1e-8.
        momentum: of the rule of that name; default 0.9 (torch's examples).
        weight_decay: decoupled; default 0.0 (the paper's pre-training).
        density: the fraction of a matrix that has state, in (0, 1]; 1 or None: the rule itself on
            all of it (the paper does so to embeddings, norms and the output layer). Default 0.25
            (paper).
        update_proj_gap: steps from one basis to the next; default 200 (paper).
        sign_lr_scale: the signs' rate, times lr; default 1.0 (the paper's pre-training; it
            fine-tunes with 0.1).
        proj_type: the side that is projected, as for `GaLoreAdamW`, but not "full"; default "std".
        projector: `"columns"` (rows on the left), `"orthogonal"` (random), `"svd"` (GaLore's), or
            how that is approximated, as for `GaLoreAdamW`. Default columns: as good as SVD in the
            paper, and free.
        stagger: whether parameters change their bases in different steps; default True.
        state_dtype: how moments are stored, `"float32"`, `"bfloat16"`, `"int8"` or `"int4"`;
            default float32.
        state_rounding, rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: a hyperparameter out of range.

    Differs from the paper: its blocks (whole tensors that take turns to have state) and its
    random single entries are not here. Differs from the authors' code: refreshes are staggered;
    columns are rows in wide matrices, unless `proj_type="right"`; a rank is at least 1; a gradient
    that is not finite makes no basis: its parameter waits.

    Where a basis from the gradient itself (SVD and its like) holds all of it, the rest is rounding,
    and its signs are not stepped: below ||G||^2 - ||R||^2 = 32 eps ||G||^2. Directions of R that
    are nothing but rounding count as 0, as for `GaLoreAdamW`.

    Example:
        >>> opt = zoopt.Frugal(model.parameters(), lr=1e-3, density=0.25)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    _remedies: ClassVar[Mapping[str, str]] = {
        "rank": "give its density, the rank as a share of the side that is projected, or None"
    }

    shards = True

    kinds_last = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        rule: FrugalRule = "adam",
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        density: float | None = 0.25,
        update_proj_gap: int = 200,
        sign_lr_scale: float = 1.0,
        proj_type: OneSided = "std",
        projector: FrugalProjector = "columns",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def _adopt(self, group: Group) -> None:
        """Betas of None are those of the group's rule."""
        if group["betas"] is None:
            group["betas"] = (0.9, 0.99 if group["rule"] == "lion" else 0.999)

    def _is_projected(self, group: Group) -> bool:
        """Not with a density that covers the whole matrix."""
        return group["density"] not in (None, 1)

    def _rank(self, m: int, n: int, side: Side, group: Group) -> int:
        """The density as a share of the projected side."""
        dim = m if side == "left" else n
        most = dim if group["projector"] in SPANNING else min(m, n)
        rank: int = max(1, round(group["density"] * dim))
        return min(rank, most)

    def _declared(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """As GaLore's, with the rule's moments; random columns have no basis."""
        declared = super()._declared(param, group)
        if group["projector"] == "columns":
            declared.pop("basis", None)
        return declared

    def _bases(self, site: Site, geo: Geometry) -> dict[str, Tensor]:
        if not _selects(site):
            return super()._bases(site, geo)
        completed = max(0, int(self.state[site.param]["step"]) - 1)
        side = geo.m if geo.side == "left" else geo.n
        dtype = accumulator_dtype(site.param.dtype)
        eye = torch.eye(side, dtype=dtype, device=site.param.device)
        return {"basis": eye[:, columns_of([site], geo, completed)[0]]}

    def _rule(self, group: Group) -> Rule:
        return RULES[group["rule"]]

    def _residual(self, group: Group) -> Residual:
        return SIGNS

    def _check_group(self, group: Group) -> None:
        check_choice("rule", group["rule"], get_args(FrugalRule))
        super()._check_group(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"], low=0.0)
        check_number("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
        if group["density"] is not None:
            check_number("density", group["density"], low=0.0, high=1.0, open_low=True)
        check_positive_int("update_proj_gap", group["update_proj_gap"])
        check_number("sign_lr_scale", group["sign_lr_scale"], low=0.0)
        check_choice("proj_type", group["proj_type"], get_args(OneSided))
        check_choice("projector", group["projector"], get_args(FrugalProjector))
        check_bool("stagger", group["stagger"])

    def _waits(self, completed: int) -> bool:
        """A gradient that is not finite changes no subspace, and moves nothing."""
        return True

    def _refresh(
        self, site: Site, state: dict[str, Tensor], geo: Geometry, gradient: Tensor
    ) -> None:
        """As GaLore's; columns are made when they are used."""
        if not _selects(site):
            super()._refresh(site, state, geo, gradient)

    def _project(
        self,
        sites: Sequence[Site],
        gradients: Sequence[Tensor],
        bases: Sequence[dict[str, Tensor]] | None = None,
    ) -> Tensor:
        site = sites[0]
        geo = self._geometry(site.param, site.group)
        assert geo is not None
        if not _selects(site):
            return super()._project(sites, gradients, bases)
        completed = int(self._state(site.param, site.group)["step"])
        return reduced_to(gradients, columns_of(sites, geo, completed).unbind(), geo)

    def _kind(self, site: Site, gradient: Tensor) -> Hashable:
        """Steps are counted from the last change of the subspace, which comes at different ones."""
        kind = super()._kind(site, gradient)
        if kind is None or self._geometry(site.param, site.group) is None:
            return kind
        return kind, age(site, int(self.state[site.param]["step"]))

    def _direction(
        self,
        sites: Sequence[Site],
        reduced: Tensor,
        states: Sequence[dict[str, Tensor]],
        step: int,
        keys: Sequence[NoiseKey],
        norms: Tensor | None = None,
    ) -> Tensor:
        """The rule's, counted from the last change of the subspace, where moments start from 0."""
        group = sites[0].group
        geo = self._geometry(sites[0].whole, group)
        if geo is not None:
            # A step's number names its rounding's bits too. They are those of the last subspace's
            # step of this age, whose moments have been dropped.
            step = age(sites[0], step - 1)
            if step == 1:
                names = self._rule(group).specs(geo.reduced_shape, group, reduced.dtype)
                once(torch._foreach_zero_, [state[name] for state in states for name in names])
        return super()._direction(sites, reduced, states, step, keys, norms)

    def _bases_down(
        self, sites: Sequence[Site], gradients: Sequence[Tensor], geo: Geometry
    ) -> list[dict[str, Tensor]]:
        """None for columns, which are made when they are used."""
        if _selects(sites[0]):
            return [{} for _ in sites]
        return super()._bases_down(sites, gradients, geo)

    def _step_matrices(
        self,
        sites: Sequence[Site],
        gradients: Sequence[Tensor] | None,
        bases: Sequence[dict[str, Tensor]] | None = None,
        reduced: Tensor | None = None,
    ) -> None:
        site = sites[0]
        geo = self._geometry(site.param, site.group)
        if geo is None or not _selects(site):
            super()._step_matrices(sites, gradients, bases, reduced)
            return
        assert gradients is not None
        states = [self.state[own.param] for own in sites]
        completed = int(states[0]["step"])
        columns = kept(columns_of, sites, geo, completed).unbind()
        if reduced is None:
            reduced = kept(reduced_to, gradients, columns, geo)
        keys = [own.key for own in sites]
        directions = self._columns_direction(sites, reduced, states, keys)
        grads = [matrix(gradient) for gradient in gradients]
        signs = sign_rate(site.group, geo)
        write_columns(sites, directions, grads, columns, geo, completed + 1, signs=signs)
        count(states)

    def _columns_direction(
        self,
        sites: Sequence[Site],
        reduced: Tensor,
        states: Sequence[dict[str, Tensor]],
        keys: Sequence[NoiseKey],
    ) -> Tensor:
        """The rule's direction of the chosen columns."""
        step = int(states[0]["step"]) + 1
        direction = once(self._direction, sites, reduced, states, step, keys)
        return direction.to(reduced.dtype)

    def _step_shard(self, site: Site, gradient: Tensor) -> None:
        param, geo = site.param, self._geometry(site.param, site.group)
        if geo is None or not _selects(site):
            super()._step_shard(site, gradient)
            return
        state = self._local_state(site)
        completed, grad = int(state["step"]), matrix(local_like(gradient, param))
        if kept(self._refresh_due, site, state) and anywhere(not grad.isfinite().all(), param):
            return
        rows, part, chosen = Rows(param), site.shard, columns_of([site], geo, completed)[0]
        wide, key = accumulator_dtype(param.dtype), NoiseKey(site.seed, site.stream)
        if geo.side == "right":
            before = rows.first * geo.rank
            reduced, key = grad.index_select(1, chosen).to(wide), key.shifted(before)
            own = self._columns_direction([part], reduced.unsqueeze(0), [state], [key])
        else:
            # Every process has all of R and its moments, and here are some of the chosen rows.
            skipped = int((chosen < rows.first).sum())
            chosen = chosen[(chosen >= rows.first) & (chosen < rows.first + len(grad))] - rows.first
            every, mine = (
                grad.new_zeros(geo.rank, geo.n, dtype=wide),
                slice(skipped, skipped + len(chosen)),
            )
            every[mine] = grad.index_select(0, chosen).to(wide)
            reduced = rows.assembled(every).t().contiguous()
            direction = self._columns_direction([part], reduced.unsqueeze(0), [state], [key])
            own, before = direction[:, :, mine], skipped * geo.n
        signs = sign_rate(site.group, geo)
        write_columns([part], own, [grad], [chosen], geo, completed + 1, signs=signs, before=before)
        count([state])


def _selects(site: Site) -> bool:
    """Whether R is columns of the gradient themselves."""
    return bool(site.group["projector"] == "columns")
