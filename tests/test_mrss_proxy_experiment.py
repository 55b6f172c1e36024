"""The layers of ssm/mrss_proxy_experiment.ipynb: what must hold for any shape."""

import pytest
import torch
import torch.nn.functional as F

from lab.notebooks import definitions

NOTEBOOK = "ssm/mrss_proxy_experiment.ipynb"
ns = definitions(NOTEBOOK)
SHAPES = [(1, 1, 8), (2, 5, 8), (3, 97, 16), (2, 256, 12)]
MAKERS = {
    "DepthwiseCausalConv1d": lambda d, k: ns["DepthwiseCausalConv1d"](d, k),
    "ScanProxy": lambda d, k: ns["ScanProxy"](d, k),
    "RecurrentProxy": lambda d, k: ns["RecurrentProxy"](d),
    "Baseline": lambda d, k: ns["Baseline"](d, k),
    "GatedBaseline": lambda d, k: ns["GatedBaseline"](d, k),
    "MRSS": lambda d, k: ns["MRSS"](d, k, 4),
    "HierarchicalMRSS": lambda d, k: ns["HierarchicalMRSS"](d, k, (2, 4, 8)),
    "SplitMRSS": lambda d, k: ns["SplitMRSS"](d, k, 8, 0.75),
    "SparseMRSS": lambda d, k: ns["SparseMRSS"](d, k, 8, 0.5),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensors_and_gradients(fn, *inputs):
    """Output and gradients of fn, for a fixed gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = fn(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    slopes = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outs]
    return [o.detach() for o in outs], torch.autograd.grad(outs, leaves, slopes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("taps", [1, 4, 9, 63])
@pytest.mark.parametrize("form", ["stock", "channels_last", "toeplitz", "fft"])
def test_convolution_forms_equal_the_formula(form, shape, taps):
    x, weight = torch.randn(shape), torch.randn(shape[2], taps) / taps
    expected = tensors_and_gradients(ns["shift_add_conv"], x, weight)
    got = tensors_and_gradients(ns["CONV_FORMS"][form], x, weight)
    for a, b in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_convolution_gradient_is_exact_in_double():
    """Also across the chunks of the kernel gradient, and through non-contiguous input."""
    x = torch.randn(2, 3, 300, dtype=torch.float64).transpose(1, 2)
    weight = torch.randn(3, 5, dtype=torch.float64)
    expected = tensors_and_gradients(ns["shift_add_conv"], x, weight)
    got = tensors_and_gradients(ns["ChannelsLastConv"].apply, x, weight)
    for a, b in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    small = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ns["ChannelsLastConv"].apply, (small, weight.requires_grad_()))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_keeps_the_shape(name, shape):
    model = MAKERS[name](shape[2], 7)
    x = torch.randn(shape)
    before = x.clone()
    y = model(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert torch.equal(x, before), "the input must not be written to"


@pytest.mark.parametrize("name", MAKERS)
def test_every_layer_is_causal(name):
    model, x = MAKERS[name](16, 15), torch.randn(2, 301, 16)
    assert max(ns["causality_error"](model, x, t) for t in (1, 8, 63, 64, 65, 128, 200, 300)) < 1e-5


def test_causal_choice_never_looks_ahead_and_the_other_one_does():
    """With a decisive score, changing late steps changes early outputs only if `causal` is off."""
    errors = {}
    for causal in (True, False):
        errors[causal] = 0.0
        for seed in range(5):
            torch.manual_seed(seed)
            model = ns["SparseMRSS"](16, 15, 8, 0.25, causal=causal)
            torch.nn.init.normal_(model.score.weight, std=100.0)
            errors[causal] = max(errors[causal], ns["causality_error"](model, torch.randn(2, 640, 16), 400))
    assert errors[True] < 1e-6 < errors[False]


@pytest.mark.parametrize("causal", [True, False])
def test_density_of_the_chosen_blocks(causal):
    chosen = ns["choose_blocks"](torch.randn(64, 128), 0.125, causal)
    assert chosen.shape == (64, 128) and chosen.dtype == torch.bool
    share = chosen.float().mean()
    assert chosen[:, 0].all() or not causal, "the first block is the best one so far"
    assert share == 0.125 if not causal else 0.1 < share < 0.15


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_reaches_every_parameter_and_the_input(name):
    model, x = MAKERS[name](16, 15), torch.randn(2, 333, 16, requires_grad=True)
    model(x).square().sum().backward()
    for key, value in [("x", x), *model.named_parameters()]:
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0, key


def test_mrss_as_published_leaves_its_low_branch_untrained():
    model = ns["MRSS"](16, 15, 4, detach_low=True)
    model(torch.randn(2, 64, 16)).sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {"scan_low.conv.weight", "scan_low.project.weight"}


def test_rate_one_is_the_baseline():
    x, base = torch.randn(2, 51, 16), ns["Baseline"](16, 7)
    mrss, many = ns["MRSS"](16, 7, 1), ns["HierarchicalMRSS"](16, 7, (1, 1))
    for scan in (mrss.scan_low, mrss.scan_high, *many.scans):
        scan.load_state_dict(base.state_dict())
    torch.testing.assert_close(mrss(x), base(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(many(x), base(x), rtol=0, atol=1e-6)
    split = ns["SplitMRSS"](16, 7, 1, 0.5)
    filtered = torch.cat([ns["shift_add_conv"](x[..., :8], split.high_conv.weight),
                          ns["shift_add_conv"](x[..., 8:], split.low_conv.weight)], -1)
    weight = torch.cat([split.high_project.weight, split.low_project.weight], 1)
    torch.testing.assert_close(split(x), F.relu(filtered @ weight.T), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 133])
@pytest.mark.parametrize("r, share", [(1, 0.5), (3, 0.6), (8, 0.75), (16, 0.875), (200, 0.5)])
def test_split_equals_its_plain_form(steps, r, share):
    model = ns["SplitMRSS"](16, 15, r, share)
    x = torch.randn(3, steps, 16)
    inputs = (x, *model.parameters())
    fast = torch.func.functional_call
    names = [n for n, _ in model.named_parameters()]

    def run(forward):
        def fn(x, *values):
            return forward(dict(zip(names, values, strict=True)), x)
        return tensors_and_gradients(fn, *inputs)

    def plain(values, x):
        class View:
            high, r = model.high, model.r
        view = View()
        for part in ("high_conv", "low_conv", "high_project", "low_project"):
            setattr(view, part, type("Part", (), {"weight": values[f"{part}.weight"]}))
        return ns["split_reference"](view, x)

    (y, grads), (right, right_grads) = run(lambda values, x: fast(model, values, x)), run(plain)
    torch.testing.assert_close(y, right, rtol=0, atol=1e-5)
    for a, b in zip(grads, right_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sparse_with_every_block_chosen_is_split():
    sparse, split = ns["SparseMRSS"](16, 15, 8, 0.5, causal=False), ns["SplitMRSS"](16, 15, 8, 0.75)
    split.load_state_dict({k: v for k, v in sparse.state_dict().items() if not k.startswith("score")})
    torch.nn.init.zeros_(sparse.score.weight)
    torch.nn.init.constant_(sparse.score.bias, 50.0)
    sparse.density = 1.0
    x = torch.randn(2, 300, 16)
    torch.testing.assert_close(sparse(x), split(x), rtol=0, atol=1e-5)


def test_recurrent_view_equals_convolution_view():
    model = ns["RecurrentProxy"](8)
    torch.nn.init.uniform_(model.a, 0.2, 0.99)
    x = torch.randn(2, 60, 8)
    for form in ("stock", "channels_last"):
        conv = ns["CONV_FORMS"][form](x, model.kernel(60))
        torch.testing.assert_close(model(x), F.relu(model.project(conv)), rtol=0, atol=1e-5)
    start = ns["RecurrentProxy"](8)  # a = 0, b = 1: no memory at all
    torch.testing.assert_close(start(x), F.relu(start.project(x)))


@pytest.mark.parametrize("steps", [64, 333])
@pytest.mark.parametrize("name", ["Baseline", "GatedBaseline", "MRSS", "SplitMRSS", "SparseMRSS"])
def test_counted_flops_equal_the_formula(name, steps):
    model = MAKERS[name](16, 15)
    counted = ns["counted_flops"](model, torch.randn(2, steps, 16))
    assert counted == ns["flops_of"](model, 2, steps, 16)
    assert all(m.form is None for m in model.modules() if hasattr(m, "form")), "the form must be put back"


def test_flops_of_the_original_report():
    scan, mrss = ns["scan_flops"](8, 8192, 512, 63), ns["mrss_flops"]
    assert round(scan / 1e9, 2) == 38.59
    assert [round(mrss(8, 8192, 512, 63, r) / 1e9, 2) for r in (1, 2, 4)] == [111.53, 92.24, 82.59]
    assert min(mrss(8, 8192, 512, 63, r) for r in range(1, 512)) > 1.8 * scan


def test_updates_are_counted():
    sparse = ns["SparseMRSS"](16, 15, 8, 0.5)
    sparse(torch.randn(1, 640, 16))
    chosen = float(sparse.chosen.float().mean())
    for model, updates in ((ns["Baseline"](16, 15), 1), (ns["MRSS"](16, 15, 4), 1.25),
                           (ns["SplitMRSS"](16, 15, 8, 0.75), 0.25 + 0.75 / 8), (sparse, 0.25 * chosen + 0.75 / 8)):
        assert ns["updates_per_step"](model) == pytest.approx(updates)


@pytest.mark.parametrize("r, share", [(8, 0.75), (8, 0.875), (16, 0.875)])
def test_budgets_match_within_five_percent(r, share):
    size = lambda model: sum(p.numel() for p in model.parameters())
    base = size(ns["Baseline"](512, 63))
    assert abs(size(ns["SplitMRSS"](512, 63, r, share)) / base - 1) < 0.05
    assert abs(size(ns["SparseMRSS"](512, 63, r, 0.125)) / base - 1) < 0.05


@pytest.mark.parametrize("call, words", [
    (lambda: ns["DepthwiseCausalConv1d"](8, 0), "kernel=0"),
    (lambda: ns["DepthwiseCausalConv1d"](8, 3, "magic"), "form='magic'"),
    (lambda: ns["MRSS"](8, 3, 0), "r=0"),
    (lambda: ns["MRSS"](8, 3, 1.5), "r=1.5"),
    (lambda: ns["HierarchicalMRSS"](8, 3, ()), "rates=()"),
    (lambda: ns["HierarchicalMRSS"](8, 3, 4), "rates=4"),
    (lambda: ns["SplitMRSS"]("8", 3, 2, 0.5), "dim='8'"),
    (lambda: ns["SplitMRSS"](8, None, 2, 0.5), "kernel=None"),
    (lambda: ns["SparseMRSS"](8, 3, 2, 0.5, block=0), "block=0"),
    (lambda: ns["SplitMRSS"](8, 3, 2, 1.0), "low_fraction=1.0"),
    (lambda: ns["SplitMRSS"](8, 3, 2, 0), "low_fraction=0"),
    (lambda: ns["SparseMRSS"](8, 3, 2, 0.0), "density=0.0"),
    (lambda: ns["check_shapes"](0, 10, 8, 3), "BATCH=0"),
    (lambda: ns["check_shapes"](1, 10, 8, True), "KERNEL=True"),
    (lambda: ns["check_dtype"]("float64", torch.device("cpu")), "DTYPE='float64'"),
])
def test_bad_values_are_named(call, words):
    with pytest.raises(ValueError, match="allowed") as error:
        call()
    assert words in str(error.value)


def test_averaging_task_is_the_recurrence():
    x, y = ns["averaging_task"](2, 50, (4.0,), torch.Generator().manual_seed(0))
    decay, state = torch.exp(torch.tensor(-1 / 4.0)), torch.zeros(2, 1)
    for t in range(50):
        state = decay * state + torch.sqrt(1 - decay**2) * x[:, t]
        torch.testing.assert_close(y[:, t], state, rtol=0, atol=1e-5)
