"""Which node of the captured graph each node of its lifted copy stands for.

Lifting changes the copy: fused calls are written out, several queries taken apart, tokens of a sequence spelled out,
slices of a stack and rows of a pool become inputs. What it makes in place of a captured node says so (`instead`);
everything else is found by comparing the two graphs call by call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
INSTEAD = "kvbuffer_instead"
_AROUND = (aten.unsqueeze.default, aten.select.int, aten.clone.default)


def instead(new: Node, original: Node) -> None:
    """Say that `new` has the value of a node that others used before, in all of a graph."""
    # with its own name: meta is handed on to other nodes
    new.meta[INSTEAD] = new.name, _replaced(original) or original.name


def is_instead(node: Node) -> bool:
    """Whether a node was made to replace a captured one."""
    return _replaced(node) is not None


def _replaced(node: Node) -> str | None:
    """The name of the captured node that a node was made to replace."""
    own, name = node.meta.get(INSTEAD, ("", ""))
    return name if own == node.name else None


@dataclass
class Origins:
    """same: nodes of the copy that are the same call on the same values, with their originals: nothing is to prove.
    claims: nodes of the copy that are used in place of an original but computed in another way. aliases: original
    nodes in whose place the copy has (what shows) one of its own inputs, or what was stored before. Claims and aliases
    are to be proved on numbers. changed: the outputs of the copy are none of these.
    """

    same: dict[Node, Node] = field(default_factory=dict)
    claims: dict[Node, Node] = field(default_factory=dict)
    aliases: dict[Node, Node] = field(default_factory=dict)
    changed: bool = False

    def of(self, node: Node) -> Node | None:
        """The original that a node of the copy stands for."""
        return self.same.get(node) or self.claims.get(node)

    def shown(self, node: Node) -> Node:
        """What a node of the copy has the value of, behind dims of size 1 and copies that lifting puts around it."""
        while self.of(node) is None and node.target in _AROUND:
            node = node.all_input_nodes[0]
        return node

    def behind(self, outputs: Iterable[Node]) -> list[Node]:
        """The claims that are computed from outputs of a program: they stay when it takes the outputs' place."""
        found: list[Node] = []
        seen: set[Node] = set()
        stack = list(outputs)
        while stack:
            node = stack.pop()
            if node in self.claims:
                found.append(node)
            elif node not in seen:
                seen.add(node)
                stack += [user for user in node.users if user not in self.same]
        return found

    def standing(self) -> dict[Node, Node]:
        """The node of the copy that is used in place of each captured one."""
        inputs = self.aliases | {old: new for new, old in self.same.items()}
        return inputs | {old: new for new, old in self.claims.items()}


def origins(original: GraphModule, copy: GraphModule, dropped: Iterable[int] = ()) -> Origins:
    """Compare a lifted copy with its captured graph. dropped: positions of outputs that the copy stores instead."""
    found = Origins()
    by_name = {n.name: n for n in original.graph.nodes}
    for node in copy.graph.nodes:
        replaced = _replaced(node)
        old = by_name.get(replaced or node.name)
        if old is None:
            continue
        skipped = frozenset(dropped) if node.op == "output" else frozenset[int]()
        aliases = None if replaced else _aliases(node, old, found, skipped)
        if aliases is not None:
            found.same[node] = old
            found.aliases |= aliases
        elif node.op == "output":
            found.changed = True
        else:
            found.claims[node] = old
    return found


def _aliases(node: Node, old: Node, found: Origins, skipped: frozenset[int]) -> dict[Node, Node] | None:
    """Which values of an original call were replaced in its copy by values known already; None for another call.

    skipped: positions of a graph's outputs that are not compared.
    """
    if (node.op, node.target) != (old.op, old.target):
        return None
    if _bare(node, skipped) != _bare(old, skipped):
        return None
    aliases: dict[Node, Node] = {}
    for new, given in zip(_nodes(node, skipped), _nodes(old, skipped), strict=True):
        if found.of(new) is given:
            continue
        shown = found.shown(new)
        known = found.of(shown) is not None or shown.op == "placeholder"
        if not known or {**found.aliases, **aliases}.get(given, new) is not new:
            return None
        aliases[given] = new
    return aliases


def _arguments(node: Node, skipped: frozenset[int]) -> Any:
    if not skipped:
        return node.args, node.kwargs
    returned: Any = node.args[0]
    return [x for i, x in enumerate(returned) if i not in skipped]


def _bare(node: Node, skipped: frozenset[int]) -> str:
    return str(map_arg(_arguments(node, skipped), lambda n: "%"))


def _nodes(node: Node, skipped: frozenset[int]) -> Iterator[Node]:
    found: list[Node] = []
    map_arg(_arguments(node, skipped), found.append)
    yield from found
