"""The runner: what it refuses, and what it keeps when a notebook fails."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from conftest import tiny_notebook

from lab import run as runner

GOOD = '''run = start_run("ssm", "good", MODE, SEED, OUT, RESUME)
check(STEPS is None or is_count(STEPS), "STEPS", STEPS, "a whole number of at least 1")
table = Table(run, "good", ["i"])
for i in range(STEPS or 2):
    table.add(dict(i=i, label=LABEL))
table.save()
fig, ax = plt.subplots()
save_figure(run, fig, "good.png", "an empty figure")
run.finish()'''
BAD = '''run = start_run("ssm", "bad", MODE, SEED, OUT, RESUME)
table = Table(run, "bad", ["i"])
table.add(dict(i=0))
table.save()
raise RuntimeError("on purpose")'''


@pytest.mark.parametrize("words, said", [
    (["--mode", "fast"], "--mode"),
    (["--colour"], "--colour"),
    (["--onl=ssm"], "--onl=ssm"),
    (["--only", "nothing"], "--only nothing: no such notebook; there are: ssm, vlm, good"),
    (["--set", "STEPZ=3"], "--set STEPZ=3: no such parameter; there are: LABEL, RATE, RESUME, SEED, STEPS"),
    (["--set", "STEPS=three"], "--set STEPS=three: not a value of type None or int"),
    (["--set", "SEED=1.5"], "--set SEED=1.5: not a value of type int"),
    (["--set", "SEED=True"], "--set SEED=True: not a value of type int"),
    (["--set", "RESUME=true"], "--set RESUME=true: not a value of type bool"),
    (["--set", "STEPS"], "--set STEPS: write PARAM=VALUE"),
    (["--set", "MODE=cpu"], "use --mode"),
    (["--mode", "gpu"], "--mode gpu: no CUDA device found"),
])
def test_bad_words_are_refused_in_one_line(project, words, said):
    folder, run = project
    if words == ["--mode", "gpu"] and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    done = run(*words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert not (folder / "results").exists() and not (folder / ".staging").exists()


def test_good_run_files_its_results_and_takes_parameters(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    done = run("--mode", "cpu", "--set", "STEPS=3", "--set", "LABEL=7", "--set", "RATE=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (csv,) = folder.glob("results/ssm/*/good.csv")
    lines = csv.read_text().splitlines()
    assert len(lines) == 4 and lines[1].startswith("0,7,")
    made = {p.name for p in csv.parent.iterdir()}
    assert made == {"good.csv", "good.env.json", "good.html", "good.ipynb"}
    assert len(list(folder.glob("figures/ssm/*/good.png"))) == 1
    notebook = nbformat.read(csv.parent / "good.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert "papermill" not in notebook.metadata and not any("papermill" in c.metadata for c in notebook.cells)
    assert any(line.split()[:2] == ["good", "ok"] for line in done.stdout.splitlines()), done.stdout


def test_smoke_leaves_results_alone(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    assert run("--mode", "smoke").returncode == 0
    assert not (folder / "results").exists()
    assert list((folder / ".scratch/results").rglob("good.csv"))


def test_failing_notebook_spoils_nothing(project):
    folder, run = project
    tiny_notebook(folder / "ssm/bad.ipynb", BAD.replace("raise", "run.finish() #"))
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    assert run("--mode", "cpu", "--only", "bad").returncode == 0
    (csv,) = folder.glob("results/ssm/*/bad.csv")
    before = csv.read_bytes()
    tiny_notebook(folder / "ssm/bad.ipynb", BAD)
    done = run("--mode", "cpu")
    assert done.returncode == 1
    assert "bad failed: RuntimeError: on purpose" in done.stderr
    assert csv.read_bytes() == before
    assert (folder / "results/ssm/bad.failed.ipynb").exists()
    assert list(folder.glob("results/ssm/*/good.csv")), "the other notebook still ran"
    table = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[-2:]}
    assert table == {"bad": "failed", "good": "ok"}


def test_wrong_value_is_one_clear_line(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    done = run("--mode", "smoke", "--set", "STEPS=-1")
    assert done.returncode == 1
    assert "ValueError: STEPS=-1 is not allowed; allowed: a whole number of at least 1" in done.stderr


def test_dead_kernel_is_a_failure(project):
    folder, run = project
    tiny_notebook(folder / "ssm/dies.ipynb", "import os\nos.kill(os.getpid(), 9)")
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    done = run("--mode", "smoke")
    assert done.returncode == 1 and "dies failed: DeadKernelError" in done.stderr
    assert list((folder / ".scratch/results").rglob("good.csv"))


def test_foreign_kernel_name_still_runs(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD, kernel="my-own-kernel")
    assert run("--mode", "smoke").returncode == 0


def test_python_without_the_packages_is_refused(project):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "bare")], check=True)
    done = subprocess.run(["bash", "run_all.sh", "--python", "bare/bin/python"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "lacks torch, papermill" in done.stderr


def test_read_only_output_is_refused(project, tmp_path):
    folder, run = project
    tiny_notebook(folder / "ssm/good.ipynb", GOOD)
    (tmp_path / "a-file").write_text("not a folder")
    done = run("--mode", "smoke", "--out", str(tmp_path / "a-file" / "x"))
    assert done.returncode == 2 and "--out: cannot write" in done.stderr


def test_two_runs_at_once_and_ctrl_c(project):
    """The second run on an output folder is refused; Ctrl-C ends the first, which the next one continues."""
    folder, run = project
    slow = GOOD.replace("    table.add", "    if not table.has(i=i): __import__('time').sleep(0.1)\n    table.add")
    slow = slow.replace("    table.add", "    if table.has(i=i): continue\n    print('step', i, flush=True)\n    table.add", 1)
    tiny_notebook(folder / "ssm/good.ipynb", slow)
    run("--help")  # fills the shared cells
    words = ["bash", "run_all.sh", "--python", sys.executable, "--mode", "cpu", "--set", "STEPS=120"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests started in the background ignore Ctrl-C, and hand that on
    first = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True, preexec_fn=heed)
    deadline = time.monotonic() + 120
    for line in first.stdout:
        if "step 3" in line or time.monotonic() > deadline:
            break
    second = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert second.returncode == 2 and "another run is writing" in second.stderr, second.stderr
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0
    assert not list(folder.rglob("good.csv")) and not list(folder.rglob("*.tmp"))
    third = run("--mode", "cpu", "--set", "STEPS=120")
    assert third.returncode == 0, third.stderr + errors
    assert "good: continuing an interrupted run" in third.stdout
    (csv,) = folder.glob("results/ssm/*/good.csv")
    assert [int(line.split(",")[0]) for line in csv.read_text().splitlines()[1:]] == list(range(120))


SLOW = '''import os, time
run = start_run("ssm", "slow", MODE, SEED, OUT, RESUME)
table = Table(run, "slow", ["i"])
for i in range(STEPS or 25):
    if not table.has(i=i):
        if i == 5 and os.path.exists("stop"):
            raise RuntimeError("on purpose")
        time.sleep(0.1)
        table.add(dict(i=i, label=LABEL, square=i * i))
        print("step", i, os.getpid(), flush=True)
table.save()
run.finish()'''


def slow_table(out):
    """The table that SLOW made, without what differs from run to run."""
    (csv,) = out.glob("results/ssm/*/slow.csv")
    return pd.read_csv(csv).drop(columns=["run_id", "utc_time"])


def test_a_killed_run_is_continued_and_ends_like_an_undisturbed_one(project):
    folder, run = project
    tiny_notebook(folder / "ssm/slow.ipynb", SLOW)
    run("--help")  # fills the shared cells
    words = ["bash", "run_all.sh", "--python", sys.executable, "--mode", "cpu", "--out", "out"]
    first = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in first.stdout:
        if line.startswith("step 7 "):
            break
    kernel = int(line.split()[2])
    first.kill()
    os.kill(kernel, signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL and not list((folder / "out").rglob("*.csv"))
    second = run("--mode", "cpu", "--out", "out")
    assert second.returncode == 0, second.stderr
    kept = int(re.search(r"slow: continuing an interrupted run, (\d+) rows are there", second.stdout)[1])
    assert 8 <= kept < 25 and f"step {kept - 1} " not in second.stdout, "no finished row is measured again"
    assert run("--mode", "cpu", "--out", "undisturbed").returncode == 0
    pd.testing.assert_frame_equal(slow_table(folder / "out"), slow_table(folder / "undisturbed"))


def test_other_parameters_or_versions_start_over_and_say_so(project):
    folder, run = project
    tiny_notebook(folder / "ssm/slow.ipynb", SLOW)
    (folder / "stop").touch()
    words = ("--mode", "cpu", "--out", "out")
    assert run(*words).returncode == 1
    said = "slow: starting over, code, parameters or versions differ"
    other = run(*words, "--set", "LABEL=other")
    assert other.returncode == 1 and said in other.stdout and "step 0 " in other.stdout
    (journal,) = folder.rglob(".slow.slow.journal")
    identity, *rows = journal.read_text().splitlines()
    assert len(rows) == 5 and all('"label": "other"' in row for row in rows)
    journal.write_text("\n".join([json.dumps(json.loads(identity) | {"torch": "1.0.0"}), *rows]) + "\n")
    (folder / "stop").unlink()
    last = run(*words, "--set", "LABEL=other")
    assert last.returncode == 0 and said in last.stdout and "step 0 " in last.stdout, last.stderr
    assert slow_table(folder / "out")["i"].tolist() == list(range(25))


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
    paths = [runner.ROOT / "ssm/first.ipynb", runner.ROOT / "ssm/second.ipynb"]
    monkeypatch.setattr(runner, "find_notebooks", lambda only: paths)
    monkeypatch.setattr(runner, "settings_for", lambda notebooks, settings: [{}, {}])
    monkeypatch.setattr(runner, "execute", fake_execute)
    monkeypatch.setattr(runner, "render", lambda copy: copy.with_suffix(".html").write_text("new\n"))
    place = tmp_path / "results/ssm/device"
    place.mkdir(parents=True)
    for path in paths:
        (place / f"{path.stem}.csv").write_text("earlier\n")
        (place / f"{path.stem}_raw.csv").write_text("earlier\n")
    return place, lambda: runner.run(runner.parse(["--mode", "cpu", "--out", str(tmp_path)]))


def fails_for_first(function, error):
    """A function that raises when it is called for the first of the two notebooks."""
    def call(*args):
        if any("first" in str(arg) for arg in args):
            raise error
        return function(*args)
    return call


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EROFS, "Read-only file system"), ValueError("a template is missing")])
@pytest.mark.parametrize("where", ["tidy", "render", "move_into_place"])
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
    left = tmp_path / ".staging/first/results/ssm/other-device/first.csv"
    left.parent.mkdir(parents=True)
    left.write_text("half of it\n")
    left.with_name("first.env.json").write_text("of a run that could not be filed\n")
    assert run() == 0
    assert not (place.parent / "other-device").exists() and (place / "first.csv").read_text() == "new\n"


def test_a_failure_is_told_even_if_its_notebook_cannot_be_kept(two_notebooks, monkeypatch, capsys):
    _, run = two_notebooks
    monkeypatch.setattr(runner, "execute", lambda path, *_: ("failed", f"{path.stem} on purpose"))
    assert run() == 1
    assert capsys.readouterr().err == "first failed: first on purpose\nsecond failed: second on purpose\n"


@pytest.mark.parametrize("words, tools", [("test", True), ("--mode cpu test", True), ("--only test", False),
                                          ("--mode=cpu", False), ("--only=ssm test", True), ("--python test", False)])
def test_the_front_door_installs_the_test_tools_for_tests_only(words, tools, tmp_path):
    """The part of run_all.sh that reads the words, with nothing installed."""
    script = (runner.ROOT / "run_all.sh").read_text().split("starter=")[0] + 'echo "action=$action"\n'
    (tmp_path / "door.sh").write_text(script)
    said = subprocess.run(["bash", "door.sh", *words.split()], cwd=tmp_path, capture_output=True, text=True).stdout
    assert said == f"action={'test' if tools else 'run'}\n"
