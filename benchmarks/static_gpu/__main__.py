"""python -m benchmarks.static_gpu: see the package's text for what it is good for."""

from __future__ import annotations

import argparse
import os

from benchmarks import static_gpu
from benchmarks.static_gpu import pins, table
from benchmarks.static_gpu.cases import NAMES, STATES, VARIANTS, cases
from benchmarks.static_gpu.machine import Machine
from benchmarks.static_gpu.predict import predict


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static_gpu",
        description=static_gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--table", action="store_true", help=f"write {table.OUT.name} anew (some 15 minutes), or the rows asked for"
    )
    parser.add_argument("--pins", action="store_true", help=f"write {pins.OUT.name} anew (half a minute)")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="else all for --table, and gdn")
    parser.add_argument("--states", nargs="+", default=list(STATES), choices=STATES)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    names = tuple(args.only or (NAMES if args.table else NAMES[:1]))
    chosen = cases(names, tuple(args.states), tuple(args.variants))
    if args.table or args.pins:
        if args.table:
            table.write(chosen)
        if args.pins:
            pins.renew()
        return
    for case in chosen:
        for form, config in case.forms().items():
            for batch in args.batches:
                print(f"{case.name} {case.state} {form}, batch {batch}")
                print(f"  {predict(case.kernel(batch, config), Machine()).text(Machine())}\n", flush=True)


if __name__ == "__main__":
    main()
