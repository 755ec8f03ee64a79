"""Updates during the backward pass: each gradient is freed as soon as it has been applied."""

from __future__ import annotations

from typing import get_args

from torch import nn

from zoopt.checks import check_choice, check_number, check_positive_int
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.fusion import Clip, FusedBackward
from zoopt.wrapper import wrapper_of


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

    Memory: one whole gradient at a time. On a GPU, where a layer's parameters are updated together,
    the gradients of one layer: of a member of an `nn.ModuleList`, else of a module; 256 MiB and one
    gradient at most. With `accumulation_steps` above 1, or with clipping "global", also all R_p:
    r max(m, n) elements of a projected matrix instead of m n, beside those gradients. For AdamW
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
