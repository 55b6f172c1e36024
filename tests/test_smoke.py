"""Every notebook, run as Colab would, one file alone in an empty folder, top to bottom; some once more, beside the package.

In smoke mode every number but times, memory and dates is the same on any machine, however slow."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, clean_environment
from nbclient import NotebookClient
from test_notebooks import claimed, load

from lab import build

# what differs between two runs of the same code: times, memory, what follows from them, and when it ran
CHANGES = re.compile(
    r"latency|_ms|_us|us_per|ms_|throughput|speedup|^noisy$|slope|crossover|seconds|train_s|peak_mem|mib|memory|limit|"
    r"faster|crossing|misfit|run_id|utc_time|git_|^(low|high|measured|verdict|reason|source|error_ms)$")
# the last step of a factored decode is elementwise: in the formula, not in PyTorch's counter
UNCOUNTED = {"kernel_distillation": 0.01}
PROVENANCE = {"run_id", "device", "dtype", "torch", "python", "seed", "mode", "git_commit", "weights", "status"}
SOURCES = build.sources()
# run twice, the shortest of each kind: distils kernels, trains and times layers, times towers, trains towers, looks at images
TWICE = ("kernel_distillation", "real_signals", "hardware", "masked_pretraining", "photographs")


# processes that have the libraries when they begin: importing them takes longer than most notebooks in smoke mode
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "pandas", "matplotlib.pyplot", "transformers", "transformers.models.clip",
                              "sklearn.datasets", "scipy.special", "torchvision", "IPython", "effarch.clip.study", "test_smoke"])


def run_cells(path, folder, alone):
    """Run a notebook's code cells in smoke mode in IPython, in this process; what they say is kept in executed.ipynb."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    os.chdir(folder)
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")] + [str(ROOT)] * (not alone)
    for name in [n for n in sys.modules if n.split(".")[0] in ("effarch", "lab")]:
        del sys.modules[name]
    notebook, shell = nbformat.read(path, as_version=4), InteractiveShell.instance()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with capture_output() as said:
                done = shell.run_cell(cell.source, store_history=False)
            cell.outputs = [nbformat.v4.new_output("stream", text=said.stdout + said.stderr)]
            cell.outputs += [nbformat.v4.new_output("display_data", data=shown.data) for shown in said.outputs]
            if not done.success:
                said = f"{cell.source}\n{said.stdout[-3000:]}{said.stderr[-1000:]}"
                Path("failed.txt").write_text(f"{said}\n{done.error_before_exec or done.error_in_exec!r}", encoding="utf-8")
                raise SystemExit(1)
            if "parameters" in cell.metadata.get("tags", []):
                shell.user_ns["MODE"] = "smoke"
    nbformat.write(notebook, "executed.ipynb")


def execute(path, folder, alone):
    """Run a notebook in an empty folder; returns the executed notebook."""
    folder.mkdir()
    process = FORKS.Process(target=run_cells, args=(path, folder, alone))
    process.start()
    process.join()
    failed = folder / "failed.txt"
    assert process.exitcode == 0, failed.read_text(encoding="utf-8") if failed.exists() else f"it ended with {process.exitcode}"
    return nbformat.read(folder / "executed.ipynb", as_version=4)


@pytest.mark.smoke
@pytest.mark.parametrize("path", SOURCES, ids=[p.stem for p in SOURCES])
def test_alone_in_an_empty_folder(path, tmp_path):
    """Without the repository on the path, from what the support cell writes; some once more with it, and with the same numbers."""
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    notebook = execute(path, alone, alone=True)
    assert "files written beside this notebook" in support_said(notebook) and (alone / "effarch/bench/run.py").exists()
    check_outputs(path, alone / ".scratch", notebook)
    assert undocumented(alone) == [], "results/README.md lacks them"
    if path.stem not in TWICE:
        return
    notebook = execute(path, beside, alone=False)
    assert "effarch is here: nothing to write" in support_said(notebook) and not (beside / "effarch").exists()
    same_numbers(alone, beside)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["kernel_distillation", "hardware"])  # the shortest of each suite
def test_papermill_runs_it_headlessly(name, tmp_path):
    done = subprocess.run(["bash", "run_all.sh", "--python", sys.executable, "--mode", "smoke", "--only", name, "--out", str(tmp_path)],
                          cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    (copy,) = tmp_path.glob(f"results/**/{name}.ipynb")
    check_outputs(next(p for p in SOURCES if p.stem == name), tmp_path, nbformat.read(copy, as_version=4))


def support_said(notebook):
    """What the support cell printed."""
    (cell,) = build.tagged(notebook, "support")
    return "".join(output.get("text", "") for output in cell.outputs)


def check_outputs(path, root, notebook):
    """Tables with schema and provenance, figures, claims; no error and no warning in the outputs."""
    found = {p.stem: p for p in root.rglob("results/**/*.csv")}
    tables = {name: pd.read_csv(p) for name, p in found.items() if name != "claims" and not name.endswith("_raw")}
    assert tables
    for name, frame in tables.items():
        assert len(frame) > 0, f"{name} has no rows"
        assert PROVENANCE <= set(frame), (name, PROVENANCE - set(frame))
        assert set(frame["mode"]) == {"smoke"}
        assert not frame["status"].str.startswith("error").any(), (name, frame["status"].unique())
        flops = ["flops_counted", "flops_analytic"]
        both = frame.dropna(subset=flops) if set(flops) <= set(frame) else frame[:0]
        slack = UNCOUNTED.get(path.stem, 0) * both["flops_analytic"] if len(both) else 0
        assert not len(both) or ((both["flops_counted"] - both["flops_analytic"]).abs() <= slack).all(), name
    ids = sorted(claimed(load(path)))
    assert ("claims" in found) == bool(ids)
    if ids:
        claims = pd.read_csv(found["claims"], keep_default_na=False)
        assert claims["id"].tolist() == ids
        assert (claims["reason"] != "").all()
        assert ((claims["measured"].astype(str) != "") | (claims["verdict"] == "not testable here")).all()
    figures = [p for p in root.rglob("figures/**/*") if p.suffix in (".png", ".jpg")]
    assert figures and all(p.stat().st_size > 2000 for p in figures)
    facts = json.loads(next(root.rglob(f"results/**/{path.stem}.env.json")).read_text())
    assert facts["packages"]["torch"] and facts["num_threads"] == 1
    assert not list(root.rglob("*.journal")) and not list(root.rglob("*.tmp"))
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    text = "".join(o.get("text", "") for o in outputs)
    assert "✓" in text and "Traceback" not in text and "Warning" not in text
    pictures = sum(bool({"image/png", "image/jpeg"} & set(o.get("data", {}))) for o in outputs)
    assert pictures >= len(figures), "each figure is in the notebook, too"


def undocumented(folder):
    """Tables and columns that the data dictionary lacks (`x_low` and the like go with `x`)."""
    words, missing = set(re.findall(r"`([^`]+)`", (ROOT / "results/README.md").read_text(encoding="utf-8"))), []
    for path in sorted(folder.rglob("results/**/*.csv")):
        missing += [] if path.name in words or path.stem.endswith("_raw") else [path.name]
        for column in pd.read_csv(path, nrows=1).columns:
            stem = re.sub(r"_(low|high|p\d+)$", "", column)
            stem = re.sub(r"_minus_(best|tome|fixed|dense|previous|ours)$", "_minus_x", stem)
            missing += [] if {column, stem, f"{stem}_median"} & words else [f"{path.name}: {column}"]
    return missing


def same_numbers(first, second):
    """The CSVs of two runs are the same to the byte, apart from measured times, memory and dates; so are their raw tables' keys."""
    names = sorted(p.relative_to(first) for p in first.rglob("results/**/*.csv"))
    assert names == sorted(p.relative_to(second) for p in second.rglob("results/**/*.csv"))
    for name in names:
        one, two = (pd.read_csv(folder / name, dtype=str, keep_default_na=False) for folder in (first, second))
        kept = [c for c in one if not CHANGES.search(c)]
        pd.testing.assert_frame_equal(one[kept], two[kept], obj=str(name))


@pytest.mark.smoke
def test_editing_a_design_and_running_the_cells_below(tmp_path):
    """A researcher changes SplitMRSS after a run, and runs that cell and all below it: new rows, no old measurement."""
    notebook = nbformat.read(ROOT / "ssm/mrss_proxy_experiment.ipynb", as_version=4)
    (parameters,) = build.tagged(notebook, "parameters")
    parameters.source += '\nMODE = "smoke"'
    place = next(i for i, c in enumerate(notebook.cells) if "class SplitMRSS" in c.source and "support" not in c.metadata.get("tags", []))
    client = NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path))))

    def sizes_from(begin):
        """Run the cells from `begin` on; parameters of every design in the table that is then there."""
        for i, cell in enumerate(notebook.cells[begin:], begin):
            client.execute_cell(cell, i)
        table = pd.read_csv(next(tmp_path.rglob("mrss_proxy_results.csv"))).query("experiment == 'designs'")
        return table.groupby("variant")["params"].max()

    with client.setup_kernel():
        before = sizes_from(0)
        source = notebook.cells[place].source
        notebook.cells[place].source = source.replace('"kernel") / 4)', '"kernel") / 2)')  # longer filters at the full rate
        assert notebook.cells[place].source != source
        changed = sizes_from(place) > before
    heirs = ("SplitMRSS", "Dilated twin")  # the second is a subclass of the first
    assert set(changed[changed].index) == {n for n in changed.index if n.startswith(heirs)}


def test_there_are_notebooks_of_both_suites():
    assert {p.parent.name for p in SOURCES} == {"ssm", "vlm"} and len(SOURCES) >= 6
