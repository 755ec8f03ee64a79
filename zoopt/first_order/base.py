"""Shared by all first-order optimizers: the loop over gradients, and what a method fills in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from zoopt.ambient import OwnArithmetic, opaque
from zoopt.checks import check_bool, check_choice, check_number
from zoopt.distributed.checkpoint import asks_for_state, called_by_get, called_by_load
from zoopt.distributed.sharding import (
    is_sharded,
    local,
    local_like,
)
from zoopt.dtypes import RoundingMode
from zoopt.first_order.checks import check_gradient, check_shards, check_values
from zoopt.first_order.known import Bucket, KnownStep
from zoopt.first_order.progress import Mark, Update
from zoopt.first_order.site import Site, gradient_of, operand, tied_by_data
from zoopt.interrupts import uninterrupted
from zoopt.kernels.journal import kept
from zoopt.noise import NOISE_VERSION
from zoopt.optimizer import DeclaredStateOptimizer, Group, Params
from zoopt.parameters import check_param, named_params


class Fusion(Protocol):
    """The interface of `zoopt.fuse_backward`, which replaces the step."""

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """Finish the updates that backward has not done."""

    def discard(self) -> None:
        """Drop gradients that have arrived and not been applied."""


class FirstOrderOptimizer(DeclaredStateOptimizer):
    """Updates each parameter from its gradient: `_reduce` it to what is needed, then `_apply` that.

    The two are separate so that the gradient can be freed between them (`zoopt.fuse_backward`), and
    so that results of `_reduce` can be summed over micro-batches. Randomness (of stochastic
    rounding, of random projections) is a function of `seed`, the parameter's name or position, and
    its step.
    """

    _fusion: Fusion | None = None
    #: By name, how far each parameter had come in a step that an error interrupted.
    _begun: dict[str | int, Mark] | None = None
    #: The updates in which that was.
    _interrupted: Sequence[Update] = ()
    #: Which parameters the last step has updated together, where the next one can take them over.
    _known: KnownStep | None = None
    #: Whether parameters of one kind stay so while they, their groups and gradients do, and nothing
    #: else is asked of a dense gradient.
    kinds_last = False
    #: Whether parameters whose rows are sharded over processes can be updated.
    shards = False

    def __init__(self, params: Params, defaults: dict[str, Any], *, seed: int | None) -> None:
        run = {"seed": self._share_seed(seed), "noise_version": NOISE_VERSION}
        super().__init__(params, {**defaults, **run})

    @opaque
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the loss and its gradients again, and returns the loss.

        Returns:
            What the closure returned, or None.

        Linear algebra that can fail comes first, for all parameters. After that, each parameter is
        updated with its state, or it is not. If an error ends the step, for example because memory
        runs out, a step from the same gradients goes on where it ended. A parameter that it has
        begun to update is finished first, also by a step from other gradients, and by `state_dict`.
        Signals such as Ctrl-C's wait until the updates are done.

        Raises:
            RuntimeError: a gradient is sparse; a parameter no longer has its state's shape, or has
                no values; or processes have different seeds. Nothing has changed then.
        """
        if asks_for_state(self):
            if called_by_load() or not called_by_get():  # `state_dict` makes its own.
                self._make_state()
            return None
        self._check_seed()
        if self._fusion is not None:
            return self._fusion.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with OwnArithmetic():
            self._step()
        return loss

    def _step(self) -> None:
        self._finish()
        if self._known is not None and self._step_known(self._known):
            return
        self._check_state()
        sites = []
        for site in self._sites():
            check_values(site)
            if site.param.grad is not None:
                self._check_gradient(site)
                sites.append(site)
        for site in sites:
            # If memory runs out, it does so before anything has changed.
            self._state(site.param, site.group)
        with self._apart(sites) as parts:
            self._step_sites(parts)

    def _step_known(self, known: KnownStep) -> bool:
        """Take the step with the same parameters updated together as in the last one; return
        whether that is right."""
        gradients = None if self._begun else known.gradients()
        if gradients is None or not self._prepare_due(known.buckets, gradients):
            self._known = None
            return False
        updated = 0
        try:
            with uninterrupted():
                for bucket, own in zip(known.buckets, gradients, strict=True):
                    self._complete(bucket, self._update_together, bucket, own)
                    updated += 1
                self._stepped()
        except BaseException:
            self._begun = {}
            for number, bucket in enumerate(known.buckets if updated < len(known.buckets) else ()):
                for site in bucket:
                    self._begun[site.name] = Mark(gradient_of(site), done=number < updated)
            raise
        return True

    def _prepare_due(
        self, buckets: Sequence[Bucket], gradients: Sequence[Sequence[Tensor]]
    ) -> bool:
        """Prepare the parameters that need it; return whether all can be updated. What has been
        prepared is noted until then."""
        marks = self._begun = {}
        for bucket, grads in zip(buckets, gradients, strict=True):
            for number in self._due(bucket):
                site = dataclasses.replace(bucket[number], continues=False)
                mark = marks[site.name] = Mark(gradient_of(site))
                mark.prepare(self._prepare, site, grads[number])
        if any(mark.done for mark in marks.values()):
            return False
        self._begun = None
        return True

    def _due(self, sites: Sequence[Site]) -> Sequence[int]:
        """Where `kinds_last`, the numbers of the parameters that a step has to prepare."""
        return ()

    def _step_sites(self, sites: Sequence[Site]) -> None:
        """Step parameters that have gradients and state."""
        # How far each has come, where an error ended the step from the same gradients.
        before, self._begun = self._begun or {}, {}
        marks = self._begun
        for site in sites:
            source = gradient_of(site) if site.stack is None else site.stack.grad
            assert source is not None
            mark = before.get(site.name)
            if mark is None or not mark.is_of(source):
                mark = Mark(source)
            marks[site.name] = mark
        ready = []
        for site in sites:
            mark = marks[site.name]
            if not is_sharded(site.param):
                mark.prepare(self._prepare, site, operand(gradient_of(site)))
            if not mark.done:
                continues = site.continues or not is_sharded(site.param)
                ready.append(dataclasses.replace(site, continues=continues))
        with uninterrupted():
            buckets = self._update_all(ready)
            self._begun = None
            self._stepped()
        if (
            self.kinds_last
            and buckets is not None
            and len(ready) == len(sites)
            and self._fusion is None
        ):
            self._known = KnownStep.of(self.param_groups, self.state, buckets)

    def _stepped(self) -> None:
        """What follows when a step has been taken, before any signal."""

    def _update_all(self, sites: Sequence[Site]) -> list[Bucket] | None:
        """Update prepared parameters, those of one kind together. Return these buckets if they hold
        all of them."""
        alone, together = self._partition(sites, [gradient_of(site) for site in sites])
        for i in alone:
            self._complete([sites[i]], self._step_param, sites[i], gradient_of(sites[i]))
        buckets = [Bucket.of([sites[i] for i in members]) for members in together]
        for bucket in buckets:
            gradients = [operand(gradient_of(site)) for site in bucket]
            self._complete(bucket, self._update_together, bucket, gradients)
        stacked = any(site.stack is not None for site in sites)
        return None if alone or stacked or not sites else buckets

    def _partition(
        self, sites: Sequence[Site], gradients: Sequence[Tensor]
    ) -> tuple[list[int], list[list[int]]]:
        """The numbers of the parameters that are updated by themselves, and of those that one
        operation updates together."""
        kinds = [self._kind(site, own) for site, own in zip(sites, gradients, strict=True)]
        members = [i for i, kind in enumerate(kinds) if kind is not None]
        # Parameters tied by their data are updated one after the other.
        tied = {members[i] for i in tied_by_data([sites[i].param for i in members])}
        together: dict[Hashable, list[int]] = {}
        for i in members:
            if i not in tied:
                together.setdefault(kinds[i], []).append(i)
        alone = [i for i, kind in enumerate(kinds) if kind is None or i in tied]
        return alone, list(together.values())

    def _complete(
        self,
        sites: Sequence[Site],
        update: Callable[..., None],
        *args: Any,
        changes_weights: bool = True,
    ) -> None:
        """Run an update of parameters, or of their state alone. If an error ends it after it has
        begun to write, it is kept, to be finished before anything else happens to the
        parameters."""
        own = Update(sites, update, args, changes_weights)
        try:
            own.run()
        except BaseException:
            if own.begun:
                own.keep_states(self.state)
                self._interrupted = [*self._interrupted, own]
            raise
        self._completed(own)

    def _completed(self, update: Update) -> None:
        if isinstance(update.sites, Bucket) and not self._begun and update.changes_weights:
            torch.autograd.graph.increment_version(update.sites.params)
            return
        for site in update.sites:
            mark = (self._begun or {}).get(site.name)
            if mark is not None:
                mark.done = True
            if update.changes_weights:
                self._written(site.param)

    def _finish(self) -> None:
        """Finish the updates that errors have interrupted."""
        while self._interrupted:
            first, *others = self._interrupted
            with OwnArithmetic(), torch.no_grad(), uninterrupted():
                first.finish(self.state)
                self._completed(first)
                self._interrupted = others

    def forget_begun(self) -> None:
        """Drop what an error has left unfinished, because other weights or state take its place."""
        self._begun, self._interrupted, self._known = None, (), None

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the parameters' shapes in each group, which a load checks. An update
        that an error has interrupted is finished before."""
        self._finish()
        if not called_by_get():
            return super().state_dict()
        # With all entries that a load will look for, and no trace here.
        new = [site for site in self._sites() if site.param not in self.state]
        new = [site for site in new if self._may_train(site.param, site.group)]
        try:
            with OwnArithmetic():
                for site in new:
                    self.allocate_state(site.param, site.group)
            return super().state_dict()
        finally:
            for site in new:
                self.state.pop(site.param, None)

    def _may_train(self, param: Tensor, group: Group) -> bool:
        """Whether a parameter trains in some of the steps."""
        return param.requires_grad

    def __getstate__(self) -> dict[str, Any]:
        self._finish()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.forget_begun()  # It belongs to the state before.
        super().__setstate__(state)

    @contextlib.contextmanager
    def _apart(self, sites: Sequence[Site]) -> Iterator[Sequence[Site]]:
        """The sites, where parameters that are stepped in parts are replaced by these parts."""
        yield sites

    def _is_parted(self, site: Site) -> bool:
        """Whether a parameter is stepped in parts, some of which may have no gradient."""
        return False

    def _reduce_parts(self, site: Site, gradient: Tensor, before: Tensor | None) -> Tensor | None:
        """`_reduce` of all parts of a parameter; `before` is the result of earlier
        micro-batches."""
        return self._reduce(site, gradient)

    def _apply_parts(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        """`_apply` of all parts of a parameter."""
        self._apply(site, reduced, gradient)

    def _kind(self, site: Site, gradient: Tensor) -> Hashable:
        """Equal for parameters that one operation updates together from these gradients, or
        results of `_reduce`; on a GPU that is one launch. None for one that is updated by itself.
        """
        return None

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """Update parameters of one `_kind` and their state from their gradients."""
        raise NotImplementedError

    def _reduce_together(
        self, sites: Sequence[Site], gradients: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`_reduce` of prepared parameters of one `_kind`; in the accumulator's dtype, where the
        results are not the gradients."""
        return gradients

    def _apply_together(
        self,
        sites: Sequence[Site],
        reduced: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
    ) -> None:
        """`_apply` of parameters of one `_kind`; without gradients, if they do not need them."""
        self._update_together(sites, reduced)

    @opaque
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that `zoopt.fuse_backward` has accumulated are dropped too."""
        super().zero_grad(set_to_none)
        if self._fusion is not None:
            self._fusion.discard()

    def _make_state(self) -> None:
        """State for every parameter that has a gradient, as before its first step."""
        with OwnArithmetic():
            for site in self._sites():
                if site.param.grad is not None:
                    self._state(site.param, site.group)

    def _step_param(self, site: Site, gradient: Tensor) -> None:
        """Update a prepared parameter, alone."""
        if is_sharded(site.param):
            self._step_shard(site, gradient)
        else:
            self._update(site, operand(gradient))

    def _update(self, site: Site, gradient: Tensor) -> None:
        """Update a prepared parameter and its state from its gradient."""
        reduced = kept(self._reduce, site, gradient)
        if reduced is not None:
            self._apply(site, reduced, gradient)

    def _written(self, param: Tensor) -> None:
        """Tell autograd, which does not see the kernels' writes: going backward through an older
        graph must raise, and not use other weights silently."""
        torch.autograd.graph.increment_version(param)
        if is_sharded(param):
            torch.autograd.graph.increment_version(local(param))

    def _step_shard(self, site: Site, gradient: Tensor) -> None:
        """Step this process's part of a sharded parameter, as if it were the whole."""
        shard, gradient = site.shard, local_like(gradient, site.param)
        self.state[shard.param] = self._local_state(site)
        try:
            reduced = kept(self._reduce, shard, gradient)
            if reduced is not None:
                self._apply(shard, reduced, gradient)
        finally:
            del self.state[shard.param]
        self._merge(site)

    def _local_state(self, site: Site) -> dict[str, Tensor]:
        """This process's part of the parameter's state; writes to it go to the whole state."""
        state = self._state(site.param, site.group)
        return {name: local(value) for name, value in state.items()}

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        """Do everything that can fail, for all parameters, before any of them is written. If False
        is returned, this parameter is not updated."""
        return True

    def _reduce(self, site: Site, gradient: Tensor) -> Tensor | None:
        """The part of the gradient that the update needs, which is summed over micro-batches; None
        if the parameter is not to be updated."""
        return gradient

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        """Update the parameter and its state from `_reduce`'s result and, if `_needs_gradient`, the
        whole gradient."""
        raise NotImplementedError

    def _needs_gradient(self, site: Site) -> bool:
        """Whether `_apply` needs the whole gradient besides the result of `_reduce`."""
        return False

    def _keeps_gradient(self, site: Site) -> bool:
        """Whether the result of `_reduce` is the whole gradient."""
        return True

    def _sites(self) -> Iterator[Site]:
        """Every parameter, with its place."""
        named = list(named_params(self.param_groups))
        for position, (_, group, param, name) in enumerate(named):
            yield Site(param, group, name, position, len(named))

    def _can_shard(self, param: Tensor, group: Group) -> bool:
        """Whether a part of the rows can be stepped as a parameter of its own, followed by
        `_merge`."""
        return False

    def _merge(self, site: Site) -> None:
        """Combine the state of all parts after the step of a sharded parameter."""

    def _check_gradient(self, site: Site) -> None:
        """Raise unless the update can read the parameter's gradient."""
        check_gradient(site, type(self).__name__)

    def _check_group(self, group: Group) -> None:
        """Raise unless the group's hyperparameters and parameters are in range."""
        super()._check_group(group)
        check_number("lr", group["lr"], low=0.0)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_bool("maximize", group["maximize"])
        check_choice("rounding", group["rounding"], get_args(RoundingMode))
        for param in group["params"]:
            check_param(local(param))
        check_shards(group, self._can_shard, type(self).__name__)
