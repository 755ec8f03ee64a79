"""Every variant of every Triton kernel that the package can ask for, as calls of its operations.

A variant is run under `stub_gpu`: what is compiled is what the launch path asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from bench.stub_gpu import Launch, launches, stub_gpu
from zoopt import kernels
from zoopt.bench.kernels_first_order import BYTES, NUMBERS, RANK, moment
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.adam.op_average import load_
from zoopt.kernels.batch import Batch
from zoopt.kernels.descent.op import curve_, descend_, small_elements, turn_
from zoopt.kernels.descent.rule import Rule, Shape
from zoopt.kernels.entries.op import adam_entries_, cover_entries_, sum_entries_
from zoopt.kernels.entries.operands import Cover, Entries, Sums
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.product.op_batch import add_products_
from zoopt.kernels.product.op_scale import scale_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DISTRIBUTIONS = ("normal", "rademacher", "masked normal", "masked rademacher")
#: Directions of a call.
_DRAWS = {"apply": 1, "apply_4": 4, "apply_10": 10, "momentum": 1, "momentum_10": 10, "add": 1}
_PERTURBED = ("perturb", "perturb_alone", "perturb_out", "perturb_rows", "perturb_scaled")
_ROUNDED = (*_DRAWS, "adam_window")
#: Updates by shape and rule, and the bytes that they read and write beside theta.
_DESCENTS = {
    "descend_adam": (Shape(), Rule("adam", (0.9, 0.1, 0.99, 0.01, 0.5, -0.1, 1e-8)), 16),
    "descend_sign": (Shape(), Rule("sign", (-0.1,)), 0),
    "descend_kept": (Shape("kept"), Rule("momentum", (0.9, -0.1)), 9),
    "descend_scaled": (Shape("scaled"), Rule(), 4),
    "descend_cone": (Shape("cone", 0.1, 0.1), Rule(), 4),
}
#: Changes of float32 state.
_STATES = ("curve", "turn")
_PRODUCTS = ("product", "product_gradient", "scaled")
_MATRICES = ("sm3", "sm3_momentum", "products", *_PRODUCTS)
_MATRICES += tuple(f"{name}_batch" for name in _PRODUCTS)
#: A matrix of whole vectors and blocks, small.
_SHAPE = (128, 256)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel as it is launched: the operation, theta's dtype, and what shapes it.

    `distribution` begins with "masked" where the density is below 1; it is "-" of kernels without
    directions, as `format` is of kernels without moments. "alone" is an operation on a tensor, all
    others are on batches of two, where there are batches; those of products are called "batch".
    "adam" has a gradient of the dtype, in whose place its direction goes, and no theta;
    "adamw_odd" is "adamw" with a tensor that is not of whole vectors of memory.
    "adam_norms" sums squares as well, and its direction is float32. "product" is the product alone,
    "product_gradient" has both of the gradient's terms besides, and "scaled" a channel's scale
    alone. "multiply" has a factor for each tensor. "entries" are at positions of their own, whose
    weights and gradients are read and written one by one.
    """

    kernel: str
    dtype: str
    distribution: str = "-"
    format: str = "-"
    rounding: str = "nearest"

    @property
    def bytes_per_element(self) -> float:
        """What is read and written of tensors of theta's size."""
        item = DTYPES[self.dtype].itemsize
        if self.format != "-":
            if self.kernel in ("store", "load"):
                return item + BYTES[self.format]
            others = {"adam_norms": 4, **dict.fromkeys(("adam", "lion", "lerp"), item)}
            beside = others.get(self.kernel, 2 * item)
            return 2 * self._moments * BYTES[self.format] + item + beside
        beside = {"momentum": 8, "momentum_10": 8, "add": 4, "sm3": item, "sm3_momentum": item + 8}
        beside |= {"product_gradient": item, "scaled": item}
        beside |= {name: bytes_ for name, (_, _, bytes_) in _DESCENTS.items()}
        beside |= {"small": 1 - item}
        return 2 * item + beside.get(self.kernel.removesuffix("_batch"), 0)

    @property
    def bytes_of_code(self) -> float:
        """Of one moment of an element, if it is a code."""
        return BYTES[self.format] if self.format in ("int8", "int4") else 0.0

    @property
    def bytes_beside_codes(self) -> float:
        """What is read and written of tensors of theta's size, except codes."""
        passes = 1 if self.kernel in ("store", "load") else 2 * self._moments
        return self.bytes_per_element - passes * self.bytes_of_code

    @property
    def _moments(self) -> int:
        return 1 if self.kernel in ("lion", "lerp", "store", "load") else 2

    def launch(self, target: str) -> Launch:
        """What the operation launches for a key of `TARGETS`, compiled.

        Of several launches (numbers that go to memory, say) the one with the operation's kernel.
        """
        with stub_gpu(target):
            recorded = launches(self.call(), compiled=True)
        return recorded.launches[-1]

    def call(self) -> Callable[[], Any]:
        """The operation on tensors of zeros."""
        theta = torch.zeros(_SHAPE, dtype=DTYPES[self.dtype])
        if self.format != "-":
            return self._adam(theta)
        if self.distribution == "-":
            return self._matrix(theta)
        return self._noise(theta)

    def _noise(self, theta: Tensor) -> Callable[[], Any]:
        density = 0.25 if self.distribution.startswith("masked") else 1.0
        kind: Any = self.distribution.removeprefix("masked ")
        key = NoiseKey(1 << 63, 1 << 31, distribution=kind, density=density)
        if self.kernel == "perturb_alone":
            return functools.partial(kernels.perturb, theta, 1e-3, key=key, draw=3, out=theta)
        if self.kernel == "perturb_rows":
            rows = torch.zeros(4, dtype=torch.int64)
            return functools.partial(kernels.perturb_rows, theta, rows, 1e-3, key=key, draw=3)
        tensors = (theta, theta.clone())
        batch = Batch(tensors, (key, dataclasses.replace(key, stream=2)))
        wide = [torch.zeros(_SHAPE), torch.zeros(_SHAPE)]
        options: dict[str, Any]
        if self.kernel == "perturb":
            return functools.partial(kernels.perturb, batch, 1e-3, draw=3, out=tensors)
        if self.kernel == "perturb_out":
            return functools.partial(kernels.perturb, batch, 1e-3, draw=3)
        if self.kernel == "perturb_scaled":
            scales = [torch.zeros(len(theta)) for theta in tensors]
            options = {"draw": 3, "row_scale": scales, "out": tensors}
            return functools.partial(kernels.perturb, batch, 1e-3, **options)
        if self.kernel.startswith("writes"):
            rule: Any = "sign" if self.kernel == "writes_estimate" else "none"
            draw = 3 if self.rounding == "stochastic" else None
            terms: Any = ((3,), (0.1,), 1.0, draw, rule, (3,), (0.1,))
            return functools.partial(kernels.write_each_, batch, [kernels.Write(*terms)])
        options = {"decay": 0.9, "rounding": self.rounding}
        if self.kernel == "adam_window":
            args = ([0.1], [1.0], [0.1], [0.1], [True])
            options |= {"eps": 1e-8, "step_size": -0.1, "draws": [3]}
            return functools.partial(kernels.adam_window_, batch, *args, **options)
        if self.kernel in _DESCENTS:
            return self._descent(batch, options)
        if self.kernel == "curve":
            return functools.partial(curve_, batch, [0.1], draws=[3], base=0.9)
        if self.kernel == "turn":
            numbers = {"radial": 0.1, "keep": 0.9, "grow": 0.1}
            return functools.partial(turn_, batch, [0.1], draws=[3], **numbers)
        if self.kernel == "small":
            masks = [torch.zeros(_SHAPE, dtype=torch.bool) for _ in tensors]
            limits = list(torch.zeros(4, 2).select(1, 0)[:2])
            return functools.partial(small_elements, batch, limits, masks)
        options["draws"] = range(_DRAWS[self.kernel])
        coefficients = [0.1] * _DRAWS[self.kernel]
        if self.kernel == "add":
            return functools.partial(kernels.add_, batch, wide, coefficients, **options)
        if self.kernel.startswith("momentum"):
            options |= {"momentum": 0.9, "step_size": -0.1}
            sums = (coefficients, coefficients)
            return functools.partial(kernels.momentum_, batch, wide, *sums, **options)
        return functools.partial(kernels.apply_, batch, coefficients, **options)

    def _descent(self, batch: Batch, options: dict[str, Any]) -> Callable[[], Any]:
        shape, rule, _ = _DESCENTS[self.kernel]
        names = ["first", "second"][: rule.states] + ["beside"] * (shape.kind != "plain")
        state = {name: [torch.zeros(_SHAPE) for _ in batch.tensors] for name in names}
        if shape.kind == "kept":
            state["beside"] = [values.bool() for values in state["beside"]]
        options |= {"draws": [3], "shape": shape, "rule": rule}
        return functools.partial(descend_, batch, [0.1], [0.1], **state, **options)

    @property
    def _rounding(self) -> dict[str, Any]:
        draw = 3 if self.rounding == "stochastic" else None
        return {"key": NoiseKey(1, 2), "rounding_draw": draw}

    def _adam(self, theta: Tensor) -> Callable[[], Any]:
        odd = self.kernel == "adamw_odd"
        tensors = [theta, theta.new_zeros(999) if odd else theta.clone()]
        batch = Batch(tensors, [NoiseKey(1, 2), NoiseKey(1, 3)])
        moments = [
            [moment(tensor, self.format, signed=signed) for tensor in tensors]
            for signed in (True, False)
        ]
        draw = 3 if self.rounding == "stochastic" and self.format != "float32" else None
        options: dict[str, Any] = {"moment_draw": draw}
        if self.kernel == "lion":
            averages = {"look": (0.9, 0.1), "keep": (0.99, 0.01), "signs": True, "out": tensors}
            return functools.partial(kernels.average_, batch, moments[0], **averages, **options)
        if self.kernel == "lerp":
            return functools.partial(kernels.lerp_, batch, moments[0], 0.1, out=tensors, **options)
        if self.kernel == "load":
            return functools.partial(load_, batch, moments[1])
        if self.kernel == "store":
            return functools.partial(kernels.store_, batch, moments[1], **options)
        options |= NUMBERS
        if self.kernel.startswith("adamw"):
            rounding_draw = self._rounding["rounding_draw"]
            gradients = [torch.zeros_like(tensor) for tensor in tensors]
            return functools.partial(
                kernels.adamw_,
                *(batch, gradients, *moments),
                decay=0.9,
                rounding_draw=rounding_draw,
                **options,
            )
        if self.kernel == "adam":
            return functools.partial(kernels.adam_, batch, *moments, out=tensors, **options)
        norms = torch.zeros(2, 2 * len(theta))
        return functools.partial(kernels.adam_, batch, *moments, norms=norms, **options)

    def _entries(self, theta: Tensor) -> Callable[[], Any]:
        """A quarter of the entries of two tensors; all, where deltas lie beside a weight."""
        batch = Batch((theta, theta.clone()), [NoiseKey(1, 2), NoiseKey(1, 3)])
        gradients = [torch.zeros_like(tensor) for tensor in batch.tensors]
        beside = self.kernel == "entries_beside"
        count = theta.numel() // (1 if beside else 4)
        index = [torch.zeros(count, dtype=torch.int32) for _ in gradients]
        wide = [[torch.zeros(count) for _ in gradients] for _ in range(2)]
        if self.kernel == "entries_sum":
            sums = [[values.bfloat16() for values in own] for own in wide]
            operands = [Sums(*own) for own in zip(index, *sums, strict=True)]
            return functools.partial(sum_entries_, batch, operands)
        if self.kernel == "entries_cover":
            bounds = ([torch.zeros(size) for _ in gradients] for size in theta.shape)
            covers = [Cover(*own) for own in zip(index, *bounds, strict=True)]
            return functools.partial(cover_entries_, batch, covers)
        entries = [
            Entries(
                *((None, None) if beside else (own, theta.new_zeros(count))),
                *(state[i] for state in wide),
                torch.zeros(count, dtype=torch.int16),
            )
            for i, own in enumerate(index)
        ]
        return functools.partial(
            adam_entries_,
            *(batch, gradients, entries),
            betas=(0.9, 0.99),
            eps=1e-8,
            rate=-0.1,
            rounding_draw=self._rounding["rounding_draw"],
        )

    def _matrix(self, theta: Tensor) -> Callable[[], Any]:
        gradient = torch.zeros_like(theta)
        if self.kernel.startswith("sm3"):
            accumulators = [torch.zeros(size) for size in theta.shape]
            buffer = torch.zeros(theta.shape) if self.kernel == "sm3_momentum" else None
            options = {"step_size": -0.1, "buffer": buffer, **self._rounding}
            return functools.partial(kernels.sm3_, theta, gradient, accumulators, **options)
        m, n = theta.shape
        kernel = self.kernel.removesuffix("_batch")
        factors = torch.zeros(m, RANK), torch.zeros(n, RANK)
        if self.kernel.startswith("entries"):
            return self._entries(theta)
        if self.kernel == "multiply":
            batch = Batch((theta, theta.clone()), [NoiseKey(1, 2), NoiseKey(1, 3)])
            return functools.partial(scale_, batch, torch.zeros(2))
        if self.kernel == "products":
            batch = Batch((theta, theta.clone()), [self._rounding["key"], NoiseKey(1, 3)])
            left, right = ([each.unsqueeze(0)] * 2 for each in factors)
            rounding_draw = self._rounding["rounding_draw"]
            return functools.partial(add_products_, batch, left, right, rounding_draw=rounding_draw)
        beside: dict[str, Any] = {}
        if kernel != "product":
            beside = {"gradient": gradient, "channel_scale": torch.zeros(m, 1)}
        if kernel == "product_gradient":
            beside |= {"sign_of": factors, "sign_step": 0.1}
        added: tuple[Any, ...] = (None, None) if kernel == "scaled" else factors
        if kernel == self.kernel:
            return functools.partial(
                kernels.add_product_, theta, *added, **beside, **self._rounding
            )
        batch = Batch([theta, theta.clone()], [NoiseKey(1, 2), NoiseKey(1, 3)])
        added = tuple(None if factor is None else [factor] * 2 for factor in added)
        beside = {
            name: operand if name == "sign_step" else [operand] * 2
            for name, operand in beside.items()
        }
        rounding_draw = self._rounding["rounding_draw"]
        return functools.partial(
            kernels.add_product_, batch, *added, **beside, rounding_draw=rounding_draw
        )


def _roundings(dtype: str) -> tuple[str, ...]:
    return ("nearest",) if dtype == "fp32" else ("nearest", "stochastic")


def variants() -> Iterator[Variant]:
    """Every variant that an operation on whole tensors can ask for."""
    for dtype in DTYPES:
        for distribution in DISTRIBUTIONS:
            for kernel in _PERTURBED:
                yield Variant(kernel, dtype, distribution)
            for kernel in _ROUNDED:
                for rounding in _roundings(dtype):
                    yield Variant(kernel, dtype, distribution, rounding=rounding)
            # One kernel for both roundings: each write says which is its own.
            for kernel in ("writes", "writes_estimate"):
                yield Variant(kernel, dtype, distribution, rounding=_roundings(dtype)[-1])
        for kernel in _DESCENTS:
            for rounding in _roundings(dtype):
                yield Variant(kernel, dtype, "normal", rounding=rounding)
        yield Variant("small", dtype, "normal")
        yield Variant("multiply", dtype)
        for rounding in _roundings(dtype):
            yield Variant("entries", dtype, rounding=rounding)
        for kernel in ("entries_sum", "entries_cover"):
            yield Variant(kernel, dtype)
        for kernel in _MATRICES:
            for rounding in _roundings(dtype):
                # To nearest a product alone is BLAS's.
                if rounding == "stochastic" or kernel not in ("product", "product_batch"):
                    yield Variant(kernel, dtype, rounding=rounding)
        for form in get_args(Format):
            for rounding in ("nearest", "stochastic"):
                if dtype != "fp32" or form != "float32" or rounding == "nearest":
                    yield Variant("adamw", dtype, format=form, rounding=rounding)
    for kernel in _STATES:
        yield Variant(kernel, "fp32", "normal")
    yield Variant("entries_beside", "fp32")
    for form in get_args(Format):
        for kernel in ("adam", "adam_norms"):
            yield Variant(kernel, "fp32", format=form, rounding="stochastic")
        for kernel in ("adam", "lion", "lerp", "store"):
            yield Variant(kernel, "bf16", format=form, rounding="stochastic")
        yield Variant("load", "bf16", format=form)
    for form in ("bfloat16", "int4"):
        yield Variant("adamw_odd", "bf16", format=form, rounding="stochastic")
