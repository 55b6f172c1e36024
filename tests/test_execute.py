"""The runner: what it refuses, what it plans, and what it keeps when a notebook fails."""

import base64
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import clean_environment, new_notebook, read_json, tiny_notebook
from PIL import Image

from lab import execute as runner
from lab import plan
from lab.plan import Cost, Plan

GOOD = '''table = Table(run, "good", ["i"])
for i in range(run.settings.STEPS):
    table.add(dict(i=i, label=LABEL, share=run.seconds_share))
table.save()
fig, ax = plt.subplots()
save_figure(run, fig, "good", "an empty figure")
run.finish()'''
BAD = '''table = Table(run, "bad", ["i"])
table.add(dict(i=0))
table.save()
raise RuntimeError("on purpose")'''


@pytest.mark.parametrize("words, said", [
    (["--mode", "fast"], "--mode"),
    (["--mode", "gpu"], "invalid choice: 'gpu'"),
    (["--colour"], "--colour"),
    (["--onl=ssm"], "--onl=ssm"),
    (["report"], "invalid choice: 'report'"),
    (["--only", "nothing"], "--only nothing: no such notebook; there are: ssm, vlm, good"),
    (["--set", "STEPZ=3"], "--set STEPZ=3: no such parameter; there are: LABEL, RATE, RESUME, SECONDS, SEED, STEPS"),
    (["--set", "STEPS=three"], "--set STEPS=three: not a value of type None or int"),
    (["--set", "SEED=1.5"], "--set SEED=1.5: not a value of type int"),
    (["--set", "SEED=True"], "--set SEED=True: not a value of type int"),
    (["--set", "RESUME=true"], "--set RESUME=true: not a value of type bool"),
    (["--set", "STEPS"], "--set STEPS: write PARAM=VALUE"),
    (["--set", "SEED=1", "--set", "SEED=2"], "--set SEED=2: SEED is set twice"),
    (["--set", "MODE=quick"], "use --mode"),
    (["--repeat", "0"], "--repeat 0: a whole number of at least 1"),
    (["--repeat", "two"], "--repeat"),
    (["--redraw"], "--redraw, --retime: no results of good in"),
    (["--redraw", "--repeat", "3"], "--redraw: without --repeat and --retime"),
    (["--retime", "--mode", "full"], "--mode full: not with --redraw or --retime"),
])
def test_bad_words_are_refused_in_one_line(project, words, said):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert not (folder / "results").exists() and not (folder / ".staging").exists()


def test_bad_words_are_refused_before_anything_is_installed(project):
    """Without --python a .venv would be made."""
    folder, _ = project
    done = subprocess.run(["bash", "run_all.sh", "--mode", "fast"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and "--mode" in done.stderr and not (folder / ".venv").exists()


def test_good_run_files_its_results_which_a_quick_one_leaves_alone(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD, minutes=dict(quick=100))
    done = run("--mode", "full", "--set", "STEPS=4", "--set", "LABEL=7", "--set", "RATE=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (csv,) = folder.glob("results/ssm/*/good.csv")
    lines = csv.read_text().splitlines()
    assert len(lines) == 5 and lines[1].startswith("0,7,")
    assert {p.name for p in csv.parent.iterdir()} == {"good.csv", "good.env.json", "good.ipynb"}
    assert len(list(folder.glob("figures/ssm/*/good.png"))) == 1
    notebook = nbformat.read(csv.parent / "good.ipynb", as_version=4)
    assert sum("image/png" in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", [])) == 1
    assert "papermill" not in notebook.metadata and not any("papermill" in c.metadata for c in notebook.cells)
    assert str(folder) not in (csv.parent / "good.ipynb").read_text(), "no folder of this machine"
    assert any(line.split()[:2] == ["good", "ok"] for line in done.stdout.splitlines()), done.stdout
    assert "report: results/report.html" in done.stdout and (folder / "results/report.html").exists()
    published = {p: p.read_bytes() for kind in ("results", "figures") for p in (folder / kind / "ssm").rglob("*") if p.is_file()}
    assert len(published) == 4
    done = run("--mode", "quick")
    assert done.returncode == 0 and "quick mode: 1 notebooks" in done.stdout, done.stdout + done.stderr
    assert {p: p.read_bytes() for p in published} == published
    quick = csv.parent.with_name(csv.parent.name + "-quick") / "good.csv"
    assert "comparisons take 10% of their usual time" in done.stdout and "SECONDS=0.4" in done.stdout
    assert (pd.read_csv(quick)["share"] == 0.1).all() and read_json(quick.with_name("good.env.json"))["seconds_share"] == 0.1


def test_the_plan_stands_first_and_the_table_last_and_smoke_leaves_results_alone(project):
    folder, run = project
    tiny_notebook(folder / "ssm/first.ipynb", GOOD, kernel="my-own-kernel", minutes=dict(smoke=3))
    tiny_notebook(folder / "ssm/second.ipynb", "run.finish()", minutes=dict(full=9))
    done = run("--mode", "smoke")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "smoke mode: 2 notebooks, about 3.5 min"
    assert [line.split() for line in lines[1:3]] == [["ssm/first.ipynb", "3.0", "min"], ["ssm/second.ipynb", "30", "s"]]
    steps = [line for line in lines if line.startswith("== ")]
    assert steps[0] == "== 1/2 ssm/first.ipynb: about 3.0 min, 3.5 min left =="
    assert re.fullmatch(r"== 2/2 ssm/second\.ipynb: about 30 s, .* left ==", steps[1])
    assert [line.split()[:2] for line in lines[-3:]] == [["notebook", "status"], ["first", "ok"], ["second", "ok"]]
    assert "report" not in done.stdout and not (folder / "results").exists()
    assert list((folder / ".scratch/results").rglob("good.csv"))


def test_failing_notebook_spoils_nothing(project):
    folder, run = project
    tiny_notebook(folder / "ssm/bad.ipynb", BAD.replace("raise", "run.finish() #"))
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    assert run("--mode", "full", "--only", "bad").returncode == 0
    (csv,) = folder.glob("results/ssm/*/bad.csv")
    before = csv.read_bytes()
    tiny_notebook(folder / "ssm/bad.ipynb", BAD)
    tiny_notebook(folder / "ssm/dies.ipynb", "import os\nos.kill(os.getpid(), 9)")
    done = run("--mode", "full")
    assert done.returncode == 1
    assert "bad failed: RuntimeError: on purpose" in done.stderr and "dies failed: DeadKernelError" in done.stderr
    assert csv.read_bytes() == before
    assert (folder / "results/ssm/bad.failed.ipynb").exists()
    assert list(folder.glob("results/ssm/*/good.csv")), "the other notebook still ran"
    table = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[-3:]}
    assert table == {"bad": "failed", "dies": "failed", "good": "ok"}


def test_wrong_value_is_one_clear_line(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    done = run("--mode", "smoke", "--set", "STEPS=-1")
    assert done.returncode == 1
    assert "ValueError: STEPS=-1 is not allowed; allowed: None or a whole number of at least 1" in done.stderr


def test_python_without_the_packages_is_refused(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "bare")], check=True)
    done = subprocess.run(["bash", "run_all.sh", "--python", "bare/bin/python"], cwd=folder,
                          capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 2 and "lacks torch, papermill" in done.stderr


def test_read_only_output_is_refused(project, tmp_path):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    (tmp_path / "a-file").write_text("not a folder")
    done = run("--mode", "smoke", "--out", str(tmp_path / "a-file" / "x"))
    assert done.returncode == 2 and "--out: cannot write" in done.stderr


# the front door


def test_braces_a_link_and_a_terminal_that_knows_ascii_only(project, tmp_path):
    """papermill formats paths; run_all.sh is called through two links from another folder, which has a lab/ of its own."""
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", "print('✓ 3 × 4 …')", GOOD)
    caller = tmp_path / "caller"
    (caller / "lab").mkdir(parents=True)
    (caller / "lab/__init__.py").write_text("raise SystemExit('the wrong lab')")
    (caller / "hop").symlink_to(folder / "run_all.sh")
    (caller / "go").symlink_to("hop")
    done = run("--mode", "smoke", "--out", "o{ut} {0}", script="go", cwd=caller,
               env=clean_environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr
    assert len(list((caller / "o{ut} {0}/results").rglob("good.csv"))) == 1
    assert "? 3 ? 4 ?" in done.stdout and done.stdout.isascii()
    assert "wrong lab" not in done.stdout


SHOW = "print('given', MODEL_ID, TUNE_DATASET)\nrun.finish()"


@pytest.mark.parametrize("given, seen", [
    (dict(MODEL_ID="weights/clip"), "given ../caller/weights/clip None"),
    (dict(MODEL_ID="./weights/other"), "given ../caller/weights/other None"),
    (dict(MODEL_ID="openai/clip"), "given openai/clip None"),
    (dict(TUNE_DATASET="imagefolder:pictures"), "given openai/x imagefolder:../caller/pictures"),
    (dict(TUNE_DATASET="synthetic:64"), "given openai/x synthetic:64"),
], ids=str)
def test_folders_are_meant_as_the_caller_sees_them(project, tmp_path, monkeypatch, given, seen):
    folder, run = project
    notebook = folder / "ssm/show.ipynb"
    notebook.write_text(nbformat.writes(new_notebook(
        ("parameters", 'MODEL_ID = "openai/x"  # a\nTUNE_DATASET: str | None = None  # b'))))
    (tmp_path / "caller/weights/clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "caller")
    monkeypatch.setattr(runner, "ROOT", folder)
    (values,) = runner.settings_for([notebook], [f"{name}={value}" for name, value in given.items()])
    values = dict(MODEL_ID="openai/x", TUNE_DATASET=None) | values
    assert f"given {values['MODEL_ID']} {values['TUNE_DATASET']}" == seen
    absolute = runner.settings_for([notebook], [f"MODEL_ID={tmp_path}/caller/weights/clip", "TUNE_DATASET=imagefolder:~/x"])
    assert runner.from_here("TRAIN", "imagefolder:weights/clip") == f"imagefolder:{os.path.relpath(tmp_path / 'caller/weights/clip', folder)}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert runner.from_here("DATASET", "cifar10") == "cifar10", "a data set, also where a folder has its name"
    assert absolute == [dict(MODEL_ID=f"{tmp_path}/caller/weights/clip", TUNE_DATASET="imagefolder:~/x")]


@pytest.mark.parametrize("words, tools", [("test", True), ("--mode quick test", True), ("--only test", False),
                                          ("--mode=quick", False), ("--only=ssm test", True), ("--python test", False),
                                          ("--repeat 3 test", True)])
def test_the_front_door_installs_the_test_tools_for_tests_only(words, tools, tmp_path):
    """The part of run_all.sh that reads the words, with nothing installed."""
    script = (runner.ROOT / "run_all.sh").read_text().split("starter=")[0] + 'echo "action=$action"\n'
    (tmp_path / "door.sh").write_text(script)
    said = subprocess.run(["bash", "door.sh", *words.split()], cwd=tmp_path, capture_output=True, text=True).stdout
    assert said == f"action={'test' if tools else 'run'}\n"


# interrupted and repeated


def wait_for(stream, start):
    """The first line of a running command that begins with `start`; fails when the command ends without it."""
    said = []
    for line in stream:
        said.append(line)
        if line.startswith(start):
            return line
    raise AssertionError(f"it ended without {start!r}: {''.join(said)}")


# goes on after each step only when the test allows it, so that no outcome depends on how fast the machine is
SLOW = '''import os, time
table = Table(run, "slow", ["i"])
for i in range(12):
    if not table.has(i=i):
        if i == 5 and os.path.exists("stop"):
            raise RuntimeError("on purpose")
        while i == 7 and os.path.exists("wait"):
            print("waiting", os.getpid(), flush=True)
            time.sleep(0.1)
        table.add(dict(i=i, label=LABEL, square=i * i))
        print("step", i, flush=True)
table.save()
run.finish()'''


def slow_table(out):
    """The table that SLOW made, without what differs from run to run."""
    (csv,) = out.glob("results/ssm/*/slow.csv")
    return pd.read_csv(csv).drop(columns=["run_id", "utc_time"])


def start_and_wait(folder, *words):
    """Begin a run that stops before its seventh step: (process, id of its kernel)."""
    (folder / "wait").touch()
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests started in the background ignore Ctrl-C, and hand that on
    process = subprocess.Popen(["bash", "run_all.sh", "--python", sys.executable, *words], cwd=folder, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(),
                               start_new_session=True, preexec_fn=heed)
    return process, int(wait_for(process.stdout, "waiting ").split()[1])


def test_two_runs_at_once_and_ctrl_c(project):
    """The second run on an output folder is refused; Ctrl-C ends the first, which the next one continues."""
    folder, run = project
    tiny_notebook(folder / "ssm/slow.ipynb", SLOW)
    first, _ = start_and_wait(folder, "--mode", "full")
    second = run("--mode", "full")
    assert second.returncode == 2 and "another run is writing" in second.stderr, second.stderr
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and errors.strip() == "interrupted: nothing was overwritten; the same command continues the run"
    assert not list(folder.rglob("slow.csv")) and not list(folder.rglob("*.tmp"))
    (folder / "wait").unlink()
    third = run("--mode", "full")
    assert third.returncode == 0, third.stderr + errors
    assert "slow: going on with 7 rows of an interrupted run" in third.stdout
    assert "step 6" not in third.stdout and "step 7" in third.stdout
    assert slow_table(folder)["i"].tolist() == list(range(12))
    (facts,) = folder.glob("results/ssm/*/slow.env.json")
    assert read_json(facts)["continued"]


def test_a_killed_run_is_continued_and_ends_like_an_undisturbed_one(project):
    folder, run = project
    tiny_notebook(folder / "ssm/slow.ipynb", SLOW)
    words = ("--mode", "full", "--repeat", "2", "--out", "out")
    first, kernel = start_and_wait(folder, *words)
    first.kill()
    os.kill(kernel, signal.SIGKILL)
    first.communicate(timeout=120)
    assert first.returncode == -signal.SIGKILL and not list((folder / "out").rglob("*.csv"))
    (folder / "wait").unlink()
    second = run(*words)
    assert second.returncode == 0, second.stderr
    assert "slow: going on with 7 rows of an interrupted run" in second.stdout
    assert "step 6" not in second.stdout and second.stdout.count("step 7\n") == 1, "no finished row is made again"
    table = slow_table(folder / "out")
    assert table[["i", "label", "square"]].values.tolist() == [[i, "x", i * i] for i in range(12)]


def test_other_parameters_or_versions_start_over_and_say_so(project):
    folder, run = project
    tiny_notebook(folder / "ssm/slow.ipynb", SLOW)
    (folder / "stop").touch()
    words = ("--mode", "full", "--out", "out")
    assert run(*words).returncode == 1
    said = "slow: starting over, code, parameters, weights, images or versions differ"
    other = run(*words, "--set", "LABEL=other")
    assert other.returncode == 1 and said in other.stdout and "step 0" in other.stdout
    (journal,) = folder.rglob(".slow.slow.journal")
    identity, *rows = journal.read_text().splitlines()
    assert len(rows) == 5 and all('"label": "other"' in row for row in rows)
    journal.write_text("\n".join([json.dumps(json.loads(identity) | {"torch": "1.0.0"}), *rows]) + "\n")
    (folder / "stop").unlink()
    last = run(*words, "--set", "LABEL=other")
    assert last.returncode == 0 and said in last.stdout and "step 0" in last.stdout, last.stderr
    assert slow_table(folder / "out")["i"].tolist() == list(range(12))


TIMED = '''import os
table = Table(run, "timed", ["variant"])
table.compare({"a": lambda: None, "b": lambda: sum(range(2000))}, ratios=dict(ratio="a"))
if not table.has(variant="trained"):
    table.add(dict(variant="trained", process=os.environ["EFFARCH_PROCESS"]))
table.save()
fig, ax = plt.subplots()
save_figure(run, fig, "timed", "an empty figure")
print("process", run.process, "ends", flush=True)
run.finish()'''


def test_repeated_runs_are_pooled_in_one_result(project):
    folder, run = project
    tiny_notebook(folder / "ssm/timed.ipynb", TIMED)
    done = run("--mode", "smoke", "--repeat", "3")
    assert done.returncode == 0, done.stderr
    assert [f"process {i} ends" in done.stdout for i in range(3)] == [True] * 3
    assert "smoke mode, 3 processes each: 1 notebooks, about 1.5 min" in done.stdout
    (csv,) = (folder / ".scratch").rglob("timed.csv")
    frame = pd.read_csv(csv).set_index("variant")
    assert frame["n_runs"].tolist()[:2] == [6, 6] and frame.loc["trained", "process"] == "0/3"
    assert pd.read_csv(csv.with_name("timed_raw.csv"))["process"].value_counts().to_dict() == {0: 4, 1: 4, 2: 4}
    facts = read_json(csv.with_name("timed.env.json"))
    assert facts["processes"] == 3 and len(facts["process_seconds"]) == 3
    assert "process 2 ends" in csv.with_name("timed.ipynb").read_text(), "the last one is kept"
    assert not list(folder.rglob("*.journal"))


DRAWN = '''import time
table, checks = Table(run, "drawn", ["kind", "dtype", "share", "size"]), Table(run, "drawn_checks", ["check"], checked=True)
checks.add(dict(check="today's", value=run.settings.STEPS))
for size in (None, 8, (1, 2)):
    if not table.has(kind="made", size=size):
        table.add(dict(kind="made", dtype="float32", share=1 / 3, size=size, value=time.time() % 1, whole=[1, 2.5], small=size == 8, text="[no list"))
row = table.find(kind="made", size=8)[0]
assert row["whole"] == [1, 2.5] and row["small"] is True and row["value"] > 0, row
rows = table.compare({"a": lambda: time.sleep(.001), "b": lambda: None}, name="kind", ratios={"ratio": "b"}, dtype="float16", share=0.5, size=1)
assert all(len(row["raw_ms"]) == run.process + 1 for row in rows.values())
table.add(rows["a"] | dict(twice=2 * rows["a"]["n_runs"]))
table.save()
checks.save()
fig, ax = plt.subplots()
save_figure(run, fig, "drawn", "TITLE")
run.finish()'''


def test_published_rows_are_drawn_again_and_nothing_is_measured(project):
    folder, run = project
    tiny_notebook(folder / "ssm/drawn.ipynb", DRAWN)
    done = run("--mode", "full", "--repeat", "2", "--set", "SECONDS=0.2")
    assert done.returncode == 0, done.stdout + done.stderr
    (csv,) = folder.glob("results/ssm/*/drawn.csv")
    tables, facts = {p: p.read_bytes() for p in csv.parent.glob("*.csv")}, read_json(csv.with_name("drawn.env.json"))
    assert len(tables) == 3
    tiny_notebook(folder / "ssm/drawn.ipynb", DRAWN.replace("TITLE", "another title"))
    done = run("--redraw")
    assert done.returncode == 0 and "drawn again" in done.stdout, done.stdout + done.stderr
    assert "another result" not in done.stdout and {p: p.read_bytes() for p in tables} == tables
    again = read_json(csv.with_name("drawn.env.json"))
    assert again.pop("redrawn")["utc_time"] > again["utc_time"] and again == facts
    with Image.open(next(folder.glob("figures/ssm/*/drawn.png"))) as image:
        assert image.info["Description"] == "another title"


def test_only_times_are_measured_again(project):
    folder, run = project
    tiny_notebook(folder / "ssm/drawn.ipynb", DRAWN)
    assert run("--mode", "smoke", "--out", ".").returncode == 0
    (csv,) = folder.glob("results/ssm/*/drawn.csv")
    before, facts = pd.read_csv(csv), read_json(csv.with_name("drawn.env.json"))
    done = run("--retime", "--repeat", "2", "--set", "STEPS=9")
    assert done.returncode == 0 and "only times are measured" in done.stdout, done.stdout + done.stderr
    after, raw = pd.read_csv(csv), pd.read_csv(csv.with_name("drawn_raw.csv"))
    made = after["kind"] == "made"
    pd.testing.assert_frame_equal(before[made], after[made][[*before]])
    assert raw["process"].value_counts().to_dict() == {0: 4, 1: 4} and after["n_runs"].max() == 4
    assert not set(after.loc[~made, "run_id"]) & set(before["run_id"])
    again = read_json(csv.with_name("drawn.env.json"))
    assert again["trained"]["run_id"] == facts["run_id"] != again["run_id"] and again["processes"] == 2
    assert pd.read_csv(csv.with_name("drawn_checks.csv"))["value"].tolist() == [facts["settings"]["STEPS"]], "sizes are the published ones"


@pytest.mark.parametrize("old, new, said", [
    ("(None, 8, (1, 2))", "(None, 8, 9)", "--redraw: drawn.csv has no row for kind made, size 9: run this notebook without"),
    ('"b": lambda: None', '"b": lambda: None, "c": lambda: 1', "drawn.csv has no row for dtype float16, share 0.5, size 1, kind c:"),
    ('"a": lambda: time.sleep(.001), "b"', '"b"', "KeyError: 'a'"),
    ('Table(run, "drawn", ', 'Table(run, "other", ', "--redraw: other.csv has no row for kind made"),
    ('table.add(rows["a"] |', 'table.add(rows["a"] | dict(raw_ms=[[1.0], [2.0]]) |', "has no row for kind a, dtype float16, share 0.5, size 1"),
])
def test_a_row_that_has_to_be_measured_ends_a_redrawing(project, old, new, said):
    folder, run = project
    tiny_notebook(folder / "ssm/drawn.ipynb", DRAWN)
    assert run("--mode", "smoke", "--out", ".").returncode == 0
    before = {p: p.read_bytes() for p in (folder / "results").rglob("*") if p.is_file()}
    tiny_notebook(folder / "ssm/drawn.ipynb", DRAWN.replace(old, new))
    done = run("--redraw")
    assert done.returncode == 1 and said in done.stderr, done.stdout + done.stderr
    assert {p: p.read_bytes() for p in before} == before


def test_a_process_that_fails_ends_the_notebook(project):
    folder, run = project
    tiny_notebook(folder / "ssm/timed.ipynb", TIMED.replace("run.finish()", "assert run.process == 0, 'on purpose'\nrun.finish()"))
    done = run("--mode", "smoke", "--repeat", "3")
    assert done.returncode == 1 and "timed failed: AssertionError: on purpose" in done.stderr
    assert "process 2 ends" not in done.stdout and not list((folder / ".scratch/results").rglob("*.csv"))


# the plan


class Clock:
    """A clock that stands at `minutes` until a test moves it."""

    minutes = 0.0

    def __call__(self):
        return 60 * self.minutes


def test_comparisons_are_shortened_only_where_all_would_take_too_long():
    assert plan.share_of_seconds([Cost(1, 1)] * 19, 38) == 1
    assert plan.share_of_seconds([Cost(1, 1)] * 25, 38) == pytest.approx(0.52)
    assert plan.share_of_seconds([Cost(1, 1)] * 60, 38) == plan.LEAST_SHARE
    assert plan.share_of_seconds([Cost(0, 50)], 38) == 1, "nothing to shorten"
    for n in (5, 15, 20, 25, 32):
        share = plan.share_of_seconds([Cost(1.5, 1)] * n, 38)
        assert sum(Cost(1.5, 1).at(share) for _ in range(n)) <= 38 + 1e-9 or share == plan.LEAST_SHARE


@pytest.mark.parametrize("n, taken, limit, expected", [
    (15, 2, 38, 1.0),  # as expected
    (15, 0.1, 38, 1.0),  # faster
    (15, 500, None, 1.0),  # no limit
    (25, 1.52, 38, 0.52),  # too many, and each as expected
])
def test_the_time_left_decides_how_long_comparisons_take(n, taken, limit, expected):
    clock = Clock()
    made = Plan([Cost(1, 1)] * n, limit, clock)
    for i in range(n):
        share, mine, left = made.next()
        assert share == pytest.approx(expected, abs=0.02)
        assert mine == Cost(1, 1).at(share) and left >= (n - i) * mine - 1e-9
        clock.minutes += taken


def test_a_slow_machine_shortens_what_is_still_to_come():
    """Everything but the comparisons takes twice as long as expected: at the end it is in time all the same."""
    clock = Clock()
    made = Plan([Cost(1.5, 0.5)] * 17, 38, clock)
    shares = []
    for _ in range(17):
        shares.append(made.next()[0])
        clock.minutes += 1.5 * shares[-1] + 1
    assert shares[0] == 1 and shares[-1] < 1 and clock.minutes < 39


@pytest.mark.parametrize("settings, repeat, share", [([], 1, 0.57), ([], 3, 0.57), (["SECONDS=4"], 1, 1.0)])
def test_many_quick_notebooks_still_end_in_time(tmp_path, monkeypatch, capsys, settings, repeat, share):
    paths = [tmp_path / f"ssm/n{i}.ipynb" for i in range(22)]
    for path in paths:
        tiny_notebook(path, minutes=dict(quick=2.2))
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "this_device", lambda: ("a cpu", 2, False))
    options = runner.parse(["--repeat", str(repeat), *(word for s in settings for word in ("--set", s))])
    mode, made = runner.make_plan(options, paths, tmp_path)
    said = capsys.readouterr().out
    assert mode == "quick" and said.startswith("quick mode")
    assert made.share == pytest.approx(share, abs=0.011) and ("usual time" in said) == (share < 1)


def test_the_device_decides_what_auto_means(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "this_device", lambda: ("a gpu", 2, True))
    mode, made = runner.make_plan(runner.parse([]), [], tmp_path)
    assert mode == "full" and made.limit is None
    device, threads, gpu = plan.this_device()
    assert device and threads >= 1 and gpu == __import__("torch").cuda.is_available()


def test_costs_come_from_the_last_whole_run_on_this_device(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "this_device", lambda: ("cpu", 2, False))
    path = tmp_path / "ssm/n.ipynb"
    tiny_notebook(path, minutes=dict(quick=2, full=10))

    def ran(place, utc_time, **facts):
        file = tmp_path / "results/ssm" / place / "n.env.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = dict(device="cpu", num_threads=2, mode="quick", comparing_seconds=30, process_seconds=[120, 60],
                     seconds_share=0.5, continued=False, utc_time=utc_time) | facts
        file.write_text(json.dumps(facts))

    def found(mode="quick"):
        return plan.cost(path, mode, [tmp_path])
    assert found() == Cost(1, 1) and found("full") == Cost(5, 5) and sum(found("smoke")) == plan.MINUTES["smoke"]
    for place, facts in dict(a=dict(device="other"), b=dict(num_threads=4), c=dict(mode="full", device="other"),
                             d=dict(continued=True), e=dict(process_seconds=[])).items():
        ran(place, "2026-01-09", **facts)
    (tmp_path / "results/ssm/f").mkdir()
    (tmp_path / "results/ssm/f/n.env.json").write_text("{ cut off")
    assert found() == Cost(1, 1) and found("full") == Cost(5, 5)
    ran("g", "2026-01-02")
    assert found() == Cost(1.0, 1.5 + plan.START_MINUTES), "half their SECONDS took 30 s; the rest of two minutes is the rest"
    ran("h/weights", "2026-01-03", process_seconds=[60], seconds_share=1)
    assert found() == Cost(0.5, 0.5 + plan.START_MINUTES), "the last one"
    ran("i", "2026-01-01", mode="smoke", device="other", num_threads=1)
    assert found("smoke") == Cost(1.0, 1.5 + plan.START_MINUTES), "smoke: of any device"


# filing


def fake_execute(path, values, mode, staging):
    """What a notebook that went well leaves in its staging folder."""
    place = staging / "results/ssm/device"
    place.mkdir(parents=True, exist_ok=True)
    for name in (".csv", ".env.json", "_raw.csv"):
        (place / f"{path.stem}{name}").write_text("new\n")
    nbformat.write(nbformat.v4.new_notebook(), staging / path.name)
    return "ok", ""


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch):
    """Two notebooks that only pretend to run, and their earlier results: (folder of those, run)."""
    paths = [tmp_path / "sources/ssm/first.ipynb", tmp_path / "sources/ssm/second.ipynb"]
    for path in paths:
        tiny_notebook(path)
    monkeypatch.setattr(runner, "ROOT", tmp_path / "sources")
    monkeypatch.setattr(runner, "execute", fake_execute)
    monkeypatch.setattr(runner, "this_device", lambda: ("a cpu", 2, False))
    place = tmp_path / "out/results/ssm/device"
    place.mkdir(parents=True)
    for path in paths:
        (place / f"{path.stem}.csv").write_text("earlier\n")
        (place / f"{path.stem}_raw.csv").write_text("earlier\n")
    return place, lambda: runner.run(runner.parse(["--mode", "full", "--out", str(tmp_path / "out")]))


def fails_for_first(function, error):
    """A function that raises when it is called for the first of the two notebooks."""
    def call(*args):
        if any("first" in str(arg) for arg in args):
            raise error
        return function(*args)
    return call


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EROFS, "Read-only file system"), ValueError("a template is missing")])
@pytest.mark.parametrize("where", ["tidy", "move_into_place"])
def test_a_fault_while_filing_fails_that_notebook_alone(two_notebooks, monkeypatch, capsys, where, error):
    place, run = two_notebooks
    monkeypatch.setattr(runner, where, fails_for_first(getattr(runner, where), error))
    assert run() == 1
    said = capsys.readouterr()
    assert said.err == f"first failed: {type(error).__name__}: {error}\n"
    table = {line.split()[0]: line.split()[1] for line in said.out.splitlines()[-2:]}
    assert table == {"first": "failed", "second": "ok"}
    assert {p.name: p.read_text() for p in place.glob("first*")} == {"first.csv": "earlier\n", "first_raw.csv": "earlier\n"}
    assert (place / "second.csv").read_text() == "new\n"
    assert (place.parents[2] / ".staging/first").exists(), "what it measured is still there"


@pytest.mark.parametrize("last", ["first.env.json", "first_raw.csv"])
def test_results_are_moved_all_or_none(two_notebooks, monkeypatch, capsys, last):
    """The disk fails when some files are already in their places: those give way to the earlier ones again."""
    place, run = two_notebooks
    before = {p.name: p.read_text() for p in place.iterdir()}
    replace = os.replace

    def replace_until(source, target):
        if str(target) == str(place / last) and "earlier" not in str(source):
            raise OSError(errno.EROFS, "Read-only file system")
        replace(source, target)

    monkeypatch.setattr(runner.os, "replace", replace_until)
    assert run() == 1 and "first failed: OSError: [Errno 30] Read-only file system" in capsys.readouterr().err
    assert {name: (place / name).read_text() for name in before if "first" in name} == \
        {name: text for name, text in before.items() if "first" in name}
    assert {p.name for p in place.glob("first*")} == {"first.csv", "first_raw.csv"}
    monkeypatch.setattr(runner.os, "replace", replace)
    assert run() == 0 and {p.read_text() for p in place.glob("*.csv")} == {"new\n"}


def test_what_another_device_left_unfinished_is_not_filed(two_notebooks, tmp_path):
    place, run = two_notebooks
    left = tmp_path / "out/.staging/first/results/ssm/other-device/first.csv"
    left.parent.mkdir(parents=True)
    left.write_text("half of it\n")
    left.with_name("first.env.json").write_text("of a run that could not be filed\n")
    assert run() == 0
    assert not (place.parent / "other-device").exists() and (place / "first.csv").read_text() == "new\n"


def test_what_an_earlier_attempt_left_is_not_filed_with_the_next_one(two_notebooks, tmp_path):
    """Its code may have been another: a table that is not written any more."""
    place, run = two_notebooks
    for left in ("results", "figures"):
        orphan = tmp_path / "out/.staging/first" / left / place.relative_to(tmp_path / "out/results") / "orphan.csv"
        orphan.parent.mkdir(parents=True)
        orphan.write_text("of cells that are no more\n")
    assert run() == 0
    assert not list((tmp_path / "out/results").rglob("orphan.csv")) and not list((tmp_path / "out/figures").rglob("orphan.csv"))
    assert (place / "first.csv").read_text() == "new\n"


def test_a_failure_is_told_even_if_its_notebook_cannot_be_kept(two_notebooks, monkeypatch, capsys):
    _, run = two_notebooks
    monkeypatch.setattr(runner, "execute", lambda path, *_: ("failed", f"{path.stem} on purpose"))
    assert run() == 1
    assert capsys.readouterr().err == "first failed: first on purpose\nsecond failed: second on purpose\n"


def png(size, noise):
    """A PNG of a picture, as text in base64."""
    random = np.random.default_rng(0)
    smooth = np.linspace(0, 255, size)[:, None, None] * np.ones((1, size, 3))
    pixels = np.clip(smooth + noise * random.normal(size=(size, size, 3)), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode()


def test_an_executed_copy_is_for_reading(tmp_path):
    """Without the support code, widgets and timing metadata; its pictures no larger than they need to be."""
    notebook = new_notebook("# A question?", ("support", "#@title Support code: x\n" + "a = 1\n" * 2000), "x = 1", ("glance", "# an older run's numbers"))
    notebook.metadata["papermill"], notebook.metadata["widgets"] = dict(duration=1), dict(state={})
    for cell in notebook.cells:
        cell.metadata["papermill"], cell.metadata["execution"] = dict(begin=1), {"iopub.status.busy": "2026-01-01"}
    chart, photo = png(300, 0), png(700, 10)
    for picture in (chart, photo):
        notebook.cells[2].outputs.append(nbformat.v4.new_output("display_data", {"image/png": picture, "text/plain": "fig"}))
    notebook.cells[1].outputs.append(nbformat.v4.new_output("stream", text="effarch is here: nothing to write\n"))
    warned = f"{sys.prefix}/lib/some/module.py:21: SomeWarning: x\n{runner.ROOT}/effarch/y.py:3: z\n"
    notebook.cells[1].outputs.append(nbformat.v4.new_output("stream", name="stderr", text=warned))
    path = tmp_path / "n.ipynb"
    nbformat.write(notebook, path)
    runner.tidy(path)
    got = nbformat.read(path, as_version=4)
    nbformat.validate(got)
    assert len(got.cells) == 3, "the results at a glance are the last run's, not this one's"
    assert got.cells[1].source.splitlines()[0] == "#@title Support code: x" and len(got.cells[1].source.splitlines()) == 2
    assert "effarch/" in got.cells[1].source and got.cells[1].outputs[0].text.startswith("effarch is here")
    assert got.cells[1].outputs[1].text == "lib/some/module.py:21: SomeWarning: x\neffarch/y.py:3: z\n", "no folder of this machine"
    assert got.cells[2].source == "x = 1" and got.cells[0].source == "# A question?"
    assert not {"papermill", "widgets", "execution"} & {k for part in (got, *got.cells) for k in part.metadata}
    first, second = (output["data"] for output in got.cells[2].outputs)
    assert len(first["image/png"]) <= len(chart) and "image/png" not in second and first["text/plain"] == "fig"
    assert len(second["image/jpeg"]) < len(photo) / 3
    kept = Image.open(io.BytesIO(base64.b64decode(second["image/jpeg"])))
    assert kept.size == (700, 700)
