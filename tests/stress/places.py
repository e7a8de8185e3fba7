"""Where states live: tensors of one's own, views, stacks, pools, caches, memory that others own as well."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.stress.graphs import SLOTS, B, H, K, V, whole
from tests.stress.machine import Held, Place

Make = Callable[[torch.Generator], Place]
SHAPE = (B, H, K, V)
ALL = (
    "decode",
    "decode",
    "other flush",
    "at once",
    "any batch",
    "delta",
    "donated",
    "declined",
    "verify 2",
    "verify 4",
)
PLAIN = ("decode", "verify 2", "verify 4")


def numbers(sizes: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor]:
    start = whole(-500, 501, sizes, g)
    return start, start.clone()


def own(g: torch.Generator) -> Place:
    return Place("own", *numbers(SHAPE, g), ALL)


def zero(g: torch.Generator) -> Place:
    return Place("zero", torch.empty(SHAPE).zero_(), torch.zeros(SHAPE), ALL)


def view(g: torch.Generator) -> Place:
    """Its base is the user's as well."""
    real, twin = numbers((3, *SHAPE), g)
    return Place("view", real[1], twin[1], PLAIN, held=[Held("base", real, twin)])


def lone_view(g: torch.Generator) -> Place:
    real, twin = numbers((3, *SHAPE), g)
    return Place("view without its base", real[1], twin[1], PLAIN)


def stack(g: torch.Generator) -> Place:
    return Place("stack", *numbers((2, *SHAPE), g), ("layers", "slice", "slice"))


def pool(g: torch.Generator) -> Place:
    return Place("pool", *numbers((SLOTS, H, K, V), g), ("pool", "pool", "pool", "any batch"))


def turned(g: torch.Generator) -> Place:
    real, twin = numbers((B, H, V, K), g)
    return Place("turned", real.transpose(-1, -2), twin.transpose(-1, -2), ("decode",))


def inference(g: torch.Generator) -> Place:
    with torch.inference_mode():
        return Place("inference", *numbers(SHAPE, g), ("decode", "verify 2"), inference=True)


def shared(g: torch.Generator) -> Place:
    real, twin = numbers(SHAPE, g)
    return Place("shared", real.share_memory_(), twin, PLAIN)


def borrowed(g: torch.Generator) -> Place:
    real, twin = (x.numpy() for x in numbers(SHAPE, g))
    return Place("borrowed", torch.from_numpy(real), torch.from_numpy(twin), PLAIN, held=[Held("array", real, twin)])


def exported(g: torch.Generator) -> Place:
    """Another tensor on its memory, of which torch knows nothing."""
    real, twin = numbers(SHAPE, g)
    others = torch.from_dlpack(real), torch.from_dlpack(twin)
    return Place("exported", real, twin, PLAIN, held=[Held("import", *others)])


def buffer(g: torch.Generator) -> Place:
    real, twin = numbers(SHAPE, g)
    module = torch.nn.Module()
    module.register_buffer("state", real)
    return Place("buffer", real, twin, PLAIN, holder=module)


def cache(g: torch.Generator) -> Place:
    real, twin = numbers(SHAPE, g)
    return Place("cache", real, twin, ALL, holder=SimpleNamespace(layers=[{"state": real}]))


def parameter(g: torch.Generator) -> Place:
    real, twin = numbers(SHAPE, g)
    return Place("parameter", torch.nn.Parameter(real, requires_grad=False), twin, ("decode",))


KINDS: dict[Make, int] = {
    own: 8, zero: 2, view: 2, lone_view: 1, stack: 3, pool: 3, turned: 1, inference: 1, shared: 1, borrowed: 1,
    exported: 1, buffer: 1, cache: 3, parameter: 1,
}  # fmt: skip


def draw(dice: random.Random, g: torch.Generator, without: Iterable[str] = ()) -> Place:
    makes = [make for make in KINDS if make.__name__ not in without]
    (make,) = dice.choices(makes, [KINDS[m] for m in makes])
    return make(g)
