# Written by `python -m lab.build` from vlm/query_tokens.ipynb, where each part is explained: edit it there.
"""Learned queries and their rivals: ways to hand a few tokens of a picture to whoever reads it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count
from effarch.clip.towers import attend, split_heads
from effarch.token_reduction.encoder import Tokens, take
from effarch.token_reduction.merging import match_alternating, merge

OBJECTIVES = ("itc", "itm", "itg")


def query_mask(objective, queries, words):
    """(B, Q + T, Q + T) bool: may the token of a row look at the token of a column? Q queries stand before T words.

    objective: 'itc' (queries and words apart), 'itm' (all see all), 'itg' (words see the queries and earlier words, queries only
    themselves): BLIP-2, arXiv 2301.12597, figure 2. words: (B, T) bool, False for padding, which nothing sees."""
    check(objective in OBJECTIVES, "objective", objective, ", ".join(OBJECTIVES))
    count = words.shape[1]
    mask = torch.ones(queries + count, queries + count, dtype=torch.bool, device=words.device)
    mask[:queries, queries:] = objective == "itm"
    mask[queries:, :queries] = objective != "itc"
    if objective == "itg":
        mask[queries:, queries:] = mask[queries:, queries:].tril()
    return mask & F.pad(words.bool(), (queries, 0), value=True)[:, None]


class MultiHead(nn.Module):
    """Multi-head attention, W_o softmax(q kᵀ / √d) v: x (B, N, width) looks at source (B, M, source_width)."""

    def __init__(self, width, heads, source_width=None):
        super().__init__()
        check(width % heads == 0, "heads", heads, f"a divisor of the width {width}")
        self.heads, source_width = heads, source_width or width
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(source_width, width), nn.Linear(source_width, width)

    def forward(self, x, source, mask=None):
        """(B, N, width). mask: bool, True = may look, or float, added to the logits; (B, N, M) or (1, N, M)."""
        fits = mask is None or mask.dim() == 3 and (mask.dtype == torch.bool or mask.is_floating_point())
        check(fits, "mask", None if mask is None else (tuple(mask.shape), mask.dtype), "(B, N, M) or (1, N, M), bool or float")
        q, k, v = (split_heads(layer(y), self.heads) for layer, y in ((self.q, x), (self.k, source), (self.v, source)))
        return self.out(attend(q, k, v, None if mask is None else mask[:, None]).transpose(1, 2).flatten(2))


def mlp(width, hidden=None):
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, hidden or 4 * width), nn.GELU(), nn.Linear(hidden or 4 * width, width))


class QFormerLayer(nn.Module):
    """One layer: attention among queries and words, cross-attention of the queries to the picture, an MLP of their own for each.

    Every part is followed by its LayerNorm, as in BERT: x = norm(x + part(x)). crosses: whether it looks at the picture."""

    def __init__(self, width, heads, picture_width, crosses, hidden=None, reads=True, eps=1e-12):
        super().__init__()
        self.attention, self.attention_norm = MultiHead(width, heads), nn.LayerNorm(width, eps)
        self.cross = MultiHead(width, heads, picture_width) if crosses else None
        self.cross_norm = nn.LayerNorm(width, eps) if crosses else None
        self.mlp, self.mlp_norm = mlp(width, hidden), nn.LayerNorm(width, eps)
        self.word_mlp, self.word_norm = (mlp(width, hidden), nn.LayerNorm(width, eps)) if reads else (None, None)

    def forward(self, x, queries, picture, mask=None, bias=None):
        """x (B, Q + T, width), the first `queries` of which are queries; picture (B, N, picture_width); bias (1, Q, N) of its logits."""
        x = self.attention_norm(x + self.attention(x, x, mask))
        seen, words = x[:, :queries], x[:, queries:]
        if self.cross is not None:
            seen = self.cross_norm(seen + self.cross(seen, picture, bias))
        seen = self.mlp_norm(seen + self.mlp(seen))
        return torch.cat([seen, self.word_norm(words + self.word_mlp(words))], 1) if words.shape[1] else seen


class QFormer(nn.Module):
    """BLIP-2's querying transformer (arXiv 2301.12597): Q learned queries read a picture, beside words if there are any.

    width: of queries and words; picture_width: of a patch; every: the first of so many layers looks at the picture; vocabulary: of
    the words, 0 = it reads none; longest: most words. Queries start at N(0, 0.02²): equal ones would stay equal. grid: (rows, columns)
    of the patches, to give every query a place (not in BLIP-2): it begins by looking around there, see `place_bias`."""

    def __init__(self, queries, width, picture_width, depth=2, heads=4, every=2, vocabulary=0, longest=64, hidden=None, grid=None, eps=1e-12):
        super().__init__()
        check_count(queries, "queries")
        self.queries = nn.Parameter(0.02 * torch.randn(queries, width))
        self.embed = nn.Embedding(vocabulary, width) if vocabulary else None
        self.places = nn.Embedding(longest, width) if vocabulary else None
        self.norm = nn.LayerNorm(width, eps)
        self.sharpness = nn.Parameter(torch.tensor(4.0)) if grid else None
        self.register_buffer("nearness", place_bias(nearly_square(queries), grid)[None] if grid else None)
        self.layers = nn.ModuleList(QFormerLayer(width, heads, picture_width, i % every == 0, hidden, bool(vocabulary), eps)
                                    for i in range(depth))

    def forward(self, picture, ids=None, objective="itm", words=None, queries=None):
        """(B, Q, width) and, where there are words ids (B, T), their states (B, T, width), else None.

        picture: (B, N, picture_width). words: (B, T) bool, False for padding; None: no padding. objective: which mask. queries:
        (B, Q, width) in the place of the learned ones."""
        x = (self.queries if queries is None else queries).expand(len(picture), -1, -1)
        count, mask, bias = x.shape[1], None, None if self.sharpness is None else self.sharpness * self.nearness
        if ids is not None:
            check(self.embed is not None, "ids", "given", "None, for a Q-Former without a vocabulary")
            x = torch.cat([x, self.embed(ids) + self.places.weight[: ids.shape[1]]], 1)
            mask = query_mask(objective, count, torch.ones_like(ids, dtype=torch.bool) if words is None else words)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, count, picture, mask, bias)
        return x[:, :count], x[:, count:] if ids is not None else None


def nearly_square(count):
    """(rows, columns) of `count` places: the most even way to write it as a product; 32 → (4, 8)."""
    rows = next(r for r in range(math.isqrt(check_count(count, "count")), 0, -1) if count % r == 0)
    return rows, count // rows


def place_bias(coarse, fine):
    """(coarse places, fine places): minus the squared distance of their centres on one picture, in cells of the coarse grid.

    coarse, fine: (rows, columns). exp(sharpness · bias) is a Gaussian around each coarse place, as DETR's queries got in SMCA
    (arXiv 2101.07448)."""
    rows, columns = (-(((torch.arange(n) + 0.5)[:, None] - (torch.arange(m) + 0.5) * n / m) ** 2) for n, m in zip(coarse, fine, strict=True))
    return (rows[:, None, :, None] + columns[None, :, None, :]).reshape(coarse[0] * coarse[1], fine[0] * fine[1])


def from_blip2(theirs, queries, embeddings=None):
    """The QFormer that computes what transformers' Blip2QFormerModel `theirs` does, with copies of its weights.

    queries: (1, Q, width) or (Q, width), what `query_tokens` is there; embeddings: a Blip2TextEmbeddings, or None: it reads no words."""
    config, weights, reads = theirs.config, theirs.state_dict(), embeddings is not None
    check(config.hidden_act == "gelu", "hidden_act", config.hidden_act, "gelu")
    ours = QFormer(queries.shape[-2], config.hidden_size, config.encoder_hidden_size, config.num_hidden_layers,
                   config.num_attention_heads, config.cross_attention_frequency, config.vocab_size if reads else 0,
                   config.max_position_embeddings, config.intermediate_size, eps=config.layer_norm_eps)
    names = {"norm": "layernorm"}
    for i, layer in enumerate(ours.layers):
        mine, other = f"layers.{i}", f"encoder.layer.{i}"
        for part, told in [("attention", "attention"), ("cross", "crossattention")][: 1 if layer.cross is None else 2]:
            names |= {f"{mine}.{part}.{short}": f"{other}.{told}.attention.{long}" for short, long in dict(q="query", k="key", v="value").items()}
            names |= {f"{mine}.{part}.out": f"{other}.{told}.output.dense", f"{mine}.{part}_norm": f"{other}.{told}.output.LayerNorm"}
        for part, norm, end in [("mlp", "mlp_norm", "_query"), ("word_mlp", "word_norm", "")][: 2 if reads else 1]:
            names |= {f"{mine}.{part}.0": f"{other}.intermediate{end}.dense", f"{mine}.{part}.2": f"{other}.output{end}.dense",
                      f"{mine}.{norm}": f"{other}.output{end}.LayerNorm"}
    copied = {f"{mine}.{kind}": weights[f"{other}.{kind}"] for mine, other in names.items() for kind in ("weight", "bias")}
    copied["queries"] = queries.reshape(ours.queries.shape)
    if reads:
        copied |= {"embed.weight": embeddings.word_embeddings.weight, "places.weight": embeddings.position_embeddings.weight}
    ours.load_state_dict(copied)
    return ours.to(queries.device).train(theirs.training)


class PerceiverResampler(nn.Module):
    """Flamingo's (arXiv 2204.14198, figure 5): learned latents look at the patches and at themselves, x += attention(x, [patches, x]),
    x += MLP(x), the norms before."""

    def __init__(self, queries, width, picture_width, depth=2, heads=4):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(check_count(queries, "queries"), width))
        self.embed = nn.Linear(picture_width, width)
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width), MultiHead(width, heads),
                                                   nn.LayerNorm(width), mlp(width)]) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, picture):
        """(B, N, picture_width) → (B, Q, width)."""
        picture, x = self.embed(picture), self.queries.expand(len(picture), -1, -1)
        for patch_norm, norm, attention, mlp_norm, step in self.layers:
            y = norm(x)
            x = x + attention(y, torch.cat([patch_norm(picture), y], 1))
            x = x + step(mlp_norm(x))
        return self.norm(x)
def pool_patches(x, grid, count):
    """Average pooling: (B, rows · columns, C) of a grid → (B, count, C), means over nearly equal rectangles."""
    maps = x.transpose(1, 2).unflatten(-1, grid)
    return F.adaptive_avg_pool2d(maps, nearly_square(count)).flatten(2).transpose(1, 2)


def shuffle_patches(x, grid, factor):
    """Pixel shuffle (InternVL 1.5, arXiv 2404.16821): factor × factor patches become one token of factor² · C channels.

    (B, rows · columns, C) → (B, ⌈rows / factor⌉ · ⌈columns / factor⌉, factor² · C); zeros fill up a grid that does not divide."""
    maps = x.transpose(1, 2).unflatten(-1, grid)
    maps = F.pad(maps, (0, -grid[1] % factor, 0, -grid[0] % factor))
    return F.pixel_unshuffle(maps, factor).flatten(2).transpose(1, 2)


def select_patches(x, scores, count):
    """The `count` patches of highest score in their order: x (B, N, C), scores (B, N) → (B, count, C)."""
    check(count <= x.shape[1], "count", count, f"at most the {x.shape[1]} patches")
    return take(x, scores.topk(count, dim=1).indices.sort(1).values)


def merge_patches(x, count, attention=None, width=None):
    """Merge the most similar patches until `count` are left: (B, N, C) → (B, count, C), means weighted by size.

    Similar is told by the first `width` channels. attention (B, N): what is looked at merges last, as in ProtectedMerging: the loss of
    a pair is times √((a + 0.05) · size), a over its mean."""
    check(1 <= count <= x.shape[1], "count", count, f"1 to {x.shape[1]}, the patches")
    a = None if attention is None else attention / attention.mean(1, keepdim=True).clamp(min=1e-30) + 0.05
    carried = x if a is None else torch.cat([x, a[..., None].to(x.dtype)], -1)
    tokens = Tokens(carried, None, 0, 0, sizes=torch.ones_like(x[..., 0], dtype=torch.float32))
    while (n := tokens.x.shape[1]) > count:
        weight = None if a is None else (tokens.x[..., -1].float() * tokens.sizes).sqrt()
        merge(tokens, *match_alternating(tokens.x[..., :width or x.shape[-1]], min(n - count, n // 2), 0, weight))
    return tokens.x[..., : x.shape[-1]]


def place_code(grid, width):
    """(rows · columns, width): sines and cosines of a patch's row and column, of wavelengths from 2 patches to twice the grid."""
    check(width % 4 == 0, "width", width, "a multiple of 4")
    rate = math.pi * torch.logspace(-1, 0, width // 4, base=max(grid)).flip(0)
    row, column = torch.meshgrid(*(torch.arange(n) + 0.5 for n in grid), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * rate, column.reshape(-1, 1) * rate], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


class Objectives(nn.Module):
    """BLIP-2's first stage: a Q-Former that reads words, with the heads of its three losses, whose sum is to be made small.

    projection: width in which picture and text are compared. Of the vocabulary 0 is padding, 1 starts a text that is compared, 2 one that
    is written."""

    def __init__(self, qformer, projection=64, temperature=0.07):
        super().__init__()
        width = qformer.queries.shape[-1]
        self.qformer, self.temperature = qformer, nn.Parameter(torch.tensor(float(temperature)))
        self.picture, self.text = nn.Linear(width, projection), nn.Linear(width, projection)
        self.matches, self.writes = nn.Linear(width, 2), nn.Linear(width, qformer.embed.num_embeddings)

    def forward(self, picture, ids, generator=None):
        """{itc, itm, itg}: losses of pairs picture (B, N, C) and ids (B, T) without a start; generator: draws the negatives, on their device."""
        check(len(ids) >= 2, "ids", f"{len(ids)} text", "at least two: each needs a wrong partner")
        compared, written = (F.pad(ids, (1, 0), value=first) for first in (1, 2))
        seen, text = self.qformer(picture, compared, "itc", compared != 0)
        logits = contrast(self.picture(seen), self.text(text[:, 0])) / self.temperature
        other_picture, other_text = hard_negatives(logits.detach(), generator)
        pictures, texts = torch.cat([picture, picture[other_picture], picture]), torch.cat([compared, compared, compared[other_text]])
        judged = self.matches(self.qformer(pictures, texts, "itm", texts != 0)[0]).mean(1)
        right = (torch.arange(len(judged), device=judged.device) < len(ids)).long()
        told = self.writes(self.qformer(picture, written, "itg", written != 0)[1][:, :-1])
        return dict(itc=contrastive_loss(logits), itm=F.cross_entropy(judged, right),
                    itg=F.cross_entropy(told.flatten(0, 1), ids.flatten(), ignore_index=0))


def contrast(seen, text):
    """(B, B): cosine of picture i with text j, of the query that fits best. seen (B, Q, P), text (B, P)."""
    return (F.normalize(seen, dim=-1) @ F.normalize(text, dim=-1).T).amax(1)


def contrastive_loss(logits, smoothing=0.1):
    """Cross-entropy of (B, B) logits to their diagonal, both ways; smoothed labels as in LAVIS."""
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels, label_smoothing=smoothing) + F.cross_entropy(logits.T, labels, label_smoothing=smoothing)) / 2


def hard_negatives(logits, generator=None):
    """For every text another picture and for every picture another text, (B,) each: the likelier, the more alike they are."""
    def draw(rows):
        chance = (rows.softmax(-1) + 1e-4).fill_diagonal_(0)
        return torch.multinomial(chance, 1, generator=generator)[:, 0]

    return draw(logits.T), draw(logits)
