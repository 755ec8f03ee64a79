"""CoFiTune: only some layers train, and neurons that matter for old knowledge train less."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoopt.ambient import opaque
from zoopt.distributed.checkpoint import called_by_checkpoint, check_nothing_left_out
from zoopt.distributed.seed import SharedSeed
from zoopt.dtypes import accumulator_dtype, resolved_rounding
from zoopt.groups import all_params
from zoopt.kernels.dispatch import is_fake, known
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op import add_product_
from zoopt.nn.losses import functions
from zoopt.nn.losses import gradients as loss_gradients
from zoopt.nn.modules import Target, is_conv1d, linear_layers
from zoopt.noise import stream
from zoopt.selection.saved import check_plain, check_saved, check_vectors
from zoopt.warn import warn
from zoopt.wrapper import Wrapper, with_closure


def normalised_importance(gates: Tensor) -> Tensor:
    """|tanh((|s| - mean) / std)| over the neurons of a layer, (m,) -> (m,) in [0, 1].

    Args:
        gates: s, the derivatives of the loss with respect to a factor on each neuron's output.
    """
    sizes = gates.abs()
    spread = sizes.std(correction=0)
    valued = not is_fake(sizes) and bool(sizes.any())
    if valued and not 1e-6 * float(sizes.max()) < float(spread) < math.inf:
        # Equal but for rounding, or their squares are outside the dtype's range.
        sizes = sizes.double() / float(sizes.max())
        spread = sizes.std(correction=0)
    standard = (sizes - sizes.mean()) / spread
    own = torch.where(spread > 0, standard.tanh().abs(), torch.zeros_like(sizes))
    return own.to(gates.dtype)


class CoFiTune(Wrapper):
    r"""CoFiTune (Zhang et al., 2024, arXiv:2404.10306), over any first-order optimizer.

    Coarse: only the linear layers that match `target` train, for example the up and down
    projections of middle layers. Fine: each of their neurons i (a row of W (m, n) and its bias) has
    an importance I_i in [0, 1] for what the model already knows. Its step is reduced by I_i:

        W <- W_old + (1 - I) (W_new - W_old),    W_new after the optimizer's step

    The mask applies to the step and not to the gradient, because Adam divides by the size of the
    gradient and would cancel a constant factor. I is computed once, at construction, from `losses`.
    With s_i the derivative of their mean with respect to a factor on neuron i's output, which is
    sum_j W_ij G_ij,

        I = |tanh((|s| - mean |s|) / std |s|)|    over the neurons of a layer

    It hooks the optimizer's `step`, and holds a copy of the trained layers during the step. Between
    steps it keeps one number per neuron. Save `state_dict` along with the optimizer's. A run that
    loads both continues exactly.

    Args:
        model: its other parameters are frozen until `remove`.
        optimizer: an existing one, made from the model's parameters.
        losses: functions that represent what the model should keep. Each returns the loss of a
            batch with its graph. The paper uses the divergence between two forward passes under
            dropout.
        target: the layers that train; as for `zoopt.lowrank.param_groups`.
        seed: seed of the bits that round 16-bit weights; default torch.initial_seed().

    Raises:
        TypeError, ValueError: the optimizer is already under CoFiTune or another wrapper, is
            OwLore, is fused into the backward pass, or does not hold the layers; `target` matches
            nothing; there are no losses, or gradients of one are not finite.

    Differs from the authors' code, which masks the gradient.

    Example:
        >>> opt = zoopt.AdamW(model.named_parameters(), lr=1e-5)
        >>> keep = [lambda batch=batch: model(**batch).loss for batch in general]
        >>> tuned = zoopt.CoFiTune(model, opt, keep, target=["*.layers.[4-7].mlp.*"])
    """

    label = "CoFiTune"
    chooses = True
    from_gradients = True
    unfused = "its steps are not in step()"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        losses: Iterable[Callable[[], Tensor]],
        *,
        target: Target,
        seed: int | None = None,
    ) -> None:
        self._check(optimizer)
        layers = linear_layers(model, target)
        held = set(map(id, all_params(optimizer.param_groups)))
        for name, layer in layers.items():
            if id(layer.weight) not in held:
                raise ValueError(
                    f"optimizer must hold the weights of the layers that train, got one without "
                    f"that of {name!r}; make it of the model's parameters"
                )
            for part, param in layer.named_parameters(recurse=False):
                check_plain(f"{name}.{part}", param)
        self._layers = layers
        self._seed = SharedSeed(seed, type(self).__name__).value
        self._step = 0
        self._required = {param: param.requires_grad for param in model.parameters()}
        self._saved: dict[Tensor, Tensor] = {}
        own = {id(param) for layer in layers.values() for param in layer.parameters(recurse=False)}
        try:
            for param in model.parameters():
                param.requires_grad_(id(param) in own)
            #: name of a layer -> the importance of its neurons.
            self.importance = _importance(layers, losses)
        except BaseException:
            self._release()
            raise
        self._attach(
            optimizer,
            optimizer.register_step_pre_hook(lambda _, *given: self._before_step(*given)),
            optimizer.register_step_post_hook(lambda *_: self._after_step()),
            optimizer.register_load_state_dict_pre_hook(
                lambda _, saved: check_nothing_left_out(
                    saved, remedy="load it inside `with CoFiTune.loading():`"
                )
            ),
        )

    def remove(self) -> None:
        """Undo it: parameters that trained before train again, and steps are not reduced."""
        self._detach()
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The seed, the number of steps taken and the neurons' importance."""
        return {"seed": self._seed, "step": self._step, "importance": dict(self.importance)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from `state_dict`.

        Raises:
            TypeError, ValueError: the state is of other layers, or damaged. Nothing has changed
                then.
        """
        own = {name: len(values) for name, values in self.importance.items()}
        check_saved("CoFiTune", state, "importance")
        check_vectors("importance", state["importance"], own, "layers")
        if missing := own.keys() - state["importance"].keys():
            raise ValueError(
                f"state must be of the same layers, got no importance of {sorted(missing)}; load "
                f"it over the model and target that it was saved with"
            )
        self._seed, self._step = state["seed"], state["step"]
        self.importance = {
            name: state["importance"][name].to(values.device, values.dtype, copy=True)
            for name, values in self.importance.items()
        }

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """A context in which torch.distributed.checkpoint can load an optimizer's state that has
        parts for parameters that do not train."""
        frozen = [param for param, required in self._required.items() if required]
        frozen = [param for param in frozen if not param.requires_grad]
        for param in frozen:
            param.requires_grad_(True)
        try:
            yield
        finally:
            for param in frozen:
                param.requires_grad_(False)

    def _release(self) -> None:
        for param, required in self._required.items():
            param.requires_grad_(required)

    @opaque
    @torch.no_grad()
    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(not torch.equal(param, old) for param, old in self._saved.items()):
            warn(
                "CoFiTune could not hold back the last step, which an error or a signal has ended: "
                "neurons have moved in full; load the weights from before it to undo that"
            )
        closure = with_closure(args, kwargs, lambda closure: closure) is not None
        self._saved = {
            param: param.detach().clone()
            for layer in self._layers.values()
            for param in layer.parameters(recurse=False)
            if closure or param.grad is not None
        }

    @opaque
    @torch.no_grad()
    def _after_step(self) -> None:
        for name, layer in self._layers.items():
            for own, param in layer.named_parameters(recurse=False):
                if param in self._saved:
                    key = NoiseKey(self._seed, stream(f"cofitune {name}.{own}"))
                    across = own == "weight" and is_conv1d(layer)
                    self._hold_back(param, 1.0 - self.importance[name], across, key)
        self._saved.clear()
        if not called_by_checkpoint():  # That call only creates the optimizer's state.
            self._step += 1

    def _hold_back(self, param: Tensor, share: Tensor, across: bool, key: NoiseKey) -> None:
        """W <- W_old + share (W_new - W_old), with a `share` for each row, or column (`across`)."""
        wide, old = accumulator_dtype(param.dtype), self._saved[param]
        theta = old.reshape(len(old), -1).contiguous()
        change = (param.detach().to(wide) - old.to(wide)).reshape(theta.shape).contiguous()
        stochastic = resolved_rounding("auto", param.dtype) == "stochastic"
        add_product_(
            theta,
            None,
            None,
            gradient=change,
            channel_scale=share.to(wide).unsqueeze(0 if across else 1),
            key=key,
            rounding_draw=self._step & 0xFFFFFFFF if stochastic else None,
        )
        param.copy_(theta.view(param.shape))


def _importance(
    layers: dict[str, nn.Module], losses: Iterable[Callable[[], Tensor]]
) -> dict[str, Tensor]:
    """Compute I of each layer's neurons, without touching `.grad`."""
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}  # type: ignore[misc]
    gates: dict[str, Tensor] = {}
    count = 0
    for loss in functions(losses):
        count += 1
        made = loss_gradients(loss, [*weights.values()])
        for (name, weight), gradient in zip(weights.items(), made, strict=True):
            wide = accumulator_dtype(weight.dtype)
            axis = 0 if is_conv1d(layers[name]) else 1
            product = weight.detach().to(wide) * (0.0 if gradient is None else gradient.to(wide))
            own = product.sum(axis)
            gates[name] = gates[name] + own if name in gates else own
    if not count:
        raise ValueError(
            "losses must hold a function at least, got none; pass one for each batch of what the "
            "model is to keep"
        )
    for name, own in gates.items():
        if not known(own.isfinite().all(), True):
            raise ValueError(
                f"losses must have finite gradients, got one that is not for {name!r}; leave out "
                f"batches of which the model makes infinities or NaN"
            )
    return {name: normalised_importance(own / count) for name, own in gates.items()}
