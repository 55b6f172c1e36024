"""Tables that survive: each finished comparison is journaled at once, CSVs replace the old ones whole."""

import fcntl
import json
import os

import pandas as pd

from lab.cells.environment import check, code_fingerprint, write_atomically

# kept for as long as this process lives: a second run on the same files is refused, a dead one frees them
_open_journals = {}


class Table:
    """A tidy CSV, `<results>/<name>.csv`: one row per configuration, named by the columns in `key`.

    `add` writes the finished rows of one comparison to a journal at once. A run that died and is started
    again with the same code, parameters, device and versions finds them there (`has`) and goes on.
    """

    def __init__(self, run, name, key):
        self.run, self.name, self.key = run, name, list(key)
        self.path = run.results / f"{name}.csv"
        self.journal = run.results / f".{run.notebook}.{name}.journal"
        same = ("suite", "notebook", "mode", "device", "weights", "seed", "torch", "cuda", "transformers",
                "python", "num_threads")
        self.identity = dict({k: run.row[k] for k in same}, code=code_fingerprint(), key=self.key)
        self.rows = []
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

    def _recover(self):
        """Take over the rows of an interrupted run of the same kind, else begin an empty journal."""
        self.file.seek(0)
        entries, good = [], 0
        for line in self.file:
            try:
                entries.append(json.loads(line))
            except ValueError:  # cut off in mid-write, or damaged: what follows cannot be trusted
                break
            good += len(line)
        if entries and self.run.resume and entries[0] == self.identity:
            self.file.truncate(good)
            self.rows = [row for group in entries[1:] for row in group]
            if self.rows:
                print(f"{self.name}: continuing an interrupted run, {len(self.rows)} rows are there")
        else:
            if len(entries) > 1:
                why = "RESUME is False" if not self.run.resume else "code, parameters or versions differ"
                print(f"{self.name}: starting over, {why}")
            self.file.truncate(0)
            self._append(self.identity)

    def _append(self, entry):
        self.file.write(json.dumps(entry).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def has(self, **key):
        """Whether a finished row with these values is there."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, rows):
        """Add the finished rows of one comparison (dicts; `raw_ms` may hold the raw times)."""
        rows = [dict(row) for row in ([rows] if isinstance(rows, dict) else rows)]
        for row in rows:
            missing = [k for k in self.key if k not in row]
            check(not missing, "row", row, f"a value for every key column; missing: {missing}")
            row.setdefault("status", "ok")
        rows = json.loads(json.dumps([dict(self.run.row, **row) for row in rows], default=plain))
        self._append(rows)
        self.rows += rows

    def save(self):
        """Write the CSV and, where there are raw times, `<name>_raw.csv`; returns the table."""
        raw = [dict({k: row[k] for k in ["run_id", *self.key]}, i=i, latency_ms=ms)
               for row in self.rows for i, ms in enumerate(row.get("raw_ms") or [])]
        table = pd.DataFrame([{k: v for k, v in row.items() if k != "raw_ms"} for row in self.rows])
        front = [*self.key, *(c for c in table if c not in self.key and c not in self.run.row)]
        front = [c for c in front if c in table]  # the sweep first, the provenance last
        table = table[[*front, *(c for c in table if c not in front)]]
        write_csv(self.path, table)
        if raw:
            write_csv(self.path.with_name(f"{self.name}_raw.csv"), pd.DataFrame(raw))
        return read_csv(self.path)


def plain(value):
    """numpy scalars, paths and the like as JSON values; a number that is not finite becomes an empty cell."""
    return value.item() if hasattr(value, "item") else str(value)


def write_csv(path, table):
    """Write a table the same way everywhere: six significant digits, one newline style, atomically."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n", float_format="%.6g"))


def read_csv(path):
    """Read a table back: figures are drawn from what is on disk. Only an empty cell is a missing value."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])
