"""Charts with large text, drawn from the CSVs: three for the README, all for the poster.

Each takes the axes and a Place and returns the rows it shows; Missing (and nothing drawn) where there are none. Sizes
come from rcParams, so that the same chart suits a wall and a phone."""

import struct
import textwrap
import warnings
import zlib

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from effarch.bench.figures import (
    OURS,
    PALETTE,
    PROPOSED,
    RIVAL,
    encode,
    in_words,
    interval_bars,
    series_style,
)
from lab.report.findings import BASELINE, find, original
from lab.report.select import Missing, Times, rows
from lab.report.text import answer_parts

TEXT = 24  # points, on the poster
STYLE = {"font.size": TEXT, "axes.titlesize": TEXT, "axes.labelsize": TEXT, "xtick.labelsize": TEXT, "ytick.labelsize": TEXT,
         "legend.fontsize": TEXT, "legend.frameon": False, "lines.linewidth": 5, "lines.markersize": 14,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
         "font.family": "DejaVu Sans"}
SMALL = STYLE | {name: 16 for name in STYLE if name.endswith("size") and name != "lines.markersize"} | {
    "lines.linewidth": 3, "lines.markersize": 9}
GREY = "#8a949e"
PLAIN = "#000000"


def text_size():
    """Points of all text in the chart that is being drawn."""
    return matplotlib.rcParams["font.size"]


def named(table, column, names):
    """[(label, rows)] of those names that the table has."""
    found = [(label, table[table[column] == name]) for name, label in names.items()]
    found = [(label, part) for label, part in found if len(part)]
    if not found:
        raise Missing(column)
    return found


def footer(table, device):
    """'device · weights · dtype · torch · n · commit' of the rows that a chart shows."""
    row = table.iloc[0]
    counted = next((c for c in ("n_pictures", "n_images", "n_runs") if c in table and table[c].notna().any()), None)
    weights = [] if pd.isna(row.get("weights")) else [row["weights"]]
    facts = [device, *weights, " and ".join(sorted(set(table["dtype"]), reverse=True)), f"torch {row['torch']}"]
    if counted:
        low, high = int(table[counted].min()), int(table[counted].max())
        facts.append(f"{low if low == high else f'{low} to {high}'} {dict(n_runs='rounds').get(counted, counted.removeprefix('n_'))}")
    if not pd.isna(row["git_commit"]):
        facts.append(f"commit {row['git_commit']}{'+' if str(row['git_dirty']) == 'True' else ''}")
    return " · ".join(facts)


def name_share(axes, names):
    """The share of the axes' width that the longest of some names takes, with a little room."""
    inches = axes.get_window_extent().width / axes.figure.dpi
    return min(0.6, (0.62 * max(map(len, names)) + 1) * text_size() / 72 / inches)


def write_names(axes, points, side):
    """Write each series' name beside a point, on one side ('left' or 'right'): [(x, y, name, colour)].

    Names that would touch move apart, upwards."""
    engine = axes.figure.get_layout_engine()
    if engine:
        engine.execute(axes.figure)
    axes.get_xlim(), axes.get_ylim()  # settles the limits
    scale = axes.figure.dpi / 72
    gap = 1.15 * text_size() * scale
    last = axes.get_window_extent().y0 - gap / 2
    for x, y, name, colour in sorted(points, key=lambda point: point[1]):
        up = axes.transData.transform((x, y))[1]
        last = max(up, last + gap)
        axes.annotate(name, (x, y), ((-1 if side == "left" else 1) * 0.6 * text_size(), (last - up) / scale), va="center",
                      ha="right" if side == "left" else "left", textcoords="offset points", color=colour, annotation_clip=False)


def bars(axes, labels, values, low, high, text, line=None, colours=None):
    """Horizontal bars from the top down, with intervals and the value at the end of each; line: a mark across all,
    which no value is written over."""
    y = range(len(values), 0, -1)
    axes.barh(y, values, 0.7, color=colours or [PALETTE[i % 8] for i in range(len(values))])
    axes.errorbar(values, y, xerr=[[max(0, v - a) for v, a in zip(values, low, strict=True)],
                                   [max(0, b - v) for v, b in zip(values, high, strict=True)]],
                  fmt="none", color="black", elinewidth=text_size() / 10, capsize=text_size() / 4)
    if line is not None:
        axes.axvline(line, color="black", linewidth=text_size() / 9)
    for at, value, end in zip(y, values, high, strict=True):
        end = max(end, value)
        axes.text(end if line is None or end > line else line, at, f" {text(value)}", va="center")
    axes.set_yticks(list(y), labels)
    axes.grid(axis="y", visible=False)


def designs(axes, place):
    """The layers as boxes: height is channels, width is time; where MRSS was measured."""
    table = place.table("mrss_proxy_results")
    full, low, gate = PALETTE[5], PALETTE[4], PALETTE[3]
    stacks = {"Baseline": [(full, 4, 1)], "MRSS": [(full, 4, 1), (low, 4, 1), (gate, 4, 1)],
              "SplitMRSS": [(full, 1, 1), (low, 3, 1)]}
    for x, (name, parts) in enumerate(stacks.items()):
        bottom = 0
        for colour, channels, share in parts:
            steps = [(x + 0.1 * i, 0.03) for i in range(8)] if colour == low else [(x, 0.8 * share)]
            for left, width in steps:
                axes.bar(left, channels, width, bottom, align="edge", color=colour, edgecolor="black", linewidth=1.5)
            bottom += channels
        axes.text(x + 0.4, 12.6, name, ha="center")
    for colour, label in ((full, "full rate"), (low, "every few steps"), (gate, "gate, full rate")):
        axes.bar(0, 0, color=colour, edgecolor="black", label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, columnspacing=1, handlelength=1.2)
    axes.set(xlim=(-0.05, 2.85), ylim=(0, 12.2), xticks=[], yticks=[], ylabel="channels →")
    axes.grid(visible=False)
    return table


def rates(axes, place):
    """Time of a forward pass over that of the baseline with the same convolution: MRSS as proposed, then ours."""
    table = rows(place.table("mrss_proxy_results"), {"pass": "forward"})
    ours = [v for v in rows(table, dict(experiment="designs"))["variant"].unique() if v.startswith("Split")]
    ratios = {f"MRSS, {word} step": original(f"MRSS r={r}", " (stock conv)") for r, word in {1: "every", 2: "every 2nd", 4: "every 4th", 8: "every 8th"}.items()}
    ratios |= {in_words(name).replace("SplitMRSS: ", "").replace(" at 1/", " every ") + "th step": Times("mrss_proxy_results", dict(variant=name), BASELINE,
                                        {"experiment": "designs", "pass": "forward", "batch": max}) for name in ours}
    found = {label: measured.estimate for label, number in ratios.items() if (measured := find(number, place))}
    if not found:
        raise Missing("designs")
    bars(axes, list(found), *([getattr(e, part) for e in found.values()] for part in ("value", "low", "high")),
         lambda v: f"{v:.2f}×", line=1, colours=[PROPOSED if label.startswith("MRSS") else OURS for label in found])
    axes.text(1, len(found) + 0.75, " baseline", va="center")
    axes.set(xlabel="time over the baseline's", ylim=(0.4, len(found) + 1.1))
    axes.set_xlim(0, max(e.high for e in found.values()) * 1.25)
    return table[table["experiment"].isin(["original", "designs"])]


def lengths_axis(axes, lengths, label):
    """A logarithmic axis of lengths, at most seven of them named."""
    lengths = sorted(lengths)
    lengths = lengths[::-1][::max(1, -(-len(lengths) // 7))][::-1]
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds")
    axes.set_xticks(lengths, [f"{t // 1024:.0f}k" if t >= 1024 else f"{t:.0f}" for t in lengths])
    axes.minorticks_off()


def lines(axes, series, along, colours):
    """Medians over a length, each line named at its end; returns the rows shown."""
    ends = []
    for i, (label, part) in enumerate(series):
        part = part.sort_values(along)
        axes.plot(part[along], part["latency_ms_median"], **series_style(i) | dict(color=colours[label]))
        ends.append((part[along].iloc[-1], part["latency_ms_median"].iloc[-1], label, colours[label]))
    shown = pd.concat([part for _, part in series])
    lengths_axis(axes, shown[along].unique(), {"length": "tokens", "context": "tokens in the context"}[along])
    left, right = axes.get_xlim()
    room = name_share(axes, [label for label, _ in series])
    axes.set_xlim(left, left * (right / left) ** (1 / (1 - room)))
    write_names(axes, ends, "right")
    return shown


def layers(axes, place):
    """Time of a whole layer over the length of the sequence, of each the faster precision or chunk size."""
    table = place.table("scan_layers")
    table = table.assign(at=table["length"]).sort_values("latency_ms_median").dropna(subset=["latency_ms_median"])
    names = {"attention": "attention", "Mamba-2 (ours)": "Mamba-2 (ours)", "Mamba-2 transformers": "transformers' Mamba-2"}
    series = [(label, table[table["variant"].str.startswith(name)].drop_duplicates("length")) for name, label in names.items()]
    series = [(label, part) for label, part in series if len(part)]
    if not series:
        raise Missing("layers")
    return lines(axes, series, "length", dict(zip(names.values(), (RIVAL, OURS, GREY), strict=True)))


NAMES = {"ours": "ours", "tome": "ToMe", "cls_merge": "CLS, merged", "evit": "EViT, averaged",
         "smaller_input": "smaller image", "vtp": "original rule"}
HIGHLIGHTS = {"ours": OURS, "ToMe": RIVAL, "original rule": PROPOSED, "smaller image": PLAIN}


def tokens(axes, place):
    """Change of accuracy over the share of the whole encoder's multiply-adds; four methods stand out."""
    table, column = place.table("token_reduction_methods"), "accuracy_minus_dense"
    if column not in table:
        raise Missing(column)
    series = named(table.dropna(subset=[column]), "method", NAMES)
    names = []
    for i, (label, part) in enumerate(series):
        part, colour = part.sort_values("macs_share"), HIGHLIGHTS.get(label, GREY)
        x, y = 100 * part["macs_share"], 100 * part[column]
        spread = [100 * ends for ends in interval_bars(part, column)]
        style = series_style(i) | dict(color=colour, zorder=3 if label in HIGHLIGHTS else 2)
        axes.errorbar(x, y, yerr=spread, elinewidth=text_size() / 12, capsize=text_size() / 5, **style)
        names.append((x.iloc[0], y.iloc[0], label, colour))
    axes.plot(100, 0, "k*", markersize=0.9 * text_size(), linestyle="none")
    axes.annotate("whole model", (101.5, 0), (0, -1.1 * text_size()), ha="right", va="center", textcoords="offset points")
    left = min(x for x, *_ in names) - 1
    room = name_share(axes, [label for label, _ in series])
    axes.set(xlabel="multiply-adds left, %", ylabel="± accuracy, points", xlim=(left - (102 - left) * room / (1 - room), 102))
    ticks = [t for t in range(10, 101, 10) if t >= left - 5]
    axes.set_xticks(ticks[::-1][::2][::-1] if len(ticks) > 5 else ticks)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    write_names(axes, [(left, y, label, colour) for _, y, label, colour in names], "left")
    return pd.concat([part for _, part in series])


def clock(axes, place):
    """Time of methods at half the multiply-adds, as a share of the whole encoder's."""
    table = rows(place.table("token_reduction_latency"), dict(budget=0.5))
    if "latency_vs_dense" not in table or table["latency_vs_dense"].isna().all():
        raise Missing("latency_vs_dense")
    table = table.dropna(subset=["latency_vs_dense"])
    found = [(label, part.iloc[0]) for label, part in named(table[table["batch"] == table["batch"].max()], "method", NAMES)]
    low, high = ([100 * row[f"latency_vs_dense_{end}"] for _, row in found] for end in ("low", "high"))
    bars(axes, [label for label, _ in found], [100 * row["latency_vs_dense"] for _, row in found], low, high,
         lambda v: f"{v:.0f} %", line=50, colours=[HIGHLIGHTS.get(label, GREY) for label, _ in found])
    axes.set(xlabel="time, % of the whole encoder's")
    axes.set_xlim(0, max(100, max(high)) * 1.15)
    return pd.DataFrame([row for _, row in found])


# the README's three pictures: the finding they stand below, file in figures/report, a short question (the title, with the
# finding's verdict), chart, description
HEADLINES = [
    ("mrss", "rates.png", "Is MRSS faster?", rates,
     "Time of a forward pass relative to the baseline with the same convolution, with 95 % intervals: MRSS as proposed, its second branch at every step, every "
     "second and so on, then designs that run a share of the channels at every eighth or sixteenth step only. Left of the line is faster."),
    ("scan_attention", "layers.png", "Mamba or attention?", layers,
     "Milliseconds of a whole layer over the length of the sequence, each in its faster precision: attention, Mamba-2 written here, "
     "Mamba-2 of the transformers library with its faster chunk size, where it fits into memory."),
    ("tokens_free", "tokens.png", "Tokens to spare?", tokens,
     "Change of class-name accuracy against the share of multiply-adds that is left, for several ways to drop or merge "
     "tokens. The star is the whole encoder."),
]


def drawn(chart, axes, place):
    """chart(axes, place), or None where its rows are missing; a column that is not there is told and gives None."""
    try:
        return chart(axes, place)
    except Missing:
        return None
    except KeyError as error:
        warnings.warn(f"{place.path}: the chart {chart.__name__}: no column {error}", stacklevel=2)
        return None


def picture(title, chart, place, mark, alt):
    """One of the README's pictures as PNG bytes; None where the chart's rows are missing."""
    with matplotlib.rc_context(SMALL):
        figure = Figure(figsize=(7, 4.6), layout="constrained", dpi=100)
        axes = figure.add_subplot()
        axes.set_title(title := textwrap.fill(title, 46), loc="left", fontweight="bold")
        table = drawn(chart, axes, place)
        if table is None:
            return None
        figure.supxlabel(footer(table, place.device), fontsize=8, color="#555555", x=0.99, ha="right")
        axes.clear()  # again, now that the labels and the title have their room
        axes.set_title(title, loc="left", fontweight="bold")
        chart(axes, place)
        return stamped(encode(figure, alt, dpi=120), mark)


def stamped(png, mark):
    """PNG bytes that carry the fingerprint of what they were made of, as a comment."""
    chunk = b"tEXtComment\0" + mark.encode()
    end = png[-12:]  # the IEND chunk
    return png[:-12] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end


def verdict_at(report, key, place):
    """The verdict that a finding has at a place: 'No: 1.8× the time'; '' where it has none."""
    mine = report.findings[(report.findings["key"] == key) & (report.findings["place"] == place.path)]
    return answer_parts(mine["answer"].iloc[0])[0].removesuffix(".") if len(mine) else ""


def headlines(report):
    """[(key, path, alt, PNG bytes)] of the README's pictures: of the first device (a GPU where there is one) that can."""
    drawn = []
    for key, name, question, chart, alt in HEADLINES:
        suite = next(iter(report.findings.loc[report.findings["key"] == key, "suite"]), None)
        images = (picture(f"{question} {verdict_at(report, key, place)}".strip(), chart, place, report.mark, alt)
                  for place in report.shown_places if place.suite == suite)
        image = next((image for image in images if image), None)
        if image:
            drawn.append((key, report.root / "figures" / "report" / name, alt, image))
    return drawn
