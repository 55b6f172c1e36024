# Written by `python -m lab.build` from ssm/scan_clip.ipynb, where each part is explained: edit it there.
"""A pretrained vision tower whose attention becomes a scan: features from landmarks, mixers, and their distillation."""

import copy
import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count
from effarch.clip.towers import attend, find_vision_module, project, split_heads
from effarch.scans.scan import ssd
from effarch.vision_ssm import read_along, scan_orders, sum_back


class Mixer(nn.Module):
    """What takes the place of a layer's attention: x (B, N, D), already normalised → (B, N, D), token 0 is CLS.

    block: the layer (see effarch.clip.towers), whose value and output projections are where training starts. exact_cls:
    the CLS token goes on attending by softmax, which costs O(N). Subclasses define `mix(x, v)`: values (B, N, D) → (B, N, D)."""

    def __init__(self, block, heads, exact_cls=False):
        super().__init__()
        self.heads, self.value, self.out = heads, copy.deepcopy(block.v), copy.deepcopy(block.out)
        self.query, self.key = (copy.deepcopy(block.q), copy.deepcopy(block.k)) if exact_cls else (None, None)
        self.requires_grad_(True)

    def forward(self, x):
        v = self.value(x)
        y = self.mix(x, v)
        if self.query is not None:
            y = torch.cat([self.cls_row(x, v), y[:, 1:]], 1)
        return self.out(y)

    def cls_row(self, x, v):
        """softmax(q_0 kᵀ) v, (B, 1, D). All keys are never made: q_0 · (W x_s) = (Wᵀ q_0) · x_s, and the bias of k cancels."""
        q = split_heads(self.query(x[:, :1]), self.heads)[:, :, 0]  # (B, heads, d)
        asked = torch.einsum("bhd,hdc->bhc", q, self.key.weight.unflatten(0, (self.heads, -1)))
        weights = torch.softmax(asked @ x.mT / q.shape[-1] ** 0.5, -1)
        return (weights[:, :, None] @ split_heads(v, self.heads)).transpose(1, 2).flatten(2)


class Removed(Mixer):
    """No token sees another."""

    def forward(self, x):
        return torch.zeros_like(x)


class MeanOfValues(Mixer):
    """Every token gets the mean of all values: attention that cannot choose."""

    def mix(self, x, v):
        return v.mean(1, keepdim=True).expand_as(v)


def centres(points, count, seed=0, rounds=10):
    """`count` centres of points (n, d) by Lloyd's k-means, from a random start: (count, d)."""
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:count]
    check(len(start) == check_count(count, "count"), "points", len(points), f"at least {count}, one for each centre")
    centre = points[start.to(points.device)]
    for _ in range(rounds):
        nearest = torch.cdist(points, centre).argmin(1)
        sums = torch.zeros_like(centre).index_add_(0, nearest, points)
        sizes = torch.zeros(count, device=points.device).index_add_(0, nearest, torch.ones(len(points), device=points.device))
        centre = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centre)
    return centre


@torch.no_grad()
def landmark_maps(block, heads, x, states, sharpness=4.0, seed=0):
    """Two linear maps D → heads · states, whose softmax and exp are the features C of queries and B of keys.

    x (B, N, D): normalised inputs of the layer, a few training images. The landmarks are centres of its queries."""
    width = block.q.in_features
    d = width // heads
    scale = d**-0.25  # half of attention's 1/√d to each side
    q, k = (split_heads(layer(x), heads).transpose(0, 1).flatten(1, 2) * scale for layer in (block.q, block.k))  # (heads, n, d)
    c = torch.stack([centres(points, states, seed + h) for h, points in enumerate(q)])  # (heads, states, d)
    typical = torch.logsumexp((c @ k.mT).unflatten(2, (len(x), -1)), -1).mean(-1)  # log of what a landmark's softmax divides by
    maps = []
    for layer, weight, bias in ((block.q, sharpness * c, -sharpness / 2 * c.square().sum(-1)), (block.k, c, -typical)):
        linear = nn.Linear(width, heads * states, device=x.device, dtype=x.dtype)
        per_head = layer.weight.unflatten(0, (heads, -1)) * scale  # (heads, d, D)
        linear.weight.copy_((weight @ per_head).flatten(0, 1))
        offset = 0 if layer.bias is None else (weight @ (layer.bias.view(heads, -1, 1) * scale))[..., 0]
        linear.bias.copy_((bias + offset).flatten())
        maps.append(linear)
    return maps


def hedgehog_maps(block, heads):
    """Two linear maps for φ(q) = softmax(±q), φ(k) = softmax(±k) (Hedgehog, LoLCATs): q's and k's own, scaled."""
    maps = [copy.deepcopy(layer) for layer in (block.q, block.k)]
    for linear in maps:
        for value in linear.parameters():
            value.data.mul_((block.q.in_features // heads) ** -0.25)
    return maps


class LinearAttention(Mixer):
    """y_t = Σ_s (C_t · B_s) v_s / Σ_s (C_t · B_s): attention's weights as products of features, so that it costs O(N).

    maps: two linear maps to what becomes C and B, copied. signed: features softmax(±z), of both; else softmax(z) and exp(z)."""

    def __init__(self, block, heads, maps, signed=False, exact_cls=False):
        super().__init__(block, heads, exact_cls)
        self.to_C, self.to_B, self.signed = *copy.deepcopy(maps), signed
        self.requires_grad_(True)

    def features(self, x):
        """C, B: (B, N, heads, states), at least 0."""
        c, b = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.to_C, self.to_B))
        if self.signed:
            return tuple(torch.softmax(torch.cat([z, -z], -1), -1) for z in (c, b))
        return torch.softmax(c, -1), torch.exp(b - b.amax((1, 3), keepdim=True).detach())  # a common factor cancels

    def mix(self, x, v):
        v = F.pad(v.unflatten(-1, (self.heads, -1)), (0, 1), value=1.0)  # the sum of weights is one more channel
        sums = self.weigh(x, *self.features(x), v)
        return (sums[..., :-1] / (sums[..., -1:] + 1e-20)).flatten(2)

    def weigh(self, x, C, B, v):
        """Σ_s (C_t · B_s) v_s, (B, N, heads, d + 1)."""
        C, B, v = (part.transpose(1, 2) for part in (C, B, v))
        return (C @ (B.mT @ v)).transpose(1, 2)


def mix_step(tower, layer, x, mixer=None):
    """x (B, N, D) after the first half of a layer: its attention, or the mixer in its place."""
    block = tower.blocks[layer]
    y = block.norm1(x)
    if mixer is not None:
        return x + mixer(y)
    check(tower.rotary is None, "tower", "attention with rotary positions", "positions that are added to the tokens, as in CLIP or ViT")
    q, k, v = (split_heads(linear(y), tower.heads) for linear in (block.q, block.k, block.v))
    return x + block.out(attend(q, k, v).transpose(1, 2).flatten(2))


def run_layers(tower, x, mixers=None, first=0, last=None):
    """Layers `first` to before `last` (None: all that follow) on x (B, N, D), with the mixers {layer: mixer}."""
    for layer in range(first, len(tower.blocks) if last is None else last):
        x = mix_step(tower, layer, x, (mixers or {}).get(layer))
        x = x + tower.blocks[layer].mlp(tower.blocks[layer].norm2(x))
    return x


@torch.no_grad()
def advance(tower, states, mixers=None, first=0, last=None, batch=32):
    """`run_layers` over many images, a batch at a time, without gradients: states (n, N, D) → a new tensor."""
    return torch.cat([run_layers(tower, part, mixers, first, last) for part in states.split(batch)])


def tower_features(model, tower, x):
    """Tokens after the last layer → L2-normalised features (B, P)."""
    return F.normalize(project(model, tower.pool(x)), dim=-1)


class ScanMixer(LinearAttention):
    """The same with a decay: along each direction the weight of token s at token t falls with the Δ between them.

    A scan of Mamba-2 (SSD) with C, B and x = v, read along 1, 2 or 4 directions (see `scan_orders`). Δ starts at `delta` for
    every token, so that with 2 or 4 the mixer starts as linear attention (with 1: the causal one); what Δ writes, the normalisation takes out again."""

    def __init__(self, block, heads, maps, signed=False, exact_cls=False, directions=2, delta=1e-3):
        super().__init__(block, heads, maps, signed, exact_cls)
        like = dict(device=block.v.weight.device, dtype=block.v.weight.dtype)
        self.directions, self.to_delta = directions, nn.Linear(block.v.in_features, directions * heads, **like)
        nn.init.zeros_(self.to_delta.weight)
        nn.init.constant_(self.to_delta.bias, math.log(math.expm1(delta)))
        self.order = None

    def order_of(self, x):
        """(1, directions, N), made once for each size."""
        if self.order is None or self.order.shape[2] != x.shape[1] or self.order.device != x.device:
            with torch.inference_mode(False):  # it is kept, and may be trained with later
                self.order = scan_orders(side_of(x), side_of(x), self.directions).to(x.device)[None]
        return self.order

    def weigh(self, x, C, B, v):
        order, R, n = self.order_of(x), self.directions, x.shape[1]
        delta = F.softplus(self.to_delta(x).float()).unflatten(-1, (R, self.heads))  # (B, N, R, heads)
        line = lambda part: read_along(part.flatten(2), order).unflatten(-1, part.shape[2:]).flatten(2, 3)  # (B, N, R · heads, …)
        own = torch.stack([delta[:, order[0, r], r] for r in range(R)], 2).flatten(2)
        minus = -torch.ones(R * self.heads, device=x.device)
        y, _ = ssd(line(v), own, minus, line(B), line(C), chunk=-(-n // -(-n // 64)))
        y = sum_back(y.unflatten(2, (R, self.heads)).flatten(3), order).unflatten(-1, (self.heads, -1))
        itself = (C * B).sum(-1, keepdim=True) * v  # both directions of a path count the token itself: once is right
        return y - itself * (delta[:, :, 1::2].sum(2))[..., None].to(y.dtype)


def side_of(x):
    """Patches a side of a square image, from its tokens (B, 1 + side², D)."""
    side = math.isqrt(x.shape[1] - 1)
    check(side**2 == x.shape[1] - 1, "tokens", x.shape[1], "one CLS token and a square of patches")
    return side


class ShortConvolution(Mixer):
    """The mean of all values, and a gated depthwise convolution of `taps` × `taps` patches, which starts at zero."""

    def __init__(self, block, heads, exact_cls=False, taps=7):
        super().__init__(block, heads, exact_cls)
        width = block.v.in_features
        like = dict(device=block.v.weight.device, dtype=block.v.weight.dtype)
        self.gate, self.filter = nn.Linear(width, width, **like), nn.Conv2d(width, width, taps, padding=taps // 2, groups=width, **like)
        for value in (self.gate.weight, self.gate.bias, self.filter.weight, self.filter.bias):
            nn.init.zeros_(value)

    def mix(self, x, v):
        side = side_of(x)
        plane = v[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        near = F.pad(self.filter(plane).flatten(2).transpose(1, 2), (0, 0, 1, 0))
        return v.mean(1, keepdim=True) + torch.sigmoid(self.gate(x)) * near


class InPlace(nn.Module):
    """A mixer with the signature of transformers' attention."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, hidden_states, *_, **__):
        return self.mixer(hidden_states), None


REPLACEABLE = ("CLIP", "ChineseCLIP", "AltCLIP", "BLIP", "BLIP-2", "ViT", "DeiT")  # a CLS token, patches in order, attention by itself


@contextmanager
def replaced_attention(model, mixers):
    """Within the `with` block the vision layers numbered in {layer: mixer} use that mixer in place of their attention.

    Every Hugging Face call on `model` works unchanged; on exit, also after an exception, the model is what it was.
    TypeError for a model whose family is none of REPLACEABLE, ValueError for a layer that it does not have."""
    module, family = find_vision_module(model)
    if family.name not in REPLACEABLE:
        raise TypeError(f"model is {type(model).__name__}: its attention cannot be replaced; it can in {', '.join(REPLACEABLE)}")
    layers = module.layers if hasattr(module, "layers") else getattr(module.encoder, "layers", None) or module.encoder.layer
    wrong = [i for i in mixers if i not in range(len(layers))]
    check(not wrong, "layers", wrong, f"0 to {len(layers) - 1}")
    name = "self_attn" if hasattr(layers[0], "self_attn") else "attention"
    before = {i: getattr(layers[i], name) for i in mixers}

    def square(_, inputs):
        shape = tuple(inputs[0].shape)
        check(shape[-1] == shape[-2], "pixel_values.shape", shape, "square images: mixers of pictures see a square of patches")

    guard = module.embeddings.register_forward_pre_hook(square)
    try:
        for i, mixer in mixers.items():
            setattr(layers[i], name, InPlace(mixer))
        yield model
    finally:
        guard.remove()
        for i, attention in before.items():
            setattr(layers[i], name, attention)


def optimise(parameters, steps, rate, loss_of):
    """AdamW with a one-cycle schedule: loss_of(step) is made small; gradients are cut to norm 1."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 2))
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        loss_of(step).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()


def fit_one(tower, layer, mixer, student, target, scale, steps, batch, rate, random):
    """Fit one mixer: from the student's states in front of a layer to the target behind its attention, both (n, N, D)."""
    rounds = -(-steps * batch // len(student))
    picks = torch.cat([torch.randperm(len(student), generator=random) for _ in range(rounds)])[:steps * batch].view(steps, batch)
    picks = picks.to(student.device)

    def loss_of(step):
        return F.mse_loss(mix_step(tower, layer, student[picks[step]], mixer), target[picks[step]]) / scale
    optimise([value for value in mixer.parameters() if value.requires_grad], steps, rate, loss_of)


def fit_layers(tower, mixers, states, epochs=3, batch=32, rate=2e-3, seed=0):
    """Fit mixers one after the other, each on what its layer gets from the student so far, to what the teacher has there.

    states (n, N, D): embedded training images. The loss is the squared distance to the teacher's state after the attention,
    over what attention adds. The tower's weights should not require gradients: they stay as they are."""
    student = teacher = states
    at, random, batch = 0, torch.Generator().manual_seed(seed), min(batch, len(states))
    for layer in sorted(mixers):
        student, teacher, at = advance(tower, student, mixers, at, layer), advance(tower, teacher, None, at, layer), layer
        if not isinstance(mixers[layer], Removed):
            with torch.no_grad():
                target = torch.cat([mix_step(tower, layer, part) for part in teacher.split(batch)])
            scale, steps = (target - teacher).square().mean(), epochs * len(states) // batch
            fit_one(tower, layer, mixers[layer], student, target, scale, steps, batch, rate, random)


def fit_end_to_end(model, tower, mixers, states, features, steps, batch=16, rate=5e-4, hidden=0.5, seed=0):
    """Fit all mixers together: 1 - cosine to the teacher's features (n, P), and the distance of the states behind each layer.

    states (n, N, D): embedded training images; hidden: weight of the states. The tower's own weights stay as they are."""
    parameters = [value for mixer in mixers.values() for value in mixer.parameters() if value.requires_grad]
    picks = torch.randint(len(states), (steps, batch), generator=torch.Generator().manual_seed(seed)).to(states.device)
    first, depth = min(mixers), len(tower.blocks)
    before = advance(tower, states, None, 0, first)

    def loss_of(step):
        student, apart = before[picks[step]], 0
        teacher = student
        for layer in range(first, depth):
            student = run_layers(tower, student, mixers, layer, layer + 1)
            with torch.no_grad():
                teacher = run_layers(tower, teacher, None, layer, layer + 1)
            apart = apart + F.mse_loss(student, teacher) / teacher.var() / (depth - first)
        cosine = (tower_features(model, tower, student) * features[picks[step]]).sum(-1)
        return (1 - cosine).mean() + hidden * apart
    optimise(parameters, steps, rate, loss_of)
