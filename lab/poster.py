"""results/poster.pdf: one A1 page for a wall, landscape, legible from two metres. Sizes are in inches and points."""

import io

import matplotlib

from lab import poster_charts
from lab import report as text
from lab.cells.figures import PALETTE

WIDTH, HEIGHT = 33.11, 23.39
MARGIN, GAP = 0.7, 0.45
COLUMN = 11.0  # of the findings; the figures share the rest
SMALLEST = 24  # points
INK, SOFT = "#1c2126", "#4d5761"
QUESTION = ("How cheap can a Mamba-like sequence layer get, and how few vision tokens does CLIP need? "
            "We measured what an earlier report claimed, built what should work better, and compared both fairly.")
METHOD = ("Method: every comparison runs in one process on the same input, interleaved round by round; the fast form "
          "is first proved equal to the naive one. In parentheses: 95 % intervals. Numbers come from CSV files.")
REFERENCES = ("References: Mamba, Gu & Dao, arXiv:2312.00752 · Mamba-2 (SSD), Dao & Gu, arXiv:2405.21060 · S4D, Gu et al., "
              "arXiv:2206.11893 · Octave convolution, Chen et al., arXiv:1904.05049 · Laughing Hyena, Massaroli et al., "
              "arXiv:2310.18780 · CLIP, Radford et al., arXiv:2103.00020 · Token merging, Bolya et al., arXiv:2210.09461 · "
              "EViT, Liang et al., arXiv:2202.07800")
# suite, caption, chart: drawn for the first device (a GPU where there is one) that has the CSV
CHARTS = [("ssm", "What runs when: channels over time", poster_charts.designs),
          ("ssm", "Several rates: time relative to the baseline", poster_charts.rates),
          ("ssm", "A scan against attention: time over length", poster_charts.scan),
          ("ssm", "A long convolution, distilled: cost of a token", poster_charts.distilled),
          ("vlm", "Fewer tokens: answers kept over compute", poster_charts.tokens),
          ("vlm", "Half the multiply-adds: time of the whole encoder", poster_charts.clock)]


def text_width(words, size, weight="normal"):
    """Width in inches of one line in the poster's font."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(words, font, False)[0] / 72


def wrap(words, size, width, weight="normal"):
    """Lines of `words` that fit into `width` inches."""
    lines = [""]
    for word in words.split(" "):  # a no-break space is part of its word
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


class Page:
    """A matplotlib figure with the origin at the top left, in inches."""

    def __init__(self):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white", dpi=72)
        FigureCanvasAgg(self.figure)

    def lines(self, lines, x, y, size, weight="normal", color=INK):
        """Write lines downwards from y; returns the y below them."""
        for line in lines:
            self.figure.text(x / WIDTH, 1 - y / HEIGHT, line, size=size, weight=weight, color=color, va="top",
                             family="DejaVu Sans", parse_math=False)
            y += height(size)
        return y

    def paragraph(self, words, x, y, width, size, weight="normal", color=INK):
        """Write a wrapped paragraph; returns the y below it."""
        return self.lines(wrap(words, size, width, weight), x, y, size, weight, color)


def height(size):
    """Inches from one line to the next."""
    return 1.28 * size / 72


def draw_header(page, report):
    """Title, question, method; on the right the claims in numbers. Returns the y below."""
    left = WIDTH - 2 * MARGIN - 9.2
    y = page.lines(["Efficient Architectures"], MARGIN, MARGIN, 76, "bold")
    y = page.paragraph(QUESTION, MARGIN, y + 0.1, left, 32)
    y = page.paragraph(METHOD, MARGIN, y + 0.12, left, 24, color=SOFT)
    x, top = WIDTH - MARGIN - 8.6, MARGIN
    top = page.lines(["Claims of the original report"], x, top, 32, "bold") + 0.1
    for suite, counts in text.verdict_counts(report.claims).items():
        top = page.lines([f"{text.SUITES[suite]}, {sum(counts.values())} claims"], x, top, 26, color=SOFT)
        colours, begin = [PALETTE[2], PALETTE[1], "#9aa4ae"], x
        for n, colour in zip(counts.values(), colours, strict=True):
            share = 8.6 * n / max(sum(counts.values()), 1)
            axes = page.figure.add_axes([begin / WIDTH, 1 - (top + 0.3) / HEIGHT, share / WIDTH, 0.3 / HEIGHT])
            axes.set_facecolor(colour)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            begin += share
        words = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
        top = page.paragraph(words, x, top + 0.38, 8.6, 24) + 0.12
    return max(y, top)


def finding_lines(row, size, device):
    """(question, answer) of a finding as wrapped lines for the left column; device: named above all of them."""
    notes = [row["device"]] * (row["device"] != device) + [f"n\u00a0=\u00a0{text.number(row['n'])}"] * (not text.pd.isna(row["n"]))
    question = wrap(row["question"], size + 2, COLUMN, "bold")
    return question, wrap(row["answer"] + (f" [{', '.join(notes)}]" if notes else ""), size, COLUMN)


def draw_findings(page, report, y, bottom):
    """The findings in the left column, as large as they fit, but never below SMALLEST."""
    y = page.lines(["Findings"], MARGIN, y, 40, "bold", PALETTE[0]) + 0.05
    if report.findings.empty:
        page.paragraph("No run has finished yet.", MARGIN, y, COLUMN, 26)
        return
    rows = report.findings.drop_duplicates("key").to_dict("records")  # the first device: a GPU where there is one
    device = max({row["device"] for row in rows}, key=[row["device"] for row in rows].count)
    y = page.paragraph(f"On {device}, where no other device is named.", MARGIN, y, COLUMN, SMALLEST, color=SOFT) + 0.15
    sizes = [30, 28, 26, 25, SMALLEST]
    while rows:
        size = sizes.pop(0) if sizes else SMALLEST
        lines = [finding_lines(row, size, device) for row in rows]
        heights = [len(q) * height(size + 2) + len(a) * height(size) for q, a in lines]
        if y + sum(heights) + 0.18 * len(rows) <= bottom:
            break
        if not sizes:  # too much at the smallest size: the last finding of the suite with the most has to go
            suites = [row["suite"] for row in rows]
            most = max(dict.fromkeys(suites), key=suites.count)
            rows.pop(len(rows) - 1 - suites[::-1].index(most))
    gap = min(0.6, max(0.18, (bottom - y - sum(heights)) / len(rows)))
    for question, words in lines:
        y = page.lines(question, MARGIN, y, size + 2, "bold")
        y = page.lines(words, MARGIN, y, size) + gap


def drawn_chart(report, page, suite, chart, box):
    """Draw a chart into box (x, y, width, height); returns its footer, or None without a CSV for it."""
    x, y, width, tall = box
    with matplotlib.rc_context(poster_charts.STYLE):
        axes = page.figure.add_axes([x / WIDTH, 1 - (y + tall) / HEIGHT, width / WIDTH, tall / HEIGHT])
        for place in report.places:
            table = chart(axes, place) if place.suite == suite else None
            if table is not None:
                inside = axes.get_tightbbox(page.figure.canvas.get_renderer()).transformed(page.figure.dpi_scale_trans.inverted())
                frame = axes.get_window_extent().transformed(page.figure.dpi_scale_trans.inverted())
                left, below = frame.x0 - inside.x0 + 0.1, frame.y0 - inside.y0 + 0.05
                right, above = max(0, inside.x1 - frame.x1) + 0.1, max(0, inside.y1 - frame.y1) + 0.05
                axes.set_position([(x + left) / WIDTH, 1 - (y + tall - below) / HEIGHT,
                                   (width - left - right) / WIDTH, (tall - below - above) / HEIGHT])
                return poster_charts.footer(table, place.device)
        axes.remove()
    return None


def draw_figures(page, report, y, bottom):
    """The method's diagram and the charts, two columns, on the right."""
    probe = Page()
    panels = [(caption, suite, chart) for suite, caption, chart in CHARTS
              if drawn_chart(report, probe, suite, chart, (0, 0, 10, 5))]
    if not panels:
        return
    left = MARGIN + COLUMN + GAP
    width = (WIDTH - MARGIN - left - GAP) / 2
    space = (bottom - y) / max(2, -(-len(panels) // 2))
    for i, (caption, suite, chart) in enumerate(panels):
        x, top = left + (i % 2) * (width + GAP), y + i // 2 * space
        below = page.paragraph(caption, x, top, width, 26, "bold", PALETTE[0]) + 0.05
        tall = top + space - below - 0.3 - height(SMALLEST)
        notes = drawn_chart(report, page, suite, chart, (x, below, width, tall)).split(" · ")
        if chart is not poster_charts.designs:
            page.lines([", ".join(note for note in notes if not note.startswith(("float", "torch", "commit")))],
                       x, below + tall, SMALLEST, color=SOFT)


def draw(report):
    """The poster as a matplotlib figure."""
    page = Page()
    top = draw_header(page, report) + 0.35
    references = wrap(REFERENCES, SMALLEST, WIDTH - 2 * MARGIN)
    bottom = HEIGHT - 0.5 - len(references) * height(SMALLEST)
    page.lines(references, MARGIN, bottom, SMALLEST, color=SOFT)
    draw_findings(page, report, top, bottom - 0.25)
    draw_figures(page, report, top, bottom - 0.15)
    return page.figure


def pdf(report, mark):
    """The poster as PDF bytes, the same for the same inputs. mark: the fingerprint of what it is made of."""
    out = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        draw(report).savefig(out, format="pdf", metadata={
            "Title": "Efficient Architectures", "Keywords": mark, "CreationDate": None})
    return out.getvalue()
