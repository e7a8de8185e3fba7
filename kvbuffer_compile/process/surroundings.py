"""What callers may have set around a call of ours, and how none of it reaches our arithmetic.

Whoever reads a state may be in autocast, in a functorch transform, under a tracer, with another default device; the
fold that the read causes must not be. What `neutral` keeps out:

    autocast, grad mode, tracing, dispatch modes, functorch, the Python dispatcher    by the thread's dispatch keys
    function modes (the default device is one) and subclasses of tensors              by switching both off

Inference mode stays: inside, both kinds of tensors can be written, and what is made for the caller is of the kind that
he expects. As compiled code, we count no tensor versions: that alone would forbid to write inference tensors outside.

What is set for a whole process cannot be changed for one thread. The precision of products is therefore asked for
where there is a product; the default dtype is met by naming dtypes; deterministic algorithms exist for all that we
call; denormals may be flushed, and threads may be many or few, with no more harm than rounding does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_Keys = torch._C._ForceDispatchKeyGuard
_Plain = torch._C.DisableTorchFunction
_precision = torch._C._get_fp32_precision_getter

# Backends choose where a new tensor is made; everything in front of them and of what a tensor itself carries is left.
_INCLUDED = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
_EXCLUDED = torch._C._dispatch_keyset_full() - torch._C._after_ADInplaceOrView_keyset
_EXACT = ("ieee", "none")


def neutral(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run in no surroundings but our own; 3 us a call.

    A decorator and not a context manager of ours: an interrupt within `__enter__` or `__exit__` would leave the caller
    in our surroundings, while those of these two have no bytecode that one could come at.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tracing: object = torch._C._get_tracing_state()
        if tracing is not None:  # of TorchScript: it notes lists of sizes before a call is dispatched
            return _untraced(tracing, run, *args, **kwargs)
        with _Keys(_INCLUDED, _EXCLUDED), _Plain():
            return function(*args, **kwargs)

    return run


def _untraced(tracing: object, call: Callable[..., T], *args: object, **kwargs: object) -> T:
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return call(*args, **kwargs)
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the precision of its dtype, whatever `torch.set_float32_matmul_precision` says.

    Products of float64 are never rounded to less; where that is slow, the memory is slower still.
    """
    if a.dtype is torch.float32 and _precision("cuda" if a.is_cuda else "mkldnn", "matmul") not in _EXACT:
        return (a.double() @ b.double()).float()
    return a @ b
