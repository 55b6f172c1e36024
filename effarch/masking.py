# Written by `python -m lab.build` from vlm/masked_pretraining.ipynb, where each part is explained: edit it there.
"""Cheaper contrastive pre-training: masked images (FLIP, Cluster Masking), smaller images, losses for equal captions and several processes."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, check_share, is_count
from effarch.clip.captioned import captioned_clip
from effarch.token_reduction.encoder import Reducer, drop, encode_images, kept_count, take


def kept_randomly(rows, patches, keep, generator=None):
    """(rows, K) ascending numbers of K = keep · patches patches (rounded up), a uniform choice for every row."""
    kept = kept_count(check_share(keep, "keep"), patches)
    return torch.rand(rows, patches, generator=generator).argsort(1)[:, :kept].sort(1).values


def random_kept(pixels, patch, keep, generator=None):
    """FLIP's choice (arXiv 2212.00794): (B, C, H, W) → (B, K) ascending numbers of the patches that stay.

    patch: pixels a side. keep: share of the patches, K is rounded up. generator: a torch.Generator on the CPU, whatever the device."""
    patches = (pixels.shape[2] // patch) * (pixels.shape[3] // patch)
    return kept_randomly(len(pixels), patches, keep, generator).to(pixels.device)


def standardised_patches(pixels, patch):
    """(B, C, H, W) → (B, P, C · patch²): every patch's pixels with mean 0 and length 1, row by row as a tower has them; flat ones are 0."""
    rows = F.unfold(pixels.float(), patch, stride=patch).transpose(1, 2)
    flat = rows.amax(-1, keepdim=True) == rows.amin(-1, keepdim=True)  # what rounding leaves of these is no pattern
    return F.normalize((rows - rows.mean(-1, keepdim=True)).masked_fill(flat, 0), dim=-1, eps=1e-6)


def cluster_kept(pixels, patch, keep, generator=None, anchors=0.05):
    """Cluster Masking's choice (arXiv 2405.08815) at an exact count: (B, C, H, W) → (B, K) ascending numbers of the patches that stay.

    The `anchors` (a share of the patches, at least one) leave first, then what is most similar to one of them."""
    rows = standardised_patches(pixels, patch)
    patches = rows.shape[1]
    kept = kept_count(check_share(keep, "keep"), patches)
    first = kept_randomly(len(rows), patches, check_share(anchors, "anchors"), generator).to(rows.device)
    alike = (take(rows, first) @ rows.transpose(1, 2)).amax(1).scatter(1, first, 2.0)
    return alike.argsort(dim=1, stable=True)[:, :kept].sort(1).values


MASKS = {"random": random_kept, "cluster": cluster_kept}  # name: (pixels, patch, keep, generator) → (B, K)


class KeepPatches(Reducer):
    """Only the patches `kept` (B, K), numbers from 0, enter the tower; special tokens (CLS) always do."""

    def __init__(self, kept):
        whole = isinstance(kept, torch.Tensor) and kept.dim() == 2 and kept.dtype in (torch.int32, torch.int64)
        check(whole, "kept", getattr(kept, "dtype", type(kept).__name__), "a tensor (B, K) of whole numbers")
        self.kept = kept

    def at_input(self, tokens):
        patches, images = tokens.x.shape[1] - tokens.prefix, len(tokens.x)
        check(not images or len(self.kept) == images, "kept.shape", tuple(self.kept.shape), f"({images}, K), as many rows as images")
        if self.kept.device.type == "cpu" and self.kept.numel():  # a GPU would have to wait for it
            low, high = map(int, self.kept.aminmax())
            check(0 <= low and high < patches, "kept", (low, high), f"numbers from 0 to {patches - 1}")
        front = torch.arange(tokens.prefix, device=tokens.x.device).expand(len(tokens.x), -1)
        drop(tokens, torch.cat([front, self.kept.to(tokens.x.device) + tokens.prefix], 1))


def small_clip(captions, side=32, patch=4, width=64, layers=4):
    """A CLIPModel of transformers with random weights: both towers `width` wide, the text tower half as deep, heads of 32."""
    check(is_count(width, 32) and width % 32 == 0, "width", width, "a multiple of 32")
    return captioned_clip(captions, side, patch, width, width // 32, check_count(layers, "layers"), (layers + 1) // 2)


def processes():
    """(rank, how many) of the running processes; (0, 1) for one alone."""
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def gathered(rows):
    """The rows (B, …) of all processes in the order of their ranks, (W · B, …); gradients flow back to each process's own. B must be the same in all."""
    if processes()[1] == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows))


def contrastive_loss(images, texts, captions, scale, bias=None):
    """CLIP's softmax loss, or with a bias SigLIP's sigmoid loss (arXiv 2303.15343), in which equal captions are positives; a scalar.

    images, texts (B, P): L2-normalised features of pairs; captions (B,): numbers, equal where texts are; scale, bias: scalars.
    In several processes: B pairs of each, and the mean over the processes is the loss of all pairs."""
    every_text = gathered(texts)
    same = captions[:, None] == gathered(captions)
    by_image = scale * images @ every_text.T
    if bias is not None:
        return -F.logsigmoid((2 * same.float() - 1) * (by_image + bias)).sum(1).mean()
    by_text, target = scale * texts @ gathered(images).T, same / same.sum(1, keepdim=True)
    return (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2


def text_features(clip, tokens):
    """(n, L) numbers of words → (n, P) L2-normalised features of a CLIPModel's text tower."""
    out = clip.get_text_features(input_ids=tokens)
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


class ContrastiveModel(nn.Module):
    """A CLIPModel and its contrastive loss in one forward pass, as DistributedDataParallel needs it.

    loss: 'softmax' (temperature .07 at first) or 'sigmoid' (scale 10 and bias -10 at first); these are learned, too."""

    def __init__(self, clip, loss="softmax"):
        super().__init__()
        check(loss in ("softmax", "sigmoid"), "loss", loss, "softmax, sigmoid")
        self.clip, softmax = clip, loss == "softmax"
        clip.logit_scale.requires_grad_(False)  # ours is used
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07 if softmax else 10.0)))
        self.bias = None if softmax else nn.Parameter(torch.tensor(-10.0))

    def forward(self, pixels, tokens, which, captions, kept=None):
        """The loss of images (B, 3, H, W) with the captions tokens[which]: tokens (n, L), each encoded once, which (B,).

        captions (B,): their numbers, equal where they are; kept (B, K): patches that the image tower sees; None: all."""
        images = encode_images(self.clip, pixels, None if kept is None else KeepPatches(kept))
        texts = text_features(self.clip, tokens)[which]
        return contrastive_loss(images, texts, captions, self.log_scale.exp().clamp(max=100), self.bias)


@dataclass(frozen=True)
class Recipe:
    """What each step of a training sees of its images."""

    mask: str | Callable = "random"  # a name in MASKS, or a function like those: (pixels, patch, keep, generator) → (B, K)
    keep: float = 1.0  # share of the patches that stay
    side: int | None = None  # pixels a side of smaller images; None: as they are
    batch: float = 1.0  # share of the batch
    tuned: float = 0.0  # share of the steps, at the end, with whole images

    def __post_init__(self):
        check(callable(self.mask) or self.mask in MASKS, "mask", self.mask, f"a function, {', '.join(MASKS)}")
        for name in ("keep", "batch"):
            check_share(getattr(self, name), name)
        check_share(self.tuned, "tuned", open_below=False)

    def kept(self, pixels, patch, generator):
        """(B, K) patches that stay, or None for all."""
        mask = MASKS.get(self.mask, self.mask)
        return None if self.keep == 1 and self.mask in MASKS else mask(pixels, patch, self.keep, generator)


class Pairs:
    """Images with captions: pixels (N, 3, S, S) bytes, captions (N,) numbers among the rows of tokens (C, L)."""

    def __init__(self, pixels, captions, tokens):
        self.captions, self.tokens, self.sizes = captions, tokens, {pixels.shape[-1]: pixels, None: pixels}

    def __len__(self):
        return len(self.captions)

    def resize(self, side):
        """Keep the images at another side, too, as bytes; None: as they are."""
        if side not in self.sizes:
            parts = self.sizes[None].split(1000)
            small = [F.interpolate(p.float(), (side, side), mode="bicubic", antialias=True).round().clamp(0, 255).byte() for p in parts]
            self.sizes[side] = torch.cat(small)

    def images(self, index, side=None, device=None):
        """(B, 3, side, side) from -1 to 1."""
        return self.sizes[side][index].to(device).float() / 127.5 - 1

    def part(self, index):
        """The Pairs at an index: a slice, or numbers."""
        return Pairs(self.sizes[None][index], self.captions[index], self.tokens)

    def to(self, device):
        """The same with the pixels on a device; captions and words stay."""
        return Pairs(self.sizes[None].to(device), self.captions, self.tokens)


def cosine_rate(step, steps, warm=0.1):
    """Share of the learning rate at a step from 0 on: a linear start over `warm` of the steps, then a cosine to 0, which stays 0."""
    first = max(1, round(warm * steps))
    return (step + 1) / first if step < first else (1 + math.cos(math.pi * min(1, (step - first) / max(1, steps - first)))) / 2


class Trainer:
    """One training, step by step. In several processes each takes its part of every batch, and all keep the same weights.

    model: a ContrastiveModel, on its device. pairs: the Pairs, on the same. steps: for how many the schedule is planned. batch: images of
    a step, of all processes together. Equal seeds see the same images in the same order, whatever the recipe's mask."""

    def __init__(self, model, pairs, recipe, steps, batch=128, rate=1e-3, seed=0, decay=0.05):
        (self.rank, world), size = processes(), max(2, round(recipe.batch * check_count(batch, "batch", 2)))
        check(size % world == 0 and size <= len(pairs), "batch", size, f"a multiple of {world} processes, at most {len(pairs)} images")
        pairs.resize(recipe.side)
        self.pairs, self.recipe, self.steps, self.size, self.done = pairs, recipe, check_count(steps, "steps"), size, 0
        self.patch, self.device = model.clip.config.vision_config.patch_size, next(model.parameters()).device
        self.mine = slice(self.rank * size // world, (self.rank + 1) * size // world)
        self.order, self.masking = (torch.Generator().manual_seed(2 * seed + i) for i in range(2))
        self.queue = torch.empty(0, dtype=torch.long)
        self.model = model if world == 1 else nn.parallel.DistributedDataParallel(model)
        weights = [p for p in model.clip.parameters() if p.requires_grad]
        scalars = [p for p in (model.log_scale, model.bias) if p is not None]  # few steps must be enough for them
        self.optimiser = torch.optim.AdamW([dict(params=weights, weight_decay=decay), dict(params=scalars, lr=10 * rate, weight_decay=0.0)],
                                           lr=rate, betas=(0.9, 0.98), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: cosine_rate(step, steps))

    def draw(self):
        """What the model takes, of this process's part of the next batch. Every image comes once before any comes again."""
        while len(self.queue) < self.size:
            self.queue = torch.cat([self.queue, torch.randperm(len(self.pairs), generator=self.order)])
        index, self.queue = self.queue[: self.size], self.queue[self.size:]
        whole = self.recipe.tuned > 0 and self.done >= self.steps - round(self.recipe.tuned * self.steps)
        pixels = self.pairs.images(index, None if whole else self.recipe.side, self.device)
        kept = None if whole else self.recipe.kept(pixels, self.patch, self.masking)  # of all processes: the same numbers for all
        captions = self.pairs.captions[index][self.mine]
        used, which = captions.unique(return_inverse=True)
        return dict(pixels=pixels[self.mine], kept=kept if kept is None else kept[self.mine],
                    **{k: v.to(self.device) for k, v in dict(tokens=self.pairs.tokens[used], which=which, captions=captions).items()})

    def step(self):
        """One update; returns this process's loss, a scalar tensor."""
        loss = self.model(**self.draw())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.done += 1
        return loss.detach()


def train(model, pairs, recipe, steps, at=(), judge=None, **options):
    """Train for `steps` steps; returns [dict(step, training_loss, **judge(model))] for the steps in `at`. options: of `Trainer`."""
    trainer, told = Trainer(model, pairs, recipe, steps, **options), []
    for step in range(1, steps + 1):
        loss = trainer.step()
        if step in at and trainer.rank == 0:
            told.append(dict(step=step, training_loss=float(loss)) | (judge(model) if judge else {}))
    return told


@torch.no_grad()
def judge_captions(model, pairs, captions, recipe=None, batch=250):
    """Shares of right answers: accuracy (class, by its captions' mean feature), caption_accuracy, and by part of the nearest caption.

    recipe: mask and resize the images as in training; None: whole. NaN if features are not finite."""
    clip, device, recipe = model.clip, next(model.parameters()).device, recipe or Recipe()
    generator, patch = torch.Generator().manual_seed(0), clip.config.vision_config.patch_size
    pairs.resize(recipe.side)
    texts, rows = text_features(clip, captions.tokens.to(device)), []
    for index in torch.arange(len(pairs)).split(batch):
        pixels = pairs.images(index, recipe.side, device)
        kept = recipe.kept(pixels, patch, generator)
        rows.append(encode_images(clip, pixels, None if kept is None else KeepPatches(kept)))
    images = torch.cat(rows)
    classes = F.normalize(texts.unflatten(0, (len(captions.parts[0]), -1)).mean(1), dim=-1)
    said, right = (images @ texts.T).argmax(1).cpu(), captions.split(pairs.captions)
    equal = captions.split(said) == right
    hits = [(images @ classes.T).argmax(1).cpu() == right[:, 0], equal.all(1), *equal[:, 1:].T]
    names = ("accuracy", "caption_accuracy", "brightness_accuracy", "colour_accuracy", "place_accuracy")
    good = bool(images.isfinite().all() and texts.isfinite().all())  # argmax hides NaN
    return {name: float(hit.float().mean()) if good else math.nan for name, hit in zip(names, hits, strict=True)}


def _as_one_of_several(path, model, pairs, recipe, steps, options):
    """What each of the processes does; the first writes weights and scores to `path`."""
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())  # joins the others, by NCCL or gloo
    told = train(model.to(state.device), pairs.to(state.device), recipe, steps, **options)
    if state.is_main_process:
        torch.save(dict(weights={k: v.cpu() for k, v in model.state_dict().items()}, told=told), path)
    state.destroy_process_group()


def _launch(processes, *args):
    """In a fresh process: start the others."""
    from accelerate import notebook_launcher

    notebook_launcher(_as_one_of_several, args, num_processes=processes)


def check_processes(processes):
    """ValueError, one line, unless so many processes can share a training here: one for each GPU, if there are any, and more than one
    with accelerate and joblib (which scikit-learn brings) only."""
    most = torch.cuda.device_count() if torch.cuda.is_available() else math.inf
    check(is_count(processes) and processes <= most, "PROCESSES", processes, f"1 to {most}, one a GPU")
    try:
        if processes > 1:
            import accelerate  # noqa: F401
            import joblib  # noqa: F401
    except ImportError as error:
        check(False, "PROCESSES", processes, f"1 without the package {error.name}; for more: pip install accelerate joblib")


def train_in_processes(processes, model, pairs, recipe, steps, **options):
    """As `train`, with every batch shared by so many processes (see `check_processes`); the trained weights end up in `model`."""
    check_processes(processes)
    if processes == 1:
        return train(model, pairs, recipe, steps, **options)
    from joblib.externals.loky import get_reusable_executor

    with tempfile.TemporaryDirectory() as folder:
        path, device = f"{folder}/trained.pt", next(model.parameters()).device
        executor = get_reusable_executor(max_workers=1)  # not a copy of this process; takes functions of a notebook, too
        executor.submit(_launch, processes, path, model.cpu(), pairs.to("cpu"), recipe, steps, options).result()
        done = torch.load(path, weights_only=True)
    model.load_state_dict(done["weights"])
    model.to(device)
    return done["told"]
