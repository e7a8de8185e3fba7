"""State tensors that cannot be read stale: any access outside a rewritten graph folds the owed rows in first.

A state keeps its identity and storage; only its Python class changes, to `GuardedState`. Its `__torch_function__` is
called for every eager operation that touches it or a view made of it. While Dynamo traces, it leaves a
`state.copy_(kvbuffer::materialized(state))` in the graph instead: our backend erases it (our runtime knows what is
owed), any other backend executes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]  # whether two tensors share a storage
plain_calls = torch._C.DisableTorchFunctionSubclass  # inside it a GuardedState is an ordinary tensor

# What tells about a tensor without looking at its values.
_METADATA_PROPERTIES = (
    "shape dtype device ndim layout requires_grad is_leaf grad_fn _version nbytes is_sparse is_quantized _base names "
    "grad is_meta is_cpu is_cuda retains_grad itemsize"
)
_METADATA_METHODS = (
    "size dim stride numel is_contiguous element_size storage_offset nelement is_floating_point __len__ __hash__ "
    "is_complex _is_view is_inference ndimension get_device"
)
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, n).__get__ for n in _METADATA_PROPERTIES.split() if hasattr(Tensor, n)]
    + [getattr(Tensor, n) for n in _METADATA_METHODS.split() if hasattr(Tensor, n)]
)
# What replaces every element of its first argument: owed rows are dropped, not folded in.
_OVERWRITES: frozenset[Any] = frozenset([Tensor.zero_, Tensor.fill_, Tensor.copy_, torch.zero_, torch.fill_])
_ZEROES: frozenset[Any] = frozenset([Tensor.zero_, torch.zero_])
_FILLS: frozenset[Any] = frozenset([Tensor.fill_, torch.fill_])
# What hands out the memory itself, where no later access can be seen.
_EXPORTS: frozenset[Any] = frozenset([Tensor.__dlpack__, Tensor.storage, Tensor.untyped_storage])

_Touch = Callable[[Tensor, bool, bool, bool], list[Callable[[], None]]]
_on_touch: _Touch = lambda tensor, overwritten, exposed, zeros: []  # noqa: E731  (set by runtime)


def on_touch(callback: _Touch) -> None:
    """Register who is told of an access: callback(tensor, overwritten, exposed, zeros), called before it happens.

    It returns what to call when the access has succeeded.
    """
    global _on_touch
    _on_touch = callback


def _materialized(state: Tensor) -> Tensor:
    with plain_calls():
        _on_touch(state, False, False, False)
        return state.clone()


# Functional on purpose: an op that claims to write its argument is given a copy by functionalisation, and would settle
# that copy instead of the state.
_LIBRARY = torch.library.Library("kvbuffer", "FRAGMENT")
_LIBRARY.define("materialized(Tensor state) -> Tensor")
_LIBRARY.impl("materialized", _materialized, "CompositeExplicitAutograd")
torch.library.register_fake("kvbuffer::materialized", torch.empty_like, lib=_LIBRARY)
MARKER = torch.ops.kvbuffer.materialized.default


def erase_markers(gm: GraphModule) -> None:
    """Remove the markers of a captured graph: our runtime settles what a graph reads by itself."""
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function" and node.target is MARKER:
            for user in list(node.users):
                user.replace_all_uses_with(user.args[0])  # the copy_ returns the state
                gm.graph.erase_node(user)
            gm.graph.erase_node(node)
    gm.recompile()


class GuardedState(Tensor):
    """A state tensor whose owed rows are folded in before anyone sees or changes its values."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            with plain_calls():
                # False when AOT or fake-tensor code runs us for real: a marker there breaks its conversion
                if torch.compiler.is_dynamo_compiling() and func not in _METADATA:
                    for a in args:
                        if isinstance(a, GuardedState):
                            a.copy_(MARKER(a))
                return func(*args, **kwargs)
        with plain_calls():
            if func in _METADATA:
                return func(*args, **kwargs)
            states = list(_states((args, kwargs)))
            overwritten = func in _OVERWRITES and len(states) == 1 and states[0] is args[0]
            zeros = overwritten and _writes_zeros(func, args, kwargs)
            later = [call for t in states for call in _on_touch(t, overwritten, func in _EXPORTS, zeros)]
            out = func(*args, **kwargs)
            for call in later:
                call()
            _guard_views(out, states)
            return out

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))  # Tensor.__iter__ would hand out views that are not guarded

    def __format__(self, spec: str) -> str:
        with plain_calls():
            _on_touch(self, False, False, False)
            return str(self.as_subclass(Tensor).__format__(spec))  # which numbers are formatted goes by the exact class

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with plain_calls():
                _on_touch(self, False, False, False)
                copy = self.as_subclass(Tensor).clone()
                copy.__dict__.update(self.__dict__)
            memo[id(self)] = copy
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, proto: Any) -> Any:
        with plain_calls():
            _on_touch(self, False, False, False)
            return self.as_subclass(Tensor).__reduce_ex__(proto)


def _writes_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether what overwrites a state is known to be zero without looking at it."""
    value = args[1] if len(args) > 1 else kwargs.get("value")
    return func in _ZEROES or (func in _FILLS and isinstance(value, int | float) and value == 0)


def _guard_views(out: Any, states: list[GuardedState]) -> None:
    """A view may be held and read after later steps. Views by their storage: detach() and inference mode make some
    that autograd does not count as views."""
    if type(out) is Tensor:
        if out.layout is torch.strided and any(_alias_of(out, s) for s in states):
            out.__class__ = GuardedState
    elif isinstance(out, list | tuple):
        for x in out:
            _guard_views(x, states)


def _states(x: Any) -> Iterator[GuardedState]:
    if isinstance(x, GuardedState):
        yield x
    elif isinstance(x, list | tuple):
        for y in x:
            yield from _states(y)
    elif isinstance(x, dict):
        yield from _states(list(x.values()))
