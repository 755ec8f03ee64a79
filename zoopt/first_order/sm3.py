"""SM3: one vector of second moments for each axis, instead of one moment for each element."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from zoopt.checks import check_number
from zoopt.distributed.sharding import greatest_, inner_dimension, local, shard_dimensions
from zoopt.dtypes import RoundingMode, accumulator_dtype
from zoopt.first_order.base import FirstOrderOptimizer
from zoopt.first_order.site import Site, batch_kind, batch_of, descent_rate
from zoopt.kernels import sm3_
from zoopt.kernels.journal import once
from zoopt.optimizer import STEP, Group, Params, TensorSpec, hyperparameters
from zoopt.registry import Variant, register


@register("sm3", "compact", Variant(fused=True))
class SM3(FirstOrderOptimizer):
    r"""SM3-II (Anil et al., 2019): Adagrad with one accumulator for each row, column, ... of theta.

    With a vector A_k for each axis k of theta, of that axis's size and 0 at first, element by
    element

        nu    <- min_k A_k + g^2
        theta <- (1 - lr weight_decay) theta - lr g / (sqrt(nu) + eps),   0 / 0 = 0
        A_k   <- max of nu over all axes but k

    so that sum g^2 <= nu, and a step is never longer than Adagrad's. For vectors and scalars A is
    nu itself, and the step is Adagrad's. With beta > 0 the sums become averages, which can fall,

        nu <- beta min_k A_k + (1 - beta) g^2

    and with momentum > 0 the weights follow an average of the steps u = g / (sqrt(nu) + eps):

        m <- momentum m + (1 - momentum) u,   theta <- (1 - lr weight_decay) theta - lr m

    Sparse gradients, as of `torch.nn.Embedding(sparse=True)`, touch their rows only: absent rows
    keep weights, accumulator and momentum as they are, without decay. With beta, momentum and
    weight_decay 0 the step is, bit for bit, that of a dense gradient whose other rows are zero
    (also with stochastic rounding).

    State: m + n numbers for an (m, n) matrix, in general the sum of the dimensions, of 4 bytes each
    (8 for float64). With momentum, 4 (8) bytes more for each element. For bfloat16 and float16
    weights that are rounded stochastically, 8 bytes a parameter for `step`, which selects the bits.

    Args:
        params: tensors, (name, tensor) pairs, or groups of either.
        lr: learning rate; default 0.1, as in common ports. Like Adagrad's, steps shrink by
            themselves; the authors' only schedule is a warm-up.
        momentum: in [0, 1); default 0, without a buffer.
        beta: in [0, 1); default 0, the paper's sums, which forget nothing.
        eps: added to sqrt(nu); default 0, as in the paper. torch.optim.Adagrad's is 1e-10.
        weight_decay: decoupled, of the rows that have a gradient; default 0.
        rounding: how bfloat16 and float16 weights are written: `"nearest"`, `"stochastic"`, or
            `"auto"` (default), which is stochastic.
        maximize: ascend instead of descending.
        seed: of the rounding bits; default, torch's initial seed.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient that does not consist of whole rows. Nothing has
            changed then.

    A gradient that is not finite makes its weight NaN, as in torch's optimizers. In the minimum
    over axes a NaN counts as larger than infinity, so a finite accumulator of another axis is used.

    Differs from the paper: has `eps`, `weight_decay` and rounding. Differs from common ports:
    accumulators are float32 for all weights (in bfloat16 they stop growing after 256 equal
    squares); where nu is 0 there is no division; averages can fall, since nu is assigned, and not
    the maximum of old and new; rows that are absent from a sparse gradient keep their accumulators,
    which still count in the columns' maxima; momentum works with sparse gradients too, and has no
    buffer if it is 0.

    Example:
        >>> opt = zoopt.SM3(model.parameters(), lr=0.1, momentum=0.9)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     opt.step()
        ...     opt.zero_grad()
    """

    shards = True
    kinds_last = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.0,
        beta: float = 0.0,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def declared_state(self, param: Tensor, group: Group) -> dict[str, TensorSpec]:
        """`accumulator_0`, `accumulator_1`, ...; `momentum_buffer`; `step` for rounding bits."""
        wide = accumulator_dtype(param.dtype)
        declared = {
            f"accumulator_{axis}": TensorSpec((size,), wide)
            for axis, size in enumerate(tuple(param.shape) or (1,))
        }
        if group["momentum"]:
            declared["momentum_buffer"] = TensorSpec(tuple(param.shape), wide)
        if group["rounding"] != "nearest" and param.dtype.itemsize == 2:
            declared["step"] = STEP
        return declared

    def _apply(self, site: Site, reduced: Tensor, gradient: Tensor | None) -> None:
        self._update_together([site], [reduced.coalesce() if reduced.is_sparse else reduced])

    def _kind(self, site: Site, gradient: Tensor) -> Hashable:
        state = self._state(site.param, site.group)
        return batch_kind(site, gradient, *([state["step"]] if "step" in state else []))

    def _update_together(self, sites: Sequence[Site], gradients: Sequence[Tensor]) -> None:
        group = sites[0].group
        states = [self._state(site.param, group) for site in sites]
        rounding_draw = None
        if "step" in states[0]:
            rounding_draw = sites[0].rounding_draw(int(states[0]["step"]) + 1)
        sm3_(
            batch_of(sites),
            gradients,
            [
                [state[f"accumulator_{axis}"] for axis in range(max(1, site.param.dim()))]
                for site, state in zip(sites, states, strict=True)
            ],
            step_size=descent_rate(group),
            beta=group["beta"],
            eps=group["eps"],
            decay=1.0 - float(group["lr"]) * group["weight_decay"],
            buffer=[state["momentum_buffer"] for state in states] if group["momentum"] else None,
            momentum=group["momentum"],
            rounding_draw=rounding_draw,
        )
        if "step" in states[0]:
            once(torch._foreach_add_, [state["step"] for state in states], 1)

    def _can_shard(self, param: Tensor, group: Group) -> bool:
        """Along dimension 0; along one other where nothing is rounded by its place."""
        if not inner_dimension(param):
            return True
        one = len(shard_dimensions(param)) == 1
        return one and "step" not in self.declared_state(param, group)

    def _follows_rows(self, name: str, spec: TensorSpec, param: Tensor, group: Group) -> bool:
        return name in (f"accumulator_{inner_dimension(param)}", "momentum_buffer")

    def _merge(self, site: Site) -> None:
        """Accumulators of the other axes: the maxima over all rows are the maxima over all
        parts."""
        state, sharded = self._state(site.param, site.group), inner_dimension(site.param)
        for axis in range(site.param.dim()):
            if axis == sharded:
                continue
            accumulator = state[f"accumulator_{axis}"]
            if not local(site.param).numel():
                once(accumulator.zero_)
            greatest_(accumulator, site.param)

    def _check_gradient(self, site: Site) -> None:
        gradient = site.param.grad
        if gradient is None or not gradient.is_sparse:
            super()._check_gradient(site)
        elif gradient.sparse_dim() != 1:
            raise RuntimeError(
                f"SM3 needs dense gradients, or sparse ones of whole rows, got one of sparse_dim "
                f"{gradient.sparse_dim()} for parameter {site.name!r}; pass gradient.to_dense()"
            )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_number("momentum", group["momentum"], low=0.0, high=1.0, open_high=True)
        check_number("beta", group["beta"], low=0.0, high=1.0, open_high=True)
        check_number("eps", group["eps"], low=0.0)
