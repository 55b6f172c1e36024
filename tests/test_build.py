"""Exported modules are the notebooks' cells, support cells are the modules, and importing any of it does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, clean_environment, new_notebook, tiny_notebook

from lab import build

MODULES = sorted(p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
                 for p in (ROOT / "effarch").rglob("*.py"))
METHODS = [m for m in MODULES if m.split(".")[1:2] not in ([], ["bench"], ["clip"], ["checks"])]
EXPORTS = (("export", 'import math\n\nfrom effarch.checks import check'),
           "print('not exported')",
           ("export", 'def area(r):\n    """π r² of a circle, for r ≥ 0."""\n    check(r >= 0, "r", r, "≥ 0")\n    return math.pi * r**2'))
HOME = dict(module="effarch/circle.py", doc="Circles.")


def python(code, cwd, *words, **environment):
    """Run Python code in a process that does not know the repository."""
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True,
                          env=clean_environment(**environment), timeout=300)


@pytest.fixture
def small(project):
    """(folder, build) of a project with a notebook that exports a module and one that uses it."""
    folder, _ = project
    tiny_notebook(folder / "ssm/circle.ipynb", *EXPORTS, **HOME)
    tiny_notebook(folder / "ssm/wheel.ipynb", "%pwd\nfrom effarch.circle import area")

    def build_it(*words):
        return subprocess.run([sys.executable, "-m", "lab.build", *words], cwd=folder, capture_output=True, text=True,
                              env=clean_environment(), timeout=300)
    return folder, build_it


def load(path):
    return nbformat.read(path, as_version=4)


def support_of(path):
    (cell,) = build.tagged(load(path), "support")
    return cell.source


# exported modules


def test_a_module_is_the_export_cells_in_order(small):
    folder, build_it = small
    assert build_it().returncode == 0
    text = (folder / "effarch/circle.py").read_text()
    assert text == ("# Written by `python -m lab.build` from ssm/circle.ipynb, where each part is explained: edit it there.\n"
                    '"""Circles."""\n\nimport math\n\nfrom effarch.checks import check\n\n\n' + EXPORTS[2][1] + "\n")
    done = python("import effarch.circle as c; print(c.area(1), c.__doc__)", folder)
    assert done.stdout == "3.141592653589793 Circles.\n", done.stderr


def test_what_is_in_step_is_left_alone_and_what_is_not_is_found(small):
    folder, build_it = small
    assert build_it().returncode == 0
    written = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in [folder / "effarch/circle.py", *folder.glob("ssm/*.ipynb")]}
    again = build_it()
    assert again.returncode == 0 and again.stdout == "" and build_it("--check").returncode == 0
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in written} == written


def edit_module(folder):
    path = folder / "effarch/circle.py"
    path.write_text(path.read_text().replace("math.pi", "3"))
    return ["effarch/circle.py", "ssm/wheel.ipynb"]  # whose support cell holds the module


def edit_cell(folder):
    path = folder / "ssm/circle.ipynb"
    path.write_text(path.read_text().replace("r**2", "r * r"))
    return ["effarch/circle.py"]


def edit_support(folder):
    path = folder / "ssm/wheel.ipynb"
    notebook = load(path)
    build.tagged(notebook, "support")[0].source += "\n# an edit"
    nbformat.write(notebook, path)
    return ["ssm/wheel.ipynb"]


def edit_package(folder):
    path = folder / "effarch/checks.py"
    path.write_text(path.read_text() + "\n# an edit\n")
    return ["ssm/circle.ipynb", "ssm/wheel.ipynb"]


def leave_outputs(folder):
    path = folder / "ssm/circle.ipynb"
    notebook = load(path)
    cell = notebook.cells[-1]
    cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="x")], 3
    notebook.metadata["widgets"] = dict(state={})
    nbformat.write(notebook, path)
    return ["ssm/circle.ipynb"]


@pytest.mark.parametrize("edit", [edit_module, edit_cell, edit_support, edit_package, leave_outputs])
def test_a_difference_is_named_and_mended(small, edit):
    folder, build_it = small
    build_it()
    expected = edit(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    found = build_it("--check")
    assert found.returncode == 1
    assert sorted(line.split(":")[0] for line in found.stdout.splitlines()) == sorted(expected)
    assert {p: p.read_bytes() for p in before} == before, "--check changes nothing"
    assert build_it().returncode == 0 and build_it("--check").returncode == 0


def test_sources_are_tidied(small):
    folder, build_it = small
    leave_outputs(folder)
    build_it()
    notebook = load(folder / "ssm/circle.ipynb")
    nbformat.validate(notebook)
    assert notebook.metadata["effarch"] == HOME and notebook.metadata.colab.gpuType == "T4"
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
    (cell,) = build.tagged(notebook, "support")
    assert cell.metadata.cellView == "form" and cell.metadata.jupyter.source_hidden
    assert len(build.tagged(notebook, "export")) == 2 and len(build.tagged(notebook, "parameters")) == 1


# the support cell


def files_in(source):
    """{name: text} that a support cell holds."""
    names = {}
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            names[node.targets[0].slice.value] = node.value.value
    return names


def test_a_support_cell_holds_what_the_notebook_imports_and_no_more(small):
    folder, build_it = small
    build_it()
    home, user = (files_in(support_of(folder / f"ssm/{name}.ipynb")) for name in ("circle", "wheel"))
    assert "effarch/circle.py" not in home, "the home notebook defines it"
    assert set(user) == {*home, "effarch/circle.py"} and "effarch/checks.py" in home
    assert "effarch/bench/original_claims.csv" in home and not [n for n in user if n.startswith("effarch/clip")]
    assert all(text == (folder / name).read_text(encoding="utf-8") for name, text in user.items())


def run_support(source, cwd, after="", **environment):
    """Run a support cell as IPython would, then some code, in a process of its own."""
    code = ("import sys; from pathlib import Path; from IPython.core.interactiveshell import InteractiveShell\n"
            "shell = InteractiveShell.instance(); sys.path[:0] = ['']\n"
            "result = shell.run_cell(Path(sys.argv[1]).read_text(encoding='utf-8'))\nresult.raise_error()\n" + after)
    path = Path(cwd) / "support-cell.txt"
    path.write_text(source, encoding="utf-8")
    done = python(code, cwd, str(path), IPYTHONDIR=str(cwd), **environment)
    path.unlink()
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


USE = "from effarch.circle import area; import effarch; print('area', area(2), effarch.__file__)"


@pytest.fixture
def alone(small, tmp_path):
    """(an empty folder, the support cell of a notebook that uses an exported module)."""
    folder, build_it = small
    build_it()
    empty = tmp_path / "empty"
    empty.mkdir()
    return empty, support_of(folder / "ssm/wheel.ipynb")


def test_alone_it_writes_the_modules_byte_by_byte(alone):
    empty, source = alone
    said = run_support(source, empty, USE)
    files = files_in(source)
    assert f"effarch: {len(files)} files written beside this notebook" in said
    assert f"area 12.566370614359172 {empty}/effarch/__init__.py" in said
    assert {p.relative_to(empty).as_posix(): p.read_text(encoding="utf-8") for p in (empty / "effarch").rglob("*")
            if p.suffix in (".py", ".csv")} == files


def test_an_edited_file_is_kept_and_the_others_are_renewed(alone):
    empty, source = alone
    run_support(source, empty)
    edited, stale = empty / "effarch/circle.py", empty / "effarch/checks.py"
    edited.write_text(edited.read_text().replace("math.pi", "3"))
    newer = source.replace("Bad input gets one line", "Wrong input gets one line")
    said = run_support(newer, empty, USE)
    assert "effarch/circle.py: your edited file is kept" in said and "area 12 " in said
    assert "Wrong input" in stale.read_text()
    said = run_support(source, empty, USE)
    assert "area 12 " in said and "Bad input" in stale.read_text(), "it is still kept, and a renewed file is not taken for an edit"


def test_in_the_repository_nothing_is_written(alone, small):
    folder, _ = small
    _, source = alone
    for place in (folder, folder / "ssm"):
        said = run_support(source, place, USE)
        assert "effarch is here: nothing to write" in said and f"{folder}/effarch/__init__.py" in said
    assert not list(folder.rglob(".written.json"))


def test_an_installed_package_is_used_unless_it_lacks_something(alone, small, tmp_path):
    folder, _ = small
    empty, source = alone
    said = run_support(source, empty, USE, PYTHONPATH=str(folder))
    assert "effarch is here: nothing to write" in said and not (empty / "effarch").exists()
    (folder / "effarch/circle.py").unlink()  # as an older version would
    said = run_support(source, empty, USE, PYTHONPATH=str(folder))
    assert f"{empty}/effarch/__init__.py" in said


def test_a_file_that_cannot_be_quoted_is_refused(small):
    folder, build_it = small
    path = folder / "effarch/checks.py"
    path.write_text(path.read_text() + "TEXT = '''x'''\n")
    done = build_it()
    assert done.returncode == 1 and "effarch/checks.py: no triple single quotes there" in done.stderr


@pytest.mark.parametrize("code, found", [
    ("import effarch.bench as b", {"effarch.bench"}),
    ("from effarch.bench import start\nimport torch", {"effarch.bench", "effarch.bench.start"}),
    ("def f():\n    from effarch import scans\n    import effarch.clip.towers", {"effarch", "effarch.scans", "effarch.clip.towers"}),
    ("import effarchitecture", set())])
def test_imports_are_found_wherever_they_stand(code, found):
    assert build.imported(code) == found


LAZY = '''"""Looked up when first used."""


def __getattr__(name):
    from importlib import import_module

    return getattr(import_module("effarch.shapes.round" if name == "PI" else "effarch.shapes.flat"), name)
'''


def test_names_that_a_package_looks_up_bring_their_module(small):
    folder, build_it = small
    package = folder / "effarch/shapes"
    package.mkdir()
    (package / "__init__.py").write_text(LAZY)
    (package / "round.py").write_text('"""Round."""\nfrom effarch.checks import check\n\nPI = 3\n')
    (package / "flat.py").write_text('"""Flat."""\n\n\nclass Square:\n    """A square."""\n')
    for use, found in (("from effarch.shapes import PI", "round"), ("from effarch.shapes import Square", "flat")):
        tiny_notebook(folder / "ssm/wheel.ipynb", use)
        assert build_it().returncode == 0
        files = files_in(support_of(folder / "ssm/wheel.ipynb"))
        assert {n for n in files if "shapes" in n} == {"effarch/shapes/__init__.py", f"effarch/shapes/{found}.py"}
    tiny_notebook(folder / "ssm/wheel.ipynb", "from effarch.shapes import Circle")
    assert "effarch.shapes.Circle: no module of the package defines it" in build_it().stderr


def test_magics_do_not_hide_imports():
    notebook = new_notebook("%matplotlib inline\n!ls\nfrom effarch.checks import check", ("support", "import effarch.clip"))
    assert build.imported(build.code_of(notebook)) == {"effarch.checks", "effarch.checks.check"}


# the repository itself


def test_the_repository_is_in_step():
    done = subprocess.run([sys.executable, "-m", "lab.build", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_export_cells_hold_definitions_only():
    """Imports (all in the first one), functions, classes, constants; public ones are documented."""
    for path in build.sources():
        for i, cell in enumerate(build.tagged(load(path), "export")):
            where = f"{path.name}: {cell.source.splitlines()[0]}"
            for node in ast.parse(cell.source).body:
                imports = isinstance(node, ast.Import | ast.ImportFrom)
                assert i == 0 or not imports, f"{where}: imports belong into the first export cell"
                text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                assert imports or text or isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
                                                     | ast.AugAssign), where  # the last: a registry grows
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    assert ast.get_docstring(node), f"{where}: {node.name} has no docstring"


def test_public_names_of_the_package_are_documented():
    for path in sorted((ROOT / "effarch").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


ARROWS = {  # what a part of the package may import of effarch, besides itself
    "checks": set(), "bench": {"checks"}, "clip": {"checks", "bench"}}


def test_arrows_point_one_way():
    """Methods → checks, clip.towers; clip → bench; nothing that is shared imports a method."""
    methods = {m.split(".")[1] for m in METHODS}
    for module in MODULES:
        if module == "effarch":
            assert build.imported((ROOT / "effarch/__init__.py").read_text()) == set()
            continue
        path, own = build.file_of(module), module.split(".")[1]
        used = {name.split(".")[1] for name in build.imported(path.read_text(encoding="utf-8")) if "." in name} - {own}
        assert used <= ARROWS.get(own, {"checks", "clip", *methods}), (module, used)
        relative = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, f"{module}: the support cell follows absolute imports only"


# imports every module named on the command line, one after the other; a state that differs afterwards is printed
IMPORT = '''
import importlib, io, json, os, random, sys, warnings
sys.path.insert(0, sys.argv[1])
import effarch
assert "torch" not in sys.modules and "numpy" not in sys.modules, "import effarch imports nothing else"
import matplotlib, numpy, torch, transformers
import transformers.models.auto.modeling_auto
def state():
    return dict(
        random=random.getstate(), numpy=numpy.random.get_state()[1].tolist(), torch=torch.get_rng_state().tolist(),
        threads=torch.get_num_threads(), dtype=str(torch.get_default_dtype()), grad=torch.is_grad_enabled(),
        style=str(dict(matplotlib.rcParams)), place=os.getcwd(), path=list(sys.path), files=sorted(os.listdir(".")),
        precision=torch.get_float32_matmul_precision(), deterministic=torch.are_deterministic_algorithms_enabled(),
        hook=str(sys.excepthook))
before, out = state(), sys.stdout
for name in sys.argv[2:]:
    sys.stdout = sys.stderr = heard = io.StringIO()
    importlib.import_module(name)
    sys.stdout, sys.stderr = out, sys.__stderr__
    after = state()
    changed = [k for k in before if before[k] != after[k]]
    if changed or heard.getvalue():
        print(name, "changes", changed, "says", repr(heard.getvalue()))
'''


def test_importing_has_no_side_effect(tmp_path):
    """No file, no print, no draw from a generator, no global setting; `import effarch` brings no torch."""
    done = python(IMPORT, tmp_path, str(ROOT), *MODULES)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr[-2000:]


LIGHT = '''
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in ("pandas", "matplotlib", "papermill", "effarch.bench"):
    sys.modules[name] = None  # importing it fails, as if it were not there (a library may take pandas where it is)
for name in sys.argv[2:]:
    importlib.import_module(name)
'''


def test_methods_need_few_packages(tmp_path):
    done = python(LIGHT, tmp_path, str(ROOT), *METHODS)
    assert done.returncode == 0, done.stderr[-2000:]
