"""What a zoo model does, in numbers: its decays, how far its states remember, how clear its choices are."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.zoo.decoding import DecodeStep, prefilled, prompt, states_of


@torch.no_grad()
def decays(model: PreTrainedModel, index: int, seed: int = 0, prompt_len: int = 12) -> Tensor:
    """The per-token decays of state `index`, [heads, rows, columns], as one decode step applies them.

    Row b of a batch of identical prompts gets a one added to row b of its state: the differences to the last,
    untouched sequence are the Jacobian X of the update along the state's next-to-last axis. A plain decay
    leaves X diagonal. A delta rule gives X = (I - b k k^T) Diag(a), and a follows from its elements.
    """
    rows = _state(prefilled(model, prompt(1, prompt_len, seed)), index).shape[-2]
    step = prefilled(model, prompt(1, prompt_len, seed).expand(rows + 1, -1).contiguous())
    state = _state(step, index)
    state.zero_()
    for row in range(rows):
        state[row, ..., row, :] = 1.0
    step(prompt(1, 1, seed + 1).expand(rows + 1, 1).contiguous())
    after = _state(step, index).double()
    jacobian = (after[:-1] - after[-1:]).movedim(0, -1)  # [..., output row, column, input row]
    return _diagonal_of(jacobian.movedim(-2, -3))


def _state(step: DecodeStep, index: int) -> Tensor:
    return states_of(step)[index][1]


def _diagonal_of(x: Tensor) -> Tensor:
    """[..., rows, columns] of a in X = (I - b k k^T) Diag(a), X as [..., columns, rows, rows].

    a_i = X_ii - X_ij X_li / X_lj for any j, l that differ from i and each other; the largest X_lj is taken.
    """
    rows = x.shape[-1]
    a = x.diagonal(dim1=-2, dim2=-1).clone()
    if rows < 3:
        return a.movedim(-2, -1)
    off = x - torch.diag_embed(a)
    for i in range(rows):
        rest = off.clone()
        rest[..., i, :] = 0
        rest[..., :, i] = 0
        best = rest.abs().flatten(-2).argmax(-1, keepdim=True)
        pivot = rest.flatten(-2).gather(-1, best)[..., 0]
        row_i = off[..., i, :].gather(-1, best % rows)[..., 0]
        column_i = off[..., :, i].gather(-1, best // rows)[..., 0]
        correction = torch.where(pivot.abs() > 1e-7, row_i * column_i / pivot, 0.0)
        a[..., i] -= correction
    return a.transpose(-1, -2)


@torch.no_grad()
def influence(model: PreTrainedModel, index: int, ago: int = 16, seed: int = 0) -> float:
    """Relative change of the present logits when state `index` was another one `ago` tokens back.

    Only the state itself carries the difference: at the end it is moved into an undisturbed run, so that
    attention to tokens that were computed with the disturbed state does not count as memory.
    """
    disturbed, clean, reference = (_fresh(model, seed) for _ in range(3))
    state = _state(disturbed, index)
    noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed))
    state.add_(noise * state.float().std())
    for token in prompt(ago, 1, seed + 2).unsqueeze(1):
        for step in (disturbed, clean, reference):
            step(token)
    _state(clean, index).copy_(_state(disturbed, index))
    last = prompt(1, 1, seed + 3)
    wanted, found = reference(last), clean(last)
    return float((found - wanted).abs().max() / wanted.abs().max())


def _fresh(model: PreTrainedModel, seed: int) -> DecodeStep:
    """A prefilled step with a copy of the model: some keep states in their modules."""
    return prefilled(copy.deepcopy(model), prompt(1, 12, seed))


@dataclass(frozen=True)
class Text:
    """Greedy tokens [n] of one sequence and the margin of each choice, relative to the largest logit."""

    tokens: Tensor
    margins: Tensor

    @property
    def looped_at(self) -> int:
        """First position from which the rest repeats with a period of at most 32, or the length."""
        tokens, n = self.tokens, len(self.tokens)
        best = n
        for period in range(1, 33):
            same = tokens[period:] == tokens[:-period]
            wrong = (~same).nonzero()
            start = int(wrong[-1]) + 1 if len(wrong) else 0
            if start + 2 * period <= n:
                best = min(best, start)
        return best


@torch.no_grad()
def greedy_text(model: PreTrainedModel, n: int = 256, seed: int = 0, cache: str = "dynamic") -> Text:
    """Greedy text after a prompt of 8 tokens, by plain decode steps."""
    ids = prompt(1, 8, seed)
    step = prefilled(model, ids[:, :-1], cache)
    token, tokens, margins = ids[:, -1:], [], []
    for _ in range(n):
        logits = step(token)[0].float()
        top = logits.topk(2).values
        margins.append((top[0] - top[1]) / logits.abs().max())
        token = logits.argmax().view(1, 1)
        tokens.append(token[0, 0])
    return Text(torch.stack(tokens), torch.stack(margins))
