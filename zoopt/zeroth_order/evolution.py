"""Evolution strategies: a population around theta, and a step towards its fitter members."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from zoopt.ambient import opaque
from zoopt.checks import check_bool, check_choice, check_positive_int
from zoopt.distributed.exchange import Job, Parallel
from zoopt.distributed.sharding import is_sharded
from zoopt.dtypes import RoundingMode
from zoopt.kernels.noise.key import Distribution, NoiseKey
from zoopt.optimizer import Group, Params, TensorSpec, hyperparameters
from zoopt.parameters import named_params
from zoopt.registry import register
from zoopt.warn import warn
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.batched import evaluate_batch
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.closure import Closure, check_closure
from zoopt.zeroth_order.engine.direction import Coefficients, Direction
from zoopt.zeroth_order.engine.groups import ProbeNames
from zoopt.zeroth_order.engine.low_rank import OuterProduct
from zoopt.zeroth_order.engine.members import MemberBatch
from zoopt.zeroth_order.engine.noise import Noise
from zoopt.zeroth_order.engine.perturbation import Perturbation, PerturbationMode
from zoopt.zeroth_order.engine.population import (
    GenerationRecord,
    Population,
    Shaping,
    fitness_eps,
    fitness_values,
    shaped,
)
from zoopt.zeroth_order.engine.probe import Evaluation, Outcome, PendingProbe, mean_loss
from zoopt.zeroth_order.engine.progress import Progress
from zoopt.zeroth_order.engine.sites import Site


def evolution(
    f: Sequence[float], z: Sequence[tuple[int, float]], shaping: Shaping
) -> tuple[tuple[float, ...], dict[int, float]]:
    """An evolution strategy's step, from the fitnesses of its members theta + sigma z_i:

        rhat   = shaped f
        theta <- decay theta + lr / N sum_i rhat_i z_i

    Args:
        f: N fitnesses.
        z: each member's draw and sign: z_i = sign z(draw).

    Returns:
        rhat, and draw -> its coefficient in (1/N) sum_i rhat_i z_i.
    """
    rhat = shaped(f, shaping)
    step = dict.fromkeys((draw for draw, _ in z), 0.0)
    for (draw, sign), weight in zip(z, rhat, strict=True):
        step[draw] += sign * weight / len(f)
    return rhat, step


@register("evolution-strategy", "zeroth-order")
class EvolutionStrategy(ZerothOrderOptimizer):
    r"""A population around theta, and a step towards its fitter members (Salimans et al., 2017).

    Of a population of N members theta + sigma z_i, with fitnesses f_i,

        theta <- (1 - lr weight_decay) theta + lr / N sum_i rhat_i z_i

    where rhat is f shaped. Antithetic members 2k and 2k + 1 are +z and -z of one draw. Without a
    rank z is independent normals (or signs). With one (EGGROLL: Sarkar et al., 2025), a parameter
    of two or more dimensions, seen as (m, n), has z = A B^T / sqrt(r), A (m, r) and B (n, r)
    normal and new in every draw; evaluating it costs no pass over the weights, and the update is
    one product with all the vectors.

    `step(evaluate)` calls `evaluate` once a member, N forward passes; it returns the fitness of
    the model as it stands, to be maximised. Fitness may be anything: a reward, an accuracy, a
    negative loss. The population can be split over processes or batches in any way:

        fitness = opt.evaluate(evaluate, members=range(rank, N, world))
        opt.update(gathered)                    # every member's, in every process: the same bits

    and with a rank, `evaluate_batched` evaluates many members in one forward pass.

    State, in bytes: 0. The run's position (seed, step, draw) is in the param groups.

    Args:
        params, weight_decay, blocks, block_order, seed, process_group, parallel, record: as for
            `MeZO`.
        lr: learning rate alpha; default 5e-4 (Qiu et al., arXiv:2509.24372).
        sigma: perturbation scale; default 1e-3 (Qiu et al.).
        population_size: N, at least 2; default 30 (Qiu et al.).
        rank: r, or None for independent elements; default None (EGGROLL, arXiv:2511.16652: 1).
        shaping: `"zscore"` (Qiu et al.): (f - mean) / std; `"rank"`: ranks spread over
            [-1/2, 1/2] (Salimans et al., arXiv:1703.03864); `"pair-sign"`: 1 for the better
            member of each antithetic pair, -1 for the other.
        antithetic: members in pairs of opposite directions (Salimans et al.; EGGROLL); default
            True. N must be even.
        perturbation: as for `MeZO`; with a rank, `"auto"` is virtual for all dtypes.
        rounding: as for `MeZO`.
        distribution: `"normal"`, or `"rademacher"` without a rank.
        maximize: False if `evaluate` returns a loss.

    lr, sigma, weight_decay, rank, perturbation, rounding and distribution can differ between param
    groups.

    Raises:
        TypeError, ValueError: as for `MeZO`; an odd population of pairs; `"pair-sign"` without
            pairs; signs with a rank.

    A member whose fitness is not finite weighs 0 (with `"pair-sign"`, so does its other half), is
    counted in `skipped_probes` and warned of once. `last_step` is a `GenerationRecord`. All
    evaluations of one call see the same torch RNG state, as for `MeZO`; calls of `evaluate` for
    parts of a population each have their own.

    Differs from the authors' code (Qiu et al.), which has no pairs, gives parameters of one shape
    the same noise, and adds the noise to the weights and takes it away again in their own dtype.

    Example:
        >>> opt = zoopt.EvolutionStrategy(model.parameters())
        >>> mean_reward = opt.step(lambda: reward(model))
    """

    _names = ProbeNames("sigma", "population_size", ("shaping", "antithetic"), "fitness")

    #: Batch sizes whose layout `evaluate_batched` has verified.
    _verified: frozenset[int] = frozenset()
    #: The relative spacing of fitnesses that have been evaluated one by one.
    _spacing = 0.0

    scripted = True
    alike = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 5e-4,
        *,
        sigma: float = 1e-3,
        population_size: int = 30,
        rank: int | None = None,
        shaping: Shaping = "zscore",
        antithetic: bool = True,
        weight_decay: float = 0.0,
        perturbation: PerturbationMode = "auto",
        rounding: RoundingMode = "auto",
        distribution: Distribution = "normal",
        blocks: Blocks = None,
        block_order: BlockOrder = "cyclic",
        maximize: bool = True,
        seed: int | None = None,
        process_group: Job = None,
        parallel: Parallel = "data",
        record: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            hyperparameters(locals()),
            seed=seed,
            process_group=process_group,
            parallel=parallel,
            record=record,
        )

    @opaque
    def evaluate(self, evaluate: Closure, members: Iterable[int] | None = None) -> dict[int, float]:
        """The fitness of some members of the present generation; changes nothing.

        Args:
            evaluate: returns the fitness, as for `step`.
            members: their numbers, of 0 ... population_size - 1; default all.

        Returns:
            member -> fitness, for `update`.

        Raises:
            TypeError, ValueError, RuntimeError: as for `step`; a member that there is none of;
                perturbation in place while the run is recorded.
        """
        check_closure(evaluate, "evaluate")
        self._refuse_parts("evaluate")
        population = self._population()
        chosen = population.chosen(members)
        if self.recorder is not None and not all(site.virtual for site in population.sites):
            raise ValueError(
                "perturbation must be 'virtual' to call evaluate while the run is recorded, got "
                "'inplace': its passes round the weights, and no record tells of them; or take "
                "whole generations by step()"
            )
        perturbation = self._perturbation(population)
        evaluation = self._own_evaluation(evaluate, perturbation)
        evaluation.verify = False
        try:
            fitness = evaluation.losses_along(*map(population.place, chosen))
            perturbation.restore()
        except BaseException:
            self._undo(perturbation)
            raise
        self._note_spacing(evaluation.rng.eps, fitness)
        return dict(zip(chosen, fitness, strict=True))

    @opaque
    def evaluate_batched(
        self,
        evaluate: Closure,
        members: Iterable[int] | None = None,
        *,
        examples: int = 1,
        verify: bool = True,
    ) -> dict[int, float]:
        """As `evaluate`, with all the members in one forward pass; for groups with a rank.

        `evaluate` runs the model on a batch whose leading dimension is len(members) * examples,
        each member's examples one after the other, and returns a fitness a member, in their order.
        Each example meets its own member's parameters: the products with theta are shared, and a
        member's rank-r part is added to its own rows. What a member gets equals what `evaluate`
        gives on its examples alone, up to rounding (and except for dropout).

        Args:
            evaluate: returns a tensor of one fitness a member, or a sequence of numbers.
            members: as for `evaluate`. Antithetic pairs that are neighbours share their vectors.
            examples: how many examples of the batch each member has; default 1.
            verify: before the first batch of a size, evaluate once more with NaN in the place of
                the first member's perturbation, and see that it reaches no other member's examples
                (in a model that is not batch-first, or that mixes examples, it does). Pass False
                if `evaluate` cannot bear NaN.

        Raises:
            TypeError, ValueError: a param group without a rank, or a fitness of another length.
            RuntimeError: an operator reads a parameter in a way that has no form for several
                members, its input's leading dimension is not the batch's, or members mix. The
                message names the operator.
        """
        check_closure(evaluate, "evaluate_batched")
        self._refuse_parts("evaluate_batched")
        check_positive_int("examples", examples)
        population = self._population()
        chosen = population.chosen(members)
        if not chosen:
            return {}
        batch = MemberBatch([population.place(i) for i in chosen], examples)
        verify = verify and batch.rows not in self._verified
        values, eps = evaluate_batch(evaluate, population.sites, batch, verify=verify)
        self._note_spacing(eps, values)
        if verify:
            self._verified |= {batch.rows}
        return dict(zip(chosen, values, strict=True))

    @opaque
    def update(self, fitness: Mapping[int, Any] | Sequence[Any] | Tensor) -> float:
        """Take one step from the fitnesses of all members.

        Args:
            fitness: member -> fitness, or the fitnesses in the order of the members.

        Returns:
            The mean fitness.

        Raises:
            TypeError, ValueError: a member without a fitness, or a fitness without a member.
            RuntimeError: probes are pending. Nothing has changed then.
        """
        if self._pending is not None:
            raise RuntimeError(
                "update must not be called while probes are pending, whose fitnesses are known; "
                "call step() instead"
            )
        values = fitness_values(fitness, self.param_groups[0]["population_size"])
        eps = max(self._spacing, fitness_eps(fitness))
        self._settle()
        self._note_changes()
        population = self._population()
        if self.recorder is not None:
            self.recorder.told(values)
        population.add([Outcome((value,), value) for value in values])
        self._take(population, None)
        self._spacing = 0.0
        self._warn_of_narrow(eps, [values])
        return mean_loss(population.losses)

    def _refuse_parts(self, call: str) -> None:
        """Raise if parameters are sharded: their ranks can only evaluate the same member."""
        for *_, param, name in named_params(self.param_groups):
            if is_sharded(param):
                raise RuntimeError(
                    f"{call} must have whole parameters, got {name!r}, which is sharded: all ranks "
                    f"gather it for each member; pass a process_group, and call step"
                )

    def _note_spacing(self, eps: float, fitness: Sequence[float]) -> None:
        """Judge fitnesses of 16 bits; a single one waits for the rest of the population."""
        if len(fitness) < 2:
            self._spacing = max(self._spacing, eps)
        self._warn_of_narrow(eps, [fitness])

    def _differences(self, outcomes: Sequence[Outcome]) -> Iterable[Sequence[float]]:
        return [[outcome.delta for outcome in outcomes]]

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """None."""
        return {}

    def _population(self) -> Population:
        """The generation that is due, or that probes have begun to measure."""
        self._settle()
        population = self._pending or self._new_pending()
        assert isinstance(population, Population)
        return population

    def _new_pending(self) -> Population:
        pending = super()._new_pending()
        antithetic = self.param_groups[0]["antithetic"]
        signs = (1.0, -1.0 if antithetic else 1.0) * len(pending.draws)
        return Population(
            pending.sites, pending.draws, pending.block, signs=signs[: len(pending.draws)]
        )

    def _draws(self) -> tuple[int, ...]:
        run = self.param_groups[0]
        each = 2 if run["antithetic"] else 1
        return tuple(run["draw"] + i // each for i in range(run["population_size"]))

    def _evaluate(self, evaluation: Evaluation, pending: PendingProbe) -> Sequence[Outcome]:
        # A fitness may be noisy: over a population, its noise averages out.
        evaluation.verify = False
        assert isinstance(pending, Population)
        fitness = evaluation.losses_along(*map(pending.place, range(pending.size)))
        return [Outcome((value,), value) for value in fitness]

    def _usable(self, outcome: Outcome) -> Outcome:
        return outcome  # shaped before it meets float32

    def _record(self, pending: PendingProbe, step: int) -> GenerationRecord:
        assert isinstance(pending, Population)
        return pending.record(step)

    def _take(self, pending: PendingProbe, perturbation: Perturbation | None) -> None:
        assert isinstance(pending, Population)
        z, shaping = list(map(pending.place, range(pending.size))), self.param_groups[0]["shaping"]
        pending.shaped, pending.coefficients = evolution(pending.deltas, z, shaping)
        super()._take(pending, perturbation)

    def _warn_of_skipped(self, pending: PendingProbe) -> None:
        if pending.skipped and pending.skipped == self.skipped_probes:
            warn(
                f"left out {pending.skipped} of {len(pending.draws)} members because a fitness was "
                f"not finite; if this goes on, lower lr or sigma (later ones are only counted, in "
                f"skipped_probes)"
            )

    def _weights(self, group: Group, pending: PendingProbe) -> dict[int, float]:
        assert isinstance(pending, Population)
        sign = -1.0 if group["maximize"] else 1.0
        return {draw: sign * c for draw, c in pending.coefficients.items()}

    def _update(
        self, site: Site, pending: PendingProbe, offset: Coefficients, progress: Progress
    ) -> None:
        self._descend(site, pending, offset, self._weights(site.group, pending), progress)

    def _steps_runs(self, group: Group) -> bool:
        return group["rank"] is None

    def _virtual(self, param: Tensor, group: Group) -> bool:
        if group["rank"] is None:
            return super()._virtual(param, group)
        # At the operators that read them, low-rank directions cost no pass over the weights.
        return bool(group["perturbation"] != "inplace")

    def _direction(
        self, param: Tensor, group: Group, number: int, *, virtual: bool
    ) -> Direction | None:
        key = NoiseKey(group["seed"], number, distribution=group["distribution"])
        if group["rank"] is None or param.dim() < 2:
            return Noise(key)
        return OuterProduct(key, self._whole(param), group["rank"])

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        size, antithetic, shaping = group["population_size"], group["antithetic"], group["shaping"]
        if size < 2:
            raise ValueError(
                f"population_size must be at least 2, got {size}: a fitness has no weight alone"
            )
        check_bool("antithetic", antithetic)
        check_choice("shaping", shaping, get_args(Shaping))
        if antithetic and size % 2:
            raise ValueError(
                f"population_size must be even with antithetic=True, got {size}: members come in "
                f"pairs; make it {size + 1}, or set antithetic=False"
            )
        if shaping == "pair-sign" and not antithetic:
            raise ValueError(
                "antithetic must be True with shaping='pair-sign', which compares the members of a "
                "pair, got False; use 'zscore' or 'rank'"
            )
        if group["rank"] is not None:
            check_positive_int("rank", group["rank"])
            if group["distribution"] != "normal":
                raise ValueError(
                    f"distribution must be 'normal' with a rank, got {group['distribution']!r}: "
                    f"the factors are normals"
                )
