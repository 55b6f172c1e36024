"""results/poster.pdf: one A1 page for a wall, landscape, legible from two metres. Sizes are in inches and points."""

import io
import re

import matplotlib

from effarch.bench.figures import PALETTE
from lab.report import charts, text

WIDTH, HEIGHT = 33.11, 23.39
MARGIN, GAP = 0.7, 0.45
COLUMN = 11.0  # of the findings; the figures share the rest
SMALLEST = 24  # points
INK, SOFT = "#1c2126", "#4d5761"
QUESTION = ("How cheap can a Mamba-like sequence layer get, and how few vision tokens does CLIP need? "
            "We measured what an earlier report claimed, built what should work better, and compared both fairly.")
METHOD = ("Method: every comparison runs in one process on the same input, interleaved round by round; the fast form "
          "is first proved equal to the naive one. In parentheses: 95 % intervals. A verdict uses the whole interval.")
REFERENCES = ("References: Mamba, Gu & Dao, arXiv:2312.00752 · Mamba-2 (SSD), Dao & Gu, arXiv:2405.21060 · S4D, Gu et al., "
              "arXiv:2206.11893 · Octave convolution, Chen et al., arXiv:1904.05049 · Laughing Hyena, Massaroli et al., "
              "arXiv:2310.18780 · CLIP, Radford et al., arXiv:2103.00020 · Token merging, Bolya et al., arXiv:2210.09461 · "
              "EViT, Liang et al., arXiv:2202.07800")
# suite, caption, chart: drawn for the first device (a GPU where there is one) that has the CSV
CHARTS = [("ssm", "What runs when: channels over time", charts.designs),
          ("ssm", "Several rates: time relative to the baseline", charts.rates),
          ("ssm", "A Mamba-2 layer against attention: time over length", charts.layers),
          ("vlm", "Fewer tokens: accuracy over compute", charts.tokens),
          ("vlm", "Half the multiply-adds: time of the whole encoder", charts.clock)]
ANSWERS = [key for key, *_ in charts.HEADLINES]
VERDICT_COLOURS = [PALETTE[2], PALETTE[1], PALETTE[4], "#9aa4ae"]


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


def authors(root):
    """The authors as CITATION.cff names them; '' without the file."""
    path = root / "CITATION.cff"
    names = re.findall(r"^  - (?:name: (.+)|family-names: (.+)\n    given-names: (.+))$",
                       path.read_text(encoding="utf-8") if path.exists() else "", re.M)
    return ", ".join(name or f"{given} {family}" for name, family, given in names)


def draw_header(page, report):
    """Title, question, method; on the right the claims in numbers. Returns the y below."""
    left = WIDTH - 2 * MARGIN - 9.2
    y = page.lines(["Efficient Architectures"], MARGIN, MARGIN, 76, "bold")
    y = page.paragraph(authors(report.root), MARGIN, y + 0.05, left, SMALLEST, color=SOFT)
    y = page.paragraph(QUESTION, MARGIN, y + 0.1, left, 32)
    y = page.paragraph(METHOD, MARGIN, y + 0.12, left, 24, color=SOFT)
    x, top = WIDTH - MARGIN - 8.6, MARGIN
    top = page.lines(["Claims of the original report"], x, top, 32, "bold") + 0.1
    for suite, counts in text.verdict_counts(report.claims).items():
        top = page.lines([f"{text.SUITES[suite]}, {sum(counts.values())} claims"], x, top, 26, color=SOFT)
        begin = x
        for n, colour in zip(counts.values(), VERDICT_COLOURS, strict=True):
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
    """[(lines, points, weight, colour)] of a finding in the left column: the question, the verdict in bold, and of the
    three answers of the README the sentence with its number. device: named above all of them."""
    verdict, sentence = text.answer_parts(row["answer"])
    verdict += "" if row["device"] == device else f" [{row['device']}]"
    parts = [(row["question"], size, "normal", SOFT), (verdict, size + 2, "bold", INK)]
    parts += [(sentence, size, "normal", INK)] if row["key"] in ANSWERS else []
    return [(wrap(words, points, COLUMN, weight), points, weight, colour) for words, points, weight, colour in parts]


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
        heights = [sum(len(part) * height(points) for part, points, *_ in parts) for parts in lines]
        if y + sum(heights) + 0.18 * len(rows) <= bottom:
            break
        if not sizes:  # too much at the smallest size: the last finding of the suite with the most has to go
            suites = [row["suite"] for row in rows if row["key"] not in ANSWERS]
            most = max(dict.fromkeys(suites), key=suites.count)
            rows.remove([row for row in rows if row["suite"] == most and row["key"] not in ANSWERS][-1])
    gap = min(0.6, max(0.18, (bottom - y - sum(heights)) / len(rows)))
    for parts in lines:
        for part, points, weight, colour in parts:
            y = page.lines(part, MARGIN, y, points, weight, colour)
        y += gap


def place_for(report, suite, chart):
    """The first place (a GPU where there is one) that has the rows of a chart, or None."""
    for place in report.shown_places:
        if place.suite == suite and charts.drawn(chart, Page().figure.add_axes([0, 0, 1, 1]), place) is not None:
            return place
    return None


def drawn_chart(place, page, chart, box):
    """Draw a chart into box (x, y, width, height), its labels included; returns its footer."""
    x, y, width, tall = box
    with matplotlib.rc_context(charts.STYLE):
        axes = page.figure.add_axes([x / WIDTH, 1 - (y + tall) / HEIGHT, width / WIDTH, tall / HEIGHT])
        chart(axes, place)
        # how much room do the labels need? Then it is drawn again in what is left
        inches = page.figure.dpi_scale_trans.inverted()
        inside = axes.get_tightbbox(page.figure.canvas.get_renderer()).transformed(inches)
        frame = axes.get_window_extent().transformed(inches)
        left, below = frame.x0 - inside.x0 + 0.1, frame.y0 - inside.y0 + 0.05
        right, above = max(0, inside.x1 - frame.x1) + 0.1, max(0, inside.y1 - frame.y1) + 0.05
        axes.clear()
        axes.set_position([(x + left) / WIDTH, 1 - (y + tall - below) / HEIGHT,
                           (width - left - right) / WIDTH, (tall - below - above) / HEIGHT])
        table = chart(axes, place)
        axes.get_tightbbox(page.figure.canvas.get_renderer())  # ticks are made when first asked for: in this style
    return charts.footer(table, place.device)


def draw_picture(page, path, box):
    """Show a published figure, as large as fits into box (x, y, width, height)."""
    from PIL import Image

    x, y, width, tall = box
    with Image.open(path) as image:
        pixels, scale = image.convert("RGB"), min(width / image.width, tall / image.height)
        size = image.width * scale, image.height * scale
    axes = page.figure.add_axes([x / WIDTH, 1 - (y + size[1]) / HEIGHT, size[0] / WIDTH, size[1] / HEIGHT])
    axes.imshow(pixels, aspect="auto")
    axes.axis("off")


def draw_figures(page, report, y, bottom):
    """The method's diagram, the charts and a photograph, two columns, on the right."""
    panels = [(caption, place_for(report, suite, chart), chart) for suite, caption, chart in CHARTS]
    shown = text.photograph(report)
    panels = [panel for panel in panels if panel[1]] + ([("A photograph, before and after", shown["place"], None)] if shown else [])
    left = MARGIN + COLUMN + GAP
    width = (WIDTH - MARGIN - left - GAP) / 2
    space = (bottom - y) / max(2, -(-len(panels) // 2))
    for i, (caption, place, chart) in enumerate(panels):
        x, top = left + (i % 2) * (width + GAP), y + i // 2 * space
        below = page.paragraph(caption, x, top, width, 26, "bold", PALETTE[0]) + 0.05
        tall = top + space - below - 0.3 - height(SMALLEST)
        if chart is None:
            draw_picture(page, shown["path"], (x, below, width, tall + height(SMALLEST)))
            continue
        notes = drawn_chart(place, page, chart, (x, below, width, tall)).split(" · ")
        if chart is not charts.designs:
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


def pdf(report):
    """The poster as PDF bytes, the same for the same inputs, with their fingerprint."""
    out = io.BytesIO()
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        draw(report).savefig(out, format="pdf", metadata={
            "Title": "Efficient Architectures", "Keywords": report.mark, "CreationDate": None})
    return out.getvalue()
