"""transformers: a Trainer that probes the loss where the original calls backward."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer


class ZOTrainer(transformers.Trainer):
    """transformers.Trainer for zeroth-order optimizers; its arguments, loop and checkpoints.

    Choose the optimizer in one of two ways:

        ZOTrainer(..., optimizer_cls_and_kwargs=(zoopt.MeZO, {"lr": 1e-6, "zo_eps": 1e-3}))
        ZOTrainer(..., optimizers=(zoopt.MeZO(model.named_parameters(), lr=1e-6), None))

    In the first form the Trainer makes two param groups without names: one with the weight_decay
    of TrainingArguments, and one without for biases and normalisation layers.
    A weight_decay among the kwargs therefore has no effect; the seed is that of TrainingArguments
    unless the kwargs have one. In both forms `optim` and `learning_rate` of TrainingArguments have
    no effect, and its scheduler works on the optimizer's own lr.

    Every micro-batch is probed: 2 num_probes forward passes (one-sided: 1 + num_probes), no
    backward pass and no gradients. Micro-batches share their directions, so accumulating them is
    the same as one large batch. A run resumed from a checkpoint equals the uninterrupted one bit
    for bit. The model is in training mode, as always in the Trainer; all evaluations of a
    micro-batch see the same dropout.

    Under `torchrun` or `accelerate launch` each process probes its own part of the batch, and all
    take the same step from the mean of their losses (see `MeZO`'s process_group). The model is not
    wrapped in DistributedDataParallel, which would keep buffers for gradients. With FSDP2, by
    Accelerate's plugin or `fsdp_config`, each process keeps and perturbs its own shards; the
    optimizer is then given as optimizer_cls_and_kwargs. The figures in the log are those of the
    whole job.

    In the log, `loss` is the mean over the evaluated points, and `grad_norm` the root mean square
    of the step's projected gradients (with one probe, the magnitude of the projected gradient),
    which estimates the norm of the gradient. `max_grad_norm` has no effect, since there are no
    gradients to clip; use the optimizer's `max_projected_grad`.

    Raises, at the first training step and before anything has changed:
        TypeError: the optimizer is not one of zoopt's zeroth-order optimizers.
        RuntimeError: the optimizer cannot accumulate probes (`ZOConservativeSGD`).
        ValueError: it maximises; fp16 with a gradient scaler, DeepSpeed, FSDP1 or DataParallel.
    """

    #: The run's state at the time of the optimizer's pending probes.
    _run: transformers.TrainerState | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, but the model is not wrapped for the exchange of gradients."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.num_processes > 1 and not self.is_fsdp_enabled:
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Probe the loss of a micro-batch; the Trainer's `optimizer.step()` then updates."""
        optimizer = self._zeroth_order()
        if self._run is not self.state:
            # A run that was stopped between two micro-batches leaves its probes behind. This is
            # another run, so they are dropped, as gradients would be.
            optimizer.zero_grad()
            self._run = self.state
        # The loss on which the original step would call backward, in its contexts and its scale,
        # by the rules of the installed version of transformers.
        evaluate = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        with _intercepted_backward(self.accelerator) as losses:

            def closure() -> Tensor:
                evaluate()
                return losses.pop()

            loss = optimizer.probe(closure)
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with `grad_norm` computed from the step's projected gradients.

        The Trainer takes the norm of `.grad`, which is empty here. The log is the only public place
        where it can be replaced.
        """
        record = self._zeroth_order().last_step if "grad_norm" in logs else None
        if record is not None:
            squares = [g * g for g in record.projected_grads if not math.isnan(g)]
            logs["grad_norm"] = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
        super().log(logs, start_time)

    def _zeroth_order(self) -> ZerothOrderOptimizer:
        """The optimizer under Accelerate's wrapper, checked together with the Trainer's set-up."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, ZerothOrderOptimizer):
            raise TypeError(
                f"ZOTrainer needs a zeroth-order optimizer, got {type(optimizer).__name__}; pass "
                "optimizer_cls_and_kwargs=(zoopt.MeZO, {'lr': 1e-6}), or use transformers.Trainer"
            )
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError(
                f"maximize must be False, got True: the Trainer's loss is to fall; set it in the "
                f"arguments of {type(optimizer).__name__}, and let compute_loss return the "
                f"negative of what is to rise"
            )
        if self.accelerator.scaler is not None:
            raise ValueError(
                "fp16 must be False, got True: its gradient scaler cannot step without gradients; "
                "set bf16=True, or load the model with dtype=torch.float16 and leave fp16 False"
            )
        if self.is_deepspeed_enabled:
            raise ValueError(
                "ZOTrainer needs whole parameters, but DeepSpeed is enabled; shard the model with "
                "FSDP2 (fsdp_config={'version': 2}), or load it with device_map='auto'"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_version must be 2, got {plugin.fsdp_version}: FSDP1 keeps parameters in "
                f"flat tensors; set fsdp_config={{'version': 2}}, or launch with --fsdp_version 2"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"ZOTrainer must run without DataParallel, got {self.args.n_gpu} GPUs in one "
                f"process; start a process a GPU by torchrun, or leave one GPU in "
                f"CUDA_VISIBLE_DEVICES"
            )
        if self.accelerator.num_processes > 1 and not optimizer.together:
            optimizer.join(torch.distributed.group.WORLD)
        return optimizer


@contextlib.contextmanager
def _intercepted_backward(accelerator: Any) -> Iterator[list[Tensor]]:
    """Make `accelerator.backward` only append the loss to the list."""
    losses: list[Tensor] = []
    attributes = vars(accelerator)  # An attribute of the instance hides the method.
    before = {key: attributes[key] for key in ("backward",) if key in attributes}
    attributes["backward"] = lambda loss, **_: losses.append(loss)
    try:
        yield losses
    finally:
        del attributes["backward"]
        attributes.update(before)
