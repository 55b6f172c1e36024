"""What the notebooks about scans share: tasks that need memory, their training, cases, agreement, crossings."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effarch.bench import half_type, redrawn, start
from effarch.bench.recall import RECALL, choose_rates, error_ratio, learn_all, learn_recall, recall_counts
from effarch.bench.sequences import (
    Agreement,
    Case,
    attention_flops,
    crossing,
    faster,
    library_fits,
    measured,
    time_cases,
)
from effarch.bench.tables import Table

LIMITS = dict(matmul_flops_per_s=1e9, copy_bytes_per_s=1e9)


@pytest.fixture
def run(tmp_path):
    return start("ssm/some", dict(MODE="smoke", SEED=1, OUT=str(tmp_path), RESUME=True, SECONDS=None))


class Lookup(nn.Module):
    """ids → (logits, nothing): one number per token and next token."""

    def __init__(self, vocabulary=64):
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, ids):
        return self.table(ids), None


@pytest.mark.parametrize("task", RECALL)
def test_tasks_can_be_solved_from_what_they_show(task):
    make, vocabulary = RECALL[task]
    ids, labels = make(200, generator=torch.Generator().manual_seed(1))
    assert ids.shape == labels.shape and int(ids.max()) < vocabulary and int(ids.min()) >= 0
    for row, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        places = [t for t, label in enumerate(asked) if label >= 0]
        if task == "induction":
            answers = [row[row.index(0) + 1]]
            assert row[:-1].count(0) == 1
        elif task == "copying":
            answers = [v for v in row if v > 1]
        else:
            answers = [row[row.index(row[t]) + 1] for t in places]
            assert len(places) == 4 and all(row.index(row[t]) < 8 and row.index(row[t]) % 2 == 0 for t in places)
        assert [asked[t] for t in places] == answers


@pytest.mark.parametrize("task, options, words", [
    ("mqar", dict(length=10, pairs=4), "pairs=4.*1 to 2"), ("mqar", dict(length=64, pairs=16, vocabulary=32), "pairs=16.*1 to 15"),
    ("copying", dict(length=3, memory=4), "memory=4.*length=3"), ("induction", dict(length=2), "length=2.*at least 3")])
def test_what_cannot_be_shown_is_not_asked(task, options, words):
    with pytest.raises(ValueError, match=words):
        RECALL[task][0](2, **options)


def test_the_smallest_tasks_ask_for_all_they_show():
    assert [int((RECALL[t][0](5, **o)[1] >= 0).sum()) for t, o in (
        ("mqar", dict(length=16, pairs=4)), ("mqar", dict(length=60, pairs=15, vocabulary=32)), ("copying", dict(length=4)),
        ("induction", dict(length=3)))] == [20, 75, 20, 5]
    with pytest.raises(ValueError, match="steps=0"):
        learn_recall(Lookup(), "mqar", 0, 0)


@pytest.mark.parametrize("kind", ["forward", "forward+backward"])
def test_what_the_librarys_path_writes_out_is_what_is_refused(kind):
    """Its largest product, found by watching it run on meta tensors, is the one that the guard compares with its limit."""
    scan = pytest.importorskip("transformers.models.mamba2.modeling_mamba2").mamba2_chunk_scan
    run = SimpleNamespace(device=torch.device("cpu"))
    for length, chunk, heads, width, states in ((64, 8, 2, 4, 3), (64, 2, 2, 4, 3), (64, 64, 2, 4, 3), (64, 4, 1, 32, 1), (8, 256, 2, 4, 2)):
        class Largest(TorchDispatchMode):
            numbers = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                if func is torch.ops.aten.mul.Tensor:
                    self.numbers = max(self.numbers, out.numel())
                return out

        x, dt = torch.ones(1, length, heads, width, device="meta"), torch.ones(1, length, heads, device="meta")
        A, B = torch.ones(heads, device="meta"), torch.ones(1, length, 1, states, device="meta")
        with Largest() as largest:
            scan(x, dt, A, B, B, chunk)
        gib = 4 * largest.numbers / 2**30 * (1 if kind == "forward" else 2)
        given = (run, kind, 1, length, chunk, heads, width, states)
        assert library_fits(*given, gib=1.001 * gib) and not library_fits(*given, gib=0.9 * gib)
        assert library_fits(SimpleNamespace(device=torch.device("cuda")), *given[1:], gib=0)


def test_the_same_seed_gives_the_same_data_and_training():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Lookup()
        row = learn_recall(model, "mqar", 3, 5)
        results.append((row["accuracy"], row["steps"], model.table.weight.detach().clone()))
    assert results[0][:2] == results[1][:2] and torch.equal(results[0][2], results[1][2])


def test_training_learns_stops_at_the_target_and_counts():
    torch.manual_seed(0)
    model = Lookup(10)
    model.table.weight.data[1, 0] = 4.0  # at a marker it says "blank", which is never right
    assert recall_counts(model, "copying") == (2048, 2048)
    row = learn_recall(model, "copying", 160, 0, rate=0.1, target=0.05)
    assert row["steps"] in (50, 100) and row["wrong"] < 1900 and row["n_test"] == 512 * 4
    assert row["accuracy"] == 1 - row["wrong"] / row["n_test"] and row["status"] == "ok" and row["params"] == 100


def test_a_diverged_model_is_nan_not_a_score():
    model = Lookup(10)
    model.table.weight.data[3, 3] = math.nan
    wrong, asked = recall_counts(model, "copying")
    assert math.isnan(wrong) and asked == 2048
    assert learn_recall(model, "copying", 1, 0)["status"] == "nan"


def test_further_losses_reach_the_model():
    torch.manual_seed(0)
    plain, pulled = Lookup(10), Lookup(10)
    pulled.load_state_dict(plain.state_dict())
    learn_recall(plain, "copying", 2, 0)
    learn_recall(pulled, "copying", 2, 0, extra_loss=lambda m: 100 * m.table.weight.square().sum())
    assert pulled.table.weight.norm() < plain.table.weight.norm()


def test_all_models_train_once_and_errors_are_paired_by_seed(run, capsys):
    table, built = Table(run, "trainings", key=["task", "variant", "seed_of_model"]), []

    def build(task):
        built.append(task)
        return Lookup(RECALL[task][1])

    models = dict(one=build, other=build)
    trained = learn_all(run, table, models, ["copying"], 2, 2, describe=lambda model: dict(extra=7))
    assert len(built) == 4 and set(trained) == {("copying", v, s) for v in models for s in (1, 2)}
    assert all(row["extra"] == 7 and row["most_steps"] == 2 for row in table.rows)
    assert learn_all(run, table, models, ["copying"], 2, 2) == {} and len(built) == 4
    rows = [dict(row) for row in table.rows]
    again = learn_all(run, table, models, ["copying"], 2, 2, keep=run.seed)  # as a later process does, which has the rows only
    assert set(again) == {key for key in trained if key[2] == run.seed} and [dict(row) for row in table.rows] == rows
    for key, model in again.items():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained[key].parameters(), strict=True))
    ratio = error_ratio(table, "one", "other", task="copying")
    assert ratio == (1, 1, 1)  # the same start and data
    capsys.readouterr()
    table.add(dict(table.find(variant="other", seed_of_model=2)[0], status="nan", wrong=math.nan))
    assert error_ratio(table, "one", "other", task="copying")[0] == 1 and "leaves out 1 of 2 seeds" in capsys.readouterr().out


def test_the_learning_rate_that_learns_most_is_chosen_on_a_seed_that_no_result_uses(run):
    rates, table = [1e-6, 0.1], Table(run, "rates", key=["task", "variant", "rate"])
    models = dict(one=lambda task: Lookup(RECALL[task][1]))
    best = choose_rates(run, table, models, ["copying"], rates, 40)
    assert best == {("copying", "one"): 0.1} and {row["rate"] for row in table.rows} == set(rates)
    results = Table(run, "trainings", key=["task", "variant", "seed_of_model"])
    learn_all(run, results, models, ["copying"], 2, 3, rates=best)
    assert {row["rate"] for row in results.rows} == {0.1}
    assert not {row["seed_of_model"] for row in table.rows} & {row["seed_of_model"] for row in results.rows}
    other = Table(run, "one rate", key=["task", "variant", "rate"])
    assert choose_rates(run, other, models, ["copying"], [0.5], 40) == {("copying", "one"): 0.5} and not other.rows


def test_a_rate_that_diverges_is_never_chosen(run):
    def broken(task):
        model = Lookup(RECALL[task][1])
        model.table.weight.data[3, 3] = math.nan
        return model

    table = Table(run, "rates", key=["task", "variant", "rate"])
    assert choose_rates(run, table, dict(one=broken), ["copying"], [0.1, 0.2], 2) == {("copying", "one"): 0.1}
    assert {row["status"] for row in table.rows} == {"nan"}


def test_a_case_gives_the_first_result_and_gradients_to_all():
    case = Case(lambda x, w: (x * w, "state"), torch.tensor([2.0, 3.0]))
    y = case(torch.ones(2))
    assert y.tolist() == [2, 3] and [p.tolist() for p in case.parameters()] == [[2, 3]]
    layer = nn.Linear(2, 2)
    assert set(Case(layer).parameters()) == set(layer.parameters())


def test_timed_cases_note_memory_flops_and_a_limit(run):
    table, x = Table(run, "times", key=["pass", "length", "variant"]), torch.ones(1, 8, 4)
    cases = {"mix": (x, Case(nn.Linear(4, 4, bias=False))), "attention": (x, Case(lambda x: x + 0)),
             "broken": (x, Case(lambda x: x.reshape(7)))}
    for kind in ("forward", "forward+backward"):
        rows = time_cases(table, cases, kind, LIMITS, {"attention": 10**6}, length=8, ratios=dict(latency_over_ours="mix"))
        assert rows["broken"]["status"].startswith("error")
    forward = {row["variant"]: row for row in table.find(length=8, status="ok", **{"pass": "forward"})}
    assert forward["mix"]["flops"] == 2 * 8 * 16 and forward["mix"]["bytes_min"] == 4 * (32 + 16 + 32)
    assert forward["mix"]["limit_ms"] == pytest.approx(1e3 * max(256 / 1e9, 320 / 1e9))
    assert forward["attention"]["limit_ms"] == pytest.approx(1.0)
    assert forward["mix"]["peak_mem_mib"] > 0
    rows, rounds = measured(table)
    assert set(rows["variant"]) == {"mix", "attention"} and rounds == "2 rounds"


def test_timed_cases_of_two_precisions_have_the_limits_of_their_own(run):
    table, limits = Table(run, "times", key=["pass", "variant"]), {torch.float32: LIMITS, torch.bfloat16: {k: 2 * v for k, v in LIMITS.items()}}
    x, layer = torch.ones(1, 8, 4), nn.Linear(4, 4, bias=False)
    cases = {"single": (x, Case(layer)), "half": (x.bfloat16(), Case(nn.Linear(4, 4, bias=False).bfloat16()))}
    rows = time_cases(table, cases, "forward", limits, {"single": 10**6, "half": 10**6})
    assert [rows[name]["dtype"] for name in cases] == ["float32", "bfloat16"]
    assert rows["single"]["limit_ms"] == pytest.approx(2 * rows["half"]["limit_ms"]) == pytest.approx(1.0)


def test_half_precision_by_what_the_device_computes(monkeypatch):
    assert half_type(torch.device("cpu")) == torch.bfloat16
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        assert half_type(torch.device("cuda")) == dtype


def test_a_table_where_all_failed_can_be_drawn(run):
    table, x = Table(run, "failed", key=["pass", "length", "variant"]), torch.ones(1, 8, 4)
    time_cases(table, {"broken": (x, Case(lambda x: x.reshape(7)))}, "forward", LIMITS, length=8)
    rows, _ = measured(table)
    assert rows.empty and {"latency_ms_median", "latency_over_ours", "n_runs"} <= set(rows)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_attention_counts_the_pairs_that_are_not_masked(length):
    pairs = sum(1 for t in range(length) for s in range(length) if s <= t)
    assert attention_flops(3, length, 8) == 3 * pairs * 8 * 2 * 2
    assert attention_flops(3, length, 8, projections=4) - attention_flops(3, length, 8) == 4 * 2 * 3 * length * 8 * 8


def test_agreement_asserts_says_and_keeps(run, capsys):
    agree = Agreement(run, "agreement")
    agree("same", torch.ones(2), torch.ones(2) + 1e-3, 1e-2)
    assert "✓ same (max error 1.0e-03)" in capsys.readouterr().out
    assert agree.table.find(check="same")[0]["max_abs_err"] == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(AssertionError, match="pair: max error 1.00e"):
        agree("pair", [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.zeros(3)], 1e-2)
    with pytest.raises(ValueError):
        agree("uneven", [torch.ones(2)], [torch.ones(2), torch.zeros(3)], 1e-2)
    for other in (torch.ones(1, 7, 3), torch.ones(3), torch.ones(())):
        with pytest.raises(AssertionError, match=r"one of many: shapes differ, \[\(\(4, 7, 3\)"):
            agree("one of many", torch.ones(4, 7, 3), other, 1e-6)


def test_crossing_finds_the_length_and_says_when_there_is_none():
    rng = torch.Generator().manual_seed(0)
    noisy = lambda value: (value * (1 + 0.05 * torch.rand(15, generator=rng))).tolist()
    lengths = [256, 512, 1024, 2048]
    linear, quadratic = [noisy(float(t)) for t in lengths], [noisy(t * t / 700) for t in lengths]
    at, low, high = redrawn([*linear, *quadratic], crossing(lengths))
    assert low <= at <= high and 600 < at < 800 and high - low < 100
    assert crossing(lengths)([float(t) for t in lengths] + [t / 2 for t in lengths]) == math.inf
    assert crossing(lengths)([float(t) for t in lengths] + [t * 2 for t in lengths]) == 256


def test_nothing_here_imports_a_method():
    import subprocess
    import sys

    code = ("import effarch.bench.sequences, effarch.bench.recall, sys; "
            "print([m for m in sys.modules if m.startswith('effarch.scans') or m.startswith('effarch.multirate')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_faster_of_two_precisions(tmp_path):
    rows = [dict(variant="a", length=8, latency_ms_median=3.0, status="ok"), dict(variant="a, half", length=8, latency_ms_median=2.0, status="ok"),
            dict(variant="a", length=9, latency_ms_median=1.0, status="oom"), dict(variant="b", length=8, latency_ms_median=0.5, status="ok")]
    table = SimpleNamespace(find=lambda **where: [row for row in rows if where.items() <= row.items()])
    assert faster(table, ("a", "a, half"), length=8) == "a, half" and faster(table, ("a", "a, half"), length=9) is None


def test_an_agreement_of_a_number_that_is_none_is_no_agreement(tmp_path):
    pairs = [torch.zeros(2), torch.tensor([float("nan")])], [torch.zeros(2), torch.zeros(1)]
    agree = Agreement.__new__(Agreement)
    agree.table = SimpleNamespace(add=lambda row: None)
    agree("equal", [torch.zeros(2)], [torch.zeros(2)], 0)
    with pytest.raises(AssertionError, match="two: max error nan"):
        agree("two", *pairs, 1e-3)
