"""Single changes that turn a recurrence into something else, most of it no recurrence at all."""

from __future__ import annotations

from collections.abc import Callable

from tests.spelled.sketches import Speller
from tests.spelled.spellings import OUTER, Value

Mutation = Callable[[Speller, Value], Value]

IN_PLACE_OF_S = {
    "nonlinear": (
        "torch.tanh({S})", "{S}.clamp(-0.7, 0.7)", "{S}.abs()", "torch.sin({S})", "{S} / (1 + {S}.abs())",
        "{S} * {S}.sigmoid()",
        "torch.where({S} > 0, {S}, 0.5 * {S})", "torch.nn.functional.gelu({S})", "torch.maximum({S}, -0.3 * {S})",
        "{S}.softmax(-1)", "torch.nn.functional.normalize({S}, dim=-1)", "{S}.sort(-1)[0]", "torch.hypot({S}, {S})",
    ),
    "moved": (
        "{S}.roll(1, -1)", "{S}.roll(1, -2)", "{S}.roll(1, 0)", "{S}.flip(-1)", "{S}.flip(0)", "{S}.cumsum(-1) * 0.5",
        "{S}.tril()", "{S}[..., torch.arange({J} - 1, -1, -1)]", "torch.cat([{S}[..., 1:], {S}[..., :1]], -1)",
        "torch.nn.functional.pad({S}[..., :-1], (1, 0))", "{S}.reshape({shape}[:-2] + ({J}, {I})).transpose(-1, -2)",
    ),
    "mixed": (
        "{S} + 0.2 * {S}.roll(1, 0)", "{S} - 0.3 * {S}.mean(0, keepdim=True)", "0.5 * ({S} + {S}.flip(-1))",
        "{S} - 0.2 * {S}.sum((-1, -2), keepdim=True)", "{S} + 0.2 * {S}.mean(-1, keepdim=True).roll(1, -2)",
    ),
    "own decay": (
        "{S} * torch.sigmoid({S}.mean((-1, -2), keepdim=True))", "{S} / (1 + {S}.square().sum((-1, -2), keepdim=True))",
        "{S} * torch.sigmoid({S}.sum(-1, keepdim=True))", "{S} * (1 - {S}.amax(-2, keepdim=True).sigmoid())",
        "{S} * {S}", "{S} / {S}.norm()", "{S} * torch.sigmoid({S}[..., :1])", "{S} * {S}.detach().mean().sigmoid()",
    ),
    "in part": (
        "torch.cat([{S}[..., :1].tanh(), {S}[..., 1:]], -1)", "{S}.select_scatter({S}[..., 0] * 0.5, -1, 0)",
        "{S}.slice_scatter({S}[..., 1:] * 0.5, -1, 1)", "{S} * torch.eye({I}, {J}, dtype=f32)",
        "{S}.masked_fill({S} > 1, 0.0)",
        "{S} + torch.zeros_like({S}).index_fill(-1, torch.tensor([0]), 1.0) * {S}",
        "torch.where(torch.eye({I}, {J}) > 0, {S}, 0.5 * {S})", "{S}.index_copy(-1, torch.tensor([0]), {S}[..., 1:2])",
    ),
    "precision": ("{S}.mul(8).round().div(8)", "({S} * 16).to(torch.int32).to(f32) / 16", "{S}.floor()"),
}  # fmt: skip
WITH_A_PRODUCT = {  # o runs along both axes
    "full decay": (
        "{S} * torch.sigmoid({o})", "{S} * (1 - 0.1 * {o})", "{S} * torch.exp(-{o}.abs())", "{S} / (2 + {o}.square())",
        "torch.where({o} > 0, {S}, 0.5 * {S})", "{S}.masked_fill({o} > 0.5, 0)", "torch.lerp({S}, {o}, {o}.sigmoid())",
    ),
    "full rank": (
        "{S} + torch.relu({o})", "{S} + torch.sin({o})", "{S} + {o}.softmax(-1)", "{S} + {o}.cumsum(-1)",
        "{S} + {o}.tril()",
        "{S} + torch.maximum({o}, {S})", "{S} + {o} * {S}", "{S} + {o}.roll(1, -1) * {o}.sigmoid()",
    ),
    "full transition": (
        "torch.tanh({o} @ {o}.mT) @ {S}", "({o} @ {o}.mT) @ {S}", "{S} @ torch.sigmoid({o}.mT @ {o})",
        "(torch.eye({I}, dtype=f32) - torch.relu({o} @ {o}.mT)) @ {S}",
        "torch.linalg.matrix_exp(-({o} @ {o}.mT)) @ {S}",
    ),
}  # fmt: skip
SHOWN = (  # the state, or something about it, seen from outside; views of it are in test_spellings
    "{S} * 2", "{S}.clone()", "{S}.norm()", "{S}[..., 0].clone()", "{S}.mT + 0", "{S}.amax(-1)", "{S}.sum()",
    "{S}.square().mean(-1)", "{S}[:1] + 0", "{S}.diagonal(0, -2, -1).clone()", "({S} > 0).any()", "{S}.sum(0)",
    "{S}.std((-1, -2))",
)  # fmt: skip
TO_VALUE = (  # of a read y and the matrix, in place of a value
    "torch.tanh({y}) + {S}.mean((-1, -2), keepdim=True)[..., 0]", "{y} * {S}.amax((-1, -2))[..., None]",
    "{y} + {S}.abs().sum((-1, -2))[..., None]", "{y}.roll(1, -1)", "{y}.softmax(-1)", "{y}.sort(-1)[0]",
    "{y}.roll(1, 0)",
    "{y} * {y}.mean(0, keepdim=True)", "{y}.cumsum(-1)", "{y} - {y}.amax()",
)  # fmt: skip


def _instead(templates: tuple[str, ...]) -> Mutation:
    return lambda p, S: p.w.new(templates, S=S)


def _with_product(templates: tuple[str, ...]) -> Mutation:
    def mutation(p: Speller, S: Value) -> Value:
        l, r = p.operand("key", "key"), p.operand("value", "value")
        return p.w.new(templates, S=S, o=p.w.new(OUTER, l=r if p.swap else l, r=l if p.swap else r))

    return mutation


def _shown(p: Speller, S: Value) -> Value:
    p.outputs.append(p.w.new(SHOWN, view=Value(S.name, S.memory, False), S=S))
    return S


def _decay_from_read(p: Speller, S: Value) -> Value:
    y = p.read(S, p.key(), "key")
    forms = (
        "torch.sigmoid({y}.mean(-1))[..., None, None]",
        f"torch.sigmoid({{y}}).unsqueeze({-1 if p.swap else -2})",
    )
    return p.w.new("{S} * {A}", S=S, A=p.w.new(forms, y=y))


def _value_from_state(p: Speller, S: Value) -> Value:
    value = p.w.new(TO_VALUE, y=p.read(S, p.key(), "key"), S=S)
    return p.write(p.w.new("{S} * 1", S=S), p.key(), value)


def _part_written(p: Speller, S: Value) -> Value:
    forms = (
        "{s}[:1].mul_(0.5)",
        "{s}[..., :1] = 1.0",
        "{s}.select(0, 0).copy_({s}.select(0, -1))",
        "{s}.unbind(-1)[0].mul_(2)",
    )
    p.w.change(forms, p.state, s=p.state)
    return S


def _old_read_with_new_key(p: Speller, S: Value) -> Value:
    """A read of the old state whose key needs the new one."""
    new = p.write(p.w.new("{S} * 0.9", S=S), p.key(), p.value())
    y = p.w.new("torch.sigmoid({y}.mean(-1, keepdim=True))", y=p.read(new, p.key(), "key"))
    p.outputs.append(p.read(S, p.w.new("{x} * {y}", x=p.key(), y=y), "key"))
    return new


def _stored_twice(p: Speller, S: Value) -> Value:
    p.w.change("{s}.copy_({s} * 0.5)", p.state, s=p.state)
    return S


MUTATIONS: dict[str, Mutation] = {
    **{name: _instead(templates) for name, templates in IN_PLACE_OF_S.items()},
    **{name: _with_product(templates) for name, templates in WITH_A_PRODUCT.items()},
    "shown": _shown,
    "decay from read": _decay_from_read,
    "value from state": _value_from_state,
    "part written": _part_written,
    "old read with new key": _old_read_with_new_key,
    "stored twice": _stored_twice,
}
