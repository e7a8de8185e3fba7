"""Measure a small byte-level Qwen3.5 model on held-out text: loss, decays of its heads, greedy completions.

python examples/measure_tiny_lm.py                                      # the committed target model
python examples/measure_tiny_lm.py examples/checkpoints/tiny_draft      # or any other checkpoint
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from byte_text import decode, encode
from rich.console import Console
from rich.table import Table
from stdlib_text import Corpus, read_corpus
from torch import Tensor
from transformers import GenerationConfig, Qwen3_5ForCausalLM
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.utils import logging as transformers_logging

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
SHORT_CONTEXT, LONG_CONTEXT = 256, 1024  # bytes
WINDOWS_AT_ONCE = 8
PROMPTS = ("    for i in range(", "def __init__(self, ", "try:\n    import ", "class Error(")


def next_byte_loss(model: Qwen3_5ForCausalLM, block: Tensor) -> Tensor:
    """Return the mean loss, in nats per byte, of predicting block[:, 1:]; `block` is (batch, bytes)."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=block[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), block[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Qwen3_5ForCausalLM, text: Tensor, context: int) -> float:
    """Return the loss, in nats per byte, over `text` cut into windows of `context` bytes."""
    windows = text[: len(text) // context * context].view(-1, context)
    parts = windows.split(WINDOWS_AT_ONCE)
    return sum(next_byte_loss(model, part).item() * len(part) for part in parts) / len(windows)


def linear_layers(model: Qwen3_5ForCausalLM) -> list[Qwen3_5GatedDeltaNet]:
    """Return the Gated DeltaNet modules of `model` in layer order."""
    return [layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn")]


@torch.no_grad()
def measure_decays(model: Qwen3_5ForCausalLM, text: Tensor) -> list[Tensor]:
    """Return, for each linear layer, the decays exp(g) at each byte of `text`: shape (bytes, heads)."""
    layers = linear_layers(model)
    seen: list[list[Tensor]] = [[] for _ in layers]

    def record(index: int, projection: torch.nn.Module, inputs: object, a: Tensor) -> None:
        g = -layers[index].A_log.exp() * F.softplus(a.float() + layers[index].dt_bias)
        seen[index].append(g.exp().flatten(0, 1))

    hooks = [layer.in_proj_a.register_forward_hook(partial(record, i)) for i, layer in enumerate(layers)]
    held_out_loss(model, text, LONG_CONTEXT)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def decay_table(decays: list[Tensor]) -> Table:
    """Return a table of each head's decay: quantiles, and the half-life in bytes at the median."""
    table = Table(title="decay exp(g) per byte on held-out text")
    for title in ("layer.head", "5 %", "50 %", "95 %", "half-life at 50 %, bytes"):
        table.add_column(title, justify="right")
    quantiles = torch.tensor([0.05, 0.5, 0.95])
    for layer, decay in enumerate(decays):
        for head, (low, median, high) in enumerate(decay.quantile(quantiles, dim=0).T.tolist()):
            half_life = math.log(0.5) / math.log(median)
            table.add_row(f"{layer}.{head}", f"{low:.3f}", f"{median:.4f}", f"{high:.4f}", f"{half_life:.1f}")
    return table


def complete(model: Qwen3_5ForCausalLM, prompt: str, new_bytes: int = 120) -> str:
    """Return the greedy continuation of `prompt`, `new_bytes` long."""
    ids = torch.tensor([encode(prompt)])
    settings = GenerationConfig(max_new_tokens=new_bytes, do_sample=False)
    output = model.generate(ids, settings, attention_mask=torch.ones_like(ids))  # type: ignore[misc]
    return decode(output[0, ids.shape[1] :].tolist())


def report(model: Qwen3_5ForCausalLM, corpus: Corpus, console: Console) -> None:
    """Print the held-out losses, the decays and some greedy completions."""
    model.eval()
    for context in (SHORT_CONTEXT, LONG_CONTEXT):
        loss = held_out_loss(model, corpus.held_out, context)
        bits = loss / math.log(2)
        console.print(f"held out, windows of {context} bytes: {loss:.3f} nats/byte ({bits:.3f} bits/byte)")
    console.print(decay_table(measure_decays(model, corpus.held_out)))
    for prompt in PROMPTS:
        text = prompt + complete(model, prompt)
        console.print(f"--- {prompt!r}", text, sep="\n", markup=False, highlight=False, soft_wrap=True)


def silence_transformers() -> None:
    """Keep warnings and bars of transformers out of the output: else a line per kernel that runs as plain PyTorch."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Load the checkpoint named on the command line and print its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINTS / "tiny_lm")
    checkpoint = parser.parse_args().checkpoint
    silence_transformers()
    report(Qwen3_5ForCausalLM.from_pretrained(checkpoint), read_corpus(), Console())


if __name__ == "__main__":
    main()
