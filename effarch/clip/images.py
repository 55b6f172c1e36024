"""Images to measure on: CIFAR-10, a folder of images with or without labels, or synthetic ones; kept as bytes, normalised per batch."""

import errno
import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from effarch.checks import check
from effarch.clip.checkpoints import reachable

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BUNDLED = ("astronaut", "chelsea", "coffee", "camera", "horse", "stereo_motorcycle", "page", "rocket")
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


class NoImages(Exception):
    """The wanted images cannot be had here; the message says why."""


@dataclass
class Images:
    """Preprocessed images: pixels (N, 3, S, S) uint8, labels (N,) or None, class names, what they are."""

    pixels: torch.Tensor
    labels: torch.Tensor | None
    classes: list
    source: str
    skipped: int = 0  # files that could not be decoded
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    scale: float = 1 / 255  # of the bytes, before mean and std
    groups: list | None = None  # of photos: the picture that each is cut from

    def __len__(self):
        return len(self.pixels)

    def digest(self):
        """SHA-256 of pixels, labels, class names and scaling, as hexadecimal text."""
        made = hashlib.sha256(repr((tuple(self.pixels.shape), self.classes, self.mean, self.std, self.scale)).encode())
        for part in (self.pixels, self.labels):
            made.update(b"none" if part is None else part.contiguous().numpy().tobytes())
        return made.hexdigest()

    def batch(self, index, device="cpu"):
        """Normalised float32 pixel_values (B, 3, S, S) of the images at `index` (a slice or a list)."""
        pixels = self.pixels[index].to(device).float() * self.scale
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def batches(self, size, device="cpu"):
        """All images in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size), device)

    def part(self, index):
        """The Images at `index` (a slice or a list of numbers)."""
        groups = None if self.groups is None else np.asarray(self.groups)[index].tolist()
        return replace(self, pixels=self.pixels[index], labels=None if self.labels is None else self.labels[index], groups=groups)

    def split(self, count):
        """(the first `count` Images, the others). Of photos whole pictures, `count` crops at least: crops of one picture are
        alike, and what is fitted on some must not be judged on others. ValueError if one picture is all there is."""
        if self.groups is None:
            return self.part(slice(0, count)), self.part(slice(count, None))
        first, pictures = set(), list(dict.fromkeys(self.groups))
        while sum(group in first for group in self.groups) < count and len(first) < len(pictures):
            first.add(pictures[len(first)])
        check(len(first) < len(pictures) or count >= len(self), "DATASET", self.source, "photographs of more pictures: they are fitted on some and judged on others")
        return tuple(self.part([i for i, group in enumerate(self.groups) if (group in first) == wanted]) for wanted in (True, False))


def scaling(processor):
    """{'mean', 'std', 'scale'} for `Images`: what a Hugging Face image processor does to bytes."""
    rescale = getattr(processor, "do_rescale", True)
    plain = dict(mean=(0.0,) * 3, std=(1.0,) * 3, scale=processor.rescale_factor if rescale else 1.0)
    if not getattr(processor, "do_normalize", True):
        return plain
    return dict(plain, mean=tuple(processor.image_mean), std=tuple(processor.image_std))


def stratified(labels, count, seed):
    """Indices of `count` items, the same number of each class as far as there are enough, in random order."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(labels))
    rank = np.empty(len(labels), int)  # how many of its class come earlier in the random order
    for label in np.unique(labels):
        mine = order[np.asarray(labels)[order] == label]
        rank[mine] = np.arange(len(mine))
    return order[np.argsort(rank[order], kind="stable")][:count]


def pictures_below(folder):
    """The image files below a folder, sorted; without hidden ones and what is in hidden folders, such as thumbnails."""
    hidden = lambda file: any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not hidden(file))


def folder_images(path):
    """(paths, labels, classes) of a folder with one folder of images per class."""
    root = Path(path).expanduser()
    check(root.is_dir(), "DATASET", f"imagefolder:{path}", "a folder that exists")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    files = [pictures_below(p) for p in folders]
    empty = [p.name for p, inside in zip(folders, files, strict=True) if not inside]
    check(folders and not empty, "DATASET", f"imagefolder:{path}",
          f"one folder per class with images in each; without: {empty or 'all'}")
    paths = [f for inside in files for f in inside]
    labels = [i for i, inside in enumerate(files) for _ in inside]
    names = [p.name.replace("_", " ") for p in folders]
    check(len(set(names)) == len(names), "DATASET", f"imagefolder:{path}", "folders whose names differ by more than _ and space")
    return paths, labels, names


def photo_files(path):
    """(paths, groups) of all images below a folder, unlabelled. Files whose names differ in a last number only, such as
    cat-0.jpg and cat-1.jpg, are parts of one picture: a group."""
    root = Path(path).expanduser()
    files = pictures_below(root) if path and root.is_dir() else []
    check(files, "DATASET", f"photos:{path}", "a folder with images in it")
    return files, [re.sub(r"-\d+$", "", f.relative_to(root).with_suffix("").as_posix()) for f in files]


def bundled_photographs():
    """[(name, PIL image)]: photographs and a page of text that come with scikit-image; [] without it."""
    try:
        from skimage import data
    except ImportError:
        return []
    pictures = []
    for name in BUNDLED:
        try:
            array = getattr(data, name)()
        except (AttributeError, OSError, ImportError):  # not in this version, or not downloaded with it
            continue
        array = np.asarray(array[0] if isinstance(array, tuple) else array)
        array = array.astype(np.uint8) * 255 if array.dtype == bool else array
        pictures.append((name.removeprefix("stereo_"), Image.fromarray(array).convert("RGB")))
    return pictures


def cifar10(train):
    """(PIL images, labels, classes) of CIFAR-10 through torchvision; NoImages where it cannot be had."""
    from torchvision.datasets import CIFAR10

    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "efficient-architectures"
    there = (cache / "cifar-10-batches-py" / "batches.meta").exists()
    if not there and not reachable(CIFAR_URL):
        raise NoImages(f"no answer from {CIFAR_URL}")
    try:
        data = CIFAR10(cache, train=train, download=True)
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        raise NoImages(f"the disk of {cache} is full" if full else str(error).splitlines()[0]) from None
    return [Image.fromarray(x) for x in data.data], data.targets, list(data.classes)


def synthetic(side, count, seed):
    """Uniform noise images of side × side pixels, as the original report's speed test used."""
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(count)]


def to_rgb(picture):
    """A PIL image in RGB, turned as its EXIF says; grey values of 16 bits or floats in 0…255; transparency is left out, as the
    processors of transformers do."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):  # PIL would cut them off at 255
        values = np.nan_to_num(np.asarray(picture, np.float64))  # no data is black
        most = 1 if picture.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 else 65535
        picture = Image.fromarray((values / most * 255).clip(0, 255).round().astype(np.uint8))
    return picture.convert("RGB")


def preprocess(pictures, processor, native=False):
    """PIL images or files → ((n, 3, S, S) uint8, indices of those that could be decoded).

    Resizes and crops as the processor does, but leaves the scaling to `Images.batch`; native=True: neither."""
    pixels, good = [], []
    for i, picture in enumerate(pictures):
        try:
            picture = to_rgb(picture if isinstance(picture, Image.Image) else Image.open(picture))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what PIL raises for damaged files
            continue
        steps = dict(do_resize=False, do_center_crop=False) if native else {}
        done = processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt", **steps)
        pixels.append(done["pixel_values"][0].to(torch.uint8))
        good.append(i)
    return (torch.stack(pixels) if pixels else torch.empty(0)), good


def load_images(dataset, count, processor, seed=0, train=False, native=False):
    """`count` images of DATASET: 'cifar10' or 'imagefolder:<path>', stratified by class; 'photos:<path>', pictures of any kind
    without labels, in random order; 'photographs', the eight of scikit-image; 'synthetic:<side>'.

    Files that cannot be decoded are skipped and counted. ValueError for a bad name or folder; NoImages
    where CIFAR-10 or scikit-image is neither here nor can be downloaded."""
    kind, _, rest = dataset.partition(":")
    check(kind in ("cifar10", "imagefolder", "photos", "photographs", "synthetic"), "DATASET", dataset,
          "cifar10, imagefolder:<path>, photos:<path>, photographs, synthetic:<side>")
    groups = None
    if kind == "synthetic":
        check(rest.isdigit() and 16 <= int(rest) <= 1024, "DATASET", dataset, "synthetic:64, synthetic:128, …")
        pictures, labels, classes = synthetic(int(rest), count, seed), None, []
    elif kind == "photographs":
        found = bundled_photographs()[:count]
        if not found:
            raise NoImages("scikit-image is not installed")
        (groups, pictures), labels, classes = map(list, zip(*found, strict=True)), None, []
    elif kind == "photos":
        files, names = photo_files(rest)
        chosen = np.random.default_rng(seed).permutation(len(files))[:count]
        pictures, groups, labels, classes = [files[i] for i in chosen], [names[i] for i in chosen], None, []
    else:
        pictures, labels, classes = folder_images(rest) if kind == "imagefolder" else cifar10(train)
        chosen = stratified(labels, count, seed)
        pictures, labels = [pictures[i] for i in chosen], [labels[i] for i in chosen]
    pixels, good = preprocess(pictures, processor, native)
    check(len(good) > 0, "DATASET", dataset, f"images that can be decoded; none of {len(pictures)} could")
    labels = None if labels is None else torch.tensor([labels[i] for i in good])
    groups = None if groups is None else [groups[i] for i in good]
    source = kind if kind in ("imagefolder", "photos") else dataset
    return Images(pixels, labels, classes, source, len(pictures) - len(good), **scaling(processor), groups=groups)
