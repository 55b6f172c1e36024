"""One small view of every vision tower: the parts that the encoder loop needs, whatever they are called.

FAMILIES is the list of what is supported, and why the rest is not. To add one, write a function module → Tower
(the shortest is `blip_tower`), name it here, and give tests/test_towers.py a small model of it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from effarch.clip.towers.base import (
    Block,
    Tower,
    as_built,
    attend,
    has,
    mean_of_patches,
    plain,
    sides_of,
    split_heads,
    wide,
)
from effarch.clip.towers.clip_like import blip_tower, clip_tower, siglip_tower
from effarch.clip.towers.other_libraries import open_clip_tower, timm_tower
from effarch.clip.towers.vit_like import dino_tower, dinov3_tower, mae_tower, vit_tower

__all__ = ["FAMILIES", "Block", "Family", "Tower", "attend", "find_vision_module", "make_tower", "mean_of_patches", "plain",
           "project", "sides_of", "split_heads", "supported", "wide"]


@dataclass
class Family:
    """Models that one adapter serves, or that none can."""

    name: str
    classes: tuple  # of the library's module; older versions of transformers have another name for some
    adapter: Any = None  # module → Tower; None: not supported
    why_not: str = ""
    library: str = "transformers"


FAMILIES = [
    Family("CLIP", ("CLIPVisionModel", "CLIPVisionTransformer"), clip_tower),  # also inside LLaVA and others
    Family("ChineseCLIP", ("ChineseCLIPVisionModel", "ChineseCLIPVisionTransformer"), clip_tower),
    Family("AltCLIP", ("AltCLIPVisionModel", "AltCLIPVisionTransformer"), clip_tower),
    Family("SigLIP", ("SiglipVisionModel", "SiglipVisionTransformer"), siglip_tower),
    Family("BLIP", ("BlipVisionModel",), blip_tower),
    Family("BLIP-2", ("Blip2VisionModel",), blip_tower),
    Family("ViT", ("ViTModel",), vit_tower),
    Family("DeiT", ("DeiTModel",), vit_tower),
    Family("ViT-MAE", ("ViTMAEModel",), mae_tower),
    Family("DINOv2", ("Dinov2Model",), dino_tower),
    Family("DINOv2 with registers", ("Dinov2WithRegistersModel",), dino_tower),
    Family("DINOv3", ("DINOv3ViTModel",), dinov3_tower),
    Family("timm's ViT", ("VisionTransformer",), timm_tower, library="timm"),  # MobileCLIP-B is one
    Family("EVA-CLIP", ("Eva",), timm_tower, library="timm"),  # EVA-02-CLIP, too, and timm's DINOv3
    Family("OpenCLIP", ("VisionTransformer",), open_clip_tower, library="open_clip"),
    Family("ALIGN", ("AlignVisionModel",), why_not="its EfficientNet is convolutional and has no patch tokens"),
    Family("MobileViT", ("MobileViTModel",),
           why_not="its patches go back into a feature map for convolutions after every stage, so none may be missing"),
    Family("MobileCLIP-S", ("FastVit",), library="timm",
           why_not="it is convolutional up to its last stage (MobileCLIP-B, a ViT, is supported)"),
    Family("SigLIP 2 with NaFlex", ("Siglip2VisionModel", "Siglip2VisionTransformer"),
           why_not="its batches are padded, and padding would merge with patches; SigLIP 2 of fixed size is a SigLIP model"),
    Family("Qwen2.5-VL", ("Qwen2_5_VisionTransformerPretrainedModel",),
           why_not="it attends within windows and joins 2 × 2 patches at its end; vlm/qwen_pruning.ipynb is about it"),
]

LIBRARIES = {"timm", "open_clip", "torchvision"}  # each has a VisionTransformer; any other module may be a copy of transformers'
BY_CLASS = {(family.library, name): family for family in FAMILIES for name in family.classes}


def supported():
    """Names of the families with an adapter, as one phrase."""
    *names, last = [family.name for family in FAMILIES if family.adapter]
    return f"{', '.join(names)} and {last} models"


def family_of(cls):
    """The Family of a module's class, by its name and its bases' names; None if it is of none."""
    for base in cls.__mro__:
        library = base.__module__.partition(".")[0]
        family = BY_CLASS.get((library if library in LIBRARIES else "transformers", base.__name__))
        if family is not None:
            return family
    return None


def towers_in(model):
    """[(module, Family, the module that holds it or None)] of all vision towers in a model, each once, those near its root first."""
    level, found, seen = [(model, None)], [], set()
    while level:
        below = []
        for module, parent in level:
            family = family_of(type(module))
            wrapper = family and family.adapter and family.library == "transformers" and not hasattr(module, "embeddings")
            if family and not wrapper:  # older versions have wrappers
                found.append((module, family, parent))
            else:
                below += [(child, module) for child in module._modules.values() if child is not None]
        level = [(child, parent) for child, parent in below if not (id(child) in seen or seen.add(id(child)))]
    return found


def find_vision_module(model):
    """(module, Family) of the vision tower inside a model.

    TypeError naming the model if there is none we know, or several, also at different depths."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is not supported; supported: {supported()}")
    found, name = towers_in(model), type(model).__name__
    if len(found) == 1 and found[0][1].adapter:
        return found[0][:2]
    if len(found) > 1:
        names = ", ".join(family.name for _, family, _ in found)
        raise TypeError(f"{name} has several vision towers ({names}): give the one to reduce, or the part of the model that holds it")
    why = f": {found[0][1].name}: {found[0][1].why_not}" if found else f"; supported: {supported()}"
    raise TypeError(f"{name} is not supported{why}")


def make_tower(model):
    """The Tower of a model of a supported family, or of its bare vision tower. TypeError for any other model."""
    module, family = find_vision_module(model)
    try:
        return as_built(family.adapter(module))
    except AttributeError as error:  # a part that another library has replaced
        raise TypeError(f"{type(module).__name__} is not as its library builds it: {error}") from error


def project(model, pooled, first=None):
    """The projection into the space shared with text of the model around a vision tower; without one, the pooled vector as it is.

    first: () → (B, D) the CLS token of the last hidden state, which BLIP's retrieval projects instead."""
    module, family, parent = towers_in(model)[0]
    if has(parent, "trunk"):  # a timm model inside open_clip
        return parent.head(parent.trunk.head(pooled))
    if parent is not None and getattr(parent, "visual", None) is module:  # open_clip's own
        return pooled @ module.proj if has(module, "proj") else pooled
    if has(parent, "visual_projection"):
        return parent.visual_projection(pooled)
    return parent.vision_proj(first()) if family.name == "BLIP" and has(parent, "vision_proj") else pooled
