# Provisional: will be written by `python -m lab.build` from vlm/clip_pruning.ipynb.
"""Token reduction in a vision tower: the encoder loop, what a reducer is, and the original pruning by patch norm."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check
from effarch.clip.towers import attend, make_tower, project, split_heads


@dataclass
class Tokens:
    """What a reducer sees and changes during a forward pass. B images, N tokens left, P patches at first."""

    x: torch.Tensor  # (B, N, D)
    pixels: torch.Tensor  # (B, 3, H, W), as given to the model
    prefix: int  # tokens in front that must stay (CLS)
    depth: int  # number of layers
    layer: int = -1  # index of the current layer; -1 before the first
    first: int = 0  # tokens that enter the first layer
    sizes: torch.Tensor | None = None  # (B, N): how many patches a token stands for; None = one each
    q: torch.Tensor | None = None  # (B, heads, N, d) of the latest attention
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    logits_bias: torch.Tensor | None = None  # (B, 1, 1, N): log sizes added to that attention's logits
    owner: torch.Tensor | None = None  # (B, prefix + P): where each patch is now, -1 = dropped; if traced
    counts: list = field(default_factory=list)  # per layer (keys in attention, tokens in MLP)
    macs: int = 0  # multiply-adds per image so far, the reducer's own matrix products included


def attention_step(tokens, block, heads, queries=None, size_bias=1.0, implementation="sdpa"):
    """x += attention(norm1(x)) for the first `queries` tokens (None = all); the others leave.

    size_bias: a token of size s gets size_bias · log s on its logits; with 1 as if it were there s times."""
    x = block.norm1(tokens.x)
    n, d = x.shape[1], x.shape[2]
    m = n if queries is None else queries
    bias = None
    if tokens.sizes is not None and size_bias:
        bias = (tokens.sizes.log() * size_bias)[:, None, None].to(x.dtype)
    q, k, v = (split_heads(layer(y), heads) for layer, y in
               ((block.q, x[:, :m]), (block.k, x), (block.v, x)))
    mixed = attend(q, k, v, bias, implementation)
    tokens.x = tokens.x[:, :m] + block.out(mixed.transpose(1, 2).flatten(2))
    tokens.q, tokens.k, tokens.v, tokens.logits_bias = q, k, v, bias
    tokens.macs += 2 * m * d * d + 2 * n * d * d + 2 * m * n * d


def mlp_step(tokens, block):
    """x += mlp(norm2(x))."""
    tokens.x = tokens.x + block.mlp(block.norm2(tokens.x))
    tokens.macs += 2 * tokens.x.shape[1] * tokens.x.shape[2] * block.hidden


def run_encoder(tower, pixels, reducer=None, trace=False, implementation="sdpa", interpolate=None):
    """All layers of a tower. pixels: (B, 3, H, W) → Tokens with x (B, N, D) before the final norm.

    interpolate: fit the position embeddings to the image size; None = where it is not the model's own.
    reducer=None is the dense encoder. With `reducer.cls_only_last` the last layer computes the CLS row only:
    nothing else of it is read, so the feature is the same."""
    interpolate = pixels.shape[-1] != tower.image_size if interpolate is None else interpolate
    x = tower.embed(pixels, interpolate)
    tokens = Tokens(x, pixels, tower.prefix, len(tower.blocks))
    tokens.macs = (x.shape[1] - tower.prefix) * tower.patch.weight.numel()
    if trace:
        tokens.owner = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
    if reducer is not None:
        reducer.at_input(tokens)
    tokens.x, tokens.first = tower.pre_norm(tokens.x), tokens.x.shape[1]
    for tokens.layer, block in enumerate(tower.blocks):
        last = tokens.layer == len(tower.blocks) - 1
        shortcut = last and tower.prefix == 1 and reducer is not None and reducer.cls_only_last
        if reducer is not None:
            reducer.before_layer(tokens)
        seen = tokens.x.shape[1]
        bias = 1.0 if reducer is None else reducer.size_bias
        attention_step(tokens, block, tower.heads, 1 if shortcut else None, bias, implementation)
        if reducer is not None and not shortcut:
            reducer.after_attention(tokens)
        tokens.counts.append((seen, tokens.x.shape[1]))
        mlp_step(tokens, block)
    return tokens


def pooled_output(tower, tokens):
    """(B, D) what the model calls pooler_output, from the encoder's last tokens."""
    tokens.macs += tower.pool_macs(tokens.x.shape[1])
    merged = tokens.sizes is not None
    return tower.pool(tokens.x, tokens.sizes.log() if merged else None)


def encode_images(model, pixel_values, reducer=None, implementation="sdpa", interpolate=None):
    """L2-normalised image features (B, P) of a CLIP, SigLIP or ViT model, through our own encoder loop.

    reducer=None gives the model's own features. Raises TypeError for an unsupported model."""
    tower = make_tower(model)
    tokens = run_encoder(tower, pixel_values, reducer, implementation=implementation, interpolate=interpolate)
    return F.normalize(project(model, pooled_output(tower, tokens)), dim=-1)


@torch.no_grad()
def trace_encoder(model, reducer=None, pixel_values=None, image_size=None, tower=None):
    """Tokens after one pass with everything recorded: `owner`, `counts` per layer, `macs` per image.

    pixel_values: (B, 3, H, W); None takes one blank image of the model's (or the given) size. tower: in place of the model's."""
    tower = tower or make_tower(model)
    weight = tower.patch.weight
    if pixel_values is None:
        side = image_size or tower.image_size
        pixel_values = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
    tokens = run_encoder(tower, pixel_values, reducer, trace=True)
    pooled = pooled_output(tower, tokens)
    projection = getattr(model, "visual_projection", None)
    tokens.macs += pooled.shape[-1] * projection.out_features if projection is not None else 0
    return tokens


def shapes_only(tower):
    """A Tower whose layers keep the width and compute nothing: the same multiply-adds are added up, ten times sooner."""
    same = nn.Identity()
    return replace(tower, blocks=[replace(b, q=same, k=same, v=same, out=same, mlp=same) for b in tower.blocks])


def encoder_macs(model, reducer=None, image_size=None):
    """Multiply-adds of one image through the vision encoder (2 FLOPs each), the reducer's own included."""
    return trace_encoder(model, reducer, image_size=image_size, tower=shapes_only(make_tower(model))).macs


def fit_budget(make, limit, cost, steps=14):
    """The reducer make(position) of highest cost that is at most `limit`, by bisection of position in [0, 1].

    make: position → reducer, dearer with position; cost: reducer → multiply-adds, or any unit that `limit` has, too.
    ValueError if none fits."""
    low, high, best = 0.0, 1.0, make(0.0)
    least = cost(best)
    check(least <= limit, "budget", limit, f"at least {least:.4g} for this method")
    if cost(make(1.0)) <= limit:
        return make(1.0)
    for _ in range(steps):
        middle = (low + high) / 2
        reducer = make(middle)
        low, high, best = (middle, high, reducer) if cost(reducer) <= limit else (low, middle, best)
    return best


def start_encoder(tower, pixels, layers):
    """(B, 3, S, S) → Tokens that have passed the first `layers` dense layers."""
    tokens = Tokens(tower.embed(pixels, pixels.shape[-1] != tower.image_size), pixels, tower.prefix, len(tower.blocks))
    tokens.macs = (tokens.x.shape[1] - tower.prefix) * tower.patch.weight.numel()
    tokens.x, tokens.first = tower.pre_norm(tokens.x), tokens.x.shape[1]
    for block in tower.blocks[:layers]:
        attention_step(tokens, block, tower.heads)
        mlp_step(tokens, block)
    return tokens


def continue_encoder(tower, tokens, reducer, first, attended=False):
    """Layers `first` to the last, changing `tokens`. attended: layer `first` is done up to its MLP."""
    for layer in range(first, tokens.depth):
        tokens.layer, block = layer, tower.blocks[layer]
        shortcut = layer == tokens.depth - 1 and tower.prefix == 1 and reducer.cls_only_last
        if not (attended and layer == first):
            reducer.before_layer(tokens)
            attention_step(tokens, block, tower.heads, 1 if shortcut else None, reducer.size_bias)
            if not shortcut:
                reducer.after_attention(tokens)
        mlp_step(tokens, block)
    return tokens


def read_out(model, tower, tokens):
    """Tokens after the last layer → L2-normalised features (B, P)."""
    feature = project(model, pooled := pooled_output(tower, tokens))
    tokens.macs += 0 if feature is pooled else pooled.shape[-1] * feature.shape[-1]
    return F.normalize(feature, dim=-1)


def select_images(tokens, index):
    """The images at `index` of a Tokens as a Tokens of their own; the original stays as it is."""
    parts = {name: getattr(tokens, name)[index] for name in ("x", "pixels", "q", "k", "v")
             if getattr(tokens, name) is not None}
    return replace(tokens, **parts)


class Reducer:
    """Base class; does nothing. Subclasses override one of the three places where tokens may leave.

    kind: 'keep' (its strength is a keep ratio in (0, 1]) or 'merge' (mean tokens merged per layer, >= 0).
    cls_only_last: compute only the CLS row of the last layer, which is exact where the CLS token is read.
    size_bias: weight of the log size on attention's logits; 1 lets a merged token count as often as its parts."""

    kind = "keep"
    cls_only_last = False
    size_bias = 1.0

    def at_input(self, tokens):
        """Before the first layer (and CLIP's first norm), positions already added."""

    def before_layer(self, tokens):
        """Before layer `tokens.layer`; q, k, v are those of the layer before."""

    def after_attention(self, tokens):
        """Inside layer `tokens.layer`: its attention is done, its MLP is next."""


def check_keep(keep):
    """Validate a keep ratio."""
    ok = isinstance(keep, (int, float)) and not isinstance(keep, bool) and 0 < keep <= 1
    check(ok, "keep ratio", keep, "a number above 0 and at most 1")
    return float(keep)


def kept_count(keep, n):
    """Tokens that remain of n: rounded up, at least one."""
    return min(n, max(1, -int(-keep * n // 1)))


def importance(tokens, by_value=False, samples=16):
    """(B, N - prefix): attention that the CLS token pays to every other token, mean over heads.

    by_value: times the length of the token's value vector. Without a CLS token: the mean over `samples`
    evenly spaced queries. Reuses the layer's q, k and v."""
    n = tokens.q.shape[2]
    rows = slice(0, 1) if tokens.prefix else slice(0, n, max(1, n // samples))
    q = tokens.q[:, :, rows]
    logits = q @ tokens.k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits if tokens.logits_bias is None else logits + tokens.logits_bias
    tokens.macs += q.shape[1] * q.shape[2] * tokens.k.shape[2] * q.shape[3]
    attention = torch.softmax(logits.float(), dim=-1).mean(2)
    attention = attention * tokens.v.float().norm(dim=-1) if by_value else attention
    return attention.mean(1)[:, tokens.prefix:]


def top_indices(scores, count):
    """(B, count) indices of the highest scores, in ascending order, so that tokens keep their order."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def split_kept(tokens, scores, count):
    """Indices into all N tokens: (B, prefix + count) kept, prefix first, and (B, rest) in token order."""
    order = scores.argsort(dim=1, descending=True, stable=True) + tokens.prefix
    front = torch.arange(tokens.prefix, device=order.device).repeat(len(order), 1)
    kept, rest = order[:, :count].sort(1).values, order[:, count:].sort(1).values
    return torch.cat([front, kept], 1), rest


def take(x, index):
    """x (B, N, D) at index (B, M) → (B, M, D); whole rows are copied, which is faster than gather."""
    batch, n, width = x.shape
    rows = index + torch.arange(0, batch * n, n, device=x.device)[:, None]
    return x.reshape(-1, width).index_select(0, rows.flatten()).view(batch, -1, width)


def track(tokens, kept, rest=None, target=None):
    """Record where every patch went: `rest` joins `target` (positions among the kept), else it is dropped."""
    if tokens.owner is None:
        return
    where = torch.full(tokens.x.shape[:2], -1, device=kept.device)
    where.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    if rest is not None:
        where.scatter_(1, rest, target)
    moved = where.gather(1, tokens.owner.clamp(min=0))
    tokens.owner = torch.where(tokens.owner < 0, tokens.owner, moved)


def drop(tokens, kept):
    """Keep the tokens `kept` (B, M), prefix included; the others are gone."""
    track(tokens, kept)
    if tokens.sizes is not None:
        tokens.sizes = tokens.sizes.gather(1, kept)
    tokens.x = take(tokens.x, kept)


def append(tokens, token, size=None):
    """Add one token (B, D) at the end; size: (B,) patches that it stands for, or None for a plain token."""
    if tokens.sizes is not None or size is not None:
        sizes = tokens.x.new_ones(tokens.x.shape[:2]) if tokens.sizes is None else tokens.sizes
        tokens.sizes = torch.cat([sizes, torch.ones_like(sizes[:, :1]) if size is None else size[:, None]], 1)
    tokens.x = torch.cat([tokens.x, token[:, None]], 1)


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
