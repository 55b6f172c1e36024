"""A notebook's definitions as a namespace, so that tests can use the code that readers see."""

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def cells(path, *tags):
    """The code cells of a notebook that carry one of the tags (all code cells without tags given)."""
    path = Path(path)
    notebook = nbformat.read(path if path.is_absolute() else ROOT / path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [c for c in code if not tags or set(tags) & set(c.metadata.get("tags", []))]


def definitions(path):
    """Execute only the cells tagged `parameters` and `definitions`; returns their names and values.

    path: a notebook, relative to the repository's root or absolute.
    """
    names = {"__name__": f"notebook_{Path(path).stem}"}
    module = type(sys)(names["__name__"])
    sys.modules[module.__name__] = module  # dataclasses and pickling look their module up
    module.__dict__.update(names)
    for i, cell in enumerate(cells(path, "parameters", "definitions")):
        exec(compile(cell.source, f"{path}:definitions[{i}]", "exec"), module.__dict__)
    return module.__dict__
