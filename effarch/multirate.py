# Written by `python -m lab.build` from ssm/mrss_proxy_experiment.ipynb, where each part is explained: edit it there.
"""Layers whose channels run at several rates, and the layers they are compared with.

Baseline, GatedBaseline, MRSS   the original experiment
SplitMRSS                       channels split by rate
LowRankBaseline, DilatedTwin    controls: equal compute; equal weights and receptive field
DepthwiseCausalConv1d           the filter in all of them, in one of CONV_FORMS"""

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, is_count, is_number


def scan_flops(batch, steps, dim, kernel):
    """FLOPs of one filter and one projection: 2·B·T·D·K + 2·B·T·D²."""
    return 2 * batch * steps * dim * (kernel + dim)


def mrss_flops(batch, steps, dim, kernel, r):
    """FLOPs of MRSS at rate r: both branches and the dense gate, 2·B·T·D²."""
    low = scan_flops(batch, -(-steps // r), dim, kernel)
    return low + scan_flops(batch, steps, dim, kernel) + 2 * batch * steps * dim * dim


def shift_add_conv(x, weight):
    """Depthwise causal convolution, as the formula reads: y[t] = Σ_j w[j] · x[t − K + 1 + j].

    x: (B, T, C); weight: (C, K), the last tap weighs the current step. Returns (B, T, C)."""
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return sum(weight[:, j] * padded[:, j : j + x.shape[1]] for j in range(weight.shape[1]))


def stock_conv(x, weight):
    """The same through `conv1d`, which wants time last: two transposed copies around the convolution."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.conv1d(padded, weight[:, None], groups=weight.shape[0]).transpose(1, 2)


def fast_length(least):
    """The smallest 2^a · 3^b · 5^c of at least `least`: an FFT of most other lengths takes several times longer."""
    odd = [3**b * 5**c for b in range(21) for c in range(14) if 3**b * 5**c < 2 * least]
    return min(q << (-(-least // q) - 1).bit_length() for q in odd)


def fft_conv(x, weight):
    """The same as a product of spectra, padded so that nothing wraps around."""
    weight = weight[:, -x.shape[1] :]  # older taps see only the zeros before the start
    size = fast_length(x.shape[1] + weight.shape[1] - 1)
    wide = lambda v: v.to(torch.promote_types(v.dtype, torch.float32))  # no FFT of half precision on a CPU
    spectrum = torch.fft.rfft(wide(x), size, dim=1) * torch.fft.rfft(wide(weight).flip(1).T, size, dim=0)
    return torch.fft.irfft(spectrum, size, dim=1)[:, : x.shape[1]].to(x.dtype)


def device_kind(x):
    """The kind of device that autocast knows: of a tensor without values, a CPU."""
    return "cpu" if x.is_meta else x.device.type


def image_conv(x, weight):
    """Correlate (B, T, C) with (C, K) without padding, as an image of height 1 whose channels lie last."""
    image = x.transpose(1, 2)[:, :, None]
    return F.conv2d(image, weight[:, None, None], groups=weight.shape[0])[:, :, 0].transpose(1, 2)


class ChannelsLastConv(torch.autograd.Function):
    """(x, weight) → y, all three passes in the channels-last form. Autocast stays out: `channels_last_conv` casts before."""

    @staticmethod
    def forward(x, weight):
        with torch.autocast(device_kind(x), enabled=False):
            return image_conv(F.pad(x, (0, 0, weight.shape[1] - 1, 0)), weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with torch.autocast(device_kind(x), enabled=False):
            later = F.pad(grad, (0, 0, 0, weight.shape[1] - 1))
            return image_conv(later, weight.flip(1)), kernel_gradient(x, grad, weight.shape[1])


def kernel_gradient(x, grad, taps, chunk=256, lanes=512):
    """Gradient of the kernel, (C, K): Σ over batch and t of grad[t] · x[t − K + 1 + j], `chunk` steps at a time.

    Narrow layers take several sequences at once as further channels, up to `lanes`."""
    width, group, total = x.shape[2], max(1, lanes // x.shape[2]), 0
    if not len(x):
        return x.new_zeros(width, taps)
    for some, slopes in zip(x.split(group), grad.split(group), strict=True):
        bank = F.pad(some.transpose(0, 1).flatten(1), (0, 0, taps - 1, 0))  # (K − 1 + T, sequences · C)
        kernels = slopes.transpose(0, 1).flatten(1).split(chunk)
        for begin, kernel in zip(range(0, x.shape[1], chunk), kernels, strict=True):
            window = bank[None, begin : begin + len(kernel) + taps - 1]
            total = total + image_conv(window, kernel.T)[0].unflatten(1, (-1, width)).sum(1)
    return total.T


def channels_last_conv(x, weight):
    """The channels-last form with its own backward pass, in the dtype of x or of autocast.

    Half precision on a CPU is computed in float32: faster, and on processors with matrix units (AMX) the half-precision
    kernel for this layout has been seen not to return."""
    kind, dtype = device_kind(x), x.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(kind)
    inner = torch.float32 if kind == "cpu" and dtype in (torch.float16, torch.bfloat16) else dtype
    return ChannelsLastConv.apply(x.to(inner), weight.to(inner)).to(dtype)


CONV_FORMS = {"stock": stock_conv, "channels_last": channels_last_conv, "fft": fft_conv}
FAST = {"cpu": "channels_last", "cuda": "stock"}


def check_sequence(x, dim):
    """ValueError unless x is (B, T, dim) with T ≥ 1."""
    right = x.dim() == 3 and x.shape[1] > 0 and x.shape[2] == dim and x.is_floating_point()
    check(right, "x", (tuple(x.shape), x.dtype), f"(B, T, {dim}) with T ≥ 1, floating-point numbers")


class DepthwiseCausalConv1d(nn.Module):
    """One causal filter of `kernel` taps a channel, no bias, weights N(0, 0.02²): (B, T, dim) → (B, T, dim).

    form: a name in CONV_FORMS, or None for the device's in FAST (see `with_form`). ValueError for a size below 1."""

    form = None

    def __init__(self, dim, kernel):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(check_count(dim, "dim"), check_count(kernel, "kernel")) * 0.02)

    def forward(self, x):
        check_sequence(x, len(self.weight))
        return CONV_FORMS[self.form or FAST.get(x.device.type, "stock")](x, self.weight)


def with_form(module, form):
    """Set the form of every filter in `module` (None: the device's), and return the module. ValueError for an unknown one."""
    check(form is None or form in CONV_FORMS, "form", form, f"None or one of {', '.join(CONV_FORMS)}")
    for layer in module.modules():
        if isinstance(layer, DepthwiseCausalConv1d):
            layer.form = form
    return module


def projection(width, dim):
    """Linear map of the channels without bias, weights N(0, 0.02²)."""
    layer = nn.Linear(width, dim, bias=False)
    nn.init.normal_(layer.weight, std=0.02)
    return layer


class Baseline(nn.Module):
    """y = relu(W · conv(x)), one scan at the full rate: (B, T, dim) → (B, T, dim). ValueError for a size below 1."""

    def __init__(self, dim, kernel):
        super().__init__()
        self.conv, self.project = DepthwiseCausalConv1d(dim, kernel), projection(dim, dim)

    def forward(self, x):
        return F.relu_(self.project(self.conv(x)))


class GatedBaseline(Baseline):
    """y = σ(W_g x + b) ⊙ scan(x): Baseline with the dense gate of MRSS, (B, T, dim) → (B, T, dim)."""

    def __init__(self, dim, kernel):
        super().__init__(dim, kernel)
        self.gate = nn.Linear(dim, dim)

    def forward(self, x):
        check_sequence(x, self.gate.in_features)
        return torch.sigmoid(self.gate(x)) * super().forward(x)


class MRSS(nn.Module):
    """y = g ⊙ up(scan_low(x[::r])) + (1 − g) ⊙ scan_high(x), g = σ(W_g x + b): (B, T, dim) → (B, T, dim).

    detach_low: as published, no gradient reaches the low branch. ValueError unless r is a whole number of at least 1."""

    runs_on = dict(scan_low="low")

    def __init__(self, dim, kernel, r, detach_low=False):
        super().__init__()
        self.r, self.detach_low = check_count(r, "r"), detach_low
        self.scan_low, self.scan_high = Baseline(dim, kernel), Baseline(dim, kernel)
        self.gate, self.updates_per_step = nn.Linear(dim, dim), 1 + 1 / r

    def forward(self, x):
        check_sequence(x, self.gate.in_features)
        low = self.scan_low(x[:, :: self.r]).repeat_interleave(self.r, dim=1)[:, : x.shape[1]]
        g = torch.sigmoid(self.gate(x))
        return g * (low.detach() if self.detach_low else low) + (1 - g) * self.scan_high(x)


def flops_of(model, batch, steps):
    """Analytic FLOPs of a forward pass of one layer, padding included: 2 · B · Σ weights · the steps they run on.

    The layer's `runs_on` names the parts that do not run on all T steps: 'low' on ⌈T/r⌉, 'blocks' on whole blocks of r; a
    layer with a method `flops(batch, steps)` is asked itself."""
    if hasattr(model, "flops"):
        return model.flops(batch, steps)
    low, where = -(-steps // getattr(model, "r", 1)), getattr(model, "runs_on", {})
    runs = dict(low=low, blocks=low * getattr(model, "r", 1))
    return sum(2 * batch * p.numel() * runs.get(where.get(name.split(".")[0]), steps)
               for name, p in model.named_parameters() if p.dim() == 2)


def causal_pool(x, r):
    """Mean over the r steps that end at 0, r, 2r, … (zeros before the start): (B, T, C) → (B, ⌈T/r⌉, C)."""
    padded = F.pad(x, (0, 0, r - 1, 0))
    return torch.stack([padded[:, j : j + r].mean(1) for j in range(0, x.shape[1], r)], 1)


def split_reference(model, x):
    """SplitMRSS without any shortcut, from the same weights."""
    high = shift_add_conv(x[..., : model.high], model.high_conv.weight)
    low = shift_add_conv(causal_pool(x[..., model.high :], model.r), model.low_conv.weight)
    both = torch.cat([high, low.repeat_interleave(model.r, dim=1)[:, : x.shape[1]]], dim=-1)
    return F.relu(both @ torch.cat([model.high_project.weight, model.low_project.weight], dim=1).T)


class SplitPool(torch.autograd.Function):
    """(B, T, D) → the first `high` channels (B, T, high), and the causal pool of the rest (B, ⌈T/r⌉, D − high)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.high, ctx.r = inputs[0].shape, *inputs[1:]

    @staticmethod
    def forward(x, high, r):
        low = x[..., high:]
        windows = -(-x.shape[1] // r) - 1  # whole windows; the one before holds the first step alone
        pooled = low.new_empty(x.shape[0], windows + 1, low.shape[2])
        pooled[:, 0] = low[:, 0] / r
        if windows:
            pooled[:, 1:] = low[:, 1 : 1 + windows * r].unflatten(1, (windows, r)).mean(2)
        return x[..., :high].contiguous(), pooled

    @staticmethod
    def backward(ctx, grad_high, grad_pooled):
        grad, share = grad_high.new_empty(ctx.shape), grad_pooled / ctx.r
        grad[..., : ctx.high] = grad_high
        low, windows = grad[..., ctx.high :], share.shape[1] - 1
        low[:, 0] = share[:, 0]
        low[:, 1 + windows * ctx.r :] = 0  # steps after the last window
        if windows:
            low[:, 1 : 1 + windows * ctx.r].unflatten(1, (windows, ctx.r)).copy_(share[:, 1:, None])
        return grad, None, None


def project_and_add(project, high, low, r):
    """relu(W_h h + up(low)): high (B, T, C), low (B, ⌈T/r⌉, D) → (B, T, D), in place on the projection."""
    steps, blocks = high.shape[1], low.shape[1]
    if steps < blocks * r:
        high = F.pad(high, (0, 0, 0, blocks * r - steps))
    y = project(high.unflatten(1, (blocks, r)))
    return F.relu_(y.add_(low[:, :, None])).flatten(1, 2)[:, :steps]


class SplitMRSS(nn.Module):
    """Channels split by rate: `low_fraction` of them at T/r with `kernel` taps, the rest at T with kernel/4.

    (B, T, dim) → (B, T, dim), causal. ValueError unless r ≥ 1 and 0 < low_fraction < 1."""

    runs_on = dict(low_conv="low", low_project="low", high_project="blocks")
    updates_per_step = property(lambda self: (self.high + self.low / self.r) / (self.high + self.low))

    def __init__(self, dim, kernel, r, low_fraction):
        super().__init__()
        check(is_number(low_fraction) and 0 < low_fraction < 1, "low_fraction", low_fraction, "a number above 0 and below 1")
        check(is_count(dim, 2), "dim", dim, "a whole number of at least 2, one channel for each rate")
        self.r, self.low = check_count(r, "r"), min(max(round(dim * low_fraction), 1), dim - 1)
        self.high, short = dim - self.low, max(round(check_count(kernel, "kernel") / 4), 1)
        self.high_conv, self.low_conv = DepthwiseCausalConv1d(self.high, short), DepthwiseCausalConv1d(self.low, kernel)
        self.high_project, self.low_project = projection(self.high, dim), projection(self.low, dim)

    def forward(self, x):
        check_sequence(x, self.high + self.low)
        high, low = SplitPool.apply(x, self.high, self.r)
        low = self.low_project(self.low_conv(low))
        return project_and_add(self.high_project, self.high_conv(high), low, self.r)


class LowRankBaseline(nn.Module):
    """y = relu(U V · conv(x)): Baseline with a channel mixing of rank `rank`, (B, T, dim) → (B, T, dim)."""

    def __init__(self, dim, kernel, rank):
        super().__init__()
        self.conv = DepthwiseCausalConv1d(dim, kernel)
        self.down, self.up = projection(dim, check_count(rank, "rank")), projection(rank, dim)

    def forward(self, x):
        return F.relu_(self.up(self.down(self.conv(x))))


class DilatedTwin(SplitMRSS):
    """The weights of SplitMRSS at the full rate: its long filters are dilated by r, nothing is pooled or repeated.

    (B, T, dim) → (B, T, dim); the receptive field of SplitMRSS."""

    runs_on, updates_per_step = dict(low_conv="blocks"), 1.0

    def forward(self, x):
        check_sequence(x, self.high + self.low)
        batch, steps, _ = x.shape
        low = F.pad(x[..., self.high :], (0, 0, 0, -steps % self.r)).unflatten(1, (-1, self.r))
        low = self.low_conv(low.transpose(1, 2).flatten(0, 1))  # r sequences, each of every r-th step
        low = low.unflatten(0, (batch, self.r)).transpose(1, 2).flatten(1, 2)[:, :steps]
        both = torch.cat([self.high_conv(x[..., : self.high].contiguous()), low], -1)
        return F.relu_(F.linear(both, torch.cat([self.high_project.weight, self.low_project.weight], 1)))
