"""Linear layers with a frozen weight, float or quantised, and a sparse change beside it."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.weak import WeakIdKeyDictionary

from zoopt.checks import check_number
from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.batch import Batch
from zoopt.kernels.dispatch import known, launches
from zoopt.kernels.entries.op import sum_entries_
from zoopt.kernels.entries.operands import Sums
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op_scale import scale_
from zoopt.nn.foreign import frozen_dtype, frozen_weight, is_quantised
from zoopt.nn.largest import Largest
from zoopt.nn.linear import RecomputedLinear, check_inside, check_no_hooks, gradient_rows
from zoopt.nn.modules import Target, chosen, named
from zoopt.nn.quantised import QuantisedLinear


class Wanted(NamedTuple):
    """What an optimizer wants to know of the gradient of the whole weight.

    Attributes:
        largest: how many of the inactive entries with the largest |g|.
        at: int32 positions whose gradients it needs.
    """

    largest: int = 0
    at: Tensor | None = None


class Tap:
    """What backward passes tell an optimizer about the gradient of a layer's whole weight, which
    is never stored.

    Attributes:
        asks: what the optimizer wants of the next step, or None.
        picked: int32 positions, from the first backward pass of the gradient.
        picked_finite: whether the gradient from which they come was finite.
        hooked: whether `accumulated` is called, which torch allows only while the delta trains.
    """

    def __init__(self, layer: SparseDeltaLinear) -> None:
        self._layer = weakref.ref(layer)
        self.asks: Callable[[], Wanted | None] = lambda: None
        self.picked: Tensor | None = None
        self.picked_finite = True
        self.hooked = False
        self._gathered: Tensor | None = None
        self._reference: tuple[Tensor, Tensor] | None = None
        self._version = self._pass = -1

    @property
    def layer(self) -> SparseDeltaLinear:
        """The layer."""
        layer = self._layer()
        if layer is None:
            raise RuntimeError("the layer of a sparse delta must exist, got one that is gone")
        return layer

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's, (out, in)."""
        return self.layer.out_features, self.layer.in_features

    def begin(self) -> None:
        """Begin the backward of one of the layer's calls. The first one of a backward pass drops
        what was gathered and picked for a gradient that is gone."""
        current, grad = torch._C._current_graph_task_id(), self.layer.delta.grad
        if current != self._pass and (grad is None or grad._version != self._version):
            self._gathered = self.picked = None
        self._pass = current

    def gather(self, values: Tensor) -> None:
        """Add the gradients at the wanted positions."""
        self._gathered = values if self._gathered is None else self._gathered + values

    def accumulated(self, delta: Tensor) -> None:
        """Note the gradient as backward has left it."""
        grad = delta.grad
        if grad is not None:
            place = grad.abs().argmax(0, keepdim=True)
            self._version, self._reference = grad._version, (place, grad[place])

    @property
    def has_gathered(self) -> bool:
        """Whether there are gradients at the wanted positions."""
        return self._gathered is not None and self._reference is not None

    def gathered(self, grad: Tensor) -> Tensor | None:
        """The gradients at the wanted positions; clipped or unscaled as `grad` has been since."""
        if self._gathered is None or self._reference is None:
            return None
        place, before = self._reference
        factor = torch.where(before == 0, torch.ones_like(before), grad[place] / before)
        return self._gathered * factor

    def stepped(self) -> None:
        """Drop what has been used."""
        self.picked = self._gathered = None


def gathered_together(taps: Sequence[Tap], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """`Tap.gathered` of several layers; on a GPU by a few operations, however many they are."""
    found = list[Tensor | None]([None] * len(taps))
    held = [
        (i, tap._gathered, *tap._reference)
        for i, tap in enumerate(taps)
        if tap._gathered is not None and tap._reference is not None
    ]
    if len(held) < 2 or not launches(grads[0]):
        return [tap.gathered(grad) for tap, grad in zip(taps, grads, strict=True)]
    members, values, places, before = zip(*held, strict=True)
    keys = [NoiseKey(0, i) for i in members]  # Nothing is drawn.
    now, squares = kept(before[0].new_zeros, 2, len(held))
    columns = (torch.cat(places).to(torch.int32), now, squares)
    sums = [Sums(*own) for own in zip(*(torch.split(each, 1) for each in columns), strict=True)]
    sum_entries_(Batch([grads[i] for i in members], keys, reads=True), sums)
    old = torch.cat(before)
    scaled = [kept(torch.empty_like, own) for own in values]
    once(torch._foreach_copy_, scaled, list(values))
    scale_(Batch(scaled, keys), torch.where(old == 0, 1.0, now / old))
    for i, own in zip(members, scaled, strict=True):
        found[i] = own
    return found


_taps: Any = WeakIdKeyDictionary()


def tap_of(param: Tensor) -> Tap | None:
    """The tap of the layer whose `delta` the parameter is; None for any other parameter."""
    tap: Tap | None = _taps.get(param)
    return tap


class SparseDeltaLinear(RecomputedLinear):
    r"""A linear layer y = x (W0 + D)^T + bias with a frozen W0 and a sparse D.

    D has k = density m n entries that may be nonzero. Their values, `delta` (k,), train; their
    positions, `index` (k,), are int32 and row-major. The first backward pass chooses those with the
    largest |dL/dW|. `zoopt.SparseDeltaAdamW` replaces some of them regularly; with any other
    optimizer they stay.

    W0 + D exists only temporarily, in forward and backward. dL/dW is computed a few rows at a time,
    and only what is needed of it is kept.

    Bytes: 8 per entry of D, besides the base.

    Args:
        base: the layer whose weight is W0: a `QuantisedLinear`, an nn.Linear, or a quantised layer
            of torchao or bitsandbytes. It becomes a submodule, and is frozen.
        density: the share of entries of D, in (0, 1]; at least one. Default 0.01.
        entries: how many entries D has, instead of a density.

    Raises:
        TypeError, ValueError: a base of another kind, or an argument out of range.
    """

    index: Tensor

    def __init__(
        self, base: nn.Module, density: float = 0.01, *, entries: int | None = None
    ) -> None:
        check_number("density", density, low=0.0, high=1.0, open_low=True)
        m, n, dtype = checked_base(base)
        if entries is not None and not (type(entries) is int and 0 <= entries <= m * n):
            raise ValueError(
                f"entries must be an int from 0 to {m * n}, as many as the base has weights, got "
                f"{entries!r}; pass fewer, or a density"
            )
        super().__init__(n, m)
        self.base = base.requires_grad_(False)
        device = next(tensor.device for tensor in [*base.parameters(), *base.buffers()])
        count, wide = entries, accumulator_dtype(dtype)
        if count is None:
            count = min(m * n, max(1, int(density * m * n)))
        self.delta = nn.Parameter(torch.zeros(count, dtype=wide, device=device))
        self.register_buffer("index", torch.full((count,), -1, dtype=torch.int32, device=device))
        self._placed: bool | None = None
        self._connect()

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The base's bias."""
        bias: nn.Parameter | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def placed(self) -> bool:
        """Whether D's positions have been chosen."""
        if self._placed is None:
            self._placed = bool(known((self.index >= 0).all(), False))
        return self._placed

    def place(self, index: Tensor) -> None:
        """Set D's positions, (k,)."""
        self.index.copy_(index)
        self._placed = True

    def weight_of(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """W0 + D, (out, in), with those values (k,) in D; the sum is rounded once."""
        w = frozen_weight(self.base, dtype)
        if not self.placed and known(values.any(), False):
            raise RuntimeError(
                "a sparse delta must have positions before its values move, got none yet; run "
                "loss.backward() once, which chooses them, or set them by layer.place(index)"
            )
        if self.placed:
            flat, places = w.view(-1), self.index.long()
            flat[places] = (flat[places].to(values.dtype) + values).to(dtype)
        return w

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """W0 + D (out, in) in the base's dtype."""
        return self.weight_of(self.delta, frozen_dtype(self.base))

    def _linear(self, x: Tensor) -> Tensor:
        return self._recomputed(x, self.delta)

    def _gradient(self, values: Tensor, grad: Tensor, tokens: Tensor) -> Tensor:
        """dL/dW at D's positions, (k,). The first time it chooses them; and it tells the tap what
        the optimizer wants of dL/dW."""
        tap = tap_of(self.delta)
        if tap is None or not tap.hooked:
            tap = self._connect(tap)
        tap.begin()
        wide = self.delta.dtype
        if not self.placed:
            first, finite = self._largest(grad, tokens, self.delta.numel(), None)
            if not finite:
                return torch.full_like(self.delta, torch.nan)
            self.place(first)
        active, wanted = self.index.long(), tap.asks() or Wanted()
        own, others = torch.zeros_like(self.delta), None
        at = None if wanted.at is None else wanted.at.long()
        if at is not None:
            others = torch.zeros(at.numel(), dtype=wide, device=own.device)
        for start, dense in self._rows(grad, tokens):
            _read(own, dense, active, start)
            if at is not None and others is not None:
                _read(others, dense, at, start)
        if others is not None:
            tap.gather(others)
        if wanted.largest and tap.picked is None:
            picked, tap.picked_finite = self._largest(grad, tokens, wanted.largest, active)
            tap.picked = picked.to(torch.int32)
        return own

    def _rows(self, grad: Tensor, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
        """dL/dW in the accumulator's dtype, a few rows at a time: first position, (rows n,)."""
        for run, dense in gradient_rows(grad, tokens, self.delta.dtype):
            yield run.start * self.in_features, dense.view(-1)

    def _largest(
        self, grad: Tensor, tokens: Tensor, count: int, active: Tensor | None
    ) -> tuple[Tensor, bool]:
        """The positions of the `count` largest |dL/dW| of entries that are not active, int64; and
        whether all of dL/dW is finite."""
        best, finite = Largest(count, self.delta, without=active), True
        for start, dense in self._rows(grad, tokens):
            scores = dense.abs()
            finite = finite and bool(known(scores.amax().isfinite(), True))
            best.add(scores.nan_to_num_(0.0), start)
        return best.positions, finite

    def _connect(self, tap: Tap | None = None) -> Tap:
        """Let optimizers find the layer by its parameter."""
        tap = _taps[self.delta] = tap or Tap(self)
        if self.delta.requires_grad:
            self.delta.register_post_accumulate_grad_hook(tap.accumulated)  # type: ignore[no-untyped-call]
            tap.hooked = True
        return tap

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._connect()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._placed = None

    def _apply(self, fn: Any, recurse: bool = True) -> SparseDeltaLinear:
        """As in nn.Module, but D stays in float32 or float64 if `fn` would narrow it."""
        self._apply_but_not_narrow("delta", fn, recurse)
        return self

    def extra_repr(self) -> str:
        """The sizes, and the entries of D."""
        return f"{super().extra_repr()}, entries={self.delta.numel()}"


def checked_base(base: nn.Module) -> tuple[int, int, torch.dtype]:
    """The sizes m, n and the dtype of a base's weight; raises unless a delta can lie beside it."""
    dtype = frozen_dtype(base)
    m, n = base.out_features, base.in_features
    if not isinstance(m, int) or not isinstance(n, int) or m * n >= 2**31:
        raise ValueError(
            f"base must have fewer than 2^31 weights, got {m} x {n}: indices are int32"
        )
    if not m * n:
        raise ValueError(
            f"base must have weights, got {m} x {n}; choose layers by target without it"
        )
    return m, n, dtype


def _read(out: Tensor, dense: Tensor, positions: Tensor, start: int) -> None:
    """out[e] <- dense[positions[e] - start] for the positions that lie in dense."""
    inside = (positions >= start) & (positions < start + dense.numel())
    values = dense[(positions - start).clamp_(0, dense.numel() - 1)]
    torch.where(inside, values, out, out=out)


def convert_to_sparse_delta(
    model: nn.Module, target: Target | None = None, *, density: float = 0.01
) -> list[tuple[str, nn.Parameter]]:
    """Give layers with a frozen weight, float or quantised, a sparse delta that trains (SpIEL).

    Everything else in the model is frozen.

    Args:
        model: changed in place.
        target: which layers, quantised or plain; as for `zoopt.lowrank.param_groups`. Default: all
            quantised layers of the model, those of zoopt, torchao and bitsandbytes.
        density: as for `SparseDeltaLinear`.

    Returns:
        The deltas by name, for `zoopt.SparseDeltaAdamW`.

    Raises:
        TypeError, ValueError: an argument is out of range, no layer matches, or one has a sparse
            delta already. The model is then unchanged.

    Example:
        >>> zoopt.nn.convert_to_quantised(model, bits=4)
        >>> opt = zoopt.SparseDeltaAdamW(zoopt.nn.convert_to_sparse_delta(model), lr=1e-4)
    """
    check_number("density", density, low=0.0, high=1.0, open_low=True)
    layers = _layers(model, target)
    for name, module in model.named_modules():
        if isinstance(module, SparseDeltaLinear) and (f"{name}.base" if name else "base") in layers:
            raise ValueError(
                f"layers must not have a sparse delta yet, got {name!r}, which has one; remove it "
                f"first, by zoopt.nn.remove_sparse_delta(model), or choose layers by target "
                f"without it"
            )
    check_inside(layers)
    check_no_hooks(layers)
    for name, layer in layers.items():
        if type(layer) is NonDynamicallyQuantizableLinear:
            raise TypeError(
                f"a layer must be called by its owner to have a sparse delta, got {name!r} of "
                f"torch's attention, which reads its weight; choose layers by target without it"
            )
        checked_base(layer)
    built = {name: SparseDeltaLinear(layer, density) for name, layer in layers.items()}
    model.requires_grad_(False)
    for name, layer in built.items():
        model.set_submodule(name, layer.train(layers[name].training))
        layer.delta.requires_grad_(True)
    return named(model, (layer.delta for layer in built.values()))


def _layers(model: nn.Module, target: Target | None) -> dict[str, nn.Module]:
    """The layers that `target` names, except those in several places of the model."""
    places = collections.Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantisedLinear) and places[id(module)] == 1
    }
    if target is not None:
        return chosen(model, found, target)
    found = {name: module for name, module in found.items() if is_quantised(module)}
    if not found:
        raise ValueError(
            "model must have quantised layers, got none; convert it first by "
            "zoopt.nn.convert_to_quantised(model), or choose layers by target"
        )
    return found


def remove_sparse_delta(model: nn.Module) -> nn.Module:
    """Replace each `SparseDeltaLinear` by its base: the layers as they were, bit for bit.

    Returns:
        The model; if it is itself such a layer, its base.
    """
    if isinstance(model, SparseDeltaLinear):
        return model.base
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseDeltaLinear):
            model.set_submodule(name, module.base)
    return model
