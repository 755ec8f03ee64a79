"""One seed for all processes that train together.

Replicas with different noise seeds drift apart while their losses look normal. The processes of a
group therefore compare seeds through the group's store: each process publishes its own and reads
those that others have published. An optimizer that exists in one process only never waits.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from zoopt.kernels.noise.key import check_unsigned

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)
_alone = contextvars.ContextVar("_alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Do not compare seeds of optimizers that are made and stepped inside this context."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def default_seed() -> int:
    """torch's initial seed, as 64 bits. torch's generator is not changed."""
    return torch.initial_seed() & 0xFFFFFFFFFFFFFFFF


def several_ranks() -> bool:
    """Whether this process is in a job of several, and not inside `alone`."""
    return _store() is not None


class SharedSeed:
    """The seed of one optimizer, or of one set of layers, in all processes of the default group.

    Args:
        seed: 64 bits; None is rank 0's `torch.initial_seed()`.
        owner: the purpose of the seed. Each process numbers the seeds of an owner in the order of
            their creation. Seeds with equal numbers must be equal.

    Attributes:
        value: the seed.

    Raises:
        ValueError: not an int in [0, 2^64), or another process has a different seed for the same
            number.
        RuntimeError: seed is None, and rank 0 has not published one before the group's timeout.
    """

    def __init__(self, seed: int | None, owner: str) -> None:
        if seed is not None:
            check_unsigned("seed", seed, 64)
        self._owner = owner
        self._agreed = self._compared = False
        #: The changes of the seed here: before which step, and to what.
        self._changes: list[tuple[int, int]] = []
        #: The number of the last step that began here, its seed and its place in its run.
        self._number = -1
        self._last: tuple[int, int | None] | None = None
        #: Changes that others had made before this process's first step.
        self._theirs: dict[int, list[tuple[int, int]]] = {}
        self.value = default_seed() if seed is None else seed
        self._begin(follow=seed is None)

    def check(self, seed: int, place: int | None = None) -> None:
        """Raise unless all processes begin this step with the same seed.

        This costs nothing while the seed is the agreed one. If it is a new one, for example from a
        checkpoint, every process that made the optimizer must have it, and the processes wait for
        each other here. The first call also reads, without waiting, how others have changed the
        seed before this process made its optimizer: at the same steps it must change here.

        Args:
            place: the number of the step in its run. With an equal seed and place a step is the
                last one, repeated after an error.

        Raises:
            RuntimeError: another process has another seed, or publishes none before the group's
                timeout.
        """
        if place is None or (seed, place) != self._last:
            self._number, self._last = self._number + 1, (seed, place)
        if not self._agreed:
            self.value = seed
            self._begin(follow=False)
        elif seed != self.value:
            self._change(seed)
        if not self._compared:
            self._listen()
        for rank, changes in self._theirs.items():
            due = [new for step, new in changes[len(self._changes) :] if step <= self._number]
            if due:
                self._require(seed, due[-1], rank)

    def _begin(self, *, follow: bool) -> None:
        """Publish the seed, or take rank 0's."""
        store = _store()
        if store is None:
            return
        self._key = f"zoopt/seed/{self._owner}/{next(_numbers[self._owner])}"
        store.set(f"{self._key}/made/{dist.get_rank()}", "1")
        if follow and dist.get_rank() != 0:
            self.value = int(_read(store, f"{self._key}/first", self._owner, rank=0))
        else:
            first = int(store.compare_set(f"{self._key}/first", "", str(self.value)))
            if first != self.value:
                raise ValueError(
                    f"seed must be the same in all processes, or their replicas drift apart, got "
                    f"{self.value} for {self._owner} in rank {dist.get_rank()} and {first} in "
                    f"another; pass one seed to all, or none: rank 0's is then taken"
                )
        self._agreed = True

    def _change(self, seed: int) -> None:
        """Compare the new seed between all processes that have made this `SharedSeed`."""
        store = _store()
        if store is None:
            self.value = seed
            return
        if (self._number, seed) not in self._changes[-1:]:  # or it is tried again
            self._changes.append((self._number, seed))
        key = f"{self._key}/{len(self._changes) - 1}"
        store.set(f"{key}/{dist.get_rank()}", str(seed))
        store.set(f"{self._key}/changes/{dist.get_rank()}", json.dumps(self._changes))
        for rank in range(dist.get_world_size()):
            if store.check([f"{self._key}/made/{rank}"]):
                self._require(seed, int(_read(store, f"{key}/{rank}", self._owner, rank)), rank)
        self.value = seed

    def _listen(self) -> None:
        """Read how other processes have changed the seed until now. Of later changes this process
        is told while they wait for it."""
        store = _store()
        if store is None:
            return
        for rank in range(dist.get_world_size()):
            key = f"{self._key}/changes/{rank}"
            if rank != dist.get_rank() and store.check([key]):
                self._theirs[rank] = json.loads(_read(store, key, self._owner, rank))
        self._compared = True

    def _require(self, seed: int, other: int, rank: int) -> None:
        if other != seed:
            raise RuntimeError(
                f"seed must be the same in all processes, or their replicas drift apart, "
                f"got {seed} for {self._owner} in rank {dist.get_rank()} and {other} in "
                f"rank {rank}; load the same checkpoint in all of them"
            )


def _store() -> Store | None:
    """The default group's store; None if this process is alone."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return None
    if dist.get_world_size() < 2:
        return None
    if dist.get_backend() == "fake":
        return None
    store: Store = dist.distributed_c10d._get_default_store()
    return store


def _read(store: Store, key: str, owner: str, rank: int) -> bytes:
    try:
        value: bytes = store.get(key)
    except Exception as error:
        raise RuntimeError(
            f"rank {dist.get_rank()} needs to know the seed of {owner} in rank {rank}, which has "
            f"not said it; make the optimizer, and load its checkpoint, in every process, or pass "
            f"the seed"
        ) from error
    return value
