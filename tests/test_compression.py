"""Distil and prune: gates and their expected size, what slicing leaves, compensation, distillation, the Lagrangian, bad input."""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, clean_environment

from effarch.clip.captioned import captioned_clip, clip_features, judge_clip
from effarch.clip.captions import Captions
from effarch.clip.checkpoints import load_checkpoint, locate_checkpoint
from effarch.clip.library_scores import library_scores
from effarch.compression import (
    RULES,
    TOWERS,
    Gates,
    Pressure,
    Student,
    Watch,
    attention_loss,
    collect_moments,
    fewer_layers,
    gate_open,
    gate_sample,
    gate_value,
    hidden_loss,
    kept_anywhere,
    kept_within,
    logit_loss,
    size_left,
    slice_units,
    spaced,
    taylor_scores,
    train_student,
    unit_costs,
    unit_groups,
    unit_scores,
)
from effarch.masking import Pairs
from effarch.token_reduction import encode_images


def close(a, b, limit=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=limit)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PIXELS, LABELS = torch.randint(0, 255, (24, 3, 16, 16), generator=seeded(5)).byte(), torch.arange(24) % 3
CAPTIONS = Captions(("cat", "fire engine", "ship"), PIXELS)
PAIRS = Pairs(PIXELS, CAPTIONS(PIXELS, LABELS), CAPTIONS.tokens)
FEW, WORDS = PAIRS.images(slice(0, 5)), CAPTIONS.tokens[:7]


@pytest.fixture
def clip():
    """Random weights that are large enough for every part to matter."""
    torch.manual_seed(0)
    model = captioned_clip(CAPTIONS, side=16, patch=8, width=32, heads=4, vision=3, text=2).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(3.0)
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def both(model):
    with torch.no_grad():
        return torch.cat(clip_features(model, FEW, WORDS))


def batch():
    return dict(pixels=FEW, tokens=WORDS, which=torch.arange(5), captions=torch.arange(5))


def params(model):
    return sum(p.numel() for p in model.parameters())


# gates

def test_gates_are_exact_zeros_and_ones_as_often_as_the_formula_says():
    log_alpha = torch.linspace(-5, 5, 11)
    z = gate_sample(log_alpha, torch.rand(40_000, 11, generator=seeded()).clamp(1e-6, 1 - 1e-6))
    assert z.min() == 0 and z.max() == 1
    close((z > 0).float().mean(0), gate_open(log_alpha), 0.01)
    close((z < 1).float().mean(0), gate_open(-log_alpha), 0.01)  # the noise is symmetric


def test_without_noise_a_gate_is_its_sample_in_the_middle_of_a_temperature_of_one():
    close(gate_value(torch.tensor([-100.0, 0.0, 100.0])), torch.tensor([0.0, 0.5, 1.0]))
    close(gate_sample(torch.zeros(1), torch.tensor([0.5])), torch.tensor([0.5]))


def test_expected_size_is_the_mean_size_of_draws(clip):
    gates, draw = Gates(clip), seeded(1)
    with torch.no_grad():
        gates.log_alpha.copy_(2 * torch.randn(len(gates.costs), generator=draw))
    sizes = []
    for _ in range(1500):
        gates.draw(draw)
        sizes.append(float(gates.costs[gates.values > 0].sum() / gates.costs.sum()))
    assert abs(sum(sizes) / len(sizes) - float(gates.size().detach())) < 0.004


def test_open_gates_change_nothing_and_leave_nothing_behind(clip):
    whole, gates = both(clip), Gates(clip)
    assert torch.equal(both(clip), whole)  # no values: not even multiplied
    gates.values = torch.ones_like(gates.costs)
    close(both(clip), whole, 1e-6)
    gates.values = torch.zeros_like(gates.costs)
    assert (both(clip) - whole).abs().max() > 1e-2
    gates.remove()
    assert torch.equal(both(clip), whole) and not any(part._forward_pre_hooks for part in clip.modules())


def test_a_gradient_reaches_every_gate_and_agrees_with_a_difference(clip):
    gates = Gates(clip, start=0.0)
    gates.draw(seeded(2))
    loss = sum(part[:, 0].sum() for part in clip_features(clip, FEW, WORDS))
    (gradient,) = torch.autograd.grad(loss, gates.log_alpha, retain_graph=True)
    inside = (gates.values > 0) & (gates.values < 1)
    assert (gradient[inside] != 0).all() and (gradient[~inside] == 0).all() and inside.any()
    clip.double()
    gates.values = gates.values.detach().double().requires_grad_()
    see = lambda: sum(part[:, 0].sum() for part in clip_features(clip, FEW.double(), WORDS))
    (gradient,) = torch.autograd.grad(see(), gates.values)
    for i in (0, 5, 200, len(gradient) - 1):
        values, sides = gates.values.detach(), []
        for step in (1e-4, -1e-4):
            gates.values = values.clone()
            gates.values[i] += step
            sides.append(float(see().detach()))
        gates.values = values
        assert abs((sides[0] - sides[1]) / 2e-4 - float(gradient[i])) < 1e-5


# sizes and slices

@pytest.mark.parametrize("choose", [kept_within, kept_anywhere])
def test_sliced_is_gated_and_as_small_as_the_formula_says(clip, choose):
    gates = Gates(clip)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.randn(len(gates.costs), generator=seeded(3)))
    kept = choose(gates.log_alpha, gates.groups, 0.5)
    stays = torch.cat([torch.zeros(g.count).index_fill(0, index, 1.0) for g, index in zip(gates.groups, kept, strict=True)])
    gates.values = stays * gate_value(gates.log_alpha.detach())
    gated = both(clip)
    gates.remove()
    sliced = slice_units(clip, kept, gates.groups, gate_value(gates.log_alpha.detach()))
    close(both(sliced), gated)
    assert params(clip) - params(sliced) == pytest.approx((1 - size_left(kept, gates.groups)) * float(gates.costs.sum()), abs=0.5)
    assert abs(size_left(kept, gates.groups) - 0.5) < 0.02
    assert [g.count for g in unit_groups(sliced)] == [len(index) for index in kept]
    assert all(type(part) is torch.nn.Linear for part in (sliced.vision_model.encoder.layers[0].mlp.fc1, sliced.text_model.encoder.layers[0].self_attn.q_proj))


def test_all_units_kept_is_the_model_itself(clip):
    groups = unit_groups(clip)
    scores = unit_scores(clip, groups, "magnitude")
    for kept in (kept_within(scores, groups, 1.0), kept_anywhere(scores, groups, 1.0)):
        assert size_left(kept, groups) == 1
        close(both(slice_units(clip, kept, groups)), both(clip), 1e-6)


def test_the_price_of_units_in_numbers_and_in_multiply_adds(clip):
    by = {what: unit_groups(clip, by=what) for what in ("parameters", "multiply-adds")}
    head, channel = by["parameters"][:2]
    assert (head.count, head.cost) == (4, 3 * 8 * 33 + 8 * 32) and (channel.count, channel.cost) == (128, 65)
    head, channel = by["multiply-adds"][:2]  # 5 tokens: queries, keys, values, output; both products of attention
    assert head.cost == 5 * 4 * 8 * 32 + 2 * 25 * 8 and channel.cost == 5 * 2 * 32
    assert [g.tower for g in by["parameters"]] == ["vision"] * 6 + ["text"] * 4
    assert {g.tower for g in unit_groups(clip, ("text",))} == {"text"}


def test_anywhere_takes_the_best_but_leaves_one_of_each_kind(clip):
    groups = unit_groups(clip)
    scores = torch.cat([torch.full((g.count,), float(g.tower == "text")) + torch.linspace(0, 0.5, g.count) for g in groups])
    kept = kept_anywhere(scores, groups, 0.5)
    for group, index in zip(groups, kept, strict=True):
        assert len(index) >= 1 and group.count - 1 in index
        assert len(index) == group.count or group.tower == "vision"
    assert size_left(kept, groups) <= 0.5 + 1e-6


def test_what_leaves_is_compensated_by_least_squares(clip):
    """On the images it was fitted to, a compensated slice of one layer is closer; and a unit that repeats another can leave unseen."""
    with torch.no_grad():
        mlp = clip.vision_model.encoder.layers[-1].mlp
        mlp.fc1.weight[64:] = mlp.fc1.weight[:64]
        mlp.fc1.bias[64:] = mlp.fc1.bias[:64]
    moments = collect_moments(clip, [(FEW, WORDS)])
    groups = unit_groups(clip)
    kept = [torch.arange(64) if (g.tower, g.layer, g.kind) == ("vision", 2, "channels") else torch.arange(g.count) for g in groups]
    plain, repaired = (both(slice_units(clip, kept, groups, moments=m)) for m in (None, moments))
    assert (plain - both(clip)).abs().max() > 1e-2
    assert (repaired - both(clip)).abs().max() < 0.05 * (plain - both(clip)).abs().max()


def test_moments_are_those_of_what_enters_the_second_matrices(clip):
    seen = []
    hook = clip.text_model.encoder.layers[1].mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    moments = collect_moments(clip, [(FEW[:2], WORDS[:3]), (FEW[2:], WORDS[3:])])
    hook.remove()
    rows = torch.cat(seen)
    close(moments["text", 1, "channels"].second, rows.T @ rows / len(rows), 1e-5)
    assert set(moments) == {(g.tower, g.layer, g.kind) for g in unit_groups(clip)}
    assert not any(part._forward_pre_hooks for part in clip.modules())


def test_rules_by_hand(clip):
    groups, moments = unit_groups(clip), collect_moments(clip, [(FEW, WORDS)])
    layer, found = clip.vision_model.encoder.layers[0], moments["vision", 0, "heads"]
    head = slice(8, 16)  # the second one
    out = layer.self_attn.out_proj.weight[:, head]
    wanted = {"Wanda": (found.second.diagonal()[head] * out.double().square().sum(0)).sum(),
              "magnitude": sum(getattr(layer.self_attn, f"{x}_proj").weight[head].square().sum() for x in "qkv") + out.square().sum()}
    for rule, value in wanted.items():
        assert float(unit_scores(clip, groups, rule, moments)[1]) == pytest.approx(float(value.detach()) ** 0.5, rel=1e-5)
    assert set(RULES) == {"random", "magnitude", "Wanda", "least squares"}


def test_taylor_scores_are_squared_gradients_of_gates(clip):
    student = Student(clip)
    scores = taylor_scores(student, [batch(), batch()])
    gates = Gates(clip)
    gates.values = torch.ones_like(gates.costs, requires_grad=True)
    (gradient,) = torch.autograd.grad(student(**batch()), gates.values)
    close(scores, 2 * gradient.square(), 1e-6)
    assert len(scores) == len(unit_costs(gates.groups)) and (scores > 0).any()


def test_the_library_scores_every_unit_and_finds_a_dead_one(clip):
    pytest.importorskip("torch_pruning")
    layer = clip.text_model.encoder.layers[0]
    with torch.no_grad():
        layer.mlp.fc1.weight[3], layer.mlp.fc2.weight[:, 3] = 0.0, 0.0
    scores = library_scores(clip, Student(clip)(**batch()))
    assert {key: len(found) for key, found in scores.items()} == {(g.tower, g.layer, g.kind): g.count for g in unit_groups(clip)}
    assert scores["text", 0, "channels"].argmin() == 3 and scores["text", 0, "channels"][3] == 0
    assert list(scores) == [(g.tower, g.layer, g.kind) for g in unit_groups(clip)]


def test_without_the_library_one_line_says_so(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="torch-pruning"):
        library_scores(clip, torch.zeros(()))


# distillation

@pytest.mark.parametrize(("depth", "count", "stay"), [(4, 2, [1, 3]), (12, 6, [1, 3, 5, 7, 9, 11]), (4, 3, [0, 1, 3]), (3, 3, [0, 1, 2]), (5, 1, [4])])
def test_layers_are_evenly_spaced_and_the_last_one_stays(depth, count, stay):
    assert spaced(depth, count) == stay


def test_fewer_layers_are_the_teachers_own(clip):
    student, same = fewer_layers(clip, 2, 1)
    assert same == {"vision": [0, 2], "text": [1]}
    assert [len(student.vision_model.encoder.layers), len(student.text_model.encoder.layers)] == [2, 1]
    close(student.vision_model.encoder.layers[1].mlp.fc1.weight, clip.vision_model.encoder.layers[2].mlp.fc1.weight, 0)
    assert params(student) < params(clip) and len(clip.vision_model.encoder.layers) == 3
    assert (student.config.vision_config.num_hidden_layers, clip.config.vision_config.num_hidden_layers) == (2, 3)


def test_watched_attention_is_transformers_own(clip):
    eager = copy.deepcopy(clip)
    eager.set_attn_implementation("eager")
    watch = Watch(clip)
    both(clip)
    with torch.no_grad():
        outs = {"vision": eager.vision_model(pixel_values=FEW, output_attentions=True, output_hidden_states=True),
                "text": eager.text_model(input_ids=WORDS, output_attentions=True, output_hidden_states=True)}
    for tower, out in outs.items():
        for i, own in enumerate(out.attentions):
            close(watch.map(tower, i), own)
            if i + 1 < len(out.attentions):  # the last one is normalised in some versions
                close(watch.hidden[tower, i], out.hidden_states[i + 1], 1e-4)
    watch.remove()
    assert not any(part._forward_hooks for part in clip.modules())


def test_losses_are_zero_for_the_teacher_and_follow_their_equations(clip):
    other, same = copy.deepcopy(clip), {"vision": [0, 1, 2], "text": [0, 1]}
    mine, its = Watch(clip), Watch(other)
    both(clip), both(other)
    assert float(hidden_loss(mine, its, same)) == 0 and float(attention_loss(mine, its, same)) == 0
    with torch.no_grad():
        other.vision_model.encoder.layers[0].mlp.fc2.weight.mul_(1.5)
    both(other)
    got, wanted = mine.hidden["vision", 0], its.hidden["vision", 0]
    naive = ((got - wanted) ** 2).mean() / ((wanted - wanted.mean(0).mean(0)) ** 2).mean()
    close(hidden_loss(mine, its, dict(vision=[0])), naive, 1e-6)
    a, b = mine.map("vision", 1), its.map("vision", 1)
    close(attention_loss(mine, its, dict(vision=[0, 1])), ((a - b) ** 2).sum(-1).mean() / 2, 1e-6)
    features = [torch.nn.functional.normalize(torch.randn(4, 6, generator=seeded(i)), dim=-1) for i in range(4)]
    assert float(logit_loss(*features[:2], *features[:2], 5.0, 5.0)) == pytest.approx(0, abs=1e-6)
    p, q = (9.0 * features[2] @ features[3].T), (5.0 * features[0] @ features[1].T)
    naive = sum((x.softmax(-1) * (x.softmax(-1) / y.softmax(-1)).log()).sum(-1).mean() for x, y in ((p, q), (p.T, q.T))) / 2
    close(logit_loss(*features, 5.0, 9.0), naive)


def test_a_student_learns_from_its_teacher_alone_and_the_teacher_stays(clip):
    before = copy.deepcopy(clip.state_dict())
    student, same = fewer_layers(clip, 2, 1)
    losses = ("logits", "hidden", "attention")
    far = Student(student, losses, clip, same=same)
    first = float(far(**batch()).detach())
    student = train_student(far, PAIRS, 25, 2e-3, batch=12)
    again = Student(student, losses, clip, same=same)
    assert float(again(**batch()).detach()) < 0.8 * first
    assert again.finish().logit_scale.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    assert not any(part._forward_hooks for model in (student, clip) for part in model.modules())


def test_equal_seeds_train_alike_and_the_scale_is_kept(clip):
    first, second = (train_student(Student(copy.deepcopy(clip)), PAIRS, 3, 1e-3, seed=4, batch=8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert float(first.logit_scale) != float(clip.logit_scale)


# the Lagrangian

@pytest.mark.parametrize(("target", "steps"), [(0.3, 60), (0.7, 60), (0.5, 30)])
def test_the_constraint_is_reached_within_two_percent(clip, target, steps):
    gates = Gates(clip)
    pressure = Pressure(gates, target, steps)
    sliced = train_student(Student(clip, gates=gates, pressure=pressure), PAIRS, steps, 1e-3, batch=8)
    assert abs(float(gates.size().detach()) - target) < 0.02
    kept = kept_anywhere(gates.log_alpha, gates.groups, target)
    assert abs(size_left(kept, gates.groups) - target) < 0.02 and torch.isfinite(both(sliced)).all()


def test_the_wanted_size_falls_and_multipliers_rise(clip):
    gates = Gates(clip)
    pressure = Pressure(gates, 0.5, 10)
    gaps = []
    for _ in range(6):
        loss = pressure()
        loss.backward()
        gaps.append(pressure.multipliers[0].grad.item())
        pressure.done += 1
        pressure.multipliers[0].grad = None
    size = float(gates.size().detach())
    assert gaps == pytest.approx([size - wanted for wanted in (0.9, 0.8, 0.7, 0.6, 0.5, 0.5)], abs=1e-5)
    pressure().backward()
    pressure.step()
    assert all(float(value.detach()) > 0 for value in pressure.multipliers)


# the whole

def test_what_is_not_finite_is_not_judged(clip):
    see = lambda index: PAIRS.images(index)
    row, reference = judge_clip(clip, see, PAIRS.captions, CAPTIONS)
    row, _ = judge_clip(clip, see, PAIRS.captions, CAPTIONS, reference, batch=7)
    assert row["cosine_mean"] == pytest.approx(1, abs=1e-5) and row["top1_agreement"] == 1 and 0 <= row["accuracy"] <= 1
    with torch.no_grad():
        clip.visual_projection.weight.fill_(math.nan)
    row, _ = judge_clip(clip, see, PAIRS.captions, CAPTIONS, reference)
    assert all(math.isnan(value) for value in row.values())


@pytest.mark.parametrize(("call", "said"), [
    (lambda m: Gates(m, ("audio",)), r"towers=\('audio',\) is not allowed; allowed: vision, text"),
    (lambda m: unit_groups(m, by="bytes"), "by='bytes' is not allowed; allowed: parameters, multiply-adds"),
    (lambda m: kept_anywhere(torch.zeros(len(unit_costs(unit_groups(m)))), unit_groups(m), 0), "left=0 is not allowed"),
    (lambda m: unit_scores(m, unit_groups(m), "size"), "rule='size' is not allowed; allowed: random"),
    (lambda m: unit_scores(m, unit_groups(m), "Wanda"), "moments=None is not allowed"),
    (lambda m: Student(m, ("logits",)), "teacher=None is not allowed"),
    (lambda m: Student(m, ("cosine",), m), r"losses=\('cosine',\) is not allowed; allowed: contrastive, logits"),
    (lambda m: fewer_layers(m, 4, 1), "count=4 is not allowed; allowed: 1 to 3"),
    (lambda m: Pressure(Gates(m), 1.5, 10), "target=1.5 is not allowed"),
    (lambda m: slice_units(m, [torch.arange(0)] * 10, unit_groups(m)), "kept heads of layer 0"),
    (lambda m: captioned_clip(CAPTIONS, width=30, heads=4), "heads=4 is not allowed; allowed: a divisor of the width, 30"),
])
def test_bad_input_gets_one_line(clip, call, said):
    with pytest.raises(ValueError, match=said) as error:
        call(clip)
    assert "\n" not in str(error.value)


def test_other_models_are_refused(clip):
    with pytest.raises(TypeError, match="CLIPVisionModel is not supported; supported: transformers' CLIPModel"):
        unit_groups(clip.vision_model)


def test_an_adapter_is_not_lost_but_refused_until_it_is_merged(clip):
    peft = pytest.importorskip("peft")
    for target in ("q_proj", "out_proj", "fc1", "fc2"):
        adapted = peft.get_peft_model(copy.deepcopy(clip), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)).eval()
        inner, right = adapted.get_base_model(), both(adapted.get_base_model())
        groups = unit_groups(inner)
        kept = [torch.arange(group.count) for group in groups]
        for call in (lambda m=inner, g=groups, k=kept: slice_units(m, k, g), lambda m=inner, g=groups: unit_scores(m, g, "magnitude")):
            with pytest.raises(TypeError, match=r"Linear in the place of Linear .*merge_and_unload\(\) first"):
                call()
        close(both(slice_units(adapted.merge_and_unload(), kept, groups)), right, 1e-4)


def test_importing_needs_no_plots_and_no_pruning_library():
    code = "import sys, effarch.compression; print([n for n in ('torch_pruning', 'matplotlib', 'pandas', 'effarch.bench') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]


@pytest.mark.checkpoint
def test_a_pretrained_tower_is_sliced_as_it_was_gated():
    folder = os.environ.get("EA_CLIP_CHECKPOINT")
    if not folder:
        pytest.skip("EA_CLIP_CHECKPOINT does not name a checkpoint")
    model = load_checkpoint(locate_checkpoint(folder), torch.device("cpu")).model
    side, gates = model.config.vision_config.image_size, Gates(model, ("vision",))
    pixels, see = torch.randn(1, 3, side, side, generator=seeded()), lambda m: getattr(out := m.get_image_features(pixel_values=pixels), "pooler_output", out)
    with torch.no_grad():
        gates.log_alpha.copy_(torch.randn(len(gates.costs), generator=seeded()))
        kept = kept_anywhere(gates.log_alpha, gates.groups, 0.6)
        gates.values = torch.cat([torch.zeros(g.count).index_fill(0, index, 1.0) for g, index in zip(gates.groups, kept, strict=True)])
        gated = see(model)
        gates.remove()
        close(see(slice_units(model, kept, gates.groups)), gated, 1e-4 * float(gated.abs().max()))
    assert {g.tower for g in gates.groups} == {"vision"} and len(TOWERS) == 2


def test_a_sliced_model_is_not_read_as_if_it_had_all_its_heads(clip):
    groups = unit_groups(clip)
    sliced = slice_units(clip, [torch.arange(max(1, group.count // 2)) for group in groups], groups)
    with pytest.raises(TypeError, match="layer 1 with .* heads .* is not supported|layer 0 with .* heads .* is not supported"):
        encode_images(sliced, FEW)


@pytest.mark.parametrize("wrong", [lambda n: torch.ones(n, dtype=torch.bool), lambda n: torch.tensor([1, 0]), lambda n: torch.tensor([0, n]),
                                   lambda n: torch.tensor([0, 0]), lambda n: torch.tensor([], dtype=torch.long)])
def test_units_that_are_no_ascending_numbers_are_refused(clip, wrong):
    groups = unit_groups(clip)
    kept = [torch.arange(group.count) for group in groups]
    kept[0] = wrong(groups[0].count)
    with pytest.raises(ValueError, match="kept .* at least one"):
        slice_units(clip, kept, groups)
