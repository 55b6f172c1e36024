"""The shared cells: measuring, tables that survive, figures, claims."""

import builtins
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from lab.cells import claims, environment, figures, measure, results

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path):
    return environment.start_run("ssm", "demo", "smoke", 0, tmp_path)


# measuring


def test_known_cost_ratio_is_ranked_right_and_raw_times_are_kept():
    x = torch.randn(192, 192)
    once, many = (lambda: x @ x), (lambda: [x @ x for _ in range(20)][-1])
    rows = measure.compare({"many": many, "once": once}, rounds=9)
    ratio, low, high = measure.ratio_interval(rows["many"]["raw_ms"], rows["once"]["raw_ms"])
    assert low > 3 and low <= ratio <= high
    assert all(len(row["raw_ms"]) == row["n_runs"] == 9 and row["timer"] == "perf_counter" for row in rows.values())
    assert all(r["latency_ms_p20"] <= r["latency_ms_median"] <= r["latency_ms_p80"] for r in rows.values())


def test_rounds_are_interleaved_in_changing_order():
    calls = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    state = np.random.get_state()[1].tolist()
    measure.compare(cases, rounds=20, warmup=2)
    assert "".join(calls[:6]) == "aabbcc" and np.random.get_state()[1].tolist() == state
    rounds = ["".join(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert len(rounds) == 20 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 3


@pytest.mark.parametrize("fault, status", [
    (lambda: torch.empty(10**16), "oom"),
    (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")), "oom"),
    (lambda: torch.tensor([1.0, float("nan")]), "nan"),
    (lambda: torch.zeros(2) @ torch.zeros(3), "error: "),
])
def test_a_fault_is_a_row_and_the_others_go_on(fault, status):
    rows = measure.compare({"bad": fault, "good": lambda: torch.zeros(3)}, rounds=2)
    assert rows["bad"]["status"].startswith(status) and rows["bad"]["raw_ms"] == []
    assert "latency_ms_median" not in rows["bad"] and rows["good"]["status"] == "ok"


def test_interval_covers_the_truth_and_shrinks():
    generator = np.random.default_rng(1)
    def width(n):
        a, b = generator.lognormal(np.log(2), 0.2, n), generator.lognormal(0, 0.2, n)
        ratio, low, high = measure.ratio_interval(a, b)
        assert low <= ratio <= high
        return high - low, low <= 2 <= high
    assert np.mean([width(40)[1] for _ in range(40)]) > 0.8
    assert np.mean([width(200)[0] for _ in range(10)]) < np.mean([width(10)[0] for _ in range(10)])
    with pytest.raises(ValueError, match="cannot be paired"):
        measure.ratio_interval([1, 2], [1])
    assert np.isnan(measure.ratio_interval([], [])).all()  # a case that failed has no ratio, and stops nothing


@pytest.mark.parametrize("rounds", [3, 5, 8, 12])
def test_interval_of_few_rounds_is_wide_enough(rounds):
    """About 95 % of the intervals hold the truth, also where a bootstrap of so few rounds would hold it in 76 %."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        a, b = generator.lognormal(np.log(2), 0.2, rounds), generator.lognormal(0, 0.2, rounds)
        ratio, low, high = measure.ratio_interval(a, b)
        covered += low <= 2 <= high
        assert low <= ratio <= high
    assert covered / 300 > 0.89


def test_noise_is_said(monkeypatch, capsys):
    times = iter([1.0, 5.0] * 100)
    monkeypatch.setattr(measure, "time_once", lambda fn, device: (fn(), next(times))[1])
    rows = measure.compare({"jitters": lambda: None}, rounds=6)
    assert rows["jitters"]["noisy"] and "noisy machine: 1 of 1" in capsys.readouterr().out
    monkeypatch.setattr(measure, "time_once", lambda fn, device: 2.0)
    rows = measure.compare({"calm": lambda: None}, rounds=6)
    assert not rows["calm"]["noisy"] and capsys.readouterr().out == ""


def test_keeping_freed_memory_needs_no_particular_system(monkeypatch):
    environment.keep_freed_memory()
    assert torch.zeros(2**24).sum() == 0  # large tensors still come and go
    monkeypatch.setattr(environment.ctypes, "CDLL", lambda name: object())  # a system without glibc
    environment.keep_freed_memory()


def test_peak_memory_counts_residents_and_the_high_water_mark():
    x = torch.zeros(2**20)  # 4 MiB
    def two_then_one():
        y = x + 1
        z = y + 1
        del y
        return z + 1
    mib, source = measure.peak_memory(two_then_one, CPU, [x, x.view(2, -1)])
    assert source == "cpu_live_tensors" and mib == pytest.approx(4 + 8, abs=0.1)
    assert measure.peak_memory(lambda: None, CPU)[0] == 0


def test_flops_limits_and_slopes():
    a = torch.randn(64, 64)
    assert measure.count_flops(lambda: a @ a) == 2 * 64**3
    limits = dict(matmul_flops_per_s=1e9, copy_bytes_per_s=1e9)
    assert measure.limit_ms(1e9, 1, limits) == 1e3 and measure.limit_ms(1, 2e9, limits) == 2e3
    found = measure.ceilings(CPU, rounds=1)
    assert all(np.isfinite(v) and v > 0 for v in found.values())
    slope, low, high = measure.fit_loglog([1, 2, 4, 8], [3, 12, 48, 192])
    assert slope == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)


# environment


@pytest.mark.parametrize("words, name", [
    (dict(mode="fast"), "MODE"), (dict(seed=-1), "SEED"), (dict(seed=True), "SEED"), (dict(resume="no"), "RESUME")])
def test_wrong_settings_name_parameter_value_and_what_is_allowed(tmp_path, words, name):
    given = dict(suite="ssm", notebook="demo", mode="smoke", seed=0, out=tmp_path) | words
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed; allowed: "):
        environment.start_run(**given)


def test_slug_is_a_plain_folder_name():
    assert environment.device_slug(CPU).startswith("cpu-")
    assert set(environment.device_slug(CPU)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_seed_repeats(tmp_path):
    draws = []
    for _ in range(2):
        environment.start_run("ssm", "demo", "smoke", 7, tmp_path)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]


def test_a_clock_going_backwards_changes_nothing(tmp_path, monkeypatch, capsys):
    """Every look at the clock is an hour earlier than the last: an interrupted run still continues, no time is negative."""
    hours = iter(range(1000))

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, tzinfo=tz) - timedelta(hours=next(hours))

    monkeypatch.setattr(environment, "datetime", Clock)
    monkeypatch.setattr(time, "time", lambda: -1e6)
    first = environment.start_run("ssm", "demo", "smoke", 0, tmp_path)
    results.Table(first, "t", ["i"]).add(dict(i=0, **measure.compare({"f": lambda: time.sleep(0.001)}, rounds=2)["f"]))
    second = environment.start_run("ssm", "demo", "smoke", 0, tmp_path)
    assert second.row["utc_time"] < first.row["utc_time"]
    table = results.Table(second, "t", ["i"])
    assert table.has(i=0) and "continuing an interrupted run, 1 rows" in capsys.readouterr().out
    assert table.save()["latency_ms_median"].iloc[0] > 0
    second.finish()
    assert json.loads((second.results / "demo.env.json").read_text())["seconds"] >= 0


# tables


def test_table_holds_key_measurements_and_provenance(run):
    table = results.Table(run, "t", ["variant", "seq_len"])
    table.add([dict(variant="nan", seq_len=3, latency_ms_median=np.float64(1.23456789), raw_ms=[1.0, 2.0]),
               dict(variant="b", seq_len=np.int64(4), status="oom")])
    assert table.has(variant="b") and table.has(variant="nan", seq_len=3) and not table.has(variant="c")
    frame = table.save()
    assert list(frame.columns[:3]) == ["variant", "seq_len", "latency_ms_median"]
    assert frame["variant"].tolist() == ["nan", "b"], "a name is a name, only an empty cell is missing"
    assert frame["status"].tolist() == ["ok", "oom"] and frame["latency_ms_median"].isna().tolist() == [False, True]
    provenance = "run_id device compute_capability dtype torch cuda transformers python num_threads weights " \
                 "git_commit git_dirty seed utc_time mode"
    assert set(provenance.split()) <= set(frame)
    raw = results.read_csv(run.results / "t_raw.csv")
    assert raw["latency_ms"].tolist() == [1.0, 2.0] and raw["i"].tolist() == [0, 1]


def test_a_row_without_its_key_is_refused(run):
    with pytest.raises(ValueError, match="missing: \\['seq_len'\\]"):
        results.Table(run, "t", ["seq_len"]).add(dict(variant="a"))


def test_a_crash_while_writing_keeps_the_old_file(run, monkeypatch):
    path = run.results / "t.csv"
    results.write_csv(path, pd.DataFrame({"a": [1]}))
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        results.write_csv(path, pd.DataFrame({"a": [2]}))
    assert path.read_bytes() == old and not list(run.results.glob(".*.tmp"))


def same_run(tmp_path, **words):
    return environment.start_run("ssm", "demo", "smoke", words.pop("seed", 0), tmp_path, **words)


def test_an_interrupted_run_goes_on_but_only_the_same(tmp_path, monkeypatch, capsys):
    results.Table(same_run(tmp_path), "t", ["i"]).add(dict(i=0))
    assert results.Table(same_run(tmp_path), "t", ["i"]).has(i=0)
    assert "continuing an interrupted run, 1 rows" in capsys.readouterr().out
    monkeypatch.setattr(results, "code_fingerprint", lambda: "other code")
    assert not results.Table(same_run(tmp_path), "t", ["i"]).has(i=0)
    assert "starting over, code, parameters or versions differ" in capsys.readouterr().out
    monkeypatch.undo()
    results.Table(same_run(tmp_path), "t", ["i"]).add(dict(i=0))
    assert not results.Table(same_run(tmp_path, seed=1), "t", ["i"]).has(i=0)
    results.Table(same_run(tmp_path), "t", ["i"]).add(dict(i=0))
    assert not results.Table(same_run(tmp_path, resume=False), "t", ["i"]).has(i=0)


def test_code_run_in_the_kernel_is_part_of_the_identity(monkeypatch):
    def kernel(*cells):
        shell = type("Shell", (), {"user_ns": {"In": list(cells)}})
        monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
        return environment.code_fingerprint()
    assert kernel("", "a = 1", "b = 2") == kernel("", "a = 1", "b = 2", "b = 2"), "a cell run twice is the same code"
    assert kernel("", "a = 1", "b = 2") != kernel("", "a = 1", "b = 3")


@pytest.mark.parametrize("damage", [b'{"half a ro', b"\x00\xff\xfe garbage\n", b"[1, 2\n{}\n"])
def test_a_damaged_journal_loses_only_what_is_damaged(tmp_path, damage):
    first = results.Table(same_run(tmp_path), "t", ["i"])
    first.add(dict(i=0))
    with open(first.journal, "ab") as file:
        file.write(damage)
    again = results.Table(same_run(tmp_path), "t", ["i"])
    assert again.has(i=0) and len(again.rows) == 1
    again.add(dict(i=1))
    third = results.Table(same_run(tmp_path), "t", ["i"])
    assert [row["i"] for row in third.rows] == [0, 1]


def test_finish_leaves_no_journal(run):
    table = results.Table(run, "t", ["i"])
    table.add(dict(i=0))
    table.save()
    run.finish()
    assert sorted(p.name for p in run.results.iterdir()) == ["demo.env.json", "t.csv"]
    assert not results.Table(run, "t", ["i"]).has(i=0)


HOLD = """import sys; sys.path.insert(0, {root!r})
from lab.cells import environment, results
run = environment.start_run("ssm", "demo", "smoke", 0, sys.argv[1])
table = results.Table(run, "t", ["i"])
print("holding", flush=True)
sys.stdin.read()"""


def test_two_processes_on_the_same_table_are_kept_apart(tmp_path):
    words = [sys.executable, "-c", HOLD.format(root=str(ROOT)), str(tmp_path)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while "holding" not in holder.stdout.readline():
        pass
    with pytest.raises(RuntimeError, match="another run is writing t.csv"):
        results.Table(same_run(tmp_path), "t", ["i"])
    holder.kill()
    holder.wait()
    assert not results.Table(same_run(tmp_path), "t", ["i"]).has(i=0), "a dead run holds nothing"


# figures and claims


def test_figure_is_the_same_bytes_twice_and_says_where_it_is_from(run):
    def draw():
        fig, ax = figures.plt.subplots()
        ax.plot([1, 2], **figures.series_style(0))
        figures.save_figure(run, fig, "f.png", "a line", n=3)
        return (run.figures / "f.png").read_bytes()
    figures.plt.switch_backend("agg")
    first = draw()
    assert first == draw() and b"a line" in first


def test_series_are_told_apart_without_colour():
    marks = [(figures.series_style(i)["marker"], figures.series_style(i)["linestyle"]) for i in range(8)]
    assert len(set(marks)) == 8 and len({mark for mark, _ in marks}) == 8


STATEMENTS = {f"A0{i}": dict(statement=f"s{i}", quantity="q", condition="c", claimed=1, unit="ms") for i in (1, 2)}


def test_claims_need_a_measurement_and_keep_other_notebooks_rows(run):
    other = environment.start_run("ssm", "other", "smoke", 0, run.results.parents[2])
    mine = claims.Claims(other, {"A03": STATEMENTS["A01"]})
    mine.add("A03", "not testable here", "no such device")
    mine.save()
    judged = claims.Claims(run, STATEMENTS)
    with pytest.raises(ValueError, match="measured=None is not allowed"):
        judged.add("A01", "supported", "because")
    with pytest.raises(ValueError, match="verdict='true'"):
        judged.add("A01", "true", "because", measured=1, source="t.csv: i=0")
    with pytest.raises(ValueError, match="claim='Z9'"):
        judged.add("Z9", "supported", "because", measured=1, source="t.csv: i=0")
    judged.add("A01", "supported", "because", measured=1.5, low=1, high=2, n=3, source="t.csv: i=0")
    with pytest.raises(ValueError, match=r"claims=\['A02'\]"):
        judged.save()
    judged.add("A02", "not supported", "because", measured=9, source="t.csv: i=1")
    assert judged.save()["id"].tolist() == ["A01", "A02"]
    assert results.read_csv(run.results / "claims.csv")["id"].tolist() == ["A01", "A02", "A03"]
    judged.save()
    assert len(results.read_csv(run.results / "claims.csv")) == 3
