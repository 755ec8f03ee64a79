"""Parameters that train and rest in turn; the run's numbers are kept in the param groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from zoopt.distributed.checkpoint import called_by_checkpoint
from zoopt.wrapper import Wrapper


class Rounds(Wrapper):
    """Chooses which parameters train, by the number of the optimizer's steps.

    The optimizer's param groups hold the run's numbers, so its state dict has them.

    Args:
        optimizer: its steps are counted.
        run: the numbers at the start, by group key.

    Attributes:
        key: of the number of steps, in the groups.
    """

    key: ClassVar[str]

    def __init__(self, optimizer: Optimizer, run: dict[str, Any]) -> None:
        self._optimizer, self._run = optimizer, run
        self._write()
        self._follow()
        self._attach(
            optimizer,
            optimizer.register_load_state_dict_pre_hook(lambda _, saved: self._check_saved(saved)),
            optimizer.register_step_post_hook(lambda *_: self._stepped()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._load()),
        )

    @classmethod
    def _label_of(cls, optimizer: Optimizer) -> str | None:
        if any(cls.key in group for group in optimizer.param_groups):
            return cls.label
        return super()._label_of(optimizer)

    def remove(self) -> None:
        """Undo it: all parameters train again, and the optimizer's groups are as before."""
        self._detach()
        for param, _ in self._choice():
            param.requires_grad_(True)
        for group in self._optimizer.param_groups:
            for key in self._run:
                group.pop(key, None)

    def _choice(self) -> Iterable[tuple[nn.Parameter, bool]]:
        """Each parameter that trains or rests, and whether it trains now."""
        raise NotImplementedError

    def _count(self) -> None:
        """Count a step; the next step may begin with another choice."""
        raise NotImplementedError

    def _check_run(self, run: dict[str, Any]) -> None:
        """Raise unless the numbers are of such a run."""
        raise NotImplementedError

    def _check_saved(self, saved: dict[str, Any]) -> None:
        """Raise if the run's numbers in a state dict are damaged, before it is loaded."""
        saved = saved.get("zeroth_order", saved)  # a Hybrid's first groups
        for group in saved.get("param_groups", ())[:1]:
            found = {key: group[key] for key in self._run if key in group}
            missing = self._run.keys() - found.keys()
            if found and missing:
                raise ValueError(
                    f"state_dict must have all of {', '.join(map(repr, self._run))} in its groups, "
                    f"got one without {', '.join(map(repr, sorted(missing)))}"
                )
            if found:
                self._check_run(found)

    def _stepped(self) -> None:
        if not called_by_checkpoint():  # That call only creates the optimizer's state.
            self._count()

    def _write(self) -> None:
        for group in self._optimizer.param_groups:
            group.update(self._run)

    def _load(self) -> None:
        """Continue where a loaded state dict was, or go on if it does not say."""
        saved: dict[str, Any] = self._optimizer.param_groups[0]
        if self._run.keys() <= saved.keys():
            self._run = {key: saved[key] for key in self._run}
        self._write()
        self._follow()

    def _follow(self) -> None:
        for param, trains in self._choice():
            param.requires_grad_(trains)
            if not trains:
                param.grad = None
