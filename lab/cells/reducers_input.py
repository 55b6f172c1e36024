"""Reducers that act once, before the encoder: the original method and its controls."""

import torch
import torch.nn.functional as F

from lab.cells.environment import check
from lab.cells.reducers import Reducer, append, check_keep, drop, kept_count, split_kept


class InputPruning(Reducer):
    """Keep the patches with the highest score before the encoder; drop the rest or leave a summary.

    keep: share of patches that stay. rest: 'drop', or 'mean' (one token, the mean of the dropped patches),
    or 'learned' (the same plus `offset`, a fitted vector (D,); zero until it is fitted)."""

    def __init__(self, keep, rest="drop", offset=None):
        check(rest in ("drop", "mean", "learned"), "rest", rest, "drop, mean, learned")
        self.keep, self.rest, self.offset = check_keep(keep), rest, offset

    def scores(self, tokens):
        """(B, P), higher = stays. Here: the L2 norm of the patch embedding (the original method)."""
        return tokens.x[:, tokens.prefix:].norm(dim=-1)

    def at_input(self, tokens):
        patches = tokens.x.shape[1] - tokens.prefix
        count = kept_count(self.keep, patches)
        if count == patches:
            return
        kept, rest = split_kept(tokens, self.scores(tokens), count)
        if self.rest == "drop":
            return drop(tokens, kept)
        others = tokens.x.sum(1) - tokens.x.gather(
            1, kept[..., None].expand(-1, -1, tokens.x.shape[-1])).sum(1)
        summary = others / rest.shape[1]
        drop(tokens, kept)
        append(tokens, summary if self.offset is None else summary + self.offset)


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
