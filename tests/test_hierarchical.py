"""effarch.hierarchical: what must hold for a hierarchy of rates, its strongest control, and the embedding of modalities."""

import pytest
import torch
from test_gpu_ready import ends_on_the_gpu
from torch import nn

from effarch.bench import count_flops
from effarch.hierarchical import (
    DilatedLowRank,
    HierarchicalMRSS,
    ModalityEmbedding,
    hierarchical_reference,
    pooled,
)
from effarch.multirate import DilatedTwin, SplitMRSS, causal_pool, flops_of, with_form

torch.set_num_threads(1)
RATES = [((1, 2, 4, 8), (1 / 8, 1 / 8, 1 / 4, 1 / 2)), ((2, 4, 8), (1 / 4, 1 / 4, 1 / 2)), ((8,), (1,)), ((1,), (1,)), ((1, 6), (0.5, 0.5)),
         ((3, 6, 24), (0.2, 0.3, 0.5))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("rate", [1, 2, 5, 8])
@pytest.mark.parametrize("steps", [1, 7, 8, 9, 40])
def test_pooling_in_one_pass_is_the_causal_mean(steps, rate):
    x = torch.randn(2, steps, 3)
    torch.testing.assert_close(pooled(x, rate), causal_pool(x, rate))


@pytest.mark.parametrize("rates, shares", RATES)
@pytest.mark.parametrize("steps", [1, 7, 24, 65])
def test_it_is_its_plain_form_with_gradients(steps, rates, shares):
    model, x = HierarchicalMRSS(20, 15, rates, shares), torch.randn(2, steps, 20, requires_grad=True)
    slope, inputs = torch.linspace(-1, 1, x.numel()).view_as(x), [x, *model.parameters()]
    results = [(y.detach(), *torch.autograd.grad(y, inputs, slope)) for y in (model(x), hierarchical_reference(model, x))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), results[0][0])


@pytest.mark.parametrize("steps", [5, 64, 101])
@pytest.mark.parametrize("rate, share", [(8, 0.75), (4, 0.5), (16, 0.875)])
def test_two_rates_are_split_mrss(rate, share, steps):
    split, same = SplitMRSS(16, 21, rate, share), HierarchicalMRSS(16, 21, (1, rate), (1 - share, share))
    same.load_state_dict(dict(zip(same.state_dict(), split.state_dict().values(), strict=True)))
    x = torch.randn(2, steps, 16)
    torch.testing.assert_close(same(x), split(x))
    assert same.flops(2, steps) == flops_of(split, 2, steps)
    assert same.updates_per_step == split.updates_per_step


@pytest.mark.parametrize("rates, shares", RATES)
def test_flops_are_as_counted(rates, shares):
    model = with_form(HierarchicalMRSS(20, 15, rates, shares), "stock").to("meta")
    for steps in (1, 50, 96):
        assert count_flops(lambda steps=steps: model(torch.empty(2, steps, 20, device="meta"))) == model.flops(2, steps) == flops_of(model, 2, steps)


@pytest.mark.parametrize("shape", [(7, 16), (2, 0, 16), (2, 7, 17)])
def test_layers_name_their_input_where_its_shape_is_wrong(shape):
    for make in MAKERS.values():
        with pytest.raises(ValueError, match=r"x=\(.*\(B, T, 16\) with T ≥ 1"):
            make()(torch.ones(shape))
    with pytest.raises(ValueError, match=r"len\(x\)=1.*2 sequences"):
        ModalityEmbedding((5, 3), 8)((torch.zeros(2, 4, dtype=torch.long),))


MAKERS = {"hierarchy": lambda: HierarchicalMRSS(16, 15), "all slow": lambda: HierarchicalMRSS(16, 15, (8,), (1,)),
          "control": lambda: DilatedLowRank(16, 15, 8, 0.75, 4)}


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_seen_before_it_comes(name):
    model, x = MAKERS[name](), torch.randn(2, 70, 16)
    for t in (1, 8, 9, 63):
        later = torch.cat([x[:, :t], -x[:, t:]], 1)
        torch.testing.assert_close(model(later)[:, :t], model(x)[:, :t])
        assert not torch.allclose(model(later), model(x))


@pytest.mark.parametrize("name", MAKERS)
def test_every_weight_is_trained(name):
    model = MAKERS[name]()
    model(torch.randn(2, 70, 16)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_slower_rates_see_further_back_and_no_rate_costs_all():
    def reach(model):
        x = torch.randn(1, 160, 16, requires_grad=True)
        model(x)[0, -8:].sum().backward()
        return 160 - int(x.grad[0].abs().sum(-1).nonzero()[0])

    one, two, all_slow = (HierarchicalMRSS(16, 8, rates, shares) for rates, shares in (((1,), (1,)), ((1, 8), (0.5, 0.5)), ((8,), (1,))))
    assert reach(one) < reach(two) == reach(all_slow)
    assert all_slow.updates_per_step == 1 / 8 < two.updates_per_step < one.updates_per_step == 1


def test_the_control_is_a_twin_whose_mixing_has_low_rank():
    twin, control = DilatedTwin(16, 9, 4, 0.5), DilatedLowRank(16, 9, 4, 0.5, 16)
    control.high_conv.load_state_dict(twin.high_conv.state_dict())
    control.low_conv.load_state_dict(twin.low_conv.state_dict())
    with torch.no_grad():  # of full rank, and U the identity: the twin itself
        control.down.weight.copy_(torch.cat([twin.high_project.weight, twin.low_project.weight], 1))
        control.up.weight.copy_(torch.eye(16))
    for steps in (3, 41):
        x = torch.randn(2, steps, 16)
        torch.testing.assert_close(control(x), twin(x))
    narrow = DilatedLowRank(16, 9, 4, 0.5, 2)
    counted = count_flops(lambda: with_form(narrow, "stock").to("meta")(torch.empty(3, 37, 16, device="meta")))
    assert counted == flops_of(narrow, 3, 37)


def test_modalities_reach_the_channels_of_their_block_only():
    ids, pixels = torch.randint(9, (2, 12)), torch.randn(2, 12, 3)
    for order in ((0, 1), (1, 0)):
        embed = ModalityEmbedding((9, 3), 8, order)
        y, changed = embed((ids, pixels)), embed((ids, -pixels))
        block = order.index(1)
        assert torch.equal(y.unflatten(2, (2, 4))[:, :, 1 - block], changed.unflatten(2, (2, 4))[:, :, 1 - block])
        assert not torch.allclose(y.unflatten(2, (2, 4))[:, :, block], changed.unflatten(2, (2, 4))[:, :, block])
    mixed = ModalityEmbedding((9, 3), 8)
    assert (mixed((ids, pixels)) != mixed((ids, -pixels))).all() and mixed((ids, pixels)).shape == (2, 12, 8)


def test_symbols_are_rows_and_features_a_linear_map():
    embed = ModalityEmbedding((5, 4), 6)
    nn.init.normal_(embed.bias)
    ids, features = torch.randint(5, (3, 7)), torch.randn(3, 7, 4)
    symbols, linear = embed.tables
    torch.testing.assert_close(embed((ids, features)), symbols[ids] + features @ linear / 2 + embed.bias)


@pytest.mark.parametrize("make, said", [
    (lambda: HierarchicalMRSS(16, 9, (1, 3, 4), (0.2, 0.3, 0.5)), "rates=.*divide the next"),
    (lambda: HierarchicalMRSS(16, 9, (4, 2), (0.5, 0.5)), "rates="),
    (lambda: HierarchicalMRSS(16, 9, (), ()), "rates="),
    (lambda: HierarchicalMRSS(16, 9, (1, 2.0), (0.5, 0.5)), "rates="),
    (lambda: HierarchicalMRSS(16, 9, (1, 2), (0.5, 0.6)), "shares=.*add up to 1"),
    (lambda: HierarchicalMRSS(16, 9, (1, 2), (1,)), "shares="),
    (lambda: HierarchicalMRSS(16, 9, (1, 2), (1.5, -0.5)), "shares="),
    (lambda: HierarchicalMRSS(2, 9, (1, 2, 4), (0.2, 0.3, 0.5)), "dim=2"),
    (lambda: HierarchicalMRSS(0, 9), "dim="), (lambda: HierarchicalMRSS(16, 0), "kernel="),
    (lambda: DilatedLowRank(16, 9, 4, 0.5, 0), "rank="),
    (lambda: ModalityEmbedding((3, 4), 8, (0, 0)), "order="), (lambda: ModalityEmbedding((3, 4), 7, (0, 1)), "dim=7"),
    (lambda: ModalityEmbedding((3, 0), 8), "sizes=0"), (lambda: ModalityEmbedding((3.5, 2), 8), "sizes=3.5"), (lambda: ModalityEmbedding(3, 8), "sizes=3 "),
    (lambda: ModalityEmbedding((), 8), "sizes="), (lambda: ModalityEmbedding((3, 4), 4.5), "dim=4.5"), (lambda: ModalityEmbedding((3, 4), 0), "dim=0"),
    (lambda: ModalityEmbedding((3, 4), 8, 3), "order=3")])
def test_what_cannot_be_built_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("order", [None, (1, 0)])
def test_what_no_modality_is_gets_one_line(order):
    embed, symbols, features = ModalityEmbedding((9, 3), 8, order), torch.randint(9, (2, 12)), torch.randn(2, 12, 3)
    assert torch.equal(embed((symbols.int(), features)), embed([symbols, features]))
    for wrong in (symbols.float(), symbols.double(), symbols.bool(), symbols.to(torch.int8), symbols[0], symbols[:, :5], torch.randn(2, 12, 4), None, 3):
        with pytest.raises(ValueError, match="^x=.* is not allowed; allowed: [93] symbols .B, T. as int32 or int64, or features .B, T, [93].") as error:
            embed((wrong, features))
        assert "\n" not in str(error.value)
    for wrong in (symbols, None):
        with pytest.raises(ValueError, match="^x=.*a tuple of 2 sequences, one a modality"):
            embed(wrong)


def test_it_goes_through_autocast_state_dicts_and_double():
    model = HierarchicalMRSS(16, 9)
    again = HierarchicalMRSS(16, 9)
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 30, 16)
    assert torch.equal(again(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert (half.float() - model(x)).norm() < 0.03 * model(x).norm()
    double = with_form(model, "stock").double()
    torch.testing.assert_close(double(x.double()), hierarchical_reference(double, x.double()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MAKERS)
def test_on_a_gpu_nothing_crosses_the_devices(name):
    ends_on_the_gpu(lambda: (with_form(MAKERS[name](), "stock"), [torch.randn(2, 70, 16)]))


@pytest.mark.parametrize("order", [None, (0, 1), (1, 0)])
def test_on_a_gpu_the_embedding_stays_there(order):
    def build():
        embed = ModalityEmbedding((9, 3), 8, order)
        return lambda *x: embed(x), [torch.randint(9, (2, 12)), torch.randn(2, 12, 3)]

    ends_on_the_gpu(build)
