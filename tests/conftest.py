"""Shared by all tests: one torch thread a worker, and a small project to run things in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

PARAMETERS = '''MODE = "auto"  # auto, quick, full or smoke
SEED = 0  # of every generator
OUT: str | None = None  # folder for results/ and figures/
RESUME = True  # continue an interrupted run
SECONDS: float | None = None  # most seconds of one comparison; None: 4 quick, 20 full
STEPS: int | None = None  # rounds; None: 2 quick, 3 full, 2 smoke
LABEL = "x"  # any text
RATE = 0.5  # between 0 and 1'''
START = '''import matplotlib.pyplot as plt

from effarch.bench import Table, count, save_figure, start

run = start("ssm/{name}", globals(), STEPS=count(quick=2, full=3, smoke=2))'''

# the cells of a notebook by the rules, as `new_notebook` takes them
GOOD_ANATOMY = [
    "# A tiny question?", ("glance", "# nothing yet"), ("parameters", PARAMETERS), ("support", ""),
    START.format(name="tiny"), "save_figure(run, plt.gcf(), 'tiny', 'nothing')", "# Try your own\n\n...", *["x = 1", "# so"] * 5,
    "# Takeaways, limits, references", "x = 3", "run.finish()"]

SLOW = ("test_smoke", "test_survival", "test_execute", "test_package")  # whole runs, up to minutes each


def pytest_collection_modifyitems(items):
    """The slow tests come first, half of them to each of two workers; else one works on alone at the end."""
    slow = [item for item in items if item.path.stem in SLOW]
    rest = [item for item in items if item.path.stem not in SLOW]
    half = len(rest) // 2
    items[:] = slow[::2] + rest[:half] + slow[1::2] + rest[half:]


def new_notebook(*cells, kernel="python3", **metadata):
    """A notebook of cells given as code, (tag, code) or (tag, markdown that begins with #)."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": kernel, "display_name": "x", "language": "python"}})
    if metadata:
        notebook.metadata["effarch"] = metadata
    for cell in cells:
        tag, source = cell if isinstance(cell, tuple) else ("", cell)
        new = nbformat.v4.new_markdown_cell if source.startswith("# ") else nbformat.v4.new_code_cell
        notebook.cells.append(new(source, metadata={"tags": [tag]} if tag else {}))
    return notebook


def tiny_notebook(path, *cells, **words):
    """Write a notebook of the usual anatomy: title, glance, the parameters above, an empty support cell, `run = start(…)`,
    then the given cells (see `new_notebook`)."""
    front = ["# A tiny question?", ("glance", "# nothing yet"), ("parameters", PARAMETERS), ("support", ""),
             START.format(name=path.stem)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(*front, *cells, **words), path)


# what stands in for the report in a small project: it notes that it was asked for
REPORT = '''"""A report that is one file."""


def write(root):
    """Write it; the files written."""
    path = root / "results" / "report.html"
    path.write_text("the report")
    return [path]
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the machinery with no notebooks in it: (folder, run) where run(*words) calls run_all.sh."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("lab", "effarch"):  # with what is compiled already
        shutil.copytree(ROOT / name, folder / name)
    shutil.rmtree(folder / "lab/report")
    (folder / "lab/report.py").write_text(REPORT)
    shutil.copy(ROOT / "run_all.sh", folder)
    for suite in ("ssm", "vlm"):
        (folder / suite).mkdir()

    def run(*words, script="run_all.sh", **kwargs):
        kwargs = dict(cwd=folder, env=clean_environment()) | kwargs
        return subprocess.run(["bash", str(script), "--python", sys.executable, *words], capture_output=True, text=True,
                              timeout=300, **kwargs)

    return folder, run


def clean_environment(**more):
    """This process's environment without what would let a process find the repository or lose its figures."""
    hidden = ("PYTHONPATH", "MPLBACKEND", "EFFARCH_PROCESS", "EFFARCH_SECONDS_SHARE")
    return {k: v for k, v in os.environ.items() if k not in hidden} | more


def read_json(path):
    """A JSON file's content."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
