"""A zeroth-order optimizer whose steps several ranks can take together."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from zoopt.checks import check_nonnegative_int
from zoopt.distributed.exchange import Exchange, Job, Parallel, digest_of
from zoopt.distributed.replicas import compare
from zoopt.distributed.seed import several_ranks
from zoopt.distributed.sharding import is_sharded, layout, ranks_of
from zoopt.optimizer import Params
from zoopt.parameters import named_params
from zoopt.warn import warn
from zoopt.zeroth_order.engine.closure import Closure, RecordedLosses
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.probe import Evaluation, PendingProbe
from zoopt.zeroth_order.engine.shared import SharedEvaluation, refuse
from zoopt.zeroth_order.engine.updates import ZerothOrderUpdates

#: Group keys that are not compared between ranks.
_APART = ("params", "param_names")


class ZerothOrderJob(ZerothOrderUpdates):
    """Steps that the ranks of a process group take together.

    Attributes:
        check_every: how many steps pass between comparisons of the weights' checksums, each of
            which reads all weights. The ranks always compare them at the first step that a process
            takes; with 0 only then.
    """

    check_every: int = 100
    # torch copies an optimizer without calling __init__; a copy then takes its steps alone.
    _exchange: Exchange | None = None
    _compared = False
    _warned_alone = False

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        seed: int | None,
        process_group: Job = None,
        parallel: Parallel = "data",
    ) -> None:
        exchange = Exchange(process_group, parallel) if process_group is not None else None
        super().__init__(params, defaults, seed=seed)
        self._exchange = exchange

    @property
    def together(self) -> bool:
        """Whether other ranks take the steps too."""
        return self._exchange is not None

    def join(self, process_group: Job, parallel: Parallel = "data") -> None:
        """Take the next steps together with other ranks, as if made with this process group.

        This is for an optimizer without a process group, for example from
        `zoopt.trajectory.resume`.

        Args:
            process_group: as for `MeZO`; None: take steps alone.
            parallel: as for `MeZO`.

        Raises:
            RuntimeError: probes are pending.
        """
        if self._pending is not None:
            raise RuntimeError(
                "join must not be called while probes are pending; call step() or zero_grad() first"
            )
        self._exchange = Exchange(process_group, parallel) if process_group is not None else None
        self._compared = False

    def _evaluation(
        self, closure: Closure, perturbation: Perturbation, pending: PendingProbe, weight: float
    ) -> Evaluation:
        """The evaluations of a step, by this process alone or by all ranks."""
        exchange = self._exchange
        if exchange is None:
            if not isinstance(closure, RecordedLosses):
                self._refuse_shards()
                self._warn_alone()
            if self.recorder is not None:
                closure = self.recorder.listen(closure)
            return self._own_evaluation(closure, perturbation)
        standing = self._standing(pending)
        digest = digest_of(*standing)
        check = self._check_due(pending)
        self._check_shards(exchange)
        if self._wholes or any(site.in_place for site in pending.sites):
            # Before anything moves, as a move cannot be taken back to the bit; and before a forward
            # pass gathers shards, which must not meet another call of another rank.
            self._agree_on(exchange, standing, digest, check=check)
            check = False
        return SharedEvaluation(
            closure,
            perturbation,
            self._params(),
            verify=self._verifies,
            exchange=exchange,
            weight=float(weight),
            digest=digest,
            check=check,
            sharded=bool(self._wholes),
            compare=functools.partial(self._compare, exchange, standing),
            heard=None if self.recorder is None else self.recorder.listen_together(),
        )

    def _own_evaluation(self, closure: Closure, perturbation: Perturbation) -> Evaluation:
        """The evaluations of a step, by this process alone."""
        return Evaluation(closure, perturbation, self._params(), verify=self._verifies)

    @property
    def _verifies(self) -> bool:
        """Whether the next evaluation is the run's first; it is repeated to verify the closure."""
        return self._pending is None and not self.param_groups[0]["step"]

    def _confirm(self, pending: PendingProbe) -> None:
        """Raise in all ranks unless all of them take the step with the same pending probes."""
        if self._exchange is None:
            return
        standing = self._standing(pending, "step() of what was probed")
        self._agree_on(self._exchange, standing, digest_of(*standing))

    def _agree_on(
        self,
        exchange: Exchange,
        standing: list[tuple[str, Any]],
        digest: int,
        *,
        check: bool = False,
    ) -> None:
        """Raise in all ranks unless all are at the same position; `check`: compare the weights."""
        agreed = exchange.combine([], count=0, digest=digest, check=check)
        if agreed.apart or agreed.check:
            self._compare(exchange, standing)
        refuse(agreed)

    def _check_seed(self) -> None:
        # Ranks that take steps together compare the seed along with everything else.
        if self._exchange is None:
            super()._check_seed()

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _check_due(self, pending: PendingProbe) -> bool:
        """Whether this step compares the ranks' weights."""
        if pending.losses:
            return False
        every: int = self.check_every
        check_nonnegative_int("check_every", every)
        return not self._compared or (every > 0 and self.param_groups[0]["step"] % every == 0)

    def _compare(self, exchange: Exchange, standing: list[tuple[str, Any]]) -> None:
        """Raise in all ranks unless all are at the same position of the run with equal weights."""
        compare(exchange, standing, _names(self.param_groups))
        self._compared = True

    def _standing(
        self, pending: PendingProbe, call: str = "an evaluation"
    ) -> list[tuple[str, Any]]:
        """What must be equal in all ranks, by name. Lists and larger tensors are left out."""
        standing: list[tuple[str, Any]] = [("call", call), ("class", type(self).__name__)]
        several = len(self.param_groups) > 1
        for number, group in enumerate(self.param_groups):
            where = f" of param group {number}" if several else ""
            for key, value in group.items():
                if isinstance(value, Tensor) and value.numel() == 1:
                    value = value.item()
                if key not in _APART and not isinstance(value, list | Tensor):
                    standing.append((key + where, value))
        return [*standing, ("probed micro-batches", len(pending.losses) // len(pending.draws))]

    def _refuse_shards(self) -> None:
        """Raise if parameters are sharded over ranks that do not exchange their losses."""
        if {torch.nn.Parameter, Tensor}.issuperset(map(type, self._params())):
            return
        for *_, param, name in named_params(self.param_groups):
            if is_sharded(param):
                raise RuntimeError(
                    f"{type(self).__name__} must have a process_group where parameters are "
                    f"sharded, got none, and {name!r} is: the parts of a parameter would move by "
                    f"the loss of their own rank; pass torch.distributed.group.WORLD"
                )

    def _check_shards(self, exchange: Exchange) -> None:
        """Raise unless the ranks over which parameters are sharded are in the job, and evaluate at
        the same points: a forward pass gathers the parts of all of them."""
        first: dict[Hashable, Tensor] = {}
        for param in dict.fromkeys(self._wholes.values()):
            first.setdefault(layout(param), param)
        for param in first.values():
            divided, holding = ranks_of(param)
            if divided <= exchange.same_points and holding <= exchange.ranks:
                continue
            name = next(name for *_, own, name in named_params(self.param_groups) if own is param)
            raise RuntimeError(
                f"the ranks over which parameters are sharded must be in the process_group and "
                f"evaluate at the same points, got {name!r}, which is divided over ranks "
                f"{sorted(divided)} and held by {sorted(holding)}, in a group of "
                f"{sorted(exchange.ranks)}, of which {sorted(exchange.same_points)} evaluate "
                f"together; use parallel='data', or a mesh whose dimension 'data' is the one of "
                f"fully_shard"
            )

    def _warn_alone(self) -> None:
        """Warn once that replicas will drift apart."""
        if not self._warned_alone and several_ranks():
            self._warned_alone = True
            name = type(self).__name__
            warn(
                f"{name} takes its steps alone in a job of several processes: each has losses of "
                f"its own, so that their weights drift apart; pass "
                f"process_group=torch.distributed.group.WORLD to {name}"
            )


def _names(groups: Any) -> Iterable[tuple[str | int, Tensor]]:
    for *_, param, name in named_params(groups):
        yield name, param
