"""results/report.html: everything on one page that needs no network, no server and no other file."""

import base64
import io
from pathlib import Path

import jinja2
import pandas as pd

from effarch.bench.claims import VERDICTS
from lab.report import text

TEMPLATE = Path(__file__).with_name("page.html")
MOST_BYTES = 6_000_000
SIZES = [(1200, 82), (1200, 70), (1000, 60), (800, 50)]  # pixels wide, WebP quality: the first that fits


def embedded(path, width, quality):
    """(data URI, width, height) of a figure, at most `width` pixels wide."""
    from PIL import Image

    with Image.open(path) as image:
        image = image.convert("RGB")
        if image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
        data = io.BytesIO()
        image.save(data, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}", *image.size


def embed(figures):
    """{path: (data URI, width, height)} of all figures, in the best quality that keeps the page small."""
    for width, quality in SIZES:
        images = {f["path"]: embedded(f["path"], width, quality) for f in figures}
        if sum(len(uri) for uri, *_ in images.values()) < 0.9 * MOST_BYTES:
            break
    return images


def grouped_findings(report):
    """[{suite, question, answers: [{verdict, sentence, more, where, n, source}]}] in the order of the table."""
    groups = {}
    for row in report.findings.to_dict("records"):
        group = groups.setdefault(row["key"], dict(suite=row["suite"], question=row["question"], answers=[]))
        verdict, sentence = text.answer_parts(row["answer"])
        group["answers"].append(dict(
            verdict=verdict, sentence=sentence, more=row["more"], source=f"results/{row['place']}/{row['source']}",
            facts=", ".join(filter(None, [text.where(row), text.repetitions(row)]))))
    return list(groups.values())


def claim_rows(report):
    """The claims as the template shows them."""
    rows = []
    for row in report.claims.to_dict("records"):
        row = {k: "" if pd.isna(v) else v for k, v in row.items()}
        rows.append(row | dict(
            claimed=text.several(row["claimed"], row["unit"]), mark=text.MARKS[row["verdict"]],
            measured=text.measured_text(pd.Series(row).replace("", None)), slug=row["verdict"].replace(" ", "-"),
            where=text.where(row) if row["device"] else ""))
    return rows


def figure_groups(report, images):
    """[{suite, title, figures: […]}]: the same figure of several devices side by side."""
    groups = {}
    for figure in report.figures:
        uri, width, height = images[figure["path"]]
        title = figure["name"].replace("_", " ")
        group = groups.setdefault((figure["suite"], figure["name"]),
                                  dict(suite=figure["suite"], title=title[:1].upper() + title[1:], figures=[]))
        place = figure["place"]
        group["figures"].append(dict(uri=uri, width=width, height=height, alt=figure["alt"],
                                     where=text.where(dict(device=place.device, weights=place.weights))))
    return [groups[key] for key in sorted(groups)]


def page(report):
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    runs = [row | dict(minutes=text.number(row["minutes"]), where=text.where(row)) for row in report.runs.to_dict("records")]
    return template.render(
        mark=report.mark, suites=text.SUITES, verdicts=VERDICTS, counts=text.verdict_counts(report.claims),
        findings=grouped_findings(report), claims=claim_rows(report), runs=runs,
        figures=figure_groups(report, embed(report.figures)))
