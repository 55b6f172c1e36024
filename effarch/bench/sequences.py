"""What notebooks about sequence layers share: checks that become rows, cases to time, and lines over the length."""

import math

import numpy as np
import torch
from torch import nn

from effarch.bench.figures import power_ticks, series_style
from effarch.bench.tables import Table
from effarch.bench.timing import count_flops, limit_ms, one_pass, peak_memory, tensor_bytes
from effarch.checks import check


class Agreement:
    """Asserts that two results agree, prints it with the largest error, and keeps it as a row of `<name>.csv`."""

    def __init__(self, run, name):
        self.table = Table(run, name, key=["check"], checked=True)

    def __call__(self, what, ours, theirs, tolerance):
        """ours, theirs: tensors, or lists of tensors, of equal shapes; tolerance: of the largest absolute difference. → that difference."""
        pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else list(zip(ours, theirs, strict=True))
        shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in pairs if a.shape != b.shape]
        assert not shapes, f"{what}: shapes differ, {shapes}"
        error = float(torch.stack([(a.detach().double() - b.detach().double()).abs().max().cpu() for a, b in pairs]).max())  # NaN stays
        assert error <= tolerance, f"{what}: max error {error:.2e} > {tolerance:.0e}"
        self.table.add(dict(check=what, max_abs_err=error, tolerance=tolerance))
        print(f"✓ {what} (max error {error:.1e})")
        return error


class Case(nn.Module):
    """call(x, *rest) → its first result. `rest` (tensors) gets gradients, too, as the weights of a layer do."""

    def __init__(self, call, *rest):
        super().__init__()
        self.call, self.rest = call, nn.ParameterList(rest)

    def forward(self, x):
        out = self.call(x, *self.rest)
        return out[0] if isinstance(out, tuple) else out


def library_fits(run, kind, batch, length, chunk, heads, head_width, states, gib=3.0):
    """Whether the eager Mamba-2 path of transformers can be timed: on a CPU, no product that it writes out is above `gib`
    (half of it with gradients), since the system ends a process that takes all memory. On a GPU that is a row, as everywhere.

    Its products, each before its sum: C Bᵀ and its use within chunks, inputs to states, chunk to chunk for all pairs."""
    chunks = -(-length // chunk)
    length, pairs = chunks * chunk, (chunks + 1) ** 2 * heads * head_width * states
    largest = 4 * batch * max(length * chunk * heads * max(states, head_width), length * heads * head_width * states, pairs) / 2**30
    return run.device.type == "cuda" or largest <= (gib if kind == "forward" else gib / 2)


def time_cases(table, cases, kind, limits, known=None, **columns):
    """Compare {name: (x, module)}, one row each; notes its memory and, going forward, FLOPs and the least possible time.

    kind: 'forward' or 'forward+backward', the column `pass`; limits: of the device (see `ceilings`), or {dtype: those} for
    inputs x of several; known: {name: FLOPs} of what the counter does not see; columns: as in `Table.compare`."""
    calls = {name: one_pass(module, x, kind) for name, (x, module) in cases.items()}

    def describe(name):
        x, module = cases[name]
        given = [x, *module.parameters()]
        peak, source = peak_memory(calls[name], table.run.device, given)
        row = dict(peak_mem_mib=peak, mem_source=source, dtype=str(x.dtype).removeprefix("torch."))
        if kind == "forward":
            flops = (known or {}).get(name) or count_flops(calls[name])  # 0: only what the counter does not see
            nbytes = tensor_bytes(given) + x.numel() * x.element_size()  # read all, write an output as large as x
            row |= dict(flops=flops or None, bytes_min=nbytes, limit_ms=limit_ms(flops, nbytes, limits.get(x.dtype, limits)))
        return row

    return table.compare(calls, describe=describe, **columns, **{"pass": kind})


def faster(table, names, **where):
    """The variant, of those named (a layer in its precisions, say), that takes the least time in a comparison; None: none ran."""
    found = [row for row in table.find(status="ok", **where) if row["variant"] in names]
    return min(found, key=lambda row: row["latency_ms_median"])["variant"] if found else None


def attention_flops(batch, length, width, projections=0):
    """FLOPs of causal attention: only the T(T + 1) / 2 pairs that are not masked; and of projections width → width."""
    return 4 * batch * width * (length * (length + 1) // 2) + 2 * projections * batch * length * width**2


def crossing(lengths):
    """A statistic for `redrawn`: the length from which the first half of the medians stays below the second half.

    lengths: ascending; between them it interpolates log-linearly. lengths[0]: from there on or before; inf: from none."""
    check(list(lengths) == sorted(set(lengths)), "lengths", lengths, "numbers that ascend")

    def statistic(medians):
        gain = np.log(medians[len(lengths):]) - np.log(medians[:len(lengths)])
        behind = np.flatnonzero(gain <= 0)
        if not len(behind) or behind[-1] + 1 == len(lengths):
            return math.inf if len(behind) else lengths[0]
        i = behind[-1]
        return lengths[i] * (lengths[i + 1] / lengths[i]) ** (gain[i] / (gain[i] - gain[i + 1]))
    return statistic


def draw_lines(ax, table, x, y="latency_ms_median", names=None):
    """One line per variant, log-log; times with their 20th and 80th percentiles. names: fixes order and so colours."""
    for i, name in enumerate(table["variant"].unique() if names is None else names):
        part, style = table[table["variant"] == name].sort_values(x), series_style(i)
        if len(part):
            ax.loglog(part[x], part[y], label=name, **style)
            if y == "latency_ms_median":
                ax.fill_between(part[x], part["latency_ms_p20"], part["latency_ms_p80"], alpha=0.2, color=style["color"])
    if len(table):
        power_ticks(ax.xaxis, table[x])


def measured(table):
    """(rows, rounds): the rows of a Table that are ok, as a frame, and how many rounds they took, in words."""
    rows = table.save()
    rows = rows[rows["status"] == "ok"].copy()
    ratio = "latency_over_ours"
    for column in ("n_runs", "latency_ms_median", ratio, f"{ratio}_low", f"{ratio}_high"):  # even if all failed
        rows[column] = rows.get(column, float("nan"))
    return rows, " to ".join(f"{n:.0f}" for n in sorted({rows["n_runs"].min(), rows["n_runs"].max()})) + " rounds"
