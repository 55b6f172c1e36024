"""Results in words: numbers, intervals, and the generated blocks of the README."""

import math
import re
import tomllib
from collections import Counter

import pandas as pd

from effarch.bench.claims import UNDECIDED, UNTESTABLE, VERDICTS

PICTURED = "tokens_free", "photograph_answer"  # a finding, and the figure of a photograph that README and poster show with it
SUITES = {"ssm": "Sequence models", "vlm": "Vision-language models"}
MARKS = dict(zip(VERDICTS, ["✓", "✗", "?", "○"], strict=True))
DECIDED = VERDICTS[:2]
UNJUDGED = "its notebook has no published run yet"
BLOCK = re.compile(r"(<!-- report:(\w+) -->\n)(.*?)(<!-- /report:\2 -->)", re.S)
WITHOUT_UNIT = ("", "ratio", "error ratio", "slope", "cosine", "share")
OF_SHARES = "%", "points"  # units of what the tables keep as shares


def missing(value):
    """Whether there is no number."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def number(value, unit=""):
    """A number as readers see it: three significant digits, shares as per cent (two decimals below half a per cent).

    unit: '×', '%' (value is a share), 'points' (a difference of shares) or a plain unit. '' if there is none."""
    if missing(value):
        return ""
    value = float(value)
    size = abs(value)
    if unit in OF_SHARES:
        text = f"{100 * value:+.1f}" if unit == "points" else f"{100 * value:.{2 if 0 < size < 0.005 else 1}f}"
    elif size >= 1e6:
        text = f"{value:.2e}"
    elif size >= 100 or value == int(value):
        text = f"{value:.0f}"
    elif size < 1e-3:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    text = "−" + text[1:] if text.startswith("-") else text
    return f"{text}{unit}" if unit in ("", "×") else f"{text} {unit}"


def short(value, unit=""):
    """A number for a verdict: two significant digits, and no sign for a difference."""
    if unit in OF_SHARES:
        return number(abs(value), unit).lstrip("+")
    value, size = float(value), abs(value)
    text = f"{value:.0f}" if size >= 10 or size == 0 else f"{value:.{1 - math.floor(math.log10(size))}f}"
    return text + (unit if unit in ("", "×") else f" {unit}")


def span(low, high, unit=""):
    """' (low–high)' of an interval, '' without one."""
    if missing(low) or missing(high):
        return ""
    ends = [number(v, unit).removesuffix(unit).strip() for v in (low, high)]
    return f" ({(' to ' if low < 0 or unit == 'points' else '–').join(ends)})"


def with_span(estimate, unit=""):
    """An Estimate in words: '1.82× (1.72–1.98)'."""
    return number(estimate.value, unit) + span(estimate.low, estimate.high, unit)


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
            here = float(value)
            if spread is number and unit == "points":  # a difference of shares, as findings have it
                parts.append(number(here, unit))
            else:
                parts.append((value if spread is str else spread(here)) + ("" if unit in WITHOUT_UNIT else f" {unit}"))
        except ValueError:
            parts.append(value)
    return ", ".join(parts)


def repetitions(row):
    """'30 rounds'; '' where it is not known of what."""
    n, n_of = row.get("n"), row.get("n_of")
    return "" if any(v is None or pd.isna(v) or v == "" for v in (n, n_of)) else f"{number(n)} {n_of.removesuffix('s') if float(n) == 1 else n_of}"


def measured_text(row):
    """A claim's measured value with interval and n: '0.81 (0.79–0.83), 30 rounds'. '' if nothing was measured."""
    if pd.isna(row["measured"]):
        return ""
    low, high = (pd.to_numeric(row[c], errors="coerce") for c in ("low", "high"))
    text = several(row["measured"], row["unit"], number) + span(low, high, "points" if row["unit"] == "points" else "")
    return ", ".join(filter(None, [text, repetitions(row)]))


def where(row):
    """'device' or 'device, weights'."""
    return row["device"] + (f", {row['weights']}" if row["weights"] and not pd.isna(row["weights"]) else "")


def answer_parts(answer):
    """(verdict, rest) of a finding's answer, '**verdict** rest'."""
    _, verdict, rest = answer.split("**", 2)
    return verdict, rest.strip()


def verdict_counts(claims):
    """{suite: {verdict: number of statements}}; a statement counts with the first device that decided it, GPUs first."""
    rank = claims["verdict"].map(lambda v: 0 if v in DECIDED else VERDICTS.index(v))
    first = claims.assign(rank=rank).sort_values("rank", kind="stable").groupby("id").first()
    return {suite: {v: int(((first["suite"] == suite) & (first["verdict"] == v)).sum()) for v in VERDICTS}
            for suite in SUITES}


def table(head, body):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in line) + " |"
                     for line in lines)


# The README's generated blocks


def address(root):
    """owner/name on GitHub as pyproject.toml has it, or None. (Not of `git remote`: a clone has its own.)"""
    path = root / "pyproject.toml"
    urls = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("urls", {}) if path.exists() else {}
    found = re.search(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?(?:\s|$)", " ".join(urls.values()))
    return found and found[1]


def start_block(report):
    """How to open a notebook in Colab: badges where the repository's address is known, else an upload."""
    steps = "*Runtime → Change runtime type → T4*, then *Runtime → Run all*. Nothing has to be installed."
    name = address(report.root)
    if not name:
        return ("**In Colab:** download one file from [`ssm/`](ssm) or [`vlm/`](vlm), open "
                f"[colab.research.google.com](https://colab.research.google.com), *File → Upload notebook*, {steps} "
                "The notebook brings the code that it needs.")
    lines = [f"**In Colab:** click, {steps}", ""]
    for suite in SUITES:
        for path in sorted((report.root / suite).glob("*.ipynb")):
            link = f"https://colab.research.google.com/github/{name}/blob/main/{suite}/{path.name}"
            lines.append(f"[![open {path.stem} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link}) "
                         f"{path.stem}<br>")
    return "\n".join(lines)


def answers_block(report):
    """The three answers, each with its picture."""
    parts = []
    for key, path, alt, _ in report.headlines:
        found = report.findings[report.findings["key"] == key]
        if len(found):
            row, link = found.iloc[0], path.relative_to(report.root).as_posix()
            facts = " · ".join(filter(None, [where(row), repetitions(row)]))
            parts.append(f"### {row['question']}\n\n{row['answer']}<br><sub>{facts}</sub>\n\n{image(link, alt)}")
            if key == PICTURED[0] and (shown := photograph(report)):
                parts.append(image(shown["path"].relative_to(report.root).as_posix(), shown["alt"]))
    if not parts:
        return "No run has finished here yet: `./run_all.sh` draws the pictures."
    note = "In parentheses: 95 % intervals. A *round* times each of what is compared once, in turn."
    return "\n\n".join([note if any(place.gpu for place in report.shown_places) else f"Measured on CPUs so far. {note}", *parts])


def image(link, alt):
    """A picture that opens in full size."""
    return f'<a href="{link}"><img src="{link}" width="640" alt="{alt}"></a>'


def photograph(report):
    """The published figure of one photograph, before and after; None where there is none."""
    return next((figure for figure in report.figures if figure["name"] == PICTURED[1]), None)


def findings_block(report):
    """The findings, one line a question; a list for each suite, headed by where most of it was measured."""
    if report.findings.empty:
        return "No run has finished here yet: `./run_all.sh` fills this list."
    parts = []
    for suite, mine in report.findings.groupby("suite", sort=False):
        rows = mine.to_dict("records")
        most = Counter(map(where, rows)).most_common(1)[0][0]
        facts = [" · ".join(filter(None, ["" if where(row) == most else where(row), repetitions(row)])) for row in rows]
        lines = [f"- *{row['question']}* {row['answer']}" + (f" [{told}]" if told else "") for row, told in zip(rows, facts, strict=True)]
        other = "" if all(where(row) == most for row in rows) else ", where a line does not name another"
        parts.append(f"**{SUITES[suite]}** on {most}{other}:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def claim_line(row, several_places):
    """A claim as a line of a list: the verdict first, then what was claimed, measured, and why."""
    claimed, measured = several(row["claimed"], row["unit"]), measured_text(row)
    measured += f" ({where(row)})" if several_places and not pd.isna(row["device"]) else ""
    told = ": ".join(filter(None, [measured.strip(), row["reason"]]))
    return f"- {MARKS[row['verdict']]} **{row['verdict']}** {row['id']} {row['statement']} (claimed: {claimed}). {told}."


def claims_block(report):
    """Verdicts in numbers; the decided claims; the others folded."""
    judged = report.claims.dropna(subset="device").to_dict("records")
    places = {suite: list(dict.fromkeys(where(row) for row in judged if row["suite"] == suite)) for suite in SUITES}
    words = [f"{SUITES[suite]}{' on ' if places[suite] else ''}{'; '.join(places[suite])}: "
             + ", ".join(f"{n} {verdict}" for verdict, n in found.items())
             for suite, found in verdict_counts(report.claims).items()]
    decided, rest = [], []
    for row in report.claims.to_dict("records"):
        line = claim_line(row, len(places[row["suite"]]) > 1)
        (decided if row["verdict"] in DECIDED else rest).append(line)
    parts = [". ".join(words) + ".", "\n".join(decided)]
    if rest:
        parts += [f"<details><summary>The others: {UNDECIDED}, {UNTESTABLE}, or {UNJUDGED}</summary>", "\n".join(rest), "</details>"]
    return "\n\n".join(filter(None, parts))


def runs_block(report):
    """Which notebook ran where, for how long."""
    if report.runs.empty:
        return "No run has finished here yet."
    body = [[f"[{r['notebook']}](results/{r['place']}/{r['notebook']}.ipynb)", where(r), number(r["minutes"]),
             f"torch {r['torch']}", r["commit"], r["date"]] for r in report.runs.to_dict("records")]
    return table(["notebook (executed)", "device", "minutes", "with", "commit", "date"], body)


BLOCKS = dict(start=start_block, answers=answers_block, findings=findings_block, claims=claims_block, runs=runs_block)


def fill(text, report):
    """A README with its generated blocks brought up to date; ValueError for a block that nobody makes."""
    unknown = {name for _, name, *_ in BLOCK.findall(text)} - set(BLOCKS)
    if unknown:
        raise ValueError(f"README.md: report:{min(unknown)} is none of {', '.join(BLOCKS)}")
    return BLOCK.sub(lambda m: f"{m[1]}\n{BLOCKS[m[2]](report)}\n\n{m[4]}", text)
