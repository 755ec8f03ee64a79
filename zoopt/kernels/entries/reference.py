"""Operations on some entries of a tensor, defined in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from zoopt.kernels.entries.operands import OLDEST, Cover, Entries, Rates, Sums
from zoopt.kernels.journal import kept, once
from zoopt.kernels.noise.key import NoiseKey
from zoopt.kernels.noise.philox import PURPOSE_ROUNDING, words
from zoopt.kernels.noise.reference import round_nearest, round_stochastic


def adam_entries(
    theta: Tensor,
    gradient: Tensor,
    entries: Entries,
    betas: tuple[float, float],
    rates: Rates,
    key: NoiseKey,
    rounding_draw: int | None,
) -> None:
    """theta_i <- round(theta_i + decay (base_i - theta_i) + rate N_i) for entries i of theta (n,),
    with N as in `adam_direction`."""
    index = slice(None) if entries.positions is None else kept(entries.positions.long)
    own = gradient[index].to(entries.exp_avg.dtype)
    direction = adam_direction(own, entries, betas, rates)
    weights = kept(theta[index].to, direction.dtype)
    if entries.base is None or entries.positions is None:
        step = direction * rates.adam.scale - weights * rates.decay
        once(theta.copy_, weights + step)
        return
    change = (entries.base.to(direction.dtype) - weights) * rates.decay
    moved = weights + change + direction * rates.adam.scale
    if rounding_draw is None:
        rounded = round_nearest(moved, theta.dtype)
    else:
        bits = halfwords_at(key.offset + entries.positions.long(), key, rounding_draw)
        rounded = round_stochastic(moved, theta.dtype, bits)
    once(theta.__setitem__, index, rounded)


def adam_direction(
    gradient: Tensor, entries: Entries, betas: tuple[float, float], rates: Rates
) -> Tensor:
    """mhat / (sqrt(vhat) + eps) of entries (k,), each corrected for its own age. Moments and ages
    are updated in place."""
    age, m, v = kept(_averages, gradient, entries, rates)
    for state, values in ((entries.age, age), (entries.exp_avg, m), (entries.exp_avg_sq, v)):
        once(state.copy_, values)
    # In float64, because 1 - b2^age has only a few correct bits in float32 while age is small.
    exponent = age.double()
    mhat = m / (1.0 - betas[0] ** exponent).to(m.dtype)
    vhat = v / (1.0 - betas[1] ** exponent).to(v.dtype)
    # Through float64, as in noise's `reference.adam_window`: the rounded root is then exact.
    return mhat / (vhat.double().sqrt().to(v.dtype) + rates.adam.eps)


def _averages(gradient: Tensor, entries: Entries, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """The next ages and moments."""
    numbers = rates.adam
    age = entries.age.clamp(max=OLDEST - 1).add_(1)
    m = (entries.exp_avg * numbers.beta1).add_(gradient * numbers.complement1)
    v = (entries.exp_avg_sq * numbers.beta2).add_(gradient.square() * numbers.complement2)
    return age, m, v


def halfwords_at(index: Tensor, key: NoiseKey, draw: int) -> Tensor:
    """The 16 random bits that round the elements at positions, int64 (k,), in any order."""
    block, place = index // 8, index % 8
    made = words(block, seed=key.seed, stream=key.stream, draw=draw, purpose=PURPOSE_ROUNDING)
    word = made.gather(1, (place // 2).unsqueeze(1)).squeeze(1)
    return torch.where(place % 2 == 0, word & 0xFFFF, word >> 16)


def sum_entries(gradient: Tensor, sums: Sums) -> None:
    """total <- total + g,    squares <- squares + g^2, rounded to nearest."""
    wide = torch.promote_types(sums.total.dtype, torch.float32)
    own = (gradient if sums.positions is None else gradient[sums.positions.long()]).to(wide)
    for state, values in ((sums.total, own), (sums.squares, own.square())):
        once(state.copy_, round_nearest(kept(torch.add, state.to(wide), values), state.dtype))


def cover_entries(gradient: Tensor, cover: Cover, picked: bool) -> None:
    """nu_ij = min(r_i, c_j) + g_ij^2,    r_i <- max(r_i, max_j nu_ij), c_j <- max(c_j, max_i nu_ij)
    of SM3-II, over the entries (i, j)."""
    rows, columns, active = cover.rows, cover.columns, cover.positions.long()
    g = (gradient if picked else gradient[active]).to(rows.dtype)
    i, j = active // columns.numel(), active % columns.numel()
    nu = kept(torch.add, torch.minimum(rows[i], columns[j]), g.square())
    once(rows.scatter_reduce_, 0, i, nu, "amax")
    once(columns.scatter_reduce_, 0, j, nu, "amax")
