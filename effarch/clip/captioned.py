"""A small CLIP for images with composed captions: its shape, its features by transformers' own modules, its share of right answers."""

import math

import torch
import torch.nn.functional as F

from effarch.checks import check, check_count


def captioned_clip(captions, side=32, patch=4, width=64, heads=4, vision=4, text=4):
    """A CLIPModel of transformers with random weights for `Captions`: `vision` and `text` layers, each with an MLP of 4 × width channels."""
    import transformers

    check(width % check_count(heads, "heads") == 0, "heads", heads, f"a divisor of the width, {width}")
    check(side % check_count(patch, "patch") == 0, "patch", patch, f"a divisor of the image's side, {side}")
    shape = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, hidden_act="gelu")
    images = dict(shape, num_hidden_layers=check_count(vision, "vision"), image_size=side, patch_size=patch)
    texts = dict(shape, num_hidden_layers=check_count(text, "text"), vocab_size=len(captions.words) + 2, bos_token_id=0, eos_token_id=1,
                 pad_token_id=1, max_position_embeddings=captions.tokens.shape[1])
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=images, text_config=texts, projection_dim=width))


def clip_features(clip, pixels, tokens):
    """L2-normalised features (B, P) of images (B, 3, H, W) and (n, P) of texts (n, L), by transformers' own modules: whatever its layers hold."""
    outs = clip.get_image_features(pixel_values=pixels), clip.get_text_features(input_ids=tokens)
    return tuple(F.normalize(getattr(out, "pooler_output", out), dim=-1) for out in outs)


@torch.no_grad()
def judge_clip(clip, pixels, numbers, captions, reference=None, batch=250):
    """(row, (features (N, P), classes said (N,))): shares of right answers of a small CLIP.

    pixels: index → (B, 3, H, W) of the images at an index (n,); numbers (N,): of their captions. The row holds accuracy (class, by its
    captions' mean feature) and caption_accuracy; with a reference, which is another model's second result, cosine_mean and top1_agreement,
    too. NaN where features are not finite."""
    device = next(clip.parameters()).device
    tokens, rows = captions.tokens.to(device), []
    for index in torch.arange(len(numbers)).split(batch):
        features, texts = clip_features(clip, pixels(index).to(device), tokens)
        rows.append(features)
    images = torch.cat(rows)
    classes = F.normalize(texts.unflatten(0, (len(captions.parts[0]), -1)).mean(1), dim=-1)
    said, good = (images @ classes.T).argmax(1).cpu(), bool(images.isfinite().all() and texts.isfinite().all())
    share = lambda hits: float(hits.float().mean()) if good else math.nan  # argmax hides NaN
    row = dict(accuracy=share(said == captions.split(numbers)[:, 0]), caption_accuracy=share((images @ texts.T).argmax(1).cpu() == numbers))
    if reference is not None:
        row |= dict(cosine_mean=float((images * reference[0]).sum(-1).mean()) if good else math.nan, top1_agreement=share(said == reference[1]))
    return row, (images, said)
