"""The strongest findings: which CSV rows answer which question. A finding whose rows are missing is absent."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from scipy import stats

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
    {value}, {interval}, and the names in `Measured.words`. unit: '×', '%' (value is a share), 'points' (a difference
    of shares) or a plain unit.
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
    """A number as readers see it: three significant digits, a share as per cent (two decimals below half a per cent). '' if there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    value = float(value)
    size = abs(value)
    if unit in ("%", "points"):
        text = f"{100 * value:{'+' if unit == 'points' else ''}.{2 if 0 < size < 0.005 else 1}f}"
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


def span(low, high, unit=""):
    """' (low–high)' of an interval, '' without one."""
    if any(v is None or pd.isna(v) for v in (low, high)):
        return ""
    ends = [number(v, unit).removesuffix(unit).strip() for v in (low, high)]
    return f" ({(' to ' if low < 0 or unit == 'points' else '–').join(ends)})"


def interval(found, unit=""):
    """The interval of a Measured as text."""
    return span(found.low, found.high, unit)


def answer(finding, found):
    """Which of the finding's answers the interval (or, without one, the value) gives."""
    low, high = (found.value if v is None or pd.isna(v) else v for v in (found.low, found.high))
    below, around, above = finding.answers
    return below if high < finding.threshold else above if low > finding.threshold else around


def sentence(finding, found):
    """The finding in words."""
    text = finding.sentence.format(
        answer=answer(finding, found), value=number(found.value, finding.unit),
        interval=interval(found, finding.unit), **dict(found.words))
    return re.sub(r"(\d)%", r"\1 %", text)


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


def time_ratio(name, a, b, pair=(), at=max, per=None, words=(), **common):
    """Median time of rows `a` over that of rows `b`, bootstrapped over the raw times of the same rounds.

    name: the table without '.csv'; a, b, common: selections, or functions of a Place that give one. pair: columns
    that both sides share; of the values that both have, `at` picks one (the largest by default). per: a column to
    divide the times by, such as tokens. words: columns of row `b` for the sentence."""
    def measure(place):
        a_here, b_here = (side(place) if callable(side) else side for side in (a, b))
        if a_here is None or b_here is None:
            return None
        table, raw = place.read(f"{name}.csv"), place.read(f"{name}_raw.csv")
        if table is None or raw is None:
            return None
        sides = [rows(table, common | side) for side in (a_here, b_here)]
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
            times.append(mine.sort_values("i")["latency_ms"].to_numpy() / (side[per].iloc[0] if per else 1))
        if len(times[0]) != len(times[1]) or not len(times[0]):
            return None
        ratio, low, high = ratio_interval(*times)
        source = f"{name}_raw.csv: {describe(common | where | a_here)} over {describe(b_here)}"
        told = where | {word: sides[1][word].iloc[0] for word in words}
        return Measured(ratio, low, high, len(times[0]), source, tuple(told.items()))
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


def seed_ratio(name, column, a, b, seed, **common):
    """Error of variant `a` over that of `b`, paired by seed: geometric mean with Student's 95 % interval."""
    def measure(place):
        table = place.read(f"{name}.csv")
        if table is None:
            return None
        sides = [rows(table, common | side).set_index(seed)[column] for side in (a, b)]
        ratios = (sides[0] / sides[1]).dropna()
        if len(ratios) < 2 or (ratios <= 0).any():
            return None
        logs = ratios.map(math.log)
        half = stats.t.ppf(0.975, len(logs) - 1) * logs.std() / len(logs) ** 0.5
        values = (math.exp(v) for v in (logs.mean(), logs.mean() - half, logs.mean() + half))
        return Measured(*values, len(logs), f"{name}.csv: {describe(common | a)} over {describe(b)}")
    return measure


def also(measure, **others):
    """`measure`, and further numbers for its sentence: name=(measure, unit). Absent if any of them is.

    A word of another row, such as its batch, is {name_word} in the sentence."""
    def together(place):
        found, words = measure(place), []
        for name, (other, unit) in others.items():
            second = other(place)
            if found is None or second is None:
                return None
            words.append((name, number(second.value, unit) + interval(second, unit)))
            words += [(f"{name}_{word}", value) for word, value in second.words]
        return found and replace(found, words=(*found.words, *words))
    return together


def crossing(name, **where):
    """From which length on a scan stays faster than attention; words: {crossing}, the statement in words."""
    def measure(place):
        table = place.read(f"{name}.csv")
        chosen = table if table is None else rows(table, where)
        if chosen is None or len(chosen) != 1:
            return None
        row, source = chosen.iloc[0], f"{name}.csv: {describe(where)}"
        first, last = (number(row[c]) for c in ("from_length", "to_length"))
        if pd.isna(row["crossover_length"]):
            told = f"not faster at any length up to {last} tokens"
            return Measured(row["to_length"], n=row.get("n_runs"), source=source, words=(("crossing", told),))
        found = Measured(row["crossover_length"], row["low"], row["high"], row.get("n_runs"), source)
        at_once = row["crossover_length"] <= row["from_length"]
        told = f"faster at every length from {first} tokens, the shortest measured" if at_once else \
            f"faster from {number(found.value)} tokens on{interval(found)}"
        return replace(found, words=(("crossing", told),))
    return measure


def distilled_order(place):
    """The smallest timed state space that is large enough for every long trained kernel at its tolerance."""
    orders, timed = (place.read(f"kernel_distillation_{n}.csv") for n in ("orders", "latency"))
    if orders is None or timed is None:
        return None
    orders = rows(orders, dict(task="long", method="hankel"))
    timed = rows(timed, dict(phase="decode", kernel="per channel", method="hankel"))
    if orders.empty or timed.empty or not orders["reached"].astype(bool).all():
        return None
    enough = timed.loc[timed["rank"] >= orders["modes"].max(), "rank"]
    return None if enough.empty else dict(method="hankel", rank=int(enough.min()))


def explicit_form(place):
    """The faster of the explicit convolutions."""
    timed = place.read("kernel_distillation_latency.csv")
    if timed is None:
        return None
    timed = rows(timed, {"phase": "decode", "kernel": "per channel", "method": lambda m: m.str.startswith("explicit")})
    return None if timed.empty else dict(method=timed.sort_values("us_per_token")["method"].iloc[0])


def tokens(column, n, method):
    """A cell of the comparison of token reductions at half the compute, with the interval beside it."""
    return cell("token_reduction_methods", column, f"{column}_low", f"{column}_high", n, ["macs_share"],
                method=method, budget=0.5)


def kept(method):
    """Share of the dense encoder's answers that a method keeps at half the multiply-adds."""
    return cell("clip_equal_compute", "top1_agreement", "top1_agreement_low", "top1_agreement_high", "n_images",
                ["share_of_dense_macs"], method=method, budget=0.5)


def original(design, suffix=""):
    """Time of a design over that of Baseline in the original experiment; suffix: which convolution both use."""
    return time_ratio("mrss_proxy_results", dict(variant=f"{design}{suffix}"), dict(variant=f"Baseline{suffix}"),
                      experiment="original")


def halved(at, method="ours"):
    """Time of the dense encoder over that of a method at half the multiply-adds, at one of the batch sizes."""
    return time_ratio("token_reduction_latency", dict(method="dense"), dict(method=method), pair=["batch"], at=at, budget=0.5)


def decode(at):
    """Time a token of attention over that of a Mamba-2 layer, after one of the contexts."""
    return time_ratio("scan_decode", dict(variant="attention"), dict(variant="Mamba-2"), pair=["context"], at=at)


FORWARD = {"pass": "forward"}
BASELINE, SPLIT = dict(variant="Baseline"), dict(variant="SplitMRSS r=8 α=0.875")
MILD, COARSE = dict(variant="SplitMRSS r=8 α=0.75"), dict(variant="SplitMRSS r=16 α=0.875")
SPARSE = dict(variant="SparseMRSS r=32 ρ=0.125")


def layer(other, at=max):
    """Time of another whole layer over that of our Mamba-2 layer, at one of the lengths, and the unit it is told in."""
    return time_ratio("scan_layers", dict(variant=other), dict(variant="Mamba-2 (ours)"), pair=["length"], at=at), "×"


def designs(kind, design=SPLIT):
    """Time of the baseline over that of a design, at the largest batch; kind: the pass."""
    return time_ratio("mrss_proxy_results", BASELINE, design, pair=["batch"], experiment="designs", **{"pass": kind})


def quality(task, design=SPLIT):
    """Error of a design over that of the baseline, and the unit it is told in."""
    return seed_ratio("mrss_quality", "error", design, BASELINE, "train_seed", task=task), "×"


def decoding(other):
    """Time a token of another form over that of the state space that distillation gives."""
    return time_ratio("kernel_distillation_latency", other, distilled_order, words=["rank", "taps"], phase="decode",
                      kernel="per channel", per="tokens")


def dense_error(kind, saving=10):
    """Output error of a dense kernel, trained the way `kind`, at the largest rank that stores `saving` times fewer numbers."""
    def measure(place):
        table = place.read("kernel_distillation_quality.csv")
        where = dict(task="mixing", kind=kind, method="svd", saving=lambda s: s >= saving)
        chosen = table if table is None else rows(table, where)
        if chosen is None or chosen.empty:
            return None
        errors = chosen.sort_values("rank").groupby("seed")["output_error"].last()
        return Measured(errors.mean(), n=len(errors), source=f"kernel_distillation_quality.csv: {describe(where)}")
    return measure


FINDINGS = [
    Finding("mrss", "ssm", "Is MRSS faster than its baseline?",
            also(original("MRSS r=4", " (stock conv)"), fast=(original("MRSS r=4"), "×")),
            "As proposed (r = 4, the original's best) it is {answer}: {value}{interval} the baseline's time; with a faster "
            "convolution in both, {fast}."),
    Finding("split", "ssm", "Does splitting the channels by rate win?",
            also(designs("forward"), training=(designs("forward+backward"), "×"),
                 mild=(designs("forward", MILD), "×"), mild_training=(designs("forward+backward", MILD), "×"),
                 coarse=(designs("forward", COARSE), "×"), coarse_training=(designs("forward+backward", COARSE), "×")),
            "SplitMRSS with seven eighths of the channels at an eighth of the rate is {value}{interval} as fast as the "
            "baseline with the same fast convolution, {training} with gradients. Three quarters at an eighth: {mild}, "
            "{mild_training}. Seven eighths at a sixteenth: {coarse}, {coarse_training}."),
    Finding("split_error", "ssm", "What does that cost in quality?",
            also(quality("multi-timescale")[0], control=quality("short-timescale"), digits=quality("digits"),
                 mild_digits=quality("digits", MILD), coarse_digits=quality("digits", COARSE)),
            "The error, equal steps, as a multiple of the baseline's: {value}{interval} on several time scales; {control} on "
            "short ones, where it cannot help; {digits} on digits read pixel by pixel ({mild_digits} with three quarters of "
            "the channels, {coarse_digits} at a sixteenth)."),
    Finding("sparse", "ssm", "And the full rate only where it is needed?",
            also(designs("forward", SPARSE), error=quality("multi-timescale", SPARSE), control=quality("short-timescale", SPARSE),
                 digits=quality("digits", SPARSE)),
            "SparseMRSS (full rate in an eighth of the blocks) is {value}{interval} as fast, but its error is {error}, {control} "
            "and {digits} the baseline's on the same three tasks."),
    Finding("scan_library", "ssm", "Is our scan faster than the transformers library's?",
            also(time_ratio("scan_speed", dict(variant="SSD transformers, Q=256"), dict(variant="SSD (ours)"),
                            pair=["length"], **FORWARD), layer=layer("Mamba-2 transformers")),
            "Mamba-2's scan at {length} tokens: {value}{interval} as fast as the library's PyTorch path; the whole layer {layer}."),
    Finding("scan_attention", "ssm", "From which length on does a scan beat attention?",
            also(crossing("scan_crossover", variant="SSD (ours)", **FORWARD), late=layer("attention"), early=layer("attention", min)),
            "Mamba-2's scan against PyTorch's fused attention, forward: {crossing}. A whole Mamba-2 layer, with everything around "
            "the scan, is {late} as fast as an attention layer at {late_length} tokens, {early} at {early_length}.", ""),
    Finding("distil_decode", "ssm", "Does distilling a convolution speed decoding up?",
            also(decoding(explicit_form), blocks=(decoding(dict(method="blocked")), "×")),
            "A state space of {rank} modes, enough for every kernel of {taps} taps trained for it, decodes {value}{interval} "
            "as fast as the convolution; next to exact decoding in blocks it is {blocks} as fast."),
    Finding("scan_decode", "ssm", "Does a state decode faster than a cache?",
            also(decode(max), early=(decode(min), "×")),
            "After {context} tokens, a Mamba-2 layer decodes {value}{interval} as fast as an attention layer; after "
            "{early_context}, {early}."),
    Finding("distil_error", "ssm", "Do distilled kernels stay within one per cent?",
            also(claim("A18"), early=(dense_error("free"), "%")),
            "{answer}: a dense kernel with ten times fewer numbers, plainly trained to within one per "
            "cent of its own target, has {value}{interval} relative output error; after half the steps {early}.",
            "%", 0.01, ("Yes, given enough training", "Undecided", "No")),
    Finding("tokens_ours", "vlm", "How many tokens can go?",
            also(kept("ours"), vtp=(kept("vtp"), "%"), tome=(kept("tome"), "%"),
                 left=(cell("clip_equal_compute", "tokens_mean", n=None, method="ours", budget=0.5), ""),
                 of=(cell("clip_equal_compute", "tokens_last", n=None, method="dense"), "")),
            "Merging similar tokens our way, down to {left} of {of} on average over the layers ({share_of_dense_macs:.0%} of the "
            "multiply-adds), {value}{interval} of its zero-shot answers stay; with ToMe {tome}; keeping the patches of "
            "largest norm, as the original did, {vtp}.", "%"),
    Finding("tokens_tome", "vlm", "Is that better than ToMe?",
            tokens("agreement_minus_tome", n="n_images", method="ours"),
            "On the same images, at {macs_share:.0%} of the multiply-adds, it is {answer} ToMe: {value}{interval}.",
            "points", 0.0, ("worse than", "not distinguishable from", "better than")),
    Finding("tokens_time", "vlm", "Does the saving show on the clock?",
            also(halved(max), small=(halved(min), "×")),
            "At half the multiply-adds it is {value}{interval} as fast as the whole encoder at batch {batch}, {small} at batch "
            "{small_batch}."),
    Finding("tokens_input", "vlm", "Would a smaller image do as well?",
            also(halved(max, "smaller_input"), agreement=(tokens("top1_agreement", "n_images", "smaller_input"), "%"),
                 accuracy=(tokens("accuracy_minus_dense", "n_images", "smaller_input"), "points"),
                 ours=(tokens("accuracy_minus_dense", "n_images", "ours"), "points")),
            "Scaled down to half the multiply-adds it is {value}{interval} as fast at batch {batch}, but {agreement} of the "
            "answers stay. Accuracy changes by {accuracy}; with merging, by {ours}. (Enlarged CIFAR-10 images, which lose "
            "little.)"),
]


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
                    weights=place.weights, place=f"{place.suite}/{place.name}", source=measured.source,
                    words="; ".join(f"{k}={v}" for k, v in measured.words)))
    return found
