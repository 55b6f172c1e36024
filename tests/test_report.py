"""The report: numbers and verdicts from CSVs, the README's blocks and snippets, the page in a real browser, the poster."""

import importlib.util
import os
import re
import shutil
import warnings
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.text
import pandas as pd
import pytest
import report_world
import torch
from conftest import ROOT
from PIL import Image

import effarch
from effarch.bench.claims import VERDICTS, statements
from effarch.bench.intervals import Estimate, decide, ratio_interval, t_interval
from effarch.bench.tables import read_csv, write_csv
from lab import report
from lab.report import charts, findings, page, poster, reading, text
from lab.report.findings import FINDINGS, Finding
from lab.report.select import (
    Ambiguous,
    Cell,
    Errors,
    Least,
    Missing,
    Place,
    Start,
    Times,
    at_least,
    begins,
    only,
)

SPEED = Times("demo_speed", dict(variant="fast"), dict(variant="slow"), dict(length=max))
INVENTED = [
    Finding("speed", "ssm/ssm_demo", "Is fast faster?", SPEED, "At length {length}, fast takes {value} of slow's time.",
            below="Yes: {short} the time.", above="No."),
    Finding("single", "vlm/vlm_demo", "How long does it take?", Cell("demo_speed", "latency_ms_median", dict(variant="slow", length=64), "ms"),
            "{value} at batch one.", limit=None, above="{short}."),
    Finding("fresh", "ssm/ssm_fresh", "Is there anything new?", Cell("fresh", "share", dict(name="a"), "%"), "It is {value}.",
            above="A quarter.", limit=None),
    Finding("absent", "ssm/ssm_demo", "Is there more?", Cell("no_such_table", "x", {}), "{value}"),
    Finding("oom", "ssm/ssm_demo", "What about the huge one?", Cell("demo_speed", "latency_ms_median", dict(variant="huge")), "{value}"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with invented results and everything that the report makes of them. Read only."""
    root = tmp_path_factory.mktemp("world")
    report_world.write_world(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(findings, "FINDINGS", INVENTED)
        report.write(root)
    return root


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder with invented CSVs that look like those of the project's notebooks. Read only."""
    root = tmp_path_factory.mktemp("tables")
    report_world.write_project_tables(root)
    return root


@pytest.fixture
def invented(monkeypatch):
    monkeypatch.setattr(findings, "FINDINGS", INVENTED)


def claims_of(root):
    return read_csv(root / "results" / "claims.csv")


def findings_of(root):
    return read_csv(root / "results" / "findings.csv")


def place_of(root, where=report_world.T4):
    suite, name = where
    slug, _, weights = name.partition("/")
    return Place(root / "results" / suite / name, suite, slug, weights)


# Numbers out of tables


def test_a_ratio_of_times_is_that_of_the_one_rule(world):
    found = SPEED.measure(place_of(world))
    raw = read_csv(world / "results/ssm/tesla-t4/demo_speed_raw.csv")
    raw = raw[raw["length"] == 128]
    times = [[part["latency_ms"].tolist() for _, part in raw[raw["variant"] == v].groupby("process")] for v in ("fast", "slow")]
    assert found.estimate == pytest.approx(ratio_interval(*times), rel=1e-5) and len(times[0]) == 2
    assert (found.n, found.n_of, found.words) == (25, "rounds in 2 runs", dict(length=128))
    assert found.source == "demo_speed_raw.csv: length=128, variant=fast over variant=slow"


def test_results_from_before_the_processes_are_of_one(world):
    found = SPEED.measure(place_of(world, report_world.CPU))
    assert (found.n, found.n_of) == (25, "rounds") and found.estimate.low < 1 / 3 < found.estimate.high


@pytest.mark.parametrize("number, wrong", [
    (Times("demo_speed", dict(variant="fast"), dict(variant="slow")), Ambiguous),  # of two lengths
    (Times("demo_speed", dict(variant="fast"), dict(variant="huge"), dict(length=max)), Missing),  # out of memory
    (Times("demo_speed", dict(variant="fast"), dict(variant="none"), dict(length=64)), Missing),
    (Cell("demo_speed", "latency_ms_median", dict(length=64)), Ambiguous),
    (Cell("demo_speed", "no_such_column", dict(variant="fast", length=64)), Missing),
    (Cell("demo_speed", "latency_ms_median", dict(no_such_column=1)), Missing),
    (Errors("demo_speed", dict(variant="fast"), dict(variant="slow"), column="latency_ms_median", pair="notebook"), Ambiguous),
    (Least("demo_speed", "latency_ms_median", dict(variant="none"), over="length"), Missing)])
def test_a_selection_gives_one_number_or_says_why_not(world, number, wrong):
    with pytest.raises(wrong):
        number.measure(place_of(world))


def test_the_least_of_each_training_is_averaged(world):
    table = place_of(world).table("demo_speed")
    found = Least("demo_speed", "latency_ms_median", {}, over="length").measure(place_of(world))
    assert found.estimate == pytest.approx(t_interval(table.groupby("length")["latency_ms_median"].min()), rel=1e-5) and found.n == table["length"].nunique()


def test_unpaired_rounds_give_no_ratio(tmp_path):
    report_world.write_place(tmp_path, *report_world.CPU, "CPU", "full")
    path = tmp_path / "results/ssm/cpu-intel-xeon-2t/demo_speed_raw.csv"
    raw = read_csv(path)
    write_csv(path, raw[(raw["variant"] != "fast") | (raw["process"] == 0)])
    found = SPEED.measure(place_of(tmp_path, report_world.CPU))
    assert (found.n, found.n_of) == (10, "rounds"), "of the processes that both sides have"
    write_csv(path, raw.iloc[1:])
    with pytest.raises(Missing):
        Times("demo_speed", dict(variant="slow"), dict(variant="fast"), dict(length=64)).measure(place_of(tmp_path, report_world.CPU))


def test_errors_are_paired_by_seed_and_of_counts_half_an_error_is_added(tmp_path):
    rows = [dict(variant=v, train_seed=s, error=e, wrong=round(100 * e), n_test=100, status="ok")
            for v, errors in (("a", (0.2, 0.3, 0.1)), ("b", (0.1, 0.1, 0.1))) for s, e in enumerate(errors)]
    sides, place = (dict(variant="a"), dict(variant="b")), Place(tmp_path, "ssm", "x")
    write_csv(tmp_path / "quality.csv", pd.DataFrame(rows))
    each = Errors("quality", *sides).measure(place)
    assert each.estimate.value == pytest.approx((20.5 * 30.5 * 10.5 / 10.5**3) ** (1 / 3), rel=1e-5) and each.n_of == "paired trainings"
    write_csv(tmp_path / "quality.csv", pd.DataFrame(rows).drop(columns="wrong"))
    os.utime(tmp_path / "quality.csv", ns=(1, 1))
    paired = Errors("quality", *sides).measure(place)
    assert paired.estimate.value == pytest.approx(6 ** (1 / 3), rel=1e-5) and (paired.n, paired.n_of) == (3, "paired trainings")


def test_extremes_and_conditions_pick_rows():
    table = pd.DataFrame(dict(method=["x, slow", "x, fast", "y"], rank=[1, 2, 3], ms=[5.0, 4.0, 1.0]))
    assert only(table, dict(method=begins("x"), ms=min))["rank"] == 2
    assert only(table, dict(rank=at_least(2), ms=max))["method"] == "x, fast"
    with pytest.raises(Missing):
        only(table, dict(rank=at_least(4)))


@pytest.mark.parametrize("attention, told", [
    ((4, 8, 16), "from 2 tokens on, attention up to 1"), ((9, 16, 30), "from 1 tokens on, the smallest number measured"),
    ((4, 16, 4), None), ((4, 8, 8.001), None)])
def test_a_start_is_where_all_later_intervals_agree(tmp_path, attention, told):
    rows = [dict(variant=v, length=n, ms=ms) for n, a in zip((1, 2, 3), attention, strict=True)
            for v, ms in (("attention", a), ("ours", 5 if n == 1 else 6 if n == 2 else 8))]
    report_world.timed(tmp_path, "layers", dict(mode="full"), rows)
    number = Start("layers", dict(variant="attention"), dict(variant="ours"), "length", "attention")
    if told:
        assert number.measure(Place(tmp_path, "ssm", "x")).words["told"] == told
    else:
        with pytest.raises(Missing):
            number.measure(Place(tmp_path, "ssm", "x"))


# Findings


@pytest.mark.parametrize("low, high", [(0.5, 0.9), (0.9, 1.1), (1.1, 2.0), (1.05, 1.05), (float("nan"), float("nan"))])
def test_verdicts_follow_the_one_rule(low, high):
    estimate = Estimate(1.05, low, high)
    finding = Finding("k", "ssm/x", "?", None, "", above="above", below="below", undecided="undecided")
    wanted = {True: "above", False: "below", None: "undecided"}[decide(estimate, above=1)]
    assert findings.verdict(finding, estimate) == wanted
    assert (wanted == "undecided") == (not (high < 1 or 1 < low < high))


def test_findings_come_from_rows_and_missing_rows_give_none(world):
    found = findings_of(world)
    assert set(found["key"]) == {"speed", "single", "fresh"}
    speed = found[found["key"] == "speed"]
    assert speed["place"].tolist() == ["ssm/tesla-t4", "ssm/cpu-intel-xeon-2t"], "a GPU first"
    assert speed["answer"].iloc[0].startswith("**Yes: 0.33× the time.** At length 128, fast takes 0.33")
    assert set(found["notebook"]) == {"ssm_demo", "vlm_demo", "ssm_fresh"}


EXPECTED = dict(
    mrss=(1.5, "**No: 1.5× the time.**"), split=(3, "**Yes: 3.0× as fast.**"), split_error=(3, "**3.0× the error.**"),
    signals=(0.5, "**0.50× the baseline's error on a smooth one, 0.67× that of equal compute.**"), modalities=(0.8, "**Yes: 0.80× the error.**"),
    scan_attention=(8, "**Our Mamba-2 from 512 tokens on, attention up to 256.**"),
    scan_decode=(8, "**Our Mamba-2 from 256 tokens on, the smallest number measured.**"), scan_library=(2, "**For Mamba-2 on this CPU, yes: 2.0× as fast.**"),
    multirate_error=(2, "**Not for free: 2.0× the errors.**"), router=(3, "**No: 3.0× the errors.**"), distil_decode=(5, "**Yes, if the kernel is one: 5.0× as fast.**"),
    distil_error=(0.2002, "**Not within one per cent: 20.0 % output error.**"), vision_speed=(2, "**At 4096 patches, 2.0× as fast; not at 196.**"), vision_error=(2, "**No: 2.0× the errors.**"),
    scan_clip=(0.9, "**Not closely: cosine 0.90.**"), original=(-0.05, "**No: 5.0 points lost.** On enlarged CIFAR-10 images, with 68 %"),
    merging=(0.95, "**Cosine 0.95.** On enlarged CIFAR-10 images, with 49 %"), tokens_free=(0, "**Down to 64 of 197 tokens, seven tenths of the compute: less than one point lost.**"), tokens_half=(0.94, "keeps 94.0 % (93.5–94.5)"),
    tokens_tome=(0.04, "**Yes: 4.0 points more answers stay.**"), photos=(0.1, "**Yes: 10.0 points more than ToMe.** On photographs, with 49 %"), tokens_time=(1.6, "**Yes, 8 images at a time: 1.6× as fast.**"),
    tokens_input=(-0.15, "**15.0 points fewer"), scaling=(2, "**2.0× as fast.**"), crossing=(4000, "**Not at the 197 tokens of its images.**"),
    hardware=(2, "**bfloat16, on this device: 2.0× as fast.** With all tokens and 8 images at a time"), qwen=(1.5, "**Before the vision tower: 1.5× as fast as inside it.** With a quarter"),
    fusion=(-0.3, "**Fewer tokens: thinning loses 30.0 points.**"), few_shot=(0.06, "**6.0 points.** On CIFAR-10, with 16 labelled"),
    masked=(0.03, "**Yes: 3.0 points more.**"), queries=(-0.2, "**No: 20.0 points lost.** After 14 seconds of training on two cores, a small Q-Former"),
    compressed=(0.04, "**Yes: 4.0 points more.** A small CLIP"))


def test_every_finding_of_the_project_selects_exactly_one_number(tables):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an ambiguous selection warns
        found = pd.DataFrame(findings.collect(reading.find_places(tables)[0]))
    assert found["key"].is_unique and found["key"].tolist() == [f.key for f in FINDINGS] == list(EXPECTED)
    for row in found.to_dict("records"):
        value, words = EXPECTED[row["key"]]
        assert row["value"] == pytest.approx(value, rel=0.02, abs=1e-9), row["key"]
        assert words in row["answer"] and "{" not in row["answer"] + row["more"], row
        assert bool(row["more"]) == bool(next(f.more for f in FINDINGS if f.key == row["key"])), row["key"]


@pytest.mark.parametrize("finding", FINDINGS, ids=[f.key for f in FINDINGS])
def test_a_finding_without_its_rows_is_absent(tables, finding, monkeypatch):
    places, read = reading.find_places(tables)[0], Place.table

    def without(place, name):
        if name.removesuffix("_raw") == finding.number.table:
            raise Missing(name)
        return read(place, name)

    monkeypatch.setattr(Place, "table", without)
    assert findings.collect(places, [finding]) == []


def test_what_is_beside_a_finding_may_be_missing(tables):
    finding = next(f for f in FINDINGS if f.key == "mrss")
    partly = Finding(**(vars(finding) | dict(beside={})))
    (row,) = findings.collect(reading.find_places(tables)[0], [partly])
    assert row["more"] == "" and row["answer"].startswith("**No: 1.5× the time.**")


def test_an_ambiguous_selection_is_told(tables):
    vague = Finding("k", "ssm/x", "?", Cell("scan_layers", "latency_ms_median", dict(length=256)), "{value}")
    with pytest.warns(UserWarning, match="scan_layers: 6 rows fit length=256"):
        assert findings.collect(reading.find_places(tables)[0], [vague]) == []


def test_a_renamed_column_is_told_and_the_rest_is_reported(tables, tmp_path):
    root = shutil.copytree(tables, tmp_path / "copy")
    path = root / "results/ssm/tesla-t4/scan_layers.csv"
    write_csv(path, read_csv(path).rename(columns=dict(latency_ms_median="ms", length="tokens")))
    found = report.read(root)
    assert set(found.findings["key"]) == {f.key for f in FINDINGS} - {"scan_attention"}
    with pytest.warns(UserWarning, match="ssm/tesla-t4: the chart layers: no column 'length'"):
        assert charts.drawn(charts.layers, poster.Page().figure.add_subplot(), place_of(root)) is None
    with pytest.warns(UserWarning, match="ssm/tesla-t4: demo_speed: no column 'train'"):
        assert findings.find(Least("demo_speed", "latency_ms_median", dict(variant="slow"), over="train"), place_of(root)) is None


# Modes


def test_quick_is_never_shown_where_something_is_published(world):
    found, claims = findings_of(world), claims_of(world)
    quick = found[found["mode"] == "quick"]
    assert set(quick["key"]) == {"fresh"} and quick["device"].str.endswith(", quick").all()
    assert set(found.loc[found["mode"] == "full", "key"]) == {"speed", "single"}
    assert not claims["place"].astype(str).str.endswith("-quick").any()
    runs = report.read(world).runs
    assert set(runs.loc[runs["mode"] == "quick", "notebook"]) == {"ssm_fresh"}
    assert not any("-quick" in str(f["path"]) for f in report.read(world).figures)


def test_quick_is_shown_where_nothing_else_is(tmp_path, invented):
    report_world.write_place(tmp_path, "ssm", "cpu-x-quick", "Xeon X", "quick")
    found = report.read(tmp_path)
    assert found.findings["device"].tolist() == ["Xeon X, 2 threads, quick"] and len(found.figures) == 2
    assert (found.claims["device"] == "Xeon X, 2 threads, quick").sum() == 12 and found.runs["mode"].tolist() == ["quick"]


def test_old_modes_count_as_full_and_strange_ones_nowhere(tmp_path, invented):
    report_world.write_place(tmp_path, "ssm", "old", "CPU", "cpu")
    assert report.read(tmp_path).findings["mode"].tolist() == ["full"]
    for name, mode in (("a", "smoke"), ("b-quick", "full"), ("c", "quick")):
        root = tmp_path / name
        report_world.write_place(root, "ssm", name, "CPU", mode)
        found = report.read(root)
        assert found.places == [] and found.findings.empty and found.figures == [] and set(found.claims["reason"]) == {text.UNJUDGED}


def test_smoke_never_enters(world):
    assert "Smoke" not in set(claims_of(world)["device"]) | set(findings_of(world)["device"])
    for name in ("results/report.html", "README.md"):
        assert "smoke-device" not in (world / name).read_text()


# Claims


def test_every_claim_has_a_row_and_every_verdict_a_measurement(world):
    claims, known = claims_of(world), statements()
    assert list(dict.fromkeys(claims["id"])) == list(known)
    assert not claims.duplicated(["id", "place"]).any()
    judged = claims[claims["verdict"] != "not testable here"]
    assert set(judged["verdict"]) == set(VERDICTS[:3]) and judged[["measured", "source", "device"]].notna().all(axis=None)
    nobody = claims[claims["reason"] == text.UNJUDGED]
    assert set(nobody["id"]) == {*(f"A{i}" for i in range(13, 22)), *(f"B{i}" for i in range(13, 20))}
    assert nobody["device"].isna().all()
    for row in nobody.astype(object).fillna("").to_dict("records"):
        assert {k: row[k] for k in ("statement", "quantity", "condition", "claimed", "unit")}.items() <= known[row["id"]].items()
    block = text.claims_block(report.read(world))
    assert f"- ○ **not testable here** B16 {known['B16']['statement']} (claimed: 2r/d). {text.UNJUDGED}.\n" in block
    assert '<td data-label="Claimed">2r/d</td>' in (world / "results/report.html").read_text()


def test_the_statements_are_those_of_the_original_report():
    """Its own list lies beside the project, never inside: EA_CLAIMS names it, else it is looked for where CI has it."""
    path = Path(os.environ.get("EA_CLAIMS", ROOT.parent / "shared/original_claims.csv"))
    if not path.exists():
        pytest.skip("the original report's list of claims is not here (EA_CLAIMS)")
    original = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("id").sort_index()
    ours = pd.DataFrame(statements().values()).set_index("id").sort_index()
    facts = ["suite", "claimed", "unit"]
    pd.testing.assert_frame_equal(ours[facts], original[facts], check_dtype=False)


def test_decided_claims_are_shown_and_the_others_folded(world):
    block = text.claims_block(report.read(world))
    shown, folded = block.split("<details>")
    assert "- ✓ **supported** A01 " in shown and "- ✗ **not supported** A02 " in shown and "because of row 1" in shown
    assert "- ? **undecided** A03 " in folded and "- ○ **not testable here** A04 " in folded and text.UNJUDGED in folded
    assert "✓ " not in folded and "? **undecided" not in shown
    assert "25 rounds (Tesla T4)" in shown, "two devices: each is named"


def test_a_decided_verdict_wins_over_none_a_new_one_over_an_old_and_strange_claims_are_refused(tmp_path):
    report_world.write_world(tmp_path)
    path = tmp_path / "results/ssm/tesla-t4/claims.csv"
    table = read_csv(path)
    other = table[table["id"].isin(["A01", "A02", "A04"])].assign(
        notebook="zz_other", measured=5.0, low=4.0, high=6.0, verdict="not supported", source="x.csv: i=0")
    other.loc[other["id"] == "A02", "utc_time"] = "2026-02-02T00:00:00Z"
    other.loc[other["id"] == "A01", ["utc_time", "verdict"]] = "2026-02-02T00:00:00Z", "undecided"
    write_csv(path, pd.concat([table, other]))
    found = report.read(tmp_path).claims.set_index(["id", "place"])["measured"]
    assert found["A04", "ssm/tesla-t4"] == 5 and found["A02", "ssm/tesla-t4"] == 5
    assert found["A01", "ssm/tesla-t4"] == 1.2345, "decided beats undecided"
    write_csv(path, table.assign(id="Z01"))
    with pytest.raises(ValueError, match="'Z01' is no statement"):
        report.read(tmp_path)


def test_a_statement_counts_with_the_first_device_that_decided_it():
    frame = pd.DataFrame([dict(id="A01", suite="ssm", verdict=v) for v in ("undecided", "not supported", "supported")])
    assert text.verdict_counts(frame)["ssm"] == dict(zip(VERDICTS, (0, 1, 0, 0), strict=True))


# Texts


@pytest.mark.parametrize("value, unit, words", [
    (0.33333, "×", "0.333×"), (12.345, "ms", "12.3 ms"), (1234.5, "", "1234"), (0.93456, "%", "93.5 %"), (30.0, "", "30"),
    (-0.25, "", "−0.250"), (-0.034, "points", "−3.4 points"), (0.0008, "%", "0.08 %"), (2.5e-7, "", "2.5e-07"), (0, "", "0"),
    (float("nan"), "", ""), (None, "ms", "")])
def test_numbers_as_readers_see_them(value, unit, words):
    assert text.number(value, unit) == words


@pytest.mark.parametrize("value, unit, words", [
    (1.82144, "×", "1.8×"), (63.11, "×", "63×"), (0.5512, "×", "0.55×"), (-0.059, "points", "5.9 points"), (4677.4, "tokens", "4677 tokens")])
def test_numbers_in_a_verdict_are_short(value, unit, words):
    assert text.short(value, unit) == words


def test_alt_texts_of_both_kinds_of_picture(tmp_path):
    for name in ("a.png", "b.jpg"):
        report_world.write_figure(tmp_path / name, "Größe × 2 – µ")
        assert reading.alt_text(tmp_path / name) == "Größe × 2 – µ"


def test_the_measuring_code_writes_what_is_read_here(tmp_path):
    from matplotlib.figure import Figure

    from effarch.bench.figures import encode

    for photo, name in ((False, "a.png"), (True, "b.jpg")):
        (tmp_path / name).write_bytes(encode(Figure(figsize=(1, 1)), "Größe × 2 – µ", photo))
        assert reading.alt_text(tmp_path / name) == "Größe × 2 – µ"


NOT_NUMBERS = re.compile(r"<[^>]*>|\]\([^)]*\)|torch [\w.+]+|ViT-\w+/\d+|\d{4}-\d\d-\d\d")
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)(\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![.]?\w)( ?%)?")


def numbers_in(words):
    """[(number, whether % follows)] of all numbers but those of links, dates, versions, commits and names such as Mamba-2."""
    return [(number, bool(percent)) for number, percent in NUMBER.findall(NOT_NUMBERS.sub(" ", words))]


def backed(number, cells, share=False):
    """Whether a number is one of some CSV cells, rounded to its digits, or is written in one; share: as per cent, too."""
    digits = len(number.split("e")[0].partition(".")[2])
    words = " ".join(c for c in cells if isinstance(c, str))
    words = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?", words)
    values = [float(c) for c in [*cells, *words] if isinstance(c, int | float) or c in words]
    shown = {f"{abs(v):.{digits}{'e' if 'e' in number else 'f'}}" for v in [*values, *(100 * v for v in values if share)]}
    return number in words or number in shown


def lines_and_rows(name, body, root):
    """[(line, CSV cells behind it, whether they are shares)] of a block."""
    lines = [line for line in body.splitlines() if line.strip()]
    found, claims = findings_of(root), claims_of(root)
    kept = ["value", "low", "high", "n", "n_of", "source", "words", "question"]
    if name == "findings":
        rows = [line for line in lines if line.startswith("- ")]
        behind = pd.concat([mine for _, mine in found.groupby("suite", sort=False)]) if len(found) else found
        return [(line, row[kept].tolist(), row["unit"] in ("%", "points")) for line, (_, row) in zip(rows, behind.iterrows(), strict=True)]
    if name == "answers":
        keys = [key for key, *_ in report.collect(root).headlines]
        rows = [line for line in lines if line.startswith("**")]
        first = found.drop_duplicates("key").set_index("key", drop=False)
        return [(line, first.loc[key, kept].tolist(), first.loc[key, "unit"] in ("%", "points")) for line, key in zip(rows, keys, strict=True)]
    if name == "claims":
        kept = ["statement", "claimed", "measured", "low", "high", "n", "unit", "reason"]
        rows = [line for line in lines if re.match("- [✓✗?○]", line)]
        decided = claims["verdict"].isin(text.DECIDED)
        behind = pd.concat([claims[decided], claims[~decided]])
        assert len(rows) == len(behind)
        return [(line, row[kept].tolist(), row["unit"] == "points") for line, (_, row) in zip(rows, behind.iterrows(), strict=True)]
    if name == "runs":
        rows = [line for line in lines if line.startswith("| [")]
        return [(line, [row["minutes"], row["commit"]], False) for line, (_, row) in zip(rows, report.read(root).runs.iterrows(), strict=True)]
    return []


def unbacked(root):
    """The numbers in the README's generated blocks that are not in the CSV row of their line."""
    wrong, words = [], (root / "README.md").read_text()
    rows = [*claims_of(root).dropna(subset="device").to_dict("records"), *findings_of(root).to_dict("records"), *report.read(root).runs.to_dict("records")]
    devices = {text.where(row) for row in rows}
    for device in sorted(devices, key=len, reverse=True):
        words = words.replace(device, "")
    for _, name, body, _ in text.BLOCK.findall(words):
        behind = lines_and_rows(name, body, root)
        for line, cells, share in behind:
            wrong += [n for n, percent in numbers_in(line) if not backed(n, cells, share or percent)]
        other = [line for line in body.splitlines() if line not in {line for line, *_ in behind}]
        told = [n for line in other for n, _ in numbers_in(line) if "95 % interval" not in line and not line.startswith("### ")]
        counts = [str(n) for mine in text.verdict_counts(claims_of(root)).values() for n in mine.values()]
        wrong += told if told != (counts if name == "claims" else []) else []
    return wrong


def test_every_number_in_generated_blocks_is_in_its_csv_row(world):
    assert len(numbers_in((world / "README.md").read_text())) > 60
    assert unbacked(world) == []


@pytest.mark.parametrize("true, false, wrong", [
    ("0.33", "0.77", 1), ("length 128", "length 129", 1), ("25 rounds in", "26 rounds in", 1), (", 25 rounds", ", 26 rounds", 1),
    ("(1.10–1.30)", "(1.10–1.31)", 1), ("claimed: 30.50", "claimed: 30.51", 1), ("1.23 ms", "1.24 ms", 1), ("| 1.50 |", "| 1.60 |", 1), (" supported", "7 supported", 8)])
def test_a_forged_number_is_found(world, tmp_path, true, false, wrong):
    forged = shutil.copytree(world, tmp_path / "forged")
    readme = (forged / "README.md").read_text()
    assert true in readme
    (forged / "README.md").write_text(readme.replace(true, false, 1))
    assert len(unbacked(forged)) == wrong


def test_what_is_a_number():
    words = "107× (98.3–115) and 96.7 % of 8192 at r = 4, −0.25; 1.4e-14. <b 3> [x](y/4) torch 2.11.0+cu130 2026-11-25 " \
            "ViT-B/16 Mamba-2 S4D CIFAR-10 A01 1021eade6e 2dr d² 2r/d p=0.5"
    assert [n for n, _ in numbers_in(words)] == ["107", "98.3", "115", "96.7", "8192", "4", "0.25", "1.4e-14", "0.5"]
    assert [n for n, percent in numbers_in(words) if percent] == ["96.7"]


# README


def test_readme_blocks_are_filled_and_prose_is_kept(world):
    words = (world / "README.md").read_text()
    assert words.startswith("# Title\n\nWords.") and words.endswith("More words.\n")
    assert "**Sequence models** on Tesla T4, where a line does not name another:" in words and "Measured on CPUs so far" not in words
    assert [reading.Place(world, "ssm", slug).gpu for slug in ("tesla-t4", "nvidia-h100", "cpu-amd-epyc-2t")] == [True, True, False]
    assert "**Sequence models** on Tesla T4" and "- *Is fast faster?* **Yes: 0.33× the time.**" in words
    assert " [25 rounds in 2 runs]\n" in words and " [Intel Xeon 2.20GHz, 2 threads · 25 rounds]\n" in words and "[ssm_demo](results/ssm/tesla-t4/ssm_demo.ipynb)" in words
    assert "File → Upload notebook" in words and "colab-badge" not in words
    for target in re.findall(r"\]\(([^)]+)\)", words):
        assert target.startswith("https://") or target in ("ssm", "vlm") or (world / target).exists(), target
    with pytest.raises(ValueError, match="report:nonsense is none of"):
        text.fill("<!-- report:nonsense -->\n<!-- /report:nonsense -->", report.read(world))


def test_badges_where_the_project_names_its_address(world, tmp_path):
    root = shutil.copytree(world, tmp_path / "copy")
    (root / "vlm").mkdir()
    (root / "vlm/x.ipynb").write_text("{}")
    (root / "pyproject.toml").write_text('[project]\nurls = {Home = "https://example.org", Repository = "https://github.com/a-b/c.d"}\n')
    block = text.start_block(report.read(root))
    assert "](https://colab.research.google.com/github/a-b/c.d/blob/main/vlm/x.ipynb)" in block
    (root / "pyproject.toml").write_text("[project]\n")
    assert "Upload notebook" in text.start_block(report.read(root))


def test_the_three_answers_have_pictures_of_the_tables(tables, tmp_path):
    root = shutil.copytree(tables, tmp_path / "copy")
    report.write(root)
    words, pictures = (root / "README.md").read_text(), sorted((root / "figures/report").iterdir())
    assert [p.name for p in pictures] == ["layers.png", "rates.png", "tokens.png"] and report.stale(root) == []
    for picture in pictures:
        assert f'<img src="figures/report/{picture.name}" width="640" alt="{reading.alt_text(picture)}">' in words
        assert picture.stat().st_size < 60_000
    assert words.count("\n### ") == 3 and "### Is MRSS, a layer at two rates, faster than its baseline?\n\n**No: 1.5× the time.**" in words
    assert unbacked(root) == []
    (root / "results/ssm/tesla-t4/mrss_proxy_results.csv").unlink()
    assert "rates.png" not in text.answers_block(report.collect(root))


def test_a_headline_picture_is_titled_by_its_verdict(tables, monkeypatch):
    titles, draw = [], charts.picture
    monkeypatch.setattr(charts, "picture", lambda title, *rest: titles.append(title) or draw(title, *rest))
    shown = report.collect(tables)
    verdicts = shown.findings.drop_duplicates("key").set_index("key")["answer"].str.extract(r"\*\*(.*?)\.?\*\*")[0]
    assert "Is MRSS faster? No: 1.5× the time" in titles
    for (key, _, question, *_), title in zip(charts.HEADLINES, titles, strict=True):
        assert title == f"{question} {verdicts[key]}"
    elsewhere = next(place for place in shown.places if place.suite == "vlm")
    assert charts.verdict_at(shown, "mrss", elsewhere) == ""


def test_a_photograph_stands_with_the_third_answer_and_on_the_poster(tables, tmp_path):
    root = shutil.copytree(tables, tmp_path / "copy")
    without = len(poster.draw(report.collect(root)).axes)
    folder = next(root.glob("results/vlm/**/token_reduction_methods.csv")).parent
    folder = root / "figures" / folder.relative_to(root / "results")
    folder.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x010E] = "before and after"
    Image.new("RGB", (90, 50), (200, 30, 10)).save(folder / "photograph_answer.jpg", exif=exif)
    shown = report.collect(root)
    words, drawn = text.answers_block(shown), poster.draw(shown).axes
    link = (folder / "photograph_answer.jpg").relative_to(root).as_posix()
    assert 'figures/report/tokens.png' in words.split(link)[0] and f'<img src="{link}" width="640" alt="before and after">' in words
    assert len(drawn) == without + 1 and drawn[-1].images[0].get_array().shape == (50, 90, 3)
    box = drawn[-1].get_position()
    assert box.width * poster.WIDTH / (box.height * poster.HEIGHT) == pytest.approx(90 / 50), "not stretched"


@pytest.mark.parametrize("n, words", [("1", "1 model"), ("3", "3 models"), ("", "")])
def test_repetitions_are_of_one_or_of_several(n, words):
    assert text.repetitions(dict(n=n, n_of="models")) == words


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


def test_a_report_that_fails_changes_nothing(world, tmp_path, invented, monkeypatch):
    root = shutil.copytree(world, tmp_path / "copy")
    path = root / "results/ssm/tesla-t4/claims.csv"
    write_csv(path, read_csv(path).assign(measured=7.5))
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    monkeypatch.setattr(poster, "pdf", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(root)
    assert before == {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}


README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_three_snippets():
    assert len(SNIPPETS) == 3 and "token_reduction(model" in SNIPPETS[0] and "compare(" in SNIPPETS[1] and "ssd(" in SNIPPETS[2]


@pytest.mark.parametrize("i", range(3), ids=["token_reduction", "compare", "ssd"])
def test_the_readmes_snippets_run_as_they_stand(i, capsys):
    torch.manual_seed(0)
    names = {}
    exec(compile(SNIPPETS[i], f"README.md, snippet {i + 1}", "exec"), names)
    if i == 0:
        full = names["model"].get_image_features(pixel_values=names["pixels"])
        shape, reduced = lambda out: getattr(out, "pooler_output", out), names["features"]
        assert shape(reduced).shape == shape(full).shape and not torch.equal(shape(reduced), shape(full))
    elif i == 1:
        assert 0 < names["low"] <= names["ratio"] <= names["high"] and "by hand takes" in capsys.readouterr().out
    else:
        assert names["y_next"].shape == names["x"].shape and names["y_next"].isfinite().all()
        assert not torch.equal(names["y"], names["y_next"])


def test_the_readmes_prose_states_no_measured_number():
    assert {name for _, name, *_ in text.BLOCK.findall(README)} == set(text.BLOCKS)
    prose = text.BLOCK.sub("", README)
    prose = re.sub(r"```.*?```|arXiv:\d{4}\.\d{4,5}|Python \d\.\d+|`[^`]*`", " ", prose, flags=re.S)
    assert re.findall(r"\d+\.\d+|\d+\s*(?:%|×|ms\b|MiB|points|times|images)", prose) == []
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("results/") or (ROOT / target).exists(), target


def test_the_readme_is_short_and_in_order():
    assert len(text.BLOCK.sub("", README).splitlines()) < 160  # and what is generated
    order = ["report:start", "report:answers", "I have a T4", "## Use it in your own code", "report:findings", "report:claims",
             "## Limits", "## Run it", "## Layout", "bibtex", "CONTRIBUTING"]
    assert [README.index(part) for part in order] == sorted(README.index(part) for part in order)
    for path in [*ROOT.glob("ssm/*.ipynb"), *ROOT.glob("vlm/*.ipynb")]:
        assert path.stem in README, path


def test_nothing_measured_with_fitted_labels_is_called_zero_shot():
    told = text.BLOCK.sub("", README) + "".join(str(vars(f)) for f in FINDINGS) + "".join(alt for *_, alt in charts.HEADLINES)
    assert "zero-shot" not in told.lower() + poster.QUESTION + poster.METHOD


def test_the_citation_is_one():
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    facts = dict(re.findall(r"^(\w[\w-]*): (.+)$", cff, re.M))
    assert facts["version"] == effarch.__version__ and f"version = {{{facts['version']}}}" in README
    assert f"title   = {{{facts['title']}}}" in README and f"year    = {{{facts['date-released'][:4]}}}" in README
    assert f"author  = {{{{{poster.authors(ROOT)}}}}}" in README


def test_times_or_figures_that_are_newer_say_so():
    at = dict(git_commit="abc", git_dirty=False)
    assert reading.other_commits({}) == ""
    assert reading.other_commits(dict(trained=at)) == ", trained at abc"
    assert reading.other_commits(dict(trained=at, redrawn=at | dict(git_dirty=True))) == ", trained at abc, drawn again at abc+"


# The repository's own report


def real_report():
    if not reading.find_places(ROOT)[0]:
        pytest.skip("no results in the repository yet")


def test_the_reports_in_the_repository_are_up_to_date():
    real_report()
    assert [p.name for p in report.stale(ROOT)] == []


def test_the_repositorys_selections_are_not_ambiguous_and_all_find_rows():
    """Each finding of a notebook that was run."""
    real_report()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report.read(ROOT)
    ran = set(found.runs["suite"] + "/" + found.runs["notebook"])
    assert [f.key for f in FINDINGS if f.notebook in ran and f.key not in set(found.findings["key"])] == []


def test_the_repositorys_numbers_claims_and_verdicts_are_backed():
    real_report()
    assert unbacked(ROOT) == []
    claims = claims_of(ROOT)
    assert set(claims["id"]) == set(statements())
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
        splits = [re.split(comma + " | against ", where) for comma in (",", r",(?= \w+=)")]  # a value may hold a comma itself
        lost = min(([part for part in parts if not in_table(part, table)] for parts in splits), key=len)
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


def undocumented(root, dictionary):
    """What tables and columns under results/ the data dictionary does not name."""
    words, wrong = set(re.findall(r"`([^`]+)`", dictionary)), set()
    for path in (root / "results").rglob("*.csv"):
        wrong |= {path.name} if path.name not in words and not path.stem.endswith("_raw") else set()
        for column in pd.read_csv(path, nrows=1).columns:
            stem = re.sub(r"_(low|high|p\d+)$", "", column)
            stem = re.sub(r"_minus_(best|tome|fixed|dense|previous|ours)$", "_minus_x", stem)
            wrong |= {f"{path.name}: {column}"} if not {column, stem, f"{stem}_median"} & words else set()
    return wrong


def test_the_data_dictionary_is_complete(tables):
    dictionary = (ROOT / "results/README.md").read_text(encoding="utf-8")
    assert undocumented(ROOT, dictionary) == set()
    found = {w for w in undocumented(tables, dictionary) if not w.startswith(("demo_speed", "fresh"))}
    assert found == set()
    for name in (*reading.COLUMNS, *reading.FINDING_COLUMNS, "process", *VERDICTS):
        assert f"`{name}`" in dictionary, name
    assert undocumented(tables, dictionary.replace("`crossing_tokens`", "")) >= {"token_scaling_fits.csv: crossing_tokens"}


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
    assert {i["alt"] for i in reader.images} >= {"An invented detail of ssm × Tesla T4"}
    assert reader.other == ["data:,"]
    for link in reader.links:
        assert link.startswith("#") or (path.parent / link).exists(), link
    assert path.stat().st_size < page.MOST_BYTES
    assert "<strong>Yes: 0.33× the time.</strong> At length 128" in path.read_text()


def test_page_escapes_what_it_shows(tmp_path, invented):
    report_world.write_world(tmp_path)
    path = tmp_path / "results/ssm/tesla-t4/claims.csv"
    write_csv(path, read_csv(path).assign(reason="<script>alert(1)</script> & more"))
    shown = page.page(report.read(tmp_path))
    assert "<script>alert" not in shown and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in shown


def test_pictures_shrink_until_the_page_is_small(tmp_path, monkeypatch):
    report_world.write_figure(tmp_path / "f.png", "a")
    figures = [dict(path=tmp_path / "f.png")]
    monkeypatch.setattr(page, "SIZES", [(600, 82), (400, 50)])
    uri, width, height = page.embed(figures)[tmp_path / "f.png"]
    assert (width, height) == (600, 338)
    monkeypatch.setattr(page, "MOST_BYTES", len(uri) // 2)
    assert page.embed(figures)[tmp_path / "f.png"][1] == 400


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
def test_poster_is_legible_and_nothing_overflows(tables, tmp_path, which):
    root = dict(nothing=tmp_path, invented=tables, repository=ROOT)[which]
    if which == "repository":
        real_report()
    figure = poster.draw(report.read(root))
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    assert min(t.get_fontsize() for t in texts) >= 24
    own = [t for t in texts if t in figure.texts]
    assert len(own) > 10
    whole, renderer = figure.bbox, figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in own]
    assert all(b.x0 >= 30 and b.y0 >= 20 and b.x1 <= whole.x1 - 30 and b.y1 <= whole.y1 - 20 for b in boxes)
    panels = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert all(p.x0 >= 30 and p.y0 >= 20 and p.x1 <= whole.x1 - 20 and p.y1 <= whole.y1 - 20 for p in panels)
    assert len(panels) >= dict(nothing=2, invented=12, repository=2)[which]
    for axes in figure.axes:  # labels of one axis leave each other room
        for axis, begin, end in ((axes.xaxis, "x0", "x1"), (axes.yaxis, "y0", "y1")):
            labels = [t.get_window_extent(renderer) for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
            labels.sort(key=lambda b: getattr(b, begin))
            assert all(getattr(a, end) <= getattr(b, begin) + 2 for a, b in zip(labels, labels[1:], strict=False))
        names = [t.get_window_extent(renderer) for t in axes.texts]  # nor do names of series touch
        assert not any(a.overlaps(b) and min(a.y1, b.y1) - max(a.y0, b.y0) > 4 for k, a in enumerate(names) for b in names[k + 1:])
    for i, box in enumerate(boxes):
        for other, words in zip([*boxes[i + 1:], *panels], [*own[i + 1:], *panels], strict=True):
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 0 or down <= 2, f"{own[i].get_text()!r} overlaps {words}"


def test_poster_is_the_same_twice(world, invented):
    assert poster.pdf(report.collect(world)) == (world / "results/poster.pdf").read_bytes()


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
    chrome.command_executor.client_config.timeout = 600  # a loaded machine is no fault
    chrome.set_script_timeout(600)
    chrome.set_page_load_timeout(600)
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
        for verdict in ("", *VERDICTS):
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

    for path in pages(world)[:2 if (scheme, width) in (("light", 375), ("dark", 1280)) else 1]:
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
