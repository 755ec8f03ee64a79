"""Programs that start several processes: the Trainer's, and the example's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

#: Trains for four steps, again from the checkpoint of the second; writes weights and log.
PROGRAM = """
import json, os, pathlib, sys
import torch
from tests.test_integration_trainer import Shares, bits, build
folder, batch = pathlib.Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
states = []
for resume in (None, str(folder / "checkpoint-2")):
    torch.manual_seed(0)
    model = Shares()
    trainer = build(
        model, folder, per_device_train_batch_size=batch, save_strategy="steps", save_steps=2,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    states.append([p.detach().clone() for p in model.parameters()])
    rank = trainer.args.process_index
    log = [{k: e[k] for k in ("loss", "grad_norm") if k in e} for e in trainer.state.log_history]
torch.save(states, folder / f"weights{rank}.pt")
(folder / f"log{rank}.json").write_text(json.dumps(log))
assert type(trainer.model_wrapped).__name__ == "Shares"
"""


def launch(processes: int, *command: str) -> str:
    options = ["--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    runner = ["-m", "torch.distributed.run", *options] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *runner, *command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_the_trainer_on_two_processes_is_that_of_one_with_their_batches(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    two, one = tmp_path / "two", tmp_path / "one"
    for folder, processes, batch in ((two, 2, 2), (one, 1, 4)):
        folder.mkdir()
        launch(processes, str(program), str(folder), str(batch))
    first, second = (torch.load(two / f"weights{rank}.pt") for rank in range(2))
    [alone, _] = torch.load(one / "weights0.pt")
    for straight, resumed, other, single in zip(*first, second[0], alone, strict=True):
        assert torch.equal(straight, resumed)
        assert torch.equal(straight, other)
        # Float32 losses near 0.3, of 20 terms in another order, over 2 zo_eps, times lr |z|.
        torch.testing.assert_close(straight, single, rtol=0.0, atol=1e-3)
    [log, other_log] = [json.loads((two / f"log{rank}.json").read_text()) for rank in range(2)]
    alone_log = json.loads((one / "log0.json").read_text())
    for entry, other, single in zip(log, other_log, alone_log, strict=True):
        assert entry == other
        assert entry == pytest.approx(single, rel=1e-2)


def test_the_example_on_two_processes() -> None:
    output = launch(2, str(ROOT / "examples" / "11_distributed.py"))
    words = output.split()
    assert output.startswith("2 processes: accuracy ")
    assert float(words[5].rstrip(";")) > 0.9 > float(words[3])
    assert output.endswith("weights that differ: 0\n")
