"""What a measurement was: the command, the machine, the commit; stored beside its numbers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from kvbuffer_compile.codegen import build


def command(module: str) -> str:
    """How this measurement was started, but for where its results went."""
    given = sys.argv[1:]
    kept = [x for n, x in enumerate(given) if x != "--out" and given[n - 1 : n] != ["--out"]]
    return " ".join([f"python -m benchmarks.{module}", *kept])


def machine() -> dict[str, Any]:
    """Processor, threads, versions, commit and command."""
    cpu = next((x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    versions = {"torch": torch.__version__, "compiler": (build.compiler() or "").split(": ")[-1]}
    run = {"commit": _commit(), "command": command(_module().removeprefix("benchmarks."))}
    return {"cpu": cpu, "capability": capability, "cores": os.cpu_count(), "threads": threads, **versions, **run}


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return sys.argv[0] if spec is None else spec.name


def _commit() -> str:
    """Of the code that runs; with a plus when files differ from it."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
