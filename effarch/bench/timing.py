"""Time, memory and FLOPs of callables, compared fairly: one process, same input, interleaved rounds."""

import ctypes
import inspect
import math
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from effarch.bench.intervals import ratio_interval
from effarch.checks import check, is_count, is_number

WIDTH = 0.05  # a ratio is known well enough when its 95 % interval is within ± this share of it
LEAST_ROUNDS, MOST_ROUNDS = 5, 200


def synchronize(device):
    """Wait until the device has finished what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_once(fn, device):
    """Milliseconds of one call: CUDA events on a GPU, perf_counter on a CPU and, until it has finished, on an Apple GPU."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        torch.cuda.synchronize(device)
        return max(start.elapsed_time(stop), 1e-6)
    synchronize(device)
    begin = time.perf_counter()
    fn()
    synchronize(device)
    return max((time.perf_counter() - begin) * 1e3, 1e-6)  # a coarse clock may not have moved; ratios need more than 0


def finite(out):
    """False if a real or complex number in `out` (a tensor, an array or a number, or tuples, lists and dicts of them) is not finite."""
    if isinstance(out, torch.Tensor):
        return not (out.is_floating_point() or out.is_complex()) or bool(out.isfinite().all())
    if isinstance(out, (float, complex, np.ndarray, np.inexact)):
        return np.asarray(out).dtype.kind not in "fc" or bool(np.isfinite(out).all())
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (tuple, list)) else ()
    return all(map(finite, parts))


LAZY = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
WORKS = "functions that do their work when they are called, as lambda: list(numbers()) does for a generator function"


def check_works(fn, name="fn"):
    """ValueError unless `fn` can be called and does its work then: a generator or coroutine function only makes an object."""
    check(callable(fn), name, type(fn).__name__, WORKS)
    lazy = any(kind(part) for kind in LAZY for part in (fn, type(fn).__call__))
    check(not lazy, name, "a generator or coroutine function", WORKS)


def check_done(out, name="fn"):
    """ValueError for a result whose work is still to be done, a generator, another iterator, a coroutine or a future."""
    waits = isinstance(out, (Iterator, Awaitable, AsyncIterator)) or hasattr(out, "add_done_callback")
    if waits and inspect.iscoroutine(out):
        out.close()  # else Python warns that nobody awaited it
    check(not waits, name, f"a function that returns a {type(out).__name__}", WORKS)


def status_of(error):
    """'oom' or 'error: …' for an exception that a measured callable raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    short = "alloc" in lines[0] and "memory" in lines[0]  # the CPU allocator raises a plain RuntimeError
    oom = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or short
    return "oom" if oom else f"error: {lines[0][:120]}"


def one_pass(model, x, kind="forward"):
    """A callable for `compare`: one pass of a layer on the input x.

    kind: 'forward' (in inference mode) or 'forward+backward' (the gradients of x and of all trained weights, for a
    gradient of ones)."""
    check(kind in ("forward", "forward+backward"), "kind", kind, "forward, forward+backward")

    def forward():
        with torch.inference_mode():
            return model(x)

    def training():
        leaf = x.detach().requires_grad_()
        y, weights = model(leaf), [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(y, [leaf, *weights], torch.ones_like(y), allow_unused=True)[0]

    return forward if kind == "forward" else training


def attempt(fn, device, name="fn"):
    """Run once. 'ok', 'oom', 'nan' (a non-finite output) or 'error: …': a fault is a row, not a crash. ValueError for what has not
    done its work (see `check_done`)."""
    try:
        out = fn()
        synchronize(device)
        status = "ok" if finite(out) else "nan"
    except Exception as error:
        return status_of(error)
    check_done(out, name)
    return status


def checkpoints(least, most):
    """Numbers of rounds after which the widths are looked at: least, then 1.3 times as many each time, most."""
    at = least
    while at < most:
        yield at
        at = max(at + 1, int(at * 1.3))
    yield most


def check_cases(cases):
    """ValueError unless `cases` are what `compare` takes: {name: function without arguments that does its work when it is called}."""
    check(isinstance(cases, Mapping), "cases", type(cases).__name__, "a dict {name: function without arguments}")
    for name, fn in cases.items():
        check_works(fn, f"cases[{name!r}]")


def compare(cases, device=None, seconds=20.0, rounds=None, warmup=2, against=None, width=WIDTH, clock=time.perf_counter):
    """Time several callables against each other, until their ratios are known or the time is used.

    cases: {name: callable without arguments}; it has to do its work when it is called: generators, coroutines and futures are a
    ValueError. Every case is warmed up (at least once), then each round calls all of them once, in a new random order, so that
    slow drifts of the machine and what a neighbour leaves in the caches hit all alike. It stops when the 95 % interval of every
    case's time over that of `against` (a case or a list of cases; default: the first) is within ±`width`, after 200 rounds, or
    when `seconds` have passed, but not before 5 rounds (3 if a round alone takes longer than `seconds`). The rule looks at
    widths only, never at the result. rounds: exactly so many instead, whatever the clock says.

    Returns {name: row} with status, raw_ms, latency_ms_median, _p20, _p80, n_runs, n_warmup, timer, noisy (True: the
    interval was still wider when the time was used). A failed case, such as one whose output is not finite in the warm-up or after
    the rounds, keeps its `status` and has no times."""
    check_cases(cases)
    check(is_number(seconds) and seconds >= 0 or seconds == math.inf, "seconds", seconds, "a number of at least 0")
    check(is_number(width) and width > 0, "width", width, "a number above 0")
    check(is_count(warmup, 0), "warmup", warmup, "a whole number of at least 0")
    check(rounds is None or is_count(rounds), "rounds", rounds, "None or a whole number of at least 1")
    chosen = lambda: torch.device(device or ("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"))
    check(chosen().type in ("cpu", "cuda", "mps"), "device", device, "cpu, cuda, mps: what others have queued would not be waited for")
    references = against if isinstance(against, list) else [against]
    unknown = [name for name in references if name is not None and name not in cases]
    check(not unknown, "against", unknown, f"names of cases: {', '.join(map(str, cases))}")
    begin = clock()
    rows = {}
    for name, fn in cases.items():
        status = "ok"
        for _ in range(max(warmup, 1)):
            status = attempt(fn, chosen(), f"cases[{name!r}]") if status == "ok" else status
        rows[name] = dict(status=status, raw_ms=[])
        if status == "oom" and chosen().type == "cuda":
            torch.cuda.empty_cache()
    device = chosen()  # now that a first call may have started the GPU
    shuffle = np.random.default_rng(0)  # of its own: the notebook's generators are not touched
    done, wide = 0, []
    looks = set(checkpoints(LEAST_ROUNDS, MOST_ROUNDS))
    begin_rounds = clock()
    while done < (rounds or MOST_ROUNDS):
        good = [name for name in cases if rows[name]["status"] == "ok"]
        for i in shuffle.permutation(len(good)):
            try:
                rows[good[i]]["raw_ms"].append(time_once(cases[good[i]], device))
            except Exception as error:
                rows[good[i]] = dict(status=status_of(error), raw_ms=[])
        done += 1
        if rounds or not good:
            continue
        spent, a_round = clock() - begin, (clock() - begin_rounds) / done
        over = spent + a_round > seconds
        if done in looks or over:
            wide = too_wide({n: rows[n]["raw_ms"] for n in good if rows[n]["raw_ms"]}, references, width)
        if (done >= LEAST_ROUNDS and done in looks and not wide) or (
                over and done >= (3 if a_round > seconds else LEAST_ROUNDS)):
            break
    for name, row in rows.items():
        # once more, untimed: a look at every result would stand between the timed calls
        if row["status"] == "ok" and (status := attempt(cases[name], device, f"cases[{name!r}]")) != "ok":
            rows[name] = dict(status=status, raw_ms=[])
        elif row["status"] == "ok":
            row.update(n_warmup=max(warmup, 1), timer="cuda_event" if device.type == "cuda" else "perf_counter",
                       noisy=name in wide, **summary(row["raw_ms"]))
    if wide:
        print(f"a noisy machine: after {done} rounds {len(wide)} of {len(rows)} ratios are known less well than "
              f"±{width:.0%}: {', '.join(map(str, wide[:5]))}{' …' if len(wide) > 5 else ''}", flush=True)
    if keeping:  # what one comparison has freed would stand beside the next one's tensors, of other sizes
        glibc("malloc_trim", 0)
    return rows


def summary(raw_ms):
    """Columns of a row from its raw times: median, 20th and 80th percentile in ms, and how many there are."""
    low, middle, high = np.percentile(raw_ms, [20, 50, 80])
    return dict(latency_ms_median=float(middle), latency_ms_p20=float(low), latency_ms_p80=float(high), n_runs=len(raw_ms))


def too_wide(raw, references, width):
    """The names in {name: raw times} whose time over that of a reference is not yet known to ±`width`."""
    wide = []
    # a reference that failed leaves the first case in its place
    for reference in [raw[name] for name in references if name in raw] or list(raw.values())[:1]:
        for name, times in raw.items():
            if times is not reference and name not in wide:
                ratio, low, high = ratio_interval(times, reference, draws=500)
                if not (high - low) / 2 <= width * ratio:
                    wide.append(name)
    return wide


def tensor_bytes(tensors):
    """Bytes of tensors, each storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def glibc(function, *given):
    """Call a function of glibc's allocator; elsewhere nothing happens."""
    try:
        getattr(ctypes.CDLL(None), function)(*given)
    except (AttributeError, OSError, TypeError):  # not glibc: leave it as it is
        pass


MMAP_MAX, TRIM_THRESHOLD = -4, -1  # options of mallopt: most blocks of their own for large tensors; when to give memory back
keeping = False


def keep_freed_memory():
    """Let a Linux process keep the memory it frees, as PyTorch's allocator does on a GPU.

    Else every large tensor is new memory that the system clears page by page, and a benchmark of large layers
    measures that instead of the layers."""
    global keeping
    keeping = True
    glibc("mallopt", MMAP_MAX, 0)
    glibc("mallopt", TRIM_THRESHOLD, -1)


@contextmanager
def large_tensors_apart():
    """Give large tensors blocks of their own again for a while. The profiler's many small records would settle in what
    they freed, until no large tensor fits there any more: 1000 steps of 16 MiB took 16 GiB."""
    try:
        if keeping:
            glibc("mallopt", MMAP_MAX, 65536)  # glibc's default
        yield
    finally:
        if keeping:
            glibc("mallopt", MMAP_MAX, 0)


def peak_memory(fn, device, resident=()):
    """(MiB, source): the resident tensors (weights, inputs) plus the peak of what one call allocates.

    The same definition on both devices, so other live tensors never count. On a CPU the profiler's
    allocation records are added up; memory that a library takes outside PyTorch's allocator is not seen."""
    check_works(fn)
    base, device = tensor_bytes(resident), torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        check_done(fn())
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before + base) / 2**20, "cuda_max_allocated"
    cpu = torch.profiler.ProfilerActivity.CPU
    with large_tensors_apart(), torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        check_done(fn())
    records = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())]
    return float(max(np.cumsum([0, *changes])) + base) / 2**20, "cpu_live_tensors"


def count_flops(fn):
    """FLOPs of one call as PyTorch's counter sees them: matmuls, attention and convolutions, 2 per multiply-add. In a backward
    pass the counter takes a grouped convolution for a dense one."""
    check_works(fn)
    # it knows no fused attention on a CPU, none whose heads of queries share one of keys, and not nn.MultiheadAttention's own kernel
    each = lambda q, *shared: [(*s[:-3], q[-3], *s[-2:]) for s in shared]  # shapes, as if keys and values were repeated
    fused = [f"_scaled_dot_product_{kind}" for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")]
    known = {getattr(torch.ops.aten, name): lambda q, k, v, *_, **__: sdpa_flop_count(q, *each(q, k, v)) for name in fused}
    known |= {getattr(torch.ops.aten, f"{name}_backward"): lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(dy, q, *each(q, k, v)) for name in fused}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=known) as counter:
            check_done(fn())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def ceilings(device, dtype=torch.float32, rounds=15, small=False):
    """This device's measured limits: the best matmul rate (FLOP/s) and copy bandwidth of main memory (bytes/s); small: of no use, but at once.

    The second factor lies as a layer's weight does: the other way round some CPUs take ten times as long in bfloat16."""
    n, mib = (64, 1) if small else (8192, 256) if device.type == "cuda" else (1024, 64)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(mib * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    rows = compare({"matmul": lambda: F.linear(a, b), "copy": lambda: target.copy_(source)}, device, rounds=rounds)
    fastest = {name: min(row["raw_ms"], default=float("nan")) / 1e3 for name, row in rows.items()}  # no memory: not known
    return dict(matmul_flops_per_s=2 * n**3 / fastest["matmul"],
                copy_bytes_per_s=2 * tensor_bytes([source]) / fastest["copy"])


def half_type(device):
    """The half precision to use on a device: bfloat16, but float16 on a GPU below compute capability 8.0 (such as a T4)."""
    old = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def limit_ms(flops, nbytes, limits):
    """The least time this device could need: the larger of compute and memory traffic, in ms."""
    return 1e3 * max(flops / limits["matmul_flops_per_s"], nbytes / limits["copy_bytes_per_s"])
