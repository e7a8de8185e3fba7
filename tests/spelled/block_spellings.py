"""Random blocks of tokens in random spellings: calls with one product for all reads and one for all updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

PRODUCT = (  # l [B, H, T, K], r [B, H, T, V]: the sum of all outer products
    "{l}.mT @ {r}",
    "{l}.transpose(-1, -2).contiguous() @ {r}",
    "torch.einsum('bhtk,bhtv->bhkv', {l}, {r})",
    "torch.bmm({l}.flatten(0, 1).mT, {r}.flatten(0, 1)).unflatten(0, {l}.shape[:2])",
    "({l}[..., None] * {r}[..., None, :]).sum(-3)",
    "({r}.mT @ {l}).mT",
)
ADD = (
    "{S} + {o}",
    "{o} + {S}",
    "torch.add({S}, {o} * 0.5, alpha=2)",
    "{S} - (-{o})",
    "torch._foreach_add([{S}], [{o}])[0]",
)
READ = {
    "key": (
        "{x} @ {S}",
        "torch.einsum('bhtk,bhkv->bhtv', {x}, {S})",
        "torch.bmm({x}.flatten(0, 1), {S}.flatten(0, 1)).unflatten(0, {x}.shape[:2])",
        "({S}.mT @ {x}.mT).mT",
        "({x}[..., None] * {S}[..., None, :, :]).sum(-2)",
    ),
    "value": ("{x} @ {S}.mT", "torch.einsum('bhtv,bhkv->bhtk', {x}, {S})", "({S} @ {x}.mT).mT"),
}
DECAY = {
    "scalar": ("{S} * {a}[..., None, None]", "{a}[:, :, None, None] * {S}", "{S} / (1 / {a})[..., None, None]"),
    "key": ("{S} * {a}.unsqueeze(-1)", "torch.diag_embed({a}) @ {S}"),
    "value": ("{S} * {a}.unsqueeze(-2)",),
}
SAME = ("{x}", "{x}.clone()", "{x} * 1", "{x}.flatten(0, 1).unflatten(0, {x}.shape[:2])", "{x}.double().to(f32)")
SIZES = ((2, 3, 5, 4, 6), (1, 2, 17, 4, 4), (2, 2, 3, 3, 3))
SHAPES = {"q": "TK", "k": "TK", "p": "TV", "v": "TV", "b": "T", "scalar": "", "key": "K", "value": "V"}


class Block:
    """step(S, *inputs) -> outputs, S changed in place. sizes: of B, H, T, K, V."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        sizes = draw(st.sampled_from(SIZES))
        self.sizes = dict(zip("BHTKV", sizes, strict=True))
        self.inputs: list[str] = []
        self.lines: list[str] = []
        self.outputs: list[str] = []
        self._write()
        body = [f"def step(S, {', '.join(self.names)}):", *self.lines, f"return {', '.join(self.outputs)},"]
        self.text = "\n    ".join(body)

    @property
    def names(self) -> list[str]:
        return [f"{kind}{i}" for i, kind in enumerate(self.inputs)]

    def _pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def _input(self, kind: str) -> str:
        self.inputs.append(kind)
        return self._new(SAME, x=self.names[-1])

    def _new(self, templates: Any, **used: str) -> str:
        self.lines.append(f"x{len(self.lines)} = {self._pick(templates).format(**used)}")
        return f"x{len(self.lines) - 1}"

    def _read(self, S: str) -> None:
        axis = self._pick(("key", "key", "key", "value"))
        self.outputs.append(self._new(READ[axis], S=S, x=self._input("q" if axis == "key" else "p")))

    def _decay(self, S: str) -> str:
        kind = self._pick(("scalar", "scalar", "key", "value"))
        return self._new(DECAY[kind], S=S, a=self._input(kind))

    def _write(self) -> None:
        S = "S"
        if maybe := self._pick((0, 1, 2, 3)):
            S = self._decay(S) if maybe > 1 else S
        old = S
        if self._pick((0, 1, 2)) == 0:
            self._read(S)
        for _ in range(self._pick((1, 1, 2))):
            k, v = self._input("k"), self._input("v")
            if self._pick((0, 1)):
                error = self._new(("{v} - {y}", "-({y} - {v})"), v=v, y=self._new(READ["key"], S=old, x=k))
                v = self._new(("{e} * {b}[..., None]", "{b}.unsqueeze(-1) * {e}"), e=error, b=self._input("b"))
            S = self._new(ADD, S=S, o=self._new(PRODUCT, l=k, r=v))
        if self._pick((0, 1, 2)) == 0:
            S = self._decay(S)
        if self._pick((0, 1)) or not self.outputs:
            self._read(S)
        self.lines.append(self._pick(("S.copy_({S})", "S[:] = {S}", "S.zero_().add_({S})")).format(S=S))

    def function(self, wide: bool = False) -> Callable[..., tuple[Tensor, ...]]:
        scope: dict[str, Any] = {"torch": torch, "f32": torch.float64 if wide else torch.float32}
        exec(compile(self.text, "<block>", "exec"), scope)
        return scope["step"]  # type: ignore[no-any-return]

    def draws(self, g: torch.Generator) -> list[Tensor]:
        """Operands of one call."""
        found = []
        for kind in self.inputs:
            x = torch.randn([self.sizes[n] for n in "BH" + SHAPES[kind]], generator=g)
            x = 0.35 + 0.649 * x.sigmoid() if kind in ("scalar", "key", "value", "b") else x
            found.append(x / x.norm(dim=-1, keepdim=True) / self.sizes["T"] ** 0.5 if kind == "k" else x)
        return found

    def start(self, g: torch.Generator) -> Tensor:
        return torch.randn([self.sizes[n] for n in "BHKV"], generator=g)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """A random block."""
    return Block(draw)
