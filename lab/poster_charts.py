"""Charts with large text, drawn from the CSVs: for the poster and the README.

Each takes the axes and a Place, and returns the rows it shows; None (and nothing drawn) where there are none."""

import io

import pandas as pd
from matplotlib.ticker import NullFormatter

from lab.cells.figures import PALETTE, series_style
from lab.findings import BASELINE, FORWARD, original, rows, time_ratio

TEXT = 24  # points
STYLE = {"font.size": TEXT, "axes.titlesize": TEXT, "axes.labelsize": TEXT, "xtick.labelsize": TEXT, "ytick.labelsize": TEXT,
         "legend.fontsize": TEXT, "legend.frameon": False, "lines.linewidth": 5, "lines.markersize": 14,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
         "font.family": "DejaVu Sans"}


def named(table, column, names):
    """[(label, rows)] of those names that the table has."""
    found = [(label, table[table[column] == name]) for name, label in names.items()]
    return [(label, part) for label, part in found if len(part)]


def legend_beside(axes):
    """A legend to the right of the axes: at this size of text it would cover the lines."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.3, labelspacing=0.4, borderpad=0)


def shown(found):
    """The rows of [(label, row)] as a table."""
    return pd.DataFrame([row for _, row in found])


def footer(table, device):
    """'device · weights · dtype · torch · n · commit' of the rows that a chart shows."""
    row, counts = table.iloc[0], table["n_images" if "n_images" in table else "n_runs"].dropna()
    weights = [] if pd.isna(row.get("weights")) else [row["weights"]]
    facts = [device, *weights, row["dtype"], f"torch {row['torch']}"]
    if len(counts):
        low, high = int(counts.min()), int(counts.max())
        facts.append(f"n = {low}" if low == high else f"n = {low} to {high}")
    if not pd.isna(row["git_commit"]):
        facts.append(f"commit {row['git_commit']}{'+' if str(row['git_dirty']) == 'True' else ''}")
    return " · ".join(facts)


def bars(axes, labels, values, low, high, text, line=None, colours=None):
    """Horizontal bars from the top down, with intervals and the value at the end of each; line: a mark across all,
    which no value is written over."""
    y = range(len(values), 0, -1)
    axes.barh(y, values, 0.7, color=colours or [PALETTE[i % 8] for i in range(len(values))])
    axes.errorbar(values, y, xerr=[[v - a for v, a in zip(values, low, strict=True)],
                                   [b - v for v, b in zip(values, high, strict=True)]], fmt="none", color="black", capsize=8)
    if line is not None:
        axes.axvline(line, color="black", linewidth=3)
    for at, value, end in zip(y, values, high, strict=True):
        end = max(end, value)
        axes.text(end if line is None or end > line else line, at, f"  {text(value)}", va="center", fontsize=TEXT)
    axes.set_yticks(list(y), labels)
    axes.grid(axis="y", visible=False)


def designs(axes, place):
    """The layers as boxes: height is channels, width is time; where MRSS was measured."""
    table = place.read("mrss_proxy_results.csv")
    if table is None:
        return None
    full, low, gate = PALETTE[5], PALETTE[4], PALETTE[3]
    stacks = {"Baseline": [(full, 4, 1)], "MRSS": [(full, 4, 1), (low, 4, 1), (gate, 4, 1)],
              "SplitMRSS": [(full, 1, 1), (low, 3, 1)], "SparseMRSS": [(full, 1, 0.125), (low, 3, 1)]}
    for x, (name, parts) in enumerate(stacks.items()):
        bottom = 0
        for colour, channels, share in parts:
            steps = [(x + 0.1 * i, 0.03) for i in range(8)] if colour == low else [(x, 0.8 * share)]
            for left, width in steps:
                axes.bar(left, channels, width, bottom, align="edge", color=colour, edgecolor="black", linewidth=1.5)
            bottom += channels
        axes.text(x + 0.4, 12.6, name, ha="center", fontsize=TEXT)
    for colour, label in ((full, "full rate"), (low, "every r-th step"), (gate, "gate, full rate")):
        axes.bar(0, 0, color=colour, edgecolor="black", label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, columnspacing=1, handlelength=1.2)
    axes.set(xlim=(-0.05, 3.85), ylim=(0, 12.2), xticks=[], yticks=[], ylabel="channels →")
    axes.grid(visible=False)
    return table


def rates(axes, place):
    """Time of a forward pass relative to the baseline with the same fast convolution: MRSS as proposed, then ours."""
    table = place.read("mrss_proxy_results.csv")
    if table is None:
        return None
    table = rows(table, FORWARD)
    ours = [v for v in rows(table, dict(experiment="designs"))["variant"].unique() if v.startswith(("Split", "Sparse"))]
    ratios = {f"MRSS r={r}": original(f"MRSS r={r}") for r in (1, 2, 4, 8)}
    ratios |= {name.replace("MRSS r", " r"): time_ratio(
        "mrss_proxy_results", dict(variant=name), BASELINE, pair=["batch"], experiment="designs", **FORWARD) for name in ours}
    found = [(label, measured) for label, measure in ratios.items() if (measured := measure(place))]
    if not found:
        return None
    high = [measured.high for _, measured in found]
    bars(axes, [label for label, _ in found], [measured.value for _, measured in found], [measured.low for _, measured in found],
         high, lambda v: f"{v:.2f}×", line=1, colours=[PALETTE[1 if label.startswith("MRSS") else 2] for label, _ in found])
    axes.set(xlabel="time, × the baseline's")
    axes.set_xlim(0, max(high) * 1.25)
    return table[table["experiment"].isin(["original", "designs"])]


def scan(axes, place):
    """Time of a forward pass over the sequence length."""
    table = place.read("scan_speed.csv")
    if table is None:
        return None
    names = {"attention (sdpa)": "attention", "S6 transformers": "Mamba, lib.", "SSD transformers, Q=256": "Mamba-2, lib.",
             "S6 (ours)": "Mamba, here", "SSD (ours)": "Mamba-2, here"}
    series = named(rows(table, {"pass": "forward"}), "variant", names)
    if not series:
        return None
    for i, (label, part) in enumerate(series):
        part = part.sort_values("length")
        axes.plot(part["length"], part["latency_ms_median"], label=label, **series_style(i))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds")
    lengths = sorted(table["length"].unique())[::-2][::-1]
    axes.set_xticks(lengths, [f"{t // 1024}k" if t >= 1024 else str(t) for t in lengths])
    axes.minorticks_off()
    legend_beside(axes)
    return pd.concat([part for _, part in series])


def distilled(axes, place):
    """Microseconds that one decoded token costs."""
    table = place.read("kernel_distillation_latency.csv")
    if table is None:
        return None
    table = rows(table, {"phase": "decode", "kernel": "per channel"})
    explicit = table[table["method"].str.startswith("explicit")].sort_values("us_per_token").head(1)
    parts = [("convolution", explicit), ("exact, in blocks", table[table["method"] == "blocked"])]
    parts += [(f"{r} modes", table[(table["method"] == "hankel") & (table["rank"] == r)]) for r in (4, 8, 16, 32)]
    parts = [(label, part.iloc[0]) for label, part in parts if len(part)]
    if not parts:
        return None
    low, high = ([row[f"latency_ms_{q}"] * 1e3 / row["tokens"] for _, row in parts] for q in ("p20", "p80"))
    bars(axes, [label for label, _ in parts], [row["us_per_token"] for _, row in parts], low, high, lambda v: f"{v:,.0f}" if v >= 10 else f"{v:.2g}")
    axes.set(xscale="log", xlabel="microseconds a token (p20 to p80)")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(right=axes.get_xlim()[1] * 2.5)
    return shown(parts)


NAMES = {"ours": "ours", "tome": "ToMe", "cls_merge": "CLS, merged", "evit": "EViT",
         "smaller_input": "smaller input", "vtp": "original rule"}


def tokens(axes, place):
    """Agreement with the whole encoder over the share of its multiply-adds."""
    table = place.read("token_reduction_methods.csv")
    if table is None or "top1_agreement" not in table:
        return None
    series = named(table.dropna(subset=["top1_agreement"]), "method", NAMES)
    if not series:
        return None
    for i, (label, part) in enumerate(series):
        part = part.sort_values("macs_share")
        spread = [100 * (part["top1_agreement"] - part["top1_agreement_low"]),
                  100 * (part["top1_agreement_high"] - part["top1_agreement"])]
        axes.errorbar(100 * part["macs_share"], 100 * part["top1_agreement"], yerr=spread, label=label, elinewidth=2, capsize=6,
                      **series_style(i))
    axes.plot(100, 100, "k*", markersize=24, label="dense", linestyle="none")
    axes.set(xlabel="multiply-adds, % of dense", ylabel="same answers, %")
    legend_beside(axes)
    return pd.concat([part for _, part in series])


def clock(axes, place):
    """Time of methods at half the multiply-adds, as a share of the whole encoder's."""
    table = place.read("token_reduction_latency.csv")
    if table is None or "latency_vs_dense" not in table:
        return None
    table = rows(table, dict(budget=0.5)).dropna(subset=["latency_vs_dense"])
    table = table[table["batch"] == table["batch"].max()]
    found = [(label, part.iloc[0]) for label, part in named(table, "method", NAMES)]
    if not found:
        return None
    low, high = ([100 * row[f"latency_vs_dense_{end}"] for _, row in found] for end in ("low", "high"))
    bars(axes, [label for label, _ in found], [100 * row["latency_vs_dense"] for _, row in found], low, high,
         lambda v: f"{v:.0f} %", line=50)
    axes.set(xlabel=f"time, % of the whole encoder (batch {found[0][1]['batch']:.0f})")
    axes.set_xlim(0, max(100, max(high)) * 1.15)
    return shown(found)


# suite, file in figures/report, title, chart, description: the README's two figures
HEADLINES = [
    ("ssm", "rates.png", "Time relative to the baseline", rates,
     "Time of a forward pass of MRSS and of the designs that split channels by rate, relative to the baseline with the same "
     "convolution, with 95 % intervals; left of the line is faster."),
    ("vlm", "tokens.png", "Answers that stay, over compute", tokens,
     "Share of zero-shot answers that stay the same against the share of multiply-adds, for several ways to drop or merge "
     "tokens."),
]


def headline(title, chart, place, mark, alt):
    """One of the README's figures as PNG bytes; None where the chart's CSV is missing."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 6.6), layout="constrained")
        axes = figure.add_subplot()
        table = chart(axes, place)
        if table is None:
            return None
        axes.set_title(title, loc="left", fontweight="bold")
        figure.supxlabel(footer(table, place.device), fontsize=13, color="#555555", x=0.99, ha="right")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120, metadata={"Description": alt, "Comment": mark})
    return out.getvalue()
