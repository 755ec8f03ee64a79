"""Half fine-tuning: half of each layer's parameters train in each round, with any optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoopt.checks import check_nonnegative_int, check_positive_int
from zoopt.distributed.seed import SharedSeed
from zoopt.kernels.noise.key import check_unsigned
from zoopt.kernels.noise.philox import words
from zoopt.nn.modules import repeated_layers
from zoopt.noise import stream
from zoopt.selection.rounds import Rounds

_STREAM = stream("zoopt half fine-tuning")
Category = Literal["attention", "mlp", "norm"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """The parameters of one module, which train or rest together.

    Attributes:
        layer: the number of the repeated layer that contains the module.
        category: the part of the layer to which it belongs; half of each part trains.
        params: its own parameters, for example weight and bias.
    """

    layer: int
    category: Category
    params: tuple[nn.Parameter, ...]


def units(model: nn.Module) -> list[Unit]:
    """The modules of the repeated layers that have trained parameters of their own, in order.

    Modules that hold only vectors are norms. Others belong to attention if their name inside the
    layer contains "attn" or "attention", and to the MLP otherwise. Parameters that several modules
    share are in no unit.
    """
    layers = repeated_layers(model)
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param] = owners.get(param, 0) + 1
    found = []
    for number, layer in enumerate(layers.values()):
        for name, module in layer.named_modules():
            own = tuple(
                param
                for param in module.parameters(recurse=False)
                if param.requires_grad and owners[param] == 1
            )
            if own:
                found.append(Unit(number, _category(name, own), own))
    return found


def trained_units(units: Sequence[Unit], *, seed: int, draw: int) -> list[bool]:
    """Draw which units train in round `draw`: a random half of each layer and category.

    If the number k of units is odd, (k + 1) / 2 train in half of the layers and (k - 1) / 2 in the
    others.
    """
    number = torch.arange(len(units) * 2, device="cpu")
    keys = words(number, seed=seed, stream=_STREAM, draw=draw)[:, 0].tolist()
    members: dict[tuple[Category, int], list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault((unit.category, unit.layer), []).append(index)
    trained = [False] * len(units)
    for category in ("attention", "mlp", "norm"):
        sets = [indices for (kind, _), indices in members.items() if kind == category]
        odd = sorted(
            (indices for indices in sets if len(indices) % 2),
            key=lambda indices: keys[len(units) + indices[0]],
        )
        larger = {indices[0] for indices in odd[: (len(odd) + 1) // 2]}
        for indices in sets:
            count = len(indices) // 2 + (indices[0] in larger)
            for index in sorted(indices, key=lambda index: keys[index])[:count]:
                trained[index] = True
    return trained


class HalfFineTuning(Rounds):
    r"""Half fine-tuning (Hui et al., 2024, arXiv:2404.18466), over any optimizer.

    A round has `round_steps` steps. In each round a random half of each repeated layer trains:

        attention: 2 of q, k, v, o (1 of a fused qkv and o)
        MLP: 2 of up, down and gate in half of the layers, 1 in the others (1 if there are two)
        norms: half of them

    Parameters outside the layers (embeddings, head, last norm) always train. Resting parameters
    have requires_grad=False and no gradient, and keep their optimizer state. A bias trains together
    with its weight.

    It hooks the optimizer's `step`, so it works with torch's optimizers, zoopt's first-order and
    zeroth-order ones, `Hybrid`, schedulers and the Trainer. Seed, round length and the number of
    steps taken are in the optimizer's param groups (`hft_seed`, `hft_round_steps`, `hft_step`),
    and so in its state dict: a resumed run continues exactly. It keeps no tensors.

    Args:
        model: with its repeated layers in an nn.ModuleList. Frozen parameters stay frozen.
        optimizer: an existing one, over the model's parameters.
        round_steps: steps of a round, for example of an epoch. In the paper a round is a task.
        seed: seed of the draws; default torch.initial_seed(), rank 0's in all processes.

    Raises:
        TypeError, ValueError: an argument is out of range; the model has no repeated layers; the
            optimizer is already under half fine-tuning or another wrapper, is OwLore, or keeps a
            window of past directions (MeZO's `momentum_window`, ZOAdam's `state="window"`), which
            would move parameters that rested.

    `remove()`, or leaving the `with` block, lets all parameters train again.
    DistributedDataParallel needs find_unused_parameters=True.

    Differs from the paper: half of each layer's norms train, and the last norm always does.

    Example:
        >>> opt = torch.optim.AdamW(model.parameters(), lr=2e-5)
        >>> half = zoopt.HalfFineTuning(model, opt, round_steps=len(loader))
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    label, key = "half fine-tuning", "hft_step"

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, round_steps: int, seed: int | None = None
    ) -> None:
        check_positive_int("round_steps", round_steps)
        seed = SharedSeed(seed, type(self).__name__).value
        self._check(optimizer)
        self._units = units(model)
        run = {"hft_seed": seed, "hft_round_steps": round_steps, "hft_step": 0}
        super().__init__(optimizer, run)

    @classmethod
    def _check(cls, optimizer: Any) -> None:
        super()._check(optimizer)
        for window in _windows(optimizer):
            raise ValueError(
                f"optimizer must not keep a window of past directions, which would move "
                f"parameters that rested then, got {window}; store the momentum, or leave it out"
            )

    @property
    def round(self) -> int:
        """The number of the current round, from 0."""
        return int(self._run["hft_step"] // self._run["hft_round_steps"])

    def _check_run(self, run: dict[str, Any]) -> None:
        check_unsigned("hft_seed", run["hft_seed"], 64)
        check_positive_int("hft_round_steps", run["hft_round_steps"])
        check_nonnegative_int("hft_step", run["hft_step"], 1 << 53)

    def _count(self) -> None:
        before = self.round
        self._run["hft_step"] += 1
        self._write()
        if self.round != before:
            self._follow()

    def _choice(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """The round's units train, and the others rest."""
        trained = trained_units(
            self._units, seed=self._run["hft_seed"], draw=self.round & 0xFFFFFFFF
        )
        for unit, trains in zip(self._units, trained, strict=True):
            for param in unit.params:
                yield param, trains


def _category(name: str, params: Sequence[Tensor]) -> Category:
    if all(param.dim() < 2 for param in params):
        return "norm"
    return "attention" if any(part in name.lower() for part in ("attn", "attention")) else "mlp"


def _windows(optimizer: Optimizer) -> Iterator[str]:
    """The hyperparameters that make a group keep a window of past directions."""
    for group in optimizer.param_groups:
        if group.get("momentum_window") is not None:
            yield f"momentum_window={group['momentum_window']}"
        if group.get("state") == "window":
            yield "state='window'"
