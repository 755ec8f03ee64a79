"""The groups of a zeroth-order run: which parameters take part, their directions and state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from torch import Tensor

from zoopt.ambient import OwnArithmetic
from zoopt.checks import (
    check_bool,
    check_choice,
    check_nonnegative_int,
    check_number,
    check_positive_int,
)
from zoopt.distributed.sharding import (
    check_placement,
    in_runs,
    inner_dimension,
    is_sharded,
    local,
    offset,
    runs,
)
from zoopt.dtypes import NARROW, RoundingMode, resolved_rounding
from zoopt.kernels.noise.key import Distribution, NoiseKey
from zoopt.lasting import Facts, facts_of
from zoopt.noise import NOISE_VERSION, stream
from zoopt.optimizer import DeclaredStateOptimizer, Group, Params
from zoopt.parameters import check_param, named_params
from zoopt.zeroth_order.engine.blocks import block_due, block_of, check_blocks
from zoopt.zeroth_order.engine.direction import Direction
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.perturbation import PerturbationMode
from zoopt.zeroth_order.engine.probe import Estimator
from zoopt.zeroth_order.engine.sites import Site, Sites


@dataclasses.dataclass(frozen=True)
class ProbeNames:
    """The names of a class's group keys for its probes.

    Attributes:
        scale: how far from theta the loss is evaluated.
        count: in how many directions.
        run: keys that are the same in every group, besides `count` and those of every class.
        value: what the closure returns, to the user.
    """

    scale: str = "zo_eps"
    count: str = "num_probes"
    run: tuple[str, ...] = ()
    value: str = "loss"

    @property
    def shared(self) -> tuple[str, ...]:
        """The keys that describe the run, and so are the same in every group."""
        everyone = ("seed", "step", "draw", "noise_version", "estimator", "blocks", "block_order")
        return (*everyone, self.count, *self.run)


#: Group keys on which sites do not depend, many of which change at each step.
_APART = (
    *("params", "param_names", "step", "draw", "lr", "window"),
    *("past", "updates", "exp_avg_sq"),
)
#: A limit on directions a step: more are a mistake, which would use up the memory.
_MOST_DIRECTIONS = 1 << 20


class ZerothOrderGroups(DeclaredStateOptimizer):
    """Parameters, their directions and their state, and the checks of a group."""

    _names = ProbeNames()
    #: Whether whole parameters move as shards do, from copies: a plan of shards has them.
    as_shards = False

    def __init__(self, params: Params, defaults: dict[str, Any], *, seed: int | None) -> None:
        run = {"seed": self._share_seed(seed), "step": 0, "draw": 0, "noise_version": NOISE_VERSION}
        super().__init__(params, {**defaults, **run})

    @property
    def _wholes(self) -> dict[Tensor, Tensor]:
        """The parts of sharded parameters that lie here, and whose they are."""
        parts: dict[Tensor, Tensor] = self.__dict__.setdefault("_parts", {})
        return parts

    @property
    def _runs(self) -> dict[Tensor, tuple[int, bool]]:
        """Of the parts that are one of several runs of what lies here, the numbers of the runs, and
        whether they are the last."""
        numbers: dict[Tensor, tuple[int, bool]] = self.__dict__.setdefault("_run_numbers", {})
        return numbers

    @property
    def _shared_keys(self) -> tuple[str, ...]:
        return self._names.shared

    def _draws(self) -> tuple[int, ...]:
        """The numbers of this step's directions."""
        run = self.param_groups[0]
        return tuple(range(run["draw"], run["draw"] + run[self._names.count]))

    @property
    def _known_sites(self) -> dict[int | None, tuple[Facts, Sites]]:
        """By block, the sites of the last step, and the facts that they were made from."""
        known: dict[int | None, tuple[Facts, Sites]] = self.__dict__.setdefault("_sites_known", {})
        return known

    def _facts(self) -> Facts | None:
        """What sites with lasting directions depend on, to be compared; None if nobody can tell."""
        return facts_of(self.param_groups, self.state, _APART, tensors=False)

    def _survey(self, known: Sites | None) -> None:
        """Read the values of other parameters on which directions depend; where nothing else has
        changed, those of `known` follow."""

    def _sites(self, block: int | None = None) -> Iterator[Site]:
        """The parameters of this step (of one block, or of all), with their directions."""
        run = self.param_groups[0]
        blocks = run.get("blocks")
        self._wholes.clear()
        self._runs.clear()
        for group_index, group, param, name in named_params(self.param_groups):
            if not param.requires_grad:
                continue
            if block is not None and block_of(blocks, group_index, name) != block:
                continue
            number, sharded = stream(name), is_sharded(param)
            self._ready_state(param, group, number)
            parts = self._parts_of(param) if sharded else [(param, 0)]
            if not param.numel():
                continue
            virtual, copied = self._virtual(param, group), False
            if sharded or self.as_shards:
                # Its operators read what is gathered from the shards.
                virtual, copied = False, virtual
            scale = float(group[self._names.scale])
            rounding = resolved_rounding(group["rounding"], param.dtype)
            for part, first in parts:
                direction = self._direction(part, group, number, virtual=virtual)
                if direction is not None:
                    if sharded:
                        direction.of_part(first, part.numel())
                    yield Site(part, group, direction, virtual, rounding, scale, copied)

    def _parts_of(self, param: Tensor) -> list[tuple[Tensor, int]]:
        """What lies here of a sharded parameter: runs of it, and their places in the whole."""
        part = local(param)
        if not inner_dimension(param) or not part.numel():
            self._wholes[part] = param
            return [(part, offset(param))]
        parts = in_runs(part, param)
        last = len(parts) - 1
        self._runs.update({run: (i, i == last) for i, run in enumerate(parts)})
        self._wholes.update(dict.fromkeys(parts, param))
        return list(zip(parts, runs(param), strict=True))

    def _whole(self, param: Tensor) -> Tensor:
        """The parameter that this is a part of, or is."""
        return self._wholes.get(param, param)

    def _state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """As in `DeclaredStateOptimizer`; of a part, the parts of the whole parameter's."""
        whole = self._wholes.get(param)
        if whole is None:
            return super()._state(param, group)
        state = {name: local(value) for name, value in super()._state(whole, group).items()}
        if param not in self._runs:
            return state
        number, last = self._runs[param]
        # A count goes up with the last run.
        counts = {n: v if last else v.clone() for n, v in state.items() if not v.dim()}
        # Of one run: `in_runs` would make views of all of them.
        return counts | {
            n: v.view(-1, param.numel())[number] for n, v in state.items() if n not in counts
        }

    #: Whether a part of a parameter can be stepped by itself, by its place in the whole.
    _can_shard = True

    def _steps_runs(self, group: Group) -> bool:
        """Whether any elements that follow one another can be stepped by themselves, with their
        state: not only whole rows of a parameter."""
        return False

    @OwnArithmetic()
    def _ready_all(self) -> list[Tensor]:
        """Make the state of all parameters (some have none); return those that had not been
        made."""
        new = []
        for _, group, param, name in named_params(self.param_groups):
            if param.requires_grad and param not in self.state:
                self._ready_state(param, group, stream(name))
                new.append(param)
        for param in new if self.state else ():
            self.state[param] = self.state.get(param, {})
        return new

    def _ready_state(self, param: Tensor, group: Group, number: int) -> None:
        """Make the missing state of a parameter, before the evaluations, so that a lack of memory
        shows before anything has changed."""
        declared = self.declared_state(param, group)
        missing = declared.keys() - self.state.get(param, {}).keys() if declared else ()
        if not missing:
            return
        try:
            self._state(param, group)
            if param.numel():
                self._initialise(param, group, number)
        except BaseException:
            for name in missing:
                self.state[param].pop(name, None)
            raise

    def _initialise(self, param: Tensor, group: Group, number: int) -> None:
        """Set the first values of new state that are not zeros; `number` is the stream."""

    def _virtual(self, param: Tensor, group: Group) -> bool:
        """Whether the parameter is perturbed virtually."""
        mode: PerturbationMode = group["perturbation"]
        return param.dtype in NARROW if mode == "auto" else mode == "virtual"

    def _direction(
        self, param: Tensor, group: Group, number: int, *, virtual: bool
    ) -> Direction | None:
        """The parameter's direction, or None if it does not take part.

        Args:
            param, group: the parameter and its group.
            number: its stream.
            virtual: whether it is perturbed virtually.
        """
        return Noise(NoiseKey(group["seed"], number, distribution=group["distribution"]))

    def _block_due(self) -> int | None:
        """The block of this step, or None for all parameters."""
        run = self.param_groups[0]
        blocks = run.get("blocks")
        if blocks is None:
            return None
        count = len(self.param_groups) if blocks == "groups" else len(blocks)
        return block_due(count, run["block_order"], run["seed"], run["step"])

    def _check_values(self) -> None:
        """Raise if a parameter has no values here, or has been sharded as no step can be taken."""
        for _, group, param, name in named_params(self.param_groups):
            if is_sharded(param):
                self._check_shard(group, param, name)
            if param.is_meta:
                raise RuntimeError(
                    f"parameter {name!r} must hold values, got one on the meta device, which can "
                    f"be perturbed neither in place nor virtually; load the model whole before the "
                    f"optimizer is made, in bfloat16 say, without accelerate's cpu_offload or "
                    f"disk_offload"
                )

    def _check_group(self, group: Group) -> None:
        """Raise unless the group's hyperparameters and parameters are valid."""
        super()._check_group(group)
        check_nonnegative_int("step", group["step"], 1 << 53)
        check_nonnegative_int("draw", group["draw"], 1 << 32)
        self._check_options(group)
        names = group.get("param_names", range(len(group["params"])))
        for param, name in zip(group["params"], names, strict=True):
            check_param(local(param))
            if is_sharded(param):
                self._check_shard(group, param, name)

    def _check_shard(self, group: Group, param: Tensor, name: str | int) -> None:
        """Raise unless the group's method can step a sharded parameter."""
        if not self._can_shard:
            raise ValueError(
                f"{type(self).__name__} must have whole parameters, got {name!r}, which is "
                f"sharded; use another class, MeZO say, or keep the parameter out of fully_shard"
            )
        check_placement(param, name)
        if inner_dimension(param) and not self._steps_runs(group):
            raise ValueError(
                f"{type(self).__name__} must have parameters sharded along dimension 0 with these "
                f"hyperparameters, got dimension {inner_dimension(param)} for {name!r}; use MeZO "
                f"with mask None or 'random', or another class whose directions have independent "
                f"elements"
            )

    def _check_options(self, group: Group) -> None:
        """Raise unless the group's hyperparameters are valid."""
        check_number("lr", group["lr"], low=0.0)
        check_number(self._names.scale, group[self._names.scale], low=0.0, open_low=True)
        check_number("weight_decay", group["weight_decay"], low=0.0)
        check_positive_int(self._names.count, group[self._names.count])
        if group[self._names.count] > _MOST_DIRECTIONS:
            raise ValueError(
                f"{self._names.count} must be at most 2^20, got {group[self._names.count]}: a step "
                f"evaluates the loss for each"
            )
        if group.get("max_projected_grad") is not None:
            check_number("max_projected_grad", group["max_projected_grad"], low=0.0, open_low=True)
        if "estimator" in group:
            check_choice("estimator", group["estimator"], get_args(Estimator))
        if "blocks" in group:
            check_blocks(group["blocks"], group["block_order"])
        check_bool("maximize", group["maximize"])
        if "distribution" in group:
            check_choice("distribution", group["distribution"], get_args(Distribution))
        check_choice("perturbation", group["perturbation"], get_args(PerturbationMode))
        check_choice("rounding", group["rounding"], get_args(RoundingMode))

    def _check_run(self, groups: list[Group]) -> None:
        super()._check_run(groups)
        for group_index, group, _, name in named_params(groups):
            block_of(group.get("blocks"), group_index, name)
