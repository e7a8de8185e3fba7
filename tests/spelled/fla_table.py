"""docs/flash-linear-attention.md: functions and layers of the installed library, run on a CPU against its own kernels.

python -m tests.spelled.fla_table                  all of them, about an hour; writes the page
python -m tests.spelled.fla_table chunk_kda Comba  these, as JSON, a line each
python -m tests.spelled.fla_table --page FILES     the page from such lines
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import importlib
import logging
import pkgutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from kvbuffer_compile.backend import GraphRecord, observers
from kvbuffer_compile.integrations.functions import fla as table
from kvbuffer_compile.integrations.functions import substitution
from tests.spelled import fla_calls as calls

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "flash-linear-attention.md"
TIMES = ROOT / "benchmarks" / "results" / "fla.json"
OPTIONS = {"inner": "eager", "target": "aten", "flush": 8, "donate": True}
HEAD = "| name | ops | states | largest error | status |\n|---|---|---|---|---|\n"
TIMED_HEAD = "| name | ops | states | largest error | Inductor's time over ours | status |\n|---|---|---|---|---|---|\n"
PROMPT = 3  # tokens of a layer's prompt
AT_ONCE = 8  # tokens of one call of a chunked function
Row = dict[str, Any]


def function_row(name: str) -> Row:
    """One function: TOKENS tokens on a state, one at a time or, where it works in chunks, AT_ONCE at a time."""
    if name in table.UNSERVED:
        return {"name": name, "status": f"declined: {table.UNSERVED[name]}"}
    function = calls.exported()[name]
    g = torch.Generator().manual_seed(0)
    tokens = AT_ONCE if name.startswith(("chunk", "fused_chunk")) else 1
    state, given = calls.states(name, g), [calls.inputs(function, tokens, g) for _ in range(calls.TOKENS // tokens)]
    one = lambda held, now: function(**now, **held, output_final_state=True)  # noqa: E731
    records: list[GraphRecord] = []
    compiled = _compiled(lambda held, now: _in_place(held, one(held, now)))
    with torch.no_grad(), observers.also(records.append):
        mine = tree_map(torch.clone, state)
        ours = [compiled(mine, now) for now in given]
        if name in calls.REFUSED:
            return _row(name, records, None, calls.REFUSED[name])
        theirs = []
        for now in given:
            out, *new = one(state, now)
            theirs.append(out)
            state = dict(zip(state, new, strict=True))
    return _row(name, records, _error(ours, theirs))


def _in_place(held: dict[str, Any], result: tuple[Any, ...]) -> Tensor:
    """What a decode loop does with a function's states."""
    out, *new = result
    for old, now in zip(tree_flatten(list(held.values()))[0], tree_flatten(new)[0], strict=True):
        old.copy_(now)
    return out


def layer_row(name: str) -> Row:
    """One layer with the library's own cache: a prompt, then token by token, compiled and as the library runs it."""
    from fla.models.utils import FLACache

    layer = layer_of(name, calls.LAYERS[name], PROMPT + calls.TOKENS)
    tokens = torch.randn(calls.B, PROMPT + calls.TOKENS, 32)
    told: dict[str, str] = {}
    records: list[GraphRecord] = []

    def run(step: Any) -> Iterator[Tensor]:
        cache = FLACache()
        prompt = step if name in calls.NO_PROMPT else layer  # else in the interpreter, on both sides
        prompt(tokens[:, :PROMPT], past_key_values=cache, use_cache=True)
        for t in range(PROMPT, tokens.shape[1]):
            yield step(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)[0]

    with torch.no_grad(), observers.also(records.append), substitution.left_alone(told.__setitem__):
        try:
            ours = list(run(_compiled(layer)))
        except Exception as error:
            why = "; ".join(f"{one}: {reason}" for one, reason in told.items())
            return {"name": name, "status": f"declined: {why}" if why else f"fails: {type(error).__name__}"}
        if name in calls.NO_PROMPT:
            return _row(name, records, None, calls.NO_PROMPT[name])
        return _row(name, records, _error(ours, list(run(layer))))


def layer_of(name: str, given: dict[str, Any], tokens: int) -> Any:
    """A layer by its name (not all are exported by the package itself) with random weights, for so many tokens."""
    import fla.layers

    modules = (importlib.import_module(f"fla.layers.{m.name}") for m in pkgutil.iter_modules(fla.layers.__path__))
    kind = next(vars(module)[name] for module in modules if name in vars(module))
    torch.manual_seed(0)
    layer = kind(layer_idx=0, **given).eval()
    for parameter in layer.parameters():  # models fill in what layers leave at zero, or as it was in memory
        if not parameter.isfinite().all() or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    for module in layer.modules():  # a table of angles that grows token by token is compiled anew as often
        if hasattr(module, "_update_cos_sin_cache"):
            module._update_cos_sin_cache(tokens, torch.device("cpu"), torch.float32)
    return layer


def _compiled(step: Any) -> Any:
    torch._dynamo.reset()
    substitution.watch()
    return torch.compile(step, backend="kvbuffer", fullgraph=True, options=OPTIONS)


def _error(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference of a run, relative to the largest value of its step."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(ours, theirs, strict=True))


def _row(name: str, records: list[GraphRecord], error: float | None, unchecked: str = "") -> Row:
    last = records[-1]  # earlier graphs are of the first calls, before sizes and counters became symbols
    plans = [plan for _, plan in last.rewritten]
    declined = [f"{why.rule}: {why.reason.split(' (')[0]}" for why in last.declined]
    return {
        "name": name,
        "ops": ", ".join(plan.program.signature for plan in plans),
        "states": len(plans),
        "error": error,
        "status": "; ".join([*dict.fromkeys(plan.variant for plan in plans)] or ["declined: " + "; ".join(declined)]),
        "unchecked": unchecked,
    }


def line(row: Row, *timed: str) -> str:
    error = row.get("error")
    shown = "" if error is None else f"{error:.0e}"
    shown = f"not compared: {row['unchecked']}" if row.get("unchecked") else shown
    cells = (row["name"], row.get("ops", ""), row.get("states", ""), shown, *timed, row["status"].replace("|", "/"))
    return f"| {' | '.join(map(str, cells))} |"


def page(functions: Iterable[Row], layers: Iterable[Row]) -> str:
    import fla

    stored = json.loads(TIMES.read_text(encoding="utf-8"))
    times = {row["layer"]: f"{row['inductor_over_kvbuffer']:.2f}" for row in stored["rows"]}
    return "\n\n".join(
        [
            "# flash-linear-attention",
            f"Made by `python -m tests.spelled.fla_table` with flash-linear-attention {fla.__version__} and torch "
            f"{torch.__version__.split('+')[0]} on a CPU, where its Triton kernels cannot run: under "
            '`torch.compile(..., backend="kvbuffer")` its functions are the recurrences that they compute, and norms, '
            "convolutions and activations of its layers plain torch ops. The error is the largest difference from "
            f"the library's own kernels in Triton's interpreter over {calls.TOKENS} tokens in float32, relative to the "
            "largest value of a step.",
            "Its cache puts a new state in the place of the old one at every token. States are buffered when the old "
            'ones may be written to: `options={"donate": True}`, if you keep no state of an earlier token. Tables of '
            "rotary angles were made long enough beforehand: one that grows is compiled anew, by any backend.",
            "## Layers",
            TIMED_HEAD + "\n".join(line(row, times.get(row["name"], "")) for row in layers),
            f"Times are those of one layer of {stored['hidden_size']} features at batch {stored['batch']}, a token a "
            f'call, on {stored["machine"]["cpu"]} with {stored["machine"]["threads"]} threads, `flush="auto"`, over '
            "the same layer left to Inductor with its functions spelled out in torch ops (`python -m benchmarks.fla`). "
            "A layer's state stays in the last cache here, so that for all but one the kernel that writes it at every "
            "token was chosen; other programs ran beside.",
            "## Functions",
            "`buffered`: a token a call; `verify`: 8 tokens a call, as one step.",
            HEAD + "\n".join(map(line, functions)) + "\n",
        ]
    )


def row_of(name: str) -> Row:
    if name in calls.WITHOUT:
        return {"name": name, "status": f"declined: {calls.WITHOUT[name]}"}
    return layer_row(name) if name in calls.LAYERS else function_row(name)


def main(asked: list[str]) -> None:
    layers = [*calls.LAYERS, *calls.WITHOUT]
    names = [*layers, *calls.exported()]
    stored = asked[1:] if asked[:1] == ["--page"] else []
    lines = [line for path in stored for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for name in [] if stored else asked or names:
        rows[name] = row_of(name)
        print(json.dumps(rows[name]), flush=True)
    if stored or not asked:
        found = [rows.get(name, {"name": name, "status": "not run"}) for name in names]
        PAGE.write_text(page(found[len(layers) :], found[: len(layers)]), encoding="utf-8")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    calls.interpret()
    main(sys.argv[1:])
