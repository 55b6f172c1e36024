"""The encoder loop: Hugging Face's layers, with a place before and inside each where tokens may leave."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from lab.cells.towers import attend, make_tower, project, split_heads


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
def trace_encoder(model, reducer=None, pixel_values=None, image_size=None):
    """Tokens after one pass with everything recorded: `owner`, `counts` per layer, `macs` per image.

    pixel_values: (B, 3, H, W); None takes one blank image of the model's (or the given) size."""
    tower = make_tower(model)
    weight = tower.patch.weight
    if pixel_values is None:
        side = image_size or tower.image_size
        pixel_values = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
    tokens = run_encoder(tower, pixel_values, reducer, trace=True)
    pooled = pooled_output(tower, tokens)
    projection = getattr(model, "visual_projection", None)
    tokens.macs += pooled.shape[-1] * projection.out_features if projection is not None else 0
    return tokens


def encoder_macs(model, reducer=None, image_size=None):
    """Multiply-adds of one image through the vision encoder (2 FLOPs each), the reducer's own included."""
    return trace_encoder(model, reducer, image_size=image_size).macs
