# Written by `python -m lab.build` from ssm/multirate_scan.ipynb, where each part is explained: edit it there.
"""Mamba-2 blocks that run part of the scan at a lower rate: heads split by rate, and a router that chooses tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, is_count, is_number
from effarch.scans.blocks import Mamba2Block
from effarch.scans.scan import ssd


def causal_pool(x, rate, before=None, first=0):
    """Means of the last `rate` tokens at tokens first, first + rate, …: x (B, T, D) → (B, ⌈(T - first)/rate⌉, D).

    before (B, rate - 1, D): the tokens before x; None: zeros."""
    check_count(rate, "rate")
    count = -(-(x.shape[1] - first) // rate)
    x = F.pad(x, (0, 0, rate - 1, 0)) if before is None else torch.cat([before, x], 1)
    return x[:, first:first + rate * count].unflatten(1, (count, rate)).mean(2)


def hold(x, rate, length):
    """Each row of x (B, M, D) for `rate` tokens, cut to `length`: undoes `causal_pool` in time."""
    return x.repeat_interleave(rate, 1)[:, :length]


class Stepwise(nn.Module):
    """A block that takes a single token as a sequence of one."""

    def step(self, x, state=None):
        """One token: x (B, width) and the state → (y (B, width), state)."""
        y, state = self(x[:, None], state)
        return y[:, 0], state


class MultiRateBlock(Stepwise):
    """Mamba-2 with `slow_heads` of its heads at 1/rate: x (B, T, width) → (y, state), going on from a state if given.

    Parameters: exactly those of Mamba2Block(groups=2) with the same heads, head_width and states. ValueError unless
    1 ≤ slow_heads < heads and rate ≥ 1."""

    def __init__(self, width, heads=8, head_width=16, states=16, slow_heads=4, rate=4, chunk=None):
        super().__init__()
        check(is_count(slow_heads) and slow_heads < heads, "slow_heads", slow_heads, f"1 to {heads - 1}")
        self.rate = check_count(rate, "rate")
        self.fast = Mamba2Block(width, heads - slow_heads, head_width, states, chunk=chunk)
        self.slow = Mamba2Block(width, slow_heads, head_width, states, rate=rate, chunk=chunk)

    def forward(self, x, state=None):
        """State: (of the fast heads, of the slow heads, the last rate - 1 tokens, the output that is held, tokens so far)."""
        nothing = x.new_zeros(len(x), self.rate - 1, x.shape[2]), x.new_zeros(len(x), 1, x.shape[2])
        fast, slow, recent, held, t = state or (None, None, *nothing, 0)
        (y, fast), first, length = self.fast(x, fast), -t % self.rate, x.shape[1]
        outputs = [held.expand(-1, min(first, length), -1)] if first else []
        if length > first:
            out, slow = self.slow(causal_pool(x, self.rate, recent, first), slow)
            outputs, held = [*outputs, hold(out, self.rate, length - first)], out[:, -1:].clone()
        recent = torch.cat([recent, x], 1)[:, length:].clone()  # a view would keep the whole sequence in memory
        return y + torch.cat(outputs, 1), (fast, slow, recent, held, t + length)


def ratio_loss(p, chosen, target):
    """H-Net's ratio loss: 1 at its best, when the share of tokens chosen and the mean p both equal `target`."""
    n, share, mean = 1 / target, chosen.float().mean(), p.mean()
    return n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))


def running_average(y, p, before=None):
    """z_t = p_t y_t + (1 - p_t) z_(t-1) for y (B, T, D), p (B, T): an SSD scan with one head and one state.

    before (B, 1, D): z before the first token; None: zeros. In float32 at least: 1 - 1e-4 is 1 in bfloat16."""
    p = p.to(torch.promote_types(p.dtype, torch.float32)).clamp(1e-4, 1 - 1e-4)
    one, delta = torch.ones_like(p)[..., None, None], -torch.log1p(-p)[..., None]  # B and C, (B, T, 1, 1); Δ with e^-Δ = 1 - p
    state = None if before is None else before[:, None, None]
    z, _ = ssd((y * (p[..., None] / delta))[:, :, None], delta, -torch.ones(1).to(p), one, one, state)
    return z[:, :, 0].to(y.dtype)


class Router(nn.Module):
    """x (B, T, width) → p (B, T), how much a token differs from the one before: (1 - cos(W_q x_t, W_k x_(t-1))) / 2.

    last (B, 1, width): the token before the first; None: there is none, and p is 1 there."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)

    def forward(self, x, last=None):
        before = torch.cat([x[:, :1] if last is None else last, x[:, :-1]], 1)
        p = 0.5 * (1 - F.cosine_similarity(self.query(x), self.key(before), dim=-1))
        return F.pad(p[:, 1:], (1, 0), value=1.0) if last is None else p


class DynamicBlock(Stepwise):
    """`block` on chosen tokens only: x (B, T, width) → (y, state). After a call, `share` and `loss` tell about the choice.

    block: a MambaBlock or Mamba2Block. choose: 'learned' (the router: tokens whose p reaches `threshold`) or 'stride'
    (every round(1/target)-th). State: (of the block, the last token, the output that is held, tokens so far)."""

    threshold = 0.5

    def __init__(self, width, block, target=0.25, choose="learned"):
        super().__init__()
        check(is_number(target) and 0 < target < 1, "target", target, "a number between 0 and 1")
        check(choose in ("learned", "stride"), "choose", choose, "learned, stride")
        self.block, self.router, self.target, self.choose = block, Router(width), target, choose
        self.loss = self.share = None

    def __getstate__(self):
        return vars(self) | dict(loss=None)  # it holds a graph after a training step, which no copy can take

    def route(self, x, last=None):
        """(p, chosen), both (B, T), each from tokens up to its own; the first of all is always chosen."""
        p = self.router(x, last)
        return p, p >= self.threshold

    def forward(self, x, state=None):
        inner, last, held, t = state or (None, None, x.new_zeros(len(x), 1, x.shape[2]), 0)
        y, inner = self.at_choice(x, inner, last, held) if self.choose == "learned" else self.at_stride(x, inner, held, t)
        return y, (inner, x[:, -1:].clone(), y[:, -1:].clone(), t + x.shape[1])

    def at_stride(self, x, inner, held, t):
        """(y, state of the block): a fixed stride needs no sorting."""
        rate, length = round(1 / self.target), x.shape[1]
        first = min(-t % rate, length)
        y, slow = held.expand(-1, first, -1), x[:, first::rate]
        self.share = slow.shape[1] / length
        if slow.shape[1]:
            out, inner = self.block(slow, inner)
            y = torch.cat([y, hold(out, rate, length - first)], 1)
        return y, inner

    def at_choice(self, x, inner, last, held):
        """(y, state of the block): the chosen tokens side by side, their outputs smoothed and put back."""
        p, chosen = self.route(x, last)
        self.share, self.loss, counts = chosen.float().mean().detach(), ratio_loss(p, chosen, self.target), chosen.sum(1)
        order = torch.argsort(~chosen, dim=1, stable=True)[:, :int(counts.max())]  # chosen tokens first, in their order
        pick, y = lambda v, index: v.gather(1, index[..., None].expand(-1, -1, v.shape[-1])), held
        if order.shape[1]:
            y, inner = self.block(pick(x, order), inner, lengths=counts)
            y = torch.cat([held, running_average(y, p.gather(1, order), held)], 1)
        y = pick(y, chosen.cumsum(1))  # the latest chosen output, or what was held before
        confidence = torch.where(chosen, p, 1 - p)[..., None]
        return y * (confidence + (1 - confidence).detach()), inner
