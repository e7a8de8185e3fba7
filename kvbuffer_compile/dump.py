"""Keep what the backend made for one graph: programs, plans, generated source, the graphs before and after."""

from __future__ import annotations

from pathlib import Path

from torch.fx import GraphModule

from kvbuffer_compile import targets
from kvbuffer_compile.passes.lifted import Lifted
from kvbuffer_compile.plan import Plan


def write(folder: str | Path, before: GraphModule, after: GraphModule, chosen: list[tuple[Lifted, Plan]]) -> Path:
    """Write graph<N>/ under folder and return it. Existing dumps are kept: N counts up."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    n = 0
    while True:
        target = root / f"graph{n}"
        try:
            target.mkdir()
            break
        except FileExistsError:
            n += 1
    (target / "before.txt").write_text(str(before.graph))
    (target / "after.txt").write_text(str(after.graph))
    for lifted, plan in chosen:
        (target / f"{lifted.state.name}.txt").write_text(f"{lifted.source}\n{lifted.program}\n\n{plan}\n")
        source = targets.source(plan)
        if source is not None:
            (target / f"{lifted.state.name}{source[0]}").write_text(source[1])
    return target
