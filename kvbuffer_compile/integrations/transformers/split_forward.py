"""One forward call of a transformers model as two: what comes first as it is, the last tokens as a verify step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils.generic import ModelOutput

from kvbuffer_compile.errors import StateError

# Arguments with one entry for each token in their last dim, and what has one for each token so far.
PER_TOKEN = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
SO_FAR = "attention_mask"
EMBEDDINGS = "inputs_embeds"  # [B, T, hidden]


def token_count(inputs: dict[str, Any]) -> int:
    """How many tokens a call has."""
    return int(_tokens(inputs).shape[1])


def token_batch(inputs: dict[str, Any]) -> int:
    """How many sequences a call has."""
    return int(_tokens(inputs).shape[0])


def _tokens(inputs: dict[str, Any]) -> Tensor:
    found = inputs[EMBEDDINGS] if inputs.get("input_ids") is None else inputs["input_ids"]
    assert isinstance(found, Tensor)
    return found


def twice(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call on one token for two of them."""
    return followed_by(inputs, inputs) | _masked(inputs, inputs)


def followed_by(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call that does what two do; those that are not of a token each are the second's."""
    dims = {**dict.fromkeys(PER_TOKEN, -1), EMBEDDINGS: 1}
    both = {name: dim for name, dim in dims.items() if isinstance(then.get(name), Tensor) and name in first}
    return then | {name: torch.cat([first[name], then[name]], dim) for name, dim in both.items()}


def _masked(first: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    mask = then.get(SO_FAR)
    return {SO_FAR: torch.cat([first[SO_FAR], mask], -1)} if isinstance(mask, Tensor) and mask.dim() == 2 else {}


def split(inputs: dict[str, Any], tail: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of two calls that together do what one does, the second with the last `tail` tokens.

    Slices are copied: one graph does not serve tensors with and without a storage offset.
    """
    first, last = dict(inputs), dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if name in PER_TOKEN:
            first[name], last[name] = value[..., :-tail], value[..., -tail:].clone()
        elif name == EMBEDDINGS:
            first[name], last[name] = value[:, :-tail], value[:, -tail:].clone()
        elif name == SO_FAR and value.dim() == 2:
            first[name] = value[:, :-tail]
        elif name != "logits_to_keep":
            reason = "speculation: the prompt of a first call is split, and the argument {} cannot be: leave it out"
            raise StateError(reason.format(repr(name)))
    if inputs.get("logits_to_keep"):
        first["logits_to_keep"] = max(1, inputs["logits_to_keep"] - tail)
    return first, last


def joined(first: Any, last: Any) -> Any:
    """The outputs of both calls as one call gives them; what is of neither kind here is the second's."""
    for name in ("logits", "hidden_states", "attentions"):
        if isinstance(last.get(name), Tensor):
            last[name] = torch.cat([first[name], last[name]], 1)
        elif isinstance(last.get(name), tuple):
            before, after = first[name], last[name]
            last[name] = tuple(_joined_layer(b, a) for b, a in zip(before, after, strict=True))
    return last


def _joined_layer(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Hidden states [B, T, hidden] of a layer, or its attention [B, heads, T, tokens so far]."""
    if before is None or after is None:
        return after
    return torch.cat([F.pad(before, (0, after.shape[-1] - before.shape[-1])), after], -2)


def first_token(out: Any) -> Any:
    """What a call gives of its first token alone."""
    return _of_tokens(out, slice(0, 1), 1)


def last_tokens(out: Any, count: int) -> Any:
    """What a call gives of its last tokens alone."""
    return _of_tokens(out, slice(-count, None), None)


def _of_tokens(out: Any, kept: slice, seen: int | None) -> Any:
    """seen: how many tokens the attention of those kept is over, None for all."""
    out["logits"] = out["logits"][:, kept]
    for name, width in (("hidden_states", None), ("attentions", seen)):
        if isinstance(out.get(name), Tensor):
            out[name] = out[name][:, kept]
        elif isinstance(out.get(name), tuple):
            out[name] = tuple(None if x is None else x[..., kept, :width] for x in out[name])
    return out


def keep_logits(out: Any, count: int) -> Any:
    """Only the last logits, as `logits_to_keep` asks; 0 keeps all."""
    if isinstance(out, ModelOutput) and count:
        out["logits"] = out["logits"][:, -count:]
    return out


def mark_sizes(inputs: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """The inputs of a step prepared so that one graph serves every number of tokens above one, and every past."""
    inputs = {name: _packed(value) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    for name in (*PER_TOKEN, SO_FAR):
        if isinstance(inputs.get(name), Tensor):
            torch._dynamo.maybe_mark_dynamic(inputs[name], inputs[name].dim() - 1)
    if isinstance(inputs.get(EMBEDDINGS), Tensor):
        torch._dynamo.maybe_mark_dynamic(inputs[EMBEDDINGS], 1)
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys, layer.values = _packed(layer.keys), _packed(layer.values)  # type: ignore[arg-type]
            torch._dynamo.maybe_mark_dynamic(layer.keys, 2)
            torch._dynamo.maybe_mark_dynamic(layer.values, 2)
    return inputs


def _packed(x: Tensor) -> Tensor:
    """x without gaps: a cropped tensor has the strides of the longer one, and would be another graph's."""
    strides, size = [1] * x.dim(), 1
    for dim in reversed(range(x.dim())):
        strides[dim] = size
        size *= x.shape[dim]
    return x if x.stride() == tuple(strides) else x.clone(memory_format=torch.contiguous_format)
