"""Damaged files and killed runs: a sample of what `bench/durability.py` does at length."""

from __future__ import annotations

from pathlib import Path

from bench.durability import damages, kills


def test_damaged_files_never_give_wrong_weights(tmp_path: Path) -> None:
    found = damages(300, 5, tmp_path)
    assert sum(found.values()) == 300
    assert not {name: count for name, count in found.items() if name.endswith("wrong")}
    for kind in ("flip", "swap", "twice"):
        assert found[f"{kind} error"] > 0
    assert found["cut said"] > 0


def test_killed_runs_lose_nothing_that_had_returned(tmp_path: Path) -> None:
    found = kills(20, 5, tmp_path)
    assert found["kills"] == 20
    assert found["steps"] > 20
    assert found["lost"] == found["wrong"] == 0
