"""GradNormLoRP: a normalised low-rank update, its factors' gradients projected on two sides."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zoopt.checks import check_bool, check_choice, check_positive_int
from zoopt.dtypes import RoundingMode
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.galore import INSIDE
from zoopt.first_order.projected.residuals import Residual
from zoopt.first_order.projected.subspace import Projector
from zoopt.first_order.site import Site
from zoopt.kernels.adam.moments import Format
from zoopt.kernels.dispatch import known
from zoopt.nn import GradNormLinear, convert_to_gradnorm
from zoopt.nn.stacks import GradNormStack
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import Recipe, register

#: Its name in release 0.1.
convert = convert_to_gradnorm


def param_groups(model: nn.Module, *, rank: int, **group_options: Any) -> list[Group]:
    """Param groups: the factors I and J, to project (those of experts apart, with `matrices`), and
    all else that trains, plain.

    Args:
        model: a converted model.
        rank: of the projection, at most that of the factors.
        group_options: any further hyperparameters of the factors' group.

    Raises:
        TypeError, ValueError: a rank that is not a positive int, or a model that is not converted.
    """
    check_positive_int("rank", rank)
    # Of each factor, how many matrices it holds.
    counts: dict[int, int] = {}
    for layer in model.modules():
        if isinstance(layer, GradNormLinear | GradNormStack):
            number = layer.matrices if isinstance(layer, GradNormStack) else 1
            counts |= {id(layer.left): number, id(layer.right): number}
    if not counts:
        raise ValueError(
            "model must have GradNormLinear layers, got none; convert it first by "
            "zoopt.nn.convert_to_gradnorm(model, rank=...)"
        )
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups: list[Group] = []
    for number in sorted(set(counts.values())):
        factors = [pair for pair in trained if counts.get(id(pair[1])) == number]
        stack = {"matrices": number} if number > 1 else {}
        if factors:
            groups.append({"params": factors, "rank": rank, **stack, **group_options})
    plain = [pair for pair in trained if id(pair[1]) not in counts]
    return [*groups, {"params": plain, "rank": None}]


def _prepared(model: nn.Module, rank: int) -> nn.Module:
    return convert_to_gradnorm(model, rank=rank)


def _of_factors(model: nn.Module, rank: int) -> GradNormLoRP:
    """The factors projected to half of their rank, with the paper's 8-bit moments."""
    return GradNormLoRP(param_groups(model, rank=max(1, rank // 2)), state_dtype="int8")


@register("gradnormlorp", "low-rank", recipe=Recipe(_of_factors, _prepared))
class GradNormLoRP(AdamFamily):
    r"""GradNormLoRP (Huang et al., 2024, arXiv:2412.19616): Adam between two bases of a gradient.

    For D the gradient of a factor, I or J, of `zoopt.nn.GradNormLinear`, with U and V its leading
    left and right singular vectors, made anew every T = update_proj_gap steps,

        R = U^T D V,    m <- b1 m + (1 - b1) R,    v <- b2 v + (1 - b2) R^2
        theta <- (1 - lr weight_decay) theta - lr scale U [mhat / (sqrt(vhat) + eps)] V^T

    Parameters of groups with `rank=None`, and vectors such as M, get AdamW. Until a matrix has a
    gradient (J has none while I = 0) it stays as it is.

    State, in bytes: of a matrix (m, k), 4 r (m + k) for the bases (0 with projector="random"; half
    of it where weights are bfloat16) and 8 r^2 for the moments (int8: 2 r^2 + r^2 / 32, from 4096
    elements on), r = min(rank, m, k); AdamW's of any other; and 8 each for `step`. float64
    parameters: twice that.

    Args:
        params: the groups of `zoopt.first_order.gradnormlorp.param_groups`, or any parameters.
        lr: learning rate; default 1e-3 (torch's AdamW).
        betas: decay of the moments; default (0.9, 0.999) (Adam).
        eps: added to the denominator; default 1e-6 (GaLore's).
        weight_decay: decoupled; default 0.
        rank: r, of the projection; default 128. One above a matrix's own is cut to it.
        update_proj_gap: T; default 200 (GaLore's).
        scale: of the projected update; default 1 (the paper has none).
        projector: how the bases are made: as for `GaLoreAdamW`; default `"warm"`.
        stagger: spread the refreshes over the steps; default True.
        state_dtype: of the moments: `"float32"` (default), `"bfloat16"`, `"int8"` (the paper's
            8-bit form) or `"int4"`; those of fewer than 4096 elements stay float32.
        state_rounding, rounding, maximize, seed: as for `GaLoreAdamW`.

    Raises:
        TypeError, ValueError: a hyperparameter out of range.
        RuntimeError: in `step`, a gradient is sparse.

    Differs from the authors' code, whose four variants disagree with the paper and of which the
    8-bit one does not run: this is the paper's algorithm. Entries of R that are nothing but
    rounding (all but the diagonal, in the step that makes exact bases) count as 0, as for
    `GaLoreAdamW`.

    Example:
        >>> zoopt.nn.convert_to_gradnorm(model, rank=128)
        >>> groups = zoopt.first_order.gradnormlorp.param_groups(model, rank=64)
        >>> opt = zoopt.GradNormLoRP(groups, lr=1e-3, state_dtype="int8")
        >>> ...
        >>> zoopt.nn.merge(model)
    """

    kinds_last = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = 128,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        projector: Projector = "warm",
        stagger: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        defaults = {**hyperparameters(locals()), "proj_type": "full"}
        super().__init__(params, defaults, seed=seed)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        check_choice("proj_type", group["proj_type"], ("full",))

    def _residual(self, group: Group) -> Residual:
        return INSIDE

    def _prepare(self, site: Site, gradient: Tensor) -> bool:
        state = self.state.get(site.param, {})
        begun = site.continues or (bool(state) and int(state["step"]) > 0)
        if not begun and self._geometry(site.param, site.group) and not known(gradient.any(), True):
            # A gradient of zeros has no subspace, and Adam makes no step of it.
            self.state.pop(site.param, None)
            return False
        return super()._prepare(site, gradient)
