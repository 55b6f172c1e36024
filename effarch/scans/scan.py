# Written by `python -m lab.build` from ssm/selective_scan.ipynb, where each part is explained: edit it there.
"""Mamba's selective scans S6 and SSD: by their definitions, and fast, in pure PyTorch."""

import functools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from effarch.checks import check, check_count


def no_autocast(x):
    """A context in which autocast, if it is on, leaves products in the type of their inputs."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def check_tensors(**given):
    """ValueError unless all are tensors of floating-point numbers."""
    for name, v in given.items():
        real = isinstance(v, torch.Tensor) and v.is_floating_point()
        check(real, name, getattr(v, "dtype", type(v).__name__), "a tensor of floating-point numbers")


def check_state(state, *shape):
    """ValueError unless the state that a step goes on from is a tensor of this shape; short, since every token pays for it."""
    if not isinstance(state, torch.Tensor) or state.shape != shape or not state.is_floating_point():
        told = (tuple(state.shape), state.dtype) if isinstance(state, torch.Tensor) else state
        check(False, "state", told, f"a tensor {shape} of floating-point numbers")


def at_least_float32(scan):
    """Decorate scan(x, delta, A, B, C, state=None, …) → (y, state): all is computed in the inputs' common type, float32
    at least, also under autocast, as half precision is not enough for products of many decays. y has x's type."""
    @functools.wraps(scan)
    def wrapped(x, delta, A, B, C, state=None, **options):
        given = [x, delta, A, B, C] if state is None else [x, delta, A, B, C, state]
        check_tensors(**dict(zip(("x", "delta", "A", "B", "C", "state"), given, strict=False)))
        kind = functools.reduce(torch.promote_types, {v.dtype for v in given}, torch.float32)
        with no_autocast(x):
            y, state = scan(*(v.to(kind) for v in given), **options)
        return y.to(x.dtype), state
    return wrapped


def sequential(step, x, delta, A, B, C, state, dtype, empty):
    """A scan by its definition: `step` for one token after the other, computed in `dtype`, from `state` or from what empty() makes.

    Returns (y, state)."""
    check_tensors(x=x, delta=delta, A=A, B=B, C=C, **({} if state is None else dict(state=state)))
    check(x.shape[1] > 0 and delta.shape[:2] == B.shape[:2] == C.shape[:2] == x.shape[:2], "delta, B, C", [tuple(v.shape) for v in (delta, B, C)],
          f"{tuple(x.shape[:2])}, batch and length of x, at first")
    outputs, state = [], (empty() if state is None else state).to(dtype)
    x, delta, A, B, C = (v.to(dtype) for v in (x, delta, A, B, C))
    for t in range(x.shape[1]):
        y, state = step(x[:, t], delta[:, t], A, B[:, t], C[:, t], state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


def s6_step(x, delta, A, B, C, state):
    """One token of S6 (Gu & Dao 2023, arXiv 2312.00752, eq. 2): x, delta (B, D); A (D, N); B, C (B, N); state (B, N, D).

    Returns y (B, D) and the new state, computed in the state's type. The skip D·x is left to the block."""
    check_state(state, len(x), *A.T.shape)
    kind, (x, delta, A, B, C) = x.dtype, (v.to(state.dtype) for v in (x, delta, A, B, C))
    state = torch.exp(delta[:, None] * A.T) * state + B[:, :, None] * (delta * x)[:, None]
    with no_autocast(x):
        return (C[:, None] @ state)[:, 0].to(kind), state


def s6_sequential(x, delta, A, B, C, state=None, dtype=torch.float64):
    """S6, token by token: x, delta (B, T, D); A (D, N); B, C (B, T, N). Returns y (B, T, D) and state (B, N, D)."""
    return sequential(s6_step, x, delta, A, B, C, state, dtype, lambda: x.new_zeros(len(x), *A.T.shape))


def readable(v):
    """Whether the program may look at values: not while it is compiled or captured, nor where there are none."""
    return not (torch.compiler.is_compiling() or v.is_meta or v.is_cuda and torch.cuda.is_current_stream_capturing())


def in_chunks(v, chunk):
    """(B, T, …) → (B, ⌈T/chunk⌉, chunk, …), zeros appended: with Δ = 0 they neither decay nor write."""
    missing = -v.shape[1] % chunk
    v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, missing)) if missing else v
    return v.unflatten(1, (-1, chunk))


def carry_states(decay, written, state):
    """States at the start of each chunk, stacked over dim 1, and the last one: h ← decay_j · h + written_j."""
    starts = []
    for d, w in zip(decay.unbind(1), written.unbind(1), strict=True):
        starts.append(state)
        state = torch.addcmul(w, d, state)
    return torch.stack(starts, 1), state


def s6_chunked(x, delta, A, B, C, state, chunk):
    """S6 over one segment; see `s6`. After `in_chunks`: (batch, chunks, token in the chunk, states, channels)."""
    length, A = x.shape[1], A.T.contiguous()
    x, delta, B, C = (in_chunks(v, chunk) for v in (delta * x, delta, B, C))
    x, delta, C, B = (v.unbind(2) for v in (x.unsqueeze(3), delta.unsqueeze(3), C.unsqueeze(3), B.unsqueeze(4)))
    local, through, kept = 0, 1, []
    for x_i, delta_i, B_i in zip(x, delta, B, strict=True):  # token i of every chunk at once
        decay = torch.exp(delta_i * A)
        local = torch.addcmul(decay * local, B_i, x_i) if kept else B_i * x_i
        through = decay * through  # what is left of the state that the chunk started from
        kept.append((local, through))
    starts, state = carry_states(through, local, state)
    y = torch.cat([C_i @ torch.addcmul(h, d, starts) for C_i, (h, d) in zip(C, kept, strict=True)], 2)
    return y.flatten(1, 2)[:, :length], state


def in_segments(scan, inputs, state, segment, recompute):
    """scan(*inputs, state) → (y, state) over one segment of time (dim 1) after the other, handing the state on."""
    outputs = []
    for parts in zip(*(v.split(segment, 1) for v in inputs), strict=True):
        again = recompute and torch.is_grad_enabled()
        y, state = checkpoint(scan, *parts, state, use_reentrant=False) if again else scan(*parts, state)
        outputs.append(y)
    return (torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]), state


def check_scan(delta, A, state, empty, chunk, segment):
    """Refuse a state of another shape than `empty`, chunks or segments below one token, A > 0 and Δ < 0."""
    check(state.shape == empty.shape, "state.shape", tuple(state.shape), tuple(empty.shape))
    check_count(chunk, "chunk")
    check_count(segment, "segment")
    if readable(delta) and bool((A > 0).any() | (delta < 0).any()):  # one look, since a GPU has to wait for it
        check(not (A > 0).any(), "A", A.max().item(), "numbers of at most 0, since e^(ΔA) is a decay")
        check(False, "delta", delta.min().item(), "numbers of at least 0, since Δ is a time")


@at_least_float32
def s6(x, delta, A, B, C, state=None, chunk=32, segment=2048, recompute=False):
    """S6, Mamba's selective scan (Gu & Dao 2023, arXiv 2312.00752), in pure PyTorch. Returns (y, state).

    x, delta (B, T, D), delta ≥ 0; A (D, N), A ≤ 0; B, C (B, T, N); state (B, N, D) to start from. Equal to
    `s6_sequential` for every chunk and segment. ValueError for shapes or values that do not fit."""
    check(x.dim() == 3 and x.shape[1] > 0, "x.shape", tuple(x.shape), "(B, T, D) with T ≥ 1")
    check(delta.shape == x.shape, "delta.shape", tuple(delta.shape), f"{tuple(x.shape)}, as x")
    check(A.dim() == 2 and len(A) == x.shape[2], "A.shape", tuple(A.shape), f"({x.shape[2]}, N): channels of x, states")
    check(B.shape == C.shape == (*x.shape[:2], A.shape[1]), "B.shape, C.shape", (tuple(B.shape), tuple(C.shape)),
          f"{(*x.shape[:2], A.shape[1])}: batch, length, states of A")
    empty = x.new_zeros(len(x), *A.T.shape)
    state = empty if state is None else state
    check_scan(delta, A, state, empty, chunk, segment)
    scan = lambda x, delta, B, C, state: s6_chunked(x, delta, A, B, C, state, min(chunk, x.shape[1]))
    return in_segments(scan, (x, delta, B, C), state, segment, recompute)


def random_s6(length, channels=6, states=5, batch=2, dtype=torch.float64, device="cpu"):
    """Inputs x, Δ, A, B, C of an S6 scan, with the published range of Δ and A = -1 … -N."""
    normal = lambda *shape: torch.randn(batch, length, *shape, dtype=dtype, device=device)
    A = -torch.arange(1, states + 1, dtype=dtype, device=device).repeat(channels, 1)
    return normal(channels), F.softplus(normal(channels) - 3), A, normal(states), normal(states)


def random_ssd(length, heads=4, head_width=5, states=6, groups=2, batch=2, dtype=torch.float64, device="cpu"):
    """Inputs x, Δ, A, B, C of an SSD scan, with the published range of Δ and A in [-16, -1]."""
    normal = lambda *shape: torch.randn(batch, length, *shape, dtype=dtype, device=device)
    A = -torch.linspace(1, 16, heads, dtype=dtype, device=device)
    return normal(heads, head_width), F.softplus(normal(heads) - 3), A, normal(groups, states), normal(groups, states)


def ssd_step(x, delta, A, B, C, state):
    """One token of SSD (Dao & Gu 2024, arXiv 2405.21060): x (B, H, P); delta (B, H); A (H,); B, C (B, G, N).

    Returns y (B, H, P) and the new state (B, G, N, H/G, P), computed in the state's type. Heads of a group share B_t, C_t."""
    check_state(state, len(x), *B.shape[1:], x.shape[1] // B.shape[1], x.shape[2])
    kind, (x, delta, A, B, C) = x.dtype, (v.to(state.dtype) for v in (x, delta, A, B, C))
    by_group = lambda v: v.unflatten(1, (B.shape[1], 1, -1))  # b g 1 k …
    state = by_group(torch.exp(delta * A))[..., None] * state + B[..., None, None] * by_group(delta[..., None] * x)
    with no_autocast(x):
        return (C[..., None, :] @ state.flatten(3)).reshape(x.shape).to(kind), state


def ssd_empty(x, B):
    """The zero state (B, G, N, H/G, P) for x (B, T, H, P) and B (B, T, G, N)."""
    return x.new_zeros(len(x), *B.shape[2:], x.shape[2] // B.shape[2], x.shape[3])


def ssd_sequential(x, delta, A, B, C, state=None, dtype=torch.float64):
    """SSD, token by token: x (B, T, H, P); delta (B, T, H); A (H,); B, C (B, T, G, N). Returns (y, state)."""
    return sequential(ssd_step, x, delta, A, B, C, state, dtype, lambda: ssd_empty(x, B))


def segment_sums(a):
    """(…, Q) → (…, Q, Q): a_{s+1} + … + a_t in row t, column s ≤ t; -∞ above the diagonal."""
    size = a.shape[-1]
    sums = a[..., None].expand(*a.shape, size).tril(-1).cumsum(-2)
    return sums.masked_fill(torch.ones(size, size, dtype=torch.bool, device=a.device).triu(1), -torch.inf)


@at_least_float32
def ssd_minimal(x, delta, A, B, C, state=None, chunk=64):
    """SSD as the paper's four sums (Dao & Gu 2024, section 6), each of them one einsum, from the zero state. Returns (y, state); see `ssd`."""
    check(state is None, "state", "given", "None: `ssd` goes on from a state")
    check_count(chunk, "chunk")
    X, a, B, C = (in_chunks(v, min(chunk, x.shape[1])) for v in (x * delta[..., None], delta * A, B, C))
    X, a = (v.unflatten(3, (B.shape[3], -1)) for v in (X, a))  # b c q g k …: heads k of group g
    a = a.permute(0, 3, 4, 1, 2)  # b g k c q
    total = a.cumsum(-1)
    inside = torch.einsum("bctgn,bcsgn,bgkcts,bcsgkp->bctgkp", C, B, torch.exp(segment_sums(a)), X)
    written = torch.einsum("bcsgn,bgkcs,bcsgkp->bcgnkp", B, torch.exp(total[..., -1:] - total), X)
    decay = torch.exp(segment_sums(F.pad(total[..., -1], (1, 0))))  # from the end of a chunk to that of another
    states = torch.einsum("bgkzc,bcgnkp->bzgnkp", decay, F.pad(written, (0, 0) * 4 + (1, 0)))
    inherited = torch.einsum("bctgn,bcgnkp,bgkct->bctgkp", C, states[:, :-1], torch.exp(total))
    return (inside + inherited).flatten(3, 4).flatten(1, 2)[:, :x.shape[1]], states[:, -1]


class DecayedAttention(torch.autograd.Function):
    """y = ((C Bᵀ).tril() ∘ e^(ℓ_t - ℓ_s)) x inside each chunk: C, B (…, Q, N); log_decay ℓ (…, K, Q), descending; x (…, K, Q, P).

    Returns y, and its two factors for the gradient. By hand, that of ℓ leaves out each token's own term, which does not decay
    and would drown the rest. Where a graph of the gradient is wanted, PyTorch derives `forward` itself."""

    @staticmethod
    def forward(C, B, log_decay, x):
        decay = (log_decay[..., :, None] - log_decay[..., None, :]).clamp_(max=0).exp_()
        attention = (C @ B.mT).tril_()
        return (attention[..., None, :, :] * decay) @ x, decay, attention

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 4
        C, B, log_decay, x, decay, attention = saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            found = torch.autograd.grad(DecayedAttention.forward(C, B, log_decay, x)[0], [saved[i] for i in wanted], dy, create_graph=True)
            return tuple(dict(zip(wanted, found, strict=True)).get(i) for i in range(4))
        dx = (attention[..., None, :, :] * decay).mT @ dy
        back = (dy @ x.mT).mul_(decay)
        shared = back.sum(-3).tril_()
        back = back.mul_(attention[..., None, :, :]).tril_(-1)
        return shared @ B, shared.mT @ C, back.sum(-1) - back.sum(-2), dx


def carry_at_once(log_decay, written, state):
    """`carry_states` as one matrix product: for a GPU, where each step of a loop is a kernel. log_decay (b, c, g, k)."""
    total = F.pad(log_decay.double().permute(0, 2, 3, 1), (1, 0)).cumsum(-1)  # float64: differences of long sums
    decay = torch.exp((total[..., :, None] - total[..., None, :]).clamp(max=0)).tril().to(written.dtype)
    written = torch.cat([state[:, None], written], 1).permute(0, 2, 4, 1, 3, 5)  # b g k c+1 n p
    states = (decay @ written.flatten(4)).unflatten(4, written.shape[4:]).permute(0, 3, 1, 4, 2, 5)
    return states[:, :-1], states[:, -1].clone()  # a view would keep all states in memory


def ssd_chunked(x, delta, A, B, C, state, chunk, careful):
    """SSD over one segment; see `ssd`. b batch, c chunks, q tokens, g groups, k heads per group, n states, p channels."""
    length, p, groups = x.shape[1], x.shape[3], B.shape[2]
    split = lambda v: in_chunks(v, chunk).unflatten(3, (groups, -1))  # b c q g k …
    # a fault of Δ comes back with x · Δ, one of A nowhere else
    log_decay = torch.where(A.isnan(), A, (delta * A).nan_to_num(0)).clamp(min=-30 if x.dtype == torch.float32 else -80)
    total = split(log_decay).permute(0, 1, 3, 4, 2).contiguous().cumsum(-1)  # b c g k q
    x, (B, C) = split(x * delta[..., None]), (in_chunks(v, chunk).transpose(2, 3) for v in (B, C))  # b c g q n
    # what each chunk writes into the state, decayed to the chunk's end, and the states it starts from
    to_end = F.pad(torch.exp(total[..., -1:] - total[..., :-1]), (0, 1), value=1.0)  # the last token does not decay: no gradient
    to_end = to_end.permute(0, 1, 4, 2, 3)[..., None]  # b c q g k 1
    written = (B.mT @ (x * to_end).transpose(2, 3).flatten(4)).unflatten(4, (-1, p))  # b c g n k p
    if x.is_cuda and not careful:
        starts, state = carry_at_once(total[..., -1], written, state)
    else:
        starts, state = carry_states(torch.exp(total[..., -1])[:, :, :, None, :, None], written, state)
    inherited = (C @ starts.flatten(4)).unflatten(4, (-1, p))  # b c g q k p
    if careful:  # the masked half is zero, but 0 · NaN is NaN: take faults out here, and put them in below
        spoilt, x = (0 * x).cumsum(2), x.nan_to_num(0, 0, 0)
    # inside each chunk: masked, decayed attention
    y, *_ = DecayedAttention.apply(C, B, total, x.permute(0, 1, 3, 4, 2, 5))  # b c g k q p
    y = torch.addcmul(y.transpose(3, 4), inherited, torch.exp(total).transpose(3, 4)[..., None]).transpose(2, 3)
    y = y + spoilt if careful else y
    return y.flatten(3, 4).flatten(1, 2)[:, :length], state


@at_least_float32
def ssd(x, delta, A, B, C, state=None, chunk=None, segment=2048, recompute=False):
    """SSD, Mamba-2's scan (Dao & Gu 2024, arXiv 2405.21060), as matrix products. Returns (y, state).

    x (B, T, H, P); delta (B, T, H), delta ≥ 0; A (H,), A ≤ 0; B, C (B, T, G, N), H a multiple of G; state
    (B, G, N, H/G, P) to start from; chunk, None: 32, and 64 from 64 states on. Equal to `ssd_sequential` for every
    chunk and segment, up to rounding that grows with the chunk; a decay below e^-30 in float32 (e^-80 in float64) counts as that. Its gradients
    have none of their own. ValueError for shapes or values that do not fit. Compiled or captured, where no value can be looked
    at: A > 0 or Δ < 0 make NaN, and a token that is not finite spoils its whole chunk, earlier tokens among them."""
    check(x.dim() == 4 and x.shape[1] > 0, "x.shape", tuple(x.shape), "(B, T, H, P) with T ≥ 1")
    check(delta.shape == x.shape[:3], "delta.shape", tuple(delta.shape), f"{tuple(x.shape[:3])}: batch, length, heads of x")
    check(A.shape == x.shape[2:3], "A.shape", tuple(A.shape), f"{tuple(x.shape[2:3])}: heads of x")
    check(B.shape == C.shape and B.dim() == 4 and B.shape[:2] == x.shape[:2] and x.shape[2] % B.shape[2] == 0,
          "B.shape, C.shape", (tuple(B.shape), tuple(C.shape)), f"(B, T, G, N), G a divisor of {x.shape[2]} heads")
    chunk = chunk if chunk is not None else 32 if B.shape[3] < 64 else 64
    state = ssd_empty(x, B) if state is None else state
    check_scan(delta, A, state, ssd_empty(x, B), chunk, segment)
    delta = delta if readable(delta) else torch.where((delta < 0) | (A > 0), torch.nan, delta)
    scan = lambda careful, x, delta, B, C, state: ssd_chunked(
        x, delta, A, B, C, state, min(chunk, x.shape[1]), careful)
    run = lambda careful: in_segments(functools.partial(scan, careful), (x, delta, B, C), state, segment, recompute)
    y, after = run(careful=False)
    return run(careful=True) if readable(after) and not after.isfinite().all() else (y, after)
