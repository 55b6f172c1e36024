"""Every notebook, run as Colab would: one file alone in an empty folder, top to bottom, twice with the same seed."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from lab import sync_cells

# what differs between two runs of the same code: times, memory, what follows from them, and when it ran
CHANGES = re.compile(
    r"latency|_ms|_us|us_per|ms_|throughput|speedup|^noisy$|slope|crossover|seconds|train_s|peak_mem|mib|memory|limit|"
    r"faster|crossing|misfit|run_id|utc_time|git_|^(low|high|measured|verdict|reason|n_runs|error_ms)$")
TABLES = {  # of each notebook: tables with their number of rows (None: at least one), and the claims it judges
    "mrss_proxy_experiment": (dict(mrss_conv_forms=None, mrss_proxy_results=None, mrss_quality=None), "A", range(1, 14)),
    "selective_scan": (dict(scan_speed=None, scan_speedups=None, scan_quality=None, scan_decode=None), "A", range(14, 17)),
    "kernel_distillation": (dict(kernel_distillation_quality=None, kernel_distillation_latency=None,
                                 kernel_distillation_spectrum=None), "A", range(17, 20)),
    "clip_pruning": (dict(clip_vtp_results=None, clip_equal_compute=None, clip_plugins=3),
                     "B", [*range(1, 14), 15]),
    "token_reduction": (dict(token_reduction_grid=None, token_reduction_methods=None, token_reduction_latency=None),
                        "B", ()),
    "token_scaling": (dict(token_scaling=None, token_scaling_fits=None, token_scaling_adaptive=None), "B", [14]),
}
PARAMETERS = {"mrss_proxy_experiment": ["-p", "CONV_FORM", "channels_last"]}  # else the fastest here is taken
# the last step of a factored decode is elementwise: in the formula, not in PyTorch's counter
UNCOUNTED = {"kernel_distillation": 0.01}
SOURCES = sync_cells.sources()


def run_alone(path, folder):
    """Execute a copy of the notebook, with nothing beside it; returns the executed notebook."""
    folder.mkdir()
    shutil.copy(path, folder)
    words = [sys.executable, "-m", "papermill", path.name, "executed.ipynb", "-k", "python3", "-p", "MODE", "smoke",
             *PARAMETERS.get(path.stem, []), "--no-progress-bar", "--execution-timeout", "300"]
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "PYTHONPATH")}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(folder / "executed.ipynb", as_version=4)


@pytest.mark.smoke
@pytest.mark.parametrize("path", SOURCES, ids=[p.stem for p in SOURCES])
def test_alone_in_an_empty_folder_and_the_same_twice(path, tmp_path):
    notebook = run_alone(path, tmp_path / "first")
    check_outputs(path.stem, tmp_path / "first" / ".scratch", notebook)
    run_alone(path, tmp_path / "second")
    same_numbers(tmp_path / "first", tmp_path / "second")


@pytest.mark.smoke
def test_editing_a_design_and_running_the_cells_below(tmp_path):
    """A researcher changes SplitMRSS after a run, and runs that cell and all below it: new rows, no old measurement."""
    notebook = nbformat.read(ROOT / "ssm/mrss_proxy_experiment.ipynb", as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += '\nMODE, CONV_FORM = "smoke", "channels_last"'
    place = next(i for i, c in enumerate(notebook.cells) if "class SplitMRSS" in c.source)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path))))

    def sizes_from(begin):
        """Run the cells from `begin` on; parameters of every design in the table that is then there."""
        for i, cell in enumerate(notebook.cells[begin:], begin):
            client.execute_cell(cell, i)
        table = pd.read_csv(next(tmp_path.rglob("mrss_proxy_results.csv"))).query("experiment == 'designs'")
        return table.groupby("variant")["params"].max()

    with client.setup_kernel():
        before = sizes_from(0)
        assert "round(kernel / 4)" in notebook.cells[place].source
        notebook.cells[place].source = notebook.cells[place].source.replace("round(kernel / 4)", "round(kernel / 2)")
        changed = sizes_from(place) > before
    heirs = ("SplitMRSS", "SparseMRSS")  # the second is a subclass of the first
    assert set(changed[changed].index) == {n for n in changed.index if n.startswith(heirs)}


def check_outputs(name, root, notebook):
    """Tables with schema and provenance, figures, claims; no error and no warning in the outputs."""
    tables, letter, numbers = TABLES[name]
    found = {p.stem: p for p in root.rglob("results/**/*.csv")}
    for table, rows in tables.items():
        frame = pd.read_csv(found[table])
        assert len(frame) == (rows or len(frame)) and len(frame) > 0, table
        needed = {"run_id", "device", "dtype", "torch", "python", "seed", "mode", "git_commit", "weights", "status"}
        assert needed <= set(frame), (table, needed - set(frame))
        assert set(frame["mode"]) == {"smoke"}
        flops = ["flops_counted", "flops_analytic"]
        both = frame.dropna(subset=flops) if set(flops) <= set(frame) else frame[:0]
        slack = UNCOUNTED.get(name, 0) * both["flops_analytic"] if len(both) else 0
        assert not len(both) or ((both["flops_counted"] - both["flops_analytic"]).abs() <= slack).all(), table
    for path in found.values():
        assert_documented(path)
    if len(numbers):
        claims = pd.read_csv(found["claims"], keep_default_na=False)
        assert claims["id"].tolist() == [f"{letter}{i:02d}" for i in numbers]
        assert (claims["reason"] != "").all()
        assert ((claims["measured"].astype(str) != "") | (claims["verdict"] == "not testable here")).all()
    figures = list(root.rglob("figures/**/*.png"))
    assert figures and all(p.stat().st_size > 5000 for p in figures)
    facts = json.loads(next(root.rglob(f"results/**/{name}.env.json")).read_text())
    assert facts["packages"]["torch"] and facts["seconds"] > 0
    assert not list(root.rglob("*.journal")) and not list(root.rglob("*.tmp"))
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert "✓" in text and "Traceback" not in text and "Warning" not in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= len(figures), "each figure is in the notebook, too"


DICTIONARY = (ROOT / "results/README.md").read_text(encoding="utf-8")


def assert_documented(path):
    """The data dictionary has the table and each of its columns (`x_low` and the like go with `x`)."""
    words = set(re.findall(r"`([^`]+)`", DICTIONARY))
    assert path.name in words or path.stem.endswith("_raw"), path.name
    for column in pd.read_csv(path, nrows=1).columns:
        stem = re.sub(r"_(low|high|p20|p80)$", "", column)
        stem = re.sub(r"_minus_(best|tome|fixed|dense)$", "_minus_x", stem)
        assert {column, stem, f"{stem}_median"} & words, (path.name, column)


def same_numbers(first, second):
    """The CSVs of two runs are the same, apart from times, memory and dates."""
    names = sorted(p.relative_to(first) for p in first.rglob("results/**/*.csv") if not p.stem.endswith("_raw"))
    assert names == sorted(p.relative_to(second) for p in second.rglob("results/**/*.csv") if not p.stem.endswith("_raw"))
    for name in names:
        one, two = (pd.read_csv(folder / name, dtype=str) for folder in (first, second))
        kept = [c for c in one if not CHANGES.search(c)]
        pd.testing.assert_frame_equal(one[kept], two[kept], obj=str(name))


def test_every_notebook_is_expected_here():
    assert {p.stem for p in SOURCES} == set(TABLES)
    assert ROOT / "ssm/mrss_proxy_experiment.ipynb" in SOURCES and ROOT / "vlm/clip_pruning.ipynb" in SOURCES
