"""Fewer vision tokens in a Qwen2.5-VL-class model: exactness at every place, batches, video, caches, beams, what it costs."""

import sys

import pytest
import torch
import transformers
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

from effarch.bench import count_flops, tensor_bytes
from effarch.qwen import (
    METHODS,
    PLACES,
    Method,
    Reduction,
    Units,
    View,
    attend,
    embed_units,
    encode_vision,
    farthest,
    layout,
    merge_windows,
    plan_reduction,
    reduce_in_tower,
    reduce_vision_tokens,
    runs,
    segments,
    top,
)
from effarch.vlm import answers, checkpoints, inputs, pictures, scenes, shapes

EVERY = [(where, name) for name, method in METHODS.items() for where in method.places]
RULES = dict(before="patch_norm", inside="key_norm", after="visionzip", language="pyramiddrop")  # one of each place
each_place = pytest.mark.parametrize("where, name", RULES.items())


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return shapes.random_model("tiny")


@pytest.fixture(scope="module")
def older():
    """A Qwen2-VL: no windows, LayerNorm, another MLP."""
    torch.manual_seed(0)
    text = shapes.SHAPES["tiny"]["text_config"]
    vision = dict(depth=3, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2)
    tokens = dict(image_token_id=508, video_token_id=509, vision_start_token_id=510, vision_end_token_id=511)
    config = transformers.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **tokens)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def made(model, *grids, **options):
    return dict(inputs.noise_prompt(model.config, [(1, *grid) for grid in grids], **options))


def batch_of(model, prompts, left=True):
    """One batch of prompts of different lengths, filled up at one side."""
    longest = max(p["input_ids"].shape[1] for p in prompts)

    def fill(name, value):
        rows = []
        for p in prompts:
            filler = torch.full((1, longest - p[name].shape[1]), value, dtype=p[name].dtype)
            rows.append(torch.cat([filler, p[name]] if left else [p[name], filler], 1))
        return torch.cat(rows)
    return dict(input_ids=fill("input_ids", 0), attention_mask=fill("attention_mask", 0), mm_token_type_ids=fill("mm_token_type_ids", 0),
                pixel_values=torch.cat([p["pixel_values"] for p in prompts]), image_grid_thw=torch.cat([p["image_grid_thw"] for p in prompts]))


def close(a, b, tolerance=1e-5):
    error = (a - b).abs().max().item()
    assert error < tolerance, error


# the tower


def test_the_tower_is_the_librarys(model, older):
    for one in (model, older):
        for grids in ([[1, 12, 20], [1, 10, 8]], [[3, 6, 10]], [[1, 2, 2]]):
            grid = torch.tensor(grids)
            pixels = torch.randn(int(grid.prod(-1).sum()), 1176)
            features, index = encode_vision(one.model.visual, pixels, grid)
            assert torch.equal(features, one.model.visual(pixels, grid_thw=grid).pooler_output)
            assert torch.equal(index, torch.arange(len(features)))


def test_layout_by_hand():
    frame, window, place = layout(torch.tensor([[1, 8, 12], [2, 4, 4]]), 2, 4)
    assert frame.tolist() == [0] * 24 + [1] * 4 + [2] * 4
    assert window.view(-1)[:24].view(4, 6).tolist() == [[0, 0, 0, 0, 1, 1]] * 4
    assert window[24:].tolist() == [2] * 4 + [3] * 4
    assert place[:7].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5], [1, 0]]


def test_attention_in_runs_of_any_length_is_one_big_mask():
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([3, 1, 3, 2, 5]))
    q, k, v = torch.randn(3, len(ids), 4, 2, 8)
    bias = torch.randn(len(ids))
    owner = ids.repeat_interleave(4)
    rows, columns, values = (t.flatten(0, 1).transpose(0, 1) for t in (q, k, v))
    logits = rows @ columns.transpose(1, 2) * 8**-0.5 + bias.repeat_interleave(4)
    wanted = (logits.masked_fill(owner[:, None] != owner, -torch.inf).softmax(-1) @ values).transpose(0, 1).reshape(len(ids), 4, 16)
    close(attend(q, k, v, segments(ids), bias), wanted)
    assert sum(group.numel() for group in segments(ids)) == len(ids) and [len(r) for r in runs(ids)] == [3, 1, 3, 2, 5]


# exactness


@pytest.mark.parametrize("where, name", EVERY)
def test_keeping_all_is_the_model(model, where, name):
    given = made(model, (12, 20), (10, 8))
    dense = model(**given)
    with reduce_vision_tokens(model, name, 1.0, where):
        reduced = model(**given)
        assert torch.equal(reduced.logits, dense.logits)
        more = model(input_ids=given["input_ids"][:, -3:], past_key_values=reduced.past_key_values)
    assert torch.equal(more.logits, model(input_ids=given["input_ids"][:, -3:], past_key_values=dense.past_key_values).logits)


@pytest.mark.parametrize("where, name", EVERY)
def test_every_method_keeps_its_share_of_each_image(model, where, name):
    given = made(model, (16, 16), (8, 12))
    with reduce_vision_tokens(model, name, 0.25, where) as plan:
        out = model(**given)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    units, text = 64 + 24, given["input_ids"].shape[1] - 88
    if where == "language":
        assert lengths[0] == units + text and lengths[-1] == 22 + text and sorted(lengths, reverse=True) == lengths
    else:
        (index,) = plan.kept
        assert [(index < 64).sum().item(), (index >= 64).sum().item()] == [16, 6] and len(index.unique()) == 22
        assert set(lengths) == {22 + text} and out.logits.shape[1] == 22 + text
    assert out.logits.isfinite().all()


def test_before_the_tower_is_the_librarys_tower_on_those_patches(model):
    """Its own forward takes positions and windows of a selection; ours finds them."""
    visual, grid = model.model.visual, torch.tensor([[1, 24, 20]])
    pixels = torch.randn(480, 1176)
    plan = plan_reduction(model.config, "random", 0.4, "before")
    features, index = encode_vision(visual, pixels, grid, plan)
    _, window, place = layout(grid, 2, 4)
    order = window[index].argsort(stable=True)
    corner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    lengths = torch.unique_consecutive(window[index][order], return_counts=True)[1]
    theirs = visual(pixels.view(120, 4, -1)[index].flatten(0, 1), grid_thw=grid, window_index=order,
                    position_ids=(place[index][:, None] * 2 + corner).flatten(0, 1), cu_seqlens=torch.tensor([0, 4 * len(index)]),
                    cu_window_seqlens=torch.cat([torch.zeros(1), 4 * lengths.cumsum(0)]).int()).pooler_output
    assert len(index) == 48 and len(lengths) == 9
    close(features, theirs)


@pytest.mark.parametrize("where, name", [("after", "key_norm"), ("language", "fastv")])
def test_what_is_dropped_is_as_if_it_were_masked(model, where, name):
    """After the tower: columns of the full prompt that nobody sees; in the language model from that layer on."""
    given = made(model, (12, 12))
    inner = model.model
    with reduce_vision_tokens(model, name, 0.3, where) as plan:
        out = model(**given).logits[:, -1]
    vision = given["input_ids"][0] == model.config.image_token_id
    h = inner.get_input_embeddings()(given["input_ids"])
    h[0, vision] = encode_vision(inner.visual, given["pixel_values"], given["image_grid_thw"])[0]
    positions, _ = inner.get_rope_index(given["input_ids"], given["mm_token_type_ids"], image_grid_thw=given["image_grid_thw"])
    turn, n = inner.language_model.rotary_emb(h, positions), h.shape[1]
    seen = torch.ones(n).bool()
    if where == "after":
        seen[vision.nonzero().flatten()] = torch.zeros(36).bool().index_fill(0, plan.kept[0], True)
    for i, layer in enumerate(inner.language_model.layers):
        if where == "language" and i in plan.layers:
            a, attention = layer.input_layernorm(h), layer.self_attn
            q = attention.q_proj(a).view(1, n, -1, attention.head_dim).transpose(1, 2)
            k = attention.k_proj(a).view(1, n, -1, attention.head_dim).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, *turn)
            score = (q[0, :, -1:] @ k[0].transpose(1, 2) * attention.scaling).softmax(-1).mean((0, 1))
            best = score.masked_fill(~vision, -1).topk(11).indices
            seen = (~vision).index_fill(0, best, True)
        mask = torch.ones(n, n).tril().bool() & seen
        h = layer(h, attention_mask=(mask | torch.eye(n).bool())[None, None], position_embeddings=turn)
    close(out, model.lm_head(inner.language_model.norm(h))[:, -1])


@each_place
def test_an_answer_with_a_cache_equals_one_without(model, where, name):
    given = made(model, (12, 12), (8, 8))
    words = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with reduce_vision_tokens(model, name, 0.4, where):
        cached, whole = (model.generate(**given, **words, use_cache=use) for use in (True, False))
        assert torch.equal(cached.sequences, whole.sequences)
        close(torch.stack(cached.logits), torch.stack(whole.logits))
        # by hand: the same tokens at once, with the full mask, with the short mask, without one; then one by one
        answer = cached.sequences[:, given["input_ids"].shape[1]:]
        for full in (True, False, None):
            out = model(**given)
            columns = (given["input_ids"] if full else out.past_key_values.layers[0].keys[0, 0][None]).shape[1]
            mask = {} if full is None else dict(attention_mask=torch.ones(1, columns + 4).long())
            more = model(input_ids=answer[:, :4], past_key_values=out.past_key_values, **mask)
            close(more.logits, torch.stack(cached.logits[1:], 1))
        out = model(**given)
        for i in range(4):
            out = model(input_ids=answer[:, i : i + 1], past_key_values=out.past_key_values)
            close(out.logits[:, -1], cached.logits[i + 1])


@each_place
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_batch_of_different_images_is_one_by_one(model, where, name, implementation):
    prompts = [made(model, (12, 20), text=7), made(model, (8, 8), text=21, seed=1), made(model, (16, 12), (4, 4), text=5, seed=2)]
    words = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    model.set_attn_implementation(implementation)
    try:
        with reduce_vision_tokens(model, name, 0.4, where):
            alone = [torch.stack(model.generate(**p, **words).logits, 1)[0] for p in prompts]
            together = torch.stack(model.generate(**batch_of(model, prompts), **words).logits, 1)
            with pytest.raises(ValueError, match="attention_mask=.* on the right .* is not allowed; allowed: filled up on the left only"):
                model(**batch_of(model, prompts, left=False))
    finally:
        model.set_attn_implementation("sdpa")
    for one, row in zip(alone, together, strict=True):
        close(row, one)


def test_eager_equals_sdpa(model):
    given = made(model, (12, 12))
    for where, name in RULES.items():
        with reduce_vision_tokens(model, name, 0.3, where):
            fused = model(**given).logits
            model.set_attn_implementation("eager")
            plain = model(**given).logits
            model.set_attn_implementation("sdpa")
        close(fused, plain)


@each_place
def test_video(model, where, name):
    """Each frame keeps its share before the language model; the positions in time are the library's."""
    given = dict(inputs.noise_prompt(model.config, [(3, 8, 12)], video=True), second_per_grid_ts=torch.tensor([2.0]))
    dense = model(**given)
    with reduce_vision_tokens(model, name, 1.0, where):
        assert torch.equal(model(**given).logits, dense.logits)
    with reduce_vision_tokens(model, name, 0.25, where) as plan:
        said = model.generate(**given, max_new_tokens=3, do_sample=False)
        assert said.shape[1] == given["input_ids"].shape[1] + 3
    if where != "language":
        assert torch.bincount(plan.kept[0] // 24).tolist() == [6, 6, 6]


def test_images_and_a_video_in_one_prompt(model):
    image, video = made(model, (8, 8), text=5), dict(inputs.noise_prompt(model.config, [(2, 8, 4)], text=5, video=True))
    both = {name: torch.cat([image[name], video[name]], 1) for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    both |= {name: value for part in (image, video) for name, value in part.items() if "pixel" in name or "grid" in name}
    dense = model(**both)
    with reduce_vision_tokens(model, "grid", 1.0):
        assert torch.equal(model(**both).logits, dense.logits)
    with reduce_vision_tokens(model, "grid", 0.5) as plan:
        assert model(**both).logits.shape[1] == both["input_ids"].shape[1] - 8 - 8
        assert [len(index) for index in plan.kept] == [8, 8]


@each_place
def test_beams(model, where, name):
    given = made(model, (12, 12))
    words = dict(max_new_tokens=4, num_beams=3, do_sample=False, output_scores=True, return_dict_in_generate=True)
    dense = model.generate(**given, **words)
    with reduce_vision_tokens(model, name, 1.0, where):
        assert torch.equal(model.generate(**given, **words).sequences, dense.sequences)
    with reduce_vision_tokens(model, name, 0.3, where):
        cached, whole = (model.generate(**given, **words, use_cache=use) for use in (True, False))
        several = model.generate(**given, max_new_tokens=2, do_sample=True, num_return_sequences=3)
    assert torch.equal(cached.sequences, whole.sequences) and several.shape[0] == 3
    close(cached.sequences_scores, whole.sequences_scores)


def test_the_older_model(older):
    given = made(older, (12, 20), (8, 8))
    dense = older(**given).logits
    for where, name in EVERY:
        with reduce_vision_tokens(older, name, 1.0, where):
            assert torch.equal(older(**given).logits, dense), (where, name)
    for where, name in dict(RULES, inside="ours").items():
        with reduce_vision_tokens(older, name, 0.3, where):
            words = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
            cached, whole = (older.generate(**given, **words, use_cache=use) for use in (True, False))
        close(torch.stack(cached.logits), torch.stack(whole.logits))


def test_windows_that_are_rebuilt(model):
    """Survivors fill windows of full size: fewer of them, and another result than with windows that shrink."""
    given, logits = made(model, (24, 24)), {}
    for windows in ("stay", "rebuild"):
        with reduce_vision_tokens(model, "grid", 0.25, "inside", windows=windows):
            logits[windows] = model(**given).logits
    assert not torch.equal(logits["stay"], logits["rebuild"])
    plan = plan_reduction(model.config, "grid", 0.25, "before", windows="rebuild")
    units = embed_units(model.model.visual, given["pixel_values"], given["image_grid_thw"])
    left = reduce_in_tower(plan, units, -1)
    assert [len(r) for r in runs(left.window)] == [16, 16, 4] and len(units.window.unique()) == 9


# around it


def test_the_model_is_restored(model):
    given, inner = made(model, (8, 8)), model.model
    model(**given)
    dense, deltas = model(**given).logits, inner.rope_deltas
    with pytest.raises(KeyError), reduce_vision_tokens(model, "grid", 0.5):
        model(**made(model, (12, 8)))
        raise KeyError("from inside")
    assert "forward" not in vars(inner) and inner.rope_deltas is deltas
    with reduce_vision_tokens(model, "grid", 0.5):
        outer = model(**given).logits
        with reduce_vision_tokens(inner, "random", 0.25):
            assert model(**given).logits.shape[1] == outer.shape[1] - 4
        assert torch.equal(model(**given).logits, outer)
    assert torch.equal(model(**given).logits, dense)


def test_text_alone_is_untouched(model):
    text = dict(input_ids=torch.randint(9, 400, (2, 12)), attention_mask=torch.ones(2, 12).long())
    dense, said = model(**text).logits, model.generate(**text, max_new_tokens=4, do_sample=False)
    for where, name in RULES.items():
        with reduce_vision_tokens(model, name, 0.1, where):
            assert torch.equal(model(**text).logits, dense) and torch.equal(model(text["input_ids"]).logits, dense)
            assert torch.equal(model.generate(**text, max_new_tokens=4, do_sample=False), said)


@pytest.mark.parametrize("arguments, said", [
    (("grid", 0), "keep ratio=0 is not allowed"), (("grid", 1.5), "keep ratio=1.5 is not allowed"), (("grid", True), "keep ratio=True"),
    (("sort", 0.5), "method='sort' is not allowed; allowed: random, grid"),
    (("fastv", 0.5), "where for fastv='after' is not allowed; allowed: language"),
    (("grid", 0.5, "inside", [9]), "layers=[9] is not allowed; allowed: a list of ascending whole numbers from 0 to 3"),
    (("fastv", 0.5, "language", [2, 1]), "layers=[2, 1]"), (("grid", 0.5, "inside", 1), "layers=1"),
    (("grid", 0.5, "inside", None, "move"), "windows='move' is not allowed; allowed: stay, rebuild")])
def test_a_wrong_argument_is_one_clear_line(model, arguments, said):
    with pytest.raises(ValueError, match="is not allowed") as error, reduce_vision_tokens(model, *arguments):
        pass
    assert said in str(error.value) and "\n" not in str(error.value) and "forward" not in vars(model.model)


def test_an_unsupported_model_is_one_clear_line():
    small = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(TypeError, match=r"CLIPVisionModel is not supported; supported: Qwen2.5-VL"), reduce_vision_tokens(small, "grid", 0.5):
        pass


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


@pytest.mark.parametrize("change, said", [
    (lambda given: without(given, "mm_token_type_ids"), "mm_token_type_ids=None"),
    (lambda given: dict(given, output_attentions=True), "output_attentions"),
    (lambda given: dict(given, labels=given["input_ids"]), "labels='given' is not allowed; allowed: None"),
    (lambda given: dict(given, attention_mask=given["attention_mask"].index_fill(1, torch.tensor([3]), 0)), "attention_mask='filled up on the right or inside'"),
    (lambda given: dict(given, input_ids=given["input_ids"][:, 3:], attention_mask=None, mm_token_type_ids=None), "placeholders=15"),
    (lambda given: dict(without(given, "input_ids"), inputs_embeds=torch.zeros(1, 58, 64)), "input_ids=None")])
def test_inputs_that_cannot_be_reduced(model, change, said):
    given = made(model, (8, 8))
    with reduce_vision_tokens(model, "grid", 0.5), pytest.raises(ValueError, match="is not allowed") as error:
        model(**change(given))
    assert said in str(error.value) and "\n" not in str(error.value)


def refused(model, said, kind=ValueError):
    """In one line, when the block begins and when a prompt is read in it."""
    with pytest.raises(kind, match=said) as error, reduce_vision_tokens(model, "grid", 0.5):
        pass
    assert "\n" not in str(error.value) and "forward" not in vars(model.model) and not model._forward_pre_hooks


@pytest.mark.parametrize("place", ["visual", "visual.blocks.1", "visual.blocks.1.attn", "language_model"])
def test_hooks_and_patches_that_would_be_left_out_are_refused(model, place):
    part, given = model.model.get_submodule(place), made(model, (8, 8))
    hook = part.register_forward_hook(lambda *_: None)
    refused(model, f"hooks on=.'{place}'")
    hook.remove()
    part.forward = lambda *args, **kwargs: None
    refused(model, f"forwards of their own=.'{place}'")
    del part.forward
    kind = type(part)
    part.__class__ = type("Own", (kind,), dict(forward=lambda self, *args, **kwargs: None, __module__=__name__))
    refused(model, f"forwards of their own=.'{place}'")
    part.__class__ = kind
    attention = model.model.visual.blocks[1].attn
    attention.is_causal = True
    refused(model, "layer 1 with is_causal=True is not supported", TypeError)
    attention.is_causal = False
    with reduce_vision_tokens(model, "grid", 0.5):
        hook = part.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="hooks on"):
            model(**given)
        hook.remove()
        model(**given)


def test_a_forward_of_the_models_own_and_hidden_states_by_configuration_are_refused(model):
    inner, given = model.model, made(model, (8, 8))
    before = inner.forward
    inner.forward = lambda *args, **kwargs: before(*args, **kwargs)
    with pytest.raises(ValueError, match="modules patched=\"the model's forward\""), reduce_vision_tokens(model, "grid", 0.5):
        pass
    del inner.forward
    for config in (inner.config, inner.language_model.config):
        config.output_hidden_states = True
        with reduce_vision_tokens(model, "grid", 0.5), pytest.raises(ValueError, match="options=.'output_hidden_states'"):
            model(**given)
        config.output_hidden_states = False


@pytest.mark.parametrize("part", ["visual", "language_model"])
def test_a_registered_attention_is_refused(model, part, monkeypatch):
    registry = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(registry._local_mapping, "sharp", lambda *args, **kwargs: None)
    monkeypatch.setattr(model.model.get_submodule(part).config, "_attn_implementation_internal", "sharp")
    refused(model, "attn_implementation='sharp' is not supported", TypeError)


def test_another_image_asks_anew_without_a_cache(model):
    """A prompt that begins like the last one but shows another image is no answer that has grown."""
    given, other = made(model, (12, 12)), made(model, (12, 12), seed=3)
    more = torch.randint(9, 400, (1, 3))
    longer = dict(other, **{name: torch.cat([given[name], filler], 1) for name, filler in (
        ("input_ids", more), ("attention_mask", torch.ones_like(more)), ("mm_token_type_ids", torch.zeros_like(more)))})
    with reduce_vision_tokens(model, "fastv", 0.3, "language"):
        alone = model(**longer, use_cache=False).logits
    with reduce_vision_tokens(model, "fastv", 0.3, "language"):
        model(**given, use_cache=False)
        close(model(**longer, use_cache=False).logits, alone)


def test_caches_that_cannot_be_reduced(model):
    given = made(model, (8, 8))
    with reduce_vision_tokens(model, "grid", 0.5):
        out = model(**given)
        with pytest.raises(ValueError, match="past_key_values='DynamicCache' is not allowed; allowed: None or an empty"):
            model(**given, past_key_values=out.past_key_values)
        with pytest.raises(ValueError, match="past_key_values='StaticCache'"):
            model.generate(**given, max_new_tokens=2, cache_implementation="static", disable_compile=True)
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=given["input_ids"][:, :2], past_key_values=out.past_key_values, attention_mask=torch.ones(1, 7).long())
        assert model(**given, use_cache=False).past_key_values is None


def test_generate_without_token_types_is_refused(model):
    """The library would take one-dimensional positions, silently."""
    with reduce_vision_tokens(model, "grid", 0.5), pytest.raises(ValueError, match="mm_token_type_ids"):
        model.generate(**without(made(model, (8, 8)), "mm_token_type_ids"), max_new_tokens=2)


def test_decoding_that_rolls_its_cache_back_is_refused(model):
    """It would crop by the length of the whole prompt, which changes nothing of a shorter cache."""
    given = made(model, (8, 8))
    model.generate(**given, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)  # the library alone does it
    with reduce_vision_tokens(model, "grid", 0.5), pytest.raises(ValueError, match="generate='assisted or prompt-lookup decoding' is not allowed"):
        model.generate(**given, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)


def test_a_chat_in_a_pipeline(model, tmp_path):
    """From a folder, through the processor and its chat format, as a user has it."""
    folder = save_checkpoint(model, tmp_path)
    study = checkpoints.load_study(checkpoints.locate_model(str(folder), "tiny", False), "tiny", "cpu", torch.float32)
    assert study.why_not == "" and study.slug.startswith(f"{folder.name}-")
    picture = Image.new("RGB", (112, 84), "red")
    given = study.question(picture, "what colour?", 12)
    assert given["image_grid_thw"].prod().item() // 4 == 12 and int((given["input_ids"] == study.config.image_token_id).sum()) == 12
    pipe = transformers.pipeline("image-text-to-text", model=study.model, processor=study.processor)
    message = [dict(role="user", content=[dict(type="image", image=picture), dict(type="text", text="what colour?")])]
    words = dict(generate_kwargs=dict(do_sample=False, max_new_tokens=4), return_full_text=False)
    dense = pipe(text=message, **words)[0]["generated_text"]
    with reduce_vision_tokens(study.model, "key_norm", 1.0):
        assert pipe(text=message, **words)[0]["generated_text"] == dense
    for where, name in RULES.items():
        with reduce_vision_tokens(study.model, name, 0.5, where) as plan:
            assert isinstance(pipe(text=message, **words)[0]["generated_text"], str)
        assert len(plan.kept) == 1 and len(plan.kept[0]) == (12 if where == "language" else 6)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n")


def save_checkpoint(model, folder):
    """A folder with a tiny model, a tokenizer of single bytes, and the library's own processor."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=SPECIAL[1:], eos_token="<|im_end|>",
                                                     pad_token="<|endoftext|>")
    tokens = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>", vision_start_token_id="<|vision_start|>",
                  vision_end_token_id="<|vision_end|>")
    config = transformers.Qwen2_5_VLConfig(**shapes.SHAPES["tiny"], tie_word_embeddings=False,
                                           **{name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()})
    torch.manual_seed(1)
    folder = folder / "tiny-chat"
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    transformers.Qwen2_5_VLProcessor(transformers.Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT).save_pretrained(folder)
    return folder


# what it costs


@pytest.mark.parametrize("where", PLACES)
def test_multiply_adds_and_memory_are_as_computed(model, older, where):
    for one in (model, older):
        given = made(one, (16, 16))
        for keep in (1.0, 0.25):
            plan = plan_reduction(one.config, "random" if where == "language" else "grid", keep, where)
            with reduce_vision_tokens(one, plan.method, keep, where), sdpa_kernel(SDPBackend.MATH):
                counted = count_flops(lambda one=one, given=given: one(**given, logits_to_keep=1)) / 2
                cache = one(**given, logits_to_keep=1).past_key_values
            assert abs(counted / sum(shapes.prefill_macs(one.config, (1, 16, 16), 42, plan)) - 1) < 1e-3
            held = tensor_bytes(t for layer in cache.layers for t in (layer.keys, layer.values))
            assert held == shapes.cache_bytes(one.config, (1, 16, 16), 42, plan, 4)


def test_the_further_in_front_the_cheaper():
    config = shapes.shape_config("3b")
    cost = {where: sum(shapes.prefill_macs(config, (1, 32, 32), 40, plan_reduction(config, "random", 0.25, where))) for where in PLACES}
    dense = shapes.prefill_macs(config, (1, 32, 32), 40)
    assert cost["before"] < cost["inside"] < cost["after"] < cost["language"] < sum(dense)
    assert 0.4 < dense[0] / sum(dense) < 0.5, "about half of the published 3B model's prompt is its tower"
    assert shapes.cache_bytes(config, (0, 0, 0), 1) == 36864


# methods


def view_of(x, **given):
    """A View of features (n, C) on a square grid; queries and keys are the features."""
    side = round(len(x) ** 0.5)
    place = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    heads = x[:, None, None, :]
    return View(x, place, heads, heads, **dict(dict(received=lambda: x[:, 0], middle=x[:, 1]), **given))


def kept_by(name, view, count):
    kept, mixture = METHODS[name].choose(view, count)
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == count
    if mixture is not None:
        close(mixture.sum(1), torch.ones(count))
        assert (mixture >= 0).all() and mixture.shape == (count, len(view.x))
    return kept.tolist(), mixture


def test_norms_in_both_directions():
    x = torch.arange(1.0, 17)[:, None].expand(16, 4).contiguous()
    for part in "qk":
        which = {"q": "query", "k": "key"}[part]
        assert kept_by(f"{which}_norm", view_of(x), 3)[0] == [13, 14, 15] and kept_by(f"{which}_norm_low", view_of(x), 3)[0] == [0, 1, 2]
    assert kept_by("patch_norm", view_of(x), 2)[0] == [14, 15] and kept_by("attention", view_of(x), 2)[0] == [14, 15]


def test_the_grid_is_even_and_chance_is_not():
    view = view_of(torch.randn(64, 4))
    quarter = {(r, c) for r, c in view.place[kept_by("grid", view, 16)[0]].tolist()}
    assert all(len(quarter & {(2 * r + i, 2 * c + j) for i in (0, 1) for j in (0, 1)}) == 1 for r in range(4) for c in range(4))
    draws = [kept_by("random", view_of(view.x, seed=seed), 16)[0] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_diversity_takes_what_is_unlike():
    x = torch.cat([torch.eye(8)[[0] * 6 + [1] * 6], torch.eye(8)[2:6]]) + 0.01 * torch.randn(16, 8)
    assert set(kept_by("divprune", view_of(x), 6)[0]) >= {12, 13, 14, 15}
    assert {12, 13, 14, 15} <= set(farthest(x, torch.tensor([0, 6]), 6).tolist())
    half = kept_by("vispruner", view_of(x, received=lambda: torch.arange(16.0).flip(0)), 6)[0]
    assert {0, 1, 2} <= set(half), "half by attention"


def test_methods_that_merge():
    x = torch.randn(16, 6)
    received = torch.arange(16.0)
    kept, mixture = kept_by("visionzip", view_of(x, received=lambda: received), 8)
    assert set(kept) >= {10, 11, 12, 13, 14, 15}, "the dominant by attention"
    assert torch.equal(mixture[kept.index(15)], torch.eye(16)[15]), "a dominant token stays as it is"
    close(mixture.gt(0).sum(0).float(), torch.ones(16)), "each token is in one"
    kept, mixture = kept_by("sparsevlm", view_of(x, received=lambda: received), 6)
    assert kept == [10, 11, 12, 13, 14, 15] and mixture.gt(0).sum().item() == 6 + 3 and mixture[:, 7:10].gt(0).sum().item() == 3
    kept, mixture = kept_by("pool", view_of(x), 4)
    close(mixture @ x, x.view(2, 2, 2, 2, 6).mean((1, 3)).view(4, 6))


def test_hiprune_keeps_anchors_their_neighbours_and_the_best_of_the_rest():
    middle, received = torch.zeros(16), torch.zeros(16)
    middle[5], received[15], received[12] = 1, 0.5, 0.4
    kept, _ = kept_by("hiprune", view_of(torch.zeros(16, 2), received=lambda: received, middle=middle), 7)
    assert kept == [1, 4, 5, 6, 9, 12, 15]


def units_of(x, side=4):
    """Units (U, 1, D) of square windows of side² units."""
    n = len(x)
    zeros = torch.zeros(n, 1, 2)
    window = torch.arange(n) // side**2
    return Units(x[:, None], torch.arange(n), torch.zeros(n).long(), window, torch.zeros(n, 2).long(), zeros, zeros,
                 q=torch.randn(n, 1, 2, 4), k=torch.randn(n, 1, 2, 4))


def test_merging_in_windows():
    x = torch.randn(32, 6)
    left = merge_windows(units_of(x), 0.5)
    assert [len(r) for r in runs(left.window)] == [8, 8] and left.sizes.view(2, 8).sum(1).tolist() == [16, 16]
    again = merge_windows(left, 0.25)
    assert [len(r) for r in runs(again.window)] == [4, 4] and again.sizes.view(2, 4).sum(1).tolist() == [16, 16]
    assert torch.equal(merge_windows(units_of(x), 1.0).x[:, 0], x)
    twins = torch.randn(16, 6).repeat_interleave(2, 0)  # neighbours are equal: merging them loses nothing
    pairs = merge_windows(units_of(twins), 0.5)
    close(pairs.x[:, 0].sort(0).values, twins[::2].sort(0).values)
    assert set(pairs.sizes.tolist()) == {2.0}


def test_ours_keeps_windows_even(model):
    plan = plan_reduction(model.config, "ours", 0.25, "inside")
    assert isinstance(plan, Reduction) and plan.tower_share(0) == 1 and plan.tower_share(4) == 0.25
    given = made(model, (16, 16))
    features, index = encode_vision(model.model.visual, given["pixel_values"], given["image_grid_thw"], plan)
    window = layout(given["image_grid_thw"], 2, 4)[1]
    assert torch.bincount(window[index]).tolist() == [4, 4, 4, 4] and len(features) == 16


def test_a_method_of_ones_own(model):
    METHODS["last"] = Method(top(lambda view: torch.arange(len(view.x))), ("after",))
    try:
        with reduce_vision_tokens(model, "last", 0.25) as plan:
            model(**made(model, (8, 8)))
        assert plan.kept[0].tolist() == [12, 13, 14, 15]
    finally:
        del METHODS["last"]


# the smaller image


def test_the_smaller_image(model):
    given = made(model, (16, 24), (8, 8))
    same = inputs.smaller_image(given, model.config, 1.0)
    assert all(torch.equal(same[name], given[name]) for name in given)
    few = inputs.smaller_image(given, model.config, 0.25)
    assert few["image_grid_thw"].tolist() == [[1, 8, 12], [1, 4, 4]] and few["input_ids"].shape[1] == given["input_ids"].shape[1] - 72 - 12
    assert model(**few).logits.isfinite().all()
    flat = dict(given, pixel_values=torch.full_like(given["pixel_values"], 0.3))
    close(inputs.smaller_image(flat, model.config, 0.3)["pixel_values"], torch.tensor(0.3))
    ramp = torch.linspace(0, 1, 16 * 14)[:, None].expand(-1, 24 * 14)
    rows = ramp.view(8, 2, 14, 12, 2, 14).permute(0, 3, 1, 4, 2, 5).reshape(384, 1, 196).expand(-1, 6, -1).reshape(384, -1)
    small = inputs.smaller_image(dict(made(model, (16, 24)), pixel_values=rows), model.config, 0.25)["pixel_values"].view(4, 6, 2, 2, 6, 14, 14)
    assert (small[1:].mean((1, 2, 3, 4, 5, 6)) > small[:-1].mean((1, 2, 3, 4, 5, 6))).all(), "the picture is the same, top to bottom"


def test_the_smaller_image_of_a_batch(model):
    prompts = [made(model, (8, 8), seed=seed) for seed in (0, 1)]
    few = inputs.smaller_image(batch_of(model, prompts), model.config, 0.25)
    for i, one in enumerate(inputs.smaller_image(p, model.config, 0.25) for p in prompts):
        assert torch.equal(few["input_ids"][i], one["input_ids"][0])
    with pytest.raises(ValueError, match="the same number of tokens"):
        inputs.smaller_image(batch_of(model, [prompts[0], made(model, (8, 12))]), model.config, 0.25)


@pytest.mark.parametrize("h, w, keep", [(8, 8, 0.25), (8, 8, 0.5), (5, 7, 0.3), (1, 9, 0.5), (16, 12, 0.1), (3, 3, 0.01), (4, 30, 0.5)])
def test_a_shrunk_grid_has_at_most_its_share_and_the_shape(h, w, keep):
    rows, columns = inputs.shrink(h, w, keep)
    assert 1 <= rows <= h and 1 <= columns <= w and rows * columns <= max(1, keep * h * w)
    assert rows * columns >= 0.6 * keep * h * w
    assert inputs.shrink(h, w, 1.0) == (h, w)


# answers, checkpoints, scenes


def test_what_the_model_said_is_what_it_finds_likely(model):
    given = made(model, (8, 8))
    said = answers.greedy_answer(model, given, 5)
    logits = answers.answer_logits(model, given, said)
    assert torch.equal(logits.argmax(-1), said[0])
    same = answers.judge_answer(logits, logits, said)
    assert same["same_answer"] == same["token_agreement"] == 1 and same["kl"] == 0 and same["perplexity"] >= 1
    other = answers.judge_answer(logits.flip(0) + torch.randn_like(logits), logits, said)
    assert other["kl"] > 0 and other["token_agreement"] < 1
    assert answers.judge_answer(logits * torch.inf, logits, said) == dict(status="nan")
    with reduce_vision_tokens(model, "fastv", 0.3, "language"):
        fewer = answers.answer_logits(model, given, said)
    assert fewer.shape == logits.shape and not torch.equal(fewer, logits)


def test_the_default_is_not_fetched_without_a_gpu(tmp_path):
    place = checkpoints.locate_model(checkpoints.DEFAULT_MODEL, "small", cuda=False)
    assert (place.folder, place.slug) == (None, "random-qwen2.5-vl-small") and "no GPU" in place.why
    assert checkpoints.locate_model("Qwen/Qwen2-VL-2B-Instruct", "tiny", True, smoke=True).folder is None
    with pytest.raises(ValueError, match="MODEL_ID"):
        checkpoints.locate_model(str(tmp_path), "small", cuda=False)
    with pytest.raises(ValueError, match="SIZE='huge' is not allowed"):
        shapes.shape_config("huge")


def test_a_checkpoint_of_another_kind_is_one_clear_line(tmp_path):
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    place = checkpoints.locate_model(str(tmp_path), "small", cuda=False)
    with pytest.raises(ValueError, match="MODEL_ID") as error:
        checkpoints.load_study(place, "small", "cpu", torch.float32)
    assert "\n" not in str(error.value)


def test_pictures_with_questions():
    asked = pictures.questions(2, seed=3)
    assert [q.kind for q in asked].count("text") == [q.kind for q in asked].count("chart") == 2
    again = pictures.questions(2, seed=3)
    assert all(a.picture.tobytes() == b.picture.tobytes() for a, b in zip(asked, again, strict=True))
    assert asked[-1].picture.tobytes() != asked[-2].picture.tobytes() and asked[-1].picture.size == (448, 448)


def test_scenes_hold_what_is_asked():
    drawn = scenes.draw_scenes(50, torch.Generator().manual_seed(0), test=True)
    same = scenes.draw_scenes(50, torch.Generator().manual_seed(0), test=True)
    assert torch.equal(drawn.pixels, same.pixels)
    shown, room = scenes.unit_labels(drawn)
    assert torch.equal((shown != 10).sum(1), drawn.present.sum(1))
    (given, count), (_, where), (_, which) = (scenes.ask(drawn, task) for task in scenes.TASKS)
    assert torch.equal(count - scenes.ANSWER, drawn.present.sum(1))
    for i in range(50):
        asked = int(where[i] - scenes.ANSWER)
        assert drawn.present[i, asked] and drawn.digit[i, asked] == which[i] - scenes.ANSWER
        assert room[drawn.unit[i, asked]] == asked and shown[i, drawn.unit[i, asked]] == drawn.digit[i, asked]
    energy = drawn.pixels.view(50, 6, 8, 6, 8).transpose(2, 3).reshape(50, 36, 64).pow(2).sum(-1)
    assert energy[shown != 10].min() > energy[shown == 10].mean(), "a digit is where its label says"
    units = given["pixel_values"].view(50, 36, 4, 16).pow(2).sum((2, 3))
    close(units, energy, 1e-3)


def test_training_is_repeatable_and_learns():
    """Few steps: the tower sees digits, and the answers are the same the second time."""
    one, _ = scenes.train_tiny(encode_vision, 0, (3, 3), 100)
    two, _ = scenes.train_tiny(encode_vision, 0, (3, 3), 100)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    given, right = scenes.ask(scenes.draw_scenes(20, torch.Generator().manual_seed(1), test=True), "count")
    assert 0 <= scenes.right_answers(one, given, right) <= 20 and not any(p.requires_grad for p in one.parameters())
