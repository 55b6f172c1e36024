"""Where the quadratic term takes over, and token budgets of each image's own, in buckets."""

import itertools

import numpy as np
import pytest
import torch
import transformers

from effarch.bench import redrawn
from effarch.clip.towers import make_tower
from effarch.token_reduction.encoder import (
    attention_step,
    encode_images,
    encoder_macs,
    importance,
    start_encoder,
)
from effarch.token_reduction.merging import MergeSimilar, ProtectedMerging
from effarch.token_reduction.scaling import (
    counts_by_attention,
    counts_by_twins,
    crossing,
    encode_adaptive,
    first_merge,
    fit_terms,
    ideal_levels,
    level_of,
    twin_similarity,
)

LEVELS = (0.3, 0.5, 0.75, 1.0)
SHAPE = dict(patch_size=8, image_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=12, num_attention_heads=3)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request):
    torch.manual_seed(0)
    if request.param == "clip":
        made = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SHAPE, projection_dim=20))
    else:
        made = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2 if p.ndim > 1 else 1)
    return made.eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pictures(count=5, side=64, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# counts


def test_counts_by_attention_follow_how_spread_the_attention_is():
    even, peaked = torch.full((1, 10), 0.1), torch.tensor([[0.91] + [0.01] * 9])
    scores = torch.cat([even, peaked])
    assert counts_by_attention(scores, 0.85).tolist() == [9, 1]
    assert counts_by_attention(scores, 0.95).tolist() == [10, 5]
    assert counts_by_attention(torch.rand(500, 196), 1.0).max() <= 196, "a sum of all may be rounded to less than one"
    more = [counts_by_attention(scores, tau).sum().item() for tau in (0.2, 0.5, 0.8, 0.99)]
    assert more == sorted(more), "a higher threshold never keeps fewer"
    assert torch.equal(counts_by_attention(scores * 7, 0.85), counts_by_attention(scores, 0.85))


def test_tokens_with_a_twin_are_not_counted(model):
    tokens = start_encoder(make_tower(model), pictures(1))
    macs, p = tokens.macs, tokens.prefix
    tokens.x = torch.zeros(1, 64 + p, 64)
    tokens.x[:, p:] = torch.eye(64)  # 64 different patches
    twins = twin_similarity(tokens)
    assert twins.shape == (1, 64) and counts_by_twins(twins, 0.5).item() == 64
    assert tokens.macs - macs == 64 * 64 * 64, "looking costs something"
    tokens.x[:, p + 1] = 3 * tokens.x[:, p]  # now the first two are the same but for their length
    assert counts_by_twins(twin_similarity(tokens), 0.5).item() == 62


def test_the_level_is_the_least_that_holds_the_count():
    for count in range(0, 70):
        level = level_of(torch.tensor([count]), 64, LEVELS).item()
        enough = [i for i, share in enumerate(LEVELS) if share * 64 >= count - 1e-6]
        assert level == (enough[0] if enough else len(LEVELS) - 1), count


# bucketing


def test_bucketed_images_are_in_order_and_as_if_alone(model):
    x, keeps = pictures(), torch.tensor([0.5, 0.3, 1.0, 0.5, 0.3])
    features, macs = encode_adaptive(model, x, lambda tokens: keeps, first_merge(model))
    for i, keep in enumerate(keeps.tolist()):
        alone = encode_images(model, x[i:i + 1], ProtectedMerging(keep))
        torch.testing.assert_close(features[i:i + 1], alone, rtol=0, atol=2e-5)
    assert macs == pytest.approx(np.mean([encoder_macs(model, ProtectedMerging(keep)) for keep in keeps.tolist()]), rel=1e-3)


def test_a_rule_is_paid_for_and_the_order_of_images_does_not_matter(model):
    x, layer = pictures(), first_merge(model)

    def rule(tokens):
        return torch.tensor(LEVELS)[level_of(counts_by_attention(importance(tokens), 0.5), 64, LEVELS)]

    order = torch.tensor([3, 0, 4, 2, 1])
    straight, macs = encode_adaptive(model, x, rule, layer)
    mixed, _ = encode_adaptive(model, x[order], rule, layer)
    torch.testing.assert_close(mixed, straight[order], rtol=0, atol=2e-5)
    tokens = start_encoder(make_tower(model), x, layer, ProtectedMerging(0.5))
    attention_step(tokens, make_tower(model).blocks[layer], make_tower(model).heads)
    keeps = rule(tokens)
    free = encode_adaptive(model, x, lambda tokens: keeps, layer)[1]
    assert macs > free


def test_all_tokens_is_the_dense_model(model):
    features, macs = encode_adaptive(model, pictures(2), lambda tokens: torch.ones(2), first_merge(model))
    torch.testing.assert_close(features, encode_images(model, pictures(2)), rtol=0, atol=2e-5)
    assert macs == encoder_macs(model, ProtectedMerging(1.0))


def test_the_deciding_layer_is_that_of_the_first_merge(model):
    assert first_merge(model) == 1
    assert first_merge(model, lambda _: MergeSimilar(4)) == 0


# the ideal choice


def test_the_ideal_choice_is_the_best_of_all_for_its_compute():
    """Against all combinations: none with as little compute loses less."""
    random, macs = np.random.default_rng(0), np.array([1.0, 2.0, 3.5])
    for _ in range(10):
        loss = np.sort(random.random((5, 3)), 1)[:, ::-1]
        for limit in (1.0, 1.8, 2.6, 4.0):
            chosen = ideal_levels(loss, macs, limit)
            spent, lost = macs[chosen].mean(), loss[np.arange(5), chosen].sum()
            assert spent <= limit + 1e-9
            for other in itertools.product(range(3), repeat=5):
                if macs[list(other)].mean() <= spent + 1e-9:
                    assert loss[np.arange(5), list(other)].sum() >= lost - 1e-9
        assert (ideal_levels(loss, macs, 4.0) == loss.argmin(1)).all(), "with enough compute everybody gets the best"


def test_an_impossible_limit_is_refused():
    with pytest.raises(ValueError, match="limit=0.5 is not allowed; allowed: at least 1.0"):
        ideal_levels([[1, 0]], [1.0, 2.0], 0.5)


# the fit


@pytest.mark.parametrize("terms", [(2.0, 0.01, 2e-5), (0.0, 0.03, 1e-6), (5.0, 0.0, 1e-5)])
def test_known_terms_are_recovered(terms):
    n = np.array([197, 325, 577, 1025, 1601, 2501.0])
    found = fit_terms(n, terms[0] + terms[1] * n + terms[2] * n**2)
    np.testing.assert_allclose(found, terms, rtol=1e-5, atol=1e-9)
    assert crossing(n, terms[0] + terms[1] * n + terms[2] * n**2) == pytest.approx(terms[1] / terms[2], rel=1e-4, abs=1e-3)


def rounds(random, n, count=15, speed=1.0):
    return [(speed * (2 + 0.02 * m + 2e-5 * m * m) * random.normal(1, 0.02, count)).tolist() for m in n]


def test_the_crossing_has_an_interval_around_the_truth_and_may_not_exist():
    random, n = np.random.default_rng(0), [197, 401, 785, 1445, 2501]
    star, low, high = redrawn(rounds(random, n), lambda ms: crossing(n, ms))
    assert low <= star <= high and 500 < low < 1000 < high < 2000
    linear = redrawn([[3 + 0.02 * m] * 3 for m in n], lambda ms: crossing(n, ms))
    assert linear.value > 1e6, "no quadratic term, no crossing"


def test_redrawing_pools_processes_and_is_not_narrower_than_they_differ():
    """One process twice as slow changes no crossing; two that differ in it widen the interval; nothing gives nothing."""
    random, n = np.random.default_rng(1), [197, 401, 785, 1445, 2501]
    per_process = [rounds(random, n, speed=speed) for speed in (1.0, 2.0)]
    star, low, high = redrawn([list(parts) for parts in zip(*per_process, strict=True)], lambda ms: crossing(n, ms))
    assert low < 1000 < high and 700 < star < 1400
    differ = [[[1.0] * 9, [3.0] * 9]]
    value, low, high = redrawn(differ, lambda ms: ms[0])
    assert value == pytest.approx(3**0.5) and low < 1 and high > 3
    assert np.isnan(redrawn([[1.0, 2.0], []], sum)).all() and np.isnan(redrawn([], sum)).all()
    few, many = ([(1 + 0.1 * np.sin(np.arange(n))).tolist()] for n in (5, 40))
    width = [redrawn(raw, lambda ms: ms[0]) for raw in (few, many)]
    assert width[0].high - width[0].low > 2 * (width[1].high - width[1].low), "few rounds say little"
    assert np.isnan(redrawn([[2.0], [3.0]], sum).low) and redrawn([[2.0], [3.0]], sum).value == 5
