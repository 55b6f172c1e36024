"""Everything that states a result, made from the CSVs: README tables, results/{claims,findings}.csv, page and poster.

    python -m lab.report           write all of it
    python -m lab.report --check   name what is stale; exit 1 if anything is
"""

import argparse
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from lab import findings
from lab.cells.claims import VERDICTS
from lab.cells.environment import write_atomically
from lab.cells.results import read_csv
from lab.findings import Place, number, span

ROOT = Path(__file__).resolve().parent.parent
STATEMENTS = Path(__file__).with_name("original_claims.csv")
SUITES = {"ssm": "Sequence models", "vlm": "Vision-language models"}
MARKS = dict(zip(VERDICTS, ["✓", "✗", "○"], strict=True))
UNJUDGED = "no notebook measures it yet"
COLUMNS = ["id", "suite", "statement", "quantity", "condition", "claimed", "unit", "measured", "low", "high", "n",
           "verdict", "reason", "device", "weights", "place", "source", "notebook", "mode", "git_commit", "utc_time"]
FINDING_COLUMNS = ["key", "suite", "question", "answer", "value", "low", "high", "n", "unit", "device", "weights",
                   "place", "source", "words"]
BLOCK = re.compile(r"(<!-- report:(\w+) -->\n)(.*?)(<!-- /report:\2 -->)", re.S)


@dataclass
class Report:
    """What was found under a root folder: tables of claims, findings and runs (DataFrames), and the figures."""

    root: Path
    places: list
    claims: pd.DataFrame
    findings: pd.DataFrame
    runs: pd.DataFrame
    figures: list  # of dicts: suite, place, name, path, alt

    @cached_property
    def mark(self):
        """The fingerprint of everything the report is made of."""
        return fingerprint(self)

    @cached_property
    def headlines(self):
        """[(path, alt, PNG bytes)] of the README's figures: on the first device (a GPU where there is one) that can."""
        from lab import poster_charts

        drawn = []
        for suite, name, title, chart, alt in poster_charts.HEADLINES:
            images = (poster_charts.headline(title, chart, p, self.mark, alt) for p in self.places if p.suite == suite)
            image = next((i for i in images if i), None)
            if image:
                drawn.append((self.root / "figures" / "report" / name, alt, image))
        return drawn


def device_label(facts):
    """'NVIDIA H200' or 'Intel Xeon 2.50GHz, 2 threads', from a run's provenance."""
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@", " ", facts["device"])
    name = re.sub(r"\b\d+-Core\b", " ", name)
    name = " ".join(name.split())
    threads = facts["num_threads"]
    return name if facts["mode"] == "gpu" else f"{name}, {threads} thread{'s' * (threads > 1)}"


def read_facts(folder):
    """The long provenance of each finished run in a folder, smoke runs left out."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.env.json"))]
    return [facts for facts in found if facts["mode"] != "smoke"]


def find_places(root):
    """(places, runs): the folders of results, GPUs first, and a table of the runs that made them."""
    places, runs = [], []
    for folder in sorted({p.parent for p in (root / "results").glob("*/*/**/*.env.json")}):
        suite, slug, *weights = folder.relative_to(root / "results").parts
        facts = read_facts(folder)
        if not facts:
            continue
        newest = max(facts, key=lambda f: f["utc_time"])
        place = Place(folder, suite, slug, "/".join(weights), device_label(newest))
        places.append((newest["mode"] != "gpu", place.weights.startswith("random"), place))
        for f in facts:
            runs.append(dict(
                suite=suite, notebook=f["notebook"], device=place.device, weights=place.weights, mode=f["mode"],
                minutes=f["seconds"] / 60, dtype=f["dtype"], torch=f["torch"], transformers=f["transformers"],
                python=f["python"], commit=f["git_commit"] + ("+" if f["git_dirty"] else ""),
                date=f["utc_time"][:10], seed=f["seed"], place=f"{suite}/{place.name}"))
    places = [p for *_, p in sorted(places, key=lambda item: (item[2].suite, *item[:2], item[2].name))]
    return places, pd.DataFrame(runs)


def collect_claims(places):
    """One row per statement and place; a statement that nobody judged appears once, without a device."""
    statements = read_csv(STATEMENTS).astype(object)
    order = {name: i for i, name in enumerate(statements["id"])}
    collected = {}
    for place in places:
        path = place.folder / "claims.csv"
        table = read_csv(path).astype(object) if path.exists() else pd.DataFrame()
        for row in sorted(table.to_dict("records"), key=lambda row: row["notebook"]):
            if row["id"] not in order:
                raise ValueError(f"{path}: {row['id']!r} is no statement of {STATEMENTS.name}")
            if row["mode"] == "smoke":
                continue
            row |= dict(device=place.device, weights=place.weights, place=f"{place.suite}/{place.name}")
            key = (row["id"], row["place"])
            # two notebooks may look at one statement: a measured verdict says more than none
            if key not in collected or collected[key]["verdict"] == VERDICTS[2]:
                collected[key] = row
    judged = {name for name, _ in collected}
    for row in statements.to_dict("records"):
        if row["id"] not in judged:
            collected[row["id"], ""] = dict(row, verdict=VERDICTS[2], reason=UNJUDGED)
    places_order = {f"{p.suite}/{p.name}": i for i, p in enumerate(places)}
    keys = sorted(collected, key=lambda k: (order[k[0]], places_order.get(k[1], 0)))
    return pd.DataFrame([collected[k] for k in keys], columns=COLUMNS)


def alt_text(path):
    """The description that a figure carries in its PNG metadata."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description", path.stem.replace("_", " "))


def collect(root=ROOT):
    """Read everything under results/ and figures/ of a root folder."""
    places, runs = find_places(root)
    figures = [dict(suite=p.suite, place=p, name=path.name, path=path, alt=alt_text(path)) for p in places
               for path in sorted((root / "figures" / p.suite / p.name).glob("*.png"))]
    found = pd.DataFrame(findings.collect(places), columns=FINDING_COLUMNS)
    return Report(root, places, collect_claims(places), found, runs, figures)


# Text


def several(values, units="", spread=str):
    """'62.84|127.32' with 'ms|seq/s' → '62.84 ms, 127.32 seq/s'. Words stay as they are; spread formats numbers."""
    if values is None or pd.isna(values):
        return ""
    values = str(values).split("|")
    units = "" if units is None or pd.isna(units) else units
    units = units.split("|") if "|" in units else [units] * len(values)
    parts = []
    for value, unit in zip(values, [*units, *[""] * len(values)], strict=False):
        try:
            number_here = float(value)
            parts.append((value if spread is str else spread(number_here))
                         + ("" if unit in ("", "ratio", "slope", "cosine", "share") else f" {unit}"))
        except ValueError:
            parts.append(value)
    return ", ".join(parts)


def measured_text(row):
    """A claim's measured value with interval and n: '0.81 (0.79–0.83), n = 30'. '' if nothing was measured."""
    if pd.isna(row["measured"]):
        return ""
    low, high = (pd.to_numeric(row[c], errors="coerce") for c in ("low", "high"))
    spread = span(low, high)
    text = several(row["measured"], row["unit"], number)
    return text + spread + ("" if pd.isna(row["n"]) else f", n\u00a0=\u00a0{number(row['n'])}")


def where(row):
    """'device' or 'device, weights'."""
    return row["device"] + (f", {row['weights']}" if row["weights"] and not pd.isna(row["weights"]) else "")


def verdict_counts(claims):
    """{suite: {verdict: number of statements}}; a statement counts with the best verdict of any device."""
    best = claims.assign(rank=claims["verdict"].map(VERDICTS.index)).sort_values("rank").groupby("id").first()
    return {suite: {v: int(((best["suite"] == suite) & (best["verdict"] == v)).sum()) for v in VERDICTS}
            for suite in SUITES}


def table(head, body):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in line) + " |"
                     for line in lines)


def findings_block(report):
    """The findings, one line per question and device."""
    if report.findings.empty:
        return "No run has finished here yet: `./run_all.sh` fills this table."
    body, last = [], None
    for row in report.findings.to_dict("records"):
        question = "" if row["question"] == last else f"**{row['question']}**"
        last = row["question"]
        body.append([question, row["answer"], where(row), "" if pd.isna(row["n"]) else number(row["n"])])
    return table(["question", "measured (95 % interval)", "device", "n"], body)


def figures_block(report):
    """The headline figures, side by side."""
    images = [f'<a href="{path}"><img src="{path}" width="49%" alt="{alt}"></a>'
              for path, alt in ((p.relative_to(report.root).as_posix(), alt) for p, alt, _ in report.headlines)]
    return f"<p>{' '.join(images)}</p>" if images else "No figure has been drawn here yet."


def claims_block(report):
    """Verdicts in numbers, and one line per statement."""
    counts = verdict_counts(report.claims)
    places = {suite: list(dict.fromkeys(where(dict(device=p.device, weights=p.weights)) for p in report.places
                                        if p.suite == suite)) for suite in SUITES}
    words = [f"{SUITES[suite]}{' on ' if places[suite] else ''}{'; '.join(places[suite])}: "
             + ", ".join(f"{n} {verdict}" for verdict, n in found.items()) for suite, found in counts.items()]
    body = []
    for name, mine in report.claims.groupby("id", sort=False):
        results = []
        for row in mine.to_dict("records"):
            text = f"{MARKS[row['verdict']]} {measured_text(row)}".strip()
            named = row["verdict"] != VERDICTS[2] and len(places[row["suite"]]) > 1
            results.append(f"{text} ({where(row)})" if named else text)
        first = mine.iloc[0]
        body.append([name, first["statement"], several(first["claimed"], first["unit"]),
                     "<br>".join(dict.fromkeys(results))])
    legend = ", ".join(f"{mark} {verdict}" for verdict, mark in MARKS.items())
    return "\n\n".join([". ".join(words) + f". ({legend})",
                        table(["", "statement", "claimed", "measured here"], body)])


def runs_block(report):
    """Which notebook ran where, for how long."""
    if report.runs.empty:
        return "No run has finished here yet."
    body = [[f"[{r['notebook']}](results/{r['place']}/{r['notebook']}.ipynb)", where(r), number(r["minutes"]),
             f"torch {r['torch']}", r["commit"], r["date"]] for r in report.runs.to_dict("records")]
    return table(["notebook (executed)", "device", "minutes", "with", "commit", "date"], body)


BLOCKS = dict(findings=findings_block, figures=figures_block, claims=claims_block, runs=runs_block)


def fill(text, report):
    """A README with its generated blocks brought up to date; ValueError for a block that nobody makes."""
    unknown = {name for _, name, *_ in BLOCK.findall(text)} - set(BLOCKS)
    if unknown:
        raise ValueError(f"README.md: report:{min(unknown)} is none of {', '.join(BLOCKS)}")
    return BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]](report)}\n\n{m[4]}", text)


# Writing


def fingerprint(report):
    """Hash of all that page and poster are made of: the results, the figures and the code."""
    made = {report.root / "results" / name for name in ("claims.csv", "findings.csv")}
    inputs = [p for p in (report.root / "results").rglob("*") if p.suffix == ".csv" or p.name.endswith(".env.json")]
    inputs += [f["path"] for f in report.figures]
    code = [STATEMENTS, *(Path(__file__).with_name(n) for n in ("findings.py", "report.py", "report_page.py",
                                                                "report_page.html", "poster.py",
                                                               "poster_charts.py"))]
    digest = hashlib.sha256()
    for path in [*sorted(set(inputs) - made), *code]:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def texts(report):
    """{path: text} of everything that is text and not the page."""
    out = {}
    for name, frame in (("claims.csv", report.claims), ("findings.csv", report.findings)):
        out[report.root / "results" / name] = csv_text(frame)
    readme = report.root / "README.md"
    if readme.exists():
        out[readme] = fill(readme.read_text(encoding="utf-8"), report)
    return out


def csv_text(frame):
    """The bytes that `write_csv` would write, as text."""
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def write(root=ROOT):
    """Write all of it. Returns the paths."""
    from lab import poster, report_page

    report = collect(root)
    files = {path: text.encode() for path, text in texts(report).items()}
    files |= {path: image for path, _, image in report.headlines}
    files |= {root / "results/report.html": report_page.page(report, report.mark).encode(),
              root / "results/poster.pdf": poster.pdf(report, report.mark)}
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
    return list(files)


def stale(root=ROOT):
    """The paths that `write` would change."""
    report = collect(root)
    found = [path for path, text in texts(report).items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    marked = [*(path for path, *_ in report.headlines), root / "results/report.html", root / "results/poster.pdf"]
    return found + [path for path in marked if not path.exists() or report.mark.encode() not in path.read_bytes()]


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lab.report", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="where results/, figures/ and README.md are")
    options = parser.parse_args(argv)
    root = options.root.resolve()
    for path in stale(root) if options.check else write(root):
        print(f"{path.relative_to(root)}{': stale, run `python -m lab.report`' if options.check else ''}")
    return int(options.check and bool(stale(root)))


if __name__ == "__main__":
    sys.exit(main())
