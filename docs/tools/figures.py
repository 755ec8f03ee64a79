"""Tables of measured figures, made from the JSON files under bench/results.

A line `<!-- figures: NAME argument; argument -->` in a page is followed by the table when the
documentation is built. In README.md, which is read without being built, the table stands between
that line and `<!-- end of figures -->`, and

    python docs/tools/figures.py README.md

writes it anew. A test compares the two, so that no figure is typed by hand.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
MARKER = re.compile(r"^<!-- figures: (?P<name>\w+)(?: (?P<arguments>.*?))? -->$", re.MULTILINE)
FILLED = re.compile(
    r"(?P<marker>^<!-- figures: .*? -->$).*?(?P<end>^<!-- end of figures -->$)",
    re.MULTILINE | re.DOTALL,
)
Row = dict[str, Any]
#: Instructions that a GPU executes while it moves a byte at .85 of what a copy moves: 132
#: multiprocessors, 128 lanes, 1.7 GHz; 3.0 (H100 SXM) and 4.2 TB/s (H200).
ROOM = {gpu: 132 * 128 * 1.7e9 / (0.85 * c) for gpu, c in (("H100", 3.0e12), ("H200", 4.2e12))}
#: The ratios of bench.scaling.
RATIOS = (("together", "alone"), ("beside", "alone"), ("together", "beside"))


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table whose first `text` columns are aligned to the left."""
    rule = ["---"] * text + ["---:"] * (len(headings) - text)
    lines = [headings, rule, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def chosen(rows: Sequence[Row], names: Sequence[str], key: str) -> list[Row]:
    """The rows of these names, in this order; all of them without names."""
    if not names:
        return list(rows)
    by_name = {row[key]: row for row in rows}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise KeyError(f"no row {', '.join(missing)}; there are: {', '.join(by_name)}")
    return [by_name[name] for name in names]


def spread(figure: Row, digits: int) -> str:
    if figure["mean"] is None:
        return "diverged"
    return f"{figure['mean']:.{digits}f} ± {figure['std']:.{digits}f}"


def command(result: Row) -> str:
    return (
        f"`{result['command']}`, {result['machine']['cpu']}, {result['machine']['threads']} threads"
    )


def plan(*names: str) -> str:
    """Peak memory of LLaMA-7B as planned, and what it is made of, in GB."""
    estimates = chosen(read("plan_llama7b.json")["estimates"], names, "name")
    parts = ("gradients", "optimizer state", "activations")
    return table(
        ["method", "peak", *parts],
        [
            [
                e["name"],
                f"{e['peak'] / 1e9:.1f}",
                *(f"{e['categories'][part] / 1e9:.1f}" for part in parts),
            ]
            for e in sorted(estimates, key=lambda e: e["peak"])
        ],
    )


def pretrain(size: str, *names: str) -> str:
    """Perplexity of a small LLaMA after 400 steps, best first."""
    records = chosen(read(f"pretrain/summary_{size}.json")["records"], names, "label")
    records.sort(key=lambda record: record["validation_perplexity"]["mean"] or float("inf"))
    return table(
        ["method", "lr", "perplexity", "state, MB", "ms an update"],
        [
            [
                r["label"],
                f"{r['lr']:.2g}",
                spread(r["validation_perplexity"], 1),
                f"{r['state_bytes'] / 1e6:.2f}",
                f"{r['cpu_seconds']['mean_optimizer'] * 1e3:.1f}",
            ]
            for r in records
        ],
    )


def convergence(*names: str) -> str:
    """Test loss and accuracy of the zeroth-order methods at one budget of forward passes."""
    records = chosen(read("convergence/summary.json")["records"], names, "label")
    records.sort(key=lambda record: record["test_cross_entropy"]["mean"])
    return table(
        ["method", "forwards a step", "lr", "test cross-entropy", "test accuracy", "against MeZO"],
        [
            [
                r["label"] + (" *" if r["lr_at_edge"] else ""),
                str(r["forwards_per_step"]),
                f"{r['lr']:.2g}",
                spread(r["test_cross_entropy"], 3),
                spread(r["test_accuracy"], 3),
                "" if r["verdict"] == "reference" else r["verdict"],
            ]
            for r in records
        ],
    )


def selection(*names: str) -> str:
    """Methods that choose what trains: what they reach, and what a step takes."""
    result = read("selection/summary.json")
    rows = []
    for r in chosen(result["records"], names, "label"):
        cost = result["costs"][r["method"]]
        rows.append(
            [
                r["label"] + (" *" if r["lr_at_edge"] else ""),
                str(r["steps"]),
                f"{r['lr']:.2g}",
                spread(r["cross_entropy"], 3),
                spread(r["accuracy"], 3),
                f"{cost['seconds']:.2f}",
                *(f"{cost[key] / 1e6:.1f}" for key in ("peak_bytes", "state_bytes")),
            ]
        )
    headings = ["method", "steps", "lr", "test cross-entropy", "test accuracy"]
    return table([*headings, "s a step", "peak, MB", "state, MB"], rows)


def memory(*names: str) -> str:
    """Measured peaks of the demo's model, beside the plan's."""
    rows: dict[str, dict[str, Row]] = {}
    for row in read("memory_cpu.json")["rows"]:
        rows.setdefault(row["name"], {})[row["unit"]] = row
    everything = [{"name": name, **units} for name, units in rows.items()]
    found = chosen(everything, names, "name")
    found.sort(key=lambda row: row["bytes"]["median"])
    return table(
        ["method", "peak of tensors, MB", "/ inference", "resident set, MB"],
        [
            [
                row["name"],
                f"{row['bytes']['median'] / 1e6:,.0f}",
                f"{row['bytes']['ratio']:.2f}",
                f"{row['bytes resident']['median'] / 1e6:,.0f}",
            ]
            for row in found
        ],
    )


def paper_memory() -> str:
    """The MeZO paper's memory table, beside what is planned and what the paper reports."""
    return table(
        ["model, method", "planned, GiB", "paper, GiB", "planned / paper"],
        [
            [
                row["name"],
                f"{row['median'] / 2**30:.1f}",
                f"{row['paper'] / 2**30:.0f}",
                f"{row['ratio']:.2f}",
            ]
            for row in read("paper_memory.json")["rows"]
        ],
    )


def step(file: str, *names: str) -> str:
    """Time and memory of one step of a model of the size of GPT-2 small."""
    times: dict[str, Row] = {}
    peaks: dict[str, Row] = {}
    for row in read(file)["rows"]:
        (times if row["unit"] == "s" else peaks)[row["name"]] = row
    rows = sorted(chosen(list(times.values()), names, "name"), key=lambda row: row["ratio"])
    return table(
        ["one step", "seconds", "/ two forwards", "peak above the model, MiB"],
        [
            [
                "two forward passes" if row["name"] == "inference" else row["name"],
                f"{row['median']:.2f}",
                f"{row['ratio']:.2f}",
                f"{peaks[row['name']]['beyond'] / 2**20:,.0f}",
            ]
            for row in rows
        ],
    )


def galore_step() -> str:
    """GaLore's step over the matrices of one LLaMA layer, beside its floor and galore-torch."""
    layers: dict[str, dict[str, Row]] = {}
    for file in ("lowrank_step_cpu.json", "lowrank_step_7b_cpu.json"):
        for row in read(file)["rows"]:
            match = re.fullmatch(r"(\w+) (\w+) layer (\w+)", row["name"])
            if match:
                size, dtype, what = match.groups()
                layers.setdefault(f"{size}, {dtype}", {})[what] = row
    return table(
        ["LLaMA of", "ms a layer", "/ floor", "galore-torch's time / ours"],
        [
            [
                name,
                f"{found['zoopt']['amortised_ms']:,.1f}",
                f"{found['zoopt']['amortised_ratio']:.2f}",
                f"{found['published']['amortised_ms'] / found['zoopt']['amortised_ms']:.2f}",
            ]
            for name, found in layers.items()
        ],
    )


def learning_rates() -> str:
    """The best learning rate of each method over that of torch's AdamW, where both were tuned."""
    sizes = ("1m", "6m")
    found = {
        size: {r["label"]: r["lr"] for r in read(f"pretrain/summary_{size}.json")["records"]}
        for size in sizes
    }
    labels = [label for label in found["1m"] if all(label in found[size] for size in sizes)]
    rows = []
    for label in labels:
        own = [found[size][label] for size in sizes]
        ratios = [
            lr / found[size]["torch.optim.AdamW"] for lr, size in zip(own, sizes, strict=True)
        ]
        rows.append([label, *(f"{lr:.2g}" for lr in own), *(f"{ratio:.2g}" for ratio in ratios)])
    rows.sort(key=lambda row: float(row[3]))
    return table(["method", "lr, 1.3M", "lr, 5.8M", "/ AdamW's, 1.3M", "/ AdamW's, 5.8M"], rows)


def precision() -> str:
    """What 16-bit weights lose."""
    return table(
        ["method", "what it is", "figure"],
        [
            [row["name"], row["unit"], f"{row['median']:.2g}"]
            for row in read("precision.json")["rows"]
        ],
        text=2,
    )


def demo() -> str:
    """What the demo reaches on held-out sentences."""
    result = read("demo_figures.json")
    before, after = result["test"]["before"], result["test"]["after"]
    rows = [
        [name, f"{before[key]:.3f}", f"{after[key]:.3f}"]
        for name, key in (
            ("accuracy", "accuracy"),
            ("accuracy, threshold at the median (no label bias)", "calibrated_accuracy"),
            ("cross-entropy", "cross_entropy"),
            ("cross-entropy, threshold at the median", "calibrated_cross_entropy"),
        )
    ]
    return table([f"{result['sentences']['test']} held-out sentences", "before", "after"], rows)


def demo_memory() -> str:
    """The demo's measured peaks."""
    peaks = {
        key: value["peak_mib"]
        for key, value in read("demo_figures.json")["memory"].items()
        if isinstance(value, dict)
    }
    names = {"inference": "inference", "mezo": "MeZO", "adamw": "AdamW"}
    return table(
        ["peak memory, same batch, bfloat16", "MiB", "times inference"],
        [
            [names[key], f"{peak:,.0f}", f"{peak / peaks['inference']:.2f}"]
            for key, peak in peaks.items()
        ],
    )


def quantised() -> str:
    """MeZO on the demo's model, in bfloat16 and in 4 bits."""
    result = read("quantised.json")
    names = {
        "mezo": "MeZO, bfloat16",
        "mezo-lora": "MeZO on LoRA, bfloat16",
        "qzo-int4": "QZO, 4 bits",
        "mezo-lora-int4": "MeZO on LoRA, 4 bits",
    }
    rows = [
        [
            names[name],
            f"{row['trained'] / 1e6:.1f} M",
            f"{(row['model_bytes'] + row['state_bytes']) / 1e6:.0f}",
            f"{row['seconds_a_step']:.1f}",
            f"{row['accuracy_before']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['cross_entropy_before']:.3f}",
            f"{row['cross_entropy']:.3f}",
            f"{row['seeds']}",
        ]
        for name, row in result["methods"].items()
    ]
    headings = [
        "method",
        "trained",
        "weights and state, MB",
        "s a step",
        "accuracy before",
        "after",
    ]
    return table([*headings, "cross-entropy before", "after", "seeds"], rows)


def green_trainer() -> str:
    """Shares of a full backward pass, planned and measured."""
    rows = [
        [row["model"], f"{row['budget']:.0%}", f"{row['planned']:.1%}", f"{row['median']:.1%}"]
        for row in read("green_trainer_cpu.json")["rows"]
    ]
    return table(["model", "budget", "planned", "measured time"], rows)


def machine_code() -> str:
    """What GPU kernels compile to."""
    kernels = {
        "perturb, bf16, normal, nearest": "perturb bfloat16 weights",
        "apply, bf16, normal, stochastic": "MeZO's update, rounded stochastically",
        "adamw, bf16, int8, stochastic": "AdamW, int8 moments, rounded stochastically",
        "adamw, bf16, int4, stochastic": "AdamW, int4 moments, rounded stochastically",
    }
    found = {row["name"]: row for row in read("sass.json")["rows"]}
    rows = []
    for name, what in kernels.items():
        for target in ("sm_80", "sm_90"):
            row = found[f"{name}, {target}"]
            counts = (row["registers"], row["spills"], row["access_bits"])
            rows.append([what, target, f"{row['executed_per_element']:.1f}", *map(str, counts)])
    headings = ["kernel", "target", "instructions an element", "registers", "spills", "access bits"]
    return table(headings, rows, text=2)


def bound_by_arithmetic(gpu: str) -> list[Row]:
    """The kernels that execute more instructions than the GPU has room for while it moves their
    bytes at .85 of a copy's speed. Entries that are read one by one move more than is counted."""
    return [
        row
        for row in read("sass.json")["rows"]
        if row["target"] == "sm_90"
        and not row["kernel"].startswith("entries")
        and row["executed_per_element"] > ROOM[gpu] * row["bytes_per_element"]
    ]


def arithmetic() -> str:
    """Those of an H100, by what they do, with a column for each dtype of the weights."""
    counts: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in bound_by_arithmetic("H100"):
        kind = row["distribution"] if row["format"] == "-" else row["format"]
        key = (row["kernel"], kind, row["rounding"])
        counts.setdefault(key, {})[row["dtype"]] = row
    rows = []
    for (kernel, *kind), found in counts.items():
        cells = [
            f"{found[dtype]['executed_per_element']:.1f} of "
            f"{ROOM['H100'] * found[dtype]['bytes_per_element']:.1f}"
            if dtype in found
            else ""
            for dtype in ("fp32", "bf16", "fp16")
        ]
        rows.append([f"`{kernel}`", *kind, *cells])
    return table(["kernel", "noise", "rounding", "float32", "bfloat16", "float16"], rows, text=3)


def trajectory(*names: str) -> str:
    """Milliseconds a step of replays of one file, and of ways to make its writes again."""
    rows = []
    for r in chosen(read("trajectory.json")["replay"], names, "run"):
        ways = (("one_by_one", "x_one_by_one"), ("published", "x_published"))
        rows.append(
            [
                r["run"],
                *(f"{r[key]:.2f}" for key in ("ms_a_step", "ms_closed", "ms_noise")),
                *(f"{r[f'ms_{way}']:.1f} ({r[ratio]:.0f}x)" for way, ratio in ways),
            ]
        )
    headings = ["weights", "replay", "closed form", "the noise alone"]
    return table([*headings, "one pass per write", "published passes"], rows)


def recording() -> str:
    """What the record costs."""
    found = read("trajectory.json")["recording"]
    costs = {"8M parameters": found}
    costs |= {f"the demo's model, {name}": cost for name, cost in found.get("demo", {}).items()}
    rows = [
        [
            name,
            f"{cost['step_ms']:.0f}",
            f"{cost['recorder_ms']:.2f}",
            f"{cost['share']:.2%}",
            f"{cost['bytes_a_step']:.0f}",
        ]
        for name, cost in costs.items()
    ]
    return table(["run", "ms a step", "ms in the recorder", "share", "bytes a step"], rows)


def scaling() -> str:
    """A step of several processes on one machine."""
    rows = []
    for r in read("scaling.json")["measured"]:
        times = (f"{1e3 * r[key]:.0f}" for key in ("alone", "beside", "together"))
        ratios = (f"{r[f'{name} / {base}']:.2f}" for name, base in RATIOS)
        rows.append([str(r["ranks"]), *times, f"{1e6 * r['exchange']:.0f}", *ratios])
    headings = ["processes", *(f"{name}, ms" for name in ("alone", "beside", "together"))]
    ratios = (f"{name} / {base}" for name, base in RATIOS)
    return table([*headings, "exchange, us", *ratios], rows)


def many_ranks() -> str:
    """A step as modelled for many ranks."""
    rows = [
        [
            f"{r['ranks']:,}",
            *(f"{1e3 * r[key]:.1f}" for key in ("tree", "ring", "straggler")),
            f"{r['efficiency']:.0%}",
        ]
        for r in read("scaling.json")["modelled"]
    ]
    headings = ["ranks", "tree, ms", "ring, ms", "slowest rank, ms", "efficiency"]
    return table(headings, rows)


def overhead() -> str:
    """The Python of a virtual step: without biases and with."""
    rows = [r for r in read("overhead.json")["rows"] if r["kind"] == "virtual"]
    found = {r["name"]: r for r in rows}
    table_rows = []
    for name, own in found.items():
        biased = found.get(f"{name}, biases")
        if biased is not None:
            times = (f"{r[key]:.0f}" for r in (own, biased) for key in ("median", "inside"))
            table_rows.append([name, *times, f"{biased['calls']:.0f}"])
    headings = ["method", "us an operator", "inside evaluations", "with biases, us"]
    headings += ["inside evaluations", "calls"]
    return table(headings, table_rows)


def overhead_in_place() -> str:
    """The Python of a step in place, by the number of tensors."""
    rows = [r for r in read("overhead.json")["rows"] if r["kind"] == "in place"]
    counts = list(dict.fromkeys(r["tensors"] for r in rows))
    found = {(r["name"], r["tensors"]): r["median"] for r in rows}
    names = dict.fromkeys(r["name"] for r in rows)
    table_rows = [[name, *(f"{found[name, n] / 1e3:.1f}" for n in counts)] for name in names]
    return table(["method", *(f"{n:,} tensors, ms" for n in counts)], table_rows)


def overhead_first_order() -> str:
    """The Python of a first-order step."""
    rows = [
        [r["name"], f"{r['median'] / 1e3:.1f}", f"{r['calls']:.0f}"]
        for r in read("overhead.json")["rows"]
        if r["kind"] == "first-order"
    ]
    return table(["optimizer", "ms a step", "calls a tensor"], rows)


def decision() -> str:
    """Which optimizer: what must fit, what it takes at 7B, and what it trains to."""
    planned = {e["name"]: e["peak"] / 1e9 for e in read("plan_llama7b.json")["estimates"]}
    backprop = {
        r["label"]: r["validation_perplexity"]["mean"]
        for r in read("pretrain/summary_1m.json")["records"]
    }
    forward = {
        r["label"]: r["test_cross_entropy"]["mean"]
        for r in read("convergence/summary.json")["records"]
    }
    fused = ", each gradient freed as it arrives"
    choices = (
        ("weights, gradients and a quarter of Adam's state", "AdamW(state_dtype=\"int8\")",
         "zoopt.AdamW, int8 state", "AdamW, int8"),
        (f"weights and a quarter of Adam's state{fused}",
         "AdamW(state_dtype=\"int8\")` and `fuse_backward",
         "zoopt.AdamW, int8 state, fused backward", "AdamW, int8"),
        ("weights and gradients", "Fira", "Fira", "Fira"),
        ("the same, with no SVD and no basis to keep", "Apollo", "Apollo", "Apollo"),
        ("weights and activations", "GaLoreAdamW(state_dtype=\"int8\")` and `fuse_backward",
         "GaLoreAdamW, int8 state, fused backward", "GaLoreAdamW, warm, int8"),
        ("the same, next to no state", "SM3` and `fuse_backward", "SM3, fused backward", "SM3"),
        ("inference; or the objective has no derivative", "MeZO", "MeZO", "MeZO"),
        ("the same, and the loss's scale is not known", "ZOAdam(state=\"scalar\")",
         "ZOAdam, scalar", "ZOAdam, scalar"),
        ("inference, and the last layers' activations", "Hybrid(MeZO, AdamW)",
         "Hybrid, last two layers", None),
    )  # fmt: skip
    rows = []
    for what, take, plan_name, label in choices:
        trains = "" if label is None else (
            f"{backprop[label]:.0f}" if label in backprop else f"{forward[label]:.3f}"
        )  # fmt: skip
        rows.append([what, f"`{take}`", f"{planned[plan_name]:.1f}", trains])
    return table(["what fits", "take", "LLaMA-7B, GB", "trains to"], rows, text=2)


def source(file: str) -> str:
    """The command and the machine that made a result."""
    return command(read(file))


TABLES: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        plan,
        pretrain,
        convergence,
        selection,
        memory,
        paper_memory,
        step,
        galore_step,
        learning_rates,
        precision,
        demo,
        demo_memory,
        quantised,
        green_trainer,
        machine_code,
        arithmetic,
        trajectory,
        recording,
        overhead,
        overhead_in_place,
        overhead_first_order,
        scaling,
        many_ranks,
        decision,
        source,
    )
}


def render(marker: str) -> str:
    """The table that a marker line asks for."""
    match = MARKER.fullmatch(marker)
    if match is None or match["name"] not in TABLES:
        raise KeyError(f"{marker!r} names none of {', '.join(TABLES)}")
    arguments = [part.strip() for part in (match["arguments"] or "").split(";") if part.strip()]
    return TABLES[match["name"]](*arguments)


def filled(text: str) -> str:
    """A page with the tables between its markers made anew."""
    return FILLED.sub(lambda m: f"{m['marker']}\n{render(m['marker'])}\n{m['end']}", text)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(filled(path.read_text()))
