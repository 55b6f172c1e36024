"""Adaptive token budgets, bucketing, and the fit that finds where the quadratic term takes over."""


import numpy as np
import pytest
import torch

from lab.notebooks import definitions

NOTEBOOK = "vlm/token_scaling.ipynb"


@pytest.fixture(scope="module")
def nb():
    return definitions(NOTEBOOK)


@pytest.fixture(scope="module")
def model(nb):
    torch.manual_seed(0)
    return nb["random_clip"](smoke=True)[0].eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pictures(count=5, side=64, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


# counts


def test_counts_by_attention_follow_how_spread_the_attention_is(nb):
    even, peaked = torch.full((1, 10), 0.1), torch.tensor([[0.91] + [0.01] * 9])
    scores = torch.cat([even, peaked])
    assert nb["counts_by_attention"](scores, 0.85).tolist() == [9, 1]
    assert nb["counts_by_attention"](scores, 0.95).tolist() == [10, 5]
    more = [nb["counts_by_attention"](scores, tau).sum().item() for tau in (0.2, 0.5, 0.8, 0.99)]
    assert more == sorted(more), "a higher threshold never keeps fewer"
    assert torch.equal(nb["counts_by_attention"](scores * 7, 0.85), nb["counts_by_attention"](scores, 0.85))


def test_tokens_with_a_twin_are_not_counted(nb, model):
    tower = nb["make_tower"](model)
    tokens = nb["start_encoder"](tower, pictures(1), 1)
    nb["attention_step"](tokens, tower.blocks[1], tower.heads)
    tokens.k = torch.zeros(1, 3, 65, 64)
    tokens.k[:, :, 1:] = torch.eye(64)  # 64 different patches
    twins = nb["twin_similarity"](tokens)
    assert twins.shape == (1, 64) and nb["counts_by_twins"](twins, 0.5).item() == 64
    tokens.k[:, :, 2] = tokens.k[:, :, 1]  # now the first two are the same
    assert nb["counts_by_twins"](nb["twin_similarity"](tokens), 0.5).item() == 62


@pytest.mark.parametrize("step", [4, 16])
def test_rounded_counts_are_buckets_within_the_image(nb, step):
    counts = torch.arange(0, 70)
    rounded = nb["round_counts"](counts, step, 64)
    assert (rounded >= counts.clamp(max=64)).all() and (rounded - counts.clamp(1, 64) < step).all()
    assert (rounded % step == 0).all() and rounded.min() == step and rounded.max() == 64


@pytest.mark.parametrize("patches", [64, 196, 1024])
def test_one_shot_keeps_exactly_the_count(nb, patches):
    for count in range(1, patches + 1):
        assert nb["kept_count"](nb["one_shot"](count, patches, 3).keep, patches) == count


# bucketing


def test_bucketed_images_are_in_order_and_as_if_alone(nb, model):
    tower, x = nb["make_tower"](model), pictures()
    counts = torch.tensor([32, 8, 64, 32, 8])
    features, macs = nb["encode_adaptive"](model, tower, x, lambda tokens: counts, 3)
    cost = []
    for i, count in enumerate(counts.tolist()):
        reducer = nb["one_shot"](count, 64, 3)
        alone = nb["encode_images"](model, x[i:i + 1], reducer)
        torch.testing.assert_close(features[i:i + 1], alone, rtol=0, atol=1e-5)
        cost.append(nb["encoder_macs"](model, reducer))
    assert macs == pytest.approx(np.mean(cost), rel=1e-6)


def test_the_order_of_images_in_a_batch_does_not_matter(nb, model):
    tower, x = nb["make_tower"](model), pictures()
    def rule(tokens):
        return nb["round_counts"](nb["counts_by_attention"](nb["importance"](tokens), 0.5), 4, 64)

    order = torch.tensor([3, 0, 4, 2, 1])
    straight, _ = nb["encode_adaptive"](model, tower, x, rule, 3)
    mixed, _ = nb["encode_adaptive"](model, tower, x[order], rule, 3)
    torch.testing.assert_close(mixed, straight[order], rtol=0, atol=1e-5)


def test_all_patches_is_the_dense_model(nb, model):
    tower, x = nb["make_tower"](model), pictures(2)
    features, _ = nb["encode_adaptive"](model, tower, x, lambda tokens: torch.full((2,), 64), 3)
    torch.testing.assert_close(features, nb["encode_images"](model, x), rtol=0, atol=1e-5)


# the fit


@pytest.mark.parametrize("terms", [(2.0, 0.01, 2e-5), (0.0, 0.03, 1e-6), (5.0, 0.0, 1e-5)])
def test_known_terms_are_recovered(nb, terms):
    n = np.array([197, 325, 577, 1025, 1601, 2501.0])
    found = nb["fit_terms"](n, terms[0] + terms[1] * n + terms[2] * n**2)
    np.testing.assert_allclose(found, terms, rtol=1e-5, atol=1e-9)


def test_the_crossing_has_an_interval_around_the_truth_and_may_not_exist(nb):
    random, n = np.random.default_rng(0), [197, 401, 785, 1445, 2501]
    rounds = [(2 + 0.02 * m + 2e-5 * m * m) * random.normal(1, 0.02, 15) for m in n]
    star, low, high = nb["crossing"](n, rounds)
    assert low <= star <= high and 500 < low < 1000 < high < 2000
    linear = [[3 + 0.02 * m] * 3 for m in n]
    assert nb["crossing"](n, linear)[0] > 1e6, "no quadratic term, no crossing"
