"""Calls that no search finds: arguments of functions that are hard to please, what torch does not list as overridable
because it never asks the class of a tensor, and what cannot be called on a state at all, with the reason."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.callables import (
    HALF,
    ONE,
    STATE,
    YES,
    ZERO,
    Make,
    channels,
    constant,
    first,
    mask,
    matrix,
    same,
    vector,
)

MATRIX, BATCH, LAYERS, IMAGES = (4, 4), (2, 4, 4), (2, 2, 4, 4), (1, 2, 4, 4, 4)


def t(*sizes: int) -> Make:
    return lambda shape: same(sizes)


def i(*sizes: int) -> Make:
    return lambda shape: torch.zeros(sizes, dtype=torch.long)


NONE, TWO, NO, PAIR, ORIGIN = map(constant, (None, 2, False, (1, 1), (0, 0)))
RNN = (t(2, 4), lambda shape: [same((4, 4)), same((4, 4))], constant(False), ONE, ZERO, YES, constant(False), YES)


@dataclass(frozen=True)
class Given:
    """The shape of the state, and the arguments."""

    shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def on(shape: tuple[int, ...], *args: Any, **kwargs: Any) -> Given:
    return Given(shape, args, kwargs)


# By the name, or its last part without a closing underscore.
ARGUMENTS: dict[str, Given] = {
    "addbmm": on(MATRIX, STATE, t(2, 4, 4), t(2, 4, 4)),
    "addmv": on(MATRIX, t(4), STATE, t(4)),
    "affine_grid_generator": on(BATCH, lambda shape: same((2, 2, 3)), constant((2, 1, 4, 4)), YES),
    "as_strided": on(LAYERS, STATE, constant((2, 2)), constant((4, 1))),
    "as_strided_scatter": on(LAYERS, STATE, t(2, 2), constant((2, 2)), constant((4, 1))),
    "torch.nn.functional.batch_norm": on(LAYERS, STATE, channels, channels),
    "batch_norm": on(LAYERS, STATE, channels, channels, channels, channels, YES, HALF, HALF, NO),
    "bilinear": on(MATRIX, STATE, matrix, t(3, 4, 4), NONE),
    "clamp": on(LAYERS, STATE, ZERO, HALF),
    "clip": on(LAYERS, STATE, ZERO, HALF),
    "conv_tbc": on(BATCH, STATE, t(2, 4, 3), t(3)),
    "conv_transpose1d": on(BATCH, STATE, t(4, 3, 2)),
    "convolution": on(LAYERS, STATE, t(3, 2, 2, 2), NONE, PAIR, ORIGIN, PAIR, NO, ORIGIN, ONE),
    "cosine_embedding_loss": on(MATRIX, STATE, matrix, t(4)),
    "ctc_loss": on(BATCH, STATE, lambda shape: torch.ones(4, 1).long(), lambda shape: torch.full((4,), 2), i(4)),
    "torch.nn.functional.embedding": on(MATRIX, first, STATE),
    "embedding": on(MATRIX, STATE, first),
    "torch.nn.functional.embedding_bag": on(MATRIX, first, STATE, i(1)),
    "embedding_bag": on(MATRIX, STATE, first, i(1)),
    "fold": on(BATCH, STATE, constant((3, 3)), constant((2, 2))),
    "grid_sample": on(LAYERS, STATE, t(2, 3, 3, 2)),
    "grid_sampler": on(LAYERS, STATE, t(2, 3, 3, 2), ZERO, ZERO, YES),
    "grid_sampler_2d": on(LAYERS, STATE, t(2, 3, 3, 2), ZERO, ZERO, YES),
    "grid_sampler_3d": on(IMAGES, STATE, t(1, 3, 3, 3, 3), ZERO, ZERO, YES),
    "gru_cell": on(MATRIX, STATE, matrix, t(12, 4), t(12, 4)),
    "householder_product": on(MATRIX, STATE, vector),
    "index_put": on(LAYERS, STATE, lambda shape: (first(shape),), constant(torch.tensor(0.5))),
    "torch.nn.functional.instance_norm": on(LAYERS, STATE, channels, channels),
    "instance_norm": on(LAYERS, STATE, channels, channels, channels, channels, YES, HALF, HALF, NO),
    "interpolate": on(LAYERS, STATE, TWO),
    "linear_cross_entropy": on(MATRIX, STATE, matrix, i(4)),
    "lstm_cell": on(MATRIX, STATE, lambda shape: (matrix(shape), matrix(shape)), t(16, 4), t(16, 4)),
    "torch.linalg.lu_solve": on(MATRIX, STATE, lambda shape: torch.tensor([1, 2, 3, 4], dtype=torch.int32), matrix),
    "lu_solve": on(MATRIX, STATE, matrix, lambda shape: torch.tensor([1, 2, 3, 4], dtype=torch.int32)),
    "lu_unpack": on(MATRIX, STATE, lambda shape: torch.tensor([1, 2, 3, 4], dtype=torch.int32)),
    "max_unpool1d": on(BATCH, STATE, lambda shape: torch.arange(4).expand(shape) * 2, TWO),
    "moveaxis": on(LAYERS, STATE, ZERO, ONE),
    "movedim": on(LAYERS, STATE, ZERO, ONE),
    "narrow": on(LAYERS, STATE, ZERO, ZERO, ONE),
    "native_group_norm": on(LAYERS, STATE, channels, channels, TWO, TWO, constant(16), ONE, HALF),
    "native_layer_norm": on(LAYERS, STATE, constant((4,)), NONE, NONE, HALF),
    "nonzero_static": on(LAYERS, STATE, size=TWO),
    "ormqr": on(MATRIX, STATE, vector, matrix),
    "permute": on(LAYERS, STATE, constant((3, 1, 0, 2))),
    "poisson_nll_loss": on(LAYERS, STATE, same, YES, YES, HALF, ONE),
    "polygamma": on(LAYERS, ONE, STATE),
    "torch.Tensor.polygamma": on(LAYERS, STATE, ONE),
    "torch.Tensor.polygamma_": on(LAYERS, STATE, ONE),
    "put": on(LAYERS, STATE, first, t(2)),
    "repeat_interleave": on(LAYERS, STATE, TWO),
    "rnn_relu": on(BATCH, STATE, lambda shape: same((1, 2, 4)), *RNN[1:]),
    "rnn_tanh": on(BATCH, STATE, lambda shape: same((1, 2, 4)), *RNN[1:]),
    "scatter": on(LAYERS, STATE, ZERO, i(1, 2, 4, 4), same),
    "scatter_add": on(LAYERS, STATE, ZERO, i(1, 2, 4, 4), same),
    "scatter_reduce": on(LAYERS, STATE, ZERO, i(1, 2, 4, 4), same, constant("amax")),
    "segment_reduce": on(MATRIX, STATE, constant("sum"), lengths=lambda shape: torch.tensor([1, 3])),
    "select_scatter": on(LAYERS, STATE, t(2, 4, 4), ZERO, ONE),
    "slice_scatter": on(LAYERS, STATE, same),
    "solve_triangular": on(MATRIX, STATE, matrix, upper=YES),
    "split_with_sizes": on(LAYERS, STATE, constant((1, 1))),
    "stft": on(MATRIX, STATE, constant(4), return_complex=YES),
    "unfold": on(LAYERS, STATE, TWO, TWO, ONE),
    "unfold_copy": on(LAYERS, STATE, TWO, TWO, ONE),
    "unflatten": on(LAYERS, STATE, ZERO, constant((1, 2))),
    "view_as_complex": on((2, 4, 4), lambda shape: same((4, 2))),
    "where": on(LAYERS, mask, STATE, same),
    "torch.Tensor.where": on(LAYERS, STATE, mask, same),
    "__deepcopy__": on(LAYERS, STATE, lambda shape: {}),
    "__format__": on(LAYERS, STATE, constant("")),
    "apply": on(LAYERS, STATE, lambda shape: lambda x: x + 1),
    "map": on(LAYERS, STATE, same, lambda shape: lambda x, y: x + y),
    "map2": on(LAYERS, STATE, same, same, lambda shape: lambda x, y, z: x + y),
}

# Names (of which a part matches) of what takes no state, by the reason.
NEVER = {
    "whole numbers only": "bincount|bitwise|gcd|lcm|one_hot|unravel_index|__invert__|__r?(and|or|xor|[lr]shift)__|"
    "__i(and|or|xor|[lr]shift)__|dequantize_per|nested_tensor_",
    "one element only": r"item$|is_nonzero|__(float|int|long|complex|bool|index|nonzero)__|local_scalar",
    "vectors only": r"\.(dot|vdot|outer|ger|cartesian_prod|combinations|meshgrid|repeat_interleave_)$|frobenius_norm$",
    "complex, sparse or quantised only": "imag|view_as_real|view_as_complex|istft|hspmm|sspaddmm|smm|crow_indices|"
    "col_indices|row_indices|[._]indices|[._]values|_nnz|_dim[IV]|coalesce|sparse_mask|sparse_resize|as_sparse|"
    "_to_dense|int_repr|q_per_channel|q_scale|q_zero|qscheme|quantize|quantized|qparams|conj_copy|fbgemm|prune|"
    "_make_dep|linear_prepack|_sparse_broadcast",
    "symbols, not tensors": r"sym_|_sym",
    "other devices and processes": "cudnn|miopen|mkldnn|cuda|xpu|ipu|mtia|hpu|distributed|sync|broadcast$|"
    "all_reduce|^reduce$|all_gather|^gather$|^scatter$|reduce_scatter|all_to_all|isend|irecv|^send$|^recv$|"
    "record_stream|pin_memory|register|backward|retain_grad|autocast",
    "a module's internals": "multi_head_attention_forward|batch_norm_(elemt|gather|stats)|fake_quant|"
    "^torch.(gru|lstm)$|native_norm|tensorinv|_fused_rms_norm|ldl_solve|_fw_primal|_make_dual|fractional_max_pool|"
    "lp_pool1d|affine_grid|conv_tbc$",
    "a dim of 3 only": r"cross$",
    "no use of a tensor's values, or another tensor's": "__array_wrap__|__setstate__|float_power_$|Tensor.resize$",
}


# ------------------------------------------------------------------ what torch does not list as overridable


def _through(alias: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A copy made through an alias."""
    return lambda s: alias(s).clone()


def _set(s: Tensor) -> Tensor:
    return torch.empty(0).set_(s)  # type: ignore[call-overload,no-any-return]


def _data(s: Tensor) -> Tensor:
    x = torch.empty(0)
    x.data = s
    return x


def _swapped(s: Tensor) -> Tensor:
    """What was in the state is in another tensor now."""
    x = torch.zeros_like(s)
    torch.utils.swap_tensors(x, s)
    return x


def _saved(s: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save({"state": [s]}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _norm(s: Tensor) -> Tensor:
    return (s * s).sum() / 2


def _twice(x: Tensor) -> Tensor:
    return x * 2


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


def _traced(s: Tensor) -> Tensor:
    return torch.jit.trace(_twice, torch.zeros_like(s))(s)  # type: ignore[no-any-return]


def _mapped(s: Tensor) -> Tensor:
    return torch._higher_order_ops.map(_twice, s)  # type: ignore[attr-defined,no-any-return]


def _looped(s: Tensor) -> Tensor:
    start = torch.tensor(0)
    return torch._higher_order_ops.while_loop(lambda i, x: i < 1, lambda i, x: (i + 1, x * 2), (start, s))[1]  # type: ignore[attr-defined,no-any-return]


_SCRIPT = "def twice(x):\n    return x * 2\ndef of_list(x: List[Tensor]):\n    return torch.stack(x)\n"
scripted = torch.jit.CompilationUnit(_SCRIPT)
_cells = [torch.nn.Linear(4, 3), torch.nn.LayerNorm(4), torch.nn.LSTM(4, 3), torch.nn.MultiheadAttention(4, 2)]
LINEAR, NORM, LSTM, ATTENTION = (c.requires_grad_(False) for c in _cells)

BY_HAND: dict[str, Callable[[Tensor], Any]] = {
    # constructors
    "torch.tensor": torch.tensor,
    "torch.tensor(list)": lambda s: torch.tensor(list(s[0, 0, 0])),
    "Tensor.new_tensor": lambda s: s.new_tensor(s),
    "Tensor.new_tensor of another": lambda s: torch.zeros(1).new_tensor(s),
    "Tensor.new": lambda s: torch.zeros(1).new(s),
    "torch.Tensor": torch.Tensor,
    "torch.FloatTensor": torch.FloatTensor,
    "torch.as_tensor": torch.as_tensor,
    "torch.as_tensor(dtype=)": lambda s: torch.as_tensor(s, dtype=torch.float64),
    "torch.asarray": torch.asarray,
    "torch.asarray(copy=)": lambda s: torch.asarray(s, copy=True),
    "torch.asarray(dtype=)": lambda s: torch.asarray(s, dtype=torch.float64),
    "torch.sparse_coo_tensor": lambda s: torch.sparse_coo_tensor(torch.arange(len(s))[None], s).to_dense(),
    "torch.sparse_csr_tensor": lambda s: torch.sparse_csr_tensor([0, 4], [0, 1, 2, 3], s[0, 0, 0]).to_dense(),
    "torch.nested.nested_tensor": lambda s: torch.nested.nested_tensor([s]).to_padded_tensor(0.0)[0],
    "torch.nested.as_nested_tensor": lambda s: torch.nested.as_nested_tensor([s]).to_padded_tensor(0.0)[0],
    "torch.nn.Parameter": lambda s: torch.nn.Parameter(s, requires_grad=False),
    "torch.nn.Buffer": torch.nn.Buffer,
    "Tensor.as_subclass": lambda s: s.as_subclass(Tensor),
    "Tensor._make_subclass": lambda s: Tensor._make_subclass(Tensor, s),  # type: ignore[attr-defined]
    "torch.autograd.Variable": torch.autograd.Variable,
    "torch.masked.masked_tensor": lambda s: torch.masked.masked_tensor(s, s > 0.5).to_tensor(0.0),
    "torch.distributions.Normal": lambda s: torch.distributions.Normal(s, 1.0).log_prob(torch.tensor(0.5)),
    "torch.Size": lambda s: torch.Size([int(s.sum())]),
    # memory
    "Tensor.set_": _through(_set),
    "Tensor.set_ held": _set,
    "Tensor.data.__set__": _through(_data),
    "Tensor.data.__set__ held": _data,
    "torch.utils.swap_tensors": _swapped,
    "torch.utils.dlpack.to_dlpack": lambda s: torch.from_dlpack(torch.utils.dlpack.to_dlpack(s)),
    "torch.utils.dlpack.from_dlpack": torch.utils.dlpack.from_dlpack,
    "numpy.from_dlpack": np.from_dlpack,
    "numpy.asarray": np.asarray,
    "numpy.array": np.array,
    "numpy.add": lambda s: np.add(s, 1),
    "Tensor.numpy(force=)": lambda s: s.numpy(force=True),
    "Tensor.untyped_storage": lambda s: bytes(s.untyped_storage()),
    "Tensor.storage": lambda s: list(s.storage()),
    "Tensor.data_ptr": lambda s: _floats(s.data_ptr(), s.numel()),
    "multiprocessing.reduction": lambda s: _sent(s),
    # copies
    "copy.copy": copy.copy,
    "copy.deepcopy": lambda s: copy.deepcopy({"state": [s]})["state"][0],
    "pickle": lambda s: pickle.loads(pickle.dumps((s, s)))[0],
    "torch.save": _saved,
    "repr": repr,
    "str": str,
    "format": lambda s: f"{s}",
    "format of one": lambda s: f"{s[0, 0, 0, 0]:.3f}",
    "list": lambda s: torch.stack(list(s)),
    "iter": lambda s: torch.stack([x for x in iter(s)]),
    "reversed": lambda s: torch.stack(list(reversed(s))),
    "in": lambda s: 0.5625 in s,
    "len": len,
    "max": lambda s: max(s[0, 0, 0]),
    "sum": lambda s: sum(s),
    "bool": lambda s: bool(s.flatten()[0] > 0.5),
    "float": lambda s: float(s[0, 0, 0, 0]),
    "int": lambda s: int(s[0, 0, 0, 0] * 16),
    "torch.compiler.disable": lambda s: torch.compiler.disable(_twice)(s),
    "pytree": lambda s: torch.utils._pytree.tree_map(_twice, {"a": [s]}),
    "default_collate": lambda s: torch.utils.data.default_collate([s, s]),
    "torch.testing.assert_close": lambda s: torch.testing.assert_close(s, s + 0),
    # transforms
    "torch.func.vmap": lambda s: torch.func.vmap(_twice)(s),
    "torch.func.grad": lambda s: torch.func.grad(_norm)(s),
    "torch.func.grad_and_value": lambda s: torch.func.grad_and_value(_norm)(s),
    "torch.func.vjp": lambda s: torch.func.vjp(_twice, s)[0],
    "torch.func.jvp": lambda s: torch.func.jvp(_norm, (s,), (s,)),
    "torch.func.jacrev": lambda s: torch.func.jacrev(_norm)(s),
    "torch.func.jacfwd": lambda s: torch.func.jacfwd(_norm)(s),
    "torch.func.hessian": lambda s: torch.func.hessian(lambda x: (x * x * x).sum())(s),
    "torch.func.linearize": lambda s: torch.func.linearize(_norm, s)[0],
    "torch.func.functionalize": lambda s: torch.func.functionalize(_twice)(s),
    "torch.func.functional_call": lambda s: torch.func.functional_call(LINEAR, {"weight": s[0, 0, :3]}, same((2, 4))),
    "torch.autograd.functional.vjp": lambda s: torch.autograd.functional.vjp(_norm, s),
    "torch.autograd.functional.jacobian": lambda s: torch.autograd.functional.jacobian(_norm, s),
    "torch.autograd.Function": _Double.apply,
    "torch.autograd.forward_ad": lambda s: _dual(s),
    "torch.utils.checkpoint": lambda s: torch.utils.checkpoint.checkpoint(_twice, s, use_reentrant=False),
    "torch.jit.trace": _traced,
    "torch.jit.script": lambda s: scripted.twice(s),
    "torch.jit.script(list)": lambda s: scripted.of_list([s, s]),
    "torch.jit.fork": lambda s: torch.jit.wait(torch.jit.fork(_twice, s)),
    "torch.cond": lambda s: torch.cond(torch.tensor(True), _twice, torch.neg, (s,)),
    "map": _mapped,
    "while_loop": _looped,
    "torch.fx.symbolic_trace": lambda s: torch.fx.symbolic_trace(_twice)(s),
    "make_fx": lambda s: _made_fx(s),
    # modules and lists
    "nn.Linear": lambda s: LINEAR(s),
    "nn.LayerNorm": lambda s: NORM(s),
    "nn.LSTM": lambda s: LSTM(s[0])[0],
    "nn.MultiheadAttention": lambda s: ATTENTION(s[0], s[0], s[0])[0],
    "scaled_dot_product_attention": lambda s: torch.nn.functional.scaled_dot_product_attention(
        query=same(s.shape), key=s, value=same(s.shape)
    ),
    "einsum(list)": lambda s: torch.einsum("abij,abjk->abik", [s, s]),
    "torch._foreach_add": lambda s: torch._foreach_add([s, s], 1),
    "torch._foreach_mul_": lambda s: torch._foreach_mul_([s], 2),
    "torch.nn.utils.parameters_to_vector": lambda s: torch.nn.utils.parameters_to_vector([s]),
    "torch.nn.utils.get_total_norm": lambda s: torch.nn.utils.get_total_norm([s]),
    "pad_sequence": lambda s: torch.nn.utils.rnn.pad_sequence([s, s]),
    "pack_padded_sequence": lambda s: torch.nn.utils.rnn.pack_padded_sequence(s[0], torch.tensor([2, 2, 2, 2])).data,
    "torch.linspace": lambda s: torch.linspace(s[0, 0, 0, 0], 1, 3),
    "torch.full": lambda s: torch.full((2,), s[0, 0, 0, 0]),
    "torch.full_like": lambda s: torch.full_like(torch.empty(2), s[0, 0, 0, 0]),
    "torch.normal": lambda s: torch.normal(s, 1.0),
    "torch.result_type": lambda s: torch.result_type(s, 1),
    "Tensor.__setitem__ value": lambda s: torch.zeros_like(s).__setitem__((), s),
    "index": lambda s: torch.arange(4.0)[(s[0, 0, 0] > 0.5)],
    "slice": lambda s: torch.arange(4.0)[int(s[0, 0, 0, 0]) :],
}


def _floats(address: int, count: int) -> list[float]:
    import ctypes

    return list((ctypes.c_float * count).from_address(address))


def _sent(s: Tensor) -> Any:
    """To another process and back, without the other process."""
    from multiprocessing.reduction import ForkingPickler

    return pickle.loads(bytes(ForkingPickler.dumps(s)))


def _dual(s: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, s)
        return torch.autograd.forward_ad.unpack_dual(dual * 2)


def _made_fx(s: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(_twice)(s)(s)
