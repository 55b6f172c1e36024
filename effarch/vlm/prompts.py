"""The language model's side of a Qwen2-VL-class prompt: which columns there are, where they stand, what may be seen.

Works on transformers' own modules; knows nothing of how columns are chosen."""

from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature

import torch
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModelOutputWithPast

from effarch.checks import check
from effarch.clip.towers.base import as_its_library, home_of, hooked, patched, refuse_attention, refuse_masks

SUPPORTED = "Qwen2.5-VL and Qwen2-VL of transformers 5, without sliding windows"


def find_model(model):
    """The part of a model that holds tower and language model; TypeError for a model or a library that is not supported."""
    inner = getattr(model, "model", model)
    known = {base.__name__ for base in type(inner).__mro__} & {"Qwen2_5_VLModel", "Qwen2VLModel"}
    if not known or "mm_token_type_ids" not in signature(inner.get_rope_index).parameters or inner.language_model.has_sliding_layers:
        raise TypeError(f"{type(model).__name__} is not supported; supported: {SUPPORTED}")
    return inner


@dataclass
class Prompt:
    """The columns of B prompts in the language model, filled up on the left."""

    h: torch.Tensor  # (B, N, C)
    positions: torch.Tensor  # (B, N, 3) time, row, column
    real: torch.Tensor  # (B, N) False where it is filled up
    vision: torch.Tensor  # (B, N)
    asks: torch.Tensor  # (B, N) text of the prompt itself

    def take(self, keep):
        """The columns keep (B, N), pushed to the right; rows that keep fewer are filled up."""
        index = keep.int().argsort(dim=1, stable=True)[:, -int(keep.sum(1).max()):]
        row, real = torch.arange(len(keep), device=keep.device)[:, None], keep.gather(1, index)
        return Prompt(self.h[row, index], self.positions[row, index], real, self.vision[row, index] & real,
                      self.asks[row, index] & real)


@dataclass
class Note:
    """What the steps after a reduced prompt need to know; it lies on the cache."""

    columns: int  # of the prompt before the reduction
    position: torch.Tensor  # (B,) which comes next
    stages: dict  # layer → (B, M) which columns of its cache are real


def causal_mask(real, n, implementation, dtype):
    """Attention mask of the last n of the columns real (B, M), in the form that an attention implementation takes."""
    if "flash" in implementation:
        return None if real.all() else real.long()
    if implementation == "sdpa" and n in (1, real.shape[1]) and real.all():
        return None  # the kernel's own causal mask; a single query sees everything
    column = torch.arange(real.shape[1], device=real.device)
    mask = real[:, None, None] & (column <= column[-n:, None])
    return mask if implementation == "sdpa" else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


def rope_positions(inner, call):
    """(3, B, N) positions of a prompt: the caller's (`generate` gives them), or the library's; ValueError where they would be
    one-dimensional, which is what the library falls back to without mm_token_type_ids."""
    kinds, given = call.get("mm_token_type_ids"), call.get("position_ids")
    spatial = given is not None and given.ndim == 3 and bool((given[-1] != given[-2]).any())
    check(kinds is not None or spatial, "mm_token_type_ids", None, "what the processor returns: 0 text, 1 image, 2 video")
    if given is not None:
        return given[-3:]
    names = ("mm_token_type_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, inner.rope_deltas = inner.get_rope_index(call["input_ids"], **{n: call[n] for n in names if call.get(n) is not None})
    return positions


def refuse_left_out(inner):
    """ValueError for hooks and patches that a reduced prompt would leave out without a word, TypeError for an attention of somebody else's,
    or one in the tower that is told to be causal, say."""
    blocks = {f"visual.blocks.{i}{place}": part for i, block in enumerate(inner.visual.blocks) for place, part in (("", block), (".attn", block.attn))}
    parts = {"visual": inner.visual, "visual.rotary_pos_emb": inner.visual.rotary_pos_emb, "language_model": inner.language_model} | blocks
    parts = {name: getattr(part, "_orig_mod", part) for name, part in parts.items()}  # inside what torch.compile made
    refuse_attention([*parts.values(), *(layer.self_attn for layer in inner.language_model.layers)])
    for i, block in enumerate(inner.visual.blocks):
        refuse_masks(getattr(block.attn, "_orig_mod", block.attn), i)
    home = home_of(type(inner).forward)
    own = [name for name, part in parts.items() if patched(part) or not as_its_library(type(part), "forward", home)]
    check(not own, "forwards of their own", own[:3], "none where prompts are reduced: not these modules are called, but their parts")
    held = hooked(parts)
    check(not held, "hooks on", held[:3], "hooks on the whole model, on single norms, linear layers and MLPs, or on layers of the language model")


def no_labels(model, args, options):
    """Before a call of the whole model: ValueError for labels of a prompt with pictures, whose columns would no longer be those of the logits."""
    pictures = [name for name in ("pixel_values", "pixel_values_videos") if options.get(name) is not None]
    check(not pictures or not any(labels is not None for labels in [options.get("labels"), *args[5:6]]), "labels", "given",
          "None where prompts are reduced: compare the logits, which are those of the columns that are left")


ORDER = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "pixel_values",
         "pixel_values_videos", "image_grid_thw", "video_grid_thw")  # of the library's arguments


def open_prompt(inner, call):
    """A call of the model's forward as dict(input_ids, real, positions, cache, media), or None without pictures.

    media: [(patches, grids, placeholder's token)]. ValueError, one line, for what cannot be reduced."""
    kinds = (("pixel_values", "image_grid_thw", inner.config.image_token_id),
             ("pixel_values_videos", "video_grid_thw", inner.config.video_token_id))
    media = [(call[pixels], call.get(grid), token) for pixels, grid, token in kinds if call.get(pixels) is not None]
    if not media:
        return None
    ids, cache, mask = call.get("input_ids"), call.get("past_key_values"), call.get("attention_mask")
    check(ids is not None, "input_ids", None, "the prompt's tokens, with its pictures")
    check(cache is None or not (cache.is_compileable or cache.get_seq_length()), "past_key_values", type(cache).__name__,
          "None or an empty DynamicCache; a new turn needs the whole conversation")
    check(mask is None or getattr(mask, "ndim", 0) == 2, "attention_mask", type(mask).__name__, "None or two dimensions")
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    check(bool((real[:, 1:] >= real[:, :-1]).all()), "attention_mask", "filled up on the right or inside", "filled up on the left only: "
          "processor.tokenizer.padding_side = 'left'")
    units = inner.config.vision_config.spatial_merge_size**2
    for _, grid, token in media:
        wanted, there = int(grid.prod(-1).sum()) // units, int((ids == token).sum())
        check(wanted == there, "placeholders", there, f"{wanted}, one for each unit of the pictures")
    positions, use = rope_positions(inner, call), call.get("use_cache")
    if cache is None and (inner.config.text_config.use_cache if use is None else use):
        cache = DynamicCache(config=inner.language_model.config)
    return dict(input_ids=ids, real=real, positions=positions, cache=cache, media=media)


def no_rollback(*_):
    """Instead of a cache's `crop`, which counts the tokens that are no longer there."""
    check(False, "generate", "assisted or prompt-lookup decoding", "greedy, sampled or beam search: a reduced prompt's cache is not rolled back")


def read_on(inner, note, call):
    """Hidden states (B, n, C) of n tokens that follow a reduced prompt, all layers; each layer sees what its cache holds."""
    language, cache, mask, positions = inner.language_model, *(call.get(n) for n in ("past_key_values", "attention_mask", "position_ids"))
    h = call.get("inputs_embeds")
    h = inner.get_input_embeddings()(call["input_ids"]) if h is None else h
    first, n = note.stages[0], h.shape[1]
    done = cache.get_seq_length() - first.shape[1]
    lengths = [columns + done + n for columns in (note.columns, first.shape[1])]
    check(mask is None or mask.ndim == 2 and mask.shape[1] in lengths, "attention_mask", mask is None or tuple(mask.shape),
          "two dimensions, the prompt and all since; a new turn needs the whole conversation, without a cache")
    new = first.new_ones(len(h), done + n) if mask is None else mask[:, -(done + n):].bool()
    if positions is None:
        positions = (note.position[:, None] + done + torch.arange(n, device=h.device)).expand(3, -1, -1)
    positions = positions[-3:] if positions.ndim == 3 else positions.expand(3, -1, -1)
    turn, kind = language.rotary_emb(h, positions), language.config._attn_implementation
    for i, layer in enumerate(language.layers):
        if i in note.stages:
            mask = causal_mask(torch.cat([note.stages[i], new], 1), n, kind, h.dtype)
        h = layer(h, attention_mask=mask, position_embeddings=turn, past_key_values=cache, use_cache=True)
    return language.norm(h)


def read_prompt(inner, prompt, cache, drop):
    """All layers on a Prompt: (hidden states (B, M, C), {layer: (B, M) columns that are real from it on}).

    drop(number, layer, prompt, totals, turn) → the Prompt with fewer columns that this layer reads, or None; totals: vision
    tokens of each row at first, turn: (cos, sin) of the columns."""
    language, stages, totals = inner.language_model, {}, prompt.vision.sum(1).tolist()
    rotate = lambda prompt: language.rotary_emb(prompt.h, prompt.positions.permute(2, 0, 1))
    turn = rotate(prompt)
    for i, layer in enumerate(language.layers):
        fewer = drop(i, layer, prompt, totals, turn)
        if fewer is not None:
            prompt, turn = fewer, rotate(fewer)
        if fewer is not None or i == 0:
            stages[i] = prompt.real
            mask = causal_mask(prompt.real, prompt.h.shape[1], language.config._attn_implementation, prompt.h.dtype)
        prompt.h = layer(prompt.h, attention_mask=mask, position_embeddings=turn, past_key_values=cache, use_cache=cache is not None)
    return language.norm(prompt.h), stages


def place_features(inner, input_ids, real, media, encode):
    """(embeddings (B, N, C) with the features of what is left, columns that stay (B, N), vision columns (B, N))."""
    h, keep, vision = inner.get_input_embeddings()(input_ids), real, torch.zeros_like(real)
    for pixels, grid, token in media:
        slots = input_ids == token
        features, index = encode(pixels, grid)
        columns = slots.flatten().nonzero().flatten()[index]
        h = h.flatten(0, 1).index_copy(0, columns, features.to(h.dtype)).view_as(h)
        keep, vision = (keep & ~slots).flatten().index_fill(0, columns, True).view_as(keep), vision | slots
    return h, keep, vision


@contextmanager
def reading_differently(model, encode, drop):
    """Within the `with` block the model (see find_model) reads prompts with pictures through `encode` and `drop`.

    encode(patches, grids) → (features (U', C), numbers (U',) of the units they stand for); drop: see read_prompt. Everything else
    is as the library has it: text alone, `generate`, beams. Afterwards, also after an exception, the model is what it was."""
    inner = find_model(model)
    original, before, deltas, asked = inner.forward, vars(inner).get("forward"), inner.rope_deltas, []
    refuse_left_out(inner)
    check(getattr(before, "reads_differently", False) or not patched(inner), "modules patched", "the model's forward",
          "none where prompts are reduced: it would not be called")

    def first_pass(input_ids, real, positions, cache, media):
        h, keep, vision = place_features(inner, input_ids, real, media, encode)
        n, old = input_ids.shape[1], asked[0].shape[1] if asked else 0
        now = [input_ids[:, :old], *(part for pixels, grid, _ in media for part in (pixels, grid))]
        # without a cache an answer grows by whole prompts: the text that asks stays that of the first
        if cache is not None or not old or n <= old or len(now) != len(asked) or not all(map(torch.equal, now, asked)):
            asked[:] = [input_ids, *(now[1:] if cache is None else ())]
        asks = real & ~vision & (torch.arange(n, device=real.device) < asked[0].shape[1])
        prompt = Prompt(h, positions.permute(1, 2, 0), real, vision, asks).take(keep)
        h, stages = read_prompt(inner, prompt, cache, drop)
        if cache is not None:
            cache.reduced, cache.crop = Note(n, positions.amax((0, 2)) + 1, stages), no_rollback
        return h

    def forward(*args, **options):
        call = dict(zip(ORDER, args, strict=False)) | options
        prompt, note = open_prompt(inner, call), getattr(call.get("past_key_values"), "reduced", None)
        if prompt is None and note is None:  # text only: nothing to reduce
            return original(**call)
        configured = lambda name: any(getattr(config, name, False) for config in (inner.config, inner.language_model.config))
        unsupported = [name for name in ("output_attentions", "output_hidden_states")
                       if (configured(name) if call.get(name) is None else call[name])]
        check(not unsupported, "options", unsupported, "neither of them where prompts are reduced, also in the configuration")
        if prompt:
            refuse_left_out(inner)
        h = first_pass(**prompt) if prompt else read_on(inner, note, call)
        cache = prompt["cache"] if prompt else call["past_key_values"]
        return Qwen2_5_VLModelOutputWithPast(last_hidden_state=h, past_key_values=cache, rope_deltas=inner.rope_deltas)

    forward.reads_differently = True
    inner.forward = forward
    hook = None if model is inner else model.register_forward_pre_hook(no_labels, with_kwargs=True)
    try:
        yield
    finally:
        inner.rope_deltas = deltas
        if hook is not None:
            hook.remove()
        if before is None:
            del inner.forward
        else:
            inner.forward = before
