"""The file of a run: a header, and a record for each request to the optimizer.

    file    = MAGIC, length u32, header (zlib of JSON), crc32 u32, record ...
    record  = tag u8, count varint, check u8, [lr f64 a group], payload, chain u32

Numbers are little-endian. `tag` has the kind in its low three bits, then whether the losses are
float64 (else float32, where these hold them exactly) and whether learning rates follow. `count` is
the number of losses or of bytes. `check` is a checksum of tag and count alone, to distinguish a
damaged length from a record that was cut off. `chain` is the crc32 of the record, starting from
that of the record before: flipped bits and missing, duplicate or misplaced records break it.

The last record of a process that was killed can be incomplete: it is left out, and reported.
Any other inconsistency is an error.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAGIC = b"ZOOPTRUN"
FORMAT = 1
_WIDE, _RATES = 8, 16


class Kind(enum.IntEnum):
    """What was asked for: a step of a closure, a probe, a step of what was probed, to drop that;
    what was changed from outside before the next of these; evaluations that an error has ended; a
    step of losses that were measured elsewhere."""

    STEP = 1
    PROBE = 2
    APPLY = 3
    DROP = 4
    CHANGE = 5
    FAILED = 6
    TOLD = 7


#: The change that a closed recorder leaves: a hash of the weights.
TRAINED = "weights"
#: Those that take a step.
STEPS = (Kind.STEP, Kind.APPLY, Kind.TOLD)


class TrajectoryError(ValueError):
    """A file that is no trajectory, is damaged, or belongs to another model."""


@dataclasses.dataclass(frozen=True)
class Event:
    """A record.

    Attributes:
        kind: what was asked for.
        losses: the closure's results, in order.
        rates: the learning rate of each group, if one has changed; empty if not.
        change: what was changed, see `zoopt.trajectory.recorder`.
    """

    kind: Kind
    losses: tuple[float, ...] = ()
    rates: tuple[float, ...] = ()
    change: dict[str, Any] = dataclasses.field(default_factory=dict)


def encode_header(header: dict[str, Any]) -> bytes:
    """The head of a file."""
    payload = zlib.compress(json.dumps(header).encode())
    head = MAGIC + struct.pack("<I", len(payload)) + payload
    return head + struct.pack("<I", zlib.crc32(head))


def encode(event: Event, chain: int) -> tuple[bytes, int]:
    """A record, and the chain after it.

    Args:
        chain: of the record before, or the crc32 of the header.
    """
    tag = int(event.kind)
    if event.kind is Kind.CHANGE:
        payload = json.dumps(event.change).encode()
        count = len(payload)
    else:
        wide = any(_narrowed(loss) != loss and not math.isnan(loss) for loss in event.losses)
        payload = struct.pack(f"<{len(event.losses)}{'d' if wide else 'f'}", *event.losses)
        count = len(event.losses)
        tag |= _WIDE * wide
    tag |= _RATES * bool(event.rates)
    head = bytes([tag]) + _varint(count)
    rates = struct.pack(f"<{len(event.rates)}d", *event.rates)
    body = head + bytes([zlib.crc32(head) & 0xFF]) + rates + payload
    chain = zlib.crc32(body, chain)
    return body + struct.pack("<I", chain), chain


def _narrowed(value: float) -> float:
    """The value as a float32; infinity if it is too large."""
    try:
        narrowed: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.inf
    return narrowed


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@dataclasses.dataclass
class Contents:
    """The content of a file.

    Attributes:
        header: see `zoopt.trajectory.header`.
        events: the complete records.
        size: bytes up to the end of the last of them.
        torn: bytes after it, of a record that was cut off.
        step_ends: where the record of each step ends, and the chain there; those of the header
            come first.
        trained: a hash of the weights after the last step; None if the recorder was not closed.
    """

    header: dict[str, Any]
    events: list[Event]
    size: int
    torn: int
    step_ends: list[tuple[int, int]]
    trained: str | None = None

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.step_ends) - 1


def read(path: str | Path) -> Contents:
    """Read a file and check all of it.

    Raises:
        TrajectoryError: it is no trajectory, of an unknown version, or damaged.
        OSError: it cannot be read.
    """
    data = Path(path).read_bytes()
    header, end, chain = _header(data, path)
    groups = len(header["groups"])
    events: list[Event] = []
    step_ends, trained = [(end, chain)], None
    while end < len(data):
        try:
            event, after, chain = _record(data, end, chain, groups)
        except _Torn:
            break
        except (TrajectoryError, ValueError, KeyError) as error:
            raise TrajectoryError(
                f"{path} is damaged at byte {end}, after {len(events)} whole records: {error}; "
                f"restore it from a copy, or replay what is before with until="
            ) from None
        end, trained = after, event.change.get(TRAINED)
        if trained is None:
            events.append(event)
        if event.kind in STEPS:
            step_ends.append((end, chain))
    return Contents(header, events, end, len(data) - end, step_ends, trained)


class _Torn(Exception):
    """The data end within a record."""


def _header(data: bytes, path: str | Path) -> tuple[dict[str, Any], int, int]:
    """The header, where it ends, and its checksum."""
    if data[: len(MAGIC)] != MAGIC:
        raise TrajectoryError(f"{path} is no trajectory of zoopt; it begins with {data[:8]!r}")
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    end = start + length
    if end + 4 > len(data):
        raise TrajectoryError(f"{path} ends within its header, so nothing was recorded in it")
    checksum = int.from_bytes(data[end : end + 4], "little")
    if zlib.crc32(data[:end]) != checksum:
        raise TrajectoryError(f"{path} is damaged in its header; restore it from a copy")
    header: dict[str, Any] = json.loads(zlib.decompress(data[start:end]))
    if header.get("format") != FORMAT:
        raise TrajectoryError(
            f"{path} must be of format {FORMAT}, got {header.get('format')!r}; install the version "
            f"of zoopt that wrote it, {header.get('zoopt')}"
        )
    return header, end + 4, checksum


def _record(data: bytes, start: int, chain: int, groups: int) -> tuple[Event, int, int]:
    """The record that begins at `start`, where it ends, and the chain after it."""
    tag = data[start]
    count, position = _read_varint(data, start + 1)
    if position >= len(data):
        raise _Torn
    if data[position] != zlib.crc32(data[start:position]) & 0xFF:
        raise TrajectoryError("a length does not have its checksum")
    position += 1
    kind = Kind(tag & 7)
    rates_end = position + (8 * groups if tag & _RATES else 0)
    width = 1 if kind is Kind.CHANGE else 8 if tag & _WIDE else 4
    end = rates_end + width * count
    if end + 4 > len(data):
        raise _Torn
    chain = zlib.crc32(data[start:end], chain)
    if int.from_bytes(data[end : end + 4], "little") != chain:
        raise TrajectoryError("a record does not have its checksum")
    rates = struct.unpack(f"<{(rates_end - position) // 8}d", data[position:rates_end])
    payload = data[rates_end:end]
    if kind is Kind.CHANGE:
        return Event(kind, rates=rates, change=json.loads(payload)), end + 4, chain
    losses = struct.unpack(f"<{count}{'d' if tag & _WIDE else 'f'}", payload)
    return Event(kind, losses, rates), end + 4, chain


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        if position >= len(data):
            raise _Torn
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise TrajectoryError("a length has no end")


def steps_of(events: Sequence[Event]) -> Iterator[list[Event]]:
    """The events of each step: those that led to it, and the step. Later events are left out."""
    waiting: list[Event] = []
    for event in events:
        waiting.append(event)
        if event.kind in STEPS:
            yield waiting
            waiting = []
