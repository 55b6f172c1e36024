"""Labelled images to learn from, apart from those that judge; and digits, a domain far from photographs."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from effarch.checks import check
from effarch.clip.images import load_images, preprocess, scaling


def training_folders(folder):
    """The folders beside an image folder whose names begin with train, sorted."""
    own = Path(folder).expanduser().resolve()
    return [p for p in sorted(own.parent.glob("train*")) if p.is_dir() and p != own]


def check_apart(name, train, dataset):
    """ValueError if the images to learn from, as DATASET names images, lie in the folder of those that judge, or these in theirs; None names none."""
    def folder_of(text):
        kind, _, folder = (text or "").partition(":")
        return Path(folder).expanduser().resolve() if kind in ("imagefolder", "photos") else None

    mine, judges = folder_of(train), folder_of(dataset)
    apart = None in (mine, judges) or not (mine.is_relative_to(judges) or judges.is_relative_to(mine))
    check(apart, name, train, f"other images than those of {dataset}, which judge")


def training_source(dataset):
    """What to learn from, as a DATASET, for the test images that DATASET names: cifar10 (its training split) for itself,
    imagefolder:<the one folder beside that begins with train> for an image folder. ValueError where there is not one."""
    kind, _, rest = dataset.partition(":")
    check(kind in ("cifar10", "imagefolder"), "DATASET", dataset, "cifar10, imagefolder:<path>: others have no labels")
    if kind == "cifar10":
        return dataset
    beside = training_folders(rest)
    check(len(beside) == 1, "DATASET", dataset,
          f"a folder beside one of labelled training images, train…; found: {[p.name for p in beside] or 'none'}")
    return f"imagefolder:{beside[0]}"


def training_images(dataset, count, processor, seed=0):
    """`count` training Images, stratified by class, of `training_source`; NoImages where CIFAR-10 cannot be had."""
    return load_images(training_source(dataset), count, processor, seed, train=True)


def resized(images, processor):
    """Small Images as a Hugging Face image processor makes them: at the model's size, with its scaling."""
    pictures = [Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in images.pixels]
    pixels, _ = preprocess(pictures, processor)
    return replace(images, pixels=pixels, **scaling(processor))
