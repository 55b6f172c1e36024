"""The encoder loop, the original pruning, budgets, and `token_reduction` around unmodified models, on tiny random ones."""

import math

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from effarch.bench import count_flops
from effarch.clip.images import Images
from effarch.clip.towers import make_tower
from effarch.clip.zero_shot import image_features
from effarch.token_reduction import REDUCERS, reducer_for_budget, token_reduction
from effarch.token_reduction.encoder import (
    InputPruning,
    Reducer,
    Tokens,
    append,
    attention_step,
    continue_encoder,
    encode_images,
    encoder_macs,
    fit_budget,
    fit_summary,
    importance,
    kept_count,
    mlp_step,
    naive_pruned_features,
    read_out,
    run_encoder,
    select_images,
    start_encoder,
    strength_at,
    take,
    trace_encoder,
)

VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=3, image_size=64,
              patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
            bos_token_id=0, eos_token_id=1, pad_token_id=1)
FAMILIES = {
    "CLIP": lambda t: t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)),
    "CLIP of 12 layers": lambda t: t.CLIPModel(
        t.CLIPConfig(vision_config=dict(VISION, num_hidden_layers=12), text_config=TEXT, projection_dim=24)),
    "SigLIP": lambda t: t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=TEXT)),
    "SigLIP without head": lambda t: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION, vision_use_head=False)),
    "ViT": lambda t: t.ViTModel(t.ViTConfig(**VISION)),
    "ViT classifier": lambda t: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=5)),
    "CLIP classifier": lambda t: t.CLIPForImageClassification(
        t.CLIPConfig(vision_config=VISION, text_config=TEXT, num_labels=5)),
    "SigLIP classifier": lambda t: t.SiglipForImageClassification(
        t.SiglipConfig(vision_config=VISION, text_config=TEXT, num_labels=5)),
}


def build(family):
    """A tiny random model of a family, its weights made large enough that layers matter."""
    torch.manual_seed(0)
    model = FAMILIES[family](transformers)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(2)
    return model.eval()


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


def library_feature(model, pixels):
    """The feature by transformers' own call, normalised."""
    out = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def close(a, b, limit=1e-5):
    assert (a - b).abs().max() < limit, (a - b).abs().max().item()


# the loop


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_loop_is_the_model(model, pixels, implementation):
    close(encode_images(model, pixels, implementation=implementation), library_feature(model, pixels))


def test_a_loop_in_two_parts_is_the_whole_loop(model, pixels):
    tower = make_tower(model)
    for first in (0, 2, 6):
        start = start_encoder(tower, pixels, first)
        assert start.layer == first - 1 and len(start.counts) == first
        end = continue_encoder(tower, start, None, first)
        assert end.counts == run_encoder(tower, pixels).counts and end.macs == run_encoder(tower, pixels).macs
        assert torch.equal(read_out(model, tower, end), encode_images(model, pixels))


def test_images_taken_out_half_way_are_as_if_alone(model, pixels):
    """After a summary token with a size of its own; the start stays as it was."""
    tower = make_tower(model)
    start = start_encoder(tower, pixels, 0, InputPruning(0.5, "mean"), trace=True)
    start.sizes = torch.ones(start.x.shape[:2])
    start.sizes[1] = 2.0
    part = select_images(start, torch.tensor([1]))
    assert part.x.shape[0] == part.sizes.shape[0] == part.owner.shape[0] == 1 and part.sizes.unique().tolist() == [2.0]
    together = read_out(model, tower, continue_encoder(tower, start, None, 0))
    close(read_out(model, tower, continue_encoder(tower, part, None, 0)), together[1:2])


def test_macs_and_counts_of_a_continued_start_do_not_leak(clip, pixels):
    tower = make_tower(clip)
    start = start_encoder(tower, pixels, 2)
    before = (start.macs, list(start.counts), start.x.clone())
    continue_encoder(tower, select_images(start, slice(None)), InputPruning(1.0), 2)
    assert (start.macs, start.counts) == before[:2] and torch.equal(start.x, before[2])


def test_one_token_of_size_two_is_two_identical_tokens(model, pixels):
    tower = make_tower(model)
    x, p = tower.pre_norm(tower.embed(pixels)), tower.prefix
    twice = Tokens(torch.cat([x, x[:, p:]], 1), pixels, p, 6)
    once = Tokens(x.clone(), pixels, p, 6, sizes=torch.full(x.shape[:2], 2.0))
    once.sizes[:, :p] = 1
    for block in tower.blocks:
        for tokens in (twice, once):
            attention_step(tokens, block, tower.heads)
            mlp_step(tokens, block)
    largest = once.x.abs().max()
    close(twice.x[:, : x.shape[1]] / largest, once.x / largest, 2e-5)
    close(tower.pool(twice.x, None), tower.pool(once.x, once.sizes), 1e-4)


def test_cheap_importance_is_the_attention_map(clip, pixels):
    seen = {}

    class Spy(Reducer):
        def after_attention(self, tokens):
            seen[tokens.layer] = importance(tokens)

    encode_images(clip, pixels, Spy())
    clip.set_attn_implementation("eager")
    maps = clip.vision_model(pixels, output_attentions=True).attentions
    clip.set_attn_implementation("sdpa")
    for layer, attention in enumerate(maps):
        close(seen[layer], attention.mean(1)[:, 0, 1:], 1e-6)


@pytest.mark.parametrize("shape", [(96, 96), (96, 64), (64, 96), (70, 66)])
def test_other_image_sizes_also_oblong_and_no_multiple_of_the_patch(model, shape):
    pixels = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    call = getattr(model, "get_image_features", model)
    out = call(pixels, interpolate_pos_encoding=True)
    close(encode_images(model, pixels), F.normalize(getattr(out, "pooler_output", out), dim=-1))
    tokens = trace_encoder(model, InputPruning(0.5), pixels)
    assert tokens.grid == (shape[0] // 8, shape[1] // 8) and tokens.first == tokens.prefix + math.prod(tokens.grid) // 2


def test_an_unsupported_model_is_named():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    with pytest.raises(TypeError, match="BertModel is not supported; supported: CLIP, .*ViT"):
        encode_images(transformers.BertModel(config), torch.zeros(1, 3, 8, 8))


# the original rule


def test_fast_pruning_equals_the_naive_loop(clip, pixels):
    for keep in (1.0, 0.5, 0.1):
        close(encode_images(clip, pixels, InputPruning(keep)), naive_pruned_features(clip, pixels, keep))


@pytest.mark.parametrize("rest", ["drop", "mean", "learned"])
def test_keeping_all_changes_nothing_and_each_image_is_for_itself(model, pixels, rest):
    close(encode_images(model, pixels, InputPruning(1.0, rest)), library_feature(model, pixels))
    reducer = InputPruning(0.4, rest)
    together = encode_images(model, pixels, reducer)
    close(torch.cat([encode_images(model, image[None], reducer) for image in pixels]), together, 1e-4)
    assert torch.equal(encode_images(model, pixels, reducer), together), "the second call is as the first"


@pytest.mark.parametrize("lowest", [False, True])
def test_the_largest_or_the_smallest_norms_stay(clip, pixels, lowest):
    norms = make_tower(clip).embed(pixels)[:, 1:].norm(dim=-1)
    for keep, left in ((0.5, 32), (0.1, 7), (0.001, 1)):
        tokens = trace_encoder(clip, InputPruning(keep, lowest=lowest), pixels)
        expected = norms.topk(left, dim=1, largest=not lowest).indices.sort(1).values
        stay = [(owner >= 0).nonzero()[:, 0].tolist() for owner in tokens.owner[:, 1:]]
        assert stay == expected.tolist() and tokens.counts[0][0] == 1 + left
        assert trace_encoder(clip, InputPruning(keep, "mean"), pixels).counts[0][0] == 2 + left


def test_the_summary_is_the_mean_of_what_left_plus_the_offset(clip, pixels):
    tower, offset = make_tower(clip), torch.arange(48.0)
    x = tower.embed(pixels)
    tokens = start_encoder(tower, pixels, 0, InputPruning(0.5, "learned", offset), trace=True)
    gone = tokens.owner[:, 1:] < 0
    mean = torch.stack([x[i, 1:][gone[i]].mean(0) for i in range(3)])
    close(tokens.x[:, -1], tower.pre_norm(mean + offset), 1e-4)


def test_pruning_does_not_care_about_the_order_of_patches(clip, pixels):
    tower = make_tower(clip)
    x = tower.embed(pixels)
    order = torch.cat([torch.tensor([0]), torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1])
    results = []
    for y in (x, x[:, order]):
        tokens = Tokens(y.clone(), pixels, 1, 6)
        InputPruning(0.5).at_input(tokens)
        attention_step(tokens, tower.blocks[0], tower.heads)
        results.append(tokens.x[:, 0])
    close(*results)


def test_fitting_the_summary_helps_on_its_images_and_leaves_the_model_alone(clip):
    raw = torch.randint(0, 256, (16, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, before = Images(raw, None, [], "noise"), [p.requires_grad for p in clip.parameters()]
    features = lambda reducer: image_features(lambda x: encode_images(clip, x, reducer), images)
    dense = features(None)
    offset = fit_summary(clip, images, dense, 0.3, steps=12)
    assert torch.equal(offset, fit_summary(clip, images, dense, 0.3, steps=12)), "the same on any machine"
    assert [p.requires_grad for p in clip.parameters()] == before and not offset.requires_grad
    cosine = [(features(InputPruning(0.3, rest, o)) * dense).sum(-1).mean() for rest, o in (("mean", None), ("learned", offset))]
    assert cosine[1] > cosine[0]


def test_a_summary_whose_fit_breaks_off_leaves_the_model_as_it_was(clip):
    class Pictures:
        def __len__(self):
            return 6

        def batch(self, index, device):
            return torch.zeros(len(index), 3, 64, 64)

    before = [p.requires_grad for p in clip.parameters()]
    with pytest.raises(IndexError):
        fit_summary(clip, Pictures(), torch.randn(3, 24), 0.5, 5)
    assert [p.requires_grad for p in clip.parameters()] == before and any(before)


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, True, None, "half", float("nan")])
def test_bad_keep_ratios_and_rests_are_refused(keep):
    with pytest.raises(ValueError, match="keep ratio"):
        InputPruning(keep)
    with pytest.raises(ValueError, match="rest='x' is not allowed; allowed: drop, mean, learned"):
        InputPruning(0.5, "x")


def test_kept_counts_are_exact_where_floats_are_not():
    assert kept_count(0.07, 100) == 7 and kept_count(0.071, 100) == 8 and kept_count(1e-9, 5) == 1 and kept_count(1.0, 5) == 5
    for n in (64, 196, 1024):
        assert all(kept_count(count / n, n) == count for count in range(1, n + 1))


# half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", ["drop", "mean"])
def test_half_precision_sums_and_scores_in_float32(dtype, rest):
    """Embeddings whose sum over the patches exceeds what half precision holds, with norms that round to one value."""
    x = 1000 + 0.25 * torch.randn(2, 65, 8, generator=torch.Generator().manual_seed(0))
    exact, found = Tokens(x.to(dtype).float(), None, 1, 6), Tokens(x.to(dtype), None, 1, 6)
    for tokens in (exact, found):
        InputPruning(0.5, rest).at_input(tokens)
    assert found.x.dtype == dtype and found.x.isfinite().all()
    close(found.x.float(), exact.x, 1000 * torch.finfo(dtype).eps)
    assert InputPruning(0.5).scores(found).dtype == torch.float32


def test_a_size_appended_in_half_precision_is_exact():
    tokens = Tokens(torch.zeros(2, 3, 4, dtype=torch.bfloat16), None, 1, 6)
    append(tokens, torch.zeros(2, 4), torch.tensor([257.0, 1001.0]))
    assert tokens.sizes[:, -1].tolist() == [257, 1001] and tokens.x.dtype == torch.bfloat16


def test_a_bfloat16_model_stays_close(pixels):
    reducer, half = InputPruning(0.5, "mean"), build("CLIP").to(torch.bfloat16)
    found = encode_images(half, pixels.bfloat16(), reducer)
    assert found.dtype == torch.bfloat16
    assert F.cosine_similarity(found.float(), encode_images(build("CLIP"), pixels, reducer)).min() > 0.98


# compute and budgets


def test_macs_of_vit_b_16_match_the_published_figure():
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(patch_size=16))
    assert encoder_macs(model) == pytest.approx(17.56e9, rel=2e-3)  # ViT-B/16 at 224 pixels
    assert encoder_macs(model, InputPruning(0.5)) / encoder_macs(model) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("rest", ["drop", "mean"])
def test_added_up_is_counted_and_no_images_count_as_one(model, pixels, rest):
    for reducer in (None, InputPruning(0.5, rest)):
        macs = encoder_macs(model, reducer)
        assert count_flops(lambda r=reducer: encode_images(model, pixels[:1], r, implementation="eager")) == 2 * macs
        assert trace_encoder(model, reducer, pixels).macs == macs
    assert encoder_macs(model, image_size=96) > 2 * encoder_macs(model)


def test_a_reducer_that_must_see_an_image_is_counted_on_a_blank_one(clip):
    class Peeks(InputPruning):
        def at_input(self, tokens):
            float(tokens.x[0].sum())
            super().at_input(tokens)

    assert encoder_macs(clip, Peeks(0.5)) == encoder_macs(clip, InputPruning(0.5))


def test_gathering_no_images_and_no_tokens():
    assert take(torch.zeros(0, 5, 4), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 4)
    assert take(torch.zeros(2, 5, 4), torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 4)


def test_fit_budget_is_the_dearest_that_fits():
    best = fit_budget(lambda position: round(position * 1000), 333, lambda cost: cost)
    assert 332 <= best <= 333
    assert fit_budget(lambda position: position, 2.0, lambda cost: cost) == 1.0
    with pytest.raises(ValueError, match="budget"):
        fit_budget(lambda position: position + 1, 0.5, lambda cost: cost)


@pytest.mark.parametrize("shortcut", [False, True, None])
def test_strengths_run_from_the_strongest_to_none(shortcut):
    make = strength_at(InputPruning, "keep", 64, shortcut, rest="mean")
    assert [make(position).keep for position in (0, 0.5, 1)] == [1 / 64, 0.5, 1.0]
    assert make(0.5).cls_only_last == bool(shortcut) and make(0.5).rest == "mean"
    assert [strength_at(lambda r: Rate(r), "merge", 64)(position).r for position in (0, 0.5, 1)] == [32, 16, 0]


class Rate(Reducer):
    kind = "merge"

    def __init__(self, r):
        self.r = r


@pytest.mark.parametrize("budget", [0.4, 0.5, 0.7])
def test_one_patch_more_would_be_over_the_budget(model, budget):
    dense, cost = encoder_macs(model), lambda reducer: encoder_macs(model, reducer)
    reducer = fit_budget(strength_at(InputPruning, "keep", 64, False), budget * dense, cost)
    assert cost(reducer) <= budget * dense < cost(InputPruning(reducer.keep + 1 / 64))


@pytest.mark.parametrize("name", list(REDUCERS))
def test_a_float64_model_keeps_its_precision(pixels, name):
    """A finite difference of 1e-6 needs it: sums that fell to float32 once made it noise."""
    model, x = build("CLIP").double(), pixels[:2].double()
    reducer = reducer_for_budget(name, 0.6, model)
    along = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=x.dtype)
    total = lambda x: (encode_images(model, x, reducer) * torch.arange(24, dtype=x.dtype).cos()).sum()
    with torch.enable_grad():
        slope = (torch.autograd.grad(total(x := x.requires_grad_()), x)[0] * along).sum()
    close((total(x + 1e-6 * along) - total(x - 1e-6 * along)) / 2e-6, slope, 1e-5 * slope.abs() + 1e-8)


def test_cls_only_last_layer_is_exact(clip, pixels):
    full, short = InputPruning(0.5), InputPruning(0.5)
    short.cls_only_last = True
    close(encode_images(clip, pixels, full), encode_images(clip, pixels, short))
    assert encoder_macs(clip, short) < encoder_macs(clip, full)
    idle = Reducer()
    idle.cls_only_last = True
    close(encode_images(clip, pixels, idle), library_feature(clip, pixels))
    assert encoder_macs(clip, idle) < encoder_macs(clip)


# token_reduction


@pytest.mark.parametrize("name", ["vtp", "evit", "tome", "ours"])
def test_by_name_within_its_budget_and_restored(model, pixels, name):
    everything = False if isinstance(model, transformers.ViTModel) else None  # its patches may be read: no shortcut
    before, reducer = library_feature(model, pixels), reducer_for_budget(name, 0.5, model, cls_only_last=everything)
    with token_reduction(model, name, budget=0.5) as inside:
        assert inside is model
        close(library_feature(model, pixels), encode_images(model, pixels, reducer))
    with token_reduction(model, reducer):
        inside = library_feature(model, pixels)
    close(inside, encode_images(model, pixels, reducer))
    assert (inside - before).abs().max() > 1e-4
    assert torch.equal(library_feature(model, pixels), before) and "forward" not in vars(make_tower(model).module)


def test_restored_after_an_exception_and_nested(clip, pixels):
    before, half, third = library_feature(clip, pixels), InputPruning(0.5), InputPruning(0.3)
    with pytest.raises(RuntimeError, match="boom"):
        with token_reduction(clip, half):
            raise RuntimeError("boom")
    assert torch.equal(library_feature(clip, pixels), before)
    with token_reduction(clip, half):
        outer = library_feature(clip, pixels)
        with token_reduction(clip, third):
            close(library_feature(clip, pixels), encode_images(clip, pixels, third))
        assert torch.equal(library_feature(clip, pixels), outer)
    assert torch.equal(library_feature(clip, pixels), before)


@pytest.mark.parametrize("arguments, error, words", [
    (("tomee", 0.5), ValueError, "reducer='tomee' is not allowed; allowed: vtp"), (("ours",), ValueError, "budget=None"),
    (("ours", 1.5), ValueError, "budget"), (("ours", 0.001), ValueError, "budget"), ((InputPruning(0.5), 0.5), ValueError, "budget"),
    ((0.5,), TypeError, "reducer=0.5 is not supported"), ((None,), TypeError, "reducer=None"), ((InputPruning, 0.5), TypeError, "reducer=")])
def test_wrong_requests_are_one_clear_line_and_touch_nothing(clip, pixels, arguments, error, words):
    with pytest.raises(error, match=words):
        with token_reduction(clip, *arguments):
            pass
    assert "forward" not in vars(make_tower(clip).module)


def test_what_is_not_available_inside_is_refused(pixels):
    clip, name = build("CLIP"), "output_attentions"
    clip.set_attn_implementation("eager")  # else transformers refuses attention maps itself
    with token_reduction(clip, InputPruning(0.5)):
        assert isinstance(clip.vision_model(pixels, return_dict=False), tuple)
        with pytest.raises(ValueError, match=name):
            clip.vision_model(pixel_values=pixels, **{name: True})
        setattr(clip.vision_model.config, name, True)
        with pytest.raises(ValueError, match=name):
            clip.get_image_features(pixels)


def test_dropout_that_would_be_left_out_is_refused():
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION, attention_dropout=0.1))
    with pytest.raises(ValueError, match="dropout"):
        with token_reduction(model.train(), InputPruning(0.5)):
            pass
    with token_reduction(model.eval(), InputPruning(0.5)):
        assert model(torch.zeros(1, 3, *[model.config.image_size] * 2)).pooler_output.isfinite().all()


def same_patches(family):
    """A model that sees no positions, so that equal patches are equal tokens."""
    model = build(family)
    table = make_tower(model).module.embeddings
    weight = table.position_embeddings if hasattr(table, "position_embeddings") else table.position_embedding.weight
    weight.zero_()
    return model


def output(model, pixels):
    """What the model is called for: logits, or the mean over its patches."""
    out = model(pixels)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state[:, make_tower(model).prefix:].mean(1)


@pytest.mark.parametrize("family", ["CLIP classifier", "SigLIP classifier", "ViT classifier", "ViT", "SigLIP without head"])
@pytest.mark.parametrize("name, options", [  # a size bias of 0.85 is not exact, and the equal ones must not run out
    ("tome", dict(budget=0.7)), ("ours", dict(budget=0.9, size_bias=1.0))])
def test_who_reads_the_patches_gets_them_all(family, name, options):
    """Two kinds of patches, 48 of one and 16 of the other: merging equal ones must change nothing."""
    model = same_patches(family)
    kinds = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    choice = (torch.arange(64) % 8 >= 2).long()  # whole columns, so that each finds its like at the other parity
    pixels = torch.cat([torch.cat([kinds[choice[8 * i + j]] for j in range(8)], -1) for i in range(8)], -2)[None]
    dense = output(model, pixels)
    with token_reduction(model, name, **options):
        reduced = output(model, pixels)
    assert reduced.isfinite().all()
    close(reduced, dense, 1e-4)


def test_a_mean_over_merged_patches_counts_their_sizes(pixels):
    model, reducer = build("SigLIP without head"), REDUCERS["tome"](4)
    with token_reduction(model, reducer):
        mean = model(pixels).last_hidden_state.mean(1)
    close(encode_images(model, pixels, reducer), F.normalize(mean, dim=-1))


def test_hidden_states_asked_for_by_the_configuration(pixels):
    clip = build("CLIP")
    clip.vision_model.config.output_hidden_states = True
    with token_reduction(clip, "ours", budget=0.6):
        assert len(clip.vision_model(pixels).hidden_states) == 7


@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_strength_changes_nothing_for_any_model(family, pixels):
    model = build(family)
    call = getattr(model, "get_image_features", model)
    expected = call(pixels)
    with token_reduction(model, "ours", budget=1.0):
        found = call(pixels)
    for key, value in expected.items():
        if value is None or key == "last_hidden_state" and hasattr(model, "get_image_features"):
            assert found.get(key) is None, key  # CLIPModel and SiglipModel are not asked for their last tokens
        else:
            close(found[key], value)
    read = lambda o: o.pooler_output if hasattr(o, "pooler_output") and o.pooler_output is not None else o[0][:, 0]
    close(*(o.logits if hasattr(o, "logits") else read(o) for o in (found, expected)))


def test_a_shortcut_of_the_reducer_given_is_not_used_where_patches_are_read(pixels):
    model, reducer = build("CLIP classifier"), reducer_for_budget("ours", 0.5, build("CLIP"))
    with token_reduction(model, reducer):
        assert model(pixels).logits.isfinite().all() and reducer.cls_only_last
        assert model.vision_model(pixels).last_hidden_state.shape[1] == 65
    with token_reduction(model, reducer, patch_tokens=False):
        assert model.vision_model(pixels).last_hidden_state is None


def test_budgets_hold_where_the_last_layer_is_whole():
    model = build("CLIP classifier")
    seen = []
    with token_reduction(model, "ours", budget=0.5):
        tower = make_tower(model)
        for block in tower.module.encoder.layers:
            block.mlp.fc1.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0].shape[1]))
        model(torch.zeros(1, 3, 64, 64))
    assert seen[-1] > 1 and max(seen[1:]) < 65
    assert encoder_macs(model, reducer_for_budget("ours", 0.5, model, cls_only_last=False)) <= 0.5 * encoder_macs(model)


def test_merging_and_dropping_together_is_refused_only_where_patches_are_read(pixels):
    class Both(REDUCERS["tome"]):
        def at_input(self, tokens):
            InputPruning(0.5).at_input(tokens)

    with token_reduction(build("CLIP"), Both(4)) as model:
        assert library_feature(model, pixels).isfinite().all()
    with token_reduction(build("CLIP classifier"), Both(4)) as model:
        with pytest.raises(ValueError, match="patches dropped by Both.*patch_tokens=False"):
            model(pixels)


def test_the_whole_model_runs_reduced(clip, pixels):
    ids = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
    with token_reduction(clip, InputPruning(0.5)):
        out = clip(input_ids=ids, pixel_values=pixels)
    assert out.logits_per_image.shape == (3, 2) and out.vision_model_output.last_hidden_state is None


def word_tokenizer():
    """A tokenizer of eight words, with CLIP's start and end tokens."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "this", "is", "a", "cat", "dog"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                                pad_token="</s>", unk_token="<unk>", model_max_length=16)


def test_the_pipeline_of_transformers_runs_reduced(clip):
    processor = transformers.CLIPImageProcessor(size=dict(shortest_edge=64), crop_size=dict(height=64, width=64))
    classify = transformers.pipeline("zero-shot-image-classification", model=clip, tokenizer=word_tokenizer(),
                                     image_processor=processor, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    scores = lambda: {row["label"]: row["score"] for row in classify(picture, candidate_labels=["cat", "dog"])}
    dense = scores()
    with token_reduction(clip, "vtp", budget=0.5):
        reduced = scores()
    assert reduced["cat"] != dense["cat"] and scores() == dense
