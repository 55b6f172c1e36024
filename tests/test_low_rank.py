"""Low rank: factors, heads and MLPs made thinner, adapters, scores and repairs, on tiny random towers."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from test_encoder import build, close, library_feature
from torch import nn

from effarch.bench import count_flops
from effarch.clip.images import Images
from effarch.clip.towers import make_tower
from effarch.low_rank import (
    ADAPTERS,
    CRITERIA,
    METRICS,
    PLACES,
    REPAIRS,
    LowRankLinear,
    MatchByAttention,
    Moment,
    adapter_targets,
    add_adapter,
    all_weights,
    by_head,
    collect_moments,
    compensate,
    copy_of,
    distil,
    factor,
    factor_rank,
    floored,
    fold_query_key,
    fold_value_output,
    joint_factors,
    layer_numbers,
    layers_of,
    linear,
    low_rank_layers,
    matrix_numbers,
    output_directions,
    pooled_features,
    query_key_form,
    residual_repair,
    root,
    slim_attention,
    slim_mlp,
)
from effarch.token_reduction import REDUCERS, reducer_for_budget, token_reduction
from effarch.token_reduction.encoder import encode_images, encoder_macs

HEADS, HEAD, WIDTH, HIDDEN = 3, 16, 48, 96


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["CLIP", "SigLIP"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def clip():
    return build("CLIP")


def pictures(count=12, seed=1):
    """Images that differ in their size and colour, too, or all features would be alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 64, 64, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator) * 2


@pytest.fixture(scope="module")
def moments(model):
    with torch.no_grad():
        return collect_moments(model, [pictures()])


@pytest.fixture(scope="module")
def clip_moments(clip):
    with torch.no_grad():
        return collect_moments(clip, [pictures()])


def correlated(rows, n, seed=0):
    """(rows, n) float64 inputs whose numbers depend on one another, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.05, n, dtype=torch.float64)
    return torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix + torch.randn(n, generator=generator, dtype=torch.float64)


def moment_of(x):
    made = Moment()
    made.add(x)
    return made


def dense_of(pair):
    return pair[1].weight @ pair[0].weight


# factors


@pytest.mark.parametrize("rows, columns", [(48, 48), (96, 48), (48, 96), (5, 200)])
def test_the_rank_of_a_share_is_the_largest_that_fits(rows, columns):
    for share in (0.1, 0.5, 1.0):
        r = factor_rank(share, rows, columns)
        assert r * (rows + columns) <= share * rows * columns or r == 1
        assert (r + 1) * (rows + columns) > share * rows * columns
    if rows == columns:
        assert factor_rank(1.0, rows, columns) == rows // 2, "a square matrix saves below half of its width only"


@pytest.mark.parametrize("m, n", [(20, 20), (30, 20), (20, 30)])
def test_full_rank_is_exact_and_the_numbers_are_counted(m, n):
    layer, x = nn.Linear(n, m), correlated(200, n)
    for metric in METRICS:
        pair = factor(layer, moment_of(x), min(m, n), metric)
        close(pair(x.float()), layer(x.float()), 1e-3)
        low = factor(layer, moment_of(x), 4, metric)
        assert sum(p.numel() for p in low.parameters()) == 4 * (m + n) + m and matrix_numbers(low) == 4 * (m + n)
        assert (low.in_features, low.out_features) == (n, m) and low(x.float()).shape == (200, m)
        assert torch.linalg.matrix_rank(dense_of(low)) == 4 and torch.equal(low[1].bias, layer.bias)


@pytest.mark.parametrize("m, n", [(20, 20), (30, 20), (20, 30)])
def test_whitened_is_the_best_for_the_outputs_and_svd_for_the_weights(m, n):
    layer, x = nn.Linear(n, m, bias=False).double(), correlated(300, n)
    moment, weight = moment_of(x), layer.weight
    for rank in (1, 5, 12):
        pairs = {metric: dense_of(factor(layer, moment, rank, metric)) for metric in METRICS}
        outputs = {metric: ((weight - w) @ moment.second @ (weight - w).T).trace() for metric, w in pairs.items()}
        assert outputs["whitened"] < min(outputs["SVD"], outputs["diagonally scaled"])
        # what is lost is what the discarded directions hold, and no less is possible
        energy = torch.linalg.eigvalsh(weight @ moment.second @ weight.T).flip(0)
        assert outputs["whitened"] == pytest.approx(energy[rank:].sum().item(), rel=1e-6)
        assert (weight - pairs["SVD"]).square().sum() == pytest.approx(torch.linalg.svdvals(weight)[rank:].square().sum().item(), rel=1e-6)
        measured = (x @ (weight - pairs["whitened"]).T).square().sum(1).mean()
        assert measured.item() == pytest.approx(outputs["whitened"].item(), rel=1e-6), "the moments are those of the inputs"


def test_whitening_needs_no_inverse():
    """Inputs in a padded model never leave a subspace: there the pair is exact from its dimension on."""
    layer, x = nn.Linear(20, 20).double(), correlated(100, 20)
    x[:, 15:] = 0
    x[:, 14] = x[:, 0]
    pair = factor(layer, moment_of(x), 14)
    assert all(p.isfinite().all() for p in pair.parameters())
    close(pair(x), layer(x), 1e-8)


def test_directions_are_orthonormal_also_for_batches_of_matrices():
    weight = torch.randn(3, 30, 8, dtype=torch.float64)
    second = torch.stack([moment_of(correlated(50, 8, seed)).second for seed in range(3)])
    u = output_directions(weight, second, 5)
    close(u.mT @ u, torch.eye(5, dtype=torch.float64).expand(3, 5, 5), 1e-8)
    close(u[1] @ u[1].T, (alone := output_directions(weight[1], second[1], 5)) @ alone.T, 1e-8)


def test_roots():
    matrix = torch.stack([moment_of(correlated(50, 6, seed)).second for seed in range(2)])
    close(root(matrix) @ root(matrix), matrix, 1e-8)
    floor = floored(torch.zeros(4, 4, dtype=torch.float64), 0.1)
    assert torch.linalg.matrix_rank(floor) == 4 and floored(torch.eye(3), 0.5).diagonal().tolist() == [1.5] * 3


# moments


def test_moments_are_those_of_the_inputs(model):
    batches, seen = [pictures(4, 2), pictures(3, 3)], []
    layer = layers_of(model)[2]
    hook = layer.mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    found = collect_moments(model, batches)[2]["fc2"]
    hook.remove()
    x = torch.cat(seen)
    assert found.count == len(x) == 7 * (64 + make_tower(model).prefix)
    close(found.mean, x.mean(0), 1e-5)
    close(found.second, x.T @ x / len(x), 1e-4)
    close(found.covariance, torch.cov(x.T, correction=0), 1e-4)


def test_hooks_go_even_after_a_fault(clip):
    with pytest.raises(ValueError, match="pixel_values"):
        collect_moments(clip, [torch.randn(2, 5, 64, 64)])
    assert not any(part._forward_pre_hooks for part in clip.modules())


def test_a_copy_shares_the_text_and_nothing_of_the_vision(clip):
    new = copy_of(clip)
    own = {id(p) for p in clip.parameters()}
    shared = {name for name, p in new.named_parameters() if id(p) in own}
    assert shared and all(name.startswith("text") for name in shared)
    assert {name for name, _ in clip.named_parameters() if name.startswith("text")} == shared


# heads


def test_all_of_it_is_the_model_itself(model, moments):
    x = pictures(3, 5)
    dense = encode_images(model, x)
    close(encode_images(slim_attention(model, moments, HEAD, HEAD), x), dense, 1e-4)
    close(encode_images(slim_mlp(model, moments, 1.0), x), dense, 1e-4)
    close(encode_images(slim_attention(model, moments), x), dense, 1e-6)


def test_transformers_own_call_and_token_reduction_work_on_slim_models(model, moments):
    slim = slim_mlp(slim_attention(model, moments, HEAD // 2, HEAD // 4), moments, 0.5)
    pair, x = low_rank_layers(slim, collect_moments(slim, [pictures()]), 0.5, places=("mlp.fc1", "self_attn.q_proj")), pictures(3, 5)
    for changed in (slim, pair):
        close(encode_images(changed, x), library_feature(changed, x))
    reducer = reducer_for_budget("ours", 0.6, model)
    with token_reduction(slim, reducer):
        close(library_feature(slim, x), encode_images(slim, x, reducer))
    close(encode_images(model, x), library_feature(model, x))  # and the original is what it was


def test_queries_and_keys_are_the_truncated_form(clip, clip_moments):
    """Head by head against the form spelled out over the inputs with a one for the bias: [x, 1] M xᵀ."""
    layer, moment, rank, x = layers_of(clip)[1].self_attn, clip_moments[1]["attention"], 5, correlated(7, WIDTH)
    (wq, bq), (wk, bk) = by_head(layer.q_proj, HEADS), by_head(layer.k_proj, HEADS)
    q, k = (made.double()(x).unflatten(1, (HEADS, rank)) for made in fold_query_key(layer.q_proj, layer.k_proj, HEADS, moment, rank))
    floor = 1e-6
    for h in range(HEADS):
        rows = torch.cat([wq[h], bq[h][:, None]], 1)  # (d, D + 1)
        second = torch.cat([torch.cat([moment.second, moment.mean[:, None]], 1), torch.cat([moment.mean, torch.ones(1).double()])[None]])
        left, right = root(floored(rows @ second @ rows.T, floor)), root(floored(wk[h] @ moment.covariance @ wk[h].T, floor))
        u, s, v = torch.linalg.svd(left @ right)
        form = torch.linalg.inv(left) @ u[:, :rank] @ s[:rank].diag() @ v[:rank] @ torch.linalg.inv(right)
        expected = (x @ wq[h].T + bq[h]) @ form @ (x @ wk[h].T + bk[h]).T / HEAD**0.5
        close(q[:, h] @ k[:, h].T / rank**0.5, expected, 1e-5 * expected.abs().max())


def test_the_form_that_is_kept_is_the_best_on_its_own_images(clip, clip_moments):
    """Mean squared error of q kᵀ over all pairs of tokens, against keeping any other directions of the head."""
    layer, moment, rank = layers_of(clip)[0].self_attn, clip_moments[0]["attention"], 6
    (wq, bq), (wk, _) = by_head(layer.q_proj, HEADS), by_head(layer.k_proj, HEADS)
    root_q, root_k, u, s, v = query_key_form(layer.q_proj, layer.k_proj, HEADS, moment, floor=1e-9)
    kept = s[:, rank:].square().sum()
    shift = torch.einsum("hdn,n,he->hde", wq, moment.mean, bq)
    queries = wq @ moment.second @ wq.mT + shift + shift.mT + bq[..., None] * bq[:, None]
    keys = wk @ moment.covariance @ wk.mT
    assert kept < s.square().sum() * 0.9
    for seed in range(5):
        other = torch.linalg.qr(torch.randn(HEADS, HEAD, rank, generator=torch.Generator().manual_seed(seed)).double()).Q
        lost = torch.eye(HEAD).double() - other @ other.mT
        assert (queries @ lost @ keys @ lost.mT).diagonal(dim1=1, dim2=2).sum() > kept * 1.01


def test_what_all_keys_share_changes_nothing(clip, clip_moments):
    x, shifted = pictures(2, 5), copy.deepcopy(clip)
    layer = layers_of(shifted)[0].self_attn
    layer.k_proj.bias.add_(torch.linspace(-3, 3, WIDTH))
    close(encode_images(shifted, x), encode_images(clip, x), 1e-4)
    close(encode_images(slim_attention(shifted, collect_moments(shifted, [pictures()]), qk=5), x),
          encode_images(slim_attention(clip, clip_moments, qk=5), x), 1e-3)


def test_dead_dimensions_of_padded_heads_cost_nothing(clip):
    """Heads of 65 that are 64 padded by a zero: one rank less is exact."""
    padded, x = copy.deepcopy(clip), pictures(2, 5)
    for layer in layers_of(padded):
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight.view(HEADS, HEAD, WIDTH)[:, -1] = 0
            part.bias.view(HEADS, HEAD)[:, -1] = 0
    found = collect_moments(padded, [pictures()])
    close(encode_images(slim_attention(padded, found, HEAD - 1, HEAD - 1), x), encode_images(padded, x), 1e-3)


def test_more_rank_loses_less(clip, clip_moments):
    x = pictures(6, 5)
    dense = encode_images(clip, x)
    for option in ("qk", "vo"):
        cosine = [(encode_images(slim_attention(clip, clip_moments, **{option: rank}), x) * dense).sum(-1).mean() for rank in (2, 8, 15)]
        assert cosine[0] < cosine[1] < cosine[2], option
    some = slim_attention(clip, clip_moments, qk=[HEAD] * 5 + [2])
    assert [layer.self_attn.q_proj.out_features for layer in layers_of(some)] == [HEADS * HEAD] * 5 + [HEADS * 2]


# compensation


def test_compensation_is_the_regression_on_what_is_left():
    old, x, kept = nn.Linear(12, 7).double(), correlated(400, 12), torch.tensor([0, 3, 4, 9])
    moment, z = moment_of(x), x[:, kept]
    weight, bias = compensate(old, old.weight[:, kept], lambda rows: rows[kept], moment, floor=1e-12)
    design = torch.cat([z, torch.ones(len(z), 1).double()], 1)
    expected = torch.linalg.lstsq(design, old(x)).solution.T
    close(weight, expected[:, :-1], 1e-6)
    close(bias, expected[:, -1], 1e-6)
    residual = old(x) - (z @ weight.T + bias)
    close(residual.T @ (z - z.mean(0)) / len(z), torch.zeros(7, 4).double(), 1e-6)  # nothing that is left could tell more
    plain, shift = compensate(old, old.weight[:, kept], lambda rows: rows[kept], moment, weights=False)
    assert torch.equal(plain, old.weight[:, kept])
    close((z @ plain.T + shift).mean(0), old(x).mean(0), 1e-8)


def test_values_are_folded_without_loss_where_the_output_reads_less():
    """Output matrices of rank r in every head need r values a head."""
    v, out = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
    out.weight.copy_(torch.cat([torch.randn(WIDTH, 5) @ torch.randn(5, HEAD) / 10 for _ in range(HEADS)], 1))
    x = correlated(300, WIDTH).float()
    moment = moment_of(v(x))
    values, output = fold_value_output(v, out, HEADS, moment, 5)
    assert values.out_features == HEADS * 5 and output.in_features == HEADS * 5
    close(output(values(x)), out(v(x)), 1e-3)
    values, output = fold_value_output(v, out, HEADS, moment, 3)
    close(output(values(x)).mean(0), out(v(x)).mean(0), 1e-3)  # the mean stays whatever goes


@pytest.mark.parametrize("criterion", CRITERIA)
def test_least_squares_loses_less_than_the_mean_and_the_mean_less_than_nothing(criterion):
    """In one layer, on its own images; whichever channels went, and these are the same for all three."""
    one = build("CLIP")
    found, x = collect_moments(one, [pictures()]), pictures()
    layer = 3
    wanted, losses, kept = [], {}, set()
    layers_of(one)[layer].mlp.register_forward_hook(lambda _, inputs, output: wanted.append((inputs[0], output)))
    encode_images(one, x)
    for repair in REPAIRS:
        slim = layers_of(slim_mlp(one, found, 0.5, criterion, repair))[layer].mlp
        slim._forward_hooks.clear()
        losses[repair] = (slim(wanted[0][0]) - wanted[0][1]).square().mean().item()
        kept.add(tuple(slim.fc1.weight[:, 0].tolist()))
    assert losses["least squares"] < losses["mean"] < losses["nothing"], losses
    assert len(kept) == 1


def test_a_channel_that_another_doubles_is_not_missed(clip):
    double, x = copy.deepcopy(clip), pictures(3, 5)
    for layer in layers_of(double):
        half = HIDDEN // 2
        layer.mlp.fc1.weight[half:], layer.mlp.fc1.bias[half:] = layer.mlp.fc1.weight[:half].clone(), layer.mlp.fc1.bias[:half].clone()
        layer.mlp.fc2.weight[:, half:] *= 0.5  # so that the criterion drops the second of each pair
    slim = slim_mlp(double, collect_moments(double, [pictures(24)]), 0.5, "Wanda")
    dense = encode_images(double, x)
    plain = slim_mlp(double, collect_moments(double, [pictures(24)]), 0.5, "Wanda", "nothing")
    lost = [(encode_images(changed, x) - dense).abs().max().item() for changed in (slim, plain)]
    assert lost[0] < 0.2 * lost[1], lost


def test_the_order_of_channels_does_not_matter(clip, clip_moments):
    mixed, order = copy.deepcopy(clip), torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(1))
    for layer in layers_of(mixed):
        layer.mlp.fc1.weight.copy_(layer.mlp.fc1.weight[order])
        layer.mlp.fc1.bias.copy_(layer.mlp.fc1.bias[order])
        layer.mlp.fc2.weight.copy_(layer.mlp.fc2.weight[:, order])
    found, x = collect_moments(mixed, [pictures()]), pictures(2, 5)
    for criterion in ("magnitude", "Wanda", "FLAP", "surgeon"):
        close(encode_images(slim_mlp(mixed, found, 0.5, criterion), x), encode_images(slim_mlp(clip, clip_moments, 0.5, criterion), x), 1e-3)


# sizes


@pytest.mark.parametrize("name", REDUCERS)
def test_a_budget_holds_for_towers_that_are_slim_or_low_rank(model, moments, name):
    for changed in (slim_attention(model, moments, 4, 4), low_rank_layers(model, moments, 0.25)):
        reducer = reducer_for_budget(name, 0.6, changed)
        flops = lambda r=None, net=changed: count_flops(lambda: encode_images(net, pictures(1, 5), r, implementation="eager"))
        assert encoder_macs(changed, reducer) <= 0.6 * encoder_macs(changed) == 0.3 * flops()
        assert flops(reducer) <= 0.61 * flops()


def test_formula_added_up_and_counted_agree_on_changed_towers(model, moments):
    x = pictures(1, 5)
    slim = slim_mlp(slim_attention(model, moments, 6, 10), moments, 0.5)
    tokens, depth = 64 + make_tower(model).prefix, len(moments)
    fewer = depth * (2 * (HEAD - 6) + 2 * (HEAD - 10)) * HEADS * WIDTH + depth * HIDDEN * WIDTH
    assert layer_numbers(model) - layer_numbers(slim) == fewer
    scores = depth * tokens**2 * HEADS * (2 * HEAD - 6 - 10)
    assert encoder_macs(model) - encoder_macs(slim) == fewer * tokens + scores
    for changed in (slim, low_rank_layers(model, moments, 0.5)):
        assert count_flops(lambda changed=changed: encode_images(changed, x, implementation="eager")) == 2 * encoder_macs(changed)
    merging = reducer_for_budget("ours", 0.6, model)
    merging.cls_only_last = False
    counted = count_flops(lambda: encode_images(slim, x, merging, implementation="eager")) / 2
    assert counted == pytest.approx(encoder_macs(slim, merging), rel=0.02)  # matching inside a layer is counted by the dense width


def test_pairs_hold_the_share_they_were_given(clip, clip_moments):
    for share in (0.25, 0.5, 1.0):
        pair = low_rank_layers(clip, clip_moments, share)
        expected = sum(factor_rank(share, *p.weight.shape) * sum(p.weight.shape)
                       for layer in layers_of(clip) for p in (layer.get_submodule(place) for place in PLACES))
        assert layer_numbers(pair) == expected <= share * layer_numbers(clip)
    some = low_rank_layers(clip, clip_moments, 0.5, places=("mlp.fc1",))
    kinds = {name.rsplit(".", 1)[-1] for name, part in some.named_modules() if isinstance(part, LowRankLinear)}
    assert kinds == {"fc1"}


# adapters


def training_set(model, count=12):
    """(Images, dense features)."""
    pixels = (pictures(count).clamp(-2, 2) * 60 + 128).to(torch.uint8)
    images = Images(pixels, None, [], "random")
    return images, encode_images(model, images.batch(slice(None)))


@pytest.fixture(scope="module")
def broken(clip, clip_moments):
    with torch.no_grad():
        return slim_mlp(clip, clip_moments, 0.5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_start_at_the_model_and_are_merged_into_it(clip, broken, kind):
    pytest.importorskip("peft")
    x, (images, target) = pictures(3, 5), training_set(clip)
    before = {name: p.clone() for name, p in broken.state_dict().items()}
    drawn = torch.random.get_rng_state()
    adapted = add_adapter(broken, kind, rank=4)
    assert torch.equal(torch.random.get_rng_state(), drawn), "draws of others go on as without it"
    inner = adapted.get_base_model()
    close(encode_images(inner, x), encode_images(broken, x), 1e-5)
    names = {name for name, p in inner.named_parameters() if p.requires_grad}
    assert names and all("vision" in name and "lora" in name for name in names)
    frozen = {name: p.clone() for name, p in inner.named_parameters() if name not in names}
    distil(inner, images, target, steps=3, rate=1e-2, batch=4)
    assert all(torch.equal(p, frozen[name]) for name, p in inner.named_parameters() if name not in names), "frozen weights stay bit-equal"
    beside = encode_images(inner, x)
    assert (beside - encode_images(broken, x)).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    close(encode_images(merged, x), beside, 1e-5)
    close(library_feature(merged, x), beside, 1e-5)
    assert layer_numbers(merged) == layer_numbers(broken) and encoder_macs(merged) == encoder_macs(broken)
    assert all(torch.equal(p, before[name]) for name, p in broken.state_dict().items()), "the model given is not touched"
    assert all(p.requires_grad for p in broken.parameters())


def test_an_adapter_is_not_lost_but_refused_until_it_is_merged(clip):
    peft = pytest.importorskip("peft")
    makes = {r"fc1": lambda m, found: slim_mlp(m, found, 1.0, repair="nothing"), r"fc2": lambda m, found: slim_mlp(m, found, 1.0),
             r"q_proj": lambda m, found: slim_attention(m, found, qk=HEAD), r"v_proj": lambda m, found: slim_attention(m, found, vo=HEAD),
             r"out_proj": lambda m, found: slim_attention(m, found, vo=HEAD), r"k_proj": lambda m, found: low_rank_layers(m, found, 0.9)}
    for target, make in makes.items():
        config = peft.LoraConfig(r=4, target_modules=rf"vision_model.*\.{target}", init_lora_weights=False)
        adapted = peft.get_peft_model(copy.deepcopy(clip), config).eval()
        inner, x = adapted.get_base_model(), pictures(4)
        found, right = collect_moments(inner, [x]), encode_images(inner, x)
        with pytest.raises(TypeError, match=r"Linear in the place of Linear is not supported .peft.*merge_and_unload\(\) first") as error:
            make(inner, found)
        assert "\n" not in str(error.value)
        if target != "k_proj":
            close(encode_images(make(adapted.merge_and_unload(), found), x), right, 1e-4)


def test_padded_rows_and_the_text_tower_are_no_targets(clip):
    padded = copy.deepcopy(clip)
    layers_of(padded)[2].mlp.fc2.weight[5] = 0
    names = set(adapter_targets(padded, "DoRA"))
    assert set(adapter_targets(padded, "LoRA")) == set(adapter_targets(clip, "DoRA"))
    assert set(adapter_targets(clip, "DoRA")) - names == {"vision_model.encoder.layers.2.mlp.fc2"}
    assert len(names) == 6 * 6 - 1 and not any("text" in name for name in names)


def test_dora_gives_numbers_in_a_padded_model(clip):
    pytest.importorskip("peft")
    padded = copy.deepcopy(clip)
    for layer in layers_of(padded):
        layer.self_attn.out_proj.weight[-3:] = 0
    assert encode_images(add_adapter(padded, "DoRA", 2).get_base_model(), pictures(2)).isfinite().all()


def test_distillation_brings_features_closer_and_its_seed_decides(clip, broken):
    images, target = training_set(clip)
    close_to = lambda net: float((encode_images(net, images.batch(slice(None))) * target).sum(-1).mean())
    nets = []
    for seed in (0, 0, 1):
        nets.append(all_weights(broken))
        distil(nets[-1], images, target, steps=8, rate=1e-4, batch=8, seed=seed)
    assert close_to(nets[0]) > close_to(broken) + 1e-3
    first, second, other = (net.state_dict()["vision_model.encoder.layers.0.mlp.fc1.weight"] for net in nets)
    assert torch.equal(first, second) and not torch.equal(first, other)
    outside = [name for name, p in nets[0].named_parameters() if "encoder.layers" not in name or name.startswith("text")]
    assert outside and all(torch.equal(nets[0].state_dict()[name], broken.state_dict()[name]) for name in outside)
    assert all(p.requires_grad for p in broken.parameters()), "what was given may still be trained"


def test_distillation_works_through_a_reducer(clip):
    images, target = training_set(clip)
    net, reducer = all_weights(clip), reducer_for_budget("ours", 0.5, clip)
    distil(net, images, target, steps=8, rate=1e-4, batch=8, reducer=reducer)
    gained = [(encode_images(n, images.batch(slice(None)), reducer) * target).sum(-1).mean() for n in (net, clip)]
    assert gained[0] > gained[1]


def test_without_peft_there_is_one_clear_line(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        add_adapter(clip, "LoRA")


# scores between images and texts


def features(n, p=24, seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, p, generator=torch.Generator().manual_seed(9))
    return F.normalize(centres[torch.arange(n) % classes] + 0.5 * torch.randn(n, p, generator=generator) + 0.7, dim=-1)


def scores_of(images, texts, maps):
    a, b = maps
    return (images.double() @ a) @ (texts.double() @ b).T


def test_a_score_of_full_rank_ranks_as_clips():
    images, texts = features(60), features(40, seed=1)
    scores = [x - x.mean(1, keepdim=True) for x in (images.double() @ texts.double().T, scores_of(images, texts, joint_factors(images, texts, 24)))]
    close(*scores, 1e-6)


def test_c_classes_need_rank_c_minus_one():
    images, texts = features(200), features(5, seed=1)
    exact = (images @ texts.T).argmax(1)
    assert torch.equal(scores_of(images, texts, joint_factors(images, texts, 4, floor=1e-9)).argmax(1), exact)
    assert not torch.equal(scores_of(images, texts, joint_factors(images, texts, 1)).argmax(1), exact)


def test_both_moments_are_better_than_one_or_none():
    images, texts = features(300), features(200, seed=1)
    centred = texts.double() - texts.double().mean(0)
    exact = images.double() @ centred.T
    basis = torch.linalg.eigh(images.double().T @ images.double()).eigenvectors.flip(-1)
    for rank in (1, 3, 8):
        lost = lambda a, b: (scores_of(images, centred, (a, b)) - exact).square().mean()
        best = lost(*joint_factors(images, texts, rank, floor=1e-12))
        assert best < lost(basis[:, :rank], basis[:, :rank])
        assert best < lost(torch.eye(24).double()[:, :rank], torch.eye(24).double()[:, :rank])
        assert best.item() == pytest.approx(torch.linalg.svdvals(exact)[rank:].square().sum().item() / exact.numel(), rel=1e-4)  # Eckart and Young
    turn = torch.linalg.qr(torch.randn(24, 24).double()).Q
    turned = scores_of(images.double() @ turn, centred @ turn, joint_factors(images.double() @ turn, texts.double() @ turn, 3))
    close(turned, scores_of(images, centred, joint_factors(images, texts, 3)), 1e-6)  # the axes do not matter


def test_attention_between_text_and_image():
    texts, tokens = torch.randn(3, 4, 10), torch.randn(3, 9, 12)
    torch.manual_seed(0)
    dense, thin = MatchByAttention(10, 12), MatchByAttention(10, 12, rank=10)
    assert sum(p.numel() for p in dense.parameters()) == 2 * 10 * 12
    assert sum(p.numel() for p in MatchByAttention(10, 12, rank=3).parameters()) == 2 * 3 * (10 + 12)
    for full, low in ((dense.where, thin.where), (dense.what, thin.what)):
        u, s, v = torch.linalg.svd(full[0].weight, full_matrices=False)
        low[0].weight.copy_(v)
        low[1].weight.copy_(u * s)
    close(thin(texts, tokens), dense(texts, tokens))  # all of the rank is the dense form
    order = torch.randperm(9)
    close(dense(texts, tokens[:, order]), dense(texts, tokens))
    close(dense(texts, torch.cat([tokens, tokens], 1)), dense(texts, tokens))
    naive = torch.empty(3, 4)
    for i in range(3):
        for j in range(4):
            weight = torch.softmax(tokens[i] @ (dense.where[0].weight @ texts[i, j]) / 12**0.5, 0)
            naive[i, j] = (dense.what[0].weight @ texts[i, j]) @ (weight @ tokens[i]) / 12**0.5
    close(dense(texts, tokens), naive)
    blind = MatchByAttention(10, 12, look=False)
    close(blind(texts, tokens), blind(texts, tokens.mean(1, keepdim=True)))


# repair


def test_a_linear_fault_is_repaired_exactly():
    weight, z = torch.randn(6, 10), torch.randn(80, 10) + 1
    wanted = z @ weight.T
    close(residual_repair(z, wanted, weight, 1e-6), weight, 1e-4)
    turn = torch.eye(10) + 0.3 * torch.randn(10, 10)
    close((z @ turn.T) @ residual_repair(z @ turn.T, wanted, weight, 1e-9).T, wanted, 1e-3)
    close(residual_repair(z @ turn.T, wanted, weight, 1e9), weight, 1e-4)  # an endless ridge changes nothing
    one = torch.outer(torch.randn(6), torch.randn(10))
    close(residual_repair(z, z @ (weight + one).T, weight, 1e-9, rank=1), weight + one, 1e-3)


def test_a_repair_of_low_rank_is_between_none_and_all(clip):
    x, reducer = pictures(40), reducer_for_budget("vtp", 0.5, clip)
    weight = clip.visual_projection.weight
    z, wanted = pooled_features(clip, x, reducer), pooled_features(clip, x) @ weight.T
    close(F.normalize(pooled_features(clip, x) @ weight.T, dim=-1), encode_images(clip, x))
    lost = {rank: (z @ residual_repair(z, wanted, weight, 0.01, rank).T - wanted).square().mean() for rank in (1, 4, 24)}
    assert lost[24] < lost[4] < lost[1] < (z @ weight.T - wanted).square().mean()
    for rank in (1, 4):
        assert torch.linalg.matrix_rank((residual_repair(z, wanted, weight, 0.01, rank) - weight).double(), rtol=1e-4) == rank
    close(residual_repair(z, wanted, weight, 0.01, 24), residual_repair(z, wanted, weight, 0.01), 1e-5)


# faults that a user can cause


def test_bad_input_gets_one_line(clip, clip_moments):
    layer, moment, x = nn.Linear(8, 6), moment_of(torch.randn(9, 8)), features(20)
    cases = [
        (lambda: factor_rank(0, 4, 4), "share=0 "), (lambda: factor_rank(1.5, 4, 4), "share=1.5"),
        (lambda: factor(layer, moment, 7), "rank=7 .* 1 to 6"), (lambda: factor(layer, moment, 2.0), "rank=2.0"),
        (lambda: factor(layer, moment, 2, "magic"), "metric='magic' .* SVD"),
        (lambda: low_rank_layers(clip, clip_moments, 0.5, places=("fc1",)), "places="),
        (lambda: slim_attention(clip, clip_moments, qk=HEAD + 1), f"rank={HEAD + 1} .* 1 to {HEAD}"),
        (lambda: slim_attention(clip, clip_moments, vo=0), "rank=0"),
        (lambda: slim_attention(clip, clip_moments, qk=[4, 4]), "ranks=.* 6"),
        (lambda: slim_attention(clip, clip_moments[:3], qk=4), "moments=3 .* 6"),
        (lambda: slim_mlp(clip, clip_moments, 0.5, "luck"), "criterion='luck' .* Wanda"),
        (lambda: slim_mlp(clip, clip_moments, 0.5, repair="glue"), "repair='glue' .* mean"), (lambda: slim_mlp(clip, clip_moments, 2), "share=2"),
        (lambda: collect_moments(clip, []), "batches="), (lambda: add_adapter(clip, "MoRA"), "kind='MoRA' .* DoRA"),
        (lambda: add_adapter(clip, "LoRA", 0), "rank=0"), (lambda: joint_factors(x, x, 25), "rank=25 .* 1 to 24"),
        (lambda: MatchByAttention(4, 4, 0), "rank=0"), (lambda: residual_repair(x, x, torch.eye(24), 0), "ridge=0"),
        (lambda: distil(all_weights(clip), *training_set(clip), steps=0, rate=1e-3), "steps=0")]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="ViTModel is not supported"):
        collect_moments(build("ViT"), [pictures(1)])


def test_made_layers_hold_their_numbers():
    weight, bias = torch.randn(3, 5).double(), torch.randn(3).double()
    made = linear(weight, bias, torch.zeros(1))
    assert made.weight.dtype == torch.float32 and made.weight.requires_grad
    close(made(torch.ones(1, 5)), (weight.sum(1) + bias).float()[None])


@pytest.mark.parametrize("kind, mean, limit", [(torch.float32, 300.0, 1e-4), (torch.bfloat16, 20.0, 1e-4), (torch.float16, 20.0, 1e-4), (torch.float64, 3000.0, 1e-9)])
def test_moments_far_from_zero_and_in_half_precision(kind, mean, limit):
    """Sums of large squares lose the spread in float32, and overflow in half precision."""
    rows = (mean + 3 * torch.randn(4000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(kind)
    moment = Moment()
    for part in rows.view(8, 10, 50, 5):
        moment.add(part)
    assert (moment.covariance / torch.cov(rows.double().T, correction=0) - 1).diagonal().abs().max() < limit
    assert torch.allclose(moment.mean, rows.double().mean(0), rtol=1e-6)
    assert torch.allclose(moment.second, rows.double().T @ rows.double() / len(rows), rtol=1e-5)
