# Written by `python -m lab.build` from vlm/token_merging.ipynb, where each part is explained: edit it there.
"""Reducers that merge similar tokens: ToMe, and our recipe."""

from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F

from effarch.checks import check, is_number
from effarch.clip.towers import wide
from effarch.token_reduction.encoder import Reducer, check_keep, check_size_bias, importance, take, track


def merge_naive(tokens, kept, rest, target, keep_norm=False):
    """What `merge` computes, one image and one group at a time: the definition, to check the fast one."""
    sizes = tokens.sizes if tokens.sizes is not None else torch.ones_like(tokens.x[..., 0])
    x, size = take(tokens.x, kept), sizes.gather(1, kept)
    for image, i in [(b, t) for b in range(len(x)) for t in set(target[b].tolist())]:
        group = torch.cat([kept[image, i : i + 1], rest[image, target[image] == i]])
        weight = sizes[image, group] / sizes[image, group].sum()
        mean = weight @ tokens.x[image, group]
        length = (weight @ tokens.x[image, group].norm(dim=-1)) / mean.norm() if keep_norm else 1.0
        x[image, i], size[image, i] = mean * length, sizes[image, group].sum()
    return x, size


def merge(tokens, kept, rest, target, keep_norm=False):
    """Merge token rest[b, i] into kept[b, target[b, i]]: mean weighted by size, sizes add up.

    kept (B, M), rest and target (B, R). keep_norm=True gives a merged token the mean length of its parts
    instead of the shorter length of their mean. Sums in float32 at least. Only rows that change are computed with."""
    track(tokens, kept, rest, target)
    x = wide(tokens.x)
    sizes = tokens.sizes if tokens.sizes is not None else x.new_ones(x.shape[:2])
    new, parts, before = take(x, kept), take(x, rest), take(x, kept.gather(1, target))
    part_sizes = sizes.gather(1, rest)
    tokens.sizes = sizes.gather(1, kept).scatter_add_(1, target, part_sizes)
    weight = part_sizes / tokens.sizes.gather(1, target)
    rows = (target + torch.arange(len(x), device=x.device)[:, None] * kept.shape[1]).flatten()
    flat = new.view(-1, x.shape[-1])
    flat.index_add_(0, rows, ((parts - before) * weight[..., None]).flatten(0, 1))
    if keep_norm:
        length = before.norm(dim=-1)
        longer = torch.zeros_like(tokens.sizes).scatter_add_(1, target, (parts.norm(dim=-1) - length) * weight)
        merged = flat.index_select(0, rows)
        wanted = (length + longer.gather(1, target)).flatten() / merged.norm(dim=-1).clamp(min=1e-6)
        scaled = merged * wanted[:, None]
        if scaled.requires_grad:  # a group of three or more writes its row several times; each is a part of the gradient
            times = torch.zeros_like(tokens.sizes).scatter_add_(1, target, torch.ones_like(weight)).gather(1, target)
            scaled = scaled.detach() + (scaled - scaled.detach()) / times.flatten()[:, None]
        flat.index_copy_(0, rows, scaled)
    tokens.x = new.to(tokens.x.dtype)


def similarities(a, b):
    """a bᵀ over (B, N, C) in their own type, also under autocast, which would round until many are equal."""
    device = "cpu" if a.is_meta else a.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return a @ b.transpose(1, 2)


def match_alternating(metric, merges, prefix=1, weight=None):
    """ToMe's matching (arXiv 2210.09461): tokens at even places (A) choose their most similar at odd ones (B).

    metric: (B, N, C), compared by cosine in float32; prefix: tokens in front that stay. The `merges` pairs with
    the least loss merge: 1 - similarity, times the source's `weight` (B, N) if given. Returns kept (B, N - merges),
    A before B and each in order, rest and target (B, merges), as `merge` wants them."""
    if prefix > 1:  # as with one; the others go back in front
        parts = [None if t is None else torch.cat([t[:, :1], t[:, prefix:]], 1) for t in (metric, weight)]
        kept, rest, target = match_alternating(parts[0], merges, 1, parts[1])
        front = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
        return torch.cat([front, kept[:, 1:] + prefix - 1], 1), rest + prefix - 1, target + prefix - 1
    metric = F.normalize(metric.float(), dim=-1)
    similarity, partner = similarities(metric[:, ::2], metric[:, 1::2]).max(-1)
    loss = 1 - similarity if weight is None else (1 - similarity) * weight[:, ::2]
    loss[:, :prefix] = torch.inf  # the CLS token is in A, where nothing joins it, and never leaves
    order = loss.argsort(dim=1, stable=True)
    source, stay = order[:, :merges], order[:, merges:].sort(1).values
    odd = torch.arange(1, metric.shape[1], 2, device=metric.device).expand(len(metric), -1)
    return torch.cat([2 * stay, odd], 1), 2 * source, partner.gather(1, source) + stay.shape[1]


class MergeSimilar(Reducer):
    """ToMe (arXiv 2210.09461): merge the most similar pairs of tokens in every layer, between attention and MLP.

    r: mean tokens merged per layer. Unlike the published code we keep the order of tokens also without a CLS token."""

    kind = "merge"

    def __init__(self, r, cls_only_last=False, size_bias=1.0):
        check(is_number(r) and r >= 0, "r", r, "a finite number of at least 0")
        self.r, self.cls_only_last, self.size_bias = r, cls_only_last, check_size_bias(size_bias)

    def merges(self, tokens):
        """How many tokens to merge in this layer; the roundings of a fractional r add up to the right total."""
        return round(self.r * (tokens.layer + 1)) - round(self.r * tokens.layer)

    def metric(self, tokens):
        """(B, N, C) what similarity is measured on: the keys, mean over heads."""
        return tokens.k.float().mean(1)

    def weight(self, tokens):
        """(B, N) how much losing a source matters, or None for all alike."""
        return None

    def after_attention(self, tokens, keep_norm=False):
        n = tokens.x.shape[1]
        merges = min(self.merges(tokens), (n - tokens.prefix) // 2)
        if merges <= 0:
            return
        metric, n = self.metric(tokens), n - max(0, tokens.prefix - 1)
        tokens.macs += (n + 1) // 2 * (n // 2) * metric.shape[-1]
        merge(tokens, *match_alternating(metric, merges, tokens.prefix, self.weight(tokens)), keep_norm)


def hump(keep, depth, end=0.32, fall=3.5):
    """Share of the tokens left after each layer, `keep` on average: all after the first layer, end · keep after
    the last, and most of the merging in the middle: (1 - u^rise)^fall, u from 0 to 1; `rise` is solved for."""
    if depth < 3:
        return (keep,) * depth
    last = max(end * keep, 1 - (1 - keep) * depth / 2)  # the second where `keep` is near 1
    last = min(last, (keep * depth - 1) / (depth - 1))  # a shallow network that must keep little
    if last <= 0:
        return (keep,) * depth

    def left(rise):
        steps = (min(1.0, layer / (depth - 2)) for layer in range(depth))
        return tuple(last + (1 - last) * (1 - u**rise) ** fall for u in steps)

    low, high = 0.01, 100.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sum(left(middle)) <= keep * depth else (low, middle)
    return left(low)


def straight(keep, depth):
    """Share of the tokens left after each layer, `keep` on average, if each merges the same number (ToMe); never fewer than a fiftieth, which is more on average where `keep` is small."""
    return tuple(max(0.02, 1 - 2 * (1 - keep) * (layer + 1) / (depth + 1)) for layer in range(depth))


@lru_cache
def checkered_order(rows, columns, prefix, device):
    """(prefix + P,) on the device, made once for it: the prefix, then the patches with every second row's columns swapped pairwise."""
    with torch.inference_mode(False):
        places = torch.arange(rows * columns).view(rows, columns // 2, 2)
        places[1::2] = places[1::2].flip(-1)
        return torch.cat([torch.arange(prefix), places.flatten() + prefix]).to(device)


def checkerboard(tokens):
    """Order the patches so that all four neighbours of a patch stand at places of the other parity.

    On a grid of even width every second row swaps its columns pairwise; one of odd width alternates as it is."""
    rows, columns = tokens.grid or (0, 1)
    if columns % 2 or rows * columns != tokens.x.shape[1] - tokens.prefix:
        return
    order = checkered_order(rows, columns, tokens.prefix, tokens.x.device).expand(len(tokens.x), -1)
    track(tokens, order)
    tokens.x = take(tokens.x, order)


MERGING_TWELFTHS = (1, 3, 5, 6, 8)  # where in the depth ours merges: five times, for every merge takes time


class ProtectedMerging(MergeSimilar):
    """Our recipe: ToMe with eight changes. keep: mean share of the tokens left over the layers.

    The other arguments remove one change each: shape=straight, every_layer=True, checkered=False, hidden=False,
    protect=False, keep_norm=False, size_bias=1.0, cls_only_last=False."""

    kind = "keep"

    def __init__(self, keep, shape=hump, every_layer=False, checkered=True, hidden=True, protect=True,
                 keep_norm=True, size_bias=0.85, cls_only_last=True):
        check(callable(shape), "shape", shape, "a function (keep, depth) → shares, such as hump or straight")
        self.keep, self.shape, self.every_layer = check_keep(keep), shape, every_layer
        self.checkered, self.hidden, self.protect = checkered, hidden, protect
        self.keep_norm, self.size_bias, self.cls_only_last = keep_norm, check_size_bias(size_bias), cls_only_last
        self.left = {}  # what the shape says for a depth: it is solved for once, not in every layer

    def at_input(self, tokens):
        if self.checkered and self.keep < 1:
            checkerboard(tokens)

    def merges(self, tokens):
        """What the shape asks for, on average over the layers up to the next merge."""
        known = self.keep, self.shape, tokens.depth
        if known not in self.left:
            self.left[known] = self.shape(self.keep, tokens.depth)
        left, five = self.left[known], {tokens.depth * twelfth // 12 for twelfth in MERGING_TWELFTHS}
        at = range(tokens.depth) if self.every_layer else sorted(five)
        if tokens.layer not in at:
            return 0
        until = next((layer for layer in at if layer > tokens.layer), tokens.depth)
        mean = sum(left[tokens.layer : until]) / (until - tokens.layer)
        return tokens.x.shape[1] - max(tokens.prefix + 1, round(mean * tokens.first))

    def metric(self, tokens):
        return tokens.x if self.hidden else super().metric(tokens)

    def weight(self, tokens):
        if not self.protect:
            return None
        scores = importance(tokens)
        weight = F.pad(scores / scores.mean(1, keepdim=True).clamp(min=1e-30) + 0.05, (tokens.prefix, 0))  # CLS may see itself only
        return (weight if tokens.sizes is None else weight * tokens.sizes).sqrt()

    def after_attention(self, tokens):
        super().after_attention(tokens, self.keep_norm)


class EnergyMerging(MergeSimilar):
    """PiToMe (arXiv 2405.16148): every layer merges the tokens of the highest energy, 1 - keep of the patches. keep: share that stays in each."""

    kind = "keep"

    def __init__(self, keep, cls_only_last=False, size_bias=1.0):
        self.keep, self.cls_only_last, self.size_bias = check_keep(keep), cls_only_last, check_size_bias(size_bias)

    def after_attention(self, tokens):
        n, p = tokens.x.shape[1] - tokens.prefix, tokens.prefix
        if (merges := min(int(n * (1 - self.keep) + 1e-9), n // 2)) <= 0:
            return
        unit = F.normalize(self.metric(tokens)[:, p:], dim=-1)
        similarity, margin = similarities(unit, unit), 0.9 * (1 - tokens.layer / tokens.depth)
        order = F.elu(similarity - margin).mean(-1).argsort(dim=1, descending=True, stable=True)
        a, b = order[:, : 2 * merges : 2], order[:, 1 : 2 * merges : 2]
        tokens.macs += n * n * unit.shape[-1]
        closest = similarity.gather(1, a[..., None].expand(-1, -1, n)).gather(2, b[:, None].expand(-1, merges, -1)).argmax(-1)
        kept = torch.cat([b, order[:, 2 * merges :]], 1) + p  # the targets first
        front = torch.arange(p, device=kept.device).expand(len(kept), -1)
        merge(tokens, torch.cat([front, kept], 1), a + p, closest + p)


DIFFRATE = (197, 178, 162, 141, 115, 96, 78, 60, 47, 21, 13, 3)  # of 197 tokens, after each layer of DeiT-B at 8.7 GMAC


def diffrate(keep, depth):
    """Share of the tokens left after each layer, `keep` on average, in the shape that DiffRate (arXiv 2305.17997) learned for DeiT-B."""
    if keep * depth <= 1 or keep == 1:  # nothing leaves in the first layer, or in any
        return (keep,) * depth
    at = [i * (len(DIFFRATE) - 1) / max(depth - 1, 1) for i in range(depth)]
    learned = [DIFFRATE[int(i)] + (i % 1) * (DIFFRATE[min(int(i) + 1, 11)] - DIFFRATE[int(i)]) for i in at]
    low, high = 1e-3, 1e3
    for _ in range(50):  # a power of the shares keeps the shape and moves the mean
        power = (low * high) ** 0.5
        left = tuple((count / 197) ** power for count in learned)
        low, high = (power, high) if sum(left) > keep * depth else (low, power)
    return left


class DiffRateMerging(ProtectedMerging):
    """ToMe's merging with DiffRate's schedule. keep: mean share of the tokens left over the layers."""

    def __init__(self, keep, cls_only_last=False):
        super().__init__(keep, diffrate, every_layer=True, checkered=False, hidden=False, protect=False, keep_norm=False,
                         size_bias=1.0, cls_only_last=cls_only_last)
