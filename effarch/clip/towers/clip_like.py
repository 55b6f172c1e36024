"""Adapters to the towers of image-text models in transformers: CLIP and those built like it, SigLIP, BLIP and BLIP-2."""

from operator import attrgetter

from torch import nn

from effarch.clip.towers.base import (
    Block,
    Tower,
    first_token,
    mean_of_patches,
    mlp_width,
    plain,
    side_of,
    thirds,
)


def clip_block(layer, width):
    """A Block of CLIP's, ChineseCLIP's, AltCLIP's or SigLIP's layer."""
    q, k, v, out = attrgetter("q_proj", "k_proj", "v_proj", "out_proj")(layer.self_attn)
    return Block(layer.layer_norm1, q, k, v, out, layer.layer_norm2, layer.mlp, mlp_width(layer.mlp, width), layer=layer, attention=layer.self_attn)


def blip_block(layer, width):
    """A Block of BLIP's or BLIP-2's layer, whose projections are one."""
    plain(nn.Linear, layer.self_attn.qkv)
    q, k, v = thirds(layer.self_attn, "qkv.weight", "qkv.bias")
    return Block(layer.layer_norm1, q, k, v, layer.self_attn.projection, layer.layer_norm2, layer.mlp,
                 mlp_width(layer.mlp, width), layer=layer, attention=layer.self_attn)


def assemble(module, block, finish, pool, prefix=1, pre_norm=None, calls=(), pools=True, pool_macs=lambda n: 0):
    """The Tower of a module with CLIP's names."""
    config, emb = module.config, module.embeddings
    return Tower(
        module=module, embed=lambda pixels, interpolate=False: emb(pixels, interpolate_pos_encoding=interpolate),
        pre_norm=pre_norm or nn.Identity(), blocks=[block(layer, config.hidden_size) for layer in module.encoder.layers],
        finish=finish, pool=pool, pools=pools, heads=config.num_attention_heads, prefix=prefix, patch=emb.patch_embedding,
        pool_macs=pool_macs, image_size=side_of(config.image_size), calls=[emb, *calls],
        dropout=config.attention_dropout)


def clip_tower(module):
    """CLIP, ChineseCLIP, AltCLIP: the last hidden state is not normed, the pooled CLS token is."""
    norm = module.post_layernorm
    return assemble(module, clip_block, nn.Identity(), lambda x, _=None: norm(first_token(x)), pre_norm=module.pre_layrnorm,
                    calls=[norm])


def blip_tower(module):
    """BLIP and BLIP-2: the last hidden state is normed, its CLS token once more."""
    norm = module.post_layernorm
    return assemble(module, blip_block, norm, lambda x, _=None: norm(norm(first_token(x))))


def siglip_tower(module):
    """SigLIP: no CLS token; a learned query pools, or nothing does."""
    norm, head, config = module.post_layernorm, getattr(module, "head", None), module.config
    if head is None:
        return assemble(module, clip_block, norm, lambda x, sizes=None: mean_of_patches(norm(x), sizes), prefix=0, pools=False)
    d, hidden = config.hidden_size, config.intermediate_size
    return assemble(
        module, clip_block, norm, lambda x, sizes=None: pool_with_probe(head, norm(x), sizes), prefix=0,
        calls=[head.attention, head.layernorm, head.mlp], pool_macs=lambda n: 2 * d * (d + n * d + n + hidden))


def pool_with_probe(head, x, sizes=None):
    """SigLIP's pooling: a learned query attends to all tokens (merged ones as often as their parts), then an MLP."""
    bias = None if sizes is None else sizes.log()[:, None].repeat_interleave(head.attention.num_heads, 0).to(x.dtype)
    pooled = head.attention(head.probe.repeat(len(x), 1, 1), x, x, attn_mask=bias)[0]
    return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
