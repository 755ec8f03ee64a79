"""What changed beyond noise between two results of one benchmark, A before and B after.

Rows are matched by name and unit; in every unit less is better. A figure has changed if its medians
differ by more than the two spreads (interquartile ranges of the rounds) together, and by more than
--threshold: between runs on one machine, medians drift by some per cent, which the rounds of a
single run do not show. Counts, such as bytes, have no noise: every difference is a change. The exit
status is 1 if anything is worse, that is slower or larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from zoopt.bench import common
from zoopt.cli import terminal

Verdict = Literal["worse", "better", "within noise", "noise unknown", "new", "gone"]
STYLES = {"worse": "bold red", "better": "green", "noise unknown": "yellow"}
#: Entries that must be equal if a difference is to come from the code.
SAME_MACHINE = ("device", "cpu", "threads", "torch", "triton", "numba")


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure, before and after.

    Attributes:
        before, after: its rows, or None where the document lacks it.
        noise: the difference that its medians must exceed, or None if a spread is not known.
    """

    name: str
    unit: str
    before: common.Row | None
    after: common.Row | None
    noise: float | None
    verdict: Verdict


def compare(before: Mapping[str, Any], after: Mapping[str, Any], threshold: float) -> list[Change]:
    """Every figure of either document, in the order of the first."""
    rows: list[dict[tuple[str, str], common.Row]] = [
        {(row["name"], row["unit"]): row for row in document["rows"]}
        for document in (before, after)
    ]
    changes = []
    for name, unit in dict.fromkeys([*rows[0], *rows[1]]):
        a, b = (table.get((name, unit)) for table in rows)
        noise = None if a is None or b is None else noise_of(a, b, threshold)
        changes.append(Change(name, unit, a, b, noise, verdict(a, b, noise)))
    return changes


def noise_of(a: common.Row, b: common.Row, threshold: float) -> float | None:
    """The largest difference between medians that may be noise; None if that is not known."""
    if a["spread"] is None or b["spread"] is None:
        return None
    spreads = float(a["spread"] + b["spread"])
    return max(spreads, threshold * abs(a["median"])) if spreads else 0.0


def verdict(a: common.Row | None, b: common.Row | None, noise: float | None) -> Verdict:
    """Whether a figure changed by more than `noise`."""
    if a is None or b is None:
        return "new" if a is None else "gone"
    if a["median"] is None or b["median"] is None:
        # It could be measured before, and now runs out of memory, for example.
        if a["median"] == b["median"]:
            return "within noise"
        return "worse" if b["median"] is None else "better"
    if noise is None:
        return "noise unknown"
    difference = b["median"] - a["median"]
    if abs(difference) <= noise:
        return "within noise"
    return "worse" if difference > 0 else "better"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """How the two differ apart from their figures: machine, versions, arguments."""
    lines = []
    for part, keys in (
        ("machine", SAME_MACHINE),
        ("arguments", sorted({*before["arguments"], *after["arguments"]})),
    ):
        old, new = (document[part] or {} for document in (before, after))
        lines += [
            f"{part}: {key} was {old.get(key)}, is {new.get(key)}"
            for key in keys
            if old.get(key) != new.get(key)
        ]
    return lines


def cells(change: Change) -> list[Any]:
    """A change as a line of the table."""
    a, b = change.before, change.after
    percent = ""
    if a is not None and b is not None and a["median"] and b["median"] is not None:
        percent = f"{(b['median'] / a['median'] - 1.0) * 100.0:+.1f} %"
    noise = "" if change.noise is None else f"{change.noise:.4g}"
    return [
        *(change.name, change.unit, figure(a), figure(b), percent, noise),
        terminal.styled(change.verdict, STYLES.get(change.verdict, "")),
    ]


def figure(row: common.Row | None) -> str:
    """A row's median and spread, or why it has none."""
    if row is None:
        return ""
    if row["median"] is None:
        return str(row["reason"])
    if row["unit"] == "bytes":
        return f"{row['median']:,.0f}"
    return f"{row['median']:.4g}" + (f" +- {row['spread']:.2g}" if row["spread"] else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns 1 if anything is worse."""
    parser = terminal.Parser(
        "zoopt bench compare", str(__doc__), "zoopt bench compare before.json after.json"
    )
    parser.add_argument("before", type=Path, metavar="A.json", help="a benchmark's results")
    parser.add_argument("after", type=Path, metavar="B.json", help="later ones of the same")
    parser.add_argument(
        "--threshold", type=terminal.fraction, default=0.05, help="smallest relative change"
    )
    terminal.add_json_argument(parser)
    options = parser.parse_args(argv)
    before, after = (common.load_document(path) for path in (options.before, options.after))
    if before["benchmark"] != after["benchmark"]:
        raise terminal.CommandError(
            f"A and B must be of one benchmark, got {before['benchmark']!r} and "
            f"{after['benchmark']!r}"
        )
    console = terminal.open_console(options.json)
    for line in differences(before, after):
        console.print(f"note: {line}", markup=False)
    changes = compare(before, after, options.threshold)
    terminal.print_table(
        console,
        f"{before['benchmark']}: {options.before} -> {options.after}",
        ("figure", "unit", "before", "after", "change", "noise", "verdict"),
        [cells(change) for change in changes],
    )
    verdicts = [change.verdict for change in changes]
    counts = {kind: verdicts.count(kind) for kind in get_args(Verdict)}
    console.print(", ".join(f"{count} {kind}" for kind, count in counts.items() if count))
    console.print(
        "changed: medians further apart than both interquartile ranges together "
        f"and than {options.threshold:.0%}"
    )
    terminal.write_json(options.json, [dataclasses.asdict(change) for change in changes])
    return 1 if counts["worse"] else 0
