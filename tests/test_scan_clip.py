"""A tower whose attention becomes a scan: exact where it must be, equal to all pairs, distilled without touching the tower."""

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from test_gpu_ready import ends_on_the_gpu, unread  # noqa: F401

from effarch.clip.checkpoints import random_clip
from effarch.clip.towers import attend, find_vision_module, make_tower, split_heads
from effarch.clip.towers.small import SMALL_MODELS
from effarch.scan_clip import (
    REPLACEABLE,
    LinearAttention,
    MeanOfValues,
    Mixer,
    Removed,
    ScanMixer,
    ShortConvolution,
    advance,
    centres,
    fit_end_to_end,
    fit_layers,
    hedgehog_maps,
    landmark_maps,
    mix_step,
    replaced_attention,
    run_layers,
    tower_features,
)
from effarch.token_reduction.encoder import run_encoder, start_encoder
from effarch.vision_ssm import scan_orders


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def clip():
    """(model, tower, pixels, states before the first layer) of a small CLIP with 64 patches."""
    torch.manual_seed(1)
    model = random_clip(smoke=True)[0].eval().requires_grad_(False)
    for value in model.parameters():
        value.data *= 2  # else attention is nearly uniform
    tower, pixels = make_tower(model), torch.randn(6, 3, 64, 64)
    return model, tower, pixels, tower.pre_norm(tower.embed(pixels))


def close(a, b, tolerance):
    assert a.shape == b.shape
    assert float((a.detach() - b.detach()).abs().max()) <= tolerance


def exact_attention(block, x, heads):
    q, k, v = (split_heads(layer(x), heads) for layer in (block.q, block.k, block.v))
    return block.out(attend(q, k, v).transpose(1, 2).flatten(2))


def every_mixer(tower, layer, x):
    """{name: mixer} of each kind for a layer."""
    block, heads = tower.blocks[layer], tower.heads
    maps = lambda: landmark_maps(block, heads, block.norm1(x), 8)
    return {"removed": Removed(block, heads), "mean": MeanOfValues(block, heads), "mean, CLS": MeanOfValues(block, heads, exact_cls=True),
            "convolution": ShortConvolution(block, heads), "linear": LinearAttention(block, heads, maps()),
            "signed": LinearAttention(block, heads, hedgehog_maps(block, heads), signed=True),
            "scan": ScanMixer(block, heads, maps()), "scan, CLS": ScanMixer(block, heads, maps(), exact_cls=True, directions=4)}


NAMES = ["removed", "mean", "mean, CLS", "convolution", "linear", "signed", "scan", "scan, CLS"]


# features


def test_centres_find_the_clusters():
    middles = 10 * torch.randn(4, 5)
    points = (middles[:, None] + 0.1 * torch.randn(4, 50, 5)).flatten(0, 1)[torch.randperm(200)]
    best = min((centres(points, 4, seed) for seed in range(8)), key=lambda c: float(torch.cdist(points, c).amin(1).sum()))
    assert torch.cdist(middles, best).amin(1).max() < 0.1
    close(centres(points, 1), points.mean(0, keepdim=True), 1e-5)
    close(centres(points, 200).sort(0).values, points.sort(0).values, 1e-6)
    same = centres(torch.ones(6, 2), 3)
    assert same.isfinite().all()


def test_a_mixer_that_was_looked_at_without_gradients_is_trained_later(clip):
    _, tower, _, states = clip
    block = tower.blocks[2]
    mixer = ScanMixer(block, tower.heads, hedgehog_maps(block, tower.heads), signed=True)
    with torch.inference_mode():
        mixer(states)
    mixer(states.detach().clone()).sum().backward()
    assert mixer.to_delta.bias.grad.isfinite().all()


@pytest.mark.parametrize("kind", [LinearAttention, ScanMixer])
def test_mixers_of_the_same_maps_share_no_weight(clip, kind):
    _, tower, _, states = clip
    block = tower.blocks[2]
    maps = landmark_maps(block, tower.heads, block.norm1(states[:1]), 4)
    one, two = kind(block, tower.heads, maps), kind(block, tower.heads, maps)
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}


def test_with_a_landmark_at_every_query_it_is_softmax_attention(clip):
    """C becomes one of n, and B the exact weights of that query."""
    _, tower, _, states = clip
    block, x = tower.blocks[2], tower.blocks[2].norm1(states[:1])
    mixer = LinearAttention(block, tower.heads, landmark_maps(block, tower.heads, x, x.shape[1], sharpness=1e5))
    exact = exact_attention(block, x, tower.heads)
    close(mixer(x), exact, 1e-3 * exact.abs().max())
    few = LinearAttention(block, tower.heads, landmark_maps(block, tower.heads, x, 4))
    assert (few(x) - exact).abs().max() > 10 * (mixer(x) - exact).abs().max()


def test_landmarks_are_closer_than_the_mean_and_than_signed_features(clip):
    _, tower, _, states = clip
    block = tower.blocks[1]
    x = block.norm1(states)
    error = lambda mixer: float((mixer(x) - exact_attention(block, x, tower.heads)).detach().norm())
    mixers = every_mixer(tower, 1, states)
    assert error(mixers["linear"]) < 0.9 * min(error(mixers["mean"]), error(mixers["signed"]))


@pytest.mark.parametrize("signed", [False, True])
def test_linear_attention_is_all_pairs(clip, signed):
    _, tower, _, states = clip
    block = tower.blocks[1]
    maps = hedgehog_maps(block, 3) if signed else landmark_maps(block, 3, states, 8)
    mixer, x = LinearAttention(block, 3, maps, signed), block.norm1(states)
    C, B = mixer.features(x)
    assert C.min() >= 0 and B.min() >= 0
    weights = torch.einsum("bthn,bshn->bhts", C, B)
    y = (weights / weights.sum(-1, keepdim=True)) @ split_heads(mixer.value(x), 3)
    close(mixer(x), mixer.out(y.transpose(1, 2).flatten(2)), 1e-5)


# the scan


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("side", [1, 3, 4])
def test_a_scan_is_all_decayed_pairs_and_each_path_counts_a_token_itself_once(clip, directions, side):
    _, tower, _, states = clip
    block = tower.blocks[1]
    mixer = ScanMixer(block, 3, landmark_maps(block, 3, states, 8), directions=directions, delta=0.1)
    torch.nn.init.normal_(mixer.to_delta.weight, std=0.3)
    x = torch.randn(2, side**2 + 1, 48)
    C, B = mixer.features(x)
    v = torch.randn(2, side**2 + 1, 3, 5)
    delta, total = F.softplus(mixer.to_delta(x)).unflatten(-1, (directions, 3)), torch.zeros(2, side**2 + 1, 3, 5)
    for r, path in enumerate(scan_orders(side, side, directions).tolist()):
        for i, t in enumerate(path):
            for j, s in enumerate(path[:i + (r % 2 == 0)]):
                decay = torch.exp(-sum(delta[:, u, r] for u in path[j + 1:i + 1])) if i > j else 1
                total[:, t] += (decay * delta[:, s, r] * (C[:, t] * B[:, s]).sum(-1))[..., None] * v[:, s]
    close(mixer.weigh(x, C, B, v) / total.abs().max(), total / total.abs().max(), 1e-5)


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_without_decay_a_scan_is_linear_attention(clip, directions):
    _, tower, _, states = clip
    block, x = tower.blocks[1], tower.blocks[1].norm1(states)
    maps = landmark_maps(block, 3, states, 8)
    scan = ScanMixer(block, 3, copy.deepcopy(maps), directions=directions, delta=1e-6)
    linear = LinearAttention(block, 3, copy.deepcopy(maps))
    if directions > 1:
        close(scan(x), linear(x), 1e-3)
    else:  # of what was read before
        C, B = linear.features(x)
        place, v = scan.order_of(x)[0, 0].argsort(), linear.value(x).unflatten(-1, (3, -1))
        weight = torch.einsum("bthn,bshn->bhts", C, B) * (place[:, None] >= place)
        close(scan(x), linear.out(torch.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdim=True), v).flatten(2)), 1e-3)


# the mixers


@pytest.mark.parametrize("name", [n for n in NAMES if n != "removed"])
def test_mixers_train_every_parameter(clip, name):
    _, tower, _, states = clip
    mixer = every_mixer(tower, 1, states)[name]
    if name == "convolution":
        torch.nn.init.normal_(mixer.filter.weight)  # at zero the gate is not asked
    mixer(tower.blocks[1].norm1(states)).square().sum().backward()
    for key, value in mixer.named_parameters():
        nothing = key == "key.bias"  # the same for all keys
        assert nothing or (value.grad is not None and value.grad.isfinite().all() and value.grad.abs().sum() > 0), key


@pytest.mark.parametrize("kind", [MeanOfValues, ShortConvolution, LinearAttention, ScanMixer])
def test_the_exact_cls_row_is_attentions_own_and_the_only_change(clip, kind):
    _, tower, _, states = clip
    block, x = tower.blocks[1], tower.blocks[1].norm1(states)
    maps = (landmark_maps(block, 3, states, 8),) if issubclass(kind, LinearAttention) else ()
    plain, exact = (kind(block, 3, *copy.deepcopy(maps), exact_cls=e) for e in (False, True))
    close(exact(x)[:, 0], exact_attention(block, x, 3)[:, 0], 1e-5)
    close(exact(x)[:, 1:], plain(x)[:, 1:], 1e-6)
    assert (plain(x)[:, 0] - exact(x)[:, 0]).abs().max() > 1e-4


def test_controls_see_what_they_may(clip):
    _, tower, _, states = clip
    block, x = tower.blocks[1], torch.randn(1, 65, 48)
    assert not Removed(block, 3)(x).any()
    close(MeanOfValues(block, 3)(x), block.out(block.v(x).mean(1, keepdim=True)).expand(1, 65, 48), 1e-6)
    close(ShortConvolution(block, 3)(x), MeanOfValues(block, 3)(x), 1e-6)
    mixer = ShortConvolution(block, 3, taps=3)
    torch.nn.init.normal_(mixer.filter.weight)
    changed = x.clone()
    changed[:, 1 + 8 * 4 + 4] += 1
    far = lambda x: mixer.mix(x, block.v(x)) - block.v(x).mean(1, keepdim=True)
    moved = (far(changed) - far(x)).abs().amax(-1)[0] > 1e-5
    plane = moved[1:].view(8, 8)
    assert not moved[0] and plane[3:6, 3:6].all() and int(plane.sum()) == 9


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_close(clip, name):
    _, tower, _, states = clip
    mixer, x = every_mixer(tower, 1, states)[name], tower.blocks[1].norm1(states)
    y, half = mixer(x), copy.deepcopy(mixer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - y).abs().max() <= 0.05 * y.abs().max() + 1e-6


# in the place of attention


def library_features(model, pixels):
    out = model.get_image_features(pixel_values=pixels)
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def test_with_no_layer_replaced_it_is_the_model_bit_for_bit(clip):
    model, tower, pixels, states = clip
    original = library_features(model, pixels)
    with replaced_attention(model, {}):
        assert torch.equal(library_features(model, pixels), original)
    close(tower_features(model, tower, run_layers(tower, states)), original, 1e-6)
    close(tower_features(model, tower, advance(tower, states, batch=4)), original, 1e-6)


@pytest.mark.parametrize("places", [[0], [11], [1, 3, 5, 7, 9, 11], list(range(12))])
def test_the_library_runs_the_mixers(clip, places):
    model, tower, pixels, states = clip
    original, mixers = library_features(model, pixels), {i: every_mixer(tower, i, states)["scan"] for i in places}
    with replaced_attention(model, mixers):
        found = library_features(model, pixels)
    close(found, tower_features(model, tower, run_layers(tower, states, mixers)), 1e-6)
    assert (found - original).abs().max() > 1e-4
    assert torch.equal(library_features(model, pixels), original), "afterwards it is the model again"
    half_way = run_layers(tower, states, mixers, 0, 5)
    close(run_layers(tower, half_way, mixers, 5), run_layers(tower, states, mixers), 0)


def test_the_model_is_itself_again_after_an_exception(clip):
    model, tower, pixels, states = clip
    before = [layer.self_attn for layer in tower.module.encoder.layers]
    with pytest.raises(RuntimeError, match="stop"), replaced_attention(model, {3: MeanOfValues(tower.blocks[3], 3)}):
        assert tower.module.encoder.layers[3].self_attn is not before[3]
        raise RuntimeError("stop")
    assert all(layer.self_attn is old for layer, old in zip(tower.module.encoder.layers, before, strict=True))


def test_a_vit_of_transformers_runs_them_too():
    config = transformers.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8)
    model = transformers.ViTModel(config).eval()
    tower, pixels = make_tower(model), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = tower.embed(pixels)
        mixers = {1: ScanMixer(tower.blocks[1], 4, landmark_maps(tower.blocks[1], 4, states, 5))}
        with replaced_attention(model, mixers):
            found = model(pixel_values=pixels).last_hidden_state
        close(found, tower.finish(run_layers(tower, states, mixers)), 1e-5)
        assert (found - model(pixel_values=pixels).last_hidden_state).abs().max() > 1e-5


@pytest.mark.parametrize("family", SMALL_MODELS)
def test_every_family_is_run_as_it_is_or_refused(family):
    try:
        model = SMALL_MODELS[family]().eval()
        tower = make_tower(model)
    except (ImportError, TypeError):
        return pytest.skip("not installed, or no tower")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        states = start_encoder(tower, pixels).x
        if tower.rotary is not None:
            with pytest.raises(ValueError, match="tower='attention with rotary positions' is not allowed"):
                run_layers(tower, states)
        else:
            close(run_layers(tower, states), run_encoder(tower, pixels).x, 1e-5)
        name = find_vision_module(model)[1].name
        mixers = {0: MeanOfValues(tower.blocks[0], tower.heads)}
        if name not in REPLACEABLE:
            with pytest.raises(TypeError, match="its attention cannot be replaced; it can in CLIP, "):
                replaced_attention(model, mixers).__enter__()
        else:
            with replaced_attention(model, mixers):
                found = tower.module(pixels).last_hidden_state
            close(found, tower.finish(run_layers(tower, states, mixers)), 1e-5)


def siglip():
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=small, vision_config=small | dict(image_size=32, patch_size=8)))


@pytest.mark.parametrize("call, kind, said", [
    (lambda clip: replaced_attention(clip[0], {12: None}).__enter__(), ValueError, "layers=[12] is not allowed; allowed: 0 to 11"),
    (lambda clip: replaced_attention(siglip(), {}).__enter__(), TypeError, "model is SiglipModel: its attention cannot be replaced; it can in CLIP,"),
    (lambda clip: replaced_attention(torch.nn.Linear(2, 2), {}).__enter__(), TypeError, "Linear is not supported"),
    (lambda clip: centres(torch.zeros(3, 2), 4), ValueError, "points=3 is not allowed; allowed: at least 4"),
    (lambda clip: centres(torch.zeros(3, 2), 0), ValueError, "count=0 is not allowed"),
    (lambda clip: every_mixer(clip[1], 0, clip[3])["scan"](torch.zeros(1, 8, 48)), ValueError, "tokens=8 is not allowed; allowed: one CLS token and a square"),
    (lambda clip: every_mixer(clip[1], 0, clip[3])["convolution"](torch.zeros(1, 8, 48)), ValueError, "tokens=8 is not allowed"),
])
def test_bad_input_is_named(clip, call, kind, said):
    with pytest.raises(kind) as caught:
        call(clip)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# distillation


def distance(tower, mixers, states, layer):
    """Mean squared distance of the student to the teacher's state behind a layer's attention."""
    student, teacher = advance(tower, states, mixers, 0, layer), advance(tower, states, None, 0, layer)
    with torch.no_grad():
        return float(F.mse_loss(mix_step(tower, layer, student, mixers[layer]), mix_step(tower, layer, teacher)))


@pytest.mark.parametrize("name", ["mean", "scan, CLS"])
def test_both_fits_bring_the_student_closer_and_leave_the_tower_alone(clip, name):
    model, tower, _, states = clip
    tower_before, states_before = copy.deepcopy(model.state_dict()), states.clone()
    mixers = {i: every_mixer(tower, i, states)[name] for i in (2, 5)}
    teacher = tower_features(model, tower, run_layers(tower, states))
    far = distance(tower, mixers, states, 5)
    fit_layers(tower, mixers, states, epochs=10, batch=3)
    assert distance(tower, mixers, states, 5) < 0.9 * far
    mixers = {i: every_mixer(tower, i, states)[name] for i in (2, 5)}
    lost = lambda: float(1 - (tower_features(model, tower, advance(tower, states, mixers)) * teacher).sum(-1).mean())
    before = lost()
    fit_end_to_end(model, tower, mixers, states, teacher, steps=12, batch=6, rate=1e-3)
    assert lost() < 0.9 * before
    assert all(torch.equal(value, tower_before[key]) for key, value in model.state_dict().items())
    assert torch.equal(states, states_before)


def test_a_later_layer_corrects_what_an_earlier_one_lost(clip):
    """Layer 5 is fitted on the student's own states: with layer 2 removed it ends closer than when fitted on the teacher's."""
    _, tower, _, states = clip
    own = {2: Removed(tower.blocks[2], 3), 5: MeanOfValues(tower.blocks[5], 3)}
    apart = {5: copy.deepcopy(own[5])}
    fit_layers(tower, own, states, epochs=10, batch=3)
    fit_layers(tower, apart, states, epochs=10, batch=3)
    assert distance(tower, own, states, 5) < distance(tower, {2: own[2], 5: apart[5]}, states, 5)


def test_the_same_seed_gives_the_same_student(clip):
    model, tower, _, states = clip
    teacher, found = tower_features(model, tower, run_layers(tower, states)), []
    for chosen in (3, 3, 4):
        mixers = {1: every_mixer(tower, 1, states)["linear"]}
        fit_layers(tower, mixers, states, epochs=1, batch=2, seed=chosen)
        fit_end_to_end(model, tower, mixers, states, teacher, 2, batch=3, seed=chosen)
        found.append(mixers[1].out.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_layer_removed_has_nothing_to_fit(clip):
    _, tower, _, states = clip
    mixers = {1: Removed(tower.blocks[1], 3)}
    before = copy.deepcopy(mixers[1].state_dict())
    fit_layers(tower, mixers, states, epochs=1, batch=3)
    assert all(torch.equal(value, before[key]) for key, value in mixers[1].state_dict().items())


@pytest.mark.parametrize("name", ["mean, CLS", "convolution", "linear", "signed", "scan", "scan, CLS"])
def test_mixers_stay_on_the_gpu(name, unread, monkeypatch):  # noqa: F811
    monkeypatch.setattr("effarch.scan_clip.copy.deepcopy", lambda module: module)  # which fake tensors do not know

    def build():
        from types import SimpleNamespace
        part = lambda: torch.nn.Linear(48, 48)
        block = SimpleNamespace(q=part(), k=part(), v=part(), out=part())
        maps = [torch.nn.Linear(48, 24), torch.nn.Linear(48, 24)]
        made = {"mean, CLS": lambda: MeanOfValues(block, 3, True), "convolution": lambda: ShortConvolution(block, 3),
                "linear": lambda: LinearAttention(block, 3, maps), "signed": lambda: LinearAttention(block, 3, maps, True),
                "scan": lambda: ScanMixer(block, 3, maps), "scan, CLS": lambda: ScanMixer(block, 3, maps, exact_cls=True, directions=4)}[name]()
        if isinstance(made, ScanMixer):
            made.order = scan_orders(8, 8, made.directions)[None].cuda()  # sent once, before what is timed
        assert isinstance(made, Mixer)
        return made, [torch.randn(2, 65, 48)]

    ends_on_the_gpu(build)
