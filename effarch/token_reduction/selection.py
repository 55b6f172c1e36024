# Written by `python -m lab.build` from vlm/token_reduction.ipynb, where each part is explained: edit it there.
"""Reducers that select tokens by a score, all methods by name, and the strength of each that fits a budget."""

import math  # noqa: I001
from functools import lru_cache, partial
from inspect import signature

import torch
import torch.nn.functional as F

from effarch.checks import check, check_count, check_share, is_count
from effarch.clip.towers import make_tower, sides_of, wide
from effarch.token_reduction.encoder import (
    InputPruning, Reducer, append, check_keep, drop, encoder_macs, fit_budget, importance, kept_count, split_kept,
    strength_at, take)
from effarch.token_reduction.merging import DiffRateMerging, EnergyMerging, MergeSimilar, ProtectedMerging, merge


@lru_cache
def uniform(n, seed, device):
    """(n,) uniform numbers, the same on every device; drawn on a CPU, and sent to each device once."""
    with torch.inference_mode(False):
        return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu").to(device)


@lru_cache
def dither(rows, columns, device):
    """(rows · columns,): an ordered dither (Bayer) matrix; the patches of its lowest numbers are evenly spread."""
    with torch.inference_mode(False):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        order = torch.zeros_like(x)
        for bit in range(max(rows, columns).bit_length()):  # interleave the reversed bits of x ^ y and y
            order = order * 4 + ((x ^ y) >> bit & 1) * 2 + (y >> bit & 1)
        return order.flatten().float().to(device)


class Random(InputPruning):
    """Uniformly random patches (FLIP, arXiv 2212.00794, used at inference): one draw per seed, the same for
    all images of a batch, so that an image's feature does not depend on its neighbours."""

    def __init__(self, keep, seed=0, rest="drop"):
        super().__init__(keep, rest)
        self.seed = check_count(seed, "seed", least=0)

    def scores(self, tokens):
        n = tokens.x.shape[1] - tokens.prefix
        return uniform(n, self.seed, tokens.x.device).expand(len(tokens.x), n)


class Grid(InputPruning):
    """Evenly spread patches, in the order of `dither`. Half is a checkerboard."""

    def scores(self, tokens):
        return -dither(*tokens.grid, tokens.x.device).expand(len(tokens.x), -1)


def patch_variance(tokens):
    """(B, P): variance of the pixels inside each patch, mean over the three colours."""
    x = tokens.pixels.float()
    mean, square = (F.adaptive_avg_pool2d(values, tokens.grid) for values in (x, x * x))
    return (square - mean * mean).mean(1).flatten(1)


def spectral_saliency(tokens, width=64):
    """(B, P): spectral-residual saliency of the grey image at width × width pixels, mean over each patch."""
    grey = F.interpolate(tokens.pixels.float().mean(1, keepdim=True), size=(width, width), mode="area")
    spectrum = torch.fft.fft2(grey)
    log_size = spectrum.abs().clamp(min=1e-6).log()
    local = F.avg_pool2d(F.pad(log_size, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    back = torch.fft.ifft2(torch.polar((log_size - local).exp(), spectrum.angle())).abs() ** 2
    smooth = F.avg_pool2d(F.pad(back, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    return F.adaptive_avg_pool2d(smooth, tokens.grid).flatten(1)


def attention_entropy(tokens):
    """(B, N - prefix): entropy (nats) of each token's attention as a query, mean over heads. Needs the full map."""
    logits = tokens.q @ tokens.k.transpose(-1, -2) * tokens.q.shape[-1] ** -0.5
    logits = logits if tokens.logits_bias is None else logits + tokens.logits_bias
    tokens.macs += tokens.q.shape[1] * tokens.q.shape[2] ** 2 * tokens.q.shape[3]
    log_share = logits.float().log_softmax(-1)
    return -(log_share.exp() * log_share).sum(-1).mean(1)[:, tokens.prefix:]


SCORES = {  # name → Tokens → (B, N - prefix), highest stays
    "grid": lambda t: Grid(1.0).scores(t),
    "random": lambda t, seed=0: Random(1.0, seed).scores(t),
    "saliency": spectral_saliency,
    "variance": patch_variance,
    "token norm": lambda t: t.x[:, t.prefix:].float().norm(dim=-1),  # before the encoder: the original method
    "key norm": lambda t: t.k.float().norm(dim=-1).mean(1)[:, t.prefix:],
    "query norm": lambda t: t.q.float().norm(dim=-1).mean(1)[:, t.prefix:],
    "attention entropy": attention_entropy,
    "CLS attention": importance,
    "CLS attention × value": lambda t: importance(t, by_value=True),
}
SCORES |= {f"{name}, lowest": lambda t, score=SCORES[name]: -score(t)
           for name in ("variance", "token norm", "key norm", "query norm", "attention entropy")}
PICTURE_SCORES = ("grid", "random", "saliency", "variance", "variance, lowest")  # carried along as tokens leave
INPUT_SCORES = (*PICTURE_SCORES, "token norm", "token norm, lowest")  # those that can act before the encoder


BEFORE, SINGLE, SEVERAL, EVERY = PLACES = ("before the encoder", "one layer", "three layers", "every layer")
RESTS = {"drop": "dropped", "fuse": "fused", "evit_published": "EViT", "evit": "EViT, averaged", "merge": "merged"}


def layers_of(place, depth):
    """The layers (0-based, between attention and MLP) where tokens leave; -1 is before the encoder.

    One layer: at a quarter of the depth; three: at a quarter, half and three quarters."""
    quarter = depth // 4
    return {BEFORE: (-1,), SINGLE: (quarter,), SEVERAL: (quarter, depth // 2, 3 * depth // 4),
            EVERY: tuple(range(depth))}[place]


def join_nearest(tokens, kept, rest):
    """Each of `rest` (B, R) merges into the kept token, never the CLS token, with the most similar key."""
    metric = F.normalize((tokens.x if tokens.k is None else tokens.k.mean(1)).float(), dim=-1)
    a, b = take(metric, rest), take(metric, kept[:, tokens.prefix:])
    tokens.macs += a.shape[1] * b.shape[1] * a.shape[2]
    merge(tokens, kept, rest, (a @ b.transpose(1, 2)).argmax(-1) + tokens.prefix)


def part_with(tokens, kept, rest, how, scores):
    """What becomes of the tokens `rest` (B, R) that leave: `how` is a name in RESTS; scores: (B, n) of all."""
    if how == "drop":
        return drop(tokens, kept)
    if how == "merge":
        return join_nearest(tokens, kept, rest)
    sizes = torch.ones_like(tokens.x[..., 0], dtype=torch.float32) if tokens.sizes is None else tokens.sizes
    weight = sizes.gather(1, rest) if how == "fuse" else scores.gather(1, rest - tokens.prefix) + 1e-30  # all zero: their mean
    token, total = (take(tokens.x, rest) * weight[..., None]).sum(1), weight.sum(1)
    drop(tokens, kept)
    append(tokens, token if how == "evit_published" else token / total[:, None], total if how == "fuse" else None)


class ScoredReduction(Reducer):
    """Keep the tokens with the highest `score` at each of `layers`: a point of the grid score × place × rest.

    keep: share that stays each time. score: a name in SCORES. layers: see layers_of; None: three layers.
    rest: a name in RESTS; 'evit' and 'evit_published' need a CLS attention. seed: of the random score."""

    def __init__(self, keep, score="CLS attention", layers=None, rest="drop", seed=0, cls_only_last=False):
        check(layers is None or isinstance(layers, (tuple, list)) and all(is_count(layer, -1) for layer in layers), "layers", layers,
              "None or numbers of layers from 0 on, -1 before them")
        before = layers is not None and -1 in layers
        check_count(seed, "seed", least=0)
        check(score in SCORES, "score", score, ", ".join(SCORES))
        check(rest in RESTS, "rest", rest, ", ".join(RESTS))
        check(not before or score in INPUT_SCORES, "score before the encoder", score, ", ".join(INPUT_SCORES))
        check("evit" not in rest or score.startswith("CLS"), "score with EViT's token", score, "a CLS attention")
        self.keep, self.score, self.layers, self.rest, self.seed = check_keep(keep), score, layers, rest, seed
        self.size_bias, self.cls_only_last = float(rest in ("fuse", "merge")), cls_only_last

    def at_input(self, tokens):
        if self.layers is not None and -1 in self.layers:
            self.reduce(tokens)

    def after_attention(self, tokens):
        if tokens.layer in (layers_of(SEVERAL, tokens.depth) if self.layers is None else self.layers):
            self.reduce(tokens)

    def reduce(self, tokens):
        """Choose who stays; picture scores are computed once a pass and carried along."""
        n = tokens.x.shape[1] - tokens.prefix
        if (count := kept_count(self.keep, n)) < n:
            options = dict(seed=self.seed) if self.score == "random" else {}
            scores = SCORES[self.score](tokens, **options) if tokens.carried is None else tokens.carried
            kept, rest = split_kept(tokens, scores, count)
            part_with(tokens, kept, rest, self.rest, scores)
            if self.score in PICTURE_SCORES:  # a new token has none: it stays
                left = scores.gather(1, kept[:, tokens.prefix:] - tokens.prefix)
                tokens.carried = F.pad(left, (0, tokens.x.shape[1] - kept.shape[1]), value=torch.inf)


def fitted(factory, budget, model, image_size=None, cls_only_last=None):
    """The dearest reducer factory(strength) whose multiply-adds are at most `budget` × the dense encoder's.

    factory: a Reducer class, or a partial of one; its `kind` says what the strength is. budget: share in (0, 1].
    image_size: in pixels; None: the model's own. cls_only_last: the exact shortcut of the last layer; None: as the
    method has it. ValueError if the budget cannot be reached. The reducer's macs_share says which share it takes: in a shallow
    tower a method may have few strengths, the next of them above the budget ("ours" in 4 layers: 0.476 for 0.5)."""
    check_share(budget, "budget")
    check(cls_only_last is None or isinstance(cls_only_last, bool), "cls_only_last", cls_only_last, "None, True or False")
    kind, tower = getattr(factory, "func", factory).kind, make_tower(model)
    sides = sides_of(image_size or tower.image_size)
    patches = math.prod(side // patch for side, patch in zip(sides, tower.patch.kernel_size, strict=True))
    dense, make = encoder_macs(model, None, image_size), strength_at(factory, kind, patches, cls_only_last)

    def cost(reducer):
        macs = encoder_macs(model, reducer, image_size)
        reducer.macs_share = macs / dense
        return macs

    least = cost(make(0.0)) / (budget * dense) * budget
    check(least <= budget, "budget", budget, f"at least {least:.3f} for this method")
    return fit_budget(make, budget * dense, cost)


class ClusterMasking(Random):
    """Cluster-Masking-style (arXiv 2405.08815), used at inference: drop whole clusters of patches whose
    pixels look like a few random anchors; the similarity limit is set per image to keep the given share."""

    def __init__(self, keep, seed=0, anchors=0.03, rest="drop"):
        super().__init__(keep, seed, rest)
        self.anchors = check_share(anchors, "anchors")

    def scores(self, tokens):
        n = tokens.x.shape[1] - tokens.prefix
        size = tokens.pixels.shape[2] // tokens.grid[0], tokens.pixels.shape[3] // tokens.grid[1]
        patches = F.unfold(tokens.pixels.float(), size, stride=size).transpose(1, 2)
        patches = F.normalize(patches - patches.mean(-1, keepdim=True), dim=-1)
        chosen = uniform(n, self.seed, patches.device).topk(max(1, round(self.anchors * n))).indices
        tokens.macs += n * len(chosen) * patches.shape[-1]
        return -(patches @ patches[:, chosen].transpose(1, 2)).amax(-1)


class RatioSchedule(Reducer):
    """DynamicViT's schedule (arXiv 2106.02034) without its trained predictor: before each of three layers
    keep, keep², keep³ of the patches, by the CLS attention of the layer before."""

    def __init__(self, keep, cls_only_last=False):
        self.keep, self.cls_only_last = check_keep(keep), cls_only_last

    def before_layer(self, tokens):
        stages = layers_of(SEVERAL, tokens.depth)
        if tokens.layer in stages and tokens.layer > 0:
            count = max(1, int((tokens.first - tokens.prefix) * self.keep ** (stages.index(tokens.layer) + 1)))
            if count < tokens.x.shape[1] - tokens.prefix:
                drop(tokens, split_kept(tokens, importance(tokens), count)[0])


class PruMergeLike(Reducer):
    """After PruMerge+ (arXiv 2403.15388), at one layer (after a quarter): keep half by CLS attention and half evenly spread;
    to each kept token its `near` most similar dropped ones are added, weighted by their CLS attention.

    PruMerge lets the count vary by image, which cannot be batched, and lets tokens grow: here the share is
    fixed and the sum is divided by its weights, since no later layer was trained for longer tokens."""

    def __init__(self, keep, near=32, cls_only_last=False):
        self.keep, self.near, self.cls_only_last = check_keep(keep), check_count(near, "near"), cls_only_last

    def after_attention(self, tokens):
        n, p = tokens.x.shape[1] - tokens.prefix, tokens.prefix
        count = kept_count(self.keep, n)
        if tokens.layer != tokens.depth // 4 or count == n:
            return
        scores = importance(tokens)
        by_attention = scores.topk((count + 1) // 2, dim=1).indices
        chosen = scores.scatter(1, by_attention, 2.0)  # attention is at most 1
        free = (chosen >= 2).int().argsort(dim=1, stable=True)[:, : n - by_attention.shape[1]]  # the others, in raster order
        even = torch.linspace(0, free.shape[1] - 1, count - by_attention.shape[1], device=free.device).round().long()
        kept, rest = split_kept(tokens, chosen.scatter(1, free[:, even], 2.0), count)
        metric = F.normalize(wide(tokens.k.mean(1)), dim=-1)
        similarity = take(metric, kept[:, p:]) @ take(metric, rest).transpose(1, 2)
        limit = similarity.topk(min(self.near, rest.shape[1]), dim=-1).values[..., -1:]
        weight = (similarity >= limit) * scores.gather(1, rest - p)[:, None]
        mixed = take(tokens.x, kept[:, p:]) + weight @ wide(take(tokens.x, rest))
        tokens.macs += count * rest.shape[1] * (metric.shape[-1] + mixed.shape[-1])
        drop(tokens, kept)
        mixed = mixed / (1 + weight.sum(-1, keepdim=True))
        tokens.x = torch.cat([tokens.x[:, :p], mixed.to(tokens.x.dtype)], 1)


REDUCERS = {  # name → factory(strength, **options); strength: keep ratio, or mean tokens merged per layer
    "vtp": InputPruning,
    "vtp_mean": partial(InputPruning, rest="mean"),
    "vtp_learned": partial(InputPruning, rest="learned"),
    "random": Random,
    "grid": Grid,
    "cluster": ClusterMasking,
    "evit": partial(ScoredReduction, rest="evit"),
    "evit_published": partial(ScoredReduction, rest="evit_published"),
    "cls_drop": ScoredReduction,
    "cls_merge": partial(ScoredReduction, rest="merge"),
    "dynamicvit": RatioSchedule,
    "prumerge": PruMergeLike,
    "tome": MergeSimilar,
    "pitome": EnergyMerging,
    "diffrate": DiffRateMerging,
    "ours": ProtectedMerging,
}


def reducer_kind(name):
    """'keep' or 'merge': what the strength of a method means."""
    check(name in REDUCERS, "reducer", name, ", ".join(REDUCERS))
    return getattr(REDUCERS[name], "func", REDUCERS[name]).kind


def reducer_for_budget(name, budget, model, image_size=None, cls_only_last=None, **options):
    """The dearest reducer `name` whose multiply-adds are at most `budget` × the dense encoder's: `fitted` by name.

    options go to the method. ValueError for an unknown name or option and for a budget that cannot be reached."""
    reducer_kind(name)
    _, *known = signature(REDUCERS[name]).parameters.values()
    names = sorted({"cls_only_last", "image_size", *(one.name for one in known)})
    for option, value in options.items():
        check(option in names or any(one.kind is one.VAR_KEYWORD for one in known), option, value, f"options of {name!r}: {', '.join(names)}")
    return fitted(partial(REDUCERS[name], **options), budget, model, image_size, cls_only_last)
