"""Statistics of the compiled Triton kernels: instructions, registers, spills, memory accesses.

This needs no GPU, because kernels are launched on a stub. For NVIDIA targets, the nvdisasm that
triton ships disassembles the cubin. For AMD targets the assembly is read directly.

`python -m bench.sass` counts every variant of every kernel for each target.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from bench import sass_path
from bench.stub_gpu import TARGETS
from bench.variants import Variant, variants
from zoopt.bench import common

UNIT = "instructions/element"
COLUMNS = {
    "kernel": "kernel",
    "dtype": "dtype",
    "distribution": "distribution",
    "format": "format",
    "rounding": "rounding",
    "target": "target",
    "median": UNIT,
    "executed_per_element": "executed/element",
    "registers": "registers",
    "spills": "spills",
    "access_bits": "access bits",
}
#: Instructions that only pad the end of a program.
PADDING = ("NOP", "BRA", "s_nop", "s_code_end")
SASS_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
SASS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
GCN_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
GCN_LINE = re.compile(r"^\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|flat_\w+|scratch_\w+)", re.M)


@dataclasses.dataclass(frozen=True)
class Report:
    kernel: str
    dtype: str
    rounding: str
    target: str
    instructions_per_element: float
    registers: int
    spills: int
    access_bits: int
    bytes_per_element: float
    distribution: str = "-"
    format: str = "-"
    executed_per_element: float | None = None


def _read_cubin(cubin: bytes, tool: str, *options: str) -> str:
    """Run one of the programs that triton ships on a cubin, and return its output."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [program, *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def listing(compiled: Any) -> str:
    """The machine code of a kernel compiled for an NVIDIA target."""
    # Without its analysis of a branch stack, which these kernels do not use: a third of the time.
    return _read_cubin(compiled.asm["cubin"], "nvdisasm", "-c", "--no-dataflow")


def _nvidia(compiled: Any, text: str) -> tuple[list[str], int, int, list[int]]:
    """Opcodes, registers, spills and the widths in bits of the accesses to global memory.

    Args:
        text: the listing of the machine code.
    """
    opcodes = SASS_LINE.findall(text)
    spills = sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes)
    accesses = [opcode.split(".") for opcode in opcodes if opcode.startswith(("LDG", "STG"))]
    widths = [
        next((SASS_BITS[part] for part in parts if part in SASS_BITS), 32) for parts in accesses
    ]
    # The registers allocated to a thread can be more than those in the listing.
    usage = _read_cubin(compiled.asm["cubin"], "cuobjdump", "-res-usage")
    [registers] = re.findall(r"\bREG:(\d+)", usage)
    return opcodes, int(registers), spills, widths


def _amd(compiled: Any) -> tuple[list[str], int, int, list[int]]:
    """As _nvidia, from the assembly of an AMD target."""
    text = compiled.asm["amdgcn"]
    opcodes = GCN_LINE.findall(text)
    accesses = re.findall(r"\s(?:global|buffer)_(?:load|store)_(\w+)", text)
    widths = [GCN_BITS.get(access, 16) for access in accesses]
    [registers] = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    [spills] = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
    return opcodes, int(registers), int(spills), widths


def report(variant: Variant, target: str) -> Report:
    """Compile one kernel for one target, with the options of its launch, and count.

    `instructions_per_element` counts all code, for blocks at a tensor's end and for rare numbers
    too; `executed_per_element`, of NVIDIA targets, what a program executes that does whole blocks
    of ordinary numbers (see `sass_path`). Instructions in a loop over directions are counted once,
    so the figures are for one direction. `access_bits` is
    128 if every load and store of theta (and of a buffer, an addend, a gradient or moments) has 128
    bits; codes of a thread's elements are one word, of 64 bits (int8) or 32 (int4). Loads of
    coefficients, bounds, draws and row numbers are always scalar.
    """
    launch = variant.launch(target)
    compiled = launch.compiled
    machine_code = None if target.startswith("gfx") else listing(compiled)
    counts = _amd(compiled) if machine_code is None else _nvidia(compiled, machine_code)
    opcodes, registers, spills, widths = counts
    threads = compiled.metadata.num_warps * TARGETS[target].warp_size
    named = launch.arguments
    block = named["BLOCK"] if "BLOCK" in named else named["ROWS"] * named["COLUMNS"]
    work = [opcode for opcode in opcodes if not opcode.startswith(PADDING)]
    executed = None
    if machine_code is not None:
        blocks = named.get("BLOCKS", 1)
        count = sass_path.executed(machine_code, blocks)
        executed = count * threads / (block * blocks)
    vectors = int(variant.bytes_beside_codes * block) // (16 * threads)
    # A thread has as many codes as it has other numbers.
    code = int(variant.bytes_of_code * 8 * block) // threads
    wide = widths.count(128) >= vectors and (not code or widths.count(code) >= 2)
    return Report(
        **dataclasses.asdict(variant),
        target=target,
        executed_per_element=executed,
        instructions_per_element=len(work) * threads / block,
        registers=registers,
        spills=spills,
        access_bits=128 if wide else min(widths, default=16),
        bytes_per_element=variant.bytes_per_element,
    )


def rows() -> list[common.Row]:
    """A row for each kernel variant and target."""
    found = []
    for variant in variants():
        for target in TARGETS:
            common.progress(f"compiling {variant.kernel} {variant.dtype} for {target}")
            found.append(row(dataclasses.asdict(report(variant, target))))
    common.progress("")
    return found


def row(counts: dict[str, Any]) -> common.Row:
    """The row of one report."""
    what = ("kernel", "dtype", "distribution", "format", "rounding", "target")
    name = ", ".join(counts[key] for key in what if counts.get(key, "-") != "-")
    extra = {key: value for key, value in counts.items() if key != "instructions_per_element"}
    return common.counted(name, counts["instructions_per_element"], UNIT, **extra)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    arguments = common.parser(str(__doc__), "python -m bench.sass --json bench/results/sass.json")
    common.add_json_argument(arguments)
    arguments.set_defaults(plot=None)
    options = common.parse(arguments, argv)
    found = rows()
    common.say(common.table(COLUMNS, found), options.json)
    document = common.document("kernels", options, torch.device("cpu"), found, ratio_to=None)
    common.write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
