"""What a zoo model does, in numbers: its decays, how far its states remember, how clear its choices are."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.zoo.decoding import DecodeStep, prefilled, prompt, states_of


@dataclass(frozen=True)
class Transition:
    """What one decode step does to its old state: S -> (I - beta k k^T) Diag(decay) S, with |k| = 1.

    decay [heads, rows, columns] along the state's two last axes; beta [heads, columns], 0 without a delta rule.
    """

    decay: Tensor
    beta: Tensor


@torch.no_grad()
def transition(model: PreTrainedModel, index: int, seed: int = 0, prompt_len: int = 12) -> Transition:
    """The transition of state `index` for one token after a prompt, measured from outside.

    A batch of identical prompts starts from zero states but for ones in row b of sequence b. What the step adds
    to a zero state is seen in one more sequence; the differences to it are the Jacobian of the update.
    """
    rows = _state(prefilled(model, prompt(1, prompt_len, seed)), index).shape[-2]
    step = prefilled(model, prompt(1, prompt_len, seed).expand(rows + 1, -1).contiguous())
    state = _state(step, index)
    state.zero_()
    for row in range(rows):
        state[row, ..., row, :] = 1.0
    step(prompt(1, 1, seed + 1).expand(rows + 1, 1).contiguous())
    after = _state(step, index).double()
    jacobian = (after[:-1] - after[-1:]).movedim(0, -1).transpose(-2, -3)  # [..., column, row out, row in]
    decay = _decay_of(jacobian)
    beta = (1 - jacobian.diagonal(dim1=-2, dim2=-1) / decay).sum(-1)
    return Transition(decay.transpose(-1, -2), beta)


def _state(step: DecodeStep, index: int) -> Tensor:
    return states_of(step)[index][1]


def _decay_of(x: Tensor) -> Tensor:
    """a [..., n] of x = (I - b k k^T) Diag(a), [..., n, n].

    a_i = x_ii - x_ij x_li / x_lj for any j, l that differ from i and from each other; the largest x_lj is taken.
    """
    n = x.shape[-1]
    a = x.diagonal(dim1=-2, dim2=-1).clone()
    off = x - torch.diag_embed(a)
    for i in range(n):
        rest = off.clone()
        rest[..., i, :] = 0
        rest[..., :, i] = 0
        best = rest.abs().flatten(-2).argmax(-1, keepdim=True)
        pivot = rest.flatten(-2).gather(-1, best)[..., 0]
        row_i = off[..., i, :].gather(-1, best % n)[..., 0]
        column_i = off[..., :, i].gather(-1, best // n)[..., 0]
        # Rounding leaves about 1e-8 beside the diagonal where there is no delta rule.
        a[..., i] -= torch.where(pivot.abs() > 1e-6, row_i * column_i / pivot, 0.0)
    return a


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
    """Greedy tokens [batch, n] and the margin of each choice, relative to the largest logit."""

    tokens: Tensor
    margins: Tensor

    def looped_at(self, longest: int = 32) -> int:
        """First position from which some sequence only repeats a period of at most `longest`, or n."""
        return min(_looped_at(row, longest) for row in self.tokens)


def _looped_at(tokens: Tensor, longest: int) -> int:
    found = n = len(tokens)
    for period in range(1, longest + 1):
        wrong = (tokens[period:] != tokens[:-period]).nonzero()
        start = int(wrong[-1]) + 1 if len(wrong) else 0
        if start + 2 * period <= n:
            found = min(found, start)
    return found


@torch.no_grad()
def greedy_text(model: PreTrainedModel, ids: Tensor, n: int, cache: str = "dynamic") -> Text:
    """Greedy text after `ids` [batch, length], by plain decode steps."""
    step = prefilled(model, ids[:, :-1], cache)
    token, tokens, margins = ids[:, -1:], [], []
    for _ in range(n):
        logits = step(token).float()
        top = logits.topk(2).values
        margins.append((top[:, 0] - top[:, 1]) / logits.abs().amax(-1))
        token = logits.argmax(-1, keepdim=True)
        tokens.append(token)
    return Text(torch.cat(tokens, 1), torch.stack(margins, 1))
