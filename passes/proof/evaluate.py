"""Values of a region in float64, on random numbers for everything that it is cut at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from kvbuffer_compile.passes.proof.region import Region, is_tensor
from kvbuffer_compile.passes.proof.sizes import Extents, concrete
from kvbuffer_compile.passes.reading.arguments import is_repeated

aten = torch.ops.aten
TOLERANCE = 1e-9  # of float64 arithmetic on a few hundred terms; a wrong factor is off by 1e-2 and more
WILD = 1e8  # beyond it sums are lost in rounding: solvers that converge on a model's numbers diverge on random ones
LARGE = 32e6  # bytes: what holds less at once is evaluated at its own sizes
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, aten._to_copy.default})


class Limit(str):
    """Why something was not evaluated. limits, in bytes: held at once, and written in all, which is about 2 s."""

    held, written = 256e6, 2e9

    def __new__(cls, cost: tuple[int, int]) -> Limit:
        return super().__new__(
            cls,
            f"the lifted program could not be checked: its part of the graph holds {cost[0] / 1e6:.0f} MB at once in "
            f"float64 and writes {cost[1] / 1e6:.0f} MB (at most {cls.held / 1e6:.0f} and {cls.written / 1e6:.0f} are "
            "spent), and batch and heads could not be told from other sizes; a smaller batch may do",
        )

    @classmethod
    def exceeded(cls, cost: tuple[int, int]) -> bool:
        return cost[0] > cls.held or cost[1] > cls.written


def cost(order: list[Node], region: Region, extents: Extents, ends: Iterable[Node]) -> tuple[int, int]:
    """Bytes that evaluating a region holds at once, and bytes that it writes in all."""
    last = _last_uses(order, region, ends)
    held = most = total = 0
    gone: dict[int, int] = {}
    for i, node in enumerate(order):
        if region.source(node) is None and is_tensor(node):
            size = 8 * torch.Size(extents.of(node)).numel()
            held, total = held + size, total + size
            most = max(most, held)
            gone[last[node]] = gone.get(last[node], 0) + size
        held -= gone.pop(i, 0)
    return most, total


def _last_uses(order: list[Node], region: Region, ends: Iterable[Node]) -> dict[Node, int]:
    """Where each value is used for the last time; one that is asked for, never."""
    last: dict[Node, int] = {}
    for i, node in enumerate(order):
        last[node] = i
        for x in region.inputs(node):
            last[x] = i
    last |= {n: len(order) for n in ends}
    for node in reversed(order):  # a value lives as long as those that share it
        if (source := region.source(node)) is not None:
            last[source] = max(last[source], last[node])
    return last


def evaluate(
    order: list[Node],
    region: Region,
    extents: Extents,
    ends: Iterable[Node],
    draw: Callable[..., Tensor],
    seed: int,
    tame: bool = False,
) -> dict[Node, Any]:
    """The values of `ends`. draw: what floating point numbers are taken from. tame: also where a value that may be cut
    comes out wild.

    ValueError or RuntimeError when the calls do not fit the sizes.
    """
    ends = set(ends)
    evaluator = _Evaluator(extents, draw, seed)
    last, values = _last_uses(order, region, ends), evaluator.values
    gone: dict[int, list[Node]] = {}
    for i, node in enumerate(order):
        source = region.source(node)
        if source is not None:
            values[node] = values[source]
        else:
            values[node] = evaluator.random(node) if region.is_cut(node) else evaluator.call(node)
            if tame and _is_wild(values[node]) and region.may_cut(node):
                values[node] = evaluator.random(node)
        gone.setdefault(last[node], []).append(node)
        for one in gone.pop(i, ()):
            del values[one]
    return values


class _Evaluator:
    def __init__(self, extents: Extents, draw: Callable[..., Tensor], seed: int) -> None:
        self.extents, self.draw = extents, draw
        self.generator = torch.Generator().manual_seed(seed)
        self.values: dict[Node, Any] = {}

    def call(self, node: Node) -> Any:
        args: Any = torch.fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, self.values.__getitem__)
        if node.target in _CASTS and _is_float(node):
            return args[0].double()
        args, kwargs = self._sized(node, args, kwargs)
        if "dtype" in kwargs and _is_float(node):
            kwargs = {**kwargs, "dtype": torch.float64}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        # a cast that copies in the graph does not copy here, and leaves other strides: views may have to copy
        target: Any = aten.reshape.default if node.target in _VIEWS else node.target
        out = target(*_plain(args), **_plain(kwargs))
        if is_tensor(node) and tuple(out.shape) != self.extents.of(node):
            raise ValueError(f"{node} has another shape at these sizes")
        return out.double() if isinstance(out, Tensor) and out.dtype.is_floating_point else out

    def _sized(self, node: Node, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        """Arguments with the sizes that stand in the graph as numbers."""
        schema = getattr(node.target, "_schema", None)
        names = [] if schema is None or not is_tensor(node) else [a.name for a in schema.arguments]
        given, named = list(args), dict(kwargs)
        for i, name in enumerate(names):
            if name in ("size", "shape", "repeats"):
                shape: Any = list(self.extents.of(node))
                if name == "repeats":
                    old = (1,) * len(shape) + tuple(args[0].shape)
                    shape = [n // m for n, m in zip(shape, old[-len(shape) :], strict=True)]
                if i < len(given):
                    given[i] = shape
                elif name in named:
                    named[name] = shape
        return given, named

    def random(self, node: Node) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return _plain(value)
        shape = self.extents.of(node)
        if any(repeated := is_repeated(node)):
            narrow = [1 if same else n for n, same in zip(shape, repeated, strict=True)]
            return self._drawn(torch.Size(narrow), value.dtype).expand(shape)
        return self._drawn(shape, value.dtype)

    def _drawn(self, shape: Any, dtype: torch.dtype) -> Tensor:
        if dtype.is_floating_point:
            return self.draw(shape, generator=self.generator, dtype=torch.float64)
        if dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.5
        if len(shape) == 1:  # of equal slots of a pool any could win
            return torch.randperm(shape[0], generator=self.generator).to(dtype)
        return torch.randint(0, 2, shape, generator=self.generator, dtype=dtype)


def _plain(x: Any) -> Any:
    """Arguments with numbers in place of symbolic ones."""
    if isinstance(x, list | tuple):
        return [_plain(y) for y in x]
    if isinstance(x, dict):
        return {n: _plain(y) for n, y in x.items()}
    if isinstance(x, torch.SymInt):
        return concrete(x)
    return x.node.hint if isinstance(x, torch.SymFloat | torch.SymBool) else x


def _is_wild(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point and not bool((x.abs() < WILD).all())


def _is_float(node: Node) -> bool:
    return is_tensor(node) and bool(node.meta["val"].dtype.is_floating_point)


def difference(got: Any, want: Any) -> float:
    """Largest difference relative to the largest value, 0 for what rounding does; infinite for other shapes, or when
    one side is not finite where the other is."""
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return 0.0 if got == want else float("inf")
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    got, want = got.double(), want.double()
    scale = want.abs().max().clamp_min(1e-30)
    error = ((got - want).abs().max() / scale).item()
    return float("inf") if error != error else error if error > TOLERANCE else 0.0
