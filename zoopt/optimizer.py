"""The base of every optimizer: state that is declared in one place and loads byte for byte."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from zoopt.ambient import opaque
from zoopt.distributed.seed import SharedSeed
from zoopt.distributed.sharding import is_sharded, sharded_as, sharded_zeros
from zoopt.kernels.noise.philox import NOISE_VERSION

#: What torch.optim.Optimizer accepts as `params`.
Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Group = dict[str, Any]
P = ParamSpec("P")
R = TypeVar("R")
#: State that Python reads in a step, which must not wait for the device: it lies on the CPU.
PYTHON_NUMBERS = ("step", "agreements", "doublings")


def hyperparameters(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A param group's defaults: the arguments of an `__init__` (its `locals()`) but for these."""
    others = ("self", "params", "seed", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """The shape and dtype of one state tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


#: How many steps a parameter has taken; a float32 number would stop at 2^24.
STEP = TensorSpec((), torch.int64)


def _counted(value: Any) -> Any:
    """A count of steps as it is kept; release 0.1.0 and torch have float32 or plain numbers."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(value, Tensor) and not value.is_floating_point():
        return value
    if isinstance(number, int | float) and number >= 0 and number == number // 1:
        return torch.tensor(int(number))
    return value


def state_device(name: str, param: Tensor) -> torch.device:
    """Where a state tensor of the parameter lies: with it, but for the numbers Python reads."""
    return torch.device("cpu") if name in PYTHON_NUMBERS else param.device


class DeclaredStateOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose per-parameter state follows from `declared_state` alone.

    Allocation, exact loading, the prediction of memory and the tests read that declaration. Where
    torch.optim.Optimizer.load_state_dict casts state tensors to the parameter's dtype, this class
    keeps their bits, and checks a checkpoint before it changes anything.
    """

    _incoming: dict[Tensor, dict[str, Any]] | None = None
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
        """Raise if another process goes on with another seed."""
        seed: int = self.param_groups[0]["seed"]
        if self._shared_seed is None:  # a copy, or unpickled
            self._share_seed(seed)
        else:
            self._shared_seed.check(seed)

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
                device = state_device(name, param)
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
        self, name: str, value: Tensor, spec: TensorSpec, param: Tensor, group: Group
    ) -> Tensor:
        """A copy of a saved state tensor where the parameter needs it."""
        if is_sharded(param) and self._follows_rows(name, spec, param, group):
            value = sharded_as(value, param)
        return value.to(state_device(name, param), copy=True)

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
        """As torch's, with the parameters' shapes in each group: a load checks them."""
        state_dict = super().state_dict()
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            saved["shapes"] = [list(param.shape) for param in group["params"]]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of the same class over parameters of the same shapes, bit for bit.

        Raises:
            ValueError: the dict belongs to another optimizer, or to parameters of other shapes.
                Nothing has changed then.
        """
        state_dict = state_dict.copy()
        hooks = self._optimizer_load_state_dict_pre_hooks
        for hook in hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        state_dict = self._adopted(state_dict)
        self._check_groups(state_dict)
        self._incoming = self._exact_state(state_dict)
        # The hooks have run; torch gets no state to cast, and hands over in __setstate__.
        self._optimizer_load_state_dict_pre_hooks = collections.OrderedDict()
        groups = [
            {key: value for key, value in group.items() if key != "shapes"}
            for group in state_dict["param_groups"]
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
            state = {**state, "state": collections.defaultdict(dict, self._incoming)}
        super().__setstate__(state)
        # torch adds a default of its own here, which no param group of ours has.
        self.defaults.pop("differentiable", None)

    def _check_groups(self, state_dict: Mapping[str, Any]) -> None:
        """Raise unless the param groups are those of this class over as many parameters."""
        name = type(self).__name__
        if not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"state_dict must have the keys 'state' and 'param_groups', got "
                f"{sorted(state_dict)}; pass what {name}.state_dict() returned"
            )
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise ValueError(
                f"state_dict must have as many parameters a group as the optimizer, "
                f"{[len(group['params']) for group in self.param_groups]}, "
                f"got {[len(group['params']) for group in saved]}; "
                f"build {name} from the parameters it was saved with"
            )
        for group, own in zip(saved, self.param_groups, strict=True):
            shapes = [list(param.shape) for param in own["params"]]
            if group.get("shapes", shapes) != shapes:
                raise ValueError(
                    f"state_dict must be of parameters of the same shapes, {shapes}, got "
                    f"{group['shapes']}; build {name} from the parameters it was saved with"
                )
            missing = sorted(self.defaults.keys() - group.keys())
            if missing:
                raise ValueError(
                    f"state_dict must be one of {name}, but its groups have no "
                    f"{', '.join(map(repr, missing))}; load it into the class that saved it"
                )
            version = group["noise_version"]
            if version != NOISE_VERSION:
                raise ValueError(
                    f"noise_version must be {NOISE_VERSION}, got {version!r}: the run was recorded "
                    f"with another noise and cannot go on with this one; install the version of "
                    f"zoopt that wrote it"
                )

    def _exact_state(self, state_dict: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Copies of the saved state on the parameters' devices, checked against the declaration."""
        exact: dict[Tensor, dict[str, Any]] = {}
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, index in zip(group["params"], saved["params"], strict=True):
                declared = self.declared_state(param, saved)
                entries = {
                    name: _counted(value) if declared.get(name) == STEP else value
                    for name, value in state_dict["state"].get(index, {}).items()
                }
                for name, value in entries.items():
                    self._check_entry(name, value, declared, index)
                if entries:
                    exact[param] = {
                        name: self._placed(name, value, declared[name], param, saved)
                        for name, value in entries.items()
                    }
        return exact

    def _check_entry(
        self, name: str, value: Any, declared: Mapping[str, TensorSpec], index: Any
    ) -> None:
        if name not in declared:
            raise ValueError(
                f"state of parameter {index} must have the entries {sorted(declared)} for "
                f"{type(self).__name__}, got {name!r}; load it into the class that saved it"
            )
        spec = declared[name]
        if (
            not isinstance(value, Tensor)
            or tuple(value.shape) != spec.shape
            or value.dtype != spec.dtype
        ):
            got = (
                f"{value.dtype} {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ValueError(
                f"state {name!r} of parameter {index} must be a {spec.dtype} tensor of shape "
                f"{spec.shape}, got {got}; load the checkpoint over parameters of the same shapes"
            )
