"""Time, memory and FLOPs of callables, compared fairly: one process, same input, interleaved rounds."""

import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

NOISY = 0.3  # a case whose 20th and 80th percentile lie further apart, as a share of its median, is noisy


def synchronize(device):
    """Wait until the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(fn, device):
    """Milliseconds of one call: CUDA events on a GPU, perf_counter on a CPU."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop)
    begin = time.perf_counter()
    fn()
    return (time.perf_counter() - begin) * 1e3


def attempt(fn, device):
    """Run once. 'ok', 'oom', 'nan' (a non-finite output) or 'error: …': a fault is a row, not a crash."""
    try:
        out = fn()
        synchronize(device)
    except (torch.OutOfMemoryError, MemoryError):
        return "oom"
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        short = "alloc" in text and "memory" in text  # the CPU allocator raises a plain RuntimeError
        return "oom" if short else f"error: {text[:120]}"
    if isinstance(out, torch.Tensor) and out.is_floating_point() and not out.isfinite().all():
        return "nan"
    return "ok"


def compare(cases, rounds, warmup=2, device=None):
    """Time several callables against each other.

    cases: {name: callable without arguments}; rounds: timed calls of each. Every case is warmed up,
    then each round calls all of them once, in a new random order, so that slow drifts of the machine and
    what a neighbour leaves in the caches hit all alike. Returns {name: row}; a failed case keeps its `status`.
    """
    device = device or torch.device("cpu")
    rows = {}
    for name, fn in cases.items():
        status = "ok"
        for _ in range(max(warmup, 1)):
            status = attempt(fn, device) if status == "ok" else status
        rows[name] = dict(status=status, raw_ms=[])
        if status == "oom" and device.type == "cuda":
            torch.cuda.empty_cache()
    good = [name for name in cases if rows[name]["status"] == "ok"]
    shuffle = np.random.default_rng(0)  # of its own: the notebook's generators are not touched
    for _ in range(rounds):
        for i in shuffle.permutation(len(good)):
            rows[good[i]]["raw_ms"].append(time_once(cases[good[i]], device))
    for name in good:
        low, middle, high = np.percentile(rows[name]["raw_ms"], [20, 50, 80])
        rows[name].update(
            latency_ms_median=middle, latency_ms_p20=low, latency_ms_p80=high, n_warmup=max(warmup, 1),
            n_runs=rounds, timer="cuda_event" if device.type == "cuda" else "perf_counter",
            noisy=bool(high - low > NOISY * middle))
    noisy = [str(name) for name in good if rows[name]["noisy"]]
    if noisy and rounds >= 5:
        print(f"a noisy machine: {len(noisy)} of {len(good)} cases spread by more than {NOISY:.0%} of their median "
              f"(20th to 80th percentile): {', '.join(noisy[:5])}{' …' if len(noisy) > 5 else ''}", flush=True)
    return rows


def ratio_interval(raw_a, raw_b, draws=2000):
    """(ratio, low, high) of median(a) / median(b) with a 95 % interval; rounds are paired.

    A bootstrap over rounds; with fewer than eight, where that is too narrow, Student's t on the log ratios of
    the rounds, widened to hold the ratio itself. Without times (a case that failed): three NaN."""
    a, b = np.asarray(raw_a, float), np.asarray(raw_b, float)
    if not len(a) or not len(b):
        return float("nan"), float("nan"), float("nan")
    if len(a) != len(b):
        raise ValueError(f"raw times of {len(a)} and {len(b)} rounds cannot be paired")
    ratio = float(np.median(a) / np.median(b))
    if len(a) < 8:
        from scipy import stats

        logs = np.log(a / b)
        half = stats.t.ppf(0.975, len(a) - 1) * logs.std(ddof=1) / len(a) ** 0.5 if len(a) > 1 else float("nan")
        low, high = np.exp([logs.mean() - half, logs.mean() + half])
        return ratio, float(np.fmin(low, ratio)), float(np.fmax(high, ratio))
    pick = np.random.default_rng(0).integers(0, len(a), (draws, len(a)))
    ratios = np.median(a[pick], axis=1) / np.median(b[pick], axis=1)
    return ratio, *map(float, np.percentile(ratios, [2.5, 97.5]))


def tensor_bytes(tensors):
    """Bytes of tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_memory(fn, device, resident=()):
    """(MiB, source): the resident tensors (weights, inputs) plus the peak of what one call allocates.

    The same definition on both devices, so other live tensors never count. On a CPU the profiler's
    allocation records are added up; memory that a library takes outside PyTorch's allocator is not seen.
    """
    base = tensor_bytes(resident)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before + base) / 2**20, "cuda_max_allocated"
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        fn()
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())]
    return float(max(np.cumsum([0, *changes])) + base) / 2**20, "cpu_live_tensors"


def count_flops(fn):
    """FLOPs of one call as PyTorch's counter sees them: matmuls and convolutions, 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def ceilings(device, dtype=torch.float32, rounds=5):
    """This device's measured limits: the best matmul rate (FLOP/s) and copy bandwidth (bytes/s)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn((256 if device.type == "cuda" else 64) * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    rows = compare({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, 2, device)
    fastest = {name: min(row["raw_ms"]) / 1e3 for name, row in rows.items()}
    return dict(matmul_flops_per_s=2 * n**3 / fastest["matmul"],
                copy_bytes_per_s=2 * tensor_bytes([source]) / fastest["copy"])


def limit_ms(flops, nbytes, limits):
    """The least time this device could need: the larger of compute and memory traffic, in ms."""
    return 1e3 * max(flops / limits["matmul_flops_per_s"], nbytes / limits["copy_bytes_per_s"])


def fit_loglog(x, y):
    """(slope, low, high) of log y over log x with a 95 % interval (Student's t); needs three points."""
    from scipy import stats

    fit = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr
    return float(fit.slope), float(fit.slope - half), float(fit.slope + half)
