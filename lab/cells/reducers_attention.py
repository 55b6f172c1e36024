"""Reducers that score by attention inside the encoder, at a few layers."""

import torch
import torch.nn.functional as F

from lab.cells.environment import check
from lab.cells.reducers import (
    Reducer,
    append,
    check_keep,
    drop,
    importance,
    kept_count,
    merge,
    split_kept,
    take,
)


class AttentionPruning(Reducer):
    """Keep the tokens that the CLS token attends to most, at a few layers, between attention and MLP.

    keep: share that stays at each of `layers` (see `stages`). rest: 'drop'; 'fuse' (EViT, arXiv 2202.07800: one
    token, the mean of the dropped weighted by attention); 'merge' (each joins its most similar kept token)."""

    def __init__(self, keep, layers=None, rest="drop", cls_only_last=False):
        check(rest in ("drop", "fuse", "merge"), "rest", rest, "drop, fuse, merge")
        self.keep, self.layers, self.rest = check_keep(keep), layers, rest
        self.cls_only_last = cls_only_last

    def after_attention(self, tokens):
        n = tokens.x.shape[1] - tokens.prefix
        count = kept_count(self.keep, n)
        if tokens.layer not in stages(self.layers, tokens.depth) or count == n:
            return
        scores = importance(tokens)
        kept, rest = split_kept(tokens, scores, count)
        if self.rest == "merge":
            return merge(tokens, kept, rest, most_similar(tokens, kept, rest))
        if self.rest == "fuse":
            weight = scores.gather(1, rest - tokens.prefix).to(tokens.x.dtype)
            fused = (take(tokens.x, rest) * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        drop(tokens, kept)
        if self.rest == "fuse":
            append(tokens, fused)


def stages(layers, depth):
    """The layers (0-based) to act in; None = after a quarter, half and three quarters of the depth."""
    return tuple(layers) if layers is not None else (depth // 4, depth // 2, 3 * depth // 4)


def most_similar(tokens, kept, rest):
    """(B, R): for each of `rest` the position among `kept` (never the CLS token) with the closest keys."""
    metric = F.normalize(tokens.k.mean(1), dim=-1)
    a, b = take(metric, rest), take(metric, kept[:, tokens.prefix:])
    tokens.macs += a.shape[1] * b.shape[1] * a.shape[2]
    return (a @ b.transpose(1, 2)).argmax(-1) + tokens.prefix


class RatioSchedule(Reducer):
    """DynamicViT's schedule (arXiv 2106.02034) without its trained predictor: before each of `layers`
    keep, keep², keep³ … of the patches, by the CLS attention of the layer before."""

    def __init__(self, keep, layers=None, cls_only_last=False):
        self.keep, self.layers, self.cls_only_last = check_keep(keep), layers, cls_only_last

    def at_input(self, tokens):
        self.patches = tokens.x.shape[1] - tokens.prefix

    def before_layer(self, tokens):
        layers = stages(self.layers, tokens.depth)
        if tokens.layer not in layers:
            return
        stage = layers.index(tokens.layer) + 1
        count = max(1, int(self.patches * self.keep**stage))
        if count < tokens.x.shape[1] - tokens.prefix:
            drop(tokens, split_kept(tokens, importance(tokens), count)[0])


class PruMergeLike(Reducer):
    """After PruMerge+ (arXiv 2403.15388) at one layer (after a quarter): keep half by CLS attention and half evenly spread;
    to each kept token its `near` most similar dropped ones are added, weighted by their CLS attention.

    PruMerge lets the count vary by image, which cannot be batched, and lets tokens grow: here the share is
    fixed and the sum is divided by its weights, since no later layer was trained for longer tokens."""

    def __init__(self, keep, layer=None, near=32, cls_only_last=False):
        self.keep, self.layer, self.near, self.cls_only_last = check_keep(keep), layer, near, cls_only_last

    def after_attention(self, tokens):
        n, p = tokens.x.shape[1] - tokens.prefix, tokens.prefix
        count = kept_count(self.keep, n)
        layer = tokens.depth // 4 if self.layer is None else self.layer
        if tokens.layer != layer or count == n:
            return
        scores = importance(tokens).to(tokens.x.dtype)
        by_attention = scores.topk((count + 1) // 2, dim=1).indices
        chosen = scores.scatter(1, by_attention, 2.0)  # attention is at most 1
        order = (chosen >= 2).int().argsort(dim=1, stable=True)
        free = order[:, : n - by_attention.shape[1]]  # what is left over, in raster order
        even = torch.linspace(0, free.shape[1] - 1, count - by_attention.shape[1]).round().long()
        spread = free[:, even.to(free.device)]
        kept, rest = split_kept(tokens, chosen.scatter(1, spread, 2.0), count)
        metric = F.normalize(tokens.k.mean(1), dim=-1)
        similarity = take(metric, kept[:, p:]) @ take(metric, rest).transpose(1, 2)
        tokens.macs += count * rest.shape[1] * metric.shape[-1]
        limit = similarity.topk(min(self.near, rest.shape[1]), dim=-1).values[..., -1:]
        weight = (similarity >= limit) * scores.gather(1, rest - p)[:, None]
        mixed = take(tokens.x, kept[:, p:]) + weight @ take(tokens.x, rest)
        tokens.macs += count * rest.shape[1] * mixed.shape[-1]
        mixed = mixed / (1 + weight.sum(-1, keepdim=True))
        drop(tokens, kept)
        tokens.x = torch.cat([tokens.x[:, :p], mixed], 1)
