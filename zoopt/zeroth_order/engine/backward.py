"""Backward passes through a part of the parameters, at the points of a zeroth-order probe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from zoopt.zeroth_order.engine.closure import Closure, loss_value


class LateGradients:
    """A closure that is evaluated with a backward pass, and the mean of the gradients:

        (1/n) sum_i grad_l L(e_i, l)            over the points e_i at which `loss` was called

    Gradients are summed here; `.grad` is set aside until `close`.

    Args:
        closure: evaluates the loss and returns it with its graph.
        early, late: the parameters; gradients are those of the late ones.
        verify: whether the second call repeats the first, so that its gradient does not count.
    """

    def __init__(
        self, closure: Closure, early: list[Tensor], late: list[Tensor], verify: bool
    ) -> None:
        self._closure, self._early, self._late, self._verify = closure, early, late, verify
        self._calls = self._count = 0
        self._nothing: list[Tensor | None] = [None] * len(late)
        self._sums = self._nothing
        self._before = self._exchange(self._nothing)

    def _exchange(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        before = [param.grad for param in self._late]
        for param, grad in zip(self._late, grads, strict=True):
            param.grad = grad
        return before

    def loss(self) -> Any:
        """What the closure returns at the parameters' present values; adds its gradient."""
        self._calls += 1
        try:
            for param in self._early:
                param.requires_grad_(False)
            with torch.enable_grad():
                loss = self._closure()
            value = loss_value(loss)
            if math.isfinite(value) and not (self._verify and self._calls == 2):
                self._backward(loss)
        finally:
            for param in self._early:
                param.requires_grad_(True)
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _backward(self, loss: Any) -> None:
        ready = isinstance(loss, Tensor) and loss.requires_grad
        ready &= all(grad is None for grad in self._exchange(self._sums))
        if ready:
            # torch.autograd.backward would suspend a virtual perturbation, but a checkpointed
            # layer runs its operators again and must see it.
            Variable._execution_engine.run_backward(
                *((loss,), (torch.ones_like(loss),), False, False, ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )
        self._sums = self._exchange(self._nothing)
        if not ready or all(grad is None for grad in self._sums):
            raise RuntimeError(
                "the closure must return the loss as a tensor that depends on first_order's "
                "parameters differentiably, and not call backward; end it with `return loss`"
            )
        self._count += 1

    def close(self, *, keep: bool) -> None:
        """Set `.grad` to what it was, plus the mean over the evaluations if it is to be kept."""
        grads = list(self._before)
        for i, (before, total) in enumerate(zip(self._before, self._sums, strict=True)):
            if keep and total is not None:
                total.div_(self._count)
                grads[i] = total if before is None else before.add_(total)
        self._exchange(grads)
