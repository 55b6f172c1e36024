"""The runner: what it refuses, and what it keeps when a notebook fails."""

import errno
import signal
import subprocess
import sys
import time

import nbformat
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
    first = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    deadline = time.monotonic() + 120
    for line in first.stdout:
        if "step 3" in line or time.monotonic() > deadline:
            break
    second = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert second.returncode == 2 and "another run is writing" in second.stderr, second.stderr
    import os

    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode != 0
    assert not list(folder.rglob("good.csv")) and not list(folder.rglob("*.tmp"))
    third = run("--mode", "cpu", "--set", "STEPS=120")
    assert third.returncode == 0, third.stderr + errors
    assert "good: continuing an interrupted run" in third.stdout
    (csv,) = folder.glob("results/ssm/*/good.csv")
    assert [int(line.split(",")[0]) for line in csv.read_text().splitlines()[1:]] == list(range(120))


def test_a_full_disk_while_filing_fails_that_notebook_alone(monkeypatch, tmp_path, capsys):
    def file_away(path, values, mode, out):
        if path.stem == "first":
            raise OSError(errno.ENOSPC, "No space left on device")
        return "ok", "", out / "results"

    paths = [runner.ROOT / "ssm/first.ipynb", runner.ROOT / "ssm/second.ipynb"]
    monkeypatch.setattr(runner, "find_notebooks", lambda only: paths)
    monkeypatch.setattr(runner, "settings_for", lambda notebooks, settings: [{}, {}])
    monkeypatch.setattr(runner, "run_one", file_away)
    assert runner.run(runner.parse(["--mode", "cpu", "--out", str(tmp_path)])) == 1
    said = capsys.readouterr()
    assert "first failed: OSError" in said.err and "No space left" in said.err
    table = {line.split()[0]: line.split()[1] for line in said.out.splitlines()[-2:]}
    assert table == {"first": "failed", "second": "ok"}


@pytest.mark.parametrize("words, tools", [("test", True), ("--mode cpu test", True), ("--only test", False), ("--mode=cpu", False)])
def test_the_front_door_installs_the_test_tools_for_tests_only(words, tools, tmp_path):
    """The part of run_all.sh that reads the words, with nothing installed."""
    script = (runner.ROOT / "run_all.sh").read_text().split("starter=")[0] + 'echo "action=$action"\n'
    (tmp_path / "door.sh").write_text(script)
    said = subprocess.run(["bash", "door.sh", *words.split()], cwd=tmp_path, capture_output=True, text=True).stdout
    assert said == f"action={'test' if tools else 'run'}\n"
