"""A few tokens through the engine, its pages and the states, before anybody's request: the logits must be the model's.

What an architecture does with the past is not known from its modules: some ignore a state when a prompt goes on from
it, some give attention another number than their layer has. One comparison of numbers finds all of that out, and the
decode steps are compiled by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

from kvbuffer_compile.errors import StateError

# Tokens of two requests in each batch: pieces of prompts, then one of each kind, then one token for both.
BATCHES = ((4, 3), (2, 1), (1, 1))
# Of the logits' own deviation. Rounding in bfloat16 is below 0.05 and a forgotten state above 0.3 in the models tried.
MOST = 0.15


class Trial:
    """What a model says of two short prompts alone. model: before the engine has changed its attention."""

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        self.name = type(model).__name__
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        lengths = [sum(pieces) for pieces in zip(*BATCHES, strict=True)]
        self.prompts = [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]
        inputs = [torch.tensor([prompt], device=model.device) for prompt in self.prompts]
        self.logits = [model._call_impl(input_ids=ids, use_cache=False).logits[0].float() for ids in inputs]

    @torch.no_grad()
    def check(self, model: Any, processor: Any, most: int) -> None:
        """StateError when served requests would have other logits than alone. model: as the engine has it; most:
        requests that it takes at a time."""
        count = min(len(self.prompts), most, processor.max_batch_tokens)
        whole = processor.max_batch_tokens >= max(map(sum, BATCHES))
        batches = BATCHES if whole else ((1, 1),) * 3
        requests = [
            RequestState(request_id=f"__trial_{n}__", initial_tokens=p) for n, p in enumerate(self.prompts[:count])
        ]
        try:
            for batch in batches:
                got = _run(model, processor, requests, batch[:count])
        finally:
            for request in requests:
                processor.cache.free_blocks(request.request_id)
        for request, seen, alone in zip(requests, got, self.logits, strict=False):
            want = alone[request.position_offset - 1]
            error = float((seen - want).square().mean().sqrt() / want.std().clamp(min=1e-12))
            if not error < MOST:
                raise StateError(
                    f"continuous batching: {self.name} gives other logits in the engine than alone (a difference of "
                    f"{error:.2f} of their deviation after {request.position_offset} tokens): it is not served"
                )


def _run(model: Any, processor: Any, requests: Sequence[Any], counts: Sequence[int]) -> list[Tensor]:
    """The next tokens of each request as one batch; the logits of the last of them."""
    batch = []
    for request, count in zip(requests, counts, strict=True):
        request._status = RequestStatus.PREFILLING  # by its property it would be timed
        done = request.position_offset
        request.tokens_to_process = request.initial_tokens[done : done + count]
        if not processor.cache.can_store_request_tokens(request, count):
            raise MemoryError("continuous batching: the engine's pages do not hold two requests of a few tokens")
        batch.append(FutureRequestState(request, has_new_token=True, complete_blocks={}, query_length=count))
    inputs = processor.inputs_and_outputs
    past = max(request.position_offset for request in requests)
    inputs.prepare_batch_tensors(batch, processor.logit_processor, False, sum(counts), past, use_padding=False)
    logits = model(**inputs.get_model_kwargs()).logits[0].float()
    ends = torch.tensor(counts).cumsum(0) - 1
    return list(logits[ends.to(logits.device)])
