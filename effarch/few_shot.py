# Written by `python -m lab.build` from vlm/few_shot.ipynb, where each part is explained: edit it there.
"""Few-shot classification on frozen CLIP features: caches, Gaussian classes, probes and adapters; choices by held-out shots."""

import copy
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, check_share, is_number


@dataclass
class Support:
    """The labelled features that a few-shot method may look at, and the zero-shot head that it starts from.

    features (m, d) and text (C, d): rows of length 1; labels (m,): 0 to C − 1, every class at least once; scale: of the
    cosines, CLIP's own is about 100. Arrays and lists become tensors. ValueError, one line, for anything else."""

    features: torch.Tensor
    labels: torch.Tensor
    text: torch.Tensor
    scale: float = 100.0

    def __post_init__(self):
        self.features, self.text = x, text = torch.as_tensor(self.features), torch.as_tensor(self.text)
        y = torch.as_tensor(self.labels).to(x.device)
        check(text.ndim == 2 and len(text) >= 2, "text", tuple(text.shape), "(classes, width), at least two classes")
        check(x.ndim == 2 and x.shape[1] == text.shape[1], "features", tuple(x.shape), f"(shots, {text.shape[1]}), as wide as text")
        check(x.dtype == text.dtype, "features", x.dtype, f"{text.dtype}, as text has")
        for name, rows in dict(features=x, text=text).items():
            check(rows.dtype in (torch.float32, torch.float64), name, rows.dtype, "torch.float32 or torch.float64")
            longest = (rows.norm(dim=-1) - 1).abs().max() if len(rows) else torch.tensor(torch.nan)
            check(bool(longest < 1e-2), name, f"rows off length 1 by {longest:.2g}", "finite rows of length 1: normalise them")
        check(y.shape == x.shape[:1] and not y.is_floating_point() and y.dtype != torch.bool, "labels", (tuple(y.shape), y.dtype), f"({len(x)},) whole numbers")
        self.labels = y.long()
        check(bool((y >= 0).all() and (y < len(text)).all()), "labels", [int(y.min()), int(y.max())], f"0 to {len(text) - 1}")
        missing = [c for c, n in enumerate(self.counts().tolist()) if n == 0]
        check(not missing, "classes without a shot", missing[:5], "at least one labelled image of every class")
        check(is_number(self.scale) and self.scale > 0, "scale", self.scale, "a number above 0")

    def counts(self):
        """(C,) shots of every class."""
        return torch.bincount(self.labels, minlength=len(self.text))

    def one_hot(self):
        """(m, C), as float."""
        return F.one_hot(self.labels, len(self.text)).to(self.features.dtype)

    def means(self):
        """(C, d) mean feature of every class."""
        return self.one_hot().T @ self.features / self.counts()[:, None]

    def part(self, index):
        """The Support of the shots at `index`."""
        return replace(self, features=self.features[index], labels=self.labels[index])


def draw_support(labels, shots, draws, seed=0):
    """(draws, C, shots) indices of labelled images: `draws` support sets, the first k of `shots` being those of k shots.

    No image is in two of them while a class has images enough (draws · shots); after that the images are shuffled anew.
    ValueError for a class with fewer than `shots` images."""
    check_count(shots, "shots"), check_count(draws, "draws")
    generator, classes = torch.Generator().manual_seed(seed), int(labels.max()) + 1
    mine = [(labels == c).nonzero()[:, 0] for c in range(classes)]
    least = min(range(classes), key=lambda c: len(mine[c]))
    check(shots <= len(mine[least]), "shots", shots, f"at most {len(mine[least])}, the labelled images of class {least}")

    def parts(images):
        while True:  # cut a shuffled class into as many parts as there are
            yield from images[torch.randperm(len(images), generator=generator)][: len(images) // shots * shots].view(-1, shots)

    return torch.stack([torch.stack([part for _, part in zip(range(draws), parts(images), strict=False)]) for images in mine], 1)


class LinearScores(nn.Module):
    """features (n, d) → features weightᵀ + bias (n, C). Frozen."""

    def __init__(self, weight, bias=None):
        super().__init__()
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        self.weight, self.bias = (nn.Parameter(x.detach().clone(), requires_grad=False) for x in (weight, bias))

    def forward(self, features):
        return features @ self.weight.T + self.bias


class CacheScores(nn.Module):
    """Tip-Adapter's scores (arXiv 2207.09519, eq. 5): (n, d) → exp(−β (1 − f keysᵀ)) values, (n, C).

    keys (m, d); values (m, C); channels: the ones that keys have (d' of d), f is then cut down to them and normalised."""

    def __init__(self, keys, values, beta, channels=None):
        super().__init__()
        check(is_number(beta) and beta > 0, "beta", beta, "a number above 0")
        self.keys, self.beta = nn.Parameter(keys.detach().clone(), requires_grad=False), beta
        self.register_buffer("values", values)
        self.register_buffer("channels", channels)

    def forward(self, features):
        if self.channels is not None:
            features = F.normalize(features[:, self.channels], dim=-1)
        return torch.exp(self.beta * (features @ self.keys.T - 1)) @ self.values


class Blend(nn.Module):
    """Zero-shot logits plus α times extra scores. alpha: a number, or a tensor without dimensions."""

    def __init__(self, support, extra, alpha=1.0):
        super().__init__()
        self.extra = extra
        self.register_buffer("weight", support.scale * support.text)
        self.register_buffer("alpha", torch.as_tensor(alpha, dtype=support.text.dtype, device=support.text.device))

    def forward(self, features):
        return features @ self.weight.T + self.alpha * self.extra(features)


def zero_shot(support):
    """The head without any shot."""
    return LinearScores(support.scale * support.text)


def cache_scores(support, beta=5.5):
    """CacheScores of all shots. Where classes have unequal numbers of shots, each class counts as much as the largest."""
    counts = support.counts()
    return CacheScores(support.features, support.one_hot() * (counts.max() / counts), beta)


def tip_adapter(support, alpha=1.0, beta=5.5):
    """Tip-Adapter with the paper's residual ratio α and sharpness β (it has their letters the other way round); nothing is chosen."""
    return Blend(support, cache_scores(support, beta), alpha)


WEIGHTS = (0.0, *(2.0**i for i in range(-4, 8)))  # of extra scores, in units of spread; 0 is zero-shot
BETAS = (1.0, 2.0, 5.5, 10.0, 20.0, 40.0)
SCALES = tuple(2.0**i for i in range(-1, 6))  # of logits whose spread is one


def spread(scores):
    """(…, m, C) → (…): standard deviation over the classes, root mean square over the images."""
    return (scores - scores.mean(-1, keepdim=True)).square().mean((-2, -1)).sqrt().clamp(min=1e-12)


def held_out(make, support, folds=None):
    """(m, C): every shot scored by make(support without its fold)(features): one shot of every class, or one in `folds`.

    ValueError where a class has fewer shots than folds, or one only."""
    fewest = int(support.counts().min())
    check(fewest >= 2, "shots of a class", fewest, "at least 2 to choose by: one is held out")
    folds = fewest if folds is None else check_count(folds, "folds", 2)
    check(folds <= fewest, "folds", folds, f"at most {fewest}, the shots of the rarest class")
    one_hot = F.one_hot(support.labels, len(support.text))
    place = (one_hot.cumsum(0).gather(1, support.labels[:, None])[:, 0] - 1) % folds  # the how-manieth of its class
    scores = support.features.new_empty(len(place), len(support.text))
    for out in (place == fold for fold in range(folds)):
        scores[out] = make(support.part(~out))(support.features[out])
    return scores


def held_out_loss(logits, labels):
    """(…, m, C) → (…): cross-entropy in nats, at the best of a few SCALES of the logits (which change no answer)."""
    unit = logits / spread(logits)[..., None, None]
    true = unit.gather(-1, labels.expand(unit.shape[:-1])[..., None])[..., 0]
    return torch.stack([(torch.logsumexp(s * unit, -1) - s * true).mean(-1) for s in SCALES]).amin(0)


def blend_weights(text, held):
    """(W,): the α that give extra scores `held` (m, C) WEIGHTS times the spread of the zero-shot logits `text` (m, C)."""
    return held.new_tensor(WEIGHTS) * spread(text) / spread(held)


def choose_blend(support, candidates):
    """The Blend of zero-shot and a candidate (a function Support → scores) whose held-out loss is least.

    Every candidate is tried with all WEIGHTS; of equal losses the least weight is taken."""
    text, alphas, losses = zero_shot(support)(support.features), [], []
    for make in candidates:
        held = held_out(make, support)
        alphas.append(blend_weights(text, held))
        losses += [held_out_loss(text + alpha * held, support.labels) for alpha in alphas[-1]]
    best, weight = divmod(int(torch.stack(losses).argmin()), len(WEIGHTS))
    return Blend(support, candidates[best](support), alphas[best][weight])


def choose_head(support, candidates, folds=None):
    """The candidate (a function Support → head) whose held-out loss is least, fitted to all shots; with one shot a class the first."""
    losses = [held_out_loss(held_out(make, support, folds), support.labels) for make in candidates if support.counts().min() > 1]
    return candidates[int(torch.stack(losses).argmin()) if losses else 0](support)


def gaussian_scores(support):
    """GDA (arXiv 2402.04087): LinearScores whose differences are log odds of Gaussian classes with one covariance.

    d · pinv((n − 1) S + tr(S) I) is the inverse covariance, S the pooled one. Where every class has one shot S is zero,
    and the identity takes its place: the nearest class mean."""
    means, (n, d) = support.means(), support.features.shape
    centred = support.features - means[support.labels]
    scatter = centred.T @ centred
    ridge = scatter.trace() / (n - 1)
    ridge = torch.where(ridge > 1e-9, ridge, 1.0)  # one shot a class
    weight = d * torch.linalg.solve(scatter + ridge * torch.eye(d, dtype=means.dtype, device=means.device), means.T).T
    return LinearScores(weight, -(weight * means).sum(-1) / 2)


def text_and_class_means(support):
    """Zero-shot with other names: the normalised sum of a class's text feature and its normalised mean feature."""
    return LinearScores(support.scale * F.normalize(support.text + F.normalize(support.means(), dim=-1), dim=-1))


def separating_channels(support, share, balance=0.7):
    """Indices of the share of channels in which features of different classes agree least and class texts vary most.

    balance: weight of the first against the second, as APE's code has it for ImageNet."""
    check_share(share, "share of channels"), check_share(balance, "balance", open_below=False)
    classes, sums = len(support.text), support.text + support.one_hot().T @ support.features
    counts = (1 + support.counts()).to(sums.dtype)
    pairs = counts.sum() ** 2 - counts.square().sum()
    agree = (sums.sum(0).square() - sums.square().sum(0)) / pairs  # mean product over pairs of different classes
    worth = (1 - balance) * support.text.var(0, correction=min(1, classes - 1)) - balance * agree
    return worth.topk(max(1, round(share * len(worth)))).indices.sort().values


def refined_cache(support, beta=5.5, gamma=0.0, share=0.75):
    """APE's scores without training (arXiv 2304.01195): a cache over `share` of the channels, its values times exp(γ D)."""
    check(is_number(gamma), "gamma", gamma, "a finite number")
    channels, base = separating_channels(support, share), cache_scores(support, beta)
    keys, text = (F.normalize(x[:, channels], dim=-1) for x in (support.features, support.text))
    surprise = -(keys @ text.T).log_softmax(-1).gather(1, support.labels[:, None]) / math.log(2)  # in bits
    return CacheScores(keys, base.values * torch.exp(gamma * surprise), beta, channels)


@torch.enable_grad()
def train_head(head, support, steps=200, rate=1e-3):
    """Train what of a head requires gradients on all shots at once: AdamW, cosine to zero. Returns the head, frozen."""
    check_count(steps, "steps")
    weights = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(support.features), support.labels).backward()
        optimizer.step()
        schedule.step()
    return head.requires_grad_(False)


def tip_adapter_f(support, blend=None, steps=200, rate=1e-3):
    """Tip-Adapter-F: the keys of a copy of a Tip-Adapter are trained. blend: that Tip-Adapter; None: the published α and β."""
    blend = tip_adapter(support) if blend is None else copy.deepcopy(blend)
    blend.extra.keys.requires_grad_(True)
    return train_head(blend, support, steps, rate)


class Adapted(nn.Module):
    """Zero-shot logits of changed features: s · normalise(change(f)) Tᵀ."""

    def __init__(self, support, change):
        super().__init__()
        self.change, self.scale = change, support.scale
        self.register_buffer("text", support.text)

    def forward(self, features):
        return self.scale * F.normalize(self.change(features), dim=-1) @ self.text.T


class Bottleneck(nn.Module):
    """CLIP-Adapter's network (arXiv 2110.04544): ratio · relu(up relu(down f)) + (1 − ratio) f."""

    def __init__(self, d, hidden, ratio, generator):
        super().__init__()
        shapes = dict(down=(hidden, d), up=(d, hidden))
        self.down, self.up = (nn.Parameter(torch.randn(shape, generator=generator) / shape[1] ** 0.5) for shape in shapes.values())
        self.ratio = ratio

    def forward(self, features):
        return self.ratio * F.relu(F.relu(features @ self.down.T) @ self.up.T) + (1 - self.ratio) * features


class LowRank(nn.Module):
    """f + up down f, with down (r, d) random and up (d, r) zero at first: LoRA (arXiv 2106.09685) on the projection."""

    def __init__(self, d, rank, generator):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(rank, d, generator=generator) / d**0.5), nn.Parameter(torch.zeros(d, rank))

    def forward(self, features):
        return features + features @ self.down.T @ self.up.T

    def folded(self, weight):
        """The projection weight (d, D) with the residual in it: no extra work per image."""
        return weight + self.up @ (self.down @ weight)


def clip_adapter(support, ratio=0.2, hidden=None, steps=200, rate=1e-3, seed=0):
    """CLIP-Adapter on the image side, trained. hidden: width of its network; None: a quarter of the feature's."""
    check_share(ratio, "ratio")
    d, generator = support.features.shape[1], torch.Generator().manual_seed(seed)
    change = Bottleneck(d, check_count(hidden or max(1, d // 4), "hidden"), ratio, generator).to(support.features)
    return train_head(Adapted(support, change), support, steps, rate)


def low_rank_projection(support, rank=8, steps=200, rate=1e-3, seed=0):
    """The projection plus a trained residual of rank r. ValueError unless 1 ≤ r ≤ d."""
    d = support.features.shape[1]
    check(check_count(rank, "rank") <= d, "rank", rank, f"at most the width of the features, {d}")
    change = LowRank(d, rank, torch.Generator().manual_seed(seed)).to(support.features)
    return train_head(Adapted(support, change), support, steps, rate)


@torch.enable_grad()
def text_probe(support, penalty=None, iterations=60):
    """Logistic regression that starts at the text head T: cross-entropy + penalty · ‖W − T‖², by L-BFGS.

    penalty: above 0; None: one over the shots of a class (ProLIP's rule, arXiv 2410.05270)."""
    penalty = float(1 / support.counts().double().mean()) if penalty is None else penalty
    check(is_number(penalty) and penalty > 0, "penalty", penalty, "a number above 0")
    moved = torch.zeros_like(support.text, requires_grad=True)
    optimizer = torch.optim.LBFGS([moved], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = support.scale * support.features @ (support.text + moved).T
        total = F.cross_entropy(logits, support.labels) + penalty * moved.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return LinearScores(support.scale * (support.text + moved))


def chosen_tip_adapter(support):
    """Tip-Adapter, α and β chosen by held-out shots."""
    return choose_blend(support, [partial(cache_scores, beta=beta) for beta in BETAS])


def chosen_ape(support):
    """APE, α, β and γ chosen by held-out shots."""
    return choose_blend(support, [partial(refined_cache, beta=b, gamma=g) for b in BETAS for g in (0.0, 0.5)])


def chosen_gda(support):
    """Zero-shot and GDA, their blend chosen by held-out shots; folded into one weight and bias."""
    blend = choose_blend(support, [gaussian_scores])
    return LinearScores(blend.weight + blend.alpha * blend.extra.weight, blend.alpha * blend.extra.bias)


def chosen_tip_adapter_f(support, steps=200):
    """Tip-Adapter-F from the α and β that held-out shots choose; with one shot a class from the published ones."""
    return tip_adapter_f(support, chosen_tip_adapter(support) if support.counts().min() > 1 else None, steps)


def chosen_clip_adapter(support, steps=200):
    """CLIP-Adapter, its ratio chosen by held-out shots; with one shot a class ImageNet's, 0.2."""
    return choose_head(support, [partial(clip_adapter, ratio=ratio, steps=steps) for ratio in (0.2, 0.6)], folds=2)


METHODS = {  # name → function: Support → head, a module (n, d) → logits (n, C)
    "zero-shot": zero_shot,
    "text + class mean": text_and_class_means,
    "Tip-Adapter, α = 1, β = 5.5": tip_adapter,
    "Tip-Adapter": chosen_tip_adapter,
    "APE": chosen_ape,
    "GDA": chosen_gda,
    "Tip-Adapter-F": chosen_tip_adapter_f,
    "CLIP-Adapter": chosen_clip_adapter,
    "low-rank projection": low_rank_projection,
    "text-initialised probe": text_probe,
}
