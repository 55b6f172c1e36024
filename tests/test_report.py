"""The report: claims and findings from CSVs, README blocks, the page in a real browser, the poster."""

import importlib.util
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.text
import pandas as pd
import pytest
import report_world
from conftest import ROOT

from lab import findings, poster, report, report_page, run
from lab.cells.results import read_csv, write_csv
from lab.findings import Finding, Measured

FINDINGS = [
    Finding("speed", "ssm", "Is fast faster?", findings.time_ratio(
        "demo_speed", dict(variant="fast"), dict(variant="slow"), pair=["length"]),
        "At length {length}, fast is {answer} than slow: {value}{interval} of its time."),
    Finding("single", "vlm", "How long does it take?", findings.cell(
        "demo_speed", "latency_ms_median", variant="slow", length=64), "{value} at batch one.", "ms"),
    Finding("claim", "ssm", "Is the first claim true?", findings.claim("A01"), "It is {value}{interval}.", ""),
    Finding("absent", "ssm", "Is there more?", findings.cell("no_such_table", "x"), "{value}"),
    Finding("oom", "ssm", "What about the huge one?", findings.cell("demo_speed", "latency_ms_median", variant="huge"), "{value}"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with invented results and everything that the report makes of them. Read only."""
    root = tmp_path_factory.mktemp("world")
    report_world.write_world(root)
    with pytest.MonkeyPatch.context() as patch:
        use_invented_lists(patch)
        report.write(root)
    return root


@pytest.fixture
def invented(monkeypatch):
    use_invented_lists(monkeypatch)


def use_invented_lists(patch):
    """Findings and headline figures of the invented world instead of the project's."""
    patch.setattr(findings, "FINDINGS", FINDINGS)


def claims_of(root):
    return read_csv(root / "results" / "claims.csv")


def findings_of(root):
    return read_csv(root / "results" / "findings.csv")


# collecting


def test_every_claim_has_a_row_and_every_verdict_a_measurement(world):
    claims, statements = claims_of(world), read_csv(report.STATEMENTS)
    assert list(dict.fromkeys(claims["id"])) == list(statements["id"])
    assert not claims.duplicated(["id", "place"]).any()
    judged = claims[claims["verdict"] != "not testable here"]
    assert len(judged) and judged[["measured", "source", "device"]].notna().all(axis=None)
    assert claims["reason"].notna().all()
    nobody = claims[claims["reason"] == report.UNJUDGED]
    assert set(nobody["id"]) == {"A13", "A14", "A15", "A16", "A17", "A18", "A19", "B13", "B14", "B15", "B16", "B17"}
    assert nobody["device"].isna().all()
    told = ["id", "statement", "quantity", "condition", "claimed", "unit"]
    mine = statements[statements["id"].isin(nobody["id"])]
    pd.testing.assert_frame_equal(nobody[told].reset_index(drop=True), mine[told].reset_index(drop=True), check_dtype=False)
    lines = {line.split(" | ")[0]: line for line in (world / "README.md").read_text().splitlines()}
    assert " | 2r/d | ○ |" in lines["| B16"] and " | maintained | ○ |" in lines["| B17"]
    page = (world / "results/report.html").read_text()
    assert '<td data-label="Claimed">2r/d</td>' in page and '<td data-label="Claimed">maintained</td>' in page


def test_the_statements_are_those_of_the_original_report():
    """Its own list lies beside the project, never inside: EA_CLAIMS names it, else it is looked for where CI has it."""
    path = Path(os.environ.get("EA_CLAIMS", ROOT.parent / "shared/original_claims.csv"))
    if not path.exists():
        pytest.skip("the original report's list of claims is not here (EA_CLAIMS)")
    original, ours = (pd.read_csv(p, dtype=str, keep_default_na=False) for p in (path, report.STATEMENTS))
    facts = ["id", "suite", "claimed", "unit"]
    pd.testing.assert_frame_equal(ours[facts], original[facts])


def test_statements_are_complete():
    statements = read_csv(report.STATEMENTS)
    assert statements.drop(columns="unit").notna().all(axis=None) and statements["id"].is_unique


def test_smoke_never_enters(world):
    assert "Smoke" not in set(claims_of(world)["device"]) | set(findings_of(world)["device"])
    for name in ("results/report.html", "README.md"):
        assert "smoke-device" not in (world / name).read_text()


def test_a_verdict_wins_over_none_and_strange_claims_are_refused(tmp_path):
    report_world.write_world(tmp_path)
    path = tmp_path / "results/ssm/tesla-t4/claims.csv"
    table = read_csv(path)
    other = table[table["id"].isin(["A01", "A03"])].assign(
        notebook="zz_other", measured=5.0, low=4.0, high=6.0, verdict="not supported", source="x.csv: i=0")
    write_csv(path, pd.concat([table, other]))
    found = report.collect(tmp_path).claims.set_index(["id", "place"])
    assert found.loc[("A03", "ssm/tesla-t4"), "measured"] == 5
    assert found.loc[("A01", "ssm/tesla-t4"), "measured"] == 1.2345, "the first verdict stays"
    write_csv(path, table.assign(id="Z01"))
    with pytest.raises(ValueError, match="'Z01' is no statement"):
        report.collect(tmp_path)


def test_findings_come_from_rows_and_missing_rows_give_none(world):
    found = findings_of(world)
    assert set(found["key"]) == {"speed", "single", "claim"}
    ratios = found[found["key"] == "speed"]
    assert ratios["place"].tolist() == ["ssm/tesla-t4", "ssm/cpu-intel-xeon-2t"], "a GPU first"
    assert (ratios["low"] < 1 / 3).all() and (ratios["high"] > 1 / 3).all() and (ratios["n"] == 25).all()
    assert ratios["answer"].iloc[0].startswith("At length 128, fast is faster than slow: 0.33")
    assert ratios["source"].iloc[0] == "demo_speed_raw.csv: length=128, variant=fast over variant=slow"


@pytest.mark.parametrize("low, high, word", [(0.5, 0.9, "faster"), (0.9, 1.1, "about as fast"), (1.1, 2.0, "slower"),
                                             (None, None, "slower")])
def test_the_interval_decides_the_words(low, high, word):
    finding = Finding("k", "ssm", "?", None, "{answer}")
    assert findings.sentence(finding, Measured(1.05, low, high)) == word


@pytest.mark.parametrize("value, unit, text", [
    (0.33333, "×", "0.333×"), (12.345, "ms", "12.3 ms"), (1234.5, "", "1234"), (0.93456, "%", "93.5 %"), (30.0, "", "30"),
    (-0.25, "", "−0.250"), (-0.034, "points", "−3.4 points"), (2.5e-7, "", "2.5e-07"), (0, "", "0"), (float("nan"), "", ""), (None, "ms", "")])
def test_numbers_as_readers_see_them(value, unit, text):
    assert findings.number(value, unit) == text


def test_time_ratio_needs_exactly_one_row_a_side_and_paired_rounds(tmp_path):
    report_world.write_world(tmp_path)
    place = report.find_places(tmp_path)[0][0]
    fast, slow = dict(variant="fast"), dict(variant="slow")
    assert findings.time_ratio("demo_speed", fast, slow)(place) is None, "two lengths: not one row"
    assert findings.time_ratio("demo_speed", fast, dict(variant="huge"), pair=["length"])(place) is None
    assert findings.time_ratio("demo_speed", fast, slow, length=64)(place).n == 25
    raw = read_csv(place.folder / "demo_speed_raw.csv")
    write_csv(place.folder / "demo_speed_raw.csv", raw.iloc[1:])
    assert findings.time_ratio("demo_speed", slow, fast, length=64)(place) is None


EXPECTED = dict(
    mrss=(1.5, "it is slower: 1.50× (1.50–1.50) the baseline's time"),
    split=(3, "is 3× (3–3) as fast as the baseline with the same fast convolution, 3× (3–3) with gradients. Three quarters at "
          "an eighth: 2.67× (2.67–2.67), 2.67× (2.67–2.67). Seven eighths at a sixteenth: 3.43× (3.43–3.43)"),
    split_error=(0.5, "0.500× (0.500–0.500) on several time scales; 1.10× (1.10–1.10) on short ones, where it cannot help; "
                 "3.00× (3.00–3.00) on digits"),
    sparse=(4, "is 4× (4–4) as fast, but its error is 2× (2–2), 4.40× (4.40–4.40) and 12× (12–12) the baseline's"),
    scan_library=(5, "at 1024 tokens: 5×"), scan_attention=(512, "attention, forward: faster from 512 tokens on (500–530)."),
    scan_decode=(8, "as fast as an attention layer; after 256, 2× (2–2)."),
    distil_decode=(50, "A state space of 16 modes, enough for every kernel of 8192 taps trained for it, decodes 50× (50–50) as fast "
                   "as the convolution; next to exact decoding in blocks it is 5× (5–5) as fast."),
    tokens_ours=(0.94, "down to 104 of 197 on average over the layers (49 % of the multiply-adds), 94.0 % (92.0–96.0) of its "
                 "zero-shot answers stay; with ToMe 90.0 % (88.0–92.0); keeping the patches of largest norm, as the original "
                 "did, 70.0 % (68.0–72.0)."),
    tokens_tome=(0.04, "it is better than ToMe: +4.0 points (+2.0 to +6.0)."), tokens_time=(1.6, "as the whole encoder at batch 8, 1.60× (1.60–1.60) at batch 1."))


@pytest.fixture(scope="module")
def project_tables(tmp_path_factory):
    """A folder with invented CSVs that look like those of the project's notebooks. Read only."""
    root = tmp_path_factory.mktemp("tables")
    report_world.write_project_tables(root)
    return root


def test_the_projects_findings_say_what_the_tables_hold(project_tables):
    found = report.collect(project_tables).findings.set_index("key")
    for key, (value, words) in EXPECTED.items():
        assert found.loc[key, "value"] == pytest.approx(value), key
        assert words in found.loc[key, "answer"], (key, found.loc[key, "answer"])
    assert len({f.key for f in findings.FINDINGS}) == len(findings.FINDINGS)
    assert set(EXPECTED) <= {f.key for f in findings.FINDINGS}


@pytest.mark.parametrize("change, words", [
    (dict(crossover_length=None, low=None, high=None), "forward: not faster at any length up to 1024 tokens."),
    (dict(crossover_length=128.0), "forward: faster at every length from 128 tokens, the shortest measured.")])
def test_a_crossing_may_be_missing_or_before_the_first_length(project_tables, tmp_path, change, words):
    root = shutil.copytree(project_tables, tmp_path / "copy")
    path = root / "results/ssm/tesla-t4/scan_crossover.csv"
    write_csv(path, read_csv(path).assign(**change))
    assert words in report.collect(root).findings.set_index("key").loc["scan_attention", "answer"]


# README


NOT_NUMBERS = re.compile(r"<[^>]*>|\]\([^)]*\)|torch [\w.+]+|ViT-\w+/\d+|\d{4}-\d\d-\d\d")
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![.]?\w)( ?%)?")


def numbers_in(text):
    """[(number, whether % follows)] of all numbers but those of links, dates, versions, commits and names such as Mamba-2."""
    return [(number, bool(percent)) for number, percent in NUMBER.findall(NOT_NUMBERS.sub(" ", text))]


def backed(number, cells, share=False):
    """Whether a number is one of some CSV cells, rounded to its digits, or is written in one; share: as per cent, too."""
    digits = len(number.split("e")[0].partition(".")[2])
    words = " ".join(c for c in cells if isinstance(c, str))
    words = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?", words)
    values = [float(c) for c in [*cells, *words] if isinstance(c, int | float) or c in words]
    shown = {f"{abs(v):.{digits}{'e' if 'e' in number else 'f'}}" for v in [*values, *(100 * v for v in values if share)]}
    return number in words or number in shown


def rows_behind(name, root):
    """The CSV cells behind each line of a block's table, and whether they are shares."""
    claims = claims_of(root)
    if name == "findings":
        kept = ["value", "low", "high", "n", "source", "words"]
        return [(row[kept].tolist(), row["unit"] in ("%", "points")) for _, row in findings_of(root).iterrows()]
    if name == "claims":
        kept = ["statement", "claimed", "measured", "low", "high", "n", "unit"]
        return [(mine[kept].to_numpy().ravel().tolist(), False) for _, mine in claims.groupby("id", sort=False)]
    if name == "runs":
        return [([row["minutes"], row["commit"]], False) for _, row in report.collect(root).runs.iterrows()]
    return []


def expected_counts(root):
    """How often each verdict is given, suite by suite: a statement counts with the best of its verdicts."""
    claims = claims_of(root)
    best = claims.groupby("id")["verdict"].agg(lambda verdicts: min(verdicts, key=report.VERDICTS.index))
    suite = claims.groupby("id")["suite"].first()
    return [str(((best == verdict) & (suite == s)).sum()) for s in report.SUITES for verdict in report.VERDICTS]


def unbacked(root):
    """The numbers in the README's generated blocks that are not in the CSV row of their line."""
    wrong, text = [], (root / "README.md").read_text()
    for device in sorted({report.where(row) for row in claims_of(root).dropna(subset="device").to_dict("records")}, key=len):
        text = text.replace(device, "")
    for _, name, body, _ in report.BLOCK.findall(text):
        lines = [line for line in body.splitlines() if line.strip()]
        table = [line for line in lines if line.startswith("|")][2:]
        behind = rows_behind(name, root)
        if name != "figures":
            assert len(table) == len(behind), f"{name}: {len(table)} lines of {len(behind)} rows"
        for line, (cells, share) in zip(table, behind, strict=False):
            wrong += [n for n, percent in numbers_in(line) if not backed(n, cells, share or percent)]
        told = [n for line in lines if not line.startswith("|") for n, _ in numbers_in(line)]
        if told != (expected_counts(root) if name == "claims" else []):
            wrong += told
    return wrong


def test_every_number_in_generated_blocks_is_in_its_csv_row(world):
    assert len(numbers_in((world / "README.md").read_text())) > 60
    assert unbacked(world) == []


@pytest.mark.parametrize("true, false, wrong", [
    ("0.33", "0.77", 1), ("length 128", "length 129", 1), ("| 25 |", "| 26 |", 1), ("n\u00a0=\u00a025", "n = 26", 1),
    ("(1.10–1.30)", "(1.10–1.31)", 1), ("0.57, ", "0.58, ", 1), ("1.50 |", "1.60 |", 1), (" supported", "7 supported", 6)])
def test_a_forged_number_is_found(world, tmp_path, true, false, wrong):
    forged = shutil.copytree(world, tmp_path / "forged")
    readme = (forged / "README.md").read_text()
    assert true in readme
    (forged / "README.md").write_text(readme.replace(true, false, 1))
    assert len(unbacked(forged)) == wrong


def test_what_is_a_number():
    text = "107× (98.3–115) and 96.7 % of 8192 at r = 4, −0.25; 1.4e-14. <b 3> [x](y/4) torch 2.11.0+cu130 2026-11-25 " \
           "ViT-B/16 Mamba-2 S4D CIFAR-10 A01 1021eade6e 2dr d² 2r/d p=0.5"
    assert [n for n, _ in numbers_in(text)] == ["107", "98.3", "115", "96.7", "8192", "4", "0.25", "1.4e-14", "0.5"]
    assert [n for n, percent in numbers_in(text) if percent] == ["96.7"]


def test_readme_blocks_are_filled_and_prose_is_kept(world):
    text = (world / "README.md").read_text()
    assert text.startswith("# Title\n\nWords.") and text.endswith("More words.\n")
    assert "No figure has been drawn here yet" in text
    assert "**Is fast faster?**" in text and "[ssm_demo](results/ssm/tesla-t4/ssm_demo.ipynb)" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (world / target).exists(), target
    with pytest.raises(ValueError, match="report:nonsense is none of"):
        report.fill("<!-- report:nonsense -->\n<!-- /report:nonsense -->", report.collect(world))


def test_headline_figures_are_drawn_from_the_tables(project_tables, tmp_path):
    root = shutil.copytree(project_tables, tmp_path / "copy")
    report.write(root)
    text, figures = (root / "README.md").read_text(), sorted((root / "figures/report").iterdir())
    assert [f.name for f in figures] == ["rates.png", "tokens.png"] and report.stale(root) == []
    for figure in figures:
        assert f'<img src="figures/report/{figure.name}" width="49%" alt="{report.alt_text(figure)}">' in text
    (root / "results/ssm/tesla-t4/mrss_proxy_results.csv").unlink()
    assert "rates.png" not in report.figures_block(report.collect(root))


def test_check_names_what_is_stale(world, tmp_path, invented, capsys):
    root = shutil.copytree(world, tmp_path / "copy")
    words = ["--root", str(root)]
    assert report.main([*words, "--check"]) == 0 and capsys.readouterr().out == ""
    path = root / "results/ssm/tesla-t4/claims.csv"
    write_csv(path, read_csv(path).assign(measured=7.5))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    assert report.main([*words, "--check"]) == 1
    said = capsys.readouterr().out
    for name in ("results/claims.csv", "README.md", "results/report.html", "results/poster.pdf"):
        assert f"{name}: stale" in said
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}, "a check changes nothing"
    assert report.main(words) == 0 and report.main([*words, "--check"]) == 0
    assert "7.5" in (root / "README.md").read_text()


# The repository's own report


def real_report():
    if not report.find_places(ROOT)[0]:
        pytest.skip("no results in the repository yet")


def test_the_reports_in_the_repository_are_up_to_date():
    real_report()
    assert [p.name for p in report.stale(ROOT)] == []


def test_the_repositorys_numbers_claims_and_verdicts_are_backed():
    real_report()
    assert unbacked(ROOT) == []
    claims, statements = claims_of(ROOT), read_csv(report.STATEMENTS)
    assert set(claims["id"]) == set(statements["id"])
    judged = claims[claims["verdict"] != "not testable here"]
    assert judged[["measured", "source"]].notna().all(axis=None)
    assert missing_sources(ROOT) == {}


def in_table(part, table):
    """Whether a part of a source, 'column=value', a column, or what stands in a cell, is in a table of texts."""
    column, equals, value = part.partition("=")
    if equals and re.fullmatch(r"\w+", column):
        start, dots, _ = value.partition("…")
        wanted = {value, value.removesuffix(".0"), re.sub(r" \(\w+\)$", "", value)}
        return column in table and any(cell in wanted or dots and cell.startswith(start) for cell in table[column])
    return part in table or any(table[c].str.contains(part, regex=False).any() for c in table)


def missing_sources(root):
    """{id: what is wrong} of the judged claims whose source names no table of their folder, or no row of it."""
    wrong, claims = {}, claims_of(root)
    for row in claims[claims["verdict"] != "not testable here"].to_dict("records"):
        name, _, where = row["source"].partition(": ")
        path = root / "results" / row["place"] / name
        if not re.fullmatch(r"[\w-]+\.csv", name) or not path.exists():
            wrong[row["id"]] = f"{row['source']}: no such table in {row['place']}"
            continue
        table = read_csv(path).astype(str)
        lost = [part for part in re.split(r", | against ", where) if not in_table(part, table)]
        if lost:
            wrong[row["id"]] = f"{row['source']}: nowhere in {name}: {lost}"
    return wrong


@pytest.mark.parametrize("source", [
    "analytic: 1 + 1/r", "this notebook: plug-in check", "no_such.csv: variant=slow", "../claims.csv: id=A01",
    "demo_speed.csv: variant=slower", "demo_speed.csv: speed=slow", "demo_speed.csv: variant=slow, quick"])
def test_a_claim_without_a_table_behind_it_is_found(world, tmp_path, source):
    assert missing_sources(world) == {}
    root = shutil.copytree(world, tmp_path / "copy")
    table = claims_of(root)
    row = table.index[table["verdict"] == "supported"][0]
    table.loc[row, "source"] = source
    write_csv(root / "results/claims.csv", table)
    assert set(missing_sources(root)) == {table.loc[row, "id"]}


def test_the_readmes_prose_states_no_measured_number():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {name for _, name, *_ in report.BLOCK.findall(text)} == set(report.BLOCKS)
    prose = report.BLOCK.sub("", text)
    prose = re.sub(r"```.*?```|arXiv:\d{4}\.\d{4,5}|Python \d\.\d+|`[^`]*`", " ", prose, flags=re.S)
    assert re.findall(r"\d+\.\d+|\d+\s*(?:%|×|ms\b|MiB|points|times|images)", prose) == []
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("results/") or (ROOT / target).exists(), target


# The page


class Reader(HTMLParser):
    """Collects links, images and unbalanced tags."""

    def __init__(self):
        super().__init__()
        self.stack, self.wrong, self.images, self.links, self.other = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "img", "br"):
            self.stack.append(tag)
        if tag == "img":
            self.images.append(attributes)
        elif tag == "a":
            self.links.append(attributes["href"])
        elif "src" in attributes or tag == "link":
            self.other.append(attributes.get("src") or attributes["href"])

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def test_page_stands_alone(world):
    path = world / "results/report.html"
    reader = Reader()
    reader.feed(path.read_text())
    assert reader.wrong == [] and reader.stack == []
    assert len(reader.images) == 6 and all(i["src"].startswith("data:image/webp;base64,") for i in reader.images)
    assert {i["alt"] for i in reader.images} >= {"An invented detail of ssm on Tesla T4"}
    assert reader.other == ["data:,"]
    for link in reader.links:
        assert link.startswith("#") or (path.parent / link).exists(), link
    assert path.stat().st_size < report_page.MOST_BYTES


def test_page_escapes_what_it_shows(tmp_path, invented):
    report_world.write_world(tmp_path)
    path = tmp_path / "results/ssm/tesla-t4/claims.csv"
    write_csv(path, read_csv(path).assign(reason="<script>alert(1)</script> & more"))
    page = report_page.page(report.collect(tmp_path), "mark")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page


def test_pictures_shrink_until_the_page_is_small(tmp_path, monkeypatch):
    report_world.write_figure(tmp_path / "f.png", "a")
    figures = [dict(path=tmp_path / "f.png")]
    uri, width, height = report_page.embed(figures)[tmp_path / "f.png"]
    assert (width, height) == (1200, 675)
    monkeypatch.setattr(report_page, "MOST_BYTES", len(uri) // 2)
    assert report_page.embed(figures)[tmp_path / "f.png"][1] == 800


def test_report_without_any_run(tmp_path):
    (tmp_path / "README.md").write_text("<!-- report:findings -->\n<!-- /report:findings -->\n")
    assert len(report.write(tmp_path)) == 5 and report.stale(tmp_path) == []
    assert "No run has finished here yet" in (tmp_path / "README.md").read_text()


# The poster


def test_poster_is_one_a1_page(world):
    data = (world / "results/poster.pdf").read_bytes()
    boxes = re.findall(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", data)
    assert [[round(float(v) / 72 * 25.4) for v in box] for box in boxes] == [[841, 594]]


@pytest.mark.parametrize("which", ["nothing", "invented", "repository"])
def test_poster_is_legible_and_nothing_overflows(project_tables, tmp_path, which):
    root = dict(nothing=tmp_path, invented=project_tables, repository=ROOT)[which]
    if which == "repository":
        real_report()
    figure = poster.draw(report.collect(root))
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= 24
    own = [t for t in texts if t in figure.texts]
    assert len(own) > 10
    page, renderer = figure.bbox, figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in own]
    assert all(b.x0 >= 30 and b.y0 >= 20 and b.x1 <= page.x1 - 30 and b.y1 <= page.y1 - 20 for b in boxes)
    panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert all(p.x0 >= 30 and p.y0 >= 20 and p.x1 <= page.x1 - 20 and p.y1 <= page.y1 - 20 for p in panels)
    assert len(panels) >= dict(nothing=2, invented=12, repository=2)[which]
    for axes in figure.axes:  # labels of one axis leave each other room
        for axis, begin, end in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            labels = [t.get_window_extent(renderer) for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
            labels.sort(key=lambda b: getattr(b, begin))
            assert all(getattr(a, end) <= getattr(b, begin) + 2 for a, b in zip(labels, labels[1:], strict=False))
    for i, box in enumerate(boxes):
        for other, words in zip([*boxes[i + 1:], *panels], [*own[i + 1:], *panels], strict=True):
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 0 or down <= 2, f"{own[i].get_text()!r} overlaps {words}"


def test_poster_is_the_same_twice(world, invented):
    found = report.collect(world)
    assert poster.pdf(found, found.mark) == (world / "results/poster.pdf").read_bytes()


# After a run


@pytest.mark.parametrize("words, status, writes", [
    ([], "ok", True), (["--mode", "cpu"], "ok", True), (["--mode", "smoke"], "ok", False),
    (["--mode", "cpu", "--out", "elsewhere"], "ok", False), (["--mode", "cpu"], "failed", False)])
def test_a_good_run_writes_the_report(tmp_path, monkeypatch, capsys, words, status, writes):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "find_notebooks", lambda only: [tmp_path / "ssm/good.ipynb"])
    monkeypatch.setattr(run, "parameters", lambda path: {})
    monkeypatch.setattr(run, "run_one", lambda path, *_: (status, "", path.parent))
    assert run.run(run.parse(words)) == int(status != "ok")
    assert (tmp_path / "results/report.html").exists() == writes == ("report: results/" in capsys.readouterr().out)


def test_a_broken_report_fails_the_run_and_spoils_nothing(world, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(world, tmp_path / "copy")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.setattr(run, "find_notebooks", lambda only: [])
    monkeypatch.setattr(report, "STATEMENTS", tmp_path / "no-such-file.csv")
    assert run.run(run.parse(["--mode", "cpu"])) == 1
    assert "the report was not written: FileNotFoundError" in capsys.readouterr().err
    after = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and ".staging" not in p.parts}
    assert after == before


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, driven by selenium; skips where either is absent."""
    if not importlib.util.find_spec("selenium"):
        pytest.skip("selenium is not installed (tests/requirements.txt)")
    binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no chromium and chromedriver (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def show(browser, path, width=1280, scheme="light"):
    """Open a page at a width in a colour scheme."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [dict(name="prefers-color-scheme", value=scheme)]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dict(features=features))
    browser.get(path.as_uri())


def pages(world):
    """The invented report, and the repository's own if there is one."""
    return [p for p in (world / "results/report.html", ROOT / "results/report.html") if p.exists()]


def test_browser_loads_it_without_errors_and_every_image_decodes(world, browser):
    for path in pages(world):
        browser.get_log("browser")
        show(browser, path)
        broken = browser.execute_async_script("""const done = arguments[0], images = [...document.images];
            Promise.allSettled(images.map(i => i.decode())).then(found =>
                done(images.filter((image, k) => found[k].status != "fulfilled" || !image.naturalWidth).length));""")
        assert broken == 0
        assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
        assert browser.execute_script("return performance.getEntriesByType('resource')"
                                      ".filter(r => !r.name.startsWith('data:')).length") == 0


def test_browser_filters_by_suite_and_verdict(world, browser):
    claims = claims_of(world)
    show(browser, world / "results/report.html")
    pick = """for (const [id, value] of Object.entries(arguments[0])) {
            const choice = document.getElementById(id);
            choice.value = value;
            choice.dispatchEvent(new Event("change"));
        }
        const rows = [...document.querySelectorAll("#claims-table tbody tr")];
        return [rows.filter(r => r.offsetParent !== null).length, document.getElementById("shown").textContent]"""
    for suite in ("", "ssm", "vlm"):
        for verdict in ("", *report.VERDICTS):
            mine = claims[(claims["suite"] == suite) | (suite == "")]
            expected = int(((mine["verdict"] == verdict) | (verdict == "")).sum())
            visible, said = browser.execute_script(pick, dict(suite=suite, verdict=verdict))
            assert visible == expected and said == f"{expected} of {len(claims)} shown", (suite, verdict)


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_browser_never_scrolls_sideways(world, browser, width):
    for path in pages(world):
        show(browser, path, width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        wide = browser.execute_script("""return [...document.querySelectorAll("body *")].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1 && getComputedStyle(e).position != "absolute"
            && !e.closest("thead")).map(e => e.outerHTML.slice(0, 80))""")
        assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_browser_accessibility(world, browser, scheme, width):
    if not importlib.util.find_spec("axe_core_python"):
        pytest.skip("axe-core-python is not installed (tests/requirements.txt)")
    from axe_core_python.selenium import Axe

    for path in pages(world):
        show(browser, path, width, scheme)
        rules = dict(runOnly=["wcag2a", "wcag2aa", "wcag21aa", "best-practice"])
        found = Axe().run(browser, options=rules)
        wrong = {v["id"]: v["nodes"][0]["html"][:120] for v in found["violations"]}
        assert wrong == {} and any(p["id"] == "color-contrast" for p in found["passes"])


def test_browser_prints_it(world, browser):
    import base64

    show(browser, world / "results/report.html")
    data = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", dict(printBackground=False))["data"])
    assert data.startswith(b"%PDF") and len(data) > 10_000
