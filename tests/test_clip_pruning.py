"""The vision suite's encoder loop and reducers on tiny random models, its data loading, and the
real checkpoint's regression, where EA_CLIP_CHECKPOINT and EA_CIFAR10 say where it is."""

import os

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from PIL import Image

from lab.notebooks import definitions

NOTEBOOK = ROOT / "vlm/clip_pruning.ipynb"
NAMES = ["vtp", "vtp_mean", "vtp_learned", "random", "grid", "cluster", "evit", "cls_drop", "cls_merge", "dynamicvit",
         "prumerge", "tome", "ours"]
VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=3, image_size=64,
              patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
            bos_token_id=0, eos_token_id=1, pad_token_id=1)


@pytest.fixture(scope="module")
def nb():
    """The notebook's definitions."""
    return definitions(NOTEBOOK)


def build(family):
    """A tiny random model of a family, its weights made large enough that layers matter."""
    torch.manual_seed(0)
    t = transformers
    model = {
        "CLIP": lambda: t.CLIPModel(t.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)),
        "SigLIP": lambda: t.SiglipModel(t.SiglipConfig(vision_config=VISION, text_config=TEXT)),
        "ViT": lambda: t.ViTModel(t.ViTConfig(**VISION)),
    }[family]()
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


@torch.no_grad()
def library_feature(model, pixels):
    """The feature by transformers' own call, normalised."""
    out = model.get_image_features(pixels) if hasattr(model, "get_image_features") else model(pixels)
    return F.normalize(getattr(out, "pooler_output", out), dim=-1)


def close(a, b, limit=1e-5):
    assert (a - b).abs().max() < limit, (a - b).abs().max().item()


def test_the_named_definitions_are_there(nb):
    for name in ("encode_images", "REDUCERS", "reducer_for_budget", "token_reduction", "encoder_macs"):
        assert name in nb
    assert list(nb["REDUCERS"]) == NAMES


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_loop_is_the_model(nb, model, pixels, implementation):
    close(nb["encode_images"](model, pixels, implementation=implementation), library_feature(model, pixels))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_full_strength_changes_nothing(nb, model, pixels, name):
    idle = nb["REDUCERS"][name](1.0 if nb["reducer_kind"](name) == "keep" else 0)
    expected = library_feature(model, pixels)
    close(nb["encode_images"](model, pixels, idle), expected)
    with nb["token_reduction"](model, idle):
        close(library_feature(model, pixels), expected)


@torch.no_grad()
def test_context_manager_reduces_and_restores(nb, model, pixels):
    before, reducer = library_feature(model, pixels), nb["reducer_for_budget"]("ours", 0.5, model)
    with nb["token_reduction"](model, reducer):
        inside = library_feature(model, pixels)
    close(inside, nb["encode_images"](model, pixels, reducer))
    assert (inside - before).abs().max() > 1e-4
    assert torch.equal(library_feature(model, pixels), before)
    with pytest.raises(RuntimeError, match="boom"):
        with nb["token_reduction"](model, reducer):
            raise RuntimeError("boom")
    assert torch.equal(library_feature(model, pixels), before)
    assert "forward" not in vars(nb["make_tower"](model).module)


@torch.no_grad()
def test_context_manager_nests_and_refuses_what_it_cannot_give(nb, clip, pixels):
    half, third = nb["InputPruning"](0.5), nb["InputPruning"](0.3)
    with nb["token_reduction"](clip, half):
        outer = library_feature(clip, pixels)
        with nb["token_reduction"](clip, third):
            close(library_feature(clip, pixels), nb["encode_images"](clip, pixels, third))
        assert torch.equal(library_feature(clip, pixels), outer)
        with pytest.raises(ValueError, match="output_hidden_states"):
            clip.vision_model(pixel_values=pixels, output_hidden_states=True)


@torch.no_grad()
def test_the_whole_model_runs_reduced(nb, clip, pixels):
    ids = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1]])
    with nb["token_reduction"](clip, nb["InputPruning"](0.5)):
        out = clip(input_ids=ids, pixel_values=pixels)
    assert out.logits_per_image.shape == (3, 2) and out.vision_model_output.last_hidden_state.shape[1] == 33


def word_tokenizer():
    """A tokenizer of eight words, with CLIP's start and end tokens."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "this", "is", "a", "cat", "dog"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                                pad_token="</s>", unk_token="<unk>", model_max_length=16)


@torch.no_grad()
def test_the_zero_shot_pipeline_runs_reduced(nb, clip):
    processor = transformers.CLIPImageProcessor(size=dict(shortest_edge=64), crop_size=dict(height=64, width=64))
    classify = transformers.pipeline("zero-shot-image-classification", model=clip, tokenizer=word_tokenizer(),
                                     image_processor=processor, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    scores = lambda: {row["label"]: row["score"] for row in classify(picture, candidate_labels=["cat", "dog"])}
    dense = scores()
    with nb["token_reduction"](clip, nb["InputPruning"](0.5)):
        reduced = scores()
    assert reduced["cat"] != dense["cat"] and scores() == dense


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_second_call_as_the_first_and_one_image_as_in_a_batch(nb, model, pixels, name):
    reducer = nb["reducer_for_budget"](name, 0.6, model)
    first, second = (nb["trace_encoder"](model, reducer, pixels) for _ in range(2))
    assert first.counts == second.counts and torch.equal(first.x, second.x)
    together = nb["encode_images"](model, pixels, reducer)
    alone = torch.cat([nb["encode_images"](model, image[None], reducer) for image in pixels])
    close(alone, together, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [0.4, 0.5, 0.7])
def test_budgets_are_honoured_and_counted_right(nb, model, pixels, name, budget):
    reducer = nb["reducer_for_budget"](name, budget, model)
    macs, dense = nb["encoder_macs"](model, reducer), nb["encoder_macs"](model)
    assert 0.8 * budget * dense <= macs <= budget * dense
    eager = lambda: nb["encode_images"](model, pixels[:1], reducer, implementation="eager")
    assert nb["count_flops"](eager) == 2 * macs


def test_macs_of_vit_b_16_match_the_published_figure(nb):
    with torch.device("meta"):
        config = transformers.CLIPVisionConfig(patch_size=16)
        model = transformers.CLIPVisionModel(config)
    dense = nb["encoder_macs"](model)
    assert dense == pytest.approx(17.56e9, rel=2e-3)  # ViT-B/16 at 224 pixels
    assert nb["encoder_macs"](model, nb["REDUCERS"]["tome"](16)) / dense == pytest.approx(0.50, abs=0.01)


@torch.no_grad()
def test_unreachable_budget_and_unknown_name_are_refused(nb, clip):
    with pytest.raises(ValueError, match="at least 0"):
        nb["reducer_for_budget"]("prumerge", 0.05, clip)
    with pytest.raises(ValueError, match="allowed: vtp"):
        nb["reducer_for_budget"]("tomee", 0.5, clip)
    for budget in (0, -1, 1.5, "half", True, None, float("nan")):
        with pytest.raises(ValueError, match="budget"):
            nb["reducer_for_budget"]("vtp", budget, clip)


@pytest.mark.parametrize("name, strength, options", [
    ("tome", float("inf"), {}), ("tome", True, {}), ("tome", -1, {}), ("tome", "8", {}), ("ours", float("nan"), {}),
    ("cls_drop", 0.5, {"rest": "x"}), ("vtp", 0.5, {"rest": "x"}), ("cls_merge", "half", {})])
def test_wrong_strengths_and_options_are_refused_with_what_is_allowed(nb, name, strength, options):
    with pytest.raises(ValueError, match="is not allowed; allowed: "):
        nb["REDUCERS"][name](strength, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cls_merge", "tome", "ours"])
def test_merging_loses_no_patch(nb, model, pixels, name):
    tokens = nb["trace_encoder"](model, nb["reducer_for_budget"](name, 0.5, model), pixels)
    n = 64 + tokens.prefix
    close(tokens.sizes.sum(1), torch.full((3,), float(n)), 1e-3)
    assert (tokens.owner >= 0).all()
    if tokens.x.shape[1] == tokens.sizes.shape[1]:  # not after the CLS-only last layer
        for owner, sizes in zip(tokens.owner, tokens.sizes, strict=True):
            assert torch.equal(owner.bincount(minlength=len(sizes)).float(), sizes.round())
    if tokens.prefix:
        assert (tokens.sizes[:, 0] == 1).all() and (tokens.owner[:, 0] == 0).all()
        assert (tokens.owner[:, 1:] > 0).all(), "nothing joins the CLS token"


def test_sizes_of_vit_b_16_add_up_to_197(nb):
    torch.manual_seed(0)
    shape = dict(VISION, image_size=224, patch_size=16)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**shape)).eval()
    tokens = nb["trace_encoder"](model, nb["REDUCERS"]["tome"](16), torch.randn(2, 3, 224, 224))
    close(tokens.sizes.sum(1), torch.full((2,), 197.0), 1e-3)


@torch.no_grad()
def test_merging_identical_tokens_is_exact_with_the_size_bias(nb, model, pixels):
    tower = nb["make_tower"](model)
    p, x = tower.prefix, tower.pre_norm(tower.embed(pixels))
    twice = torch.cat([x[:, :p], x[:, p:].repeat_interleave(2, 1)], 1)  # neighbours: one in A, one in B
    plain = nb["Tokens"](twice.clone(), pixels, p, 6, layer=1, first=twice.shape[1])
    merged = nb["Tokens"](twice.clone(), pixels, p, 6, layer=1, first=twice.shape[1])
    for tokens, reducer in ((plain, None), (merged, nb["MergeSimilar"](32)), (plain, None), (merged, None)):
        for_this = tower.blocks[2]
        nb["attention_step"](tokens, for_this, tower.heads)
        if reducer is not None:
            reducer.after_attention(tokens)
        nb["mlp_step"](tokens, for_this)
    assert merged.x.shape[1] == twice.shape[1] - 32
    if p:
        close(plain.x[:, :p], merged.x[:, :p], 1e-4)
    close((plain.x[:, p:]).sum(1), (merged.x * merged.sizes[..., None])[:, p:].sum(1), 1e-2)


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("sized", [False, True])
def test_fast_merging_equals_one_group_at_a_time(nb, keep_norm, sized):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 21, 6, generator=generator)
    sizes = torch.randint(1, 5, (3, 21), generator=generator).float() if sized else None
    tokens = nb["Tokens"](x.clone(), None, 1, 6, sizes=sizes)
    matched = nb["match_alternating"](x, 8, 1)
    expected, expected_sizes = nb["merge_naive"](tokens, *matched, keep_norm)
    nb["merge"](tokens, *matched, keep_norm)
    close(tokens.x, expected)
    close(tokens.sizes, expected_sizes)
    assert torch.equal(tokens.x[:, 0], x[:, 0]) and tokens.x.shape[1] == 13


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "tome", "vtp", "evit"])
def test_cls_only_last_layer_is_exact(nb, clip, pixels, name):
    full, short = nb["reducer_for_budget"](name, 0.5, clip), nb["reducer_for_budget"](name, 0.5, clip)
    short.__dict__.update(full.__dict__)
    full.cls_only_last, short.cls_only_last = False, True
    close(nb["encode_images"](clip, pixels, full), nb["encode_images"](clip, pixels, short))
    assert nb["encoder_macs"](clip, short) < nb["encoder_macs"](clip, full)


@torch.no_grad()
def test_pruning_does_not_care_about_the_order_of_patches(nb, clip, pixels):
    tower = nb["make_tower"](clip)
    x = tower.embed(pixels)
    order = torch.cat([torch.tensor([0]), torch.randperm(64, generator=torch.Generator().manual_seed(0)) + 1])
    results = []
    for y in (x, x[:, order]):
        tokens = nb["Tokens"](y.clone(), pixels, 1, 6)
        nb["InputPruning"](0.5).at_input(tokens)
        nb["attention_step"](tokens, tower.blocks[0], tower.heads)
        results.append(tokens.x[:, 0])
    close(*results)


@torch.no_grad()
def test_fast_pruning_equals_the_naive_loop(nb, clip, pixels):
    for keep in (1.0, 0.5, 0.1):
        close(nb["encode_images"](clip, pixels, nb["InputPruning"](keep)), nb["naive_pruned_features"](clip, pixels, keep))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vtp", "vtp_mean", "random", "grid", "cluster"])
def test_keep_ratio_keeps_what_it_says(nb, clip, pixels, name):
    for keep, left in ((0.5, 32), (0.1, 7), (0.001, 1)):
        tokens = nb["trace_encoder"](clip, nb["REDUCERS"][name](keep), pixels)
        assert (tokens.owner[:, 1:] >= 0).sum(1).tolist() == [left] * 3
        assert tokens.counts[0][0] == 1 + left + (name == "vtp_mean")
    grid = nb["trace_encoder"](clip, nb["Grid"](0.5), pixels).owner[0, 1:].view(8, 8) >= 0
    assert (grid[1:] ^ grid[:-1]).all() and (grid[:, 1:] ^ grid[:, :-1]).all(), "half of a grid is a checkerboard"


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, True, None, "half"])
def test_bad_keep_ratios_are_refused(nb, keep):
    for name in NAMES:
        if nb["reducer_kind"](name) == "keep":
            with pytest.raises(ValueError, match="keep ratio"):
                nb["REDUCERS"][name](keep)
    if not isinstance(keep, bool | int | float):
        with pytest.raises(ValueError, match="r="):
            nb["REDUCERS"]["tome"](keep)


def test_random_masks_differ_by_seed_only(nb, clip, pixels):
    owners = [nb["trace_encoder"](clip, nb["Random"](0.5, seed), pixels).owner for seed in (0, 0, 1)]
    assert torch.equal(owners[0], owners[1]) and not torch.equal(owners[0], owners[2])


@torch.no_grad()
def test_the_cheap_cls_row_is_the_attention_map(nb, clip, pixels):
    seen = {}

    class Spy(nb["Reducer"]):
        def after_attention(self, tokens):
            seen[tokens.layer] = nb["importance"](tokens)

    nb["encode_images"](clip, pixels, Spy())
    clip.set_attn_implementation("eager")
    maps = clip.vision_model(pixels, output_attentions=True).attentions
    clip.set_attn_implementation("sdpa")
    for layer, attention in enumerate(maps):
        close(seen[layer], attention.mean(1)[:, 0, 1:], 1e-6)


@pytest.mark.parametrize("side", [4, 7, 14])
@pytest.mark.parametrize("prefix", [0, 1])
def test_checkerboard_puts_neighbours_at_places_of_the_other_parity(nb, side, prefix):
    x = torch.arange(prefix + side * side, dtype=torch.float32)[None, :, None]
    tokens = nb["Tokens"](x.clone(), None, prefix, 12, owner=torch.arange(x.shape[1])[None])
    nb["checkerboard"](tokens)
    place = tokens.x[0, :, 0].argsort()[prefix:].view(side, side)  # of each patch on the grid
    assert (place[1:] % 2 != place[:-1] % 2).all() and (place[:, 1:] % 2 != place[:, :-1] % 2).all()
    assert sorted(tokens.x[0, :, 0].tolist()) == x[0, :, 0].tolist()
    assert tokens.owner[0].tolist() == tokens.x[0, :, 0].argsort().tolist()  # the trace knows where they went


def test_checkerboard_leaves_what_is_no_square_alone(nb):
    x = torch.arange(7.0)[None, :, None]
    tokens = nb["Tokens"](x.clone(), None, 1, 12)
    nb["checkerboard"](tokens)
    assert torch.equal(tokens.x, x)


@pytest.mark.parametrize("depth, layers", [(12, {1, 3, 5, 6, 8}), (24, {2, 6, 10, 12, 16}), (4, {0, 1, 2})])
def test_ours_merges_five_times_over_the_depth(nb, depth, layers):
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**dict(VISION, num_hidden_layers=depth))).eval()
    for options, expected in (({}, layers), (dict(every_layer=True), set(range(depth - 1)))):
        counts = nb["trace_encoder"](model, nb["ProtectedMerging"](0.4, **options)).counts
        assert {layer for layer, (seen, left) in enumerate(counts[:-1]) if left < seen} <= expected
        assert counts[-1][0] < counts[0][0]


def test_features_that_are_not_finite_are_a_status_and_no_number(nb):
    good, text = torch.nn.functional.normalize(torch.randn(3, 4), dim=-1), torch.eye(4)
    bad = good.clone()
    bad[1, 2] = float("nan")
    assert nb["fidelity"](bad, good, text, torch.zeros(3)) == dict(n_images=3, status="nan")


def test_hump_and_straight_leave_what_they_say(nb):
    for depth in (4, 12, 24):
        for keep in (0.3, 0.5, 0.7, 0.9, 1.0):
            left = nb["hump"](keep, depth)
            assert np.mean(left) == pytest.approx(keep, abs=2e-3) and left[0] > 0.97
            assert all(a >= b - 1e-9 for a, b in zip(left, left[1:], strict=False))
        assert np.mean(nb["straight"](0.6, depth)) == pytest.approx(0.6, abs=1e-9)


@torch.no_grad()
def test_other_resolutions_and_dtypes(nb, clip):
    big = torch.randn(2, 3, 96, 96)
    out = clip.get_image_features(big, interpolate_pos_encoding=True)
    close(nb["encode_images"](clip, big), F.normalize(getattr(out, "pooler_output", out), dim=-1))
    assert nb["encoder_macs"](clip, image_size=96) > 2 * nb["encoder_macs"](clip)
    reducer, small = nb["reducer_for_budget"]("ours", 0.5, clip), torch.randn(2, 3, 64, 64)
    expected = nb["encode_images"](clip, small, reducer)
    half = build("CLIP").to(torch.bfloat16)
    found = nb["encode_images"](half, small.bfloat16(), reducer)
    assert found.dtype == torch.bfloat16 and F.cosine_similarity(found.float(), expected).min() > 0.98


def test_an_unsupported_model_is_named(nb):
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    with pytest.raises(TypeError, match="BertModel is not supported.*CLIP, SigLIP and ViT"):
        nb["encode_images"](transformers.BertModel(config), torch.zeros(1, 3, 8, 8))


@torch.no_grad()
def test_text_is_pooled_at_the_end_token(nb, clip):
    class Fake:
        model = clip

        def tokenize(self, texts):
            ids = [[0, *(ord(c) % 90 + 5 for c in t[-4:]), 1] for t in texts]
            return transformers.BatchEncoding({"input_ids": torch.tensor(ids)})

    text = nb["text_features"](Fake(), ["zebra", "horse", "plane"], ["a photo of a {}", "one {}"])
    assert text.shape == (3, 24) and (text @ text.T - 2 * torch.eye(3)).max() < 0.9999
    states = clip.text_model(**Fake().tokenize(["zebra", "horse"])).last_hidden_state
    close(states[0, 0], states[1, 0]), "the start token of a causal encoder sees nothing"


def test_fitting_the_summary_helps_on_its_images(nb, clip):
    raw = torch.randint(0, 256, (16, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = nb["Images"](raw, None, [], "noise")
    before = [p.requires_grad for p in clip.parameters()]
    dense = nb["image_features"](clip, images)
    offset, steps = nb["fit_summary"](clip, images, dense, 0.3, seconds=1.5)
    assert steps >= 1 and offset.abs().sum() > 0 and [p.requires_grad for p in clip.parameters()] == before
    cosine = [(nb["image_features"](clip, images, nb["InputPruning"](0.3, rest, o)) * dense).sum(-1).mean()
              for rest, o in (("mean", None), ("learned", offset))]
    assert cosine[1] > cosine[0]


# ---------------------------------------------------------------- checkpoints and images


def image_folder(root, classes=("cat", "dog"), each=3):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            Image.new("RGB", (20, 30), (40 * i, 60 * j, 90)).save(root / name / f"{j}.png")
    return root


@pytest.fixture(scope="module")
def processor():
    return transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)


def test_images_are_what_the_processor_makes(nb, processor, tmp_path):
    root = image_folder(tmp_path / "x")
    images = nb["load_images"](f"imagefolder:{root}", 4, processor)
    assert len(images) == 4 and images.classes == ["cat", "dog"] and images.labels.bincount().tolist() == [2, 2]
    paths = nb["folder_images"](root)[0]
    expected = processor([Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
    pixels, good = nb["preprocess"](paths, processor)
    mine = nb["Images"](pixels, None, [], "", 0, tuple(processor.image_mean), tuple(processor.image_std))
    close(mine.batch(slice(None)), expected, 1e-5)
    assert good == list(range(6))


def test_undecodable_files_are_skipped_and_counted(nb, processor, tmp_path):
    root = image_folder(tmp_path / "x")
    (root / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n not really")
    (root / "dog" / "empty.jpg").write_bytes(b"")
    images = nb["load_images"](f"imagefolder:{root}", 8, processor)
    assert len(images) == 6 and images.skipped == 2
    for name in ("cat", "dog"):
        for path in (root / name).iterdir():
            path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of 8 could"):
        nb["load_images"](f"imagefolder:{root}", 8, processor)


@pytest.mark.parametrize("dataset", ["imagefolder:/nowhere/at/all", "imagenet", "synthetic:x", "synthetic:4", ""])
def test_bad_datasets_are_one_clear_line(nb, processor, dataset):
    with pytest.raises(ValueError, match="DATASET"):
        nb["load_images"](dataset, 4, processor)


def test_an_empty_class_folder_is_named(nb, processor, tmp_path):
    root = image_folder(tmp_path / "x")
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        nb["load_images"](f"imagefolder:{root}", 4, processor)


def test_synthetic_images_resized_or_native(nb, processor):
    assert nb["load_images"]("synthetic:64", 3, processor).pixels.shape == (3, 3, 64, 64)
    assert nb["load_images"]("synthetic:128", 3, processor).pixels.shape == (3, 3, 64, 64)
    assert nb["load_images"]("synthetic:128", 3, processor, native=True).pixels.shape == (3, 3, 128, 128)


def test_class_names_that_no_prompt_fits_are_refused(nb):
    assert len(nb["prompt_templates"](list(nb["CIFAR_CLASSES"]))) == 18
    assert nb["prompt_templates"](["tabby cat", "mountain"]) == ["a photo of a {}."]
    for bad in ("0012", "n01440764", "7"):
        with pytest.raises(ValueError, match="class names"):
            nb["prompt_templates"](["cat", bad])


def save_clip(folder, clip):
    clip.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    return folder


def test_checkpoint_folders_that_cannot_be_used(nb, clip, tmp_path):
    with pytest.raises(ValueError, match="MODEL_ID.*config.json"):
        nb["locate_checkpoint"](str(tmp_path))
    with pytest.raises(ValueError, match="MODEL_ID"):
        nb["locate_checkpoint"](str(tmp_path / "missing"))
    folder = save_clip(tmp_path / "My CLIP", clip)
    location = nb["locate_checkpoint"](str(folder))
    assert location.slug == "my-clip"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        nb["load_checkpoint"](location, torch.device("cpu"))


def test_without_a_network_a_stand_in_or_a_clear_refusal(nb, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    location = nb["locate_checkpoint"]("openai/clip-vit-base-patch16")
    assert location.folder is None and location.why
    assert nb["locate_checkpoint"]("openai/clip-vit-base-patch16", smoke=True).slug == "random-tiny"
    with pytest.raises(ValueError, match="MODEL_ID"):
        nb["locate_checkpoint"]("some-body/some-clip")
    checkpoint = nb["load_checkpoint"](location, torch.device("cpu"), smoke=True)
    assert not checkpoint.pretrained and checkpoint.tokenize is None
    assert nb["reachable"]("http://127.0.0.1:9", 2) is False


def test_fidelity_is_exact_on_known_features(nb):
    dense = F.normalize(torch.tensor([[1.0, 0], [0, 1.0], [1.0, 1.0], [1.0, 0.1]]), dim=-1)
    moved = dense.clone()
    moved[1] = torch.tensor([1.0, 0])
    row = nb["fidelity"](moved, dense, torch.eye(2), torch.tensor([0, 1, 0, 0]))
    assert row["top1_agreement"] == 0.75 and row["cosine_mean"] == pytest.approx(0.75)
    assert row["accuracy_change"] == pytest.approx(-0.25)
    assert row["top1_agreement_low"] < 0.75 < row["top1_agreement_high"] < 1
    assert "top1_agreement" not in nb["fidelity"](moved, dense)


# ---------------------------------------------------------------- the real checkpoint


@pytest.fixture(scope="module")
def real(nb):
    """(checkpoint, test images, text features, dense features) of the real CLIP on CIFAR-10."""
    folder, data = os.environ.get("EA_CLIP_CHECKPOINT"), os.environ.get("EA_CIFAR10")
    if not folder or not data:
        pytest.skip("EA_CLIP_CHECKPOINT and EA_CIFAR10 do not name a checkpoint and a CIFAR-10 folder")
    checkpoint = nb["load_checkpoint"](nb["locate_checkpoint"](folder), torch.device("cpu"))
    images = nb["load_images"](f"imagefolder:{data}/test_1k", 1000, checkpoint.processor)
    text = nb["text_features"](checkpoint, images.classes, nb["prompt_templates"](images.classes))
    return checkpoint, images, text, nb["image_features"](checkpoint.model, images)


@pytest.mark.checkpoint
def test_real_zero_shot_accuracy(nb, real):
    checkpoint, images, text, dense = real
    assert nb["fidelity"](dense, dense, text, images.labels)["top1_accuracy"] >= 0.92
    close(nb["encode_images"](checkpoint.model, images.batch([0, 1])), library_feature(checkpoint.model, images.batch([0, 1])))


@pytest.mark.checkpoint
def test_real_target_at_half_of_the_compute(nb, real):
    checkpoint, images, text, dense = real
    reduced = nb["image_features"](checkpoint.model, images, nb["reducer_for_budget"]("ours", 0.5, checkpoint.model))
    row = nb["fidelity"](reduced, dense, text, images.labels)
    assert row["cosine_mean"] >= 0.973 and row["top1_agreement"] >= 0.955 and row["accuracy_change"] >= -0.03
