"""What a vision tower is to the encoder loop, and the parts that the adapters of all families share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import is_count


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

    def called(self):
        """The modules that the loop calls, each with all that is in it."""
        ours = [getattr(block, name) for block in self.blocks for name in ("norm1", "q", "k", "v", "out", "norm2", "mlp")]
        return [piece for one in [*ours, self.pre_norm, self.finish, *self.calls] for piece in pieces(one)]

    def skipped(self):
        """{name: part} of the modules that the loop does not call, so that hooks on them would not run."""
        called = {id(part) for piece in self.called() for part in piece.modules()}
        return {name: part for name, part in self.module.named_modules() if name and id(part) not in called}

    def places(self):
        """[(parent, name, part)] of the parts that the loop has looked up, to see later whether they are still in their places."""
        known = set(map(id, [*self.called(), *(part for block in self.blocks for part in (block.layer, block.attention))]))
        live = ("fc_norm", "head_drop", "head") if self.library == "timm" else ()  # timm's own forward_head calls what stands there
        return [(parent, name, part) for parent in self.module.modules() for name, part in parent.named_children()
                if id(part) in known and not (parent is self.module and name in live)]


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


def home_of(function):
    """The package in which a function was written."""
    return function.__module__.partition(".")[0]


def patched(module):
    """Whether a module has a forward of its own in the place of its class's; not counted: accelerate's hooks, which call that, and what
    torch.compile made of it."""
    own = vars(module).get("forward")
    own = getattr(own, "_torchdynamo_orig_callable", own)
    return own is not None and getattr(own, "__func__", None) is not type(module).forward and not hasattr(module, "_hf_hook")


def as_built(tower):
    """The tower, if its layers compute what the loop computes: TypeError for other heads, another scale, or another forward."""
    homes = {"torch", "transformers", "timm", "open_clip", home_of(type(tower.module).forward)}  # its own: a copy of a library's file
    for i, block in enumerate(tower.blocks):
        inner = getattr(block.attention, "attention", None)  # ViT's and DINOv2's may have one inside
        for part in (getattr(one, "_orig_mod", one) for one in (block.layer, block.attention, inner) if isinstance(one, nn.Module)):
            known = home_of(type(part).forward) in homes or getattr(part, "plain_attention", False)
            if patched(part) or not known:
                raise TypeError(f"layer {i}: {type(part).__name__} with a forward of its own is not supported: not the layers are called, but their parts "
                                "(plain_attention = True in its class says that it is softmax attention of q_proj, k_proj, v_proj and out_proj)")
        attention = block.attention if inner is None else inner
        heads = {getattr(attention, name) for name in ("num_heads", "num_attention_heads") if has(attention, name)}
        size = next((getattr(attention, name) for name in ("head_dim", "attention_head_size") if has(attention, name)), None)
        width = block.q.out_features if has(block.q, "out_features") else None
        if heads - {tower.heads} or None not in (size, width) and width != tower.heads * size:
            raise TypeError(f"layer {i} with {sorted(heads)} heads of {size} for a width of {width} is not supported; supported: {tower.heads} heads in each layer, "
                            "as the configuration or the first one says")
        size = size or width and width / tower.heads
        for name in ("scale", "scaling"):
            scale = getattr(attention, name, None)
            if isinstance(scale, float) and size and abs(scale * size**0.5 - 1) > 1e-4:
                raise TypeError(f"layer {i} with {name}={scale} is not supported; supported: 1 / √{size}, the root of a head's width")
    return tower


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
        raise TypeError(f"{type(part).__name__} in the place of {kind.__name__} is not supported: a joint projection of queries, "
                        "keys and values has to be as its library makes it")
    return part


def side_of(image_size):
    """Tower.image_size of an image size given as a number or a pair."""
    height, width = sides_of(image_size)
    return height if height == width else (height, width)


def sides_of(image_size):
    """(height, width) in pixels of an image size given as a pair, or as a number if it is square."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


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
    if implementation == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits if bias is None else logits + bias
    return torch.softmax(wide(logits), dim=-1).to(v.dtype) @ v
