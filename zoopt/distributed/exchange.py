"""The exchange of closure results between the ranks of a job, in each step.

    data     each rank has its own micro-batch, and all evaluate at the same points:
             L = sum_r w_r L_r / sum_r w_r, one all-reduce
    probes   the evaluations of a step are divided over ranks that have the same micro-batch:
             one all-gather

Each rank also sends a digest of its position in the run. The same exchange therefore detects ranks
that are out of step, before its result is used. Afterwards every rank has bit for bit the same
numbers, and decisions depend on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.distributed as dist

from zoopt.checks import check_choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    #: The ranks that train together: a group, a mesh of one dimension, or a mesh of two dimensions
    #: named "data" and "probes".
    Job = ProcessGroup | DeviceMesh | None
else:
    Job = Any

#: What is divided over the ranks of a group.
Parallel = Literal["data", "probes"]

#: With this many bits the sum of squares is exact in float64 for up to 2^15 ranks.
_DIGEST_BITS = 19
#: Vectors are padded to a multiple of this length. Ranks with different numbers of evaluations
#: then still exchange vectors of equal length, and can report the error.
_PADDED = 16
#: For so many seconds a process looks for an exchange's end before it sleeps.
_AWAKE = 0.01
#: Lets another process have the core.
_yield = getattr(os, "sched_yield", lambda: None)


def digest_of(*values: Any) -> int:
    """A short hash of values that have the same `repr` in every process."""
    return zlib.crc32(repr(values).encode()) & ((1 << _DIGEST_BITS) - 1)


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What all ranks know after an exchange.

    Attributes:
        values: the values of all evaluations, in order.
        repeated: the repeated value at the first point, from each rank that divides evaluations.
        check: whether any rank wants the replicas compared.
        apart: whether ranks are at different positions of the run.
        failed: how many ranks' closures raised an error; and if it was one, the number of the rank.
        weightless: whether the weights of all ranks are 0.
    """

    values: list[float]
    repeated: list[float]
    check: bool
    apart: bool
    failed: tuple[int, int]
    weightless: bool


class Exchange:
    """The ranks that take steps together.

    Args:
        process_group: see `Job`; not None.
        parallel: what is divided over the ranks of a group or of a mesh of one dimension.

    Raises:
        TypeError, ValueError: process_group is not a `Job`, or this process is not in the group.

    Attributes:
        data, probes: this rank's groups; None if there is none.
        ranks: the numbers of all ranks of the job.
        same_points: those that evaluate at the same points as this one.
        rank: this process's number in the whole job.
        first: whether this is the first rank, which for example writes the record for all.
    """

    def __init__(self, process_group: Any, parallel: Parallel) -> None:
        check_choice("parallel", parallel, get_args(Parallel))
        groups = _groups(process_group, parallel)
        self.data: ProcessGroup | None = groups.get("data")
        self.probes: ProcessGroup | None = groups.get("probes")
        self.rank = dist.get_rank()
        self.first = not any(dist.get_rank(group) for group in groups.values())
        self.same_points = {self.rank}
        if self.data is not None:
            self.same_points = set(dist.get_process_group_ranks(self.data))
        self.ranks = self.same_points
        if self.probes is not None:
            members = dist.get_process_group_ranks(self.probes)
            mesh = process_group.mesh.flatten().tolist() if self.data is not None else members
            self.ranks = set(mesh)

    def share(self, count: int, rank: int | None = None) -> range:
        """Which of `count` evaluations this rank makes, or the given rank of the probes group."""
        if self.probes is None:
            return range(count)
        size = dist.get_world_size(self.probes)
        own = dist.get_rank(self.probes) if rank is None else rank
        return range(own * count // size, (own + 1) * count // size)

    def combine(
        self,
        values: Sequence[float],
        *,
        count: int,
        width: int = 1,
        weight: float = 1.0,
        digest: int = 0,
        failed: bool = False,
        check: bool = False,
        repeated: float | None = None,
    ) -> Agreed:
        """Combine the values of all ranks. Every rank of the job must call it.

        Args:
            values: those of this rank's share, `width` for each evaluation.
            count: the number of evaluations of all ranks.
            weight: the weight of this rank's values.
            digest: hash of this rank's position in the run.
            failed: whether this rank's closure raised an error; its values are then not used.
            check: whether this rank wants the replicas compared.
            repeated: this rank's repeated value at the first point.

        Raises:
            RuntimeError: a rank has ended, or does not answer within the group's timeout.
        """
        own = [0.0] * (len(self.share(count)) * width) if failed else list(values)
        again = [0.0 if repeated is None else repeated] if self.probes is not None else []
        apart, weightless, failures = False, False, (int(failed), self.rank * failed)
        if self.data is not None:
            weighted = [weight * value if weight else 0.0 for value in (*own, *again)]
            head = [weight, digest, digest**2, *failures, check]
            total, *sums = self._sum([*map(float, head), *weighted])
            ranks = dist.get_world_size(self.data)
            apart = (sums[0], sums[1]) != (ranks * digest, ranks * digest**2)
            failures, check = (int(sums[2]), int(sums[3])), sums[4] > 0
            weightless = not total
            means = [value / total if total else 0.0 for value in sums[5 : 5 + len(weighted)]]
            own, again = means[: len(own)], means[len(own) :]
        if self.probes is None:
            return Agreed(own, [], check, apart, failures, weightless)
        head = [digest, *failures, check, apart, weightless]
        rows = self._gather([*map(float, head), *again, *own])
        parts = [row[7 : 7 + len(self.share(count, rank)) * width] for rank, row in enumerate(rows)]
        failing = [row for row in rows if row[1]]
        return Agreed(
            values=[value for part in parts for value in part],
            repeated=[row[6] for row in rows],
            check=any(row[3] for row in rows),
            apart=any(row[4] or row[0] != digest for row in rows),
            failed=(int(sum(row[1] for row in failing)), int(sum(row[2] for row in failing))),
            weightless=any(row[5] for row in rows),
        )

    def gather(self, value: Any) -> list[Any]:
        """Gather a value from all ranks of the job; the order is the same in all of them."""
        values = [value]
        for group in (self.data, self.probes):
            if group is not None:
                parts: list[Any] = [None] * dist.get_world_size(group)
                with self._explained():
                    dist.all_gather_object(parts, values, group=group)
                values = [each for part in parts for each in part]
        return values

    def _sum(self, values: list[float]) -> list[float]:
        vector = self._vector(values, self.data)
        with self._explained():
            finish(dist.all_reduce(vector, group=self.data, async_op=True))
        summed: list[float] = vector.tolist()
        return summed

    def _gather(self, values: list[float]) -> list[list[float]]:
        vector = self._vector(values, self.probes)
        rows = [torch.empty_like(vector) for _ in range(dist.get_world_size(self.probes))]
        with self._explained():
            finish(dist.all_gather(rows, vector, group=self.probes, async_op=True))
        return [row.tolist() for row in rows]

    def _vector(self, values: list[float], group: Any) -> torch.Tensor:
        length = -(-len(values) // _PADDED) * _PADDED
        padded = [*values, *[0.0] * (length - len(values))]
        return torch.tensor(padded, dtype=torch.float64, device=_device(group))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say of an error in a collective operation what it means."""
        try:
            yield
        except Exception as error:
            raise RuntimeError(
                f"rank {self.rank} could not exchange numbers with the other ranks of its step: "
                f"one has ended, or has done something else until the group's timeout; see what "
                f"that rank says, and start the job again from a checkpoint or a record"
            ) from error


def finish(work: Any) -> None:
    """Wait for a collective operation: look for its end for a while, and sleep only then.

    A message of a few bytes takes a fraction of a millisecond, but waking a process that sleeps may
    take until the next tick of the system's clock, up to 4 ms.
    """
    until = time.monotonic() + _AWAKE
    while not work.is_completed() and time.monotonic() < until:
        _yield()
    work.wait()


def _device(group: Any) -> torch.device:
    """The device on which the group's backend needs its operands."""
    backend = str(dist.get_backend(group))
    if "gloo" in backend or "mpi" in backend:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _groups(process_group: Any, parallel: Parallel) -> dict[str, ProcessGroup]:
    """This rank's groups, by what is divided over their ranks."""
    # Do not import the module: that is slow, and a caller with a mesh has already imported it.
    meshes = sys.modules.get("torch.distributed.device_mesh")
    if meshes is not None and isinstance(process_group, meshes.DeviceMesh):
        names = process_group.mesh_dim_names
        if process_group.ndim == 1:
            return {parallel: process_group.get_group()}
        if process_group.ndim != 2 or names is None or set(names) != set(get_args(Parallel)):
            raise ValueError(
                f"a mesh must have one dimension, or two that are named 'data' and 'probes', got "
                f"{process_group.ndim} named {names}; pass mesh_dim_names=('data', 'probes') to "
                f"init_device_mesh"
            )
        return {name: process_group.get_group(name) for name in names}
    if dist.is_available() and process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"process_group must be one that this process is in, got one without rank "
            f"{dist.get_rank()}; make the optimizer in the group's processes only"
        )
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a process group or a DeviceMesh, got "
            f"{type(process_group).__name__}; pass torch.distributed.group.WORLD once the group "
            f"has been initialised"
        )
    return {parallel: process_group}
