"""Evaluations that are divided over the ranks of a job.

Each rank evaluates its part, and all ranks receive all losses, as if one process had evaluated
them. Skipping, clipping, accepting and the update are therefore the same in all ranks, and a record
of these losses is a record of the run.

When parameters are perturbed in place, every rank makes every move. This includes moves to points
that another rank evaluates, and moves after an error. The reason is rounding: each move rounds, and
the weights must round equally in all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from zoopt.distributed.exchange import Agreed, Exchange
from zoopt.distributed.sharding import regathered
from zoopt.warn import warn
from zoopt.zeroth_order.engine.closure import Closure, Loss, loss_values
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.probe import Evaluation, agree
from zoopt.zeroth_order.engine.sites import Displacement


class SharedEvaluation(Evaluation):
    """An `Evaluation` of which this rank makes its part.

    Args:
        closure, perturbation, params, verify: as for `Evaluation`.
        exchange: the ranks that evaluate together.
        weight: the weight of this rank's losses, if ranks have their own micro-batches.
        digest: hash of this rank's position in the run.
        check: whether the replicas must be compared now.
        sharded: whether parameters are sharded; modules then gather them when they need them.
        compare: compares the replicas in all ranks, and raises if they differ.
        heard: called with the combined losses, for a record; None: not recorded.
    """

    def __init__(
        self,
        closure: Closure,
        perturbation: Perturbation,
        params: Iterable[Tensor],
        *,
        verify: bool,
        exchange: Exchange,
        weight: float,
        digest: int,
        check: bool,
        sharded: bool,
        compare: Callable[[], None],
        heard: Callable[[Sequence[float]], None] | None,
    ) -> None:
        super().__init__(closure, perturbation, params, verify=verify)
        self._exchange, self._weight, self._digest = exchange, weight, digest
        self._check, self._compare_replicas, self._heard = check, compare, heard
        self._sharded = sharded
        self._gathering = regathered if sharded else contextlib.nullcontext

    def each(
        self, count: int, width: int, evaluate: Callable[[int], Sequence[Loss]]
    ) -> list[list[float]]:
        """As in `Evaluation`."""
        found: list[Loss] = []
        error: Exception | None = None
        try:
            for number in self._exchange.share(count):
                found += evaluate(number)
            values = loss_values(found)
        except Exception as raised:
            values, error = [], raised
        agreed = self._agree(values, count=count, width=width, error=error)
        return [agreed[i : i + width] for i in range(0, len(agreed), width)]

    def losses_at(self, displacements: Sequence[Displacement]) -> list[float]:
        """As in `Evaluation`."""
        count = len(displacements)
        share = self._exchange.share(count)
        verify, self.verify = self.verify, False
        divided = self._exchange.probes is not None
        found: list[Loss] = []
        again: list[Loss] = []
        error: Exception | None = None
        for number, displacement in enumerate(displacements):
            own = number in share
            # A rank without a share evaluates too, so that generators advance equally everywhere.
            extra = number == 0 and (verify or not share)
            times = 0 if error is not None else int(own) + int(extra)
            try:
                losses = self._visit(displacement, times)
            except Exception as raised:
                if error is not None:
                    raise  # A move itself has failed.
                error, losses = raised, []
            if losses:
                found += losses[:own]
                again += losses[own:]
        values, repeated = [], None
        if error is None:
            try:
                numbers = loss_values([*found, *again])
                values, extras = numbers[: len(found)], numbers[len(found) :]
                repeated = extras[0] if extras else None
            except Exception as raised:  # A GPU may report an error only now.
                error = raised
        if verify and not divided and repeated is not None:
            self._compare(values[0], repeated)
        agreed = self._agree(
            values, count=count, error=error, repeated=repeated if divided and verify else None
        )
        if self._heard is not None:
            # A single process evaluates the first point twice, so the record has it twice.
            self._heard([*agreed[:1], *agreed] if verify else agreed)
        return agreed

    def _visit(self, displacement: Displacement, times: int) -> list[Loss]:
        """Move to a point, and evaluate the closure there `times` times."""
        self.perturbation.evaluated = times > 0
        with self.perturbation.at(displacement), self._gathering():
            losses = [self.rng.evaluate(self.closure) for _ in range(times)]
            if times:
                self._refuse_gradients()
        return losses

    def _agree(
        self,
        values: Sequence[float],
        *,
        count: int,
        width: int = 1,
        error: Exception | None,
        repeated: float | None = None,
    ) -> list[float]:
        """Return the values of all ranks, or raise an error in all of them.

        With sharded parameters an error is raised in this rank alone: others may be waiting for it
        in a forward pass, and would take an exchange for a part of that pass. They raise when this
        process ends, or after the group's timeout.
        """
        if error is not None and self._sharded:
            raise error
        agreed = self._exchange.combine(
            values,
            count=count,
            width=width,
            weight=self._weight,
            digest=self._digest,
            failed=error is not None,
            check=self._check,
            repeated=repeated,
        )
        self._check = False
        if error is not None:
            raise error
        if (agreed.apart or agreed.check) and not agreed.failed[0]:
            self.perturbation.put_back()  # Ranks may have evaluated at different points.
            self._compare_replicas()
        refuse(agreed)
        if repeated is not None:
            self._compare_ranks(agreed.repeated)
        return agreed.values

    def _compare_ranks(self, losses: Sequence[float]) -> None:
        """Warn if ranks that divide the evaluations have different losses at the first point."""
        for rank, loss in enumerate(losses):
            if not agree(losses[0], loss):
                warn(
                    f"the closure must compute the same function in all ranks that divide the "
                    f"probes, got {losses[0]!r} in the first and {loss!r} in number {rank}: the "
                    f"estimate will be mostly noise; give them the same batch, and call "
                    f"torch.manual_seed alike in all of them"
                )
                return


def refuse(agreed: Agreed) -> None:
    """Raise an error in all ranks if the exchange has revealed one.

    Raises:
        RuntimeError: a rank's closure raised an error, or ranks are at different positions.
        ValueError: all weights are 0.
    """
    ranks, number = agreed.failed
    if ranks:
        who = (
            f"rank {number}'s closure has" if ranks == 1 else f"the closures of {ranks} ranks have"
        )
        raise RuntimeError(
            f"{who} raised an error, so no rank takes this step, and all weights are as before it; "
            f"see what that rank says"
        )
    if agreed.apart:
        raise RuntimeError(
            "all ranks must take the same step of the same run, got ranks that are at different "
            "places; call step and probe equally often in all of them"
        )
    if agreed.weightless:
        raise ValueError(
            "weight must be positive in a rank at least, got 0 in all of them; leave the step out "
            "in all ranks, or pass how many tokens or examples each has"
        )
