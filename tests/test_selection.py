"""Reducers that select tokens: scores, places, the rest, the field's methods, budgets; on CLIP, SigLIP and ViT towers."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from effarch.bench import count_flops
from effarch.clip.towers import make_tower
from effarch.token_reduction import token_reduction
from effarch.token_reduction.encoder import (
    InputPruning,
    Reducer,
    attention_step,
    continue_encoder,
    encode_images,
    encoder_macs,
    importance,
    kept_count,
    read_out,
    replace,
    run_encoder,
    select_images,
    split_kept,
    start_encoder,
    trace_encoder,
)
from effarch.token_reduction.selection import (
    BEFORE,
    EVERY,
    INPUT_SCORES,
    PICTURE_SCORES,
    PLACES,
    REDUCERS,
    RESTS,
    SCORES,
    SEVERAL,
    SINGLE,
    Grid,
    Random,
    ScoredReduction,
    fitted,
    join_nearest,
    layers_of,
    part_with,
    patch_variance,
    reducer_for_budget,
    reducer_kind,
    uniform,
)

NAMES = ["vtp", "vtp_mean", "vtp_learned", "random", "grid", "cluster", "evit", "evit_published", "cls_drop", "cls_merge",
         "dynamicvit", "prumerge", "tome", "pitome", "diffrate", "ours"]
SHAPE = dict(patch_size=8, image_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=3)
KINDS = dict(
    clip=lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SHAPE, projection_dim=20)),
    siglip=lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SHAPE)),
    vit=lambda: transformers.ViTModel(transformers.ViTConfig(**SHAPE)))


@torch.no_grad()
def build(kind):
    """A tiny random tower, its weights made large enough that layers matter."""
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    for p in model.parameters():
        p.mul_(2 if p.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def clip():
    return build("clip")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def pictures(count=3, side=64, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def attended(model, pixels, layer=1):
    """Tokens after the attention of a layer, as a score sees them."""
    tower = make_tower(model)
    tokens = start_encoder(tower, pixels, layer)
    tokens.layer = layer
    attention_step(tokens, tower.blocks[layer], tower.heads)
    return tokens


def close(a, b, limit=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=limit)


# scores


def test_every_score_is_one_finite_number_a_patch_and_no_neighbour_changes_it(model):
    x = pictures()
    together, alone = attended(model, x), attended(model, x[1:2])
    for name, score in SCORES.items():
        many, one = score(together), score(alone)
        assert many.shape == (3, 64) and many.isfinite().all(), name
        torch.testing.assert_close(many[1:2], one, rtol=1e-3, atol=1e-5, msg=name)


def test_scores_of_pictures_see_each_patch_where_sides_are_no_multiple_of_it(clip):
    """70 × 66 pixels: 8 × 8 patches of 8, and a rest that is in none."""
    flat = torch.zeros(1, 3, 70, 66)
    flat[:, :, 24:32, 40:48] = pictures(1, 8)
    assert (patch_variance(attended(clip, flat)) > 1e-6).nonzero().tolist() == [[0, 3 * 8 + 5]]


def test_variance_and_saliency_find_the_patch_that_differs(clip):
    flat = torch.zeros(1, 3, 64, 64)
    flat[:, :, 24:32, 40:48] = pictures(1, 8)  # patch (3, 5) of the 8 × 8 grid
    tokens = attended(clip, flat)
    assert patch_variance(tokens).argmax().item() == 3 * 8 + 5
    assert (patch_variance(tokens) > 1e-6).sum() == 1
    best = SCORES["saliency"](tokens)[0].topk(4).indices.tolist()
    assert 3 * 8 + 5 in best, "saliency is blurred, but peaks there"


def test_saliency_of_a_blank_image_is_finite(clip):
    assert SCORES["saliency"](attended(clip, torch.zeros(1, 3, 64, 64))).isfinite().all()


def test_opposite_signs_are_opposite_orders(clip):
    tokens, signed = attended(clip, pictures()), [name for name in SCORES if name.endswith(", lowest")]
    assert len(signed) == 5
    for name in signed:
        close(SCORES[name](tokens), -SCORES[name.removesuffix(", lowest")](tokens))


def test_entropy_is_that_of_the_full_attention_map_and_the_map_is_paid_for(clip):
    tokens = attended(clip, pictures())
    macs = tokens.macs
    attention = torch.softmax(tokens.q @ tokens.k.transpose(-1, -2) / tokens.q.shape[-1] ** 0.5, dim=-1)
    expected = torch.special.entr(attention).sum(-1).mean(1)[:, 1:]
    found = SCORES["attention entropy"](tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.max() <= np.log(65) + 1e-5
    assert tokens.macs - macs == 65 * 65 * 48


def test_half_a_grid_is_a_checkerboard_on_any_grid(clip):
    for shape in ((8, 8), (6, 10)):
        x = torch.randn(2, 3, 8 * shape[0], 8 * shape[1])
        kept = (run_encoder(make_tower(clip), x, Grid(0.5), trace=True).owner[:, 1:] >= 0).view(2, *shape)
        assert (kept[:, 1:] ^ kept[:, :-1]).all() and (kept[:, :, 1:] ^ kept[:, :, :-1]).all()


def test_random_numbers_do_not_hang_on_the_default_type():
    uniform.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        drawn = uniform(5, 3, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        uniform.cache_clear()
    assert torch.equal(drawn, uniform(5, 3, torch.device("cpu")))


def test_random_masks_differ_by_seed_only(clip):
    owners = [trace_encoder(clip, Random(0.5, seed), pictures()).owner for seed in (0, 0, 1)]
    assert torch.equal(owners[0], owners[1]) and not torch.equal(owners[0], owners[2])
    assert (owners[0] == owners[0][:1]).all(), "an image's choice does not depend on its neighbours"


def test_clusters_of_alike_patches_leave_first(clip):
    """Half of the image repeats one patch: if that patch is an anchor, all its copies leave before the others."""
    x = pictures(1)
    x[:, :, :32] = x[:, :, :8, :8].repeat(1, 1, 4, 8)
    for seed in range(20):
        reducer = REDUCERS["cluster"](0.5, seed=seed, anchors=1 / 64)
        anchor = uniform(64, reducer.seed, torch.device("cpu")).argmax().item()
        kept = (trace_encoder(clip, reducer, x).owner[0, 1:] >= 0).tolist()
        if anchor < 32:
            assert not any(kept[:32]) and all(kept[32:])
            return
    raise AssertionError("no seed drew an anchor from the upper half")


# places and the rest


@pytest.mark.parametrize("rest", list(RESTS))
@pytest.mark.parametrize("place", PLACES)
def test_counts_are_right_and_nothing_that_counts_is_lost(model, place, rest):
    tower, score = make_tower(model), "CLS attention" if "evit" in rest else "grid"
    layers, new = layers_of(place, 6), rest in ("fuse", "evit", "evit_published")
    if place == BEFORE and "evit" in rest:
        with pytest.raises(ValueError, match="before the encoder"):
            ScoredReduction(0.7, score, layers, rest)
        return
    reducer = ScoredReduction(0.7, score, layers, rest)
    kept = 64
    for _ in layers:
        kept += (kept_count(0.7, kept) < kept) * (kept_count(0.7, kept) + new - kept)
    for _ in range(2):  # the second pass is like the first
        tokens = run_encoder(tower, pictures(), reducer)
        assert tokens.x.shape[1] == tower.prefix + kept
        if rest in ("fuse", "merge"):
            close(tokens.sizes.sum(1), torch.full((3,), 64.0 + tower.prefix), 1e-3)


@pytest.mark.parametrize("score", list(SCORES))
def test_keeping_all_is_the_dense_model(model, score):
    x = pictures()
    close(encode_images(model, x, ScoredReduction(1.0, score, layers_of(SEVERAL, 6), "merge")), encode_images(model, x))


@pytest.mark.parametrize("wrong", [
    dict(score="beauty"), dict(rest="burn"), dict(keep=0.0), dict(keep=True), dict(layers=(-1,)),
    dict(score="key norm", layers=(-1,)), dict(score="grid", rest="evit")])
def test_a_bad_request_is_refused_in_one_line(wrong):
    with pytest.raises(ValueError, match="is not allowed; allowed: ") as error:
        ScoredReduction(**dict(dict(keep=0.5), **wrong))
    assert "\n" not in str(error.value)


def test_points_of_the_grid_are_the_named_methods(clip):
    x = pictures()
    same = {"vtp": dict(score="token norm", layers=(-1,)), "grid": dict(score="grid", layers=(-1,)),
            "random": dict(score="random", layers=(-1,), seed=0), "cls_merge": dict(rest="merge"), "evit": dict(rest="evit")}
    for name, options in same.items():
        a, b = encode_images(clip, x, REDUCERS[name](0.6)), encode_images(clip, x, ScoredReduction(0.6, **options))
        close(a, b)


def test_identical_patches_may_be_fused_or_merged_but_not_dropped(clip):
    """Exact with the sizes in attention, and not without; EViT's token counts once."""
    clip = build("clip")
    x, layers = pictures(1).mean((2, 3), keepdim=True).expand(-1, -1, 64, 64).contiguous(), layers_of(SINGLE, 6)
    clip.vision_model.embeddings.position_embedding.weight[2:] = clip.vision_model.embeddings.position_embedding.weight[1]
    dense = encode_images(clip, x)
    error = {rest: (encode_images(clip, x, ScoredReduction(0.5, "CLS attention", layers, rest)) - dense).abs().max().item()
             for rest in RESTS}
    assert max(error["fuse"], error["merge"]) < 1e-5 < min(error["drop"], error["evit"], error["evit_published"])


def test_evits_token_is_the_attention_weighted_sum_and_its_mean(clip):
    start = attended(clip, pictures(2))
    scores = importance(start)
    kept, rest = split_kept(start, scores, 20)
    for how in ("evit_published", "evit"):
        tokens = replace(start)
        part_with(tokens, kept, rest, how, scores)
        assert tokens.x.shape[1] == 22 and tokens.sizes is None
        for image in range(2):
            weights = scores[image, rest[image] - 1]
            expected = sum(w * start.x[image, i] for w, i in zip(weights, rest[image], strict=True))
            close(tokens.x[image, -1], expected if how == "evit_published" else expected / weights.sum(), 1e-4)
            assert weights.sum() < 1


def test_a_token_joins_the_most_similar_kept_one_and_never_the_cls_token(clip):
    tokens = attended(clip, pictures(2))
    keys, before = F.normalize(tokens.k.mean(1), dim=-1), tokens.x.clone()
    kept, rest = split_kept(tokens, importance(tokens), 63)  # one leaves
    join_nearest(tokens, kept, rest)
    for image in range(2):
        similarity = keys[image, kept[image, 1:]] @ keys[image, rest[image, 0]]
        place = 1 + similarity.argmax().item()
        mean = (before[image, kept[image, place]] + before[image, rest[image, 0]]) / 2
        close(tokens.x[image, place], mean)
        assert tokens.sizes[image].tolist() == [2.0 if i == place else 1.0 for i in range(64)]


def test_picture_scores_go_along_when_tokens_leave(clip):
    """Chosen at three layers by a picture score, the survivors are its overall best."""
    x, reducer = pictures(), ScoredReduction(0.5, "variance", (1, 2, 4), "drop")
    tokens = run_encoder(make_tower(clip), x, reducer, trace=True)
    best = patch_variance(start_encoder(make_tower(clip), x)).topk(8).indices
    for i in range(3):
        assert (tokens.owner[i, 1:] >= 0).nonzero()[:, 0].tolist() == sorted(best[i].tolist())


def test_a_fused_token_without_a_picture_stays(clip):
    reducer = ScoredReduction(0.5, "variance", (1, 2, 4), "fuse")
    tokens = run_encoder(make_tower(clip), pictures(), reducer)
    close(tokens.sizes.sum(1), torch.full((3,), 65.0), 1e-3)
    assert tokens.sizes[:, -1].min() >= 1 and tokens.x.shape[1] < 65


def test_a_loop_in_two_parts_is_the_whole_loop(clip):
    tower, x = make_tower(clip), pictures()
    for rest in RESTS:
        reducer = ScoredReduction(0.5, rest=rest)
        start = start_encoder(tower, x, 1)
        parts = [read_out(clip, tower, continue_encoder(tower, replace(start), reducer, 1)) for _ in range(2)]
        close(parts[0], encode_images(clip, x, reducer))
        assert torch.equal(*parts), "the shared start must not change"


# the methods


def test_the_methods_by_name():
    assert list(REDUCERS) == NAMES
    assert {name for name in NAMES if reducer_kind(name) == "merge"} == {"tome"}
    with pytest.raises(ValueError, match="allowed: vtp"):
        reducer_kind("tomee")


@pytest.mark.parametrize("name", NAMES)
def test_full_strength_changes_nothing(model, name):
    x = pictures()
    close(encode_images(model, x, REDUCERS[name](1.0 if reducer_kind(name) == "keep" else 0)), encode_images(model, x))


@pytest.mark.parametrize("name", NAMES)
def test_second_call_as_the_first_and_one_image_as_in_a_batch(model, name):
    x, reducer = pictures(), reducer_for_budget(name, 0.6, model)
    first, second = (trace_encoder(model, reducer, x) for _ in range(2))
    assert first.counts == second.counts and torch.equal(first.x, second.x)
    alone = torch.cat([encode_images(model, image[None], reducer) for image in x])
    close(alone, encode_images(model, x, reducer), 1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0.5, 0.7])
def test_budgets_are_honoured_and_counted_right(model, name, budget):
    reducer = reducer_for_budget(name, budget, model)
    macs, dense = encoder_macs(model, reducer), encoder_macs(model)
    assert 0.85 * budget * dense <= macs <= budget * dense
    assert count_flops(lambda: encode_images(model, pictures(1), reducer, implementation="eager")) == 2 * macs


@pytest.mark.parametrize("place", PLACES)
def test_every_place_meets_the_budget(clip, place):
    score = "grid" if place == BEFORE else "CLS attention"
    factory = partial(ScoredReduction, score=score, layers=layers_of(place, 6), rest="merge")
    reducer = fitted(factory, 0.6, clip, cls_only_last=True)
    assert 0.5 < encoder_macs(clip, reducer) / encoder_macs(clip) <= 0.6 and reducer.cls_only_last


def test_the_cls_only_last_layer_is_exact_and_may_be_given_to_all_or_to_none(clip):
    x = pictures()
    for name in NAMES:
        full, short = (REDUCERS[name](0.5 if reducer_kind(name) == "keep" else 6) for _ in range(2))
        full.cls_only_last, short.cls_only_last = False, True
        close(encode_images(clip, x, full), encode_images(clip, x, short))
        assert encoder_macs(clip, short) < encoder_macs(clip, full)
    assert reducer_for_budget("ours", 0.6, clip).cls_only_last and not reducer_for_budget("evit", 0.6, clip).cls_only_last
    for name, only in (("ours", False), ("evit", True)):
        assert reducer_for_budget(name, 0.6, clip, cls_only_last=only).cls_only_last is only


@pytest.mark.parametrize("score", PICTURE_SCORES)
def test_passes_that_take_turns_do_not_share_scores(clip, score):
    """As two threads with one reducer do."""
    tower, reducer, pixels = make_tower(clip), ScoredReduction(0.7, score), torch.randn(3, 3, 64, 64)
    alone = [run_encoder(tower, x, reducer).x for x in (pixels, 2 * pixels.flip(0))]
    turns = [start_encoder(tower, x, 0, reducer) for x in (pixels, 2 * pixels.flip(0))]
    for layer in range(6):
        for tokens in turns:
            continue_encoder(tower, tokens, reducer, layer, until=layer + 1)
    assert all(torch.equal(tokens.x, x) for tokens, x in zip(turns, alone, strict=True))
    start = start_encoder(tower, pixels, 0, reducer)
    part = select_images(continue_encoder(tower, start, reducer, 0, until=4), slice(1, 2))
    assert part.carried is not None and torch.allclose(continue_encoder(tower, part, reducer, 4).x, alone[0][1:2], atol=1e-5)


def test_other_image_sizes_have_budgets_of_their_own(clip):
    reducer = reducer_for_budget("evit", 0.5, clip, image_size=128)
    share = encoder_macs(clip, reducer, 128) / encoder_macs(clip, None, 128)
    assert 0.45 < share <= 0.5
    assert encode_images(clip, pictures(1, 128), reducer).isfinite().all()


def test_unreachable_budgets_and_wrong_ones_are_refused(clip):
    with pytest.raises(ValueError, match="budget=0.05 is not allowed; allowed: at least 0"):
        reducer_for_budget("prumerge", 0.05, clip)
    with pytest.raises(ValueError, match="allowed: vtp"):
        reducer_for_budget("tomee", 0.5, clip)
    for budget in (0, -1, 1.5, "half", True, None, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            reducer_for_budget("vtp", budget, clip)


@pytest.mark.parametrize("name, option, value", [
    ("tome", "optoin", 3), ("tome", "r", 3), ("tome", "keep", 0.5), ("ours", "keep", 0.5), ("random", "seeds", 1), ("cls_merge", "near", 3), ("diffrate", "shape", 1)])
def test_an_option_that_a_method_does_not_have_is_one_line(clip, name, option, value):
    for use in (lambda: reducer_for_budget(name, 0.5, clip, **{option: value}), token_reduction(clip, name, budget=0.5, **{option: value}).__enter__):
        with pytest.raises(ValueError, match=f"{option}={value} is not allowed; allowed: options of '{name}': .*cls_only_last.*image_size"):
            use()


@pytest.mark.parametrize("name, option, value", [
    ("tome", "size_bias", -3), ("ours", "size_bias", float("nan")), ("pitome", "size_bias", "no"), ("tome", "size_bias", None), ("ours", "shape", "x"),
    ("random", "seed", "a"), ("cluster", "seed", -1), ("cluster", "anchors", 0), ("prumerge", "near", 0), ("cls_drop", "layers", "a"), ("cls_drop", "layers", (1.5,)),
    ("cls_drop", "seed", 0.5), ("vtp_learned", "offset", 3), ("tome", "cls_only_last", "no"), ("ours", "patch_tokens", "no"), ("ours", "patch_tokens", 0)])
def test_what_an_option_cannot_be_is_one_line(clip, name, option, value):
    with pytest.raises(ValueError, match=f"^{option}=.* is not allowed; allowed: ") as error:
        token_reduction(clip, name, budget=0.5, **{option: value}).__enter__()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_reducer_says_which_share_it_takes(clip, name):
    for budget in (0.6, 1.0):
        reducer = reducer_for_budget(name, budget, clip)
        assert reducer.macs_share == encoder_macs(clip, reducer) / encoder_macs(clip) <= budget


def test_a_budget_that_a_shallow_tower_jumps_over_is_told_once_and_any_other_is_not():
    shallow = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SHAPE | dict(num_hidden_layers=4))).eval()
    share = reducer_for_budget("ours", 0.6, shallow).macs_share
    assert share < 0.57 and reducer_for_budget("tome", 0.6, shallow).macs_share > 0.58
    for name, budget, words in (("ours", 0.6, f"'ours' takes {share:.3f} of the dense multiply-adds for budget=0.6"), ("tome", 0.6, ""), ("ours", 1.0, ""), ("ours", 0.95, "")):
        with warnings.catch_warnings(record=True) as found, torch.no_grad():
            warnings.simplefilter("always")
            with token_reduction(shallow, name, budget=budget):
                shallow(pictures()), shallow(pictures())
        assert len(found) == bool(words) and all(words in str(one.message) for one in found), (name, budget)


@pytest.mark.parametrize("name, strength, options", [
    ("cls_drop", 0.5, {"rest": "x"}), ("cls_merge", "half", {}), ("grid", 0, {}), ("dynamicvit", 1.01, {}), ("prumerge", None, {}),
    ("cluster", True, {}), ("evit", -0.5, {})])
def test_wrong_strengths_and_options_are_refused_with_what_is_allowed(name, strength, options):
    with pytest.raises(ValueError, match="is not allowed; allowed: "):
        REDUCERS[name](strength, **options)


@pytest.mark.parametrize("name", ["random", "grid", "cluster", "vtp"])
def test_keep_ratio_keeps_what_it_says(clip, name):
    for keep, left in ((0.5, 32), (0.1, 7), (0.001, 1)):
        tokens = trace_encoder(clip, REDUCERS[name](keep), pictures())
        assert (tokens.owner[:, 1:] >= 0).sum(1).tolist() == [left] * 3


def test_the_ratio_schedule_keeps_powers_of_the_ratio(clip):
    counts = trace_encoder(clip, REDUCERS["dynamicvit"](0.7), pictures()).counts
    assert [n - 1 for n, _ in counts] == [64, int(64 * 0.7), int(64 * 0.7), *[int(64 * 0.7**2)], *[int(64 * 0.7**3)] * 2]


def test_prumerge_keeps_half_by_attention_and_spreads_the_rest(clip):
    x, seen = pictures(), {}

    class Spy(Reducer):
        def after_attention(self, tokens):
            seen[tokens.layer] = importance(tokens)

    encode_images(clip, x, Spy())
    owner = trace_encoder(clip, REDUCERS["prumerge"](0.5), x).owner[:, 1:]
    for i in range(3):
        kept = set((owner[i] >= 0).nonzero()[:, 0].tolist())
        best = set(seen[1][i].topk(16).indices.tolist())
        assert len(kept) == 32 and best <= kept
        others = sorted(set(range(64)) - best)
        assert kept - best == {others[round(j)] for j in np.linspace(0, 47, 16)}


def test_every_method_runs_in_half_precision(clip):
    model, x = build("clip").to(torch.bfloat16), pictures().to(torch.bfloat16)
    for name in NAMES:
        reducer = REDUCERS[name](0.5 if reducer_kind(name) == "keep" else 6)
        out = encode_images(model, x, reducer)
        assert out.dtype == torch.bfloat16 and out.isfinite().all(), name


def test_names_of_scores_places_and_rests_belong_together():
    assert set(PICTURE_SCORES) < set(INPUT_SCORES) < set(SCORES)
    assert layers_of(BEFORE, 12) == (-1,) and layers_of(SINGLE, 12) == (3,) and layers_of(SEVERAL, 12) == (3, 6, 9)
    assert layers_of(EVERY, 12) == tuple(range(12))
    assert issubclass(Grid, InputPruning) and set(RESTS) == {"drop", "fuse", "evit", "evit_published", "merge"}


def test_evits_token_is_the_plain_mean_where_all_that_leave_have_no_attention(clip):
    start, scores = attended(clip, pictures(2)), torch.zeros(2, 64)
    scores[:, 0] = 1
    kept, rest = split_kept(start, scores, 20)
    tokens = replace(start)
    part_with(tokens, kept, rest, "evit", scores)
    close(tokens.x[:, -1], torch.stack([x[i].mean(0) for x, i in zip(start.x, rest, strict=True)]), 1e-4)


def test_the_nearest_in_half_precision_is_that_of_the_same_numbers_in_float32(clip):
    start = attended(clip, pictures(2))
    keys = (40 * torch.randn(2, 1, 65, 256, generator=torch.Generator().manual_seed(0)) + 100).bfloat16()
    kept, rest = split_kept(start, torch.randn(2, 64, generator=torch.Generator().manual_seed(1)), 20)
    owners = []
    for k in (keys, keys.float()):
        tokens = replace(start, k=k, owner=torch.arange(65).repeat(2, 1))
        join_nearest(tokens, kept, rest)
        owners.append(tokens.owner)
    assert torch.equal(*owners)


@pytest.mark.parametrize("depth, left", [(1, [64]), (2, [64, 16]), (3, [64, 16, 8]), (4, [64, 32, 16, 8])])
def test_a_schedule_fits_few_layers(depth, left):
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**dict(SHAPE, num_hidden_layers=depth))).eval()
    counts = [n - 1 for n, _ in trace_encoder(model, REDUCERS["dynamicvit"](0.5), pictures()).counts]
    assert counts == left


@pytest.mark.parametrize("name", NAMES)
def test_no_images_are_no_features(clip, name):
    reducer = REDUCERS[name](0.5 if reducer_kind(name) == "keep" else 6)
    assert encode_images(clip, pictures()[:0], reducer).shape[0] == 0
