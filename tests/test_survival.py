"""A run that is killed at any moment loses at most the configuration in flight."""

import random
import signal
import subprocess
import sys
import time

import pandas as pd
from conftest import ROOT

SWEEP = """import sys, time; sys.path.insert(0, {root!r})
from lab.cells import environment, results
run = environment.start_run("ssm", "demo", "smoke", 0, sys.argv[1])
tables = [results.Table(run, name, ["i"]) for name in ("first", "second")]
print("ready", flush=True)
for table in tables:
    for i in range(60):
        if not table.has(i=i):
            time.sleep(0.004)
            table.add([dict(i=i, half=h, square=i * i, raw_ms=[i, i + 0.5]) for h in (0, 1)])
    table.save()
run.finish()
print("finished", flush=True)
"""
CHANGES = ["run_id", "utc_time", "git_dirty", "git_commit"]


def start(folder):
    words = [sys.executable, "-c", SWEEP.format(root=str(ROOT)), str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def tables(folder):
    found = sorted(folder.rglob("*.csv"))
    return {p.name: pd.read_csv(p).drop(columns=CHANGES, errors="ignore") for p in found}


def test_sigkill_at_twenty_random_moments(tmp_path):
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    assert "finished" in start(undisturbed).communicate(timeout=120)[0]
    (csv,) = undisturbed.rglob("first.csv")
    earlier = disturbed / csv.relative_to(undisturbed)
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier result\n")
    moments = random.Random(0)
    for kill in range(20):
        process = start(disturbed)
        for line in process.stdout:
            if line == "ready\n":
                break
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert "finished" not in process.communicate()[0], f"kill {kill} came too late to be one"
        assert earlier.read_text() == "an earlier result\n" or len(pd.read_csv(earlier)) == 120
    out = start(disturbed).communicate(timeout=120)[0]
    assert "finished" in out and "continuing an interrupted run" in out
    expected, got = tables(undisturbed), tables(disturbed)
    assert set(expected) == set(got)
    for name in expected:
        pd.testing.assert_frame_equal(expected[name], got[name])


FULL = """import resource, signal, sys; sys.path.insert(0, {root!r})
from lab.cells import environment, results
run = environment.start_run("ssm", "demo", "smoke", 0, sys.argv[1])
table = results.Table(run, "t", ["i"])
for i in range(3):
    if not table.has(i=i):
        table.add(dict(i=i))
if sys.argv[2] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = table.journal.stat().st_size + 40
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
for i in range(3, 6):
    table.add(dict(i=i))
table.save()
"""


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(tmp_path):
    words = [sys.executable, "-c", FULL.format(root=str(ROOT)), str(tmp_path)]
    full = subprocess.run([*words, "full"], capture_output=True, text=True)
    assert full.returncode != 0 and "OSError" in full.stderr
    assert not list(tmp_path.rglob("*.csv"))
    again = subprocess.run([*words, "free"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "continuing an interrupted run, 3 rows" in again.stdout
    (csv,) = tmp_path.rglob("t.csv")
    assert pd.read_csv(csv)["i"].tolist() == [0, 1, 2, 3, 4, 5]


READ_ONLY = """import os, sys; sys.path.insert(0, {root!r})
from lab.cells import environment, results
if os.geteuid() == 0:
    os.setuid(65534)  # root may write everywhere; nobody may not
environment.start_run("ssm", "demo", "smoke", 0, sys.argv[1])
"""


def test_read_only_results_folder_is_named(tmp_path):
    earlier = tmp_path / "results/ssm/earlier.csv"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier result\n")
    for folder in (earlier.parent, earlier.parent.parent, tmp_path):
        folder.chmod(0o555)
    words = [sys.executable, "-c", READ_ONLY.format(root=str(ROOT)), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    for folder in (tmp_path, earlier.parent.parent, earlier.parent):
        folder.chmod(0o755)
    assert done.returncode != 0 and "PermissionError" in done.stderr and str(tmp_path) in done.stderr
    assert earlier.read_text() == "an earlier result\n"
