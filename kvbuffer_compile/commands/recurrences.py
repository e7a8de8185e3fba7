"""Recurrences of real models by name: program text, a plain torch step, inputs with decays that remember."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbuffer_compile.codegen.standalone.check import draw
from kvbuffer_compile.ir.program import Program
from kvbuffer_compile.ir.text import parse

_HEAD = "program over b h tokens 1\n"
_QKV = "input q: key(b h)\ninput k: key(b h)\ninput v: value(b h)\n"
_DELTA = "y = read k\nd = aten.sub.Tensor(v, y)\nu = aten.mul.Tensor(d, beta)\nupdate k, u\n"


@dataclass(frozen=True)
class Recurrence:
    """sizes, heads: of a typical layer, (K, V) and how many. step(state, *inputs) -> out updates a state
    [batch, heads, K, V] in place, inputs in the program's order."""

    name: str
    sizes: tuple[int, int]
    heads: int
    text: str
    step: Callable[..., Tensor]

    @property
    def program(self) -> Program:
        return parse(_HEAD + self.text)

    def inputs(self, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """One token: unit keys, decays in 0.7..0.999, beta in 0..1."""
        tails = {"scalar": (), "key": self.sizes[:1], "value": self.sizes[1:]}
        return [
            draw(DRAWN[v.name], (batch, self.heads, *tails[v.kind]), device).to(
                dtype if v.kind != "scalar" else torch.float32
            )
            for v in self.program.inputs
        ]


# What an input is like in a trained model, by its name.
DRAWN = {
    **dict.fromkeys(("q", "k", "p", "c"), "unit"), "v": "normal",
    **dict.fromkeys(("g", "a", "f"), "gate"), **dict.fromkeys(("i", "beta"), "rate"),
}  # fmt: skip


def _gdn(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    new = S.float() * g[..., None, None]
    u = (v.float() - (new * k.float()[..., None]).sum(-2)) * beta[..., None]
    new = new + k.float()[..., None] * u[..., None, :]
    S.copy_(new)
    return (new * q.float()[..., None]).sum(-2)


def _kda(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, beta: Tensor) -> Tensor:
    new = S.float() * a.float()[..., None]
    u = (v.float() - (new * k.float()[..., None]).sum(-2)) * beta[..., None]
    new = new + k.float()[..., None] * u[..., None, :]
    S.copy_(new)
    return (new * q.float()[..., None]).sum(-2)


def _gla(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
    new = S.float() * a.float()[..., None] + k.float()[..., None] * v.float()[..., None, :]
    S.copy_(new)
    return (new * q.float()[..., None]).sum(-2)


def _scalar(S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    new = S.float() * g[..., None, None] + k.float()[..., None] * v.float()[..., None, :]
    S.copy_(new)
    return (new * q.float()[..., None]).sum(-2)


def _mlstm(S: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> Tensor:
    return _scalar(S, q, k.float() * i[..., None], v, f)


def _rwkv7(S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, p: Tensor, c: Tensor) -> Tensor:
    old = S.float()
    y = (old * p.float()[..., None]).sum(-2)
    new = old * a.float()[..., None] + c.float()[..., None] * y[..., None, :]
    new = new + k.float()[..., None] * v.float()[..., None, :]
    S.copy_(new)
    return (new * q.float()[..., None]).sum(-2)


_G, _A, _BETA = "input g: scalar(b h)\n", "input a: key(b h)\n", "input beta: scalar(b h)\n"
_PLAIN = "update k, v\no = read q\nreturn o"
RECURRENCES = {
    r.name: r
    for r in (
        Recurrence("gdn", (128, 128), 32, _QKV + _G + _BETA + "decay g\n" + _DELTA + "o = read q\nreturn o", _gdn),
        Recurrence("kda", (128, 128), 32, _QKV + _A + _BETA + "decay a\n" + _DELTA + "o = read q\nreturn o", _kda),
        Recurrence("mamba2", (128, 64), 64, _QKV + _G + "decay g\n" + _PLAIN, _scalar),
        Recurrence("gla", (128, 128), 32, _QKV + _A + "decay a\n" + _PLAIN, _gla),
        Recurrence(
            "rwkv7", (64, 64), 64,
            _QKV + _A + "input p: key(b h)\ninput c: key(b h)\ny = read p\ndecay a\nupdate c, y\n" + _PLAIN, _rwkv7,
        ),
        Recurrence(
            "mlstm", (256, 512), 4,
            _QKV + "input f: scalar(b h)\ninput i: scalar(b h)\nki = aten.mul.Tensor(k, i)\ndecay f\nupdate ki, v\n"
            "o = read q\nreturn o", _mlstm,
        ),
    )
}  # fmt: skip
