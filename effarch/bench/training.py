"""Small trainings that compare sequence layers by what they can learn: three tasks, one network, one budget."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from effarch.checks import check

# time constants, in steps, of the two averaging tasks
TASKS = {"multi-timescale": (2, 8, 32, 128, 512), "short-timescale": (1, 2, 4, 6, 8), "digits": None}


def averaging_task(batch, steps, taus, generator):
    """White noise x (batch, steps, 1) and its exponential averages (batch, steps, len(taus)), scaled to variance 1.

    taus: time constants in steps. generator: a torch.Generator on the CPU, so that every device gets the same data."""
    x = torch.randn(batch, steps, generator=generator)
    decay = torch.exp(-torch.arange(steps) / torch.tensor(taus, dtype=torch.float32)[:, None])
    kernels = decay * torch.sqrt(1 - decay[:, 1:2] ** 2)
    spectrum = torch.fft.rfft(x, 2 * steps)[:, None] * torch.fft.rfft(kernels, 2 * steps)
    return x[..., None], torch.fft.irfft(spectrum, 2 * steps)[..., :steps].transpose(1, 2)


@cache
def digits():
    """scikit-learn's digits, read once: images (1797, 64) float64 from 0 to 16, labels (1797,). Not to be written to."""
    from sklearn.datasets import load_digits

    return tuple(torch.tensor(part) for part in load_digits(return_X_y=True))


def digit_sequences(generator):
    """scikit-learn's 8 × 8 digits, read pixel by pixel: (x, labels) to train on, of a quarter to test on, and to choose settings by.

    x: (N, 64, 1), from 0 to 1; labels: (N,). generator: decides which quarter. The fifth to choose by is always the same, so that it
    is in no training and in no test."""
    images, labels = digits()
    x, y = images.float()[:, :, None] / 16, labels
    fixed = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    aside, rest = fixed[: len(y) // 5], fixed[len(y) // 5 :]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    parts = rest[len(rest) // 4 :], rest[: len(rest) // 4], aside
    return tuple((x[part], y[part]) for part in parts)


class Network(nn.Module):
    """Two residual layers of `make(dim)` between a linear input and a linear output: (B, T, 1) → (B, T, outputs).

    inputs: another module in place of the linear input, from whatever it takes to (B, T, dim).
    Mixing matrices (nn.Linear) start by Xavier's rule, filters (any other weight of two dimensions) at N(0, 1/taps)."""

    def __init__(self, make, dim, outputs, inputs=None):
        super().__init__()
        self.inputs, self.outputs = nn.Linear(1, dim) if inputs is None else inputs, nn.Linear(dim, outputs)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.layers = nn.ModuleList(make(dim) for _ in range(2))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif getattr(getattr(module, "weight", None), "ndim", 0) == 2:
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)

    def forward(self, x):
        x = self.inputs(x)
        for norm, layer in zip(self.norms[:2], self.layers, strict=True):
            x = x + layer(norm(x))
        return self.outputs(self.norms[2](x))


def train(network, batches, loss, steps, rate=3e-3):
    """AdamW with a one-cycle schedule for `steps` steps; batches() gives (x, y), loss(network(x), y) is made small."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
    for _ in range(steps):
        x, y = batches()
        optimizer.zero_grad(set_to_none=True)
        loss(network(x), y).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def learn(task, make, seed, steps, length=1024, dim=64, device=None, rate=3e-3, choosing=False):
    """Train one small network of layers `make(dim)` on a task and test it; returns columns of its row.

    task: a name in TASKS. The averaging tasks take sequences of `length` steps, 8 at a time, fresh ones each step; their
    error is the mean squared one of 32 sequences that are the same for all. Digits take 32 a step and are answered
    at the last step; their error is the share of wrong answers, with `wrong` of `n_test`. choosing: test on other sequences and digits, on
    which no result is tested. The same seed means the same data and start for every layer. A diverged network has error NaN."""
    check(task in TASKS, "task", task, ", ".join(TASKS))
    data = torch.Generator().manual_seed(1000 + seed)
    if task == "digits":
        (x, y), *tests = digit_sequences(data)
        test = tests[choosing]

        def draw():
            pick = torch.randint(len(x), (32,), generator=data)
            return x[pick], y[pick]

        outputs, loss = 10, lambda out, y: F.cross_entropy(out[:, -1], y)
    else:
        outputs, loss, taus = len(TASKS[task]), F.mse_loss, TASKS[task]
        draw, test = lambda: averaging_task(8, length, taus, data), averaging_task(32, length, taus, torch.Generator().manual_seed(1 + choosing))
    torch.manual_seed(seed)
    network = Network(make, dim, outputs).to(device)
    train(network, lambda: [part.to(device) for part in draw()], loss, steps, rate)
    with torch.inference_mode():
        out, y = network(test[0].to(device)), test[1].to(device)
    row = dict(params=sum(p.numel() for p in network.parameters()))
    if task != "digits":
        return row | dict(error=float(loss(out, y)))
    wrong = int((out[:, -1].argmax(-1) != y).sum()) if out.isfinite().all() else math.nan  # argmax hides NaN
    return row | dict(error=wrong / len(y), wrong=wrong, n_test=len(y))
