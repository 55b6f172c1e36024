"""State spaces that see: filters equal their recurrences, orders lose no token, pruning keeps time, clear errors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_gpu_ready import ends_on_the_gpu, unread  # noqa: F401

from effarch.scans.scan import ssd_sequential
from effarch.vision_ssm import (
    S4ND,
    FeedForward,
    PatchClassifier,
    SelfAttention,
    VisionMambaBlock,
    choose_tokens,
    hippo_legs,
    keep_tokens,
    kernel_by_powers,
    legs_nplr,
    merge_into,
    read_along,
    s4_kernel,
    s4d_kernel,
    s4d_recurrence,
    s4nd_recurrence,
    scan_orders,
    sum_back,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert float((a.detach() - b.detach()).abs().max()) <= tolerance


# filters


@pytest.mark.parametrize("states", [1, 2, 7, 64])
def test_legs_is_normal_plus_a_low_rank(states):
    (A, B), (poles, p, in_basis, V) = hippo_legs(states), legs_nplr(states)
    close(V @ V.mH, torch.eye(states, dtype=V.dtype), 1e-12)
    close(V @ (torch.diag(poles) - p[:, None] * p.conj()) @ V.mH, A.to(V.dtype), 1e-10)
    close(V @ in_basis, B.to(V.dtype), 1e-10)
    assert (poles.real + 0.5).abs().max() < 1e-12


def test_legs_remembers_the_mean_of_the_past():
    """The state 0 of the time-invariant LegS is the exponentially weighted mean of what was: of a constant, the constant."""
    A, B = hippo_legs(16)
    steady = -torch.linalg.solve(A, B)
    close(steady, F.one_hot(torch.tensor(0), 16).double(), 1e-9)


@pytest.mark.parametrize("length", [1, 2, 33, 64])
@pytest.mark.parametrize("delta", [1e-3, 0.1])
def test_cauchy_products_are_powers_of_the_matrix(length, delta):
    (A, B), (poles, p, in_basis, V), C = hippo_legs(24), legs_nplr(24), torch.randn(24, dtype=torch.float64)
    expected = kernel_by_powers(A, B, C, delta, length)
    assert expected.abs().max() > 1e-4
    close(s4_kernel(poles, p, in_basis, C.to(V.dtype) @ V, delta, length), expected, 1e-10)


def test_the_first_taps_do_not_depend_on_how_many_there_are():
    poles, p, B, V = legs_nplr(16)
    C = torch.randn(16, dtype=torch.complex128)
    close(s4_kernel(poles, p, B, C, 0.02, 90)[:31], s4_kernel(poles, p, B, C, 0.02, 31), 1e-10)
    A, delta = poles[::2][None], torch.tensor([0.02])
    close(s4d_kernel(A, C[None, ::2], delta, 90)[:, :31], s4d_kernel(A, C[None, ::2], delta, 31), 1e-12)


def test_a_vandermonde_product_is_the_recurrence():
    A = torch.complex(-torch.rand(3, 4).double(), 5 * torch.randn(3, 4).double())
    C, delta, u = torch.randn(3, 4, dtype=torch.complex128), torch.rand(3).double(), torch.randn(3, 40).double()
    kernel = s4d_kernel(A, C, delta, 40)
    y = torch.stack([sum(kernel[:, lag] * u[:, t - lag] for lag in range(t + 1)) for t in range(40)], 1)
    close(s4d_recurrence(A, C, delta, u), y, 1e-10)


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (9, 4)])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_convolution_of_a_plane_is_two_recurrences(shape, rate):
    layer, x = S4ND(3, 6).double(), torch.randn(2, *shape, 3).double()
    close(layer(x, rate), s4nd_recurrence(layer, x, rate), 1e-10)


def test_the_plane_is_seen_from_all_sides_and_every_parameter_learns():
    layer, x = S4ND(3, 6), torch.randn(1, 6, 7, 3, requires_grad=True)
    layer(x)[0, 3, 3].square().sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()
    for name, value in layer.named_parameters():
        assert value.grad.isfinite().all() and value.grad.abs().sum() > 0, name


def one_sided(width=2):
    """An S4ND layer that looks back only."""
    layer = S4ND(width, 6).double()
    layer.C.data[:, 1] = 0
    layer.skip.data.zero_()
    return layer


@pytest.mark.parametrize("factor", [2, 3])
@torch.no_grad()
def test_a_finer_grid_is_exact_where_the_picture_is_constant_in_each_cell(factor):
    """Zero-order hold: `factor` steps of Δ / factor with one input are one step of Δ."""
    layer, x = one_sided(), torch.randn(1, 5, 6, 2).double()
    fine = x.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    last = slice(factor - 1, None, factor)
    close(layer(fine, 1 / factor)[:, last, last], layer(x), 1e-10)
    assert (layer(fine)[:, last, last] - layer(x)).abs().max() > 1e-2, "without the smaller Δ it is another filter"


@torch.no_grad()
def test_for_a_smooth_picture_a_finer_grid_converges():
    """Band-limited in each axis: every halving of Δ halves what is left of the error, from both sides of a place."""
    layer = S4ND(2, 6).double()

    def seen(n):
        t = torch.arange(n).double() / n
        wave = torch.sin(2 * math.pi * t) + 0.5 * torch.cos(4 * math.pi * t)
        x = (wave[:, None] * wave).expand(2, n, n).permute(1, 2, 0)[None]
        return layer(x, 8 / n)[:, ::n // 8, ::n // 8]

    grids = [seen(n) for n in (16, 32, 64, 128)]
    one, two, three = (float((a - b).norm()) for a, b in zip(grids, grids[1:], strict=False))
    assert 0.4 * one < two < 0.6 * one and 0.45 * two < three < 0.55 * two, (one, two, three)


@pytest.mark.parametrize("call, said", [
    (lambda: hippo_legs(0), "states=0 is not allowed; allowed: a whole number of at least 1"),
    (lambda: S4ND(3, 5), "states=5 is not allowed; allowed: an even number"),
    (lambda: S4ND(3)(torch.zeros(2, 4, 3)), "x.shape=(2, 4, 3) is not allowed"),
    (lambda: scan_orders(3, 3, 3), "directions=3 is not allowed; allowed: 1, 2, 4"),
    (lambda: scan_orders(3, 3, 2, "centre"), "cls='centre' is not allowed; allowed: first, middle, last"),
    (lambda: scan_orders(0, 3), "rows=0 is not allowed"),
    (lambda: VisionMambaBlock(8, states=0), "states=0 is not allowed"),
    (lambda: VisionMambaBlock(8)(torch.zeros(1, 10, 8), scan_orders(2, 2)[None]), "order.shape=(1, 2, 5) is not allowed"),
    (lambda: SelfAttention(10, 3), "heads=3 is not allowed; allowed: a divisor of width=10"),
    (lambda: choose_tokens(torch.zeros(1, 5), 0.0), "share=0.0 is not allowed"),
    (lambda: network()(torch.zeros(1, 1, 4, 4), at=0, share=0.5, how="sorted"), "how='sorted' is not allowed"),
])
def test_bad_input_is_named(call, said):
    with pytest.raises(ValueError) as caught:
        call()
    assert said in str(caught.value) and "\n" not in str(caught.value)


# orders


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("cls", ["first", "middle", "last"])
def test_an_order_reads_every_token_once(directions, cls):
    orders = scan_orders(3, 5, directions, cls)
    assert orders.shape == (directions, 16) and (orders.sort(1).values == torch.arange(16)).all()
    assert (orders == 0).nonzero()[:, 1].tolist() == [dict(first=0, middle=7, last=15)[cls]] * directions


def test_orders_go_along_rows_and_columns_and_back():
    row, back, down, up = ([t for t in path if t] for path in scan_orders(2, 3, 4).tolist())
    assert row == [1, 2, 3, 4, 5, 6] and down == [1, 4, 2, 5, 3, 6]
    assert back == row[::-1] and up == down[::-1]


def test_with_the_cls_token_in_the_middle_both_halves_are_as_near():
    for path in scan_orders(4, 4, 4).tolist():
        assert path.index(0) == 8


def test_tokens_come_back_to_their_places():
    x, orders = torch.randn(3, 10, 4), scan_orders(3, 3, 4)[None]
    close(sum_back(read_along(x, orders), orders), 4 * x, 1e-6)
    own = torch.stack([scan_orders(3, 3, 4)[:, torch.randperm(10)] for _ in range(3)])
    close(sum_back(read_along(x, own), own), 4 * x, 1e-6)
    close(read_along(x, orders), read_along(x, orders.expand(3, -1, -1)), 0)


# the block


def by_hand(block, x, order):
    """The block's definition: each direction's short filter and scan on its own, token by token, in float64."""
    block, x, y = copy.deepcopy(block).double(), x.double(), 0
    inner, mixed = block.sizes[0], block.sizes[1]
    gate, tokens, delta = block.in_proj(x).split(block.sizes, -1)
    for r, path in enumerate(order):
        part = slice(r * mixed, (r + 1) * mixed)
        padded = F.pad(tokens[:, path], (0, 0, block.conv1d.kernel_size[0] - 1, 0)).transpose(1, 2)
        u = F.silu(F.conv1d(padded, block.conv1d.weight[part], block.conv1d.bias[part], groups=mixed)).transpose(1, 2)
        u, B, C = u.split(block.mixed_sizes, -1)
        u, own = u.unflatten(-1, (block.heads, -1)), slice(r * block.heads, (r + 1) * block.heads)
        out, _ = ssd_sequential(u, F.softplus(delta[:, path] + block.dt_bias[own]), -block.A_log[own].exp(), B[:, :, None], C[:, :, None])
        y = y + (out + block.D[own, None] * u).flatten(2)[:, path.argsort()]
    assert y.shape[-1] == inner
    return block.out_proj(block.norm(y * F.silu(gate)))


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("cls", ["first", "middle"])
@torch.no_grad()
def test_several_directions_in_one_call_are_as_many_scans(directions, cls):
    block, x, orders = VisionMambaBlock(12, directions, 3, 8, 5), torch.randn(2, 21, 12), scan_orders(4, 5, directions, cls)
    close(block(x, orders[None]).double(), by_hand(block, x, orders), 1e-5)
    close(block(x, orders[None]), block(x, orders.expand(2, -1, -1)), 1e-6)


@torch.no_grad()
def test_one_direction_sees_what_it_has_read_and_two_see_all():
    x = torch.randn(1, 17, 12)
    changed = x.clone()
    changed[:, 9] += 1
    for directions, seen in ((1, 16 - 8), (2, 17)):
        block, orders = VisionMambaBlock(12, directions, 3, 8, 5), scan_orders(4, 4, directions, "last")[None]
        assert int(((block(x, orders) - block(changed, orders)).abs().amax(-1) > 0).sum()) == seen + (directions == 1)


@torch.no_grad()
def test_a_picture_turned_around_is_read_turned_around():
    """With the same weights for both directions and the CLS token in the middle of an even number of patches."""
    block, x = VisionMambaBlock(12, 2, 3, 8, 5), torch.randn(2, 17, 12)
    for value in (block.conv1d.weight, block.conv1d.bias, block.dt_bias, block.A_log, block.D):
        value.data[len(value) // 2:] = value.data[:len(value) // 2]
    orders, turned = scan_orders(4, 4)[None], torch.cat([torch.tensor([0]), torch.arange(16, 0, -1)])
    close(block(x[:, turned], orders), block(x, orders)[:, turned], 1e-5)
    assert (block(x[:, turned], scan_orders(4, 4, 2, "first")[None]) - block(x, scan_orders(4, 4, 2, "first")[None])[:, turned])[:, 1:].abs().max() < 1e-5


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_blocks_train_every_parameter(directions):
    block = VisionMambaBlock(12, directions, 3, 8, 5)
    block(torch.randn(2, 17, 12), scan_orders(4, 4, directions)[None]).square().sum().backward()
    for name, value in block.named_parameters():
        assert value.grad.isfinite().all() and value.grad.abs().sum() > 0, name


@torch.no_grad()
def test_half_precision_stays_close():
    block, x, orders = VisionMambaBlock(12, 2, 3, 8, 5), torch.randn(2, 17, 12), scan_orders(4, 4)[None]
    y = copy.deepcopy(block).bfloat16()(x.bfloat16(), orders)
    assert y.dtype == torch.bfloat16 and (y.float() - block(x, orders)).abs().max() < 0.05


# fewer tokens


def steady_block():
    """A block without short filter whose Δ is the same for every token, and in which a token of zeros writes nothing."""
    block = VisionMambaBlock(12, 2, 3, 8, 5, taps=1)
    block.in_proj.weight.data[-3:] = 0
    block.conv1d.bias.data.zero_()
    block.dt_bias.data.zero_()
    block.conv1d.weight.data.mul_(8)
    return block


@torch.no_grad()
def test_gaps_keep_the_time_of_dropped_tokens():
    block, x, orders = steady_block(), torch.randn(2, 17, 12), scan_orders(4, 4)[None]
    kept = torch.tensor([[0, 1, 4, 9, 16], [0, 2, 3, 5, 11]])
    x = x * torch.zeros(2, 17, 1).scatter(1, kept[..., None], 1)
    few, whole = x.gather(1, kept[..., None].expand(-1, -1, 12)), block(x, orders).gather(1, kept[..., None].expand(-1, -1, 12))
    close(block(few, *keep_tokens(orders, kept)), whole, 1e-5)
    assert (block(few, *keep_tokens(orders, kept, aligned=False)) - whole).abs().max() > 1e-2, "closing up forgets them"


def test_orders_of_what_is_left():
    orders = scan_orders(2, 2, 4)[None]  # 1 2 0 3 4 and back, 1 3 0 2 4 and back
    order, gap = keep_tokens(orders, torch.tensor([[0, 1, 3]]))
    assert order[0].tolist() == [[1, 0, 2], [2, 0, 1], [1, 2, 0], [0, 2, 1]]
    assert gap[0].tolist() == [[1, 2, 1], [1, 1, 2], [1, 1, 1], [1, 1, 1]]
    assert keep_tokens(orders, torch.arange(5)[None])[1].unique().tolist() == [1]


def test_keeping_tokens_twice_is_keeping_the_last_ones_at_once():
    orders, kept = scan_orders(4, 4, 4)[None], torch.tensor([[0, 1, 4, 6, 9, 11, 14, 16], [0, 2, 5, 8, 9, 12, 13, 16]])
    again = torch.tensor([[0, 2, 4, 6], [0, 1, 3, 5]])
    order, gap = keep_tokens(orders, kept)
    twice, once = keep_tokens(order, again, gap=gap), keep_tokens(orders, kept.gather(1, again))
    assert torch.equal(twice[0], once[0]) and torch.equal(twice[1], once[1])
    with pytest.raises(ValueError, match=r"order.shape=\(2, 4, 8\).*1 or 3"):
        keep_tokens(order, again[[0, 0, 1]])


@pytest.mark.parametrize("options, words", [
    (dict(at=3, share=0.5), "at=3.*0 to 2"), (dict(at=-1, share=0.5), "at=-1"), (dict(at=2.0, share=0.5), r"at=2\.0"), (dict(at="2"), "at='2'"),
    (dict(at=2, share=25), "share=25.*at most 1"), (dict(at=2, share=0), "share=0"), (dict(share=0.5), "share=0.5.*`at`"),
    (dict(at=2, share=0.5, scores=torch.rand(2, 16)), r"scores.shape=\(2, 16\).*\(2, 17\)"), (dict(at=1, share=0.5), "at=1.*importance")])
def test_a_pruning_that_would_not_be_what_is_asked_for_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        network("attention")(torch.randn(2, 1, 4, 4), **options)


def test_an_order_names_each_token_once():
    block, order = VisionMambaBlock(12, 2, 3, 8, 5), scan_orders(4, 4)[None].clone()
    order[0, 1, 0] = order[0, 1, 1]
    for given in (order, order.expand(2, -1, -1)):
        with pytest.raises(ValueError, match="order='no permutation'.*0 to 16"):
            block(torch.randn(2, 17, 12), given)


@pytest.mark.parametrize("share, count", [(1.0, 8), (0.5, 4), (0.3, 2), (1e-3, 1)])
def test_the_best_tokens_stay_and_so_does_the_cls_token(share, count):
    scores = torch.rand(5, 9)
    kept = choose_tokens(scores, share)
    assert kept.shape == (5, count + 1) and (kept[:, 0] == 0).all() and (kept.diff() > 0).all()
    for row, chosen in zip(scores, kept, strict=True):
        left = [i for i in range(1, 9) if i not in chosen]
        assert not left or row[chosen[1:]].min() >= row[left].max()


def test_merging_by_hand():
    x, kept = torch.randn(2, 9, 6), torch.tensor([[0, 2, 5, 7], [0, 1, 3, 8]])
    merged = merge_into(x, kept)
    for tokens, chosen, found in zip(x, kept.tolist(), merged, strict=True):
        groups = {i: [tokens[i]] for i in chosen}
        for i in set(range(9)) - set(chosen):
            groups[max(chosen[1:], key=lambda j: float(F.cosine_similarity(tokens[i], tokens[j], dim=0)))].append(tokens[i])
        close(found, torch.stack([torch.stack(groups[i]).mean(0) for i in chosen]), 1e-5)
    close(merge_into(x, torch.arange(9).expand(2, -1)), x, 0)


def network(kind="scan"):
    layers = [VisionMambaBlock(12, 2, 3, 8, 5) for _ in range(3)]
    if kind == "attention":
        layers = [SelfAttention(12, 3), FeedForward(12, 20), SelfAttention(12, 3)]
    return PatchClassifier(layers, 12, 4)


@pytest.mark.parametrize("kind", ["scan", "attention"])
@pytest.mark.parametrize("how", ["naive", "aligned", "merged"])
@torch.no_grad()
def test_keeping_every_patch_changes_nothing(kind, how):
    net, pixels = network(kind), torch.randn(2, 1, 4, 4)
    close(net(pixels, at=2, share=1.0, how=how), net(pixels), 0)
    few = net(pixels, at=2, share=0.5, how=how)
    assert few.isfinite().all() and (few - net(pixels)).abs().max() > 1e-6


@torch.no_grad()
def test_attention_knows_no_order_and_a_scan_does():
    pixels, scores = torch.randn(2, 1, 4, 4), torch.rand(2, 17)
    for kind, differs in (("attention", False), ("scan", True)):
        net = network(kind)
        one, two = (net(pixels, at=2, share=0.5, how=how, scores=scores) for how in ("naive", "aligned"))
        assert ((one - two).abs().max() > 1e-6) == differs


@torch.no_grad()
def test_patches_outside_the_kept_ones_are_not_seen_after_the_drop():
    net = network("attention")
    net.layers[0] = FeedForward(12, 20)  # token by token: nothing spreads before the drop
    scores, pixels = torch.rand(1, 17), torch.randn(1, 1, 4, 4)
    kept = set(choose_tokens(scores, 0.5)[0].tolist())
    for i in range(1, 17):
        changed = pixels.clone()
        changed.view(-1)[i - 1] += 1
        same = torch.equal(net(changed, at=2, share=0.5, scores=scores), net(pixels, at=2, share=0.5, scores=scores))
        assert same == (i not in kept)


@pytest.mark.parametrize("kind", ["scan", "attention"])
def test_importance_is_one_number_a_token(kind):
    net, x = network(kind), torch.randn(3, 17, 12)
    scores = net.layers[0].importance(x)
    assert scores.shape == (3, 17) and (scores >= 0).all()
    if kind == "attention":
        close(scores.sum(1), torch.ones(3), 1e-5)


@pytest.mark.parametrize("kind", ["scan", "attention"])
def test_networks_train_every_parameter(kind):
    net = network(kind)
    net(torch.randn(4, 1, 4, 4), at=2, share=0.5, how="merged").square().sum().backward()
    for name, value in net.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0, name


@pytest.mark.parametrize("directions", [2, 4])
def test_blocks_stay_on_the_gpu(directions, unread):  # noqa: F811
    def build():
        block = VisionMambaBlock(12, directions, 3, 8, 5)
        return block, [torch.randn(2, 17, 12), scan_orders(4, 4, directions)[None].cuda()]

    ends_on_the_gpu(build)
