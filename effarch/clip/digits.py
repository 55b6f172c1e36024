"""Offline stand-in: a small CLIP trained here on scikit-learn's digits. Shows that the pipeline works; it is
no evidence about CLIP."""

import string
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from effarch.clip.checkpoints import Checkpoint
from effarch.clip.images import Images

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ALPHABET = " ." + string.ascii_lowercase


def digit_images(seed=0):
    """(training Images, test Images): 1 297 and 500 handwritten digits, 8 × 8 pixels enlarged to 32 × 32."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    pixels = torch.tensor(data.images * 15, dtype=torch.uint8)[:, None].expand(-1, 3, -1, -1)
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.tensor(data.target)
    parts = order[500:], order[:500]
    return tuple(Images(pixels[i], labels[i], DIGITS, "scikit-learn digits") for i in parts)


def spell(texts):
    """Character tokens of texts: 0 starts, 1 ends and pads, then the letters."""
    rows = [[0, *(ALPHABET.index(c) + 2 for c in text), 1] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def train_digits_clip(device, steps=400, seed=0, log=print):
    """(Checkpoint, test Images): a 4-layer CLIP, 16 patches, fitted with CLIP's loss over the ten prompts."""
    torch.manual_seed(seed)
    shape = dict(num_hidden_layers=4, num_attention_heads=3, hidden_size=48, intermediate_size=192,
                 initializer_range=0.2)
    text = dict(shape, num_hidden_layers=1, vocab_size=len(ALPHABET) + 2, max_position_embeddings=40,
                bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = transformers.CLIPConfig(vision_config=dict(shape, image_size=32, patch_size=8), text_config=text,
                                     projection_dim=32)
    model = transformers.CLIPModel(config).to(device).train()
    train, test = digit_images(seed)
    prompts = spell([f"a photo of a {name}." for name in DIGITS]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    random, begin = np.random.default_rng(seed), time.perf_counter()
    for _ in range(steps):
        index = random.integers(0, len(train), 64)
        out = model.get_text_features(**prompts)
        words = F.normalize(getattr(out, "pooler_output", out), dim=-1)
        seen = model.get_image_features(pixel_values=train.batch(index, device))
        images = F.normalize(getattr(seen, "pooler_output", seen), dim=-1)
        loss = F.cross_entropy(images @ words.T * 20, train.labels[index].to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    log(f"a small CLIP was fitted to digits in {time.perf_counter() - begin:.0f} s (loss {loss.item():.3f})")
    facts = dict(checkpoint="small CLIP trained here on digits")
    return Checkpoint(model.eval(), None, spell, "digits-clip", True, facts), test
