"""Copy the shared cells of lab/cells into the notebooks, or check that the copies are true.

    python -m lab.sync_cells           rewrite the copies
    python -m lab.sync_cells --check   name every copy that differs; exit 1 if there is one
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
FIRST_LINE = re.compile(r"#@title .+ · copied from (lab/cells/\w+\.py)")


def sources():
    """The project's notebooks."""
    return sorted([*ROOT.glob("ssm/*.ipynb"), *ROOT.glob("vlm/*.ipynb")])


def copied_text(title, path):
    """What a copied cell holds: its title line, then the module without what only a module needs."""
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"^from lab\.cells\.\w+ import (\([^)]*\)|.*)\n", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n\n", text)
    return f"{title}\n{text.rstrip()}"


def sync(notebook):
    """Bring the copies in a notebook up to date; returns the titles of those that differed."""
    changed = []
    for cell in notebook.cells:
        title = cell.source.split("\n", 1)[0]
        match = FIRST_LINE.fullmatch(title)
        if cell.cell_type != "code" or not match:
            continue
        if not (ROOT / match[1]).exists():
            raise FileNotFoundError(f"{title!r}: there is no {match[1]}")
        text = copied_text(title, match[1])
        if cell.source != text:
            cell.source = text
            changed.append(title)
    return changed


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check_only = parser.parse_args(argv).check
    stale = 0
    for path in sources():
        notebook = nbformat.read(path, as_version=4)
        for title in sync(notebook):
            stale += 1
            print(f"{path.relative_to(ROOT)}: {title} {'differs' if check_only else 'updated'}")
        if not check_only:
            nbformat.write(notebook, path)
    return int(check_only and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
