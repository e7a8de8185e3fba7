"""Every way we know to write what touches a state, and a writer of straight-line PyTorch that draws among them.

A matrix is a state in working dims [*lanes, i, j], a vector runs along i or j, a scalar is one number a lane. In the
templates {n} are the letters of the lanes for einsum, {I} and {J} sizes, {shape} the matrix's shape. `f32` is float32,
or float64 in the exact run of the same text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

OUTER = (
    "{l}.unsqueeze(-1) * {r}.unsqueeze(-2)",
    "{l}[..., :, None] * {r}[..., None, :]",
    "{l}.unsqueeze(-1) @ {r}.unsqueeze(-2)",
    "torch.einsum('{n}i,{n}j->{n}ij', {l}, {r})",
    "torch.einsum('{n}j,{n}i->{n}ij', {r}, {l})",
    "torch.bmm({l}.reshape(-1, {I}, 1), {r}.reshape(-1, 1, {J})).reshape({shape})",
    "({r}.unsqueeze(-1) * {l}.unsqueeze(-2)).transpose(-1, -2)",
    "torch.mul({l}.unsqueeze(-1).expand({shape}), {r}.unsqueeze(-2))",
    "torch.addcmul(torch.zeros({shape}, dtype=f32), {l}.unsqueeze(-1), {r}.unsqueeze(-2))",
)
ADD = (  # a product o to the matrix S
    "{S} + {o}", "{o} + {S}", "torch.add({S}, {o})", "{S} - (-{o})", "torch.sub({S}, {o}, alpha=-1)",
    "torch.add({S}, {o} * 0.5, alpha=2)", "torch._foreach_add([{S}], [{o}])[0]",
)  # fmt: skip
ADD_ = ("{S}.add_({o})", "{S} += {o}", "{S}.sub_(-{o})", "torch._foreach_add_([{S}], [{o}])")
WRITE = (  # a product given by its factors
    "torch.addcmul({S}, {l}.unsqueeze(-1), {r}.unsqueeze(-2))",
    "torch.baddbmm({S}.reshape(-1, {I}, {J}), {l}.reshape(-1, {I}, 1), {r}.reshape(-1, 1, {J})).reshape({shape})",
)
WRITE_ = ("{S}.addcmul_({l}.unsqueeze(-1), {r}.unsqueeze(-2))",)
READ_I = (  # over the first index of the matrix
    "({S} * {x}.unsqueeze(-1)).sum(-2)",
    "torch.sum({x}[..., None] * {S}, dim=-2, keepdim=True).squeeze(-2)",
    "({x}.unsqueeze(-1) * {S}).mean(-2) * {I}",
    "({x}.unsqueeze(-2) @ {S}).squeeze(-2)",
    "torch.matmul({S}.transpose(-1, -2), {x}.unsqueeze(-1))[..., 0]",
    "torch.einsum('{n}ij,{n}i->{n}j', {S}, {x})",
    "torch.bmm({x}.reshape(-1, 1, {I}), {S}.reshape(-1, {I}, {J})).reshape({shape}[:-2] + ({J},))",
    "torch.linalg.vecdot({S}, {x}.unsqueeze(-1), dim=-2)",
    "({S}.mT * {x}.unsqueeze(-2)).sum(-1)",
)
READ_J = (
    "({S} * {x}.unsqueeze(-2)).sum(-1)",
    "torch.sum({x}[..., None, :] * {S}, dim=-1, keepdim=True)[..., 0]",
    "({S} @ {x}.unsqueeze(-1)).squeeze(-1)",
    "torch.einsum('{n}j,{n}ij->{n}i', {x}, {S})",
    "torch.bmm({S}.reshape(-1, {I}, {J}), {x}.reshape(-1, {J}, 1)).reshape({shape}[:-2] + ({I},))",
    "({x}.unsqueeze(-2) @ {S}.mT).flatten(-2)",
)
SPREAD = {  # a factor as something that broadcasts with the matrix
    "scalar": ("{a}[..., None, None]", "{a}.unsqueeze(-1).unsqueeze(-1)", "{a}.reshape({a}.shape + (1, 1))"),
    "i": ("{a}.unsqueeze(-1)", "{a}[..., :, None]", "{a}.unsqueeze(-1).expand({shape})"),
    "j": ("{a}.unsqueeze(-2)", "{a}[..., None, :]", "{a}.unsqueeze(-2).expand({shape}).contiguous()"),
}
SCALE = (  # the matrix by what broadcasts with it
    "{S} * {A}", "{A} * {S}", "torch.mul({S}, {A})", "{S} / (1 / {A})", "{S} - {S} * (1 - {A})",
    "torch.addcmul({S}, {S}, {A} - 1)", "torch.div({S}, {A}.reciprocal())",
    "torch.lerp({S}, torch.zeros_like({S}), 1 - {A})",
)  # fmt: skip
SCALE_ = (
    "{S}.mul_({A})", "{S} *= {A}", "{S}.div_(1 / {A})", "{S}.copy_({S} * {A})", "torch._foreach_mul_([{S}], [{A}])",
)  # fmt: skip
DIAGONAL = {
    "scalar": ("torch.einsum('{n},{n}ij->{n}ij', {a}, {S})",),
    "i": ("torch.einsum('{n}i,{n}ij->{n}ij', {a}, {S})", "torch.diag_embed({a}) @ {S}"),
    "j": ("torch.einsum('{n}ij,{n}j->{n}ij', {S}, {a})", "{S} @ torch.diag_embed({a})"),
}
EXP = ("torch.exp({a})", "{a}.exp()", "torch.exp(2 * {a}).sqrt()", "1 / torch.exp(-{a})")
MINUS = (
    "{x} - {y}", "torch.sub({x}, {y})", "-({y} - {x})", "torch.rsub({y}, {x})", "{x} + (-1) * {y}",
    "{x}.clone().sub_({y})", "torch.add({x}, {y}, alpha=-1)",
)  # fmt: skip
TIMES = (  # a vector by a scalar of its lane
    "{x} * {b}[..., None]", "{b}.unsqueeze(-1) * {x}", "torch.mul({x}, {b}.unsqueeze(-1).expand_as({x}))",
    "torch.einsum('{n}i,{n}->{n}i', {x}, {b})", "{x} / (1 / {b})[..., None]",
)  # fmt: skip
SAME = (  # of anything, also of what depends on a read
    "{x}.clone()", "{x} * 1", "{x} + 0", "{x}.contiguous()", "{x}.to(f32)", "{x}.double().to(f32)",
    "{x}.unsqueeze(0)[0]",
    "{x}.reshape(-1).reshape({x}.shape)", "{x}.flatten(0, -2).view({x}.shape)",
    "{x}.transpose(0, -1).contiguous().transpose(0, -1)", "0.5 * ({x} + {x})", "-(-{x})",
)  # fmt: skip
SAME_OUTSIDE = (  # of operands only
    "{x}.flip(-1).flip(-1)", "torch.cat([{x}[..., :1], {x}[..., 1:]], -1)", "torch.stack([{x}, 2 * {x}]).unbind(0)[0]",
    "torch.nn.functional.pad({x}, (0, 2))[..., :{x}.shape[-1]]",
    "{x}.cumsum(-1).diff(dim=-1, prepend={x}[..., :1] * 0)",
    "torch.maximum({x}, {x} - 1)", "torch.split(torch.cat([{x}, {x}], 0), {x}.shape[0])[1]",
    "torch.zeros_like({x}).copy_({x})", "{x}.index_select(-1, torch.arange({x}.shape[-1]))",
)  # fmt: skip
DEAD = (
    "torch.relu({x})",
    "torch.tanh({x}).sum()",
    "{x} * {x}",
    "{x}.shape[0]",
    "torch.zeros_like({x}).add_(1)",
    "{x}.mT",
)
VIEWS = (  # the same memory for certain
    "{x}.transpose(-1, -2).mT", "{x}.unsqueeze(0).squeeze(0)", "{x}.view({x}.shape)", "{x}[...]",
    "{x}.expand({x}.shape)",
)  # fmt: skip
TRANSITION = {  # (I - b k k^T) S along either index, and S - (b k k^T) S
    "i": (
        "(torch.eye({I}, dtype=f32) - {b}[..., None, None] * {l}.unsqueeze(-1) * {l}.unsqueeze(-2)) @ {S}",
        "{S} - ({b}[..., None, None] * {l}.unsqueeze(-1) @ {l}.unsqueeze(-2)) @ {S}",
    ),
    "j": (
        "{S} @ (torch.eye({J}, dtype=f32) - torch.einsum('{n},{n}i,{n}j->{n}ij', {b}, {l}, {l}))",
        "{S} + {S} @ ((-{l}).unsqueeze(-1) @ ({l} * {b}[..., None]).unsqueeze(-2))",
    ),
}


@dataclass(frozen=True)
class Value:
    """A variable of the text. memory: what it may share storage with; certain: it is a view of exactly that, or owns
    it; so writing to it in place has one meaning."""

    name: str
    memory: str
    certain: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Line:
    text: str
    defines: str
    uses: frozenset[str]
    reads: frozenset[str]
    writes: frozenset[str]

    def before(self, later: Line) -> bool:
        """Whether a later line has to stay behind this one."""
        return (
            self.defines in later.uses
            or not self.writes.isdisjoint(later.reads | later.writes)
            or not self.reads.isdisjoint(later.writes)
        )


@dataclass
class Writer:
    """Straight-line code under construction. Templates are drawn; every result is a variable."""

    draw: st.DrawFn
    names: dict[str, Any] = field(default_factory=dict)  # what templates may mention besides their operands
    lines: list[Line] = field(default_factory=list)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def maybe(self, one_in: int = 4) -> bool:
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def new(
        self, templates: Sequence[str] | str, view: Value | None = None, certain: bool = False, **used: Value
    ) -> Value:
        """A variable for an expression. view: what the result may share memory with, `certain` or not."""
        name = f"x{len(self.lines)}"
        memory = view.memory if view else name
        out = Value(name, memory, view.certain and certain if view else True)
        self._line(f"{name} = {self._text(templates, used)}", name, used, frozenset())
        return out

    def change(self, templates: Sequence[str] | str, target: Value, **used: Value) -> None:
        """Write to a variable's memory in place."""
        self._line(self._text(templates, used), "", used, frozenset([target.memory]))

    def _text(self, templates: Sequence[str] | str, used: dict[str, Value]) -> str:
        template = templates if isinstance(templates, str) else self.pick(templates)
        return template.format(**used, **self.names)

    def _line(self, text: str, defines: str, used: dict[str, Value], writes: frozenset[str]) -> None:
        uses = frozenset(v.name for v in used.values())
        reads = frozenset(v.memory for v in used.values())
        self.lines.append(Line(text, defines, uses, reads, writes))

    def like(self, x: Value, outside: bool = False) -> Value:
        """The same value, perhaps written anew. outside: it does not depend on a state."""
        if not self.maybe():
            return x
        return self.new(SAME + SAME_OUTSIDE if outside else SAME, view=Value(x.name, x.memory, False), x=x)

    def shuffled(self) -> list[str]:
        """The lines in a random order that means the same."""
        generator: random.Random = self.draw(st.randoms(use_true_random=True))
        waiting = list(range(len(self.lines)))
        needs = {j: {i for i in range(j) if self.lines[i].before(self.lines[j])} for j in waiting}
        out: list[str] = []
        while waiting:
            ready = [j for j in waiting if needs[j].isdisjoint(waiting)]
            j = generator.choice(ready)
            waiting.remove(j)
            out.append(self.lines[j].text)
        return out
