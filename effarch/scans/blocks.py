# Written by `python -m lab.build` from ssm/mamba_layers.ipynb, where each part is explained: edit it there.
"""Mamba's and Mamba-2's blocks and language models, and the attention layer they are compared with."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, is_count, is_number
from effarch.scans.scan import check_state, readable, s6, s6_step, ssd, ssd_step


def causal_conv(x, weight, bias, state=None, act=F.silu, lengths=None):
    """Depthwise causal convolution, then `act`: x (B, T, D); weight (D, 1, K); state (B, K-1, D), the inputs before x.

    Returns the output (B, T, D) and the new state, the last inputs (of the first lengths[b] tokens of row b)."""
    length, taps, weight = x.shape[1], weight.shape[-1], weight.to(x.dtype)
    if state is not None:
        check_state(state, len(x), taps - 1, x.shape[2])
    x = torch.cat([x.new_zeros(len(x), taps - 1, x.shape[2]) if state is None else state.to(x.dtype), x], 1)
    y = x[:, :length] * weight[:, 0, 0] + (0 if bias is None else bias.to(x.dtype))
    for k in range(1, taps):
        y = torch.addcmul(y, x[:, k:k + length], weight[:, 0, k])
    if lengths is None:
        return act(y), x[:, length:].clone()  # a view would keep the whole sequence in memory
    last = lengths[:, None] + torch.arange(taps - 1, device=x.device)
    return act(y), x.gather(1, last[..., None].expand(-1, -1, x.shape[2]))


def inverse_softplus_uniform(n, low=1e-3, high=1e-1):
    """(n,) biases whose softplus is log-uniform in [low, high]: the published initialisation of Δ."""
    delta = torch.exp(torch.rand(n) * math.log(high / low) + math.log(low))
    return delta + torch.log(-torch.expm1(-delta))


def check_ids(ids, shape):
    """ValueError unless ids are numbers of tokens, (B, T) or (B,) as the shape says; returns them."""
    told = (tuple(ids.shape), ids.dtype) if isinstance(ids, torch.Tensor) else type(ids).__name__
    whole = isinstance(ids, torch.Tensor) and ids.dim() == {"(B,)": 1, "(B, T)": 2}[shape] and ids.dtype in (torch.int32, torch.int64)
    check(whole, "ids", told, f"whole numbers {shape}")
    return ids


def check_sizes(vocabulary, width, mixers, positions):
    """ValueError unless a language model can be made of them; returns the mixers."""
    for name, value, least in (("vocabulary", vocabulary, 1), ("width", width, 1), ("positions", positions, 0)):
        check_count(value, name, least)
    wrong = [type(mixer).__name__ for mixer in mixers if not isinstance(mixer, nn.Module)]
    check(not wrong, "mixers", wrong, "modules, such as Mamba2Block(width)")
    return mixers


def check_lengths(lengths, batch, length):
    """ValueError unless `lengths` is None or (batch,), whole numbers from 0 to `length`."""
    if lengths is None:
        return
    told = (tuple(lengths.shape), lengths.dtype) if isinstance(lengths, torch.Tensor) else type(lengths).__name__
    whole = told in (((batch,), torch.int32), ((batch,), torch.int64))
    check(whole, "lengths", told, f"None, or ({batch},): whole numbers from 0 to {length}, one for each row of x")
    if readable(lengths) and bool((lengths < 0).any() | (lengths > length).any()):
        check(False, "lengths", lengths.tolist(), f"0 to {length}, the tokens of x")


def check_pair(state):
    """ValueError unless `state` is what a block returns to go on from."""
    check(isinstance(state, (tuple, list)) and len(state) == 2, "state", type(state).__name__, "None, or (last inputs of the convolution, h) as the block returns it")


class ScanBlock(nn.Module):
    """What both Mamba blocks share. State: (last inputs of the convolution, h). Parameters named in `exact` stay in
    float32 when a model is cast below it: a decay rounded to 8 bits is another memory a hundred tokens later."""

    def forward(self, x, state=None, lengths=None):
        """x (B, T, width) → (y (B, T, width), state), going on from `state` if there is one.

        lengths (B,): the tokens of each row that count; what follows is padding and leaves the state as it is."""
        check(x.dim() == 3, "x.shape", tuple(x.shape), "(B, T, width)")
        check_lengths(lengths, *x.shape[:2])
        check_pair(state := (None, None) if state is None else state)
        conv_state, h = state
        inputs, gate, conv_state = self.scan_inputs(x, conv_state, lengths)
        y, h = self.scan(*inputs, h, chunk=self.chunk)
        return self.finish(y, inputs[0], gate), (conv_state, h)

    def step(self, x, state=None):
        """One token: x (B, width) and the state → (y (B, width), state)."""
        check(x.dim() == 2, "x.shape", tuple(x.shape), "(B, width), one token of each row")
        if state is None:
            y, state = self(x[:, None])
            return y[:, 0], state
        check_pair(state)
        (u, delta, A, B, C), gate, conv_state = self.scan_inputs(x[:, None], state[0])
        y, h = self.scan_step(u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], state[1])
        return self.finish(y, u[:, 0], gate[:, 0]), (conv_state, h)

    def time_step(self, delta, lengths, limits=(0.0, float("inf"))):
        """Δ within its limits; it is 0 from token lengths[b] on, so that padding neither decays nor writes."""
        inside = 1 if lengths is None else torch.arange(delta.shape[1], device=delta.device) < lengths[:, None]
        return F.softplus(delta).clamp(*limits) * (inside if lengths is None else inside[..., None])

    def _apply(self, fn, recurse=True):
        before = {name: self.get_parameter(name).data for name in self.exact}
        super()._apply(fn, recurse)
        for name, old in before.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = old.to(parameter.device, torch.float32)
        return self


class MambaBlock(ScanBlock):
    """Mamba's block (Gu & Dao 2023): x (B, T, width) → (y, state). Parameters are named as in transformers.

    expand: inner channels over width; rank of Δ's projection, None: width / 16; act: after the convolution."""

    exact, scan, scan_step = ("A_log", "dt_proj.bias"), staticmethod(s6), staticmethod(s6_step)

    def __init__(self, width, states=16, expand=2, taps=4, rank=None, bias=False, conv_bias=True, chunk=32, act=F.silu):
        super().__init__()
        check_count(width, "width")
        check(is_number(expand), "expand", expand, "a number above 0")
        inner, rank = round(expand * width), -(-width // 16) if rank is None else rank
        for name, value in dict(chunk=chunk, width=width, states=states, expand=inner, taps=taps, rank=rank).items():
            check_count(value, name)
        self.sizes, self.chunk, self.act = (rank, states, states), chunk, act
        self.in_proj = nn.Linear(width, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.dt_proj.bias.data = inverse_softplus_uniform(inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def scan_inputs(self, x, conv_state, lengths=None):
        """x (B, T, width) → what the scan needs: u, Δ, A, B, C; and the gate and the new conv state."""
        u, gate = self.in_proj(x).chunk(2, -1)
        u, conv_state = causal_conv(u, self.conv1d.weight, self.conv1d.bias, conv_state, self.act, lengths)
        low_rank, B, C = self.x_proj(u).split(self.sizes, -1)
        delta = self.time_step(F.linear(low_rank, self.dt_proj.weight) + self.dt_proj.bias, lengths)
        return (u, delta, -torch.exp(self.A_log), B, C), gate, conv_state

    def finish(self, y, u, gate):
        """Skip, gate, output projection."""
        return self.out_proj(torch.addcmul(y, u, self.D.to(u.dtype)) * F.silu(gate))


class Mamba2Block(ScanBlock):
    """Mamba-2's block (Dao & Gu 2024): x (B, T, width) → (y, state). Parameters are named as in transformers.

    rate multiplies Δ: a block that sees only every r-th moment lets r times as much time pass at each."""

    exact, scan, scan_step = ("A_log", "dt_bias"), staticmethod(ssd), staticmethod(ssd_step)

    def __init__(self, width, heads=8, head_width=16, states=16, groups=1, taps=4, bias=False, conv_bias=True,
                 eps=1e-5, delta_limit=(0.0, float("inf")), rate=1, chunk=None, act=F.silu):
        super().__init__()
        for name, value in dict(width=width, heads=heads, head_width=head_width, states=states, taps=taps).items():
            check_count(value, name)
        check(is_count(groups) and heads % groups == 0, "groups", groups, f"a divisor of heads={heads}")
        check(is_number(rate) and rate > 0, "rate", rate, "a number above 0")
        check(chunk is None or is_count(chunk), "chunk", chunk, "None or a whole number of at least 1")
        check(isinstance(delta_limit, (tuple, list)) and len(delta_limit) == 2, "delta_limit", delta_limit, "a pair (least, most) of numbers")
        inner, mixed = heads * head_width, heads * head_width + 2 * groups * states
        self.by_head, self.chunk, self.act, self.rate, self.delta_limit = (heads, groups, groups), chunk, act, rate, delta_limit
        self.sizes, self.mixed_sizes = (inner, mixed, heads), (inner, groups * states, groups * states)
        self.in_proj = nn.Linear(width, inner + mixed + heads, bias=bias)
        self.conv1d = nn.Conv1d(mixed, mixed, taps, groups=mixed, bias=conv_bias)
        self.dt_bias = nn.Parameter(inverse_softplus_uniform(heads))
        self.A_log = nn.Parameter((torch.rand(heads) * 15 + 1).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=eps)
        self.out_proj = nn.Linear(inner, width, bias=bias)

    def scan_inputs(self, x, conv_state, lengths=None):
        """x (B, T, width) → what the scan needs: u, Δ, A, B, C; and the gate and the new conv state."""
        gate, mixed, delta = self.in_proj(x).split(self.sizes, -1)
        mixed, conv_state = causal_conv(mixed, self.conv1d.weight, self.conv1d.bias, conv_state, self.act, lengths)
        u, B, C = (v.unflatten(-1, (n, -1)) for v, n in zip(mixed.split(self.mixed_sizes, -1), self.by_head, strict=True))
        delta = self.rate * self.time_step(delta + self.dt_bias, lengths, self.delta_limit)
        return (u, delta, -torch.exp(self.A_log), B, C), gate, conv_state

    def finish(self, y, u, gate):
        """Skip, gate, normalisation, output projection."""
        return self.out_proj(self.norm(torch.addcmul(y, u, self.D[:, None].to(u.dtype)).flatten(-2) * F.silu(gate)))


class AttentionLayer(nn.Module):
    """Causal multi-head self-attention: x (B, T, width) → (y, ()); `step` appends to a key-value cache.

    The empty state knows nothing of x: `forward` refuses to go on from it."""

    def __init__(self, width, heads):
        super().__init__()
        check(is_count(heads) and check_count(width, "width") % heads == 0, "heads", heads, f"a divisor of width={width}")
        self.heads = heads
        self.qkv, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def split(self, x):
        """x (B, T, width) → q, k, v, each (B, heads, T, head width)."""
        return (v.unflatten(-1, (self.heads, -1)).transpose(1, 2) for v in self.qkv(x).chunk(3, -1))

    def forward(self, x, state=None):
        check(state is None, "state", type(state).__name__, "None: attention goes on by `step`, from a cache")
        y = F.scaled_dot_product_attention(*self.split(x), is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2)), ()

    def step(self, x, cache, t):
        """Token t, x (B, width); cache (2, B, heads, ≥ t + 1, head width), written in place. Returns y (B, width)."""
        check(isinstance(cache, torch.Tensor) and cache.dim() == 5, "cache", getattr(cache, "shape", type(cache).__name__), "a tensor (2, B, heads, T, head width)")
        check(is_count(t, 0) and t < cache.shape[3], "t", t, f"a whole number from 0 to {cache.shape[3] - 1}, the last place of the cache")
        q, k, v = self.split(x[:, None])
        cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
        y = F.scaled_dot_product_attention(q, cache[0, :, :, :t + 1], cache[1, :, :, :t + 1])
        return self.out_proj(y.flatten(1))


def block_from_transformers(mixer, config):
    """Our block with the weights of a transformers MambaMixer or Mamba2Mixer; ValueError for another model type."""
    check(config.model_type in ("mamba", "mamba2"), "model_type", config.model_type, "mamba, mamba2")
    common = dict(states=config.state_size, taps=config.conv_kernel, bias=config.use_bias,
                  conv_bias=config.use_conv_bias, act=mixer.act)
    if config.model_type == "mamba":
        block = MambaBlock(config.hidden_size, expand=config.intermediate_size / config.hidden_size,
                           rank=int(config.time_step_rank), **common)
    else:
        block = Mamba2Block(config.hidden_size, config.num_heads, config.head_dim, groups=config.n_groups,
                            eps=config.layer_norm_epsilon, delta_limit=tuple(config.time_step_limit), **common)
    block.load_state_dict(mixer.state_dict())
    return block.to(mixer.in_proj.weight)


class MambaLM(nn.Module):
    """A language model of any mixers: ids (B, T) → logits (B, T, vocabulary) and one state per layer.

    positions: length up to which a learned position is added, as attention needs it; 0: none. A model with positions reads
    a sequence at once: its states do not say where they stopped; so does one with an AttentionLayer. residual_in_fp32: what
    the layers add up to stays in float32 at least when the model is cast below it. ValueError for what cannot go on."""

    def __init__(self, vocabulary, width, mixers, eps=1e-5, positions=0, residual_in_fp32=False):
        super().__init__()
        mixers = check_sizes(vocabulary, width, list(mixers), positions)
        self.residual_in_fp32, self.embeddings = residual_in_fp32, nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(positions, width)) if positions else None
        self.layers = nn.ModuleList(nn.ModuleDict(dict(norm=nn.RMSNorm(width, eps=eps), mixer=m)) for m in mixers)
        self.norm_f = nn.RMSNorm(width, eps=eps)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def _through(self, how, x, states):
        check(states is None or len(states) == len(self.layers), "len(states)", len(states or ()), f"None, or one for each of {len(self.layers)} layers")
        after, x = [], x.to(torch.promote_types(x.dtype, torch.float32)) if self.residual_in_fp32 else x
        normed = lambda norm: F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps).to(norm.weight.dtype)
        for layer, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            y, state = how(layer["mixer"])(normed(layer["norm"]), state)
            x = x + y
            after.append(state)
        return self.lm_head(normed(self.norm_f)), after

    def forward(self, ids, states=None):
        x = self.embeddings(check_ids(ids, "(B, T)"))
        if self.positions is not None:
            check(states is None, "states", "given", "None, since this model has learned positions")
            check(ids.shape[1] <= len(self.positions), "ids.shape", tuple(ids.shape), f"(B, T) with T ≤ {len(self.positions)}, the positions")
            x = x + self.positions[:ids.shape[1]]
        return self._through(lambda mixer: mixer, x, states)

    def step(self, ids, states=None):
        """ids (B,): one token each → logits (B, vocabulary), states."""
        check(self.positions is None, "positions", "learned", "0 (none), for one token at a time")
        stuck = any(isinstance(layer["mixer"], AttentionLayer) for layer in self.layers)
        check(not stuck, "mixers", "AttentionLayer", "mixers with a state, for one token at a time: attention steps from a cache of its own")
        return self._through(lambda mixer: mixer.step, self.embeddings(check_ids(ids, "(B,)")), states)

    @torch.no_grad()
    def generate(self, ids, tokens):
        """Greedy continuation of ids (B, T ≥ 1) by `tokens` tokens, 0 or more; returns (B, T + tokens)."""
        check(ids.dim() == 2 and ids.shape[1] > 0, "ids.shape", tuple(ids.shape), "(B, T) with T ≥ 1")
        check_count(tokens, "tokens", least=0)
        out, states = [ids], None
        for i in range(tokens):
            logits, states = self.step(out[-1][:, 0], states) if i else self(ids)
            out.append((logits if i else logits[:, -1]).argmax(-1, keepdim=True))
        return torch.cat(out, 1)


def model_from_transformers(model):
    """Our MambaLM with the weights of a transformers MambaForCausalLM or Mamba2ForCausalLM; ValueError for another model.

    As there, the embeddings are tied to the output or not, and the residual is in float32 or not."""
    check(hasattr(model, "backbone") and hasattr(model, "lm_head"), "model", type(model).__name__, "MambaForCausalLM, Mamba2ForCausalLM")
    config = model.config
    blocks = [block_from_transformers(layer.mixer, config) for layer in model.backbone.layers]
    ours = MambaLM(config.vocab_size, config.hidden_size, blocks, config.layer_norm_epsilon, residual_in_fp32=config.residual_in_fp32)
    if model.lm_head.weight is model.backbone.embeddings.weight:
        ours.lm_head.weight = ours.embeddings.weight
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in model.state_dict().items()})
    return ours.to(model.lm_head.weight).eval()
