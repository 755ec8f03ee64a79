"""One training step, phase by phase, under a meter: on real tensors or on fake ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import zoopt
from zoopt.kernels.dispatch import is_fake
from zoopt.memory.meter import StorageMeter
from zoopt.memory.methods import Method
from zoopt.optimizer import DeclaredStateOptimizer
from zoopt.wrapper import wrapper_of
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer

Inputs = Mapping[str, Any]
#: How many evaluations of a zeroth-order step are run, since all take the same memory.
EVALUATIONS = 2
_FORWARD = {1: "forward +", 2: "forward -"}


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's loss: its `loss`, or else the mean of its (first) result."""
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output.float().mean()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_of(item)


def run_steps(
    model: nn.Module,
    inputs: Inputs,
    method: Method,
    meter: StorageMeter,
    *,
    steps: int = 2,
    forward: Callable[[nn.Module, Inputs], Any] = loss_of,
    mark: Callable[[str], None] | None = None,
) -> torch.optim.Optimizer | None:
    """Take `steps` steps of the method. The first makes the state; later ones start with it.

    Args:
        forward: makes the loss that a zeroth-order step evaluates.
        mark: called with the name of each phase as it begins.

    Returns:
        The optimizer, or None for inference.
    """

    def enter(phase: str) -> None:
        meter.enter_phase(phase)
        if mark is not None:
            mark(phase)

    enter("load")
    meter.track(tensors_of(inputs), "activations")
    model = method.prepare(model)
    meter.track([*model.parameters(), *model.buffers()], "parameters")
    model.train(method.kind == "backprop")
    if method.kind == "inference":
        enter("forward")
        with torch.no_grad():
            loss_of(model, inputs)
        return None
    optimizer = method.build(model)
    if is_fake(next(model.parameters())) and isinstance(optimizer, DeclaredStateOptimizer):
        allocate_state(optimizer, meter)
        # Copies of shards are held for all parameters at once.
        copied = isinstance(optimizer, ZerothOrderOptimizer) and optimizer.as_shards
        for param in {} if copied else repeated_shapes(optimizer):
            param.requires_grad_(False)
    elif method.wrapping is not None:
        enter("choose")
        method.wrapping.wrap(model, optimizer, lambda: loss_of(model, inputs))
    fusion: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if method.fused:
        fusion = zoopt.fuse_backward(model, optimizer)  # type: ignore[arg-type]
    with fusion:
        for _ in range(steps):
            if method.kind == "zeroth-order":
                _zeroth_order_step(
                    model, inputs, optimizer, enter, forward=forward, graph=method.graph
                )
            else:
                backprop(model, inputs, meter, enter)
                enter("update")
                optimizer.step()
                optimizer.zero_grad()
            meter.track(state_tensors(optimizer), "optimizer state")
    return optimizer


def state_tensors(optimizer: Any) -> list[Tensor]:
    """The tensors that an optimizer, and what wraps it, keep between steps."""
    state = getattr(optimizer, "state", {})  # The published MeZO and QES have none.
    found = [*tensors_of(list(state.values()))]
    wrapper = wrapper_of(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None
    own: Callable[[], Any] | None = getattr(wrapper, "state_dict", None)
    return found if own is None else [*found, *tensors_of(own())]


def repeated_shapes(
    optimizer: torch.optim.Optimizer, layer_of: Callable[[Tensor], str | None] = lambda _: None
) -> dict[Tensor, Tensor]:
    """All parameters but one of each shape and group, each with that one. Of those that have a
    layer, the first layer's are left.

    Updates of one shape take the same memory.
    """
    repeated = {}
    for group in optimizer.param_groups:
        first: dict[torch.Size, Tensor] = {}
        for param in group["params"]:
            own = first.setdefault(param.shape, param)
            layer = layer_of(param)
            if own is not param and (layer is None or layer != layer_of(own)):
                repeated[param] = own
    return repeated


def allocate_state(optimizer: DeclaredStateOptimizer, meter: StorageMeter) -> None:
    """Make all of the optimizer's state, as if it had stepped before."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                optimizer.allocate_state(param, group)
    meter.track(state_tensors(optimizer), "optimizer state")


def _zeroth_order_step(
    model: nn.Module,
    inputs: Inputs,
    optimizer: torch.optim.Optimizer,
    enter: Callable[[str], None],
    *,
    forward: Callable[[nn.Module, Inputs], Any],
    graph: bool,
) -> None:
    count = 0
    # A run's first evaluation is made twice, to check that the closure is deterministic.
    repeats = int(not getattr(optimizer, "param_groups", [{}])[0].get("step", 1))
    smallest = min(model.parameters(), key=lambda param: param.numel())

    def closure(*_: Any) -> Any:
        nonlocal count
        count += 1
        number = max(1, count - repeats)
        fake = is_fake(smallest)
        if fake and number > EVALUATIONS and not graph:
            smallest.sum()  # A virtual perturbation raises if nothing reads a parameter.
            return float(number)
        enter(_FORWARD.get(number, "forward, later ones"))
        loss = forward(model, inputs)
        if graph:
            return loss
        # Fake losses have no value. Any two different numbers will do; equal ones mean no update.
        value = float(number) if fake else float(loss)
        del loss
        enter("perturb")
        return value

    enter("perturb")
    optimizer.step(closure)
    enter("update")


def backprop(
    model: nn.Module, inputs: Inputs, meter: StorageMeter, enter: Callable[[str], None]
) -> None:
    """Compute the loss and its gradients under the meter."""

    def gradient_made(param: Tensor) -> None:
        if param.grad is not None:
            meter.track([param.grad], "gradients")

    hooks = [
        param.register_post_accumulate_grad_hook(gradient_made)  # type: ignore[no-untyped-call]
        for param in model.parameters()
        if param.requires_grad
    ]
    try:
        enter("forward")
        loss = loss_of(model, inputs)
        enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
