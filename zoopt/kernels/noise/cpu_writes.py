"""Many writes of theta on the CPU, compiled: all of them on one tile while it is in the cache.

A tile is whole groups of elements; those that are not theta's are 0, and never stored. It is
float32, which holds 16-bit weights exactly, and is rounded to these after each write. Normals, and
bits that round and mask beside them, are in the order of `cpu_group`; signs in that of elements.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from zoopt.kernels.noise import philox
from zoopt.kernels.noise.cpu_group import (
    BLOCKS,
    GROUP,
    KEYS,
    add_terms,
    along,
    along_rounded,
    grouped,
    halves,
    make_normals,
    make_words,
    set_draw,
    set_seed,
    tables,
    ungrouped,
)
from zoopt.kernels.noise.cpu_tile import (
    NORMALS_PER_WORD,
    adam,
    add_sign,
    average,
    make_blocks,
    scale,
    spread_signs,
)
from zoopt.kernels.noise.writes import RULES
from zoopt.kernels.runtime.convert import (
    BFLOAT16,
    FLOAT32,
    decode,
    encode,
    rounded,
    rounded_stochastic,
    truncate,
)
from zoopt.kernels.runtime.intrinsics import (
    add_signs_once,
    add_signs_thrice,
    add_signs_twice,
    f32,
    hold,
    i64,
    jit,
    u32,
    u64,
    unowned,
)
from zoopt.kernels.runtime.spread import memory_at, spread

_SIGN, _ADAM, _MOMENTUM = RULES["sign"], RULES["adam"], RULES["momentum"]
_DIRECTION, _ROUNDING = philox.PURPOSE_DIRECTION, philox.PURPOSE_ROUNDING
_MASK = philox.PURPOSE_MASK
#: The elements of a tile, as many as 32 blocks of signs have; fewer where many directions are kept,
#: so that they stay in the cache.
TILE, _KEPT = 4096, 8192


@jit
def _room(tile, kept, masked):
    """How many 32-bit numbers the rows of `_scratch` take, each with a line of the cache."""
    return kept * tile + 8 * tile + kept * masked // 2 + 2 * KEYS + 4 * BLOCKS + 1 + 9 * 16


@jit
def _scratch(room, tile, kept, masked):
    """A tile's arrays in uint32 memory; each row begins with a line of the cache.

    float32 (kept, tile), (6, tile); uint16 (kept, masked); uint32 (2, tile / 2); uint16 (tile,);
    uint64 (2, tile / 8), (KEYS,); uint32 (4 BLOCKS,); float32 (1,).
    """
    z, rest = _row(room, kept * tile)
    grid, rest = _row(rest, 6 * tile)
    mask, rest = _row(rest, kept * masked // 2)
    pairs, rest = _row(rest, tile)
    uniform, rest = _row(rest, tile // 2)
    blocks, rest = _row(rest, tile // 2)
    keys, rest = _row(rest, 2 * KEYS)
    joined, rest = _row(rest, 4 * BLOCKS)
    one, rest = _row(rest, 1)
    return (
        z.view(np.float32).reshape((kept, tile)),
        grid.view(np.float32).reshape((6, tile)),
        mask.view(np.uint16).reshape((kept, masked)),
        pairs.reshape((2, tile // 2)),
        uniform.view(np.uint16),
        blocks.view(np.uint64).reshape((2, tile // 8)),
        keys.view(np.uint64),
        joined,
        one.view(np.float32),
    )


@jit
def _row(room, count):
    """The first `count` numbers of the room that begin with a line, and the room after them."""
    start = (64 - i64(room.ctypes.data) % 64) % 64 // 4
    return room[start : start + count], room[start + count :]


@jit
def _words(pairs, noise, draw, purpose):
    """pairs, uint32 (n / 2,): a tile's words in the order of groups."""
    low, product, keys, _, _, base, _, k0, k1 = noise
    set_draw(keys, base // 8, draw, purpose, k0, k1)
    make_words(pairs, low, product, keys)


@jit
def _signs(pairs, noise, draw):
    """pairs, uint32 (128,): the words of a tile's signs, in the order of elements."""
    low, product, keys, joined, _, base, _, k0, k1 = noise
    set_draw(keys, base // 128, draw, _DIRECTION, k0, k1)
    make_words(joined, low, product, keys)
    words, both = pairs[: 4 * BLOCKS].view(np.uint64), joined.view(np.uint64)
    for b in range(BLOCKS):
        words[2 * b], words[2 * b + 1] = both[b], both[BLOCKS + b]


@jit
def _halves(out, pairs, noise, draw, purpose):
    """16 bits for each element of a tile, in its order: uint16 (n,), in out or in pairs."""
    _, _, _, _, normal, base, stream, k0, k1 = noise
    if normal:
        _words(pairs, noise, draw, purpose)
        halves(out, pairs)
        return out
    make_blocks(pairs, base // 8, len(out) // 8, stream, draw, purpose, k0, k1)
    return pairs.view(np.uint16)


@jit
def _direction(z, pairs, noise, draw):
    """z, float32 (n,): a direction on a tile, in its order."""
    if noise[4]:
        _words(pairs, noise, draw, _DIRECTION)
        make_normals(z, pairs)
    else:
        _signs(pairs, noise, draw)
        spread_signs(z, pairs[: len(z) // 32])


@jit
def _along(theta, pairs, noise, draw, writes, decays, numbers):
    """`writes` times theta <- decay theta + number z, float32 (n,), each operation rounded; decays
    of signs are 1."""
    if noise[4]:
        _words(pairs, noise, draw, _DIRECTION)
        along(theta, pairs, writes, decays, numbers)
        return
    _signs(pairs, noise, draw)
    start, a = u64(theta.ctypes.data), u64(numbers.ctypes.data)
    for k in range(len(theta) // 32):
        here = u64(start + u64(128 * k))
        if writes == 1:
            add_signs_once(here, pairs[k], a)
        elif writes == 2:
            add_signs_twice(here, pairs[k], a)
        else:
            add_signs_thrice(here, pairs[k], a)


@jit
def _add(acc, a, z, mask, threshold):
    """acc <- acc + a z, float32 (n,), product and sum each rounded, where the mask is 1."""
    for j in range(len(acc)):
        total = f32(acc[j] + f32(a * z[j]))
        if threshold is not None:
            total = total if mask[j] < threshold else acc[j]
        acc[j] = total


@jit
def _at_once(acc, pairs, random, noise, kind, run, decays, numbers, draw, rounding):
    """The writes of a run along one direction that is used for nothing else, if there is a loop
    for them. Returns how many writes were made."""
    normal = noise[4]
    if kind == FLOAT32:
        if not normal:
            for w in range(run):
                if decays[w] != f32(1.0):
                    return 0
        _along(acc, pairs, noise, draw, run, decays, numbers)
        return run
    if kind == BFLOAT16 and normal and run == 1 and rounding >= 0:
        _words(pairs, noise, draw, _DIRECTION)
        _words(random, noise, rounding, _ROUNDING)
        along_rounded(acc, pairs, random, decays[0], numbers[0])
        return run
    return 0


@jit
def _load(acc, linear, values, lead, kind, normal):
    """A tile of theta as float32, in its order: acc and linear (n,) <- values, lead elements in."""
    linear[:] = f32(0.0)
    if kind == FLOAT32:
        linear[lead : lead + len(values)] = values.view(np.float32)
    else:
        decode(linear[lead : lead + len(values)], values, kind)
    if normal:
        grouped(acc, linear)


@jit
def _store(values, acc, linear, lead, kind, normal):
    """The inverse of _load."""
    if normal:
        ungrouped(linear, acc)
    own = linear[lead : lead + len(values)]
    if kind == FLOAT32:
        values.view(np.float32)[:] = own
    elif kind == BFLOAT16:
        truncate(values, own)
    else:
        encode(values, own, kind)


@jit
def _write_each(
    theta,
    buffer,
    kind,
    ends,
    middles,
    runs,
    rounds,
    rules,
    decays,
    step_sizes,
    epsilons,
    momenta,
    draws,
    places,
    made,
    single,
    numbers,
    first,
    second,
    closes,
    kept,
    per_word,
    stream,
    k0,
    k1,
    offset,
    threshold,
    span,
):
    """reference.write_each, with `kept` directions of a tile beside it; a buffer may be empty.

    Write w has terms ends[w] ... ends[w + 1] - 1; from middles[w] on they are its estimate's. Term
    j's direction is at places[j], and is made there first where made[j]; where single[j], no other
    term uses it. runs[w] writes are along one direction that no other uses.
    """
    normal = per_word == NORMALS_PER_WORD
    tile = max(GROUP, min(TILE, _KEPT // kept // GROUP * GROUP))
    masked = 0 if threshold is None else tile
    room = np.empty(_room(tile, kept, masked), np.uint32)
    scratch = _scratch(unowned(room), tile, kept, masked)
    z, grid, mask, pairs, uniform, blocks, keys, joined, ones = scratch
    ones[0] = f32(1.0)
    set_seed(keys, k0, k1)
    position, end = offset + span[0], offset + span[1]
    while position < end:
        base = position - position % GROUP
        # The blocks of a tile have one high half.
        stop = min(base + tile, end, ((base >> 35) + 1) << 35)
        size = (stop - base + GROUP - 1) // GROUP * GROUP
        values = theta[position - offset : stop - offset]
        linear, acc = grid[0, :size], grid[1 if normal else 0, :size]
        ghat, m, v, buf = grid[2, :size], grid[3, :size], grid[4, :size], grid[5, :size]
        past = buffer[position - offset : stop - offset]
        _load(acc, linear, values, position - base, kind, normal)
        count = size // 8 if normal else BLOCKS
        if len(past):
            _load(buf, ghat if normal else buf, past, position - base, FLOAT32, normal)
        low, product = blocks[0, :count], blocks[1, :count]
        tables(low, product, base // (8 if normal else 128), stream, k0, k1)
        noise = (low, product, keys, joined, normal, base, stream, k0, k1)
        own, random = pairs[0, : size // 2], pairs[1, : size // 2]
        w = 0
        while w < len(rules):
            j, run = ends[w], runs[w]
            if run > 0 and threshold is None:
                ds, ns = decays[w : w + run], numbers[j : j + run]
                done = _at_once(acc, own, random, noise, kind, run, ds, ns, draws[j], rounds[w])
                if done > 0:
                    w += done
                    continue
            if decays[w] != f32(1.0):
                scale(acc, decays[w])
            if rules[w] == _SIGN or rules[w] == _ADAM:
                grid[2:5] = f32(0.0)
            elif rules[w] == _MOMENTUM:
                scale(buf, momenta[w])
            target = buf if rules[w] == _MOMENTUM else ghat
            while j < ends[w + 1]:
                place = places[j]
                if single[j] and threshold is None and j < middles[w]:
                    _along(acc, own, noise, draws[j], 1, ones, numbers[j : j + 1])
                    j += 1
                    continue
                # One that is not kept has rows that are free between _load and _store.
                row = grid[0 if normal else 1, :size] if single[j] else z[place, :size]
                bits = uniform[:size] if single[j] else mask[place, :size]
                if made[j]:
                    _direction(row, own, noise, draws[j])
                    if threshold is not None:
                        bits[:] = _halves(bits, own, noise, draws[j], _MASK)
                if threshold is None and j < middles[w]:
                    start, j = j, j + 1
                    while j < middles[w] and not made[j]:  # a single one is made
                        j += 1
                    add_terms(acc, z, places, numbers, start, j)
                    continue
                own_sum = acc if j < middles[w] else target
                _add(own_sum, numbers[j], row, bits, threshold)
                if closes[j]:
                    average(ghat, m, v, first[j], second[j])
                j += 1
            if rules[w] == _SIGN:
                add_sign(acc, ghat, step_sizes[w])
            elif rules[w] == _ADAM:
                adam(acc, m, v, step_sizes[w], epsilons[w])
            elif rules[w] == _MOMENTUM:
                _add(acc, step_sizes[w], buf, mask[0], None)
            if kind != FLOAT32 and rounds[w] < 0:
                rounded(acc, kind)
            elif kind != FLOAT32:
                bits = _halves(uniform[:size], random, noise, rounds[w], _ROUNDING)
                rounded_stochastic(acc, bits, kind)
            w += 1
        _store(values, acc, linear, position - base, kind, normal)
        if len(past):
            _store(past, buf, linear if normal else buf, position - base, FLOAT32, normal)
        position = stop
    hold(room)


@jit
def _write_batch(
    tensors,
    firsts,
    item,
    kind,
    ends,
    middles,
    runs,
    rounds,
    rules,
    decays,
    step_sizes,
    epsilons,
    momenta,
    draws,
    places,
    made,
    single,
    numbers,
    first,
    second,
    closes,
    kept,
    per_word,
    k0,
    k1,
    threshold,
    span,
):
    """_write_each on the tiles of a batch.

    Args:
        tensors: int64 (t, 5): address, number of elements, offset and stream of each, and the
            address of its buffer, or 0.
        firsts: int64 (t + 1,): the number of its first tile; that of all tiles.
        item: of the type of theta's bits.
        span: of tiles.
    """
    for t in range(len(tensors)):
        start, stop = max(span[0], firsts[t]), min(span[1], firsts[t + 1])
        if start < stop:
            address, count, offset, stream, buffer = tensors[t]
            own = TILE * (start - firsts[t]), min(count, TILE * (stop - firsts[t]))
            _write_each(
                memory_at(address, count, item),
                memory_at(buffer, count if buffer else 0, u32(0)),
                kind,
                ends,
                middles,
                runs,
                rounds,
                rules,
                decays,
                step_sizes,
                epsilons,
                momenta,
                draws,
                places,
                made,
                single,
                numbers,
                first,
                second,
                closes,
                kept,
                per_word,
                u32(stream),
                k0,
                k1,
                offset,
                threshold,
                own,
            )


@jit
def write_each(arguments, team):
    """reference.write_each on a batch, on a team of threads."""
    spread(_write_batch, arguments, team)
