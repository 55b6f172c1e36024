"""A small random model of every family, to see that its adapter fits: no download, a few milliseconds each."""

from functools import partial

import transformers

SIDE = 64  # pixels of their images
LAYERS = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=3)
VISION = dict(LAYERS, image_size=SIDE, patch_size=8)
DINO = dict(LAYERS, image_size=SIDE, patch_size=8, mlp_ratio=2, layerscale_value=0.5)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=100, bos_token_id=0,
            eos_token_id=1, pad_token_id=1)

TIMM = dict(img_size=SIDE, embed_dim=48, depth=6, num_heads=3, num_classes=20)


def with_config(name, **options):
    """The class of transformers whose name begins like that of its configuration, from scratch: 'ViTModel' takes a ViTConfig."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


def llava():
    """A LLaVA: a CLIP tower whose last layer but one is read, and a small language model."""
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=transformers.LlamaConfig(**TEXT), image_token_index=99,
        vision_feature_layer=-2, vision_feature_select_strategy="default"))


def eva():
    """EVA-CLIP's tower as timm has it: `eva_giant_patch14_clip_224`, smaller."""
    from timm.models.eva import Eva

    return Eva(**TIMM, patch_size=8, global_pool="token", init_values=0.5)


def eva02():
    """EVA-02-CLIP's tower as timm has it: `eva02_base_patch16_clip_224`, smaller."""
    from timm.models.eva import Eva

    return Eva(**TIMM, patch_size=8, global_pool="token", qkv_fused=False, mlp_ratio=2, swiglu_mlp=True, scale_mlp=True,
               scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(7, 7))


def timm_vit(**options):
    """A ViT of timm."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**dict(dict(TIMM, patch_size=8), **options))


def mobileclip_b():
    """MobileCLIP-B's tower as timm has it: `vit_base_mci_224`, smaller."""
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer_hybrid import ConvStem

    stem = ConvStem(channels=(12, 12, 48), stride=(2, 2, 2), kernel_size=(2, 2, 2), padding=0)
    return timm_vit(embed_layer=partial(HybridEmbed, backbone=stem, proj=False), patch_size=1, no_embed_class=True)


def open_clip_vit():
    """open_clip's own ViT."""
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image_size=SIDE, patch_size=8, width=48, layers=6, heads=3, mlp_ratio=2.0, output_dim=20)


def fastvit():
    """MobileCLIP-S's tower as timm has it, smaller."""
    from timm.models.fastvit import FastVit

    mixers = ("repmixer", "repmixer", "repmixer", "attention")
    return FastVit(layers=(1, 1, 1, 1), embed_dims=(16, 16, 16, 32), mlp_ratios=(1, 1, 1, 1), token_mixers=mixers)


SMALL_MODELS = {  # family → () → model; what needs timm or open_clip raises ImportError where that is missing
    "CLIP": partial(with_config, "CLIPModel", vision_config=VISION, text_config=TEXT, projection_dim=24),
    "LLaVA": llava,
    "ChineseCLIP": partial(with_config, "ChineseCLIPVisionModel", **VISION),
    "AltCLIP": partial(with_config, "AltCLIPVisionModel", **VISION),
    "SigLIP": partial(with_config, "SiglipModel", vision_config=VISION, text_config=TEXT),
    "BLIP": partial(with_config, "BlipVisionModel", **VISION),
    "BLIP-2": partial(with_config, "Blip2VisionModel", **VISION),
    "ViT": partial(with_config, "ViTModel", **VISION),
    "ViT-MAE": partial(with_config, "ViTMAEModel", **VISION, mask_ratio=0.0),
    "DINOv2": partial(with_config, "Dinov2Model", **DINO),
    "DeiT": partial(with_config, "DeiTModel", **VISION),
    "DINOv2 with registers": partial(with_config, "Dinov2WithRegistersModel", **DINO, num_register_tokens=4, use_swiglu_ffn=True),
    "DINOv3": partial(with_config, "DINOv3ViTModel", **VISION, layerscale_value=0.5, num_register_tokens=4, use_gated_mlp=True),
    "timm's ViT": timm_vit,
    "MobileCLIP-B": mobileclip_b,
    "EVA-CLIP": eva,
    "EVA-02-CLIP": eva02,
    "OpenCLIP": open_clip_vit,
    "ALIGN": partial(with_config, "AlignVisionModel", image_size=SIDE, width_coefficient=0.2, depth_coefficient=0.2),
    "MobileViT": partial(with_config, "MobileViTModel", image_size=SIDE),
    "MobileCLIP-S": fastvit,
    "SigLIP 2 with NaFlex": partial(with_config, "Siglip2VisionModel", **LAYERS, patch_size=8, num_patches=64),
}
