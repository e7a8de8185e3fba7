"""A model of Gated DeltaNet layers with the heads of Qwen3.5 and random weights, and a batch that decodes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, StaticCache

VOCABULARY = 2048
PROMPT = 4  # tokens
LONGEST = 256  # positions of the attention caches


def build(layers: int) -> Any:
    """The model, with the same weights at every call: 32 states of 128 x 128 a layer; every fourth layer attention.

    layers: 4 or more. transformers asks an attention layer for the length of the cache.
    """
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        layer_types=["full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)],
    )
    return remembering(Qwen3_5ForCausalLM(config).eval())


@torch.no_grad()
def remembering(model: Any) -> Any:
    """The model with decays of 0.53 to 0.999 a token: as they are drawn, it would forget everything at once."""
    for module in model.modules():
        if hasattr(module, "A_log"):
            rates = torch.logspace(-3, -0.2, module.A_log.numel())
            module.A_log.copy_(torch.log(rates / 0.25))
            module.dt_bias.fill_(float(torch.log(torch.expm1(torch.tensor(0.25)))))
    return model


class Decoder:
    """A model with its cache. Its sequences decode given tokens, so that two sides can be compared."""

    def __init__(self, model: Any, sequences: int) -> None:
        self.model = model
        self.sequences = sequences
        self.cache = StaticCache(config=model.config, max_cache_len=LONGEST)
        self.position = 0
        self._forward(torch.arange(PROMPT).expand(sequences, PROMPT))

    @property
    def state_bytes(self) -> int:
        """Of all matrix states."""
        layers = [layer for layer in self.cache.layers if hasattr(layer, "recurrent_states")]
        return sum(state.nbytes for layer in layers for state in layer.recurrent_states.values())

    def next_token(self, seed: int) -> tuple[Tensor]:
        """One token for each sequence, [sequences, 1]."""
        return (torch.randint(0, VOCABULARY, (self.sequences, 1), generator=torch.Generator().manual_seed(seed)),)

    def arguments(self, count: int = 1) -> dict[str, Any]:
        """What the model's forward takes besides the tokens."""
        positions = torch.arange(self.position, self.position + count).expand(self.sequences, count)
        return {"past_key_values": self.cache, "position_ids": positions, "use_cache": True}

    def step(self, seed: int) -> Tensor:
        """Decode one token of each sequence; logits [sequences, vocabulary]."""
        return self._forward(*self.next_token(seed))

    @torch.no_grad()
    def _forward(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens, **self.arguments(tokens.shape[1]))
        self.position += tokens.shape[1]
        return out.logits[:, -1]
