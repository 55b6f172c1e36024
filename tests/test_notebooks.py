"""Every notebook has the same anatomy, carries true copies of the shared cells, and defines without effects."""

import ast
import os
import random
import re
import statistics
import subprocess
import sys

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT

from lab import notebooks, run, sync_cells

SOURCES = sync_cells.sources()
HEADINGS = ["Results at a glance", "Parameters", "Environment", "Background", "Model", "Correctness", "Measurement",
            "Figures", "Claims", "Takeaways, limits, references"]
each_notebook = pytest.mark.parametrize("path", SOURCES, ids=[p.stem for p in SOURCES])


def load(path):
    return nbformat.read(path, as_version=4)


def lines(cell):
    """The lines of code: without blank lines, comments and docstrings."""
    documented = set()
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for i, line in enumerate(cell.source.splitlines(), 1)
            if line.strip() and not line.strip().startswith("#") and i not in documented]


def is_copy(cell):
    return bool(sync_cells.FIRST_LINE.fullmatch(cell.source.split("\n", 1)[0]))


@each_notebook
def test_committed_without_outputs_and_with_the_right_metadata(path):
    notebook = load(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.colab.gpuType == "T4" and notebook.metadata.colab.toc_visible
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert "papermill" not in cell.metadata


@each_notebook
def test_headings_in_order(path):
    text = [line for cell in load(path).cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    assert text[0].startswith("# ")
    found = [line.removeprefix("## ") for line in text if line.startswith("## ")]
    positions = [next((i for i, f in enumerate(found) if f.startswith(h)), None) for h in HEADINGS]
    assert None not in positions, f"missing: {[h for h, p in zip(HEADINGS, positions, strict=True) if p is None]}"
    assert positions == sorted(positions)


@each_notebook
def test_cells_are_short_and_explained(path):
    notebook = load(path)
    own = [c for c in notebook.cells if c.cell_type == "code" and not is_copy(c)]
    sizes = [len(lines(cell)) for cell in own]
    assert statistics.median(sizes) <= 16
    assert max(sizes) <= 50, own[int(np.argmax(sizes))].source.splitlines()[0]
    assert 25 <= len(notebook.cells) <= 95


@each_notebook
def test_parameters_are_commented_literals_with_known_types(path):
    cells = notebooks.cells(path, "parameters")
    assert len(cells) == 1
    source = cells[0].source.splitlines()
    for node in ast.parse(cells[0].source).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign), ast.unparse(node)
        ast.literal_eval(node.value)
        assert "#" in source[node.lineno - 1], f"no comment: {ast.unparse(node)}"
    found = run.parameters(path)
    assert {"MODE", "SEED", "OUT", "RESUME"} <= set(found)
    untyped = [name for name, (default, kind) in found.items() if default is None and not kind]
    assert not untyped, "a default of None needs an annotation, for `--set` to check types"


@each_notebook
def test_links_resolve(path):
    text = "\n".join(cell.source for cell in load(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (path.parent / target).exists(), target
    assert "colab.research.google.com" not in text  # a badge would need a fixed address of the repository


@each_notebook
def test_nothing_of_this_machine_is_named(path):
    text = path.read_text(encoding="utf-8")
    for word in ("/work/", "../shared", "/root/", "/tmp/"):
        assert word not in text


def test_copies_are_true():
    done = subprocess.run([sys.executable, "-m", "lab.sync_cells", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_changed_copy_is_found_and_mended(project):
    from conftest import tiny_notebook

    folder, _ = project
    tiny_notebook(folder / "ssm/a.ipynb")
    def sync(*words):
        return subprocess.run([sys.executable, "-m", "lab.sync_cells", *words], cwd=folder,
                              capture_output=True, text=True)
    assert sync("--check").returncode == 1
    assert sync().returncode == 0 and sync("--check").returncode == 0
    notebook = load(folder / "ssm/a.ipynb")
    notebook.cells[2].source += "\n# an edit"
    nbformat.write(notebook, folder / "ssm/a.ipynb")
    found = sync("--check")
    assert found.returncode == 1 and "measure.py differs" in found.stdout
    assert "# an edit" in (folder / "ssm/a.ipynb").read_text(), "--check changes nothing"
    assert "from lab.cells" not in (folder / "ssm/a.ipynb").read_text(), "a copy needs no lab/ beside it"


@each_notebook
def test_definitions_have_no_side_effects(path, tmp_path, monkeypatch, capfd):
    """No file, no print, no draw from a generator, no global setting of torch or matplotlib."""
    import matplotlib

    notebooks.definitions(path)  # imports once: an import may warn
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    def state():
        return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                dict(matplotlib.rcParams), sorted(os.environ))
    before = state()
    names = notebooks.definitions(path)
    assert state() == before
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert callable(names["start_run"]) and names["MODE"] == "auto"


@each_notebook
def test_public_definitions_are_documented(path):
    for cell in notebooks.cells(path, "definitions"):
        for node in ast.parse(cell.source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"
