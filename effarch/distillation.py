# Written by `python -m lab.build` from ssm/kernel_distillation.ipynb, where each part is explained: edit it there.
"""Kernel distillation: a trained long convolution as a few factors, or as a small, stable state space.

`distill` compresses a kernel; effarch.decoding decodes with what comes out."""

import math
import warnings
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, is_count, is_number


def causal_conv_naive(x, kernel):
    """y_t = Σ_τ K_τ x_{t-τ} by a loop over taps. x (B, T, D); kernel (L, D) or (L, D, E) → (B, T, D or E)."""
    T, mixes = x.shape[1], kernel.dim() == 3
    y = x.new_zeros(*x.shape[:2], kernel.shape[-1])
    for lag in range(min(T, len(kernel))):
        earlier = x[:, :T - lag]
        y[:, lag:] += earlier @ kernel[lag] if mixes else earlier * kernel[lag]
    return y


def causal_conv(x, kernel):
    """The same by FFT in O(T log T), with room for the tail so that the end does not wrap around into the beginning."""
    T = x.shape[1]
    if kernel.dim() == 2:  # FFTs are fastest along the last axis
        spectrum = torch.fft.rfft(x.transpose(1, 2), 2 * T) * torch.fft.rfft(kernel[:T].T, 2 * T)
        return torch.fft.irfft(spectrum, 2 * T)[..., :T].transpose(1, 2)
    spectrum = torch.fft.rfft(x, 2 * T, dim=1)
    spectrum = torch.einsum("bfd,fde->bfe", spectrum, torch.fft.rfft(kernel[:T], 2 * T, dim=0))
    return torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T]


class S4DKernel(nn.Module):
    """S4D-Lin (Gu et al. 2022, arXiv:2206.11893): A_n = -1/2 + iπn, zero-order hold. Call with a length L → (L, D)."""

    def __init__(self, width, order=16):
        super().__init__()
        check(is_count(order, 2) and order % 2 == 0, "order", order, "an even number of at least 2: modes come in pairs")
        pairs, width = order // 2, check_count(width, "width")
        self.log_step = nn.Parameter(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((pairs, width), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(pairs).float()[:, None].repeat(1, width))
        self.C = nn.Parameter(torch.randn(2, pairs, width) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))

    def modes(self):
        """(log λ, c), both complex (order / 2, D): K_t = Re Σ_n c_n λ_n^t, plus the skip at t = 0."""
        A = torch.complex(-self.log_decay.exp(), self.frequency)
        log_poles = A * self.log_step.exp()
        return log_poles, 2 * torch.complex(*self.C) * (log_poles.exp() - 1) / A

    def forward(self, length):
        log_poles, c = self.modes()
        t = torch.arange(check_count(length, "length"), device=c.device)[:, None, None]
        kernel = (c * torch.exp(log_poles * t)).sum(1).real
        return torch.cat([kernel[:1] + self.skip, kernel[1:]])

    def native(self):
        """The same kernel as a StateSpace, exactly: what it needs to decode as a recurrence."""
        log_poles, c = (part.detach() for part in self.modes())
        return StateSpace(log_poles, c * log_poles.exp(), torch.full(c.shape, 2, device=c.device), self(1)[0].detach())


def hankel_svd_naive(taps, order=None):
    """Singular values (G, m) and right vectors (G, m, m) of the stacked Hankel matrices of taps (G, outputs, 2m-1)."""
    m = (taps.shape[-1] + 1) // 2
    _, S, V = torch.linalg.svd(taps.unfold(-1, m, 1).flatten(1, 2), full_matrices=False)  # of (G, outputs · m, m)
    return S[:, :order], V.mT[..., :order]


def hankel_product(taps, Q):
    """H @ Q without forming H: taps (…, 2m-1), Q (…, m, p) → (…, m, p), by FFT."""
    m = Q.shape[-2]
    spectrum = torch.fft.rfft(taps, 4 * m)[..., None, :] * torch.fft.rfft(Q.flip(-2).mT, 4 * m)
    return torch.fft.irfft(spectrum, 4 * m)[..., m - 1:2 * m - 1].mT


def hankel_svd(taps, order, passes=3):
    """The `order` leading singular values (G, order) and right vectors (G, m, order) for taps (G, outputs, 2m-1).

    Exact for m ≤ 128; else randomised subspace iteration with 16 extra directions."""
    m = (taps.shape[-1] + 1) // 2
    if m <= 128:
        return hankel_svd_naive(taps, order)
    draw = torch.Generator().manual_seed(0)
    Q = torch.randn(len(taps), m, min(m, order + 16), generator=draw, dtype=torch.float64).to(taps)
    for _ in range(passes):
        image = hankel_product(taps, Q[:, None])  # (G, outputs, m, p)
        Q = torch.linalg.qr(hankel_product(taps, image).sum(1))[0]
    _, S, V = torch.linalg.svd(hankel_product(taps, Q[:, None]).flatten(1, 2), full_matrices=False)
    return S[:, :order], (Q @ V.mT)[..., :order]


class Distilled(nn.Module):
    """A compressed kernel. Call with a length → (length, …), differentiable in its few parameters.

    method, rank: how it was made; kernel_error: ‖K̂ - K‖ / ‖K‖; error: the same in what the method minimises, which
    differs for 'weighted' (relative output error); note: what stood in the way, such as stability."""

    method, rank, error, kernel_error, note = "", 0, float("nan"), float("nan"), ""

    def __init__(self, *given, **parts):
        """parts: {name: tensor} to check. ValueError unless they are tensors of numbers, none empty; a Distilled is made by `distill`."""
        super().__init__()
        check(type(self) is not Distilled and not given, "Distilled", given, "distill(kernel, method), which makes one, or a LowRank, Cut or StateSpace")
        for name, part in parts.items():
            real = isinstance(part, torch.Tensor) and (part.is_floating_point() or part.is_complex()) and part.dim() > 0 and part.numel() > 0
            check(real, name, (tuple(part.shape), part.dtype) if isinstance(part, torch.Tensor) else part, "a tensor of real or complex numbers, not empty")

    def stored(self):
        """Numbers to store."""
        return sum(p.numel() for p in self.parameters())


class LowRank(Distilled):
    """K_t = Σ_r u_r(t) M_r. time (L, r), rest (r, …)."""

    def __init__(self, time, rest):
        super().__init__(time=time, rest=rest)
        check(time.dim() == 2 and time.shape[1] == len(rest), "time, rest", (tuple(time.shape), tuple(rest.shape)), "(L, r) and (r, …)")
        self.time, self.rest = nn.Parameter(time), nn.Parameter(rest)

    def forward(self, length):
        kernel = torch.tensordot(self.time[:check_count(length, "length")], self.rest, dims=1)
        return torch.cat([kernel, kernel.new_zeros(length - len(kernel), *kernel.shape[1:])])


class Cut(Distilled):
    """The first taps only. taps (r, …)."""

    def __init__(self, taps):
        super().__init__(taps=taps)
        self.taps = nn.Parameter(taps)

    def forward(self, length):
        return torch.cat([self.taps[:check_count(length, "length")], self.taps.new_zeros(max(0, length - len(self.taps)), *self.taps.shape[1:])])


class StateSpace(Distilled):
    """K_0 = skip, K_t = Re Σ_n c_n λ_n^{t-1}, stable whatever a fine-tune does.

    log_poles: complex (modes, D), or (modes,) if all channels share them; kind, of the same shape: 2 for one of a complex
    pair, 1 for a real pole, 0 for an unused one. coefficients: complex (modes, D) or (modes, D, E). skip: (D,) or (D, E)."""

    def __init__(self, log_poles, coefficients, kind, skip):
        super().__init__(log_poles=log_poles, coefficients=coefficients, skip=skip)
        shapes = {name: tuple(getattr(part, "shape", ())) for name, part in dict(log_poles=log_poles, coefficients=coefficients, kind=kind, skip=skip).items()}
        modes, c = shapes["log_poles"], shapes["coefficients"]
        fits = modes == shapes["kind"] == c[:len(modes)] and shapes["skip"] == c[1:] and (len(modes), len(c)) in ((2, 2), (1, 2), (1, 3))
        check(fits and log_poles.is_complex() and coefficients.is_complex(), "shapes", shapes,
              "complex log_poles (modes, D) or (modes,), kind as they, complex coefficients (modes, D) or (modes, D, E), skip (D,) or (D, E)")
        self.log_decay = nn.Parameter((-log_poles.real).clamp_min(1e-15).log())
        self.angle = nn.Parameter(log_poles.imag.clone())
        self.real, self.imag = nn.Parameter(coefficients.real.clone()), nn.Parameter(coefficients.imag.clone())
        self.skip = nn.Parameter(skip.clone())
        self.register_buffer("kind", kind)

    def log_poles(self):
        """log λ, complex; the angle of a real pole does not move."""
        return torch.complex(-self.log_decay.exp(), torch.where(self.kind > 1, self.angle, self.angle.detach()))

    def coefficients(self):
        """c, complex; real where the pole is real, 0 where there is none."""
        kind = self.kind.reshape(*self.kind.shape, *[1] * (self.real.dim() - self.kind.dim()))
        return torch.complex(self.real * (kind > 0), self.imag * (kind > 1))

    def forward(self, length):
        log, c = self.log_poles(), self.coefficients()
        t = torch.arange(check_count(length, "length") - 1, device=c.device).to(self.angle.dtype).reshape(-1, *[1] * log.dim())
        powers = torch.polar(torch.exp(log.real * t), log.imag * t)
        tail = (powers * c).sum(1) if c.dim() == log.dim() else torch.tensordot(powers, c, dims=1)
        return torch.cat([self.skip[None], tail.real])

    def stored(self):
        """A pair needs two numbers for its pole and two for each coefficient, a real pole one of each."""
        states = int(self.kind.sum())
        return states + states * self.real.numel() // self.kind.numel() + self.skip.numel()


def svd_method(kernel, unstable=None):
    """Truncated SVD of the kernel reshaped to L × D (per channel) or L × D² (dense)."""
    U, S, V = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
    return lambda rank: LowRank(U[:, :rank] * S[:rank], V[:rank].unflatten(1, kernel.shape[1:]).clone()), len(S)


def cut_method(kernel, unstable=None):
    """Keep the first `rank` taps: a shorter convolution."""
    return lambda rank: Cut(kernel[:rank].clone()), len(kernel)


def input_gram(x, taps):
    """G_ij = Σ_{b,t,d} x_{t-i} x_{t-j} (taps, taps) for x (B, T, D), by running sums: G_ij = G_{i+1,j+1} + the last term."""
    backwards = x.double().flip(1).transpose(1, 2).flatten(0, 1)  # (B·D, T), the last input first
    G = backwards.T @ backwards
    for i in reversed(range(len(G) - 1)):
        G[i, :-1] += G[i + 1, 1:]
    unseen = max(0, taps - len(G))  # taps beyond the longest input: zero
    return F.pad(G[:taps, :taps], (0, unseen, 0, unseen))


def weighted_method(kernel, unstable=None, inputs=None):
    """Truncated SVD of G^(1/2) K, weighted back: little output error on inputs (B, T, D) that the layer sees; the least where
    all their channels have one autocorrelation, G.

    The truncation-aware whitening of SVD-LLM (Wang et al. 2024, arXiv:2403.07378), over lags instead of features."""
    shape = None if inputs is None else tuple(inputs.shape)
    check(shape is not None and len(shape) == 3 and shape[2] == kernel.shape[1], "inputs", shape,
          f"(B, T, {kernel.shape[1]}), what the layer sees in training, for method 'weighted'")
    check(bool(inputs.isfinite().all() and (inputs != 0).any()), "inputs", "NaN, infinite or all zero", "finite values")
    values, vectors = torch.linalg.eigh(input_gram(inputs, len(kernel)))
    root = values.clamp_min(1e-8 * values[-1]).sqrt()  # lags that the inputs never excite keep a little weight
    half, inverse = (vectors * root) @ vectors.T, (vectors / root) @ vectors.T
    U, S, V = torch.linalg.svd(half @ kernel.flatten(1), full_matrices=False)

    def fit(rank):
        return LowRank(inverse @ (U[:, :rank] * S[:rank]), V[:rank].unflatten(1, kernel.shape[1:]).clone())
    fit.weigh = lambda k: causal_conv(inputs.double(), k)  # the error is that of the outputs, not of the weighted kernel
    return fit, len(S)


def hankel_tail(taps, S):
    """Predicted relative error at order 1 … p: √(Σ_{i>n} σ_i² / Σ σ_i²), all channels together. → (p,)."""
    m = (taps.shape[-1] + 1) // 2
    often = torch.cat([torch.arange(1, m + 1), torch.arange(m - 1, 0, -1)]).to(taps)
    total = (taps.square() * often).sum()
    return ((total - S.square().sum(0).cumsum(0)).clamp_min(0) / total).sqrt()


def shift_poles(V):
    """(log λ, kind) of the one-step shift of V (m, n): complex (modes,), one of each pair, and 1 or 2 states each."""
    poles = torch.linalg.eigvals(torch.linalg.lstsq(V[:-1], V[1:], driver="gels").solution)
    poles = poles[poles.imag >= 0]
    return torch.complex(poles.abs().clamp_min(1e-12).log(), poles.angle()), 1 + (poles.imag > 0).long()


def pack(found):
    """Lists of (log λ, kind) of different lengths as two tensors (G, modes); kind 0 is no mode."""
    modes = max(len(log) for log, _ in found)
    log = torch.stack([torch.cat([log, log.new_zeros(modes - len(log))]) for log, _ in found])
    return log, torch.stack([F.pad(kind, (0, modes - len(kind))) for _, kind in found])


def unit_columns(A):
    """A (G, rows, columns) with columns of norm 1 (or 0), and their norms (G, 1, columns)."""
    scale = A.norm(dim=1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    return A / scale, scale


def eliminate(log, kind, taps, rounding):
    """The best coefficients for given poles, by QR in float64. log, kind (G, modes); taps (G, T, C), K_1 first.

    → powers λ^t (G, T, modes), an orthonormal basis of what they span, c (G, modes, C), and what is left of the taps; both
    with a row more for each column: the error that rounding will give it. That keeps coefficients from growing huge."""
    modes, T = log.shape[1], taps.shape[1]
    t = torch.arange(T, device=taps.device, dtype=taps.dtype)[:, None]
    powers = torch.polar(torch.exp(log.real[:, None] * t), log.imag[:, None] * t)
    basis, scale = unit_columns(torch.cat([powers.real * (kind > 0)[:, None], -powers.imag * (kind > 1)[:, None]], -1))
    lost = rounding * (1 + log.abs() / (log.real.abs() + 1 / T))  # of c, and of λ over the time that a mode lives
    basis = torch.cat([basis, torch.diag_embed(lost.repeat(1, 2))], 1)
    taps = F.pad(taps, (0, 0, 0, 2 * modes))
    span, R = torch.linalg.qr(basis)
    c = torch.linalg.solve_triangular(R, span.mT @ taps, upper=True)
    return powers, span, torch.complex(*(c / scale.mT).split(modes, 1)), taps - basis @ c


def refine(log, kind, taps, rounding, ceiling, rounds=12):
    """Move the poles to a smaller error with Re log λ ≤ ceiling (G, modes); → (log, error (G,)). Shapes as `eliminate`."""
    wrapped = lambda angle: torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    bounded = lambda z: torch.complex(torch.minimum(z.real.clamp_min(-20), ceiling), wrapped(z.imag))
    log, (modes, C) = bounded(log), (log.shape[1], taps.shape[2])
    t = torch.arange(taps.shape[1], device=taps.device, dtype=taps.dtype)[:, None, None]
    state = eliminate(log, kind, taps, rounding)
    error, damping = state[3].norm(dim=(1, 2)), taps.new_full((len(taps), 1), 1e-2)
    for _ in range(rounds):
        powers, span, c, left = state
        slope = t * powers[:, :, None] * c.mT[:, None]  # (G, T, C, modes)
        J = torch.cat([slope.real, -slope.imag * (kind > 1)[:, None, None]], -1).flatten(2)
        J = F.pad(J, (0, 0, 0, 2 * modes))
        J = (J - span @ (span.mT @ J)).unflatten(2, (C, -1)).flatten(1, 2)
        (J, scale), left = unit_columns(J), left.flatten(1)[..., None]
        stuck = (log.real >= ceiling) & ((J.mT @ left)[:, :modes, 0] > 0)  # would leave if it could
        Q, R = torch.linalg.qr(J * ~F.pad(stuck, (0, modes))[:, None])
        U, s, V = torch.linalg.svd(R)
        step = V.mT @ ((s / (s * s + damping))[..., None] * (U.mT @ (Q.mT @ left))) / scale.mT
        new = bounded(log + torch.complex(*step[..., 0].chunk(2, 1)))
        trial = eliminate(new, kind, taps, rounding)
        wrong = trial[3].norm(dim=(1, 2))
        better = wrong < error
        for old, fresh in zip((log, error, *state), (new, wrong, *trial), strict=True):
            old[better] = fresh[better]
        damping = (damping * torch.where(better, 0.25, 4.0)[:, None]).clamp(1e-20, 1e8)
    return log, error


def spare_poles(log, kind, order, length):
    """Fill up to `order` states with damped modes in the widest gaps between the angles; → (log, kind)."""
    top = max([2 / length] + (1.1 * log.imag[kind == 2]).tolist())
    while (left := order - int(kind.sum())) > 0:
        taken = torch.cat([log.imag[log.imag < top], log.imag.new_tensor([0, top])]).sort().values
        gap = taken.diff().argmax()
        angle = (taken[gap] + taken[gap + 1]) / 2 * (left > 1)  # a single state is a real pole
        log = torch.cat([log, torch.complex(torch.full_like(angle, -2 / length), angle)[None]])
        kind = torch.cat([kind, kind.new_tensor([min(left, 2)])])
    return log, kind



def walk_in(log, kind, taps, rounding, stages=10, rounds=4):
    """Bring poles inside the unit circle in stages, refitting all of them on the way; as `refine`."""
    outside = log.real.clamp_min(0)
    for stage in reversed(range(stages)):
        log, error = refine(log, kind, taps, rounding, outside * stage / stages, rounds if stage else 10 * rounds)
    return log, error


def stable_modes(found, taps, order, rounding):
    """Stable poles near those found (a list of (log, kind), one for each of taps (G, T, C)), of the least error.

    → (list of (log, kind), for how many groups poles outside the circle would halve the error)."""
    log, kind = pack(found)
    free = eliminate(log, kind, taps, rounding)[3].norm(dim=(1, 2))
    log, error = refine(log, kind, taps, rounding, torch.zeros_like(log.real))
    best = [(new[:len(k)], k) for new, (_, k) in zip(log, found, strict=True)]
    hard = (error > 2 * free + 1e-12 * taps.norm(dim=(1, 2))).nonzero()[:, 0].tolist()
    if hard:
        more = [spare_poles(*found[i], order, taps.shape[1]) for i in hard]
        walked, left = walk_in(*pack(more), taps[hard], rounding)
        for i, new, (_, k), e in zip(hard, walked, more, left, strict=True):
            if e < error[i]:
                best[i], error[i] = (new[:len(k)], k), e
    return best, int((error > 2 * free + 0.01 * taps.norm(dim=(1, 2))).sum())


def hankel_method(kernel, unstable="mend", largest=32):
    """Balanced truncation to a stable diagonal state space; rank is the order n (a complex pair counts two).

    Per-channel kernels get poles of their own; a dense kernel gets poles shared by all pairs of channels, found from
    the time factors of its SVD, which keeps its decode state at n D numbers."""
    eps = torch.finfo(kernel.dtype).eps
    kernel, m = kernel.double(), len(kernel) // 2
    largest, dense, rest = min(largest, m - 1), kernel.dim() == 3, kernel[1:].double().flatten(1)
    if dense:
        U, S, _ = torch.linalg.svd(rest, full_matrices=False)
        targets = (U * S)[:, :largest][None]  # one group with many outputs
    else:
        targets = rest.T[..., None].contiguous()  # (D, T, 1): a group per channel
    taps = targets.mT[..., :2 * m - 1]
    S, V = hankel_svd(taps, largest)

    def fit(order):
        states = [max(1, int((s[:order] > 4 * eps * s[0]).sum())) for s in S]  # smaller values are rounding
        found = [shift_poles(v[:, :n]) for v, n in zip(V, states, strict=True)]
        far = max(log.real.max().item() for log, _ in found)
        if unstable == "reject" and far > 1e-9:  # nearer to the circle is rounding
            raise ValueError(f"kernel: its state space of order {order} has an unstable pole, |λ| = {math.exp(far):.6f}; "
                             "allowed: |λ| ≤ 1, or unstable='mend'")
        best, lost = stable_modes(found, targets, order, eps)
        log, kind = pack(best)
        c = eliminate(log, kind, rest[None] if dense else targets, eps)[2]
        form = StateSpace(log[0], c[0].unflatten(1, kernel.shape[1:]), kind[0], kernel[0]) if dense else StateSpace(
            log.T, c[..., 0].T, kind.T, kernel[0])
        form.note = f"poles outside the unit circle would halve the error of {lost} of {len(S)} kernels" if lost else ""
        return form
    fit.predicted, fit.spectrum = hankel_tail(taps, S), S
    return fit, largest


METHODS = {"svd": svd_method, "weighted": weighted_method, "hankel": hankel_method, "cut": cut_method}


def prepare(kernel, method, unstable="mend", inputs=None):
    """(fit, largest rank) of a method for a kernel (L, D) or (L, D, E); `fit(rank)` gives a Distilled with its error.

    inputs (B, T, D): what the layer sees in training; only method 'weighted' uses them, and needs them."""
    check(method in METHODS, "method", method, ", ".join(METHODS))
    check(unstable in ("mend", "reject"), "unstable", unstable, "mend, reject")
    check(isinstance(kernel, torch.Tensor), "kernel", type(kernel).__name__, "a torch.Tensor (L, D) or (L, D, E)")
    check(kernel.dim() in (2, 3) and len(kernel) >= 4, "kernel shape", tuple(kernel.shape), "(L, D) or (L, D, E), L ≥ 4")
    kinds = (torch.float32, torch.float64) if method == "hankel" else (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    check(kernel.dtype in kinds, "kernel dtype", kernel.dtype, " or ".join(map(str, kinds)) + f" for {method!r}")
    bad = int((~kernel.isfinite()).sum())
    check(bad == 0, "kernel", f"{bad} values that are NaN or infinite", "finite values")
    exact = kernel.detach().double()
    check(exact.norm() > 0, "kernel", "all zero", "a kernel with a value other than 0")
    seen = {"inputs": inputs} if method == "weighted" else {}
    fit, largest = METHODS[method](kernel.detach() if method == "hankel" else exact, unstable, **seen)
    weigh = getattr(fit, "weigh", lambda kernel: kernel)
    relative = lambda wrong, right: (wrong.norm() / right.norm()).item()

    @lru_cache(maxsize=None)
    def measured(rank):
        form = fit(rank).to(kernel.dtype)
        with torch.no_grad():
            wrong = form(len(exact)).double() - exact
            form.error, form.kernel_error = relative(weigh(wrong), weigh(exact)), relative(wrong, exact)
        form.method, form.rank = method, rank
        return form
    measured.predicted, measured.spectrum = (getattr(fit, name, None) for name in ("predicted", "spectrum"))
    return measured, largest


def each_rank(fit, largest, tolerance):
    """The first form whose error is at most the tolerance, or the best of all ranks; those whose poles are refused do not count."""
    forms, refused = [], None
    for rank in range(1, largest + 1):
        try:
            forms.append(fit(rank))
        except ValueError as error:
            refused = error
            continue
        if forms[-1].error <= tolerance:
            return forms[-1]
    if not forms:
        raise refused
    return min(forms, key=lambda form: form.error)


def smallest_rank(fit, largest, tolerance, falls=True):
    """The Distilled of the smallest rank with error ≤ tolerance, by bisection; ValueError if no rank is enough.

    falls: whether the error falls with the rank; a state space's need not: then all ranks are tried, the smallest first."""
    best = fit(largest) if falls else each_rank(fit, largest, tolerance)
    if best.error > tolerance:
        raise ValueError(f"tolerance={tolerance!r} is not allowed; allowed for method {best.method!r} on this kernel: "
                         f"at least {best.error:.3g}, reached at rank {best.rank}")
    low, high = 0 if falls else best.rank - 1, best.rank  # fails at low, works at high
    while high - low > 1:
        middle = (low + high) // 2
        form = fit(middle)
        low, high, best = (low, middle, form) if form.error <= tolerance else (middle, high, best)
    return best


def distill(kernel, method, rank=None, tolerance=None, unstable="mend", inputs=None):
    """Compress a kernel (L, D) or (L, D, E) after training; returns a Distilled (call it with a length).

    method: 'svd', 'weighted', 'hankel' (a state space) or 'cut'. Give either `rank` or `tolerance` (relative error; the
    smallest sufficient rank is found). 'weighted' needs inputs (B, T, D) that the layer sees in training; its tolerance is on
    the outputs. A state space is always stable: unstable='mend' refits poles outside the unit circle and warns
    where that costs half the accuracy, as for a kernel that grows; 'reject' refuses them. Raises ValueError for a rank
    below 1 or too large, a tolerance out of reach, NaN or infinite kernels, missing or unfit inputs, and rejected poles."""
    check((rank is None) != (tolerance is None), "rank, tolerance", (rank, tolerance), "exactly one of the two")
    check(tolerance is None or (is_number(tolerance) and 0 < tolerance < 1), "tolerance", tolerance,
          "a number between 0 and 1")
    check(rank is None or is_count(rank), "rank", rank, "a whole number of at least 1")
    fit, largest = prepare(kernel, method, unstable, inputs)
    check(rank is None or rank <= largest, "rank", rank, f"at most {largest} for this kernel and method")
    form = fit(rank) if tolerance is None else smallest_rank(fit, largest, tolerance, method != "hankel")
    if form.note:
        warnings.warn(f"distill: {form.note} (order {form.rank})", stacklevel=2)
    return form
