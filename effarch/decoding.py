# Written by `python -m lab.build` from ssm/distilled_kernels.ipynb, where each part is explained: edit it there.
"""Decoding with a long convolution, one token at a time: explicitly, exactly in blocks, or as a state space; and prompts for the latter."""

import math

import torch
import torch.nn.functional as F

from effarch.checks import check, check_count, is_count


def check_row(x, channels):
    """ValueError unless x holds one number for each channel: a batch of rows would be broadcast, or read as something else."""
    if x.shape != (channels,) or not x.is_floating_point():  # the words only then: a step takes microseconds
        check(False, "x", (tuple(x.shape), x.dtype), f"({channels},), a floating-point number for each channel")


class RingBuffer:
    """Explicit convolution, O(L) per token, without gradients. kernel (L, D); `step(x)`: x (D,) → y (D,)."""

    def __init__(self, kernel, rows=16):
        check(kernel.dim() == 2, "kernel.shape", tuple(kernel.shape), "(L, D)")
        self.reversed = kernel.detach().flip(0).T.contiguous()  # (D, L), newest tap last
        D, L = self.reversed.shape
        self.past, self.at = kernel.new_zeros(D, 2 * L), 0
        self.rows = D if kernel.is_cuda else min(rows, D)
        self.work = kernel.new_empty(self.rows, L)

    def step(self, x):
        check_row(x, len(self.past))
        L = self.reversed.shape[1]
        self.past[:, self.at] = x
        self.past[:, self.at + L] = x
        self.at = (self.at + 1) % L
        window, y = self.past[:, self.at or L:][:, :L], torch.empty_like(x)  # the last L inputs, oldest first
        for i in range(0, len(x), self.rows):
            part = self.reversed[i:i + self.rows]
            work = torch.mul(part, window[i:i + self.rows], out=self.work[:len(part)])
            torch.sum(work, 1, out=y[i:i + self.rows])
        return y


class BlockedConvolution:
    """Exact convolution, amortised: one FFT per block of P tokens, ≤ P taps in between. kernel (L, D); 1 ≤ block ≤ L.

    A one-level form of the relaxed convolutions of van der Hoeven (2002) and Flash Inference (arXiv:2410.12982)."""

    def __init__(self, kernel, block):
        check(kernel.dim() == 2, "kernel.shape", tuple(kernel.shape), "(L, D)")
        check(is_count(block) and block <= len(kernel), "block", block, f"1 to {len(kernel)}, the taps of the kernel")
        self.L, self.P, self.j = len(kernel), block, 0
        self.size = 2 ** math.ceil(math.log2(self.L + block))
        self.spectrum = torch.fft.rfft(kernel.T, self.size)
        self.recent = kernel[:block].flip(0).T.contiguous()  # (D, P), tap 0 last
        self.past = kernel.new_zeros(kernel.shape[1], self.L + block)

    def step(self, x):
        """x (D,) → y (D,)."""
        check_row(x, len(self.past))
        if self.j == 0:
            self.past[:, :self.L] = self.past[:, self.P:].clone()
            spectrum = torch.fft.rfft(self.past[:, :self.L], self.size) * self.spectrum
            self.future = torch.fft.irfft(spectrum, self.size)[:, self.L:self.L + self.P].T.contiguous()
        self.past[:, self.L + self.j] = x
        inside = self.past[:, self.L:self.L + self.j + 1]
        y = self.future[self.j] + (inside * self.recent[:, self.P - 1 - self.j:]).sum(1)
        self.j = (self.j + 1) % self.P
        return y


def check_form(form):
    """ValueError unless `form` is a StateSpace whose channels have poles of their own."""
    shapes = [tuple(getattr(form, name)().shape) for name in ("log_poles", "coefficients") if hasattr(form, name)]
    own = len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) == 2
    check(own, "form", (type(form).__name__, *shapes), "a StateSpace of a kernel (L, D), each channel with poles (modes, D) of its own")


class StateSpaceDecoder:
    """O(n) per token; form: a StateSpace with per-channel poles. `step(x)`: x (D,) → y (D,)."""

    def __init__(self, form):
        check_form(form)
        poles, c = form.log_poles().detach().exp(), form.coefficients().detach()
        self.skip = form.skip.detach().clone()
        self.cos, self.sin = poles.real.contiguous(), poles.imag.contiguous()  # (modes, D)
        self.c_real, self.c_imag = c.real.contiguous(), c.imag.contiguous()
        self.real, self.imag = torch.zeros_like(self.cos), torch.zeros_like(self.cos)

    def step(self, x):
        check_row(x, len(self.skip))
        y = torch.addcmul(self.c_real * self.real, self.c_imag, self.imag, value=-1).sum(0)
        y.addcmul_(self.skip, x)
        real = torch.addcmul(x, self.cos, self.real).addcmul_(self.sin, self.imag, value=-1)
        self.imag.mul_(self.cos).addcmul_(self.sin, self.real)
        self.real = real
        return y


class ChunkedPrefill:
    """A prompt through a per-channel StateSpace: x (D, T), T a multiple of `chunk` → (y (D, T), state (modes, D)).

    Decoding starts from that state, which an FFT does not give: in chunks of Q, a small Toeplitz product inside each
    chunk, and states carried between them."""

    def __init__(self, form, chunk=64):
        check_form(form)
        log, c, self.chunk = form.log_poles().detach().T, form.coefficients().detach().T, check_count(chunk, "chunk")  # (D, modes)
        at = torch.arange(chunk, device=c.device)
        kernel = F.pad(form(chunk).detach().T, (chunk - 1, 0))
        self.inside = kernel[:, at[:, None] - at + chunk - 1]  # (D, Q, Q), lower Toeplitz
        powers = torch.exp(log[..., None] * at)  # (D, modes, Q)
        self.into, self.out, self.jump = powers.flip(2), (c[..., None] * powers).mT, torch.exp(log * chunk)

    def __call__(self, x):
        right = x.dim() == 2 and len(x) == len(self.inside) and x.shape[1] > 0 and x.shape[1] % self.chunk == 0
        check(right, "x.shape", tuple(x.shape), f"({len(self.inside)}, T) with T a multiple of chunk={self.chunk}")
        X = x.unflatten(1, (-1, self.chunk)).mT.contiguous()  # (D, Q, chunks)
        added = torch.complex(self.into.real @ X, self.into.imag @ X)  # what each chunk adds to the state
        states, state = [], torch.zeros_like(self.jump)
        for i in range(X.shape[2]):
            states.append(state)
            state = self.jump * state + added[:, :, i]
        S = torch.stack(states, 2)
        y = self.inside @ X + self.out.real @ S.real - self.out.imag @ S.imag
        return y.mT.reshape(x.shape), state.T
