"""The scans equal their definitions and the transformers library; blocks, tasks and errors."""

import math
import re

import pytest
import torch

from lab.notebooks import definitions

NOTEBOOK = "ssm/selective_scan.ipynb"


@pytest.fixture(scope="module")
def ns():
    names = definitions(NOTEBOOK)
    names["transformers"].logging.set_verbosity_error()
    return names


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(ns, name):
    """(fast scan, sequential reference, random inputs) of S6 or SSD."""
    return ns[name], ns[f"{name}_sequential"], ns[f"random_{name}"]


def close(a, b, tolerance):
    a, b = ((v,) if isinstance(v, torch.Tensor) else v for v in (a, b))
    for left, right in zip(a, b, strict=True):
        assert float((left.detach().double() - right.detach().double()).abs().max()) <= tolerance


@pytest.mark.parametrize("name", ["s6", "ssd"])
@pytest.mark.parametrize("length", [1, 2, 31, 63, 500])
@pytest.mark.parametrize("chunk,segment", [(1, 2048), (7, 50), (32, 64), (128, 2048)])
def test_fast_scan_equals_the_sequential_definition(ns, name, length, chunk, segment):
    fast, sequential, inputs = pair(ns, name)
    given = inputs(length)
    expected = sequential(*given)
    close(fast(*given, chunk=chunk, segment=segment), expected, 1e-12)
    close(fast(*(v.float() for v in given), chunk=chunk, segment=segment), expected, 1e-4)


@pytest.mark.parametrize("name", ["s6", "ssd"])
def test_long_float32_scan_stays_accurate(ns, name):
    fast, sequential, inputs = pair(ns, name)
    given = inputs(3000, batch=1)
    close(fast(*(v.float() for v in given)), sequential(*given), 1e-4)


@pytest.mark.parametrize("name", ["s6", "ssd"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_all_inputs(ns, name, recompute):
    fast, sequential, inputs = pair(ns, name)
    given = [v.requires_grad_() for v in inputs(45)]
    weight = torch.randn_like(given[0])
    expected = torch.autograd.grad((sequential(*given)[0] * weight).sum(), given)
    y, _ = fast(*given, chunk=8, segment=20, recompute=recompute)
    close(torch.autograd.grad((y * weight).sum(), given), expected, 1e-11)


@pytest.mark.parametrize("name", ["s6", "ssd"])
def test_gradient_passes_through_the_state(ns, name):
    fast, _, inputs = pair(ns, name)
    x, delta, A, B, C = inputs(10)
    x.requires_grad_()
    _, state = fast(x, delta, A, B, C)
    y, _ = fast(x.detach(), delta, A, B, C, state)
    assert (torch.autograd.grad(y.sum(), x)[0].abs().amax(0) > 0).all()


@pytest.mark.parametrize("name", ["s6", "ssd"])
@pytest.mark.parametrize("cut", [1, 40, 96])
def test_state_hand_over_between_two_parts(ns, name, cut):
    fast, _, inputs = pair(ns, name)
    x, delta, A, B, C = inputs(97)
    whole, final = fast(x, delta, A, B, C)
    first, state = fast(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut])
    second, state = fast(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], state)
    close((torch.cat([first, second], 1), state), (whole, final), 1e-12)


@pytest.mark.parametrize("name", ["s6", "ssd"])
def test_no_output_depends_on_a_later_token(ns, name):
    fast, _, inputs = pair(ns, name)
    given = list(inputs(60))
    before = fast(*given, chunk=16)[0]
    for i in (0, 1, 3, 4):
        given[i] = given[i].clone()
        given[i][:, 37:] += 1
    after = fast(*given, chunk=16)[0]
    assert torch.equal(before[:, :37], after[:, :37])
    assert not torch.allclose(before[:, 37:], after[:, 37:])


@pytest.mark.parametrize("name", ["s6", "ssd"])
@pytest.mark.parametrize("extreme", [0.0, 1e-8, 1e4, 1e8])
def test_extreme_steps_stay_finite_and_exact(ns, name, extreme):
    fast, sequential, inputs = pair(ns, name)
    given = list(inputs(150))
    given[1] = given[1].clone()
    given[1][:, ::13] = extreme
    expected = sequential(*given)[0]
    single = [v.float().requires_grad_() for v in given]
    y = fast(*single)[0]
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.mean(), single))
    scale = float(expected.abs().max())
    close(y.detach() / scale, expected / scale, 1e-5)


@pytest.mark.parametrize("name", ["s6", "ssd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding_only(ns, name, dtype):
    fast, sequential, inputs = pair(ns, name)
    given = [v.to(dtype) for v in inputs(200)]
    y, expected = fast(*given)[0], sequential(*given)[0]
    assert y.dtype == dtype
    close(y / expected.abs().max(), expected / expected.abs().max(), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("init", ["lin", "inv", "real"])
@pytest.mark.parametrize("length", [1, 2, 101])
def test_s4d_convolution_equals_recurrence(ns, init, length):
    layer, x = ns["S4D"](5, 16, init).double(), torch.randn(2, length, 5, dtype=torch.float64)
    close(layer(x), layer.recurrent(x)[0], 1e-12)
    first, state = layer.recurrent(x[:, :length // 2 + 1])
    if length > 2:
        second, _ = layer.recurrent(x[:, length // 2 + 1:], state)
        close(torch.cat([first, second], 1), layer(x), 1e-12)


@pytest.mark.parametrize("family,options", [
    ("mamba", {}), ("mamba", dict(use_bias=True, use_conv_bias=False, conv_kernel=3)),
    ("mamba2", {}), ("mamba2", dict(groups=1)), ("mamba2", dict(time_step_limit=(0.01, 0.05))),
    ("mamba2", dict(use_bias=True, use_conv_bias=False, head_width=8))])
@pytest.mark.parametrize("length", [1, 3, 65])
def test_blocks_equal_transformers(ns, family, options, length):
    model = ns["library_model"](family, 1, **options)
    mixer = model.backbone.layers[0].mixer
    block = ns["block_from_transformers"](mixer, model.config)
    x = torch.randn(2, length, 32, requires_grad=True)
    ours, theirs = block(x)[0], mixer(x)
    close(ours, theirs, 1e-4)
    names = [n for n, _ in block.named_parameters()]
    weight = torch.randn_like(ours)
    a, b = (torch.autograd.grad((y * weight).sum(), [x, *(dict(m.named_parameters())[n] for n in names)])
            for y, m in ((ours, block), (theirs, mixer)))
    for left, right in zip(a, b, strict=True):
        close(left, right, 1e-4 * max(1.0, float(right.abs().max())))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_whole_model_generates_what_transformers_generates(ns, family):
    theirs = ns["library_model"](family)
    ours = ns["model_from_transformers"](theirs)
    ids = torch.randint(64, (3, 11))
    with torch.no_grad():
        close(ours(ids)[0], theirs(ids).logits, 1e-4)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(ours.generate(ids, 12), expected)


def blocks(ns):
    return {"mamba": ns["MambaBlock"](16), "mamba2": ns["Mamba2Block"](16, 4, 8, groups=2, rate=3),
            "multirate": ns["MultiRateBlock"](16, 4, 8, 8, 2, 4),
            "dynamic": ns["DynamicBlock"](16, ns["Mamba2Block"](16, 4, 8)),
            "stride": ns["DynamicBlock"](16, ns["Mamba2Block"](16, 4, 8), choose="stride")}


@pytest.mark.parametrize("name", ["mamba", "mamba2", "multirate", "dynamic", "stride"])
def test_blocks_are_causal_and_train_every_parameter(ns, name):
    block = blocks(ns)[name]
    x = torch.randn(2, 50, 16)
    changed = x.clone()
    changed[:, 30] += 1
    with torch.no_grad():
        close(block(x)[0][:, :30], block(changed)[0][:, :30], 1e-5)
    block(x)[0].square().sum().backward()
    unused = {"query.weight", "key.weight"} if name == "stride" else set()
    for parameter, value in block.named_parameters():
        assert parameter in unused or (value.grad is not None and value.grad.abs().sum() > 0), parameter


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_step_equals_forward_with_a_state_of_constant_size(ns, name):
    block, x = blocks(ns)[name], torch.randn(2, 40, 16)
    y, final = block(x)
    state = block(x[:, :1])[1]
    size = lambda state: [(v.shape, v.untyped_storage().nbytes()) for v in state]
    assert size(final) == size(state)  # nothing of the sequence stays behind
    sizes = size(state)
    for t in range(1, 40):
        out, state = block.step(x[:, t], state)
        close(out, y[:, t], 1e-4)
    assert size(state) == sizes
    close(state, final, 1e-4)


@pytest.mark.parametrize("length", [1, 4, 41])
@torch.no_grad()
def test_multirate_step_equals_forward(ns, length):
    block, x = blocks(ns)["multirate"], torch.randn(2, length, 16)
    y, state = block(x)[0], block.start(x)
    for t in range(length):
        out, state = block.step(x[:, t], state)
        close(out, y[:, t], 1e-4)


def test_resolution_variants_have_equal_parameters(ns):
    variants = ns["resolution_variants"](32, 8, 8, 16)
    assert len({sum(p.numel() for p in b.parameters()) for b in variants.values()}) == 1
    assert len(variants) == 4


@pytest.mark.parametrize("length", [1, 7, 8, 9])
def test_causal_pool_is_the_mean_of_the_last_tokens(ns, length):
    x, rate = torch.randn(2, length, 3), 4
    pooled = ns["causal_pool"](x, rate)
    for j in range(math.ceil(length / rate)):
        recent = x[:, max(0, rate * j - rate + 1):rate * j + 1]
        close(pooled[:, j], recent.sum(1) / rate, 1e-6)
    assert ns["hold"](pooled, rate, length).shape == x.shape


def test_running_average_equals_its_recurrence(ns):
    y, p = torch.randn(2, 30, 4, dtype=torch.float64), torch.rand(2, 30, dtype=torch.float64)
    z, expected = torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(30):
        z = p[:, t, None] * y[:, t] + (1 - p[:, t, None]) * z
        expected.append(z)
    close(ns["running_average"](y, p), torch.stack(expected, 1), 1e-12)


def test_ratio_loss_is_least_at_the_target(ns):
    loss = lambda share: float(ns["ratio_loss"](torch.full((1, 100), share), torch.arange(100)[None] < 100 * share, 0.25))
    assert loss(0.25) == pytest.approx(1, abs=1e-5)
    assert loss(0.05) < loss(0.6) and loss(0.5) > 1 and loss(0.9) > loss(0.5)


@torch.no_grad()
def test_a_router_that_chooses_all_changes_nothing_but_the_average(ns):
    inner = ns["Mamba2Block"](16, 4, 8)
    block = ns["DynamicBlock"](16, inner, 0.25)
    x = torch.randn(2, 20, 16)
    block.route = lambda x: (torch.ones(x.shape[:2]), torch.ones(x.shape[:2], dtype=torch.bool))
    close(block(x)[0], inner(x)[0], 1e-2)  # p is held below 1 by 1e-4
    assert float(block.share) == 1


@pytest.mark.parametrize("task", ["induction", "copying", "mqar"])
def test_tasks_can_be_solved_from_what_they_show(ns, task):
    ids, labels = ns["TASKS"][task][0](200, generator=torch.Generator().manual_seed(1))
    assert ids.shape == labels.shape and int(ids.max()) < ns["TASKS"][task][1] and int(ids.min()) >= 0
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


def test_training_learns(ns):
    model = ns["SequenceModel"](10, 16, [ns["Mamba2Block"](16, 2, 8, 8, chunk=16)])
    result = ns["train"](model, "copying", 2, 0, torch.device("cpu"), batch=4)
    assert result["steps"] == 2 and 0 <= result["accuracy"] <= 1
    assert all(p.grad is not None for p in model.parameters())


def test_crossover_finds_the_length_and_says_when_there_is_none(ns):
    rng = torch.Generator().manual_seed(0)
    noisy = lambda value: (value * (1 + 0.05 * torch.rand(15, generator=rng))).tolist()
    lengths = [256, 512, 1024, 2048]
    linear, quadratic = [noisy(float(t)) for t in lengths], [noisy(t * t / 700) for t in lengths]
    at, low, high = ns["crossover"](lengths, linear, quadratic)
    assert low <= at <= high and 600 < at < 800 and high - low < 100
    assert ns["crossover"](lengths, linear, [noisy(t / 2) for t in lengths])[0] == math.inf
    assert ns["crossover"](lengths, linear, [noisy(t * 2) for t in lengths]) == (256, 256, 256)


def test_flops_formula_equals_the_counter(ns):
    heads, width, states, chunk, length = 2, 8, 4, 16, 64
    cases = ns["all_cases"](length, 2, heads, width, states, chunk, {}, "cpu")
    for name in ("SSD (ours)", "S6 (ours)", f"SSD N={4 * states} (ours)"):
        fn, _ = cases[name]
        n = 4 * states if "N=" in name else states
        expected = ns["product_flops"](name, length, 2, heads, width, n, chunk)
        assert ns["count_flops"](fn) == expected, name


def test_peak_memory_is_linear_in_length(ns):
    def peak(length, name):
        fn, inputs = ns["all_cases"](length, 1, 4, 16, 16, 32, {}, "cpu")[name]
        return ns["peak_memory"](ns["forward_only"](fn), torch.device("cpu"), inputs)[0]

    for name in ("SSD (ours)", "S6 (ours)"):
        assert peak(8192, name) <= 2.2 * peak(4096, name)


@pytest.mark.parametrize("call,words", [
    (lambda ns: ns["s6"](torch.ones(2, 3), *[None] * 4), "x.shape"),
    (lambda ns: ns["s6"](*(v[:, :0] if v.dim() == 3 else v for v in ns["random_s6"](5))), "x.shape"),
    (lambda ns: ns["s6"](*ns["random_s6"](5), chunk=0), "chunk"),
    (lambda ns: ns["s6"](*ns["random_s6"](5), segment=-1), "segment"),
    (lambda ns: ns["s6"](*ns["random_s6"](5)[:1], *ns["random_s6"](6)[1:]), "delta.shape"),
    (lambda ns: ns["s6"](*ns["random_s6"](5)[:3], *ns["random_s6"](5, states=4)[3:]), "B.shape"),
    (lambda ns: ns["ssd"](*ns["random_ssd"](5), chunk=1.5), "chunk"),
    (lambda ns: ns["ssd"](*ns["random_ssd"](5)[:3], *ns["random_ssd"](5, groups=3)[3:]), "groups|divisor"),
    (lambda ns: ns["S4D"](4, 15), "states"),
    (lambda ns: ns["S4D"](4, 16, "legs"), "init"),
    (lambda ns: ns["causal_pool"](torch.ones(1, 4, 2), 0), "rate"),
    (lambda ns: ns["MultiRateBlock"](16, 4, 8, 8, 4), "slow_heads"),
    (lambda ns: ns["Mamba2Block"](16, 4, groups=3), "groups"),
    (lambda ns: ns["Mamba2Block"](16, 0), "heads=0"),
    (lambda ns: ns["Mamba2Block"](16, 4, rate=0), "rate=0"),
    (lambda ns: ns["s6"](*ns["random_s6"](5), torch.zeros(2, 6, 5)), r"state.shape=\(2, 6, 5\).*\(2, 5, 6\)"),
    (lambda ns: ns["ssd"](*ns["random_ssd"](5), torch.zeros(2, 4, 6, 5)), r"state.shape.*\(2, 2, 6, 2, 5\)"),
    (lambda ns: ns["DynamicBlock"](16, None, 1.5), "target"),
    (lambda ns: ns["DynamicBlock"](16, None, 0.5, "random"), "choose"),
])
def test_wrong_input_gives_one_clear_line(ns, call, words):
    with pytest.raises(ValueError) as error:
        call(ns)
    assert "\n" not in str(error.value) and re.search(words, str(error.value)) and "allowed" in str(error.value)


def test_optional_modules_never_break_the_notebook(ns):
    assert ns["optional"]("no_such_module_anywhere", "thing") is None
    assert ns["optional"]("math", "no_such_name") is None
    assert ns["optional"]("math", "pi") == math.pi
