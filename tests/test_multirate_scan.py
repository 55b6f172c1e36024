"""Blocks that run part of the scan at a lower rate: states, causality, gradients, routing, clear errors."""

import copy
import math
import re

import pytest
import torch

from effarch.multirate_scan import (
    DynamicBlock,
    MultiRateBlock,
    Router,
    causal_pool,
    hold,
    ratio_loss,
    running_average,
)
from effarch.scans import Mamba2Block, MambaBlock


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert float((a.detach().double() - b.detach().double()).abs().max()) <= tolerance


BLOCKS = {
    "multirate": lambda: MultiRateBlock(16, 4, 8, 8, 2, 4),
    "rate 1": lambda: MultiRateBlock(16, 4, 8, 8, 2, 1),
    "rate 5": lambda: MultiRateBlock(16, 4, 8, 8, 1, 5),
    "dynamic": lambda: DynamicBlock(16, Mamba2Block(16, 4, 8)),
    "dynamic, Mamba-1": lambda: DynamicBlock(16, MambaBlock(16, 8)),
    "stride": lambda: DynamicBlock(16, Mamba2Block(16, 4, 8), choose="stride"),
}
each_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)


def smooth(batch, length, width=16):
    """Inputs that stay alike for a while, so that a router leaves most of them out, and different ones per row."""
    x = torch.randn(batch, length, width)
    for row in range(batch):
        for t in range(1, length):
            x[row, t] = 0.1 * x[row, t] + (x[row, t - 1] if (t * (row + 2)) % (row + 3) else -x[row, t - 1])
    return x


@each_block
def test_blocks_are_causal_and_train_every_parameter(make):
    block, x = make(), torch.randn(2, 50, 16)
    changed = x.clone()
    changed[:, 30] += 1
    with torch.no_grad():
        close(block(x)[0][:, :30], block(changed)[0][:, :30], 1e-5)
    block(x)[0].square().sum().backward()
    unused = ("router.",) if getattr(block, "choose", "") == "stride" else ()
    for name, value in block.named_parameters():
        assert name.startswith(unused) or (value.grad is not None and value.grad.abs().sum() > 0), name


@each_block
@pytest.mark.parametrize("cuts", [(1,), (23,), (3, 4, 5, 6), (49,)])
@torch.no_grad()
def test_a_sequence_may_be_cut_anywhere(make, cuts):
    block, x, state, parts = make(), smooth(3, 50), None, []
    y = block(x)[0]
    for begin, end in zip((0, *cuts), (*cuts, 50), strict=True):
        part, state = block(x[:, begin:end], state)
        parts.append(part)
    close(torch.cat(parts, 1), y, 1e-4)


@each_block
@torch.no_grad()
def test_step_equals_forward_with_a_state_of_constant_size(make):
    block, x, state, sizes = make(), smooth(2, 41), None, []
    y = block(x)[0]
    size = lambda part: sum(map(size, part)) if isinstance(part, tuple) else (
        part.untyped_storage().nbytes() if isinstance(part, torch.Tensor) else 0)
    for t in range(41):
        out, state = block.step(x[:, t], state)
        close(out, y[:, t], 1e-4)
        sizes.append(size(state))
    assert sizes[-1] == sizes[-20] == size(block(x)[1])  # nothing of the sequence stays behind


@torch.no_grad()
def test_the_router_leaves_tokens_out_in_that_input():
    block = BLOCKS["dynamic"]()
    block(smooth(3, 50))
    assert 0.1 < float(block.share) < 0.5


@each_block
@torch.no_grad()
def test_a_nan_token_leaves_earlier_outputs(make):
    block, x = make(), torch.randn(2, 50, 16)
    before = block(x)[0]
    x[0, 30] = math.nan
    after = block(x)[0]
    assert torch.equal(after[:, :30], before[:, :30])
    assert torch.equal(after[1], before[1])


@each_block
def test_blocks_work_in_bfloat16(make):
    block, x = make(), torch.randn(2, 30, 16)
    exact = block(x)[0]
    y, state = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert block.step(x[:, 0].bfloat16(), state)[0].dtype == torch.bfloat16
    if not isinstance(block, DynamicBlock) or block.choose == "stride":  # rounding moves a learned choice
        close(y, exact, 0.05)


def test_splits_have_the_parameters_of_two_groups_at_full_rate():
    count = lambda block: sum(p.numel() for p in block.parameters())
    assert {count(MultiRateBlock(32, 8, 8, 16, slow, rate)) for slow in (2, 4, 6) for rate in (2, 8)} == {
        count(Mamba2Block(32, 8, 8, 16, groups=2))}


@torch.no_grad()
def test_slow_heads_work_at_every_rate_th_token_only():
    block, x = MultiRateBlock(16, 4, 8, 8, 2, 4), torch.randn(1, 21, 16)
    slow = block(x)[0] - block.fast(x)[0]
    for t in range(21):
        close(slow[:, t], slow[:, t - t % 4], 1e-5)
    assert (slow[:, 4] - slow[:, 3]).abs().max() > 1e-4


@pytest.mark.parametrize("length", [1, 7, 8, 9])
@pytest.mark.parametrize("first", [0, 3])
def test_causal_pool_is_the_mean_of_the_last_tokens(length, first):
    x, rate = torch.randn(2, length + 3, 3), 4
    before, x = x[:, :3], x[:, 3:]
    if length <= first:
        return
    pooled = causal_pool(x, rate, before, first)
    whole = torch.cat([before, x], 1)
    assert pooled.shape[1] == math.ceil((length - first) / rate)
    for j in range(pooled.shape[1]):
        close(pooled[:, j], whole[:, first + rate * j:first + rate * (j + 1)].mean(1), 1e-6)
    close(causal_pool(x, rate), causal_pool(x, rate, torch.zeros_like(before)), 0)
    assert hold(causal_pool(x, rate), rate, length).shape == x.shape


def test_running_average_equals_its_recurrence_and_goes_on():
    y, p = torch.randn(2, 30, 4, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64)
    z, expected = torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(30):
        z = p[:, t, None] * y[:, t] + (1 - p[:, t, None]) * z
        expected.append(z)
    expected = torch.stack(expected, 1)
    close(running_average(y, p), expected, 1e-12)
    close(running_average(y[:, 11:], p[:, 11:], expected[:, 10:11]), expected[:, 11:], 1e-12)


def test_running_average_in_bfloat16_is_finite_and_close():
    y, p = torch.randn(2, 30, 4), torch.rand(2, 30)
    p[:, 3] = 1
    half = running_average(y.bfloat16(), p.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half, running_average(y, p), 0.05)


def test_ratio_loss_is_least_at_the_target():
    loss = lambda share: float(ratio_loss(torch.full((1, 100), share), torch.arange(100)[None] < 100 * share, 0.25))
    assert loss(0.25) == pytest.approx(1, abs=1e-5)
    assert loss(0.05) < loss(0.6) and loss(0.5) > 1 and loss(0.9) > loss(0.5)


@torch.no_grad()
def test_router_measures_the_change_from_the_token_before():
    router, x = Router(8), torch.randn(2, 6, 8)
    x[:, 3], x[:, 4] = x[:, 2], -x[:, 2]
    p = router(x)
    close(p[:, [0, 3, 4]], torch.tensor([[1.0, 0, 1]]).expand(2, 3), 1e-5)
    close(router(x[:, 2:], x[:, 1:2]), p[:, 2:], 1e-6)


@torch.no_grad()
def test_a_trained_block_is_copied_whole():
    block = DynamicBlock(16, Mamba2Block(16, 4, 4, 4))
    x = torch.randn(2, 9, 16)
    with torch.enable_grad():
        (block(x)[0].sum() + block.loss).backward()
    assert torch.equal(copy.deepcopy(block)(x)[0], block(x)[0])


def test_a_router_that_chooses_all_changes_nothing_but_the_average():
    inner = Mamba2Block(16, 4, 8)
    block, x = DynamicBlock(16, inner, 0.25), torch.randn(2, 20, 16)
    block.route = lambda x, last: (torch.ones(x.shape[:2]), torch.ones(x.shape[:2], dtype=torch.bool))
    close(block(x)[0], inner(x)[0], 1e-2)  # p is held below 1 by 1e-4
    assert float(block.share) == 1


@torch.no_grad()
def test_chosen_tokens_pass_through_the_block_and_are_held():
    inner = Mamba2Block(16, 4, 8)
    block, x = DynamicBlock(16, inner, 0.25, "stride"), torch.randn(2, 22, 16)
    close(block(x)[0], hold(inner(x[:, ::4])[0], 4, 22), 1e-5)
    assert float(block.share) == pytest.approx(6 / 22)


@pytest.mark.parametrize("call,words", [
    (lambda: causal_pool(torch.ones(1, 4, 2), 0), "rate"),
    (lambda: MultiRateBlock(16, 4, 8, 8, 4), "slow_heads"),
    (lambda: MultiRateBlock(16, 4, 8, 8, 2, 2.5), "rate=2.5"),
    (lambda: DynamicBlock(16, None, 1.5), "target"),
    (lambda: DynamicBlock(16, None, 0.5, "random"), "choose"),
])
def test_wrong_input_gives_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and re.search(words, str(error.value)) and "allowed" in str(error.value)
