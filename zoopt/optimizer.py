"""The base of every optimizer: state that is declared in one place and loads byte for byte."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor

from zoopt.ambient import opaque
from zoopt.checkpoint import (
    MOST_STEPS,
    STEP,
    TensorSpec,
    check_entries,
    check_form,
    counter,
    saved_entries,
    saved_groups,
)
from zoopt.checks import shown
from zoopt.distributed.checkpoint import check_nothing_left_out
from zoopt.distributed.seed import SharedSeed
from zoopt.distributed.sharding import is_sharded, sharded_as, sharded_zeros
from zoopt.groups import Group, Params, check_keys, check_ordered, check_saved_keys, listed, plain
from zoopt.kernels.noise.key import check_unsigned
from zoopt.kernels.noise.philox import NOISE_VERSION
from zoopt.parameters import check_streams

__all__ = [
    "MOST_STEPS",
    "STEP",
    "DeclaredStateOptimizer",
    "Group",
    "Params",
    "TensorSpec",
    "hyperparameters",
    "state_device",
]
P = ParamSpec("P")
R = TypeVar("R")


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's defaults: the arguments of an `__init__` (its `locals()`) except these."""
    others = ("self", "params", "seed", "process_group", "parallel", "record", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


def state_device(spec: TensorSpec, param: Tensor) -> torch.device:
    """The device of a state tensor: the parameter's, or the CPU for counts that Python reads."""
    return param.device if spec.most is None else torch.device("cpu")


class DeclaredStateOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose per-parameter state follows from `declared_state` alone.

    Allocation, exact loading, the prediction of memory and the tests read that declaration. Where
    torch.optim.Optimizer.load_state_dict casts state tensors to the parameter's dtype, this class
    keeps their bits, and checks a checkpoint before it changes anything.
    """

    #: Keys that a group may have, and that mean the same as a default where it has not.
    _optional_keys: ClassVar[tuple[str, ...]] = ()
    _incoming: dict[Any, Any] | None = None
    _shared_seed: SharedSeed | None = None

    @staticmethod
    def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
        """What torch makes of a class's `step`: the hooks around it, and nothing to compile."""
        return opaque(torch.optim.Optimizer.profile_hook_step(func))

    def _share_seed(self, seed: int | None) -> int:
        """The run's seed, the same in all processes; None is rank 0's `torch.initial_seed()`."""
        self._shared_seed = SharedSeed(seed, type(self).__name__)
        return self._shared_seed.value

    def _check_seed(self) -> None:
        """Raise if another process continues with another seed."""
        seed: int = self.param_groups[0]["seed"]
        if self._shared_seed is None:  # a copy, or unpickled
            self._share_seed(seed)
        else:
            self._shared_seed.check(seed, self.param_groups[0].get("step"))

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        check_ordered(params)
        super().__init__(params, {key: plain(value) for key, value in defaults.items()})

    @property
    def _shared_keys(self) -> tuple[str, ...]:
        """Group keys that describe the run, hence are the same in every group."""
        return ("seed", "noise_version")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as in torch; it joins the run under its seed.

        Raises:
            TypeError, ValueError: a key that the optimizer does not know, a hyperparameter out of
                range, parameters in no order, twice, or of a kind that has no update, or two with
                the same noise. Nothing has changed then.
        """
        params, names = listed(param_group)
        check_keys(type(self).__name__, param_group, [*self.defaults, *self._optional_keys])
        first = self.param_groups[0] if self.param_groups else {}
        run = {key: first[key] for key in self._shared_keys if key in first}
        group = {**run, **{key: plain(v) for key, v in param_group.items() if key != "params"}}
        group = {**group, "params": params}
        if names is not None:
            group["param_names"] = names
        super().add_param_group(group)
        try:
            self._adopt(group)
            self._check_group(group)
            self._check_run(self.param_groups)
            check_streams(self.param_groups)
        except BaseException:
            self.param_groups.pop()
            raise

    def _adopt(self, group: Group) -> None:
        """Give a new group the form that it is kept in."""

    def _check_group(self, group: Group) -> None:
        """Raise unless the group, new or saved, is one that can be worked with."""
        check_unsigned("seed", group["seed"], 64)
        version = group["noise_version"]
        if type(version) is not int or version != NOISE_VERSION:
            raise ValueError(
                f"noise_version must be {NOISE_VERSION}, got {shown(version)}: the run was "
                f"recorded with another noise and cannot go on with this one; install the version "
                f"of zoopt that wrote it"
            )

    def _check_run(self, groups: list[Group]) -> None:
        """Raise unless the groups agree on what describes the run."""
        for key in self._shared_keys:
            values = [group.get(key) for group in groups]
            if any(value != values[0] for value in values):
                raise ValueError(f"{key} must be the same in every param group, got {values}")

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """The state tensors that `param` has, once stepped, under the group's hyperparameters."""
        raise NotImplementedError

    def declared_state_bytes(self) -> int:
        """Bytes of state once every parameter that requires a gradient has been stepped."""
        return sum(
            spec.nbytes
            for group in self.param_groups
            for param in group["params"]
            if param.requires_grad
            for spec in self.declared_state(param, group).values()
        )

    def allocate_state(self, param: Tensor, group: Group) -> None:
        """Make the parameter's state, as its first step would."""
        self._state(param, group)

    def _state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """The parameter's state, allocated as zeros if it is not there yet."""
        state: dict[str, Any] = self.state[param]
        for name, spec in self.declared_state(param, group).items():
            if name not in state:
                device = state_device(spec, param)
                # Of a number, fake tensors keep the value: `step` counts under them too.
                if is_sharded(param) and self._follows_rows(name, spec, param, group):
                    state[name] = sharded_zeros(spec.shape, spec.dtype, param)
                    continue
                state[name] = (
                    torch.zeros(spec.shape, dtype=spec.dtype, device=device)
                    if spec.shape
                    else torch.tensor(0.0, dtype=spec.dtype, device=device)
                )
        return state

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        """Whether the state of a sharded parameter is sharded as its rows are, or else whole."""
        return name != "step" and spec.shape == tuple(param.shape)

    def _placed(
        self, name: str, value: Any, spec: TensorSpec, param: Tensor, group: Group
    ) -> Tensor:
        """A copy of a saved state tensor where the parameter needs it, its values in a row."""
        if spec.most is not None and not spec.shape:
            return counter(value, spec.dtype)
        if is_sharded(param) and self._follows_rows(name, spec, param, group):
            return sharded_as(value, param).to(state_device(spec, param), copy=True)
        placed: Tensor = value.detach().to(state_device(spec, param))
        return placed.clone(memory_format=torch.contiguous_format)

    def _check_state(self) -> None:
        """Raise if a parameter no longer has the shape or dtype that its state was made for."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state.get(param, {})
                for name, spec in self.declared_state(param, group).items() if state else ():
                    value = state.get(name)
                    if value is not None and (tuple(value.shape), value.dtype) != (
                        spec.shape,
                        spec.dtype,
                    ):
                        raise RuntimeError(
                            f"state {name!r} of a parameter of shape {tuple(param.shape)} must be "
                            f"a {spec.dtype} tensor of shape {spec.shape}, got {value.dtype} "
                            f"{tuple(value.shape)}: the parameter has changed since; drop its "
                            f"state by optimizer.state.pop(param), or build a new optimizer"
                        )

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the parameters' shapes in each group, which a load checks."""
        # Hooks see the whole of it, and may return a structure of their own.
        hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = collections.OrderedDict()
        try:
            state_dict = super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = hooks
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved |= {key: plain(value) for key, value in saved.items() if key != "params"}
            saved["shapes"] = [list(param.shape) for param in group["params"]]
        for hook in hooks.values():
            state_dict = _unless_none(hook(self, state_dict), state_dict)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of the same class over parameters of the same shapes, bit for bit.

        Noise follows from the names that parameters were saved with, or from their positions where
        they had none, so that the run continues as it would have.

        Raises:
            TypeError, ValueError: the dict belongs to another optimizer, or to parameters of other
                shapes; it is not complete; or it holds what the constructor would refuse. Nothing
                has changed then.
        """
        check_nothing_left_out(state_dict)
        state_dict = state_dict.copy()
        hooks = self._optimizer_load_state_dict_pre_hooks
        for hook in hooks.values():
            state_dict = _unless_none(hook(self, state_dict), state_dict)
        check_form(state_dict, type(self).__name__)
        state_dict = self._adopted(state_dict)
        groups, self._incoming = self._checked(state_dict)
        # The hooks have run; torch gets no state to cast, and hands over in __setstate__.
        self._optimizer_load_state_dict_pre_hooks = collections.OrderedDict()
        groups = [
            {"param_names": None, **group, "params": saved["params"]}
            for group, saved in zip(groups, state_dict["param_groups"], strict=True)
        ]
        try:
            super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks
            self._incoming = None

    def _adopted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state_dict, or what stands for it where it is of another optimizer that is known."""
        return state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        if self._incoming is not None:
            for group in state["param_groups"]:
                if group["param_names"] is None:
                    del group["param_names"]
            state = {**state, "state": collections.defaultdict(dict, self._incoming)}
        super().__setstate__(state)
        # torch adds a default of its own here, which no param group of ours has.
        self.defaults.pop("differentiable", None)

    def _checked(self, state_dict: Any) -> tuple[list[Group], dict[Any, Any]]:
        """The groups and the state that a state_dict stands for; raises as `load_state_dict`."""
        name = type(self).__name__
        groups = saved_groups(state_dict, self.param_groups, name)
        for group, own in zip(groups, self.param_groups, strict=True):
            missing = sorted(self.defaults.keys() - group.keys())
            if missing:
                raise ValueError(
                    f"state_dict must be one of {name}, but its groups have no "
                    f"{', '.join(map(repr, missing))}; load it into the class that saved it"
                )
            known = [*self.defaults, *self._optional_keys]
            check_saved_keys(name, group.keys() - own.keys(), known)
            self._check_group(group)
        self._check_run(groups)
        check_streams(groups)
        return groups, self._exact_state(state_dict, groups)

    def _exact_state(self, state_dict: Mapping[str, Any], groups: list[Group]) -> dict[Any, Any]:
        """Copies of the saved state on the parameters' devices, checked against the declaration."""
        saved, name = state_dict["state"], type(self).__name__
        exact: dict[Any, Any] = {}
        known = set()
        for group, given in zip(groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], given["params"], strict=True):
                known.add(index)
                entries = saved_entries(saved.get(index, {}))
                declared = self.declared_state(param, group)
                check_entries(entries, declared, index, param, name)
                if entries:
                    exact[param] = {
                        key: self._placed(key, value, declared[key], param, group)
                        for key, value in entries.items()
                    }
        for key, value in saved.items():
            if isinstance(key, int) and key not in known:
                raise ValueError(
                    f"state must be of the optimizer's {len(known)} parameters, got some of number "
                    f"{key}; build {name} from the parameters it was saved with"
                )
            if key not in known:
                exact[key] = copy.deepcopy(value)  # not a parameter's: whoever put it there knows
        return exact


def _unless_none(result: Any, otherwise: Any) -> Any:
    return otherwise if result is None else result
