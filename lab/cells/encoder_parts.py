"""The encoder loop in two parts, for methods that share their first layers or regroup images on the way."""

from dataclasses import replace

import torch.nn.functional as F

from lab.cells.encoder import Tokens, attention_step, mlp_step, pooled_output
from lab.cells.towers import project


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
