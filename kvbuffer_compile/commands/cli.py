"""python -m kvbuffer_compile: doctor, explain, bench, emit. Exit codes: 0 well, 1 fails or disagrees, 2 bad input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbuffer_compile.commands.arguments import PLOTS, check_spec, parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parser(_doctor, _explain, _bench, _emit).parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, ImportError, OSError) as error:
        message = str(error).split("\n\nSet TORCHDYNAMO_VERBOSE")[0]  # Dynamo's advice for debugging itself
        print(f"kvbuffer_compile {arguments.command}: {message}", file=sys.stderr)
        return 2


# ----------------------------------------------------------------------------------------------- commands


def _doctor(arguments: argparse.Namespace) -> int:
    from kvbuffer_compile.commands import doctor

    usable = True
    for finding in doctor.findings(arguments.remeasure):
        print(finding)
        usable = usable and finding.level != "bad"
    print("usable" if usable else "not usable: see the lines marked bad")
    return 0 if usable else 1


def _explain(arguments: argparse.Namespace) -> int:
    check_spec(arguments.spec)
    _writable(arguments, "html", "plot", "json")
    if arguments.plot is not None and arguments.plot.suffix not in PLOTS:
        raise ValueError(f"--plot {arguments.plot} is not allowed: the file must end in {', '.join(PLOTS)}")
    import torch

    from kvbuffer_compile.commands import workload
    from kvbuffer_compile.explanation import explain

    fn, args = workload.load(arguments.spec, arguments.batch)()
    with torch.no_grad():  # as bench runs it
        report = explain(fn, *args, options={**_options(arguments), "tune": arguments.measure})
    print(report)
    if arguments.html is not None:
        report.to_html(arguments.html)
        _wrote(arguments.html)
    if arguments.plot is not None:
        report.plot(arguments.plot)
        _wrote(arguments.plot)
    _write_json(arguments.json, report.to_dict())
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    check_spec(arguments.spec)
    _writable(arguments, "json")
    from kvbuffer_compile.commands import workload
    from kvbuffer_compile.commands.bench import bench, table

    factory = workload.load(arguments.spec, arguments.batch)
    try:
        timings = bench(factory, _options(arguments), arguments.steps, arguments.warmup, _tell)
    except ArithmeticError as error:
        print(f"kvbuffer_compile bench: {error}", file=sys.stderr)
        return 1
    print(table(timings))
    _write_json(arguments.json, [t.to_dict() for t in timings])
    return 0


def _emit(arguments: argparse.Namespace) -> int:
    _writable(arguments, "out")
    from kvbuffer_compile.commands.emit import emit

    text = emit(arguments)
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text, encoding="utf-8")
        what = f"the {arguments.variant} step of {arguments.recurrence} for {arguments.target}"
        _wrote(arguments.out, f", {len(text.splitlines())} lines: {what}; check it with: python {arguments.out}")
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    from kvbuffer_compile.options import Options

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
        _wrote(path)


def _wrote(path: Path, more: str = "") -> None:
    print(f"wrote {path}{more}", file=sys.stderr)


def _tell(text: str) -> None:
    """How far a command is, for who waits at a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
