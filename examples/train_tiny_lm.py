"""Train the small byte-level Qwen3.5 models that the demo and the tests load from `examples/checkpoints/`.

    python examples/train_tiny_lm.py            # target, 0.94 M parameters
    python examples/train_tiny_lm.py --draft    # draft for speculative decoding, 0.25 M parameters

The text is the source of Python's own standard library, read from the interpreter that runs this script.
Everything is a function of the seed and the step number, never of the clock: the same Python, torch and
thread count on the same kind of CPU give the same model. The target takes about 35 minutes of one core (the step
numbers were chosen for that; its loss is still falling at the end), the draft about 10.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from byte_text import VOCAB_SIZE
from measure_tiny_lm import (
    CHECKPOINTS,
    LONG_CONTEXT,
    SHORT_CONTEXT,
    held_out_loss,
    linear_layers,
    next_byte_loss,
    report,
    silence_transformers,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from stdlib_text import Corpus, read_corpus
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

WARMUP_STEPS = 100
FINAL_LR_FRACTION = 0.02
SLOWEST_RATE, FASTEST_RATE = 0.001, 1.05  # initial -log(decay) per byte: decays of 0.999 and 0.35
REPORT_EVERY = 250  # steps
REPORT_BYTES = 32 * 1024  # of the held-out text while training; the final figures use all of it


@dataclass(frozen=True)
class Recipe:
    """One model and how it is trained."""

    name: str
    hidden: int
    intermediate: int
    attention_heads: int
    linear_heads: int
    peak_lr: float
    batch_bytes: int  # per step, whatever the context length
    steps: int  # at SHORT_CONTEXT
    long_steps: int  # at LONG_CONTEXT, afterwards: without them the loss rises beyond SHORT_CONTEXT


TARGET = Recipe("tiny_lm", 128, 384, 4, 4, 3e-3, 16 * 256, steps=2600, long_steps=500)
DRAFT = Recipe("tiny_draft", 64, 192, 2, 2, 5e-3, 8 * 256, steps=2600, long_steps=400)


def build_model(recipe: Recipe) -> Qwen3_5ForCausalLM:
    """Return a new model: 3 Gated DeltaNet layers with 32 x 32 states, then 1 full-attention layer."""
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        num_attention_heads=recipe.attention_heads,
        num_key_value_heads=recipe.attention_heads // 2,
        head_dim=32,
        linear_num_key_heads=recipe.linear_heads,
        linear_num_value_heads=recipe.linear_heads,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = Qwen3_5ForCausalLM(config)
    spread_decays(model)
    return model


@torch.no_grad()
def spread_decays(model: Qwen3_5ForCausalLM) -> None:
    """Set the initial decays of all heads log-evenly from 0.999 to 0.35 per byte, staggered between layers.

    The library's own initialisation (A uniform in 0.01..16, dt_bias 1) forgets within a byte in most heads.
    A gate is g = -A * softplus(a + dt_bias); at a = 0 its rate is A * dt with dt_bias = log(expm1(dt)).
    """
    layers = linear_layers(model)
    heads = layers[0].num_v_heads
    rates = torch.logspace(math.log10(SLOWEST_RATE), math.log10(FASTEST_RATE), heads * len(layers))
    for index, layer in enumerate(layers):
        rate = rates[index :: len(layers)]
        dt = rate.clamp(max=0.25)
        layer.A_log.copy_((rate / dt).log())
        layer.dt_bias.copy_(dt.expm1().log())


def make_optimizer(model: Qwen3_5ForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices only (not on gates, convolutions and norms)."""
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "conv1d" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Return the rate at `step` (from 0): linear warm-up to `peak`, then linear down to 2 % of it at the end.

    Linear, not cosine: the steps at the long context come last and need a rate that still moves the weights.
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * warmup * (1.0 - (1.0 - FINAL_LR_FRACTION) * step / total_steps)


def batches(corpus: Corpus, recipe: Recipe, steps: int, long_steps: int, seed: int) -> Iterator[Tensor]:
    """Yield one (batch, context + 1) block of training bytes per step: short contexts first, then long."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps + long_steps):
        context = SHORT_CONTEXT if step < steps else LONG_CONTEXT
        shape = (recipe.batch_bytes // context, 1)
        starts = torch.randint(len(corpus.train) - context, shape, generator=generator)
        yield corpus.train[starts + torch.arange(context + 1)]


def train_step(model: Qwen3_5ForCausalLM, optimizer: torch.optim.Optimizer, block: Tensor, rate: float) -> float:
    """Take one step at learning rate `rate`; return the loss in nats per byte before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = next_byte_loss(model, block)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(
    model: Qwen3_5ForCausalLM, recipe: Recipe, corpus: Corpus, args: argparse.Namespace, console: Console
) -> None:
    """Train `model` in place; every `REPORT_EVERY` steps print a line and save a snapshot if asked for."""
    total = args.steps + args.long_steps
    optimizer = make_optimizer(model)
    with training_progress(console) as progress:
        task = progress.add_task(recipe.name, total=total, loss=math.nan, speed=0.0)
        for step, block in enumerate(batches(corpus, recipe, args.steps, args.long_steps, args.seed)):
            loss = train_step(model, optimizer, block, learning_rate(step, total, recipe.peak_lr))
            progress.update(task, advance=1, loss=loss, speed=progress.tasks[task].speed or 0.0)
            if (step + 1) % REPORT_EVERY == 0:
                held_out = held_out_loss(model, corpus.held_out[:REPORT_BYTES], SHORT_CONTEXT)
                seconds = progress.tasks[task].elapsed or 0.0
                console.print(
                    f"step {step + 1:5d} of {total}  {seconds:6.0f} s  context {block.shape[1] - 1:4d}  "
                    f"loss {loss:.3f}  held out (first 32 kB) {held_out:.3f} nats/byte"
                )
                if args.snapshots:
                    save(model, args.snapshots / recipe.name)


def training_progress(console: Console) -> Progress:
    """Return the progress bar: step, loss in nats per byte, steps per second, remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} nats/byte"),
        TextColumn("{task.fields[speed]:.2f} steps/s"),
        TimeRemainingColumn(),
        console=console,
    )


def save(model: Qwen3_5ForCausalLM, folder: Path) -> None:
    """Write the checkpoint in full beside `folder`, then move its files there: none is ever half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        model.save_pretrained(beside)
        for path in Path(beside).iterdir():
            path.chmod(0o644)
            os.replace(path, folder / path.name)


def parse_args() -> tuple[Recipe, argparse.Namespace]:
    """Return the recipe and the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--draft", action="store_true", help="train the small draft model instead of the target")
    option("--steps", type=int, help=f"at {SHORT_CONTEXT} bytes of context ({TARGET.steps})")
    option(
        "--long-steps",
        type=int,
        help=f"then at {LONG_CONTEXT} ({TARGET.long_steps}; draft {DRAFT.long_steps})",
    )
    option("--seed", type=int, default=0, help="of the initial weights and the order of the text (0)")
    option("--threads", type=int, default=1, help="CPU threads (1, as for the committed checkpoints)")
    option("--out", type=Path, help="folder of the checkpoint (examples/checkpoints/<name>)")
    option("--snapshots", type=Path, help=f"also save to a folder in here every {REPORT_EVERY} steps")
    args = parser.parse_args()
    recipe = DRAFT if args.draft else TARGET
    args.steps = recipe.steps if args.steps is None else args.steps
    args.long_steps = recipe.long_steps if args.long_steps is None else args.long_steps
    args.out = args.out or CHECKPOINTS / recipe.name
    if args.steps < 0 or args.long_steps < 0 or args.threads < 1:
        parser.error("--steps and --long-steps must be at least 0, --threads at least 1")
    return recipe, args


def main() -> None:
    """Train, report and save; Ctrl-C leaves the checkpoint as it was."""
    recipe, args = parse_args()
    console = Console()
    silence_transformers()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # as for the committed checkpoints
    torch.manual_seed(args.seed)
    corpus = read_corpus()
    model = build_model(recipe)
    console.print(f"{recipe.name}: {model.num_parameters():,} parameters")
    console.print(f"text: {len(corpus.train):,} bytes, sha256 {corpus.digest}")
    console.print(f"held out: {len(corpus.held_out):,} bytes, {', '.join(corpus.held_out_names)}")
    try:
        train(model, recipe, corpus, args, console)
        report(model, corpus, console)
        save(model, args.out)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped before the end: {args.out} is as it was") from None
    console.print(f"saved {args.out}")


if __name__ == "__main__":
    main()
