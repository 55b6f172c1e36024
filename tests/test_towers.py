"""Every family's adapter on a small random model of it, and what works inside token_reduction."""

import copy
import pickle
import sys
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from effarch.bench import count_flops
from effarch.clip.towers import FAMILIES, find_vision_module, make_tower
from effarch.clip.towers.small import SMALL_MODELS, TEXT, VISION
from effarch.token_reduction import (
    encode_images,
    encoder_macs,
    reducer_for_budget,
    token_reduction,
    trace_encoder,
)
from effarch.token_reduction.encoder import InputPruning, Reducer, drop, run_encoder
from effarch.token_reduction.merging import match_alternating

REFUSED = [family for family in FAMILIES if not family.adapter]
NAMES = [name for name in SMALL_MODELS if name not in {family.name for family in REFUSED}]
OTHERS = ("timm's ViT", "MobileCLIP-B", "EVA-CLIP", "EVA-02-CLIP", "OpenCLIP")
HUGGING_FACE = [name for name in NAMES if name not in OTHERS]


def build(name):
    """A small model with weights so large that every layer, norm and bias matters (some libraries begin near zero)."""
    torch.manual_seed(0)
    try:
        model = SMALL_MODELS[name]()
    except ImportError as error:
        pytest.skip(f"{error.name} is not installed")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.15 * torch.randn_like(p) + (p if p.ndim < 2 else 0))
    return model.eval()


@pytest.fixture(params=NAMES)
def model(request):
    return build(request.param)


@pytest.fixture
def clip():
    return build("CLIP")


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(a, b, limit=1e-5):
    assert a.shape == b.shape and (a - b).abs().max() < limit, (a - b).abs().max().item()


def outputs(model, pixels, **options):
    """(last hidden state, pooled) by the library's own call of the tower; what it does not give is None."""
    module, family = find_vision_module(model)
    if family.library == "open_clip":
        return None, module(pixels)
    if family.library == "timm":
        last = module.forward_features(pixels)
        return last, module.forward_head(last, pre_logits=True)
    if family.name == "ViT-MAE":
        order = torch.arange(64.0).expand(len(pixels), -1)  # outside, it shuffles the patches
        options |= {} if "forward" in vars(module) else dict(noise=order)
    out = module(pixel_values=pixels, **options)
    return out.last_hidden_state, out.get("pooler_output")


def whole_call(model, pixels):
    """What people call the model for."""
    out = model.get_image_features(pixel_values=pixels) if hasattr(model, "get_image_features") else outputs(model, pixels)
    out = getattr(out, "pooler_output", out)
    return torch.stack(out) if isinstance(out, list) else out


# every family


def test_without_reduction_our_loop_is_the_library(model, pixels):
    tower = make_tower(model)
    last, pooled = outputs(model, pixels)
    tokens = run_encoder(tower, pixels)
    if last is not None:
        close(tower.finish(tokens.x), last)
    assert tower.pools == (pooled is not None)
    if pooled is not None:
        ours = tower.pool(tokens.x, None)
        close(ours @ tower.module.proj if tower.library == "open_clip" else ours, pooled)


def test_with_fewer_tokens_prefix_and_patches_are_all_there_and_the_model_comes_back(model, pixels):
    module, family = find_vision_module(model)
    before, state = outputs(model, pixels), dict(vars(module))
    tower, reducer = make_tower(model), reducer_for_budget("ours", 0.6, model, cls_only_last=False)
    tokens = run_encoder(tower, pixels, reducer, trace=True)
    assert tokens.x.shape[1] < 64 and (tokens.owner[:, : tower.prefix] == torch.arange(tower.prefix)).all()
    assert (tokens.sizes[:, : tower.prefix] == 1).all() and (tokens.owner >= 0).all()
    assert 0.5 < encoder_macs(model, reducer) / encoder_macs(model) <= 0.6
    with token_reduction(model, "ours", budget=0.6, patch_tokens=None if family.library == "open_clip" else True):
        inside = outputs(model, pixels)
    for found, expected in zip(inside, before, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.shape == expected.shape and found.isfinite().all() and (found - expected).abs().max() > 1e-5
    after = outputs(model, pixels)
    assert all(a is b or torch.equal(a, b) for a, b in zip(before, after, strict=True)) and vars(module) == state


@pytest.mark.parametrize("name, options", [  # a size bias of 0.85 is not exact, and the equal ones must not run out
    ("tome", dict(budget=0.7)), ("ours", dict(budget=0.9, size_bias=1.0))])
def test_merging_equal_patches_changes_nothing(model, name, options):
    """Two kinds of patches, 48 of one and 16 of the other, without positions."""
    for place, p in [*model.named_parameters(), *model.named_buffers()]:
        if "pos" in place or "inv_freq" in place:
            p.zero_()
        if place == "rope.pos_embed":  # sines and cosines
            p[:, p.shape[1] // 2:] = 1
    kinds = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    choice = (torch.arange(64) % 8 >= 2).long()  # whole columns, so that each finds its like at the other parity
    picture = torch.cat([torch.cat([kinds[choice[8 * i + j]] for j in range(8)], -1) for i in range(8)], -2)[None]
    dense = outputs(model, picture)
    with token_reduction(model, name, **options):
        reduced = outputs(model, picture)
    for found, expected in zip(reduced, dense, strict=True):
        if found is not None:  # CLIPModel and SiglipModel have no last hidden state inside
            close(found, expected, 1e-4)


def test_multiply_adds_are_counted(model, pixels):
    for reducer in (None, reducer_for_budget("ours", 0.6, model)):
        flops = count_flops(lambda r=reducer: encode_images(model, pixels[:1], r, implementation="eager"))
        assert flops == 2 * encoder_macs(model, reducer)


def test_each_kind_of_reducer_runs(model, pixels):
    for name in ("vtp", "evit", "dynamicvit", "tome"):
        with token_reduction(model, name, budget=0.6):
            last, pooled = outputs(model, pixels)
        assert all(x.isfinite().all() for x in (last, pooled) if x is not None)


def test_whole_models_are_reduced_inside_and_as_before_outside(pixels):
    wholes = {
        "LLaVA": lambda: build("LLaVA"),
        "ChineseCLIP": lambda: transformers.ChineseCLIPModel(
            transformers.ChineseCLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20)),
        "AltCLIP": lambda: transformers.AltCLIPModel(transformers.AltCLIPConfig(
            vision_config=VISION, text_config=dict(TEXT, project_dim=20), projection_dim=20)),
        "DINOv2": lambda: transformers.Dinov2ForImageClassification(
            transformers.Dinov2Config(hidden_size=48, num_hidden_layers=6, num_attention_heads=3, image_size=64, patch_size=8)),
    }
    for name, make in wholes.items():
        torch.manual_seed(0)
        model = make().eval()
        call = lambda m=model: m(pixels).logits if hasattr(m, "classifier") else whole_call(m, pixels)
        before = call()
        with token_reduction(model, "ours", budget=1.0):
            close(call(), before)
        with token_reduction(model, "ours", budget=0.6):
            inside = call()
        assert inside.shape == before.shape and inside.isfinite().all() and (inside - before).abs().max() > 1e-6, name
        assert torch.equal(call(), before)


def test_llava_writes(pixels):
    model = build("LLaVA")
    ids = torch.cat([torch.full((3, 64), 99), torch.tensor([[5, 6]] * 3)], 1)
    say = lambda: model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=2, do_sample=False, eos_token_id=None)
    before = say()
    with token_reduction(model, "ours", budget=1.0):
        assert torch.equal(say(), before)
    with token_reduction(model, "ours", budget=0.6):
        assert say().shape == before.shape
    with token_reduction(model, "vtp", budget=0.6), pytest.raises(ValueError, match="dropped by InputPruning=.*hidden states"):
        say()


def test_open_clip_models_around_both_kinds_of_towers(pixels):
    open_clip = pytest.importorskip("open_clip")
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    own = dict(layers=4, width=48, head_width=16, patch_size=8, image_size=64)
    timms = dict(timm_model_name="vit_tiny_patch16_224", timm_pool="token", timm_proj="linear", image_size=224)
    for kind, vision in ((open_clip.CLIP, own), (open_clip.CustomTextCLIP, timms)):
        model = kind(20, vision, text).eval()
        x = F.interpolate(pixels, vision["image_size"])
        before = model.encode_image(x, normalize=True)
        close(encode_images(model, x), before)
        reducer = reducer_for_budget("ours", 0.6, model, cls_only_last=None if vision is own else False)
        with token_reduction(model, "ours", budget=0.6):
            close(model.encode_image(x, normalize=True), encode_images(model, x, reducer))
        assert torch.equal(model.encode_image(x, normalize=True), before)


def test_the_last_layer_is_whole_where_the_mean_of_the_patches_is_read(pixels):
    """timm's ViT with a CLS token that its pooling leaves out."""
    pytest.importorskip("timm")
    from effarch.clip.towers.small import timm_vit

    model = timm_vit(global_pool="avg").eval()
    for reducer in (Reducer(), InputPruning(0.5), reducer_for_budget("ours", 0.6, model)):
        found = []
        for reducer.cls_only_last in (True, False):
            found.append((encode_images(model, pixels, reducer), encoder_macs(model, reducer)))
        assert found[0][0].isfinite().all() and torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@pytest.mark.parametrize("options", [dict(), dict(pool_include_prefix=True), dict(class_token=False), dict(reg_tokens=2)])
def test_means_of_timm_are_its_own(options, pixels):
    pytest.importorskip("timm")
    from effarch.clip.towers.small import timm_vit

    model = timm_vit(global_pool="avg", **options).eval()
    expected = F.normalize(model.forward_head(model.forward_features(pixels), pre_logits=True), dim=-1)
    close(encode_images(model, pixels), expected)
    reducer = reducer_for_budget("ours", 0.6, model, cls_only_last=False)
    with token_reduction(model, "ours", budget=0.6):  # there timm's own head pools every patch
        inside = model.forward_head(model.forward_features(pixels), pre_logits=True)
    close(encode_images(model, pixels, reducer), F.normalize(inside, dim=-1))


def oblong(name, sides):
    """A model whose own images are not square."""
    if name == "ViT":
        return transformers.ViTModel(transformers.ViTConfig(**dict(VISION, image_size=sides)))
    pytest.importorskip("timm")
    from effarch.clip.towers.small import timm_vit

    return timm_vit(img_size=sides)


def test_a_budget_holds_for_images_of_every_size():
    """DINOv2's configuration says 518 pixels, its image processor 224: half of the one is not half of the other."""
    model = transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=48, num_hidden_layers=6, num_attention_heads=3,
                                                               image_size=128, patch_size=8)).eval()
    small, native = (torch.randn(1, 3, n, n, generator=torch.Generator().manual_seed(n)) for n in (64, 128))
    for name in ("tome", "ours", "cls_drop"):
        shares, outputs = {}, {}
        for told in (None, 64, 128):
            with token_reduction(model, name, budget=0.5, **({} if told is None else dict(image_size=told))):
                outputs[told] = model(small).pooler_output, model(native).pooler_output
        for told in (64, 128):
            reducer = reducer_for_budget(name, 0.5, model, image_size=told, cls_only_last=False)
            shares[told] = encoder_macs(model, reducer, 64) / encoder_macs(model, None, 64)
        assert 0.4 < shares[64] <= 0.5 and shares[128] != shares[64]
        assert torch.equal(outputs[None][0], outputs[64][0]) and not torch.allclose(outputs[None][0], outputs[128][0])
        assert torch.equal(outputs[None][1], outputs[128][1]) and not torch.allclose(outputs[None][1], outputs[64][1])


@pytest.mark.parametrize("sides", [(64, 96), (32, 128)])  # the second has as many patches as a square
@pytest.mark.parametrize("name", ["ViT", "timm's ViT"])
def test_models_made_for_oblong_images_keep_their_positions_and_their_budget(name, sides):
    torch.manual_seed(0)
    model, pixels = oblong(name, sides).eval(), torch.randn(2, 3, *sides)
    close(encode_images(model, pixels), F.normalize(outputs(model, pixels)[1], dim=-1))
    reducer = reducer_for_budget("ours", 0.6, model, cls_only_last=False)
    assert trace_encoder(model, reducer, pixels).macs == encoder_macs(model, reducer) <= 0.6 * encoder_macs(model)
    with token_reduction(model, "ours", budget=0.6):
        close(F.normalize(outputs(model, pixels)[1], dim=-1), encode_images(model, pixels, reducer))


@pytest.mark.parametrize("after", [False, True])
def test_patches_of_open_clip_are_normed_where_it_norms_them(after, pixels):
    transformer = pytest.importorskip("open_clip.transformer")
    model = transformer.VisionTransformer(image_size=64, patch_size=8, width=48, layers=3, heads=3, mlp_ratio=2.0, output_dim=20,
                                          output_tokens=True, final_ln_after_pool=after).eval()
    model.ln_post.weight.normal_()
    before = model(pixels)
    with token_reduction(model, "ours", budget=1.0):
        for found, expected in zip(model(pixels), before, strict=True):
            close(found, expected)


def test_kept_patches_keep_their_rotary_positions(pixels):
    """The library's own layers on half of the patches, each with its position."""
    model, reducer = build("DINOv3"), InputPruning(0.5)
    tokens = run_encoder(make_tower(model), pixels[:1], reducer, trace=True)
    kept = (tokens.owner[0] >= 0).nonzero()[:, 0]
    x, (cos, sin) = model.embeddings(pixels[:1])[:, kept], model.rope_embeddings(pixels[:1])
    for layer in (model.layer if hasattr(model, "layer") else model.model.layer):
        x = layer(x, position_embeddings=(cos[kept[5:] - 5], sin[kept[5:] - 5]))
    assert len(kept) == 37
    close(tokens.x, x)


@pytest.mark.parametrize("name", ["DINOv3", "EVA-02-CLIP"])
def test_an_order_of_patches_does_not_matter_where_positions_go_along(name, pixels):
    class Shuffle(Reducer):
        def at_input(self, tokens):
            tokens.order = torch.cat([torch.arange(tokens.prefix), tokens.prefix + torch.randperm(64)]).expand(len(tokens.x), -1)
            drop(tokens, tokens.order)

    model = build(name)
    close(encode_images(model, pixels, Shuffle()), encode_images(model, pixels))
    merged = run_encoder(make_tower(model), pixels, reducer_for_budget("ours", 0.6, model, cls_only_last=False), trace=True)
    first = merged.owner.gather(1, merged.place)  # a merged token stands where one of its parts stood
    assert torch.equal(first, torch.arange(merged.x.shape[1]).expand_as(first)) and not torch.equal(merged.place, first)


def test_a_summary_token_stands_nowhere(pixels):
    model = build("DINOv3")
    tokens = run_encoder(make_tower(model), pixels, InputPruning(0.5, "mean"))
    assert (tokens.place[:, -1] == 0).all() and tokens.place.shape == tokens.x.shape[:2]
    assert all(torch.equal(table[0], value * torch.ones(16)) for table, value in zip(tokens.rotary, (1, 0), strict=True))


@pytest.mark.parametrize("prefix", [2, 3, 5])
def test_tokens_in_front_are_as_if_they_were_one(prefix):
    """The matching leaves them out, and otherwise is that of the CLS token and the patches alone."""
    metric, weight = torch.randn(2, prefix + 21, 8), torch.rand(2, prefix + 21)
    kept, rest, target = match_alternating(metric, 7, prefix, weight)
    assert kept[:, :prefix].tolist() == [list(range(prefix))] * 2
    assert rest.min() >= prefix and target.min() >= prefix
    assert torch.equal(torch.cat([kept, rest], 1).sort(1).values, torch.arange(prefix + 21).expand(2, -1))
    cut = [torch.cat([t[:, :1], t[:, prefix:]], 1) for t in (metric, weight)]
    alone = match_alternating(cut[0], 7, 1, cut[1])
    for found, one in zip((kept[:, prefix:], rest, target), (alone[0][:, 1:], *alone[1:]), strict=True):
        assert torch.equal(found, one + prefix - 1)


# what is not supported


def one_line(error):
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_why_not_is_one_sentence(family, pixels):
    assert family.why_not and not family.why_not.endswith(".")
    if family.name in SMALL_MODELS:
        with pytest.raises(TypeError, match="is not supported: ") as error:
            with token_reduction(build(family.name), "ours", budget=0.6):
                pass
        one_line(error)
        assert family.why_not in str(error.value)


def test_the_table_is_whole():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names) and set(SMALL_MODELS) <= {*names, "LLaVA", "MobileCLIP-B", "EVA-02-CLIP"}
    assert {family.name for family in FAMILIES if family.adapter} <= set(SMALL_MODELS)


def test_what_an_adapter_cannot_do_right_is_refused_by_name(clip):
    two, deep = torch.nn.ModuleList([clip.vision_model, build("ViT")]), torch.nn.ModuleList([torch.nn.ModuleList([clip]), build("ViT")])
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION))
    quantised = build("BLIP")
    quantised.encoder.layers[0].self_attn.qkv = torch.nn.Sequential(quantised.encoder.layers[0].self_attn.qkv)
    bare = dict(two=(two, TypeError, r"several vision towers \(CLIP, ViT\): give the one"),
                deep=(deep, TypeError, r"several vision towers \(ViT, CLIP\): give the one"),
                masked=(masked, ValueError, "mask_ratio=0.75 is not allowed; allowed: 0"),
                quantised=(quantised, TypeError, "Sequential in the place of Linear"))
    for other, kind, words in bare.values():
        with pytest.raises(kind, match=words) as error:
            make_tower(other)
        one_line(error)


@pytest.mark.parametrize("options, words", [
    (dict(global_pool="map"), "global_pool='map' is not supported"), (dict(patch_drop_rate=0.5), "patch dropout is not supported"),
    (dict(qk_norm=True), "normed queries and keys is not supported"), (dict(reg_tokens=2), None),
    (dict(dynamic_img_size=True, dynamic_img_pad=True), "images padded to whole patches is not supported")])
def test_other_makes_of_timm_are_refused_by_name(options, words):
    pytest.importorskip("timm")
    from effarch.clip.towers.small import timm_vit

    if words is None:
        assert make_tower(timm_vit(**options)).prefix == 3
        return
    with pytest.raises(TypeError, match=words) as error:
        make_tower(timm_vit(**options))
    one_line(error)


# inside the context manager


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hidden_states_are_the_librarys_and_hold_every_patch(name, pixels):
    model = build(name)
    module, tower = find_vision_module(model)[0], make_tower(model)
    options = dict(noise=torch.arange(64.0).expand(3, -1)) if name == "ViT-MAE" else {}
    expected = module(pixel_values=pixels, output_hidden_states=True, **options).hidden_states
    if expected is None:
        pytest.skip("this version of transformers records them around the tower only")
    with token_reduction(model, "ours", budget=1.0):
        states = module(pixel_values=pixels, output_hidden_states=True).hidden_states
    for found, wanted in zip(states[:-1], expected[:-1], strict=True):
        close(found, wanted)
    tied = (states[-1] - expected[-1]).abs().max() > 1e-5  # older versions put the normed one last
    close(tower.finish(states[-1]) if tied else states[-1], expected[-1])
    with token_reduction(model, "ours", budget=0.6):
        out = module(pixel_values=pixels, output_hidden_states=True)
        assert module(pixel_values=pixels).hidden_states is None
    assert [x.shape for x in out.hidden_states] == [x.shape for x in expected]
    close(out.hidden_states[0], expected[0])  # nothing has merged yet, and patches are in the order of the image
    reducer = reducer_for_budget("ours", 0.6, model, cls_only_last=False)
    assert encoder_macs(model, reducer) <= 0.6 * encoder_macs(model)
    tokens = run_encoder(tower, pixels, reducer, trace=True)
    close(out.hidden_states[-1], torch.stack([x[owner] for x, owner in zip(tokens.x, tokens.owner, strict=True)]))


@pytest.mark.parametrize("wanted, words", [
    (dict(output_attentions=True), "output_attentions"), (dict(attention_mask=torch.ones(3, 65)), "attention_mask"),
    (dict(output_hidden_states=[1]), "output_hidden_states=.1. is not allowed; allowed: True or False"), ({}, "pixel_values=None")])
def test_what_is_not_available_inside_is_one_line(clip, pixels, wanted, words):
    with token_reduction(clip, "ours", budget=0.6), pytest.raises(ValueError, match=words) as error:
        clip.vision_model(**(dict(wanted, pixel_values=pixels) if wanted else dict(pixel_values=None)))
    one_line(error)


@pytest.mark.parametrize("name", ["timm's ViT", "OpenCLIP"])
def test_whole_layers_of_other_libraries_are_refused(name, pixels):
    model = build(name)
    with token_reduction(model, "ours", budget=0.6), pytest.raises(ValueError, match="intermediate layers are not available"):
        model.forward_intermediates(pixels)
    assert len(model.forward_intermediates(pixels)) == 2


def test_last_hidden_state_is_never_one_token_without_a_word(clip, pixels):
    """Every patch, or what was asked for by name, or None."""
    with token_reduction(clip, "ours", budget=0.6):
        out = clip.vision_model(pixels)
        assert out.last_hidden_state is None and out.pooler_output.isfinite().all()
        whole = clip(input_ids=torch.tensor([[0, 5, 1]]), pixel_values=pixels)
        assert whole.vision_model_output.last_hidden_state is None and whole.image_embeds.shape == (3, 24)
        assert clip.vision_model(pixels, return_dict=False)[0] is None, "the place of what is missing is not taken by the next"
    with token_reduction(clip, "ours", budget=0.6, patch_tokens=True):
        assert clip.vision_model(pixels).last_hidden_state.shape[1] == 65
    with token_reduction(clip, "ours", budget=0.6, patch_tokens=False):
        assert clip.vision_model(pixels).last_hidden_state is None, "the shortcut left one"
    with token_reduction(clip, "tome", budget=0.6, patch_tokens=False):
        assert 1 < clip.vision_model(pixels).last_hidden_state.shape[1] < 65
    for name in ("ChineseCLIP", "AltCLIP", "BLIP", "BLIP-2", "ViT", "DeiT", "DINOv2", "DINOv2 with registers", "DINOv3"):
        other = build(name)
        with token_reduction(other, "ours", budget=0.6):
            assert outputs(other, pixels)[0].shape[1] == 64 + make_tower(other).prefix


class MeanHead(transformers.ViTForImageClassification):
    """A head of one's own in a class that inherits the library's."""

    def forward(self, pixel_values, **_):
        return SimpleNamespace(logits=self.classifier(self.vit(pixel_values).last_hidden_state.mean(1)))


@pytest.mark.parametrize("name", ["ours", "tome", "cls_drop"])
def test_where_a_head_reads_the_cls_token_nobody_takes_it_for_all_tokens(name, pixels):
    head = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=5)).eval()
    reducer = reducer_for_budget(name, 0.6, head)
    first = make_tower(head).finish(run_encoder(make_tower(head), pixels, reducer).x[:, :1])
    with token_reduction(head, name, budget=0.6):
        last = head.vit(pixels).last_hidden_state
        close(last[:, :1], first)
        assert last.shape == (3, 65, 48) and last[:, 1:].isnan().all()
        close(head(pixels).logits, head.classifier(first[:, 0]))
    bare = head.vit  # without a pooler, and asked for no patches
    with token_reduction(bare, name, budget=0.6, patch_tokens=False, cls_only_last=True):
        assert bare(pixels).last_hidden_state.isfinite().sum() == 3 * 48


@pytest.mark.parametrize("kind", [MeanHead, type("ViTForImageClassification", (MeanHead,), {})])
def test_a_head_of_ones_own_gets_every_patch_whatever_its_name_is(kind, pixels):
    model = kind(transformers.ViTConfig(**VISION, num_labels=5)).eval()
    before = model(pixels).logits
    with token_reduction(model, "ours", budget=1.0):
        close(model(pixels).logits, before)
    plain = transformers.ViTForImageClassification(model.config).eval()
    patch(plain)
    with token_reduction(plain, "ours", budget=1.0):
        assert plain.vit(pixels).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_what_is_missing_in_an_output_keeps_its_place(name, pixels):
    model = build(name)
    with token_reduction(model, "ours", budget=0.6):
        for out in (model.get_image_features(pixel_values=pixels), model.vision_model(pixels)):
            assert out[1] is out.pooler_output and out[:1] == (None,) and len(out.to_tuple()) == 2 and out["pooler_output"] is out[1]
            with pytest.raises(ValueError, match="last_hidden_state=None is not allowed; allowed: pooler_output") as error:
                out[0]
            one_line(error)
        states = model.vision_model(pixels, output_hidden_states=True)
        assert states[2] is states.hidden_states and len(states.hidden_states) == 7


def test_a_budget_holds_with_hidden_states_too(clip, pixels):
    call = lambda **more: count_flops(lambda: clip.vision_model(pixels[:1], **more))
    whole = call()
    for size in (None, 64):
        with token_reduction(clip, "ours", budget=0.7, image_size=size):
            assert 0.65 < call(output_hidden_states=True) / whole <= 0.7 and 0.65 < call() / whole <= 0.7


class Around(torch.nn.Module):
    """A model with a model inside."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("around", [Around, torch.nn.DataParallel, lambda model: Around(Around(model))])
def test_a_model_inside_another_is_projected_by_its_own(around, clip, pixels):
    close(encode_images(around(clip), pixels), F.normalize(whole_call(clip, pixels), dim=-1))
    assert encoder_macs(around(clip)) == encoder_macs(clip)


def test_the_retrieval_model_of_blip_is_projected_as_it_does_itself(pixels):
    text = dict(TEXT, encoder_hidden_size=48, sep_token_id=2)
    model = transformers.BlipForImageTextRetrieval(transformers.BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=20)).eval()
    model.vision_model.post_layernorm.weight.normal_()
    expected = F.normalize(model.vision_proj(model.vision_model(pixels).last_hidden_state[:, 0]), dim=-1)
    close(encode_images(model, pixels), expected)
    assert encoder_macs(model) == encoder_macs(model.vision_model) + 48 * 20


@pytest.mark.parametrize("name", ["CLIP", "ViT", "BLIP", "DINOv2", "DINOv3", "SigLIP", "timm's ViT", "OpenCLIP"])
def test_dropout_of_any_attention_is_refused_while_it_trains(name, pixels):
    model = build(name)
    with token_reduction(model, Reducer()):
        part = make_tower(model).blocks[2].attentions()[-1]
        place = next(place for place in ("dropout", "dropout_prob", "attention_dropout", "attn_drop") if hasattr(part, place))
        setattr(part, place, torch.nn.Dropout(0.5) if isinstance(getattr(part, place), torch.nn.Module) else 0.5)
        if not isinstance(getattr(part, place), torch.nn.Module):
            whole_call(model, pixels)
        model.train()
        for use in (lambda: whole_call(model, pixels), lambda: encode_images(model, pixels)):
            with pytest.raises(ValueError, match="attention dropout=0.5"):
                use()


@pytest.mark.parametrize("wrong", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 4), torch.zeros(3, 64, 64).numpy(), None])
def test_what_is_no_batch_of_images_is_one_line(wrong, clip):
    calls = [lambda: encode_images(clip, wrong)]
    with token_reduction(clip, Reducer()):
        for call in [*calls, lambda: clip.get_image_features(pixel_values=wrong)]:
            with pytest.raises(ValueError, match="pixel_values=.* is not allowed; allowed: ") as error:
                call()
            one_line(error)


@pytest.mark.parametrize("wrong", ["ours", InputPruning, 0.5])
def test_what_is_no_reducer_is_one_line(wrong, clip, pixels):
    for call in (lambda: encode_images(clip, pixels, wrong), lambda: encoder_macs(clip, wrong), lambda: trace_encoder(clip, wrong)):
        with pytest.raises(TypeError, match="reducer=.* is not supported; supported: .*reducer_for_budget") as error:
            call()
        one_line(error)


def test_sizes_and_implementations_are_what_they_are_called(clip, pixels):
    assert encoder_macs(clip, None, np.int64(64)) == encoder_macs(clip) == encoder_macs(clip, None, (np.int64(64), 64))
    for call in (lambda: encoder_macs(clip, None, "64"), lambda: encoder_macs(clip, None, (64, 0)), lambda: encoder_macs(clip, None, 64.0)):
        with pytest.raises(ValueError, match="image_size=.* is not allowed; allowed: a whole number of pixels"):
            call()
    with pytest.raises(ValueError, match="implementation='flash' is not allowed; allowed: sdpa, eager"):
        encode_images(clip, pixels, implementation="flash")


def test_offloaded_weights_and_traces_are_refused_in_one_line(clip, pixels):
    with token_reduction(clip, "ours", budget=0.6), pytest.raises(ValueError, match="torch.jit.trace=.*torch.compile"):
        torch.jit.trace(lambda x: whole_call(clip, x), pixels, check_trace=False)
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(build("ViT"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weights='meta .offloaded.'") as error, token_reduction(offloaded, "ours", budget=0.6):
        pass
    one_line(error)


@pytest.mark.parametrize("name", ["CLIP", "DINOv2", "DINOv3", "BLIP", "EVA-CLIP", "EVA-02-CLIP", "OpenCLIP"])
def test_autocast_stays_close(name, pixels):
    model = build(name)
    with token_reduction(model, "ours", budget=0.6):
        plain = whole_call(model, pixels)
        plain = plain if isinstance(plain, torch.Tensor) else plain[1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = whole_call(model, pixels)
            half = half if isinstance(half, torch.Tensor) else half[1]
    assert half.isfinite().all() and F.cosine_similarity(half.float(), plain).min() > 0.97


def gradient(model, pixels):
    """Of the mean of the pooled output, at all parameters that it reaches."""
    model.zero_grad()
    with torch.enable_grad():
        outputs(model, pixels)[1].mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "BLIP", "DINOv2", "DINOv3", "EVA-CLIP", "EVA-02-CLIP", "OpenCLIP"])
def test_gradients_flow_through_the_reducer(name, pixels):
    model = build(name)
    dense = gradient(model, pixels)
    with token_reduction(model, "ours", budget=1.0):
        whole = gradient(model, pixels)
    for place, expected in dense.items():
        close(whole[place], expected, 1e-5 + 1e-3 * float(expected.abs().max()))
    with token_reduction(model, "ours", budget=0.6):
        reduced = gradient(model, pixels)
    assert set(reduced) == set(dense) and all(g.isfinite().all() for g in reduced.values())
    first = next(g for place, g in reduced.items() if any(word in place for word in ("patch_embed", "projection.weight", "conv1")))
    assert first.abs().max() > 0


def test_training_inside_learns_and_dropout_that_would_be_left_out_is_refused(pixels):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3)).train()
    labels, optimizer, losses = torch.arange(3), torch.optim.Adam(model.parameters(), 1e-3), []
    with token_reduction(model, "ours", budget=0.6), torch.enable_grad():
        for _ in range(8):
            losses.append(model(pixels, labels=labels).loss)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
    assert losses[-1] < losses[0] / 2
    model = transformers.ViTModel(transformers.ViTConfig(**VISION, attention_probs_dropout_prob=0.1)).eval()
    with token_reduction(model, "ours", budget=0.6):
        model(pixels)
        model.train()
        with pytest.raises(ValueError, match="attention dropout=0.1 is not allowed; allowed: 0 in training"):
            model(pixels)


def test_dropout_and_stochastic_depth_of_a_branch_are_the_librarys(pixels):
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, image_size=64, patch_size=8,
                                       drop_path_rate=0.5, hidden_dropout_prob=0.2)
    model = transformers.Dinov2Model(config).train()
    found = []
    for inside in (False, True):
        torch.manual_seed(3)
        if inside:
            with token_reduction(model, "ours", budget=1.0):
                found.append(model(pixels).last_hidden_state)
        else:
            found.append(model(pixels).last_hidden_state)
    close(*found)


def test_a_compiled_model_is_reduced_inside_only(pixels):
    model = transformers.ViTModel(transformers.ViTConfig(**dict(VISION, num_hidden_layers=2))).eval()
    compiled, before = torch.compile(model, backend="eager"), model(pixels).pooler_output
    close(compiled(pixels).pooler_output, before)
    with token_reduction(compiled, "ours", budget=0.7):
        inside = model(pixels).pooler_output
        close(compiled(pixels).pooler_output, inside)
    assert (inside - before).abs().max() > 1e-4
    close(compiled(pixels).pooler_output, before)
    small = dict(pixel_values=pixels[..., :32, :32], interpolate_pos_encoding=True)
    for size in (None, 32):
        with token_reduction(compiled, "ours", budget=0.7, image_size=size):
            twice = [compiled(**small).pooler_output for _ in range(2)]
            close(model(**small).pooler_output, twice[0])
            close(twice[1], twice[0])


def test_threads_share_a_reduced_model(clip, pixels):
    """One of them ends its block while the others are in theirs; all get what they would get alone."""
    batches = [pixels * (i + 1) for i in range(4)]
    dense = [whole_call(clip, x) for x in batches]
    with token_reduction(clip, "cls_merge", budget=0.6):
        alone = [whole_call(clip, x) for x in batches]
        found, waiting = [None] * 4, threading.Barrier(4)

        def work(i):
            with torch.no_grad():
                waiting.wait()
                for _ in range(3):
                    found[i] = whole_call(clip, batches[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for call in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                call(thread)
        for a, b in zip(found, alone, strict=True):
            close(a, b, 1e-6)
    assert all(torch.equal(whole_call(clip, x), y) for x, y in zip(batches, dense, strict=True))


def test_blocks_that_overlap_may_end_in_any_order(clip, pixels):
    before = whole_call(clip, pixels)
    half, third = (token_reduction(clip, InputPruning(keep)) for keep in (0.5, 0.3))
    half.__enter__()
    third.__enter__()
    inside = whole_call(clip, pixels)
    half.__exit__(None, None, None)
    assert torch.equal(whole_call(clip, pixels), inside)
    third.__exit__(None, None, None)
    assert torch.equal(whole_call(clip, pixels), before) and "forward" not in vars(clip.vision_model)


def test_copies_and_saved_models_are_whole(clip, pixels, tmp_path):
    before = whole_call(clip, pixels)
    with token_reduction(clip, "ours", budget=0.6):
        inside, twin = whole_call(clip, pixels), copy.deepcopy(clip)
        clip.save_pretrained(tmp_path)
        assert pickle.dumps(clip)
        assert torch.equal(whole_call(twin, pixels), before) and torch.equal(whole_call(clip, pixels), inside)
        for p in clip.vision_model.parameters():
            p.mul_(0.9)
        assert torch.equal(whole_call(twin, pixels), before), "a copy has weights of its own"
    with token_reduction(twin, "ours", budget=0.6):
        close(whole_call(twin, pixels), inside)
    assert torch.equal(whole_call(twin, pixels), before)
    loaded = transformers.CLIPModel.from_pretrained(tmp_path, use_safetensors=True).eval()
    close(whole_call(loaded, pixels), before)


@pytest.mark.parametrize("name", ["CLIP", "BLIP", "timm's ViT"])
def test_hooks_that_would_not_run_are_refused_and_others_run(name, pixels):
    model = build(name)
    module, seen = find_vision_module(model)[0], []
    layer = (module.blocks if name in OTHERS else module.encoder.layers)[0]
    handle = layer.register_forward_hook(lambda *_: seen.append("layer"))
    with pytest.raises(ValueError, match="hooks on=.*layers.0|hooks on=.*blocks.0") as error:
        with token_reduction(model, "ours", budget=0.6):
            pass
    one_line(error)
    handle.remove()
    with token_reduction(model, "ours", budget=0.6):
        module.register_forward_hook(lambda *_: seen.append("tower"))
        layer.mlp.fc1.register_forward_hook(lambda *_: seen.append("linear"))
        whole_call(model, pixels)
        layer.register_forward_pre_hook(lambda *_: None)
        with pytest.raises(ValueError, match="hooks on"):
            whole_call(model, pixels)
    assert "linear" in seen and "layer" not in seen


def test_hooks_of_transformers_itself_are_no_hindrance(clip, pixels):
    clip.vision_model(pixels, output_hidden_states=True)  # it leaves hooks on the layers
    with token_reduction(clip, "ours", budget=0.6):
        assert whole_call(clip, pixels).isfinite().all()


def test_a_trace_of_a_smaller_image_still_finds_its_grid(pixels):
    """DINOv2's positions fit any size, asked for or not."""
    model = build("DINOv2")
    small = pixels[..., :48, :56]
    close(encode_images(model, small), F.normalize(model(small).pooler_output, dim=-1))
    assert trace_encoder(model, InputPruning(0.5), small).grid == (6, 7)


def test_a_shortcut_asked_for_where_patches_are_read_is_refused(pixels):
    with pytest.raises(ValueError, match="cls_only_last=True is not allowed; allowed: .*patch_tokens=False") as error:
        with token_reduction(build("ViT"), "ours", budget=0.6, cls_only_last=True):
            pass
    one_line(error)
    with token_reduction(build("ViT"), "ours", budget=0.6, cls_only_last=True, patch_tokens=False) as model:
        assert model(pixels).pooler_output.isfinite().all()


def scaled(module):
    module.self_attn.scale *= 2


def another_forward(module):
    module.forward = lambda x, *args, **kwargs: x


class Silent(transformers.models.clip.modeling_clip.CLIPEncoderLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@pytest.mark.parametrize("change, words", [
    (scaled, "scale="), (another_forward, "forward of its own"), (lambda layer: setattr(layer, "__class__", Silent), "Silent with a forward"),
    (lambda layer: another_forward(layer.self_attn), "forward of its own")])
def test_a_layer_that_computes_something_else_is_refused(clip, pixels, change, words):
    change(find_vision_module(clip)[0].encoder.layers[2])
    with pytest.raises(TypeError, match="layer.* ?2.*" + words):
        encode_images(clip, pixels)


def hooked_by_accelerate(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def hooked_and_freed(layer):
    hooked_by_accelerate(layer)
    pytest.importorskip("accelerate.hooks").remove_hook_from_module(layer)


def compiled_forward(layer):
    layer.forward = torch.compile(layer.forward, backend="eager")


@pytest.mark.parametrize("change", [hooked_by_accelerate, hooked_and_freed, compiled_forward, lambda layer: layer.compile(backend="eager")])
def test_a_layer_that_computes_the_same_in_another_way_is_taken(clip, pixels, change):
    right = encode_images(clip, pixels)
    change(find_vision_module(clip)[0].encoder.layers[2])
    close(encode_images(clip, pixels), right)


def elsewhere(module, whole):
    """As of a copy of the library's file, which inherits nothing of it, or only of a class that does."""
    module.__class__ = type(type(module).__name__, (torch.nn.Module if whole else type(module),), dict(forward=Silent.forward, __module__=Silent.__module__))


def test_a_whole_copy_of_a_librarys_file_is_taken_a_class_from_elsewhere_is_not(clip, pixels):
    module, right = find_vision_module(clip)[0], encode_images(clip, pixels)
    layer, kind = module.encoder.layers[2], type(module.encoder.layers[2])

    def refused(whole):
        elsewhere(layer, whole)
        with pytest.raises(TypeError, match="layers.2: CLIPEncoderLayer with a forward of its own"):
            make_tower(clip)
        layer.__class__ = kind

    refused(whole=False), refused(whole=True)
    elsewhere(module, whole=True)
    close(encode_images(clip, pixels), right)
    refused(whole=False)
    elsewhere(layer, whole=True)
    close(encode_images(clip, pixels), right)


def mean_of(out):
    out.pooler_output = out.last_hidden_state.mean(1)
    return out


def inherit(module, method="forward", change=lambda out: out):
    """As by a subclass that calls the library's method and changes what comes of it."""
    own = lambda self, *args, **kwargs: change(getattr(super(type(self), self), method)(*args, **kwargs))
    module.__class__ = type(type(module).__name__, (type(module),), {method: own, "__module__": Silent.__module__})


def patch(module, method="forward", change=lambda out: out):
    before = getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: change(before(*args, **kwargs)))


@pytest.mark.parametrize("own", [inherit, patch])
@pytest.mark.parametrize("name, place, method", [
    ("ViT", "", "forward"), ("CLIP", "vision_model", "forward"), ("CLIP", "vision_model.encoder", "forward"), ("SigLIP", "vision_model.head", "forward"),
    ("DINOv2", "", "forward"), ("timm's ViT", "", "forward_features"), ("timm's ViT", "", "forward_head"), ("OpenCLIP", "transformer", "forward")])
def test_a_tower_an_encoder_or_a_head_with_a_forward_of_its_own_is_refused(name, place, method, own, pixels):
    model = build(name)
    own(model.get_submodule(place), method)
    for use in (lambda: encode_images(model, pixels), token_reduction(model, Reducer()).__enter__):
        with pytest.raises(TypeError, match=f"with a {method} of its own is not supported") as error:
            use()
        one_line(error)


def test_layers_and_a_tower_of_ones_own_file_that_inherit_the_librarys_are_refused(clip):
    inherit(clip.vision_model, change=mean_of)
    clip.vision_model.encoder.layers[1].__class__ = Silent
    with pytest.raises(TypeError, match="layers.1: Silent with a forward of its own"):
        make_tower(clip)


def test_a_librarys_class_that_was_patched_is_refused(clip, monkeypatch):
    monkeypatch.setattr(type(clip.vision_model.encoder), "forward", lambda self, inputs_embeds, **_: None)
    with pytest.raises(TypeError, match="encoder: CLIPEncoder with a forward of its own"):
        make_tower(clip)
    monkeypatch.undo()
    make_tower(clip)


def test_what_is_patched_inside_is_refused_not_left_out(clip, pixels):
    with token_reduction(clip, Reducer()):
        patch(clip.vision_model.encoder)
        with pytest.raises(ValueError, match="modules patched=.'encoder'"):
            whole_call(clip, pixels)


def test_softmax_attention_of_ones_own_says_so_itself(clip, pixels):
    """plain_attention counts for the class that writes it, not for those that inherit it."""
    attention, right = clip.vision_model.encoder.layers[1].self_attn, encode_images(clip, pixels)
    inherit(attention)
    with pytest.raises(TypeError, match="plain_attention = True in its class"):
        make_tower(clip)
    type(attention).plain_attention = True
    attention.__class__ = type("Plain", (type(attention),), {})
    close(encode_images(clip, pixels), right)
    inherit(attention)
    with pytest.raises(TypeError, match="with a forward of its own"):
        make_tower(clip)


def test_a_registered_attention_is_refused_also_under_a_known_name(clip, pixels, monkeypatch):
    registry = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    own = lambda module, q, k, v, mask, scaling=None, **_: (torch.softmax(4 * scaling * q @ k.mT, -1) @ v).transpose(1, 2).contiguous()
    right = whole_call(clip, pixels)
    for name in ("sharp", "sdpa"):
        monkeypatch.setitem(registry._local_mapping, name, own)
        clip.vision_model.config._attn_implementation = name
        with pytest.raises(TypeError, match=f"attn_implementation='{name}' is not supported") as error:
            encode_images(clip, pixels)
        one_line(error)
        monkeypatch.undo()
        clip.vision_model.config._attn_implementation = "eager"
        with token_reduction(clip, Reducer()):
            close(whole_call(clip, pixels), right)
            monkeypatch.setitem(registry._local_mapping, name, own)
            clip.vision_model.config._attn_implementation = name
            with pytest.raises(TypeError, match="attn_implementation"):
                whole_call(clip, pixels)


def test_the_head_of_a_timm_model_may_change_inside(pixels):
    model = build("timm's ViT")
    with token_reduction(model, Reducer()):
        model.reset_classifier(3)
        assert model(pixels).shape == (3, 3)


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "CLIP"])
def test_fewer_heads_than_the_configuration_says_are_refused(name, pixels):
    model = build(name)
    module = find_vision_module(model)[0]
    blocks = make_tower(model).blocks
    width = blocks[0].q.out_features // 3
    for block in blocks:
        for part in (block.q, block.k, block.v):
            part.weight.data, part.bias.data, part.out_features = part.weight.data[:width], part.bias.data[:width], width
        attention = getattr(block.attention, "attention", block.attention)
        if hasattr(attention, "num_attention_heads"):
            attention.num_attention_heads = 1
    assert module.config.num_attention_heads == 3
    with pytest.raises(TypeError, match="layer 0 with .* heads"), token_reduction(model, Reducer()):
        pass


def test_modules_that_are_replaced_inside_are_refused_not_left_out(clip, pixels):
    module = find_vision_module(clip)[0]
    attention, outside = module.encoder.layers[1].self_attn, clip.get_image_features(pixel_values=pixels)
    for path in ("self_attn", "mlp"):
        with token_reduction(clip, Reducer()):
            before = getattr(module.encoder.layers[1], path)
            setattr(module.encoder.layers[1], path, copy.deepcopy(before))
            with pytest.raises(ValueError, match=f"modules replaced=.'{path}'"):
                clip.get_image_features(pixel_values=pixels)
            setattr(module.encoder.layers[1], path, before)
    attention.q_proj = torch.nn.Sequential(attention.q_proj)
    with token_reduction(clip, Reducer()):
        close(clip.get_image_features(pixel_values=pixels).pooler_output, outside.pooler_output)


def without_last(layers):
    del layers[-1]


@pytest.mark.parametrize("change", [
    lambda tower: setattr(tower.encoder, "layers", torch.nn.ModuleList(list(tower.encoder.layers)[:2])),
    lambda tower: setattr(tower, "encoder", copy.deepcopy(tower.encoder)), lambda tower: tower.encoder.layers.append(copy.deepcopy(tower.encoder.layers[0])),
    lambda tower: tower.encoder.layers.insert(0, tower.encoder.layers[1]), lambda tower: without_last(tower.encoder.layers),
    lambda tower: tower.encoder.layers.__setitem__(1, tower.encoder.layers[0]), lambda tower: setattr(tower, "post_layernorm", torch.nn.Identity())])
def test_containers_of_layers_that_change_inside_are_refused(clip, pixels, change):
    with token_reduction(clip, Reducer()):
        whole_call(clip, pixels)
        change(clip.vision_model)
        with pytest.raises(ValueError, match="modules replaced=.*would not be called") as error:
            whole_call(clip, pixels)
        one_line(error)


def test_a_projection_whose_weight_is_read_cannot_be_replaced_inside(pixels):
    model = build("BLIP")
    attention = find_vision_module(model)[0].encoder.layers[1].self_attn
    with token_reduction(model, Reducer()):
        attention.qkv = copy.deepcopy(attention.qkv)
        with pytest.raises(ValueError, match="modules replaced=.'qkv'"):
            whole_call(model, pixels)


def test_layers_called_one_by_one_are_refused_and_are_what_they_were_afterwards(model, pixels):
    tower = make_tower(model)
    parts = [part for block in tower.blocks for part in (block.layer, *block.attentions())]
    before = [vars(part).get("forward") for part in parts]
    with token_reduction(model, Reducer()):
        for part in parts:
            with pytest.raises(ValueError, match="call of='.*[0-9].*' is not allowed; allowed: the whole model or its vision tower") as error:
                part(torch.zeros(1, 5, tower.patch.out_channels))
            one_line(error)
        whole_call(copy.deepcopy(model), pixels)
    assert [vars(part).get("forward") for part in parts] == before


def test_a_loop_of_ones_own_inside_is_an_error_also_if_a_layer_is_compiled(clip, pixels):
    vision, loop = clip.vision_model, lambda x: [x := layer(x, attention_mask=None) for layer in vision.encoder.layers][-1]
    vision.encoder.layers[0].compile(backend="eager")
    vision.encoder.layers[1] = torch.compile(vision.encoder.layers[1], backend="eager")
    before = loop(vision.embeddings(pixels))
    for calls in (lambda: loop(vision.embeddings(pixels)), lambda: vision.encoder(inputs_embeds=vision.embeddings(pixels))):
        with token_reduction(clip, "ours", budget=0.6), pytest.raises(ValueError, match="call of='encoder.layers.0"):
            calls()
    assert torch.equal(loop(vision.embeddings(pixels)), before)


def broken(clip, pixels):
    with pytest.raises(ValueError):
        clip.vision_model(pixels, output_attentions=True)


def replaced_whole(clip, pixels):
    whole_call(clip, pixels)
    clip.vision_model = copy.deepcopy(clip.vision_model)


@pytest.mark.parametrize("inside, said", [
    (lambda clip, x: None, "no forward was reduced"), (lambda clip, x: clip.vision_model.embeddings(x), "no forward was reduced"),
    (encode_images, "no forward was reduced"), (lambda clip, x: whole_call(copy.deepcopy(clip), x), "no forward was reduced"),
    (replaced_whole, "the vision tower was replaced"), (whole_call, None), (broken, None)])
def test_a_block_in_which_nothing_was_reduced_says_so(clip, pixels, inside, said):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with token_reduction(clip, "ours", budget=0.6):
            inside(clip, pixels)
    found = [str(one.message) for one in found if "token_reduction" in str(one.message)]
    assert len(found) == (said is not None) and all(said in words and "CLIPModel" in words and "\n" not in words for words in found)


@pytest.mark.filterwarnings("error")
def test_where_nothing_had_to_be_reduced_or_the_block_raised_nothing_is_said(clip, pixels):
    for arguments in (("ours", 1.0), ("tome", 1), ("ours", 0.99), (InputPruning(1.0),), (Reducer(),)):
        with token_reduction(clip, *arguments):
            pass
    with pytest.raises(ZeroDivisionError), token_reduction(clip, "ours", 0.6):
        raise ZeroDivisionError
    with token_reduction(clip, InputPruning(0.5)), token_reduction(clip, InputPruning(0.3)):  # the inner one is called
        whole_call(clip, pixels)


TOLD = [("is_causal", True), ("sliding_window", 4), ("num_key_value_groups", 3), ("sinks", torch.zeros(3)), ("scaling", torch.ones(1)), ("scale", 1)]


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "BLIP", "ViT", "DINOv2", "DINOv3", "timm's ViT", "EVA-02-CLIP", "OpenCLIP"])
def test_attention_that_is_told_something_else_is_refused_before_and_inside(name, pixels):
    model = build(name)
    attention = make_tower(model).blocks[1].attentions()[-1]
    for setting, value in [*TOLD, *([("num_prefix_tokens", 0)] if name == "EVA-02-CLIP" else [])]:
        before = vars(attention).get(setting, "none")
        tell = lambda value, setting=setting: delattr(attention, setting) if isinstance(value, str) else setattr(attention, setting, value)
        with token_reduction(model, Reducer()):
            whole_call(model, pixels)
            tell(value)
            with pytest.raises(TypeError, match=f"layer 1 with {setting}=.* is not supported; supported: ") as error:
                whole_call(model, pixels)
        one_line(error)
        with pytest.raises(TypeError, match=f"layer 1 with {setting}="):
            encode_images(model, pixels)
        tell(before)
        assert encode_images(model, pixels).isfinite().all()


def test_a_part_that_stands_in_for_an_attention_is_one_clear_line(clip, pixels):
    find_vision_module(clip)[0].encoder.layers[0].self_attn = torch.nn.Identity()
    with pytest.raises(TypeError, match="not as its library builds it: .*q_proj"):
        encode_images(clip, pixels)


@pytest.mark.parametrize("wrong", [None, "CLIP", 3])
def test_what_is_no_model_is_named(wrong):
    with pytest.raises(TypeError, match="model=.* is not supported; supported: CLIP"):
        make_tower(wrong)


def test_quantised_layers_are_counted_like_whole_ones(clip):
    linear = {torch.nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(clip), linear)
    assert encoder_macs(quantised) == encoder_macs(clip)


def test_layer_scale_is_read_at_every_call(pixels):
    eva = build("EVA-CLIP")
    with token_reduction(eva, Reducer()):
        for block in eva.blocks:
            block.gamma_1 = torch.nn.Parameter(3 * block.gamma_1)
        inside = eva(pixels)
    close(inside, eva(pixels))


def test_tracing_leaves_running_statistics_alone(pixels):
    model = build("MobileCLIP-B").train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    trace_encoder(model)
    encoder_macs(model, reducer_for_budget("ours", 0.7, model))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers()) and all(part.training for part in model.modules())


def test_dropout_in_attention_is_refused_by_encode_images(clip, pixels):
    find_vision_module(clip)[0].config.attention_dropout = 0.5
    encode_images(clip, pixels)
    with pytest.raises(ValueError, match="attention dropout=0.5"):
        encode_images(clip.train(), pixels)
