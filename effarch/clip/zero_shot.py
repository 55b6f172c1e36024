"""A classifier from class names: their texts become features, an image takes the closest one.

It is zero-shot only where the text tower never saw labels of these images; hence "class-name head"."""

import unicodedata

import torch
import torch.nn.functional as F

from effarch.checks import check
from effarch.clip.images import CIFAR_CLASSES

KINDS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
# Names among ImageNet's that belong to a class of CIFAR-10, chosen by meaning alone. ImageNet knows no deer: antelopes stand in.
FROM_IMAGENET = {
    "airplane": ["airliner", "warplane"],
    "automobile": ["sports car", "convertible", "beach wagon", "cab", "limousine", "minivan", "jeep"],
    "bird": ["robin", "jay", "magpie", "goldfinch", "house finch", "junco", "indigo bunting", "chickadee", "ostrich", "hen"],
    "cat": ["tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"],
    "deer": ["impala", "gazelle", "hartebeest"],
    "dog": ["golden retriever", "Labrador retriever", "beagle", "German shepherd", "collie", "boxer", "pug", "Chihuahua"],
    "frog": ["bullfrog", "tree frog", "tailed frog"],
    "horse": ["sorrel"],
    "ship": ["container ship", "liner", "schooner", "speedboat", "fireboat", "yawl", "aircraft carrier"],
    "truck": ["trailer truck", "garbage truck", "tow truck", "pickup", "fire engine", "moving van"],
}
SAME = 1 - 1e-6  # cosine above which two texts are one
CIFAR_TEMPLATES = [f"a {kind}photo of {article} {{}}." for kind in KINDS for article in ("a", "the")]
CIFAR_TEMPLATES += [f"a photo of {size}{{}}." for size in ("a small ", "a big ", "the small ", "the big ")]


def prompt_templates(classes):
    """CLIP's 18 CIFAR-10 templates for CIFAR-10's classes, one plain template otherwise.

    ValueError where a class name has no word that a prompt could use, such as '0012' or 'n01440764'."""
    short = [c for c in classes if sum(ch.isalpha() for ch in c) < 2 and c.isascii()]  # one sign is a word in Chinese
    odd = short + [c for c in classes if not any(ch.isalpha() for ch in c) or (c[:1] == "n" and c[1:].isdigit())]
    check(not odd, "class names", odd[:3], "words: name the folders of DATASET after what they show")
    return CIFAR_TEMPLATES if set(classes) == set(CIFAR_CLASSES) else ["a photo of a {}."]


def imagenet_names():
    """The different names of ImageNet's 1000 classes, from torchvision: 999, since Cardigan is a dog and a garment."""
    from torchvision.models import ResNet50_Weights

    return list({name.lower(): name for name in ResNet50_Weights.IMAGENET1K_V2.meta["categories"]}.values())


@torch.no_grad()
def encode_texts(checkpoint, texts, batch=64):
    """(n, P) normalised features of texts, pooled at the end token, on the CPU."""
    rows = []
    for start in range(0, len(texts), batch):
        tokens = checkpoint.tokenize(texts[start:start + batch])
        if type(checkpoint.model).__name__ == "CLIPModel" and "attention_mask" in tokens:
            # its tokens look back only, so what pads them changes nothing; SigLIP reads its padding, too
            longest = int(tokens["attention_mask"].sum(1).max())
            tokens = {name: values[:, :longest] for name, values in tokens.items()}
        out = checkpoint.model.get_text_features(**{k: v.to(checkpoint.model.device) for k, v in tokens.items()})
        rows.append(F.normalize(getattr(out, "pooler_output", out), dim=-1).cpu())
    return torch.cat(rows)


def unspelt(checkpoint, names):
    """Those names that are not the same after the tokenizer's way there and back, but for case, accents and what is no letter or digit."""
    def letters(text):
        text = unicodedata.normalize("NFKD", text.casefold())
        return "".join(c for c in text if c.isalnum())

    spell = getattr(checkpoint.tokenize, "spell", None)
    return [name for name in names if letters(spell(name)) != letters(name)] if spell else []


@torch.no_grad()
def text_features(checkpoint, classes, templates):
    """(C, P): per class the normalised mean of its prompts' normalised features.

    ValueError with fewer than two classes, and where two classes get the same feature: a tokenizer that does not know
    their names makes all texts alike, and every prediction the first class."""
    check(len(classes) >= 2, "class names", classes, "at least two: with one, every prediction is right")
    unknown = unspelt(checkpoint, classes)
    check(not unknown, "class names", unknown[:3], "names that the tokenizer can spell")
    features = encode_texts(checkpoint, [template.format(name) for name in classes for template in templates])
    features = F.normalize(features.unflatten(0, (len(classes), -1)).mean(1), dim=-1)
    alike = (features @ features.T).fill_diagonal_(-1)
    first, second = divmod(int(alike.argmax()), len(classes))
    check(alike.max() < SAME, "class texts", [classes[first], classes[second]], "names that the text tower tells apart")
    return features


def zero_shot_features(checkpoint):
    """(10, P): CIFAR-10's classes by the names of ImageNet's that belong to each, so that labels of CIFAR-10 that a text
    tower has seen do not help it: per class the normalised mean of its names' features."""
    texts = {name: [template.format(word) for word in words for template in ("a photo of a {}.", "a photo of the {}.")]
             for name, words in FROM_IMAGENET.items()}
    features = encode_texts(checkpoint, [text for part in texts.values() for text in part])
    return F.normalize(torch.stack([part.mean(0) for part in features.split([len(part) for part in texts.values()])]), dim=-1)


@torch.no_grad()
def image_features(encode, images, batch=50, device="cpu"):
    """(N, P) features of all Images, on the CPU. encode: pixel_values (B, 3, S, S) → L2-normalised features (B, P)."""
    return torch.cat([encode(pixels).cpu() for pixels in images.batches(batch, device)])
