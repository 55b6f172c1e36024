# Written by `python -m lab.build` from vlm/low_rank_fusion.ipynb, where each part is explained: edit it there.
"""Low rank in the vision towers of CLIP and SigLIP: factored layers, thinner heads and MLPs without training, adapters, and scores between images and texts."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, check_share, is_count
from effarch.clip.towers import find_vision_module, make_tower, plain, split_heads, wide
from effarch.token_reduction.encoder import encode_images, pooled_output, run_encoder


def factor_rank(share, rows, columns):
    """The largest rank r whose two factors hold at most `share` of a rows × columns matrix: r (rows + columns) numbers."""
    return max(1, int(check_share(share, "share") * rows * columns / (rows + columns) + 1e-9))


class LowRankLinear(nn.Sequential):
    """y = A (B x) + b in place of a linear layer. up: A (m, r), down: B (r, n), bias: (m,) or None."""

    def __init__(self, up, down, bias=None):
        first, second = (nn.Linear(*part.shape[::-1], bias=False, device="meta") for part in (down, up))
        first.weight, second.weight = nn.Parameter(down), nn.Parameter(up)
        second.bias = None if bias is None else nn.Parameter(bias)
        super().__init__(first, second)
        self.in_features, self.out_features = down.shape[1], up.shape[0]


class Moment:
    """First and second moments of the inputs x (n numbers each) of a layer, about the mean of the first that are seen:
    products in float32 at least, sums in float64."""

    def __init__(self):
        self.count, self.total, self.outer, self.centre = 0, 0.0, 0.0, None

    def add(self, x):
        """Note the inputs (…, n)."""
        rows = wide(x.flatten(0, -2))
        self.centre = rows.mean(0) if self.centre is None else self.centre
        rows, self.count = rows - self.centre, self.count + len(rows)
        self.total, self.outer = self.total + rows.sum(0).double(), self.outer + (rows.T @ rows).double()

    mean = property(lambda self: self.centre.double() + self.total / self.count)  # (n,) E x
    second = property(lambda self: self.covariance + torch.outer(self.mean, self.mean))  # (n, n) E x xᵀ
    covariance = property(lambda self: self.outer / self.count - torch.outer(self.total, self.total) / self.count**2)


# the linear layers of a transformer layer → whose inputs they share
PLACES = {"self_attn.q_proj": "attention", "self_attn.k_proj": "attention", "self_attn.v_proj": "attention",
          "self_attn.out_proj": "out", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}


def layers_of(model):
    """The transformer layers of the vision tower; TypeError for what is neither CLIP nor SigLIP."""
    module, family = find_vision_module(model)
    if family.name not in ("CLIP", "SigLIP"):
        raise TypeError(f"{type(model).__name__} is not supported; supported: CLIP and SigLIP models of transformers")
    return module.encoder.layers


@torch.no_grad()
def collect_moments(model, batches):
    """[{'attention', 'out', 'fc1', 'fc2': Moment}], one of each layer. batches: pixel_values (B, 3, H, W) of unlabelled images."""
    moments, hooks = [], []
    for layer in layers_of(model):
        moments.append({what: Moment() for what in PLACES.values()})
        for place in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            note = lambda _, inputs, moment=moments[-1][PLACES[place]]: moment.add(inputs[0])
            hooks.append(layer.get_submodule(place).register_forward_pre_hook(note))
    try:
        for pixels in batches:
            encode_images(model, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    check(all(found["fc1"].count for found in moments), "batches", "none", "at least one batch of images")
    return moments


def copy_of(model):
    """A copy whose vision tower may be changed; what belongs to texts is shared with the original."""
    return copy.deepcopy(model, {id(part): part for name, part in model.named_children() if "text" in name})


def each_layer(model, moments):
    """(copy of the model, its layers with their moments); ValueError where these are of another model."""
    new = copy_of(model)
    check(len(moments) == len(layers_of(new)), "moments", len(moments), f"{len(layers_of(new))}, one of each layer")
    return new, zip(layers_of(new), moments, strict=True)


def root(matrix):
    """The symmetric square root of positive semidefinite matrices (…, n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def floored(matrix, floor):
    """Matrices (…, n, n) with `floor` × their mean eigenvalue added to the diagonal, so that they have an inverse."""
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    return matrix + floor * mean * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def output_directions(weight, second, rank):
    """(…, m, r) U_r: orthonormal directions that hold most of the outputs W x. weight: (…, m, n), second: (…, n, n)."""
    if weight.shape[-2] <= weight.shape[-1]:
        return torch.linalg.eigh(weight @ second @ weight.mT).eigenvectors.flip(-1)[..., :rank]
    tall = weight @ root(floored(second, 1e-9))  # more outputs than inputs: the small side's eigenvectors
    return torch.linalg.qr(tall @ torch.linalg.eigh(tall.mT @ tall).eigenvectors.flip(-1)[..., :rank]).Q


METRICS = {  # what the error is measured by: the weights, each input by its size, the outputs
    "SVD": lambda second: torch.eye(len(second), dtype=second.dtype, device=second.device),
    "diagonally scaled": lambda second: second.diagonal().diag(), "whitened": lambda second: second}


def factor(layer, moment, rank, metric="whitened"):
    """The LowRankLinear of an nn.Linear whose error is least in a metric (a name in METRICS): U_r (U_rᵀ W) x + b.

    Here and below: TypeError for a layer with an adapter or a quantiser around its weight, which would be lost."""
    weight = plain(nn.Linear, layer).weight.detach().double()
    check(is_count(rank) and rank <= min(weight.shape), "rank", rank, f"a whole number from 1 to {min(weight.shape)}")
    check(metric in METRICS, "metric", metric, ", ".join(METRICS))
    u = output_directions(weight, METRICS[metric](moment.second), rank)
    factors = (part.to(layer.weight.dtype).contiguous() for part in (u, u.T @ weight))
    return LowRankLinear(*factors, None if layer.bias is None else layer.bias.detach().clone())


def low_rank_layers(model, moments, share, metric="whitened", places=tuple(PLACES)):
    """A copy of the model whose linear layers at `places` (names in PLACES) are pairs of `share` of their numbers each.

    Its text tower is the model's own: copy.deepcopy it before that is trained, cast or set to train."""
    check(set(places) <= set(PLACES), "places", places, ", ".join(PLACES))
    new, layers = each_layer(model, moments)
    for layer, found in layers:
        for place in places:
            old = layer.get_submodule(place)
            layer.set_submodule(place, factor(old, found[PLACES[place]], factor_rank(share, *old.weight.shape), metric))
    return new


class SlimAttention(nn.Module):
    """Attention of `heads` heads that may be thinner in queries and keys than in values; called like transformers' own."""

    plain_attention = True  # for the encoder loop, which calls its parts
    def __init__(self, q_proj, k_proj, v_proj, out_proj, heads):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.heads = q_proj, k_proj, v_proj, out_proj, heads

    def forward(self, hidden_states, attention_mask=None, **_):
        """(B, N, D) → ((B, N, D), None): attention maps are not kept."""
        q, k, v = (split_heads(layer(hidden_states), self.heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def linear(weight, bias, like):
    """An nn.Linear of these numbers, in the precision of the tensor `like`."""
    made = nn.Linear(*weight.shape[::-1], device="meta")
    made.weight, made.bias = (nn.Parameter(part.to(like.dtype).contiguous()) for part in (weight, bias))
    return made


def by_head(layer, heads):
    """Weight (heads, d, D) and bias (heads, d) of a layer that makes queries, keys or values, in float64."""
    return tuple(part.detach().double().unflatten(0, (heads, -1)) for part in (plain(nn.Linear, layer).weight, layer.bias))


def query_key_form(q, k, heads, moment, floor=1e-6):
    """(root of G_q, root of G_k, U, S, Vᵀ), all with heads first: the forms of a layer's heads, weighted by what they meet."""
    (wq, bq), (wk, _) = by_head(q, heads), by_head(k, heads)
    cross = torch.einsum("hdn,n,he->hde", wq, moment.mean, bq)
    queries = wq @ moment.second @ wq.mT + cross + cross.mT + bq[..., None] * bq[:, None]
    root_q, root_k = (root(floored(part, floor)) for part in (queries, wk @ moment.covariance @ wk.mT))
    return root_q, root_k, *torch.linalg.svd(root_q @ root_k)


def fold_query_key(q, k, heads, moment, rank):
    """[q', k']: linear layers with `rank` numbers a head whose products come closest to those of q and k."""
    root_q, root_k, u, s, v = query_key_form(q, k, heads, moment)
    check(is_count(rank) and rank <= s.shape[-1], "rank", rank, f"a whole number from 1 to {s.shape[-1]}")
    made, scale = [], (s[:, :rank].sqrt() * (rank / s.shape[-1]) ** 0.25)[..., None]
    for layer, directions, square in ((q, u.mT, root_q), (k, v, root_k)):
        weight, bias = by_head(layer, heads)
        fold = scale * torch.linalg.solve(square, directions[:, :rank], left=False)  # (heads, r, d)
        made.append(linear((fold @ weight).flatten(0, 1), (fold @ bias[..., None]).flatten(), layer.weight))
    return made


def compensate(old, new, pick, moment, weights=True, floor=1e-4):
    """(weight, bias) of a layer on the picked inputs that stands in best for `old` (nn.Linear) on all of them.

    new: (m, r) the weights to start from. pick: (n, …) → (r, …), which inputs, or mixtures of them, are left. weights: False
    leaves them as they are and puts only the mean of what left into the bias."""
    weight, bias = plain(nn.Linear, old).weight.detach().double(), old.bias.detach().double()
    if weights:
        across = pick(moment.covariance)  # (r, n)
        small = pick(across.T)  # (r, r)
        new = new + torch.linalg.solve(floored(small, floor), weight @ across.T - new @ small, left=False)
    return new, bias + weight @ moment.mean - new @ pick(moment.mean)


def fold_value_output(v, out, heads, moment, rank):
    """[v', out']: values of `rank` numbers a head, in the directions that matter behind the output matrix, and that matrix. Heads
    stand in for one another's losses. moment: of the output matrix's inputs."""
    (wv, bv), wo = by_head(v, heads), plain(nn.Linear, out).weight.detach().double().unflatten(1, (heads, -1)).transpose(0, 1)  # wo: (heads, D, d)
    d = wo.shape[-1]
    check(is_count(rank) and rank <= d, "rank", rank, f"a whole number from 1 to {d}")
    spread = torch.stack([moment.covariance[i * d:(i + 1) * d, i * d:(i + 1) * d] for i in range(heads)])
    u = torch.linalg.qr(wo).Q @ output_directions(torch.linalg.qr(wo).R, floored(spread, 1e-9), rank)  # (heads, D, r)
    fold, new = u.mT @ wo, u.transpose(0, 1).flatten(1)  # fold: (heads, r, d), new: (D, heads · r)
    pick = lambda x: torch.einsum("hrd,hd...->hr...", fold, x.unflatten(0, (heads, d))).flatten(0, 1)
    weight, bias = compensate(out, new, pick, moment)
    return [linear((fold @ wv).flatten(0, 1), (fold @ bv[..., None]).flatten(), v.weight), linear(weight, bias, out.weight)]


def slim_attention(model, moments, qk=None, vo=None):
    """A copy of the model whose heads have qk numbers in queries and keys, vo in values: a rank, or a list with one of each layer.

    Its text tower is the model's own: copy.deepcopy it before that is trained, cast or set to train."""
    new, layers = each_layer(model, moments)
    heads, depth = make_tower(new).heads, len(moments)
    qks, vos = ([rank] * depth if rank is None or isinstance(rank, int) else list(rank) for rank in (qk, vo))
    check(len(qks) == len(vos) == depth, "ranks", (qk, vo), f"one rank, or {depth}")
    for (layer, found), q_rank, v_rank in zip(layers, qks, vos, strict=True):
        old = layer.self_attn
        parts = [old.q_proj, old.k_proj, old.v_proj, old.out_proj]
        parts[:2] = parts[:2] if q_rank is None else fold_query_key(*parts[:2], heads, found["attention"], q_rank)
        parts[2:] = parts[2:] if v_rank is None else fold_value_output(*parts[2:], heads, found["out"], v_rank)
        layer.self_attn = SlimAttention(*parts, heads)
    return new


CRITERIA = {  # name → (fc1, fc2, Moment of fc2's inputs) → (F,), the highest stay
    "random": lambda fc1, fc2, m: torch.rand(len(m.mean), generator=torch.Generator().manual_seed(0)).to(m.mean),
    "magnitude": lambda fc1, fc2, m: (fc1.weight.square().sum(1) + fc2.weight.square().sum(0)).sqrt(),
    "Wanda": lambda fc1, fc2, m: m.second.diagonal().sqrt() * fc2.weight.norm(dim=0),  # arXiv 2306.11695
    "FLAP": lambda fc1, fc2, m: m.covariance.diagonal().clamp(min=0).sqrt() * fc2.weight.norm(dim=0),  # arXiv 2312.11983
    "surgeon": lambda fc1, fc2, m: fc2.weight.norm(dim=0) / torch.linalg.inv(floored(m.covariance, 1e-4)).diagonal().sqrt(),
}
REPAIRS = ("nothing", "mean", "least squares")


@torch.no_grad()
def slim_mlp(model, moments, share, criterion="FLAP", repair="least squares"):
    """A copy of the model whose MLPs keep `share` of their channels, by a name in CRITERIA, with one of REPAIRS for the rest.

    Its text tower is the model's own: copy.deepcopy it before that is trained, cast or set to train."""
    check(criterion in CRITERIA, "criterion", criterion, ", ".join(CRITERIA))
    check(repair in REPAIRS, "repair", repair, ", ".join(REPAIRS))
    check_share(share, "share")
    new, layers = each_layer(model, moments)
    for layer, found in layers:
        fc1, fc2, moment = plain(nn.Linear, layer.mlp.fc1), plain(nn.Linear, layer.mlp.fc2), found["fc2"]
        count = max(1, round(share * fc1.out_features))
        kept = CRITERIA[criterion](fc1, fc2, moment).argsort(descending=True, stable=True)[:count].sort().values
        weight, bias = fc2.weight.double()[:, kept], fc2.bias.double()
        if repair != "nothing":
            weight, bias = compensate(fc2, weight, lambda x, kept=kept: x[kept], moment, repair == "least squares")
        layer.mlp.fc1, layer.mlp.fc2 = linear(fc1.weight[kept], fc1.bias[kept], fc1.weight), linear(weight, bias, fc2.weight)
    return new


def matrix_numbers(module):
    """The numbers in a module's matrices: its multiply-adds a token, too."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def layer_numbers(model):
    """The numbers in the matrices of all vision layers."""
    return sum(map(matrix_numbers, layers_of(model)))


ADAPTERS = {"LoRA": {}, "rsLoRA": dict(use_rslora=True), "PiSSA": dict(init_lora_weights="pissa_niter_8"), "DoRA": dict(use_dora=True)}


def adapter_targets(model, kind):
    """Full names of the vision layers' nn.Linear modules; for DoRA without those with rows of zeros, since it divides by their norms.

    Full names, since a suffix such as 'q_proj' would hit the text tower, too."""
    inside, picky = {id(part) for layer in layers_of(model) for part in layer.modules()}, ADAPTERS[kind].get("use_dora", False)
    return [name for name, part in model.named_modules() if id(part) in inside and isinstance(part, nn.Linear)
            and not (picky and bool((part.weight.norm(dim=1) == 0).any()))]


def add_adapter(model, kind, rank=8, seed=0):
    """A peft model around a copy: only the adapter (a name in ADAPTERS) of its vision layers is trained. Scale α / r is 1, but
    √r for rsLoRA, whose scale is α / √r. `merge_and_unload()` adds it to the weights. ImportError without peft."""
    check(kind in ADAPTERS, "kind", kind, ", ".join(ADAPTERS))
    check_count(rank, "rank")
    try:
        import peft
    except ImportError:
        raise ImportError("adapters need the package peft: pip install peft") from None
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=adapter_targets(model, kind), **ADAPTERS[kind])
    with torch.random.fork_rng():  # peft draws from the generator of all
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(model), config)


def all_weights(model):
    """A copy whose vision layers are trained, all of their weights, and nothing else."""
    new = copy.deepcopy(model)
    for p in set(new.parameters()) - {p for layer in layers_of(new) for p in layer.parameters()}:
        p.requires_grad_(False)
    return new


@torch.enable_grad()
def distil(model, images, targets, steps, rate, batch=16, seed=0, reducer=None):
    """Train what requires gradients, in place: the loss is 1 - cosine(feature, target); AdamW, cosine schedule.

    images: anything with len() and batch(index, device) → (B, 3, H, W), no labels; targets (n, P): the features wanted."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, check_count(steps, "steps"))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=generator)
        features = encode_images(model, images.batch(index, trained[0].device), reducer)
        loss = 1 - (features * targets[index].to(features)).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def joint_factors(images, texts, rank, floor=1e-6):
    """A, B (P, r): f A (t B)ᵀ comes closest to f (t - mean t)ᵀ, but for a number of each image, over pairs of images (n, P) and texts (m, P).

    To compare images by that, subtract the texts' mean from t first."""
    check(is_count(rank) and rank <= images.shape[1], "rank", rank, f"a whole number from 1 to {images.shape[1]}")
    images, texts = images.double(), texts.double() - texts.double().mean(0)
    root_f, root_t = (root(floored(x.T @ x / len(x), floor)) for x in (images, texts))
    u, s, v = torch.linalg.svd(root_f @ root_t)
    return tuple(torch.linalg.solve(square, part[:, :rank]) * s[:rank].sqrt() for square, part in ((root_f, u), (root_t, v.T)))


class MatchByAttention(nn.Module):
    """Which text fits an image? The text looks where it wants, and compares what it sees: two forms between texts and tokens.

    rank: of both forms, A Bᵀ with r (d_t + d_v) numbers each; None: dense, d_t d_v each. look: False sees the mean of all tokens."""

    def __init__(self, text_width, image_width, rank=None, look=True):
        super().__init__()
        check(rank is None or is_count(rank), "rank", rank, "None or a whole number of at least 1")

        sides = [(text_width, image_width)] if rank is None else [(text_width, rank), (rank, image_width)]
        form = lambda: nn.Sequential(*(nn.Linear(*side, bias=False) for side in sides))
        self.where, self.what = form() if look else None, form()

    def forward(self, texts, tokens):
        """texts (B, C, d_t), tokens (B, N, d_v) → scores (B, C)."""
        scale = tokens.shape[-1] ** -0.5
        if self.where is None:
            seen = tokens.mean(1, keepdim=True)
        else:
            seen = (scale * self.where(texts) @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return scale * (self.what(texts) * seen).sum(-1)


@torch.no_grad()
def pooled_features(model, pixels, reducer=None):
    """(B, D): what the model's projection reads, with fewer tokens where a reducer is given."""
    tower = make_tower(model)
    return pooled_output(tower, run_encoder(tower, pixels, reducer))


def residual_repair(pooled, wanted, weight, ridge, rank=None):
    """W + Δ (P, D): the projection that brings what a reduced model pools, (n, D), closest to the wanted features (n, P), not normalised.

    Least squares of the difference that W (P, D) leaves, with a ridge of `ridge` × the mean eigenvalue of the inputs' second
    moment, so that few images change little. rank: of Δ, for the least error (reduced-rank regression); None: full."""
    check(ridge > 0, "ridge", ridge, "a number above 0")
    z, w = pooled.double(), weight.double()
    second = z.T @ z / len(z)
    delta = torch.linalg.solve(floored(second, ridge), (wanted.double() - z @ w.T).T @ z / len(z), left=False)
    if rank is not None:
        u = output_directions(delta, second, check_count(rank, "rank"))
        delta = u @ (u.T @ delta)
    return (w + delta).to(weight.dtype)
