"""The installed flash-linear-attention: its signatures, and its functions and layers against its own kernels.

The kernels run in Triton's interpreter, in a process of its own (tests/spelled/fla_table.py).
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbuffer_compile.integrations.functions import fla as table
from kvbuffer_compile.integrations.functions import plain, substitution
from kvbuffer_compile.integrations.functions.arguments import AT_DEFAULT, Unserved, arguments, binder
from kvbuffer_compile.integrations.functions.known import Known
from tests.spelled import fla_calls

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "flash-linear-attention.md"
LARGEST = 5e-6  # relative error of 32 tokens in float32; 7e-7 was the largest seen
QUICK = ("fused_recurrent_kda", "fused_mul_recurrent_rwkv7", "chunk_comba", "fused_recurrent_gsa", "KimiDeltaAttention")


@pytest.fixture(scope="module")
def exported() -> dict[str, Callable[..., Any]]:
    """What the installed library exports."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed: pip install -e .[test,fla]")
    return fla_calls.exported()


def disagreements(name: str, known: Known, function: Callable[..., Any]) -> list[str]:
    """Where the table's arguments are not those of a function."""
    parameters = inspect.signature(function).parameters.values()
    behind = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    ours = [theirs for theirs in known.arguments.ours if theirs not in known.arguments.hidden]
    problems = [] if [p.name for p in named] == ours else [f"{name}: {[p.name for p in named]} is written {ours}"]
    if known.arguments.hidden and not behind:
        problems.append(f"{name} takes no keyword arguments beside its own")
    for p in named:
        default = known.arguments.defaults.get(p.name, p.empty)
        if type(default) is not type(p.default) and {type(default), type(p.default)} != {int, float}:
            problems.append(f"{name}: {p.name}={p.default!r} is written {default!r}")
        elif default != p.default:
            problems.append(f"{name}: {p.name}={p.default!r} is written {default!r}")
    return problems


def test_every_function_is_served_or_declined(exported: dict[str, Callable[..., Any]]) -> None:
    assert len(exported) > 50, "what is exported was not found"
    assert not [name for name in exported if name not in {**table.SERVED, **table.UNSERVED}]
    assert not set(table.SERVED) & set(table.UNSERVED)
    assert all(len(why) > 20 for why in table.UNSERVED.values())


def test_every_layer_with_a_recurrent_state_has_a_row(exported: dict[str, Callable[..., Any]]) -> None:
    import fla.layers

    modules = [importlib.import_module(f"fla.layers.{m.name}") for m in pkgutil.iter_modules(fla.layers.__path__)]
    kinds = {x for module in modules for x in vars(module).values() if isinstance(x, type) and hasattr(x, "forward")}
    found = {
        kind.__name__
        for kind in kinds
        if kind.__module__.startswith("fla.layers") and "recurrent_state" in inspect.getsource(kind)
    }
    assert len(found) > 20 and found == {*fla_calls.LAYERS, *fla_calls.WITHOUT}


def test_signatures_of_functions(exported: dict[str, Callable[..., Any]]) -> None:
    served = {name: known for name, known in table.SERVED.items() if name in exported}
    assert len(served) > 40
    assert not [x for name, known in served.items() for x in disagreements(name, known, exported[name])]


def test_signatures_of_norms_and_convolutions(exported: dict[str, Callable[..., Any]]) -> None:
    import fla.layers  # noqa: F401

    found = {
        name: vars(module)[name]
        for name in plain.SERVED
        for title, module in sorted(sys.modules.items())
        if title.startswith("fla.") and name in vars(module)
    }
    assert set(found) == set(plain.SERVED)
    assert not [x for name, known in plain.SERVED.items() for x in disagreements(name, known, found[name])]


def test_the_check_of_signatures_can_fail() -> None:
    def function(q, k, scale=1.0, **kwargs): ...

    def named(text: str) -> list[str]:
        return disagreements("f", Known(lambda c: c, arguments(text), lambda c: None), function)

    assert not named("q k scale=1.0 ** A_log=None")
    assert named("q k scale=None **") and named("q k **") and named("k q scale=1.0")


def test_defaults_are_those_of_the_function_at_hand() -> None:
    """Another version of the library may have others."""

    def function(r, w, scale=3.0, initial_state=None): ...

    found = arguments("r>q w>gk scale=None initial_state=None ** chunk_size=64 A_log=None")
    bind = binder(*found.as_stated_by(function))
    assert bind(1, w=2) == {"q": 1, "gk": 2, "scale": 3.0, "initial_state": None, "A_log": None}
    assert isinstance(bind(1, 2, a_new_option=None), Unserved) and isinstance(bind(1), Unserved)


@pytest.mark.parametrize("name", ["reverse", "cu_seqlens", "cp_context"])
def test_what_is_not_served_declines(name: str) -> None:
    bind = binder(arguments(f"q {name}={'False' if name == 'reverse' else 'None'}"), ("q", name))
    assert bind(1) == {"q": 1, name: False if name == "reverse" else None}
    declined = bind(1, torch.ones(2) if name == "cu_seqlens" else True)
    assert isinstance(declined, Unserved) and AT_DEFAULT[name] in declined.reason


def rows(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of the table, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.spelled.fla_table", *names],
        cwd=ROOT, capture_output=True, text=True, timeout=3600, env={**os.environ, "KVBUFFER_STRICT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_numbers_of_the_kernels(exported: dict[str, Callable[..., Any]]) -> None:
    found = rows(QUICK)
    assert [row["name"] for row in found] == list(QUICK)
    for row in found:
        assert row["status"] in ("buffered", "verify") and row["states"] >= 1 and row["error"] < LARGEST, row


@pytest.mark.nightly
def test_the_page_is_up_to_date(exported: dict[str, Callable[..., Any]]) -> None:
    """Every row of it, errors aside."""
    written = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written if line.startswith("| ")]
    stored = {row[0]: (row[1], row[2], row[-1].replace("/", "|")) for row in cells}
    for row in rows((*fla_calls.LAYERS, *fla_calls.WITHOUT, *exported)):
        now = (row.get("ops", ""), str(row.get("states", "")), row["status"].replace("/", "|"))
        assert stored[row["name"]] == now, f"{row}: run python -m tests.spelled.fla_table"
        assert row.get("error") is None or row["error"] < LARGEST, row


def test_a_function_that_is_left_alone_says_why() -> None:
    """On a state that exists, by a name that is known and not served."""
    module = type(sys)("fla.ops.left_alone")

    def chunk_mesa_net(x):
        return x + 1

    chunk_mesa_net.__module__ = module.__name__
    module.chunk_mesa_net = chunk_mesa_net
    sys.modules[module.__name__] = module
    told: dict[str, str] = {}
    try:
        substitution.substitute_known()
        with torch.no_grad(), substitution.left_alone(told.__setitem__):
            x = torch.ones(3)
            got = torch.compile(
                lambda x: chunk_mesa_net(x), backend="kvbuffer", fullgraph=True, options={"inner": "eager"}
            )(x)
    finally:
        del sys.modules[module.__name__]
        substitution._searched.discard(module.__name__)
    torch.testing.assert_close(got, x + 1)
    assert told == {"chunk_mesa_net": table.CONJUGATE}
