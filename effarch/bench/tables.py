"""Tables that survive: each finished comparison is journaled at once, CSVs replace the old ones whole."""

import fcntl
import json
import os

import pandas as pd

from effarch.bench.intervals import ratio_interval, with_interval
from effarch.bench.run import code_fingerprint, write_atomically
from effarch.bench.timing import compare, summary
from effarch.checks import check

# kept for as long as this process lives: a second run on the same files is refused, a dead one frees them
_open_journals = {}


class Table:
    """A tidy CSV, `<results>/<name>.csv`: one row per configuration, named by the columns in `key`.

    `add` and `compare` write finished rows to a journal at once. A run that died and is started again with the same
    code, parameters, device and versions finds them there (`has`) and goes on. In the second and later processes of
    `run_all.sh --repeat`, times are measured again and pooled; everything else is taken over."""

    def __init__(self, run, name, key):
        self.run, self.name, self.key = run, name, list(key)
        self.path = run.results / f"{name}.csv"
        self.journal = run.results / f".{run.notebook}.{name}.journal"
        same = ("suite", "notebook", "mode", "device", "weights", "seed", "torch", "cuda", "transformers",
                "python", "num_threads")
        self.identity = dict({k: run.row[k] for k in same}, code=code_fingerprint(), key=self.key)
        self._rows = {}  # values of the key columns → row
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
        self._recover()

    @property
    def rows(self):
        """All rows (dicts), in the order of their first appearance."""
        return list(self._rows.values())

    def _recover(self):
        """Take over the rows of an interrupted run (or an earlier process) of the same kind, else begin an empty journal."""
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
            for group in entries[1:]:
                self._put(group)
            if self._rows:
                why = "of an earlier process" if self.run.process else "of an interrupted run"
                print(f"{self.name}: going on with {len(self._rows)} rows {why}")
        else:
            if len(entries) > 1:
                why = "RESUME is False" if not self.run.resume else "code, parameters or versions differ"
                print(f"{self.name}: starting over, {why}")
            self.file.truncate(0)
            self._append(self.identity)

    def _put(self, rows):
        self._rows |= {tuple(map(json.dumps, (row[k] for k in self.key))): row for row in rows}

    def _append(self, entry):
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def _fresh(self, row):
        """False for a row whose times this process has yet to measure."""
        return row["status"] != "ok" or not row.get("raw_ms") or len(row["raw_ms"]) > self.run.process

    def find(self, **where):
        """The rows (dicts) whose columns have these values."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in where.items())]

    def has(self, **where):
        """Whether rows with these values are there, finished in this process."""
        found = self.find(**where)
        return bool(found) and all(map(self._fresh, found))

    def add(self, rows):
        """Add finished rows (a dict or a list of dicts, with a value for every key column) at once; replaces equal keys."""
        rows = [dict(row) for row in ([rows] if isinstance(rows, dict) else rows)]
        for row in rows:
            missing = [k for k in self.key if k not in row]
            check(not missing, "row", row, f"a value for every key column; missing: {missing}")
            row.setdefault("status", "ok")
        rows = json.loads(json.dumps([dict(self.run.row, **row) for row in rows], default=plain))
        self._append(rows)
        self._put(rows)

    def compare(self, cases, name="variant", ratios=None, speedups=None, describe=None, **common):
        """Time `cases` ({name: callable}) against each other and add one row each; returns {name: row}.

        name: the column that holds a case's name; common: further columns of all rows, the other key columns among
        them. ratios: {column: case}, time over that case's; speedups: {column: case}, that case's time over it; both
        with intervals. describe: name → further columns of a row that is ok. Already there: nothing is measured."""
        where = {k: v for k, v in common.items() if k in self.key}
        old = {row[name]: row for row in self.find(**where) if row[name] in cases}
        if set(old) == set(cases) and all(map(self._fresh, old.values())):
            return old
        references = [*(ratios or {}).values(), *(speedups or {}).values()]
        rows = compare(cases, self.run.device, against=references[0] if references else None, **self.run.timing)
        for case, row in rows.items():
            before = old.get(case, {})
            row["raw_ms"] = [*before.get("raw_ms", []), row["raw_ms"]] if row["status"] == "ok" else []
            described = dict(before) if before else describe(case) if describe and row["status"] == "ok" else {}
            rows[case] = described | row | common | {name: case}
            if row["raw_ms"]:
                rows[case] |= summary([ms for part in row["raw_ms"] for ms in part])
        for columns, faster in ((ratios, False), (speedups, True)):
            for column, reference in (columns or {}).items():
                for row in rows.values():
                    if row["raw_ms"] and rows[reference]["raw_ms"]:
                        ratio = ratio_interval(row["raw_ms"], rows[reference]["raw_ms"])
                        row.update(with_interval(column, ratio.inverse() if faster else ratio))
        self.add(list(rows.values()))
        told = ", ".join(f"{case} {row.get('latency_ms_median', float('nan')):.3g}" for case, row in rows.items())
        rounds = max((row.get("n_runs", 0) for row in rows.values()), default=0)
        self.run.log(f"{', '.join(f'{k} {v}' for k, v in where.items())} [ms, {rounds} rounds]: {told}")
        return rows

    def save(self):
        """Write the CSV and, where there are raw times, `<name>_raw.csv`; returns the table."""
        raw = [dict({k: row[k] for k in ["run_id", *self.key]}, process=process, i=i, latency_ms=ms)
               for row in self.rows for process, part in enumerate(row.get("raw_ms") or []) for i, ms in enumerate(part)]
        table = pd.DataFrame([{k: v for k, v in row.items() if k != "raw_ms"} for row in self.rows])
        front = [*self.key, *(c for c in table if c not in self.key and c not in self.run.row)]
        front = [c for c in front if c in table]  # the sweep first, the provenance last
        table = table[[*front, *(c for c in table if c not in front)]]
        write_csv(self.path, table)
        if raw:
            write_csv(self.path.with_name(f"{self.name}_raw.csv"), pd.DataFrame(raw))
        return read_csv(self.path)


def plain(value):
    """numpy scalars, paths and the like as JSON values."""
    return value.item() if hasattr(value, "item") else str(value)


def write_csv(path, table):
    """Write a table the same way everywhere: six significant digits, one newline style, atomically."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n", float_format="%.6g"))


def read_csv(path):
    """Read a table back: figures are drawn from what is on disk. Only an empty cell is a missing value."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])
