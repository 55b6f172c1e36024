"""A run that is killed at any moment loses at most the configuration in flight."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, read_json

# A line names a folder, and optionally a day: a fork of the loaded process sweeps there. The next line waits for its end.
SWEEP = """import os, sys, time; sys.path.insert(0, {root!r})
from datetime import datetime, timedelta
from effarch.bench import Table, compare, start
from effarch.bench import run as run_module

class Backwards(datetime):
    # every look at it is an hour earlier than the last
    looks = 0

    @classmethod
    def now(cls, tz=None):
        cls.looks += 1
        return datetime(2026, 1, cls.day_of_month, tzinfo=tz) - timedelta(hours=cls.looks)

def sweep(folder, day=None):
    if day:
        Backwards.day_of_month = int(day)
        run_module.datetime = Backwards
    run = start("ssm/demo", dict(MODE="smoke", SEED=0, OUT=folder, RESUME=True, SECONDS=None))
    tables = [Table(run, name, ["i", "half"]) for name in ("first", "second")]
    print("ready", flush=True)
    for table in tables:
        for i in range(60):
            if not table.has(i=i):
                ms = compare({{"case": lambda: time.sleep(0.004)}}, rounds=1, warmup=1)["case"]["raw_ms"]
                table.add([dict(i=i, half=h, square=i * i, slept_ms=ms[0], raw_ms=[i, i + 0.5]) for h in (0, 1)])
        table.save()
    run.finish()
    print("finished", flush=True)

while line := sys.stdin.readline():
    process = os.fork()
    if not process:
        try:
            sweep(*line.split())
        except BaseException as error:
            print("broken:", repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    print("process", process, flush=True)
    sys.stdin.readline()
    print("ended", os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""
CHANGES = ["run_id", "utc_time", "git_dirty", "git_commit", "slept_ms"]


@pytest.fixture
def sweeper():
    """start(folder, *clock) begins a sweep, (process id, what it printed until ready); end() gives its status and the rest."""
    parent = subprocess.Popen([sys.executable, "-c", SWEEP.format(root=str(ROOT))], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True)

    def until(*words):
        said = []
        for line in parent.stdout:
            said.append(line)
            assert not line.startswith("broken"), "".join(said)
            if line.startswith(words):
                return said
        raise AssertionError("the sweeping process is gone: " + "".join(said))

    def start(folder, *clock):
        print(folder, *clock, file=parent.stdin, flush=True)
        said = until("ready")
        return int(next(line for line in said if line.startswith("process")).split()[1]), "".join(said)

    def end():
        print(file=parent.stdin, flush=True)
        said = until("ended")
        return int(said[-1].split()[1]), "".join(said)

    yield start, end
    parent.stdin.close()
    assert parent.wait(timeout=60) == 0


def tables(folder):
    found = sorted(folder.rglob("*.csv"))
    return {p.name: pd.read_csv(p).drop(columns=CHANGES, errors="ignore") for p in found}


def assert_same_tables(expected, got):
    assert set(expected) == set(got) == {"first.csv", "first_raw.csv", "second.csv", "second_raw.csv"}
    for name in expected:
        pd.testing.assert_frame_equal(expected[name], got[name])


def journaled(folder):
    """Lines in the journals of an unfinished run."""
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob(".demo.*.journal"))


def test_sigkill_at_twenty_random_moments(sweeper, tmp_path):
    start, end = sweeper
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    start(undisturbed)
    assert "finished" in end()[1]
    (csv,) = undisturbed.rglob("first.csv")
    earlier = disturbed / csv.relative_to(undisturbed)
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier result\n")
    moments, kills = random.Random(0), 0
    while kills < 20:
        there = journaled(disturbed)
        process, said = start(disturbed)
        assert ("going on with" in said) == (there > 2), "more than the first line of each of two journals"
        wanted, delay = there + moments.randint(1, 8), moments.uniform(0, 0.01)
        while there <= journaled(disturbed) < wanted:  # it may end meanwhile: the journals are gone, the next one begins anew
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        kills += end()[0] == -signal.SIGKILL and journaled(disturbed) > 0
        assert earlier.read_text() == "an earlier result\n" or len(pd.read_csv(earlier)) == 120
    start(disturbed)
    assert "finished" in end()[1]
    assert_same_tables(tables(undisturbed), tables(disturbed))


def test_a_clock_that_runs_backwards_loses_nothing(sweeper, tmp_path):
    """It shows ever earlier hours, and after the kill it is a day earlier still: the run continues all the same."""
    start, end = sweeper
    undisturbed, backwards = tmp_path / "a", tmp_path / "b"
    start(undisturbed)
    assert "finished" in end()[1]
    while True:
        process, _ = start(backwards, 20)
        while 0 < journaled(backwards) < 6:
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        if end()[0] == -signal.SIGKILL and journaled(backwards):
            break  # else it ended first: a machine that stopped this test for long
    _, said = start(backwards, 19)
    assert "going on with" in said and "finished" in end()[1]
    assert_same_tables(tables(undisturbed), tables(backwards))
    (csv,), (facts,) = backwards.rglob("first.csv"), backwards.rglob("demo.env.json")
    frame, facts = pd.read_csv(csv), read_json(facts)
    assert frame["utc_time"].is_monotonic_decreasing and frame["utc_time"].iloc[0] > "2026-01-19T", "rows of both runs"
    assert facts["finished_utc"] < facts["utc_time"] and facts["seconds"] > 0
    assert (frame["slept_ms"] >= 4).all(), "durations come from another clock"


FULL = """import resource, signal, sys; sys.path.insert(0, {root!r})
from effarch.bench import Table, start
run = start("ssm/demo", dict(MODE="smoke", SEED=0, OUT=sys.argv[1], RESUME=True, SECONDS=None))
table = Table(run, "t", ["i"])
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
    assert "t: going on with 3 rows of an interrupted run" in again.stdout
    (csv,) = tmp_path.rglob("t.csv")
    assert pd.read_csv(csv)["i"].tolist() == [0, 1, 2, 3, 4, 5]


# root may write everywhere: it becomes nobody, once all is imported (nobody may not look into every checkout)
NOBODY = """import os, sys; sys.path.insert(0, {root!r})
from pathlib import Path
from effarch import bench
from lab import execute as runner
runner.check_environment = lambda options: None  # it starts Python, which nobody may not find
if os.geteuid() == 0:
    os.setuid(65534)
out = Path(sys.argv[1])
print(next(out.rglob("earlier.csv")).read_text(), end="", flush=True)
if sys.argv[2] == "notebook":
    bench.start("ssm/demo", dict(MODE="smoke", SEED=0, OUT=str(out), RESUME=True, SECONDS=None))
elif sys.argv[2] == "table":
    bench.write_csv(next(out.rglob("earlier.csv")), bench.tables.pd.DataFrame(dict(i=[1])))
else:
    sys.exit(runner.main(["--mode", "smoke", "--out", str(out)]))
"""


@pytest.mark.parametrize("who, status, said", [
    ("notebook", 1, "PermissionError: [Errno 13] Permission denied: '{out}/results/ssm/"),
    ("table", 1, "PermissionError: [Errno 13] Permission denied: '{out}/results/ssm/.earlier.csv"),
    ("runner", 2, "run_all.sh: --out: cannot write to {out}: Permission denied")], ids=["notebook", "table", "runner"])
def test_a_read_only_results_folder_is_named(who, status, said):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others: that would be another error
        out = Path(folder).resolve()
        earlier = out / "results/ssm/earlier.csv"
        earlier.parent.mkdir(parents=True)
        earlier.write_text("an earlier result\n")
        read_only = [earlier.parent, earlier.parent.parent, out]
        for path in read_only:
            path.chmod(0o555)
        words = [sys.executable, "-c", NOBODY.format(root=str(ROOT)), str(out), who]
        done = subprocess.run(words, capture_output=True, text=True)
        for path in reversed(read_only):
            path.chmod(0o755)
        assert done.stdout == "an earlier result\n", "it may read"
        assert done.returncode == status and done.stderr.splitlines()[-1].startswith(said.format(out=out)), done.stderr
        assert [p for p in out.rglob("*") if p.is_file()] == [earlier] and earlier.read_text() == "an earlier result\n"
