"""Every notebook has the same anatomy: short, explained, with its first figure early, and runnable alone."""

import ast
import copy
import re
import statistics
import warnings

import nbformat
import pytest
from conftest import GOOD_ANATOMY, PARAMETERS, new_notebook

from effarch.bench import statements
from lab import build, execute

SOURCES = build.sources()
each_notebook = pytest.mark.parametrize("path", SOURCES, ids=[p.stem for p in SOURCES])
# the order of what every notebook has; between them stands what is its own
ORDER = ["title", "glance", "parameters", "support", "start"]


def load(path):
    return nbformat.read(path, as_version=4)


def tags(cell):
    return cell.metadata.get("tags", [])


def own_code(notebook):
    """The code cells that a person wrote."""
    return [c for c in notebook.cells if c.cell_type == "code" and "support" not in tags(c)]


def python_of(cell):
    """A cell's Python, without magics."""
    return "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))


def lines(cell):
    """The lines of code: without blank lines, comments and docstrings."""
    source, documented = python_of(cell), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return [line for i, line in enumerate(source.splitlines(), 1)
            if line.strip() and not line.strip().startswith("#") and i not in documented]


def calls(cell, *names):
    """Whether a cell calls a function or method of one of these names."""
    found = (node.func for node in ast.walk(ast.parse(python_of(cell))) if isinstance(node, ast.Call))
    return any(getattr(f, "id", getattr(f, "attr", None)) in names for f in found)


def faults(notebook, known=None):
    """What a notebook has wrong with its anatomy, in words; [] if nothing. known: modules that notebooks export."""
    cells, said = notebook.cells, []

    def want(ok, what):
        if not ok:
            said.append(what)

    def first(test):
        return next((i for i, cell in enumerate(cells) if test(cell)), None)
    own = own_code(notebook)
    sizes = [len(lines(cell)) for cell in own] or [0]
    want(len(cells) <= 50, f"{len(cells)} cells, at most 50")
    want(sum(sizes) <= 600, f"{sum(sizes)} own lines of code, at most 600")
    want(statistics.median(sizes) <= 12, f"a median cell of {statistics.median(sizes)} lines, at most 12")
    for cell, size in zip(own, sizes, strict=False):
        want(size <= 40, f"a cell of {size} lines, at most 40: {cell.source.splitlines()[0]}")
    for tag in ("glance", "parameters", "support"):
        want(len(build.tagged(notebook, tag)) == 1, f"not one cell tagged {tag}")
    want({t for cell in cells for t in tags(cell)} <= {"glance", "parameters", "support", "export"}, "an unknown tag")
    places = [first(lambda c: c.cell_type == "markdown" and c.source.startswith("# ")),
              *(first(lambda c, tag=tag: tag in tags(c)) for tag in ("glance", "parameters", "support")),
              first(lambda c: c.cell_type == "code" and "support" not in tags(c) and calls(c, "start"))]
    named = dict(zip(ORDER, places, strict=True))
    want(None not in places, f"missing: {[name for name, i in named.items() if i is None]}")
    want(None in places or (places == sorted(places) and places[0] == 0), f"out of order: {named}")
    figure = first(lambda c: c.cell_type == "code" and "support" not in tags(c)
                   and calls(c, "save_figure") and not python_of(c).lstrip().startswith("def "))
    want(figure is not None and figure < len(cells) / 3 + 1, f"first figure in cell {figure} of {len(cells)}: not in the first third")
    want("?" in cells[0].source, "no question in the first cell")
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    want(re.search(r"try your own", text, re.I), "no 'Try your own'")
    for word in ("Takeaways", "Limits", "References"):
        want(re.search(rf"^#+ .*{word}", text, re.I | re.M), f"no heading with {word}")
    want(any(calls(c, "finish") for c in own), "no run.finish()")
    module = build.module_of(notebook)
    if module:
        want(build.tagged(notebook, "export"), "a module, but no cell tagged export")
        want(notebook.metadata["effarch"].get("doc"), "a module without its docstring")
        needs = build.needed(build.code_of(notebook))
        want(module not in needs, f"it imports {module}, which it defines (or what imports that)")
    return said


def parameter_faults(source):
    """What is wrong with a cell of parameters."""
    said, text = [], source.splitlines()
    names = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            said.append(f"not a parameter: {ast.unparse(node)}")
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            said.append(f"{target.id} is not a literal")
            continue
        names[target.id] = value
        if "#" not in text[node.end_lineno - 1]:
            said.append(f"{target.id} has no comment")
        if value is None and not isinstance(node, ast.AnnAssign):
            said.append(f"{target.id}: a default of None needs an annotation, for `--set` to check types")
    missing = {"MODE", "SEED", "OUT", "RESUME", "SECONDS"} - set(names)
    return said + [f"missing: {sorted(missing)}"] * bool(missing)


@each_notebook
def test_anatomy(path):
    assert faults(load(path)) == []


@each_notebook
def test_parameters_are_commented_literals_with_known_types(path):
    (cell,) = build.tagged(load(path), "parameters")
    assert parameter_faults(cell.source) == []
    assert {"MODE", "SEED", "OUT", "RESUME", "SECONDS"} <= set(execute.parameters(path))


@each_notebook
def test_committed_without_outputs_and_with_the_right_metadata(path):
    notebook = load(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.colab.gpuType == "T4" and notebook.metadata.colab.toc_visible
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        assert set(cell.metadata) <= {"tags", "cellView", "jupyter"}
    minutes = notebook.metadata.get("effarch", {}).get("minutes", {})
    assert set(minutes) <= {"quick", "full", "smoke"} and all(m > 0 for m in minutes.values())


@each_notebook
def test_it_runs_by_its_own_name(path):
    """`start("ssm/name", …)`: results lie under the notebook's own name."""
    (cell,) = [c for c in own_code(load(path)) if calls(c, "start")]
    names = [node.args[0].value for node in ast.walk(ast.parse(python_of(cell)))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "start"]
    assert names == [f"{path.parent.name}/{path.stem}"]


@each_notebook
def test_code_compiles_without_warnings(path):
    """Such as an invalid escape in an equation's string."""
    for cell in own_code(load(path)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compile(python_of(cell), cell.source.splitlines()[0], "exec")


@each_notebook
def test_asserts_say_what_failed(path):
    for cell in own_code(load(path)):
        for node in ast.walk(ast.parse(python_of(cell))):
            assert not isinstance(node, ast.Assert) or node.msg is not None, f"{ast.unparse(node)}: no message"


@each_notebook
def test_links_resolve(path):
    text = "\n".join(cell.source for cell in load(path).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#|mailto:", target):
            assert (path.parent / target.split("#")[0]).exists(), target
    assert "colab.research.google.com" not in text  # a badge would need a fixed address of the repository


@each_notebook
def test_nothing_of_this_machine_is_named(path):
    text = path.read_text(encoding="utf-8")
    for word in ("/work/", "../shared", "/root/", "/tmp/"):
        assert word not in text


def claimed(notebook):
    """The ids in a notebook's Claims(run, "…")."""
    for cell in own_code(notebook):
        for node in ast.walk(ast.parse(python_of(cell))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Claims":
                yield from eval(ast.unparse(node.args[1])).split()  # a text, or what joins the numbers of a range


UNTESTED = {"A21", "B16", "B17", "B18", "B19"}  # statements that need no notebook yet; a notebook may test them


def test_every_claim_is_judged_in_one_notebook():
    found = [(claim, path.parent.name) for path in SOURCES for claim in claimed(load(path))]
    assert len({claim for claim, _ in found}) == len(found), "each once"
    known = statements()
    assert {claim for claim, _ in found} >= set(known) - UNTESTED
    assert all(known[claim]["suite"] == suite for claim, suite in found)


# the rules find what they are there for


def test_a_notebook_by_the_rules_has_no_faults():
    assert faults(new_notebook(*GOOD_ANATOMY)) == [] and parameter_faults(PARAMETERS) == []


def without(i, cells):
    return cells[:i] + cells[i + 1 :]


BREAKS = {
    "52 cells, at most 50": lambda cells: cells + ["x = 1"] * (52 - len(cells)),
    "own lines of code, at most 600": lambda cells: cells + ["x = 1\n" * 38] * 17,
    "a median cell of 20": lambda cells: [c if isinstance(c, tuple) or c.startswith(("#", "import")) else c + "\nx = 1" * 20
                                          for c in cells] + ["x = 1\n" * 20] * 9,
    "a cell of 41 lines, at most 40: y = 1": lambda cells: [*cells, "y = 1\n" * 41],
    "not one cell tagged glance": lambda cells: without(1, cells),
    "not one cell tagged support": lambda cells: [*cells, ("support", "")],
    "an unknown tag": lambda cells: [*cells, ("definitions", "x = 1")],
    "missing: ['start']": lambda cells: [c.replace("run = start", "run = begin") if isinstance(c, str) else c for c in cells],
    "out of order": lambda cells: [cells[0], cells[2], cells[1], *cells[3:]],
    "not in the first third": lambda cells: cells[:5] + ["y = 1"] * 20 + cells[5:],
    "no question in the first cell": lambda cells: ["# A statement.", *cells[1:]],
    "no 'Try your own'": lambda cells: [c for c in cells if "your own" not in c],
    "no heading with Limits": lambda cells: [c.replace("limits", "bounds") if isinstance(c, str) else c for c in cells],
    "no run.finish()": lambda cells: [c for c in cells if c != "run.finish()"],
}


@pytest.mark.parametrize("said", BREAKS)
def test_a_broken_rule_is_named(said):
    found = faults(new_notebook(*BREAKS[said](copy.deepcopy(GOOD_ANATOMY))))
    assert any(said in fault for fault in found), found


@pytest.mark.parametrize("metadata, cells, said", [
    (dict(module="effarch/circle.py", doc="Circles."), [], "a module, but no cell tagged export"),
    (dict(module="effarch/circle.py"), [("export", "PI = 3")], "a module without its docstring"),
    (dict(module="effarch/checks.py", doc="x"), [("export", "from effarch.checks import check")], "it imports effarch/checks.py"),
])
def test_a_home_notebook_that_breaks_a_rule_is_named(metadata, cells, said):
    found = faults(new_notebook(*GOOD_ANATOMY[:5], *cells, *GOOD_ANATOMY[5:], **metadata))
    assert any(said in fault for fault in found), found


@pytest.mark.parametrize("change, said", [
    (("SEED = 0  # of every generator", "SEED = 0"), "SEED has no comment"),
    (("RATE = 0.5", "RATE = 1 / 2"), "RATE is not a literal"),
    (("OUT: str | None = None", "OUT = None"), "OUT: a default of None needs an annotation"),
    (("SECONDS: float", "TIME: float"), "missing: ['SECONDS']"),
    (('LABEL = "x"  #', "import os  #"), "not a parameter: import os")])
def test_a_wrong_parameter_is_named(change, said):
    found = parameter_faults(PARAMETERS.replace(*change))
    assert any(said in fault for fault in found), found
