"""Parameters that are stacks of matrices, such as a layer's experts: each matrix is stepped alone.

A stack (E, m, n), or (E m, n) as torch's attention keeps its three projections, has its state along
a first axis of E. In a step each matrix is a parameter of its own, named "<name>[e]", whose
weights, gradient and state are views of the stack's. So a stack is stepped like E parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from zoopt.checks import check_positive_int
from zoopt.first_order.projected.geometry import in_stack
from zoopt.first_order.projected.groups import ProjectedGroups
from zoopt.first_order.site import Site, operand
from zoopt.kernels.dispatch import is_fake
from zoopt.kernels.journal import kept, once, pieces
from zoopt.optimizer import Group


class StackedMatrices(ProjectedGroups):
    """Projected optimizers whose groups may say that their parameters are stacks of `matrices`."""

    _optional_keys: ClassVar[tuple[str, ...]] = ("matrices",)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        count = group.get("matrices", 1)
        check_positive_int("matrices", count)
        for param in group["params"]:
            if param.dim() > 1 and param.shape[0] % count:
                raise ValueError(
                    f"matrices must divide the first axis of every matrix of its group, got "
                    f"{count} for one of shape {tuple(param.shape)}; give that one a group of its "
                    f"own"
                )

    @contextlib.contextmanager
    def _apart(self, sites: Sequence[Site], every: bool = False) -> Iterator[Sequence[Site]]:
        """The sites, with each stack's matrices that have a gradient, or `every` one, as sites.

        A matrix whose gradient is 0 everywhere (an expert that no token has reached) counts as one
        without a gradient, and is not changed.
        """
        parts: list[Site] = []
        groups: dict[int, Group] = {}
        try:
            for site in sites:
                count = self._matrices_of(site.param, site.group)
                if count == 1:
                    parts.append(site)
                    continue
                group = groups.setdefault(id(site.group), alone(site.group))
                parts += self._parts(site, count, group, every)
            yield parts
        finally:
            whole = {id(site.param) for site in sites}
            for part in parts:
                if id(part.param) not in whole:
                    self.state.pop(part.param, None)

    def _is_parted(self, site: Site) -> bool:
        return self._matrices_of(site.param, site.group) > 1

    def _parts(self, site: Site, count: int, group: Group, every: bool) -> Iterator[Site]:
        """The matrices of a stack, each with its own state in place of the parameter's."""
        state, gradient = self._state(site.param, site.group), site.param.grad
        weights = in_stack(site.param.detach(), count)
        gradients = None if gradient is None else in_stack(operand(gradient), count)
        numbers = range(count) if every or gradients is None else reached(gradients)
        for number in numbers:
            part = weights[number]
            if gradients is not None and not every:
                part.grad = gradients[number]
            self.state[part] = {name: value[number] for name, value in state.items()}
            yield dataclasses.replace(
                site,
                param=part,
                group=group,
                name=f"{site.name}[{number}]",
                stack=site.param,
                position=site.position * count + number,
                count=site.count * count,
            )

    def _reduce_parts(self, site: Site, gradient: Tensor, before: Tensor | None) -> Tensor | None:
        count = self._matrices_of(site.param, site.group)
        if count == 1:
            return self._reduce(site, gradient)
        gradients, reduced = in_stack(gradient, count), {}
        # A matrix that no earlier micro-batch has reached starts with this one.
        begun = set() if before is None else set(reached(before))
        with self._apart([site], every=True) as parts:
            for number in reached(gradients):
                part = dataclasses.replace(parts[number], continues=number in begun)
                made = once(self._reduce, part, gradients[number])
                if made is not None:
                    reduced[number] = made
        if not reduced:
            return None
        nothing = torch.zeros_like(next(iter(reduced.values())))
        return torch.stack([reduced.get(number, nothing) for number in range(count)])

    def _apply_parts(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        count = self._matrices_of(site.param, site.group)
        if count == 1:
            self._apply(site, reduced, gradient)
            return
        gradients = None if gradient is None else in_stack(gradient, count)
        with self._apart([site], every=True) as parts:
            for number in pieces(kept(reached, reduced)):
                own = None if gradients is None else gradients[number]
                self._apply(parts[number], reduced[number], own)


def alone(group: Group) -> Group:
    """The group without `matrices`: that of single matrices."""
    return {**group, "matrices": 1}


def reached(stack: Tensor) -> list[int]:
    """The numbers of the matrices of a stack, (E, ...), that are not 0 everywhere."""
    if is_fake(stack):
        return list(range(stack.shape[0]))
    greatest = torch.linalg.vector_norm(stack.flatten(1), math.inf, dim=1)
    flags: list[bool] = (greatest != 0).tolist()  # NaN is not 0.
    return [number for number, flag in enumerate(flags) if flag]
