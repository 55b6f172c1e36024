"""Measuring, fairly: runs, timing, memory, intervals, tables, claims, figures.

`compare` times your own functions against each other; `start`, `Table`, `Claims` and `save_figure` are what the
notebooks are made of."""

from effarch.bench.claims import NOT_SUPPORTED, SUPPORTED, UNDECIDED, UNTESTABLE, Claims, statements, together
from effarch.bench.figures import (
    LINES,
    MARKERS,
    PALETTE,
    STYLE,
    in_words,
    interval_bars,
    pareto_front,
    power_ticks,
    save_figure,
    series_style,
)
from effarch.bench.intervals import (
    Estimate,
    bootstrap_mean,
    decide,
    fit_loglog,
    known_to,
    ratio_interval,
    redrawn,
    seed_ratio,
    t_interval,
    wilson,
    with_interval,
)
from effarch.bench.run import Run, start
from effarch.bench.settings import choice, count, listing, number, share, text
from effarch.bench.tables import Table, read_csv, value_of, write_csv
from effarch.bench.timing import (
    attempt,
    ceilings,
    compare,
    count_flops,
    half_type,
    limit_ms,
    one_pass,
    peak_memory,
    synchronize,
    tensor_bytes,
)
from effarch.checks import verify

__all__ = [
    "NOT_SUPPORTED", "SUPPORTED", "UNDECIDED", "UNTESTABLE", "Claims", "statements", "together",
    "LINES", "MARKERS", "PALETTE", "STYLE", "in_words", "interval_bars", "pareto_front", "power_ticks", "save_figure", "series_style",
    "Estimate", "bootstrap_mean", "decide", "fit_loglog", "known_to", "ratio_interval", "redrawn", "seed_ratio", "t_interval",
    "wilson", "with_interval", "Run", "start", "choice", "count", "listing", "number", "share", "text", "Table", "read_csv",
    "value_of", "write_csv", "attempt", "ceilings", "compare", "count_flops", "half_type", "limit_ms", "one_pass", "peak_memory", "synchronize", "tensor_bytes", "verify",
]
