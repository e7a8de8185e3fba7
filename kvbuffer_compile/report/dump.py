"""Keep what the backend made for one graph: programs, plans, generated source, the graphs before and after."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.fx import GraphModule

from kvbuffer_compile.ir.plan import Plan
from kvbuffer_compile.passes.lifted import Lifted
from kvbuffer_compile.process import disk
from kvbuffer_compile.steps import targets


def write(folder: str | Path, before: GraphModule, after: GraphModule, chosen: list[tuple[Lifted, Plan]]) -> None:
    """Write graph<N>/ under folder. Existing dumps are kept: N counts up. What cannot be written is missing, with one
    warning a process: a dump is for looking at, and no reason to decode otherwise."""
    texts = list(_texts(before, after, chosen))
    try:
        target = _new_folder(Path(folder))
        for name, text in texts:
            (target / name).write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        why = getattr(error, "strerror", None) or error
        disk.tell(
            f"kvbuffer cannot write dumps to {folder} ({why}): give the option dump, or the environment variable "
            "KVBUFFER_DUMP, a folder that can be written"
        )


def _new_folder(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    n = 0
    while True:
        target = root / f"graph{n}"
        try:
            target.mkdir()
            return target
        except FileExistsError:
            n += 1


def _texts(before: GraphModule, after: GraphModule, chosen: list[tuple[Lifted, Plan]]) -> Iterator[tuple[str, str]]:
    yield "before.txt", str(before.graph)
    yield "after.txt", str(after.graph)
    for lifted, plan in chosen:
        yield f"{lifted.state.name}.txt", f"{lifted.source}\n{lifted.program}\n\n{plan}\n"
        source = targets.source(plan)
        if source is not None:
            yield f"{lifted.state.name}{source[0]}", source[1]
