"""How many instructions a program executes, from the listing of its machine code.

A program takes the way from its first instruction to its end with the fewest accesses to memory,
and among those the fewest instructions: that of a block that is whole and of ordinary numbers.
Blocks at a tensor's end access memory element by element, and what is rare (roots of zero, say) is
called. The body of a loop is executed once, except of a loop over a program's blocks.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator

_LABEL = re.compile(r"\s*(\.L_x_\d+|\$\S+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")
_MEMORY = ("LDG", "STG", "LDL", "STL")
_PADDING = ("NOP",)
#: Instructions of the search for a program's tensor, a loop, at most.
_SHORT = 48


class Listing:
    """A program in the form that nvdisasm prints it.

    Attributes:
        opcodes: the instructions' names.
    """

    def __init__(self, text: str) -> None:
        self.opcodes: list[str] = []
        self._guarded: list[bool] = []
        targets: list[str | None] = []
        places: dict[str, int] = {}
        for line in text.splitlines():
            label = _LABEL.match(line)
            if label is not None:
                places[label[1]] = len(self.opcodes)
                continue
            found = _INSTRUCTION.match(line)
            if found is None:
                continue
            guard, opcode, rest = found.groups()
            # A call of a place in the program itself is a jump.
            jumps = opcode.startswith(("BRA", "CALL"))
            target = re.search(r"`\((\.L_\S+)\)", rest) if jumps else None
            self.opcodes.append(opcode)
            self._guarded.append(guard is not None or re.match(r"\s+!?U?P", rest) is not None)
            targets.append(None if target is None else target[1])
        self._targets = [None if name is None else places[name] for name in targets]

    @property
    def loops(self) -> list[tuple[int, int]]:
        """The first and the last instruction of each loop."""
        ends = enumerate(self._targets)
        return [(first, last) for last, first in ends if first is not None and first < last]

    def _followers(self, i: int) -> Iterator[int]:
        opcode, target = self.opcodes[i], self._targets[i]
        jumps = opcode.startswith(("BRA", "CALL"))
        if opcode.startswith("RET") or (jumps and target is None):
            return  # To what is rare, or from it.
        if jumps:
            if target is not None and target > i:
                yield target
            if not self._guarded[i]:
                return
        if i + 1 < len(self.opcodes):
            yield i + 1

    def path(self) -> list[int]:
        """The instructions that are executed, in order."""
        costs, before = {0: (0, 0)}, {0: 0}
        queue = [((0, 0), 0)]
        while queue:
            cost, i = heapq.heappop(queue)
            accesses = cost[0] + self.opcodes[i].startswith(_MEMORY)
            for follower in self._followers(i):
                new = (accesses, cost[1] + 1)
                if new < costs.get(follower, (1 << 30, 0)):
                    costs[follower], before[follower] = new, i
                    heapq.heappush(queue, (new, follower))
        found = [min((i for i in costs if self._is_end(i)), key=costs.__getitem__)]
        while found[-1]:
            found.append(before[found[-1]])
        return found[::-1]

    def _is_end(self, i: int) -> bool:
        """Whether a program that has work ends there: without a condition, or where a loop ends."""
        target = self._targets[i]
        leaves = target is not None and target < i and self.opcodes[target] == "EXIT"
        if self.opcodes[i] != "EXIT" and not leaves:
            return False
        long = [loop for loop in self.loops if loop[1] - loop[0] > _SHORT]
        return any(first < i for first, _ in long) if long else not self._guarded[i]


def executed(text: str, blocks: int = 1) -> int:
    """How many instructions a program executes that does so many blocks one after the other."""
    listing = Listing(text)
    path = [i for i in listing.path() if not listing.opcodes[i].startswith(_PADDING)]
    if blocks == 1:
        return len(path)
    bodies = (sum(first <= i <= last for i in path) for first, last in listing.loops)
    return len(path) + (blocks - 1) * max(bodies)
