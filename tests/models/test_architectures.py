"""Every architecture of the zoo, one decode step at a time: what is rewritten, what is declined and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch

from kvbuffer_compile.backend import GraphRecord
from kvbuffer_compile.errors import Declined
from tests import zoo
from tests.models.test_models import in_float64
from tests.support.daily import chosen
from tests.support.oracle import check, check_steps
from tests.zoo import ARCHS, Arch

FAST = {"inner": "eager", "target": "aten", "flush": 4}
TOKENS = 20
# Of each family of layers one, and one for each reason. Every run has Qwen3-Next, Qwen3.5 and Mamba-2 in `test_models`,
# Kimi Linear in `test_sequence` and xLSTM in bfloat16 below; at night all are here.
DAILY = {"olmo_hybrid", "falcon_h1", "minimax", "mamba", "rwkv", "lfm2"}
BF16 = ("kimi_linear", "minimax", "xlstm", "bamba", "zamba2", "olmo_hybrid", "nemotron_h")
DENSE, VECTOR, OVERWRITTEN = "full-decay", "vector", "overwritten"
# Rules that reports must show for the states of what is declined, each at a line of the model.
DECLINED: dict[str, Counter[str]] = {
    "mamba": Counter({DENSE: 2}),
    "falcon_mamba": Counter({DENSE: 2}),
    "jamba": Counter({DENSE: 2}),
    "zamba": Counter({DENSE: 6}),  # two heads a layer, each a slice
    "rwkv": Counter({VECTOR: 6, OVERWRITTEN: 4}),  # slices, three and two a layer; the second are shift registers
    "recurrent_gemma": Counter({VECTOR: 2}),
    "lfm2": Counter(),
    "zaya": Counter({OVERWRITTEN: 2}),
}


def rows(names: Iterable[str], daily: Iterable[str] = DAILY) -> list:
    archs = [ARCHS[name] for name in names]
    return chosen(archs, {a.name for a in archs} & set(daily), lambda arch: arch.name)


def batch(arch: Arch) -> int:
    return 1 if arch.name == "rwkv" else 2  # the library's own one-token step of RWKV is wrong for more


def options(arch: Arch) -> dict:
    """MiniMax returns its states, and its cache lets go of the old ones."""
    return {**FAST, "donate": arch.name == "minimax"}


def decode(arch: Arch, dtype: torch.dtype, kind: str = "dynamic") -> None:
    """TOKENS tokens with the compiled, the eager and the float64 model: logits by the oracle, states at the end."""
    models = [zoo.make_model(arch.name, dtype), zoo.make_model(arch.name, dtype)]
    models.append(in_float64(models[1]))
    steps = [zoo.prefilled(m, zoo.prompt(batch(arch), 6), kind) for m in models]
    compiled = torch.compile(steps[0], backend="kvbuffer", fullgraph=arch.fullgraph, options=options(arch))
    tokens = zoo.prompt(batch(arch), TOKENS, seed=5)
    logits: list[list[torch.Tensor]] = [[], [], []]
    with torch.no_grad():
        for t in range(TOKENS):
            for run, kept in zip((compiled, *steps[1:]), logits, strict=True):
                kept.append(run(tokens[:, t : t + 1]))
    check_steps(*logits, "logits")
    for (name, got), (_, eager), (_, exact) in zip(*map(zoo.states_of, steps), strict=True):
        check(got + 0, eager, exact, name)


def visible(record: GraphRecord) -> list[Declined]:
    """Why recurrent states are not rewritten, those that are no matrices among them; nothing is said of caches."""
    assert all(r.kept != (r.why.rule == DENSE) for r in record.refused)
    return [r.why for r in record.refused if r.why.rule in (DENSE, VECTOR, OVERWRITTEN)]


def assert_buffered(arch: Arch, records: list[GraphRecord]) -> None:
    """All its matrix states are, in one graph, or in one each for what is captured in parts."""
    found = [r for r in records if r.rewritten]
    assert found, "nothing was rewritten"
    for record in found:
        assert len(record.rewritten) == (arch.states if arch.fullgraph else 1)
        assert {plan.program.signature for _, plan in record.rewritten} == {arch.signature}
        assert {plan.variant for _, plan in record.rewritten} == {"buffered"}
        # of xLSTM the normaliser, a vector, and the stabiliser stay as they are
        rules = Counter({VECTOR: 2 * arch.states}) if arch.name == "xlstm" else Counter()
        assert Counter(why.rule for why in visible(record)) == rules
    assert arch.fullgraph or len(found) >= arch.states


@pytest.mark.parametrize("arch", rows(a for a in ARCHS if ARCHS[a].states))
def test_buffered(arch: Arch, records: list[GraphRecord]) -> None:
    decode(arch, torch.float32)
    assert_buffered(arch, records)


@pytest.mark.parametrize("arch", rows(BF16, ["xlstm"]))
def test_buffered_in_bfloat16(arch: Arch, records: list[GraphRecord]) -> None:
    decode(arch, torch.bfloat16)
    assert_buffered(arch, records)


@pytest.mark.nightly
@pytest.mark.parametrize("arch", rows(a for a in ARCHS if ARCHS[a].states and ARCHS[a].static_cache))
def test_buffered_with_a_static_cache(arch: Arch, records: list[GraphRecord]) -> None:
    decode(arch, torch.float32, kind="static")
    assert_buffered(arch, records)


@pytest.mark.parametrize("arch", rows(DECLINED))
def test_declined(arch: Arch, records: list[GraphRecord]) -> None:
    zoo.skip_where_nothing_compiles(arch.name)
    decode(arch, torch.float32)
    assert records
    for record in records:
        assert not record.states
        assert Counter(why.rule for why in visible(record)) == DECLINED[arch.name], visible(record)
        for why in visible(record):
            file, _, line = why.source.rpartition(":")
            assert file.endswith((f"modeling_{arch.name}.py", "cache_utils.py")) and line.isdigit(), why


def test_every_architecture_is_here() -> None:
    assert set(DECLINED) == {a for a in ARCHS if not ARCHS[a].states}
