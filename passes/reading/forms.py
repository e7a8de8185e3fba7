"""The closed set of forms that a graph node may have: meanings, not spellings.

view, squeeze and unsqueeze are all `Regroup`. A node that is not recognised is `Opaque`, and no rule assumes anything
about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

Operand = Node | float | int | bool
WIDEST_BLOCK = 64  # tokens of a block: the longest flush that is looked at; more are a prompt
WIDEST = 16  # positions that are looked at one by one; terms of a sum, the largest rank among them


@dataclass(frozen=True)
class Regroup:
    """The same elements in the same order in other dims."""

    x: Node


@dataclass(frozen=True)
class Permute:
    """Dim i of the result is dim order[i] of x."""

    x: Node
    order: tuple[int, ...]


@dataclass(frozen=True)
class Same:
    """x itself."""

    x: Node


@dataclass(frozen=True)
class Cast:
    """x in another dtype. exact: from float to float, which the algebra does not see."""

    x: Node
    exact: bool


@dataclass(frozen=True)
class Expand:
    """x broadcast to the shape of the result."""

    x: Node


@dataclass(frozen=True)
class Select:
    """x at one position of a dim, which disappears."""

    x: Node
    dim: int
    index: int


@dataclass(frozen=True)
class Token:
    """x at one of its tokens, whichever: the dim that counts them disappears."""

    x: Node
    dim: int


@dataclass(frozen=True)
class Slice:
    """A part of a dim of x: every `step`-th of its positions."""

    x: Node
    dim: int
    start: int
    step: int = 1


@dataclass(frozen=True)
class Blocks:
    """Tensors of one shape, one behind the other along a dim."""

    xs: tuple[Node, ...]
    dim: int


@dataclass(frozen=True)
class Join:
    """A short dim of which each position comes from somewhere: a tensor at one of its positions, a tensor that has no
    such dim (None), or a number everywhere."""

    dim: int
    parts: tuple[tuple[Operand, int | None], ...]


@dataclass(frozen=True)
class Product:
    x: Operand
    y: Operand


@dataclass(frozen=True)
class Quotient:
    x: Operand
    y: Operand


@dataclass(frozen=True)
class Sum:
    """x + scale * y."""

    x: Operand
    y: Operand
    scale: float


@dataclass(frozen=True)
class Choice:
    """x where the condition holds, y elsewhere."""

    condition: Node
    x: Operand
    y: Operand


@dataclass(frozen=True)
class Contract:
    """A sum of products, in the letters of einsum."""

    x: Node
    y: Node
    letters: tuple[str, str, str]


@dataclass(frozen=True)
class Reduce:
    """A reduction over dims of x. fn: "sum", "mean", or another that is not linear."""

    x: Node
    dims: tuple[int, ...]
    keep: bool
    fn: str


@dataclass(frozen=True)
class Variance:
    """The variance of x over dims, divided by their size less the correction."""

    x: Node
    dims: tuple[int, ...]
    keep: bool
    correction: float


@dataclass(frozen=True)
class Cumulative:
    """Running sums or products of x along a dim. fn: "cumsum" or "cumprod"."""

    x: Node
    dim: int
    fn: str


@dataclass(frozen=True)
class Pointwise:
    """Any other elementwise call, broadcasting its tensor arguments."""

    fn: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Constant:
    """The same number everywhere (None: unknown). What its shape was taken from is not a use of that tensor."""

    value: float | None


@dataclass(frozen=True)
class Write:
    """target.copy_(x), the epilogue of a mutation."""

    target: Node
    x: Node


@dataclass(frozen=True)
class Metadata:
    """A size or another number about a tensor, not a use of its values."""


@dataclass(frozen=True)
class Opaque:
    """Anything else."""


Form = (
    Regroup | Permute | Same | Cast | Expand | Select | Token | Slice | Blocks | Join | Product | Quotient | Sum
    | Choice | Contract | Reduce | Variance | Cumulative | Pointwise | Constant | Write | Metadata | Opaque
)  # fmt: skip


def operands(form: Form) -> list[Node]:
    """The nodes whose values a form uses. Opaque and Metadata list none."""
    match form:
        case Contract(x, y, _) | Product(x, y) | Quotient(x, y) | Sum(x, y, _) | Write(x, y):
            found: tuple[Any, ...] = (x, y)
        case Choice(condition, x, y):
            found = (condition, x, y)
        case Pointwise(_, args) | Blocks(args):
            found = args
        case Join(_, parts):
            found = tuple(dict.fromkeys(x for x, _ in parts))
        case Constant() | Metadata() | Opaque():
            found = ()
        case _:
            found = (form.x,)
    return [x for x in found if isinstance(x, Node)]


def is_view(form: Form) -> bool:
    """Whether the form only rearranges its operand, in its own dtype."""
    return isinstance(form, Regroup | Permute | Same | Expand | Select | Token | Slice)
