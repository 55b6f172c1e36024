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

PARAMETERS = '''MODE = "auto"  # auto, gpu, cpu or smoke
SEED = 0  # of every generator
OUT: str | None = None  # folder for results/ and figures/
RESUME = True  # continue an interrupted run
STEPS: int | None = None  # rounds; None: by the mode
LABEL = "x"  # any text
RATE = 0.5  # between 0 and 1'''


SLOW = ("test_smoke", "test_survival", "test_run")  # whole runs, up to minutes each


def pytest_collection_modifyitems(items):
    """The slow tests come first, half of them to each of two workers; else one works on alone at the end."""
    slow = [item for item in items if item.path.stem in SLOW]
    rest = [item for item in items if item.path.stem not in SLOW]
    half = len(rest) // 2
    items[:] = slow[::2] + rest[:half] + slow[1::2] + rest[half:]


def tiny_notebook(path, *cells, kernel="python3"):
    """Write a notebook with the shared cells, the parameters above, and the given code cells."""
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": kernel, "display_name": "x", "language": "python"}})
    parameters = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    nb.cells = [parameters]
    for name in ("environment", "measure", "results", "figures", "claims"):
        source = f"#@title {name} · copied from lab/cells/{name}.py"
        nb.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": ["definitions"]}))
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


@pytest.fixture
def project(tmp_path):
    """A copy of the machinery with no notebooks in it: (folder, run) where run(*words) calls run_all.sh."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "lab", folder / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_all.sh", folder)
    for suite in ("ssm", "vlm"):
        (folder / suite).mkdir()

    def run(*words, **kwargs):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([sys.executable, "-m", "lab.sync_cells"], cwd=folder, check=True, capture_output=True)
        return subprocess.run(["bash", "run_all.sh", "--python", sys.executable, *words], cwd=folder,
                              capture_output=True, text=True, env=environment, timeout=300, **kwargs)

    return folder, run


def read_json(path):
    """A JSON file's content."""
    return json.loads(Path(path).read_text(encoding="utf-8"))
