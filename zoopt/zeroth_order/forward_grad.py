"""Forward gradients: the exact derivative along a random direction, from one dual forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoopt.ambient import OwnArithmetic
from zoopt.distributed.exchange import Job, Parallel
from zoopt.dtypes import RoundingMode
from zoopt.kernels.noise.key import Distribution
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import Variant, register
from zoopt.zeroth_order.engine.blocks import BlockOrder, Blocks
from zoopt.zeroth_order.engine.closure import Closure, Loss
from zoopt.zeroth_order.engine.mask import Mask
from zoopt.zeroth_order.engine.perturbation import Perturbation
from zoopt.zeroth_order.engine.probe import Evaluation, Outcome, PendingProbe
from zoopt.zeroth_order.engine.sites import along
from zoopt.zeroth_order.mezo import MomentumSGD


def forward_gradient(
    L: Closure,
    z: Callable[[Tensor], Tensor],
    perturbation: Perturbation,
    evaluate: Callable[[Closure], Loss],
) -> tuple[Loss, float]:
    """L(theta) and s = <grad L(theta), z>, from one forward pass in dual numbers:

        L(theta + z e) = L(theta) + s e,   e^2 = 0
        theta <- decay theta - lr mean_j(s_j z_j)          the step made of these

    Args:
        L: evaluates the loss, a tensor of one element.
        z: parameter -> its direction, of its shape, generated at each operator that reads it.
        perturbation: replaces what operators read of theta.
        evaluate: runs a closure under the step's random state.
    """

    @OwnArithmetic()
    def theta(param: Tensor) -> Tensor:
        if not torch._C._is_fwd_grad_enabled():
            raise RuntimeError(
                f"the closure reads a parameter of shape {tuple(param.shape)} where no forward "
                f"derivative is kept, as inside a torch.autograd.Function, and its part of the "
                f"slope would be lost; use MeZO, or pass ForwardGrad other parameters"
            )
        return _dual(param.detach(), z(param))

    s: list[float] = []

    def primal() -> Tensor:
        dual = L()
        s.append(_tangent(dual))
        return _parts(dual)[0]

    with (
        torch.inference_mode(False),  # which has no derivatives
        forward_ad.dual_level(),
        sdpa_kernel(SDPBackend.MATH),
        perturbation.substituted(theta, lambda w, rows: theta(w)[rows], None),
    ):
        loss = evaluate(primal)
    return loss, s[0]


@register("forward-grad", "zeroth-order", Variant(planned=False))
class ForwardGrad(MomentumSGD):
    r"""SGD along random directions by the exact slope (Baydin et al., 2022, arXiv:2202.08587).

        s_j    = <grad L(theta), z_j>
        theta <- (1 - lr weight_decay) theta - lr mean_j(s_j z_j)           over num_probes

    s_j is the tangent of the loss in one forward pass in dual numbers. Each parameter's tangent z_j
    is generated at the operator that reads the parameter, and freed after it: no tangent of the
    whole model exists, and an activation's tangent lives as long as the activation. The estimate
    has no bias from a finite zo_eps and no cancellation of two losses. A step costs num_probes dual
    passes, with three products for each one of a forward pass (measured on a model of the size of
    GPT-2 small: the time of four forward passes).

    State, in bytes a parameter element: 0; with `momentum` and no `momentum_window`, 4 (8 for
    float64); with `mask="magnitude"`, 4 a parameter.

    Args:
        params, lr, momentum, momentum_window, weight_decay, num_probes, distribution, rounding,
            max_projected_grad, mask, density, blocks, block_order, maximize, seed, process_group,
            parallel: as for `MeZO`
            (the projected gradient is s_j).

    The closure must return the loss as a tensor, computed from the parameters by operators that
    have a forward derivative; attention takes torch's own plain implementation meanwhile.

    Raises:
        TypeError, ValueError: as for `MeZO`.
        TypeError, RuntimeError: in a step, if the closure returns a number, or a loss without a
            derivative (as accuracy); nothing has changed then.

    Example:
        >>> opt = zoopt.ForwardGrad(model.parameters(), lr=1e-5)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    recordable = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-6,
        *,
        momentum: float = 0.0,
        momentum_window: int | None = None,
        weight_decay: float = 0.0,
        num_probes: int = 1,
        distribution: Distribution = "normal",
        rounding: RoundingMode = "auto",
        max_projected_grad: float | None = None,
        mask: Mask | None = None,
        density: float = 1.0,
        blocks: Blocks = None,
        block_order: BlockOrder = "cyclic",
        maximize: bool = False,
        seed: int | None = None,
        process_group: Job = None,
        parallel: Parallel = "data",
    ) -> None:
        defaults = hyperparameters(locals())
        # Slopes are not divided by a zo_eps.
        defaults |= {"zo_eps": 1.0, "perturbation": "virtual", "window": ()}
        super().__init__(
            params, defaults, seed=seed, process_group=process_group, parallel=parallel
        )

    # A tangent takes the place of what an operator reads, which FSDP gathers itself.
    _can_shard = False

    def _virtual(self, param: Tensor, group: Group) -> bool:
        return True

    def _evaluate(self, evaluation: Evaluation, pending: PendingProbe) -> Sequence[Outcome]:
        draws = pending.draws
        slopes = evaluation.each(
            len(draws), 2, lambda j: self._slope(evaluation, pending, draws[j])
        )
        return [Outcome((loss,), slope) for slope, loss in slopes]

    def _slope(
        self, evaluation: Evaluation, pending: PendingProbe, draw: int
    ) -> tuple[float, Loss]:
        """The derivative of the loss along z(draw), and the loss."""
        directions = pending.sites.virtual
        reads = evaluation.perturbation.reads(along(draw, 1.0), decay=0.0)
        in_windows = reads.serves

        def z(param: Tensor) -> Tensor:
            if id(param) in in_windows:
                return reads.take(param)
            return directions[id(param)].direction.tangent(param.detach(), draw)

        queued, s = forward_gradient(
            evaluation.closure, z, evaluation.perturbation, evaluation.rng.evaluate
        )
        reads.learn()
        return s, queued


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call]
    return dual


def _parts(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return primal, tangent


def _tangent(result: Any) -> float:
    """The derivative that a loss carries."""
    if not isinstance(result, Tensor):
        raise TypeError(
            f"the closure must return the loss as a tensor, which carries the derivative, got "
            f"{type(result).__name__}; return loss, not loss.item()"
        )
    tangent = _parts(result)[1]
    if tangent is None:
        raise RuntimeError(
            "the closure must return a loss that depends on the parameters differentiably, got one "
            "without a derivative; take a differentiable loss, or MeZO, which needs none"
        )
    if tangent.numel() != 1 or tangent.is_complex():
        raise ValueError(
            f"the closure must return one real number, got a {result.dtype} tensor of shape "
            f"{tuple(result.shape)}; reduce it first, with .mean() say"
        )
    return float(tangent.item())
