"""One family of figures: colour-blind-safe, marked as well as coloured, each saying where it comes from."""

import io

import matplotlib.pyplot as plt

from lab.cells.environment import write_atomically

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
LINES = ["-", "--", "-.", ":"]
STYLE = {
    "figure.figsize": (8, 4.5), "figure.dpi": 100, "font.size": 11, "axes.titlesize": 12,
    "lines.linewidth": 2,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "figure.constrained_layout.use": True, "legend.frameon": False, "axes.axisbelow": True,
}


def series_style(i):
    """Colour, marker and line style of series number i: told apart without colour, too."""
    return dict(color=PALETTE[i % 8], marker=MARKERS[i % 8], linestyle=LINES[i // 2 % 4])


def save_figure(run, fig, name, alt, n=None):
    """Write `<figures>/<name>` (PNG, 200 dpi; `alt` describes it for who cannot see it) and show it.

    The footer names device, weights, dtype, torch, n and commit; a smoke run's figure is marked as no result."""
    facts = [run.row["device"], run.row["weights"], run.row["dtype"], f"torch {run.row['torch']}"]
    facts += [f"n = {n}"] if n is not None else []
    commit = run.row["git_commit"]
    facts += [f"commit {commit}{'+' if run.row['git_dirty'] else ''}"] if commit else []
    fig.supxlabel(" · ".join(filter(None, facts)), fontsize=8, color="#555555", x=0.99, ha="right")
    if run.smoke:
        fig.text(0.5, 0.5, "smoke run: not a result", fontsize=30, color="#D55E00", alpha=0.25,
                 ha="center", va="center", rotation=20)
    image = io.BytesIO()
    fig.savefig(image, format="png", dpi=200, metadata={"Description": alt})
    write_atomically(run.figures / name, image.getvalue())
    plt.show()
    plt.close(fig)
    print(f"{name}: {alt}")
