"""Reducers that merge similar tokens in every layer: ToMe, and ours."""

import torch
import torch.nn.functional as F

from lab.cells.environment import check
from lab.cells.reducers import Reducer, importance, merge


def match_alternating(metric, merges, prefix=1, penalty=None):
    """ToMe's matching (arXiv 2210.09461): tokens at even places (A) choose their most similar at odd ones (B).

    metric: (B, N, C), unit length. The `merges` best pairs merge. penalty: (B, N) lowers a source's
    similarity. Returns kept (B, N - merges), rest (B, merges), target (B, merges) for `merge`."""
    a, b = metric[:, ::2], metric[:, 1::2]
    best, partner = (a @ b.transpose(1, 2)).max(-1)
    best = best if penalty is None else best - penalty[:, ::2]
    best[:, :prefix] = -torch.inf  # the CLS token stays
    order = best.argsort(dim=1, descending=True, stable=True)
    source, stay = order[:, :merges], order[:, merges:].sort(1).values
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).repeat(len(metric), 1)
    return torch.cat([2 * stay, odd], 1), 2 * source, partner.gather(1, source) + stay.shape[1]


def constant(depth):
    """The same number of merges in every layer."""
    return [1.0] * depth


def hump(depth, rise=2.0, fall=4.0):
    """No merges in the first and last layer, most in the middle: what is left falls as (1 - u^rise)^fall
    while u runs from 0 to 1 over the layers between."""
    if depth < 3:
        return constant(depth)
    left = [(1 - (layer / (depth - 2)) ** rise) ** fall for layer in range(depth - 1)]
    return [0.0, *(a - b for a, b in zip(left, left[1:], strict=False)), 0.0]


def spread_merges(mean, weights):
    """Whole tokens to merge per layer, from their mean and the layers' weights; the roundings add up."""
    total, ends = sum(weights), [0]
    for i in range(len(weights)):
        ends.append(round(sum(weights[: i + 1]) / total * mean * len(weights)))
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


class MergeSimilar(Reducer):
    """Merge the most similar pairs of tokens in every layer, between attention and MLP (ToMe).

    r: mean tokens merged per layer. shape: depth → relative merges per layer. metric: 'key' or 'hidden'.
    protect: how much a token's importance (1 = the image's mean) lowers its wish to merge. small_first: the
    same for its log size. keep_norm: see `merge`. size_bias: see `Reducer`."""

    kind = "merge"

    def __init__(self, r, shape=constant, metric="key", protect=0.0, small_first=0.0, keep_norm=False,
                 size_bias=1.0, cls_only_last=False):
        check(isinstance(r, (int, float)) and r >= 0, "r", r, "a number of at least 0")
        check(metric in ("key", "hidden"), "metric", metric, "key, hidden")
        self.r, self.shape, self.metric, self.protect, self.small_first = r, shape, metric, protect, small_first
        self.keep_norm, self.size_bias, self.cls_only_last = keep_norm, size_bias, cls_only_last

    def schedule(self, depth):
        """Merges wanted per layer."""
        return spread_merges(self.r, self.shape(depth))

    def penalty(self, tokens):
        """(B, N) what lowers a token's similarity as a source, or None."""
        if not self.protect:
            return None
        scores = importance(tokens, by_value=True)
        penalty = F.pad(self.protect * scores / scores.mean(1, keepdim=True), (tokens.prefix, 0))
        if self.small_first and tokens.sizes is not None:
            penalty = penalty + self.small_first * tokens.sizes.log()
        return penalty

    def after_attention(self, tokens):
        n = tokens.x.shape[1]
        merges = min(self.schedule(tokens.depth)[tokens.layer], (n - tokens.prefix) // 2)
        if merges <= 0:
            return
        metric = F.normalize(tokens.k.mean(1) if self.metric == "key" else tokens.x, dim=-1)
        tokens.macs += (n + 1) // 2 * (n // 2) * metric.shape[-1]
        matched = match_alternating(metric, merges, tokens.prefix, self.penalty(tokens))
        merge(tokens, *matched, self.keep_norm)


def ours(r, **changes):
    """Our recipe: merge most in the middle layers; match hidden states; protect what the CLS token reads and
    what is already large; keep the length of merged tokens; compute only the CLS row of the last layer."""
    recipe = dict(shape=hump, metric="hidden", protect=0.1, small_first=0.05, keep_norm=True, size_bias=0.85,
                  cls_only_last=True)
    return MergeSimilar(r, **{**recipe, **changes})


ours.kind = "merge"
