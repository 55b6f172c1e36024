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
    similarity = a @ b.transpose(1, 2)
    if prefix:
        similarity[:, 0] = -torch.inf  # the CLS token stays
    best, partner = similarity.max(-1)
    best = best if penalty is None else best - penalty[:, ::2]
    order = best.argsort(dim=1, descending=True, stable=True)
    source, stay = order[:, :merges], order[:, merges:].sort(1).values
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).repeat(len(metric), 1)
    return (torch.cat([2 * stay, odd], 1), 2 * source, partner.gather(1, source) + stay.shape[1])


def spread_merges(mean, weights):
    """Whole tokens to merge per layer, from their mean and the layers' weights; the roundings add up."""
    weights = torch.tensor(weights, dtype=torch.float64)
    ends = (weights.cumsum(0) / weights.sum() * mean * len(weights)).round().long()
    return [int(b - a) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


class MergeSimilar(Reducer):
    """Merge the most similar pairs of tokens in every layer, between attention and MLP (ToMe).

    r: mean tokens merged per layer. shape: relative merges per layer (None = constant), stretched to the
    model's depth. metric: 'key' or 'hidden'. protect: how much the CLS attention of a token (relative to the
    image's maximum) lowers its wish to be merged. keep_norm: see `merge`."""

    kind = "merge"

    def __init__(self, r, shape=None, metric="key", protect=0.0, keep_norm=False, cls_only_last=False,
                 size_bias=True):
        check(isinstance(r, (int, float)) and r >= 0, "r", r, "a number of at least 0")
        check(metric in ("key", "hidden"), "metric", metric, "key, hidden")
        self.r, self.shape, self.metric, self.protect = r, shape, metric, protect
        self.keep_norm, self.cls_only_last, self.size_bias = keep_norm, cls_only_last, size_bias

    def schedule(self, depth):
        """Merges wanted per layer."""
        if self.shape is None:
            return spread_merges(self.r, [1] * depth)
        shape = torch.tensor(self.shape, dtype=torch.float32)[None, None]
        resized = F.interpolate(shape, size=depth, mode="linear", align_corners=True)
        return spread_merges(self.r, resized.flatten().tolist())

    def after_attention(self, tokens):
        n = tokens.x.shape[1]
        merges = min(self.schedule(tokens.depth)[tokens.layer], (n - tokens.prefix) // 2)
        if merges <= 0:
            return
        metric = F.normalize(tokens.k.mean(1) if self.metric == "key" else tokens.x, dim=-1)
        penalty = None
        if self.protect:
            scores = importance(tokens)
            penalty = F.pad(self.protect * scores / scores.amax(1, keepdim=True), (tokens.prefix, 0))
        tokens.macs += (n + 1) // 2 * (n // 2) * metric.shape[-1]
        merge(tokens, *match_alternating(metric, merges, tokens.prefix, penalty), self.keep_norm)


HUMP = (10, 14, 20, 24, 24, 20, 14, 10, 8, 6, 6, 0)


def ours(r, **changes):
    """Our recipe: merge little early, most in the middle layers; match hidden states, protect what the CLS
    token looks at, keep the length of merged tokens, and compute only the CLS row of the last layer."""
    recipe = dict(shape=HUMP, metric="hidden", protect=0.1, keep_norm=True, cls_only_last=True)
    return MergeSimilar(r, **{**recipe, **changes})


ours.kind = "merge"
