"""Many members of a population in one forward pass: each example sees its member's parameters.

The leading dimension of every activation is members x examples. For y = x W^T and a member i whose
W is displaced by s_i A_d B_d^T,

    y[i] = x[i] W^T + s_i (x[i] B_d) A_d^T

which is one product with W for all, and two batched ones with thin matrices; a bias is one more
column of these. Neighbours with the same draw, such as antithetic pairs, share its A and B.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zoopt.zeroth_order.engine.closure import Closure, PinnedRNG
from zoopt.zeroth_order.engine.members import MemberBatch, MemberDirections
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.population import fitness_eps, fitness_values
from zoopt.zeroth_order.engine.product import operands_of
from zoopt.zeroth_order.engine.sites import Site, Sites
from zoopt.zeroth_order.engine.virtual import Interception

_ARITHMETIC = frozenset(
    {
        *("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide"),
        *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"),
        *("__truediv__", "__rtruediv__"),
    }
)
_NORMS: dict[Callable[..., Any], tuple[str, ...]] = {
    functional.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    functional.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}
#: Up to this many columns are added one by one in float32 on a CPU, which is up to six times as
#: fast as MKL's product.
_FEW_COLUMNS = 2


class Members(Interception):
    """Lets operators read, for each example, the parameters of its own member.

    Args:
        sites: the parameters.
        batch: the members.
        poisoned: replace the first member's displacement by NaN, and raise if that reaches another
            member's examples.
    """

    def __init__(
        self, sites: Sequence[Site], batch: MemberBatch, *, poisoned: bool = False
    ) -> None:
        super().__init__(Sites.of(sites).virtual)
        self._batch = batch
        self._poisoned = poisoned
        self._directions = MemberDirections(sites, batch, poisoned=poisoned)

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The function's result, for each example with its own member's parameters."""
        for rule in (self._product, self._lookup, self._norm, self._arithmetic):
            result = rule(func, args, kwargs)
            if result is not None:
                return result
        raise RuntimeError(
            f"{_name(func)!r} reads a parameter, and has no form for several members in a batch: "
            f"linear, addmm, matmul and embedding have one for matrices; linear, addmm, "
            f"layer_norm, rms_norm and elementwise arithmetic for vectors; call evaluate, which "
            f"takes one member at a time, or leave the parameter out of the optimizer"
        )

    def _product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """A product of the batch with a matrix, and a bias."""
        operands = operands_of(func, args, kwargs)
        if operands is None:
            return None
        x, weight, bias = operands
        own_weight, own_bias = self._is_registered(weight), self._is_registered(bias)
        if self._is_registered(x) or weight.dim() != 2 or (own_bias and bias.dim() != 1):
            return None
        self._check(func, x, 2)
        groups = len(self._batch.draws)
        thin: list[Tensor] = []  # (D, k, rows) each
        wide: list[Tensor] = []  # (D, k, m) each
        if own_weight:
            left, right = self._directions.factors(weight)
            inner, outer = (right, left) if func is functional.linear else (left, right)
            # Both operands row-major: several times as fast as with a tall thin matrix.
            rows = x.reshape(groups, -1, x.shape[-1]).transpose(1, 2)
            thin.append(self._scaled(torch.bmm(inner.to(x.dtype), rows), weight))
            wide.append(outer)
        if own_bias:
            ones = x.new_ones(groups, 1, x.numel() // (groups * x.shape[-1]))
            thin.append(self._scaled(ones, bias))
            wide.append(self._directions.vectors(bias).unsqueeze(1))
        return _plus_products(func(*args, **kwargs), thin, wide)

    def _lookup(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The rows of a matrix that an embedding gathers."""
        lookup = self._embedding(func, args, kwargs)
        if lookup is None:
            return None
        weight, ids = lookup
        if ids.dim() > 1 and len(ids) == 1:
            # Indices without a batch, such as positions, are the same for all examples.
            ids = ids.expand(self._batch.rows, *ids.shape[1:])
        self._check(func, ids, 1)
        left, right = self._directions.factors(weight)
        rows = ids.reshape(len(left), 1, -1).expand(-1, left.shape[1], -1).long()
        thin = self._scaled(left.gather(2, rows), weight)
        return _plus_products(functional.embedding(ids, weight), [thin], [right])

    def _norm(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """A normalisation over the last dimension, by vectors."""
        if func not in _NORMS:
            return None
        values = {**dict(zip(_NORMS[func], args, strict=False)), **kwargs}
        x, shape = values.pop("input"), values.pop("normalized_shape")
        weight, bias = values.pop("weight", None), values.pop("bias", None)
        if self._is_registered(x) or len(shape) != 1:
            return None
        self._check(func, x, 2)
        y: Tensor = func(x, shape, **values)
        grouped = y.view(self._batch.members, -1, *shape)
        if weight is not None:
            grouped *= self._values(weight)
        if bias is not None:
            grouped += self._values(bias)
        return y

    def _arithmetic(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """Elementwise arithmetic of the batch with a vector or a number."""
        if _name(func) not in _ARITHMETIC or len(args) != 2 or "out" in kwargs:
            return None
        x, param = sorted(args, key=self._is_registered)
        if not isinstance(x, Tensor) or self._is_registered(x) or param.dim() > 1:
            return None
        self._check(func, x, 1 + param.dim())
        members = self._batch.members
        grouped = x.reshape(members, -1, *x.shape[1:])
        own = self._directions.own(param)
        own = own.view(members, *(1,) * (x.dim() - param.dim()), *param.shape)
        y: Tensor = func(*(own if value is param else grouped for value in args), **kwargs)
        return y.reshape(len(x), *y.shape[2:])

    def _values(self, vector: Tensor) -> Tensor:
        """A vector's values for each member's rows, or for all if it is not a parameter."""
        return self._directions.own(vector).unsqueeze(1) if self._is_registered(vector) else vector

    def _scaled(self, thin: Tensor, param: Tensor) -> Tensor:
        """thin (D, k, rows) times each member's own scale, in place."""
        scales = self._directions.scales(param, thin.dtype).view(len(thin), 1, -1, 1)
        thin.view(*thin.shape[:2], scales.shape[2], -1).mul_(scales)
        return thin

    def _check(self, func: Callable[..., Any], x: Tensor, dims: int) -> None:
        """Raise unless the tensor's leading dimension is the batch's, or the batch's and others."""
        batch = self._batch
        if x.dim() < dims or len(x) == 0 or len(x) % batch.rows:
            raise RuntimeError(
                f"the input of {_name(func)!r} must have the batch in its leading dimension, "
                f"{batch.members} members x {batch.examples} examples = {batch.rows} (or a "
                f"multiple, with further dimensions behind the batch's), got shape "
                f"{tuple(x.shape)}; pass that many examples and say how many are a member's "
                f"(examples=), or call evaluate, which takes one member at a time"
            )
        if self._poisoned and x.reshape(batch.members, -1)[1:].isnan().any():
            raise MixedMembersError(f"the input of {_name(func)!r}")


def _plus_products(y: Tensor, thin: Sequence[Tensor], wide: Sequence[Tensor]) -> Tensor:
    """y + thin^T wide, group by group: thin (D, k, rows), wide (D, k, m) each; y is reused."""
    grouped = y.view(len(thin[0]), -1, y.shape[-1])
    inner, outer = (torch.cat([part.to(y.dtype) for part in parts], 1) for parts in (thin, wide))
    if y.device.type == "cpu" and y.dtype == torch.float32 and inner.shape[1] <= _FEW_COLUMNS:
        for column, row in zip(inner.unbind(1), outer.unbind(1), strict=True):
            grouped.addcmul_(column.unsqueeze(2), row.unsqueeze(1))
    else:
        grouped.baddbmm_(inner.transpose(1, 2), outer)
    return y


def _name(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", repr(func))
    return func.__self__.__name__ if name == "__get__" else name  # type: ignore[attr-defined]


class MixedMembersError(RuntimeError):
    """A NaN in one member's perturbation reached others."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where} mixes members: a NaN that was put in the place of the first one's "
            f"perturbation is in those of others. The model is not batch-first throughout, or "
            f"mixes examples (as batch normalisation does), or makes NaN itself; call evaluate, "
            f"which takes one member at a time"
        )


def evaluate_batch(
    evaluate: Closure, sites: Sequence[Site], batch: MemberBatch, *, verify: bool
) -> tuple[list[float], float]:
    """The fitnesses of a batch's members, in their order, and their relative spacing if they have
    16 bits, otherwise 0; see `EvolutionStrategy`."""
    for site in sites:
        if site.group["rank"] is None:
            raise ValueError(
                "rank must be a positive int in all param groups for evaluate_batched, got None: "
                "each member then has whole matrices of its own; set rank=1, or call evaluate, "
                "which takes one member at a time"
            )
    sites = Sites(dataclasses.replace(site, virtual=True) for site in sites)
    perturbation = Perturbation(sites)
    rng = PinnedRNG(site.param.device for site in sites)

    def run(*, poisoned: bool) -> tuple[list[float], float]:
        results: list[Any] = []

        def closure() -> float:
            results.append(evaluate())
            return 0.0

        with perturbation.intercepted(Members(sites, batch, poisoned=poisoned)):
            rng.evaluate(closure)
        return _fitnesses(results[0], batch.members), fitness_eps(results[0])

    fitness, eps = run(poisoned=False)
    if verify and batch.members > 1:
        try:
            poisoned, _ = run(poisoned=True)
        except MixedMembersError:
            raise
        except Exception as error:
            raise RuntimeError(
                "evaluate failed with NaN in one member's place, so that its batch's layout could "
                "not be verified; pass verify=False if the model is batch-first throughout"
            ) from error
        reached = [math.isnan(p) and p != f for p, f in zip(poisoned, fitness, strict=True)]
        if any(reached[1:]):
            raise MixedMembersError("the fitness")
    return fitness, eps


def _fitnesses(result: Any, members: int) -> list[float]:
    """The closure's result as a list."""
    values = result.flatten().tolist() if isinstance(result, Tensor) else result
    if not isinstance(values, list | tuple) or len(values) != members:
        got = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(
            f"evaluate must return a fitness for each of the {members} members of the batch, got "
            f"{got}; with several examples a member, take .view({members}, -1).mean(1) of theirs"
        )
    return fitness_values(values, members)
