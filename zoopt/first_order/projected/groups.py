"""Param groups of projected optimizers: their meaning, and their checks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor

from zoopt.checks import check_choice, check_number, check_positive_int
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.projected.geometry import Geometry, ProjType, Side, geometry, projected_side
from zoopt.first_order.projected.selection import LARGE, is_plain_by_name
from zoopt.first_order.projected.subspace import Projector
from zoopt.kernels.adam.moments import Format
from zoopt.optimizer import Group, Params

#: Wider than the kernel of any convolution.
_WIDE = 32


class ProjectedGroups(FirstOrderOptimizer):
    """The groups of optimizers some of whose parameters are projected."""

    #: Group keys of other classes and of the authors' code, and the equivalent here.
    _remedies: ClassVar[Mapping[str, str]] = {}

    def __init__(self, params: Params, defaults: dict[str, Any], *, seed: int | None) -> None:
        if isinstance(params, Iterator):
            params = list(params)
        # GaLore's authors write groups in this way: those without a rank are not projected.
        if isinstance(params, list | tuple) and any(
            isinstance(group, dict) and group.get("rank") is not None for group in params
        ):
            defaults = defaults | {key: None for key in ("rank",) if key in defaults}
        super().__init__(params, defaults, seed=seed)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch; it joins the run under its seed.

        Without a `rank` of its own it has the optimizer's, except that embeddings and output
        layers, told by their names, become a plain group (`rank=None`) after it.

        Raises:
            TypeError, ValueError: a key that the class does not have, a hyperparameter out of
                range, a parameter of a kind that has no update, or two parameters with the same
                stream. Nothing has changed then.
        """
        name = type(self).__name__
        for key, remedy in self._remedies.items():
            if key in param_group and key not in self.defaults:
                raise ValueError(f"{key} must not be among the keys of {name}'s groups; {remedy}")
        parts = _split_by_name(param_group, self.defaults)
        known = len(self.param_groups)
        try:
            for part in parts:
                super().add_param_group(part)
            self._say_full_rank(self.param_groups[known])
        except BaseException:
            del self.param_groups[known:]
            raise

    def _geometry(self, param: Tensor, group: Group) -> Geometry | None:
        """How the parameter, or each matrix of a stack, is projected: from its shape alone; None if
        it is not."""
        if param.dim() < 2 or not self._is_projected(group):
            return None
        shape, count = tuple(param.shape), group.get("matrices", 1)
        m, n, side = projected_side(shape, count, group["proj_type"])
        return geometry(m, n, self._rank(m, n, side, group), side) if m and n else None

    def _matrices_of(self, param: Tensor, group: Group) -> int:
        """How many matrices are stacked along the parameter's first axis, each with its own
        subspace and state: the group's `matrices` if the parameter is projected."""
        count: int = group.get("matrices", 1)
        return count if param.dim() > 1 and self._is_projected(group) else 1

    def _is_projected(self, group: Group) -> bool:
        """Whether matrices of the group are projected."""
        return group.get("rank") is not None

    def _rank(self, m: int, n: int, side: Side, group: Group) -> int:
        """The subspace's dimensions: at most the matrix's own."""
        rank: int = group["rank"]
        return min(rank, m, n)

    def _say_full_rank(self, group: Group) -> None:
        """Warn of a large matrix whose projection has its full rank, and of a parameter that looks
        like a stack of matrices and is projected as one matrix."""
        for i, param in enumerate(group["params"] if group.get("rank") is not None else ()):
            geo = self._geometry(param, group)
            if geo is not None and looks_stacked(param) and group.get("matrices", 1) == 1:
                names, shape = group.get("param_names", range(i + 1)), tuple(param.shape)
                warnings.warn(
                    f"{names[i]!r} of shape {shape} is projected as one matrix, ({geo.m}, "
                    f"{geo.n}): if it is {shape[0]} matrices, a layer's experts say, give its "
                    f"group matrices={shape[0]}, as zoopt.lowrank.param_groups does",
                    stacklevel=6,
                )
                return
            if geo is not None and geo.rank == min(geo.m, geo.n) and param.numel() >= LARGE:
                names = group.get("param_names", range(i + 1))
                warnings.warn(
                    f"the rank of {names[i]!r} reaches its short side, {geo.rank}: it has the "
                    f"state of AdamW and a basis besides; use a lower rank, or rank=None in its "
                    f"group",
                    stacklevel=6,
                )
                return

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_choice("state_dtype", group["state_dtype"], get_args(Format))
        check_choice("state_rounding", group["state_rounding"], ("stochastic", "nearest"))
        if group.get("rank") is None:
            return
        check_positive_int("rank", group["rank"])
        check_choice("proj_type", group["proj_type"], get_args(ProjType))
        if "update_proj_gap" in group:
            check_positive_int("update_proj_gap", group["update_proj_gap"])
        if "scale" in group:
            check_number("scale", group["scale"], low=0.0)
        if "projector" in group:
            check_choice("projector", group["projector"], get_args(Projector))


def looks_stacked(param: Tensor) -> bool:
    """Whether a parameter is more likely a stack of matrices than the kernel of a convolution."""
    return param.dim() == 3 and min(param.shape[1:]) >= _WIDE and param.numel() >= LARGE


def _split_by_name(param_group: dict[str, Any], defaults: Mapping[str, Any]) -> list[Group]:
    """The group; if it has names and the optimizer's rank, without its embeddings and output
    layers, which become a second group of rank None."""
    if "rank" in param_group or defaults.get("rank") is None or "params" not in param_group:
        return [param_group]
    given = param_group["params"]
    params = list(given) if isinstance(given, Iterator) else given
    group = {**param_group, "params": params}
    if not isinstance(params, list | tuple) or not all(isinstance(p, tuple) for p in params):
        return [group]
    plain = [pair for pair in params if is_plain_by_name(str(pair[0]))]
    rest = [pair for pair in params if not is_plain_by_name(str(pair[0]))]
    parts = [{**group, "params": rest}, {**group, "params": plain, "rank": None}]
    return [part for part in parts if part["params"]] or [group]
