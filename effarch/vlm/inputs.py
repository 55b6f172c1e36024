"""Inputs of Qwen2-VL-class models without their processor: prompts of noise, and the smaller image, the baseline of all pruning."""

import torch
import torch.nn.functional as F
import transformers

from effarch.checks import check


def noise_prompt(config, grids, text=40, seed=0, video=False):
    """Inputs of the model (a BatchFeature) made by hand: noise of the grids (frames, rows, columns) of patches, random text.

    They hold what the library needs and a processor returns, `mm_token_type_ids` among it."""
    generator, vision = torch.Generator().manual_seed(seed), config.vision_config
    merge, token = vision.spatial_merge_size**2, config.video_token_id if video else config.image_token_id
    ids = [2 + seed % 7]
    for frames, rows, columns in grids:
        ids += [config.vision_start_token_id, *[token] * (frames * rows * columns // merge), config.vision_end_token_id]
    special = min(config.image_token_id, config.video_token_id, config.vision_start_token_id)
    words = torch.randint(9, special, (text - 1,), generator=generator).tolist()
    ids = torch.tensor([ids + words])
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), size, generator=generator)
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    kinds = (ids == token).int() * (2 if video else 1)
    return transformers.BatchFeature(dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds,
                                          **dict(zip(names, (pixels, torch.tensor(grids)), strict=True))))


def shrink(h, w, keep):
    """(rows, columns) of at most keep · h · w cells whose shape is closest to h × w; at least one."""
    most = max(1, int(keep * h * w + 1e-9))
    rows = range(max(1, -(-most // w)) if most < h * w else h, min(h, most) + 1)
    return max(((r, min(w, most // r)) for r in rows), key=lambda s: s[0] * s[1] / most - abs(s[0] / h - s[1] / w))


def smaller_image(inputs, config, keep):
    """The inputs as a processor with a lower `max_pixels` makes them: at most a share `keep` of each image's units.

    This is the baseline of all pruning: it saves in the tower as well as in the language model, and needs no code. inputs:
    input_ids and the like (B, N), pixel_values, image_grid_thw. ValueError where prompts would come to differ in length."""
    vision, merge, ids = config.vision_config, config.vision_config.spatial_merge_size, inputs["input_ids"]
    patch, slots = vision.patch_size, (ids.flatten() == config.image_token_id).nonzero().flatten()
    stay, grids, pixels, at = torch.ones_like(ids.flatten()).bool(), [], [], 0
    images = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(-1).tolist())
    for rows, (_, h, w) in zip(images, inputs["image_grid_thw"].tolist(), strict=True):
        h, w, side = h // merge, w // merge, merge * patch
        image = rows.view(h, w, merge, merge, -1, patch, patch).permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, h * side, w * side)
        r, c = shrink(h, w, keep)
        image = F.interpolate(image[None].float(), (r * side, c * side), mode="bicubic", antialias=True)[0].to(rows.dtype)
        parts = image.view(-1, r, merge, patch, c, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
        pixels.append(parts.reshape(r * c * merge**2, -1))
        grids.append([1, r * merge, c * merge])
        stay[slots[at + r * c : at + h * w]] = False
        at += h * w
    lengths = stay.view_as(ids).sum(1).unique().tolist()
    check(len(lengths) == 1, "prompts of a batch", lengths, "the same number of tokens in each")
    text = {name: inputs[name].flatten()[stay].view(len(ids), -1) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    return dict(text, pixel_values=torch.cat(pixels), image_grid_thw=inputs["image_grid_thw"].new_tensor(grids))
