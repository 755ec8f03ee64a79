"""The handle of a fused backward pass: what its hooks do, and its step."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoopt.ambient import OwnArithmetic, opaque
from zoopt.distributed.sharding import is_sharded
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.clipping import check_unclipped
from zoopt.first_order.fused_checks import (
    check_model,
    check_not_replicated,
    check_sites,
    check_unscaled,
)
from zoopt.first_order.gathering import Gathered, layers_of
from zoopt.first_order.progress import Mark
from zoopt.first_order.reduced import Reduced
from zoopt.first_order.site import Site, operand
from zoopt.interrupts import uninterrupted
from zoopt.kernels.dispatch import launches
from zoopt.kernels.journal import Journal, kept, once, pieces
from zoopt.removable import Removable

Clip = Literal["global", "parameter"]


class FusedBackward(Removable):
    """The handle that `fuse_backward` returns."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: FirstOrderOptimizer,
        accumulation_steps: int,
        max_grad_norm: float | None,
        clip: Clip,
    ) -> None:
        self._model, self._reference = model, weakref.ref(optimizer)
        self._accumulation_steps = accumulation_steps
        self._max_grad_norm, self._clip = max_grad_norm, clip
        #: Whether updates wait for `step`.
        self._deferred = accumulation_steps > 1 or (max_grad_norm is not None and clip == "global")
        #: Whether gradients are summed or scaled before they are applied.
        self._changes = self._deferred or max_grad_norm is not None
        self._hooks: dict[Tensor, RemovableHandle] = {}
        #: Between two steps: each parameter's place, how often it was reached, and its R.
        self._sites: dict[Tensor, Site] = {}
        self._arrivals: dict[Tensor, int] = {}
        self._reduced = Reduced(max_grad_norm, self._changes)
        #: Each parameter's layer, and the gradients of a layer that have arrived, by stream.
        self._layers: dict[Tensor, str] = {}
        self._gathered: dict[Hashable, Gathered] = {}
        self._marks: dict[Tensor, Mark] = {}
        #: The backward pass at whose end what has been gathered is applied.
        self._ends = -1
        #: Of a step that has begun, the factor of all R.
        self._scale: tuple[Tensor | None] | tuple[()] = ()
        self._journal = Journal()
        self._may_be_clipped = max_grad_norm is None
        self._attach()
        self._forward = model.register_forward_pre_hook(check_not_replicated)
        # With this attribute GradScaler.step leaves its scale on the optimizer and calls `step`,
        # which can explain the error. Otherwise it would fail an assertion about missing gradients.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        optimizer._fusion = self
        self._loading = optimizer.register_load_state_dict_post_hook(lambda _: self._forget())

    @property
    def _optimizer(self) -> FirstOrderOptimizer:
        optimizer = self._reference()
        if optimizer is None:
            raise RuntimeError("the fused optimizer is gone; keep it as long as its handle is used")
        return optimizer

    def remove(self) -> None:
        """Undo the fusion: gradients stay in `.grad` again. Those that wait for `step` are lost."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._forward.remove()
        self._forget()
        optimizer = self._reference()
        if optimizer is not None and optimizer._fusion is self:
            self._loading.remove()
            optimizer._fusion = None
            del optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def discard(self) -> None:
        """Drop what has arrived since the last step.

        Raises:
            RuntimeError: it has been applied. Nothing has changed then.
        """
        if self._arrivals and not self._deferred:
            raise RuntimeError(
                f"zero_grad() must come after step(), got gradients of {len(self._arrivals)} "
                f"parameters that backward has applied and cannot take back; call step() to go on "
                f"with them, and freeze what a backward pass must not train by "
                f"requires_grad_(False), or leave the backward unfused"
            )
        self._forget()

    def _forget(self) -> None:
        self._sites.clear()
        self._arrivals.clear()
        self._reduced.clear()
        self._gathered.clear()
        self._marks.clear()
        self._scale, self._journal = (), Journal()

    def step(self, closure: Callable[[], Any] | None) -> Any:
        """The optimizer's step: the closure if any, then the updates that backward has not done."""
        optimizer, loss = self._optimizer, None
        optimizer._finish()
        check_unscaled(optimizer)
        if self._may_be_clipped:
            check_unclipped()
            self._may_be_clipped = False
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # What a pass has left that failed.
        self._apply_gathered()
        self._attach()
        for site in self._places().values():
            if site.param.grad is not None:
                self._receive(site.param)
        self._apply_gathered()
        # In the order of parameters, not of arrival, so that norms are always rounded alike.
        waiting = [site for param, site in self._sites.items() if param in self._reduced.waiting]
        with OwnArithmetic(), uninterrupted():
            if self._clip == "global" and not self._scale:
                # Of all of them, also where an error ends this step.
                self._scale = (self._journal.run(self._reduced.scale_of, waiting),)
            scale = self._scale[0] if self._scale else None
            for members in self._alike(waiting):
                optimizer._complete(members, self._finish, members, scale)
            self._forget()
            optimizer._stepped()
        return loss

    def _attach(self) -> None:
        """Hook the parameters that have no hook yet, once all of them have passed the checks."""
        optimizer, name = self._optimizer, type(self._optimizer).__name__
        new = [site for site in optimizer._sites() if site.param not in self._hooks]
        if not new:
            return
        check_model(self._model)
        check_sites(new, self._model)
        for site in new:
            sharded = is_sharded(site.param) and not optimizer._keeps_gradient(site)
            if self._deferred and (sharded or optimizer._needs_gradient(site)):
                raise ValueError(
                    f"{name} needs the whole gradient of parameter {site.name!r}"
                    f"{', which is sharded' if sharded else ''}: "
                    f"accumulation_steps must be 1, got {self._accumulation_steps}, and clip "
                    f"'parameter' if any, got {self._clip!r}; or leave the backward unfused"
                )
        for site in new:
            param, required = site.param, site.param.requires_grad
            # torch hooks no frozen parameter, but a hook survives freezing and unfreezing.
            param.requires_grad_(True)
            hook = param.register_post_accumulate_grad_hook(_hook(self))  # type: ignore[no-untyped-call]
            param.requires_grad_(required)
            self._hooks[param] = hook
        self._layers = layers_of(self._model)

    def _places(self) -> dict[Tensor, Site]:
        """Each parameter's site, looked up once a step, since groups can be added and reloaded."""
        if not self._sites:
            self._optimizer._check_seed()
            self._optimizer._check_state()
            self._sites = {site.param: site for site in self._optimizer._sites()}
        return self._sites

    @opaque
    def _receive(self, param: Tensor) -> None:
        """Take a complete gradient: update with it or keep its R, and free it; or gather it with
        others of its layer."""
        optimizer = self._optimizer
        optimizer._finish()
        site = self._places()[param]
        optimizer._check_gradient(site)
        arrivals = self._checked_arrivals(site)
        if self._gathers(site):
            self._gather(site, arrivals)
            return
        with OwnArithmetic(), uninterrupted():
            gradient, param.grad = param.grad, None
            assert gradient is not None
            try:
                if not is_sharded(param):
                    gradient = operand(gradient)
                optimizer._complete(
                    [site], self._take, site, gradient, changes_weights=not self._deferred
                )
            except BaseException:
                if optimizer._interrupted:  # to be finished
                    self._arrivals[param] = arrivals
                else:
                    param.grad = gradient
                raise
            self._arrivals[param] = arrivals

    def _gathers(self, site: Site) -> bool:
        """Whether the gradient can be applied with others, by the same launches."""
        param, gradient = site.param, site.param.grad
        # FSDP calls hooks when it is done with a shard.
        alone = is_sharded(param) or self._optimizer._is_parted(site)
        strided = gradient is not None and gradient.layout == torch.strided
        return strided and not alone and launches(param)

    def _gather(self, site: Site, arrivals: int) -> None:
        """Take a gradient, and treat those of the layer before, or of this one if they are many."""
        param, layer = site.param, self._layers.get(site.param)
        gathered = self._gathered.setdefault(_stream_of(param), Gathered())
        if not gathered.belongs(layer):
            self._apply_layer(gathered)
        assert param.grad is not None
        with OwnArithmetic(), uninterrupted():
            gradient = operand(param.grad)
            param.grad, self._arrivals[param] = None, arrivals
            gathered.add(param, gradient, layer)
        if gathered.full:
            self._apply_layer(gathered)

    def _apply_at_the_end(self, apply: Callable[[], None]) -> None:
        """Have the backward pass call `apply` when it ends, once, if anything has been gathered."""
        running = torch._C._current_graph_task_id()
        if running != self._ends and any(own.gradients for own in self._gathered.values()):
            # torch has no public name for it; FSDP uses this one.
            torch.autograd.Variable._execution_engine.queue_callback(apply)
            self._ends = running

    def _apply_gathered(self) -> None:
        """Apply what has been gathered, of all streams, with which the present one is in step."""
        for stream, gathered in list(self._gathered.items()):
            if isinstance(stream, torch.cuda.Stream):
                for gradient in gathered.gradients.values():
                    gradient.record_stream(torch.cuda.current_stream(gradient.device))
            self._apply_layer(gathered)

    @opaque
    def _apply_layer(self, gathered: Gathered) -> None:
        """Take the gradients of one layer. If an error comes before anything is written, they go
        back to where they were."""
        optimizer, gradients = self._optimizer, gathered.gradients
        optimizer._finish()
        if not gradients:
            return
        sites = [self._places()[param] for param in gradients]
        try:
            with OwnArithmetic(), torch.no_grad():
                ready = self._prepared(sites, gradients)
                with uninterrupted():
                    if ready:
                        optimizer._complete(
                            *(ready, self._take_layer, ready),
                            [gradients[site.param] for site in ready],
                            changes_weights=not self._deferred,
                        )
                    gathered.clear()
        except BaseException:
            with uninterrupted():
                for param, gradient in gathered.gradients.items():
                    if not optimizer._interrupted:
                        param.grad = gradient
                        self._arrivals[param] -= 1
                        if not self._arrivals[param]:
                            del self._arrivals[param]
                gathered.clear()
            raise

    def _prepared(self, sites: Sequence[Site], gradients: Mapping[Tensor, Tensor]) -> list[Site]:
        """Prepare parameters, as an unfused step does; those that are to be updated."""
        ready, waiting = [], self._reduced.waiting
        for site in sites:
            gradient = gradients[site.param]
            again = site.param in waiting
            if again and waiting[site.param] is None:
                continue
            if again:
                site = dataclasses.replace(site, continues=True)
            mark = self._marks.get(site.param)
            if mark is None or not mark.is_of(gradient):
                mark = self._marks[site.param] = Mark(gradient)
            mark.prepare(self._optimizer._prepare, site, gradient)
            if not mark.done:
                ready.append(dataclasses.replace(site, continues=True))
            elif self._deferred:
                waiting[site.param] = None
        return ready

    def _take_layer(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        """Take gradients of prepared parameters: of those of one kind together, as an unfused step
        does."""
        optimizer, reduced = self._optimizer, self._reduced
        alone, together = kept(optimizer._partition, sites, gradients)
        for i in pieces(alone):
            self._take(sites[i], gradients[i])
        for members in pieces(together):
            alike, own = [sites[i] for i in members], [gradients[i] for i in members]
            if not self._changes:
                optimizer._update_together(alike, own)
                continue
            reduced.keep_together(optimizer, alike, own)
            if not self._deferred:
                reduced.apply_together(optimizer, alike, own, None)

    def _alike(self, sites: Sequence[Site]) -> list[list[Site]]:
        """Parameters whose R has been kept: those that the same launches can update, and others
        each alone."""
        optimizer, groups = self._optimizer, list[list[Site]]()
        batched: list[tuple[Site, Tensor]] = []
        for site in sites:
            reduced, param = self._reduced.waiting[site.param], site.param
            alone = reduced is None or is_sharded(param) or optimizer._is_parted(site)
            if reduced is None or alone or not launches(param):
                groups.append([site])
            else:
                batched.append((site, reduced))
        members = [site for site, _ in batched]
        single, together = optimizer._partition(members, [reduced for _, reduced in batched])
        return groups + [[members[i] for i in own] for own in ([[i] for i in single] + together)]

    def _finish(self, sites: Sequence[Site], common: Tensor | None) -> None:
        """Update parameters of one kind whose R have been kept, with the factor of all R if there
        is one."""
        optimizer, reduced = self._optimizer, self._reduced
        if len(sites) > 1:
            reduced.apply_together(optimizer, sites, None, common)
            return
        scale = common if self._clip == "global" else kept(reduced.scale_of, sites)
        reduced.apply(optimizer, sites[0], None, scale)

    def _take(self, site: Site, gradient: Tensor) -> None:
        """Keep the R of a gradient, or update with it."""
        optimizer, reduced = self._optimizer, self._reduced
        once(reduced.keep, optimizer, site, gradient)
        if not self._deferred:
            scale = kept(reduced.scale_of, [site])
            reduced.apply(optimizer, site, gradient, scale)

    def _checked_arrivals(self, site: Site) -> int:
        """How often the parameter has been reached with this gradient, which must be allowed."""
        gradient, arrivals = site.param.grad, self._arrivals.get(site.param, 0) + 1
        if arrivals > self._accumulation_steps:
            raise RuntimeError(
                f"optimizer.step() must come after {self._accumulation_steps} backward passes at "
                f"most (accumulation_steps), got {arrivals} that reached parameter {site.name!r}; "
                f"call step(), or zero_grad() to drop what has arrived"
            )
        if gradient is not None and gradient.layout != torch.strided and self._changes:
            raise RuntimeError(
                f"gradients must be dense to be accumulated or clipped, got layout "
                f"{gradient.layout} for parameter {site.name!r}; use an embedding with sparse=False"
            )
        return arrivals


def _hook(fusion: FusedBackward) -> Callable[[Tensor], None]:
    """The function that autograd calls. It must not hold references: Python's garbage collector
    cannot see those of a parameter's hook, and the parameter would never be freed."""
    reference = weakref.ref(fusion)

    def receive(param: Tensor) -> None:
        alive = reference()
        if alive is None or alive._reference() is None:
            return
        alive._receive(param)
        alive._apply_at_the_end(apply)

    def apply() -> None:
        alive = reference()
        if alive is not None and alive._reference() is not None:
            alive._apply_gathered()

    return receive


def _stream_of(param: Tensor) -> Hashable:
    """The stream on which a parameter's gradient has been made."""
    return torch.cuda.current_stream(param.device) if param.is_cuda else param.device
