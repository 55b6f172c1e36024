"""effarch.multirate: what must hold for the layers of several rates and their controls at any shape."""

import copy

import pytest
import torch
import torch.nn.functional as F

from effarch import multirate
from effarch.bench import count_flops
from effarch.multirate import (
    CONV_FORMS,
    MRSS,
    Baseline,
    ChannelsLastConv,
    DepthwiseCausalConv1d,
    DilatedTwin,
    GatedBaseline,
    LowRankBaseline,
    SplitMRSS,
    causal_pool,
    fast_length,
    fft_conv,
    flops_of,
    mrss_flops,
    scan_flops,
    shift_add_conv,
    split_reference,
    with_form,
)

torch.set_num_threads(1)
SHAPES = [(1, 1, 8), (2, 5, 8), (3, 97, 16), (2, 256, 12)]
MAKERS = {
    "DepthwiseCausalConv1d": DepthwiseCausalConv1d, "Baseline": Baseline, "GatedBaseline": GatedBaseline,
    "MRSS": lambda d, k: MRSS(d, k, 4), "SplitMRSS": lambda d, k: SplitMRSS(d, k, 8, 0.75),
    "LowRankBaseline": lambda d, k: LowRankBaseline(d, k, d // 4), "DilatedTwin": lambda d, k: DilatedTwin(d, k, 8, 0.75),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensors_and_gradients(fn, *inputs):
    """Output and gradients of fn, for a fixed gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = fn(*leaves)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def with_weights(model, plain):
    """(fast, plain): functions of (x, *weights) that compute `model` and `plain(view, x)`, a view with those weights."""
    names = [name for name, _ in model.named_parameters()]

    def fast(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

    def slow(x, *values):
        view = copy.copy(model)
        view._modules = {n.split(".")[0]: type("Part", (), dict(weight=v)) for n, v in zip(names, values, strict=True)}
        return plain(view, x)

    return fast, slow


def assert_all_close(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("taps", [1, 4, 9, 63])
@pytest.mark.parametrize("form", CONV_FORMS)
def test_convolution_forms_equal_the_formula(form, shape, taps):
    x, weight = torch.randn(shape), torch.randn(shape[2], taps) / taps
    expected = tensors_and_gradients(shift_add_conv, x, weight)
    assert_all_close(tensors_and_gradients(CONV_FORMS[form], x, weight), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", CONV_FORMS)
def test_double_precision_stays_double_also_under_autocast(form):
    x, weight = torch.randn(2, 50, 3, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    expected = shift_add_conv(x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = CONV_FORMS[form](x, weight)
    for y in (CONV_FORMS[form](x, weight), under):
        assert y.dtype == torch.float64
        assert_all_close([y], [expected], rtol=1e-12, atol=1e-12)


def test_the_formula_is_what_it_says():
    x, weight = torch.randn(2, 7, 3), torch.randn(3, 4)
    for t in range(7):
        terms = [weight[:, 3 - age] * x[:, t - age] for age in range(min(4, t + 1))]
        torch.testing.assert_close(shift_add_conv(x, weight)[:, t], sum(terms))


def test_convolution_gradient_is_exact_in_double():
    """Also across the chunks of the kernel gradient, and through non-contiguous input."""
    x = torch.randn(2, 3, 300, dtype=torch.float64).transpose(1, 2)
    weight = torch.randn(3, 5, dtype=torch.float64)
    expected = tensors_and_gradients(shift_add_conv, x, weight)
    assert_all_close(tensors_and_gradients(ChannelsLastConv.apply, x, weight), expected, rtol=1e-10, atol=1e-10)
    small = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ChannelsLastConv.apply, (small, weight.requires_grad_()))


def test_kernel_gradient_of_a_batch_of_wide_layers_takes_them_in_groups():
    x, weight = torch.randn(5, 40, 300), torch.randn(300, 3)
    expected = tensors_and_gradients(shift_add_conv, x, weight)
    assert_all_close(tensors_and_gradients(ChannelsLastConv.apply, x, weight), expected, rtol=1e-4, atol=1e-4)


def test_fast_length_is_the_smallest_product_of_two_three_and_five():
    def smooth(n):
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    good = [n for n in range(1, 4100) if smooth(n)]
    for least in range(1, 4001):
        assert fast_length(least) == next(n for n in good if n >= least)
    for least in (8192 + 62, 8192 + 503, 2**20 + 1):
        assert smooth(fast_length(least)) and least <= fast_length(least) < 1.1 * least


def test_fft_never_takes_a_length_that_is_slow(monkeypatch):
    sizes = []
    rfft = torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, size, dim: sizes.append(size) or rfft(x, size, dim=dim))
    fft_conv(torch.randn(1, 251, 2), torch.randn(2, 63))  # 313, a prime
    fft_conv(torch.randn(1, 64, 2), torch.randn(2, 504))  # only the 64 newest taps see anything
    assert set(sizes) == {320, 128}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu_never_reaches_the_channels_last_kernel(dtype, monkeypatch):
    """`Baseline(16, 15).bfloat16()` was seen to hang there on processors with AMX."""
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(multirate.F, "conv2d", lambda x, *rest, **named: seen.append(x.dtype) or conv2d(x, *rest, **named))
    model, x = with_form(Baseline(16, 15), "channels_last"), torch.randn(1, 133, 16)
    expected = tensors_and_gradients(model, x)
    got = tensors_and_gradients(model.to(dtype), x.to(dtype))
    assert got[0].dtype == got[1].dtype == dtype and set(seen) == {torch.float32} and len(seen) > 3
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("form", CONV_FORMS)
@pytest.mark.parametrize("name", MAKERS)
def test_training_under_autocast(name, form, monkeypatch):
    model, x = with_form(MAKERS[name](16, 15), form), torch.randn(2, 96, 16)

    def loss(x):
        y = model(x)
        return (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()

    leaves = [x.requires_grad_(), *model.parameters()]
    expected = torch.autograd.grad(loss(x), leaves)
    seen, conv2d = [], F.conv2d
    monkeypatch.setattr(multirate.F, "conv2d", lambda x, *rest, **named: seen.append(x.dtype) or conv2d(x, *rest, **named))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x)
        inside = torch.autograd.grad(value, leaves, retain_graph=True)
    for got in (torch.autograd.grad(value, leaves), inside):  # the backward pass may run outside of autocast, or inside
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.float32 and (a - b).norm() < 0.1 * b.norm()
    assert set(seen) <= {torch.float32}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_keeps_the_shape(name, shape):
    model, x = MAKERS[name](shape[2], 7), torch.randn(shape)
    before = x.clone()
    y = model(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert torch.equal(x, before), "the input must not be written to"


@pytest.mark.parametrize("name", MAKERS)
def test_every_layer_is_causal_and_has_memory(name):
    model, x = MAKERS[name](16, 15), torch.randn(2, 301, 16)
    y = model(x)
    for t in (1, 8, 63, 64, 65, 128, 200, 300):
        other = torch.cat([x[:, :t], torch.randn_like(x[:, t:])], 1)
        torch.testing.assert_close(model(other)[:, :t], y[:, :t], rtol=0, atol=1e-6)
    shifted = model(torch.cat([x[:, :200] + 1, x[:, 200:]], 1))
    assert not torch.allclose(shifted[:, 205], y[:, 205]), "the past counts"


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_reaches_every_parameter_and_the_input(name):
    model, x = MAKERS[name](16, 15), torch.randn(2, 333, 16, requires_grad=True)
    model(x).square().sum().backward()
    for key, value in [("x", x), *model.named_parameters()]:
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0, key


def test_mrss_as_published_leaves_its_low_branch_untrained():
    model = MRSS(16, 15, 4, detach_low=True)
    model(torch.randn(2, 64, 16)).sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {"scan_low.conv.weight", "scan_low.project.weight"}


def test_rate_one_is_the_baseline():
    x, base, mrss = torch.randn(2, 51, 16), Baseline(16, 7), MRSS(16, 7, 1)
    for scan in (mrss.scan_low, mrss.scan_high):
        scan.load_state_dict(base.state_dict())
    torch.testing.assert_close(mrss(x), base(x), rtol=0, atol=1e-6)
    split = SplitMRSS(16, 7, 1, 0.5)
    filtered = torch.cat([shift_add_conv(x[..., :8], split.high_conv.weight), shift_add_conv(x[..., 8:], split.low_conv.weight)], -1)
    weight = torch.cat([split.high_project.weight, split.low_project.weight], 1)
    torch.testing.assert_close(split(x), F.relu(filtered @ weight.T), rtol=0, atol=1e-6)
    twin = DilatedTwin(16, 7, 1, 0.5)
    twin.load_state_dict(split.state_dict())
    torch.testing.assert_close(twin(x), split(x), rtol=0, atol=1e-6)


def test_mrss_equals_its_formula():
    model, x = MRSS(16, 7, 3), torch.randn(2, 50, 16)
    low = model.scan_low(x[:, ::3])[:, torch.arange(50) // 3]
    g = torch.sigmoid(model.gate(x))
    torch.testing.assert_close(model(x), g * low + (1 - g) * model.scan_high(x))


def test_gated_baseline_equals_its_formula():
    model, plain, x = GatedBaseline(16, 7), Baseline(16, 7), torch.randn(2, 50, 16)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("gate")})
    torch.testing.assert_close(model(x), torch.sigmoid(model.gate(x)) * plain(x))


def test_causal_pool_is_the_mean_of_the_last_r_steps():
    x = torch.randn(2, 10, 3)
    pooled = causal_pool(x, 4)
    assert pooled.shape == (2, 3, 3)
    torch.testing.assert_close(pooled[:, 0], x[:, 0] / 4)
    torch.testing.assert_close(pooled[:, 2], x[:, 5:9].mean(1))


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 133])
@pytest.mark.parametrize("r, share", [(1, 0.5), (3, 0.6), (8, 0.75), (16, 0.875), (200, 0.5)])
def test_split_equals_its_plain_form(steps, r, share):
    model = SplitMRSS(16, 15, r, share)
    fast, plain = with_weights(model, split_reference)
    inputs = (torch.randn(3, steps, 16), *model.parameters())
    (y, *grads), (right, *right_grads) = tensors_and_gradients(fast, *inputs), tensors_and_gradients(plain, *inputs)
    torch.testing.assert_close(y, right, rtol=0, atol=1e-5)
    assert_all_close(grads, right_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 8, 133])
@pytest.mark.parametrize("r", [1, 3, 8, 200])
def test_dilated_twin_equals_filters_with_zeros_between_their_taps(steps, r):
    def plain(model, x):
        sparse = torch.zeros(model.low, 14 * r + 1).index_add(1, torch.arange(15) * r, model.low_conv.weight)
        high = shift_add_conv(x[..., : model.high], model.high_conv.weight)
        both = torch.cat([high, shift_add_conv(x[..., model.high :], sparse)], -1)
        return F.relu(both @ torch.cat([model.high_project.weight, model.low_project.weight], 1).T)

    model = DilatedTwin(16, 15, r, 0.75)
    inputs = (torch.randn(2, steps, 16), *model.parameters())
    (y, *grads), (right, *right_grads) = (tensors_and_gradients(fn, *inputs) for fn in with_weights(model, plain))
    torch.testing.assert_close(y, right, rtol=0, atol=1e-5)
    assert_all_close(grads, right_grads, rtol=1e-4, atol=1e-5)


def test_the_twin_has_the_weights_and_the_reach_of_split():
    split, twin = SplitMRSS(16, 15, 8, 0.75), DilatedTwin(16, 15, 8, 0.75)
    twin.load_state_dict(split.state_dict())
    x = torch.randn(1, 300, 16, requires_grad=True)
    reach = {}
    for name, model in (("split", split), ("twin", twin)):
        gradient, = torch.autograd.grad(model(x)[0, 299].sum(), x)
        reach[name] = 299 - int(gradient.abs().sum((0, 2)).nonzero()[0])
    assert abs(reach["split"] - reach["twin"]) < 2 * 8 and reach["twin"] >= 14 * 8


def test_low_rank_is_the_baseline_with_a_product_for_its_mixing():
    model, base, x = LowRankBaseline(16, 7, 5), Baseline(16, 7), torch.randn(2, 40, 16)
    base.conv.load_state_dict(model.conv.state_dict())
    base.project.weight.data = model.up.weight.data @ model.down.weight.data
    assert torch.linalg.matrix_rank(base.project.weight) == 5
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 64, 333])
@pytest.mark.parametrize("name", [name for name in MAKERS if name != "DepthwiseCausalConv1d"])
def test_counted_flops_equal_the_formula(name, steps):
    model = with_form(MAKERS[name](16, 15), "stock").to("meta")
    counted = count_flops(lambda: model(torch.empty(2, steps, 16, device="meta")))
    assert counted == flops_of(model, 2, steps)


def test_flops_of_the_original_report():
    scan = scan_flops(8, 8192, 512, 63)
    assert round(scan / 1e9, 2) == 38.59 and flops_of(Baseline(512, 63), 8, 8192) == scan
    assert [round(mrss_flops(8, 8192, 512, 63, r) / 1e9, 2) for r in (1, 2, 4)] == [111.53, 92.24, 82.59]
    assert flops_of(MRSS(512, 63, 4), 8, 8192) == mrss_flops(8, 8192, 512, 63, 4)
    assert min(mrss_flops(8, 8192, 512, 63, r) for r in range(1, 512)) > 1.8 * scan


def test_updates_are_counted():
    assert MRSS(16, 15, 4).updates_per_step == 1.25
    assert SplitMRSS(16, 15, 8, 0.75).updates_per_step == pytest.approx(0.25 + 0.75 / 8)
    assert DilatedTwin(16, 15, 8, 0.75).updates_per_step == 1


def size(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("r, share", [(8, 0.75), (8, 0.875), (16, 0.875)])
def test_budgets_match_within_five_percent(r, share):
    split = SplitMRSS(512, 63, r, share)
    assert abs(size(split) / size(Baseline(512, 63)) - 1) < 0.05
    assert size(DilatedTwin(512, 63, r, share)) == size(split)


@pytest.mark.parametrize("rank, share", [(64, 0.75), (32, 0.875)])
def test_low_rank_controls_have_equal_compute_within_three_percent(rank, share):
    ratio = flops_of(LowRankBaseline(512, 63, rank), 8, 8192) / flops_of(SplitMRSS(512, 63, 8, share), 8, 8192)
    assert abs(ratio - 1) < 0.03


def test_a_form_reaches_every_filter_and_can_be_taken_back(monkeypatch):
    model, x, used = MRSS(8, 3, 2), torch.randn(1, 9, 8), []
    monkeypatch.setitem(CONV_FORMS, "stock", lambda *pair: used.append("stock") or shift_add_conv(*pair))
    monkeypatch.setitem(CONV_FORMS, "fft", lambda *pair: used.append("fft") or shift_add_conv(*pair))
    monkeypatch.setitem(multirate.FAST, "cpu", "fft")
    assert with_form(model, "stock") is model
    model(x)
    assert used == ["stock", "stock"]
    with_form(model, None)(x)
    assert used[2:] == ["fft", "fft"]


@pytest.mark.parametrize("call, words", [
    (lambda: DepthwiseCausalConv1d(8, 0), "kernel=0"),
    (lambda: DepthwiseCausalConv1d(True, 3), "dim=True"),
    (lambda: with_form(Baseline(8, 3), "magic"), "form='magic'"),
    (lambda: Baseline(8, 2.5), "kernel=2.5"),
    (lambda: MRSS(8, 3, 0), "r=0"),
    (lambda: MRSS(8, 3, 1.5), "r=1.5"),
    (lambda: SplitMRSS("8", 3, 2, 0.5), "dim='8'"),
    (lambda: SplitMRSS(1, 3, 2, 0.5), "dim=1"),
    (lambda: SplitMRSS(8, None, 2, 0.5), "kernel=None"),
    (lambda: SplitMRSS(8, 3, 2, 1.0), "low_fraction=1.0"),
    (lambda: SplitMRSS(8, 3, 2, 0), "low_fraction=0"),
    (lambda: SplitMRSS(8, 3, 2, float("nan")), "low_fraction=nan"),
    (lambda: DilatedTwin(8, 3, -1, 0.5), "r=-1"),
    (lambda: LowRankBaseline(8, 3, 0), "rank=0"),
])
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match="allowed") as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", [(7, 16), (2, 0, 16), (2, 7, 17), (2, 7, 1), (1, 2, 7, 16)])
def test_layers_name_their_input_where_its_shape_is_wrong(name, shape):
    with pytest.raises(ValueError) as error:
        MAKERS[name](16, 8)(torch.ones(shape))
    assert str(error.value) == f"x=({shape}, torch.float32) is not allowed; allowed: (B, T, 16) with T ≥ 1, floating-point numbers"


@pytest.mark.parametrize("name", ["Baseline", "SplitMRSS"])
def test_gradients_as_a_function_are_those_of_backward(name):
    model, x = with_form(MAKERS[name](16, 8), "channels_last"), torch.randn(2, 40, 16)
    weights = dict(model.named_parameters())
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (x,)).square().sum())(weights)
    model(x).square().sum().backward()
    for parameter, value in weights.items():
        torch.testing.assert_close(found[parameter], value.grad)


@pytest.mark.parametrize("x", [torch.ones(1, 8, 3, dtype=torch.long), torch.ones(1, 8, 1), torch.ones(8, 3)])
@pytest.mark.parametrize("form", [None, "fft", "stock", "channels_last"])
def test_what_is_no_sequence_of_these_channels_is_refused(form, x):
    with pytest.raises(ValueError, match=r"x=.* is not allowed; allowed: \(B, T, 3\)"):
        multirate.with_form(multirate.DepthwiseCausalConv1d(3, 4), form)(x)
