"""Shapes of Qwen2-VL and Qwen2.5-VL models, and what a prompt costs them: multiply-adds and cache, by formula."""

import torch
import transformers

from effarch.checks import check


def shape(blocks, width, hidden, heads, full, layers, language, mlp, language_heads, kv_heads, sections, vocabulary):
    """Vision and text part of a Qwen2.5-VL configuration, as plain dictionaries."""
    vision = dict(depth=blocks, hidden_size=width, intermediate_size=hidden, num_heads=heads, fullatt_block_indexes=full,
                  out_hidden_size=language)
    text = dict(hidden_size=language, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=language_heads,
                num_key_value_heads=kv_heads, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections))
    return dict(vision_config=vision, text_config=text)


PUBLISHED = [7, 15, 23, 31]
SHAPES = {  # '3b' and '7b' are the published Qwen2.5-VL; 'small' has the proportions of '3b'
    "tiny": shape(4, 32, 64, 2, [1, 3], 4, 64, 128, 2, 1, [4, 6, 6], 512),
    "small": shape(8, 320, 856, 4, [3, 7], 9, 512, 2752, 4, 1, [16, 24, 24], 512),
    "3b": shape(32, 1280, 3420, 16, PUBLISHED, 36, 2048, 11008, 16, 2, [16, 24, 24], 151936),
    "7b": shape(32, 1280, 3420, 16, PUBLISHED, 28, 3584, 18944, 28, 4, [16, 24, 24], 152064),
}


def shape_config(size):
    """The transformers configuration of one of SHAPES; image and video tokens are the last of the vocabulary."""
    check(size in SHAPES, "SIZE", size, ", ".join(SHAPES))
    vocabulary = SHAPES[size]["text_config"]["vocab_size"]
    tokens = dict(zip(("image", "video", "vision_start", "vision_end"), range(vocabulary - 4, vocabulary), strict=True))
    return transformers.Qwen2_5_VLConfig(**SHAPES[size], **{f"{name}_token_id": token for name, token in tokens.items()},
                                         tie_word_embeddings=False)  # random tied weights only ever repeat the last token


def random_model(size, device="cpu", dtype=torch.float32, seed=0):
    """A Qwen2.5-VL of one of SHAPES with random weights, made on the device."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = transformers.Qwen2_5_VLForConditionalGeneration(shape_config(size))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def tower_shape(vision):
    """(width, MLP width × its matrices, units along a window or None, blocks with full attention) of a vision configuration."""
    if hasattr(vision, "fullatt_block_indexes"):
        side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        return vision.hidden_size, 3 * vision.intermediate_size, side, sorted(vision.fullatt_block_indexes)
    return vision.embed_dim, 2 * vision.embed_dim * vision.mlp_ratio, None, list(range(vision.depth))


def prefill_macs(config, grid, text, plan=None):
    """Multiply-adds of one prompt with one image: (in the tower, in the language model), the last token's logits included.

    grid: (frames, rows, columns) of patches; text: other tokens; plan: an effarch.qwen.Reduction, None = all tokens. Survivors
    count as evenly spread over windows, choosing them in the tower as free."""
    vision, words, m = config.vision_config, config.text_config, config.vision_config.spatial_merge_size**2
    width, hidden, side, full = tower_shape(vision)
    frames, units, c = grid[0], grid[1] * grid[2] // m, words.hidden_size
    left = [plan.tower_units(block, units) if plan else units for block in range(vision.depth + 1)]
    tower = frames * units * m * width * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for block, n in enumerate(left[:-1]):
        seen = n if block in full or not side or units <= side**2 else side**2 * n / units
        tower += frames * n * m * width * (4 * width + hidden + 2 * seen * m)
    tower += frames * left[-1] * m * width * (m * width + c)
    language, heads = c * words.vocab_size, words.num_key_value_heads / words.num_attention_heads
    for layer in range(words.num_hidden_layers):
        n = text + (plan.language_tokens(layer, frames, units) if plan else frames * units)
        if plan and plan.where == "language" and plan.keep < 1 and layer in plan.layers:  # the keys that are asked
            language += (text + plan.language_tokens(layer - 1, frames, units)) * heads * c**2
        language += n * c * ((2 + 2 * heads) * c + 3 * words.intermediate_size + 2 * n)
    return tower, language


def cache_bytes(config, grid, text, plan=None, element=2):
    """Bytes of keys and values that one prompt leaves for its answer; element: bytes of a number."""
    words, units = config.text_config, grid[1] * grid[2] // config.vision_config.spatial_merge_size**2
    row = 2 * element * words.num_key_value_heads * words.hidden_size // words.num_attention_heads
    return sum(row * (text + (plan.language_tokens(layer, grid[0], units) if plan else grid[0] * units))
               for layer in range(words.num_hidden_layers))
