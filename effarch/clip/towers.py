"""One small view of every vision tower: the parts that the encoder loop needs, whatever they are called."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.nn.functional as F
from torch import nn

SUPPORTED = "CLIP, SigLIP and ViT models of transformers"


@dataclass
class Block:
    """One pre-norm transformer layer: x += out(attention(norm1(x))), x += mlp(norm2(x))."""

    norm1: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    norm2: nn.Module
    mlp: Callable
    hidden: int  # width inside the MLP


@dataclass
class Tower:
    """A vision tower. P patches, prefix special tokens (1 = CLS first, 0 = none), width D."""

    module: nn.Module  # the Hugging Face module whose forward() does the same
    embed: Callable  # (B, 3, H, W), interpolate=False → (B, prefix + P, D), positions added
    pre_norm: Callable  # (B, N, D) → (B, N, D) before the first layer
    blocks: list
    finish: Callable  # (B, N, D) → (B, N, D): what the model calls last_hidden_state
    pool: Callable  # (B, N, D), sizes (B, N) or None → (B, D): what it calls pooler_output
    pools: bool  # whether the model has a pooler_output; without one, `pool` is the mean of the tokens or the CLS token
    heads: int
    prefix: int
    patch: nn.Conv2d
    pool_macs: Callable  # N → multiply-adds of pool
    image_size: int  # pixels a side


def find_vision_module(model):
    """The vision tower inside a model; TypeError naming the model if there is none we know."""
    inner = model
    for name in ("vision_model", "vit"):  # CLIPModel, CLIPVisionModel of older versions, ViTFor…
        inner = getattr(inner, name, inner)
    kinds = [base.__name__ for base in type(inner).__mro__]
    for kind in ("CLIPVision", "SiglipVision", "ViTModel"):
        if any(name.startswith(kind) for name in kinds):
            return inner, kind
    raise TypeError(f"{type(model).__name__} is not supported; supported: {SUPPORTED}")


BLOCK_NAMES = {  # Block's fields as CLIP and SigLIP name them, as ViT does, as ViT did up to transformers 5.5
    "layer_norm1": ("layer_norm1", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "layer_norm2"),
    "attention.q_proj": ("layernorm_before", *(f"attention.{p}_proj" for p in "qkvo"), "layernorm_after"),
    "attention.attention.query": (
        "layernorm_before", *(f"attention.attention.{p}" for p in ("query", "key", "value")),
        "attention.output.dense", "layernorm_after"),
}


def has(module, path):
    """Whether the dotted attribute exists."""
    try:
        return attrgetter(path)(module) is not None
    except AttributeError:
        return False


def make_block(layer):
    """A Block for one Hugging Face layer of any supported family."""
    names = next((names for mark, names in BLOCK_NAMES.items() if has(layer, mark)), None)
    if names is None:
        raise TypeError(f"{type(layer).__name__} is not supported; supported: {SUPPORTED}")
    parts = attrgetter(*names)(layer)
    if has(layer, "mlp.fc1"):
        mlp, hidden = layer.mlp, layer.mlp.fc1.out_features
    else:
        dense = layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense
        mlp, hidden = nn.Sequential(*dense), dense[0].out_features
    return Block(*parts, mlp, hidden)


def pool_with_probe(head, x, sizes=None):
    """SigLIP's pooling: a learned query attends to all tokens (merged ones as often as their parts), then an MLP."""
    bias = None if sizes is None else sizes.log()[:, None].repeat_interleave(head.attention.num_heads, 0).to(x.dtype)
    pooled = head.attention(head.probe.repeat(len(x), 1, 1), x, x, attn_mask=bias)[0]
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]


def mean_of_patches(x, sizes=None):
    """(B, N, D) → (B, D), a merged token counted as often as its parts; the sum is in float32."""
    if sizes is None:
        return x.float().mean(1).to(x.dtype)
    return ((x.float() * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)).to(x.dtype)


def make_tower(model):
    """The Tower of a CLIP, SigLIP or ViT model (or of a bare vision tower of these)."""
    module, kind = find_vision_module(model)
    config, emb = module.config, module.embeddings

    def embed(pixels, interpolate=False):
        return emb(pixels, interpolate_pos_encoding=interpolate)

    if kind == "ViTModel":
        layers = module.layers if hasattr(module, "layers") else module.encoder.layer
        pooler, norm = getattr(module, "pooler", None), module.layernorm
        parts = dict(
            patch=emb.patch_embeddings.projection, pre_norm=nn.Identity(), finish=norm, prefix=1,
            pool=lambda x, _=None: pooler(norm(x)) if pooler else norm(x[:, 0]), pools=pooler is not None,
            pool_macs=lambda n: config.hidden_size**2 if pooler else 0)
    elif kind == "CLIPVision":
        layers = module.encoder.layers
        parts = dict(
            patch=emb.patch_embedding, pre_norm=module.pre_layrnorm, finish=nn.Identity(), prefix=1,
            pool=lambda x, _=None: module.post_layernorm(x[:, 0]), pools=True, pool_macs=lambda n: 0)
    else:
        layers, norm, head = module.encoder.layers, module.post_layernorm, getattr(module, "head", None)
        d, hidden = config.hidden_size, config.intermediate_size
        parts = dict(
            patch=emb.patch_embedding, pre_norm=nn.Identity(), finish=norm, prefix=0,
            pool=lambda x, sizes=None: pool_with_probe(head, norm(x), sizes) if head else mean_of_patches(norm(x), sizes),
            pools=head is not None,
            pool_macs=lambda n: 2 * d * (d + n * d + n + hidden) if head else 0)
    return Tower(module=module, embed=embed, blocks=[make_block(layer) for layer in layers],
                 heads=config.num_attention_heads, image_size=config.image_size, **parts)


def project(model, pooled):
    """CLIP's projection into the space shared with text; other models read the pooled vector as it is."""
    layer = getattr(model, "visual_projection", None)
    return layer(pooled) if layer is not None else pooled


def split_heads(x, heads):
    """(B, N, D) → (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, bias=None, implementation="sdpa"):
    """softmax(q kᵀ / √d + bias) v over (B, heads, N, d): 'eager' spelled out, 'sdpa' as one fused kernel."""
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    return torch.softmax(logits.float(), dim=-1).to(v.dtype) @ v
