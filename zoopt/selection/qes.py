"""QES: integer weights move by whole codes, and each step carries its rounding error over."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoopt.checks import check_number, check_positive_int, shown
from zoopt.distributed.exchange import Exchange, Job, digest_of
from zoopt.distributed.seed import SharedSeed, several_ranks
from zoopt.kernels.noise.key import check_unsigned
from zoopt.nn.initial import CHUNK
from zoopt.nn.packing import pack, unpack
from zoopt.nn.quantised import QuantisedLinear
from zoopt.noise import normal, stream
from zoopt.selection.saved import check_saved
from zoopt.warn import warn
from zoopt.zeroth_order.engine.closure import PinnedRNG, check_closure, loss_values
from zoopt.zeroth_order.engine.narrow import JudgesLosses
from zoopt.zeroth_order.engine.shared import refuse

#: How many steps pass between comparisons of the ranks' codes.
_COMPARED_EVERY = 100
#: A step's directions: pairs of a draw and the factor of its direction, in codes.
Step = list[tuple[int, float]]


def carried(
    steps: list[Step], direction: Callable[[int], Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Replay `steps`, and return the last one's move in whole codes and its rounding error.

        e_0 = 0,    d_i = round(u_i + e_{i-1}),    e_i = u_i + e_{i-1} - d_i,
        u_i = sum of the step's weights times their directions

    Args:
        steps: oldest first.
        direction: draw -> z, of like's shape.
        like: the results have its shape and device.

    Returns:
        d and e of the last step.
    """
    error, whole = torch.zeros_like(like), torch.zeros_like(like)
    for step in steps:
        for draw, weight in step:
            error.add_(direction(draw) * weight)
        whole = error.round()
        error.sub_(whole)
    return whole, error


class QES(JudgesLosses):
    r"""Evolution strategy on the codes of quantised layers (Quantized Evolution Strategies).

    It trains the codes q of a model's `zoopt.nn.QuantisedLinear` layers, with forward passes only.
    z is standard normal and new for each step and probe. All quantities are in units of codes:

        g_j = [L(q + sigma z_j) - L(q - sigma z_j)] / (2 sigma)
        u_t = -lr mean_j g_j z_j
        q <- clamp(q + round(u_t + e_{t-1})),    e_t = u_t + e_{t-1} - round(u_t + e_{t-1})

    Steps are far smaller than one code. Without the carried error e, nothing would ever move. e is
    not stored. Each step recomputes it, layer by layer, from the seeds and g of the last `window`
    steps, starting with e = 0. It is exact during the first `window` steps. After that, older
    remainders are dropped; each is at most half a code. Scales and zero points do not change.

    State: two numbers for each probe of the window. A step regenerates all directions of the window
    for each layer.

    Args:
        model: has `QuantisedLinear` layers; nothing else in it changes.
        lr: in codes; a g of 1 moves a code by lr z.
        sigma: distance of the probes, in codes; default 0.5.
        num_probes: directions per step; default 1.
        window: number of past steps from which e is recomputed; default 100.
        max_projected_grad: clip each g to this magnitude; default 100. None: no clipping.
        seed: default torch.initial_seed(), rank 0's in all processes.
        process_group: ranks that each have a batch of their own and take the steps together, from
            the means of their losses; they exchange nothing else. Default None: this process takes
            its steps alone.

    Raises:
        TypeError, ValueError: an argument is out of range; the model has no quantised layers.

    Probes move by fractions of a code, which are added when a layer computes its weight. If a probe
    is not finite, the step moves nothing. Losses of 16 bits that hardly differ are warned of, once.
    All evaluations of a step see the same random numbers.

    Example:
        >>> zoopt.nn.convert_to_quantised(model, bits=4)
        >>> opt = zoopt.QES(model, lr=1e-3)
        >>> loss = opt.step(lambda: model(**batch).loss)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        sigma: float = 0.5,
        num_probes: int = 1,
        window: int = 100,
        max_projected_grad: float | None = 100.0,
        seed: int | None = None,
        process_group: Job = None,
    ) -> None:
        check_number("lr", lr, low=0.0)
        check_number("sigma", sigma, low=0.0, open_low=True)
        check_positive_int("num_probes", num_probes)
        check_positive_int("window", window)
        if max_projected_grad is not None:
            check_number("max_projected_grad", max_projected_grad, low=0.0, open_low=True)
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, QuantisedLinear) and module.levels is None
        }
        if not self._layers:
            raise ValueError(
                "model must have layers of integer codes, got none; convert it first by "
                "zoopt.nn.convert_to_quantised(model)"
            )
        self.lr, self.sigma, self.num_probes = lr, sigma, num_probes
        self.window, self.max_projected_grad = window, max_projected_grad
        self._seed = SharedSeed(seed, type(self).__name__).value
        self._step = 0
        self._steps: list[Step] = []
        self._exchange = None if process_group is None else Exchange(process_group, "data")
        self._warned_alone = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any], *, weight: float = 1.0) -> float:
        """Probe the closure, and move the codes.

        Args:
            closure: evaluates the loss.
            weight: the weight of this rank's losses, for example the number of its tokens.

        Returns:
            The mean of the evaluated losses (of all ranks').

        Raises:
            RuntimeError: another rank's closure raised an error, or the ranks are at different
                places of the run. No codes have moved.
        """
        check_closure(closure, type(self).__name__)
        check_number("weight", weight, low=0.0)
        self._warn_alone()
        lr, sigma = float(self.lr), float(self.sigma)
        pinned = PinnedRNG({layer.codes.device for layer in self._layers.values()})
        losses: list[Any] = []
        values: list[float] | None = None
        draws = [(self._step * self.num_probes + j) & 0xFFFFFFFF for j in range(self.num_probes)]
        try:
            for draw in draws:
                for sign in (1.0, -1.0):
                    self._stand_off(draw, sign * sigma)
                    losses.append(pinned.evaluate(closure))
            values = loss_values(losses)
        finally:
            for layer in self._layers.values():
                layer.offset = None
            agreed = self._agreed(values, 2 * len(draws), weight)
        values = agreed
        pairs = list(zip(values[::2], values[1::2], strict=True))
        self._judge(pinned.eps, pairs, "loss", "sigma")
        self._step += 1
        slopes = [(plus - minus) / (2.0 * sigma) for plus, minus in pairs]
        if all(map(math.isfinite, slopes)):
            bound = self.max_projected_grad
            if bound is not None:
                slopes = [max(-bound, min(bound, slope)) for slope in slopes]
            weights = [-lr * slope / self.num_probes for slope in slopes]
            self._steps = [*self._steps, list(zip(draws, weights, strict=True))][-self.window :]
            for name, layer in self._layers.items():
                self._move(name, layer)
        return sum(values) / len(values)

    def _agreed(self, values: Sequence[float] | None, count: int, weight: float) -> list[float]:
        """The losses of all ranks; None: this rank's closure has raised an error, which it raises
        after the others have been told."""
        exchange = self._exchange
        if exchange is None:
            return list(values or ())
        standing = [self._step, self._seed, self._steps, self.window, self.max_projected_grad]
        standing += [float(self.lr), float(self.sigma), self.num_probes]
        if self._step % _COMPARED_EVERY == 0:
            codes = [layer.codes.cpu().numpy().data for layer in self._layers.values()]
            standing += map(zlib.crc32, codes)
        agreed = exchange.combine(
            values or (),
            count=count,
            weight=weight,
            digest=digest_of(*standing),
            failed=values is None,
        )
        if values is not None:
            refuse(agreed)
        return agreed.values

    def _warn_alone(self) -> None:
        """Warn once that replicas will drift apart."""
        if self._exchange is None and not self._warned_alone and several_ranks():
            self._warned_alone = True
            warn(
                "QES takes its steps alone in a job of several processes: each has losses of its "
                "own, so that their codes drift apart; pass "
                "process_group=torch.distributed.group.WORLD to QES"
            )

    def state_dict(self) -> dict[str, Any]:
        """The seed, the number of steps, and the window's draws and weights: plain numbers."""
        return {"seed": self._seed, "step": self._step, "steps": [list(s) for s in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from `state_dict`. The codes are in the model's own state dict.

        Raises:
            TypeError, ValueError: it is not a state of QES, or damaged. Nothing has changed then.
        """
        check_saved("QES", state, "steps")
        _check_steps(state["steps"])
        self._seed, self._step = state["seed"], state["step"]
        self._steps = [[(draw, weight) for draw, weight in step] for step in state["steps"]]

    def _directions(
        self, name: str, layer: QuantisedLinear, rows: slice
    ) -> Callable[[int], Tensor]:
        """draw -> z for some rows of a layer."""
        first, last, _ = rows.indices(layer.out_features)
        n = layer.in_features

        def direction(draw: int) -> Tensor:
            z = normal(
                (last - first) * n,
                seed=self._seed,
                stream=stream(f"qes {name}"),
                draw=draw,
                offset=first * n,
                device=layer.codes.device,
            )
            return z.view(last - first, n)

        return direction

    def _stand_off(self, draw: int, distance: float) -> None:
        """Make the layers compute their weights from q + distance z."""
        for name, layer in self._layers.items():

            def offset(
                rows: slice,
                dtype: torch.dtype,
                name: str = name,
                layer: QuantisedLinear = layer,
            ) -> Tensor:
                return (self._directions(name, layer, rows)(draw) * distance).to(dtype)

            layer.offset = offset

    def _move(self, name: str, layer: QuantisedLinear) -> None:
        """q <- clamp(q + round(u + e)), some rows at a time."""
        for rows in _runs(layer):
            codes = unpack(layer.codes[rows], layer.in_features, layer.bits)
            direction = self._directions(name, layer, rows)
            whole, _ = carried(self._steps, direction, codes.float())
            moved = (codes.float() + whole).clamp_(0, (1 << layer.bits) - 1)
            layer.codes[rows] = pack(moved.to(torch.uint8), layer.bits)


def _check_steps(steps: Any) -> None:
    if not isinstance(steps, list) or any(not isinstance(step, list) or not step for step in steps):
        raise TypeError(f"steps must be a list of lists, one a step, got {shown(steps)}")
    for pair in (pair for step in steps for pair in step):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"each of steps must have pairs of draw and weight, got {shown(pair)}")
        check_unsigned("draw", pair[0], 32)
        check_number("weight", pair[1])


def _runs(layer: QuantisedLinear) -> Iterator[slice]:
    """Split a layer's rows so that intermediate tensors stay small."""
    rows = max(1, CHUNK // layer.in_features)
    for start in range(0, layer.out_features, rows):
        yield slice(start, start + rows)
