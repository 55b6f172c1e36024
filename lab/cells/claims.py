"""The original report's statements, each with what was measured here and a verdict."""

import pandas as pd

from lab.cells.environment import check
from lab.cells.results import read_csv, write_csv

VERDICTS = ("supported", "not supported", "not testable here")


class Claims:
    """Verdicts of one notebook; `statements`: {id: dict(statement, quantity, condition, claimed, unit)}."""

    def __init__(self, run, statements):
        self.run, self.statements, self.rows = run, statements, {}

    def add(self, claim, verdict, reason, measured=None, low=None, high=None, n=None, source=""):
        """Judge one claim. `measured` (with its interval and n) may be None only if it is not testable here.

        source: where the number stands, as 'file.csv: column=value, …'."""
        check(claim in self.statements, "claim", claim, ", ".join(self.statements))
        check(verdict in VERDICTS, "verdict", verdict, ", ".join(VERDICTS))
        check(measured is not None or verdict == VERDICTS[2], "measured", measured, "a number, for a verdict")
        check(bool(source) or verdict == VERDICTS[2], "source", source, "the CSV row behind the number")
        self.rows[claim] = dict(
            id=claim, suite=self.run.suite, notebook=self.run.notebook, **self.statements[claim],
            measured=measured, low=low, high=high, n=n, verdict=verdict, reason=reason, source=source,
            **{k: self.run.row[k] for k in ("device", "weights", "mode", "git_commit", "utc_time", "run_id")})

    def save(self):
        """Write claims.csv beside the results, keeping other notebooks' rows; every claim must be judged."""
        missing = [claim for claim in self.statements if claim not in self.rows]
        check(not missing, "claims", missing, "a verdict for each")
        path, table = self.run.results / "claims.csv", pd.DataFrame(self.rows.values())
        if path.exists():
            old = read_csv(path)
            others = old[old["notebook"] != self.run.notebook]
            table = pd.concat([others.astype(object), table.astype(object)])
        write_csv(path, table.sort_values("id"))
        mine = table[table["notebook"] == self.run.notebook].sort_values("id")
        shown = ["id", "statement", "claimed", "unit", "measured", "low", "high", "n", "verdict", "reason"]
        pd.set_option("display.max_colwidth", None)  # a reason that is cut off is none
        return mine[shown].astype(object).fillna("")
