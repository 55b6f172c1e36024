"""A number out of the CSVs: which rows, which column, and its interval by the one rule (effarch.bench.intervals).

A selection is {column: wanted}. wanted is a value, a Condition such as `at_least(10)`, or `min` or `max`: of the values
that are left (on both sides of a ratio, where it stands in `where`) the smallest or the largest."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from effarch.bench.intervals import Estimate, decide, ratio_interval, seed_ratio, t_interval
from effarch.bench.tables import read_csv

PUBLISHED = ("full", "gpu", "cpu")  # gpu and cpu: from before the modes said how thorough a run is


class Missing(Exception):
    """The rows are not there: the finding is absent."""


class Ambiguous(Exception):
    """More rows than one fit: the selection has to be narrowed."""


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

    @property
    def path(self):
        """The folder below results/."""
        return f"{self.suite}/{self.name}"

    @property
    def gpu(self):
        """Whether it is a GPU's."""
        return not self.slug.startswith("cpu-")

    @property
    def quick(self):
        """Whether these are first looks, which are shown only where nothing is published."""
        return self.slug.endswith("-quick")

    @property
    def modes(self):
        """The modes whose rows count here."""
        return ("quick",) if self.quick else PUBLISHED

    def table(self, name):
        """<name>.csv without smoke rows and without rows whose status is not ok; Missing if there is nothing."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            raise Missing(path.name)
        table = cached(path, path.stat().st_mtime_ns)
        for column, wanted in (("mode", self.modes), ("status", ["ok"])):
            if column in table:
                table = table[table[column].isin(wanted)]
        if table.empty:
            raise Missing(f"rows in {path.name}")
        return table


@lru_cache(64)
def cached(path, changed):
    """A CSV that several findings look at, read once for as long as it does not change. Not to be written to."""
    return read_csv(path)


class Condition(NamedTuple):
    """A test of a column's values, and how the source tells it."""

    text: str
    test: Callable


def at_least(least):
    """Values of at least `least`."""
    return Condition(f"at least {least}", lambda value: value >= least)


def begins(start):
    """Texts that begin with `start`."""
    return Condition(f"{start}…", lambda value: str(value).startswith(start))


def differs(other):
    """Values other than `other`."""
    return Condition(f"not {other}", lambda value: value != other)


def is_extreme(wanted):
    return wanted is min or wanted is max


def rows(table, where):
    """The rows that a selection leaves; `min` and `max` in it are not looked at."""
    for column, wanted in where.items():
        if is_extreme(wanted):
            continue
        if column not in table:
            return table.iloc[:0]
        test = wanted.test if isinstance(wanted, Condition) else lambda value, wanted=wanted: value == wanted
        table = table[table[column].map(test).astype(bool)]
    return table


def narrow(tables, where):
    """(tables, {column: value}) once each `min` and `max` has picked among the values that all the tables have."""
    picked = {}
    for column in (c for c, wanted in where.items() if is_extreme(wanted)):
        shared = set.intersection(*(set(t[column].dropna()) if column in t else set() for t in tables))
        if not shared:
            raise Missing(column)
        picked[column] = where[column](shared)
        tables = [t[t[column] == picked[column]] for t in tables]
    return tables, picked


def only(table, where):
    """The one row of a table that a selection leaves."""
    (found,), _ = narrow([rows(table, where)], where)
    if found.empty:
        raise Missing(describe(where))
    if len(found) > 1:
        raise Ambiguous(f"{len(found)} rows fit {describe(where)}")
    return found.iloc[0]


def describe(where):
    """A selection as text, for the source column."""
    return ", ".join(f"{k} {v.text}" if isinstance(v, Condition) else f"{v.__name__} {k}" if is_extreme(v) else f"{k}={v}"
                     for k, v in where.items())


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval, how many repetitions of what it rests on, and the CSV rows behind it."""

    estimate: Estimate
    n: float | None = None
    n_of: str = ""
    source: str = ""
    words: dict = field(default_factory=dict)  # further values from the same rows, for the sentence
    unit: str = ""


def measured(value, *rest, **more):
    """A Measured, or Missing if there is no value."""
    estimate = Estimate(*(float(f"{v:.6g}") for v in value))  # as a CSV holds it, so that both are rounded alike
    if pd.isna(estimate.value):
        raise Missing("value")
    return Measured(estimate, *rest, **more)


# Where a number comes from. `measure(place)` gives a Measured or raises Missing or Ambiguous.


@dataclass(frozen=True)
class Cell:
    """One cell of a table, with the interval and the n that stand beside it. words: columns for the sentence."""

    table: str
    column: str
    where: dict
    unit: str = ""
    words: tuple = ()

    def measure(self, place):
        row = only(place.table(self.table), self.where)
        ends = [next((row[c] for c in (f"{self.column}_{end}", end) if c in row), math.nan) for end in ("low", "high")]
        counted = next(((row[c], of) for c, of in (("n_pictures", "pictures"), ("n_images", "images"), ("n_trainings", "trainings"), ("n_runs", "rounds"), ("n", ""))
                        if c in row and not pd.isna(row[c])), (None, ""))
        if self.column not in row:
            raise Missing(self.column)
        return measured(Estimate(row[self.column], *ends), *counted, f"{self.table}.csv: {describe(self.where)}",
                        {w: row[w] for w in self.words if w in row}, self.unit)


@dataclass(frozen=True)
class Times:
    """Time of row `a` over that of row `b`, from the raw times of the same rounds.

    where: columns that both sides share. per: a column to divide the times by, such as tokens. words: columns of row `b`."""

    table: str
    a: dict
    b: dict
    where: dict = field(default_factory=dict)
    per: str | None = None
    words: tuple = ()
    unit: str = "×"

    def measure(self, place):
        table, raw = place.table(self.table), place.table(f"{self.table}_raw")
        sides, shared = narrow([rows(table, self.where | side) for side in (self.a, self.b)], self.where)
        first, second = (only(side, chosen) for side, chosen in zip(sides, (self.a, self.b), strict=True))
        keys = [c for c in raw if c in table and c not in ("run_id", "process", "i", "latency_ms")]
        times = [raw_times(raw, row, keys, self.per) for row in (first, second)]
        processes = sorted(set(times[0]) & set(times[1]))
        pairs = [[side[p] for p in processes] for side in times]
        if not processes or [len(part) for part in pairs[0]] != [len(part) for part in pairs[1]]:
            raise Missing("paired rounds")
        n_of = "rounds" + (f" in {len(processes)} runs" if len(processes) > 1 else "")
        source = f"{self.table}_raw.csv: {describe(self.where | shared | told(self.a, first))} over {describe(told(self.b, second))}"
        return measured(ratio_interval(*pairs), sum(map(len, pairs[0])), n_of, source,
                        shared | {w: second[w] for w in self.words if w in second}, self.unit)


def told(side, row):
    """A side's selection for the source: what conditions and `min` and `max` picked is named by the row's own values."""
    named = {k: row[k] for k, v in side.items() if not is_extreme(v)}
    return named or {k: row[k] for k in side}


def raw_times(raw, row, keys, per):
    """{process: times in the order of the rounds} of one row of a table; older files are of one process."""
    mine = rows(raw, {k: row[k] for k in keys if not pd.isna(row[k])}).sort_values("i")
    parts = mine.groupby("process") if "process" in mine else [(0, mine)]
    return {p: part["latency_ms"].to_numpy() / (row[per] if per else 1) for p, part in parts if len(part)}


@dataclass(frozen=True)
class Errors:
    """Error of the trainings `a` over that of `b`, paired by seed.

    column: the error; with accuracy=True a share of right answers, whose error is 1 minus it. Where the table counts
    answers (`wrong` of `n_test`), half an error is added to each, so that a training without any has a ratio, too. Any other
    column, such as the seconds of a training, is taken as it is."""

    table: str
    a: dict
    b: dict
    where: dict = field(default_factory=dict)
    column: str = "error"
    pair: str = "train_seed"
    accuracy: bool = False
    unit: str = "×"

    def measure(self, place):
        table = place.table(self.table)
        if self.pair not in table or self.column not in table:
            raise Missing(self.column)
        sides, _ = narrow([rows(table, self.where | side) for side in (self.a, self.b)], self.where)
        if any(side[self.pair].duplicated().any() for side in sides):
            raise Ambiguous(f"several rows of one {self.pair} fit {describe(self.where | self.a)}")
        a, b = (side.set_index(self.pair) for side in sides)
        both = a.index.intersection(b.index)
        if both.empty:
            raise Missing(describe(self.where | self.a))
        a, b = a.loc[both], b.loc[both]
        source = f"{self.table}.csv: {describe(self.where | self.a)} over {describe(self.b)}"
        counts = ["wrong", "n_test"]
        counted = self.column in ("error", "accuracy") and set(counts) <= set(table) and a[counts].notna().all(axis=None) and b[counts].notna().all(axis=None)
        if counted:
            a, b = ((side["wrong"] + 0.5) / side["n_test"] for side in (a, b))
        else:
            a, b = (1 - side[self.column] if self.accuracy else side[self.column] for side in (a, b))
        return measured(seed_ratio(a, b), len(both), "paired trainings", source, unit=self.unit)


@dataclass(frozen=True)
class Least:
    """Mean over trainings (`over`) of the least value of a column among each one's rows, such as its best method's error;
    Student's interval. then: of those same rows, the value of another column."""

    table: str
    column: str
    where: dict
    over: str = "seed"
    unit: str = ""
    then: str = ""

    def measure(self, place):
        found = rows(place.table(self.table), self.where)
        if found.empty:
            raise Missing(describe(self.where))
        if self.then and self.then not in found:  # a table from before this column
            raise Missing(describe(self.where))
        least = found.loc[found.groupby(self.over)[self.column].idxmin(), self.then or self.column]
        told = f"{self.then} where {self.column} is least" if self.then else f"least {self.column}"
        return measured(t_interval(least), len(least), "trainings", f"{self.table}.csv: {describe(self.where)}, {told} of each {self.over}", unit=self.unit)


@dataclass(frozen=True)
class Start:
    """From which value of the column `along` on `b` is faster than `a`: the least one from which all intervals say so.

    Its words: `told`, 'from 2048 tokens on, attention up to 512'; other: the name of `a` there."""

    table: str
    a: dict
    b: dict
    along: str
    other: str
    where: dict = field(default_factory=dict)
    unit: str = "tokens"

    def measure(self, place):
        table = place.table(self.table)
        sides = [rows(table, self.where | {k: v for k, v in side.items() if not is_extreme(v)}) for side in (self.a, self.b)]
        faster = {}
        for value in sorted(set(sides[0][self.along]) & set(sides[1][self.along])):
            times = Times(self.table, self.a, self.b, self.where | {self.along: value}).measure(place)
            faster[value] = decide(times.estimate, above=1)
        start = None
        for value in reversed(faster):
            if not faster[value]:
                break
            start = value
        if start is None:
            raise Missing("a start")
        lost = max((value for value in faster if faster[value] is False), default=None)
        tail = ", the smallest number measured" if start == min(faster) else ""
        tail = f", {self.other} up to {lost:g}" if lost is not None else tail
        told = f"from {start:g} {self.unit} on" if start < max(faster) else f"at {start:g} {self.unit}, the most measured"
        return measured(Estimate(float(start)), source=f"{self.table}_raw.csv: {describe(self.where | self.a)} over "
                        f"{describe(self.b)}, along {self.along}", words=dict(told=told + tail),
                        unit=self.unit)
