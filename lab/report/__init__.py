"""Everything that states a result outside the notebooks, made from the CSVs: README, results/{claims,findings}.csv,
page and poster.

select     a number out of the CSVs and its interval
findings   which number answers which question: one table
reading    what lies under results/ and figures/
text       numbers in words, the README's blocks
charts     pictures;  poster and page are made of them

    from lab import report
    report.write(root)

    python -m lab.report           write all of it
    python -m lab.report --check   name what is stale; exit 1 if anything is"""

import argparse
import hashlib
from pathlib import Path

from effarch.bench import claims, intervals
from effarch.bench.run import write_atomically
from lab.report import charts, findings, page, poster, text
from lab.report.reading import read

ROOT = Path(__file__).resolve().parents[2]
CODE = [*sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".html")), Path(intervals.__file__),
        Path(claims.__file__).with_name("original_claims.csv")]


def fingerprint(report):
    """Hash of all that page, poster and pictures are made of: the results, the figures and the code."""
    made = {report.root / "results" / name for name in ("claims.csv", "findings.csv")}
    inputs = [p for p in (report.root / "results").rglob("*") if p.suffix == ".csv" or p.name.endswith(".env.json")]
    inputs += [figure["path"] for figure in report.figures] + [report.root / "CITATION.cff"]
    digest = hashlib.sha256()
    for path in [*sorted(p for p in set(inputs) - made if p.exists()), *CODE]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def collect(root=ROOT):
    """Read everything under a root folder and draw the README's pictures; returns the Report."""
    report = read(root)
    report.mark = fingerprint(report)
    report.headlines = charts.headlines(report)
    return report


def csv_text(frame):
    """The text that `write_csv` would write."""
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def texts(report):
    """{path: text} of everything that is text and not the page."""
    out = {report.root / "results" / name: csv_text(frame)
           for name, frame in (("claims.csv", report.claims), ("findings.csv", report.findings))}
    readme = report.root / "README.md"
    if readme.exists():
        out[readme] = text.fill(readme.read_text(encoding="utf-8"), report)
    return out


def write(root=ROOT):
    """Write all of it below `root`; returns the paths. Nothing is changed if any part fails."""
    report = collect(root)
    files = {path: words.encode() for path, words in texts(report).items()}
    files |= {path: image for _, path, _, image in report.headlines}
    files |= {root / "results/report.html": page.page(report).encode(), root / "results/poster.pdf": poster.pdf(report)}
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
    return list(files)


def stale(root=ROOT):
    """The paths that `write` would change."""
    report = collect(root)
    found = [path for path, words in texts(report).items()
             if not path.exists() or path.read_text(encoding="utf-8") != words]
    marked = [*(path for _, path, *_ in report.headlines), root / "results/report.html", root / "results/poster.pdf"]
    return found + [path for path in marked if not path.exists() or report.mark.encode() not in path.read_bytes()]


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.report", description="Make README, page, poster and tables from the CSVs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results/, figures/ and README.md are")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    paths = stale(root) if options.check else write(root)
    for path in paths:
        print(f"{path.relative_to(root)}{': stale, run `python -m lab.report`' if options.check else ''}")
    if not options.check:
        found = set(read(root).findings["key"])
        absent = [f.key for f in findings.FINDINGS if f.key not in found]
        print(f"findings without rows: {', '.join(absent) or 'none'}")
    return int(options.check and bool(paths))
