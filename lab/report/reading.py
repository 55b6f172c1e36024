"""Reads results/ and figures/: places, runs, claims, findings, figures."""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from effarch.bench.claims import FIELDS, UNDECIDED, UNTESTABLE, statements
from effarch.bench.tables import read_csv
from lab.report import findings
from lab.report.select import PUBLISHED, Place
from lab.report.text import DECIDED, UNJUDGED

COLUMNS = ["id", "suite", "statement", "quantity", "condition", "claimed", "unit", "measured", "low", "high", "n", "n_of",
           "verdict", "reason", "device", "weights", "place", "source", "notebook", "mode", "git_commit", "utc_time"]
FINDING_COLUMNS = ["key", "suite", "notebook", "question", "answer", "more", "value", "low", "high", "n", "n_of", "unit", "mode",
                   "device", "weights", "place", "source", "words"]
RUN_COLUMNS = ["suite", "notebook", "device", "weights", "mode", "minutes", "dtype", "torch", "transformers", "python", "commit",
               "date", "seed", "processes", "place"]


@dataclass
class Report:
    """What was found under a root folder: places, tables of claims, findings and runs (DataFrames), and the figures."""

    root: Path
    places: list
    claims: pd.DataFrame
    findings: pd.DataFrame
    runs: pd.DataFrame
    figures: list  # of dicts: suite, place, name, path, alt
    mark: str = ""  # fingerprint of all that page, poster and pictures are made of
    headlines: list = field(default_factory=list)  # (finding's key, path, alt, PNG bytes) of the README's pictures

    @cached_property
    def shown_places(self):
        """The places that something shown comes from."""
        named = {*self.findings["place"], *self.runs["place"], *self.claims["place"].dropna()}
        return [place for place in self.places if place.path in named]


def device_label(facts):
    """'NVIDIA H200' or 'Intel Xeon 2.50GHz, 2 threads', from a run's provenance."""
    name = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@", " ", facts["device"])
    name = re.sub(r"\b\d+-Core\b", " ", name)
    name = " ".join(name.split())
    threads = facts["num_threads"]
    name = name if on_gpu(facts) else f"{name}, {threads} thread{'s' * (threads > 1)}"
    return name + (", quick" if facts["mode"] == "quick" else "")


def on_gpu(facts):
    """Whether a run used a GPU; only those have a compute capability."""
    return bool(facts.get("compute_capability"))


def other_commits(facts):
    """', trained at <commit>' where times are newer than trainings, ', drawn again at <commit>' where figures are newer than all."""
    told = ((word, facts.get(key)) for key, word in (("trained", "trained"), ("redrawn", "drawn again")))
    return "".join(f", {word} at {at['git_commit']}{'+' if at['git_dirty'] else ''}" for word, at in told if at)


def find_places(root):
    """(places, runs): the folders of results, GPUs first, first looks last, and a table of the runs that made them."""
    found, runs = [], []
    for folder in sorted({p.parent for p in (root / "results").glob("*/*/**/*.env.json")}):
        suite, slug, *weights = folder.relative_to(root / "results").parts
        place = Place(folder, suite, slug, "/".join(weights))
        facts = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.env.json"))]
        facts = [f for f in facts if f["mode"] in place.modes]
        if not facts:
            continue
        newest = max(facts, key=lambda f: f["utc_time"])
        place = Place(folder, suite, slug, place.weights, device_label(newest))
        found.append((place.suite, place.quick, not on_gpu(newest), place.weights.startswith("random"), place.name, place))
        for f in facts:
            runs.append(dict(
                suite=suite, notebook=f["notebook"], device=place.device, weights=place.weights,
                mode="full" if f["mode"] in PUBLISHED else f["mode"], minutes=f["seconds"] / 60, dtype=f["dtype"],
                torch=f["torch"], transformers=f["transformers"], python=f["python"],
                commit=f["git_commit"] + ("+" if f["git_dirty"] else "") + other_commits(f), date=f["utc_time"][:10], seed=f["seed"],
                processes=f.get("processes", 1), place=place.path))
    return [place for *_, place in sorted(found, key=lambda item: item[:-1])], pd.DataFrame(
        published(runs, "suite", "notebook"), columns=RUN_COLUMNS)


def published(found, *keys):
    """The dicts whose mode is not quick, and the quick ones of those `keys` that no other has."""
    full = {tuple(row[k] for k in keys) for row in found if row["mode"] != "quick"}
    return [row for row in found if row["mode"] != "quick" or tuple(row[k] for k in keys) not in full]


def collect_claims(places):
    """One row per statement and place; a statement that nobody judged appears once, without a device."""
    known, judged = statements(), []
    for place in places:
        path = place.folder / "claims.csv"
        table = read_csv(path).astype(object) if path.exists() else pd.DataFrame()
        best = {}
        for row in table.to_dict("records"):
            if row["id"] not in known:
                raise ValueError(f"{path}: {row['id']!r} is no statement of effarch/bench/original_claims.csv")
            if row["mode"] not in place.modes:
                continue
            row |= {k: known[row["id"]][k] for k in FIELDS if k != "condition"}
            row |= dict(device=place.device, weights=place.weights, place=place.path)
            # two notebooks may look at one statement: a decided verdict says more than none, a new one more than an old
            rank = row["verdict"] in DECIDED, row["verdict"] == UNDECIDED, row["utc_time"], row["notebook"]
            if row["id"] not in best or rank > best[row["id"]][0]:
                best[row["id"]] = rank, row
        judged += [row for _, row in best.values()]
    judged = published(judged, "id")
    missing = set(known) - {row["id"] for row in judged}
    judged += [dict(known[name], verdict=UNTESTABLE, reason=UNJUDGED) for name in missing]
    order = {name: i for i, name in enumerate(known)}
    places_order = {p.path: i for i, p in enumerate(places)}
    judged.sort(key=lambda row: (order[row["id"]], places_order.get(row.get("place"), 0)))
    return pd.DataFrame(judged, columns=COLUMNS)


def alt_text(path):
    """The description that a figure carries: in a PNG's text, in a JPEG's EXIF data."""
    from PIL import Image

    with Image.open(path) as image:
        told = image.info.get("Description") or image.getexif().get(0x010E)
    if not told:
        return path.stem.replace("_", " ")
    try:
        return told.encode("latin-1").decode() if path.suffix == ".jpg" else told
    except UnicodeError:
        return told


def find_figures(root, places):
    """[{suite, place, name, path, alt}] of all figures, of quick runs only where no other run drew one of that name."""
    found = []
    for place in places:
        folder = root / "figures" / place.suite / place.name
        for path in sorted(p for p in folder.glob("*") if p.suffix in (".png", ".jpg")):
            found.append(dict(suite=place.suite, place=place, name=path.stem, path=path, mode="quick" if place.quick else "full"))
    return [figure | dict(alt=alt_text(figure["path"])) for figure in published(found, "suite", "name")]


def read(root):
    """Read everything under results/ and figures/ of a root folder; without the README's pictures."""
    places, runs = find_places(root)
    found = pd.DataFrame(findings.collect(places), columns=FINDING_COLUMNS)
    return Report(root, places, collect_claims(places), found, runs, find_figures(root, places))
