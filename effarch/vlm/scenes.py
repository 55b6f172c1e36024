"""A tiny Qwen2.5-VL trained here on scenes of digits: shows that a pipeline measures what it should; no evidence about Qwen.

A scene has four rooms, told apart by the pattern of their walls, and a digit in one to four of them, each as large as one
unit of 2 × 2 patches. Three questions of one token each: how many digits, in which room is a seven, which digit is in that room."""

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import transformers

TASKS = ("count", "where", "which")
START, IMAGE, VIDEO, END, COUNT, WHERE, WHICH, ANSWER = 0, 1, 2, 3, 4, 5, 15, 19  # tokens; WHERE + digit, WHICH + room, …
SIDE, PATCH, DIGIT, ROOM = 48, 4, 8, 24  # pixels
UNITS = (SIDE // (2 * PATCH)) ** 2


def tiny_model(seed=0, width=64, hidden=96):
    """An untrained Qwen2.5-VL of 0.3 M parameters: 4 tower blocks (the second and the last with full attention), 2 layers."""
    torch.manual_seed(seed)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=dict(depth=4, hidden_size=width, intermediate_size=2 * width, num_heads=4, in_channels=1, patch_size=PATCH,
                           temporal_patch_size=1, window_size=4 * PATCH, fullatt_block_indexes=[1, 3], out_hidden_size=hidden),
        text_config=dict(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=32, bos_token_id=START, eos_token_id=END, pad_token_id=START,
                         rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[hidden // 24] * 3)),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=False)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.3)
        for layer in model.model.language_model.layers:  # queries and keys begin alike: a token looks for what is like it
            attention = layer.self_attn
            attention.k_proj.weight.normal_(std=hidden**-0.5)
            heads = attention.k_proj.weight.view(2, -1, hidden).repeat_interleave(2, 0)  # two query heads for each of keys
            attention.q_proj.weight.copy_(heads.flatten(0, 1))
    return model


def walls():
    """(4, ROOM, ROOM) patterns of equal energy: stripes along, across, a checkerboard, diagonals."""
    y, x = np.mgrid[:ROOM, :ROOM]
    patterns = y // 2 % 2, x // 2 % 2, (x // 2 + y // 2) % 2, (x + y) // 4 % 2
    return torch.tensor(np.stack(patterns), dtype=torch.float32) * 0.5 - 0.25


@dataclass
class Scenes:
    """n scenes: pixels (n, SIDE, SIDE), digit (n, 4) of each room, present (n, 4) whether it is there, unit (n, 4) where."""

    pixels: torch.Tensor
    digit: torch.Tensor
    present: torch.Tensor
    unit: torch.Tensor


@cache
def _digits():  # read once: scenes are drawn at every training step
    from sklearn.datasets import load_digits

    return tuple(torch.tensor(part) for part in load_digits(return_X_y=True))


def draw_scenes(n, generator, test=False):
    """n random Scenes of scikit-learn's digits; test: of the 397 digits that training never sees."""
    part = slice(1400, None) if test else slice(0, 1400)
    images, labels = (values[part] for values in _digits())
    images = (images / 8).float().view(-1, DIGIT, DIGIT)
    of_class = [(labels == digit).nonzero().flatten() for digit in range(10)]
    least = min(map(len, of_class))
    table = torch.stack([index[:least] for index in of_class])
    digit = torch.rand(n, 10, generator=generator).argsort(1)[:, :4]
    count = torch.randint(1, 5, (n, 1), generator=generator)
    present = torch.rand(n, 4, generator=generator).argsort(1).argsort(1) < count
    chosen = images[table[digit, torch.randint(0, least, (n, 4), generator=generator)]] * present[..., None, None]
    places = torch.randint(0, ROOM // DIGIT, (n, 4, 2), generator=generator)
    corner, pixel = places[..., None, None] * DIGIT, torch.arange(DIGIT)
    canvas = walls().repeat(n, 1, 1, 1)
    scene, room = torch.arange(n)[:, None, None, None], torch.arange(4)[None, :, None, None]
    canvas[scene, room, corner[:, :, 0] + pixel[:, None], corner[:, :, 1] + pixel] += chosen
    pixels = canvas.view(n, 2, 2, ROOM, ROOM).transpose(2, 3).reshape(n, SIDE, SIDE)
    pixels = pixels + 0.15 * torch.randn(n, SIDE, SIDE, generator=generator)
    rows, columns = (torch.arange(4) // 2 * 3 + places[..., 0], torch.arange(4) % 2 * 3 + places[..., 1])
    return Scenes(pixels, digit, present, rows * 6 + columns)


def patches(pixels):
    """(n, SIDE, SIDE) → (n · patches, PATCH²), the four patches of a unit one after another, and the grids (n, 3)."""
    n, units = len(pixels), SIDE // (2 * PATCH)
    rows = pixels.view(n, units, 2, PATCH, units, 2, PATCH).permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, PATCH**2)
    return rows, torch.tensor([[1, 2 * units, 2 * units]] * n)


def ask(scenes, task):
    """(inputs of the model, right answers (n,)): one question of a task about each scene, about its first room with a digit."""
    n, room = len(scenes.pixels), scenes.present.int().argmax(1)
    digit = scenes.digit[torch.arange(n), room]
    question, answer = {"count": (torch.full((n,), COUNT), scenes.present.sum(1)), "where": (WHERE + digit, room),
                        "which": (WHICH + room, digit)}[task]
    head = torch.tensor([START] + [IMAGE] * UNITS + [END]).expand(n, -1)
    ids, (rows, grid) = torch.cat([head, question[:, None]], 1), patches(scenes.pixels)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == IMAGE).int(), pixel_values=rows,
                image_grid_thw=grid), ANSWER + answer


def unit_labels(scenes):
    """What each unit shows: (n, UNITS) its digit or 10 for none, and (UNITS,) its room."""
    shown = torch.full((len(scenes.pixels), UNITS + 1), 10)  # digits that are absent go to a column of their own
    shown.scatter_(1, torch.where(scenes.present, scenes.unit, UNITS), scenes.digit)
    unit = torch.arange(UNITS)
    return shown[:, :UNITS], unit // 6 // 3 * 2 + unit % 6 // 3


def optimise(parameters, loss, steps, rate):
    """`steps` of AdamW on loss() with a one-cycle schedule."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2), pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def train_tower(model, encode, steps, generator, batch=32):
    """First the tower alone learns to say of every unit which digit it shows, if any, and in which room it is."""
    probe = torch.nn.Linear(model.config.text_config.hidden_size, 15).to(model.device)

    def loss():
        scenes = draw_scenes(batch, generator)
        (shown, room), (rows, grid) = unit_labels(scenes), patches(scenes.pixels)
        said = probe(encode(model.model.visual, rows.to(model.device), grid.to(model.device))[0]).cpu()
        weight = torch.tensor([1.0] * 10 + [0.2], device="cpu")  # most units are empty
        return F.cross_entropy(said[:, :11], shown.flatten(), weight) + 0.3 * F.cross_entropy(said[:, 11:], room.repeat(batch))

    optimise([*model.model.visual.parameters(), *probe.parameters()], loss, steps, 3e-3)


@torch.no_grad()
def see(model, encode, n, generator, batch=100):
    """(Scenes, features (n, UNITS, C)) of n scenes by the trained tower; the question tokens begin at what they ask for.

    'Where is a 7?' begins at the mean feature of sevens less that of all digits, 'which is in room 2?' at that of its digits."""
    parts, features = [], []
    for _ in range(max(1, n // batch)):
        parts.append(draw_scenes(min(n, batch), generator))
        rows, grid = patches(parts[-1].pixels)
        seen = encode(model.model.visual, rows.to(model.device), grid.to(model.device))[0]
        features.append(seen.view(len(grid), UNITS, -1))
    scenes = Scenes(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
    features, (shown, room) = torch.cat(features), unit_labels(scenes)
    digits, words = features[shown != 10], model.get_input_embeddings().weight
    shown, room = shown[shown != 10], room.expand_as(shown)[shown != 10]
    for digit in shown.unique().tolist():
        words[WHERE + digit] = digits[shown == digit].mean(0) - digits.mean(0)
    for one in room.unique().tolist():
        words[WHICH + one] = digits[room == one].mean(0)
    return scenes, features


def train_language(model, scenes, features, steps, generator, batch=64):
    """Then the language model learns to answer, the tower as it is: nine questions a scene, all at the same position and
    masked from each other."""
    inner, (n, device) = model.model, (1 + UNITS + 1, model.device)
    ids = torch.tensor([START] + [IMAGE] * UNITS + [END, COUNT], device=device)
    positions, _ = inner.get_rope_index(ids[None], (ids[None] == IMAGE).int(), image_grid_thw=patches(scenes.pixels[:1])[1])
    positions = torch.cat([positions[..., :n], positions[..., n:].expand(-1, -1, 9)], 2).expand(-1, batch, -1)
    mask = torch.ones(n + 9, n + 9, device=device).tril().bool()
    mask[n:, n:] = torch.eye(9, device=device).bool()
    mask, embed, rooms = mask.expand(batch, 1, -1, -1), model.get_input_embeddings(), torch.arange(4).expand(batch, -1)

    def loss():
        i = torch.randint(0, len(features), (batch,), generator=generator)
        digit, there = scenes.digit[i], scenes.present[i]
        asked = torch.cat([torch.full((batch, 1), COUNT), WHERE + digit, WHICH + rooms], 1).to(device)
        right = torch.cat([ANSWER + there.sum(1, keepdim=True), torch.where(there, ANSWER + rooms, -100),
                           torch.where(there, ANSWER + digit, -100)], 1).to(device)
        words = embed(ids[:n]).expand(batch, -1, -1)
        h = torch.cat([words[:, :1], features[i.to(device)], words[:, -1:], embed(asked)], 1)
        h = inner.language_model(inputs_embeds=h, position_ids=positions, attention_mask={"full_attention": mask}, use_cache=False)
        said = model.lm_head(h.last_hidden_state[:, n:])
        return sum(F.cross_entropy(said[:, one].flatten(0, 1), right[:, one].flatten(), ignore_index=-100)
                   for one in (slice(0, 1), slice(1, 5), slice(5, 9)))

    optimise([*inner.language_model.parameters(), *model.lm_head.parameters()], loss, steps, 4e-3)


def train_tiny(encode, seed=0, steps=(70, 250), scenes=2000, device="cpu"):
    """(model, seconds): a tiny Qwen2.5-VL that answers the three questions.

    encode: (tower, patches, grids) → (features, …), as effarch.qwen.encode_vision; steps: of the tower, of the language model."""
    begin, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    model = tiny_model(seed).to(device)
    with torch.enable_grad():
        train_tower(model, encode, steps[0], generator)
        seen = see(model, encode, scenes, generator)
        train_language(model, *seen, steps[1], generator)
    return model.eval().requires_grad_(False), time.perf_counter() - begin


@torch.no_grad()
def right_answers(model, inputs, answer):
    """How many of the questions the model, reduced or not, answers rightly."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    return int((model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1).cpu() == answer).sum())
