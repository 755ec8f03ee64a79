"""R of the parameters of a fused backward pass: summed over micro-batches, clipped, applied.

R is the part of a gradient that an update needs, by `_reduce`. Parameters of one kind (`_kind`) can
be treated together: a GPU then launches as often for many of them as for few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from zoopt.distributed.sharding import is_sharded, local, whole
from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.site import Site
from zoopt.kernels.batch import Batch
from zoopt.kernels.journal import kept, once
from zoopt.kernels.product.op_scale import scale_


class Reduced:
    """R of each parameter that has been reached and not updated.

    Args:
        max_grad_norm: the greatest norm of R, or None.
        changes: whether R is summed or scaled before it is applied.

    Attributes:
        waiting: R of each parameter, which is None if it is not to be updated.
    """

    def __init__(self, max_grad_norm: float | None, changes: bool) -> None:
        self.waiting: dict[Tensor, Tensor | None] = {}
        self._max_grad_norm, self._changes = max_grad_norm, changes

    def clear(self) -> None:
        """Drop all of them."""
        self.waiting.clear()

    def keep(self, optimizer: FirstOrderOptimizer, site: Site, gradient: Tensor) -> None:
        """Add a micro-batch's R to the earlier ones; None, which means no update, stays None."""
        again = site.param in self.waiting
        before = self.waiting.get(site.param)
        parted = optimizer._is_parted(site)
        if again and before is None and not parted:
            return
        site = dataclasses.replace(site, continues=again or site.continues)
        if is_sharded(site.param):
            # As FSDP adds them up: in their own dtype.
            if before is None:
                once(self.waiting.__setitem__, site.param, gradient)
            else:
                once(before.add_, gradient)
            return
        reduced = optimizer._reduce_parts(site, gradient, before)
        if reduced is not None and reduced is not gradient and self._changes:
            reduced = reduced.to(accumulator_dtype(reduced.dtype))
        if before is None or (reduced is None and not parted):
            once(self.waiting.__setitem__, site.param, reduced)
        elif reduced is not None:
            once(before.add_, reduced)

    def keep_together(
        self, optimizer: FirstOrderOptimizer, sites: Sequence[Site], gradients: Sequence[Tensor]
    ) -> None:
        """`keep` of prepared parameters of one kind, of which none is not to be updated."""
        params = [site.param for site in sites]
        before = kept(lambda: [self.waiting.get(param) for param in params])
        made = kept(optimizer._reduce_together, sites, gradients)
        each = list(zip(params, before, made, strict=True))
        once(self.waiting.update, {param: own for param, old, own in each if old is None})
        sums = [(old, own) for _, old, own in each if old is not None]
        if sums:
            once(torch._foreach_add_, *([pair[i] for pair in sums] for i in range(2)))

    def scale_of(self, sites: Iterable[Site]) -> Tensor | None:
        """min(1, max_grad_norm / ||R||), (), R of all these parameters, as in torch's clipping."""
        every = [r for site in sites if (r := self.waiting[site.param]) is not None]
        if self._max_grad_norm is None or not every:
            return None
        norm = get_total_norm(every)
        return self._factor(whole(norm) if is_sharded(norm) else norm)

    def _scales(self, every: Sequence[Tensor]) -> Tensor | None:
        """The same of each by itself, (k,)."""
        if self._max_grad_norm is None:
            return None
        return self._factor(torch.stack(torch._foreach_norm(list(every))))

    def _factor(self, norm: Tensor) -> Tensor:
        assert self._max_grad_norm is not None
        scale: Tensor = self._max_grad_norm / (norm + 1e-6)
        return scale.clamp(max=1.0)

    def apply(
        self,
        optimizer: FirstOrderOptimizer,
        site: Site,
        gradient: Tensor | None,
        scale: Tensor | None,
    ) -> None:
        """Update a parameter from its R times the factor, and from its gradient if that is still
        there."""
        reduced = once(self.waiting.pop, site.param)
        if reduced is None:
            return
        if scale is not None:
            gradients = None if gradient is None else [gradient]
            _scale(optimizer, [site], [local(reduced)], gradients, scale.view(1))
        if is_sharded(site.param):
            optimizer._step_shard(site, reduced)
        else:
            optimizer._apply_parts(site, reduced, gradient)

    def apply_together(
        self,
        optimizer: FirstOrderOptimizer,
        sites: Sequence[Site],
        gradients: Sequence[Tensor] | None,
        scale: Tensor | None,
    ) -> None:
        """`apply` of parameters of one kind. Without the factor of all R, each has its own."""
        popped = [once(self.waiting.pop, site.param) for site in sites]
        reduced = [own for own in popped if own is not None]
        scales = kept(self._scales, reduced) if scale is None else scale.view(1)
        if scales is not None:
            _scale(optimizer, sites, reduced, gradients, scales)
        optimizer._apply_together(sites, reduced, gradients)


def _scale(
    optimizer: FirstOrderOptimizer,
    sites: Sequence[Site],
    reduced: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    scales: Tensor,
) -> None:
    """Multiply R, and the gradients where the update needs them besides."""
    scales, keys = scales.to(reduced[0].device), [site.key for site in sites]
    scale_(Batch(reduced, keys), scales)
    if gradients is not None and optimizer._needs_gradient(sites[0]):
        scale_(Batch(gradients, keys), scales)
