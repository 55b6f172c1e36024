# Written by `python -m lab.build` from vlm/distil_and_prune.ipynb, where each part is explained: edit it there.
"""EfficientVLM in two steps for CLIP models: distillation into fewer layers, hard-concrete gates on heads and MLP channels of both towers, slicing."""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, check_share
from effarch.clip.captioned import clip_features
from effarch.low_rank import Moment, compensate, linear, plain
from effarch.masking import Recipe, Trainer, contrastive_loss

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1  # as in arXiv 1712.01312


def gate_sample(log_alpha, u):
    """Hard-concrete gates z in [0, 1], shaped like log_alpha; u: uniform noise in (0, 1) of that shape."""
    s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / BETA)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def gate_open(log_alpha):
    """P(z > 0), the gate's share of the expected size (arXiv 1712.01312, eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def gate_value(log_alpha):
    """The gate without noise (eq. 13), for inference."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


TOWERS = ("vision", "text")


def tower_layers(model):
    """{tower: its transformer layers} of a transformers CLIPModel; TypeError for any other."""
    if type(model).__name__ != "CLIPModel":
        raise TypeError(f"{type(model).__name__} is not supported; supported: transformers' CLIPModel")
    return {"vision": model.vision_model.encoder.layers, "text": model.text_model.encoder.layers}


@dataclass(frozen=True)
class Group:
    """The heads or the MLP channels of one layer: `count` units that cost `cost` each."""

    tower: str
    layer: int
    kind: str  # heads, channels
    count: int
    cost: float


def unit_groups(model, towers=TOWERS, by="parameters"):
    """[Group], by tower, layer, heads then channels; of a sliced model what is left.

    by: 'parameters', or 'multiply-adds' of one image and one caption of full length."""
    check(set(towers) <= set(TOWERS) and towers, "towers", towers, ", ".join(TOWERS))
    check(by in ("parameters", "multiply-adds"), "by", by, "parameters, multiply-adds")
    layers, vision, text = tower_layers(model), model.config.vision_config, model.config.text_config
    tokens = {"vision": (vision.image_size // vision.patch_size) ** 2 + 1, "text": text.max_position_embeddings}
    groups = []
    for tower in towers:
        n = tokens[tower]
        for i, layer in enumerate(layers[tower]):
            (rows, width), d = layer.self_attn.q_proj.weight.shape, layer.self_attn.head_dim
            head, channel = (3 * d * (width + 1) + d * width, 2 * width + 1) if by == "parameters" else (4 * n * d * width + 2 * n * n * d, 2 * n * width)
            groups += [Group(tower, i, "heads", rows // d, head), Group(tower, i, "channels", layer.mlp.fc1.out_features, channel)]
    return groups


def unit_costs(groups):
    """(n,) the cost of every unit, group after group."""
    return torch.cat([torch.full((group.count,), float(group.cost)) for group in groups])


class Gates:
    """A gate on every head and MLP channel of a CLIPModel, until `remove()`. log_alpha (n,) is what is learnt, in the order of `groups`.

    values (n,) or None: what multiplies the units in the next forward passes; None: nothing is multiplied. start: log α at
    first; 2.5 leaves a pretrained model nearly as it is (a start at 0.5 would halve it)."""

    def __init__(self, model, towers=TOWERS, by="parameters", start=2.5):
        self.groups, device = unit_groups(model, towers, by), next(model.parameters()).device
        self.costs, self.values, self.hooks = unit_costs(self.groups).to(device), None, []
        self.log_alpha = torch.full((len(self.costs),), float(start), device=device, requires_grad=True)
        layers, begin = tower_layers(model), 0
        for group in self.groups:
            layer, part = layers[group.tower][group.layer], slice(begin, begin + group.count)
            place, repeat = (layer.self_attn.out_proj, layer.self_attn.head_dim) if group.kind == "heads" else (layer.mlp.fc2, 1)
            self.hooks.append(place.register_forward_pre_hook(lambda _, inputs, part=part, repeat=repeat: self._gated(inputs[0], part, repeat)))
            begin += group.count

    def _gated(self, x, part, repeat):
        return None if self.values is None else (x * self.values[part].repeat_interleave(repeat),)

    def draw(self, generator):
        """New noise for all gates. generator: on the CPU, whatever the device."""
        u = torch.rand(len(self.costs), generator=generator).clamp(1e-6, 1 - 1e-6)
        self.values = gate_sample(self.log_alpha, u.to(self.log_alpha.device))

    def size(self):
        """Expected share of the cost that is open: a scalar with a gradient."""
        return (self.costs * gate_open(self.log_alpha)).sum() / self.costs.sum()

    def remove(self):
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()


def kept_within(scores, groups, left):
    """[(k,) ascending numbers of the units of each group that stay]: the best `left` of every group, at least one. scores: (n,)."""
    check_share(left, "left")
    parts = scores.split([group.count for group in groups])
    return [part.topk(max(1, round(left * len(part)))).indices.sort().values.cpu() for part in parts]


def kept_anywhere(scores, groups, left):
    """The same of all groups together: the best scores until the units cost `left` of all; one unit of each group stays anyhow."""
    counts = [group.count for group in groups]
    scores, costs = scores.detach().cpu().clone(), unit_costs(groups)
    budget, begin = check_share(left, "left") * float(costs.sum()) + 1e-6, 0
    for group in groups:
        scores[begin + int(scores[begin:begin + group.count].argmax())] = math.inf
        begin += group.count
    stays = torch.zeros(len(costs), dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if float(costs[i]) <= budget or scores[i] == math.inf:
            stays[i] = True
            budget -= float(costs[i])
    return [part.nonzero()[:, 0] for part in stays.split(counts)]


def size_left(kept, groups):
    """Share of the cost that stays."""
    return sum(len(index) * group.cost for index, group in zip(kept, groups, strict=True)) / sum(group.count * group.cost for group in groups)


@torch.no_grad()
def slice_units(model, kept, groups, values=None, moments=None):
    """A copy of a CLIPModel (transformers 5) in which only the `kept` units are left, as smaller nn.Linear layers.

    kept: as from `kept_within`. values (n,): of gates, multiplied into what is left. moments: {(tower, layer, kind): Moment} of
    all units' outputs; then least squares makes up for those that leave. ValueError where a group would be empty, TypeError for layers
    with an adapter (merge_and_unload() first)."""
    new = copy.deepcopy(model)
    layers, begin = tower_layers(new), 0
    for group, index in zip(groups, kept, strict=True):
        whole = index.dtype in (torch.int32, torch.int64) and len(index) > 0 and bool((index.diff() > 0).all()) and 0 <= int(index[0]) and int(index[-1]) < group.count
        check(whole, f"kept {group.kind} of layer {group.layer}", index.tolist(), f"ascending numbers below {group.count}, at least one")
        layer, heads = layers[group.tower][group.layer], group.kind == "heads"
        owner, before, after = (layer.self_attn, ("q_proj", "k_proj", "v_proj"), "out_proj") if heads else (layer.mlp, ("fc1",), "fc2")
        size = owner.head_dim if heads else 1
        rows = (index[:, None] * size + torch.arange(size)).flatten().to(layer.mlp.fc1.weight.device)
        for name in before:
            old = plain(nn.Linear, getattr(owner, name))
            setattr(owner, name, linear(old.weight[rows], old.bias[rows], old.weight))
        old = plain(nn.Linear, getattr(owner, after))
        weight, bias = old.weight[:, rows], old.bias
        if values is not None:
            weight = weight * values[begin:begin + group.count][index.to(values.device)].repeat_interleave(size).to(weight)
        if moments is not None:
            weight, bias = compensate(old, weight.double(), lambda x, rows=rows: x[rows], moments[group.tower, group.layer, group.kind])
        setattr(owner, after, linear(weight, bias, old.weight))
        if heads:
            owner.num_heads = len(index)
        begin += group.count
    return new


def spaced(depth, count):
    """Numbers of `count` evenly spaced layers of `depth`, the last one among them: every second one for half (EfficientVLM's choice)."""
    check(1 <= check_count(count, "count") <= depth, "count", count, f"1 to {depth}")
    return [(i + 1) * depth // count - 1 for i in range(count)]


def fewer_layers(model, vision, text):
    """(copy of a CLIPModel with so many of its layers in each tower, {tower: numbers of the layers that stay})."""
    new, stay = copy.deepcopy(model), {}
    for tower, depth in (("vision", vision), ("text", text)):
        layers = tower_layers(new)[tower]
        stay[tower] = spaced(len(layers), depth)
        getattr(new, f"{tower}_model").encoder.layers = nn.ModuleList(layers[i] for i in stay[tower])
        getattr(new.config, f"{tower}_config").num_hidden_layers = depth
    return new, stay


class Watch:
    """Notes of the next forward pass of a CLIPModel, layer by layer: hidden[tower, layer] (B, N, D), and from queries and keys `map`."""

    def __init__(self, model):
        self.hidden, self.q, self.k, self.heads, self.hooks = {}, {}, {}, {}, []
        for tower, layers in tower_layers(model).items():
            for i, layer in enumerate(layers):
                note = lambda what, key: lambda _, inputs, out: what.__setitem__(key, out[0] if isinstance(out, tuple) else out)
                for part, what in ((layer, self.hidden), (layer.self_attn.q_proj, self.q), (layer.self_attn.k_proj, self.k)):
                    self.hooks.append(part.register_forward_hook(note(what, (tower, i))))
                self.heads[tower, i] = layer.self_attn.head_dim

    def remove(self):
        """Leave the model as it was."""
        for hook in self.hooks:
            hook.remove()

    def map(self, tower, layer):
        """(B, heads, N, N) attention, causal in the text tower."""
        q, k = (part[tower, layer].unflatten(-1, (-1, self.heads[tower, layer])).transpose(1, 2) for part in (self.q, self.k))
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if tower == "text":
            n = logits.shape[-1]
            logits = logits.masked_fill(torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1), -math.inf)
        return logits.softmax(-1)


def logit_loss(images, texts, wanted_images, wanted_texts, scale, wanted_scale):
    """KL divergence of the student's choice of a text for each image, and of an image for each text, from the teacher's. Features (B, P)."""
    mine, wanted = scale * images @ texts.T, wanted_scale * wanted_images @ wanted_texts.T
    each = [F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True) for a, b in ((mine, wanted), (mine.T, wanted.T))]
    return sum(each) / 2


def hidden_loss(student, teacher, same):
    """Squared error of hidden states over their variance in the teacher, mean over layers. same: {tower: layers of the teacher}."""
    pairs = [(student.hidden[tower, i], teacher.hidden[tower, j]) for tower, layers in same.items() for i, j in enumerate(layers)]
    return torch.stack([F.mse_loss(mine, wanted) / (wanted - wanted.mean((0, 1))).square().mean() for mine, wanted in pairs]).mean()


def attention_loss(student, teacher, same):
    """Squared distance between the rows of attention maps, mean over rows, heads and layers."""
    each = [(student.map(tower, i) - teacher.map(tower, j)).square().sum(-1).mean() for tower, layers in same.items() for i, j in enumerate(layers)]
    return torch.stack(each).mean()


class Student(nn.Module):
    """A CLIPModel with the loss of one training, as effarch.masking's Trainer takes it.

    losses: of contrastive, logits, hidden, attention. teacher: a CLIPModel, for all but the first. weight: of those beside the contrastive
    loss. same: {tower: which of the teacher's layers those of the student follow}; None: all. gates: a Gates of `clip`, drawn anew in every
    pass. pressure: () → a further loss."""

    def __init__(self, clip, losses=("contrastive",), teacher=None, weight=1.0, same=None, gates=None, pressure=None, seed=0):
        super().__init__()
        known = ("contrastive", "logits", "hidden", "attention")
        check(losses and set(losses) <= set(known), "losses", losses, ", ".join(known))
        check(teacher is not None or tuple(losses) == ("contrastive",), "teacher", teacher, f"a model, for {', '.join(losses)}")
        self.clip, self.losses, self.weight, self.gates, self.pressure = clip, tuple(losses), weight, gates, pressure
        self.log_scale, self.bias = nn.Parameter(clip.logit_scale.detach().clone()), None
        clip.logit_scale.requires_grad_(False)  # ours is trained; `finish` puts it back
        self.noise, self.teacher = torch.Generator().manual_seed(seed), [teacher]  # in a list: no part of what is trained
        self.same = same or {tower: range(len(layers)) for tower, layers in tower_layers(clip).items()}
        self.seen, self.wanted = (Watch(clip), Watch(teacher)) if {"hidden", "attention"} & set(losses) else (None, None)

    def forward(self, pixels, tokens, which, captions, kept=None):
        """The loss of images (B, 3, H, W) with the texts tokens[which]; captions (B,): numbers, equal where texts are. kept: not used."""
        if self.gates is not None:
            self.gates.draw(self.noise)
        images, texts = clip_features(self.clip, pixels, tokens)
        scale, terms, (teacher,) = self.log_scale.exp().clamp(max=100), {}, self.teacher
        if teacher is not None:
            with torch.no_grad():
                wanted = clip_features(teacher, pixels, tokens)
        if "contrastive" in self.losses:
            terms["contrastive"] = contrastive_loss(images, texts[which], captions, scale)
        if "logits" in self.losses:
            terms["logits"] = self.weight * logit_loss(images, texts[which], wanted[0], wanted[1][which], scale, teacher.logit_scale.detach().exp())
        for name, loss in (("hidden", hidden_loss), ("attention", attention_loss)):
            if name in self.losses:
                terms[name] = self.weight * loss(self.seen, self.wanted, self.same)
        if self.pressure is not None:
            terms["pressure"] = self.pressure()
        return sum(terms.values())

    def finish(self):
        """The trained CLIPModel with its scale; nobody watches or gates it, or its teacher, any more."""
        with torch.no_grad():
            self.clip.logit_scale.copy_(self.log_scale).requires_grad_(True)
        for part in (self.seen, self.wanted, self.gates):
            if part is not None:
                part.remove()
        return self.clip


def collect_moments(model, batches, towers=TOWERS):
    """{(tower, layer, kind): Moment} of what heads and channels put out. batches: [(pixels (B, 3, H, W), tokens (n, L) or None)]."""
    found, hooks = {}, []
    for tower in towers:
        for i, layer in enumerate(tower_layers(model)[tower]):
            for kind, place in (("heads", layer.self_attn.out_proj), ("channels", layer.mlp.fc2)):
                moment = found[tower, i, kind] = Moment()
                hooks.append(place.register_forward_pre_hook(lambda _, inputs, moment=moment: moment.add(inputs[0])))
    try:
        with torch.no_grad():
            for pixels, tokens in batches:
                model.get_image_features(pixel_values=pixels) if tokens is None else clip_features(model, pixels, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found


RULES = {  # name → (weights before squared (in,), weights after squared (in,), Moment) → (in,), the squared score of each input
    "random": lambda before, after, moment: torch.rand_like(after),
    "magnitude": lambda before, after, moment: before + after,
    "Wanda": lambda before, after, moment: moment.second.diagonal().to(after) * after,  # arXiv 2306.11695
    "least squares": lambda before, after, moment: moment.covariance.diagonal().clamp(min=0).to(after) * after}  # FLAP, 2312.11983


@torch.no_grad()
def unit_scores(model, groups, rule, moments=None):
    """(n,) the score of every unit by a name in RULES, the highest stay. moments: as from `collect_moments`, for those that look at data."""
    check(rule in RULES, "rule", rule, ", ".join(RULES))
    check(moments is not None or rule in ("random", "magnitude"), "moments", moments, f"those of the model, for {rule}")
    scores = []
    for group in groups:
        layer = tower_layers(model)[group.tower][group.layer]
        *before, after = [getattr(layer.self_attn, f"{name}_proj") for name in ("q", "k", "v", "out")] if group.kind == "heads" else [layer.mlp.fc1, layer.mlp.fc2]
        after = plain(nn.Linear, after).weight.square().sum(0)
        squares = RULES[rule](sum(plain(nn.Linear, part).weight.square().sum(1) for part in before), after, moments and moments[group.tower, group.layer, group.kind])
        scores.append(squares.unflatten(0, (group.count, -1)).sum(1).sqrt())
    return torch.cat(scores)


def taylor_scores(student, batches):
    """(n,) squared gradients of a Student's loss for gates of value 1, summed over batches (Molchanov et al. 2019, eq. 8)."""
    gates, total = Gates(student.clip), 0.0
    for batch in batches:
        gates.values = torch.ones_like(gates.costs, requires_grad=True)
        (gradient,) = torch.autograd.grad(student(**batch), gates.values)
        total = total + gradient.square()
    gates.remove()
    return total


class Pressure:
    """EfficientVLM's Lagrangian (arXiv 2210.07795) on the expected size of Gates: a loss, and the steps of gates and multipliers.

    target: share of the cost to reach; ramp: share of the `steps` in which the wanted size falls from 1 to it. gate_rate: Adam's for log α; None:
    enough to close gates within the steps. multiplier_rates: Adam's for λ₁ and λ₂, which are ascended. λ₂ leads by far: where λ₁ does, it
    goes on pressing long after the size is reached. Hence Adam's short memory, too."""

    def __init__(self, gates, target, steps, ramp=0.5, gate_rate=None, multiplier_rates=(0.1, 50.0)):
        self.gates, self.target, self.ramp, self.done = gates, check_share(target, "target"), max(1, round(ramp * check_count(steps, "steps"))), 0
        self.multipliers = [torch.zeros((), device=gates.log_alpha.device, requires_grad=True) for _ in multiplier_rates]
        self.optimisers = [torch.optim.Adam([gates.log_alpha], lr=gate_rate or min(0.5, 6 / steps), betas=(0.5, 0.99)), torch.optim.Adam(
            [dict(params=[value], lr=rate) for value, rate in zip(self.multipliers, multiplier_rates, strict=True)], maximize=True)]

    def __call__(self):
        """λ₁ (s - t) + λ₂ (s - t)², a scalar."""
        gap = self.gates.size() - (1 - (1 - self.target) * min(1, (self.done + 1) / self.ramp))
        return self.multipliers[0] * gap + self.multipliers[1] * gap**2

    def step(self):
        """After the gradients of a loss that holds this one."""
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.done += 1


def train_student(student, pairs, steps, rate=1e-3, seed=0, batch=64):
    """Train a Student on Pairs; returns its CLIPModel, finished."""
    trainer = Trainer(student, pairs, Recipe(), steps, rate=rate, seed=seed, batch=batch)
    for _ in range(steps):
        trainer.step()
        if student.pressure is not None:
            student.pressure.step()
    return student.finish()
