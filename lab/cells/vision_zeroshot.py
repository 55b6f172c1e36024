"""Zero-shot classification: class names become text features, an image takes the closest one."""

import torch
import torch.nn.functional as F

from lab.cells.encoder import encode_images
from lab.cells.environment import check
from lab.cells.vision_images import CIFAR_CLASSES

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
def image_features(model, images, reducer=None, batch=50):
    """(N, P) features of all Images, on the CPU, through our encoder loop."""
    parts = [encode_images(model, pixels, reducer).cpu() for pixels in images.batches(batch, model.device)]
    return torch.cat(parts)


def share_interval(share, n, z=1.96):
    """95 % interval (Wilson) of a share observed in n trials."""
    middle, half = share + z**2 / (2 * n), z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


def mean_interval(values):
    """(mean, low, high): 95 % interval of the mean, normal approximation. values: (n,)."""
    mean, half = values.float().mean().item(), 1.96 * values.float().std().item() / len(values) ** 0.5
    return mean, mean - half, mean + half


def fidelity(features, dense, text=None, labels=None):
    """How well reduced features (N, P) keep what the dense ones say: cosine, agreement, accuracy, intervals.

    text: (C, P) or None; labels: (N,) or None. Without them those numbers are absent. The accuracy's change
    against the dense features is paired by image. Features that are not finite give status='nan' and no number."""
    if not features.isfinite().all():
        return dict(n_images=len(features), status="nan")
    cosine = (features * dense).sum(-1)
    row = dict(n_images=len(features), cosine_p5=float(cosine.quantile(0.05)), cosine_min=float(cosine.min()))
    row["cosine_mean"], row["cosine_low"], row["cosine_high"] = mean_interval(cosine)
    if text is None:
        return row
    predicted, expected = ((f @ text.T.cpu()).argmax(-1) for f in (features, dense))
    share = row["top1_agreement"] = float((predicted == expected).double().mean())
    row["top1_agreement_low"], row["top1_agreement_high"] = share_interval(share, len(features))
    if labels is not None:
        row["top1_accuracy"] = float((predicted == labels).double().mean())
        change = (predicted == labels).double() - (expected == labels).double()
        row["accuracy_change"], row["accuracy_change_low"], row["accuracy_change_high"] = mean_interval(change)
    return row
