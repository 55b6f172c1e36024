# Written by `python -m lab.build` from ssm/vision_mamba.ipynb, where each part is explained: edit it there.
"""State spaces that see: S4's and S4ND's kernels, Vision Mamba's block on the scan of Mamba-2, and how to prune its tokens."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check, check_count, check_share, is_count
from effarch.scans.blocks import causal_conv, inverse_softplus_uniform
from effarch.scans.scan import readable, ssd


def hippo_legs(states):
    """A (N, N) and B (N,) of HiPPO-LegS, float64: x' = A x + B u holds the Legendre coefficients of the past (S4, eq. 2)."""
    n = torch.arange(check_count(states, "states"), dtype=torch.float64)
    scale = (2 * n + 1).sqrt()
    return -(scale[:, None] * scale).tril(-1) - torch.diag(n + 1), scale


def bilinear(A, B, delta):
    """Ā = (I - Δ/2 A)⁻¹ (I + Δ/2 A) and B̄ = (I - Δ/2 A)⁻¹ Δ B of x' = A x + B u: A (N, N), B (N,)."""
    one = torch.eye(len(A), dtype=A.dtype)
    return torch.linalg.solve(one - delta / 2 * A, torch.cat([one + delta / 2 * A, delta * B[:, None]], 1)).split([len(A), 1], 1)


def kernel_by_powers(A, B, C, delta, length):
    """K_l = C Ā^l B̄, l < length, by its definition: one product with Ā for each step."""
    A, state = bilinear(A, B, delta)
    taps = []
    for _ in range(length):
        taps.append(C @ state[:, 0])
        state = A @ state
    return torch.stack(taps)


def legs_nplr(states):
    """LegS as normal plus low rank, A = V (Λ - p p*) V*: (Λ (N,), p (N,), B in the basis V (N,), V (N, N)), complex128."""
    A, B = hippo_legs(states)
    p = (torch.arange(states, dtype=torch.float64) + 0.5).sqrt()
    skew = A + p[:, None] * p + torch.eye(states) / 2  # A + p pᵀ is normal: -1/2 and a skew-symmetric rest
    imaginary, V = torch.linalg.eigh(-1j * skew)
    to_basis = lambda v: V.mH @ v.to(V.dtype)
    return torch.complex(torch.full_like(imaginary, -0.5), imaginary), to_basis(p), to_basis(B), V


def s4_kernel(poles, p, B, C, delta, length):
    """`kernel_by_powers` of A = Λ - p p* by S4's Cauchy products (arXiv 2111.00396, algorithm 1), (length,) real.

    poles Λ, p, B, C: complex (N,), in the basis where the normal part is diagonal."""
    A, _ = bilinear(torch.diag(poles) - p[:, None] * p.conj(), B, delta)
    C = C - C @ torch.linalg.matrix_power(A, length)  # the generating function, cut off after `length` taps
    z = torch.exp(-2j * math.pi * torch.arange(length, dtype=torch.float64) / length)
    resolvent = 2 / (2 / delta * (1 - z)[:, None] - (1 + z)[:, None] * poles)
    cauchy = lambda left, right: resolvent @ (left * right)
    low_rank = (1 + z) * cauchy(C, p) * cauchy(p.conj(), B) / (2 + (1 + z) * cauchy(p.conj(), p))  # Woodbury
    return torch.fft.ifft(cauchy(C, B) - low_rank).real


def s4d_kernel(A, C, delta, length):
    """S4D's kernel (arXiv 2206.11893): K_l = 2 Re Σ_n C_n (e^(ΔA_n) - 1)/A_n e^(ΔA_n l), zero-order hold, B = 1.

    A, C: complex (…, N/2), one pole of each conjugate pair; delta: (…). Returns (…, length): a Vandermonde product."""
    log_pole = A * delta[..., None]
    powers = torch.exp(log_pole[..., None] * torch.arange(length, device=A.device))
    return 2 * torch.einsum("...n,...nl->...l", C * torch.expm1(log_pole) / A, powers).real


def s4d_recurrence(A, C, delta, u):
    """The same filter step by step: u (…, T) → y (…, T), h_t = e^(ΔA) h_(t-1) + (e^(ΔA) - 1)/A u_t, y_t = 2 Re Σ C h_t."""
    log_pole, state, outputs = A * delta[..., None], 0, []
    for u_t in u.unbind(-1):
        state = torch.exp(log_pole) * state + torch.expm1(log_pole) / A * u_t[..., None]
        outputs.append(2 * (C * state).sum(-1).real)
    return torch.stack(outputs, -1)


class S4ND(nn.Module):
    """S4ND's layer in two dimensions (Nguyen et al. 2022, arXiv 2210.06583): a global filter k_rows(i) · k_columns(j).

    x (B, H, W, width) → the same shape. Each axis of each channel has two S4D kernels of `states` states, one for what
    lies before a place and one for what lies behind it. Δ is in the units of the grid it was trained on."""

    def __init__(self, width, states=8):
        super().__init__()
        check(is_count(states, 2) and states % 2 == 0, "states", states, "an even number of at least 2")
        shape = (2, 2, check_count(width, "width"), states // 2)  # axis, side, channel, pair of states
        self.log_delta = nn.Parameter(torch.empty(shape[:3]).uniform_(math.log(0.05), math.log(0.5)))
        self.log_decay = nn.Parameter(torch.full(shape, math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(states // 2).float().expand(shape).clone())
        self.C = nn.Parameter(torch.randn(*shape, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))

    def parameters_of(self, axis, rate):
        """A, C, Δ of the two sides of an axis, as `s4d_kernel` takes them. rate: this grid's spacing over the trained one's."""
        A = torch.complex(-self.log_decay[axis].exp(), self.frequency[axis])
        return A, torch.view_as_complex(self.C[axis]), rate * self.log_delta[axis].exp()

    def axis_kernel(self, axis, length, rate=1.0):
        """(width, 2 · length): lags 0 … length - 1, then those from -length to -1, as a circular convolution wants them."""
        before, behind = s4d_kernel(*self.parameters_of(axis, rate), length)
        return torch.cat([before, 0 * behind[:, :1], behind[:, 1:].flip(1)], 1)

    def forward(self, x, rate=1.0):
        """rate: 0.5 on a grid twice as fine, so that the filters keep their size in the picture."""
        check(x.dim() == 4 and x.shape[3] == len(self.skip), "x.shape", tuple(x.shape), f"(B, H, W, {len(self.skip)})")
        H, W = x.shape[1:3]
        rows, columns = (torch.fft.fft(self.axis_kernel(axis, n, rate)) for axis, n in enumerate((H, W)))
        spectrum = torch.fft.rfft2(x.permute(0, 3, 1, 2), s=(2 * H, 2 * W))
        spectrum = spectrum * rows[:, :, None] * columns[:, None, :W + 1]  # the outer product, as its spectrum
        y = torch.fft.irfft2(spectrum, s=(2 * H, 2 * W))[..., :H, :W]
        return y.permute(0, 2, 3, 1) + self.skip * x


def s4nd_recurrence(layer, x, rate=1.0):
    """What an S4ND layer computes, step by step: along the columns of a grid, then along its rows, from both sides."""
    y = x.permute(0, 3, 1, 2)
    for axis in (0, 1):
        (A, A2), (C, C2), (delta, delta2) = layer.parameters_of(axis, rate)
        along = (y.mT if axis == 0 else y).transpose(1, 2)  # B, the other axis, width, this axis
        behind = s4d_recurrence(A2, C2, delta2, along.flip(-1)).flip(-1)
        itself = s4d_kernel(A2, C2, delta2, 1) * along  # counted by the other side
        y = (s4d_recurrence(A, C, delta, along) + behind - itself).transpose(1, 2)
        y = y.mT if axis == 0 else y
    return y.permute(0, 2, 3, 1) + layer.skip * x


def scan_orders(rows, columns, directions=2, cls="middle"):
    """(directions, tokens): the order in which each direction reads the patches 1, 2, … (row by row) and the CLS token 0.

    directions: 1 (row by row), 2 (and backwards: Vision Mamba, arXiv 2401.09417) or 4 (and column by column both ways:
    VMamba, 2401.10166). cls: its place in every order: 'first', 'middle' or 'last'."""
    check(directions in (1, 2, 4), "directions", directions, "1, 2, 4")
    check(cls in ("first", "middle", "last"), "cls", cls, "first, middle, last")
    patches = torch.arange(1, check_count(rows, "rows") * check_count(columns, "columns") + 1)
    down = patches.view(rows, columns).T.flatten()
    place = dict(first=0, middle=len(patches) // 2, last=len(patches))[cls]
    paths = [patches, patches.flip(0), down, down.flip(0)][:directions]
    return torch.stack([torch.cat([path[:place], torch.zeros(1, dtype=torch.long), path[place:]]) for path in paths])


def read_along(x, order):
    """x (B, N, C) in each of the orders (1 or B, R, M) → (B, M, R, C)."""
    if len(order) == 1:
        return x[:, order[0].T]
    index = order.transpose(1, 2).flatten(1)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, index).unflatten(1, (order.shape[2], -1))


def sum_back(y, order):
    """What `read_along` has spread, (B, M, R, C), put back in its places and summed over the directions → (B, M, C).

    ValueError for an order that does not name each token once."""
    inverse = order.argsort(-1)  # (1 or B, R, M)
    if readable(order) and bool((order.gather(-1, inverse) != torch.arange(order.shape[2], device=order.device)).any()):
        check(False, "order", "no permutation", f"0 to {order.shape[2] - 1}, each once in every direction")
    if len(order) == 1:
        return sum(y[:, index, r] for r, index in enumerate(inverse[0]))
    return sum(y[:, :, r].gather(1, inverse[:, r, :, None].expand(-1, -1, y.shape[3])) for r in range(order.shape[1]))


class VisionMambaBlock(nn.Module):
    """Vision Mamba's block on Mamba-2's scan: x (B, N, width), read along several orders at once → (B, N, width).

    One projection for all directions; the short convolution, A and the bias of Δ are each direction's own. To the scan
    directions are further heads, so all of them take one call."""

    def __init__(self, width, directions=2, heads=4, head_width=16, states=16, taps=4):
        super().__init__()
        for name, value in dict(width=width, directions=directions, heads=heads, head_width=head_width, states=states, taps=taps).items():
            check_count(value, name)
        inner, mixed = heads * head_width, heads * head_width + 2 * states
        self.directions, self.heads, self.sizes, self.mixed_sizes = directions, heads, (inner, mixed, heads), (inner, states, states)
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(directions * mixed, directions * mixed, taps, groups=directions * mixed)
        self.dt_bias = nn.Parameter(inverse_softplus_uniform(directions * heads))
        self.A_log = nn.Parameter((torch.rand(directions * heads) * 15 + 1).log())
        self.D = nn.Parameter(torch.ones(directions * heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x, order, gap=None):
        """order (1 or B, directions, N), see `scan_orders`; gap, of that shape: steps since the token read before (pruned
        ones between them count), None: one. Over a gap the state decays as often as it would have, and nothing is written."""
        check(order.shape[1:] == (self.directions, x.shape[1]), "order.shape", tuple(order.shape), f"(1 or B, {self.directions}, {x.shape[1]})")
        gate, mixed, delta = self.in_proj(x).split(self.sizes, -1)
        mixed, delta = read_along(torch.cat([mixed, delta], -1), order).split((mixed.shape[-1], self.heads), -1)
        mixed, _ = causal_conv(mixed.flatten(2), self.conv1d.weight, self.conv1d.bias)
        u, B, C = mixed.unflatten(2, (self.directions, -1)).split(self.mixed_sizes, -1)
        u, delta = u.unflatten(-1, (self.heads, -1)).flatten(2, 3), F.softplus(delta.flatten(2) + self.dt_bias)
        # only x Δ is written, so a longer decay needs a smaller x
        times = 1 if gap is None else gap.transpose(1, 2).repeat_interleave(self.heads, 2).to(x.dtype)
        chunk = -(-x.shape[1] // -(-x.shape[1] // 32))  # of equal length: 65 tokens would else be padded to 96
        y, _ = ssd(u if gap is None else u / times[..., None], delta * times, -torch.exp(self.A_log), B, C, chunk=chunk)
        y = torch.addcmul(y, u, self.D[:, None].to(u.dtype)).unflatten(2, (self.directions, -1)).flatten(3)
        return self.out_proj(self.norm(sum_back(y, order) * F.silu(gate)))

    def importance(self, x):
        """(B, N): Δ, averaged over heads and directions: how much the block takes from a token (MTR, arXiv 2507.14042)."""
        delta = self.in_proj(x)[..., -self.heads:].repeat(1, 1, self.directions)
        return F.softplus(delta + self.dt_bias).mean(-1)


class SelfAttention(nn.Module):
    """Multi-head self-attention of a vision transformer: x (B, N, width) → the same shape; order and gap mean nothing to it."""

    def __init__(self, width, heads):
        super().__init__()
        check(is_count(heads) and width % heads == 0, "heads", heads, f"a divisor of width={width}")
        self.heads, self.qkv, self.out_proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x):
        """q, k, v, each (B, heads, N, width / heads)."""
        return (v.unflatten(-1, (self.heads, -1)).transpose(1, 2) for v in self.qkv(x).chunk(3, -1))

    def forward(self, x, order=None, gap=None):
        return self.out_proj(F.scaled_dot_product_attention(*self.split(x)).transpose(1, 2).flatten(2))

    def importance(self, x):
        """(B, N): what the CLS token attends to, averaged over heads (EViT, arXiv 2202.07800)."""
        q, k, _ = self.split(x)
        return torch.softmax(q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5, -1).mean(1)[:, 0]


class FeedForward(nn.Sequential):
    """Two linear layers with a GELU between them, token by token."""

    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x, order=None, gap=None):
        return super().forward(x)


def keep_tokens(order, kept, aligned=True, gap=None):
    """Orders and gaps of what is left: order (1 or B, R, N), kept (B, M) tokens by number → (order (B, R, M), gap or None).

    gap: None, or what an earlier call gave with this order. aligned=False forgets how far apart the kept tokens were, as plain
    dropping does."""
    check(len(order) in (1, len(kept)), "order.shape", tuple(order.shape), f"(1 or {len(kept)}, R, N), as kept")
    place = order.argsort(-1).expand(len(kept), -1, -1).gather(2, kept[:, None].expand(-1, order.shape[1], -1))
    place, order = place.sort(-1)  # (B, R, M): when each direction reads each kept token
    when = place if gap is None else gap.cumsum(-1).expand(len(kept), -1, -1).gather(2, place)
    return order, F.pad(when.diff(), (1, 0), value=1) if aligned else None


def choose_tokens(scores, share):
    """(B, M) numbers of the tokens to keep, ascending: the CLS token 0 and the best of the others; scores (B, N)."""
    count = max(1, round(check_share(share, "share") * (scores.shape[1] - 1)))
    best = scores[:, 1:].topk(count, 1).indices + 1
    return F.pad(best, (1, 0)).sort(1).values


def merge_into(x, kept):
    """x (B, N, C) at the kept tokens (B, M), each averaged with the dropped ones most similar to it (by cosine); CLS alone."""
    take = lambda v, index: v.gather(1, index[..., None].expand(-1, -1, v.shape[-1]))
    dropped = torch.ones(x.shape[:2], device=x.device).scatter(1, kept, 0).bool()
    normal = F.normalize(x, dim=-1)
    nearest = (normal @ take(normal, kept[:, 1:]).mT).argmax(-1) + 1  # (B, N): the closest kept patch
    one_hot = F.one_hot(nearest, kept.shape[1]).to(x.dtype) * dropped[..., None]
    return (take(x, kept) + one_hot.mT @ x) / (1 + one_hot.sum(1))[..., None]


class PatchClassifier(nn.Module):
    """Patches → CLS token and learned positions → residual layers f(x, order, gap) → the CLS token's class.

    pixels (B, channels, S, S), S = rows · patch → logits (B, classes)."""

    def __init__(self, layers, width, rows, patch=1, channels=1, classes=10, directions=2, cls="middle"):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.positions, self.cls = (nn.Parameter(0.02 * torch.randn(n, width)) for n in (rows * rows, 1))
        self.layers, self.norms = nn.ModuleList(layers), nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.register_buffer("order", scan_orders(rows, rows, directions, cls)[None])

    def forward(self, pixels, at=None, share=1.0, how="aligned", scores=None):
        """at: number of the layer before which tokens leave, so that `share` of the patches stays; None: all stay.

        how: 'naive' (the rest closes up), 'aligned' (Δ of the gaps), 'merged' (dropped ones join the most similar kept one,
        with Δ of the gaps). scores: (B, N) which to keep, CLS first, or None: the importance that layer `at` gives them."""
        check(how in ("naive", "aligned", "merged"), "how", how, "naive, aligned, merged")
        check(at is None or is_count(at, 0) and at < len(self.layers), "at", at, f"None or 0 to {len(self.layers) - 1}, the number of a layer")
        check(check_share(share, "share") == 1 or at is not None, "share", share, "1, where `at` does not say before which layer tokens leave")
        check(scores is None or scores.shape == (len(pixels), self.order.shape[2]), "scores.shape", scores is not None and tuple(scores.shape),
              f"({len(pixels)}, {self.order.shape[2]}): one for each token, CLS first")
        asked = share < 1 and scores is None
        check(not asked or hasattr(self.layers[at], "importance"), "at", at, "the number of a layer with `importance`, or scores")
        x = self.embed(pixels).flatten(2).transpose(1, 2) + self.positions
        x, order, gap = torch.cat([self.cls.expand(len(x), 1, -1), x], 1), self.order, None
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            if i == at and share < 1:
                kept = choose_tokens(layer.importance(norm(x)) if asked else scores, share)
                order, gap = keep_tokens(order, kept, how != "naive")
                x = merge_into(x, kept) if how == "merged" else x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
            x = x + layer(norm(x), order, gap)
        return self.head(self.norm(x[:, 0]))
