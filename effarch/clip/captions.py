"""Images with composed captions, for training a small CLIP: what a caption says beside the class is computed from the pixels."""

import math
from itertools import product

import torch

from effarch.checks import check
from effarch.clip.digits import digit_images
from effarch.clip.images import NoImages, load_images
from effarch.clip.labelled import check_apart, training_folders

LIGHT, TINT, PLACE = ("dark", "medium", "bright"), ("reddish", "greenish", "bluish"), ("top", "bottom", "left", "right")


def pixel_facts(pixels):
    """(N, 3, H, W) bytes → brightness (N,), colour (N, 3), and the brightness of the top, bottom, left and right half (N, 4); 0 to 1."""
    down, across = pixels.shape[2] // 2, pixels.shape[3] // 2
    parts = pixels, pixels[:, :, :down], pixels[:, :, -down:], pixels[..., :across], pixels[..., -across:]
    colour, *halves = (part.float().mean((2, 3)) / 255 for part in parts)
    return colour.mean(1), colour, torch.stack([half.mean(1) for half in halves], 1)


class Captions:
    """All captions that can be composed, and which one an image has: `captions(pixels, labels)` → (N,) numbers of captions.

    classes: names; pixels (N, 3, H, W) uint8: training images, on which the words for brightness and colour are fixed.
    texts: the C captions; tokens (C, L): their words as numbers, 0 starts, 1 ends and pads; words: the vocabulary.
    ValueError with fewer than two classes."""

    def __init__(self, classes, pixels):
        check(len(classes) >= 2, "classes", classes, "at least two")
        brightness, colour, _ = pixel_facts(pixels)
        self.thirds, self.middle = brightness.quantile(torch.tensor([1 / 3, 2 / 3])), colour.mean(0)
        self.parts = (tuple(classes), LIGHT, TINT, PLACE)
        self.texts = [f"a {light} {tint} photo of one {name} brightest at the {place}" for name, light, tint, place in product(*self.parts)]
        self.words = sorted({word for text in self.texts for word in text.split()})
        number = {word: i + 2 for i, word in enumerate(self.words)}
        rows = [[0, *(number[word] for word in text.split()), 1] for text in self.texts]
        longest = max(map(len, rows))
        self.tokens = torch.tensor([row + [1] * (longest - len(row)) for row in rows])

    def __call__(self, pixels, labels):
        brightness, colour, halves = pixel_facts(pixels)
        parts = labels, torch.bucketize(brightness, self.thirds), (colour - self.middle).argmax(1), halves.argmax(1)
        numbers = torch.zeros_like(labels)
        for part, names in zip(parts, self.parts, strict=True):
            numbers = numbers * len(names) + part
        return numbers

    def split(self, numbers):
        """(N, 4): class, brightness, colour and place of captions, given by number."""
        sizes = [len(names) for names in self.parts]
        return torch.stack([numbers // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes)], 1)


def coloured(images):
    """Digits in red, green and blue, so that words for colours mean something."""
    colour = (0.4 + 0.6 * torch.eye(3))[torch.arange(len(images)) % 3, :, None, None]
    images.pixels = (images.pixels * colour).round().to(torch.uint8)
    return images


def captioned_images(dataset, train_dataset, learn, test, processor, seed=0, offline=False):
    """(Images to learn from, Images to test on, why they are no evidence): at most `learn` and `test` of them, with labels.

    dataset: 'cifar10' or 'imagefolder:<path>', to test on. train_dataset: the same, to learn from; None: CIFAR-10's training part, or a
    folder train… beside the image folder, or else four fifths of that folder. Where CIFAR-10 cannot be had (or offline, with
    dataset 'cifar10') coloured handwritten digits stand in. ValueError for images without classes, and for classes that differ."""
    kind, _, folder = dataset.partition(":")
    for name, value in (("DATASET", dataset), ("TRAIN_DATASET", train_dataset or dataset)):
        check(value.partition(":")[0] in ("cifar10", "imagefolder"), name, value, "cifar10, imagefolder:<path> (a folder per class)")
    check_apart("TRAIN_DATASET", train_dataset, dataset)
    beside = training_folders(folder) if kind == "imagefolder" and train_dataset is None else []
    check(len(beside) < 2, "TRAIN_DATASET", train_dataset, f"one of the folders beside {dataset}: {', '.join(p.name for p in beside)}")
    source = train_dataset or (dataset if kind == "cifar10" else f"imagefolder:{beside[0]}" if beside else None)
    try:
        if offline and kind == "cifar10":
            raise NoImages("a smoke run downloads nothing")
        if source is None:
            every = load_images(dataset, learn + test, processor, seed)
            fifth = max(1, min(test, len(every) // 5))
            return every.part(slice(fifth, None)), every.part(slice(fifth)), ""
        mine, other = load_images(source, learn, processor, seed, train=True), load_images(dataset, test, processor, seed)
        check(mine.classes == other.classes, "TRAIN_DATASET", source, f"the classes of {dataset}: {', '.join(other.classes)}")
        return mine, other, ""
    except NoImages as error:
        mine, other = map(coloured, digit_images(seed))
        return mine.part(slice(learn)), other.part(slice(test)), f"coloured digits stand in for photographs: {error}"
