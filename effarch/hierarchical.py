# Written by `python -m lab.build` from ssm/real_signals.ipynb, where each part is explained: edit it there.
"""Channels at a hierarchy of rates, which modality meets which channels, and the control of equal compute and equal receptive field.

HierarchicalMRSS   channels split by several rates
ModalityEmbedding  which modality feeds which channels
DilatedLowRank     control: equal compute and receptive field, at the full rate"""

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, is_count, is_number
from effarch.multirate import (
    DepthwiseCausalConv1d,
    DilatedTwin,
    causal_pool,
    check_sequence,
    projection,
    shift_add_conv,
)


def hierarchical_reference(model, x):
    """HierarchicalMRSS without any shortcut, from the same weights."""
    y = 0
    for rate, part, conv, project in zip(model.rates, x.split(model.widths, -1), model.convs, model.projects, strict=True):
        slow = shift_add_conv(causal_pool(part, rate), conv.weight)
        y = y + slow.repeat_interleave(rate, dim=1)[:, : x.shape[1]] @ project.weight.T
    return F.relu(y)


def pooled(x, rate):
    """Mean over the `rate` steps that end at 0, rate, 2·rate, …: (B, T, C) → (B, ⌈T/rate⌉, C), in one pass."""
    blocks = -(-x.shape[1] // rate)
    return x if rate == 1 else F.pad(x, (0, 0, rate - 1, (blocks - 1) * rate + 1 - x.shape[1])).unflatten(1, (blocks, rate)).mean(2)


def widths_of(dim, shares):
    """Channels of each share of `dim`, at least one each: the last takes what is left."""
    widths = [max(1, round(dim * share)) for share in shares[:-1]]
    check(sum(widths) < dim, "dim", dim, f"at least {len(shares)} channels that can be split {list(shares)}")
    return [*widths, dim - sum(widths)]


def climb(project, fine, coarse, ratio):
    """W fine + coarse, held for `ratio` steps: (B, n, C) and (B, ⌈n/ratio⌉, D) → (B, n, D), in place on the projection."""
    steps, blocks = fine.shape[1], coarse.shape[1]
    if steps < blocks * ratio:
        fine = F.pad(fine, (0, 0, 0, blocks * ratio - steps))
    return project(fine.unflatten(1, (blocks, ratio))).add_(coarse[:, :, None]).flatten(1, 2)[:, :steps]


class HierarchicalMRSS(nn.Module):
    """Channels at several rates, `shares[i]` of them at 1/rates[i]: (B, T, dim) → (B, T, dim), causal.

    rates (1, r) with shares (1 − α, α) are SplitMRSS; one rate alone runs all channels at it. ValueError unless each rate divides
    the next and the shares are positive and add up to 1."""

    def __init__(self, dim, kernel, rates=(1, 2, 4, 8), shares=(1 / 8, 1 / 8, 1 / 4, 1 / 2)):
        super().__init__()
        whole = len(rates) > 0 and all(map(is_count, rates))
        check(whole and all(b % a == 0 and a < b for a, b in zip(rates, rates[1:], strict=False)), "rates", rates, "whole numbers that divide the next")
        right = len(shares) == len(rates) and all(is_number(s) and s > 0 for s in shares) and abs(sum(shares) - 1) < 1e-6
        check(right, "shares", shares, f"{len(rates)} positive numbers that add up to 1")
        self.rates, self.widths = tuple(rates), widths_of(check_count(dim, "dim"), shares)
        taps = [max(round(check_count(kernel, "kernel") * min(1, rate / 4)), 1) for rate in rates]
        self.convs = nn.ModuleList(map(DepthwiseCausalConv1d, self.widths, taps))
        self.projects = nn.ModuleList(projection(width, dim) for width in self.widths)
        self.updates_per_step = sum(width / rate for width, rate in zip(self.widths, rates, strict=True)) / dim

    def flops(self, batch, steps):
        """Analytic FLOPs of a forward pass: 2 · B · Σ weights · ⌈T/r⌉; projections run on whole blocks of the next rate."""
        total, next_rates = 0, [*self.rates[1:], self.rates[-1]]
        for rate, after, conv, project in zip(self.rates, next_rates, self.convs, self.projects, strict=True):
            total += conv.weight.numel() * -(-steps // rate) + project.weight.numel() * -(-steps // after) * (after // rate)
        return 2 * batch * total

    def forward(self, x):
        check_sequence(x, sum(self.widths))
        y, last, groups = None, 1, zip(self.rates, x.split(self.widths, -1), self.convs, self.projects, strict=True)
        for rate, part, conv, project in reversed(list(groups)):
            here = conv(pooled(part, rate))
            y, last = project(here) if y is None else climb(project, here, y, last // rate), rate
        y = F.relu_(y)
        return y if last == 1 else y.repeat_interleave(last, dim=1)[:, : x.shape[1]]


class DilatedLowRank(DilatedTwin):
    """y = relu(U V · conv(x)) with the filters of DilatedTwin: at the full rate, and sees as far as SplitMRSS."""

    def __init__(self, dim, kernel, r, low_fraction, rank):
        super().__init__(dim, kernel, r, low_fraction)
        del self.high_project, self.low_project
        self.down, self.up = projection(dim, check_count(rank, "rank")), projection(rank, dim)

    def forward(self, x):
        check_sequence(x, self.high + self.low)
        batch, steps, _ = x.shape
        low = F.pad(x[..., self.high:], (0, 0, 0, -steps % self.r)).unflatten(1, (-1, self.r))
        low = self.low_conv(low.transpose(1, 2).flatten(0, 1))  # r sequences, each of every r-th step
        low = low.unflatten(0, (batch, self.r)).transpose(1, 2).flatten(1, 2)[:, :steps]
        return F.relu_(self.up(self.down(torch.cat([self.high_conv(x[..., : self.high].contiguous()), low], -1))))


class ModalityEmbedding(nn.Module):
    """A tuple of sequences, one a modality, → (B, T, dim). Symbols (B, T) of an integer type, or features (B, T, size).

    sizes: symbols or features of each modality. order None: each one into all channels, added up (mixed). order, such as (1, 0):
    modality order[i] alone feeds the i-th of equal blocks of channels. ValueError unless it names each modality once."""

    def __init__(self, sizes, dim, order=None):
        super().__init__()
        dim = check_count(dim, "dim")
        check(isinstance(sizes, (tuple, list)) and len(sizes) > 0, "sizes", sizes, "whole numbers, one for each modality")
        named = order is None or isinstance(order, (tuple, list)) and sorted(order) == list(range(len(sizes)))
        check(named, "order", order, f"None, or 0 to {len(sizes) - 1} in some order")
        check(order is None or dim % len(sizes) == 0, "dim", dim, f"a multiple of the {len(sizes)} modalities")
        self.order, width = order, dim if order is None else dim // len(sizes)
        self.tables = nn.ParameterList(torch.randn(check_count(size, "sizes"), width) for size in sizes)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        check(isinstance(x, (tuple, list)), "x", type(x).__name__, f"a tuple of {len(self.tables)} sequences, one a modality")
        check(len(x) == len(self.tables), "len(x)", len(x), f"{len(self.tables)} sequences, one a modality")
        for v, size in zip(x, map(len, self.tables), strict=True):
            told = (tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else type(v).__name__
            fits = isinstance(v, torch.Tensor) and v.shape[:2] == x[0].shape[:2] and (
                v.dim() == 3 and v.shape[2] == size if v.is_floating_point() else v.dim() == 2 and v.dtype in (torch.int32, torch.int64))
            check(fits, "x", told, f"{size} symbols (B, T) as int32 or int64, or features (B, T, {size}), B and T as of the others")
        parts = [F.embedding(v, w) if not v.is_floating_point() else v @ w * len(w) ** -0.5 for v, w in zip(x, self.tables, strict=True)]
        return self.bias + (sum(parts) if self.order is None else torch.cat([parts[i] for i in self.order], -1))
