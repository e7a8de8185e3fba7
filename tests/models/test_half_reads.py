"""bfloat16 models whose float32 states are read in float16: as near to float64 as eager, over 256 tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.passes.choice import choose
from kvbuffer_compile.runtime import by_hand
from tests import zoo
from tests.models.test_architectures import options
from tests.models.test_models import in_float64
from tests.support.oracle import check, check_steps
from tests.zoo import ARCHS, Arch

FLUSH, BATCH = 8, 2
# Float32 states whose operands are 16-bit values; the other architectures have states of the model's own dtype.
FLOAT32 = {name for name, arch in ARCHS.items() if arch.states}


def run(arch: Arch, tokens: int, records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> int:
    """Decode some tokens with "auto" and hold all to the oracle; how many states were read in float16."""
    monkeypatch.setattr(choose, "EQUAL", 0.0)  # small states gain nothing by it
    models = [zoo.make_model(arch.name, torch.bfloat16) for _ in range(2)]
    steps = [zoo.prefilled(m, zoo.prompt(BATCH, 6)) for m in (*models, in_float64(models[1]))]
    given = {**options(arch), "flush": FLUSH, "read_dtype": "auto"}
    compiled = torch.compile(steps[0], backend="kvbuffer", fullgraph=arch.fullgraph, options=given)
    logits: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for token in zoo.prompt(BATCH, tokens, seed=5).split(1, 1):
            for call, kept in zip((compiled, *steps[1:]), logits, strict=True):
                kept.append(call(token))
    shadows = [a.shadow for a in by_hand.accounts_of(steps[0].cache) if a.shadow]
    assert all(bool((scale > 0).all()) for _, scale in shadows), "the next step would read them"
    check_steps(*logits, "logits")
    for (name, got), (_, eager), (_, exact) in zip(*map(zoo.states_of, steps), strict=True):
        check(got + 0, eager, exact, name)
    planned = {found.state.name for r in records for found, plan in r.rewritten if plan.read_dtype is not None}
    assert bool(shadows) == bool(planned)
    return len(shadows)


@pytest.mark.nightly
@pytest.mark.parametrize("arch", [pytest.param(ARCHS[name], id=name) for name in sorted(FLOAT32)])
def test_256_tokens(arch: Arch, records: list[GraphRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(arch, 256, records, monkeypatch)
    print(f"SHADOWS {arch.name} {found}")
