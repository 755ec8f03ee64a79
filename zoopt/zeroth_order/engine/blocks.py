"""Block-wise descent: a step probes and updates one block of the parameters; the others rest.

The seed and the number of the step determine which block is due, so there is no state.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, Literal

import torch

from zoopt.checks import check_choice
from zoopt.kernels.noise.philox import words
from zoopt.noise import stream

#: None: all parameters at every step. "groups": each param group is a block. Otherwise,
#: shell patterns of names (`"model.layers.0.*"`), each a block.
Blocks = None | Literal["groups"] | Sequence[str]
BlockOrder = Literal["cyclic", "random", "all"]

_ORDER_STREAM = stream("zoopt block order")


def check_blocks(blocks: Any, order: Any) -> None:
    """Raise unless the options are valid `Blocks` and `BlockOrder`."""
    check_choice("block_order", order, ("cyclic", "random", "all"))
    if blocks is None or blocks == "groups":
        return
    patterns = not isinstance(blocks, str) and isinstance(blocks, Sequence)
    if not patterns or not blocks or not all(isinstance(pattern, str) for pattern in blocks):
        raise TypeError(
            f"blocks must be None, 'groups' or a sequence of name patterns, got {blocks!r}; a "
            f"pattern is one of the shell's, 'model.layers.0.*' say"
        )


def block_of(blocks: Blocks, group_index: int, name: str | int) -> int:
    """The number of a parameter's block: that of the first pattern that matches.

    Raises:
        ValueError: with patterns, a parameter without a name, or one that none matches.
    """
    if blocks is None:
        return 0
    if blocks == "groups":
        return group_index
    if isinstance(name, int):
        raise ValueError(
            f"blocks={list(blocks)!r} are name patterns, but the parameters have no names; pass "
            f"model.named_parameters()"
        )
    for number, pattern in enumerate(blocks):
        if fnmatch.fnmatchcase(name, pattern):
            return number
    raise ValueError(
        f"parameter {name!r} must belong to a block, but none of {list(blocks)!r} matches it; add "
        f"a pattern ('*' last takes what is left), or leave the parameter out"
    )


def block_due(count: int, order: BlockOrder, seed: int, step: int) -> int | None:
    """The block of a step (from 0) among `count`, or None for all of them."""
    if order == "all" or count == 1:
        return None
    if order == "cyclic":
        return step % count
    word = words(torch.zeros(1, dtype=torch.int64), seed=seed, stream=_ORDER_STREAM, draw=step)
    return int(word.flatten()[0]) * count >> 32
