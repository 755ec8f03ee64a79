"""The comparison of 4-bit and float training by forward passes: which results make its table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bench import quantised
from bench.runs import Store, config_hash
from bench.selection.run import Run


def table(*arguments: str) -> Any:
    options = quantised.parse(["--only-report", *arguments])
    results = Store[Run](options.runs, lambda run: quantised.configuration(run, options))
    return quantised.summary(options, results)["methods"]


def test_the_table_is_of_runs_of_one_model_at_the_best_rate(tmp_path: Path) -> None:
    """The committed one is of the committed runs; those of another model, or at a rate that is not
    the method's best, are not in it."""
    committed = json.loads(Path(f"{quantised.RESULTS}.json").read_text())["methods"]
    assert table() == committed
    assert committed["qzo-int4"]["seeds"] == 3
    assert not table("--model", "another")
    runs = shutil.copytree(quantised.RESULTS, tmp_path / "runs")
    for name, lr in (("mezo-lr0.0002", 1e-3), ("qzo-int4-lr0.02", 1e-2)):
        other = json.loads((runs / f"{name}-n200-s0.json").read_text())
        other["config"]["lr"], other["metrics"]["accuracy"] = lr, 0.99
        other["config_hash"] = config_hash(other["config"])
        method = name.rpartition("-lr")[0]
        (runs / f"{method}-lr{lr:g}-n200-s0.json").write_text(json.dumps(other))
    assert table("--runs", str(runs)) == committed
