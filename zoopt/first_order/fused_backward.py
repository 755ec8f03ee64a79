"""Updates during the backward pass: each gradient is freed as soon as it has been applied."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.hooks import RemovableHandle

from zoopt.ambient import OwnArithmetic, opaque
from zoopt.checks import check_choice, check_number, check_positive_int
from zoopt.distributed.sharding import is_sharded, local, whole
from zoopt.dtypes import accumulator_dtype
from zoopt.first_order.base import FirstOrderOptimizer, Site, operand
from zoopt.first_order.clipping import check_unclipped
from zoopt.first_order.fused_checks import (
    check_model,
    check_not_replicated,
    check_sites,
    check_unscaled,
)
from zoopt.interrupts import uninterrupted
from zoopt.kernels.journal import Journal, kept, once
from zoopt.removable import Removable
from zoopt.wrapper import wrapper_of

Clip = Literal["global", "parameter"]


def fuse_backward(
    model: nn.Module,
    optimizer: FirstOrderOptimizer,
    *,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    clip: Clip = "global",
) -> FusedBackward:
    r"""Let `loss.backward()` update each parameter and free its gradient as soon as it is complete.

    Nothing else changes: the loop still calls `optimizer.step()` and `zero_grad()`, schedulers set
    the groups' lr (its value at the time of the update counts), and a `state_dict()` can be loaded
    with and without fusion. With the defaults the weights equal the unfused run's, bit for bit.

    With R_p the part of parameter p's gradient G_p that its update needs (the projected
    gradient for `GaLoreAdamW`; R_p = G_p for parameters that are not projected, as in `AdamW`),

        accumulation_steps=1:   theta_p <- update(theta_p, R_p)           in backward
        accumulation_steps=k:   R_p <- R_p + R_p(micro-batch)             in backward
                                theta_p <- update(theta_p, R_p)           in step()
        clip="parameter":       R_p <- min(1, max_grad_norm / ||R_p||) R_p
        clip="global":          R_p <- min(1, max_grad_norm / ||R||) R_p, with ||R||^2 the sum of
                                all ||R_p||^2; the updates are in step()

    Memory: one whole gradient at a time. With `accumulation_steps` above 1, or with clipping
    "global", also all R_p: r max(m, n) elements of a projected matrix instead of m n. For AdamW
    these are the gradients themselves, so nothing is saved.

    Args:
        model: has all of the optimizer's parameters. Gradients of its other parameters are not
            touched.
        optimizer: one of zoopt's first-order optimizers.
        accumulation_steps: how many backward passes come before each `optimizer.step()`, at most;
            default 1. They add up, as gradients do. In a step that makes new bases, these are
            computed from the gradients of the first pass.
        max_grad_norm: the largest norm of R; default None, no clipping.
        clip: whether all parameters are clipped as one vector or each by itself; default
            "global", as in torch.nn.utils.clip_grad_norm_. Do not call that function yourself: it
            finds no gradients here, so it returns 0 and clips nothing, without an error.

    Returns:
        A handle: `remove()` undoes it, and so does leaving its `with` block.

    Raises:
        TypeError: the optimizer is not one of zoopt's first-order optimizers.
        ValueError: it is fused already, is under a wrapper that needs whole steps (`GreenTrainer`,
            `LoRAGGPO`, `CoFiTune`), holds parameters that are not the model's, or needs whole
            gradients (APOLLO, Fira) where only R is kept, or projects sharded parameters there;
            the model is wrapped in DDP or FSDP1, whose gradients are not complete when a
            parameter's backward is.
        RuntimeError: later. In `backward`, if gradients arrive more often than
            `accumulation_steps` allows. In `step`, if a GradScaler is used, since gradients have
            been applied with its scale, or if a Trainer wants to clip gradients and max_grad_norm
            is None. In `zero_grad`, if the gradients that it should drop have been applied.

    `optimizer.zero_grad()` drops gradients that have been accumulated; so does loading a
    state_dict, which does not contain them. An update cannot be undone: freeze parameters that a
    backward pass must not train (a discriminator in its generator's step) by
    `requires_grad_(False)`, and reject a batch by its loss, before `backward`. A closure that is
    given to `step` runs as usual. The handle lives as long as the optimizer; after that, gradients
    stay in `.grad` again.

    Under `fully_shard` gradients arrive summed over the processes, and each process updates its
    shards; R_p of a sharded parameter is its whole gradient.

    Under reentrant activation checkpointing, a tied weight is reached several times in a pass, and
    each counts as a backward pass: pass `use_reentrant=False`.

    Example:
        >>> opt = zoopt.GaLoreAdamW(model.named_parameters(), lr=1e-2, rank=128)
        >>> with zoopt.fuse_backward(model, opt):
        ...     for batch in loader:
        ...         model(**batch).loss.backward()
        ...         opt.step()
    """
    if not isinstance(optimizer, FirstOrderOptimizer):
        raise TypeError(
            f"optimizer must be a first-order optimizer of zoopt, got {type(optimizer).__name__}; "
            f"for one of torch's, register its own post-accumulate-grad hooks"
        )
    check_positive_int("accumulation_steps", accumulation_steps)
    if max_grad_norm is not None:
        check_number("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
    check_choice("clip", clip, get_args(Clip))
    if optimizer._fusion is not None:
        raise ValueError(
            "optimizer must not be fused yet, got one that is; call remove() on its handle first"
        )
    wrapper = wrapper_of(optimizer)
    if wrapper is not None and wrapper.unfused is not None:
        raise ValueError(
            f"optimizer must not be under {wrapper.label}, got one that is: {wrapper.unfused}; "
            f"call remove() on it first"
        )
    return FusedBackward(model, optimizer, accumulation_steps, max_grad_norm, clip)


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
        #: Between two steps: each parameter's place, how often it was reached, and its R, which is
        #: None if it is not to be updated.
        self._sites: dict[Tensor, Site] = {}
        self._arrivals: dict[Tensor, int] = {}
        self._kept: dict[Tensor, Tensor | None] = {}
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
        self._kept.clear()
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
        self._attach()
        for site in self._places().values():
            if site.param.grad is not None:
                self._receive(site.param)
        # In the order of parameters, not of arrival, so that norms are always rounded alike.
        waiting = [site for param, site in self._sites.items() if param in self._kept]
        with OwnArithmetic(), uninterrupted():
            if self._clip == "global" and not self._scale:
                # Of all of them, also where an error ends this step.
                self._scale = (self._journal.run(self._clip_scale, waiting),)
            for site in waiting:
                scale = self._scale[0] if self._scale else None
                optimizer._complete([site], self._finish, site, scale)
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

    def _places(self) -> dict[Tensor, Site]:
        """Each parameter's site, looked up once a step, since groups can be added and reloaded."""
        if not self._sites:
            self._optimizer._check_seed()
            self._optimizer._check_state()
            self._sites = {site.param: site for site in self._optimizer._sites()}
        return self._sites

    @opaque
    def _receive(self, param: Tensor) -> None:
        """Take a complete gradient: update with it or keep its R, and free it."""
        optimizer = self._optimizer
        optimizer._finish()
        site = self._places()[param]
        optimizer._check_gradient(site)
        arrivals = self._checked_arrivals(site)
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

    def _finish(self, site: Site, common: Tensor | None) -> None:
        """Update a parameter whose R has been kept, with the factor of all of them if there is
        one."""
        scale = common if self._clip == "global" else kept(self._clip_scale, [site])
        self._update(site, None, scale)

    def _take(self, site: Site, gradient: Tensor) -> None:
        """Keep the R of a gradient, or update with it."""
        once(self._keep, site, gradient)
        if not self._deferred:
            scale = kept(self._clip_scale, [site])
            self._update(site, gradient, scale)

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

    def _keep(self, site: Site, gradient: Tensor) -> None:
        """Add a micro-batch's R to the earlier ones; None, which means no update, stays None."""
        again = site.param in self._kept
        before = self._kept.get(site.param)
        parted = self._optimizer._is_parted(site)
        if again and before is None and not parted:
            return
        site = dataclasses.replace(site, continues=again)
        if is_sharded(site.param):
            # As FSDP adds them up: in their own dtype.
            if before is None:
                once(self._kept.__setitem__, site.param, gradient)
            else:
                once(before.add_, gradient)
            return
        reduced = self._optimizer._reduce_parts(site, gradient, before)
        if reduced is not None and reduced is not gradient and self._changes:
            reduced = reduced.to(accumulator_dtype(reduced.dtype))
        if before is None or (reduced is None and not parted):
            once(self._kept.__setitem__, site.param, reduced)
        elif reduced is not None:
            once(before.add_, reduced)

    def _clip_scale(self, sites: Iterable[Site]) -> Tensor | None:
        """min(1, max_grad_norm / ||R||), R of all these parameters, as in torch's clipping."""
        every = [r for site in sites if (r := self._kept[site.param]) is not None]
        if self._max_grad_norm is None or not every:
            return None
        norm = get_total_norm(every)
        scale: Tensor = self._max_grad_norm / ((whole(norm) if is_sharded(norm) else norm) + 1e-6)
        return scale.clamp(max=1.0)

    def _update(self, site: Site, gradient: Tensor | None, scale: Tensor | None) -> None:
        """Update the parameter from its R, and from its gradient if that is still there."""
        optimizer, reduced = self._optimizer, once(self._kept.pop, site.param)
        if reduced is None:
            return
        if scale is not None:
            once(local(reduced).mul_, scale.to(reduced.device))
            apart = gradient is not None and gradient is not reduced
            if gradient is not None and apart and optimizer._needs_gradient(site):
                once(gradient.mul_, scale.to(gradient.device))
        if is_sharded(site.param):
            optimizer._step_shard(site, reduced)
        else:
            optimizer._apply_parts(site, reduced, gradient)


def _hook(fusion: FusedBackward) -> Callable[[Tensor], None]:
    """The function that autograd calls. It must not hold references: Python's garbage collector
    cannot see those of a parameter's hook, and the parameter would never be freed."""
    reference = weakref.ref(fusion)

    def receive(param: Tensor) -> None:
        alive = reference()
        if alive is not None and alive._reference() is not None:
            alive._receive(param)

    return receive
