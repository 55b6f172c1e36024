"""Adapters to the towers of timm and open_clip. Neither package is needed to import this: what a module is shows in its names."""

import torch
from torch import nn

from effarch.clip.towers.base import (
    Block,
    Stem,
    Tower,
    chain,
    first_token,
    has,
    mean_of_patches,
    mlp_width,
    plain,
    rotate_halves,
    rotate_pairs,
    side_of,
    thirds,
    with_prefix,
)


class Scale:
    """Layer scale: times a vector that the layer itself holds, read at every call."""

    def __init__(self, layer, name):
        self.layer, self.name = layer, name

    def __call__(self, x):
        return x * getattr(self.layer, self.name)


def unsupported(module, *reasons):
    """TypeError with the first reason (wrong, text) that holds."""
    for wrong, text in reasons:
        if wrong:
            raise TypeError(f"{type(module).__name__} {text} is not supported")


ATTENTIONS = ("Attention", "EvaAttention", "AttentionRope")


def timm_block(layer, width):
    """A Block of timm's ViT or EVA layer."""
    attention = layer.attn
    unsupported(layer, (type(layer).__name__ not in ("Block", "EvaBlock"), "as a layer"),
                (type(attention).__name__ not in ATTENTIONS, f"with {type(attention).__name__}"),
                (getattr(attention, "num_kv_groups", 1) > 1, "with fewer keys than queries"),
                (not isinstance(attention.q_norm, nn.Identity), "with normed queries and keys"),
                (has(attention, "gate"), "with gated attention"),
                (attention.head_dim * attention.num_heads != width, "with heads that do not add up to its width"))
    if has(attention, "qkv"):
        plain(nn.Linear, attention.qkv)
        own = ("q_bias", "k_bias", "v_bias") if has(attention, "q_bias") else ()  # EVA's
        q, k, v = thirds(attention, "qkv.weight", "qkv.bias", own)
    else:
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    first, second = (Scale(layer, name) if has(layer, name) else getattr(layer, other, None)
                     for name, other in (("gamma_1", "ls1"), ("gamma_2", "ls2")))
    out = chain(getattr(attention, "norm", None), attention.proj, attention.proj_drop, first, layer.drop_path1)
    mlp = chain(layer.mlp, second, layer.drop_path2)
    rotate = rotate_halves if getattr(attention, "rotate_half", False) else rotate_pairs
    return Block(layer.norm1, q, k, v, out, layer.norm2, mlp, mlp_width(layer.mlp, width), rotate, layer, attention)


def stem_of(embedding, width):
    """The patch embedding: a convolution, or MobileCLIP-B's stem of three."""
    if isinstance(embedding.proj, nn.Conv2d) and not has(embedding, "backbone"):
        return embedding.proj
    unsupported(embedding, (type(getattr(embedding, "backbone", None)).__name__ != "ConvStem", "as a patch embedding"))
    convolutions = [part for part in embedding.backbone.modules() if isinstance(part, nn.Conv2d)]
    pixels, macs = 1, 0
    for part in reversed(convolutions):  # a patch is one position of the last, stride² of the one before, …
        macs, pixels = macs + part.weight.numel() * pixels**2, pixels * part.stride[0]
    weight = convolutions[0].weight
    return Stem((pixels, pixels), width, weight.detach().flatten()[:1].expand(macs // weight.shape[1], weight.shape[1]))


def timm_tower(module):
    """timm's ViT (also MobileCLIP-B) and its EVA (also EVA-02 and DINOv3, with rotary positions): CLS, or the patches' mean."""
    emb, width, prefix, pooling = module.patch_embed, module.embed_dim, module.num_prefix_tokens, module.global_pool
    drop, rope = getattr(module, "patch_drop", None), getattr(module, "rope", None)
    unsupported(module, (getattr(module, "rope_mixed", False), "with positions of its own in every layer"),
                (rope is not None and not prefix, "with rotary positions and no CLS token"),
                (has(module, "dist_token"), "with a distillation token"),
                (drop is not None and not isinstance(drop, nn.Identity), "with patch dropout"),
                (getattr(emb, "dynamic_img_pad", False), "with images padded to whole patches"),
                (pooling not in ("token", "avg"), f"with global_pool={pooling!r}"))

    def embed(pixels, interpolate=False):
        x = module._pos_embed(emb(pixels))
        return x[0] if isinstance(x, tuple) else x  # EVA's rotary positions come from below

    def rotary(pixels):
        fixed = not module.dynamic_img_size and hasattr(rope, "feat_shape")
        grid = [side // size for side, size in zip(pixels.shape[-2:], emb.patch_size, strict=True)]
        sin, cos = (rope.get_embed() if fixed else rope.get_embed(shape=grid)).chunk(2, -1)
        return with_prefix(cos, sin, prefix)

    norm, fc_norm = module.norm, module.fc_norm

    def pool(x, sizes=None):
        if pooling == "token":
            return fc_norm(first_token(norm(x)))
        start = 0 if getattr(module, "pool_include_prefix", False) else prefix
        return fc_norm(mean_of_patches(norm(x)[:, start:], None if sizes is None else sizes[:, start:]))

    blocks = [timm_block(layer, width) for layer in module.blocks]
    return Tower(
        module=module, embed=embed, pre_norm=getattr(module, "norm_pre", nn.Identity()), blocks=blocks, finish=norm, pool=pool,
        pools=True, heads=module.blocks[0].attn.num_heads, prefix=prefix, patch=stem_of(emb, width), pool_macs=lambda n: 0,
        image_size=side_of(emb.img_size), library="timm", calls=[emb, module.pos_drop, fc_norm, module.head_drop, module.head],
        rotary=rotary if rope is not None else None, pools_all=pooling != "token",
        dropout=module.blocks[0].attn.attn_drop.p)


def open_clip_block(layer, width):
    """A Block of open_clip's layer, which holds PyTorch's attention."""
    unsupported(layer, (type(layer).__name__ != "ResidualAttentionBlock", "as a layer"))
    plain(nn.MultiheadAttention, layer.attn)
    q, k, v = thirds(layer.attn, "in_proj_weight", "in_proj_bias")
    return Block(layer.ln_1, q, k, v, chain(layer.attn.out_proj, layer.ls_1), layer.ln_2, chain(layer.mlp, layer.ls_2),
                 mlp_width(layer.mlp, width), layer=layer, attention=layer.attn)


def open_clip_tower(module):
    """open_clip's own ViT: the CLS token, normed, before or after."""
    width, norm = module.conv1.out_channels, module.ln_post
    unsupported(module, (module.attn_pool is not None or module.pool_type != "tok", "without the CLS token as its output"),
                (not isinstance(module.patch_dropout, nn.Identity), "with patch dropout"))

    def embed(pixels, interpolate=False):
        x = module.conv1(pixels).flatten(2).transpose(1, 2)
        front = module.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        return torch.cat([front, x], 1) + module.positional_embedding.to(x.dtype)

    layers = module.transformer.resblocks
    return Tower(
        module=module, embed=embed, pre_norm=module.ln_pre, blocks=[open_clip_block(layer, width) for layer in layers],
        finish=nn.Identity() if getattr(module, "final_ln_after_pool", False) else norm,  # of the patches, if it returns them
        pool=lambda x, _=None: norm(first_token(x)), pools=True, heads=layers[0].attn.num_heads, prefix=1,
        patch=module.conv1, pool_macs=lambda n: 0, image_size=side_of(module.image_size), library="open_clip",
        calls=[module.conv1, norm])
