"""Zero-shot classification: class names become text features, an image takes the closest one."""

import torch
import torch.nn.functional as F

from effarch.checks import check
from effarch.clip.images import CIFAR_CLASSES

KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
CIFAR_TEMPLATES = [f"a {kind}photo of {article} {{}}." for kind in KINDS for article in ("a", "the")]
CIFAR_TEMPLATES += [f"a photo of {size}{{}}." for size in ("a small ", "a big ", "the small ", "the big ")]


def prompt_templates(classes):
    """CLIP's 18 CIFAR-10 templates for CIFAR-10's classes, one plain template otherwise.

    ValueError where a class name has no word that a prompt could use, such as '0012' or 'n01440764'."""
    odd = [c for c in classes if sum(ch.isalpha() for ch in c) < 2 or (c[:1] == "n" and c[1:].isdigit())]
    check(not odd, "class names", odd[:3], "words: name the folders of DATASET after what they show")
    return CIFAR_TEMPLATES if set(classes) == set(CIFAR_CLASSES) else ["a photo of a {}."]


@torch.no_grad()
def text_features(checkpoint, classes, templates):
    """(C, P): per class the normalised mean of its prompts' normalised features (pooled at the end token)."""
    rows = []
    for name in classes:
        tokens = checkpoint.tokenize([template.format(name) for template in templates])
        out = checkpoint.model.get_text_features(**tokens.to(checkpoint.model.device))
        features = F.normalize(getattr(out, "pooler_output", out), dim=-1)
        rows.append(F.normalize(features.mean(0), dim=-1))
    return torch.stack(rows)


@torch.no_grad()
def image_features(encode, images, batch=50, device="cpu"):
    """(N, P) features of all Images, on the CPU. encode: pixel_values (B, 3, S, S) → L2-normalised features (B, P)."""
    return torch.cat([encode(pixels).cpu() for pixels in images.batches(batch, device)])
