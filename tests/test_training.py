"""Comparing layers: small trainings, passes of a layer, ratios of a table's rows, claims of several parts."""

import math

import pytest
import torch
from torch import nn

from effarch.bench.claims import NOT_SUPPORTED, SUPPORTED, UNDECIDED, together
from effarch.bench.figures import pareto_front
from effarch.bench.run import start
from effarch.bench.tables import Table
from effarch.bench.timing import one_pass
from effarch.bench.training import TASKS, Network, averaging_task, digit_sequences, learn, train

torch.set_num_threads(1)


class Mixing(nn.Module):
    """A layer without memory."""

    def __init__(self, dim):
        super().__init__()
        self.project = nn.Linear(dim, dim)

    def forward(self, x):
        return self.project(x)


class Delayed(Mixing):
    """The same, but half of its channels come a step late."""

    def forward(self, x):
        half = x.shape[2] // 2
        late = nn.functional.pad(x[..., half:], (0, 0, 1, 0))[:, :-1]
        return self.project(torch.cat([x[..., :half], late], -1))


def test_averaging_task_is_the_recurrence():
    x, y = averaging_task(2, 50, (4.0, 9.0), torch.Generator().manual_seed(0))
    decay, state = torch.exp(-1 / torch.tensor([4.0, 9.0])), torch.zeros(2, 2)
    for t in range(50):
        state = decay * state + torch.sqrt(1 - decay**2) * x[:, t]
        torch.testing.assert_close(y[:, t], state, rtol=0, atol=1e-5)


def test_digits_are_split_without_overlap_and_by_seed_only():
    (x, y), (test_x, test_y), (aside_x, aside_y) = digit_sequences(torch.Generator().manual_seed(3))
    again = digit_sequences(torch.Generator().manual_seed(3))[1]
    assert len(x) + len(test_x) + len(aside_x) == 1797 and len(aside_x) == 359 and x.shape[1:] == (64, 1) and 0 <= x.min() and x.max() == 1
    assert torch.equal(test_x, again[0]) and torch.equal(test_y, again[1])
    assert not torch.equal(test_y, digit_sequences(torch.Generator().manual_seed(4))[1][1])
    assert torch.equal(aside_x, digit_sequences(torch.Generator().manual_seed(4))[2][0])
    assert torch.cat([y, test_y, aside_y]).bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("task", TASKS)
def test_a_training_depends_on_its_seed_alone(task):
    run = lambda seed: learn(task, Mixing, seed, steps=2, length=32, dim=8)
    torch.manual_seed(5)
    first = run(0)
    torch.manual_seed(6)  # the state of the caller's generator does not matter
    assert run(0) == first and run(1)["error"] != first["error"]
    outputs = 10 if task == "digits" else len(TASKS[task])
    assert math.isfinite(first["error"]) and first["params"] == sum(p.numel() for p in Network(Mixing, 8, outputs).parameters())
    assert ("wrong" in first) == (task == "digits")


def test_a_layer_with_memory_learns_what_one_without_cannot():
    errors = [learn("short-timescale", make, 0, steps=80, length=64, dim=16)["error"] for make in (Delayed, Mixing)]
    assert errors[0] < 0.8 * errors[1]


def test_a_diverged_training_is_no_number():
    class Broken(Mixing):
        def forward(self, x):
            return self.project(x) * float("nan")

    for task in TASKS:
        assert math.isnan(learn(task, Broken, 0, steps=1, length=16, dim=8)["error"])


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task='sums'.*multi-timescale"):
        learn("sums", Mixing, 0, 1)


def test_training_makes_the_loss_small_and_starts_filters_by_their_length():
    torch.manual_seed(0)

    class Filtered(Mixing):
        def __init__(self, dim):
            super().__init__(dim)
            self.taps = nn.Module()
            self.taps.weight = nn.Parameter(torch.full((dim, 400), 7.0))

    network = Network(Filtered, 8, 3)
    assert abs(network.layers[0].taps.weight.std().item() * 20 - 1) < 0.1
    x, y = torch.randn(4, 10, 1), torch.randn(4, 10, 3) * 0.1
    before = nn.functional.mse_loss(network(x), y).item()
    train(network, lambda: (x, y), nn.functional.mse_loss, 50)
    assert nn.functional.mse_loss(network(x), y).item() < 0.5 * before


def test_a_pass_with_gradients_reaches_input_and_weights():
    layer, x = Mixing(4), torch.randn(2, 3, 4)
    assert torch.equal(one_pass(layer, x)(), layer(x)) and not one_pass(layer, x)().requires_grad
    expected = torch.ones(2, 3, 4) @ layer.project.weight
    torch.testing.assert_close(one_pass(layer, x, "forward+backward")(), expected.detach())
    assert x.grad is None and all(p.grad is None for p in layer.parameters())
    with pytest.raises(ValueError, match="kind='backward'"):
        one_pass(layer, x, "backward")


def test_front_keeps_what_no_other_beats_in_both():
    points = dict(slow=(9, 1), fast=(1, 9), between=(5, 5), beaten=(6, 6), twin=(5, 5), unknown=(0, math.nan))
    assert pareto_front(points) == ["fast", "between", "slow"]
    assert pareto_front({}) == []


@pytest.mark.parametrize("holds, verdict", [
    ((True, True), SUPPORTED), ((True, None), UNDECIDED), ((None, False), NOT_SUPPORTED), ((True, False), NOT_SUPPORTED), ((), UNDECIDED)])
def test_all_parts_of_a_claim_must_hold(holds, verdict):
    assert together(*holds) == verdict


def test_ratio_of_two_rows(tmp_path):
    given = dict(MODE="smoke", SEED=0, OUT=str(tmp_path), RESUME=True, SECONDS=None)
    table = Table(start("ssm/demo", given), "ratios", ["variant", "length"])
    for variant, ms in (("a", [2.0, 2.2] * 5), ("b", [1.0, 1.1] * 5)):
        table.add(dict(variant=variant, length=1, raw_ms=ms))
    table.add(dict(variant="c", length=1, status="oom"))
    assert table.ratio("a", "b", length=1).value == pytest.approx(2.0)
    assert math.isnan(table.ratio("a", "c", length=1).value) and math.isnan(table.ratio("a", "b", length=2).value)
    table.add(dict(variant="a", length=2, raw_ms=[1.0]))
    with pytest.raises(ValueError, match="one row of each case"):
        table.ratio("a", "b")
