# Written by `python -m lab.build` from vlm/qwen_pruning.ipynb, where each part is explained: edit it there.
"""Fewer vision tokens in Qwen2.5-VL and Qwen2-VL of transformers: before the tower, inside it, after it, in the language model."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

from effarch.checks import check
from effarch.token_reduction.encoder import Tokens, check_keep, importance, kept_count
from effarch.token_reduction.merging import match_alternating, merge
from effarch.vlm.inputs import shrink
from effarch.vlm.prompts import find_model, reading_differently
from effarch.vlm.shapes import tower_shape


@dataclass
class Units:
    """The vision tokens of a batch, packed: U units of m = 2 × 2 patches of all images, window by window."""

    x: torch.Tensor  # (U, m, D)
    index: torch.Tensor  # (U,) number of the unit among the prompts' placeholders
    frame: torch.Tensor  # (U,) an image is one frame, a video several: full attention looks at one
    window: torch.Tensor  # (U,) the other blocks look at one window
    place: torch.Tensor  # (U, 2) row and column in the frame
    cos: torch.Tensor  # (U, m, d) rotary embedding of each patch
    sin: torch.Tensor
    sizes: torch.Tensor | None = None  # (U,) how many units each stands for; None = one
    q: torch.Tensor | None = None  # (U, m, heads, d) of the latest block, rotated
    k: torch.Tensor | None = None

    def take(self, rows, **changed):
        """The Units at these rows, in this order."""
        kept = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return replace(self, **(kept | changed))


def layout(grid_thw, merge, side):
    """(frame, window, place) of every unit, row by row. grid_thw: (images, 3) patches; side: units along a window or None."""
    frames, windows, places, first = [], [], [], 0
    for frame, (h, w) in enumerate((h // merge, w // merge) for t, h, w in grid_thw.tolist() for _ in range(t)):
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
        corner = place // (side or max(h, w))
        windows.append(first + corner[:, 0] * (corner[-1, 1] + 1) + corner[:, 1])
        frames.append(torch.full((h * w,), frame))
        places.append(place)
        first = int(windows[-1].max()) + 1
    return [torch.cat(part).to(grid_thw.device) for part in (frames, windows, places)]


def embed_units(visual, pixels, grid_thw):
    """Patches (N, channels · frames · 14²) of images of sizes grid_thw → Units before the first block."""
    merge, (width, _, side, _) = visual.config.spatial_merge_size, tower_shape(visual.config)
    frame, window, place = layout(grid_thw, merge, side)
    order = window.argsort(stable=True)
    x = visual.patch_embed(pixels.to(visual.patch_embed.proj.weight.dtype)).view(len(order), merge**2, width)[order]
    corner = torch.cartesian_prod(torch.arange(merge), torch.arange(merge)).to(place.device)
    position = place[order][:, None] * merge + corner
    angle = (position[..., None].float() * visual.rotary_pos_emb.inv_freq.float()).flatten(2).repeat(1, 1, 2)
    return Units(x, order, frame[order], window[order], place[order], angle.cos(), angle.sin())


def segments(ids):
    """Runs of equal ids → for each length that occurs, the rows (runs, length) of those runs."""
    lengths = torch.unique_consecutive(ids, return_counts=True)[1]
    starts = lengths.cumsum(0) - lengths
    return [starts[lengths == n][:, None] + torch.arange(n, device=ids.device) for n in lengths.unique().tolist()]


def attend(q, k, v, groups, bias=None):
    """Attention inside each segment: q, k, v (U, m, heads, d) → (U, m, heads · d); one call for each length of segment."""
    parts = []
    for rows in groups:
        inside = (lambda t, rows=rows: t[rows]) if len(groups) > 1 else lambda t, rows=rows: t.unflatten(0, rows.shape)
        mask = None if bias is None else inside(bias).repeat_interleave(q.shape[1], 1)[:, None, None].to(q.dtype)
        mixed = F.scaled_dot_product_attention(*(inside(t).flatten(1, 2).transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        parts.append(mixed.transpose(1, 2).reshape(-1, *q.shape[1:]))
    if len(groups) == 1:
        return parts[0].flatten(2)
    return torch.empty_like(q).index_copy(0, torch.cat([rows.flatten() for rows in groups]), torch.cat(parts)).flatten(2)


def tower_block(block, units, groups):
    """One block of the library on Units; keeps its rotated queries and keys."""
    u, m, _ = units.x.shape
    q, k, v = block.attn.qkv(block.norm1(units.x)).view(u, m, 3, block.attn.num_heads, -1).unbind(2)
    q, k = library.apply_rotary_pos_emb_vision(q, k, units.cos, units.sin)
    bias = None if units.sizes is None else 0.85 * units.sizes.log()  # a merged unit counts nearly as often as its parts
    x = units.x + block.attn.proj(attend(q, k, v, groups, bias))
    return replace(units, x=x + block.mlp(block.norm2(x)), q=q, k=k)


def encode_vision(visual, pixels, grid_thw, plan=None):
    """(features (U', C), numbers (U',)) of the units that are left, in the prompt's order; plan: a Reduction, None = all."""
    units, full, groups = embed_units(visual, pixels, grid_thw), tower_shape(visual.config)[3], None
    for layer in range(-1, len(visual.blocks)):
        if layer >= 0:
            groups = groups or dict(full=segments(units.frame), window=segments(units.window))
            units = tower_block(visual.blocks[layer], units, groups["full" if layer in full else "window"])
        left = reduce_in_tower(plan, units, layer) if plan else units
        units, groups = left, groups if left is units else None
    features = visual.merger(units.x.flatten(0, 1))
    units, features = reduce_after_tower(plan, units, features) if plan else (units, features)
    order = units.index.argsort()
    return features[order], units.index[order]


@dataclass
class View:
    """What a method may look at: the n vision tokens of one image (a frame of a video; in the language model, of a prompt)."""

    x: torch.Tensor  # (n, C): patch embeddings, hidden states or merged features, wherever tokens are dropped
    place: torch.Tensor | None  # (n, 2) row and column; not in the language model
    q: torch.Tensor | None  # (n, rows, heads, d) queries and keys of the latest block, or keys of the language model's layer
    k: torch.Tensor | None
    received: Callable  # () → (n,) attention that each receives: from spread patches, or from the prompt's text
    middle: torch.Tensor | None = None  # (n,) the same in the middle of the tower
    seed: int = 0


def received_attention(q, k, samples=64):
    """(n,) mean attention that the units of one frame receive from about `samples` spread patches: q, k (n, m, heads, d)."""
    rows, columns = (t.flatten(0, 1).transpose(0, 1)[None] for t in (q, k))
    return importance(Tokens(rows, rows, prefix=0, depth=0, q=rows, k=columns), samples=samples).view(q.shape[:2]).mean(1)


def top(score):
    """The method that keeps the highest scores; score: View → (n,)."""
    return lambda view, count: (score(view).topk(count).indices.sort().values, None)


def norm(which, sign=1):
    """The original's score: mean length of a token's queries ('q') or keys ('k') over heads and patches; sign -1: the lowest."""
    return lambda view: sign * getattr(view, which).float().norm(dim=-1).flatten(1).mean(1)


def drawn(view):
    """Random scores, the same for the same seed and number of tokens."""
    return torch.rand(len(view.x), generator=torch.Generator().manual_seed(view.seed)).to(view.x.device)


def even(view):
    """Scores of an ordered dither of rows and columns: the highest are evenly spread."""
    order, (row, column) = torch.zeros_like(view.place[:, 0]), view.place.unbind(1)
    for bit in range(int(view.place.max()).bit_length()):
        order = order * 4 + ((row ^ column) >> bit & 1) * 2 + (row >> bit & 1)
    return -order


def farthest(x, kept, count):
    """Extend `kept`, rows of x, by what is least similar (cosine) to all of them until there are `count`; ascending."""
    x, rows = F.normalize(x.float(), dim=-1), kept.tolist()
    nearest = (x @ x[kept].T).amax(1).index_fill(0, kept, torch.inf)
    while len(rows) < count:
        rows.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, x @ x[rows[-1]])
        nearest[rows[-1]] = torch.inf
    return torch.tensor(rows, device=x.device).sort().values


def divprune(view, count):
    """DivPrune (arXiv 2503.02175): first what is farthest from its neighbours, then always the least similar to the kept."""
    x = F.normalize(view.x.float(), dim=-1)
    return farthest(x, (x @ x.T).fill_diagonal_(-1).amax(1).argmin()[None], count), None


def vispruner(view, count):
    """After VisPruner (arXiv 2412.01818): half by received attention, the other half unlike these and each other."""
    return farthest(view.x, view.received().topk(-(-count // 2)).indices, count), None


def hiprune(view, count):
    """After HiPrune (arXiv 2508.00553): a tenth by attention in the tower's middle, their neighbours, the rest by the last block's."""
    anchors = view.middle.topk(max(1, count // 10)).indices
    near = (view.place[:, None] - view.place[anchors]).abs().sum(-1).amin(1)
    return (view.received() + 2.0 * (near <= 1) + 2.0 * (near == 0)).topk(count).indices.sort().values, None


def join(view, kept, rest):
    """(len(kept), n) mixture: each of `rest` joins the token of `kept` with the most similar keys, with equal weight."""
    keys = F.normalize(view.k.float().flatten(1, 2).mean(1), dim=-1)
    mixture = torch.zeros(len(kept), len(keys), device=keys.device)
    mixture[torch.arange(len(kept)), kept] = 1
    mixture[(keys[rest] @ keys[kept].T).argmax(1), rest] = 1
    return mixture / mixture.sum(1, keepdim=True)


def visionzip(view, count):
    """After VisionZip (arXiv 2412.04467): 27 of 32 by received attention; the others join evenly spaced contextual tokens."""
    order = view.received().argsort(descending=True)
    dominant, rest = order[: max(1, count * 27 // 32)], order[max(1, count * 27 // 32) :].sort().values
    spaced = torch.linspace(0, len(rest) - 1, count - len(dominant)).round().long().to(rest.device)
    others = rest[torch.ones_like(rest).index_fill(0, spaced, 0).bool()]
    mixture = torch.eye(len(order), device=rest.device)[dominant]
    if len(spaced):
        mixture = torch.cat([mixture, join(view, rest[spaced], others)])
    kept, place = torch.cat([dominant, rest[spaced]]).sort()
    return kept, mixture[place]


def sparsevlm(view, count):
    """After SparseVLM (arXiv 2410.04417): by the attention of the text most like the image; of the rest the best 30 % join."""
    order = view.received().argsort(descending=True)
    kept, rest = order[:count].sort().values, order[count : count + int(0.3 * (len(order) - count))]
    return kept, join(view, kept, rest) if len(rest) else None


def pool(view, count):
    """Average pooling over a grid of at most `count` bins; a bin's mean takes the place of the unit nearest to its centre."""
    h, w = (int(n) + 1 for n in view.place.amax(0))
    rows, columns = shrink(h, w, count / (h * w))
    size = torch.tensor([rows / h, columns / w], device=view.place.device)
    bins = ((view.place + 0.5) * size).long()
    off = (bins + 0.5 - (view.place + 0.5) * size).abs().sum(1)
    mixture = F.one_hot(bins[:, 0] * columns + bins[:, 1], rows * columns).T.float()
    kept, order = (mixture / (1 + off)).argmax(1).sort()
    return kept, (mixture / mixture.sum(1, keepdim=True))[order]


MERGED = (0.1, 0.3, 0.6, 0.85, 1.0)  # what part of its merging ours has done after each of its blocks: most in the middle


def merge_windows(units, left):
    """Merge similar units within each window until a share `left` of its first number is there, at most half at a time.

    Our recipe of effarch.token_reduction with a window in an image's place: hidden states are compared, what the window attends
    to and what is large merges last, lengths are kept. A unit merges as a whole: its four patches with those of the other."""
    sizes = units.x.new_ones(len(units.x), dtype=torch.float32) if units.sizes is None else units.sizes
    parts = []
    for same in segments(units.window):
        whole = sizes[same].sum(1).round().long()  # units that each window had at first
        for n in whole.unique().tolist():
            rows = same[whole == n]
            merges = min(rows.shape[1] - max(1, round(left * n)), rows.shape[1] // 2)
            tokens = Tokens(units.x[rows].flatten(2), units.x, prefix=0, depth=0, sizes=sizes[rows])
            if merges > 0:
                tokens.q, tokens.k = (t[rows].flatten(1, 2).transpose(1, 2) for t in (units.q, units.k))
                weight = importance(tokens).unflatten(1, (rows.shape[1], -1)).mean(2)
                weight = ((weight / weight.mean(1, keepdim=True) + 0.05) * tokens.sizes).sqrt()
                kept, rest, target = match_alternating(tokens.x, merges, 0, weight)
                merge(tokens, kept, rest, target, keep_norm=True)
                rows = rows.gather(1, kept)
            parts.append((rows.flatten(), tokens.x.flatten(0, 1), tokens.sizes.flatten()))
    rows, x, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
    order = rows.argsort()
    return units.take(rows[order], x=x[order].unflatten(1, units.x.shape[1:]), sizes=sizes[order])


PLACES = ("before", "inside", "after", "language")  # before the tower, inside it, after its merger, in the language model


@dataclass
class Method:
    """How tokens are chosen: choose(View, count) → (rows kept, ascending; a mixture (kept, n) of all tokens, or None)."""

    choose: Callable | None
    places: tuple = ("inside", "after")
    depths: tuple = (2 / 36,)  # in the language model: before which layers, as shares of its depth
    raters: bool = False  # there: asked is the text most like the image, not the prompt's last token


METHODS = {
    "random": Method(top(drawn), PLACES),
    "grid": Method(top(even), PLACES[:3]),
    "patch_norm": Method(top(lambda view: view.x.float().norm(dim=-1)), ("before",)),
    "key_norm": Method(top(norm("k")), PLACES[1:]),
    "key_norm_low": Method(top(norm("k", -1)), PLACES[1:]),
    "query_norm": Method(top(norm("q"))),
    "query_norm_low": Method(top(norm("q", -1))),
    "attention": Method(top(lambda view: view.received())),
    "pool": Method(pool, ("after",)),
    "divprune": Method(divprune),
    "vispruner": Method(vispruner),
    "hiprune": Method(hiprune, ("after",)),
    "visionzip": Method(visionzip, ("after",)),
    "fastv": Method(top(lambda view: view.received()), ("language",)),
    "pyramiddrop": Method(top(lambda view: view.received()), ("language",), (1 / 4, 1 / 2, 3 / 4)),
    "sparsevlm": Method(sparsevlm, ("language",), (2 / 32, 6 / 32, 15 / 32), raters=True),
    "ours": Method(None, ("inside",)),
}


@dataclass
class Reduction:
    """What leaves where, and afterwards what was kept; `plan_reduction` makes it."""

    method: str
    keep: float
    where: str
    layers: list  # blocks of the tower after which, or layers of the language model before which, tokens leave
    windows: str  # 'stay' or 'rebuild'
    seed: int
    vision: object  # the vision configuration
    middle: torch.Tensor | None = None
    kept: list = field(default_factory=list)  # of every prompt read: numbers of the units that reach the language model

    def tower_share(self, block):
        """Share of the units that enter a block of the tower; behind the last block is the merger."""
        passed = sum(layer < block for layer in self.layers) if self.where == "inside" else int(self.where == "before")
        steps = MERGED[-len(self.layers):] if self.method == "ours" else (1.0,)
        return 1 - (1 - self.keep) * steps[passed - 1] if passed else 1.0

    def language_share(self, layer):
        """Share of the vision tokens in a layer of the language model."""
        passed = sum(at <= layer for at in self.layers) / len(self.layers) if self.where == "language" else 1
        return self.keep**passed

    def tower_units(self, block, units):
        """Units of a frame of so many that enter a block of the tower."""
        return kept_count(self.tower_share(block), units)

    def language_tokens(self, layer, frames, units):
        """Vision tokens of one image in a layer: each frame keeps its share before the language model, the prompt inside it."""
        share, n = self.language_share(layer), frames * units
        return kept_count(share, n) if self.where == "language" else frames * kept_count(share, units)


def plan_reduction(config, method, keep, where="after", layers=None, windows="stay", seed=0):
    """The Reduction with these settings for a model's configuration; ValueError for what is not there.

    layers: None takes the first block with full attention, ours five blocks with windows, the language model the method's."""
    check(method in METHODS, "method", method, ", ".join(METHODS))
    known, vision, depth = METHODS[method], config.vision_config, config.text_config.num_hidden_layers
    check(where in known.places, f"where for {method}", where, ", ".join(known.places))
    check(windows in ("stay", "rebuild"), "windows", windows, "stay, rebuild")
    full = tower_shape(vision)[3]
    most, windowed = depth if where == "language" else vision.depth, [b for b in range(vision.depth) if b not in full]
    if layers is None and where == "language":
        layers = sorted({min(depth - 1, max(1, round(share * depth))) for share in known.depths})
    elif layers is None and method == "ours":
        layers = sorted({min(windowed or full, key=lambda b: abs(b - vision.depth * twelfth / 12)) for twelfth in (1, 3, 5, 6, 8)})
    layers = [-1] if where == "before" else [full[0]] if layers is None else layers
    ok = isinstance(layers, list) and layers and all(isinstance(n, int) for n in layers) and layers == sorted(set(layers))
    check(ok and (where == "before" or 0 <= layers[0] and layers[-1] < most), "layers", layers,
          f"a list of ascending whole numbers from 0 to {most - 1}, or None")
    return Reduction(method, check_keep(keep), where, layers, windows, seed, vision)


def runs(ids):
    """Rows of each run of equal ids, a list."""
    return torch.arange(len(ids), device=ids.device).split(torch.unique_consecutive(ids, return_counts=True)[1].tolist())


def pick_units(plan, units, x):
    """Rows of Units that stay, frame by frame, and their x (rows, C)."""
    rows_left, x_left = [], []
    for rows in runs(units.frame):
        q, k, middle = (None if t is None else t[rows] for t in (units.q, units.k, plan.middle))
        view = View(x[rows], units.place[rows], q, k, partial(received_attention, q, k), middle, plan.seed)
        kept, mixture = METHODS[plan.method].choose(view, kept_count(plan.keep, len(rows)))
        rows_left.append(rows[kept])
        x_left.append(x[rows[kept]] if mixture is None else mixture.to(x.dtype) @ x[rows])
    return torch.cat(rows_left), torch.cat(x_left)


def reduce_in_tower(plan, units, layer):
    """Units after a block of the tower; layer -1 is before the first."""
    _, _, side, full = tower_shape(plan.vision)
    if plan.method == "hiprune" and layer == full[(len(full) - 1) // 2]:
        plan.middle = torch.cat([received_attention(units.q[rows], units.k[rows]) for rows in runs(units.frame)])
    if plan.keep == 1 or plan.where not in ("before", "inside") or layer not in plan.layers:
        return units
    if plan.method == "ours":
        return merge_windows(units, plan.tower_share(layer + 1))
    rows, x = pick_units(plan, units, units.x.flatten(1))
    units = units.take(rows, x=x.unflatten(1, units.x.shape[1:]))
    if plan.windows == "rebuild" and side:
        new = [torch.arange(len(rows)) // side**2 + 10**6 * i for i, rows in enumerate(runs(units.frame))]
        units.window = torch.cat(new).to(units.frame.device)
    return units


def reduce_after_tower(plan, units, features):
    """Units and their merged features (U, C) that go to the language model."""
    if plan.where == "after" and plan.keep < 1:
        rows, features = pick_units(plan, units, features)
        units = units.take(rows)
    return units, features


def prompt_view(layer, prompt, b, turn, plan):
    """View of prompt b before a layer of the language model, in whose attention the text asks; turn: (cos, sin) (B, N, d)."""
    attention, vision, real = layer.self_attn, prompt.vision[b], prompt.real[b]
    h, asks = layer.input_layernorm(prompt.h[b]), prompt.asks[b].nonzero().flatten()
    like = (prompt.h[b, vision].float() @ prompt.h[b, asks].float().T).softmax(1).mean(0) if METHODS[plan.method].raters else None
    asks = asks[-1:] if like is None else asks[like >= like.mean()]

    def turned(project, rows):
        part = project(h[rows]).unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        return library.apply_rotary_pos_emb(part, part, turn[0][b, rows], turn[1][b, rows], 0)[0]

    k = turned(attention.k_proj, slice(None))

    def received():
        q = turned(attention.q_proj, asks)
        logits = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * attention.scaling
        seen = real & (torch.arange(len(real), device=real.device) <= asks[:, None])
        return torch.softmax(logits.float().masked_fill(~seen, -torch.inf), -1).mean((0, 1))[vision]

    return View(prompt.h[b, vision], None, None, k.transpose(0, 1)[vision][:, None], received, seed=plan.seed)


def drop_columns(plan, i, layer, prompt, totals, turn):
    """The Prompt of which row b keeps its share of totals[b] vision tokens before layer i; None where nothing leaves."""
    if plan.where != "language" or i not in plan.layers or plan.keep == 1:
        return None
    keep, h, share = prompt.real.clone(), prompt.h.clone(), plan.language_share(i)
    for b, total in enumerate(totals):
        columns = prompt.vision[b].nonzero().flatten()
        if total and kept_count(share, total) < len(columns):
            view = prompt_view(layer, prompt, b, turn, plan)
            kept, mixture = METHODS[plan.method].choose(view, kept_count(share, total))
            keep[b] = keep[b].index_fill(0, columns, False).index_fill(0, columns[kept], True)
            if mixture is not None:
                h[b] = h[b].index_copy(0, columns[kept], mixture.to(h.dtype) @ h[b, columns])
    return replace(prompt, h=h).take(keep)


@contextmanager
def reduce_vision_tokens(model, method, keep, where="after", layers=None, windows="stay", seed=0):
    """Within the `with` block `model.generate(**inputs)`, `model(**inputs)` and pipelines see fewer vision tokens.

    method: a name in METHODS; keep: share in (0, 1] of each image (of each frame of a video; in the language model of each
    prompt) that is left in the end; where: a place in PLACES; layers, windows, seed: see plan_reduction. The block gets the
    Reduction. Survivors keep their positions; `model(**inputs)` returns the logits of the columns that are left. On exit, also
    after an exception, the model is what it was. TypeError for an unsupported model, ValueError for wrong arguments, for labels,
    prompts that are not filled up on the left, hidden states, and hooks or patches of what is not called: the tower, its blocks."""
    inner = find_model(model)
    plan = plan_reduction(inner.config, method, keep, where, layers, windows, seed)

    def encode(pixels, grid_thw):
        features, index = encode_vision(inner.visual, pixels, grid_thw, plan)
        plan.kept.append(index)
        return features, index

    with reading_differently(model, encode, partial(drop_columns, plan)):
        yield plan
