"""The memory table of the MeZO paper, planned: OPT at 400 tokens, batch 1 (Malladi et al., 2023).

MeZO in half precision. The paper ran the published algorithm, which makes each parameter's
direction and its products as new tensors; zoopt's needs no such thing. The table is what the driver
reports, so a plan lacks the framework's own memory: 723 MiB for a process that holds one number on
a GPU (discuss.pytorch.org, thread 73021). The table's GB are taken as 2^30 bytes.

Adam in full precision: what weights, gradients, moments and activations explain of the table's
figure, which was measured over several GPUs whose copies and buffers no plan of one device has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from zoopt.bench import common, methods
from zoopt.memory import plan

#: Model: GB of MeZO and of full fine-tuning by Adam.
TABLE = {"opt-1.3b": (4, 27), "opt-6.7b": (14, 156), "opt-13b": (26, 316), "opt-30b": (58, 633)}
GIB, FRAMEWORK = 2**30, 723 * 2**20
TOKENS = 400


def rows_of(model: str) -> list[common.Row]:
    published = methods.table()["mezo-published"].method
    half = plan(model, optimizers=[published, "MeZO"], seq=TOKENS, dtype="float16")
    full = plan(model, optimizers=["AdamW"], seq=TOKENS, dtype="float32")["AdamW"]
    paper, adam = TABLE[model]
    rows = []
    for name, label in ((published.name, "MeZO, published"), ("MeZO", "zoopt.MeZO")):
        total = half[name].peak + FRAMEWORK
        rows.append(
            common.counted(
                f"{model}, {label}",
                total,
                "bytes",
                ratio=total / (paper * GIB),
                planned=half[name].peak,
                paper=paper * GIB,
            )
        )
    rows.append(
        common.counted(
            f"{model}, AdamW float32",
            full.peak,
            "bytes",
            ratio=full.peak / (adam * GIB),
            paper=adam * GIB,
            categories=full.categories,
        )
    )
    return rows


def text(rows: Sequence[common.Row]) -> str:
    records = []
    for row in rows:
        record = {
            "name": row["name"],
            "total": row["median"] / GIB,
            "paper": row["paper"] / GIB,
            "ratio": row["ratio"],
        }
        for category, count in row.get("categories", {}).items():
            record[category] = count / row["paper"]
        records.append(record)
    columns = {
        "name": "model and method",
        "total": "planned GiB",
        "paper": "paper",
        "ratio": "planned / paper",
        "parameters": "weights / paper",
        "gradients": "gradients / paper",
        "optimizer state": "moments / paper",
        "activations": "activations / paper",
        "workspace": "workspace / paper",
    }
    return common.table(columns, records)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(
        str(__doc__), "python -m bench.paper_memory --json bench/results/paper_memory.json"
    )
    common.add_common_arguments(parser, repeats=1)
    return common.parse(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = parse(argv)
    rows = []
    for model in TABLE:
        common.progress(f"planning {model}")
        rows += rows_of(model)
    common.progress("")
    common.say(f"{text(rows)}\n\nMeZO with {FRAMEWORK >> 20} MiB of the framework", options.json)
    document = common.document("paper_memory", options, torch.device("cpu"), rows)
    common.write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
