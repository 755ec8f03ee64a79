"""The output of sections: rows of `zoopt.bench.common`, named by section, setting and method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from zoopt.bench import common
from zoopt.bench.common import Row

#: Called with each row as soon as it is measured.
Emit = Callable[[Row], None]


def timed(
    section: str,
    setting: str,
    method: str,
    seconds: Sequence[float],
    *,
    to: Sequence[float] | None = None,
    **extra: Any,
) -> Row:
    """A row of a method's durations, in milliseconds. Its ratio is relative to durations `to`."""
    return common.measured(
        f"{setting}: {method}",
        [1e3 * second for second in seconds],
        "ms",
        ratio=None if to is None else _ratio(seconds, to),
        section=section,
        setting=setting,
        method=method,
        **extra,
    )


def counted(section: str, setting: str, method: str, value: float, unit: str, **extra: Any) -> Row:
    """A row of a count, such as bytes or tests."""
    name = f"{setting}: {method}"
    what: dict[str, Any] = {"section": section, "setting": setting, "method": method}
    return common.counted(name, value, unit, **what, **extra)


def failed(section: str, setting: str, method: str, unit: str, error: BaseException | str) -> Row:
    """A row for something that could not be measured, with the reason."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    row = common.failed(f"{setting}: {method}", unit, (reason.strip().splitlines() or ["?"])[0])
    return {**row, "section": section, "setting": setting, "method": method}


def find(rows: Iterable[Row], setting: str, method: str, unit: str) -> Row | None:
    """Find the row of that setting, method and unit, if it has a figure."""
    for row in rows:
        key = row.get("setting"), row.get("method"), row["unit"]
        if key == (setting, method, unit) and row["median"] is not None:
            return row
    return None


def of_section(rows: Iterable[Row], section: str) -> Iterator[Row]:
    """The rows of one section."""
    return (row for row in rows if row.get("section") == section)


def forget(device: torch.device) -> None:
    """Free the memory of objects that are no longer referenced."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _ratio(seconds: Sequence[float], to: Sequence[float]) -> float:
    """The ratio round by round if both have the same rounds, otherwise that of the medians."""
    if len(seconds) == len(to):
        return common.ratio(seconds, to)
    import statistics

    return statistics.median(seconds) / statistics.median(to)
