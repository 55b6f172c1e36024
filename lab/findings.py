"""The strongest findings: which CSV rows answer which question. A finding whose rows are missing is absent."""

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lab.cells.measure import ratio_interval
from lab.cells.results import read_csv


@dataclass(frozen=True)
class Place:
    """Results of one device (and checkpoint): `folder` is results/<suite>/<slug>[/<weights>]."""

    folder: Path
    suite: str
    slug: str
    weights: str = ""
    device: str = ""

    @property
    def name(self):
        """The folder below the suite's, '<slug>[/<weights>]'."""
        return "/".join(filter(None, [self.slug, self.weights]))

    def read(self, name):
        """A table without smoke rows and without rows whose status is not ok; None if there is nothing."""
        path = self.folder / name
        if not path.exists():
            return None
        table = read_csv(path)
        for column, wanted in (("mode", ["gpu", "cpu"]), ("status", ["ok"])):
            if column in table:
                table = table[table[column].isin(wanted)]
        return table if len(table) else None


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval (None: not known), the number of repetitions, and the CSV rows behind it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    source: str = ""
    words: tuple = ()  # (name, value) pairs from the same rows, for the sentence


@dataclass(frozen=True)
class Finding:
    """One question, and the sentence that answers it once `measure(place)` has found the rows.

    answers: what to say if the interval is below, around or above `threshold`. The sentence may use {answer},
    {value}, {interval}, and the names in `Measured.words`. unit: '×', '%' (value is a share) or a plain unit.
    """

    key: str
    suite: str
    question: str
    measure: object
    sentence: str
    unit: str = "×"
    threshold: float = 1.0
    answers: tuple = ("faster", "about as fast", "slower")


def number(value, unit=""):
    """A number as readers see it: three significant digits, a share as per cent. '' if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    value = float(value)
    if unit == "%":
        return f"{100 * value:.1f} %"
    size = abs(value)
    if size >= 1e6:
        text = f"{value:.2e}"
    elif size >= 100 or value == int(value):
        text = f"{value:.0f}"
    elif size < 1e-3:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    return text if not unit else f"{text}{unit}" if unit == "×" else f"{text} {unit}"


def interval(found, unit=""):
    """' (low–high)' of a Measured, '' without one."""
    if any(v is None or pd.isna(v) for v in (found.low, found.high)):
        return ""
    sign = "" if unit not in ("%", "×") else " %" if unit == "%" else "×"
    low, high = (number(v, unit).removesuffix(sign) for v in (found.low, found.high))
    return f" ({low}–{high})"


def answer(finding, found):
    """Which of the finding's answers the interval (or, without one, the value) gives."""
    low, high = (found.value if v is None or pd.isna(v) else v for v in (found.low, found.high))
    below, around, above = finding.answers
    return below if high < finding.threshold else above if low > finding.threshold else around


def sentence(finding, found):
    """The finding in words."""
    return finding.sentence.format(
        answer=answer(finding, found), value=number(found.value, finding.unit),
        interval=interval(found, finding.unit), **dict(found.words))


# Selecting rows. Each returns a function of a Place, which gives a Measured or None.


def rows(table, where):
    """The rows whose columns have the given values; a callable value is a condition on the column."""
    for column, wanted in where.items():
        if column not in table:
            return table.iloc[:0]
        keep = wanted(table[column]) if callable(wanted) else table[column] == wanted
        table = table[keep]
    return table


def describe(where):
    """A selection as text, for the source column."""
    return ", ".join(f"{k}={v}" for k, v in where.items() if not callable(v))


def time_ratio(name, a, b, pair=(), at=max, **common):
    """median time of rows `a` over that of rows `b`, bootstrapped over the raw times of the same rounds.

    name: the table without '.csv'; a, b, common: selections. pair: columns that both sides share; of the
    values that both have, `at` picks one (the largest by default)."""
    def measure(place):
        table, raw = place.read(f"{name}.csv"), place.read(f"{name}_raw.csv")
        if table is None or raw is None:
            return None
        sides = [rows(table, dict(common, **side)) for side in (a, b)]
        where = {}
        for column in pair:
            shared = set.intersection(*(set(side[column]) for side in sides))
            if not shared:
                return None
            where[column] = at(shared)
            sides = [side[side[column] == where[column]] for side in sides]
        if any(len(side) != 1 for side in sides):
            return None
        keys = [c for c in raw if c in table and c not in ("run_id", "latency_ms")]
        times = []
        for side in sides:
            mine = rows(raw, {k: side[k].iloc[0] for k in keys if not pd.isna(side[k].iloc[0])})
            times.append(mine.sort_values("i")["latency_ms"].to_numpy())
        if len(times[0]) != len(times[1]) or not len(times[0]):
            return None
        ratio, low, high = ratio_interval(*times)
        source = f"{name}_raw.csv: {describe(dict(common, **where, **a))} over {describe(b)}"
        return Measured(ratio, low, high, len(times[0]), source, tuple(where.items()))
    return measure


def cell(name, column, low=None, high=None, n="n_runs", words=(), **where):
    """One cell of a table, with the interval and n that stand beside it. words: columns for the sentence."""
    def measure(place):
        table = place.read(f"{name}.csv")
        chosen = table if table is None else rows(table, where)
        if chosen is None or len(chosen) != 1 or column not in chosen or pd.isna(chosen[column].iloc[0]):
            return None
        row = chosen.iloc[0]
        beside = [row.get(c) if c else None for c in (low, high, n)]
        return Measured(row[column], *beside, f"{name}.csv: {describe(where)}",
                        tuple((w, row[w]) for w in words))
    return measure


def claim(name):
    """The measured value of a claim that has a verdict."""
    def measure(place):
        table = place.read("claims.csv")
        chosen = table if table is None else table[(table["id"] == name) & table["measured"].notna()]
        if chosen is None or len(chosen) != 1:
            return None
        row = chosen.iloc[0]
        value, low, high = (pd.to_numeric(row[c], errors="coerce") for c in ("measured", "low", "high"))
        if pd.isna(value):
            return None
        return Measured(value, low, high, row["n"], f"claims.csv: id={name} ({row['source']})")
    return measure


FINDINGS = []


def collect(places, findings=None):
    """One row (dict) per finding and place where it has been measured."""
    found = []
    for finding in FINDINGS if findings is None else findings:
        for place in places:
            measured = finding.measure(place) if place.suite == finding.suite else None
            if measured is not None:
                found.append(dict(
                    key=finding.key, suite=finding.suite, question=finding.question,
                    answer=sentence(finding, measured), value=measured.value, low=measured.low,
                    high=measured.high, n=measured.n, unit=finding.unit, device=place.device,
                    weights=place.weights, place=f"{place.suite}/{place.name}", source=measured.source))
    return found
