"""State tensors that cannot be read stale: any access from Python folds the owed rows in first.

A state keeps its identity and storage; only its Python class changes, to `GuardedState`, whose `__torch_function__` is
called for every eager operation that touches it or a view made of it, however it is passed. Compiled graphs are not
traced through it: they settle, or take the rows along, when they are entered (runtime/entry.py). What is done at an
access is decided in runtime/access.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from kvbuffer_compile.guard import dispatch_watch

plain_calls = torch._C.DisableTorchFunctionSubclass  # inside it a GuardedState is an ordinary tensor

# What tells about a tensor without looking at its values.
_METADATA_PROPERTIES = (
    "shape dtype device ndim layout requires_grad is_leaf grad_fn _version nbytes is_sparse is_quantized _base names "
    "grad is_meta is_cpu is_cuda retains_grad itemsize output_nr is_mkldnn is_nested is_sparse_csr is_mps is_xpu"
)
_METADATA_METHODS = (
    "size dim stride numel is_contiguous element_size storage_offset nelement is_floating_point __len__ __hash__ "
    "is_complex _is_view is_inference ndimension get_device is_shared is_pinned is_conj is_neg is_signed dim_order "
    "is_coalesced is_same_size has_names"
)
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, n).__get__ for n in _METADATA_PROPERTIES.split() if hasattr(Tensor, n)]
    + [getattr(Tensor, n) for n in _METADATA_METHODS.split() if hasattr(Tensor, n)]
)
# What hands out the memory itself, where no later access can be seen.
_EXPORTS: frozenset[Any] = frozenset(
    [getattr(Tensor, n) for n in "data_ptr share_memory_ storage untyped_storage _typed_storage __dlpack__".split()]
    + [getattr(Tensor, "__cuda_array_interface__").__get__]  # noqa: B009  (a property: it must not be asked)
)

Access = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
_accessed: Access = lambda func, args, kwargs: func(*args, **kwargs)  # noqa: E731  (set by runtime)
S = TypeVar("S", bound=Tensor)
_settle: Callable[[Tensor, bool], None] = lambda state, exposed: None  # noqa: E731


def on_access(accessed: Access, settle: Callable[[Tensor, bool], None]) -> None:
    """Register who makes an operation on guarded tensors safe: accessed(func, args, kwargs) runs it and gives its
    result; settle(state, exposed) is for what is no torch function. Both are called with plain_calls in force."""
    global _accessed, _settle
    _accessed, _settle = accessed, settle


class _Thread(threading.local):
    inspecting = 0


_thread = _Thread()


@contextmanager
def inspecting() -> Iterator[None]:
    """While this thread compiles: what torch asks of states then is about their shapes, not their values."""
    _thread.inspecting += 1
    try:
        yield
    finally:
        _thread.inspecting -= 1


def is_inspecting() -> bool:
    """Whether this thread compiles."""
    return bool(_thread.inspecting)


def is_export(func: Any) -> bool:
    """Whether a torch function hands out memory, so that later accesses cannot be seen."""
    return func in _EXPORTS


class GuardedState(Tensor):
    """A state tensor whose owed rows are folded in before anyone sees or changes its values."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with plain_calls():
            if func in _METADATA or _thread.inspecting:
                return func(*args, **kwargs)
            return _accessed(_OWN.get(func, func), args, kwargs)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind(0))  # Tensor.__iter__ would hand out views that are not guarded

    def __format__(self, spec: str) -> str:
        with plain_calls():
            return str(self._settled().__format__(spec))  # which numbers are formatted goes by the exact class

    def as_subclass(self, cls: type[S]) -> S:
        """A tensor of another class on the same memory: not seen from here on."""
        with plain_calls():
            _settle(self, True)
            return Tensor.as_subclass(self, cls)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            with plain_calls(), torch.no_grad():
                plain = self._settled()
                copy = plain.__deepcopy__(memo)  # by its storage: what shares memory shares it in the copy
                memo.pop(id(plain), None)  # gone with this call, and its id may be another's then
            memo[id(self)] = copy
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, proto: Any) -> Any:
        with plain_calls():
            return self._settled().__reduce_ex__(proto)

    def _settled(self) -> Tensor:
        """An ordinary tensor on the same memory, which holds the true values of everything that lies there."""
        _settle(self, False)
        plain = Tensor.as_subclass(self, Tensor)
        plain.__dict__.update(self.__dict__)
        return plain


# Of torch's own functions, those that ask for the exact class.
_OWN = {getattr(Tensor, n): getattr(GuardedState, n) for n in ("__deepcopy__", "__reduce_ex__", "__format__")}


def _reduce_shared(state: GuardedState) -> Any:
    """As multiprocessing sends a tensor: in shared memory, which the other process reads at any time."""
    with plain_calls():
        _settle(state, True)
        return reduce_tensor(Tensor.as_subclass(state, Tensor))


ForkingPickler.register(GuardedState, _reduce_shared)


def guard(owner: Tensor) -> bool:
    """Make every later access to this tensor settle first. False for a class of tensors where that cannot be done."""
    if type(owner) in (Tensor, torch.nn.Buffer):
        owner.__class__ = GuardedState
    if type(owner) is not GuardedState:
        return False
    dispatch_watch.mark(owner)  # again, if need be: `state.data = x` takes the keys of x
    return True


def may_be_state(x: object) -> bool:
    """Whether an input of a graph may become a guarded state."""
    return (
        isinstance(x, Tensor)
        and not isinstance(x, torch.nn.Parameter)
        and x.layout is torch.strided
        and x.dtype.is_floating_point
    )


def states_in(x: Any) -> Iterator[GuardedState]:
    """Every guarded tensor in the arguments of a call."""
    if isinstance(x, GuardedState):
        yield x
    elif isinstance(x, list | tuple | set | frozenset):
        for y in x:
            yield from states_in(y)
    elif isinstance(x, dict):
        yield from states_in(list(x.values()))
