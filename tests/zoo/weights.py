"""Weights that remember: random matrices of a sensible size, and decays set by hand.

With the library's own initialisation tiny Gated DeltaNet models forget within a token (decays of 8e-4), xLSTM
never writes (an input-gate bias of -10), and so a wrong buffered update would pass every test. Here each head
gets a rate -log(decay), spaced log-evenly over all heads of the model and staggered between its layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

# -log(decay) per token before the data-dependent gate: decays of 0.55 to 0.998,
# and about 0.35 to 0.999 after it.
FASTEST, SLOWEST = 0.6, 0.002
TIME_STEP = 0.5  # softplus of the bias: large enough that SSD layers write as much as they forget
GATE_SCALE = 0.35  # of the matrices behind a gate, so that rates stay within a factor of about two
GATES = ("in_proj_ba", "in_proj_a.", "a_proj.", "f_a_proj", "f_proj", "fgate_preact", "igate_preact")
GATE_EXCEPTIONS = ("q_a_proj", "kv_a_proj")
# Small against what the layers add, so that the text depends on the state and not only on the last token.
EMBEDDING_STD = 0.4
LOGIT_STD = 4.0


def remember(model: nn.Module, seed: int) -> None:
    """Give the float32 `model` the weights described above."""
    with torch.no_grad():
        _random_matrices(model, seed)
        layers = [m for m in model.modules() if _is_recurrent(m)]
        for index, layer in enumerate(layers):
            _set_decays(layer, index, len(layers))


def _random_matrices(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "A_log" not in name and "norm" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * _std(name, parameter))
    for module in model.modules():
        if hasattr(module, "normalizer"):  # RecurrentGemma multiplies its embeddings by sqrt(hidden)
            module.embed_tokens.weight.div_(module.normalizer)


def _std(name: str, parameter: Tensor) -> float:
    """Fan-in scaling, with the exceptions that this module is about."""
    fan_in = math.prod(parameter.shape[1:]) if "conv" in name else parameter.shape[-1]
    if "lm_head" in name or name == "head.weight":
        return LOGIT_STD / math.sqrt(fan_in)
    if "embed" in name:
        return EMBEDDING_STD
    gate = any(g in f".{name}" for g in GATES) and not any(e in name for e in GATE_EXCEPTIONS)
    return (GATE_SCALE if gate else 1.0) / math.sqrt(fan_in)


def _is_recurrent(module: nn.Module) -> bool:
    return any(hasattr(module, attribute) for attribute in ("A_log", "slope_rate", "fgate_preact", "time_decay"))


def rates(count: int, layer: int, layers: int) -> Tensor:
    """`count` rates of one layer: every `layers`-th of a log-even ladder from SLOWEST to FASTEST."""
    ladder = torch.linspace(math.log(SLOWEST), math.log(FASTEST), count * layers).exp()
    return ladder[layer::layers]


def _set_decays(module: nn.Module, layer: int, layers: int) -> None:
    if hasattr(module, "slope_rate"):
        _set_constant(module, layer, layers)
    elif hasattr(module, "fgate_preact"):
        rate = rates(module.fgate_preact.bias.numel(), layer, layers)
        module.fgate_preact.bias.copy_(-torch.log(torch.expm1(rate)))  # sigmoid(bias) = exp(-rate)
        module.igate_preact.bias.zero_()
    elif hasattr(module, "time_decay"):
        module.time_decay.copy_(rates(module.time_decay.numel(), layer, layers).log())
    elif module.A_log.numel() == module.dt_bias.numel() if hasattr(module, "dt_bias") else False:
        rate = rates(module.A_log.numel(), layer, layers)
        _set_softplus(module, rate.view(module.A_log.shape), module.dt_bias)
    elif hasattr(module, "dt_bias"):
        _set_channels(module, layer, layers)
    else:
        rate = rates(module.A_log.numel(), layer, layers).view(module.A_log.shape)
        bias = module.dt_proj_bias if hasattr(module, "dt_proj_bias") else module.dt_proj.bias
        _set_softplus(module, rate, bias)


def _set_softplus(module: nn.Module, rate: Tensor, bias: Tensor) -> None:
    """decay = exp(-exp(A_log) * softplus(bias + data))."""
    module.A_log.copy_(torch.log(rate / TIME_STEP))
    bias.fill_(math.log(math.expm1(TIME_STEP)))
    for weight in _time_step_rows(module):
        weight.mul_(GATE_SCALE)


def _time_step_rows(module: nn.Module) -> Iterator[Tensor]:
    """The rows of a fused input projection that make the time step: the last ones, one a head (SSD)."""
    if hasattr(module, "in_proj") and hasattr(module, "dt_bias"):
        yield module.in_proj.weight[-module.dt_bias.numel() :]
    if hasattr(module, "dt_proj"):
        yield module.dt_proj.weight
    if hasattr(module, "dt_proj_weight"):
        yield module.dt_proj_weight


def _set_channels(module: nn.Module, layer: int, layers: int) -> None:
    """One rate for each key channel (KDA).

    log(decay) = -exp(A_log) * softplus(data + bias), or bound * sigmoid(data + bias).
    """
    rate = rates(module.dt_bias.numel(), layer, layers)
    rate = rate.view(-1, module.A_log.numel()).t().reshape(-1)  # fast and slow channels in every head
    module.A_log.zero_()
    bound = getattr(module, "safe_gate_lower_bound", None) or getattr(module, "lower_bound", None)
    bias = torch.log(torch.expm1(rate)) if bound is None else torch.logit(rate / abs(bound))
    module.dt_bias.copy_(bias)


def _set_constant(module: nn.Module, layer: int, layers: int) -> None:
    """Lightning attention: one constant a head, and the tables of the block form that follow from it."""
    slope = rates(module.slope_rate.numel(), layer, layers).view(module.slope_rate.shape)
    module.slope_rate.copy_(slope)
    for buffer, values in zip(
        (module.query_decay, module.key_decay, module.diagonal_decay),
        module.decay_factors(slope),
        strict=True,
    ):
        buffer.copy_(values)
