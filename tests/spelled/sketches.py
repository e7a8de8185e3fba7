"""Random recurrences of one token, and their random spellings as PyTorch code."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvbuffer_compile.ir.program import Decay, Map, Read, Update
from kvbuffer_compile.passes.lifted import Lifted
from tests.spelled import spellings as say
from tests.spelled.spellings import Value, Writer


@dataclass(frozen=True)
class Sizes:
    """B sequences, G key heads, R heads for each of them, K rows, V columns."""

    B: int
    G: int
    R: int
    K: int
    V: int

    @property
    def H(self) -> int:
        return self.G * self.R


SIZES = (Sizes(2, 3, 1, 4, 5), Sizes(2, 2, 2, 3, 5), Sizes(4, 2, 2, 4, 4), Sizes(3, 3, 1, 3, 3), Sizes(1, 1, 1, 4, 5))
STORED = {  # the dims of a state in memory: how it becomes [B, H, a, b], and a and b
    "BHKV": ("{x}", "KV"),
    "BHVK": ("{x}", "VK"),
    "HBKV": ("{x}.transpose(0, 1)", "KV"),
    "KBHV": ("{x}.permute(1, 2, 0, 3)", "KV"),
    "(BH)KV": ("{x}.view({B}, {H}, {K}, {V})", "KV"),
    "B(HK)V": ("{x}.unflatten(1, ({H}, {K}))", "KV"),
    "B(HVK)": ("{x}.view({B}, {H}, {V}, {K})", "VK"),
    "B(GR)KV": ("{x}.view({B}, {G}, {R}, {K}, {V}).flatten(1, 2)", "KV"),
}
BACK = {
    "HBKV": "{x}.transpose(0, 1)", "KBHV": "{x}.permute(2, 0, 1, 3)", "(BH)KV": "{x}.reshape(-1, {K}, {V})",
    "B(HK)V": "{x}.flatten(1, 2)", "B(HVK)": "{x}.reshape({B}, -1)",
}  # fmt: skip
DIMS = {"HBKV": "HBKV", "KBHV": "KBHV", "(BH)KV": ("BH", "K", "V"), "B(HK)V": ("B", "HK", "V"), "B(HVK)": ("B", "HVK"),
        "B(GR)KV": "BHKV"}  # fmt: skip
LANES = {"BH": ("bh", "({B}, {H})"), "N": ("b", "({B} * {H},)"), "BGR": ("bgr", "({B}, {G}, {R})")}
REPEATED = (
    "{x}.repeat_interleave({R}, 1)", "{x}[:, :, None].expand((-1, -1, {R}) + {x}.shape[2:]).flatten(1, 2)",
    "{x}.unsqueeze(2).repeat((1, 1, {R}) + (1,) * ({x}.dim() - 2)).reshape(({B}, {H}) + {x}.shape[2:])",
)  # fmt: skip
ARRIVALS = {  # how an operand is given, and how it becomes [B, heads, ...]
    "": ("{x}",), "token": ("{x}[:, 0]", "{x}.squeeze(1)", "{x}.transpose(1, 2)[:, :, 0]", "{x}.unbind(1)[0]"),
    "heads": ("{x}[:, :, 0]", "{x}.squeeze(2)", "{x}.select(2, -1)"),
    "padded": ("{x}[..., :-1]", "{x}.narrow(-1, 0, {x}.shape[-1] - 1)"), "expanded": ("{x}",),
    "features": ("{x}.unflatten(-1, (-1, {n}))[:, 0]", "{x}.view({B}, 1, -1, {n}).squeeze(1)"),
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """decay along scalar, head, number, key or value; update by plain, delta, apart (a read key of its own) or
    transition; read along key or value."""

    op: str
    how: str


@dataclass(frozen=True)
class Recurrence:
    events: tuple[Event, ...]
    stored: str = "BHKV"
    mask: str = ""  # keep or reset

    @property
    def is_plain(self) -> bool:
        """Whether its ops on the state are known in advance, whatever the spelling."""
        return not self.mask and all(e.how != "transition" for e in self.events)


@st.composite
def recurrences(draw: st.DrawFn) -> Recurrence:
    decays = draw(st.lists(st.sampled_from(("scalar", "scalar", "head", "number", "key", "key", "value")), max_size=2))
    updates = draw(
        st.lists(
            st.sampled_from(("plain", "plain", "delta", "delta", "apart", "transition", "oja")), min_size=1, max_size=3
        )
    )
    reads = draw(st.lists(st.sampled_from(("key", "key", "key", "value")), min_size=1, max_size=2))
    events = [*(Event("decay", d) for d in decays), *(Event("update", u) for u in updates)]
    reading = [Event("read", r) for r in reads]
    order = draw(st.integers(0, 9))
    if order < 2:
        events = reading[:1] + events + reading[1:]
    elif order < 5:
        events = draw(st.permutations(events + reading))
    else:
        events = events + reading
    stored = draw(st.sampled_from(list(STORED)))
    return Recurrence(tuple(events), stored, draw(st.sampled_from(("", "", "", "", "", "keep", "reset"))))


# --------------------------------------------------------------------------------------------- what it is


def ops_of(lifted: Lifted) -> str:
    """The ops on the state in all tokens, and the axes of their operands."""
    ops = [_op(op) for op in lifted.program.ops if not isinstance(op, Map)]
    return _ordered(ops * int(lifted.tokens) if lifted.several else ops)


def _op(op: Any) -> str:
    match op:
        case Decay(factor):
            return "D" + factor.kind[0]
        case Read(_, x):
            return "R" + x.kind[0]
        case Update(left, right):
            return "U" + left.kind[0] + right.kind[0]
    raise AssertionError(op)


def _ordered(ops: list[str]) -> str:
    """Between two updates first the decays, one an axis (a read of the undecayed state is one of the decayed, with
    another key), then the reads."""
    out: list[str] = []
    for is_update, run in groupby(ops, lambda op: op[0] == "U"):
        found = list(run)
        decays = sorted({op for op in found if op[0] == "D"})
        out += found if is_update else [d for d in decays if d != "Ds" or len(decays) == 1]
        out += [] if is_update else sorted(op for op in found if op[0] == "R")
    return " ".join(out)


def swapped(ops: str) -> str:
    """The same ops with the two axes named the other way round."""
    other = {"k": "v", "v": "k"}
    return _ordered([op if op == "Ukv" else op[0] + "".join(other.get(a, a) for a in op[1:]) for op in ops.split()])


def expected(recurrence: Recurrence) -> str:
    """The ops that a plain recurrence must lift to."""
    ops: list[str] = []
    for event in recurrence.events:
        match event:
            case Event("decay", how):
                ops.append("D" + how[0] if how in ("key", "value") else "Ds")
            case Event("read", how):
                ops.append("R" + how[0])
            case Event(_, how):
                ops += [] if how == "plain" else ["Rv" if how == "oja" else "Rk"]
                ops.append("Ukv")
    return _ordered(ops)


# ----------------------------------------------------------------------------------------------- the text


@dataclass
class Spelled:
    """step(*states, *inputs) -> outputs as text. returned: the output that is the next state, by state; decomposed: to
    be captured with Inductor's decompositions."""

    text: str
    sizes: Sizes
    states: list[tuple[int, ...]]
    inputs: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]
    recurrences: list[Recurrence]
    returned: dict[int, int]
    decomposed: bool
    mutation: str = ""

    def function(self, wide: bool = False) -> Callable[..., tuple[Tensor, ...]]:
        """The step; wide: with float64 wherever it says float32."""
        scope = {"torch": torch, "f32": torch.float64 if wide else torch.float32}
        exec(compile(self.text, "<spelling>", "exec"), scope)
        return scope["step"]  # type: ignore[return-value]

    def start(self, g: torch.Generator) -> list[Tensor]:
        return [torch.randn(shape, generator=g) for shape in self.states]

    def token(self, g: torch.Generator) -> list[Tensor]:
        return [make(torch.randn(shape, generator=g)) for shape, make in self.inputs]


MAKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "key": lambda x: x / x.norm(dim=-1, keepdim=True),
    "value": lambda x: x,
    "gate": lambda x: 0.35 + 0.649 * x.sigmoid(),
    "log": lambda x: (0.35 + 0.649 * x.sigmoid()).log(),
    "beta": lambda x: 0.1 + 0.8 * x.sigmoid(),
    "mask": lambda x: x > -0.5,
}


@dataclass
class Speller:
    """Writes the lines of one step."""

    w: Writer
    sizes: Sizes
    lanes: str
    swap: bool  # the matrix is worked on as [*lanes, V, K]
    inputs: list[tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    made: list[Value] = field(default_factory=list)  # reads along the key axis: values for the next state
    mutation: Callable[[Speller, Value], Value] | None = None
    in_place: bool = True
    number: int = 0  # of the state being written

    @property
    def state(self) -> Value:
        return Value(f"s{self.number}", f"s{self.number}")

    def orient(self, swap: bool) -> None:
        s, (letters, shape) = self.sizes, LANES[self.lanes]
        self.swap = swap
        i, j = (s.V, s.K) if swap else (s.K, s.V)
        known = {name: getattr(s, name) for name in "BGRHKV"}
        lanes = eval(shape.format(**known))
        self.w.names = {**known, "n": letters, "I": i, "J": j, "shape": (*lanes, i, j), "lanes": lanes}

    # --------------------------------------------------------------------------------------- operands

    def operand(self, kind: str, make: str, shared: bool = False) -> Value:
        """A new input as a vector or scalar of the lanes. shared: one for each group of heads."""
        s = self.sizes
        heads = s.G if shared else s.H
        tail = {"key": (s.K,), "value": (s.V,)}.get(kind, ())
        forms = ["", "", "token", "heads"] + (["padded"] if tail and make != "key" else [])
        forms += ["features"] if tail else ["expanded"]
        form = self.w.pick(forms if kind != "head" and make != "mask" else [""])
        lead = {"token": (s.B, 1, heads), "heads": (s.B, heads, 1), "padded": (s.B, heads), "features": (s.B, 1)}
        lead = lead.get(form, (s.B, heads))
        if kind == "head":
            lead = (heads,)
        elif make == "mask":
            lead = (s.B,)
        many = heads if form == "features" else 1  # heads and channels in one dim, as a linear layer gives them
        maker, sizes = MAKERS[make], (*lead, *(many * n + (form == "padded") for n in tail))
        if form == "expanded":  # outside of the graph: a stride of 0
            sizes, maker = (*lead[:-1], 1), lambda x: MAKERS[make](x).expand(lead)
        self.inputs.append((sizes, maker))
        name = f"i{len(self.inputs) - 1}"
        self.w.names["n"], letters = (tail or (1,))[0], self.w.names["n"]
        x = self.w.new(say_arrival(form), view=Value(name, name), x=Value(name, name))
        self.w.names["n"] = letters
        if make == "mask":
            x = self.w.new("{x}[:, None].expand({B}, {H})", view=x, x=x)
        elif kind == "head":
            x = self.w.new(("{x}.expand({B}, {H})", "{x}.repeat({B}, 1)"), view=x, x=x)
        x = x if make == "mask" or not tail else self.w.like(x, outside=True)
        return self._in_lanes(x, shared)

    def _in_lanes(self, x: Value, shared: bool) -> Value:
        w = self.w
        if shared and self.lanes == "BGR":
            return w.new("{x}.unsqueeze(2).expand(({B}, {G}, {R}) + {x}.shape[2:])", view=x, x=x)
        if shared:
            x = w.new(REPEATED, view=x, x=x)
        if self.lanes == "N":
            return w.new(("{x}.flatten(0, 1)", "{x}.reshape((-1,) + {x}.shape[2:])"), view=x, x=x)
        if self.lanes == "BGR":
            return w.new(("{x}.unflatten(1, ({G}, {R}))", "{x}.reshape(({B}, {G}, {R}) + {x}.shape[2:])"), view=x, x=x)
        return x

    def key(self) -> Value:
        return self.operand("key", "key", shared=self.sizes.R > 1 and self.w.maybe(2))

    def value(self) -> Value:
        if self.made and self.w.maybe(3):
            return self.w.new("torch.tanh({x})", x=self.w.pick(self.made))
        return self.operand("value", "value")

    # ------------------------------------------------------------------------------------- the matrix

    def axis(self, along: str) -> str:
        return "scalar" if along not in ("key", "value") else "i" if (along == "key") != self.swap else "j"

    def decay(self, S: Value, how: str) -> Value:
        w = self.w
        if how == "number":
            number = w.pick((0.5, 0.9))
            if self._may_change(S):
                w.change(f"{{S}}.mul_({number})", S, S=S)
                return S
            return w.new((f"{{S}} * {number}", f"{number} * {{S}}", f"{{S}} / {1 / number}"), S=S)
        logarithm = w.maybe(2)
        a = self.operand(how, "log" if logarithm else "gate")
        a = w.new(say.EXP, a=a) if logarithm else a
        axis = self.axis(how)
        if w.maybe(5):
            return w.new(say.DIAGONAL[axis], S=S, a=a)
        A = w.new(say.SPREAD[axis], view=a, a=a)
        if self._may_change(S):
            w.change(say.SCALE_, S, S=S, A=A)
            return S
        return w.new(say.SCALE, S=S, A=A)

    def _may_change(self, S: Value) -> bool:
        return self.in_place and S.certain and self.w.maybe(2)

    def read(self, S: Value, x: Value, along: str) -> Value:
        return self.w.new(say.READ_I if self.axis(along) == "i" else say.READ_J, S=S, x=x)

    def write(self, S: Value, key: Value, value: Value) -> Value:
        w = self.w
        l, r = (value, key) if self.swap else (key, value)
        change = self._may_change(S)
        if w.maybe(3):
            if change:
                w.change(say.WRITE_, S, S=S, l=l, r=r)
                return S
            return w.new(say.WRITE, S=S, l=l, r=r)
        o = w.new(say.OUTER, l=l, r=r)
        if change:
            w.change(say.ADD_, S, S=S, o=o)
            return S
        return w.new(say.ADD, S=S, o=o)

    def update(self, S: Value, how: str) -> Value:
        w = self.w
        if how == "plain":
            return self.write(S, self.key(), self.value())
        b = self.operand("scalar", "beta")
        k = self.key()
        if how == "oja":
            v = self.operand("value", "key")
            error = w.new(say.MINUS, x=k, y=self.read(S, v, "value"))
            return self.write(S, w.new(say.TIMES, x=error, b=b), v)
        v = self.value()
        if how == "transition":
            S = w.new(say.TRANSITION[self.axis("key")], S=S, l=k, b=b)
            return self.write(S, k, w.new(say.TIMES, x=v, b=b))
        p = self.key() if how == "apart" else k
        form = w.draw(st.integers(0, 3))
        if form == 0:  # the step size on the key that is written
            return self.write(S, w.new(say.TIMES, x=k, b=b), w.new(say.MINUS, x=v, y=self.read(S, p, "key")))
        if form == 1:  # on the key that is read, and the value
            known = self.read(S, w.new(say.TIMES, x=p, b=b), "key")
            return self.write(S, k, w.new(say.MINUS, x=w.new(say.TIMES, x=v, b=b), y=known))
        error = w.like(w.new(say.MINUS, x=v, y=self.read(S, p, "key")))
        return self.write(S, k, w.new(say.TIMES, x=error, b=b))

    # -------------------------------------------------------------------------------------- one state

    def matrix(self, state: Value, stored: str) -> Value:
        """The state in working dims."""
        w = self.w
        x = w.new(STORED[stored][0], view=state, certain=True, x=state)
        if (STORED[stored][1] == "VK") != self.swap:
            x = w.new("{x}.transpose(-1, -2)", view=x, certain=True, x=x)
        if self.lanes == "N":
            x = w.new("{x}.reshape({shape})", view=x, certain=stored[:2] != "HB" and stored[0] != "K", x=x)
        elif self.lanes == "BGR":
            x = w.new("{x}.unflatten(1, ({G}, {R}))", view=x, certain=True, x=x)
        return w.new(say.VIEWS, view=x, certain=True, x=x) if w.maybe() else x

    def stored(self, S: Value, stored: str) -> Value:
        """The inverse of `matrix`."""
        w = self.w
        x = w.new("{x}.reshape(({B}, {H}) + {x}.shape[-2:])", view=S, x=S)
        if (STORED[stored][1] == "VK") != self.swap:
            x = w.new(("{x}.transpose(-1, -2)", "{x}.mT.contiguous()"), view=x, x=x)
        return w.new(BACK[stored], view=x, x=x) if stored in BACK else x

    def recurrence(self, number: int, one: Recurrence) -> Value | None:
        """All lines of one state; its next value when it is to be returned."""
        w = self.w
        self.number = number
        state = self.state
        self.orient(w.maybe(3))
        self.in_place = not one.mask and not (returns := w.maybe(6))
        old = S = self.matrix(state, one.stored)
        if one.mask:
            m = w.new(say.SPREAD["scalar"], a=self.operand("scalar", "mask"))
            if one.mask == "reset":
                S = w.new(("{S}.masked_fill(~{m}, 0)", "torch.where({m}, {S}, 0.0)", "{S} * {m}.to(f32)"), S=S, m=m)
        at = w.draw(st.integers(0, len(one.events) - 1))
        for i, event in enumerate(one.events):
            if self.mutation is not None and i == at:
                S = self.mutation(self, S)
            S = self._event(S, event)
        if one.mask == "keep":
            S = w.new(
                ("torch.where({m}, {S}, {old})", "{m}.to(f32) * {S} + (1 - {m}.to(f32)) * {old}"), S=S, m=m, old=old
            )
        if not one.mask and returns:
            return w.new("{x}.clone()", x=self.stored(S, one.stored))
        if S.memory != state.memory or not S.certain:
            x = self.stored(S, one.stored)
            x = x if S.memory != state.memory else w.new("{x}.clone()", x=x)
            apart = ("{s}.zero_().add_({x})", "{s}.fill_(0).add_({x})") if S.memory != state.memory else ()
            w.change(("{s}.copy_({x})", "{s}[:] = {x}", "{s}[...] = {x}", *apart), state, s=state, x=x)
        return None

    def _event(self, S: Value, event: Event) -> Value:
        w = self.w
        if w.maybe(8):
            w.new(say.DEAD, x=S)
        if w.maybe(5):
            S = w.new(say.SAME, view=Value(S.name, S.memory, False), x=S)
        if event.op == "decay":
            return self.decay(S, event.how)
        if event.op == "update":
            return self.update(S, event.how)
        out = self.read(S, self.key() if event.how == "key" else self.operand("value", "value"), event.how)
        if event.how == "key" and self.w.names["shape"][0] == self.w.names["lanes"][0]:
            self.made.append(out)
        self.outputs.append(w.new(("{x}", "torch.tanh({x})", "{x} * 0.5 + 1", "{x}.to(f32)"), view=out, x=out))
        return S


def say_arrival(form: str) -> tuple[str, ...]:
    return ARRIVALS[form]


@st.composite
def spelled(draw: st.DrawFn, mutations: dict[str, Callable[[Speller, Value], Value]] | None = None) -> Spelled:
    """A step with one state or two. mutations: of which one is applied to the last state."""
    sizes = draw(st.sampled_from(SIZES))
    w = Writer(draw)
    speller = Speller(w, sizes, draw(st.sampled_from(list(LANES))), False)
    recs = [draw(recurrences()) for _ in range(draw(st.sampled_from((1, 1, 2))))]
    next_states, name = {}, ""
    for i, one in enumerate(recs):
        if mutations is not None and i == len(recs) - 1:
            name = draw(st.sampled_from(list(mutations)))
            speller.mutation = mutations[name]
        next_states[i] = speller.recurrence(i, one)
    returned = {i: x for i, x in next_states.items() if x is not None}
    outs = [*speller.outputs, *returned.values()]
    arguments = [f"s{i}" for i in range(len(recs))] + [f"i{i}" for i in range(len(speller.inputs))]
    body = [f"def step({', '.join(arguments)}):", *w.shuffled(), f"return ({', '.join(map(str, outs))},)"]
    shapes = [tuple(_size(sizes, dim) for dim in DIMS.get(r.stored, r.stored)) for r in recs]
    positions = {i: len(speller.outputs) + j for j, i in enumerate(returned)}
    return Spelled("\n    ".join(body), sizes, shapes, speller.inputs, recs, positions, draw(st.booleans()), name)


def _size(sizes: Sizes, dim: str) -> int:
    return math.prod(getattr(sizes, letter) for letter in dim)
