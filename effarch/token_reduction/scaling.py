# Written by `python -m lab.build` from vlm/token_scaling.ipynb, where each part is explained: edit it there.
"""From which length on attention's quadratic term leads, and a token budget of its own for each image, in buckets."""

import numpy as np  # noqa: I001
import torch
import torch.nn.functional as F

from effarch.clip.towers import make_tower
from effarch.token_reduction.encoder import (
    attention_step, continue_encoder, read_out, select_images, start_encoder, trace_encoder)
from effarch.token_reduction.merging import ProtectedMerging


def fit_terms(tokens, ms):
    """(a, b, c) of t = a + b N + c N², none negative, by least squares of the relative errors. tokens, ms: (S,)."""
    from scipy.optimize import nnls

    n, t = np.asarray(tokens, float), np.asarray(ms, float)
    scale = n.max()
    columns = np.stack([np.ones_like(n), n / scale, (n / scale) ** 2], 1)
    a, b, c = nnls(columns / t[:, None], np.ones_like(t))[0]
    return a, b / scale, c / scale**2


def crossing(tokens, ms):
    """N* = b / c, the tokens from which on the quadratic part of the time is the larger one; infinite if it never is."""
    _, b, c = fit_terms(tokens, ms)
    return b / c if c > 0 else np.inf


def counts_by_attention(scores, tau):
    """(B, P) CLS attention → (B,): the fewest tokens whose share of it reaches tau."""
    share = scores.sort(dim=1, descending=True).values.cumsum(1) / scores.sum(1, keepdim=True)
    return ((share < tau).sum(1) + 1).clamp(max=scores.shape[1])


def twin_similarity(tokens):
    """(B, P): cosine of each token with the most similar other one, of the hidden states that our recipe compares."""
    x = F.normalize(tokens.x[:, tokens.prefix:].float(), dim=-1)
    tokens.macs += x.shape[1] ** 2 * x.shape[2]
    return (x @ x.transpose(1, 2) - 3 * torch.eye(x.shape[1], device=x.device)).amax(-1)


def counts_by_twins(twins, theta):
    """(B, P) similarity to the nearest other token → (B,): tokens without a twin closer than theta."""
    return (twins < theta).sum(1)


def level_of(counts, patches, levels):
    """(B,) counts → (B,) on the CPU: index of the least of the ascending shares `levels` that holds as many, else the last."""
    shares = counts.cpu().double() / patches
    return torch.searchsorted(torch.tensor(levels, dtype=torch.float64), shares - 1e-9).clamp(max=len(levels) - 1)


def first_merge(model, make=ProtectedMerging):
    """The layer (0-based) inside which the reducer make(0.5) first takes tokens away."""
    counts = trace_encoder(model, make(0.5)).counts
    return next(layer for layer, (before, after) in enumerate(counts) if after < before)


def encode_adaptive(model, pixels, keeps_of, layer, make=ProtectedMerging):
    """L2-normalised features (B, F) and mean multiply-adds per image, image i reduced by make(keep i).

    pixels: (B, 3, S, S). keeps_of: Tokens after the attention of `layer` → shares (B,) on the CPU. layer: see
    `first_merge`; before it, the reducer must leave tokens alone. Images of equal share run on together."""
    tower = make_tower(model)
    tokens = start_encoder(tower, pixels, layer, make(0.5))  # what it does to the input is the same for all shares
    tokens.layer = layer
    attention_step(tokens, tower.blocks[layer], tower.heads)
    keeps, features, macs = keeps_of(tokens), None, 0.0
    for keep in keeps.unique().tolist():
        index = (keeps == keep).nonzero()[:, 0].to(pixels.device)
        part, reducer = select_images(tokens, index), make(keep)
        reducer.after_attention(part)
        done = read_out(model, tower, continue_encoder(tower, part, reducer, layer, attended=True))
        features = done.new_empty(len(keeps), done.shape[1]) if features is None else features
        features[index] = done
        macs += part.macs * len(index) / len(keeps)
    return features, macs


def ideal_levels(loss, macs, limit):
    """(N,) the level of each image that makes the total loss least, of the choices that one price reaches, while the mean of `macs` is at most `limit`.

    loss: (N, L) of every image at every level; macs: (L,) ascending. By bisection of the price of a multiply-add: each image takes
    the level where loss + price · macs is least. ValueError if even the cheapest level costs more."""
    loss, macs = np.asarray(loss, float), np.asarray(macs, float)
    if macs[0] > limit:
        raise ValueError(f"limit={limit} is not allowed; allowed: at least {macs[0]}")
    low, high = 0.0, (loss.max() - loss.min() + 1) / np.diff(macs).min()  # at the high price all take the cheapest
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if macs[(loss + price * macs).argmin(1)].mean() <= limit else (price, high)
    return (loss + high * macs).argmin(1)
