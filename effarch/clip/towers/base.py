"""What a vision tower is to the encoder loop, and the parts that the adapters of all families share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, is_count, is_number


@dataclass
class Block:
    """One pre-norm transformer layer: x += out(attention(norm1(x))), x += mlp(norm2(x)).

    What a library does to a branch before it adds it (layer scale, dropout, stochastic depth) ends `out` and `mlp`."""

    norm1: Callable
    q: Callable
    k: Callable
    v: Callable
    out: Callable
    norm2: Callable
    mlp: Callable
    hidden: float  # width inside the MLP; a gated one, with three matrices instead of two, counts one and a half times
    rotate: Callable | None = None  # queries or keys (B, heads, N, d), cos, sin (B, 1, N, d) → the same, rotated by position
    layer: nn.Module | None = None  # the library's layer, and the attention in it
    attention: nn.Module | None = None
    _chains: dict = field(default_factory=dict, init=False, repr=False)  # what `macs` has found, since it is asked in every pass

    def attentions(self):
        """The modules that attend; ViT's and DINOv2's may have one inside."""
        both = self.attention, getattr(self.attention, "attention", None)
        return [getattr(one, "_orig_mod", one) for one in both if isinstance(one, nn.Module)]

    def macs(self, name, one):
        """Multiply-adds a token of the projection `name`: `one` if it is one matrix, else those of all its linear layers."""
        if name not in self._chains:
            matrices = linear_macs(getattr(self, name))
            self._chains[name] = sum(matrices) if len(matrices) > 1 else None
        return one if self._chains[name] is None else self._chains[name]


@dataclass
class Tower:
    """A vision tower. P patches, prefix special tokens in front (CLS first; 0 = none), width D."""

    module: nn.Module  # the library's module that does the same
    embed: Callable  # (B, 3, H, W), interpolate=False → (B, prefix + P, D), positions added
    pre_norm: Callable  # (B, N, D) → (B, N, D) before the first layer
    blocks: list
    finish: Callable  # (B, N, D) → (B, N, D): what the model calls last_hidden_state
    pool: Callable  # (B, N, D), sizes (B, N) or None → (B, D): what it calls pooler_output
    pools: bool  # whether the model has a pooler_output; without one, `pool` is the mean of the tokens or the CLS token
    heads: int
    prefix: int
    patch: Any  # nn.Conv2d, or a Stem
    pool_macs: Callable  # N → multiply-adds of pool
    image_size: int | tuple  # pixels a side, or (height, width) if they differ
    library: str = "transformers"  # whose calls the module answers: transformers, timm or open_clip
    calls: list = field(default_factory=list)  # modules that embed, finish and pool call
    dropout: float = 0.0  # of the attention weights, which the loop leaves out
    rotary: Callable | None = None  # pixels → (cos, sin), (prefix + P, d) each, for the blocks' rotate
    pools_all: bool = False  # whether `pool` reads more than the CLS token although there are tokens in front
    output: Callable | None = None  # (last, pooled, hidden states, pixels) → what the module returns; None: the usual

    def attentions(self):
        """The modules of all layers that attend."""
        return [one for block in self.blocks for one in block.attentions()]

    def called(self):
        """The modules that the loop calls, each with all that is in it."""
        ours = [getattr(block, name) for block in self.blocks for name in ("norm1", "q", "k", "v", "out", "norm2", "mlp")]
        return [piece for one in [*ours, self.pre_norm, self.finish, *self.calls] for piece in pieces(one)]

    def skipped(self):
        """{name: part} of the modules that the loop does not call, so that hooks on them would not run."""
        called = {id(part) for piece in self.called() for part in piece.modules()}
        return {name: part for name, part in self.module.named_modules() if name and id(part) not in called}

    def holders(self):
        """{name: part} of the tower ("") and of what holds parts that the loop calls, but is not called itself: encoder, layers, heads."""
        called, found = set(map(id, self.called())), {}

        def holds(module, name):
            if id(module) in called:
                return True
            if any([holds(child, f"{name}.{key}".lstrip(".")) for key, child in module._modules.items() if child is not None]):
                found[name] = module
            return name in found

        holds(self.module, "")
        return found

    def check_pixels(self, pixels):
        """ValueError, one line, for what is no batch of images (B, channels, H, W) that hold a patch."""
        told = tuple(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        channels, (height, width) = self.patch.weight.shape[1], self.patch.kernel_size
        ok = isinstance(told, tuple) and len(told) == 4 and told[1] == channels and told[2] >= height and told[3] >= width
        check(ok, "pixel_values", told, f"a tensor (B, {channels}, H, W) of images, H at least {height} and W at least {width}")

    def dropout_now(self):
        """The most dropout that an attention would use now: 0 outside training."""
        rates = [self.dropout if self.module.training else 0.0]
        for part in (one for one in self.attentions() if one.training):
            values = [getattr(part, name, 0.0) for name in ("dropout", "dropout_prob", "attention_dropout", "attn_drop")]
            rates += [rate for rate in (getattr(value, "p", value) for value in values) if is_number(rate)]
        return max(rates)

    def places(self):
        """[(parent, {name: part})] of all that stands in the tower and is not inside what the loop calls: it has looked its parts
        up there, and `moved` tells whether they still are in their places."""
        live = ("fc_norm", "head_drop", "head") if self.library == "timm" else ()  # timm's own forward_head calls what stands there
        parents = [self.module, *self.skipped().values()]
        return [(parent, {name: part for name, part in parent._modules.items() if parent is not self.module or name not in live}) for parent in parents]


def moved(places):
    """Names of parts that are no longer where `Tower.places` has seen them; where all that stands is called, also of new ones."""
    lists = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return [name for parent, before in places for name in (before | parent._modules if isinstance(parent, lists) else before)
            if parent._modules.get(name) is not before.get(name)]


class Chain:
    """Parts that are called one after the other."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


def chain(*parts):
    """The parts one after the other, without those that do nothing; a single one as it is."""
    parts = [part for part in parts if part is not None and not isinstance(part, nn.Identity)]
    return parts[0] if len(parts) == 1 else Chain(parts)


HOMES = {"torch", "transformers", "timm", "open_clip"}


def home_of(function):
    """The package in which a function or a class was written."""
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def patched(module, method="forward"):
    """Whether a module has a method of its own in the place of its class's; not counted: what calls that (accelerate's hooks,
    token_reduction), and what torch.compile made of it."""
    own = vars(module).get(method)
    while hasattr(own, "before"):  # stand-ins of token_reduction, one upon the other
        own = own.before
    if hasattr(module, "_hf_hook") and isinstance(own, partial):
        own = own.__wrapped__
    own = getattr(own, "_torchdynamo_orig_callable", own)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), method)


def as_its_library(cls, method, copied):
    """Whether a class's method is a library's, or that of a whole copy of a library's file in the package `copied`: of
    a class that inherits no library's. A class says `plain_attention = True` of a forward of its own that is softmax attention of its
    q_proj, k_proj, v_proj and out_proj."""
    written = [base for base in cls.__mro__ if method in vars(base) and base is not nn.Module]
    homes = [home_of(vars(base)[method]) for base in written]
    if not written or homes[0] in HOMES or vars(written[0]).get("plain_attention", False):
        return True
    return homes[0] == copied == home_of(written[0]) and not HOMES & set(homes)


def refuse_attention(parts):
    """TypeError if one of transformers' modules computes attention by a function that somebody else has registered; not while compiling."""
    if torch.compiler.is_compiling():
        return
    kinds = {getattr(getattr(part, "config", None), "_attn_implementation", None) for part in parts} - {None}
    for kind in kinds:
        from transformers import modeling_utils  # here, for towers of other libraries do without

        known = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", {})
        function = known[kind] if kind in known else None
        if home_of(getattr(function, "func", function)) not in ("transformers", ""):
            raise TypeError(f"attn_implementation={kind!r} is not supported: its function would not be called; supported: eager, sdpa and "
                            "others of transformers itself")


def hooked(parts):
    """Names of the parts (name → module) with hooks of the user; transformers records hidden states with some of its own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, part in parts.items() for kind in kinds for hook in getattr(part, kind).values() if home_of(hook) != "transformers"]


def as_built(tower):
    """The tower, if it computes what the loop computes: TypeError for another forward, other heads, another scale or attention."""
    methods = ("forward_features", "forward_head") if tower.library == "timm" else ("forward",)
    copied = home_of(getattr(type(tower.module), methods[0]))
    for name, part in tower.holders().items():
        for method in ("forward",) if name else methods:
            known = not patched(part, method) and as_its_library(type(part), method, copied)
            if not known and not hasattr(part, "_orig_mod"):
                said = " (plain_attention = True in its class says that it is softmax attention of q_proj, k_proj, v_proj and out_proj)"
                raise TypeError(f"{name or 'the tower'}: {type(part).__name__} with a {method} of its own is not supported: not it is called, "
                                f"but its parts{said if 'attn' in name or 'attention' in name else ''}")
    refuse_attention([tower.module, *tower.attentions()])
    refuse_settings(tower)
    return tower


# what attentions of the three libraries read, or functions of transformers that compute them, and the loop does not: with the usual value
LEFT_OUT = dict.fromkeys(("is_causal", "sliding_window", "sinks", "bias_k", "bias_v", "add_zero_attn"), False) | dict(num_key_value_groups=1)
SETTINGS = (*LEFT_OUT, "num_prefix_tokens", "num_heads", "num_attention_heads", "head_dim", "attention_head_size", "scale", "scaling")


def settings(attentions):
    """What `refuse_settings` reads of a module itself, and its parameters, to see fast whether it has to look again."""
    return [value for part in attentions for value in (*map(vars(part).get, SETTINGS), *part._parameters.values())]


def refuse_masks(attention, layer, prefix=None):
    """TypeError for an attention that is told to leave tokens out, or to add some; prefix: tokens in front that it must not rotate."""
    # not getattr, which is slow where there is nothing, and encode_images asks in every call; but a compiler knows nothing else
    own = LEFT_OUT.keys() | {"num_prefix_tokens"} if torch.compiler.is_compiling() else attention._parameters | vars(attention)
    for name, usual in (LEFT_OUT if prefix is None else LEFT_OUT | dict(num_prefix_tokens=prefix)).items():
        value = getattr(attention, name, None) if name in own or hasattr(type(attention), name) else None
        if isinstance(value, torch.Tensor) or value not in (None, usual):
            told = "a tensor" if isinstance(value, torch.Tensor) else value
            raise TypeError(f"layer {layer} with {name}={told} is not supported; supported: None or {usual}, since every token attends to all of them")


def refuse_settings(tower):
    """TypeError for a layer whose attention is told to compute something else than the loop: other heads, another scale, a mask."""
    for i, block in enumerate(tower.blocks):
        *_, attention = attentions = block.attentions()
        for part in attentions:
            refuse_masks(part, i, None if tower.rotary is None else tower.prefix)
        heads = {getattr(attention, name, None) for name in ("num_heads", "num_attention_heads")} - {None}
        size = next((value for name in ("head_dim", "attention_head_size") if (value := getattr(attention, name, None)) is not None), None)
        width = block.q.out_features if has(block.q, "out_features") else None
        if heads - {tower.heads} or None not in (size, width) and width != tower.heads * size:
            raise TypeError(f"layer {i} with {sorted(heads)} heads of {size} for a width of {width} is not supported; supported: {tower.heads} heads in each layer, "
                            "as the configuration or the first one says")
        size = size or width and width / tower.heads
        for name in ("scale", "scaling"):
            scale = getattr(attention, name, None)
            if isinstance(scale, torch.Tensor) or is_number(scale) and size and abs(scale * size**0.5 - 1) > 1e-4:
                told = "a tensor" if isinstance(scale, torch.Tensor) else scale
                raise TypeError(f"layer {i} with {name}={told} is not supported; supported: 1 / √{size}, the root of a head's width")


def pieces(part):
    """The modules that a call of `part` calls."""
    if isinstance(part, nn.Module):
        return [part]
    return [module for piece in getattr(part, "parts", ()) for module in pieces(piece)]


@dataclass
class Third:
    """The query, key or value projection (index 0, 1, 2) out of one weight that holds all three.

    weight, bias: dotted names below `owner`, read at every call; own_bias: the bias is this projection's alone."""

    owner: nn.Module
    index: int
    weight: str
    bias: str | None
    own_bias: bool = False

    def __call__(self, x):
        weight, bias = attrgetter(self.weight)(self.owner), attrgetter(self.bias)(self.owner) if self.bias else None
        rows = slice(self.index * weight.shape[0] // 3, (self.index + 1) * weight.shape[0] // 3)
        return F.linear(x, weight[rows], bias if bias is None or self.own_bias else bias[rows])


def thirds(owner, weight, bias, own_biases=()):
    """The three projections (q, k, v) out of one weight; see Third. own_biases: their names where each has its own."""
    joint = bias if has(owner, bias) else None
    return [Third(owner, i, weight, *((own_biases[i], True) if own_biases else (joint, False))) for i in range(3)]


@dataclass
class Stem:
    """What the loop asks of a patch embedding, for one that is not a single convolution."""

    kernel_size: tuple  # pixels of a patch
    out_channels: int
    weight: torch.Tensor  # of the model's type and device; its numel() is the multiply-adds of a patch


def has(module, path):
    """Whether the dotted attribute exists."""
    try:
        return attrgetter(path)(module) is not None
    except AttributeError:
        return False


def linear_macs(part):
    """The multiply-adds a token of each linear layer that a call of `part` calls, of whatever kind (also quantised)."""
    linear = lambda one: is_count(getattr(one, "in_features", None)) and is_count(getattr(one, "out_features", None))
    return [one.in_features * one.out_features for piece in pieces(part) for one in piece.modules()
            if linear(one) and not any(map(linear, list(one.modules())[1:]))]


def mlp_width(mlp, width):
    """Block.hidden of any MLP: the multiply-adds of its linear layers, divided by those of two of (width × 1)."""
    macs = sum(linear_macs(mlp))
    return macs // (2 * width) if macs % (2 * width) == 0 else macs / (2 * width)


def plain(kind, part):
    """`part`, if it is just a `kind`: what reads its weight would miss what an adapter or a quantiser does around it."""
    if type(part) is not kind:
        raise TypeError(f"{type(part).__name__} in the place of {kind.__name__} is not supported ({type(part).__module__}): its weight is read, not its output "
                        "(of an adapter: merge_and_unload() first)")
    return part


def side_of(image_size):
    """Tower.image_size of an image size given as a number or a pair."""
    height, width = sides_of(image_size)
    return height if height == width else (height, width)


def sides_of(image_size):
    """(height, width) in pixels of an image size given as a pair, or as a number if it is square."""
    sides = (image_size, image_size) if isinstance(image_size, Integral) else image_size
    pair = isinstance(sides, (tuple, list, torch.Size)) and len(sides) == 2 and all(is_count(side) for side in sides)
    check(pair, "image_size", image_size, "a whole number of pixels, or a pair of them (height, width)")
    return int(sides[0]), int(sides[1])


def first_token(x, _=None):
    """(B, N, D) → (B, D): the CLS token."""
    return x[:, 0]


def wide(x):
    """x in float32 at least, in which sums of many tokens neither overflow nor lose what is small."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_of_patches(x, sizes=None):
    """(B, N, D) → (B, D), a merged token counted as often as its parts; the sum is in float32 at least."""
    if sizes is None:
        return wide(x).mean(1).to(x.dtype)
    return ((wide(x) * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)).to(x.dtype)


def rotate_halves(x, cos, sin):
    """Rotary positions (arXiv 2104.09864) where channels i and i + d / 2 are one plane; cos, sin: of each channel's angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rotate_pairs(x, cos, sin):
    """The same with neighbouring channels as planes."""
    return (x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin).to(x.dtype)


def with_prefix(cos, sin, prefix):
    """(P, d) each → (prefix + P, d): the tokens in front stand nowhere, and are not rotated."""
    return F.pad(cos, (0, 0, prefix, 0), value=1.0), F.pad(sin, (0, 0, prefix, 0))


def split_heads(x, heads):
    """(B, N, D) → (B, heads, N, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, bias=None, implementation="sdpa"):
    """softmax(q kᵀ / √d + bias) v over (B, heads, N, d): 'eager' spelled out, 'sdpa' as one fused kernel."""
    check(implementation in ("sdpa", "eager"), "implementation", implementation, "sdpa, eager")
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    return torch.softmax(wide(logits), dim=-1).to(v.dtype) @ v
