"""Backprop on the late layers, zeroth order on the early ones, whose activations are not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from zoopt.ambient import opaque
from zoopt.distributed.checkpoint import called_by_get
from zoopt.first_order.adamw import AdamW
from zoopt.groups import all_params
from zoopt.interrupts import uninterrupted
from zoopt.nn.modules import repeated_layers
from zoopt.optimizer import Group, P, R
from zoopt.parameters import named_params
from zoopt.registry import Recipe, register
from zoopt.zeroth_order.conservative import ZOConservativeSGD
from zoopt.zeroth_order.engine.backward import LateGradients
from zoopt.zeroth_order.engine.base import ZerothOrderOptimizer
from zoopt.zeroth_order.engine.closure import Closure, check_closure
from zoopt.zeroth_order.engine.probe import PendingProbe, StepRecord, mean_loss
from zoopt.zeroth_order.evolution import EvolutionStrategy
from zoopt.zeroth_order.forward_grad import ForwardGrad
from zoopt.zeroth_order.mezo import MeZO

#: Optimizers that do not evaluate one probe of the loss around theta, and why.
_REFUSED: dict[type[Optimizer], str] = {
    ZOConservativeSGD: "the points that it compares would count as evaluations of the probe",
    ForwardGrad: "its evaluations carry a derivative forward, and none can be taken back",
    EvolutionStrategy: "fitness, which it evaluates, has no gradient in general",
}


def _last_two_layers(model: nn.Module, rank: int) -> Hybrid:
    """AdamW on the last two layers, MeZO on all other parameters."""
    layers = list(repeated_layers(model).values())[-2:]
    late = {id(param) for layer in layers for param in layer.parameters()}
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for param in model.parameters():
        if param.requires_grad:
            split[id(param) in late].append(param)
    return Hybrid(MeZO(split[0]), AdamW(split[1]))


@register(
    "hybrid",
    "zeroth-order",
    recipe=Recipe(_last_two_layers, label="last two layers", graph=True, layers=2),
)
class Hybrid(Optimizer):
    r"""Zeroth order on the early layers and first order on the late ones, from the same passes.

    The split of the "hybrid" in Zhang et al., 2024 (arXiv:2402.11592). With e and l the early and
    late parameters, and e_1 ... e_n the points at which the zeroth-order probe evaluates the loss
    (for example e + zo_eps z and e - zo_eps z),

        e <- the zeroth-order update from L(e_1, l) ... L(e_n, l)
        l <- the first-order update from the gradient (1/n) sum_i grad_l L(e_i, l)

    Two-sided points come in pairs, so that the mean is even in zo_eps and misses grad_l L(e, l) by
    O(zo_eps^2); one-sided ones miss it by O(zo_eps). A step costs n forward passes, and n backward
    passes through the late layers. Early parameters require no gradient meanwhile, so that
    activations are kept only from the first operator that reads a late parameter. These, and the
    gradients of the late parameters, add to the memory of `zeroth_order` (during backward one more
    gradient; while further micro-batches are probed, all of them twice).

    Args:
        zeroth_order: a zoopt zeroth-order optimizer over the early parameters; not
            `ZOConservativeSGD`, `ForwardGrad` or `EvolutionStrategy`.
        first_order: a torch optimizer over the late parameters (those of the last layers; a tied
            weight counts where it is read first), whose `step` needs no closure.

    State: that of the two optimizers. param_groups are those of both, zeroth_order's first, and
    schedulers can write to them. The closure of `step` and `probe` returns the loss as a tensor and
    does not call backward. The step's record is `zeroth_order.last_step`; clip gradients in
    `first_order.register_step_pre_hook`. Late gradients are freed after each step; early parameters
    never have any. Freeze a parameter that is in neither half, or it collects gradients.

    Raises:
        TypeError: an optimizer of another kind.
        ValueError: a parameter is in both, or a late one does not require a gradient.

    An evaluation whose loss is not finite gives no gradient; the mean is over the others. Where
    `zeroth_order` can use none of a micro-batch's directions, its gradients are dropped as well; if
    that is so for all of a step, neither half moves. If the closure raises, nothing has changed (in
    place, up to rounding). If an error ends a step that has begun to update, for example because
    memory runs out in `first_order`, the next call of `step`, `probe` or `state_dict` finishes it,
    also after `zero_grad`, and so does copying or pickling: `first_order` steps again from the same
    gradients. An optimizer of zoopt continues where it stopped. One of torch updates all its
    parameters again, including those that it had updated already.

    The benchmark's published code has no such split. Here the late gradient comes from the probe's
    own evaluations, not from an additional one at theta.

    Example:
        >>> late = ("layers.22.", "layers.23.", "norm.", "head.")
        >>> named = list(model.named_parameters())
        >>> opt = zoopt.Hybrid(
        ...     zoopt.MeZO([(n, p) for n, p in named if not n.startswith(late)], lr=1e-6),
        ...     torch.optim.AdamW([(n, p) for n, p in named if n.startswith(late)], lr=1e-5),
        ... )
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    #: Of a step that has begun and is not finished, late parameters and their gradients.
    _owed: list[tuple[Tensor, Tensor | None]] | None = None

    def __init__(self, zeroth_order: ZerothOrderOptimizer, first_order: Optimizer) -> None:
        _check(zeroth_order, first_order)
        self.defaults: dict[str, Any] = {}
        self.zeroth_order, self.first_order = zeroth_order, first_order
        super().__setstate__({})  # torch's constructor requires parameters

    def __getstate__(self) -> dict[str, Any]:
        self._finish()
        return {name: self.__dict__[name] for name in ("defaults", "zeroth_order", "first_order")}

    def __repr__(self) -> str:
        return f"Hybrid (\nzeroth_order: {self.zeroth_order}\nfirst_order: {self.first_order}\n)"

    @staticmethod
    def profile_hook_step(func: Callable[P, R]) -> Callable[P, R]:
        """As in `zoopt.optimizer`: nothing to compile."""
        return opaque(Optimizer.profile_hook_step(func))

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """The groups themselves of both optimizers, in a new list."""
        return [*self.zeroth_order.param_groups, *self.first_order.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The parameters' states themselves, in a new dict."""
        return {**self.zeroth_order.state, **self.first_order.state}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused, since it is not known which of the two optimizers the group is for."""
        raise RuntimeError(
            "Hybrid cannot know which half a param group is for: call add_param_group of its "
            "zeroth_order or its first_order"
        )

    @opaque
    def probe(self, closure: Closure) -> float:
        """Evaluate the closure along this step's directions, and add up for both halves.

        Call it once for each micro-batch, with losses scaled as for backward passes, and then
        `step()`. The closure evaluates the loss and returns it, a tensor of one element with its
        graph.

        Returns:
            The mean of the probe's losses.

        Raises:
            TypeError, ValueError, RuntimeError: as for `zeroth_order`; the closure calls backward,
                or its loss has no derivative with respect to the late parameters.
        """
        self._finish()
        return self._evaluated(closure, "probe", self.zeroth_order.probe)

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """Take one step: from the probes that are pending and, as by `probe`, from the closure.

        A step that an error has interrupted is finished before; without a closure, that is all.

        Returns:
            The mean of the closure's losses (without a closure: of all the pending ones, or those
            of the interrupted step that is finished), or None if there was nothing to do, in which
            case nothing at all has changed.
        """
        finished = self._finish()
        if closure is None and finished is not None:
            return finished
        run, before = self.zeroth_order.step, self.zeroth_order.last_step
        try:
            loss = run() if closure is None else self._evaluated(closure, "step", run)
        finally:
            if self._begun(before) is not None:
                self._owed = [(param, param.grad) for param in _params(self.first_order)]
        self._finish()
        return loss

    def _begun(self, before: StepRecord | None) -> StepRecord | PendingProbe | None:
        """What `zeroth_order` has measured for a step that it has taken, or that an error has cut
        short, since its `last_step` was `before`."""
        taken = self.zeroth_order.last_step
        return self.zeroth_order._cut_short or (None if taken is before else taken)

    def _finish(self) -> float | None:
        """Finish a step that `zeroth_order` has begun.

        Returns:
            The mean of all its losses, or None if there is none.
        """
        if self._owed is None:
            return None
        self.zeroth_order._settle()
        record = self.zeroth_order.last_step
        assert record is not None
        with uninterrupted():
            if record.skipped < len(record.losses):
                for param, grad in self._owed:
                    param.grad = grad
                self.first_order.step()
            self.first_order.zero_grad(set_to_none=True)
            self._owed = None
        return mean_loss(record.losses)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; pending probes of `zeroth_order` are dropped too."""
        self.first_order.zero_grad(set_to_none)
        # Last: its recorder may raise, once the probes are dropped.
        self.zeroth_order.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers' own, with their classes and the late parameters' shapes. A step that an
        error has interrupted is finished before.

        Raises:
            RuntimeError: torch.distributed.checkpoint asks for it.
        """
        self._finish()
        if called_by_get():
            raise RuntimeError(
                "torch.distributed.checkpoint must be given the two optimizers of a Hybrid one by "
                "one, got the Hybrid; pass its zeroth_order, and then its first_order"
            )
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._identity()
        state_dict["zeroth_order"] = self.zeroth_order.state_dict()
        state_dict["first_order"] = self.first_order.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both optimizers' states, and drop pending probes.

        Raises:
            ValueError: the dict belongs to other optimizers, or to parameters of other shapes.
                Nothing has changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for key, own in self._identity().items():
            if state_dict.get(key) != own:
                raise ValueError(
                    f"state_dict must be of a Hybrid with {key} {own}, got {state_dict.get(key)}; "
                    f"build it from the optimizers and parameters it was saved with"
                )
        before, pending = self.zeroth_order.state_dict(), self.zeroth_order._pending
        self.zeroth_order.load_state_dict(state_dict["zeroth_order"])
        try:
            self.first_order.load_state_dict(state_dict["first_order"])
        except BaseException:
            self.zeroth_order.load_state_dict(before)
            self.zeroth_order._pending = pending
            raise
        self._owed = None
        self.zero_grad()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _identity(self) -> dict[str, Any]:
        """The entries that must be equal in a checkpoint and the optimizer that loads it."""
        late = [group["params"] for group in self.first_order.param_groups]
        classes = [type(self.zeroth_order).__name__, type(self.first_order).__name__]
        return {"classes": classes, "late_shapes": [[list(p.shape) for p in ps] for ps in late]}

    def _evaluated(self, closure: Closure, caller: str, run: Callable[[Closure], Any]) -> float:
        """Let `run` evaluate the closure, and add the mean gradient to the late `.grad`."""
        check_closure(closure, caller)
        zeroth_order = self.zeroth_order
        before = zeroth_order._pending
        losses, skipped = (len(before.losses), before.skipped) if before else (0, 0)
        last_step = zeroth_order.last_step
        evaluation = LateGradients(
            closure, _params(zeroth_order), _params(self.first_order), zeroth_order._verifies
        )
        try:
            loss: float = run(evaluation.loss)
        finally:
            after: Any = self._begun(last_step) or zeroth_order._pending
            measured, left_out = (len(after.losses), after.skipped) if after else (0, 0)
            evaluation.close(keep=measured - losses > left_out - skipped)
        return loss


def _params(optimizer: Optimizer) -> list[Tensor]:
    """The optimizer's parameters that require a gradient."""
    groups = optimizer.param_groups
    return [param for group in groups for param in group["params"] if param.requires_grad]


def _check(zeroth_order: Any, first_order: Any) -> None:
    name = type(zeroth_order).__name__
    if not isinstance(zeroth_order, ZerothOrderOptimizer):
        raise TypeError(f"zeroth_order must be one of zoopt's, zoopt.MeZO say, got {name}")
    for refused, reason in _REFUSED.items():
        if isinstance(zeroth_order, refused):
            raise TypeError(f"zeroth_order must not be {name}: {reason}; take zoopt.MeZO, say")
    others = (ZerothOrderOptimizer, Hybrid, LBFGS)
    if not isinstance(first_order, Optimizer) or isinstance(first_order, others):
        raise TypeError(
            f"first_order must be an optimizer that steps from gradients without a closure, "
            f"torch.optim.AdamW say, got {type(first_order).__name__}"
        )
    if zeroth_order._exchange is not None:
        raise ValueError(
            f"zeroth_order must have no process_group, got {name} with one: gradients of the late "
            f"parameters are not exchanged; train with Hybrid in one process"
        )
    early = set(map(id, all_params(zeroth_order.param_groups)))
    for *_, param, param_name in named_params(first_order.param_groups):
        if id(param) in early:
            raise ValueError(
                f"no parameter may be in both optimizers, got {param_name!r}; leave it out of one"
            )
        if not param.requires_grad:
            raise ValueError(
                f"first_order's parameters must require a gradient, got {param_name!r} without; "
                f"unfreeze it with .requires_grad_(), or leave it out"
            )
