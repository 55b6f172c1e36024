# Provisional: will be written by `python -m lab.build` from vlm/token_reduction.ipynb.
"""Reducers that select tokens, all methods by name, and the strength of each that fits a budget."""

from functools import partial

import torch
import torch.nn.functional as F

from effarch.checks import check
from effarch.token_reduction.encoder import (
    InputPruning,
    Reducer,
    append,
    check_keep,
    drop,
    encoder_macs,
    importance,
    kept_count,
    split_kept,
    take,
    trace_encoder,
)
from effarch.token_reduction.merging import MergeSimilar, ProtectedMerging, merge


class Random(InputPruning):
    """Uniformly random patches (FLIP, arXiv 2212.00794, used at inference): one draw per seed, same for
    all images of a batch, so that an image's feature does not depend on its neighbours."""

    def __init__(self, keep, seed=0, rest="drop"):
        super().__init__(keep, rest)
        self.seed = seed

    def draw(self, n):
        """n uniform numbers, the same for the same seed."""
        return torch.rand(n, generator=torch.Generator().manual_seed(self.seed))

    def scores(self, tokens):
        n = tokens.x.shape[1] - tokens.prefix
        return self.draw(n).to(tokens.x.device).expand(len(tokens.x), n)


class Grid(InputPruning):
    """Evenly spread patches, blind to content: the lowest thresholds of an ordered dither (Bayer) matrix.
    Keeping half gives a checkerboard."""

    def scores(self, tokens):
        n = tokens.x.shape[1] - tokens.prefix
        side = round(n**0.5)
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        order = torch.zeros(side, side, dtype=torch.long)
        for bit in range(side.bit_length()):  # interleave the reversed bits of x ^ y and y
            order = order * 4 + ((x ^ y) >> bit & 1) * 2 + (y >> bit & 1)
        return -order.flatten().float().to(tokens.x.device).expand(len(tokens.x), n)


class ClusterMasking(Random):
    """Cluster-Masking-style (arXiv 2405.08815), used at inference: drop whole clusters of patches whose
    pixels look like a few random anchors; the similarity limit is set per image to keep the given share."""

    def __init__(self, keep, seed=0, anchors=0.03, rest="drop"):
        super().__init__(keep, seed, rest)
        self.anchors = anchors

    def scores(self, tokens):
        n = tokens.x.shape[1] - tokens.prefix
        side = tokens.pixels.shape[-1] // round(n**0.5)
        patches = F.unfold(tokens.pixels.float(), side, stride=side).transpose(1, 2)
        patches = F.normalize(patches - patches.mean(-1, keepdim=True), dim=-1)
        chosen = self.draw(n).topk(max(1, round(self.anchors * n))).indices.to(patches.device)
        tokens.macs += n * len(chosen) * patches.shape[-1]
        return -(patches @ patches[:, chosen].transpose(1, 2)).amax(-1)


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


REDUCERS = {  # name → factory(strength, **options); strength: keep ratio, or mean tokens merged per layer
    "vtp": InputPruning,
    "vtp_mean": partial(InputPruning, rest="mean"),
    "vtp_learned": partial(InputPruning, rest="learned"),
    "random": Random,
    "grid": Grid,
    "cluster": ClusterMasking,
    "evit": partial(AttentionPruning, rest="fuse"),
    "cls_drop": AttentionPruning,
    "cls_merge": partial(AttentionPruning, rest="merge"),
    "dynamicvit": RatioSchedule,
    "prumerge": PruMergeLike,
    "tome": MergeSimilar,
    "ours": ProtectedMerging,
}


def reducer_kind(name):
    """'keep' or 'merge': what the strength of a method means."""
    check(name in REDUCERS, "reducer", name, ", ".join(REDUCERS))
    factory = REDUCERS[name]
    return getattr(factory, "func", factory).kind


def reducer_for_budget(name, budget, model, image_size=None, cls_only_last=None, **options):
    """The strongest-quality reducer `name` whose multiply-adds are at most `budget` × the dense encoder's.

    budget: share in (0, 1]. cls_only_last: the exact shortcut of the last layer, for a method of any kind; None:
    as the method has it. options go to the factory. The search bisects the strength, counting
    a blank image each time: about a dozen forward passes. ValueError if the budget cannot be reached."""
    kind = reducer_kind(name)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    check(number and 0 < budget <= 1, "budget", budget, "a share above 0 and at most 1")
    dense = trace_encoder(model, image_size=image_size)
    limit, patches = budget * dense.macs, dense.x.shape[1]
    make = partial(REDUCERS[name], **options)

    def fits(position):
        """position 0 = strongest reduction … 1 = none."""
        reducer = make(max(position, 1 / patches) if kind == "keep" else (1 - position) * patches / 2)
        reducer.cls_only_last = reducer.cls_only_last if cls_only_last is None else cls_only_last
        return reducer, encoder_macs(model, reducer, image_size) <= limit

    best, ok = fits(1.0)
    if ok:
        return best
    best, ok = fits(0.0)
    check(ok, f"budget for {name}", budget, f"at least {encoder_macs(model, best, image_size) / dense.macs:.3f}")
    low, high = 0.0, 1.0
    for _ in range(11):
        middle = (low + high) / 2
        reducer, ok = fits(middle)
        low, high, best = (middle, high, reducer) if ok else (low, middle, best)
    return best
