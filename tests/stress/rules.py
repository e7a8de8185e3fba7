"""What the stress machine does: one small function for each kind of thing that happens to states."""

from __future__ import annotations

import copy
import gc
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbuffer_compile import accept, draft_tree, materialize, rollback
from tests.stress import places
from tests.stress.graphs import SLOTS, TOKENS, Graph, Inputs, gla, operands
from tests.stress.machine import Held, Place, World, rule
from tests.stress.ways import AROUND, EXPORTS, HOLDS, READS, STEADY, WRITES
from tests.support.fuse import blown

REMEMBERED = 8  # tokens that a test tries to take back


# ---------------------------------------------------------------------------------------------------- steps


def step(world: World, place: Place, name: str, inputs: Inputs, run: Any = None) -> None:
    """One step of both; `run` in place of the compiled one."""
    graph = world.compiled.steps[name]
    world.note(name)
    place.history = [*place.history, *_unrolled(graph, place.twin.clone(), inputs)][-REMEMBERED:]
    with torch.inference_mode(place.inference):
        out = (run or graph.compiled)(place.real, *inputs)
        want = graph.plain(place.twin, *inputs)
    if name == "donated":
        assert out[1] is place.real, "a donated state comes back as itself"
        place.twin.copy_(want[1])
        out, want = out[0], want[0]
    place.tokens += graph.count or 1
    world.same(out, want, f"output of {name}")
    if name in ("at once", "declined"):
        place.history.clear()
    assert float(place.twin.abs().max()) < 2**22


def _unrolled(graph: Graph, twin: Tensor, inputs: Inputs) -> list[Tensor]:
    """The twin before each token."""
    before = []
    for t in range(graph.count or 1):
        before.append(twin.clone())
        if graph.count:
            gla(twin, *(x[:, t] for x in inputs))
    return before


@rule("step", 40)
def any_step(world: World, place: Place, dice: random.Random) -> None:
    name = dice.choice(place.steps)
    for _ in range(dice.choice((1, 1, 2, 3))):
        g = world.generator(dice)
        if name == "slice":
            _step_slice(world, place, dice.randrange(2), g)
        elif name == "pool":
            inputs = operands(world.compiled.steps[name], 3, g)
            step(world, place, name, (torch.randperm(SLOTS, generator=g)[:3], *inputs))
            place.history.clear()
        else:
            step(world, place, name, operands(world.compiled.steps[name], place.twin.shape[-4], g))


def _step_slice(world: World, place: Place, at: int, g: torch.Generator) -> None:
    """A new view of a stack at every step."""
    part = Place("slice", place.real[at], place.twin[at], ("decode",))
    step(world, part, "decode", operands(world.compiled.steps["decode"], len(part.twin), g))
    place.history.clear()


@rule("step a part of the batch", 3)
def part_of_batch(world: World, place: Place, dice: random.Random) -> None:
    if "any batch" in place.steps:
        part = Place("part", place.real[:1], place.twin[:1], place.steps)
        step(world, part, "any batch", operands(world.compiled.steps["any batch"], 1, world.generator(dice)))
        world.touched(place)


@rule("a step that fails in the middle", 4)
def blown_step(world: World, place: Place, dice: random.Random) -> None:
    others = [p for p in world.places if p is not place and "delta" in p.steps]
    if "delta" not in place.steps or not others:
        return
    graph, other = world.compiled.steps["two"], dice.choice(others)
    inputs = operands(graph, len(place.twin), world.generator(dice))
    if dice.random() < 0.6:
        world.note("blown")
        with blown():
            graph.compiled(place.real, other.real, *inputs)
    out, want = graph.compiled(place.real, other.real, *inputs), graph.plain(place.twin, other.twin, *inputs)
    world.same(out, want, "output of two")
    place.history.clear()
    other.history.clear()


@rule("a step with an operand that does not fit", 0.5)
def wrong_operand(world: World, place: Place, dice: random.Random) -> None:
    if "decode" in place.steps:
        graph = world.compiled.steps["decode"]
        q, k, v, g = operands(graph, len(place.twin), world.generator(dice))
        logging.disable(logging.ERROR)  # Dynamo prints what the exception says
        try:
            with pytest.raises(Exception, match="broadcast|match"), torch.inference_mode(place.inference):
                graph.compiled(place.real, q, k, v[..., :-1], g)
        finally:
            logging.disable(logging.NOTSET)


@rule("reset Dynamo", 0.03)
def reset(world: World, place: Place, dice: random.Random) -> None:
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------ reads and writes


def read_somehow(world: World, place: Place, dice: random.Random) -> None:
    reads = READS | world.compiled.readers
    around = dice.choice(list(AROUND))
    name = dice.choice(STEADY if around not in ("nothing", "nothing again") else list(reads))
    if around in world.without or name in world.without:
        return
    world.note(f"under {around}")
    place.exported |= name in EXPORTS
    with AROUND[around]():
        world.read(place, name, reads[name])


@rule("read", 10)
def read(world: World, place: Place, dice: random.Random) -> None:
    read_somehow(world, place, dice)


@rule("write", 14)
def write(world: World, place: Place, dice: random.Random) -> None:
    writes: dict[str, Any] = WRITES | {k: lambda s, g, f=f: f(s) for k, f in world.compiled.writers.items()}
    name, seed = dice.choice([w for w in writes if w not in world.without]), dice.getrandbits(40)
    world.note(name)
    place.exported |= name in EXPORTS
    if place.kind == "inference" and "graph" in name:
        return
    for state in (place.real, place.twin):
        with torch.inference_mode(place.inference):
            writes[name](state, torch.Generator().manual_seed(seed))
    world.touched(place)


@rule("a write that fails", 2)
def failing_write(world: World, place: Place, dice: random.Random) -> None:
    with pytest.raises(RuntimeError), torch.inference_mode(place.inference):
        place.real.copy_(torch.zeros(7, 7))
    place.history.clear()


@rule("copy another", 3)
def copy_another(world: World, place: Place, dice: random.Random) -> None:
    other = dice.choice(world.places)
    if other.twin.shape == place.twin.shape and not place.inference:
        world.note(other.kind)
        place.real.copy_(other.real)
        place.twin.copy_(other.twin)
        world.touched(place)
        world.touched(other)


@rule("reorder", 2)
def reorder(world: World, place: Place, dice: random.Random) -> None:
    """As beam search does: the place has another tensor afterwards."""
    if place.kind in ("own", "zero"):
        order = torch.tensor([1, 1])
        place.real, place.twin = place.real.index_select(0, order), place.twin.index_select(0, order)
        place.held.clear()
        place.history.clear()


@rule("materialize", 3)
def by_hand(world: World, place: Place, dice: random.Random) -> None:
    materialize(place.holder or place.real)
    place.history.clear()


# --------------------------------------------------------------------------------------------------- memory


@rule("hold", 6)
def hold(world: World, place: Place, dice: random.Random) -> None:
    name = dice.choice([h for h in HOLDS if h not in world.without])
    if name == "memory at its address" and type(place.real) is Tensor:
        return  # a pointer taken before the first step leaves no trace: README, Limits
    if place.kind != "inference" and place.kind != "parameter":
        world.note(name)
        place.held.append(Held(name, *place.each(HOLDS[name])))
        place.exported = True
        place.history.clear()


@rule("share", 0.7)
def share(world: World, place: Place, dice: random.Random) -> None:
    if place.kind in ("own", "cache"):
        # torch frees the memory that it moves a storage from, whoever else has a pointer into it
        place.held = [h for h in place.held if h.name not in ("array", "asarray", "import", "memory at its address")]
        place.real.share_memory_()
        place.exported = True
        place.history.clear()


def _held(place: Place, dice: random.Random) -> Held | None:
    return dice.choice(place.held) if place.held else None


@rule("read what is held", 8)
def read_held(world: World, place: Place, dice: random.Random) -> None:
    if held := _held(place, dice):
        world.note(held.name)
        world.same(held.real, held.twin, f"{held.name} of {place.kind}, held")
        place.history.clear()


@rule("write to what is held", 4)
def write_held(world: World, place: Place, dice: random.Random) -> None:
    if held := _held(place, dice):
        world.note(held.name)
        for x in (held.real, held.twin):
            if isinstance(x, np.ndarray):
                x += 2
            else:
                x.add_(2)
        world.touched(place)


@rule("let go", 4)
def let_go(world: World, place: Place, dice: random.Random) -> None:
    if place.held:
        del place.held[dice.randrange(len(place.held))]


@rule("keep a view alone", 1)
def keep_view(world: World, place: Place, dice: random.Random) -> None:
    """The state's tensor goes, what owes rows with it; the memory lives on."""
    if place.kind in ("own", "zero"):
        place.real, place.twin = place.real[:], place.twin[:]
        place.exported = True
        place.history.clear()


@rule("deep copy of a state and its view", 2)
def deep_copy(world: World, place: Place, dice: random.Random) -> None:
    if place.kind in ("own", "zero", "cache") and len(world.places) < 4:
        (real, view), (twin, view_of_twin) = place.each(lambda s: copy.deepcopy([s, s[0]]))
        world.places.append(Place("copy", real, twin, places.PLAIN, held=[Held("view", view, view_of_twin)]))
        place.history.clear()


@rule("clone", 2)
def clone(world: World, place: Place, dice: random.Random) -> None:
    if place.twin.shape == places.SHAPE and not place.inference and len(world.places) < 4:
        world.places.append(Place("clone", place.real.clone(), place.twin.clone(), places.PLAIN))
        place.history.clear()


@rule("allocate anew", 3)
def replace(world: World, place: Place, dice: random.Random) -> None:
    """A new state, often at the address of the old one."""
    world.places.remove(place)
    address = place.twin.data_ptr(), place.real.data_ptr()
    del place
    new = world.draw(dice)
    world.counts["addresses used again"] += new.real.data_ptr() in address
    world.places.append(new)


@rule("forget in a cycle", 2)
def forget(world: World, place: Place, dice: random.Random) -> None:
    world.places.remove(place)
    place.holder = [place]
    if dice.random() < 0.5:
        place.holder.append(place.holder)
    del place


@rule("collect garbage in a step", 3)
def collect(world: World, place: Place, dice: random.Random) -> None:
    """What was forgotten goes while accounts are opened and steps run."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        fresh = places.own(world.generator(dice))
        for target in (fresh, place):
            if "decode" in target.steps:
                inputs = operands(world.compiled.steps["decode"], len(target.twin), world.generator(dice))
                step(world, target, "decode", inputs)
        world.read(fresh, "clone", torch.clone)
    finally:
        gc.set_threshold(*before)


# ------------------------------------------------------------------------------------- tokens taken back


def _rollable(place: Place) -> bool:
    return place.kind in ("own", "zero", "cache", "clone") and not place.held


@rule("roll back", 8)
def roll_back(world: World, place: Place, dice: random.Random) -> None:
    if not _rollable(place) or not place.history:
        return
    most = min(len(place.history), 4)
    each = [dice.randint(0, most) for _ in place.twin]
    counts: Any = dice.choice((each, each[0], torch.tensor(each)))
    n = each if not isinstance(counts, int) else [counts] * len(each)
    try:
        rollback(place.holder or place.real, counts)
    except ValueError:  # some of it is behind a flush
        world.note("refused")
        return
    world.counts["tokens taken back"] += sum(n)
    for b, count in enumerate(n):
        if count:
            place.twin[b] = place.history[-count][b]
    place.history.clear()


@rule("speculate", 6)
def speculate(world: World, place: Place, dice: random.Random) -> None:
    """A verify step whose drafts can always be taken back, when nobody else sees the memory."""
    if not _rollable(place) or "verify 4" not in place.steps:
        return
    inputs = operands(world.compiled.steps["verify 4"], len(place.twin), world.generator(dice))
    step(world, place, "verify 4", inputs)
    n = dice.randint(1, 4)
    world.note(f"of 4 drafts {n} go")
    try:
        rollback(place.holder or place.real, n)
        place.twin.copy_(place.history[-n])
        world.counts["drafts rejected"] += n
    except ValueError:
        assert place.exported, "drafts of a state that nobody else can see can be taken back"
    place.history.clear()


@rule("take back too much", 2)
def too_much(world: World, place: Place, dice: random.Random) -> None:
    with pytest.raises(ValueError, match="rollback"):
        rollback(place.real, place.tokens + 17)


@rule("draft a tree", 6)
def draft(world: World, place: Place, dice: random.Random) -> None:
    if not _rollable(place) or "verify 2" not in place.steps:
        return
    graph = world.compiled.steps[f"verify {dice.choice(TOKENS)}"]
    assert graph.count is not None
    inputs = operands(graph, len(place.twin), world.generator(dice))
    trees = [[dice.randint(-1, j - 1) for j in range(graph.count)] for _ in place.twin]
    world.note(str(trees))
    with draft_tree(trees):
        out = graph.compiled(place.real, *inputs)
    place.history.clear()
    ends = [dice.randint(-1, graph.count - 1) for _ in trees]
    paths = [_path(tree, end) for tree, end in zip(trees, ends, strict=True)]
    for b, tree in enumerate(trees):
        nodes = [_along(place.twin[b : b + 1].clone(), inputs, b, _path(tree, j))[1] for j in range(graph.count)]
        world.same(out[b], torch.stack(nodes), f"nodes of sequence {b}")
    if dice.random() < 0.7:
        world.note(f"accept {paths}")
        _accept(world, place, inputs, paths)


def _accept(world: World, place: Place, inputs: Inputs, paths: list[list[int]]) -> None:
    try:
        accept(place.holder or place.real, paths)
    except ValueError:
        assert place.exported, "a tree of a state that nobody else can see waits until it is accepted"
        return
    world.counts["trees accepted"] += 1
    for b, path in enumerate(paths):
        place.twin[b : b + 1] = _along(place.twin[b : b + 1].clone(), inputs, b, path)[0]


def _path(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*_path(parents, parents[node]), node]


def _along(twin: Tensor, inputs: Inputs, b: int, path: list[int]) -> tuple[Tensor, Tensor]:
    """The twin of one sequence after a path, and the last output."""
    out = torch.empty(0)
    for j in path:
        out = gla(twin, *(x[b : b + 1, j] for x in inputs))[0]
    return twin, out
