"""Parameters that train and rest in turn; the run's numbers are kept in the param groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from zoopt.ambient import opaque
from zoopt.checks import shown
from zoopt.distributed.checkpoint import (
    called_by_checkpoint,
    called_by_get,
    called_by_load,
    check_nothing_left_out,
)
from zoopt.groups import all_params
from zoopt.selection.blank import add_blank_state, make_blank_state
from zoopt.wrapper import Wrapper

#: Group key: the numbers of the parameters whose state in a checkpoint of
#: torch.distributed.checkpoint has no meaning, because they had none. They are a text, because
#: torch.distributed.checkpoint mistakes lists of another length for other entries.
BLANK = "blank_state"


def _text(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))


def _numbers(text: Any) -> Any:
    """The numbers of a text; anything else as it is."""
    words = text.split() if isinstance(text, str) else [""]
    return [int(word) for word in words] if all(map(str.isdecimal, words)) else text


class Rounds(Wrapper):
    """Chooses which parameters train, by the number of the optimizer's steps.

    The optimizer's param groups hold the run's numbers, so its state dict has them.

    torch.distributed.checkpoint saves and loads state of parameters that require a gradient. While
    it loads, all of them do. What it saves has state of all, and says which of it is blank.

    Args:
        optimizer: its steps are counted.
        run: the numbers at the start, by group key.

    Attributes:
        key: of the number of steps, in the groups.
    """

    key: ClassVar[str]
    chooses = True
    #: Whether all parameters require a gradient, because a checkpoint is being loaded.
    _loading = False
    #: Whether the optimizer has no state but what torch.distributed.checkpoint had it make.
    _initial = False

    def __init__(self, optimizer: Optimizer, run: dict[str, Any]) -> None:
        self._optimizer, self._run = optimizer, run
        self._write()
        self._follow()
        hooks = [
            optimizer.register_load_state_dict_pre_hook(lambda _, saved: self._before_load(saved)),
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._stepped()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._load()),
            optimizer.register_state_dict_post_hook(lambda _, made: self._complete(made)),
        ]
        for half in ("zeroth_order", "first_order"):  # a Hybrid's, whose hooks are not run by these
            if hasattr(optimizer, half):
                own: Optimizer = getattr(optimizer, half)
                hooks += [
                    own.register_state_dict_pre_hook(lambda *_: self._refuse_half()),
                    own.register_load_state_dict_pre_hook(lambda *_: self._refuse_half()),
                ]
        self._attach(optimizer, *hooks)

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
            for key in (*self._run, BLANK):
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

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """A context in which torch.distributed.checkpoint can load the optimizer's state.

        It is required where the optimizer has state already, and otherwise does no harm:

            with half.loading():
                set_optimizer_state_dict(model, optimizer, state_dict)
        """
        made = make_blank_state(self._optimizer, self._numbered())
        self._lift()
        try:
            yield
        finally:
            for param, state in made.items():
                if self._optimizer.state.get(param) is state:  # Nothing has been loaded.
                    del self._optimizer.state[param]
            self._follow()

    def _lift(self) -> None:
        """Let all parameters require a gradient until a checkpoint has been loaded."""
        self._loading = True
        for param, _ in self._choice():
            param.requires_grad_(True)

    def _numbered(self) -> list[nn.Parameter]:
        """All of the optimizer's parameters that may train, by number: those of the choice first.
        Numbers do not depend on the optimizer's order if the choice does not."""
        first = [param for param, _ in self._choice()]
        chosen = {id(param) for param in first}
        held = all_params(self._optimizer.param_groups)
        return first + [p for p in held if id(p) not in chosen and p.requires_grad]

    def _before_load(self, saved: dict[str, Any]) -> dict[str, Any] | None:
        """Check a state dict before it is loaded; return it without what is blank."""
        self._check_saved(saved)
        groups = saved.get("param_groups")
        if groups:
            lists = [key for key, own in self._run.items() if isinstance(own, list)]
            lists = [key for key in lists if key in groups[0]]
            texts = {key: _numbers(groups[0][key]) for key in lists}
            saved = {**saved, "param_groups": [{**group, **texts} for group in groups]}
        blank = _numbers(groups[0].get(BLANK, "")) if groups else None
        if blank:
            ids = [key for group in groups or () for key in group["params"]]
            held = all_params(self._optimizer.param_groups)
            keys = dict(zip(held, ids, strict=False))
            params = self._numbered()
            dropped = {keys.get(params[number]) for number in blank}
            state = {key: own for key, own in saved["state"].items() if key not in dropped}
            saved = {**saved, "state": state}
        remedy = f"load it inside `with {type(self).__name__}.loading():`"
        check_nothing_left_out(saved, but=dropped if blank else (), remedy=remedy)
        return saved

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
                given = {
                    key: _numbers(value) if isinstance(self._run[key], list) else value
                    for key, value in found.items()
                }
                self._check_run(given)
            blank, count = _numbers(group.get(BLANK, "")), len(self._numbered())
            if not isinstance(group.get(BLANK, ""), str) or any(
                number not in range(count) for number in blank
            ):
                raise ValueError(
                    f"{BLANK} must be a text of numbers of the {count} parameters that train, "
                    f"got {shown(blank)}"
                )

    @opaque
    def _before_step(self) -> None:
        self._initial = called_by_checkpoint() and not called_by_load()
        if called_by_checkpoint():
            if called_by_load():
                self._lift()
                for param, _ in self._choice():
                    if param.grad is None:
                        param.grad = torch.zeros_like(param)
        elif self._loading:  # it has failed
            self._follow()

    @opaque
    def _stepped(self) -> None:
        if not called_by_checkpoint():  # That call only creates the optimizer's state.
            self._count()

    def _complete(self, state_dict: dict[str, Any]) -> None:
        """Give torch.distributed.checkpoint state of all parameters."""
        if called_by_get():
            params = self._numbered()
            blank = add_blank_state(self._optimizer, params, state_dict)
            if self._initial:
                blank = list(range(len(params)))
                self._optimizer.state.clear()
                self._initial = False
            for group in state_dict["param_groups"]:
                group[BLANK] = _text(blank)
                for key, own in self._run.items():
                    if isinstance(own, list):
                        group[key] = _text(own)

    def _refuse_half(self) -> None:
        if called_by_get() or called_by_load():
            raise RuntimeError(
                f"a Hybrid under {type(self).__name__} must be saved and loaded whole, got one half"
                f" from torch.distributed.checkpoint, which skips parameters that rest; save its "
                f"state_dict() with torch.save"
            )

    def _write(self) -> None:
        for group in self._optimizer.param_groups:
            group.update({**self._run, BLANK: ""})

    def _load(self) -> None:
        """Continue where a loaded state dict was, or go on if it does not say."""
        saved: dict[str, Any] = self._optimizer.param_groups[0]
        if self._run.keys() <= saved.keys():
            self._run = {key: saved[key] for key in self._run}
        self._write()
        self._follow()

    def _follow(self) -> None:
        self._loading = False
        for param, trains in self._choice():
            param.requires_grad_(trains)
            if not trains:
                param.grad = None
