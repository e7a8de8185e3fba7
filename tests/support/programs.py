"""Programs to test with: the recurrences people use, by name, and random ones that say all the IR can say."""

from __future__ import annotations

from hypothesis import strategies as st

from kvbuffer_compile.codegen.calls import CALLS
from kvbuffer_compile.ir.memory import overload
from kvbuffer_compile.ir.program import Decay, Kind, Map, Op, Program, Read, Update, Var, verify
from kvbuffer_compile.ir.text import parse


def gated_deltanet(lanes: str = "B H", keys: str | None = None) -> Program:
    """One token of Gated DeltaNet (arXiv 2412.06464, equation 10). keys: the lanes of keys and queries, where groups of
    heads share them."""
    keys = keys or lanes
    return parse(f"""
        program over {lanes} tokens 1
          input q: key({keys})
          input k: key({keys})
          input v: value({lanes})
          input g: scalar({lanes})
          input beta: scalar({lanes})
          decay g
          y = read k
          e = aten.sub.Tensor(v, y)
          u = aten.mul.Tensor(e, beta)
          update k, u
          o = read q
          return o
    """)


# Gated linear attention, with a decay for each channel of the keys.
GLA = parse("""
    program over B H tokens 1
      input g: key(B H)
      input k: key(B H)
      input v: value(B H)
      input q: key(B H)
      decay g
      update k, v
      o = read q
      return o
""")
# Every op and kind at once: decays of both axes, reads over both, two updates, a decay behind them, a scalar side. What
# it returns is to be added.
EVERY_OP = """program over b h tokens 1
  input q: key(b h)
  input k: key(b)
  input v: value(b h)
  input g: value(b h)
  input a: key(h)
  input beta: scalar(b h)
  decay g
  y = read v
  d = aten.sub.Tensor(k, y)
  u = aten.mul.Tensor(d, beta)
  decay a
  update u, v
  update k, beta
  decay beta
  o = read q
"""

_QKV = """  input q: key(b h)
  input k: key(b h)
  input v: value(b h)
"""
_DELTA = """  {y} = read {k}
  {d} = aten.sub.Tensor({v}, {y})
  {u} = aten.mul.Tensor({d}, {beta})
  update {k}, {u}
"""


def _delta(n: str = "", beta: str = "beta") -> str:
    return _DELTA.format(y=f"y{n}", k=f"k{n}", d=f"d{n}", v=f"v{n}", u=f"u{n}", beta=f"{beta}{n}")


_TEXTS = {
    "linear_attn": _QKV + "  update k, v\n  o = read q\n  return o",
    "retnet": _QKV + "  input g: scalar(h)\n  decay g\n  update k, v\n  o = read q\n  return o",
    "gla": _QKV + "  input a: key(b h)\n  decay a\n  update k, v\n  o = read q\n  return o",
    "delta_rule": _QKV + "  input beta: scalar(b h)\n" + _delta() + "  o = read q\n  return o",
    "gdn": _QKV
    + "  input g: scalar(b h)\n  input beta: scalar(b h)\n  decay g\n"
    + _delta()
    + "  o = read q\n  return o",
    "kda": _QKV + "  input a: key(b h)\n  input beta: scalar(b h)\n  decay a\n" + _delta() + "  o = read q\n  return o",
    # B and C are shared by the heads of a group; the skip D x and the decay exp(dt A) are part of the step
    "mamba2": """  input B: key(b)
  input C: key(b)
  input x: value(b h)
  input dt: scalar(b h)
  input A: scalar(h)
  input D: scalar(h)
  dtA = aten.mul.Tensor(dt, A)
  g = aten.exp.default(dtA)
  dtx = aten.mul.Tensor(x, dt)
  decay g
  update B, dtx
  y = read C
  Dx = aten.mul.Tensor(x, D)
  o = aten.add.Tensor(y, Dx)
  return o""",
    # the bonus u counts the current token once more for the query
    "rwkv6": _QKV
    + """  input w: key(b h)
  input bonus: key(h)
  kb = aten.mul.Tensor(k, bonus)
  qkb = aten.mul.Tensor(q, kb)
  s = aten.sum.dim_IntList(qkb)
  extra = aten.mul.Tensor(v, s)
  y = read q
  o = aten.add.Tensor(y, extra)
  decay w
  update k, v
  return o""",
    "rwkv7": _QKV
    + """  input w: key(b h)
  input a: key(b h)
  input c: key(b h)
  y = read a
  decay w
  update c, y
  update k, v
  o = read q
  return o""",
    "deltaproduct2": """  input q: key(b h)
  input k1: key(b h)
  input v1: value(b h)
  input k2: key(b h)
  input v2: value(b h)
  input g: scalar(b h)
  input beta1: scalar(b h)
  input beta2: scalar(b h)
  decay g
"""
    + _delta("1")
    + _delta("2")
    + "  o = read q\n  return o",
    # Oja's rule: the key is corrected by what the state already says about the value, a read along the other axis
    "oja": _QKV
    + """  input a: value(b h)
  input beta: scalar(b h)
  decay a
  z = read v
  d = aten.sub.Tensor(k, z)
  l = aten.mul.Tensor(d, beta)
  update l, v
  o = read q
  return o""",
    "mlstm": _QKV
    + """  input f: scalar(b h)
  input i: scalar(b h)
  ki = aten.mul.Tensor(k, i)
  decay f
  update ki, v
  o = read q
  return o""",
}
NAMED: dict[str, Program] = {name: parse(f"program over b h tokens 1\n{text}") for name, text in _TEXTS.items()}


def vocabulary() -> tuple[Program, dict[str, tuple[str, tuple[str, ...]]]]:
    """A program of every pointwise call that kernels have a spelling for, on x, z and the truth values c of x > 0.5 and
    w of z > 0.5; and for each result the overload and its arguments as text."""
    lines, made = ["  c = aten.gt.Scalar(x, 0.5)", "  w = aten.gt.Scalar(z, 0.5)"], {}
    for n, (fn, call) in enumerate(CALLS.items()):
        types = [str(a.type) for a in overload(fn)._schema.arguments][: call.arity - len(call.defaults)]
        names = ["c", "x", "z"] if fn.startswith("aten.where") else ["x", "z", "x"]
        names = ["c", "w"] if fn.startswith("aten.bitwise") else names
        tensors = ["Tensor" in t for t in types]
        made[f"t{n}"] = fn, tuple(v if t else "0.75" for v, t in zip(names, tensors, strict=False))
        lines.append(f"  t{n} = {fn}({', '.join(made[f't{n}'][1])})")
    text = "\n".join([*lines, "  s = aten.sum.dim_IntList(x)", "  update s, x", f"  return {', '.join(made)}"])
    return parse(f"program over b tokens 1\n  input x: value(b)\n  input z: value(b)\n{text}"), made


# Exact on integers, and a wider choice for floats. Arguments: "x" a value, a number stands for itself.
_EXACT_MAPS = ("aten.mul.Tensor", "aten.add.Tensor", "aten.sub.Tensor", "aten.neg.default")
_FLOAT_MAPS = (*_EXACT_MAPS, "aten.sigmoid.default", "aten.tanh.default", "aten.silu.default", "aten.maximum.default")
_UNARY = {"aten.neg.default", "aten.sigmoid.default", "aten.tanh.default", "aten.silu.default"}
_LANES = [("b",), ("b", "h"), ("b", "h", "g")]


@st.composite
def random_programs(draw: st.DrawFn, exact: bool = True, events: int = 6) -> Program:
    """A program of up to `events` decays, reads, updates and maps, at least one of them a read and one an update."""
    builder = _Builder(draw, draw(st.sampled_from(_LANES)), _EXACT_MAPS if exact else _FLOAT_MAPS)
    choices = ["decay", "read", "update", "update", "map", "sum"]
    steps = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=events))
    for step in draw(st.permutations([*steps, "update", "read"])):
        getattr(builder, step)()
    return verify(builder.program())


class _Builder:
    def __init__(self, draw: st.DrawFn, lanes: tuple[str, ...], maps: tuple[str, ...]) -> None:
        self.draw, self.lanes, self.maps = draw, lanes, maps
        self.inputs: list[Var] = []
        self.ops: list[Op] = []
        self.known: dict[Kind, list[Var]] = {"scalar": [], "key": [], "value": []}
        self.tainted: set[str] = set()
        self.results: list[Var] = []

    def program(self) -> Program:
        outputs = [v for v in self.results if self.draw(st.booleans())] or self.results[-1:]
        return Program(self.lanes, tuple(self.inputs), tuple(self.ops), tuple(outputs))

    def pick(self, kind: Kind, clean: bool = False) -> Var:
        """A value of a kind: one that exists, or a new input that may be constant along some lanes."""
        found = [v for v in self.known[kind] if not (clean and v.name in self.tainted)]
        if found and self.draw(st.integers(0, 2)):
            return self.draw(st.sampled_from(found))
        shared = self.draw(st.sampled_from([(), (), self.lanes[-1:], self.lanes[:1]]))
        v = Var(f"{kind[0]}{len(self.inputs)}", kind, tuple(x for x in self.lanes if x not in shared))
        self.inputs.append(v)
        self.known[kind].append(v)
        return v

    def result(self, op: Op, out: Var, tainted: bool) -> None:
        self.ops.append(op)
        self.known[out.kind].append(out)
        if tainted:
            self.tainted.add(out.name)
            self.results.append(out)

    def decay(self) -> None:
        self.ops.append(Decay(self.pick(self.draw(st.sampled_from(("scalar", "key", "value"))), clean=True)))

    def read(self) -> None:
        kind = self.draw(st.sampled_from(("key", "key", "value")))
        out = Var(f"r{len(self.ops)}", "value" if kind == "key" else "key", self.lanes)
        self.result(Read(out, self.pick(kind)), out, True)

    def update(self) -> None:
        left = self.draw(st.sampled_from(("key", "key", "key", "scalar")))
        right = self.draw(st.sampled_from(("value", "value", "value", "scalar")))
        self.ops.append(Update(self.pick(left), self.pick(right)))

    def map(self) -> None:
        kind = self.draw(st.sampled_from(("scalar", "key", "value")))
        fn = self.draw(st.sampled_from(self.maps))
        args = (
            [self.pick(kind)]
            if fn in _UNARY
            else [self.pick(kind), self.pick(self.draw(st.sampled_from((kind, "scalar"))))]
        )
        self._call(fn, args, kind)

    def sum(self) -> None:
        self._call("aten.sum.dim_IntList", [self.pick(self.draw(st.sampled_from(("key", "value"))))], "scalar")

    def _call(self, fn: str, args: list[Var], kind: Kind) -> None:
        lanes = tuple(x for x in self.lanes if any(x in v.lanes for v in args))
        out = Var(f"m{len(self.ops)}", kind, lanes)
        self.result(Map(out, fn, tuple(args)), out, any(v.name in self.tainted for v in args))
