"""Tables that survive: each finished comparison is journaled at once, CSVs replace the old ones whole."""

import fcntl
import json
import math
import os
import time

import pandas as pd

from effarch.bench.intervals import UNKNOWN, Estimate, ratio_interval, with_interval
from effarch.bench.run import cells_fingerprint, code_fingerprint, label, write_atomically
from effarch.bench.timing import check_cases, compare, summary
from effarch.checks import check, is_number

# kept for as long as this process lives: a second run on the same files is refused, a dead one frees them
_open_journals = {}
PUBLISHED = "the published run"  # made the rows that `--redraw` takes over
# provenance is text: a commit of digits, such as 45319738e9, is no number, and version 3.10 is not 3.1
TEXT = ("run_id", "weights", "compute_capability", "torch", "cuda", "transformers", "python", "git_commit", "utc_time")


def value_of(table, column, **where):
    """The value of a column in the one row of a data frame whose other columns have these values, as a CSV spells them; NaN if
    there is not one."""
    for name, wanted in where.items():
        table = table[table[name].map(spelled) == spelled(wanted)] if name in table else table.iloc[:0]
    return table[column].iloc[0] if len(table) == 1 and column in table else math.nan


class Table:
    """A tidy CSV, `<results>/<name>.csv`: one row per configuration, named by the columns in `key`.

    `add` and `compare` write finished rows to a journal at once. A run that died and is started again with the same
    code, parameters, weights, images, device and versions finds them there (`has`) and goes on. A row counts as there only while the
    cells run so far are those that made it: after an edit it is measured again. In the second and later processes of
    `run_all.sh --repeat`, times are measured again and pooled; everything else is taken over. What failed in one process
    stays failed. With `run_all.sh --redraw` all rows are those of the CSV, and one that is not there is an error; with
    `--retime` those without times are. checked: rows are checks, which are always made again."""

    def __init__(self, run, name, key, checked=False):
        run.check_inputs()
        self.run, self.name, self.key = run, name, list(key)
        self.checked, self.taken = checked, run.redrawn and not checked
        self.path = run.results / f"{name}.csv"
        self.journal = run.results / f".{run.notebook}.{name}.journal"
        same = ("suite", "notebook", "mode", "device", "weights", "seed", "torch", "cuda", "transformers",
                "python", "num_threads")
        self.identity = dict({k: run.row[k] for k in same}, inputs=dict(run.inputs), code=code_fingerprint(), key=self.key)
        # values of the key columns → row; those that wait in the journal for `has` or `compare` are not in the table yet
        self._rows, self._waiting, self._made_by = {}, {}, {}
        previous = _open_journals.pop(str(self.journal), None)  # the cell was run again
        if previous:
            previous.close()
        self.file = open(self.journal, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise RuntimeError(f"another run is writing {self.path.name} in {run.results}: wait for it, "
                               "or set OUT to another folder") from None
        _open_journals[str(self.journal)] = self.file
        self._take_over() if self.taken else self._recover()

    @property
    def rows(self):
        """All rows (dicts), in the order of their first appearance."""
        return list(self._rows.values())

    def _recover(self):
        """Read what an interrupted run (or an earlier process) of the same kind left, else begin an empty journal."""
        if self.run.retimed and not self.checked:  # only times are measured: all that has none is taken over
            timed = {self._key_of(row) for row in self._published_rows("_raw")}
            for row in self._published_rows():
                if row["status"] == "ok" and self._key_of(row) not in timed:
                    self._put(self._waiting, dict(rows=[row], made_by=PUBLISHED))
        self.file.seek(0)
        entries, good = [], 0
        for line in self.file:
            try:
                entries.append(json.loads(line))
            except ValueError:  # cut off in mid-write, or damaged: what follows cannot be trusted
                break
            good += len(line)
        wanted = self.run.resume or self.run.process > 0
        if entries and wanted and entries[0] == self.identity:
            self.file.truncate(good)
            for entry in entries[1:]:
                self._put(self._waiting, entry)
            if self._waiting:
                self.run.continued |= not self.run.process
                why = "of an earlier process" if self.run.process else "of an interrupted run"
                print(f"{self.name}: going on with {len(self._waiting)} rows {why}")
        else:
            if len(entries) > 1:
                why = "RESUME is False" if not self.run.resume else "code, parameters, weights, images or versions differ"
                print(f"{self.name}: starting over, {why}")
            self.file.truncate(0)
            self._append(self.identity)

    def _take_over(self):
        """Take the rows of the published CSV, and their raw times, for those that are there."""
        self.file.truncate(0)
        for row in self._published_rows():
            self._put(self._waiting, dict(rows=[row], made_by=PUBLISHED))
        for row in self._published_rows("_raw"):
            parts = self._waiting[self._key_of(row)].setdefault("raw_ms", [])
            parts += [[] for _ in range(row["process"] + 1 - len(parts))]
            parts[row["process"]].append(row["latency_ms"])

    def _published_rows(self, suffix=""):
        """The rows of the published table, or of its raw times; none where there is no file, as of a table without rows."""
        path = self.run.published.with_name(f"{self.name}{suffix}.csv")
        return rows_of(path) if path.exists() else []

    def _tell_changes(self):
        """Say where what is computed again (nothing is measured) differs from the published table."""
        lost = self._waiting.keys() - self._rows.keys()
        columns = sorted({column for key, row in self._rows.items() for column, value in row.items()
                          if column != "raw_ms" and differ(value, self._waiting[key].get(column))})
        if lost or columns:
            print(f"{self.name}: {len(lost)} published rows are left out; computed again, with another result: {', '.join(columns) or 'none'}")

    def _lacking(self, where):
        """The error of a row that `--redraw` does not find."""
        raise ValueError(f"--redraw: {self.path.name} has no row for {label(where)}: run this notebook without --redraw")

    def _key_of(self, row):
        return tuple(spelled(row.get(k)) for k in self.key)

    def _put(self, place, entry):
        for row in entry["rows"]:
            key = self._key_of(row)
            place[key], self._made_by[key] = row, entry["made_by"]

    def _append(self, entry):
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _there(self, where):
        """{key: row} with these values that the cells run so far have made, here or before an interruption."""
        code, both, where = cells_fingerprint(), self._waiting | self._rows, as_kept(where)
        return {key: row for key, row in both.items()
                if self._made_by[key] in (code, PUBLISHED) and all(spelled(row.get(k)) == spelled(v) for k, v in where.items())}

    def _fresh(self, row):
        """False for a row whose times this process has yet to measure."""
        return row["status"] != "ok" or not row.get("raw_ms") or len(row["raw_ms"]) > self.run.process

    def find(self, **where):
        """The rows (dicts) whose columns have these values."""
        where = as_kept(where)
        return [row for row in self.rows if all(spelled(row.get(k)) == spelled(v) for k, v in where.items())]

    def best(self, column, most=False, **where):
        """The row with the least (most=True: the greatest) finite value of a column among those that are ok and have these values; None if none has."""
        found = [row for row in self.find(status="ok", **where) if is_number(row.get(column))]
        return (max if most else min)(found, key=lambda row: row[column], default=None)

    def ratio(self, one, other, name="variant", **where):
        """Estimate of the time of case `one` over that of `other` in the comparison `where`; NaN if either has no times.

        ValueError if `where` does not name one comparison."""
        raw = []
        for case in (one, other):
            found = [row["raw_ms"] for row in self.find(**where, **{name: case}) if row.get("raw_ms")]
            check(len(found) < 2, "where", where, "columns that leave one row of each case")
            raw += found
        return ratio_interval(*raw) if len(raw) == 2 else Estimate(UNKNOWN)

    def has(self, **where):
        """Whether this code has already made rows with these values, so that they need not be made again.

        A guard before `add`; to ask what the table holds, use `find`."""
        found = self._there(where)
        there = bool(found) and all(map(self._fresh, found.values()))
        self._rows |= found if there else {}
        if self.taken and not there:
            self._lacking(where)
        return there

    def add(self, rows):
        """Add finished rows (a dict or a list of dicts, with a value for every key column) at once; replaces equal keys."""
        rows = [dict(row) for row in ([rows] if isinstance(rows, dict) else rows)]
        for row in rows:
            missing = [k for k in self.key if k not in row]
            check(not missing, "row", row, f"a value for every key column; missing: {missing}")
            row.setdefault("status", "ok")
            raw = row.get("raw_ms") or []
            row |= dict(raw_ms=[raw]) if len(raw) and not isinstance(raw[0], (list, tuple)) else {}
        code, parts = cells_fingerprint(), {}
        for row in rows if self.taken else []:
            before = self._waiting.get(self._key_of(as_kept(row)))
            if before is None or row.get("raw_ms") and row["raw_ms"] != before.get("raw_ms"):
                self._lacking({k: row[k] for k in self.key})
        for row in as_kept([dict(self.run.row, **row) for row in rows]):
            key = self._key_of(row)
            same = row.get("raw_ms") and row["raw_ms"] == self._rows.get(key, {}).get("raw_ms")  # columns for a row that another cell measured
            parts.setdefault(self._made_by[key] if same else code, []).append(row)
        for made_by, some in parts.items():
            self._append(entry := dict(made_by=made_by, rows=some))
            self._put(self._rows, entry)

    def compare(self, cases, name="variant", ratios=None, speedups=None, describe=None, **common):
        """Time `cases` ({name: callable}) against each other and add one row each; returns {name: row}.

        name: the column that holds a case's name; common: further columns of all rows, the other key columns among
        them. ratios: {column: case}, time over that case's; speedups: {column: case}, that case's time over it; both
        with intervals. describe: name → further columns of a row that is ok. Already there: nothing is measured."""
        check_cases(cases)
        missing = [k for k in self.key if k not in common and k != name]
        check(name in self.key and not missing, "key", self.key, f"{name!r} and the columns given; missing: {missing}")
        columns = [*((column, reference, False) for column, reference in (ratios or {}).items()),
                   *((column, reference, True) for column, reference in (speedups or {}).items())]
        unknown = sorted({str(reference) for _, reference, _ in columns if reference not in cases})
        check(not unknown, "reference", unknown, f"one of the cases: {', '.join(map(str, cases))}")
        where = {k: v for k, v in common.items() if k in self.key}
        called = {spelled(as_kept(case)): case for case in cases}
        there = {key: row for key, row in self._there(where).items() if spelled(row[name]) in called}
        old = {called[spelled(row[name])]: row for row in there.values()}
        if set(old) == set(cases) and all(map(self._fresh, old.values())):
            self._rows |= there
            return old
        if self.taken:
            self._lacking(where | {name: ", ".join(map(str, set(cases) - set(old)))})
        failed = {case: row for case, row in old.items() if self.run.process and row["status"] != "ok"}
        rows = self._measure({case: fn for case, fn in cases.items() if case not in failed}, columns, old)
        for case, row in rows.items():
            if row["status"] == "ok":
                row = (old.get(case) or (describe(case) if describe else {})) | row
            rows[case] = row | common | {name: case}
        rows = {case: failed.get(case) or rows[case] for case in cases}
        for column, reference, faster in columns:
            for row in rows.values():
                raw, of = row["raw_ms"], rows[reference]["raw_ms"]
                ratio = ratio_interval(raw, of) if raw and of else Estimate(UNKNOWN)
                row.update(with_interval(column, ratio.inverse() if faster else ratio))
        self.add(list(rows.values()))
        told = ", ".join(f"{case} {row.get('latency_ms_median', float('nan')):.3g}" for case, row in rows.items())
        rounds = max((row.get("n_runs", 0) for row in rows.values()), default=0)
        self.run.log(f"{', '.join(f'{k} {v}' for k, v in where.items())} [ms, {rounds} rounds]: {told}")
        return rows

    def _measure(self, cases, columns, old):
        """Rows of `compare`, with the times of earlier processes (in `old`) before those of this one."""
        references = list(dict.fromkeys(reference for _, reference, _ in columns if reference in cases))
        begin = time.monotonic()
        rows = compare(cases, self.run.device, against=references or None, **self.run.timing)
        self.run.comparing += time.monotonic() - begin
        good = {case: row for case, row in rows.items() if row["status"] == "ok"}
        earlier = {case: old.get(case, {}).get("raw_ms", [])[: self.run.process] for case in good}
        paired = len({tuple(map(len, parts)) for parts in earlier.values()}) == 1  # measured together, then as now
        if good and not paired:
            print(f"{self.name}: the times of earlier processes are left out, as other cases were measured then")
        for case, row in good.items():
            row["raw_ms"] = [*(earlier[case] if paired else []), row["raw_ms"]]
            row["noisy"] |= bool(paired and earlier[case] and old[case].get("noisy"))
            row.update(summary([ms for part in row["raw_ms"] for ms in part]))
        return rows

    def save(self):
        """Write the CSV and, where there are raw times, `<name>_raw.csv`; returns the table."""
        if self.taken:
            self._tell_changes()
        raw = [dict({k: row[k] for k in self.key}, process=process, i=i, latency_ms=ms)
               for row in self.rows for process, part in enumerate(row.get("raw_ms") or []) for i, ms in enumerate(part)]
        table = pd.DataFrame([{k: v for k, v in row.items() if k != "raw_ms"} for row in self.rows],
                             columns=None if self.rows else [*self.key, "status"])
        front = [*self.key, *(c for c in table if c not in self.key and c not in self.run.row)]
        before = self.run.published and self.run.published.with_name(self.path.name)
        if self.taken and before.exists():  # the columns as they stood
            before = [c for c in read_csv(before) if c in self.key or c not in self.run.row]
            front = [*before, *(c for c in front if c not in before)]
        front = [c for c in front if c in table]  # the sweep first, the provenance last
        table = table[[*front, *(c for c in self.run.row if c in table and c not in front)]]
        write_csv(self.path, table)
        if raw:
            write_csv(self.path.with_name(f"{self.name}_raw.csv"), pd.DataFrame(raw))
        return read_csv(self.path)


def rows_of(path):
    """The rows (dicts) of a CSV, as near as it can tell to those that were written: whole numbers, lists, no empty cells but NaN."""
    table = read_csv(path)
    numbers = set(table.select_dtypes("number"))
    for column in table.select_dtypes("float"):
        if table[column].isna().any() and (table[column].dropna() % 1 == 0).all():
            table[column] = table[column].astype("Int64").astype(object).where(table[column].notna(), math.nan)
    return [{k: from_text(v) if isinstance(v, str) else v for k, v in row.items()
             if k in numbers or not pd.isna(v)} | {k: "" for k in TEXT if k in row and pd.isna(row[k])}
            for row in table.astype(object).to_dict("records")]


def from_text(cell):
    """What was written as this text: a list, a float that stands among words, or the text itself."""
    if cell[:1] + cell[-1:] == "[]":
        return json.loads(cell)
    try:
        value = float(cell)
    except ValueError:
        return cell
    return value if math.isfinite(value) and str(value) == cell else cell


def spelled(value):
    """A value as its cell in the CSV spells it: a row is the same row after reading it back."""
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(int(value)) if float(value).is_integer() else f"{value:.6g}"


def differ(new, old):
    """Whether a cell says something else; what was computed from numbers of six digits may differ in the last of them."""
    return not math.isclose(new, old, rel_tol=1e-4) if is_number(new) and is_number(old) else spelled(new) != spelled(old)


def plain(value):
    """numpy scalars, paths and the like as JSON values."""
    return value.item() if hasattr(value, "item") else str(value)


def as_kept(value):
    """A value as the journal keeps it: a tuple is a list there, a path its text."""
    return json.loads(json.dumps(value, default=plain))


def write_csv(path, table):
    """Write a table the same way everywhere: six significant digits, one newline style, atomically."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n", float_format="%.6g"))


def read_csv(path):
    """Read a table back: figures are drawn from what is on disk. Only an empty cell is a missing value; provenance is text."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=dict.fromkeys(TEXT, str))
