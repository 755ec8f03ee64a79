"""GaLore: Adam inside the leading singular subspace of each gradient."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoopt.checks import check_bool, check_choice
from zoopt.dtypes import RoundingMode
from zoopt.first_order.adamw import AdamFamily, StateRounding
from zoopt.first_order.projected.geometry import ProjType
from zoopt.first_order.projected.residuals import Residual, Step, Terms, no_specs
from zoopt.first_order.projected.subspace import Projector
from zoopt.kernels.adam.moments import Format
from zoopt.optimizer import Group, Params, hyperparameters
from zoopt.registry import Variant, register


def galore(step: Step) -> None:
    """Algorithm 2 of GaLore (Adam), on k matrices theta (m, n) with gradients G (m, n):

        R      = G Q                                (m, r), with Q (n, r); for a wide matrix
                                                    G^T P (n, r), with P (m, r)
        M      <- b1 M + (1 - b1) R
        V      <- b2 V + (1 - b2) R^2
        N      = Mhat / (sqrt(Vhat) + eps)          of R's shape, and so are M and V
        theta <- theta - lr (alpha N Q^T + weight_decay theta)          or P N^T

    The part of G outside the subspace is dropped. Q, of the leading singular vectors of G, is made
    anew every `update_proj_gap` steps, before any parameter is written: linear algebra can fail.
    """
    alpha = step.group["scale"]
    R = step.down()  # G Q, or G^T P: (k, channels, r)
    N = step.rule(R)  # Adam's direction; it updates M and V
    step.descend(Terms(N, rate=alpha))  # theta <- theta - lr (alpha N Q^T + weight_decay theta)


#: Nothing of the part outside the subspace.
INSIDE = Residual(no_specs, galore, needs_gradient=False, needs_reduced=False)


@register(
    "galore-adamw",
    "low-rank",
    Variant(),
    Variant("int8 state", {"state_dtype": "int8"}, fused=True),
)
class GaLoreAdamW(AdamFamily):
    r"""GaLore (Zhao et al., 2024): Adam inside the leading singular directions of the gradient.

    For a matrix of m >= n, with P (n, r) a basis of leading right singular vectors of a past G,
    computed every `update_proj_gap` steps (m < n: P (m, r) of left ones, R = G^T P):

        R = G P
        M <- b1 M + (1 - b1) R,    V <- b2 V + (1 - b2) R^2,    N = Mhat / (sqrt(Vhat) + eps)
        W <- (1 - lr weight_decay) W - lr scale N P^T

    Moments are not changed when the basis changes. Tensors of more than two dimensions are
    matrices (shape[0], rest); in a group with `matrices=E` they are E matrices stacked along the
    first axis (a layer's experts), each with a basis, moments and steps of its own. Vectors, and
    groups with `rank=None`, get AdamW; see `zoopt.lowrank.param_groups`.

    State, in bytes of a matrix with m >= n: 4 n r for the basis (2 n r where weights are
    bfloat16), 8 m r for float32 moments (float64: twice as many; by `state_dtype`: bfloat16 4 m r,
    int8 2.03, int4 1.06), 8 for `step`.

    Args:
        params: parameters, named parameters, or param groups. Of named parameters, embeddings and
            output layers are a plain group of their own (recognised by names such as `embed`,
            `wte`, `lm_head`). A group with a `rank` of its own is projected, whatever it contains.
            If any group has a `rank`, groups without one are plain, as in the authors' code.
        lr: learning rate; default 1e-3 (the authors' code; their pre-training takes 1e-2).
        betas: decay of the moments; default (0.9, 0.999) (Adam).
        eps: added to the denominator; default 1e-6 (the authors' code).
        weight_decay: decoupled; default 0 (the authors' code).
        rank: r, at most the matrix's own (a larger one gives a warning, for matrices of 65536
            elements or more); default 128 (the authors' code, for 60M weights; a quarter of the
            width for larger models).
        update_proj_gap: steps from one basis to the next; default 200 (paper).
        scale: alpha; default 0.25 (the authors' code).
        proj_type: `"std"` projects the shorter side (m >= n the right one), `"reverse_std"` the
            longer, `"right"` and `"left"` the named one, `"full"` both: R = P^T G Q is (r, r).
        projector: how a basis is made. `"svd"` (paper) and `"gram"` (eigenvectors of the smaller
            Gram matrix) are exact, `"randomized"` is Halko et al.'s (2011); `"warm"` (default) is
            randomized at first, and then one step of orthogonal iteration, orth(G^T (G P));
            `"random"` draws N(0, 1/r) from the seed and stores nothing, and `"orthogonal"`
            draws orthonormal columns.
        stagger: whether the parameters' bases are refreshed at different steps, so that no step
            has to do all of them; default True.
        decay: `"before"` the step (default; AdamW) or `"after"` it (the authors' code).
        eps_correction: whether eps is added to sqrt(Vhat) (default; Adam) or to sqrt(V) (the
            authors' code).
        state_dtype, state_rounding, rounding, maximize, seed: as for `AdamW`.

    Raises:
        TypeError, ValueError: an argument out of range.
        RuntimeError: in `step`, a sparse gradient. Nothing has changed then.

    Differs from the paper: warm bases, at different steps, as above. No basis is made
    from a gradient that is not finite: the old one stays, or the parameter waits until it has one.
    If `rank` is above the gradient's own, some directions contain only rounding errors, which
    Adam's division would turn into full steps. So columns of R below
    2 eps sqrt(max(m, n)) max |R| count as 0 (for `"full"`, single entries); the paper does not
    mention this. Differs from the
    authors' code: `decay`, `eps_correction`; with `projector="svd", stagger=False, decay="after",
    eps_correction=False` it is that code's algorithm, step by step. `p.grad` keeps its shape;
    `"reverse_std"` works at every rank.

    Example:
        >>> opt = zoopt.GaLoreAdamW(model.named_parameters(), lr=1e-3, rank=128)
        >>> model(**batch).loss.backward()
        >>> opt.step()
    """

    shards = True

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
        scale: float = 0.25,
        proj_type: ProjType = "std",
        projector: Projector = "warm",
        stagger: bool = True,
        decay: Literal["before", "after"] = "before",
        eps_correction: bool = True,
        state_dtype: Format = "float32",
        state_rounding: StateRounding = "stochastic",
        rounding: RoundingMode = "auto",
        maximize: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(params, hyperparameters(locals()), seed=seed)

    def _residual(self, group: Group) -> Residual:
        return INSIDE

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_bool("stagger", group["stagger"])
        check_bool("eps_correction", group["eps_correction"])
        check_choice("decay", group["decay"], ("before", "after"))
