"""Every public callable of torch that takes a tensor, each with arguments that it accepts.

The list is torch's own, `torch.overrides`. Arguments are found by trying a few candidates for each parameter on
ordinary tensors, or stand in `tests.support.callables_by_hand`. Nothing here knows about the compiler.
"""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.overrides
from torch import Tensor

SHAPES = ((2, 2, 4, 4), (4, 4), (2, 4, 4), (1, 2, 4, 4, 4))  # of states; functions of vectors alone take none
TRIES = 60  # combinations of candidates for the other parameters
STATE = "state"  # stands for the state among the arguments of a call

Make = Callable[[tuple[int, ...]], Any]  # an argument beside a state of this shape


# ---------------------------------------------------------------------------------------------------- values


def values(shape: Sequence[int]) -> Tensor:
    """What a state holds: positive definite matrices in (0, 1), so that functions of every domain take it; few bits, so
    that sums are exact in any order."""
    n = torch.Size(shape).numel() // (shape[-1] * shape[-2])
    each = torch.arange(n).reshape(*shape[:-2], 1, 1) / 64
    return torch.full(tuple(shape), 1 / 16) + torch.eye(shape[-2], shape[-1]) * 0.5 + each


def same(shape: tuple[int, ...]) -> Tensor:
    """Another tensor of that shape, all of it in (0, 1); a matrix of it has full rank."""
    count = torch.Size(shape).numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.linspace(0.25, 0.75, count)[order].reshape(shape)


def vector(shape: tuple[int, ...]) -> Tensor:
    return same((shape[-1],))


def channels(shape: tuple[int, ...]) -> Tensor:
    return same((shape[1],))


def matrix(shape: tuple[int, ...]) -> Tensor:
    return same((4, 4))


def kernel(shape: tuple[int, ...]) -> Tensor:
    """The weight of a convolution over all but the first two dims."""
    return same((2, shape[1], *[2] * (len(shape) - 2)))


def where(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


def first(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(2, dtype=torch.long)


def mask(shape: tuple[int, ...]) -> Tensor:
    return same(shape) > 0.4


def constant(value: Any) -> Make:
    return lambda shape: value


def listed(make: Make) -> Make:
    return lambda shape: [make(shape), make(shape)]


# ------------------------------------------------------------------------------------------------ candidates

ONE, ZERO, HALF, TWO, YES = map(constant, (1, 0, 0.5, 2, True))
ANYTHING: tuple[Make, ...] = (
    same, ONE, matrix, first, where, vector, HALF, constant((1,)), constant((1, 1)), mask, listed(same), channels,
    kernel, constant("mean"), YES, constant(torch.float32), constant(None), constant((0, 1)),
    lambda shape: shape, constant((2, 2, 2)), lambda shape: same(shape).int(), ZERO,
)  # fmt: skip
# By the name of a parameter, what to try first.
HINTS: dict[str, tuple[Make, ...]] = {
    "dim|axis|dimension|start_dim|dim0|axis0|n|k|diagonal|offset": (ZERO, ONE),
    "dim1|axis1|length|step|scale|quant_max": (ONE,),
    "index|indices|idx": (first, where, constant(0), lambda shape: (first(shape),)),
    "mask|condition": (mask,),
    "target": (same, lambda shape: torch.zeros(shape[0], dtype=torch.long), first, where),
    "source|src|values": (same, lambda shape: same((2, *shape[1:])), vector, ZERO),
    "weight": (kernel, matrix, channels, vector, same),
    "bias": (constant(None), vector),
    "running_mean|running_var|mean|var|invstd": (channels, same),
    "kernel_size|stride|output_size|groups|dilation|num_layers|n_fft|hop_length|chunks|sections": (ONE, TWO),
    "size|shape|sizes|normalized_shape": (lambda shape: shape, lambda shape: shape[-1:], constant((16, -1)), ONE),
    "padding|pad": (ZERO, constant((1, 1))),
    "tensors|matrices|operands|inputs": (listed(same), listed(matrix)),
    "split_size|split_sizes|split_size_or_sections|indices_or_sections": (ONE, TWO),
    "dims": (constant((0, 1)), lambda shape: tuple(reversed(range(len(shape))))),
    "reduce": tuple(map(constant, ("sum", "amax"))),
    "p|prob|momentum|eps|value|fill_value|exponent|tau|threshold": (HALF, TWO, ONE),
    "train|training|bidirectional|benchmark|has_biases|batch_first|align_corners": (YES,),
    "hx": (matrix, lambda shape: (matrix(shape), matrix(shape))),
    "w_ih|w_hh": (matrix, lambda shape: same((12, 4)), lambda shape: same((16, 4))),
    "other|end|input2|y": (same, ONE),
    "vec|vec1|vec2|v": (vector, matrix),
    "mat|mat1|mat2|batch1|batch2|tensor1|tensor2|x1|x2|A|B": (same, matrix),
    "zero_point|quant_min|destination|shifts|start": (ZERO,),
    "dtype": (constant(torch.float32),),
    "equation": (constant("...ij,...jk->...ik"), constant("...ij->...i")),
    "reps": (constant((1, 2)),),
}
_HINTS = {re.compile(names): makes for names, makes in HINTS.items()}


def candidates(name: str) -> tuple[Make, ...]:
    hinted = [makes for pattern, makes in _HINTS.items() if pattern.fullmatch(name)]
    return (*itertools.chain(*hinted), *ANYTHING)


# ---------------------------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class Call:
    """func(*args, **kwargs) beside a state of this shape; STATE stands where the state goes in."""

    name: str
    func: Callable[..., Any]
    shape: tuple[int, ...]
    args: tuple[Any, ...] = (STATE,)
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, state: Tensor) -> Any:
        """Run it on a state, with random numbers that are the same each time."""
        torch.manual_seed(0)
        args = [self._made(a, state) for a in self.args]
        return self.func(*args, **{k: self._made(a, state) for k, a in self.kwargs.items()})

    def _made(self, arg: Any, state: Tensor) -> Any:
        if isinstance(arg, list):
            return [self._made(a, state) for a in arg]
        return state if arg is STATE else arg(self.shape)

    def works(self) -> bool:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                self(values(self.shape))
            except Exception:  # whatever torch says of arguments it does not take
                return False
        return True


def first_call(name: str, func: Callable[..., Any], params: Sequence[str]) -> Call | None:
    """A call with the state as the first parameter, or in a list there."""
    for n in (3, TRIES):
        for shape, state in itertools.product(SHAPES, (STATE, [STATE, STATE])):
            for others in itertools.islice(itertools.product(*map(candidates, params[1:])), n):
                call = Call(name, func, shape, (state, *others))
                if call.works():
                    return call
    return None


def variants(call: Call, params: Sequence[str]) -> Iterator[Call]:
    """The same call with the state elsewhere: as each other tensor, by keyword, as `out`."""
    for at in range(1, len(call.args)):
        yield from _moved(call, at, params[at] if at < len(params) else str(at))
    method = call.name.startswith("torch.Tensor.")
    named = dict(zip(params, call.args, strict=False))
    rest = dict(list(named.items())[1:]) if method else named
    if rest and len(named) == len(call.args):
        head = call.args[:1] if method else ()
        yield from _working([replace(call, name=f"{call.name}({', '.join(rest)}=)", args=head, kwargs=rest)])
    if not method:
        plain = tuple(same if a is STATE else a for a in call.args)
        yield from _working([replace(call, name=f"{call.name}(out=)", args=plain, kwargs={"out": STATE})])


def _moved(call: Call, at: int, param: str) -> Iterator[Call]:
    if call.args[0] is not STATE or not _takes_tensor(call.args[at], call.shape):
        return
    args = list(call.args)
    args[0], args[at] = same, STATE
    tried = [replace(call, name=f"{call.name}({param})", shape=s, args=tuple(args)) for s in (call.shape, *SHAPES)]
    yield from itertools.islice(_working(tried), 1)


def _takes_tensor(make: Any, shape: tuple[int, ...]) -> bool:
    made = None if make is STATE or isinstance(make, list) else make(shape)
    return isinstance(made, Tensor) and made.dtype == torch.float32


def _working(calls: Iterable[Call]) -> Iterator[Call]:
    return (call for call in calls if call.works())


# -------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Public:
    """A public callable of torch and the names of its required parameters."""

    name: str
    func: Callable[..., Any]
    params: tuple[str, ...]


def overridable() -> list[Public]:
    """What torch lists as taking tensors of classes of one's own, sorted by name."""
    found = []
    for func, dummy in torch.overrides.get_testing_overrides().items():
        given = inspect.signature(dummy).parameters.values()
        params = tuple(p.name for p in given if p.default is p.empty and p.kind is not p.VAR_KEYWORD)
        name = torch.overrides.resolve_name(func) or getattr(func, "__qualname__", repr(func))
        found.append(Public(name, func, params))
    return sorted(found, key=lambda p: p.name)
