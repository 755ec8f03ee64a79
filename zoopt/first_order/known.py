"""What a first-order step knows from the one before: which parameters are updated together.

While parameters, groups and state are the ones that a step has found, and the same parameters have
gradients of the same kind, the next step updates the same ones together. It finds that out for all
of them at once, and does nothing for each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoopt.first_order.site import Site
from zoopt.lasting import Facts, Lasting, facts_of
from zoopt.optimizer import Group

_grad = operator.attrgetter("grad")
_dtype = operator.attrgetter("dtype")
_shape = operator.attrgetter("shape")
_layout = operator.attrgetter("layout")
#: Keys of groups that change between steps, and say nothing about which parameters are alike.
_APART = ("params", "param_names", "lr")
State = Mapping[Tensor, Mapping[str, Any]]


class Bucket(Lasting):
    """The sites of parameters of one kind, which one operation updates.

    Attributes:
        params: their parameters.
    """

    params: list[Tensor]

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Bucket:
        """A bucket of these."""
        bucket = cls(sites)
        bucket.params = [site.param for site in sites]
        return bucket


class KnownStep:
    """The parameters of a step, each in a bucket, and the facts that this follows from."""

    def __init__(
        self, facts: Facts, groups: Sequence[Group], state: State, buckets: Sequence[Bucket]
    ) -> None:
        self._facts, self._groups, self._state, self.buckets = facts, groups, state, buckets
        self._resting = [param for group in groups for param in group["params"]]
        stepped = {id(param) for bucket in buckets for param in bucket.params}
        self._resting = [param for param in self._resting if id(param) not in stepped]
        self._kinds = [
            (list(map(_shape, bucket.params)), _dtype(_grad(bucket.params[0])))
            for bucket in buckets
        ]
        self._steps = [
            [state[param]["step"] for param in bucket.params if "step" in state[param]]
            for bucket in buckets
        ]

    @classmethod
    def of(
        cls, groups: Sequence[Group], state: State, buckets: Sequence[Bucket]
    ) -> KnownStep | None:
        """What the next step can know; None if it has to look by itself."""
        facts = facts_of(groups, state, _APART, tensors=True)
        return None if facts is None else cls(facts, groups, state, buckets)

    def gradients(self) -> list[Sequence[Tensor]] | None:
        """The gradients of each bucket, contiguous; None if this step is another one."""
        facts = facts_of(self._groups, self._state, _APART, tensors=True)
        if facts is None or not facts.holds(self._facts):
            return None
        if any(grad is not None for grad in map(_grad, self._resting)):
            return None
        found: list[Sequence[Tensor]] = []
        for bucket, (shapes, dtype), steps in zip(
            self.buckets, self._kinds, self._steps, strict=True
        ):
            gradients = list(map(_grad, bucket.params))
            if not set(map(type, gradients)) <= {Tensor}:
                return None
            alike = set(map(_layout, gradients)) == {torch.strided}
            alike &= set(map(_dtype, gradients)) == {dtype}
            alike &= list(map(_shape, gradients)) == shapes and len(set(map(_item, steps))) < 2
            if not alike or any(map(Tensor.is_neg, gradients)):
                return None
            if not all(map(Tensor.is_contiguous, gradients)):
                gradients = [gradient.contiguous() for gradient in gradients]
            found.append(gradients)
        return found


_item: Callable[[Tensor], Any] = Tensor.item
