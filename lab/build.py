"""Bring the derived parts of the repository in step with their sources.

    python -m lab.build           write them
    python -m lab.build --check   name what differs; exit 1 if anything does

* Cells tagged `export`, in order, are the module that the notebook's metadata names (`effarch.module`).
* The cell tagged `support` holds the modules of `effarch` that the notebook imports, for when it is opened alone.
* The cell tagged `glance` shows the notebook's published findings, from results/findings.csv.
* Sources carry no outputs, no widget metadata, kernelspec python3 and Colab's T4."""

import argparse
import ast
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("ssm", "vlm")
SUPPORT_TITLE = "#@title Support code: the package effarch, for when this file is alone"
SUPPORT_LOGIC = '''

def _provide_support(files):
    """Find effarch in the repository or among the installed packages; else write `files` beside the notebook.

    A file that you have edited there since is left as it is."""
    import importlib
    import json
    import sys
    from hashlib import sha256
    from importlib.util import find_spec
    from pathlib import Path

    here = Path.cwd()
    home = next((p for p in (here, *here.parents) if (p / "effarch/bench").is_dir() and (p / "run_all.sh").exists()), None)
    note = here / "effarch" / ".written.json"
    if home or not note.exists():
        sys.path[:0] = [str(home)] if home and str(home) not in sys.path else []
        found = find_spec("effarch")
        if found and found.origin and all((Path(found.origin).parents[1] / name).exists() for name in files):
            return print("effarch is here: nothing to write")
    sys.path[:0] = [str(here)] if str(here) not in sys.path else []
    written = json.loads(note.read_text()) if note.exists() else {}
    digest = lambda text: sha256(text.encode()).hexdigest()
    for name, text in files.items():
        path = here / name
        if path.exists() and digest(path.read_text(encoding="utf-8")) != written.get(name):
            print(f"{name}: your edited file is kept")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written[name] = digest(text)
    note.write_text(json.dumps(written, indent=1))
    importlib.invalidate_caches()  # the folder may have been looked at before it was there
    print(f"effarch: {len(files)} files written beside this notebook")


_provide_support(_FILES)
'''


def sources():
    """The notebooks, in order."""
    return [path for suite in SUITES for path in sorted((ROOT / suite).glob("*.ipynb"))]


def tagged(notebook, tag):
    """The cells that carry a tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def module_of(notebook):
    """The file that a notebook exports, such as 'effarch/multirate.py', or None."""
    return notebook.metadata.get("effarch", {}).get("module")


def export(path, notebook):
    """The text of the module that a notebook's export cells are."""
    facts, name = notebook.metadata["effarch"], path.relative_to(ROOT).as_posix()
    head = f"# Written by `python -m lab.build` from {name}, where each part is explained: edit it there.\n"
    cells = [cell.source.strip() for cell in tagged(notebook, "export")]
    return f'{head}"""{facts["doc"]}"""\n\n' + "\n\n\n".join(cells) + "\n"


def imported(text):
    """Names of the effarch modules that a piece of code imports (and of packages whose names it imports)."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] == "effarch"}


def code_of(notebook):
    """The notebook's own code, without magics and the support cell."""
    cells = [c for c in notebook.cells if c.cell_type == "code" and "support" not in c.metadata.get("tags", [])]
    lines = "\n".join(c.source for c in cells).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def file_of(module):
    """The file of a module below ROOT, or None if it is no module (a name inside one)."""
    path = ROOT / module.replace(".", "/")
    return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.exists()), None)


def home_of(name):
    """The module behind a package's name that is looked up when it is first used, as in effarch.token_reduction, or None."""
    package, _, wanted = name.rpartition(".")
    init = file_of(package)
    if init is None or init.name != "__init__.py" or "def __getattr__" not in init.read_text(encoding="utf-8"):
        return None
    for path in sorted(set(init.parent.glob("*.py")) - {init}):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            if wanted in {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}:
                return f"{package}.{path.stem}"
    raise ValueError(f"{name}: no module of the package defines it")


def needed(code):
    """{relative path: text} of the effarch files that this code needs, packages and their data included."""
    files, todo = {}, sorted(imported(code))
    while todo:
        module = todo.pop()
        path = file_of(module)
        if path is None and "." in module:
            module = home_of(module) or ""
            path = file_of(module) if module else None
        if path is None or path.relative_to(ROOT).as_posix() in files:
            continue
        text = path.read_text(encoding="utf-8")
        files[path.relative_to(ROOT).as_posix()] = text
        if path.name == "__init__.py":
            files |= {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in path.parent.glob("*.csv")}
        parents = module.split(".")[:-1]
        todo += [".".join(parents[:i]) for i in range(1, len(parents) + 1)] + sorted(imported(text))
    return dict(sorted(files.items()))


def support(notebook):
    """The text of a notebook's support cell."""
    parts = []
    for name, text in needed(code_of(notebook)).items():
        if "'''" in text or text.endswith(("'", "\\")):
            raise ValueError(f"{name}: no triple single quotes there, the support cell quotes it with them")
        parts.append(f"_FILES[{name!r}] = r'''{text}'''")
    return "\n".join([SUPPORT_TITLE, "_FILES = {}", *parts]) + SUPPORT_LOGIC.rstrip()


def glance(path):
    """Markdown: the notebook's findings as published, with their device."""
    import pandas as pd

    table_path = ROOT / "results" / "findings.csv"
    rows = []
    if table_path.exists():
        table = pd.read_csv(table_path, keep_default_na=False)
        rows = table[table["notebook"] == path.stem].to_dict("records") if "notebook" in table else []
    if not rows:
        return "**Results at a glance.** No full run has been published yet."
    lines = ["**Results at a glance**, from the last published run (95 % intervals):", "",
             "| question | measured | device |", "| --- | --- | --- |"]
    for row in rows:
        device = row["device"] + (f", {row['weights']}" if row["weights"] else "")
        lines.append(f"| {row['question']} | {row['answer']} | {device} |")
    return "\n".join(lines)


def tidy(notebook):
    """Drop outputs and what tools leave behind; set what Colab and Jupyter need."""
    kept = {k: v for k, v in notebook.metadata.items() if k == "effarch"}
    notebook.metadata = nbformat.from_dict(dict(
        kept, accelerator="GPU", colab=dict(gpuType="T4", toc_visible=True),
        kernelspec=dict(display_name="Python 3", language="python", name="python3"),
        language_info=dict(name="python")))
    for i, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict(dict(tags=tags) if tags else {})
        cell.id = f"cell-{i:02d}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "support" in tags:
            cell.metadata.update(cellView="form", jupyter=dict(source_hidden=True))


def wanted():
    """{path: text} of every derived file, notebooks included. Modules come first: support cells are made of them."""
    files, notebooks = {}, {}
    for path in sources():
        notebook = notebooks[path] = nbformat.read(path, as_version=4)
        if module_of(notebook):
            files[ROOT / module_of(notebook)] = export(path, notebook)
    return files, notebooks


def finish(path, notebook):
    """Fill the generated cells of a notebook and tidy it; returns its text."""
    for cell in tagged(notebook, "support"):
        cell.source = support(notebook)
    for cell in tagged(notebook, "glance"):
        cell.source = glance(path)
    tidy(notebook)
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.build", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something differs")
    check_only = parser.parse_args(argv).check
    modules, notebooks = wanted()
    stale = []

    def put(path, text):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not check_only:
                path.write_text(text, encoding="utf-8")

    for path, text in modules.items():
        put(path, text)
    for path, notebook in notebooks.items():
        put(path, finish(path, notebook))
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'differs, run `python -m lab.build`' if check_only else 'written'}")
    return int(check_only and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
