"""Adapters to the towers of image models in transformers: ViT, DeiT, ViT-MAE, DINOv2 (also with registers), DINOv3."""

from operator import attrgetter

import torch
from torch import nn

from effarch.checks import check
from effarch.clip.towers.base import (
    Block,
    Tower,
    chain,
    first_token,
    has,
    mlp_width,
    rotate_halves,
    side_of,
    with_prefix,
)

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
OLD_NAMES = ("attention.query", "attention.key", "attention.value", "output.dense")  # DINOv2's; ViT's before transformers 5.6


def projections(attention):
    """(q, k, v, out) of an attention."""
    return attrgetter(*(NAMES if has(attention, NAMES[0]) else OLD_NAMES))(attention)


def vit_block(layer, width):
    """A Block of ViT's, DeiT's or ViT-MAE's layer."""
    q, k, v, out = projections(layer.attention)
    drop = layer.dropout if has(layer, "dropout") else layer.output.dropout
    mlp = layer.mlp if has(layer, "mlp") else chain(
        layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense)
    return Block(layer.layernorm_before, q, k, v, chain(out, drop), layer.layernorm_after, chain(mlp, drop),
                 mlp_width(mlp, width), layer=layer, attention=layer.attention)


def dino_block(layer, width):
    """A Block of DINOv2's or DINOv3's layer, each branch scaled."""
    q, k, v, out = projections(layer.attention)
    drop = layer.attention.output.dropout if has(layer, "attention.output.dropout") else None
    return Block(layer.norm1, q, k, v, chain(out, drop, layer.layer_scale1, layer.drop_path), layer.norm2,
                 chain(layer.mlp, layer.layer_scale2, layer.drop_path), mlp_width(layer.mlp, width), layer=layer, attention=layer.attention)


def layers_of(module):
    """The layers, which older versions of transformers keep in an encoder."""
    return module.layers if hasattr(module, "layers") else module.encoder.layer


def assemble(module, block, embed, pool, pooler=None, **more):
    """The Tower of a module with ViT's names; pooler: the module that pools, or None."""
    config, emb = module.config, module.embeddings
    blocks = [block(layer, config.hidden_size) for layer in layers_of(module)]
    return Tower(
        module=module, embed=embed, pre_norm=nn.Identity(), blocks=blocks, finish=module.layernorm, pool=pool,
        heads=config.num_attention_heads, patch=emb.patch_embeddings.projection, image_size=side_of(config.image_size),
        calls=[emb, pooler] if pooler else [emb],
        dropout=config.attention_probs_dropout_prob, **more)


def vit_tower(module):
    """ViT and DeiT, which has a distillation token behind CLS: the CLS token, through a linear layer if there is one."""
    norm, emb, pooler = module.layernorm, module.embeddings, getattr(module, "pooler", None)

    def pool(x, _=None):
        return pooler(norm(x)) if pooler else first_token(norm(x))

    return assemble(
        module, vit_block, lambda pixels, interpolate=False: emb(pixels, interpolate_pos_encoding=interpolate),
        prefix=2 if has(emb, "distillation_token") else 1, pool=pool, pooler=pooler, pools=pooler is not None,
        pool_macs=lambda n: module.config.hidden_size**2 if pooler else 0)


def mae_tower(module):
    """ViT-MAE's encoder without its masking; patches are in reading order, which is an order that it might have drawn."""
    norm, emb = module.layernorm, module.embeddings
    check(not module.config.mask_ratio, "mask_ratio", module.config.mask_ratio, "0 (patches are hidden in pretraining only)")

    def in_order(pixels):
        patches = (pixels.shape[-2] // emb.patch_size) * (pixels.shape[-1] // emb.patch_size)
        return torch.arange(patches, device=pixels.device).expand(len(pixels), -1)

    def embed(pixels, interpolate=False):
        return emb(pixels, noise=in_order(pixels).float(), interpolate_pos_encoding=interpolate)[0]

    def output(last, _, hidden, pixels):
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModelOutput

        order = in_order(pixels)
        return ViTMAEModelOutput(last_hidden_state=last, mask=torch.zeros_like(order, dtype=pixels.dtype), ids_restore=order,
                                 hidden_states=hidden)

    return assemble(module, vit_block, embed, prefix=1, pool=lambda x, _=None: first_token(norm(x)), pools=False,
                    pool_macs=lambda n: 0, output=output)


def dino_tower(module):
    """DINOv2, with registers or without: the normed CLS token; positions always fit the image's size."""
    norm, emb = module.layernorm, module.embeddings
    return assemble(module, dino_block, lambda pixels, interpolate=False: emb(pixels), pools=True, pool_macs=lambda n: 0,
                    prefix=1 + getattr(module.config, "num_register_tokens", 0), pool=lambda x, _=None: first_token(norm(x)))


def dinov3_tower(module):
    """DINOv3: CLS and registers in front, rotary positions of the patches in every layer."""
    norm, emb, rope, config = module.norm, module.embeddings, module.rope_embeddings, module.config
    prefix, layers = 1 + config.num_register_tokens, module.layer if hasattr(module, "layer") else module.model.layer
    blocks = [dino_block(layer, config.hidden_size) for layer in layers]
    for block in blocks:
        block.rotate = rotate_halves
    return Tower(
        module=module, embed=lambda pixels, interpolate=False: emb(pixels), pre_norm=nn.Identity(), blocks=blocks, finish=norm,
        pool=lambda x, _=None: first_token(norm(x)), pools=True, heads=config.num_attention_heads, prefix=prefix,
        patch=emb.patch_embeddings, pool_macs=lambda n: 0, image_size=side_of(config.image_size), calls=[emb, rope],
        dropout=config.attention_dropout, rotary=lambda pixels: with_prefix(*rope(pixels), prefix))
