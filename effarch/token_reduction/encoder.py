# Written by `python -m lab.build` from vlm/clip_pruning.ipynb, where each part is explained: edit it there.
"""Token reduction in a vision tower: the encoder loop, what a reducer is, the original pruning by patch norm, budgets."""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from effarch.checks import check, check_share, is_number
from effarch.clip.towers import attend, find_vision_module, make_tower, project, sides_of, split_heads, wide


@dataclass
class Tokens:
    """What a reducer sees and changes during a forward pass. B images, N tokens left, P patches at first, width D."""

    x: torch.Tensor  # (B, N, D)
    pixels: torch.Tensor  # (B, 3, H, W), as given to the model
    prefix: int  # tokens in front that must stay (CLS, registers)
    depth: int  # number of layers
    grid: tuple | None = None  # (rows, columns) of the patches
    layer: int = -1  # index of the current layer; -1 before the first
    first: int = 0  # tokens that enter the first layer
    sizes: torch.Tensor | None = None  # (B, N) float32: how many patches a token stands for; None = one each
    q: torch.Tensor | None = None  # (B, heads, N, d) of the latest attention
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    logits_bias: torch.Tensor | None = None  # (B, 1, 1, N): log sizes added to that attention's logits
    owner: torch.Tensor | None = None  # (B, prefix + P): where each patch is now, -1 = dropped; if traced
    rotary: tuple | None = None  # (cos, sin), (prefix + P, d) each, of the first tokens, where attention rotates by position
    place: torch.Tensor | None = None  # (B, N) which of those tokens each one is; a merged one is the one it was merged into
    carried: torch.Tensor | None = None  # (B, N - prefix) scores that a reducer goes on with in later layers
    counts: list = field(default_factory=list)  # per layer (keys in attention, tokens in MLP)
    macs: int = 0  # multiply-adds per image so far, the reducer's own matrix products included


class Reducer:
    """Base class; does nothing. Subclasses override one of the three places where tokens may leave.

    kind: 'keep' (its strength is a keep ratio in (0, 1]) or 'merge' (mean tokens merged per layer, >= 0).
    cls_only_last: compute only the CLS row of the last layer, which is exact where the CLS token is read.
    size_bias: weight of the log size on attention's logits; 1 lets a merged token count as often as its parts."""

    kind, cls_only_last, size_bias = "keep", False, 1.0

    def at_input(self, tokens):
        """Before the first layer (and CLIP's first norm), positions already added."""

    def before_layer(self, tokens):
        """Before layer `tokens.layer`; q, k, v are those of the layer before."""

    def after_attention(self, tokens):
        """Inside layer `tokens.layer`: its attention is done, its MLP is next."""


def attention_step(tokens, block, heads, queries=None, size_bias=1.0, implementation="sdpa"):
    """x += attention(norm1(x)) for the first `queries` tokens (None = all); the others leave.

    size_bias: a token of size s gets size_bias · log s on its logits; with 1 as if it were there s times."""
    x, bias = block.norm1(tokens.x), None
    n, d = x.shape[1:]
    m = n if queries is None else queries
    if tokens.sizes is not None and size_bias:
        bias = (tokens.sizes.log() * size_bias)[:, None, None].to(x.dtype)
    q, k, v = (split_heads(layer(y), heads) for layer, y in ((block.q, x[:, :m]), (block.k, x), (block.v, x)))
    if tokens.rotary is not None:
        cos, sin = (table[tokens.place][:, None] for table in tokens.rotary)
        q, k = block.rotate(q, cos[:, :, :m], sin[:, :, :m]), block.rotate(k, cos, sin)
    mixed = attend(q, k, v, bias, implementation)
    tokens.x = tokens.x[:, :m] + block.out(mixed.transpose(1, 2).flatten(2))
    tokens.q, tokens.k, tokens.v, tokens.logits_bias = q, k, v, bias
    wide, deep = (v.shape[1] * v.shape[3] for v in (q, v))  # D, but for heads that were made thinner
    tokens.macs += m * n * (wide + deep) + m * block.macs("q", d * wide) + n * block.macs("k", d * wide)
    tokens.macs += n * block.macs("v", d * deep) + m * block.macs("out", deep * d)


def mlp_step(tokens, block):
    """x += mlp(norm2(x))."""
    tokens.x = tokens.x + block.mlp(block.norm2(tokens.x))
    tokens.macs += 2 * tokens.x.shape[1] * tokens.x.shape[2] * block.hidden


def start_encoder(tower, pixels, layers=0, reducer=None, trace=False, interpolate=None):
    """(B, 3, H, W) → Tokens that have passed the reducer's `at_input` and the first `layers` dense layers.

    interpolate: fit the position embeddings to the image size; None = where it is not the model's own."""
    tower.check_pixels(pixels)
    if not isinstance(reducer, Reducer | None):
        raise TypeError(f"reducer={reducer!r} is not supported; supported: None or a Reducer, such as reducer_for_budget('ours', 0.5, model)")
    sides = tuple(pixels.shape[-2:])
    interpolate = sides != sides_of(tower.image_size) if interpolate is None else interpolate
    grid = tuple(side // patch for side, patch in zip(sides, tower.patch.kernel_size, strict=True))
    covered = pixels[..., :grid[0] * tower.patch.kernel_size[0], :grid[1] * tower.patch.kernel_size[1]]  # what is left over is in no patch
    tokens = Tokens(tower.embed(pixels, interpolate), covered, tower.prefix, len(tower.blocks), grid)
    n = tokens.x.shape[1]
    tokens.macs = (n - tower.prefix) * tower.patch.weight.numel()
    if tower.rotary is not None:
        tokens.rotary, tokens.place = tower.rotary(pixels), torch.arange(n, device=pixels.device).repeat(len(pixels), 1)
    if trace:
        tokens.owner = torch.arange(n, device=pixels.device).repeat(len(pixels), 1)
    if reducer is not None:
        reducer.at_input(tokens)
    tokens.x, tokens.first = tower.pre_norm(tokens.x), tokens.x.shape[1]
    return continue_encoder(tower, tokens, None, 0, until=layers)


def continue_encoder(tower, tokens, reducer, first, attended=False, until=None, implementation="sdpa"):
    """Layers `first` to the last (or to before `until`), changing `tokens`; reducer None = dense.

    attended: layer `first` is done up to its MLP. With `reducer.cls_only_last` the last layer computes the CLS row
    only: nothing else of it is read, so the feature is the same."""
    reducer = Reducer() if reducer is None else reducer
    for layer in range(first, tokens.depth if until is None else until):
        tokens.layer, block = layer, tower.blocks[layer]
        shortcut = layer == tokens.depth - 1 and tower.prefix == 1 and not tower.pools_all and reducer.cls_only_last
        if not (attended and layer == first):
            reducer.before_layer(tokens)
            attention_step(tokens, block, tower.heads, 1 if shortcut else None, reducer.size_bias, implementation)
            if not shortcut:
                reducer.after_attention(tokens)
        tokens.counts = [*tokens.counts, (tokens.k.shape[2], tokens.x.shape[1])]
        mlp_step(tokens, block)
    return tokens


def run_encoder(tower, pixels, reducer=None, trace=False, implementation="sdpa", interpolate=None):
    """All layers of a tower: (B, 3, H, W) → Tokens with x (B, N, D) before the final norm. reducer None = dense."""
    tokens = start_encoder(tower, pixels, 0, reducer, trace, interpolate)
    return continue_encoder(tower, tokens, reducer, 0, implementation=implementation)


def pooled_output(tower, tokens):
    """(B, D) what the model calls pooler_output, from the encoder's last tokens."""
    tokens.macs += tower.pool_macs(tokens.x.shape[1])
    return tower.pool(tokens.x, tokens.sizes)


def read_out(model, tower, tokens):
    """Tokens after the last layer → L2-normalised features (B, P)."""
    feature = project(model, pooled := pooled_output(tower, tokens), lambda: tower.finish(tokens.x[:, :1])[:, 0])
    tokens.macs += 0 if feature is pooled else pooled.shape[-1] * feature.shape[-1]
    return F.normalize(feature, dim=-1)


def refuse_dropout(tower):
    """ValueError for dropout in attention, which the encoder loop would leave out."""
    check((dropout := tower.dropout_now()) == 0, "attention dropout", dropout, "0 in training; or call model.eval()")


def encode_images(model, pixel_values, reducer=None, implementation="sdpa", interpolate=None):
    """L2-normalised image features (B, P) of a CLIP, SigLIP or ViT model, through our own encoder loop.

    reducer=None gives the model's own features, without what hooks on whole layers do (`token_reduction` refuses those).
    Raises TypeError for an unsupported model, ValueError for dropout in attention while it trains and for what are no images."""
    refuse_dropout(tower := make_tower(model))
    tokens = run_encoder(tower, pixel_values, reducer, implementation=implementation, interpolate=interpolate)
    return read_out(model, tower, tokens)


def select_images(tokens, index):
    """The images at `index` of a Tokens as a Tokens of their own; the original stays as it is."""
    names = ("x", "pixels", "sizes", "q", "k", "v", "logits_bias", "owner", "place", "carried")
    return replace(tokens, **{n: getattr(tokens, n)[index] for n in names if getattr(tokens, n) is not None})


def naive_pruned_features(model, pixels, keep):
    """VTP for CLIP one image at a time, with transformers' own layers: (B, 3, H, W) → (B, P), normalised."""
    vision, _ = find_vision_module(model)
    features = []
    for image in pixels:
        tokens = vision.embeddings(image[None])[0]
        norms = [float(patch.norm()) for patch in tokens[1:]]
        best = sorted(range(len(norms)), key=lambda i: -norms[i])[: math.ceil(keep * len(norms))]
        x = vision.pre_layrnorm(torch.stack([tokens[0], *(tokens[1 + i] for i in best)])[None])
        for layer in vision.encoder.layers:
            old = "causal_attention_mask" in layer.forward.__code__.co_varnames  # up to transformers 4
            out = layer(x, attention_mask=None, **({"causal_attention_mask": None} if old else {}))
            x = out[0] if isinstance(out, tuple) else out
        features.append(project(model, vision.post_layernorm(x[:, 0])))
    return F.normalize(torch.cat(features), dim=-1)


def check_keep(keep):
    """Validate a keep ratio, a number in (0, 1]."""
    return check_share(keep, "keep ratio")


def check_size_bias(size_bias):
    """Validate the weight of a token's log size on attention's logits, a number of at least 0."""
    check(is_number(size_bias) and size_bias >= 0, "size_bias", size_bias, "a number of at least 0")
    return size_bias


def kept_count(keep, n):
    """Tokens that remain of n: rounded up, at least one."""
    return min(n, max(1, math.ceil(keep * n - 1e-9)))


def split_kept(tokens, scores, count):
    """Indices into all N tokens: (B, prefix + count) kept, prefix first, and (B, rest), both in token order."""
    order = scores.argsort(dim=1, descending=True, stable=True) + tokens.prefix
    front = torch.arange(tokens.prefix, device=order.device).repeat(len(order), 1)
    return torch.cat([front, order[:, :count].sort(1).values], 1), order[:, count:].sort(1).values


def take(x, index):
    """x (B, N, D) at index (B, M) → (B, M, D); whole rows are copied, which is faster than gather."""
    batch, n, width = x.shape
    rows = index + torch.arange(batch, device=x.device)[:, None] * n
    return x.reshape(batch * n, width).index_select(0, rows.flatten()).view(batch, index.shape[1], width)


def track(tokens, kept, rest=None, target=None):
    """Record where every patch went: `rest` joins `target` (positions among the kept), else it is dropped."""
    if tokens.place is not None:
        tokens.place = tokens.place.gather(1, kept)
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
        sizes = torch.ones_like(wide(tokens.x[..., 0])) if tokens.sizes is None else tokens.sizes
        tokens.sizes = torch.cat([sizes, torch.ones_like(sizes[:, :1]) if size is None else size[:, None].to(sizes.dtype)], 1)
    tokens.x = torch.cat([tokens.x, token[:, None].to(tokens.x.dtype)], 1)
    if tokens.place is not None:  # it stands nowhere, like the CLS token
        tokens.place = F.pad(tokens.place, (0, 1))


class InputPruning(Reducer):
    """Keep the patches with the highest score before the encoder; drop the rest or leave a summary.

    keep: share of patches that stay. rest: 'drop', or 'mean' (one token, the mean of the dropped patches),
    or 'learned' (the same plus `offset`, a fitted vector (D,); zero until it is fitted). lowest: keep the lowest instead."""

    def __init__(self, keep, rest="drop", offset=None, lowest=False):
        check(rest in ("drop", "mean", "learned"), "rest", rest, "drop, mean, learned")
        check(offset is None or isinstance(offset, torch.Tensor), "offset", type(offset).__name__, "None or a tensor (D,)")
        self.keep, self.rest, self.offset, self.lowest = check_keep(keep), rest, offset, lowest

    def scores(self, tokens):
        """(B, P), higher = stays. Here: the L2 norm of the patch embedding (the original method)."""
        return tokens.x[:, tokens.prefix:].float().norm(dim=-1)

    def at_input(self, tokens):
        patches = tokens.x.shape[1] - tokens.prefix
        count = kept_count(self.keep, patches)
        if count == patches:
            return
        scores = self.scores(tokens)
        kept, rest = split_kept(tokens, -scores if self.lowest else scores, count)
        summary = None if self.rest == "drop" else wide(take(tokens.x, rest)).mean(1)
        drop(tokens, kept)
        if summary is not None:
            append(tokens, summary if self.offset is None else summary + self.offset)


@torch.no_grad()
def trace_encoder(model, reducer=None, pixel_values=None, image_size=None, images=1):
    """Tokens after one pass with everything recorded: `owner`, `counts` per layer, `macs` per image.

    pixel_values: (B, 3, H, W); None takes so many blank `images` of the model's (or the given) size. Hooks on single parts see that
    pass; running statistics of batch norms do not."""
    tower = make_tower(model)
    learning = [part for part in tower.module.modules() if part.training and getattr(part, "track_running_stats", False)]
    weight, sides = tower.patch.weight, sides_of(image_size or tower.image_size)
    if pixel_values is None:
        pixel_values = weight.new_zeros(images, weight.shape[1], *sides)
    try:
        for part in learning:
            part.training = False
        tokens = run_encoder(tower, pixel_values, reducer, trace=True)
        read_out(model, tower, tokens)
    finally:
        for part in learning:
            part.training = True
    return tokens


def encoder_macs(model, reducer=None, image_size=None):
    """Multiply-adds of one image through the vision encoder (2 FLOPs each), the reducer's own included."""
    try:
        return trace_encoder(model, reducer, image_size=image_size, images=0).macs
    except (RuntimeError, IndexError):  # a reducer that must see an image
        return trace_encoder(model, reducer, image_size=image_size).macs


def fit_budget(make, limit, cost, steps=14):
    """The dearest reducer make(position) that costs at most `limit`, by bisection of position in [0, 1].

    make: position → reducer, dearer with position; cost: reducer → multiply-adds. ValueError if none fits."""
    low, high, best, whole = 0.0, 1.0, make(0.0), make(1.0)
    check(cost(best) <= limit, "budget in multiply-adds", limit, f"at least {cost(best)} for this method")
    if cost(whole) <= limit:
        return whole
    for _ in range(steps):
        middle = (low + high) / 2
        reducer = make(middle)
        low, high, best = (middle, high, reducer) if cost(reducer) <= limit else (low, middle, best)
    return best


def strength_at(factory, kind, patches, cls_only_last=True, **options):
    """position in [0, 1] → a reducer; 0 is the strongest reduction, 1 is none. kind: 'keep' or 'merge' (see Reducer).

    cls_only_last: with or without the exact shortcut of the last layer; None: as the factory has it."""
    def make(position):
        reducer = factory(max(position, 1 / patches) if kind == "keep" else (1 - position) * patches / 2, **options)
        reducer.cls_only_last = reducer.cls_only_last if cls_only_last is None else cls_only_last
        return reducer

    return make


@torch.enable_grad()
def fit_summary(model, images, dense, keep, steps, batch=16, seed=0):
    """offset (D,) for InputPruning(keep, "learned", offset): minimises 1 - cosine(pruned, dense) by `steps` of Adam.

    images: anything with len() and batch(index, device) → (B, 3, H, W); dense: (n, P) their features without pruning."""
    tower = make_tower(model)
    with torch.no_grad():
        scale = tower.embed(images.batch([0], model.device))[:, tower.prefix:].abs().median()
    offset = torch.zeros(tower.patch.out_channels, device=model.device, requires_grad=True)
    reducer, optimizer = InputPruning(keep, "learned", offset), torch.optim.Adam([offset], lr=0.05 * float(scale))
    generator = torch.Generator().manual_seed(seed)
    frozen = [p.requires_grad_(False) for p in model.parameters() if p.requires_grad]
    try:
        for _ in range(steps):
            index = torch.randint(len(images), (batch,), generator=generator)
            pruned = encode_images(model, images.batch(index, model.device), reducer)
            loss = 1 - (pruned * dense[index].to(pruned.device)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return offset.detach()


def importance(tokens, by_value=False, samples=16):
    """(B, N - prefix) float32: the attention that the CLS token pays to every other token, mean over heads.

    by_value: times the length of its value vector. Without a CLS token: the mean over about `samples` spread queries."""
    q = tokens.q[:, :, :1] if tokens.prefix else tokens.q[:, :, :: max(1, tokens.q.shape[2] // samples)]
    logits = wide(q @ tokens.k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    logits = logits if tokens.logits_bias is None else logits + tokens.logits_bias
    tokens.macs += math.prod(q.shape[1:]) * tokens.k.shape[2]
    attention = torch.softmax(logits, dim=-1).mean(2)
    attention = attention * wide(tokens.v).norm(dim=-1) if by_value else attention
    return attention.mean(1)[:, tokens.prefix:]
