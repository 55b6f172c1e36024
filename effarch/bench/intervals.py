"""How certain a number is, and the ONE rule of inference: cells, claims and README all use what is here.

Every estimate is (value, low, high) with a 95 % interval. `decide` compares the interval with a limit; if it holds both
answers, or if there is no interval, or one of width zero (values that all agree show no spread), the word is "undecided"."""

import math
from typing import NamedTuple

import numpy as np

from effarch.checks import check

UNKNOWN = float("nan")
FEW = 8  # below so many values a bootstrap is too narrow: Student's t for times and seeds, no interval for images


class Estimate(NamedTuple):
    """A value with its 95 % interval; NaN ends where it is not known."""

    value: float
    low: float = UNKNOWN
    high: float = UNKNOWN

    def inverse(self):
        """The Estimate of 1 / value, as of a speed-up from a ratio of times; ends not known where the interval holds 0, NaN for 0."""
        if not self.value:
            return Estimate(UNKNOWN)
        return Estimate(1 / self.value, 1 / self.high, 1 / self.low) if self.low * self.high > 0 else Estimate(1 / self.value)

    def __str__(self):
        """'1.82 [1.72, 1.98]', for titles and what cells print; 'not measured' without a value."""
        if math.isnan(self.value):
            return "not measured"
        value, low, high = (f"{v:.2f}" if abs(v) > 0.095 or not v else f"{v:.2g}" for v in self)
        return value + ("" if math.isnan(self.low) else f" [{low}, {high}]")


def decide(estimate, above=None, below=None, between=None):
    """True, False or None (undecided): does the whole interval lie above / below a limit, or between two?

    estimate: an Estimate, or a plain number that is exact (a count, a formula). NaN anywhere, or an interval of width
    zero, which too few or all equal values make: undecided."""
    least, most = between if between is not None else (above, below)
    check((least, most) != (None, None) and (between is None or least <= most), "above, below, between", (above, below, between),
          "one limit or two, the lower first")
    exact = not isinstance(estimate, tuple)
    value, low, high = (estimate,) * 3 if exact else estimate
    if any(v is None or math.isnan(v) for v in (value, low, high)) or not (exact or low < high):
        return None
    inside = (least is None or low > least) and (most is None or high < most)
    outside = (least is not None and high <= least) or (most is not None and low >= most)
    return True if inside else False if outside else None


def t_factor(n):
    """Student's 97.5 % quantile for the mean of n values."""
    from scipy.special import stdtrit  # scipy.stats takes seconds to import

    return float(stdtrit(n - 1, 0.975))


def t_interval(values):
    """Estimate of a mean of independent, roughly normal values (trainings, say) by Student's t; n = 1: no interval."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return Estimate(float(values.mean()) if len(values) else UNKNOWN)
    half = t_factor(len(values)) * values.std(ddof=1) / len(values) ** 0.5
    return Estimate(float(values.mean()), float(values.mean() - half), float(values.mean() + half))


def by_process(raw):
    """Raw times as a list of arrays, one per process, without those of none; flat times are of one process."""
    return [part for part in _in_processes(raw) if len(part)]


def _in_processes(raw):
    check(not hasattr(raw, "columns"), "raw times", type(raw).__name__, "numbers, or a list of those of each process")
    raw = list(raw)
    nested = len(raw) and np.ndim(raw[0]) > 0
    return [np.asarray(part, float) for part in (raw if nested else [raw])]


def ratio_interval(raw_a, raw_b, draws=2000):
    """Estimate of median(a) / median(b) from interleaved rounds: round i of a is paired with round i of b.

    raw_a, raw_b: times of one process, or a list of such lists, one per process. One process: a bootstrap over rounds;
    with fewer than eight, where that is too narrow, Student's t on the log ratios. Several: the ratio is the geometric
    mean of the processes' ratios, and machines differ between runs by more than rounds do. Fewer than eight processes:
    Student's t on the logs of their ratios, but never narrower than their rounds alone allow; more: processes are redrawn
    first, then rounds within. Without times of either: three NaN. ValueError if they cannot be paired."""
    a, b = _in_processes(raw_a), _in_processes(raw_b)
    if not any(map(len, a)) or not any(map(len, b)):  # of a case that failed, say
        return Estimate(UNKNOWN)
    if [len(part) for part in a] != [len(part) for part in b]:
        raise ValueError(f"raw times of {[len(p) for p in a]} and {[len(p) for p in b]} rounds cannot be paired")
    a, b = by_process(a), by_process(b)
    check(not any((part <= 0).any() for part in (*a, *b)), "raw times", "0 or less", "above 0")
    random = np.random.default_rng(0)
    logs = np.array([math.log(np.median(x) / np.median(y)) for x, y in zip(a, b, strict=True)])
    ratio = math.exp(logs.mean())
    if len(a) == 1 and len(a[0]) < FEW:
        if len(a[0]) < 2:
            return Estimate(ratio)
        middle, low, high = t_interval(np.log(a[0] / b[0]))
        return Estimate(ratio, min(math.exp(low), ratio), max(math.exp(high), ratio))
    redrawn = np.stack([_redrawn_logs(x, y, draws, random) for x, y in zip(a, b, strict=True)])  # (processes, draws)
    within = (redrawn - logs[:, None]).mean(0)  # what the rounds leave open
    if len(a) < FEW:
        between = np.zeros(1)
    else:  # k processes redrawn from k spread too little by sqrt((k - 1) / k)
        pick = random.integers(0, len(a), (len(a), draws))
        between = (logs[pick].mean(0) - logs.mean()) * (len(a) / (len(a) - 1)) ** 0.5
    low, high = logs.mean() + np.percentile(between + within, [2.5, 97.5])
    if 1 < len(a) < FEW:
        _, least, most = t_interval(logs)
        low, high = min(low, least), max(high, most)
    return Estimate(ratio, min(math.exp(low), ratio), max(math.exp(high), ratio))


def _redrawn_logs(a, b, draws, random):
    """(draws,) log ratios of medians over redrawn rounds."""
    pick = random.integers(0, len(a), (draws, len(a)))
    return np.log(np.median(a[pick], axis=1) / np.median(b[pick], axis=1))


def wilson(hits, n, z=1.96):
    """Estimate of a share by Wilson's interval (JASA 22, 1927) of hits / n; n = 0: three NaN. ValueError unless 0 ≤ hits ≤ n."""
    if not n:
        return Estimate(UNKNOWN)
    check(not (hits < 0 or hits > n), "hits", hits, f"0 to n={n}")
    share, middle = hits / n, (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * share * (1 - share) + z * z / 4) ** 0.5
    low, high = 0 if hits == 0 else middle - half, 1 if hits == n else middle + half  # which rounding would miss by 1e-17
    return Estimate(float(share), float(low), float(high))


def bootstrap_mean(values, draws=2000, weights=None):
    """Estimate of a mean over images by bootstrap; for a paired comparison pass the differences.

    weights: how often each value counts, such as the images of a group whose mean it is. Fewer than eight values have no
    interval: two images that agree prove nothing. As redrawn means of few values spread too little, the interval is as much
    wider as Student's t is than the normal one (after Hesterberg 2015, The American Statistician 69)."""
    values, n = np.asarray(values, float), len(values)
    weights = np.ones(n) if weights is None else np.asarray(weights, float)
    if n < FEW:
        return Estimate(float(np.average(values, weights=weights)) if n else UNKNOWN)
    mean, random, drawn = np.average(values, weights=weights), np.random.default_rng(0), []
    for many in np.diff([*range(0, draws, max(1, 10**6 // n)), draws]):  # in parts, since draws × values may not fit into memory
        pick = random.integers(0, n, (many, n))
        drawn.append((values * weights)[pick].sum(1) / weights[pick].sum(1))
    ends = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    low, high = np.clip(mean + (ends - mean) * t_factor(n) / 1.96 * (n / (n - 1)) ** 0.5, values.min(), values.max())  # a cosine stays below 1
    return Estimate(float(mean), float(low), float(high))


def seed_ratio(a, b):
    """Estimate of error(a) / error(b) over trainings paired by seed: geometric mean, Student's t on the logs.

    NaN without a pair, or where an error is not above 0; one pair has no interval. A pair of which a training was lost (its
    error is not finite) is left out, and that is printed: the ratio is then that of the others."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    check(a.shape == b.shape, "shapes", (a.shape, b.shape), "as many errors of both, paired by seed")
    good = np.isfinite(a) & np.isfinite(b)
    if not good.all():
        print(f"a ratio of errors leaves out {(~good).sum()} of {len(good)} seeds, where a training was lost")
    a, b = a[good], b[good]
    if not len(a) or (a <= 0).any() or (b <= 0).any():
        return Estimate(UNKNOWN)
    return Estimate(*(math.exp(v) for v in t_interval(np.log(a / b))))


def known_to(estimate, share=0.15):
    """Whether an Estimate's interval is within about ± this share of its value, so that a ratio of times may set equal times; NaN: no."""
    return bool(estimate.high - estimate.low <= 2 * share * abs(estimate.value))


def fit_loglog(x, y):
    """Estimate of the slope of log y over log x (Student's t); fewer than three points: no interval."""
    if len(x) < 2:
        return Estimate(UNKNOWN)
    x, y = np.log(x) - np.mean(np.log(x)), np.log(y) - np.mean(np.log(y))
    slope = float(x @ y / (x @ x))
    if len(x) < 3:
        return Estimate(slope)
    half = t_factor(len(x) - 1) * (((y - slope * x) ** 2).sum() / (len(x) - 2) / (x @ x)) ** 0.5  # len(x) - 2 degrees of freedom
    return Estimate(slope, float(slope - half), float(slope + half))


def redrawn(raw, statistic, draws=500):
    """Estimate of statistic([median, …]), such as a fit over sizes, by redrawing the timed rounds of every point.

    raw: per point its rounds, or a list of rounds per process, as `Table` keeps them. statistic: medians → a number of at
    least 0, maybe infinite. Several processes: their medians' geometric mean, never narrower than the processes differ; one
    process of fewer than eight rounds: never narrower than its rounds do. A point without times: three NaN."""
    points, random = [by_process(rounds) for rounds in raw], np.random.default_rng(0)
    if not points or not all(points):
        return Estimate(UNKNOWN)

    def medians(part):  # (1 + draws,): as measured, then redrawn
        return np.median(np.vstack([part, random.choice(part, (draws, len(part)))]), axis=1)

    each = np.exp([np.mean([np.log(medians(part)) for part in parts], 0) for parts in points])
    middle, *others = (float(statistic(list(column))) for column in each.T)
    processes = min(map(len, points))
    rounds = min(len(part) for parts in points for part in parts)
    if processes == 1 and rounds < 2:
        return Estimate(middle)
    ends = list(np.percentile(others, [2.5, 97.5], method="nearest"))  # between two infinities there is nothing
    own = []
    if processes > 1:
        own = [float(statistic([np.median(parts[i]) for parts in points])) for i in range(processes)]
    elif rounds < FEW:
        own = [float(statistic([parts[0][i] for parts in points])) for i in range(rounds)]
    known = np.isfinite(own).all() and min(own, default=0) > 0
    ends += [math.exp(end) for end in t_interval(np.log(own))[1:]] if known else own
    return Estimate(middle, min(*map(float, ends), middle), max(*map(float, ends), middle))


def with_interval(name, estimate):
    """{name: …, name_low: …, name_high: …}, for a row of a table."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
