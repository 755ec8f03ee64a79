"""Wrappers of optimizers, as the planner and the meter run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

import zoopt
from zoopt.groups import all_params
from zoopt.nn.modules import repeated_layers
from zoopt.selection.green_trainer import gain, undone
from zoopt.wrapper import Wrapper


class Wrapping:
    """A wrapper around the optimizer of a method.

    On real tensors it is made by `wrap`. The planner has no values, and calls the other methods.

    Attributes:
        rotates: whether all parameters train in turn, so that all have state in the end.
    """

    rotates = False

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Wrapper:
        """Wrap the optimizer; `loss` returns the loss of a batch."""
        raise NotImplementedError

    def simulate(self, model: nn.Module, optimizer: Optimizer) -> Wrapper | None:
        """Wrap an optimizer of parameters without values; None if steps are the optimizer's."""
        return self.wrap(model, optimizer, lambda: sum_of(model))

    def undo(self, wrapper: Any) -> None:
        """Remove the wrapper that `simulate` has made."""
        if wrapper is not None:
            wrapper.remove()

    def kept(self, model: nn.Module) -> list[Tensor]:
        """Make what exists, besides weights and state, during the passes with the highest peak."""
        return []

    def step(self, optimizer: Optimizer, wrapper: Any) -> None:
        """Take a step, in which the wrapper has what it has after the passes."""
        optimizer.step()


def sum_of(model: nn.Module) -> Tensor:
    """A loss with gradients to all of the model's trained parameters."""
    return torch.stack([param.sum() for param in model.parameters() if param.requires_grad]).sum()


class Half(Wrapping):
    """Half fine-tuning: the gradients of the first round's half, and in the end all state."""

    rotates = True

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Wrapper:
        """In rounds of one step."""
        return zoopt.HalfFineTuning(model, optimizer, round_steps=1, seed=0)

    def simulate(self, model: nn.Module, optimizer: Optimizer) -> Wrapper:
        """In the first round."""
        with _disable_current_modes():  # The draw of the half has values.
            return zoopt.HalfFineTuning(model, optimizer, round_steps=2, seed=0)

    def undo(self, wrapper: Any) -> None:
        """All parameters train again."""
        with _disable_current_modes():
            wrapper.remove()


class Green(Wrapping):
    """GreenTrainer: its peak is in a choice after a step, which probes all parameters."""

    rotates = True

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Wrapper:
        """With a choice after each step, in the largest budget."""
        return zoopt.GreenTrainer(model, optimizer, loss, budget=1.0, select_every=1)

    def simulate(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Nothing is chosen without values: all parameters have gradients."""

    def kept(self, model: nn.Module) -> list[Tensor]:
        """The last step's gradients, which a choice gives back."""
        return [torch.empty_like(param) for param in model.parameters() if param.requires_grad]

    def step(self, optimizer: Optimizer, wrapper: Any) -> None:
        """The choice's step."""
        params = all_params(optimizer.param_groups)
        with undone(optimizer, params) as weights:
            optimizer.step()
            for param, old in zip(params, weights, strict=True):
                gain(param.grad, param, old)


class CoFi(Wrapping):
    """CoFiTune of the layers that are not attention's: their copies, and their neurons' numbers."""

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Wrapper:
        """Of the MLPs of all repeated layers."""
        inside = tuple(f"{name}." for name in repeated_layers(model))

        def target(name: str, module: nn.Module) -> bool:
            return name.startswith(inside) and "att" not in name.lower()

        return zoopt.CoFiTune(model, optimizer, [loss], target=target, seed=0)


class GGPO(Wrapping):
    """LoRA-GGPO: a copy of the trained matrices from the forward pass to the step."""

    def wrap(self, model: nn.Module, optimizer: Optimizer, loss: Callable[[], Tensor]) -> Wrapper:
        """With its default noise."""
        return zoopt.LoRAGGPO(model, optimizer, seed=0)

    def step(self, optimizer: Optimizer, wrapper: Any) -> None:
        """From perturbed weights."""
        wrapper.perturb()
        optimizer.step()


HALF, GREEN, COFI, GGPO_NOISE = Half(), Green(), CoFi(), GGPO()
