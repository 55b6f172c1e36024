"""Photographs to look at, and what token reduction does to them, painted patch by patch."""

import torch

from effarch.clip.images import Images, bundled_photographs, preprocess, scaling


def photographs(study, most=8):
    """(names, Images): pictures that come with scikit-image, at the model's size; without it, the study's own images."""
    pictures = bundled_photographs()
    if not pictures:
        print("scikit-image is not installed: test images take the photographs' place")
        return [f"image {i + 1}" for i in range(min(most, len(study.images)))], study.images.part(slice(0, most))
    names, shots = zip(*pictures[:most], strict=True)
    processor = study.checkpoint.processor
    return list(names), Images(preprocess(shots, processor)[0], None, [], "photographs", **scaling(processor))


def to_patches(image, patch):
    """(3, H, W) → (patches, 3, patch, patch), row by row."""
    parts = image.unfold(1, patch, patch).unfold(2, patch, patch)
    return parts.permute(1, 2, 0, 3, 4).flatten(0, 1).clone()


def from_patches(parts, columns):
    """(patches, 3, patch, patch) → (H, W, 3), for imshow."""
    patch = parts.shape[-1]
    rows = len(parts) // columns
    return parts.view(rows, columns, 3, patch, patch).permute(0, 3, 1, 4, 2).reshape(rows * patch, columns * patch, 3)


def paint_kept(image, owner, patch):
    """image (3, H, W) in 0…1, owner (P,) with -1 = dropped → (H, W, 3) with the dropped patches hatched, which shows on dark
    and on bright pictures."""
    parts, at = to_patches(image, patch), torch.arange(patch)
    stripes = (at[:, None] + at) // max(1, patch // 4) % 2
    parts[owner < 0] = 0.25 * parts[owner < 0] + 0.75 * (0.35 + 0.5 * stripes)
    return from_patches(parts, image.shape[2] // patch)


def paint_groups(image, owner, patch):
    """Like `paint_kept`, for merged patches: each group gets its mean colour, and a line where the next one begins."""
    parts, columns = to_patches(image, patch), image.shape[2] // patch
    for group in owner.unique():
        members = owner == group
        if members.sum() > 1:
            parts[members] = parts[members].mean((0, 2, 3), keepdim=True)
    canvas, grid = from_patches(parts, columns), owner.view(-1, columns)
    for i, j in ((grid[1:] != grid[:-1]).nonzero() + torch.tensor([1, 0])).tolist():
        canvas[i * patch - 1 : i * patch + 1, j * patch : (j + 1) * patch] = 0
    for i, j in ((grid[:, 1:] != grid[:, :-1]).nonzero() + torch.tensor([0, 1])).tolist():
        canvas[i * patch : (i + 1) * patch, j * patch - 1 : j * patch + 1] = 0
    return canvas


def show(ax, picture, title=""):
    """A picture (H, W, 3) without axes."""
    ax.imshow(picture.clamp(0, 1))
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
