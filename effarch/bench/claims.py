"""The original report's statements, each with what was measured here and a verdict."""

import csv
from pathlib import Path

import pandas as pd

from effarch.bench.intervals import UNKNOWN, decide
from effarch.bench.tables import read_csv, write_csv
from effarch.checks import check

VERDICTS = SUPPORTED, NOT_SUPPORTED, UNDECIDED, UNTESTABLE = (
    "supported", "not supported", "undecided", "not testable here")
FIELDS = ("statement", "quantity", "condition", "claimed", "unit")


def statements():
    """{id: dict(statement, quantity, condition, claimed, unit, suite, note)}: the texts, from their one home."""
    with open(Path(__file__).with_name("original_claims.csv"), newline="", encoding="utf-8") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def together(*holds):
    """The verdict on a claim of several parts, each True, False or None as `decide` says: all of them must hold. No part: undecided."""
    return NOT_SUPPORTED if False in holds else SUPPORTED if holds and all(holds) else UNDECIDED


class Claims:
    """Verdicts of one notebook: `judge` or `skip` each claim, `save` at the end.

    wanted: the ids this notebook judges, such as 'A01 A02 A08'; all of them must be judged when `save` is called."""

    def __init__(self, run, wanted):
        self.run, self.rows, self.wanted = run, {}, wanted.split()
        self.statements = statements()
        unknown = [name for name in self.wanted if name not in self.statements]
        check(not unknown, "claims", unknown, ", ".join(self.statements))

    def judge(self, claim, measured, reason, source, above=None, below=None, between=None, n=None, n_of="", condition=None):
        """Judge one claim by the one rule: the whole interval above / below a limit, or between two.

        measured: an Estimate, or an exact number. between: (low, high). n: repetitions, n_of: of what ('rounds',
        'images', 'seeds'). reason: one sentence; source: where the number stands, 'file.csv: column=value, …'. A
        claim of several parts passes its deciding part here, or uses `conclude`. Returns the verdict."""
        holds = decide(measured, above, below, between)
        verdict = UNDECIDED if holds is None else SUPPORTED if holds else NOT_SUPPORTED
        return self.conclude(claim, verdict, reason, measured, source, n, n_of, condition)

    def conclude(self, claim, verdict, reason, measured=None, source="", n=None, n_of="", condition=None):
        """Note a verdict that was reached by other means; `measured` may be None only if it is not testable here."""
        check(claim in self.wanted, "claim", claim, ", ".join(self.wanted))
        check(verdict in VERDICTS, "verdict", verdict, ", ".join(VERDICTS))
        check(measured is not None or verdict == UNTESTABLE, "measured", measured, "a number, for a verdict")
        check(bool(source) or verdict == UNTESTABLE, "source", source, "the CSV row behind the number")
        value, low, high = measured if isinstance(measured, tuple) else (measured, UNKNOWN, UNKNOWN)
        texts = {field: self.statements[claim][field] for field in FIELDS}
        texts["condition"] = condition or texts["condition"]
        self.rows[claim] = dict(
            id=claim, suite=self.run.suite, notebook=self.run.notebook, **texts, measured=value, low=low, high=high,
            n=n, n_of=n_of, verdict=verdict, reason=reason, source=source,
            **{k: self.run.row[k] for k in ("device", "weights", "mode", "git_commit", "utc_time", "run_id")})
        return verdict

    def skip(self, claim, reason):
        """Note that a claim cannot be tested in this run."""
        return self.conclude(claim, UNTESTABLE, reason)

    def save(self):
        """Write claims.csv beside the results, keeping other notebooks' rows; returns this notebook's, to be shown."""
        missing = [claim for claim in self.wanted if claim not in self.rows]
        check(not missing, "claims", missing, "a verdict for each")
        path, table = self.run.results / "claims.csv", pd.DataFrame(self.rows.values()).astype(object)
        if path.exists():
            old = read_csv(path)
            others = old[old["notebook"] != self.run.notebook].astype(object)
            table = pd.concat([others, table]) if len(others) else table
        write_csv(path, table.sort_values("id"))
        mine = table[table["notebook"] == self.run.notebook].sort_values("id")
        shown = ["id", "statement", "claimed", "unit", "measured", "low", "high", "n", "verdict", "reason"]
        pd.set_option("display.max_colwidth", None)  # a reason that is cut off is none
        return mine[shown].astype(object).fillna("").reset_index(drop=True)
