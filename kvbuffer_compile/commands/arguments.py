"""What the commands take, said without importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from kvbuffer_compile import __version__
from kvbuffer_compile.limits import COUNT, LONGEST, TARGETS, is_count

PLOTS = (".png", ".svg", ".pdf")
FORMS = "file.py:function, where function() returns (fn, args), or the folder of a transformers checkpoint"

# Of emit.
RECURRENCES = ("gdn", "kda", "mamba2", "gla", "rwkv7", "mlstm")
VARIANTS = ("recurrent", "buffered", "verify")
KERNELS = ("triton", "cpp")
DTYPES = ("float32", "bfloat16", "float16")
NARROW = ("float16", "bfloat16")
LAYOUTS = {"kv": (0, 1, 2, 3), "vk": (0, 1, 3, 2)}

EPILOG = """\
environment:
  TORCH_LOGS="+kvbuffer_compile"    log what is decided (INFO), and at run time flushes by settling (DEBUG)
  KVBUFFER_QUIET=1                  no line on the terminal while something compiles
  KVBUFFER_CACHE=1                  keep compiled graphs for the next process, and use kept ones
  KVBUFFER_DUMP=FOLDER              keep programs, plans, graphs and generated source there
  KVBUFFER_COMPILE_TIMEOUT=SECONDS  when a C++ compiler is given up (300)

exit codes: 0 well, 1 fails or disagrees, 2 bad input"""

Run = Callable[[argparse.Namespace], int]


def parser(doctor: Run, explain: Run, bench: Run, emit: Run) -> argparse.ArgumentParser:
    """The parser of all commands; `run` in what it returns is one of these."""
    found = argparse.ArgumentParser(
        prog="python -m kvbuffer_compile", description="Buffered decoding of linear attention.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    found.add_argument("--version", action="version", version=f"kvbuffer_compile {__version__}")
    commands = found.add_subparsers(dest="command", required=True)
    _doctor(commands.add_parser("doctor", help="what this installation can do"), doctor)
    _explain(commands.add_parser("explain", help="what is found in a decode step, and what would be done"), explain)
    _bench(commands.add_parser("bench", help="time decode steps: eager, Inductor, kvbuffer"), bench)
    _emit(commands.add_parser("emit", help="write the kernel of a named recurrence as a file of its own"), emit)
    return found


def _doctor(parser: argparse.ArgumentParser, run: Run) -> None:
    parser.add_argument("--remeasure", action="store_true", help="measure this machine again, it should be idle")
    parser.set_defaults(run=run)


def _explain(parser: argparse.ArgumentParser, run: Run) -> None:
    _workload(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    plots = ", ".join(PLOTS)
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw bytes and time against L ({plots})")
    parser.add_argument("--measure", action="store_true", help="time the plans of each state on this CPU, some seconds")
    parser.set_defaults(run=run)


def _bench(parser: argparse.ArgumentParser, run: Run) -> None:
    _workload(parser)
    parser.add_argument("--steps", type=_count, default=64, metavar="N", help="timed steps (64)")
    parser.add_argument("--warmup", type=_count, default=16, metavar="N", help="steps before them (16)")
    parser.set_defaults(run=run)


def check_spec(spec: str) -> None:
    """ValueError for a SPEC that names no file or folder; known before torch is imported, which takes seconds."""
    path, _, _ = spec.rpartition(":")
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"SPEC {spec!r}: there is no file {path}")
    elif Path(spec).suffix == ".py":
        raise ValueError(f"SPEC {spec!r} names no function of the file: it must be {FORMS}")
    elif not Path(spec).is_dir():
        raise ValueError(f"SPEC {spec!r}: there is no such folder; it must be {FORMS}")


def _workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help=FORMS)
    parser.add_argument("--batch", type=_count, default=1, metavar="N", help="sequences, for a checkpoint (1)")
    flushes = f'tokens between two flushes, 1 to {LONGEST}, or "auto" (auto)'
    parser.add_argument("--flush", type=_flush, default="auto", metavar="L", help=flushes)
    parser.add_argument("--target", choices=TARGETS, default="auto", help="who implements the steps (auto)")
    parser.add_argument("--donate", action="store_true", help="states that are returned may be overwritten")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")


def _emit(parser: argparse.ArgumentParser, run: Run) -> None:
    add = parser.add_argument
    add("--recurrence", choices=RECURRENCES, required=True, help="gdn: Gated DeltaNet, kda: Kimi Delta Attention, ...")
    add("--variant", choices=VARIANTS, required=True, help="write the state each token, buffer it, or verify drafts")
    add("--target", choices=KERNELS, required=True, help="language of the kernel")
    add("--k", type=_count, metavar="N", help="key rows of the state (those of a typical layer)")
    add("--v", type=_count, metavar="N", help="value columns of the state (those of a typical layer)")
    add("--flush", type=_count, default=16, metavar="L", help="tokens between two flushes (16)")
    add("--drafts", type=_count, default=4, metavar="N", help="tokens that fit in a verify step beside them (4)")
    add("--dtype", choices=DTYPES, default="float32", help="of the state (float32)")
    add("--row-dtype", choices=DTYPES, default="bfloat16", help="of keys and values in rows (bfloat16)")
    add("--read-dtype", choices=NARROW, help="of a shadow that steps read in a float32 state's place")
    add("--layout", choices=LAYOUTS, default="kv", help="kv: the state is [b, h, K, V], vk: [b, h, V, K] (kv)")
    add("--out", type=Path, metavar="FILE", help="write it there, not to the standard output")
    parser.set_defaults(run=run)


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
