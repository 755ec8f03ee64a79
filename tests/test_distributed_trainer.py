"""Programs that start several processes: the Trainer's, and the example's."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
#: Examples that the resumed run sees, in two steps.
SAMPLES = 8
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

#: Trains for four steps, again from the checkpoint of the second; writes weights and log. With
#: several processes so do runs of a sharded model, and of the same one unsharded.
PROGRAM = """
import json, os, pathlib, sys
import accelerate, torch
from tests.test_integration_trainer import Shares, build, opt
folder, batch = pathlib.Path(sys.argv[1]), int(sys.argv[2])
several = "RANK" in os.environ
initialise = accelerate.state.AcceleratorState.__init__


def sharding(self, *args, fsdp_plugin=None, **kwargs):
    # Accelerate takes its plugin into account on GPUs only. All that follows is its own code.
    initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, accelerate.DistributedType.FSDP


def trainer_of(make, name, **options):
    accelerate.state.AcceleratorState._reset_state()
    accelerate.state.GradientState._reset_state()
    torch.manual_seed(0)
    return build(
        make(), folder / name, per_device_train_batch_size=batch, save_strategy="steps",
        save_steps=2, ddp_backend="gloo" if several else None, **options,
    )


def run(make, name, **options):
    states = []
    for resume in (None, str(folder / name / "checkpoint-2")):
        trainer = trainer_of(make, name, **options)
        trainer.train(resume_from_checkpoint=resume)
        params = [p.detach() for p in trainer.model.parameters()]
        states.append([getattr(p, "full_tensor", p.clone)() for p in params])
        keys = ("loss", "grad_norm", "train_samples_per_second", "train_runtime")
        log = [{k: e[k] for k in keys if k in e} for e in trainer.state.log_history]
    rank = trainer.args.process_index
    torch.save(states, folder / f"{name}{rank}.pt")
    (folder / f"{name}{rank}.json").write_text(json.dumps(log))
    return trainer


trainer = run(Shares, "Shares")
assert type(trainer.model_wrapped).__name__ == "Shares"
if several:
    run(opt, "opt")
    accelerate.state.AcceleratorState.__init__ = sharding
    # On CPUs torch gives a FULL_STATE_DICT of tensors that have not been gathered yet.
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    for make, wrapped in (
        (Shares, {"auto_wrap_policy": "NO_WRAP"}),
        (opt, {"transformer_layer_cls_to_wrap": ["OPTDecoderLayer"]}),
    ):
        name = f"{make.__name__} sharded"
        trainer = run(make, name, fsdp=True, fsdp_config={**config, **wrapped})
        assert all(hasattr(p, "full_tensor") for p in trainer.model.parameters())
"""


#: How several processes are started. Accelerate starts processes on CPUs by MPI alone, unless it is
#: told that there are several GPUs; TrainingArguments(use_cpu=True) says that there are none.
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def launch(launcher: str, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], *command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes and this one have written."""
    folder = tmp_path_factory.mktemp("trainer")
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    (folder / "two").mkdir()
    launch("accelerate", str(program), str(folder / "two"), "2")
    (folder / "one").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(program), str(folder / "one"), "4"])
        runpy.run_path(str(program))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return folder


def weights_and_logs(folder: Path, name: str) -> tuple[list[Any], list[Any]]:
    """Of each process: weights at the end of a straight run and of a resumed one, and a log."""
    ranks = sorted(folder.glob(f"{name}[01].pt"))
    logs = [json.loads(path.with_suffix(".json").read_text()) for path in ranks]
    return [torch.load(path) for path in ranks], logs


def figures(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in entry.items() if not k.startswith("train_")} for entry in log]


def test_two_processes_are_one_with_their_batches(ran: Path) -> None:
    [first, second], [log, other_log] = weights_and_logs(ran / "two", "Shares")
    [[alone, _]], [alone_log] = weights_and_logs(ran / "one", "Shares")
    for straight, resumed, other, single in zip(*first, second[0], alone, strict=True):
        assert torch.equal(straight, resumed)
        assert torch.equal(straight, other)
        # Float32 losses near 0.3, of 20 terms in another order, over 2 zo_eps, times lr |z|.
        torch.testing.assert_close(straight, single, rtol=0.0, atol=1e-3)
    for entry, other, single in zip(*map(figures, (log, other_log, alone_log)), strict=True):
        assert entry == other
        assert entry == pytest.approx(single, rel=1e-2)
    for each in (log, alone_log):
        speed, seconds = each[-1]["train_samples_per_second"], each[-1]["train_runtime"]
        # Both are rounded to three digits after the point.
        assert speed * seconds == pytest.approx(SAMPLES, rel=2e-2)


@pytest.mark.parametrize("name", ["Shares", "opt"])
def test_a_sharded_model_trains_as_whole_ones_do(ran: Path, name: str) -> None:
    """Each process has its own part of the batch, and all weights while it evaluates them."""
    whole, [log, _] = weights_and_logs(ran / "two", name)
    sharded, [sharded_log, other_log] = weights_and_logs(ran / "two", f"{name} sharded")
    for runs in sharded:
        for straight, resumed, expected in zip(*runs, whole[0][0], strict=True):
            assert torch.equal(straight, resumed)
            assert torch.equal(straight, expected)
    assert figures(sharded_log) == figures(other_log) == figures(log)


def test_the_example_on_two_processes() -> None:
    output = launch("torchrun", str(ROOT / "examples" / "11_distributed.py"))
    words = output.split()
    assert output.startswith("2 processes: accuracy ")
    assert float(words[5].rstrip(";")) > 0.9 > float(words[3])
    assert output.endswith("weights that differ: 0\n")
