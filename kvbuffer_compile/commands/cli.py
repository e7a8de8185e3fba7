"""python -m kvbuffer_compile: doctor, explain, bench, emit. Exit codes: 0 well, 1 fails or disagrees, 2 bad input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbuffer_compile.commands import doctor, workload
from kvbuffer_compile.commands.emit import add_arguments as add_emit_arguments
from kvbuffer_compile.commands.emit import emit
from kvbuffer_compile.options import COUNT, TARGETS, Options, is_count

PLOTS = (".png", ".svg", ".pdf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, ImportError, OSError) as error:
        message = str(error).split("\n\nSet TORCHDYNAMO_VERBOSE")[0]  # Dynamo's advice for debugging itself
        print(f"kvbuffer_compile {arguments.command}: {message}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvbuffer_compile", description="Buffered decoding of linear attention."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctored = commands.add_parser("doctor", help="what this installation can do")
    doctored.add_argument("--remeasure", action="store_true", help="measure this machine again, it should be idle")
    doctored.set_defaults(run=_doctor)
    explain = commands.add_parser("explain", help="what is found in a decode step, and what would be done")
    _workload_arguments(explain)
    explain.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    explain.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw bytes and time against L ({', '.join(PLOTS)})"
    )
    explain.add_argument(
        "--measure", action="store_true", help="time the plans of each state on this CPU, some seconds"
    )
    explain.set_defaults(run=_explain)
    bench = commands.add_parser("bench", help="time decode steps: eager, Inductor, kvbuffer")
    _workload_arguments(bench)
    bench.add_argument("--steps", type=_count, default=64, help="timed steps (64)")
    bench.add_argument("--warmup", type=_count, default=16, help="steps before them (16)")
    bench.set_defaults(run=_bench)
    emitter = commands.add_parser("emit", help="write the kernel of a named recurrence as a file of its own")
    add_emit_arguments(emitter, _count)
    emitter.set_defaults(run=_emit)
    return parser


def _workload_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=workload.FORMS)
    parser.add_argument("--batch", type=_count, default=1, help="sequences, for a checkpoint (1)")
    parser.add_argument("--flush", type=_flush, default="auto", help='tokens between two flushes, or "auto"')
    parser.add_argument("--target", choices=TARGETS, default="auto", help="who implements the steps")
    parser.add_argument("--donate", action="store_true", help="states that are returned may be overwritten")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: it must be an integer >= 1")
    return int(text)


def _flush(text: str) -> str | int:
    if text == "auto":
        return text
    if not text.isdecimal() or not is_count(int(text)):
        raise argparse.ArgumentTypeError(f'{text!r} is not allowed: it must be "auto" or {COUNT}')
    return int(text)


# ----------------------------------------------------------------------------------------------- commands


def _doctor(arguments: argparse.Namespace) -> int:
    usable = True
    for finding in doctor.findings(arguments.remeasure):
        print(finding)
        usable = usable and finding.level != "bad"
    print("usable" if usable else "not usable: see the lines marked bad")
    return 0 if usable else 1


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    from kvbuffer_compile.explain import explain

    _writable(arguments, "html", "plot", "json")
    if arguments.plot is not None and arguments.plot.suffix not in PLOTS:
        raise ValueError(f"--plot {arguments.plot} is not allowed: the file must end in {', '.join(PLOTS)}")
    fn, args = workload.load(arguments.spec, arguments.batch)()
    with torch.no_grad():  # as bench runs it
        report = explain(fn, *args, options={**_options(arguments), "tune": arguments.measure})
    print(report)
    if arguments.html is not None:
        report.to_html(arguments.html)
    if arguments.plot is not None:
        report.plot(arguments.plot)
    _write_json(arguments.json, report.to_dict())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from kvbuffer_compile.commands.bench import bench, table

    _writable(arguments, "json")
    factory = workload.load(arguments.spec, arguments.batch)
    try:
        timings = bench(factory, _options(arguments), arguments.steps, arguments.warmup)
    except ArithmeticError as error:
        print(f"kvbuffer_compile bench: {error}", file=sys.stderr)
        return 1
    print(table(timings))
    _write_json(arguments.json, [t.to_dict() for t in timings])
    return 0


def _emit(arguments: argparse.Namespace) -> int:
    _writable(arguments, "out")
    text = emit(arguments)
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text, encoding="utf-8")
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {"flush": arguments.flush, "target": arguments.target, "donate": arguments.donate}
    Options(**given)
    return given


def _writable(arguments: argparse.Namespace, *names: str) -> None:
    """Before anything long runs: every file can be put where it is wanted."""
    for name in names:
        path: Path | None = getattr(arguments, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"--{name} {path}: the folder {path.resolve().parent} does not exist")


def _write_json(path: Path | None, value: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
