"""Linear layers that hold integer codes and train only their scales, for PEQA and QZO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoopt.checks import check_choice, check_positive_int
from zoopt.dtypes import accumulator_dtype
from zoopt.kernels.dispatch import known
from zoopt.nn import dual
from zoopt.nn.linear import RecomputedLinear, gradient_rows, replace_layers
from zoopt.nn.modules import Matrices, Target, foreign_kind, matrices, named
from zoopt.nn.packing import Packed, pack, unpack
from zoopt.nn.stacks import Stack, stacks_of

Form = Literal["linear", "log"]
FORMS: tuple[str, ...] = get_args(Form)
BITS = (3, 4, 8)


class Codes(NamedTuple):
    """A quantised weight: W = s (q - z), or W = s levels[q].

    Attributes:
        codes: q uint8 (m, n).
        scale: s (m, g).
        zero: z uint8 (m, g), or None if there are levels.
        bits: of a code.
        group_size: how many weights of a row share a scale.
        dtype: the original weight's.
        levels: (2^bits,), or None.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    dtype: torch.dtype
    levels: Tensor | None = None


def quantise(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise each group of a row to codes q, a scale s and a zero point z, with W ~ s (q - z).

    s = (max W - min W) / (2^bits - 1) and z = round(-min W / s). The range always includes 0. The
    error is at most s / 2, or at most s for weights at the ends of the range.

    Args:
        weight: (m, n).
        group_size: how many weights of a row share s and z; the last group may be shorter.

    Returns:
        q uint8 (m, n), s (m, g) in the accumulator's dtype, z uint8 (m, g).
    """
    (m, n), wide = weight.shape, accumulator_dtype(weight.dtype)
    groups, most = -(-n // group_size), (1 << bits) - 1
    padded = weight.new_zeros(m, groups * group_size, dtype=wide)
    padded[:, :n] = weight
    grouped = padded.view(m, groups, group_size)
    low, high = grouped.amin(-1).clamp_(max=0.0), grouped.amax(-1).clamp_(min=0.0)
    scale = (high - low) / most
    # Any scale represents a group of zeros; 1 avoids a division by zero.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round_().clamp_(0, most)
    codes = (grouped / scale.unsqueeze(-1)).round_().add_(zero.unsqueeze(-1)).clamp_(0, most)
    return codes.view(m, -1)[:, :n].to(torch.uint8), scale, zero.to(torch.uint8)


def of_groups(values: Tensor, per_group: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Views of values (m, n) and numbers (m, g) of groups of a row that broadcast together."""
    m, n = values.shape
    if n == group_size * per_group.shape[1]:
        return values.view(m, -1, group_size), per_group.unsqueeze(-1)
    return values, per_group.repeat_interleave(group_size, 1)[:, :n]


def integers(codes: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Subtract the zero points (m, g) from the codes (m, n): q - z, (m, n)."""
    made = codes.to(dtype)
    values, zeros = of_groups(made, zero.to(dtype), group_size)
    values.sub_(zeros)
    return made


def times_scale(made: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """Multiply the values (m, n), in place, by their groups' scales (m, g)."""
    values, scales = of_groups(made, scale.to(made.dtype), group_size)
    values.mul_(scales)
    return made


def group_sums(values: Tensor, group_size: int, groups: int) -> Tensor:
    """Sum each group of a row: (m, n) -> (m, g)."""
    m, n = values.shape
    padded = functional.pad(values, (0, groups * group_size - n))
    return padded.view(m, groups, group_size).sum(-1)


class QuantisedLinear(Packed, RecomputedLinear):
    r"""A linear layer of integer codes: W = s (q - z), with one s and one z per group of a row.

    q has 8, 4 or 3 bits and is packed without gaps. q and the zero points z (uint8) are buffers;
    training does not change them. The scales s train (PEQA, Kim et al., 2023, arXiv:2305.14152):

        dL/ds_g = sum_{j in g} dL/dW_j (q_j - z_j)

    With `form="log"` the parameter is t = log s, and W = e^t (q - z). Scales then stay positive
    whatever the step, and a perturbation of t changes s in proportion to s (QZO).

    Bytes: bits / 8 per weight, and 5 per group. W exists only temporarily, in forward and backward.
    The full dL/dW is never stored.

    Args:
        weight: (out, in), which is rounded to nearest; or `Codes`, with their bits and groups.
        bias: the layer's bias, used as it is.
        bits: 3, 4 (default) or 8.
        group_size: how many weights of a row share a scale, at most all of them; default 64.
        form: how the scales are stored, "linear" (default) or "log".

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    codes: Tensor
    zero: Tensor | None
    levels: Tensor | None

    def __init__(
        self,
        weight: Tensor | Codes,
        bias: nn.Parameter | None = None,
        *,
        bits: int = 4,
        group_size: int = 64,
        form: Form = "linear",
    ) -> None:
        if isinstance(weight, Codes):
            given = weight
            check_choice("form", form, FORMS)
        else:
            check_options(bits, group_size, form)
            check_weight("weight", weight)
            group_size = min(group_size, weight.shape[1])
            made = quantise(weight.detach(), bits, group_size)
            given = Codes(*made, bits, group_size, weight.dtype)
        if form == "log" and not known((given.scale > 0).all(), True):
            raise ValueError(
                "scales must be positive under form='log', got some that are not; use form='linear'"
            )
        out_features, in_features = given.codes.shape
        super().__init__(in_features, out_features)
        self.bits, self.group_size, self.form = given.bits, given.group_size, form
        self.dtype = given.dtype
        self.register_buffer("codes", pack(given.codes, given.bits))
        self.register_buffer("zero", given.zero)
        self.register_buffer("levels", given.levels)
        self.scale = nn.Parameter(given.scale.log() if form == "log" else given.scale.clone())
        self.register_parameter("bias", bias)
        #: (rows, dtype) -> a perturbation added to q - z of these rows; set only during a probe.
        self.offset: Callable[[slice, torch.dtype], Tensor] | None = None

    def integers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """q - z of some rows, including the perturbation of a probe in progress; or their
        levels."""
        codes = unpack(self.codes[rows], self.in_features, self.bits)
        if self.zero is None:
            assert self.levels is not None
            return self.levels.to(dtype)[codes.int()]
        values = integers(codes, self.zero[rows], self.group_size, dtype)
        return values if self.offset is None else values.add_(self.offset(rows, dtype))

    def weight_of(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute W (out, in) from scales in the layer's form."""
        scale = values.exp() if self.form == "log" else values
        wide = times_scale(self.integers(slice(None), scale.dtype), scale, self.group_size)
        return wide.to(dtype)

    @torch.no_grad()
    def materialise(self) -> Tensor:
        """W (out, in) in the dtype of the original weight."""
        return self.weight_of(self.scale, self.dtype)

    def _linear(self, x: Tensor) -> Tensor:
        return self._recomputed(x, self.scale)

    def _gradient(self, values: Tensor, grad: Tensor, tokens: Tensor) -> Tensor:
        made = torch.empty_like(values)
        for run, dense in gradient_rows(grad, tokens, values.dtype):
            dense.mul_(self.integers(run, values.dtype))
            sums = group_sums(dense, self.group_size, values.shape[1])
            # W = s (q - z), or e^t (q - z) with s = e^t.
            made[run] = sums * values[run].exp() if self.form == "log" else sums
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> QuantisedLinear:
        """As in nn.Module, but scales stay in float32 or float64 if `fn` would narrow them."""
        # What `fn` makes of the weight that the codes stand for.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        self._apply_but_not_narrow("scale", fn, recurse)
        return self

    def extra_repr(self) -> str:
        """The sizes, bits and groups."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"


class QuantisedStack(Packed, Stack):
    """A bare parameter of matrices, quantised as in `QuantisedLinear`; its scales replace it."""

    codes: Tensor
    zero: Tensor

    def __init__(
        self, matrices: Matrices, owner: nn.Module, *, bits: int, group_size: int, form: Form
    ) -> None:
        super().__init__(matrices, owner)
        weight, (count, m, n) = matrices.param.detach(), self.stacked
        group_size = min(group_size, n)
        self.bits, self.group_size, self.form = bits, group_size, form
        self.dtype = weight.dtype
        codes, self._start, zero = quantise(weight.reshape(count * m, n), bits, group_size)
        self.register_buffer("codes", pack(codes, bits))
        self.register_buffer("zero", zero)

    def integers(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """q - z of some rows; the rows of all matrices are counted through."""
        codes = unpack(self.codes[rows], self.stacked[2], self.bits)
        return integers(codes, self.zero[rows], self.group_size, dtype)

    def _make(self, original: Tensor) -> Tensor:
        return dual.apply(_Scaled, original, self).view(self.stacked)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The initial scales, (E m, g)."""
        scale = self._start.log() if self.form == "log" else self._start
        return scale.to(weight.dtype)


class _Scaled(torch.autograd.Function):
    """s -> W = s (q - z), (E m, n)."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, layer: QuantisedStack) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.layer = layer
        wide = scale.exp() if layer.form == "log" else scale
        values = layer.integers(slice(None), wide.dtype)
        return times_scale(values, wide, layer.group_size).to(layer.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [scale], layer = ctx.saved_tensors, ctx.layer
        dense = grads[0].to(scale.dtype) * layer.integers(slice(None), scale.dtype)
        sums = group_sums(dense, layer.group_size, scale.shape[1])
        return sums * scale.exp() if layer.form == "log" else sums, None


def check_options(bits: int, group_size: int, form: str) -> None:
    """Raise unless bits, group size and form are valid."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    check_positive_int("group_size", group_size)
    check_choice("form", form, FORMS)


def check_weight(name: str, weight: Tensor) -> None:
    """Raise unless a weight has elements, and their range is finite in the accumulator's dtype."""
    values, wide = weight.detach(), accumulator_dtype(weight.dtype)
    # A weight on the meta device has no values; the planner's are.
    has_values = bool(values.numel()) and not values.is_meta
    finite = not has_values or known((values.amax().to(wide) - values.amin()).isfinite(), True)
    if not values.numel() or not finite:
        fault = "NaN or an infinite range" if values.numel() else f"shape {tuple(values.shape)}"
        raise ValueError(
            f"a weight to quantise must have elements, finite ones, got {fault} for {name!r}; "
            f"choose layers by target without it"
        )


def convert_to_quantised(
    model: nn.Module,
    target: Target = "linear",
    *,
    bits: int = 4,
    group_size: int = 64,
    form: Form = "linear",
) -> nn.Module:
    """Replace each targeted linear layer with a `QuantisedLinear` of its weight.

    Matrices in bare parameters (fused experts) are quantised in the same way. Each forward pass
    dequantises them in full.

    Args:
        model: changed in place.
        target: which layers; as for `zoopt.lowrank.param_groups`.
        bits, group_size, form: as for `QuantisedLinear`.

    Returns:
        The model. `zoopt.nn.merge` turns the layers into plain ones with the same weights.

    Raises:
        TypeError, ValueError: an argument is out of range, no layer matches, or a layer cannot be
            replaced. The model is then unchanged.

    Example:
        >>> zoopt.nn.convert_to_quantised(model, bits=4)
        >>> opt = zoopt.AdamW(zoopt.nn.train_scales(model), lr=1e-5)
    """
    check_options(bits, group_size, form)
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "form": form}

    def build(name: str, weight: Tensor, bias: nn.Parameter | None) -> QuantisedLinear:
        return QuantisedLinear(weight, bias, **options)

    def build_stack(name: str, own: Matrices) -> QuantisedStack:
        return QuantisedStack(own, own.module, **options)

    for name, own in matrices(model, target).items():
        if own.is_layers and foreign_kind(own.module) is not None:
            raise TypeError(
                f"a weight to quantise must be a float one, got {name!r}, which is quantised; take "
                f"its codes over by zoopt.nn.adopt_quantised(model)"
            )
        check_weight(name, own.param)
    return replace_layers(model, target, build, build_stack)


def train_scales(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Freeze everything but the scales of quantised layers, and return the scales by name (PEQA).

    For QZO, quantise with `form="log"` and pass them to `zoopt.MeZO(..., max_projected_grad=100)`.

    Raises:
        ValueError: the model has no quantised layers.
    """
    scales = [module.scale for module in model.modules() if isinstance(module, QuantisedLinear)]
    for module in model.modules():
        for name, stack in stacks_of(module).items():
            if isinstance(stack, QuantisedStack):
                lists: Any = module.parametrizations
                scales.append(lists[name].original)
    if not scales:
        raise ValueError(
            "model must have quantised layers, got none; convert it first by "
            "zoopt.nn.convert_to_quantised(model)"
        )
    model.requires_grad_(False)
    for scale in scales:
        scale.requires_grad_(True)
    return named(model, scales)
