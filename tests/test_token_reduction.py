"""The fair comparison of token reducers: scores, places, the rest, equal budgets, intervals."""

from collections import Counter

import numpy as np
import pytest
import torch

from lab.notebooks import definitions

NOTEBOOK = "vlm/token_reduction.ipynb"


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


def pictures(count=3, side=64, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def attended(nb, model, pixels, layer=2):
    """Tokens after the attention of a layer, as a score sees them."""
    tower = nb["make_tower"](model)
    tokens = nb["start_encoder"](tower, pixels, layer)
    tokens.layer = layer
    nb["attention_step"](tokens, tower.blocks[layer], tower.heads)
    return tokens


# scores


def test_every_score_is_one_finite_number_a_patch_and_no_neighbour_changes_it(nb, model):
    x = pictures()
    together, alone = attended(nb, model, x), attended(nb, model, x[1:2])
    for name, score in nb["SCORES"].items():
        many, one = score(together), score(alone)
        assert many.shape == (3, 64) and many.isfinite().all(), name
        torch.testing.assert_close(many[1:2], one, rtol=1e-3, atol=1e-5, msg=name)


def test_variance_and_saliency_find_the_patch_that_differs(nb, model):
    flat = torch.zeros(1, 3, 64, 64)
    flat[:, :, 24:32, 40:48] = pictures(1, 8)  # patch (3, 5) of the 8 × 8 grid
    tokens = attended(nb, model, flat)
    assert nb["patch_variance"](tokens).argmax().item() == 3 * 8 + 5
    assert nb["patch_variance"](tokens).count_nonzero() == 1
    best = nb["spectral_saliency"](tokens)[0].topk(4).indices.tolist()
    assert 3 * 8 + 5 in best, "saliency is blurred, but peaks there"


def test_saliency_of_a_blank_image_is_finite(nb, model):
    tokens = attended(nb, model, torch.zeros(1, 3, 64, 64))
    assert nb["spectral_saliency"](tokens).isfinite().all()


def test_opposite_signs_are_opposite_orders(nb, model):
    tokens = attended(nb, model, pictures())
    for name, score in nb["SCORES"].items():
        if name.endswith(", lowest"):
            torch.testing.assert_close(score(tokens), -nb["SCORES"][name.removesuffix(", lowest")](tokens))


def test_entropy_is_that_of_the_full_attention_map(nb, model):
    tokens = attended(nb, model, pictures())
    macs = tokens.macs
    attention = torch.softmax(tokens.q @ tokens.k.transpose(-1, -2) / tokens.q.shape[-1] ** 0.5, dim=-1)
    expected = torch.special.entr(attention).sum(-1).mean(1)[:, 1:]
    found = nb["attention_entropy"](tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.max() <= np.log(65) + 1e-5
    assert tokens.macs - macs == 65 * 65 * 48, "the map it needs is paid for"


# places and the rest


@pytest.mark.parametrize("rest", ["drop", "summary", "fuse", "merge"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_counts_are_right_and_nothing_is_lost(nb, model, place, rest):
    tower, score = nb["make_tower"](model), "grid"
    layers = nb["layers_of"](nb["PLACES"][place], 12)
    reducer = nb["ScoredReduction"](0.7, score, layers, rest)
    for _ in range(2):  # the second pass is like the first
        tokens = nb["run_encoder"](tower, pictures(), reducer)
        kept = 64
        for _ in [layer for layer in layers if layer < 11]:  # the last layer computes the CLS row only
            kept = nb["kept_count"](0.7, kept)
        extra = rest in ("summary", "fuse")
        assert tokens.counts[-1][0] == 1 + kept + extra
    if rest != "drop":
        full = nb["ScoredReduction"](0.7, score, layers, rest)
        full.cls_only_last = False
        sizes = nb["run_encoder"](tower, pictures(), full).sizes
        torch.testing.assert_close(sizes.sum(1), torch.full((3,), 65.0))


def test_keeping_all_is_the_dense_model_and_a_bad_request_is_refused(nb, model):
    x, several = pictures(), nb["layers_of"](nb["SEVERAL"], 12)
    dense = nb["encode_images"](model, x)
    for score in nb["SCORES"]:
        kept = nb["encode_images"](model, x, nb["ScoredReduction"](1.0, score, several, "merge"))
        torch.testing.assert_close(kept, dense, rtol=0, atol=1e-5)
    for wrong in (dict(score="beauty"), dict(rest="burn"), dict(keep=0.0), dict(layers=(-1,))):
        with pytest.raises(ValueError, match="is not allowed"):
            nb["ScoredReduction"](**dict(dict(keep=0.5, score="key norm", layers=(3,), rest="drop"), **wrong))


def test_a_summary_counts_once_and_a_fused_token_as_often_as_its_parts(nb, model):
    """Identical patches: fusing them is exact with the sizes, and not without."""
    x, layers = pictures(1).mean((2, 3), keepdim=True).expand(-1, -1, 64, 64).contiguous(), (-1,)
    embed = model.vision_model.embeddings
    weight = embed.position_embedding.weight.clone()
    embed.position_embedding.weight[2:] = embed.position_embedding.weight[1]
    try:
        dense = nb["encode_images"](model, x)
        error = {rest: (nb["encode_images"](model, x, nb["ScoredReduction"](0.5, "grid", layers, rest)) - dense).abs().max()
                 for rest in ("drop", "summary", "fuse", "merge")}
    finally:
        embed.position_embedding.weight.copy_(weight)
    assert max(error["fuse"], error["merge"]) < 1e-5 < min(error["drop"], error["summary"])


def test_picture_scores_go_along_when_tokens_leave(nb, model):
    """Chosen at three layers by a picture score, the survivors are its overall best."""
    tower, x = nb["make_tower"](model), pictures()
    reducer = nb["ScoredReduction"](0.5, "variance", (2, 5, 8), "drop")
    tokens = nb["run_encoder"](tower, x, reducer, trace=True)
    start = nb["run_encoder"](tower, x, nb["ScoredReduction"](1.0, "variance", (2,)), trace=True)
    reducer.cls_only_last = False
    tokens = nb["run_encoder"](tower, x, reducer, trace=True)
    best = nb["patch_variance"](nb["start_encoder"](tower, x, 0)).topk(8).indices
    for i in range(3):
        alive = (tokens.owner[i, 1:] >= 0).nonzero()[:, 0].tolist()
        assert alive == sorted(best[i].tolist())
    assert (start.owner >= 0).all()


# equal compute


def test_fit_budget_is_the_dearest_that_fits(nb):
    best = nb["fit_budget"](lambda position: round(position * 1000), 333, lambda cost: cost)
    assert 332 <= best <= 333
    assert nb["fit_budget"](lambda position: position, 2.0, lambda cost: cost) == 1.0
    with pytest.raises(ValueError, match="budget"):
        nb["fit_budget"](lambda position: position + 1, 0.5, lambda cost: cost)


@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_every_method_and_place_meets_the_budget_narrowly(nb, model, budget):
    """At most the budget; one patch more would be over it."""
    dense, cost = nb["encoder_macs"](model), lambda reducer: nb["encoder_macs"](model, reducer)
    makes = {m: nb["strength_at"](nb["REDUCERS"][m], nb["reducer_kind"](m), 64) for m in ("tome", "ours", "vtp", "evit")}
    for place in nb["PLACES"]:
        options = dict(score="grid", layers=nb["layers_of"](place, 12), rest="merge")
        makes[place] = nb["strength_at"](nb["ScoredReduction"], "keep", 64, **options)
    for name, make in makes.items():
        reducer = nb["fit_budget"](make, budget * dense, cost)
        share = cost(reducer) / dense
        assert budget - 0.06 < share <= budget, (name, share)  # 64 patches: a patch a layer is several percent
        assert reducer.cls_only_last


def test_the_grid_is_fair_and_without_repeats(nb):
    design = nb["grid_design"](draws=5)
    names = Counter((c["score"], c["place"], c["rest"], c["draw"]) for c in design)
    assert max(names.values()) == 1
    random = [c for c in design if c["score"] == "random"]
    assert {c["draw"] for c in random} == set(range(5)) and all(c["draw"] == 0 for c in design if c not in random)
    for rest in ("drop", "merge"):  # every score sees the same place and rest
        here = {c["score"] for c in design if (c["place"], c["rest"]) == (nb["SEVERAL"], rest)}
        assert here == set(nb["SCORES"])
    before = {c["score"] for c in design if c["place"] == nb["BEFORE"]}
    assert before == set(nb["INPUT_SCORES"])
    cls = {(c["place"], c["rest"]) for c in design if c["score"] == "CLS attention"}
    assert len(cls) == 12, "three places × four rests"


def test_a_loop_in_two_parts_is_the_whole_loop(nb, model):
    tower, x = nb["make_tower"](model), pictures()
    for rest in nb["RESTS"]:
        reducer = nb["ScoredReduction"](0.5, "CLS attention", (3, 6, 9), rest)
        start = nb["start_encoder"](tower, x, 3)
        parts = nb["read_out"](model, tower, nb["continue_encoder"](tower, nb["replace"](start), reducer, 3))
        torch.testing.assert_close(parts, nb["encode_images"](model, x, reducer), rtol=0, atol=1e-5)
        again = nb["read_out"](model, tower, nb["continue_encoder"](tower, nb["replace"](start), reducer, 3))
        torch.testing.assert_close(parts, again, rtol=0, atol=0, msg="the shared start must not change")


# intervals


def test_wilson_covers_and_stays_in_range(nb):
    share, low, high = nb["wilson"](90, 100)
    assert share == 0.9 and 0.82 < low < 0.83 and 0.94 < high < 0.95  # textbook values: 0.8256, 0.9448
    assert nb["wilson"](0, 10)[1] == pytest.approx(0, abs=1e-9) and nb["wilson"](10, 10)[2] <= 1 + 1e-9


def test_the_paired_interval_sees_what_two_separate_ones_do_not(nb):
    random = np.random.default_rng(0)
    easy = random.normal(0.8, 0.1, 400)
    worse = easy - 0.005 + random.normal(0, 0.01, 400)
    mean, low, high = nb["bootstrap_mean"](worse - easy)
    assert low < mean < high < 0, "the difference is clear"
    a, b = nb["bootstrap_mean"](easy), nb["bootstrap_mean"](worse)
    assert a[1] < b[2], "although the two intervals overlap"


def test_per_image_results_survive_as_text(nb):
    features = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    text, labels = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1), torch.tensor([0, 1, 2, 0, 1, 2])
    same = nb["judge_images"](features, features, text, labels)
    seen = nb["per_image"]([same])
    np.testing.assert_allclose(seen["cosine"], 1, atol=1e-4)
    assert seen["agreement"].all() and len(seen["accuracy"]) == 6
    right = ((features @ text.T).argmax(-1) == labels).numpy()
    assert (seen["accuracy"] == right).all()
    other = dict(same, agrees="nnnnnn", cosines="")
    row = nb["quality_columns"](nb["per_image"]([same, other]), seen, "self")
    assert row["top1_agreement"] == 0.5 and row["agreement_minus_self"] == -0.5 and row["n_images"] == 6
