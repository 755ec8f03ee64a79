"""`zoopt doctor`: versions, devices, kernels, self-tests, and what to install for more."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from zoopt.cli import doctor_gpu
from zoopt.cli.terminal import add_json_argument, open_console, print_table, styled, write_json
from zoopt.doctor import diagnosis as doctor
from zoopt.doctor import selftest

DESCRIPTION = """\
Tell what this installation has: versions, devices, which implementation of the kernels runs on each
and why; test the noise and the kernels on every device (seconds, or up to a minute where they have
yet to be compiled); check the compiled kernels on disk and remove damaged ones; and say what to
install or set for more. The exit status is 1 if a test fails.

With --gpu: kernels, training steps and memory on this machine's GPU, each of the package's promises
with its figure and whether it holds; 1 if one does not, 2 without a GPU. Nothing is downloaded."""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "doctor",
        prog="zoopt doctor",
        help="versions, devices, active kernels and self-tests",
        description=DESCRIPTION,
        example="zoopt doctor --json doctor.json",
    )
    add_json_argument(parser)
    doctor_gpu.add_arguments(parser)
    parser.set_defaults(func=run)


def run(options: argparse.Namespace) -> int:
    """Print the report; returns 1 if a self-test fails."""
    if options.gpu:
        return doctor_gpu.run(options)
    console = open_console(options.json)
    versions, devices, active = doctor.versions(), doctor.devices(), doctor.active()
    found = [(name, version or styled("none", "dim")) for name, version in versions.items()]
    print_table(console, "Versions", ("package", "version"), found)
    print_table(console, "Devices", ("device", "what it is"), list(devices.items()))
    print_table(
        console,
        "Kernels (float64 always takes the reference)",
        ("device", "operations", "implementation", "because"),
        [dataclasses.astuple(row) for row in active],
    )
    results = []
    with console.status("self-tests") as status:
        for name, test in selftest.self_tests():
            status.update(f"self-test: {name}")
            results.append(selftest.run(name, test))
    print_table(
        console,
        "Self-tests",
        ("test", "result", "seconds", "detail"),
        [(r.name, _verdict(r.passed), f"{r.seconds:.1f}", r.detail) for r in results],
    )
    compiled = doctor.compiled_kernels()
    print_table(console, "Compiled kernels", ("place", "state"), list(compiled.items()))
    advice = doctor.advice()
    if advice:
        print_table(
            console,
            "For more",
            ("what", "for", "by"),
            [dataclasses.astuple(row) for row in advice],
        )
    write_json(
        options.json,
        {
            "versions": versions,
            "devices": devices,
            "kernels": [dataclasses.asdict(row) for row in active],
            "compiled_kernels": compiled,
            "self_tests": [dataclasses.asdict(result) for result in results],
            "advice": [dataclasses.asdict(row) for row in advice],
        },
    )
    failed = sum(not result.passed for result in results)
    console.print(f"{len(results) - failed} of {len(results)} self-tests pass")
    return 1 if failed else 0


def _verdict(passed: bool) -> Any:
    return styled("ok", "green") if passed else styled("FAILED", "bold red")
