"""The planner: the memory of a training step, counted on tensors with shapes but no values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from zoopt.checks import check_bool, check_choice, check_positive_int
from zoopt.distributed.seed import alone
from zoopt.memory.estimate import Estimate
from zoopt.memory.methods import Method, methods
from zoopt.memory.models import resolve
from zoopt.memory.shards import plannable
from zoopt.memory.simulate import Simulation, fake
from zoopt.memory.spec import ModelSpec

#: Tokens an example, unless the model has fewer positions.
DEFAULT_SEQ = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The estimates for one model, the smallest first.

    Attributes:
        model, batch, seq, dtype, checkpointing, gpu, processes: what was planned.
        parameters: how many the model has.
        longest: the longest sequence for which it has positions; None if there is no limit.
        sequential: whether its inputs grow with the sequence length.
        estimates: one for each method.
        left_out: methods that cannot train this model, and why.
    """

    model: str
    batch: int
    seq: int
    dtype: str
    checkpointing: bool
    gpu: bool
    processes: int
    parameters: int
    longest: int | None
    sequential: bool
    estimates: list[Estimate]
    left_out: dict[str, str]

    def __getitem__(self, name: str) -> Estimate:
        for estimate in self.estimates:
            if estimate.name == name:
                return estimate
        raise KeyError(f"{name!r} is not in the plan, which has {[e.name for e in self.estimates]}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@alone()
def plan(
    model: str | ModelSpec,
    *,
    optimizers: str | Sequence[str | Method] = "all",
    batch: int = 1,
    seq: int | None = None,
    dtype: str = "bfloat16",
    checkpointing: bool = False,
    rank: int = 128,
    lora_rank: int = 8,
    gpu: bool = False,
    processes: int = 1,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Predict the peak memory of a training step, for each optimizer; nothing is allocated.

    The step runs operator by operator on fake tensors, under the same meter that
    `zoopt.memory.measure` reads on real ones. What the meter cannot see is not in the figures: the
    framework's own memory (a CUDA context takes about 0.7 GB), an allocator's fragmentation, and
    temporaries inside operators.

    Args:
        model: a named architecture (`zoopt.memory.models.names()`), a directory or config.json of
            a transformers model (decoder, encoder, encoder-decoder, of images or of audio), or
            `module:function`, called with batch and seq and returning a module and its keyword
            arguments.
        optimizers: `"all"`, or names of methods (see `zoopt.memory.methods`), or `Method`s.
        batch: examples.
        seq: tokens an example (of an encoder-decoder: on either side; frames of audio; of no
            meaning for images); default 512, or the model's longest if it is shorter.
        dtype: of weights, gradients and activations: bfloat16, float16 or float32.
        checkpointing: activations are computed again in the backward pass.
        rank: of the low-rank projections.
        lora_rank: of LoRA's adapters.
        gpu: plan for a GPU, where parameters that are perturbed virtually have temporaries made
            ahead of their operators, in buffers of 64 MiB (or of one larger parameter). They count
            as workspace: 64 MiB at most, twice that where an operator reads several parameters and
            two buffers can meet. A CPU has one operator's temporaries at a time. Matrices of a
            shape are updated together, in windows of 32 MiB of projected gradients, with what is
            made of them. A fused backward pass gathers a layer's gradients, or 256 MiB of them.
        processes: the step of one of so many processes, over which FSDP2 divides the parameters:
            each repeated layer is gathered by itself, all others together. For zeroth-order methods
            on whole models. Parameters that one process would perturb virtually (16-bit ones; all
            of `LOZO`, `SubZero` and `ZOMuon`) move from a copy of the shard, which counts as
            workspace during the evaluations.
        progress: called with the name of each method before it is planned.

    Returns:
        The plan, smallest peak first.

    Raises:
        TypeError, ValueError: an argument out of range, or an unknown optimizer.
        ImportError: transformers (or peft, for LoRA) is needed and not installed.
    """
    check_positive_int("batch", batch)
    if seq is not None:
        check_positive_int("seq", seq)
    check_positive_int("rank", rank)
    check_positive_int("lora_rank", lora_rank)
    check_bool("gpu", gpu)
    check_positive_int("processes", processes)
    check_choice("dtype", dtype, DTYPES)
    chosen = select(optimizers, methods(rank, lora_rank))
    if optimizers == "all" and processes > 1:
        chosen = [method for method in chosen if plannable(method)]
    spec = resolve(model) if isinstance(model, str) else model
    if seq is None:
        seq = min(DEFAULT_SEQ, spec.longest or DEFAULT_SEQ)
    with fake(DTYPES[dtype]):
        spec.inputs(batch, seq)
        simulation = Simulation(spec, checkpointing, seq, gpu=gpu, processes=processes)
        estimates = []
        left_out = {}
        for method in chosen:
            if progress is not None:
                progress(method.name)
            try:
                estimates.append(simulation.estimate(method, batch))
            except Exception as error:
                # Some methods need linear layers or peft, and some models need values.
                if optimizers != "all":
                    raise
                left_out[method.name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    parameters = simulation.parameters
    estimates.sort(key=lambda estimate: estimate.peak)
    name = model if isinstance(model, str) else model.name
    return Plan(
        name,
        batch,
        seq,
        dtype,
        checkpointing,
        gpu,
        processes,
        parameters,
        spec.longest,
        spec.sequential,
        estimates,
        left_out,
    )


def select(wanted: str | Sequence[str | Method], known: Sequence[Method]) -> list[Method]:
    """The methods asked for.

    Raises:
        ValueError: a name that is none of the known ones.
    """
    if wanted == "all":
        return list(known)
    table = {method.name.lower(): method for method in known}
    chosen = []
    for item in [wanted] if isinstance(wanted, str) else wanted:
        if isinstance(item, str) and item.lower() not in table:
            raise ValueError(
                f"optimizers must be 'all' or some of {', '.join(m.name for m in known)}; "
                f"got {item!r}"
            )
        chosen.append(table[item.lower()] if isinstance(item, str) else item)
    return chosen
