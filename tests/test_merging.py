"""Merging: ToMe token for token against an independent version, the fast merge against the naive one, our recipe's parts."""

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from test_encoder import build, close

from effarch.clip.towers import make_tower
from effarch.token_reduction.encoder import (
    Tokens,
    attention_step,
    encode_images,
    encoder_macs,
    fit_budget,
    mlp_step,
    strength_at,
    trace_encoder,
)
from effarch.token_reduction.merging import (
    DIFFRATE,
    MERGING_TWELFTHS,
    DiffRateMerging,
    EnergyMerging,
    MergeSimilar,
    ProtectedMerging,
    checkerboard,
    diffrate,
    hump,
    match_alternating,
    merge,
    merge_naive,
    straight,
)


@pytest.fixture(scope="module", params=["CLIP", "SigLIP", "ViT"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def clip():
    return build("CLIP")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def at_half(model, factory, **options):
    """The reducer of a factory at half of the dense multiply-adds, with the factory's own last layer."""
    make = strength_at(partial(factory, **options), factory.kind, 64, None)
    return fit_budget(make, 0.5 * encoder_macs(model), lambda reducer: encoder_macs(model, reducer))


# PiToMe and DiffRate's schedule


def pitome_layer(x, sizes, keys, r, margin):
    """One image's step as PiToMe's paper describes it, with lists: x (N, D), sizes (N,), keys (N, C); CLS first.

    The energy of a patch is the mean of ELU(cosine - margin) over all patches; the 2r of the highest energy alternate
    between A and B; each of A joins its most similar of B, weighted by size. → {group as a set: merged token}."""
    n = len(x)
    cosine = [[float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(n)] for i in range(n)]
    elu = lambda v: v if v > 0 else np.exp(v) - 1
    energy = {i: np.mean([elu(cosine[i][j] - margin) for j in range(1, n)]) for i in range(1, n)}
    ranked = sorted(energy, key=lambda i: -energy[i])
    a, b = ranked[: 2 * r : 2], ranked[1 : 2 * r : 2]
    groups = {j: [j] for j in range(n) if j not in a}
    for i in a:
        groups[max(b, key=lambda j: cosine[i][j])].append(i)
    merged = {frozenset(g): sum(sizes[i] * x[i] for i in g) / sum(sizes[i] for i in g) for g in groups.values()}
    return merged, groups[0] == [0]


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_pitome_is_the_published_method_group_for_group(clip, pixels, keep):
    tower = make_tower(clip)
    torch.manual_seed(2)
    tokens = Tokens(torch.randn(1, 30, 32), pixels[:1], 1, len(tower.blocks), layer=1, sizes=torch.randint(1, 4, (1, 30)).float(),
                    k=torch.randn(1, 4, 30, 8), owner=torch.arange(30)[None])
    x, sizes, keys = tokens.x[0], tokens.sizes[0], tokens.k[0].mean(0)
    r = int(29 * (1 - keep) + 1e-9)
    expected, alone = pitome_layer(x, sizes, keys, r, 0.9 * (1 - 1 / len(tower.blocks)))
    EnergyMerging(keep).after_attention(tokens)
    assert alone and tokens.x.shape[1] == len(expected) == 30 - r
    for place in range(30 - r):
        group = frozenset((tokens.owner[0] == place).nonzero()[:, 0].tolist())
        torch.testing.assert_close(tokens.x[0, place], expected[group], rtol=1e-5, atol=1e-5)
        assert tokens.sizes[0, place] == sizes[list(group)].sum()
    assert tokens.owner[0, 0] == 0


@pytest.mark.parametrize("depth", [1, 3, 12, 24])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_diffrate_has_the_mean_that_is_asked_for_and_falls_as_published(keep, depth):
    left = diffrate(keep, depth)
    assert len(left) == depth and all(a >= b for a, b in zip(left, left[1:], strict=False))
    if depth > 1:
        assert sum(left) / depth == pytest.approx(keep, abs=1e-6)
    if depth == 12:  # a power of the published shares: their logarithms stay in proportion
        logs, published = np.log(left), np.log(np.array(DIFFRATE) / 197)
        np.testing.assert_allclose(logs[1:] / published[1:], logs[1] / published[1], rtol=1e-6)


def test_a_strength_that_is_changed_counts_from_the_next_image_on(model, pixels):
    used = ProtectedMerging(0.8)
    encode_images(model, pixels, used)
    used.keep = 0.4
    close(encode_images(model, pixels, used), encode_images(model, pixels, ProtectedMerging(0.4)))
    assert diffrate(1.0, 12) == (1.0,) * 12, "and at one nothing leaves"


@pytest.mark.parametrize("factory", [EnergyMerging, DiffRateMerging])
def test_the_other_mergers_do_nothing_at_keep_one_and_lose_no_patch(model, pixels, factory):
    close(encode_images(model, pixels, factory(1.0)), encode_images(model, pixels))
    traced = trace_encoder(model, factory(0.7), pixels)
    assert (traced.owner >= 0).all()
    torch.testing.assert_close(traced.sizes.sum(1), torch.full((3,), float(traced.owner.shape[1])))


# ToMe


def tome_layer(x, sizes, keys, r):
    """One image's merging step as the paper describes it, with lists: x (N, D), sizes (N,), keys (N, C); CLS first.

    Alternate the tokens into A and B, draw an edge from every token of A to its most similar one in B, keep the r most
    similar edges, average along them by size. What is left of A comes first, in order, then B."""
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in a[1:]:  # nothing takes the CLS token away
        similarity = [float(torch.nn.functional.cosine_similarity(keys[i], keys[j], dim=0)) for j in b]
        edges.append((max(similarity), i, b[similarity.index(max(similarity))]))
    gone = {i: j for _, i, j in sorted(edges, reverse=True)[:r]}
    left = [i for i in a if i not in gone]
    groups = [[i] for i in left] + [[j, *(i for i in gone if gone[i] == j)] for j in b]
    merged = torch.stack([sum(sizes[i] * x[i] for i in group) / sum(sizes[i] for i in group) for group in groups])
    return merged, torch.stack([sum(sizes[i] for i in group) for group in groups]), groups


@pytest.mark.parametrize("r", [1, 5])
def test_tome_is_the_published_method_token_for_token(clip, pixels, r):
    """Through all layers, each image by itself: same tokens in the same places, same sizes, same owners."""
    tower = make_tower(clip)
    traced = trace_encoder(clip, MergeSimilar(r), pixels)
    for image in range(len(pixels)):
        tokens = Tokens(tower.pre_norm(tower.embed(pixels[image : image + 1])), None, 1, 6)
        members = [[i] for i in range(65)]
        for layer, block in enumerate(tower.blocks):
            attention_step(tokens, block, tower.heads)
            sizes = torch.ones(tokens.x.shape[1]) if tokens.sizes is None else tokens.sizes[0]
            x, sizes, groups = tome_layer(tokens.x[0], sizes, tokens.k[0].mean(0), r)
            members = [sum((members[i] for i in group), []) for group in groups]
            tokens.x, tokens.sizes = x[None], sizes[None]
            mlp_step(tokens, block)
            assert tokens.x.shape[1] == 65 - r * (layer + 1)
        close(traced.x[image], tokens.x[0], 1e-4)
        assert traced.sizes[image].tolist() == tokens.sizes[0].tolist()
        expected = [next(place for place, group in enumerate(members) if patch in group) for patch in range(65)]
        assert traced.owner[image].tolist() == expected


def test_tokens_that_stay_keep_their_order_and_cls_stays_first():
    metric = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0))
    kept, rest, target = match_alternating(metric, 9, 1)
    for image in range(2):
        even = [i for i in kept[image].tolist() if i % 2 == 0]
        assert kept[image].tolist() == sorted(even) + list(range(1, 33, 2)) and even[0] == 0
        assert sorted(kept[image].tolist() + rest[image].tolist()) == list(range(33))
        assert (rest[image] % 2 == 0).all() and (kept[image][target[image]] % 2 == 1).all()


def test_the_most_that_can_merge_and_nothing(clip, pixels):
    for r, left in ((0, [65] * 6), (1e9, [33, 17, 9, 5, 3, 2])):
        counts = trace_encoder(clip, MergeSimilar(r), pixels).counts
        assert [after for _, after in counts] == left
    assert trace_encoder(clip, MergeSimilar(0), pixels).sizes is None


def test_a_fractional_rate_adds_up(clip, pixels):
    counts = [after for _, after in trace_encoder(clip, MergeSimilar(2.5), pixels).counts]
    assert {a - b for a, b in zip([65, *counts], counts, strict=False)} == {2, 3} and counts[-1] == 65 - 6 * 2.5


@pytest.mark.parametrize("r", [float("inf"), float("nan"), True, -1, "8", None])
def test_wrong_rates_are_refused(r):
    with pytest.raises(ValueError, match="r=.* is not allowed; allowed: a finite number of at least 0"):
        MergeSimilar(r)


# merging


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_fast_merging_equals_one_group_at_a_time(keep_norm, sized):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 21, 6, generator=generator)
    sizes = torch.randint(1, 5, (3, 21), generator=generator).float() if sized else None
    tokens = Tokens(x.clone(), None, 1, 6, sizes=sizes)
    matched = match_alternating(x, 8, 1)
    expected, expected_sizes = merge_naive(tokens, *matched, keep_norm)
    merge(tokens, *matched, keep_norm)
    close(tokens.x, expected)
    close(tokens.sizes, expected_sizes)
    assert torch.equal(tokens.x[:, 0], x[:, 0]) and tokens.x.shape[1] == 13


def test_a_merged_token_is_as_long_as_its_parts_were_on_average():
    x = torch.tensor([[[3.0, 0], [0, 1.0], [0, 5.0]]])
    for keep_norm, length in ((False, 10**0.5 / 2), (True, 2.0)):
        tokens = Tokens(x.clone(), None, 0, 6)
        merge(tokens, torch.tensor([[1, 2]]), torch.tensor([[0]]), torch.tensor([[0]]), keep_norm)
        assert tokens.x[0, 0].norm().item() == pytest.approx(length) and tokens.x[0, 1].tolist() == [0, 5]


def test_opposite_tokens_and_no_images_are_survived():
    tokens = Tokens(torch.tensor([[[1.0, 0], [-1.0, 0]]]), None, 0, 6)
    merge(tokens, torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[0]]), True)
    assert tokens.x.isfinite().all()
    empty = Tokens(torch.zeros(0, 9, 4), None, 1, 6)
    merge(empty, *match_alternating(empty.x, 3, 1), True)
    assert empty.x.shape == (0, 6, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matching_in_half_precision_is_that_of_the_same_numbers_in_float32(dtype):
    """Large states whose products overflow float16 and whose similarities bfloat16 could not tell apart."""
    x = (40 * torch.randn(2, 65, 256, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    for found, expected in zip(match_alternating(x, 20), match_alternating(x.float(), 20), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("factory", [MergeSimilar, ProtectedMerging])
def test_merging_loses_no_patch_and_nothing_joins_the_cls_token(model, pixels, factory):
    tokens = trace_encoder(model, at_half(model, factory, **({} if factory is MergeSimilar else dict(cls_only_last=False))), pixels)
    n = 64 + tokens.prefix
    close(tokens.sizes.sum(1), torch.full((3,), float(n)), 1e-3)
    assert (tokens.owner >= 0).all()
    for owner, sizes in zip(tokens.owner, tokens.sizes, strict=True):
        assert torch.equal(owner.bincount(minlength=len(sizes)).float(), sizes.round())
    if tokens.prefix:
        assert (tokens.sizes[:, 0] == 1).all() and (tokens.owner[:, 0] == 0).all() and (tokens.owner[:, 1:] > 0).all()


def test_sizes_of_vit_b_16_add_up_to_197_and_the_budget_is_the_published_one():
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=3, patch_size=16)
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).eval()
    close(trace_encoder(model, MergeSimilar(16), torch.randn(2, 3, 224, 224)).sizes.sum(1), torch.full((2,), 197.0), 1e-3)
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=16))
    assert encoder_macs(model, MergeSimilar(16)) / encoder_macs(model) == pytest.approx(0.50, abs=0.01)


def test_merging_identical_tokens_is_exact_with_the_size_bias(model, pixels):
    tower = make_tower(model)
    p, x = tower.prefix, tower.pre_norm(tower.embed(pixels))
    twice = torch.cat([x[:, :p], x[:, p:].repeat_interleave(2, 1)], 1)  # neighbours: one in A, one in B
    plain, merged = (Tokens(twice.clone(), pixels, p, 6, layer=1, first=twice.shape[1]) for _ in range(2))
    for tokens, reducer in ((plain, None), (merged, MergeSimilar(32)), (plain, None), (merged, None)):
        attention_step(tokens, tower.blocks[2], tower.heads)
        if reducer is not None:
            reducer.after_attention(tokens)
        mlp_step(tokens, tower.blocks[2])
    assert merged.x.shape[1] == twice.shape[1] - 32
    if p:
        close(plain.x[:, :p], merged.x[:, :p], 1e-4)
    close(plain.x[:, p:].sum(1), (merged.x * merged.sizes[..., None])[:, p:].sum(1), 1e-2)


# ours


@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (14, 14), (3, 8), (8, 3), (1, 6)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_checkerboard_puts_neighbours_at_places_of_the_other_parity(grid, prefix):
    rows, columns = grid
    x = torch.arange(prefix + rows * columns, dtype=torch.float32)[None, :, None]
    tokens = Tokens(x.clone(), None, prefix, 12, grid, owner=torch.arange(x.shape[1])[None])
    checkerboard(tokens)
    place = tokens.x[0, :, 0].argsort()[prefix:].view(rows, columns)  # of each patch on the grid
    assert (place[1:] % 2 != place[:-1] % 2).all() and (place[:, 1:] % 2 != place[:, :-1] % 2).all()
    assert sorted(tokens.x[0, :, 0].tolist()) == x[0, :, 0].tolist()
    assert tokens.owner[0].tolist() == tokens.x[0, :, 0].argsort().tolist()  # the trace knows where they went


@pytest.mark.parametrize("grid", [None, (2, 4)])
def test_checkerboard_leaves_what_is_no_whole_grid_alone(grid):
    x = torch.arange(7.0)[None, :, None]
    tokens = Tokens(x.clone(), None, 1, 12, grid)
    checkerboard(tokens)
    assert torch.equal(tokens.x, x)


@pytest.mark.parametrize("depth, layers", [(12, {1, 3, 5, 6, 8}), (24, {2, 6, 10, 12, 16}), (4, {0, 1, 2})])
def test_ours_merges_five_times_over_the_depth(depth, layers):
    assert {depth * twelfth // 12 for twelfth in MERGING_TWELFTHS} == layers
    shape = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=depth, num_attention_heads=3, image_size=64, patch_size=8)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).eval()
    for options, expected in (({}, layers), (dict(every_layer=True), set(range(depth - 1)))):
        counts = trace_encoder(model, ProtectedMerging(0.4, **options)).counts
        assert {layer for layer, (seen, left) in enumerate(counts[:-1]) if left < seen} <= expected
        assert counts[-1][0] < counts[0][0]


def test_hump_and_straight_leave_what_they_say():
    for depth in (4, 12, 24):
        for keep in (0.3, 0.5, 0.7, 0.9, 1.0):
            left = hump(keep, depth)
            assert np.mean(left) == pytest.approx(keep, abs=2e-3) and left[0] > 0.97
            assert all(a >= b - 1e-9 for a, b in zip(left, left[1:], strict=False))
        assert np.mean(straight(0.6, depth)) == pytest.approx(0.6, abs=1e-9)
    assert hump(0.3, 2) == (0.3, 0.3)


def test_what_the_cls_token_reads_merges_last():
    """Two equal pairs, one attended to: with room for one merge, the pair nobody reads goes."""
    class Attended(ProtectedMerging):
        def merges(self, tokens):
            return 1

    x = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 2, 2]), 4).float()[None]
    for read in (1, 3):  # the first of a pair; A holds places 0, 2, 4
        k = torch.zeros(1, 1, 5, 4)
        k[:, :, read : read + 2, 0] = 9.0
        tokens = Tokens(x + 0.01 * torch.eye(5, 4), None, 1, 6, layer=0, first=5, owner=torch.arange(5)[None],
                        q=torch.full((1, 1, 5, 4), 1.0), k=k, v=torch.zeros(1, 1, 5, 4))
        Attended(0.5).after_attention(tokens)
        pairs = tokens.owner[0].tolist()
        assert (pairs[1] == pairs[2]) == (read == 3) and (pairs[3] == pairs[4]) == (read == 1)


@pytest.mark.parametrize("options", [{}, dict(shape=straight), dict(every_layer=True), dict(checkered=False), dict(hidden=False),
                                     dict(protect=False), dict(keep_norm=False), dict(size_bias=1.0), dict(cls_only_last=False)])
def test_every_part_of_ours_can_be_taken_away_at_the_same_budget(pixels, options):
    clip = build("CLIP of 12 layers")
    ours, changed = at_half(clip, ProtectedMerging), at_half(clip, ProtectedMerging, **options)
    close(encode_images(clip, pixels, ProtectedMerging(1.0, **options)), encode_images(clip, pixels))
    assert 0.45 < encoder_macs(clip, changed) / encoder_macs(clip) <= 0.5
    together = encode_images(clip, pixels, changed)
    close(torch.cat([encode_images(clip, image[None], changed) for image in pixels]), together, 1e-4)
    if options:
        assert (together - encode_images(clip, pixels, ours)).abs().max() > 1e-5


def test_without_all_its_parts_ours_is_tome(clip, pixels):
    """At a rate where both schedules round to the same numbers."""
    class Same(ProtectedMerging):
        def merges(self, tokens):
            return 5

    bare = Same(0.5, checkered=False, hidden=False, protect=False, keep_norm=False, size_bias=1.0, cls_only_last=False)
    assert torch.equal(encode_images(clip, pixels, bare), encode_images(clip, pixels, MergeSimilar(5)))


def test_the_cls_only_last_layer_is_exact_and_counted(clip, pixels):
    for factory, strength in ((MergeSimilar, 5), (ProtectedMerging, 0.5)):
        short, full = (factory(strength, cls_only_last=c) for c in (True, False))
        close(encode_images(clip, pixels, short), encode_images(clip, pixels, full))
        assert encoder_macs(clip, short) < encoder_macs(clip, full)


def test_other_dtypes_stay_close(clip, pixels):
    reducer, half = at_half(clip, ProtectedMerging), build("CLIP").to(torch.bfloat16)
    found = encode_images(half, pixels.bfloat16(), reducer)
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float(), encode_images(clip, pixels, reducer)).min() > 0.98


def test_ours_is_compiled_to_the_same_numbers(clip, pixels):
    """The whole graph, without breaks; `eager` skips what a compiler would do with it."""
    reducer = at_half(clip, ProtectedMerging)
    compiled = torch.compile(lambda x: encode_images(clip, x, reducer), backend="eager", dynamic=False, fullgraph=True)
    close(compiled(pixels), encode_images(clip, pixels, reducer), 1e-6)


@pytest.mark.parametrize("keep_norm", [False, True])
def test_gradients_of_a_merge_are_the_naive_ones(keep_norm):
    """Also of groups of three and more, whose row is written several times."""
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    kept, rest = torch.tensor([[0, 1, 4, 5]] * 2), torch.tensor([[2, 3, 6, 7, 8]] * 2)
    target = torch.tensor([[1, 1, 1, 2, 2], [3, 1, 3, 2, 1]])
    weight = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    tokens, results = Tokens(x, None, 1, 6), []
    with torch.enable_grad():
        results.append(merge_naive(tokens, kept, rest, target, keep_norm)[0])
        merge(tokens, kept, rest, target, keep_norm)
        results.append(tokens.x)
        close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in results))


@pytest.mark.parametrize("make", [MergeSimilar, EnergyMerging, ProtectedMerging])
def test_under_autocast_the_same_tokens_are_found_similar(make):
    """Hidden states that all point one way, as those of trained towers do: half precision would call them equal."""
    x = 0.1 * torch.randn(2, 65, 48, generator=torch.Generator().manual_seed(0)) + 1
    owners = []
    for enabled in (False, True):
        q = k = v = x[:, None]
        tokens = Tokens(x, None, 1, 6, layer=1, first=65, q=q, k=k, v=v, owner=torch.arange(65).repeat(2, 1))
        reducer = make(8) if make is MergeSimilar else make(0.5, **(dict(protect=False) if make is ProtectedMerging else {}))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            reducer.after_attention(tokens)
        owners.append(tokens.owner)
    assert tokens.x.shape[1] < 65 and torch.equal(*owners)


def test_the_cls_token_stays_where_it_looks_at_itself_only():
    class Three(ProtectedMerging):
        def merges(self, tokens):
            return 3

    x, k = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 9, 8)
    k[:, :, 0] = 100
    tokens = Tokens(x, None, 1, 12, (2, 4), q=torch.full((1, 1, 9, 8), 2.0), k=k, v=x[:, None], owner=torch.arange(9)[None])
    Three(0.5).after_attention(tokens)
    assert tokens.x.shape[1] == 6 and tokens.owner[0, 0] == 0 and (tokens.owner[0, 1:] > 0).all() and tokens.sizes[0, 0] == 1
