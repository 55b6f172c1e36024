"""The scans equal their definitions and the transformers library; faults, precision, states, padding, blocks, models."""

import copy
import math
import re

import pytest
import torch
import transformers

from effarch.bench import count_flops, peak_memory
from effarch.bench.sequences import Case
from effarch.bench.timing import one_pass
from effarch.scans import (
    AttentionLayer,
    Mamba2Block,
    MambaBlock,
    MambaLM,
    block_from_transformers,
    model_from_transformers,
    random_s6,
    random_ssd,
    s6,
    s6_sequential,
    s6_step,
    scan,
    ssd,
    ssd_minimal,
    ssd_sequential,
    ssd_step,
)

transformers.logging.set_verbosity_error()
FORMS = {"s6": (s6, s6_sequential, random_s6), "ssd": (ssd, ssd_sequential, random_ssd)}
both = pytest.mark.parametrize("fast,definition,inputs", FORMS.values(), ids=FORMS)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tolerance):
    a, b = ((v,) if isinstance(v, torch.Tensor) else v for v in (a, b))
    for left, right in zip(a, b, strict=True):
        assert left.shape == right.shape
        assert float((left.detach().double() - right.detach().double()).abs().max()) <= tolerance


@both
@pytest.mark.parametrize("length", [1, 2, 31, 63, 500])
@pytest.mark.parametrize("chunk,segment", [(1, 2048), (7, 50), (32, 64), (128, 2048)])
def test_fast_scan_equals_the_sequential_definition(fast, definition, inputs, length, chunk, segment):
    given = inputs(length)
    expected = definition(*given)
    close(fast(*given, chunk=chunk, segment=segment), expected, 1e-12)
    close(fast(*(v.float() for v in given), chunk=chunk, segment=segment), expected, 1e-4)


@pytest.mark.parametrize("length,chunk", [(1, 16), (63, 16), (200, 7), (200, 500)])
def test_the_papers_four_sums_equal_the_definition(length, chunk):
    given = random_ssd(length)
    close(ssd_minimal(*given, chunk=chunk), ssd_sequential(*given), 1e-12)


@pytest.mark.parametrize("groups,heads", [(1, 1), (1, 4), (4, 4), (2, 6)])
@pytest.mark.parametrize("states", [1, 6, 64])
def test_ssd_with_any_groups_heads_and_states(groups, heads, states):
    given = random_ssd(90, heads, 3, states, groups, batch=1)
    close(ssd(*given), ssd_sequential(*given), 1e-11)
    close(ssd_minimal(*given), ssd_sequential(*given), 1e-11)


def test_states_carried_at_once_equal_the_loop():
    a, written, state = -torch.rand(2, 9, 2, 3).double(), torch.randn(2, 9, 2, 4, 3, 6).double(), torch.randn(2, 2, 4, 3, 6).double()
    looped = scan.carry_states(a.exp()[:, :, :, None, :, None], written, state)
    close(scan.carry_at_once(a, written, state), looped, 1e-12)


@both
def test_long_float32_scan_stays_accurate(fast, definition, inputs):
    given = inputs(3000, batch=1)
    close(fast(*(v.float() for v in given)), definition(*given), 1e-4)


@both
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_all_inputs(fast, definition, inputs, recompute):
    given = [v.requires_grad_() for v in inputs(45)]
    weight = torch.randn_like(given[0])
    expected = torch.autograd.grad((definition(*given)[0] * weight).sum(), given)
    y, _ = fast(*given, chunk=8, segment=20, recompute=recompute)
    close(torch.autograd.grad((y * weight).sum(), given), expected, 1e-11)


@both
def test_gradient_passes_through_the_state(fast, definition, inputs):
    x, delta, A, B, C = inputs(10)
    x.requires_grad_()
    _, state = fast(x, delta, A, B, C)
    y, _ = fast(x.detach(), delta, A, B, C, state)
    assert (torch.autograd.grad(y.sum(), x)[0].abs().amax(0) > 0).all()


@both
@pytest.mark.parametrize("cut", [1, 40, 96])
def test_state_hand_over_between_two_parts(fast, definition, inputs, cut):
    x, delta, A, B, C = inputs(97)
    whole, final = fast(x, delta, A, B, C)
    first, state = fast(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut])
    second, state = fast(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], state)
    close((torch.cat([first, second], 1), state), (whole, final), 1e-12)


@both
def test_results_share_no_memory_with_inputs_or_each_other(fast, definition, inputs):
    given = inputs(70)
    _, state = fast(*given)
    y, after = fast(*given, state)
    places = [v.untyped_storage().data_ptr() for v in (*given, state, y, after)]
    assert len(set(places)) == len(places)
    assert after.untyped_storage().nbytes() == after.numel() * after.element_size()  # nothing of the sequence stays behind


@both
def test_no_output_depends_on_a_later_token(fast, definition, inputs):
    given = list(inputs(60))
    before = fast(*given, chunk=16)[0]
    for i in (0, 1, 3, 4):
        given[i] = given[i].clone()
        given[i][:, 37:] += 1
    after = fast(*given, chunk=16)[0]
    assert torch.equal(before[:, :37], after[:, :37])
    assert not torch.allclose(before[:, 37:], after[:, 37:])


@both
@pytest.mark.parametrize("argument", [0, 1, 3, 4])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_fault_spoils_what_the_definition_says_and_nothing_before(fast, definition, inputs, argument, fault):
    given = [v.clone() for v in inputs(150)]
    clean = fast(*given, chunk=32, segment=64)[0]
    given[argument][0, 75, 0] = fault
    (y, state), (expected, final) = fast(*given, chunk=32, segment=64), definition(*given)
    assert torch.equal(y[:, :75], clean[:, :75]) and torch.equal(y[1], clean[1])
    assert torch.equal(y.isfinite(), expected.isfinite()) and torch.equal(state.isfinite(), final.isfinite())
    good = expected.isfinite()
    close(y[good], expected[good], 1e-11)


@both
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_decay_that_is_not_a_number_spoils_all_that_it_decays(fast, definition, inputs, kind):
    """A model that diverged must not look healthy: NaN in A was once read as no decay."""
    given = [v.clone().to(kind) for v in inputs(70)]
    given[2].view(-1)[1] = math.nan
    (y, state), (expected, final) = fast(*given, chunk=16), definition(*given)
    assert not expected[:, 0].isfinite().all() and expected[:, -1].isfinite().any()
    assert torch.equal(y.isfinite(), expected.isfinite()) and torch.equal(state.isfinite(), final.isfinite())


@both
@pytest.mark.parametrize("extreme", [0.0, 1e-8, 1e4, 1e8])
def test_extreme_steps_stay_finite_and_exact(fast, definition, inputs, extreme):
    given = list(inputs(150))
    given[1] = given[1].clone()
    given[1][:, ::13] = extreme
    expected = definition(*given)[0]
    single = [v.float().requires_grad_() for v in given]
    y = fast(*single)[0]
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.mean(), single))
    scale = float(expected.abs().max())
    close(y.detach() / scale, expected / scale, 1e-5)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding_only(fast, definition, inputs, dtype):
    given = [v.to(dtype) for v in inputs(200)]
    y, state = fast(*given)
    expected = definition(*given)[0]
    assert y.dtype == dtype and state.dtype == torch.float32
    close(y / expected.abs().max(), expected / expected.abs().max(), 2 * torch.finfo(dtype).eps)


@both
def test_autocast_does_not_reach_into_the_scan(fast, definition, inputs):
    given = inputs(100, dtype=torch.float32)
    expected = fast(*given)
    with torch.autocast("cpu", torch.bfloat16):
        for y, e in zip(fast(*given), expected, strict=True):
            assert y.dtype == torch.float32 and torch.equal(y, e)


def test_steps_take_a_float32_state_with_half_precision_tokens():
    for step, (fast, _, inputs) in ((s6_step, FORMS["s6"]), (ssd_step, FORMS["ssd"])):
        x, delta, A, B, C = (v.bfloat16() for v in inputs(20))
        y, _ = fast(x, delta, A, B, C)
        _, state = fast(x[:, :19], delta[:, :19], A, B[:, :19], C[:, :19])
        out, after = step(x[:, 19], delta[:, 19], A, B[:, 19], C[:, 19], state)
        assert out.dtype == torch.bfloat16 and after.dtype == torch.float32
        close(out, y[:, 19], 0.05)


@both
def test_inputs_of_two_types_are_computed_in_the_wider(fast, definition, inputs):
    x, *rest = inputs(40)
    y, state = fast(x.float(), *rest)
    assert y.dtype == torch.float32 and state.dtype == torch.float64
    close(y, definition(x.float(), *rest)[0], 1e-6)


@both
def test_no_sequences_at_all(fast, definition, inputs):
    y, state = fast(*inputs(40, batch=0))
    assert y.shape[:2] == (0, 40) and len(state) == 0


@both
def test_shapes_without_values(fast, definition, inputs):
    given = [v.to("meta") for v in inputs(40)]
    assert fast(*given)[0].shape == given[0].shape


@both
def test_scans_compile_in_one_graph(fast, definition, inputs):
    given = inputs(40)
    close(torch.compile(fast, backend="eager", fullgraph=True)(*given), definition(*given), 1e-12)


def library_model(family, layers=2, width=32, head_width=16, groups=2, chunk_size=16, **more):
    """A small random transformers language model, 'mamba' or 'mamba2', with noise on every parameter."""
    common = dict(vocab_size=64, hidden_size=width, state_size=8, num_hidden_layers=layers, pad_token_id=0, bos_token_id=0,
                  eos_token_id=None, **more)
    if family == "mamba":
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**common))
    else:
        heads = dict(num_heads=2 * width // head_width, head_dim=head_width, n_groups=groups, chunk_size=chunk_size)
        model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**common, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "dt" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("family,options", [
    ("mamba", {}), ("mamba", dict(use_bias=True, use_conv_bias=False, conv_kernel=3)), ("mamba", dict(hidden_act="gelu")),
    ("mamba", dict(expand=3)), ("mamba2", {}), ("mamba2", dict(groups=1)), ("mamba2", dict(time_step_limit=(0.01, 0.05))),
    ("mamba2", dict(use_bias=True, use_conv_bias=False, head_width=8)), ("mamba2", dict(hidden_act="relu"))])
@pytest.mark.parametrize("length", [1, 3, 65])
def test_blocks_equal_transformers(family, options, length):
    model = library_model(family, 1, **options)
    mixer = model.backbone.layers[0].mixer
    block = block_from_transformers(mixer, model.config)
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
def test_whole_model_generates_what_transformers_generates(family):
    theirs = library_model(family)
    ours = model_from_transformers(theirs)
    ids = torch.randint(64, (3, 11))
    with torch.no_grad():
        close(ours(ids)[0], theirs(ids).logits, 1e-4)
    expected = theirs.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(ours.generate(ids, 12), expected)
    assert torch.equal(ours.generate(ids, 0), ids)
    assert torch.equal(ours.generate(ids, 1), expected[:, :12])


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_bfloat16_model_is_as_close_to_float32_as_the_librarys_and_generates(family):
    theirs = library_model(family)
    ids = torch.randint(64, (2, 40))
    with torch.no_grad():
        exact = theirs(ids).logits
        ours = model_from_transformers(theirs).bfloat16()
        half = ours(ids)[0]
        library = copy.deepcopy(theirs).bfloat16()(ids).logits
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() <= 1.2 * (library - exact).norm()
    assert ours.generate(ids, 5).shape == (2, 45)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@torch.no_grad()
def test_a_deep_bfloat16_model_keeps_its_residual_in_float32_where_the_config_says_so(family):
    theirs = library_model(family, layers=24, width=32)
    theirs.backbone.embeddings.weight.mul_(10)
    half, ids = copy.deepcopy(theirs).bfloat16(), torch.randint(64, (2, 40))
    exact = copy.deepcopy(half).float()(ids).logits
    wrong = lambda model: float((model(ids)[0] - exact).norm())
    ours, rounded = model_from_transformers(half), model_from_transformers(half)
    rounded.residual_in_fp32 = False
    assert wrong(ours) <= 1.25 * wrong(half) and wrong(ours) < 0.9 * wrong(rounded)
    half.config.residual_in_fp32 = False
    assert torch.equal(model_from_transformers(half)(ids)[0], rounded(ids)[0])


def test_embeddings_are_tied_where_they_were():
    for tied in (True, False):
        theirs = library_model("mamba", tie_word_embeddings=tied)
        ours, ids = model_from_transformers(theirs), torch.randint(64, (2, 9))
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        ours(ids)[0].square().sum().backward()
        theirs(ids).logits.square().sum().backward()
        close(ours.embeddings.weight.grad / theirs.backbone.embeddings.weight.grad.norm(),
              theirs.backbone.embeddings.weight.grad / theirs.backbone.embeddings.weight.grad.norm(), 1e-4)


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16),
                                  lambda m: m.bfloat16().float(), lambda m: copy.deepcopy(m).bfloat16()])
def test_decays_survive_a_cast_in_full(cast):
    model = MambaLM(10, 16, [MambaBlock(16), Mamba2Block(16, 4, 8)])
    exact = [n for n, _ in model.named_parameters() if n.endswith(("A_log", "dt_bias", "dt_proj.bias"))]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = dict(cast(model).named_parameters())
    assert len(exact) == 4
    for name in exact:
        assert after[name].dtype == torch.float32 and torch.equal(after[name], before[name])
    assert after["layers.0.mixer.in_proj.weight"].dtype in (torch.bfloat16, torch.float16, torch.float32)


def test_a_cast_to_float64_reaches_every_parameter():
    assert {p.dtype for p in Mamba2Block(16, 4, 8).double().parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_blocks_train_in_half_precision(name, kind):
    block = blocks()[name].to(kind)
    y, state = block(torch.randn(2, 30, 16).to(kind))
    y.float().square().sum().backward()
    assert y.dtype == kind and state[1].dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_blocks_run_under_autocast(name):
    block, x = blocks()[name], torch.randn(2, 30, 16)
    expected = block(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = block(x)
    close(y, expected, 0.05)


def blocks():
    return {"mamba": MambaBlock(16), "mamba2": Mamba2Block(16, 4, 8, groups=2, rate=3)}


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_blocks_are_causal_and_train_every_parameter(name):
    block = blocks()[name]
    x = torch.randn(2, 50, 16)
    changed = x.clone()
    changed[:, 30] += 1
    with torch.no_grad():
        close(block(x)[0][:, :30], block(changed)[0][:, :30], 1e-5)
    block(x)[0].square().sum().backward()
    for parameter, value in block.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, parameter


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_a_nan_token_leaves_earlier_outputs_of_a_block(name):
    block, x = blocks()[name], torch.randn(2, 50, 16)
    before = block(x)[0]
    x[0, 30] = math.nan
    after = block(x)[0]
    assert torch.equal(after[:, :30], before[:, :30]) and torch.equal(after[1], before[1]) and after[0, 30:].isnan().all()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@torch.no_grad()
def test_step_equals_forward_with_a_state_of_constant_size(name):
    block, x = blocks()[name], torch.randn(2, 40, 16)
    y, final = block(x)
    size = lambda state: [(v.shape, v.untyped_storage().nbytes()) for v in state]
    state, sizes = None, None
    for t in range(40):
        out, state = block.step(x[:, t], state)
        close(out, y[:, t], 1e-4)
        sizes = sizes or size(state)
    assert size(state) == sizes == size(final)  # nothing of the sequence stays behind
    close(state, final, 1e-4)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "mamba2, Δ limited"])
@torch.no_grad()
def test_padding_leaves_the_state_as_it_is(name):
    block, x, lengths = blocks()[name.split(",")[0]], torch.randn(4, 40, 16), torch.tensor([40, 17, 1, 0])
    if "limited" in name:
        block.delta_limit = (0.01, 0.1)
    y, state = block(x, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        if n:
            alone, after = block(x[row:row + 1, :n])
            close(y[row:row + 1, :n], alone, 1e-5)
            close([v[row:row + 1] for v in state], after, 1e-5)
        else:
            assert all(not v[row].any() for v in state)
    again = block(x[:, :5], state, torch.zeros(4, dtype=torch.long))[1]
    close(again, state, 0)


@torch.no_grad()
def test_attention_step_equals_forward():
    layer, x = AttentionLayer(16, 4), torch.randn(2, 12, 16)
    y, cache = layer(x)[0], torch.zeros(2, 2, 4, 12, 4)
    for t in range(12):
        close(layer.step(x[:, t], cache, t), y[:, t], 1e-5)


@torch.no_grad()
def test_a_model_goes_on_from_its_states():
    model, ids = MambaLM(10, 16, [MambaBlock(16), Mamba2Block(16, 4, 8)]), torch.randint(10, (2, 20))
    whole, _ = model(ids)
    first, states = model(ids[:, :13])
    close(torch.cat([first, model(ids[:, 13:], states)[0]], 1), whole, 1e-4)


@torch.no_grad()
def test_attention_in_a_model_refuses_to_go_on_from_states_that_know_nothing():
    model, ids = MambaLM(10, 16, [Mamba2Block(16, 4, 8), AttentionLayer(16, 4)]), torch.randint(10, (2, 20))
    _, states = model(ids[:, :10])
    _, alone = model.layers[1]["mixer"](torch.randn(2, 5, 16))
    for call, words in ((lambda: model(ids[:, 10:], states), "state="), (lambda: model.layers[1]["mixer"](torch.randn(2, 5, 16), alone), "state="),
                        (lambda: model.step(ids[:, 0]), "mixers='AttentionLayer'"), (lambda: model.generate(ids, 2), "mixers='AttentionLayer'"),
                        (lambda: model(ids, []), r"len\(states\)=0.*2 layers")):
        with pytest.raises(ValueError, match=words):
            call()
    assert model.generate(ids, 1).shape == (2, 21)


@pytest.mark.parametrize("fault", ["A", "delta"])
def test_where_no_value_can_be_read_ssd_makes_nan_of_what_it_would_refuse(fault, monkeypatch):
    x, delta, A, B, C = random_ssd(20)
    right = ssd(x, delta, A, B, C)
    monkeypatch.setattr(scan, "readable", lambda v: False)  # as while it is compiled
    close(ssd(x, delta, A, B, C), right, 1e-12)
    if fault == "A":
        A[1] = 0.1
    else:
        delta[1, 15, 1] = -0.1
    y, state = ssd(x, delta, A, B, C, chunk=10)
    assert y[1, 15:, 1].isnan().all() and state.isnan().any() and y[:, :, 0].isfinite().all() and y[0, :, 1].isnan().any() == (fault == "A")


def test_single_tokens_and_the_four_sums_stay_in_float32_under_autocast():
    given = [v.float() for v in random_ssd(30)]
    (y, state), token = ssd_sequential(*given), [v if v.dim() == 1 else v[:, 0] for v in given]
    one, one6 = ssd_step(*token, torch.zeros_like(state).float()), [v if v.dim() == 2 else v[:, 0].float() for v in random_s6(3, dtype=torch.float32)]
    six = s6_step(*one6, torch.ones(2, 5, 6))
    with torch.autocast("cpu", torch.bfloat16):
        close(ssd_minimal(*given), (y.float(), state.float()), 1e-5)
        close(ssd_step(*token, torch.zeros_like(state).float()), one, 0)
        close(s6_step(*one6, torch.ones(2, 5, 6)), six, 0)


def test_flops_equal_the_formula():
    batch, length, heads, p, n, q = 2, 64, 2, 8, 4, 16
    x, *rest = random_ssd(length, heads, p, n, 1, batch, torch.float32)
    wide = heads * p
    expected = 2 * batch * length * (q * n + q * wide + 2 * n * wide)  # C Bᵀ; times x; into the state; out of it
    assert count_flops(one_pass(Case(lambda *given: ssd(*given, chunk=q), *rest), x)) == expected
    x, *rest = random_s6(length, wide, n, batch, torch.float32)
    assert count_flops(one_pass(Case(s6, *rest), x)) == 2 * batch * length * n * wide


@pytest.mark.parametrize("fast,inputs", [(s6, lambda t: random_s6(t, 32, 8, 1, torch.float32)),
                                         (ssd, lambda t: random_ssd(t, 4, 16, 16, 1, 1, torch.float32))], ids=["s6", "ssd"])
def test_peak_memory_is_linear_in_length(fast, inputs):
    def peak(length):
        given = inputs(length)
        return peak_memory(lambda: fast(*given)[0], CPU, given)[0]

    assert peak(8192) <= 2.2 * peak(4096)


@both
def test_recomputation_needs_less_memory(fast, definition, inputs):
    def peak(recompute):
        given = [v.requires_grad_() for v in inputs(4000, batch=1, dtype=torch.float32)]
        return peak_memory(lambda: torch.autograd.grad(fast(*given, segment=500, recompute=recompute)[0].sum(), given), CPU)[0]

    assert peak(True) < 0.5 * peak(False)



def one(given):
    """The first token of a scan's inputs."""
    x, delta, A, B, C = given
    return x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0]


@pytest.mark.parametrize("call,words", [
    (lambda: s6(torch.ones(2, 3), *random_s6(5)[1:]), "x.shape"),
    (lambda: s6(*(v[:, :0] if v.dim() == 3 else v for v in random_s6(5))), "x.shape"),
    (lambda: s6(*random_s6(5), chunk=0), "chunk"),
    (lambda: s6(*random_s6(5), segment=-1), "segment"),
    (lambda: s6(*random_s6(5)[:1], *random_s6(6)[1:]), "delta.shape"),
    (lambda: s6(*random_s6(5)[:3], *random_s6(5, states=4)[3:]), "B.shape"),
    (lambda: s6(*random_s6(5)[:2], random_s6(5)[2][:3], *random_s6(5)[3:]), r"A.shape=\(3, 5\).*\(6, N\)"),
    (lambda: s6(*random_s6(5)[:2], -torch.ones(6), *random_s6(5)[3:]), r"A.shape=\(6,\)"),
    (lambda: s6(*random_s6(5)[:2], -1.0, *random_s6(5)[3:]), "A='float'.*tensor"),
    (lambda: s6(*random_s6(5)[:2], 0.5 * torch.ones(6, 5), *random_s6(5)[3:]), "A=0.5.*at most 0"),
    (lambda: s6(random_s6(5)[0], -torch.ones(2, 5, 6), *random_s6(5)[2:]), "delta=-1.0.*at least 0"),
    (lambda: s6(*random_s6(5)[:3], torch.ones(2, 5, 5, dtype=torch.long), random_s6(5)[4]), "B=torch.int64"),
    (lambda: ssd(*random_ssd(5), chunk=1.5), "chunk"),
    (lambda: ssd(*random_ssd(5)[:3], *random_ssd(5, groups=3)[3:]), "groups|divisor"),
    (lambda: ssd(*random_ssd(5)[:2], -torch.ones(3), *random_ssd(5)[3:]), r"A.shape=\(3,\).*\(4,\)"),
    (lambda: ssd(*random_ssd(5)[:2], torch.tensor([-1.0, -1, -1, 2]), *random_ssd(5)[3:]), "A=2.0.*at most 0"),
    (lambda: ssd(random_ssd(5)[0], -random_ssd(5)[1], *random_ssd(5)[2:]), "delta=-0.*at least 0"),
    (lambda: Mamba2Block(16, 4, groups=3), "groups"),
    (lambda: Mamba2Block(16, 0), "heads=0"),
    (lambda: Mamba2Block(16, 4, rate=0), "rate=0"),
    (lambda: MambaBlock(16, states=0), "states=0"),
    (lambda: s6(*random_s6(5), torch.zeros(2, 6, 5)), r"state.shape=\(2, 6, 5\).*\(2, 5, 6\)"),
    (lambda: ssd(*random_ssd(5), torch.zeros(2, 4, 6, 5)), r"state.shape.*\(2, 2, 6, 2, 5\)"),
    (lambda: ssd_step(*one(random_ssd(5)), None), r"state=None.*\(2, 2, 6, 2, 5\)"),
    (lambda: ssd_step(*one(random_ssd(5)), 0.0), "state=0.0"),
    (lambda: ssd_step(*one(random_ssd(5)), torch.zeros(1)), r"state=\(\(1,\)"),
    (lambda: ssd_step(*one(random_ssd(5)), torch.zeros(2, 4, 6, 5)), r"state=.*\(2, 2, 6, 2, 5\)"),
    (lambda: ssd_step(*one(random_ssd(5)), torch.zeros(2, 2, 6, 2, 5).long()), "state=.*int64"),
    (lambda: s6_step(*one(random_s6(5)), None), r"state=None.*\(2, 5, 6\)"),
    (lambda: s6_step(*one(random_s6(5)), torch.zeros(2, 6, 5)), r"state=.*\(2, 5, 6\)"),
    (lambda: s6_sequential(*random_s6(5), torch.zeros(1)), r"state=.*\(2, 5, 6\)"),
    (lambda: ssd_sequential(*random_ssd(5), 3), "state='int'"),
    (lambda: ssd_sequential(None, *random_ssd(5)[1:]), "x='NoneType'"),
    (lambda: ssd_sequential(random_ssd(5)[0], *random_ssd(4)[1:]), "delta, B, C="),
    (lambda: ssd_minimal(*random_ssd(5), torch.zeros(2, 2, 6, 2, 5)), "state='given'.*ssd"),
    (lambda: ssd_minimal(*random_ssd(5), chunk=0), "chunk=0"),
    (lambda: Mamba2Block(16, 4, 8).step(torch.ones(3, 16), 3), "state='int'"),
    (lambda: Mamba2Block(16, 4, 8).step(torch.ones(3, 16), (torch.zeros(3, 3, 64), None)), "state=None"),
    (lambda: Mamba2Block(16, 4, 8).step(torch.ones(3, 16), (torch.zeros(3, 4, 64), None)), r"state=.*\(3, 3, 64\)"),
    (lambda: Mamba2Block(16, 4, 8).step(torch.ones(3, 1, 16)), r"x.shape=\(3, 1, 16\)"),
    (lambda: MambaBlock(16)(torch.ones(3, 16)), r"x.shape=\(3, 16\)"),
    (lambda: MambaBlock(16)(torch.ones(3, 4, 16), torch.zeros(2)), "state='Tensor'"),
    (lambda: MambaBlock("a"), "width='a'"),
    (lambda: MambaBlock(16, expand="a"), "expand='a'"),
    (lambda: MambaBlock(16, rank=0), "rank=0"),
    (lambda: MambaBlock(16, chunk=0), "chunk=0"),
    (lambda: Mamba2Block(16, chunk=0), "chunk=0"),
    (lambda: Mamba2Block(16, rate="a"), "rate='a'"),
    (lambda: Mamba2Block(16, delta_limit=3), "delta_limit=3"),
    (lambda: AttentionLayer(0, 1), "width=0"),
    (lambda: AttentionLayer(16, 4).step(torch.ones(3, 16), None, 0), "cache='NoneType'"),
    (lambda: AttentionLayer(16, 4).step(torch.ones(3, 16), torch.zeros(2, 3, 4, 5, 4), 5), "t=5.*0 to 4"),
    (lambda: AttentionLayer(16, 4).step(torch.ones(3, 16), torch.zeros(2, 3, 4, 5, 4), -1), "t=-1"),
    (lambda: MambaLM(0, 16, []), "vocabulary=0"),
    (lambda: MambaLM(9, 16, [3]), "mixers=.'int'."),
    (lambda: MambaLM(9, 16, [], positions=-1), "positions=-1"),
    (lambda: MambaLM(9, 16, [MambaBlock(16)])(torch.ones(1, 3)), "ids=.*float32"),
    (lambda: MambaLM(9, 16, [MambaBlock(16)]).step(torch.zeros(2, 1).long()), r"ids=\(\(2, 1\)"),
    (lambda: AttentionLayer(10, 4), "heads=4"),
    (lambda: AttentionLayer(16, 4)(torch.ones(1, 2, 16), "cache"), "state"),
    (lambda: MambaLM(10, 16, [MambaBlock(16)]).generate(torch.zeros(1, 3, dtype=torch.long), -1), "tokens=-1"),
    (lambda: MambaLM(10, 16, [MambaBlock(16)]).generate(torch.zeros(1, 0, dtype=torch.long), 2), "ids.shape"),
    (lambda: Mamba2Block(16, 4, 8)(torch.ones(3, 20, 16), lengths=[7, 7, 7]), "lengths='list'.*0 to 20"),
    (lambda: Mamba2Block(16, 4, 8)(torch.ones(3, 20, 16), lengths=torch.ones(3)), "lengths=.*float32"),
    (lambda: Mamba2Block(16, 4, 8)(torch.ones(3, 20, 16), lengths=torch.ones(3) > 0), "lengths=.*bool"),
    (lambda: MambaBlock(16)(torch.ones(3, 20, 16), lengths=torch.tensor([7])), r"lengths=\(\(1,\).*\(3,\)"),
    (lambda: MambaBlock(16)(torch.ones(3, 20, 16), lengths=torch.ones(3, 20).long()), r"lengths=\(\(3, 20\)"),
    (lambda: Mamba2Block(16, 4, 8, taps=1)(torch.ones(3, 20, 16), lengths=torch.tensor([25, 7, 20])), r"lengths=\[25, 7, 20\].*0 to 20"),
    (lambda: MambaBlock(16)(torch.ones(1, 20, 16), lengths=torch.tensor([-1])), r"lengths=\[-1\]"),
    (lambda: model_from_transformers(library_model("mamba").backbone), "model='MambaModel'.*MambaForCausalLM"),
    (lambda: block_from_transformers(None, transformers.FalconMambaConfig()), "model_type='falcon_mamba'.*mamba2"),
])
def test_wrong_input_gives_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value) and re.search(words, str(error.value)) and "allowed" in str(error.value)


def test_a_model_with_learned_positions_reads_a_sequence_at_once():
    model, ids = MambaLM(20, 16, [MambaBlock(16)], positions=8), torch.zeros(2, 4, dtype=torch.long)
    _, states = model(ids)
    for call, words in ((lambda: model(ids, states), "states"), (lambda: model.step(ids[:, 0], states), "positions"),
                        (lambda: model(ids.repeat(1, 3)), r"T ≤ 8")):
        with pytest.raises(ValueError, match=words):
            call()


def test_second_derivatives_are_those_of_the_paper_s_four_sums():
    given = [v.requires_grad_() for v in random_ssd(70)]
    directions = [torch.randn_like(v) for v in given]

    def second(scan):
        first = torch.autograd.grad((scan(*given)[0] ** 3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum((g * d).sum() for g, d in zip(first, directions, strict=True)), given)

    for ours, right in zip(second(ssd), second(ssd_minimal), strict=True):
        assert float((ours - right).norm() / right.norm()) < 1e-10
    few = [v.requires_grad_() for v in random_ssd(9, heads=2, head_width=2, states=3, groups=1, batch=1)]
    assert torch.autograd.gradgradcheck(lambda *v: ssd(*v, chunk=4)[0], few)
    by_function = torch.func.grad(lambda A: ssd(*given[:2], A, *given[3:])[0].sum())(given[2].detach())
    assert torch.allclose(by_function, torch.autograd.grad(ssd(*given)[0].sum(), given[2])[0])


def test_single_precision_has_the_gradient_of_a_strong_decay():
    """A token's own term does not decay: left in the derivative of the decays, its rounding would drown the rest."""
    torch.manual_seed(0)
    x, w, B, C = (torch.randn(4, 256, *shape) for shape in ((4, 16), (4, 16), (1, 16), (1, 16)))
    A, delta = -torch.tensor([8.0, 12.0, 16.0, 20.0]), torch.full((4, 256, 4), 1.0)

    def gradient(kind):
        decay = A.to(kind).requires_grad_()
        return torch.autograd.grad((ssd(x.to(kind), delta.to(kind), decay, B.to(kind), C.to(kind))[0] * w).sum(), decay)[0]

    single, double = gradient(torch.float32), gradient(torch.float64)
    assert float(((single - double) / double).abs().max()) < 1e-3


def test_gradients_of_gradients_with_recomputation():
    given = [v[:1].requires_grad_() if v.dim() > 1 else v.requires_grad_() for v in random_ssd(12, heads=2, head_width=2, states=2, groups=1)]
    grads = []
    for again in (False, True):
        (first,) = torch.autograd.grad(ssd(*given, chunk=4, segment=8, recompute=again)[0].square().sum(), given[0], create_graph=True)
        grads.append(torch.autograd.grad(first.square().sum(), given[0])[0])
    torch.testing.assert_close(*grads)
