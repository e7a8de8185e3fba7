"""Lift rules broken on purpose, one at a time: validation must refuse every program that they make wrong.

A mutant replaces one rule while a battery of graphs is lifted: in the default run one in each module of the lift, at
night all. It must make at least one program wrong, or the copy of
the graph that it stands in, by the tests' own comparison; `validate` must decline every one of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule, Node

from kvbuffer_compile.passes.algebra import factor, operands, terms, transition
from kvbuffer_compile.passes.algebra.terms import Mask
from kvbuffer_compile.passes.lift import assemble, lift
from kvbuffer_compile.passes.lifted import Lifted, LiftedGraph
from kvbuffer_compile.passes.proof import validate
from kvbuffer_compile.passes.reading import aten as graph
from kvbuffer_compile.passes.reading import labels, variation
from kvbuffer_compile.passes.reading.forms import (
    Blocks,
    Cast,
    Constant,
    Contract,
    Permute,
    Pointwise,
    Product,
    Same,
    Select,
)
from kvbuffer_compile.passes.reading.labels import Atom, resolve
from kvbuffer_compile.passes.storage import pools, stacked
from kvbuffer_compile.passes.tokens import blocks, chained, composites, lists
from kvbuffer_compile.passes.walk import images, low_rank, order, queries, walk
from tests.spelled import block_forms, forms, graph_forms, near_misses, scan_forms
from tests.spelled.lifting import TOLERANCE, capture, disagreement, evaluate, traced, unlike
from tests.support.daily import first_of_each
from tests.support.steps import GROUPED_EQUAL, Sizes, grouped_cases

EQUAL = Sizes(4, 4, 4, 4)
aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------- battery


def mean_read(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Halves, quotients and differences."""
    S.copy_(S / (1 + torch.exp(-g))[..., None, None] - torch.addcmul(0 * S, -k[..., None], v[..., None, :], value=2))
    return (S * q[..., None]).mean(-2)


def tokens(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Three tokens along a dim of the operands, in slices and selected."""
    state, out = S, []
    for t, x in enumerate(q.chunk(q.shape[0], 0)[:3]):
        S = S * g[t, :, None, None].exp() + forms.outer(k[t], v[t : t + 1][0])
        out.append(forms.read(S, x))
    state.copy_(S)
    return torch.cat(out)


def bonus(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A read beside the chain, of the state with this token counted twice; one that is scaled; decays of both axes."""
    kv = forms.outer(k, v)
    out = forms.read(S + beta[..., None, None] * kv, q)
    scaled = torch.einsum("bhkv,bhk->hvb", S * torch.sigmoid(v).unsqueeze(-2), k).permute(2, 0, 1)
    S.copy_(
        torch.exp(-(k.square().unsqueeze(-1) + v.square().unsqueeze(-2))) * S + kv + forms.outer(torch.ones_like(k), v)
    )
    return out + scaled + S.sum(-2)


def halves(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A matrix product of rank two, a delta with a choice in it, one key that reads two versions."""
    two = torch.stack([k, q], -1) @ torch.stack([v, beta[..., None] * v.flip(-1)], -2)
    early = forms.read(S, q)
    S.copy_((S * g.exp()[..., None, None]).float() + two)
    error = torch.where(v > 0, v - forms.read(S, k), beta[..., None])
    S.add_(forms.outer(k, error))
    return early + (S.mT @ q[..., None])[..., 0]


def one_head(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[K, V], by the fused calls that there are for a matrix and vectors."""
    S.copy_(torch.addr(S * g[0, 0].exp(), k[0, 0], v[0, 0]))
    S.copy_(torch.addmm(S, k[1, 0, :, None], v[1, 0, None], beta=0.5, alpha=2))
    return torch.addmv(v[0, 1], S.T, q[0, 0], alpha=3)


def fused(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A quotient added, and a read inside a fused call."""
    S.copy_(torch.addcdiv(S * g.exp()[..., None, None], forms.outer(k, v), 1 + beta.exp()[..., None, None], value=3))
    base, flat = v.flatten(0, 1).unsqueeze(1), S.flatten(0, 1)
    return torch.baddbmm(base, q.flatten(0, 1).unsqueeze(1), flat, beta=0.5, alpha=2).view_as(v)


def stacked_layers(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[L, B, H, K, V]"""
    for layer in range(2):
        states[layer] = states[layer] * g.exp()[..., None, None] + forms.outer(k, v)
        v = torch.tanh(forms.read(states[layer], q))
    return v


def restacked(states: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    first, second = states.unbind(1)
    new = first * g.exp()[..., None, None] + forms.outer(k, v)
    v = torch.tanh(forms.read(new, q))
    states.copy_(torch.stack([new, 0.5 * second + forms.outer(k, v)], 1))
    return v


def slots(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = pool[idx] * g.exp()[..., None, None] + forms.outer(k, v)
    pool[idx] = S
    return forms.read(S, q)


def slots_of_others(pool: Tensor, idx: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    S = pool[idx.flip(0)] * g.exp()[..., None, None] + forms.outer(k, v)
    pool[idx] = S
    return forms.read(S, q)


def compiled() -> Iterator[tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    """Steps that must be captured as the backend sees them: several states in one tensor, and addcmul, which is an fma
    there."""
    g = torch.Generator().manual_seed(0)
    token = forms.operands("qkvgb")(EQUAL, g)
    for step, shape in ((stacked_layers, (2, 4, 4, 4, 4)), (restacked, (4, 2, 4, 4, 4))):
        yield step.__name__, step, (torch.randn(shape, generator=g), *token)
    for step in (slots, slots_of_others):
        yield step.__name__, step, (torch.randn(7, 4, 4, 4, generator=g), torch.arange(4), *token)
    yield "scaled_in_place", graph_forms.scaled_in_place, (torch.randn(4, 4, 4, 4, generator=g), *token)


def battery() -> Iterator[tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    plain = {f.name: f for f in forms.forms()} | {f.name: f for f in (*graph_forms.GRAPH_FORMS, *_FORMS)}
    plain |= {f.name: f for f, _ in graph_forms.NEAR}
    for name in _CHOSEN:
        g = torch.Generator().manual_seed(0)
        form = plain[name]
        yield name, form.step, (*form.start(g, EQUAL), *form.inputs(EQUAL, g))
    for form in _SCANS:
        g = torch.Generator().manual_seed(0)
        yield form.name, form.step, (*form.start(g, EQUAL), *form.inputs(EQUAL, g))
    for name, step in (*block_forms.STEPS.items(), *block_forms.NONE.items()):
        g = torch.Generator().manual_seed(0)
        state = torch.randn(block_forms.B, block_forms.H, block_forms.K, block_forms.V, generator=g)
        yield f"block {name}", step, (state, *block_forms.operands(5, g))
    for case in grouped_cases():
        yield case.name, case.step, case.make(GROUPED_EQUAL)
    for name, (step, _) in near_misses.NEAR_MISSES.items():
        g = torch.Generator().manual_seed(0)
        yield f"near {name}", step, (torch.randn(4, 4, 4, 4, generator=g), *forms.operands("qkvgb")(EQUAL, g))


_TOKEN = forms.operands("qkvgb")
_STEPS = {mean_read: "BHKV", tokens: "BHKV", bonus: "BHKV", halves: "BHKV", fused: "BHKV", one_head: "KV"}
_FORMS = tuple(forms.Form(step.__name__, ("",), step, (letters,), _TOKEN) for step, letters in _STEPS.items())
_SCANS = tuple(
    scan_forms.form(step, 3) for step in (scan_forms.gated, scan_forms.logarithms, scan_forms.state_in_front)
)
_CHOSEN = (
    "gated_delta_rule", "kda", "rwkv6", "rwkv7", "dplr", "gated_oja_rule", "ttt", "gated_delta_product2", "chosen",
    "multiplied_mask", "reset", "flat_lanes", "merged_lanes", "matrix", "diagonal_and_low_rank", "several_queries",
    "grouped_queries", "mean_read", "tokens", "bonus", "halves", "triangle", "shifted_identity",
    "rwkv7_products", "two_products", "lists_of_tensors", "fused", "one_head", "mixed", "mixed_by_a_number",
)  # fmt: skip


@cache
def graphs() -> dict[str, GraphModule]:
    """The battery captured, with Inductor's decompositions and without."""
    tables = {"": {}, " decomposed": select_decomp_table()}
    found = {name: capture(step, *args)[0] for name, step, args in compiled()}
    return found | {
        name + how: traced(step, args, table)
        for name, step, args in battery()
        for how, table in tables.items()
        if not (how and name.startswith("near"))
    }


@cache
def usual() -> dict[str, str]:
    """What is lifted without a mutant, and proved: a proof must not hide a mutant later."""
    found = {}
    for name, gm in graphs().items():
        lifted = lift.lift(gm)
        assert not [why for one in lifted.found if (why := validate.validate(lifted, one))]
        found[name] = text(lifted)
    return found


def text(lifted: LiftedGraph) -> str:
    parts = [f"{one.program} {one.layout} {one.operands} {one.outputs}" for one in lifted.found]
    parts += [str(lifted.parts)]
    return "\n".join([*parts, str(lifted.gm.graph) if lifted.found else ""])


# ---------------------------------------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """where.name, or the entry name of a table, becomes make(the original)."""

    rule: str
    where: Any
    name: str
    make: Callable[[Any], Any]


def op(name: str, make: Callable[[Any], Any]) -> Mutant:
    return Mutant(f"reading {name}", graph.READERS, name, make)


def _first(node: Node) -> Any:
    return node.args[0]


def _reversed_regroup(given: Any, sizes: Any) -> Any:
    out = _REGROUP(given, sizes)
    return out if out is None else tuple(tuple(reversed(dim)) for dim in out)


_REGROUP = labels.regroup


def _last_two_swapped(original: Any) -> Any:
    def mutant(*args: Any) -> Any:
        place = original(*args)
        *lanes, i, j = place.layout.order
        return replace(place, layout=replace(place.layout, order=(*lanes, j, i)))

    return mutant


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda original: lambda *args: value


def _without_last_update(original: Any) -> Any:
    def mutant(program: Any, outputs: Any) -> Any:
        program = original(program, outputs)
        updates = [op for op in program.ops if type(op).__name__ == "Update"]
        return original(replace(program, ops=tuple(o for o in program.ops if o is not updates[-1])), outputs)

    return mutant


MUTANTS = (
    # what an op means
    op("aten.sub", lambda _: graph._sum(1)),
    op("aten.add", lambda _: graph._sum(-1)),
    op("aten.div", lambda _: lambda n: Product(*n.args)),
    op("aten.neg", lambda _: lambda n: Same(_first(n))),
    op("aten.mean", lambda _: graph._reduce("sum")),
    op("aten.transpose", lambda _: lambda n: Same(_first(n))),
    op("aten.permute", lambda _: lambda n: Permute(_first(n), tuple(range(n.meta["val"].dim())))),
    op("aten.select.int", lambda f: lambda n:
       Select(_first(n), f(n).dim, (f(n).index + 1) % _first(n).meta["val"].shape[f(n).dim])),
    op("aten.where", lambda _: lambda n: graph.Choice(n.args[0], n.args[2], n.args[1])),
    op("aten.masked_fill", lambda _: lambda n: graph.Choice(n.args[1], n.args[0], n.args[2])),
    op("aten.bmm.default", lambda _: lambda n: Contract(*n.args, ("bic", "bjc", "bij"))),
    op("aten._to_copy", lambda _: lambda n: Cast(_first(n), True)),
    op("aten.exp", lambda _: lambda n: Same(_first(n))),
    op("aten.tanh", lambda _: lambda n: Same(_first(n))),
    op("aten.relu", lambda _: lambda n: Same(_first(n))),
    op("aten.roll", lambda _: lambda n: Same(_first(n))),
    op("aten.clamp", lambda _: lambda n: Same(_first(n))),
    op("aten.abs", lambda _: lambda n: Same(_first(n))),
    op("aten.sigmoid", lambda _: lambda n: Product(_first(n), 0.25)),
    op("aten.slice.Tensor", lambda f: lambda n:
       replace(form, start=form.start + 1) if hasattr(form := f(n), "start") else form),
    # walking the state forwards
    Mutant("sum without scales", walk.Walk, "_sum",
           lambda f: lambda self, node, parts, lins: f(self, node, [(x, ()) for x, _ in parts], lins)),
    Mutant("choice of one branch", walk, "Mask", lambda f: lambda condition, keep: Mask(condition, True)),
    Mutant("quotient as product", walk.Walk, "_scaled",
           lambda f: lambda self, node, x, y, lins, reciprocal=False: f(self, node, x, y, lins)),
    Mutant("mean as sum", walk, "mean", _constant(1.0)),
    Mutant("all is zero", walk, "is_zero", _constant(True)),
    # the states of several tokens
    op("aten.cat.default", lambda f: lambda n: _backwards(f(n))),
    Mutant("slices from the front", images, "_sliced",
           lambda f: lambda lin, form, size: f(lin, replace(form, start=0), size)),
    Mutant("the chain forgets", chained.Written, "after",
           lambda f: lambda self, other: None if (step := f(self, other)) is None else (step[0], step[1][:1] * 2)),
    # versions
    Mutant("no factors on addends", order, "relative",
           lambda f: lambda v, b: (f(v, b)[0], [t[:1] for t in f(v, b)[1]])),
    # labels
    Mutant("regroup inside out", variation, "regroup", lambda f: _reversed_regroup),
    Mutant("held at the first position", terms, "fixed", lambda f: lambda l, atom, at: f(l, atom, 0)),
    # what varies
    Mutant("nothing varies", variation.Values, "vary", lambda f: lambda self, node, l: frozenset()),
    Mutant("half varies", variation, "pull", lambda f: lambda node, l: (f(node, l) or [])[:1] or None),
    Mutant("ones are zero", factor, "is_zero", lambda f: lambda node: isinstance(graph.read(node), Constant)),
    Mutant("everything was expanded", variation, "is_repeated", lambda f: lambda node: tuple(True for _ in f(node))),
    # factors
    Mutant("exp of twice", factor.Factoring, "_exp", lambda f: lambda self, term, where: f(self, (*term, 2.0), where)),
    Mutant("first of several terms", factor.Factoring, "_product", lambda f: lambda self, x, y: f(self, x, y)[:1]),
    Mutant("contraction at one position", factor.Factoring, "_summed",
           lambda f: lambda self, node, t, index: f(self, node, t, index)[:1]),
    Mutant("shared without its scalar", factor.Factoring, "shared", lambda f: lambda self, x: f(self, x)[:1]),
    Mutant("numbers left out", factor.Factoring, "_joined",
           lambda f: lambda self, t: tuple(x for x in f(self, t) if not isinstance(x, float))),
    # order
    Mutant("no decay", order.Ordering, "_decay", _constant([])),
    Mutant("every read sees the decay", order.Ordering, "_sees", _constant(True)),
    Mutant("no correction", order.Ordering, "_fix", _constant(0.0)),
    Mutant("last of the joined updates", order, "_joined",
           lambda f: lambda events, axes: [e for i, e in enumerate(f(events, axes)) if i]),
    Mutant("one decay of several", order, "_decays", lambda f: lambda run, axes: f(run[:1], axes)),
    Mutant("masks forgotten", order, "product",
           lambda f: lambda term: f(tuple(x for x in term if not isinstance(x, Mask)))),
    Mutant("post factors forgotten", order.Ordering, "_split",
           lambda f: lambda self, term, axis: (f(self, term, axis)[0], 1)),
    # operands and coordinates
    Mutant("one read for all versions", assemble, "settled",
           lambda f: lambda x: replace(f(x), stage=0) if isinstance(x, terms.Fetch) else f(x)),
    Mutant("an update dropped", lift, "trimmed", _without_last_update),
    Mutant("axes swapped in memory", assemble, "coordinates", _last_two_swapped),
    Mutant("lanes in another order", operands.Operands, "_placed", lambda f: lambda *a: _rotated(f, *a)),
    Mutant("operands at the first position", operands.Operands, "_leaf",
           lambda f: lambda self, node, l, kind:
           f(self, node, tuple(tuple(Atom(a.size, 0) if a.at else a for a in resolve(d)) for d in l), kind)),
    Mutant("ones are twos", operands.Operands, "_filled",
           lambda f: lambda self, number, tail: f(self, 2 * number, tail)),
    Mutant("another call", operands, "overload",
           lambda f: lambda fn: f("aten.add.Tensor" if fn == "aten.mul.Tensor" else fn)),
    Mutant("outputs as they come", assemble.Assembled, "output",
           lambda f: lambda self, *a: replace(f(self, *a), perm=tuple(range(len(f(self, *a).perm))))),
    Mutant("truth turned round", assemble.Lowering, "_truth",
           lambda f: lambda self, x: self._map("aten.eq.Scalar", (self._var(x), 0))),
    # transitions and queries
    Mutant("any comparison is the identity", transition._Matrix, "_is_identity",
           lambda f: lambda self, node, l: isinstance(graph.read(node), Pointwise)),
    Mutant("no diagonal of its own", transition._Matrix, "_diagonal",
           lambda f: lambda self, x, y, l, node: [(transition.IDENTITY,)]),
    Mutant("columns forgotten", transition, "_read",
           lambda f: lambda node, lin, factors, index: f(node, lin, factors[:1], index)),
    Mutant("one query for all", queries, "_single",
           lambda f: lambda w, node: [(place, f(w, node)[0][1]) for place, _ in f(w, node)]),
    Mutant("queries joined backwards", queries, "_stacked", lambda f: lambda nodes, *rest: f(nodes[::-1], *rest)),
    Mutant("one product of several", low_rank._Product, "_term",
           lambda f: lambda self, insert, term: f(self, insert, self.terms[0])),
    # blocks of tokens
    Mutant("a block decays at its other end", assemble, "once", lambda f: lambda ops, node, at: f(ops, node, -1 - at)),
    Mutant("a block decays at each token", assemble, "once", lambda f: lambda ops, node, at: node),
    Mutant("a block sees nothing of itself", assemble, "sum_within", _constant(None)),
    Mutant("added once is added at each token", blocks, "_is_counted", _constant(True)),
    Mutant("a block feeds itself", assemble, "separate", _constant(None)),
    # fused calls, and calls on lists
    Mutant("lists are subtracted", lists, "_one",
           lambda f: lambda insert, node, at, call:
           f(insert, node, at, aten.sub.Tensor if call is aten.add.Tensor else call)),
    *(Mutant(f"twice {name}", composites.COMPOSITES, name,
             lambda f: lambda insert, node: insert.call(aten.mul.Tensor, f(insert, node), 2))
      for name in composites.COMPOSITES),
    Mutant("alpha and beta forgotten", composites, "_scaled", lambda f: lambda insert, x, number: x),
    # stacks and pools
    Mutant("slices at other places", stacked, "Part",
           lambda f: lambda name, index, place: f(name, index, tuple((dim, 1 - at) for dim, at in place))),
    Mutant("earlier writes forgotten", stacked, "_follow", lambda f: _forgetful(f)),
    Mutant("one piece of those joined", stacked, "_pieces", lambda f: lambda *a: _last_piece_only(f(*a))),
    Mutant("nothing is stored", stacked, "_store", lambda f: lambda part, value, write: f(part, part, write)),
    Mutant("any slots are alike", pools, "_is_alike", _constant(True)),
)  # fmt: skip


def _backwards(form: Any) -> Any:
    return replace(form, xs=form.xs[::-1]) if isinstance(form, Blocks) else form


def _last_piece_only(pieces: dict[Any, Node] | None) -> dict[Any, Node] | None:
    return pieces and dict([*pieces.items()][-1:])


def _forgetful(original: Any) -> Any:
    def mutant(stack: Any, node: Node, base: Node) -> bool:
        done: bool = original(stack, node, base)
        if node.target is aten.select_scatter.default and node in stack.values:
            stack.values[node] = _last_piece_only(stack.values[node])
        return done

    return mutant


def _rotated(original: Any, self: Any, node: Node, have: list[Atom], axis: Any) -> Node:
    return original(self, node, [*have[1:-1], have[0], *have[-1:]] if len(have) > 2 else have, axis)


def wrong(lifted: LiftedGraph, one: Lifted, values: dict[Node, Any]) -> bool:
    """By the tests' own comparison."""
    try:
        return not unlike(lifted) < TOLERANCE or not disagreement(lifted, one, values) < TOLERANCE
    except (AssertionError, RuntimeError, KeyError):
        return True


def mutated(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> Iterator[tuple[str, LiftedGraph]]:
    """What the battery lifts to with a mutant, where that differs."""
    if isinstance(mutant.where, dict):
        monkeypatch.setitem(mutant.where, mutant.name, mutant.make(mutant.where.get(mutant.name)))
    else:
        monkeypatch.setattr(mutant.where, mutant.name, mutant.make(getattr(mutant.where, mutant.name)))
    for name, gm in graphs().items():
        try:
            lifted = lift.lift(gm)
        except Exception:  # an internal error: the backend leaves such a graph alone
            continue
        if text(lifted) != usual()[name] and lifted.found:
            yield name, lifted


def part(mutant: Mutant) -> Any:
    """The module that is mutated, or the table."""
    where = mutant.where
    return id(where) if isinstance(where, dict) else getattr(where, "__module__", None) or where.__name__


@pytest.mark.parametrize("mutant", first_of_each(MUTANTS, part, lambda m: m.rule))
def test_validation_declines_what_a_mutant_lifts_wrongly(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    usual()
    caught, missed = 0, []
    for name, lifted in mutated(monkeypatch, mutant):
        values = evaluate(lifted.gm)
        for one in lifted.found:
            declined = validate.validate(lifted, one)
            assert declined is None or declined.rule in ("validation", "unchecked")
            caught += declined is not None
            if declined is None and wrong(lifted, one, values):
                missed.append(f"{name}\n{one.program}")
    assert not missed, "\n".join(missed)
    assert caught, "the mutant makes no program wrong: it tests nothing"
