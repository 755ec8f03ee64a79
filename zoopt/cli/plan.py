"""`zoopt plan`: will it fit, and with which optimizer?"""

from __future__ import annotations

import argparse
import re
from typing import Any

from zoopt.cli.terminal import (
    CommandError,
    add_json_argument,
    open_console,
    print_table,
    styled,
    write_json,
)

DESCRIPTION = """\
Predict the peak memory of one training step, for every optimizer, without allocating anything: the
step runs on tensors that have shapes and no values. Not counted: the framework's own memory (a CUDA
context takes some 0.7 GB), fragmentation, and temporaries inside operators.

MODEL is a named architecture (gpt2, opt-1.3b ... opt-66b, llama-7b, llama-3-8b, qwen2.5-7b,
roberta-large ...: any wrong name lists them), a directory or config.json of a transformers model
(decoder, encoder, encoder-decoder, of images or of audio), or module:function, which is called with
batch and sequence length and returns a module and the keyword arguments of its call."""
_UNITS = {"": 1.0, "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_UNITS |= {"KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def size(text: str) -> int:
    """Bytes of "24GB", "80GiB" or "24000000000"."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    try:
        value = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GB or 80GiB, got {text!r}")
    return int(value)


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "plan",
        prog="zoopt plan",
        help="predict the memory of training a model, by optimizer",
        description=DESCRIPTION,
        example="zoopt plan llama-7b --gpu 24GB --seq 512 --checkpointing",
    )
    parser.add_argument("model", metavar="MODEL", help="what is trained, see above")
    parser.add_argument(
        "--optimizer",
        nargs="+",
        default=["all"],
        metavar="NAME",
        help="some of the table's methods; default: all",
    )
    parser.add_argument("--batch", type=positive, default=1, help="examples a step")
    parser.add_argument(
        "--seq", type=positive, help="tokens an example; default: 512, or the model's longest"
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of weights, gradients and activations",
    )
    parser.add_argument(
        "--gpu",
        type=size,
        metavar="SIZE",
        help="plan for a GPU, with its buffers of perturbed weights; mark what fits, 24GB say",
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again in backward"
    )
    parser.add_argument(
        "--rank", type=positive, default=128, help="of low-rank projections and factors"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        help="plan for one of so many, over which FSDP2 divides the parameters; zeroth-order only",
    )
    parser.add_argument("--lora-rank", type=positive, default=8, help="of LoRA's adapters")
    add_json_argument(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan; returns 0."""
    from zoopt.memory.meter import CATEGORIES
    from zoopt.memory.plan import plan

    console = open_console(options.json)
    wanted = "all" if options.optimizer == ["all"] else options.optimizer
    try:
        with console.status("planning") as status:
            result = plan(
                options.model,
                optimizers=wanted,
                batch=options.batch,
                seq=options.seq,
                dtype=options.dtype,
                checkpointing=options.checkpointing,
                rank=options.rank,
                lora_rank=options.lora_rank,
                gpu=options.gpu is not None,
                processes=options.processes,
                progress=lambda name: status.update(f"planning: {name}"),
            )
    except (ImportError, TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
    fits = options.gpu
    headings = ["method", "peak GB", *CATEGORIES]
    if fits is not None:
        headings += ["fits", "largest batch", "largest sequence"]
    rows = []
    for estimate in result.estimates:
        row: list[Any] = [estimate.name, _gb(estimate.peak)]
        row += [_gb(estimate.categories[category]) for category in CATEGORIES]
        if fits is not None:
            batch = estimate.largest_batch(fits, options.batch)
            seq = estimate.largest_seq(fits, result.seq)
            longest = str(min(seq, result.longest or seq) or "-") if result.sequential else "-"
            row += [
                styled("yes", "green") if estimate.fits(fits) else styled("no", "red"),
                str(batch or "-"),
                longest,
            ]
        rows.append(row)
    checkpointed = ", checkpointed" if options.checkpointing else ""
    if options.processes > 1:
        checkpointed += f", on each of {options.processes} processes"
    title = (
        f"{options.model}: {result.parameters / 1e6:,.0f}M parameters, {options.dtype}, batch "
        f"{options.batch} x {result.seq} tokens{checkpointed}"
    )
    rows += [[name, "-", *[""] * (len(headings) - 2)] for name in result.left_out]
    print_table(console, title, headings, rows)
    for name, reason in result.left_out.items():
        console.print(f"{name} cannot be planned: {reason}", markup=False)
    if fits is not None:
        console.print(
            f"fits: within {fits / 1e9:.1f} GB; the largest batch at this sequence and the "
            f"longest sequence at this batch, from their growth around these sizes"
        )
    write_json(options.json, result.as_dict())
    return 0


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f}"
