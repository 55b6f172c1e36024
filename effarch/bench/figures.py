"""One family of figures: colour-blind-safe, marked as well as coloured, each saying where it comes from."""

import io
import math
import re
import textwrap
from fractions import Fraction
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
# one thing has one colour in all figures: ours, what it is measured against, what the original report proposed
OURS, RIVAL, PROPOSED = PALETTE[2], PALETTE[0], PALETTE[1]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
LINES = ["-", "--", "-.", ":"]
STYLE = {
    "figure.figsize": (8, 4.5), "figure.dpi": 100, "font.size": 11, "axes.titlesize": 12,
    "lines.linewidth": 2,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "figure.constrained_layout.use": True, "legend.frameon": False, "axes.axisbelow": True,
}


def series_style(i):
    """Colour, marker and line style of series number i: told apart without colour, too. From the ninth on they are grey."""
    return dict(color=PALETTE[i] if i < 8 else "#999999", marker=MARKERS[i % 8], linestyle=LINES[i // 2 % 4])


def in_words(name):
    """What pictures say for a layer's name: 'MRSS r=4' is 'MRSS at 1/4', 'SplitMRSS r=8 α=0.875' is 'SplitMRSS: 7/8 at 1/8', and
    'SplitMRSS α=0.5' is 'SplitMRSS: 1/2 slow'."""
    share = lambda text: Fraction(text).limit_denominator(16)
    name = re.sub(r" r=(\d+) α=([\d.]+)", lambda found: f": {share(found[2])} at 1/{found[1]}", name)
    name = re.sub(r" α=([\d.]+)", lambda found: f": {share(found[1])} slow", name)
    return re.sub(r" r=(\d+)", r" at 1/\1", name)


def power_ticks(axis, values):
    """Make an axis (ax.xaxis or ax.yaxis) logarithmic to base 2 with plain labels at `values` only."""
    values = sorted(set(values))
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log", base=2)
    axis.set_ticks(values, [f"{value:g}" for value in values])
    axis.set_ticks([], minor=True)


def interval_bars(table, column):
    """(2, rows): distances from a column to its _low and _high, as errorbar's xerr or yerr wants them."""
    return [(table[column] - table[f"{column}_low"]).clip(lower=0), (table[f"{column}_high"] - table[column]).clip(lower=0)]


def pareto_front(points):
    """The names in {name: (cost, error)} that no other beats in both, the cheapest first; points with a NaN are left out."""
    ranked = sorted((name for name in points if all(map(math.isfinite, points[name]))), key=points.get)
    return [name for i, name in enumerate(ranked) if all(points[name][1] < points[other][1] for other in ranked[:i])]


def save_figure(run, fig, name, alt, n=None, photo=False, title=None):
    """Write `<figures>/<name>.png` and show it; `alt` describes it for who cannot see it.

    n: 'n of what', such as '20 rounds'. photo: a picture of photographs goes to `<name>.jpg` instead. title: what the
    figure says, above all of it. The footer names device, weights, dtype, torch, n and commit; a smoke run's figure is
    marked as no result."""
    facts = [run.row["device"], run.row["weights"], run.row["dtype"], f"torch {run.row['torch']}"]
    facts += [f"n = {n}"] if n is not None else []
    commit = run.row["git_commit"]
    facts += [f"commit {commit}{'+' if run.row['git_dirty'] else ''}"] if commit else []
    fig.supxlabel(" · ".join(filter(None, facts)), fontsize=8, color="#555555", x=0.99, ha="right")
    if title is not None:
        fig.suptitle(title)
    place_headline(fig)
    if run.smoke:
        fig.text(0.5, 0.5, "smoke run: not a result", fontsize=30, color="#D55E00", alpha=0.25,
                 ha="center", va="center", rotation=20)
    from effarch.bench.run import write_atomically

    picture = encode(fig, alt, photo, dpi=50 if run.smoke else 130)
    write_atomically(run.figures / f"{Path(name).stem}.{'jpg' if photo else 'png'}", picture)
    show(fig, picture, alt)
    plt.close(fig)
    print(f"{name}: {alt}")


def place_headline(fig, size=13):
    """Break a figure's title so that it fits beside a legend that stands outside at the right, and put it above one that
    stands outside at the top: the layout knows of one or the other, and would draw them over each other."""
    if len(fig.axes) == 1 and not fig.get_suptitle():  # an only axes' title is the figure's, and would not be broken
        fig.suptitle(fig.axes[0].get_title())
        fig.axes[0].set_title("")
    text = fig.get_suptitle()
    if not text:
        return
    outside = {place: [legend for legend in fig.legends if getattr(legend, "_outside_loc", None) == place] for place in ("upper", "right")}
    labels = [label for legend in outside["right"] for label in legend.get_texts()]
    beside = max((0.8 + 0.009 * label.get_fontsize() * len(label.get_text()) for label in labels), default=0)  # about its width in inches
    room = max(2.0, fig.get_figwidth() - 2 * beside)  # the title is centred
    broken, above = "\n".join(textwrap.fill(line, round(9 * room), break_on_hyphens=False) for line in text.split("\n")), outside["upper"]
    fig.suptitle("" if above else broken, fontsize=size)
    if above:
        above[0].set_title(broken, prop=dict(size=size))
        above[0].get_title().set_multialignment("center")


def show(fig, picture, alt):
    """Show what was written, in a notebook: the layout of a figure takes longer than all the rest, once is enough."""
    try:
        get_ipython()
    except NameError:
        return plt.show()
    from IPython.display import Image as Picture
    from IPython.display import display

    display(Picture(picture, alt=alt, width=round(100 * fig.get_figwidth())))


def encode(fig, alt, photo=False, dpi=130):
    """A figure as bytes with its description: PNG with a palette of 256 colours, JPEG for photographs."""
    raw, out = io.BytesIO(), io.BytesIO()
    fig.savefig(raw, format="png", dpi=dpi)
    image = Image.open(raw).convert("RGB")
    if photo:
        exif = Image.Exif()
        exif[0x010E] = alt.encode()  # ImageDescription; as text it would lose all but ASCII
        image.save(out, format="JPEG", quality=82, optimize=True, exif=exif)
    else:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("Description", alt)
        image.quantize(256, dither=Image.Dither.NONE).save(out, format="PNG", optimize=True, pnginfo=info)
    return out.getvalue()
