"""What every vision notebook needs before it measures: a checkpoint, images, a class-name head, or the reason why not."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from effarch.clip.checkpoints import load_checkpoint
from effarch.clip.images import CIFAR_CLASSES, Images, NoImages, load_images
from effarch.clip.quality import judge_images, quality_columns
from effarch.clip.zero_shot import imagenet_names, prompt_templates, text_features, zero_shot_features


@dataclass
class Study:
    """A model and images. measurable: whether quality means something; else `why_not` says why it is left empty."""

    checkpoint: Any
    model: Any
    images: Images
    text: torch.Tensor | None  # (C, P) features of the class names, on the CPU; None without labels or tokenizer
    names: torch.Tensor | None  # (1000, P) the same of ImageNet's names, which any picture can be asked for
    zero_shot: torch.Tensor | None  # (10, P) CIFAR-10's classes by names of ImageNet's; None for other images
    measurable: bool
    why_not: str

    def judge(self, features, dense):
        """`judge_images` of the features (n, P) of the first n images; dense (N, P): of all of them, or of these."""
        some = self.images.part(slice(0, len(features)))
        return judge_images(features, dense[:len(features)], self.text, some.labels, self.names, self.zero_shot)

    @property
    def image_set(self):
        """What the images are, in words for a sentence."""
        if self.images.classes == list(CIFAR_CLASSES):
            return "enlarged CIFAR-10 images"
        return "photographs" if self.images.groups else f"images of {self.images.source.partition(':')[0]}"

    def columns(self, seen, **baselines):
        """`quality_columns` of the first images, and what they are; where several are cut from one picture, pictures are redrawn."""
        n = next((len(values) for values in seen.values() if values is not None), 0)
        return dict(image_set=self.image_set) | quality_columns(seen, self.images.groups and self.images.groups[:n], **baselines)


def prepare(run, location, dataset, n_images):
    """The Study of a run: loads the checkpoint at `location` and `n_images` of `dataset`, notes both in the provenance.

    Random weights or missing images do not stop a run: cost is measured, quality is not. In a smoke run noise images
    and random class directions go through every code path; its figures and tables say that they are no result."""
    checkpoint = load_checkpoint(location, run.device, run.smoke)
    model, side = checkpoint.model, checkpoint.model.config.vision_config.image_size
    why_not = "" if checkpoint.pretrained else f"random weights ({location.why})"
    try:
        wanted = f"synthetic:{side}" if run.smoke and dataset == "cifar10" else dataset
        images = load_images(wanted, n_images, checkpoint.processor, run.seed)
    except NoImages as error:
        images = load_images(f"synthetic:{side}", 64, checkpoint.processor, run.seed)
        why_not = why_not or f"no images ({error})"
    if run.smoke and images.labels is None:
        images.labels, images.classes = torch.arange(len(images)) % 3, ["cat", "dog", "ship"]
    why_not = why_not or ("noise images" if images.source.startswith("synthetic") and not run.smoke else "")
    text, templates, names, zero_shot = None, None, None, None
    if images.classes and checkpoint.tokenize and not why_not:
        templates = prompt_templates(images.classes)
        text = text_features(checkpoint, images.classes, templates).cpu()
    if checkpoint.tokenize and not why_not:
        try:
            names = text_features(checkpoint, imagenet_names(), ["a photo of a {}."])
        except ValueError as error:  # a tokenizer of another language, say
            print(f"ImageNet's names are not judged: {error}")
        text = names if images.labels is None else text
        zero_shot = zero_shot_features(checkpoint) if images.classes == list(CIFAR_CLASSES) else None
    elif run.smoke:
        text, names = (F.normalize(torch.randn(n, model.config.projection_dim), dim=-1) for n in (len(images.classes), 20))
    measurable = run.smoke or not why_not
    run.inputs.update(checkpoint=location.digest, images=images.digest())
    run.facts.update(checkpoint.facts, images=images.source, n_images=len(images), skipped=images.skipped,
                     quality=why_not or "measured", templates=templates)
    skipped = f", {images.skipped} files not decoded" if images.skipped else ""
    print(f"{checkpoint.slug}, {side} px; {len(images)} images of {images.source}{skipped}; cosine, agreement and accuracy: "
          f"{'random numbers, no result' if run.smoke else why_not or 'measured'}")
    return Study(checkpoint, model, images, text, names, zero_shot, measurable, why_not)
