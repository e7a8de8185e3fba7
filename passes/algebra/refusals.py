"""Refusals that several passes make, in words that say what to write instead."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import Node

from kvbuffer_compile.passes.algebra.terms import Refusal
from kvbuffer_compile.passes.reading.forms import WIDEST, WIDEST_BLOCK
from kvbuffer_compile.passes.reading.labels import Size


def called(node: Node) -> str:
    """The name of the call that a node makes, as its author knows it: of what it is a decomposition of, if it is."""
    target = node.meta.get("original_aten") or node.target
    return target.overloadpacket.__name__.lstrip("_") if isinstance(target, OpOverload) else str(target)


def nonlinear(node: Node, met: bool = False) -> Refusal:
    """Something is done to the state that is no algebra. met: two values that both depend on it meet."""
    reason = (
        f"{called(node)} is applied to the state, which may only be scaled, contracted with a key and added to: apply "
        "it to what is added or to what is read"
    )
    if met:
        reason = (
            f"two values that depend on the state meet in {called(node)}: the next state and what is read must be "
            "linear in it, so factors and conditions may only be computed from what was read by a key"
        )
    return Refusal(node, "nonlinear", reason)


def rounded(node: Node) -> Refusal:
    """The state is cast to integers or booleans."""
    dtype = str(node.meta["val"].dtype).removeprefix("torch.")
    reason = f"the state is rounded to {dtype}: keep it in floating point, and round what is added to it or read"
    return Refusal(node, "nonlinear", reason)


def mentioned(node: Node) -> str:
    """An input of the graph within a reason, where its user's name is put in, or nothing at all: records.told."""
    return f" (`{node.name}`)" if node.op == "placeholder" else ""


def in_part(node: Node) -> Refusal:
    """Less than the state is used."""
    reason = (
        "a part of the state is taken along one of its axes: use the whole state, with a decay of 1 and zeros in keys "
        "or values for the part that is left out"
    )
    return Refusal(node, "partial", reason)


def prefill(node: Node, count: Size, what: str) -> Refusal:
    """More tokens in one call than are taken apart."""
    reason = (
        f"{count} {what} in one call, more than the {WIDEST} that are taken apart one by one: a prompt, which runs as "
        f"it is; calls of at most {WIDEST} tokens are buffered, and of at most {WIDEST_BLOCK} if all of them read one "
        "state by one product and are added to it by one product"
    )
    return Refusal(node, "prefill", reason)
