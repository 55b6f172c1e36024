"""effarch.bench: timing until ratios are known, one rule of inference, tables that survive, settings, figures, claims."""

import builtins
import concurrent.futures
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from matplotlib.text import Text
from PIL import Image

from effarch import bench
from effarch.bench import (
    Claims,
    Estimate,
    Table,
    attempt,
    choice,
    compare,
    count,
    decide,
    fit_loglog,
    half_type,
    listing,
    number,
    ratio_interval,
    read_csv,
    share,
    start,
    text,
    write_csv,
)
from effarch.bench import run as run_module
from effarch.bench import tables as tables_module
from effarch.bench import timing as timing_module
from effarch.bench.intervals import bootstrap_mean, seed_ratio, t_interval, wilson

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_windows():
    plt.switch_backend("agg")


def begin(folder, name="ssm/demo", process="0/1", **parameters):
    """Start a run of a notebook that has no cells."""
    given = dict(MODE="smoke", SEED=0, OUT=str(folder), RESUME=True, SECONDS=None) | parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFARCH_PROCESS", process)
        return start(name, given)


@pytest.fixture
def run(tmp_path):
    return begin(tmp_path)


class Clock:
    """A clock that only fake cases move: each call of a case takes as many seconds as it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def case(self, seconds):
        """A callable that takes so many seconds, a number or an iterator of numbers."""
        def fn():
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds
        return fn


@pytest.fixture
def clock(monkeypatch):
    """What times the calls and what keeps the budget is this one clock."""
    fake = Clock()
    monkeypatch.setattr(timing_module.time, "perf_counter", fake)
    return fake


def noise(seed, centre, spread):
    """Times that scatter log-normally around a centre, without end."""
    random = np.random.default_rng(seed)
    while True:
        yield float(centre * np.exp(random.normal(0, spread)))


# timing


def test_comparison_stops_as_soon_as_the_ratio_is_known(clock):
    rows = compare({"a": clock.case(0.1), "b": clock.case(0.2)}, seconds=1000, clock=clock)
    assert [row["n_runs"] for row in rows.values()] == [5, 5] and not rows["b"]["noisy"]
    assert rows["b"]["latency_ms_median"] == pytest.approx(200) and rows["a"]["timer"] == "perf_counter"


def test_the_noisier_the_more_rounds(clock):
    rounds = []
    for spread in (0.01, 0.05, 0.1):
        cases = {"a": clock.case(noise(1, 0.1, spread)), "b": clock.case(noise(2, 0.2, spread))}
        row = compare(cases, seconds=10**6, clock=clock)["b"]
        rounds.append(row["n_runs"])
        assert not row["noisy"]
        ratio, low, high = ratio_interval(row["raw_ms"], row["raw_ms"])
        assert ratio == 1
    assert rounds[0] < rounds[1] < rounds[2]


def test_comparison_stops_when_the_time_is_used_and_says_what_is_noisy(clock, capsys):
    cases = {"a": clock.case(noise(1, 0.1, 0.5)), "b": clock.case(noise(2, 0.2, 0.5)), "c": clock.case(0.1)}
    rows = compare(cases, seconds=20, clock=clock)
    assert 5 <= rows["b"]["n_runs"] < 200 and clock() < 21
    assert rows["b"]["noisy"] and "noisy machine" in capsys.readouterr().out
    assert not compare({"a": clock.case(0.1)}, seconds=20, clock=clock)["a"]["noisy"], "one case has no ratio"


@pytest.mark.parametrize("seconds, expected", [(0.5, 3), (4, 5)])
def test_at_least_five_rounds_but_three_where_one_takes_longer_than_the_budget(clock, seconds, expected):
    cases = {"a": clock.case(noise(1, 0.5, 0.3)), "b": clock.case(noise(2, 0.5, 0.3))}
    assert compare(cases, seconds=seconds, clock=clock)["a"]["n_runs"] == expected


def test_a_number_of_rounds_is_kept_whatever_the_clock_says(clock):
    rows = compare({"a": clock.case(10**6), "b": clock.case(noise(1, 1, 1))}, seconds=1e-9, rounds=7, clock=clock)
    assert all(row["n_runs"] == 7 for row in rows.values())


def test_every_reference_counts_when_widths_are_looked_at(clock):
    """Two cases are known well against a quiet one, but less well against each other."""
    raw = dict(dense=[1.0] * 20, ours=[next(times) for times in [noise(1, 1, 0.1)] for _ in range(20)],
               tome=[next(times) for times in [noise(2, 1, 0.1)] for _ in range(20)])

    def half(of):
        ratio, low, high = ratio_interval(raw["ours"], raw[of], draws=500)
        return (high - low) / 2 / ratio
    assert half("dense") < half("tome")
    between = (half("dense") + half("tome")) / 2
    assert "ours" not in timing_module.too_wide(raw, ["dense"], between)
    assert {"ours", "dense"} & set(timing_module.too_wide(raw, ["dense", "tome"], between)) == {"ours"}
    assert timing_module.too_wide(raw, ["gone"], 10) == [] and timing_module.too_wide({}, ["dense"], 1) == []
    looked_at = compare({n: clock.case(iter(raw[n] * 20)) for n in raw}, seconds=10**6, against=["dense", "tome"], clock=clock)
    assert looked_at["ours"]["status"] == "ok"


def test_known_cost_ratio_is_ranked_right_and_raw_times_are_kept():
    x = torch.randn(192, 192)
    once, many = (lambda: x @ x), (lambda: [x @ x for _ in range(40)][-1])
    rows = compare({"many": many, "once": once}, rounds=9)
    assert rows["many"]["latency_ms_median"] > rows["once"]["latency_ms_median"]
    assert all(len(row["raw_ms"]) == row["n_runs"] == 9 and row["timer"] == "perf_counter" for row in rows.values())
    assert all(r["latency_ms_p20"] <= r["latency_ms_median"] <= r["latency_ms_p80"] for r in rows.values())


def test_rounds_are_interleaved_in_changing_order():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    state = np.random.get_state()[1].tolist()
    compare(cases, rounds=20, warmup=2)
    assert "".join(calls[:6]) == "aabbcc" and np.random.get_state()[1].tolist() == state
    *rounds, looked_at = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert looked_at == "abc" and len(rounds) == 20 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 3


def raising(error):
    def fn():
        raise error
    return fn


FAULTS = [
    (lambda: torch.empty(10**16), "oom"),
    (raising(torch.OutOfMemoryError("CUDA out of memory")), "oom"),
    (raising(MemoryError()), "oom"),
    (lambda: torch.tensor([1.0, float("nan")]), "nan"),
    (lambda: (torch.zeros(2), dict(a=[torch.tensor(float("inf"))])), "nan"),
    (lambda: torch.tensor([complex(0, float("nan"))]), "nan"),
    (lambda: float("nan"), "nan"), (lambda: [np.array([1.0, np.inf])], "nan"), (lambda: dict(a=np.float32("nan")), "nan"),
    (lambda: torch.zeros(2) @ torch.zeros(3), "error: inconsistent"),
    (raising(TypeError("forward() takes 1 argument")), "error: forward() takes 1 argument"),
    (raising(AssertionError()), "error: AssertionError"),
    (raising(ValueError("\nfirst line\nsecond line")), "error: first line"),
    (raising(KeyError("mask")), "error: 'mask'"),
]


def test_finite_numbers_of_every_kind_are_no_fault():
    assert attempt(lambda: (3, 0.5, "x", None, True, np.array([1, 2]), np.array(["x"]), np.float64(2), 2j, torch.tensor([1])), CPU) == "ok"


def test_an_apple_gpu_is_waited_for_and_an_unknown_device_refused(monkeypatch):
    done = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: done.append("waited"))
    rows = compare({"a": lambda: done.append("called")}, device="mps", rounds=3, warmup=1)
    assert rows["a"]["status"] == "ok" and done == ["called", "waited"] + ["waited", "called", "waited"] * 3 + ["called", "waited"]
    with pytest.raises(ValueError, match="device='xpu' is not allowed; allowed: cpu, cuda, mps"):
        compare({"a": lambda: None}, device="xpu", rounds=1)


@pytest.mark.parametrize("fault, status", FAULTS, ids=[f"{i} {status[:20]}" for i, (_, status) in enumerate(FAULTS)])
def test_a_fault_is_a_row_and_the_others_go_on(fault, status):
    rows = compare({"bad": fault, "good": lambda: torch.zeros(3)}, rounds=2)
    assert rows["bad"]["status"].startswith(status) and "\n" not in rows["bad"]["status"] and rows["bad"]["raw_ms"] == []
    assert "latency_ms_median" not in rows["bad"] and rows["good"]["status"] == "ok" and rows["good"]["n_runs"] == 2
    assert attempt(fault, CPU).startswith(status)


@pytest.mark.parametrize("used", [True, False])
def test_who_names_no_device_is_timed_on_the_gpu_that_is_in_use(monkeypatch, used):
    from effarch.bench import timing

    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: used)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(timing, "attempt", lambda fn, device, name: "ok")
    monkeypatch.setattr(timing, "time_once", lambda fn, device: seen.append(device.type) or 1.0)
    timing.compare({"a": lambda: None}, rounds=3)
    assert set(seen) == {"cuda" if used else "cpu"}


@pytest.mark.parametrize("error", [TypeError("late"), AssertionError("late"), RuntimeError("late"), MemoryError("late")])
@pytest.mark.parametrize("who", ["reference", "other"])
def test_a_fault_in_a_timed_round_is_a_row_as_well(clock, error, who):
    """The third call, after two warm-ups, is timed; the reference of all ratios may be the one that fails."""
    def fails_at(n):
        calls = iter(range(10**6))

        def fn():
            clock.now += 0.1
            if next(calls) >= n:
                raise error
        return fn
    cases = {"reference": clock.case(0.1), "other": clock.case(0.2), "third": clock.case(0.2)} | {who: fails_at(4)}
    rows = compare(cases, seconds=60, against="reference", clock=clock)
    assert rows[who]["status"] == ("oom" if isinstance(error, MemoryError) else "error: late") and rows[who]["raw_ms"] == []
    others = [row for name, row in rows.items() if name != who]
    assert all(row["status"] == "ok" and row["n_runs"] >= 5 for row in others)


def test_what_is_not_finite_from_a_later_round_on_is_told(clock):
    calls = iter(range(10**6))

    def spoilt():
        clock.now += 0.1
        return torch.full((2,), float("nan") if next(calls) >= 4 else 1.0)
    rows = compare({"spoilt": spoilt, "good": clock.case(0.2)}, rounds=6, clock=clock)
    assert rows["spoilt"] == dict(status="nan", raw_ms=[])
    assert rows["good"]["raw_ms"] == pytest.approx([200] * 6)


def counting():
    yield 1


async def awaited():
    return 1


async def counting_slowly():
    yield 1


class Counting:
    def __call__(self):
        yield 1


@pytest.mark.parametrize("case", [
    counting, awaited, counting_slowly, Counting(), functools.partial(counting), lambda: counting(), lambda: awaited(), lambda: counting_slowly(),
    lambda: map(abs, [1]), lambda: iter([1]), lambda: torch.futures.Future(), lambda: concurrent.futures.Future(), 3, "f"])
@pytest.mark.filterwarnings("error")
def test_what_would_only_be_made_and_not_run_is_refused(case, run):
    for call in (lambda: compare({"good": lambda: 1, "f": case}, rounds=2), lambda: Table(run, "t", ["variant"]).compare({"f": case}),
                 lambda: timing_module.peak_memory(case, CPU), lambda: timing_module.count_flops(case)):
        with pytest.raises(ValueError, match=r"(cases\['f'\]|fn)=.* is not allowed; allowed: functions that do their work when") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong, words", [
    (dict(seconds=-1), "seconds=-1"), (dict(seconds=math.nan), "seconds=nan"), (dict(seconds=None), "seconds=None"), (dict(seconds="2"), "seconds='2'"),
    (dict(width=0), "width=0"), (dict(width=-0.1), "width=-0.1"), (dict(width=math.nan), "width=nan"), (dict(width=None), "width=None"),
    (dict(warmup=-1), "warmup=-1"), (dict(warmup=1.5), "warmup=1.5"), (dict(warmup=None), "warmup=None"), (dict(rounds=0), "rounds=0"),
    (dict(rounds=2.0), "rounds=2.0"), (dict(against="g"), "against=.'g'.")])
def test_what_a_comparison_cannot_be_told_is_one_line(wrong, words):
    with pytest.raises(ValueError, match=f"{words} is not allowed; allowed: ") as error:
        compare({"f": no_call}, **wrong)
    assert "\n" not in str(error.value)
    for cases in ([no_call], no_call, None):
        with pytest.raises(ValueError, match="cases='[a-zA-Z]*' is not allowed; allowed: a dict {name: function"):
            compare(cases)


def test_all_cases_may_fail_and_none_may_be_there():
    assert compare({"a": raising(TypeError("x"))}, seconds=1)["a"]["status"] == "error: x"
    assert compare({}, seconds=1) == {}


def test_interrupting_is_no_fault():
    with pytest.raises(KeyboardInterrupt):
        compare({"a": raising(KeyboardInterrupt())}, rounds=2)


def test_a_clock_that_stands_still_gives_no_times_of_zero(clock):
    rows = compare({"a": lambda: None, "b": lambda: None}, rounds=3, clock=clock)
    assert all(ms > 0 for row in rows.values() for ms in row["raw_ms"])
    assert ratio_interval(rows["a"]["raw_ms"], rows["b"]["raw_ms"]).value == 1


def test_peak_memory_counts_residents_and_the_high_water_mark():
    x = torch.zeros(2**20)  # 4 MiB

    def two_then_one():
        y = x + 1
        z = y + 1
        del y
        return z + 1
    mib, source = bench.peak_memory(two_then_one, CPU, [x, x.view(2, -1)])
    assert source == "cpu_live_tensors" and mib == pytest.approx(4 + 8, abs=0.1)
    assert bench.peak_memory(lambda: None, CPU)[0] == 0


def test_flops_limits_and_slopes():
    a = torch.randn(64, 64)
    assert bench.count_flops(lambda: a @ a) == 2 * 64**3
    limits = dict(matmul_flops_per_s=1e9, copy_bytes_per_s=1e9)
    assert bench.limit_ms(1e9, 1, limits) == 1e3 and bench.limit_ms(1, 2e9, limits) == 2e3
    found = bench.ceilings(CPU, rounds=1)
    assert all(np.isfinite(v) and v > 0 for v in found.values())
    slope, low, high = fit_loglog([1, 2, 4, 8], [3, 12, 48, 192])
    assert slope == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)


@pytest.mark.parametrize("words", [{}, dict(is_causal=True), dict(attn_mask=torch.ones(50, 50, dtype=torch.bool))])
def test_attention_is_counted_on_a_cpu_too(words):
    q, k, v = torch.randn(3, 2, 3, 50, 16)
    with torch.no_grad():
        assert bench.count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **words)) == 2 * 2 * 2 * 3 * 50 * 50 * 16
    q.requires_grad_()
    both = bench.count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **words).sum().backward())
    assert both > 3 * 2 * 2 * 2 * 3 * 50 * 50 * 16, "backwards at least twice as much"
    layer, x = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval(), torch.randn(2, 40, 16)
    with torch.no_grad():
        assert bench.count_flops(lambda: layer(x, x, x, need_weights=False)) == 2 * (4 * 2 * 40 * 16 * 16 + 2 * 2 * 40 * 40 * 16)
    assert torch.backends.mha.get_fastpath_enabled(), "as it was"


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_with_shared_keys_counts_as_with_repeated_ones(heads):
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k = torch.randn(1, 8, 20, 16).requires_grad_(), torch.randn(1, heads, 30, 16).requires_grad_()
    wide = k.repeat_interleave(8 // heads, 1).detach().requires_grad_()
    assert bench.count_flops(lambda: attend(q, k, k, enable_gqa=True)) == bench.count_flops(lambda: attend(q, wide, wide)) > 0
    both = bench.count_flops(lambda: attend(q, k, k, enable_gqa=True).sum().backward())
    assert both == bench.count_flops(lambda: attend(q, wide, wide).sum().backward()) > 0


# the one rule of inference


def test_ceilings_that_cannot_be_measured_are_unknown(monkeypatch):
    monkeypatch.setattr(timing_module, "attempt", lambda fn, device, name: "oom")
    limits = bench.ceilings(CPU)
    assert all(map(math.isnan, limits.values())) and math.isnan(bench.limit_ms(1e9, 1e6, limits))


def test_interval_covers_the_truth_and_shrinks():
    generator = np.random.default_rng(1)

    def width(n):
        a, b = generator.lognormal(np.log(2), 0.2, n), generator.lognormal(0, 0.2, n)
        ratio, low, high = ratio_interval(a, b)
        assert low <= ratio <= high
        return high - low, low <= 2 <= high
    assert np.mean([width(40)[1] for _ in range(40)]) > 0.8
    assert np.mean([width(200)[0] for _ in range(10)]) < np.mean([width(10)[0] for _ in range(10)])
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio_interval([1, 2], [1])
    assert np.isnan(ratio_interval([], [])).all()  # a case that failed has no ratio, and stops nothing


@pytest.mark.parametrize("processes, rounds, between", [
    (1, 3, 0), (1, 5, 0), (1, 8, 0), (1, 12, 0), (2, 12, 0), (2, 12, 0.1), (3, 12, 0), (3, 12, 0.03), (3, 12, 0.1),
    (3, 30, 0.1), (10, 12, 0.1)])
def test_intervals_hold_the_truth_as_often_as_they_say(processes, rounds, between):
    """About 95 % of them, also where a bootstrap of so few rounds or processes would hold it in 76 %."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        shift = generator.normal(0, between, processes) if between else np.zeros(processes)
        a = [generator.lognormal(np.log(2) + s, 0.05, rounds) for s in shift]
        b = [generator.lognormal(0, 0.05, rounds) for _ in range(processes)]
        ratio, low, high = ratio_interval(a, b, draws=500)
        covered += low <= 2 <= high
        assert low <= ratio <= high
    assert covered / 200 > 0.89


def test_pooled_intervals_are_wider_than_those_of_one_run_where_runs_differ():
    generator = np.random.default_rng(3)

    def times(centre):
        return generator.lognormal(math.log(centre), 0.02, 20).tolist()
    b = [times(1) for _ in range(3)]
    differ, alike = [times(c) for c in (1.8, 2.0, 2.2)], [times(2) for _ in range(3)]
    def width(estimate):
        return estimate.high - estimate.low
    single = max(width(ratio_interval(part, of)) for part, of in zip(differ, b, strict=True))
    assert width(ratio_interval(differ, b)) > 3 * single
    assert width(ratio_interval(alike, b)) < width(ratio_interval(differ, b)) / 3
    for part in (differ, alike):
        ratio, low, high = ratio_interval(part, b)
        logs = [math.log(np.median(x) / np.median(y)) for x, y in zip(part, b, strict=True)]
        assert low < ratio < high and ratio == pytest.approx(math.exp(np.mean(logs)))


def test_processes_that_agree_by_chance_promise_no_more_than_their_rounds():
    generator = np.random.default_rng(4)
    a, b = generator.lognormal(0, 0.2, 10), generator.lognormal(0, 0.2, 10)
    pooled = ratio_interval([a, a], [b, b])
    assert pooled.high - pooled.low > 0.05


NAN = float("nan")


@pytest.mark.parametrize("estimate, limit, verdict", [
    (Estimate(1.5, 1.2, 1.8), dict(above=1), True),
    (Estimate(1.5, 0.9, 1.8), dict(above=1), None),
    (Estimate(0.5, 0.4, 1.0), dict(above=1), False),
    (Estimate(0.5, 0.4, 0.9), dict(below=1), True),
    (Estimate(0.5, 0.4, 0.9), dict(between=(0.3, 1)), True),
    (Estimate(0.5, 0.4, 1.1), dict(between=(0.3, 1)), None),
    (Estimate(2, 1.5, 3), dict(between=(0.3, 1)), False),
    (3, dict(above=2), True), (2, dict(above=2), False), (NAN, dict(above=2), None), (None, dict(above=2), None),
    (Estimate(2.0), dict(above=1), None),
    (Estimate(NAN, NAN, NAN), dict(above=1), None),
    (Estimate(2.0, 2.0, 2.0), dict(above=1), None),
])
def test_one_rule_decides(estimate, limit, verdict):
    assert decide(estimate, **limit) is verdict


@pytest.mark.parametrize("estimate", [
    ratio_interval([2.0], [1.0]), ratio_interval([2.0] * 20, [1.0] * 20), ratio_interval([[2.0], [2.0]], [[1.0], [1.0]]),
    bootstrap_mean([1.0, 1.0]), bootstrap_mean([0.0] * 500), bootstrap_mean([]), t_interval([3.0]), t_interval([2.0] * 5),
    t_interval([]), seed_ratio([2.0], [1.0]), seed_ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]), seed_ratio([0.0, 1], [1.0, 1]),
    seed_ratio([NAN, 1.0], [1.0, NAN]), wilson(0, 0), fit_loglog([1], [1]), fit_loglog([1, 2], [3, 6])], ids=str)
def test_too_few_or_all_equal_values_are_undecided(estimate):
    for limit in (1e-9, 0.5, 1, 1.5, 10):
        assert decide(estimate, above=limit) is None and decide(estimate, below=limit) is None


def test_trainings_are_paired_by_seed(capsys):
    a, b = [2.0, 4.0, 8.0], [1.0, 2.0, 4.1]  # seeds differ fourfold, ratios hardly
    ratio, low, high = seed_ratio(a, b)
    assert 1.9 < low < ratio < high < 2.1
    assert capsys.readouterr().out == ""
    with_a_lost_one = seed_ratio([*a, NAN], [*b, 3.0])
    assert with_a_lost_one == seed_ratio(a, b) and "leaves out 1 of 4 seeds" in capsys.readouterr().out
    assert seed_ratio([1.0], [2.0])[0] == 0.5 and math.isnan(seed_ratio([1.0], [2.0]).low), "one pair has no interval"
    with pytest.raises(ValueError, match="paired by seed"):
        seed_ratio([1.0, 2.0], [1.0])
    assert wilson(1000, 1000).low == pytest.approx(0.9962, abs=1e-4) and wilson(0, 10).high > 0.2


def test_a_share_of_none_or_all_ends_at_none_or_all():
    for n in range(1, 500):
        assert wilson(0, n).low == 0 and wilson(n, n).high == 1 and 0 < wilson(0, n).high < 1 and 0 < wilson(n, n).low < 1
        assert decide(wilson(0, n), above=0) is not True and decide(wilson(n, n), below=1) is not True
    for hits in (11, -1):
        with pytest.raises(ValueError, match=f"hits={hits} .*0 to n=10"):
            wilson(hits, 10)


def test_nothing_is_known_of_one_over_zero():
    assert all(map(math.isnan, Estimate(0.0, -1.0, 1.0).inverse())) and Estimate(2.0, 1.0, 4.0).inverse() == (0.5, 0.25, 1.0)


def test_equal_times_need_a_ratio_that_is_known():
    assert bench.known_to(Estimate(2.0, 1.8, 2.3)) and not bench.known_to(Estimate(2.0, 1.8, 2.5))
    assert bench.known_to(Estimate(1.0, 0.96, 1.04), share=0.05) and not bench.known_to(Estimate(2.0)) and not bench.known_to(Estimate(NAN))


def test_a_check_says_what_failed_and_none_is_a_failure(capsys):
    bench.verify("equal", torch.tensor(1e-6, requires_grad=True), 1e-5)
    assert capsys.readouterr().out == "✓ equal (max error 1.0e-06)\n"
    for error in (2e-5, NAN, torch.tensor(NAN)):
        with pytest.raises(AssertionError, match="^equal: error .* is above 1e-05$"):
            bench.verify("equal", error, 1e-5)


def test_bootstrap_of_a_mean_holds_the_truth():
    generator = np.random.default_rng(5)
    held = [low <= 0.3 <= high for _, low, high in (bootstrap_mean(generator.normal(0.3, 1, 60)) for _ in range(200))]
    assert np.mean(held) > 0.88


@pytest.mark.parametrize("n", [8, 12, 26])
def test_bootstrap_of_few_values_is_wide_enough(n):
    """A plain percentile bootstrap holds the mean of eight values in 87 of 100 cases only."""
    generator = np.random.default_rng(n)
    found = [bootstrap_mean(generator.normal(0.3, 1, n), draws=800) for _ in range(1000)]
    assert 0.93 < np.mean([low <= 0.3 <= high for _, low, high in found]) < 0.985
    assert bootstrap_mean([1.0] * 7 + [0.9])[2] <= 1, "a share or a cosine never passes 1"


def test_bootstrap_with_weights_is_that_of_the_repeated_values():
    values, counts = np.array([0.1, 0.5, 0.9, 0.3, 0.7, 0.2, 0.8, 0.6, 0.4]), np.array([1, 2, 3, 4, 1, 1, 7, 1, 2])
    value, low, high = bootstrap_mean(values, weights=counts)
    assert value == pytest.approx(np.repeat(values, counts).mean()) and low < value < high
    assert bootstrap_mean(values, weights=np.full(9, 3)) == pytest.approx(bootstrap_mean(values))
    assert bootstrap_mean(values[:3], weights=counts[:3])[0] == pytest.approx(np.repeat(values[:3], counts[:3]).mean())


# settings and runs


@pytest.mark.parametrize("words, name", [
    (dict(MODE="fast"), "MODE"), (dict(MODE=None), "MODE"), (dict(MODE=["quick"]), "MODE"), (dict(SEED=-1), "SEED"),
    (dict(SEED=True), "SEED"), (dict(SEED=0.5), "SEED"), (dict(RESUME="no"), "RESUME"), (dict(OUT=" "), "OUT"),
    (dict(OUT=3), "OUT"), (dict(SECONDS=0), "SECONDS"), (dict(SECONDS="3"), "SECONDS"), (dict(SECONDS=NAN), "SECONDS")])
def test_wrong_settings_name_parameter_value_and_what_is_allowed(tmp_path, words, name):
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed; allowed: ") as error:
        begin(tmp_path, **words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


PRESETS = dict(quick=4, full=8, smoke=2)


@pytest.mark.parametrize("setting, good, bad", [
    (count(**PRESETS), [1, 7], [0, -1, 1.5, True, "3", [1]]),
    (count(least=2, most=4, **PRESETS), [2, 4], [1, 5]),
    (number(0, above=True, **PRESETS), [0.1, 3], [0, -1, NAN, float("inf"), "1", True]),
    (share(**PRESETS), [0.5, 1], [0, 1.01, "0.5"]),
    (choice("a", "b", **dict.fromkeys(PRESETS, "a")), ["b"], ["c", 1, ["a"]]),
    (text(**dict.fromkeys(PRESETS, "x")), ["a b"], ["", "  ", 3]),
    (listing(count(), **dict.fromkeys(PRESETS, [1])), [[1], (2, 3)], [[], [0], "12", 3, [1, "2"], {1: 2}]),
    (listing(number(0), length=2, **dict.fromkeys(PRESETS, [1, 2])), [[0, 1]], [[1], [1, 2, 3]]),
    (listing(count(), ascending=True, **dict.fromkeys(PRESETS, [1])), [[7], [1, 2, 9]], [[2, 1], [1, 1], [1, 3, 2], [0, 1], []]),
])
def test_settings_take_what_is_allowed_and_refuse_the_rest_in_one_line(setting, good, bad):
    for value in good:
        assert setting.resolve("NAME", value, "quick", False) == value
    for value in bad:
        with pytest.raises(ValueError, match=r"^NAME=.* is not allowed; allowed: None or ") as error:
            setting.resolve("NAME", value, "quick", False)
        assert "\n" not in str(error.value)


def test_presets_by_mode_and_device():
    setting = count(quick=4, full=8, smoke=2, cuda=16)
    found = {(mode, cuda): setting.resolve("N", None, mode, cuda) for mode in ("quick", "full", "smoke") for cuda in (0, 1)}
    assert found == {("quick", 0): 4, ("quick", 1): 4, ("full", 0): 8, ("full", 1): 16, ("smoke", 0): 2, ("smoke", 1): 2}
    assert choice("a", None).resolve("N", None, "full", False) is None
    with pytest.raises(ValueError, match="N=None is not allowed; allowed: a whole number"):
        count().resolve("N", None, "full", False)
    with pytest.raises(ValueError, match="presets"):
        count(quick=1, full=2)


def test_a_missing_parameter_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"parameters=\['SECONDS', 'BATCH'\] is not allowed"):
        start("ssm/demo", dict(MODE="smoke", SEED=0, OUT=str(tmp_path), RESUME=True), BATCH=count(**PRESETS))


def test_smoke_counts_rounds_and_other_modes_take_seconds(tmp_path, monkeypatch):
    assert begin(tmp_path).timing == dict(rounds=2, warmup=1)
    assert begin(tmp_path, MODE="quick").timing == dict(seconds=4.0)
    assert begin(tmp_path, MODE="quick", SECONDS=7).timing == dict(seconds=7)
    monkeypatch.setenv("EFFARCH_SECONDS_SHARE", "0.25")
    assert begin(tmp_path, MODE="quick").timing == dict(seconds=1.0)
    assert begin(tmp_path, MODE="quick", SECONDS=7).timing == dict(seconds=7), "who sets it gets it"


def test_quick_results_never_lie_among_published_ones(tmp_path):
    places = {mode: begin(tmp_path / mode, MODE=mode, SECONDS=1).results.relative_to(tmp_path / mode)
              for mode in ("quick", "full")}
    assert places["quick"].name == places["full"].name + "-quick" and places["quick"].parent == places["full"].parent
    deep = start("vlm/demo", dict(MODE="quick", SEED=0, OUT=str(tmp_path), RESUME=True, SECONDS=None), weights="clip")
    assert deep.results.name == "clip" and deep.results.parent.name.endswith("-quick")
    assert deep.figures.relative_to(tmp_path / "figures") == deep.results.relative_to(tmp_path / "results")


def test_smoke_writes_beside_no_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run_all.sh").touch()
    inside = tmp_path / "ssm"
    inside.mkdir()
    monkeypatch.chdir(inside)
    assert begin(None, OUT=None).root == tmp_path / ".scratch"
    assert begin(None, OUT=None, MODE="quick").root == tmp_path


def test_slug_is_a_plain_folder_name():
    assert run_module.device_slug(CPU).startswith("cpu-")
    assert set(run_module.device_slug(CPU)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_seed_repeats(tmp_path):
    draws = []
    for _ in range(2):
        begin(tmp_path, SEED=7)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]


def test_keeping_freed_memory_needs_no_particular_system(monkeypatch):
    timing_module.keep_freed_memory()
    assert torch.zeros(2**24).sum() == 0  # large tensors still come and go
    monkeypatch.setattr(timing_module.ctypes, "CDLL", lambda name: object())  # a system without glibc
    timing_module.keep_freed_memory()
    with timing_module.large_tensors_apart():
        pass


MANY_LARGE = """
import resource, torch
from effarch.bench.timing import keep_freed_memory, peak_memory
torch.set_num_threads(1)
keep_freed_memory()

def many(n):
    kept = []
    for _ in range(n):
        large = torch.zeros(2**20)
        kept += [large[:9] + 1 for _ in range(20)]
    return kept

peak, _ = peak_memory(lambda: many(3), torch.device("cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert peak < 10, peak
peak_memory(lambda: many(300), torch.device("cpu"))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_measuring_the_memory_of_many_steps_does_not_use_it_up():
    """300 steps that free 4 MiB each: what the profiler notes down must not keep their places."""
    done = subprocess.run([sys.executable, "-c", MANY_LARGE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 600, "MiB, of the 1200 that were in use one after another"


def test_progress_lines_name_the_step(run, capsys):
    done = list(run.steps([dict(a=1), ("b", 2), "c"], "training"))
    lines = capsys.readouterr().out.splitlines()
    assert done == [dict(a=1), ("b", 2), "c"] and len(lines) == 3
    assert "training 1/3: a 1" in lines[0] and "training 2/3: b, 2 (about" in lines[1] and lines[1].endswith("s left)")


def test_a_clock_going_backwards_changes_nothing(tmp_path, monkeypatch, capsys):
    """Every look at the clock is an hour earlier than the last: an interrupted run still continues, no time is negative."""
    hours = iter(range(1000))

    class Backwards(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, tzinfo=tz) - timedelta(hours=next(hours))

    monkeypatch.setattr(run_module, "datetime", Backwards)
    monkeypatch.setattr(time, "time", lambda: -1e6)
    first = begin(tmp_path)
    Table(first, "t", ["i"]).compare({"0": lambda: time.sleep(0.001)}, name="i")
    second = begin(tmp_path)
    assert second.row["utc_time"] < first.row["utc_time"]
    table = Table(second, "t", ["i"])
    assert table.has(i="0") and "going on with 1 rows of an interrupted run" in capsys.readouterr().out
    assert table.save()["latency_ms_median"].iloc[0] > 0
    second.finish()
    assert json.loads((second.results / "demo.env.json").read_text())["seconds"] >= 0


# tables


def test_table_holds_key_measurements_and_provenance(run):
    table = Table(run, "t", ["variant", "seq_len"])
    table.add([dict(variant="nan", seq_len=3, latency_ms_median=np.float64(1.23456789), raw_ms=[1.0, 2.0]),
               dict(variant="b", seq_len=np.int64(4), status="oom")])
    assert table.has(variant="b") and table.has(variant="nan", seq_len=3) and not table.has(variant="c")
    assert table.has(seq_len=np.int64(4)) and table.find(seq_len=4)[0]["variant"] == "b"
    frame = table.save()
    assert list(frame.columns[:3]) == ["variant", "seq_len", "latency_ms_median"]
    assert frame["variant"].tolist() == ["nan", "b"], "a name is a name, only an empty cell is missing"
    assert frame["status"].tolist() == ["ok", "oom"] and frame["latency_ms_median"].isna().tolist() == [False, True]
    provenance = "run_id device compute_capability dtype torch cuda transformers python num_threads weights " \
                 "git_commit git_dirty seed utc_time mode"
    assert set(provenance.split()) <= set(frame)
    raw = read_csv(run.results / "t_raw.csv")
    assert raw["latency_ms"].tolist() == [1.0, 2.0] and raw["i"].tolist() == [0, 1] and raw["process"].tolist() == [0, 0]


def test_a_table_without_rows_is_a_table(run):
    frame = Table(run, "t", ["variant", "seq_len"]).save()
    assert list(frame) == ["variant", "seq_len", "status"] and len(frame) == 0


def test_a_row_without_its_key_is_refused(run):
    with pytest.raises(ValueError, match="missing: \\['seq_len'\\]"):
        Table(run, "t", ["seq_len"]).add(dict(variant="a"))


def no_call():
    raise AssertionError("nothing should be measured")


@pytest.mark.parametrize("key, words, said", [
    (["length"], dict(length=8), "'variant' and the columns given"),
    (["variant", "length"], dict(), r"missing: \['length'\]"),
    (["variant"], dict(ratios=dict(ratio="dense")), r"reference=\['dense'\] is not allowed; allowed: one of the cases: a")])
def test_a_comparison_that_could_not_be_filed_is_refused_before_it_is_measured(run, key, words, said):
    with pytest.raises(ValueError, match=said):
        Table(run, "t", key).compare({"a": no_call}, **words)


def test_a_comparison_adds_rows_ratios_and_what_describes_them(run, capsys):
    table = Table(run, "t", ["variant", "length"])
    rows = table.compare({"dense": lambda: torch.zeros(3), "ours": lambda: torch.zeros(3), "bad": raising(TypeError("no"))},
                         ratios=dict(ratio="dense"), speedups=dict(speedup="dense"), length=8, batch=2,
                         describe=lambda name: dict(params=len(name)))
    assert rows["ours"]["params"] == 4 and rows["ours"]["batch"] == 2 and rows["ours"]["length"] == 8
    assert rows["dense"]["ratio"] == 1 and rows["ours"]["ratio"] == pytest.approx(1 / rows["ours"]["speedup"])
    assert rows["ours"]["ratio_low"] <= rows["ours"]["ratio"] <= rows["ours"]["ratio_high"]
    assert rows["bad"]["status"] == "error: no" and "params" not in rows["bad"] and math.isnan(rows["bad"]["speedup"])
    frame = table.save()
    assert frame["status"].tolist() == ["ok", "ok", "error: no"] and frame["speedup"].isna().tolist() == [False, False, True]
    assert "length 8 [ms, 2 rounds]: dense " in capsys.readouterr().out


def test_a_reference_that_fails_leaves_the_ratios_empty(run):
    table = Table(run, "t", ["variant"])
    rows = table.compare({"dense": raising(MemoryError()), "ours": lambda: None}, ratios=dict(ratio="dense"))
    assert rows["dense"]["status"] == "oom" and rows["ours"]["status"] == "ok" and math.isnan(rows["ours"]["ratio"])
    assert table.save()["ratio_low"].isna().all()


def test_a_crash_while_writing_keeps_the_old_file(run, monkeypatch):
    path = run.results / "t.csv"
    write_csv(path, pd.DataFrame({"a": [1]}))
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_csv(path, pd.DataFrame({"a": [2]}))
    assert path.read_bytes() == old and not list(run.results.glob(".*.tmp"))


def test_an_interrupted_run_goes_on_but_only_the_same(tmp_path, monkeypatch, capsys):
    Table(begin(tmp_path), "t", ["i"]).add(dict(i=0))
    again = begin(tmp_path)
    assert Table(again, "t", ["i"]).has(i=0) and again.continued
    assert "going on with 1 rows of an interrupted run" in capsys.readouterr().out
    monkeypatch.setattr(tables_module, "code_fingerprint", lambda: "other code")
    assert not Table(begin(tmp_path), "t", ["i"]).has(i=0)
    assert "starting over, code, parameters, weights, images or versions differ" in capsys.readouterr().out
    monkeypatch.undo()
    Table(begin(tmp_path), "t", ["i"]).add(dict(i=0))
    assert not Table(begin(tmp_path, SEED=1), "t", ["i"]).has(i=0)
    Table(begin(tmp_path), "t", ["i"]).add(dict(i=0))
    assert not Table(begin(tmp_path, RESUME=False), "t", ["i"]).has(i=0)
    Table(begin(tmp_path), "t", ["i"]).add(dict(i=0))
    other = begin(tmp_path)
    other.inputs["checkpoint"] = "a hash of other weights"
    assert not Table(other, "t", ["i"]).has(i=0)


@pytest.mark.parametrize("key", [(64, 64), [64, 64], Path("a/b"), torch.float32, np.int64(3), "x", None])
def test_a_key_of_any_type_is_found_again(tmp_path, key):
    """Rows go through JSON, where a tuple is a list: asked for with a tuple they were once not there, and not pooled."""
    for process in range(2):
        table = Table(begin(tmp_path, process=f"{process}/2"), "t", ["variant", "shape"])
        assert table.has(variant="a", shape=key) is False
        rows = table.compare({"a": lambda: None, "b": lambda: None}, ratios=dict(ratio="b"), shape=key)
    assert [len(row["raw_ms"]) for row in rows.values()] == [2, 2], "both processes"
    assert len(table.find(shape=key)) == 2 and table.ratio("a", "b", shape=key).value > 0
    assert table.best("ratio", shape=key, variant="a")["variant"] == "a"


@pytest.mark.parametrize("beside", [0.5, 7, "dense", None])
@pytest.mark.parametrize("value", [1.0, -2.0, 0.25, 1 / 3, 1e-7, 3, True, "x", "v1.0"])
def test_a_key_is_spelled_as_in_the_file_whatever_stands_beside_it(tmp_path, value, beside):
    tables_module.write_csv(tmp_path / "t.csv", pd.DataFrame([dict(k=value), dict(k=beside)]))
    assert tables_module.spelled(tables_module.rows_of(tmp_path / "t.csv")[0]["k"]) == tables_module.spelled(value)


def test_rows_of_a_run_that_read_something_else_are_not_taken_over(tmp_path):
    run = begin(tmp_path)
    run.before, run.inputs = dict(inputs=dict(checkpoint="a", images="b")), dict(checkpoint="a", learn="c")
    Table(run, "t", ["i"])  # what the old run did not tell of is taken
    run.inputs = dict(checkpoint="a", images="other")
    with pytest.raises(ValueError, match="--redraw, --retime='other images' is not allowed; allowed: what that run read"):
        Table(run, "t", ["i"])


def test_rows_that_wait_are_in_the_table_once_they_are_asked_for(tmp_path):
    first = Table(begin(tmp_path), "t", ["i", "j"])
    for i in range(2):
        first.add([dict(i=i, j=j) for j in range(2)])
    table = Table(begin(tmp_path), "t", ["i", "j"])
    assert table.rows == [] and not table.has(i=2)
    assert table.has(i=1) and [(row["i"], row["j"]) for row in table.rows] == [(1, 0), (1, 1)]


@contextlib.contextmanager
def kernel(*cells):
    """As if these cells had been run in a notebook."""
    with pytest.MonkeyPatch.context() as patch:
        shell = type("Shell", (), {"user_ns": {"In": ["", *cells]}})
        patch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
        yield


def test_code_run_in_the_kernel_is_part_of_the_identity():
    def fingerprint(*cells):
        with kernel(*cells):
            return run_module.code_fingerprint()
    assert fingerprint("a = 1", "b = 2") == fingerprint("a = 1", "b = 2", "b = 2"), "a cell run twice is the same code"
    assert fingerprint("a = 1", "b = 2") != fingerprint("a = 1", "b = 3")


def test_an_edit_is_measured_again_and_what_came_before_it_is_not(tmp_path):
    """A reader edits a class after the table was made, and runs that cell and the measuring one again."""
    calls = []
    def case():
        calls.append(1)
    setup, edited, measure = "table = Table(…)", "class Ours: new", "table.compare(…)"
    with kernel(setup):
        table = Table(begin(tmp_path), "t", ["variant"])
    with kernel(setup, "class Ours: old", measure):
        table.compare({"ours": case})
        table.compare({"ours": case})
        assert len(calls) == 4, "one warm-up, two rounds, one look at the result; the same code is not measured twice"
        assert table.has(variant="ours")
    with kernel(setup, "class Ours: old", measure, edited, measure):
        assert not table.has(variant="ours")
        table.compare({"ours": case})
    assert len(calls) == 8 and len(table.rows) == 1
    with kernel(setup):  # the kernel was restarted, before the run was finished
        table = Table(begin(tmp_path), "t", ["variant"])
    with kernel(setup, edited, measure):
        table.compare({"ours": case})
    assert len(calls) == 12
    with kernel(setup):  # again, without an edit
        table = Table(begin(tmp_path), "t", ["variant"])
    with kernel(setup, edited, measure):
        table.compare({"ours": no_call})


def test_one_more_case_joins_a_comparison(run):
    """A 'try your own' cell: the comparison is run again with another case."""
    table = Table(run, "t", ["variant"])
    cases = {"a": lambda: None, "b": lambda: None}
    table.compare(cases, ratios=dict(ratio="a"))
    rows = table.compare(cases | {"mine": lambda: None}, ratios=dict(ratio="a"))
    assert set(rows) == {"a", "b", "mine"} and all(len(row["raw_ms"]) == 1 for row in rows.values())


@pytest.mark.parametrize("damage", [b'{"half a ro', b"\x00\xff\xfe garbage\n", b"[1, 2\n{}\n"])
def test_a_damaged_journal_loses_only_what_is_damaged(tmp_path, damage):
    first = Table(begin(tmp_path), "t", ["i"])
    first.add(dict(i=0))
    with open(first.journal, "ab") as file:
        file.write(damage)
    again = Table(begin(tmp_path), "t", ["i"])
    assert again.has(i=0) and len(again.rows) == 1
    again.add(dict(i=1))
    third = Table(begin(tmp_path), "t", ["i"])
    assert [i for i in range(3) if third.has(i=i)] == [0, 1]


def test_finish_leaves_no_journal(run):
    table = Table(run, "t", ["i"])
    table.add(dict(i=0))
    table.save()
    run.finish()
    assert sorted(p.name for p in run.results.iterdir()) == ["demo.env.json", "t.csv"]
    assert not Table(run, "t", ["i"]).has(i=0)


# several processes


def in_processes(folder, n, body):
    """Run body(process, table, run) in n simulated processes, as `run_all.sh --repeat n` does; returns the last table."""
    for i in range(n):
        run = begin(folder, process=f"{i}/{n}")
        table = Table(run, "t", ["variant", "length"])
        body(i, table, run)
        frame = table.save()
        run.finish()
        table.file.close()
    return frame


def test_processes_are_pooled_and_nothing_else_is_done_twice(tmp_path, clock):
    described, trained = [], []

    def body(i, table, run):
        for length in (1, 2):
            cases = {"dense": clock.case(2.0), "ours": clock.case(1.0 + 0.1 * i)}
            table.compare(cases, speedups=dict(speedup="dense"), length=length,
                          describe=lambda name: described.append(name) or dict(params=3))
        if not table.has(variant="trained", length=0):
            trained.append(i)
            table.add(dict(variant="trained", length=0, error=0.5))
    frame = in_processes(tmp_path, 3, body)
    assert len(described) == 4 and trained == [0]
    assert frame["variant"].tolist() == ["dense", "ours", "dense", "ours", "trained"]
    times = frame[frame["variant"] != "trained"]
    assert (times["n_runs"] == 6).all() and (times["params"] == 3).all()
    ours = frame[frame["variant"] == "ours"].iloc[0]
    assert ours["speedup"] == pytest.approx(np.exp(np.mean(np.log([2 / 1.0, 2 / 1.1, 2 / 1.2]))))
    assert ours["speedup_high"] / ours["speedup_low"] > 1.3, "the processes differ"
    raw = read_csv(next(tmp_path.rglob("t_raw.csv")))
    assert raw.groupby(["variant", "length"])["process"].apply(list).iloc[0] == [0, 0, 1, 1, 2, 2]
    facts = json.loads(next(tmp_path.rglob("demo.env.json")).read_text())
    assert facts["processes"] == 3 and len(facts["process_seconds"]) == 3
    assert facts["seconds"] == pytest.approx(sum(facts["process_seconds"]), abs=0.11)
    assert not list(tmp_path.rglob("*.journal"))


def test_the_best_row_is_finite_and_ok(tmp_path):
    table = Table(begin(tmp_path), "t", ["variant", "length"])
    table.add([dict(variant=v, length=n, error=e, status=s) for v, n, e, s in (
        ("a", 1, 0.5, "ok"), ("b", 1, NAN, "ok"), ("c", 1, 0.1, "oom"), ("d", 1, 0.2, "ok"), ("e", 1, None, "ok"), ("a", 2, 0.0, "ok"))])
    assert table.best("error", length=1)["variant"] == "d" and table.best("error", most=True, length=1)["variant"] == "a"
    assert table.best("error", length=3) is None and table.best("wrong", length=1) is None


def test_columns_that_a_later_cell_adds_to_a_comparison_keep_the_other_processes_times(tmp_path, clock, monkeypatch):
    from effarch.bench import tables

    def body(i, table, run):
        monkeypatch.setattr(tables, "cells_fingerprint", lambda: "one cell")
        rows = table.compare({"dense": clock.case(2.0), "ours": clock.case(1.0)}, length=1)
        monkeypatch.setattr(tables, "cells_fingerprint", lambda: "two cells")
        table.add([dict(row, per_token=row["latency_ms_median"] / 4) for row in rows.values()])
    frame = in_processes(tmp_path, 3, body)
    assert (frame["n_runs"] == 6).all() and (frame["per_token"] == frame["latency_ms_median"] / 4).all()
    assert read_csv(next(tmp_path.rglob("t_raw.csv")))["process"].nunique() == 3


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_fails_in_one_process_has_failed(tmp_path, clock, failing):
    """Its row has a status, no times of the other processes and no ratio; the others are pooled."""
    attempts = []

    def body(i, table, run):
        def ours():
            clock.now += 1
            attempts.append(i)
            if i == failing:
                raise MemoryError()
        table.compare({"dense": clock.case(2.0), "ours": ours, "other": clock.case(1.0)}, length=1,
                      ratios=dict(ratio="dense"), describe=lambda name: dict(params=3))
    frame = in_processes(tmp_path, 3, body).set_index("variant")
    assert frame["status"].to_dict() == {"dense": "ok", "ours": "oom", "other": "ok"}
    assert frame.loc["ours", ["latency_ms_median", "ratio", "n_runs", "params"]].isna().all()
    assert frame.loc["dense", "n_runs"] == frame.loc["other", "n_runs"] == 6
    assert frame.loc["other", "ratio"] == pytest.approx(0.5)
    assert max(attempts) == failing, "it is not tried again"


def test_a_reference_that_fails_in_the_second_process_takes_its_ratios_away(tmp_path, clock):
    def body(i, table, run):
        table.compare({"dense": raising(MemoryError()) if i else clock.case(2.0), "ours": clock.case(1.0)}, length=1,
                      ratios=dict(ratio="dense"))
    frame = in_processes(tmp_path, 2, body).set_index("variant")
    assert frame["ratio"].isna().all() and frame.loc["ours", "n_runs"] == 4


def test_a_process_that_was_killed_is_done_again_and_counts_once(tmp_path, clock):
    def measured(process, cut=None):
        run = begin(tmp_path, process=f"{process}/2")
        table = Table(run, "t", ["variant", "length"])
        for length in (1, 2, 3):
            if length == cut:
                table.file.close()
                return None
            table.compare({"a": clock.case(1.0), "b": clock.case(1.0)}, length=length)
        frame = table.save()
        run.finish()
        table.file.close()
        return frame
    measured(0, cut=2)
    measured(0)
    measured(1, cut=3)
    measured(0)  # the runner begins with the first process again: all is there
    frame = measured(1)
    assert frame["n_runs"].tolist() == [4] * 6


HOLD = """import sys; sys.path.insert(0, {root!r})
from effarch.bench import Table, start
run = start("ssm/demo", dict(MODE="smoke", SEED=0, OUT=sys.argv[1], RESUME=True, SECONDS=None))
table = Table(run, "t", ["i"])
print("holding", flush=True)
sys.stdin.read()"""


def test_two_processes_on_the_same_table_are_kept_apart(tmp_path):
    words = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(tmp_path)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "holding" not in holder.stdout.readline():
        pass
    with pytest.raises(RuntimeError, match="another run is writing t.csv"):
        Table(begin(tmp_path), "t", ["i"])
    holder.kill()
    holder.wait()
    assert not Table(begin(tmp_path), "t", ["i"]).has(i=0), "a dead run holds nothing"


# figures and claims


def draw(run, name="f", **words):
    fig, ax = plt.subplots()
    ax.plot([1, 2], **bench.series_style(0))
    bench.save_figure(run, fig, name, "a line", n="3 rounds", **words)


@pytest.mark.parametrize("where", ["outside upper center", "outside lower center", "outside right upper", None])
@pytest.mark.parametrize("whose", ["figure", "axes"])
def test_a_long_title_and_a_legend_at_the_top_stand_clear_of_each_other(where, whose):
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot([1, 2], label="a line")
    fig.legend(loc=where) if where else None
    (fig.suptitle if whose == "figure" else ax.set_title)("a finding that is told in so many words that it has to be broken into several lines, " * 2)
    bench.figures.place_headline(fig)
    fig.canvas.draw()
    texts = [text for text in fig.findobj(Text) if text.get_text().strip() and text.get_visible()]
    boxes = [text.get_window_extent() for text in texts]
    assert any(text.get_text().count("\n") > 1 for text in texts)
    long = [i for i, text in enumerate(texts) if "finding" in text.get_text() or text.get_text() == "a line"]
    assert all(0 <= boxes[i].x0 and boxes[i].x1 <= fig.bbox.width and boxes[i].y1 <= fig.bbox.height for i in long)
    assert not any(boxes[i].overlaps(boxes[j]) for i in long for j in range(len(boxes)) if i != j)
    plt.close(fig)


@pytest.mark.parametrize("variant, words", [
    ("SplitMRSS r=8 α=0.875", "SplitMRSS: 7/8 at 1/8"), ("SplitMRSS r=2 α=0.6, mixed", "SplitMRSS: 3/5 at 1/2, mixed"),
    ("Dilated twin α=0.5, aligned", "Dilated twin: 1/2 slow, aligned"), ("MRSS r=4", "MRSS at 1/4"), ("MyMRSS", "MyMRSS")])
def test_layers_have_names_without_symbols(variant, words):
    assert bench.in_words(variant) == words


def test_figure_is_the_same_bytes_twice_and_says_what_it_shows(run):
    draw(run)
    first = (run.figures / "f.png").read_bytes()
    draw(run, "f.png")
    assert first == (run.figures / "f.png").read_bytes()
    assert Image.open(run.figures / "f.png").info["Description"] == "a line"
    draw(run, "photo", photo=True)
    assert Image.open(run.figures / "photo.jpg").getexif()[0x010E] == "a line"
    assert {p.name for p in run.figures.iterdir()} == {"f.png", "photo.jpg"} and not plt.get_fignums()


def test_a_notebook_shows_the_very_file(run, monkeypatch):
    """No second rendering: laying a figure out takes longer than all the rest."""
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(plt, "show", no_call)
    with kernel("draw()"):
        draw(run)
        draw(run, "photo", photo=True)
    png, jpg = shown
    assert png.data == (run.figures / "f.png").read_bytes() and jpg.data == (run.figures / "photo.jpg").read_bytes()
    assert (png.format, jpg.format, png.alt, png.width) == ("png", "jpeg", "a line", 800)


def test_series_are_told_apart_without_colour():
    marks = [(bench.series_style(i)["marker"], bench.series_style(i)["linestyle"]) for i in range(8)]
    assert len(set(marks)) == 8 and len({mark for mark, _ in marks}) == 8


def test_claims_are_judged_by_the_rule_and_keep_other_notebooks_rows(run, tmp_path):
    other = Claims(begin(tmp_path, "ssm/other"), "A03")
    other.skip("A03", "no such device")
    other.save()
    claims = Claims(run, "A01 A02 A08 A09")
    assert claims.judge("A01", Estimate(1.5, 1.2, 1.9), "because", "t.csv: i=0", above=1, n=20, n_of="rounds") == bench.SUPPORTED
    assert claims.judge("A02", Estimate(1.5, 0.9, 1.9), "because", "t.csv: i=1", above=1) == bench.UNDECIDED
    assert claims.judge("A08", 3, "because", "t.csv: i=2", below=1) == bench.NOT_SUPPORTED
    with pytest.raises(ValueError, match=r"claims=\['A09'\]"):
        claims.save()
    claims.judge("A09", Estimate(1.5), "too few", "t.csv: i=3", above=1)
    shown = claims.save()
    assert shown["verdict"].tolist() == ["supported", "undecided", "not supported", "undecided"]
    assert shown["statement"].tolist() == [bench.statements()[i]["statement"] for i in ("A01", "A02", "A08", "A09")]
    assert read_csv(run.results / "claims.csv")["id"].tolist() == ["A01", "A02", "A03", "A08", "A09"]
    claims.save()
    assert len(read_csv(run.results / "claims.csv")) == 5


@pytest.mark.parametrize("call, said", [
    (lambda c: c.judge("Z9", 1, "because", "t.csv: i=0", above=1), "claim='Z9'"),
    (lambda c: c.judge("A01", 1, "because", "", above=1), "source=''"),
    (lambda c: c.conclude("A01", "true", "because", 1, "t.csv: i=0"), "verdict='true'"),
    (lambda c: c.conclude("A01", bench.SUPPORTED, "because"), "measured=None"),
    (lambda c: Claims(c.run, "A01 Q7"), r"claims=\['Q7'\]")])
def test_claims_need_a_known_id_a_number_and_its_source(run, call, said):
    with pytest.raises(ValueError, match=said):
        call(Claims(run, "A01"))


@pytest.mark.parametrize("commit", ["4531973809", "0531973809", "45319738e9", "453197e809"])
def test_provenance_that_looks_like_a_number_stays_text(tmp_path, commit):
    run, other = begin(tmp_path), begin(tmp_path, "ssm/other")
    for made, claim, given in ((run, "A01", commit), (other, "A02", "a76e3560f1")):
        made.row |= dict(git_commit=given, python="3.10")
        claims = Claims(made, claim)
        claims.judge(claim, 3.0, "because", "t.csv: i=0", above=1)
        claims.save()
    assert read_csv(run.results / "claims.csv")["git_commit"].tolist() == [commit, "a76e3560f1"]
    table = Table(run, "t", key=["variant"])
    table.add([dict(variant="1", x=2.5), dict(variant=2, x=3), dict(variant=0.3, x=4)])
    found = table.save()
    write_csv(tmp_path / "again.csv", found)
    assert (tmp_path / "again.csv").read_text() == (run.results / "t.csv").read_text()
    assert found["python"].tolist() == ["3.10"] * 3 and found["weights"].isna().all()
    assert [bench.value_of(found, "x", variant=v) for v in ("1", 1, 1.0, 2, 0.1 + 0.2)] == [2.5, 2.5, 2.5, 3, 4]
    assert math.isnan(bench.value_of(found, "x", variant="3")) and bench.value_of(found, "x", variant=1, git_commit=commit) == 2.5


def test_every_statement_is_whole():
    texts = bench.statements()
    assert len(texts) > 30 and all(row["statement"] and row["quantity"] and row["suite"] in ("ssm", "vlm")
                                   for row in texts.values())


def test_times_of_processes_are_told_apart_in_whatever_holds_them():
    parts = np.random.default_rng(0).lognormal(0, 0.3, (2, 3, 10)) * np.array([1.0, 2.0, 4.0])[None, :, None]
    right = ratio_interval(*(part.tolist() for part in parts))
    for kind in (torch.tensor, lambda part: [pd.Series(row, index=range(5, 15)) for row in part], lambda part: iter(part.tolist()), tuple):
        assert ratio_interval(*map(kind, parts)) == pytest.approx(right)
    flat = [pd.Series(part[0], index=range(3, 13)) for part in parts]
    assert ratio_interval(*flat) == pytest.approx(ratio_interval(*(part[0] for part in parts)))
    with pytest.raises(ValueError, match="DataFrame"):
        ratio_interval(*map(pd.DataFrame, parts))


def test_estimates_in_words_and_upside_down():
    assert str(Estimate(1.234, 1.1, 1.4)) == f"{Estimate(1.234, 1.1, 1.4)}" == "1.23 [1.10, 1.40]" and f"{Estimate(2.0)}" == "2.00"
    assert f"{Estimate(0.00312, 0.001, 0.2)}" == "0.0031 [0.001, 0.20]"
    assert f"{Estimate(math.nan)}" == "not measured"
    assert Estimate(2, 1, 4).inverse() == (0.5, 0.25, 1) and math.isnan(Estimate(1, -0.5, 2).inverse().low)
    for wrong in ({}, dict(between=(1.2, 0.8))):
        with pytest.raises(ValueError, match="above, below, between"):
            decide(Estimate(1, 0.9, 1.1), **wrong)


def test_means_drawn_in_parts_are_those_drawn_at_once():
    values = np.random.default_rng(1).normal(size=3000)
    whole = np.random.default_rng(0).integers(0, 3000, (2000, 3000))
    low, high = np.percentile(values[whole].mean(1), [2.5, 97.5])
    found = bootstrap_mean(values)
    assert found.low == pytest.approx(low, abs=2e-4) and found.high == pytest.approx(high, abs=2e-4)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_a_device_may_be_given_by_its_name(device):
    assert compare({"a": lambda: torch.ones(2)}, device, rounds=2)["a"]["status"] == "ok" and half_type(device or "cpu") == torch.bfloat16


def test_numbers_of_numpy_are_numbers():
    from effarch.checks import check_count, is_number

    assert check_count(np.int64(3), "n") == 3 and is_number(np.float32(0.5)) and not is_number(np.bool_(True)) and not is_number(np.float64("nan"))


def test_a_ratio_without_times_is_unknown_and_one_of_no_time_refused():
    """What `compare` gives for a case that failed, beside one that did not."""
    for a, b in (([], [1.0, 2.0]), ([[1.0, 2.0]], [[]]), ([], [])):
        assert all(map(math.isnan, bench.ratio_interval(a, b)))
    with pytest.raises(ValueError, match="raw times='0 or less'"):
        bench.ratio_interval([0.0, 1.0], [1.0, 1.0])
