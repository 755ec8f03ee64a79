"""LoRA-GGPO: gradients at perturbed weights, with more noise on rows with large gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoopt.ambient import opaque
from zoopt.checks import check_number
from zoopt.distributed.checkpoint import called_by_checkpoint
from zoopt.distributed.seed import SharedSeed
from zoopt.dtypes import accumulator_dtype
from zoopt.groups import all_params
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.op import perturb
from zoopt.nn.modules import named
from zoopt.noise import stream
from zoopt.selection.saved import check_plain, check_saved, check_vectors
from zoopt.warn import warn
from zoopt.wrapper import Wrapper, with_closure


def row_scales(weight: Tensor, squares: Tensor, sigma: float, beta: float) -> Tensor:
    """c_i = (sigma ||W_i|| + min(beta ||G_i||^2, max(1, ||W_i||))) / sqrt(m) of each row of W
    (m, n): (m,).

    Args:
        squares: ||G_i||^2 of the last step's gradient, (m,); 0 before the first step.
    """
    wide = accumulator_dtype(weight.dtype)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=wide)
    scales = norms * sigma + torch.minimum(squares * beta, norms.clamp(min=1.0))
    return scales / math.sqrt(weight.shape[0])


def row_squares(gradient: Tensor, before: Tensor) -> Tensor:
    """||G_i||^2 of each row of G (m, n), at most the largest number; of rows that are not finite,
    that of `before`: (m,)."""
    if gradient.layout != torch.strided and gradient.sparse_dim() != 1:
        gradient = gradient.to_dense()
    if gradient.layout != torch.strided:
        entries = gradient.coalesce()
        squares = torch.zeros_like(before)
        if entries.values().numel():
            at = entries.indices()[0]
            rows = entries.values().reshape(len(at), -1)
            squares[at] = row_squares(rows, before[at])
        return squares
    if not gradient.numel():
        return before
    largest = torch.linalg.vector_norm(gradient, ord=math.inf, dim=1)
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=1, dtype=before.dtype)
    squares = norms.square_().clamp_(max=torch.finfo(before.dtype).max)
    return torch.where(largest.isfinite(), squares, before)


class LoRAGGPO(Wrapper):
    r"""LoRA-GGPO (Chang et al., 2025, arXiv:2502.14538), over any first-order optimizer.

    During training the model computes with W + c z instead of W, for each matrix W (m, n) that the
    optimizer trains, such as the factors of a LoRA. z is standard normal, new in each step, and

        c_i = (sigma ||W_i|| + beta ||G_i||^2) / sqrt(m)

    for each row i, with G the last step's gradient. This leads to flatter minima, above all in rows
    with large gradients. Before the optimizer's step, W is restored bit for bit. A row of G that is
    not finite is forgotten: its last finite norm stays.

    It hooks the optimizer's `step`, and the forward pass of the model and of each module that holds
    such a matrix. A forward pass in training mode perturbs the weights; one in evaluation mode
    restores them. All micro-batches of a step see the same noise. A step from gradients of weights
    without noise gives a warning: then none of these modules has been called.

    It takes a copy of the trained matrices, and 4 bytes per row. Save `state_dict` along with the
    optimizer's. A run that loads both continues exactly.

    Args:
        model: the model whose weights are perturbed.
        optimizer: the matrices that it trains are perturbed.
        sigma, beta: default 0.03 and 0.01 (kohya's port).
        seed: seed of the noise; default torch.initial_seed(), rank 0's in all processes.

    Raises:
        TypeError, ValueError: an argument is out of range; the optimizer is already under LoRAGGPO
            or another wrapper, is fused into the backward pass, or trains no matrix of the model.

    `remove()`, or leaving the `with` block, restores the weights and undoes it. Save weights after
    a step or after `restore()`.

    Differs from the paper, which adds noise to the layer's whole weight. Here the noise is on each
    trained matrix. beta ||G_i||^2 is at most max(1, ||W_i||): without a bound, the noise from a
    gradient of 1e10 makes the next loss infinite.

    Example:
        >>> opt = zoopt.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        >>> ggpo = zoopt.LoRAGGPO(model, opt)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    label = "LoRAGGPO"
    from_gradients = True
    unfused = "it would step from perturbed weights"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sigma: float = 0.03,
        beta: float = 0.01,
        seed: int | None = None,
    ) -> None:
        check_number("sigma", sigma, low=0.0)
        check_number("beta", beta, low=0.0)
        self._check(optimizer)
        held = all_params(optimizer.param_groups)
        own = named(model, held)
        self._params = {name: p for name, p in own if p.requires_grad and p.dim() == 2}
        if not self._params:
            raise ValueError(
                "optimizer must hold a matrix of the model that trains, got none; make it of the "
                "model's parameters"
            )
        for name, param in self._params.items():
            check_plain(name, param)
        self._sigma, self._beta = sigma, beta
        self._seed = SharedSeed(seed, type(self).__name__).value
        self._step = 0
        self._squares = {
            name: torch.zeros(len(param), dtype=accumulator_dtype(param.dtype), device=param.device)
            for name, param in self._params.items()
        }
        self._saved: dict[str, Tensor] = {}
        self._perturbed = self._warned = False
        self._modules = weakref.WeakSet([model, *self._owners(model)])
        # Before all other hooks: they must see the weights without noise.
        first = optimizer.register_step_pre_hook(lambda _, *given: self._before_step(*given))
        hooks: Any = optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(first.id, last=False)
        self._attach(
            optimizer,
            model.register_forward_pre_hook(lambda module, _: self._forward(module)),
            *(
                module.register_forward_pre_hook(lambda module, _: self._enter(module))
                for module in self._owners(model)
            ),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            first,
        )

    def _owners(self, model: nn.Module) -> list[nn.Module]:
        """The modules below the model that hold a perturbed matrix: they may be called alone."""
        held = {id(param) for param in self._params.values()}
        return [
            module
            for module in model.modules()
            if module is not model
            and any(id(param) in held for param in module.parameters(recurse=False))
        ]

    def remove(self) -> None:
        """Restore the weights and remove the hooks."""
        self.restore()
        self._detach()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights, bit for bit, if they are perturbed."""
        for name, saved in self._saved.items():
            self._params[name].copy_(saved)
        self._saved.clear()

    @torch.no_grad()
    def perturb(self) -> None:
        """Perturb the weights by this step's noise, unless they already are."""
        self._perturbed = True
        if self._saved:
            return
        for name, param in self._params.items():
            scales = row_scales(param.detach(), self._squares[name], self._sigma, self._beta)
            theta = param.detach()
            self._saved[name] = theta.clone()
            key = NoiseKey(self._seed, stream(f"ggpo {name}"))
            draw = self._step & 0xFFFFFFFF
            perturb(theta, 1.0, draw=draw, key=key, row_scale=scales, out=theta)

    def state_dict(self) -> dict[str, Any]:
        """The seed, the number of steps taken, and the squared row norms of the last gradients."""
        return {"seed": self._seed, "step": self._step, "squares": dict(self._squares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from `state_dict`.

        Raises:
            TypeError, ValueError: the state is of other parameters, or damaged. Nothing has
                changed then.
        """
        check_saved("LoRAGGPO", state, "squares")
        rows = {name: len(param) for name, param in self._params.items()}
        check_vectors("squares", state["squares"], rows, "parameters")
        self.restore()
        self._seed, self._step = state["seed"], state["step"]
        self._squares = {
            name: torch.zeros_like(own)
            if name not in state["squares"]
            else state["squares"][name].to(own.device, own.dtype, copy=True)
            for name, own in self._squares.items()
        }

    @opaque
    def _forward(self, module: nn.Module) -> None:
        if module not in self._modules:  # A copy, as of weights' averages, has the hooks too.
            return
        # Not if gradients are enabled: checkpointing evaluates without them first.
        if module.training:
            self.perturb()
        else:
            self.restore()

    def _enter(self, module: nn.Module) -> None:
        # In a compiled model the model's own hook has done it, and a call here would break graphs.
        if not torch.compiler.is_compiling():
            self._forward(module)

    @opaque
    @torch.no_grad()
    def _before_step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if called_by_checkpoint():  # Its gradients are zeros.
            return None
        self.restore()
        given = with_closure(args, kwargs, self._evaluated)
        if given is None:
            self._note_gradients()
        return given

    def _evaluated(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of a step, which updates after it: its noise is taken back by then."""

        def evaluate() -> Any:
            result = closure()
            self.restore()
            self._note_gradients()
            return result

        return evaluate

    @torch.no_grad()
    def _note_gradients(self) -> None:
        noiseless = not (self._perturbed or self._warned)
        if noiseless and any(param.grad is not None for param in self._params.values()):
            self._warned = True
            warn(
                "LoRAGGPO added no noise before this step: neither the model nor a module with a "
                "perturbed matrix was called in training mode; call it, or perturb() before the "
                "forward pass"
            )
        for name, param in self._params.items():
            if param.grad is not None:
                self._squares[name] = row_squares(param.grad, self._squares[name])

    @opaque
    def _after_step(self) -> None:
        if not called_by_checkpoint():  # That call only creates the optimizer's state.
            self._perturbed = False
            self._step += 1
