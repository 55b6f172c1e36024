"""Few-shot methods on frozen features: exact identities, what each may look at, faults in one line, real models and folders."""

import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from PIL import Image

from effarch.clip import labelled
from effarch.clip.checkpoints import random_clip
from effarch.clip.digits import digit_images
from effarch.clip.images import load_images, preprocess
from effarch.clip.labelled import resized, training_images
from effarch.few_shot import (
    BETAS,
    METHODS,
    SCALES,
    WEIGHTS,
    Adapted,
    Blend,
    Bottleneck,
    LowRank,
    Support,
    blend_weights,
    cache_scores,
    choose_blend,
    choose_head,
    clip_adapter,
    draw_support,
    gaussian_scores,
    held_out,
    held_out_loss,
    low_rank_projection,
    refined_cache,
    separating_channels,
    spread,
    text_and_class_means,
    text_probe,
    tip_adapter,
    tip_adapter_f,
    zero_shot,
)
from effarch.token_reduction import encode_images, reducer_for_budget

NEEDS_TWO = {"Tip-Adapter", "APE", "GDA"}  # they hold out a shot and have no published number to fall back on
CLOSED = {"zero-shot", "text + class mean", "Tip-Adapter, α = 1, β = 5.5", "Tip-Adapter", "APE", "GDA"}


def make_support(shots=3, classes=4, d=24, noise=0.6, seed=0, dtype=torch.float32, near=0.7):
    """(Support, test features, their labels): clusters on the sphere; `near`: how much of its class's centre a text has."""
    random = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(classes, d, generator=random, dtype=torch.float64), dim=-1)

    def draw(n):
        labels = torch.arange(classes).repeat_interleave(n)
        return F.normalize(centres[labels] + noise * torch.randn(classes * n, d, generator=random, dtype=torch.float64) / d**0.5, dim=-1), labels

    (x, y), (test, truth) = draw(shots), draw(20)
    other = F.normalize(torch.randn(classes, d, generator=random, dtype=torch.float64), dim=-1)
    text = F.normalize(near * centres + (1 - near) * other, dim=-1)
    return Support(x.to(dtype), y, text.to(dtype)), test.to(dtype), truth


def close(a, b, limit=1e-5):
    """Equal up to a relative error."""
    return bool((a - b).detach().abs().max() <= limit * b.detach().abs().max().clamp(min=1e-9))


# the support set


def unit(*shape):
    return F.normalize(torch.ones(*shape), dim=-1)


@pytest.mark.parametrize("change, said", [
    (dict(features=unit(4, 5)), r"features=\(4, 5\).*as wide as text"),
    (dict(features=2 * unit(4, 6)), "features='rows off length 1"),
    (dict(features=unit(4, 6) * torch.nan), "features='rows off length 1"),
    (dict(features=torch.empty(0, 6), labels=torch.empty(0, dtype=torch.long)), "features='rows off length 1 by nan"),
    (dict(labels=torch.tensor([0, 1, 0])), r"labels=\(\(3,\).*\(4,\) whole numbers"),
    (dict(labels=torch.tensor([0.0, 1, 0, 1])), "whole numbers"),
    (dict(labels=torch.tensor([0, 1, 2, 1])), r"labels=\[0, 2\].*0 to 1"),
    (dict(labels=torch.tensor([0, -1, 0, 1])), r"labels=\[-1, 1\]"),
    (dict(labels=torch.tensor([1, 1, 1, 1])), r"classes without a shot=\[0\].*every class"),
    (dict(text=unit(1, 6)), "at least two classes"),
    (dict(scale=0.0), "scale=0.0.*above 0"),
    (dict(scale=math.inf), "scale=inf"),
])
def test_a_support_set_that_cannot_be_is_named_in_one_line(change, said):
    right = dict(features=unit(4, 6), labels=torch.tensor([0, 1, 0, 1]), text=unit(2, 6))
    assert Support(**right).counts().tolist() == [2, 2]
    with pytest.raises(ValueError, match=said) as error:
        Support(**right | change)
    assert "\n" not in str(error.value)


def test_draws_share_no_image_and_fewer_shots_are_the_first_of_more():
    labels = torch.tensor([0, 1, 2] * 24)[torch.randperm(72, generator=torch.Generator().manual_seed(1))]
    drawn = draw_support(labels, shots=4, draws=6, seed=3)
    assert drawn.shape == (6, 3, 4) and len(drawn.unique()) == drawn.numel(), "24 images a class are enough for 6 · 4"
    assert (labels[drawn] == torch.arange(3)[:, None]).all()
    assert torch.equal(drawn, draw_support(labels, 4, 6, 3)) and not torch.equal(drawn, draw_support(labels, 4, 6, 4))
    more = draw_support(labels, shots=10, draws=5, seed=3)  # 24 images hold two draws of ten
    assert all(len(draw.unique()) == 30 for draw in more) and len(more.unique()) <= 72
    assert len(more[:2].unique()) == 60, "those that can be are still apart"
    assert len({frozenset(draw.flatten().tolist()) for draw in more}) == 5, "no draw is another once more"


def test_more_shots_than_images_are_refused():
    with pytest.raises(ValueError, match="shots=3 is not allowed; allowed: at most 2, the labelled images of class 1"):
        draw_support(torch.tensor([0, 0, 0, 1, 1]), shots=3, draws=1)
    with pytest.raises(ValueError, match="shots=1 .*at most 0, the labelled images of class 0"):
        draw_support(torch.tensor([1, 1]), shots=1, draws=1)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="shots"):
            draw_support(torch.tensor([0, 1]), shots=wrong, draws=1)


# caches


def test_a_cache_is_its_definition_shot_by_shot():
    support, test, _ = make_support(dtype=torch.float64)
    wanted = torch.zeros(len(test), 4, dtype=torch.float64)
    for i, image in enumerate(test):
        wanted[i] = 100 * support.text @ image
        for shot, label in zip(support.features, support.labels, strict=True):
            wanted[i, label] += 1.7 * math.exp(-3.0 * (1 - float(image @ shot)))
    assert close(tip_adapter(support, alpha=1.7, beta=3.0)(test), wanted, 1e-12)


def test_without_weight_a_cache_is_zero_shot_exactly():
    support, test, _ = make_support()
    assert torch.equal(tip_adapter(support, alpha=0.0)(test), zero_shot(support)(test))


def test_an_endlessly_sharp_cache_gives_a_cached_image_its_label():
    support, _, _ = make_support(shots=5)
    scores = cache_scores(support, beta=1e6)(support.features)
    assert torch.allclose(scores, support.one_hot(), atol=0.3), "exp(0) for itself, up to the rounding of its own cosine"
    assert torch.equal(scores.argmax(-1), support.labels)


def test_classes_of_unequal_counts_weigh_the_same():
    support, test, _ = make_support(shots=3)
    twice = support.part(torch.cat([torch.arange(12), torch.arange(3), torch.arange(3)]))  # class 0 three times
    assert twice.counts().tolist() == [9, 3, 3, 3]
    assert close(cache_scores(twice)(test), 3 * cache_scores(support)(test))


def test_arrays_and_lists_are_taken_mixed_precisions_are_refused():
    support, test, _ = make_support()
    same = Support(support.features.numpy(), support.labels.tolist(), support.text.numpy())
    assert torch.equal(tip_adapter(same)(test), tip_adapter(support)(test))
    with pytest.raises(ValueError, match="features=torch.float64 is not allowed; allowed: torch.float32, as text has"):
        Support(support.features.double(), support.labels, support.text)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, "5.5"])
def test_a_wrong_beta_is_named(wrong):
    with pytest.raises(ValueError, match="beta"):
        tip_adapter(make_support()[0], beta=wrong)


def test_refined_caches():
    support, test, _ = make_support(d=20)
    assert close(refined_cache(support, beta=4.0, gamma=0.0, share=1.0)(test), cache_scores(support, 4.0)(test)), "then it is Tip-Adapter's"
    fewer = refined_cache(support, gamma=0.0, share=0.5)
    assert fewer.keys.shape == (12, 10) and close(fewer.keys.norm(dim=-1), torch.ones(12))
    wanted = F.cosine_similarity(test[:, None, fewer.channels], support.features[:, fewer.channels], dim=-1)
    assert close(fewer(test), torch.exp(-5.5 * (1 - wanted)) @ support.one_hot()), "cosines of what is left of both"
    raised = refined_cache(support, gamma=1.0, share=1.0)
    bits = -(support.features @ support.text.T).log_softmax(-1)[range(12), support.labels] / math.log(2)
    assert close(raised.values.sum(-1), bits.exp(), 1e-4), "a shot that the text misjudges weighs more"
    for wrong in (0.0, 1.5, None):
        with pytest.raises(ValueError, match="share of channels"):
            refined_cache(support, share=wrong)
    with pytest.raises(ValueError, match="gamma"):
        refined_cache(support, gamma=math.inf)


def test_channels_are_chosen_as_by_the_double_loop_of_the_paper():
    support, _, _ = make_support(shots=2, classes=3, d=12)
    rows = [[support.text[c], *support.features[support.labels == c]] for c in range(3)]
    products = [a * b for i in range(3) for j in range(3) if i != j for a in rows[i] for b in rows[j]]
    worth = 0.3 * support.text.var(0) - 0.7 * torch.stack(products).mean(0)
    assert separating_channels(support, 0.5).tolist() == sorted(worth.argsort(descending=True)[:6].tolist())


# Gaussian classes


def test_gda_gives_the_log_odds_of_gaussian_classes():
    support, test, _ = make_support(shots=6, dtype=torch.float64)
    x, means = support.features, support.means()
    scatter = sum(torch.outer(row - means[c], row - means[c]) for row, c in zip(x, support.labels, strict=True))
    covariance = (scatter + scatter.trace() / (len(x) - 1) * torch.eye(24, dtype=x.dtype)) / 24
    slow = torch.stack([torch.distributions.MultivariateNormal(mean, covariance).log_prob(test) for mean in means], -1)
    fast = gaussian_scores(support)(test)
    assert close(fast - fast[:, :1], slow - slow[:, :1], 1e-8)


def test_one_shot_gda_is_the_nearest_mean():
    support, test, _ = make_support(shots=1, noise=1.5)
    nearest = torch.cdist(test, support.features).argmin(-1)
    scores = gaussian_scores(support)(test)
    assert scores.isfinite().all() and torch.equal(scores.argmax(-1), support.labels[nearest])


def test_text_and_class_means_is_the_head_of_their_sum():
    support, test, _ = make_support(shots=2)
    mean = torch.stack([support.features[support.labels == c].mean(0) for c in range(4)])
    wanted = [float(100 * test[0] @ (v := t + m / m.norm()) / v.norm()) for t, m in zip(support.text, mean, strict=True)]
    assert close(text_and_class_means(support)(test)[0], torch.tensor(wanted))


# what may be looked at


@pytest.mark.parametrize("folds", [None, 2])
def test_held_out_scores_never_see_the_shot_held_out(folds):
    support, _, _ = make_support(shots=4)
    seen = []

    def make(part):
        def score(features):
            shared = (features[:, None] - part.features).abs().amax(-1).min()
            assert shared > 1e-3, "a shot was scored by itself"
            seen.append((part.counts().tolist(), len(features)))
            return features @ part.means().T
        return score

    scores = held_out(make, support, folds)
    assert scores.isfinite().all() and scores.shape == (16, 4)
    assert seen == ([([3] * 4, 4)] * 4 if folds is None else [([2] * 4, 8)] * 2), "one shot of every class at a time; or halves"


def test_a_shot_changes_nothing_of_its_own_held_out_score():
    """Its label does not get there either: relabelled shots of one fold leave that fold's scores as they are."""
    support, _, _ = make_support(shots=2)
    before = held_out(gaussian_scores, support)
    first = torch.arange(0, 8, 2)  # the first of every class
    moved = support.features.clone()
    moved[first] = moved[first.roll(1)]  # the features of fold 0 change places among the classes
    after = held_out(gaussian_scores, Support(moved, support.labels, support.text))
    assert close(after[first], before[first.roll(1)]), "they are scored by the same others"
    assert not close(after[first + 1], before[first + 1], 1e-2), "which now see other shots"


def test_held_out_equals_refitting_by_hand_with_unequal_counts():
    support, _, _ = make_support(shots=3)
    support = support.part(torch.arange(11))  # the last class has two
    wanted, place = torch.empty(11, 4), torch.tensor([0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1])
    for i in range(11):
        rest = support.part((place != place[i]).nonzero()[:, 0])
        wanted[i] = cache_scores(rest)(support.features[i : i + 1])[0]
    assert close(held_out(cache_scores, support), wanted)


def test_nothing_can_be_held_out_of_one_shot():
    single, _, _ = make_support(shots=1)
    with pytest.raises(ValueError, match="shots of a class=1 .*at least 2"):
        choose_blend(single, [gaussian_scores])
    two, _, _ = make_support(shots=2)
    with pytest.raises(ValueError, match="folds=3 .*at most 2, the shots of the rarest class"):
        held_out(gaussian_scores, two, folds=3)
    with pytest.raises(ValueError, match="folds"):
        held_out(gaussian_scores, two, folds=1)


def test_held_out_loss_ignores_the_scale_and_is_a_cross_entropy():
    support, test, truth = make_support(noise=1.5)
    logits = zero_shot(support)(test)
    loss = held_out_loss(logits, truth)
    assert all(close(held_out_loss(scale * logits, truth), loss) for scale in (0.01, 7.0))
    unit = logits / spread(logits)
    assert close(loss, torch.stack([F.cross_entropy(scale * unit, truth) for scale in SCALES]).min())
    both = held_out_loss(torch.stack([logits, torch.zeros_like(logits)]), truth)  # a batch of two
    assert close(both[0], loss) and both[1] == pytest.approx(math.log(4)), "what knows nothing has ln C nats"


def test_the_weights_reach_from_zero_shot_to_the_shots_alone():
    support, _, _ = make_support(shots=4)
    text, held = zero_shot(support)(support.features), held_out(cache_scores, support)
    alpha = blend_weights(text, held)
    assert alpha.shape == (len(WEIGHTS),) and alpha[0] == 0 and WEIGHTS[0] == 0
    assert close(spread(alpha[-1] * held) / spread(text), torch.tensor(WEIGHTS[-1])), "in units of spread"
    assert torch.equal((text + alpha[-1] * held).argmax(-1), held.argmax(-1))


def test_the_choice_is_the_best_of_all_tried():
    support, test, _ = make_support(shots=4, noise=1.5)
    candidates = [partial(cache_scores, beta=beta) for beta in BETAS[:3]]
    tried = []
    for make in candidates:
        held = held_out(make, support)
        for alpha in blend_weights(zero_shot(support)(support.features), held):
            loss = held_out_loss(zero_shot(support)(support.features) + alpha * held, support.labels)
            tried.append((float(loss), Blend(support, make(support), alpha)))
    wanted = min(tried, key=lambda pair: pair[0])[1]
    assert close(choose_blend(support, candidates)(test), wanted(test), 1e-6)


class Fixed(torch.nn.Module):
    """Extra scores that are the same whatever is asked."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, features):
        return self.scores.expand(len(features), -1)


def test_scores_that_say_nothing_are_left_out():
    support, test, _ = make_support(shots=5, noise=0.5)
    for scores in (torch.zeros(4), torch.tensor([0.0, 0, 9, 0])):
        blend = choose_blend(support, [lambda part, scores=scores: Fixed(scores)])
        assert torch.equal(blend(test).argmax(-1), zero_shot(support)(test).argmax(-1)) and blend(test).isfinite().all()


def test_a_better_candidate_is_chosen_and_a_useless_text_is_outvoted():
    support, test, truth = make_support(shots=5, near=0.0)  # the texts have nothing to do with the classes
    blend = choose_blend(support, [lambda part: Fixed(torch.zeros(4)), gaussian_scores])
    assert isinstance(blend.extra, type(gaussian_scores(support)))
    before, after = ((head(test).argmax(-1) == truth).float().mean() for head in (zero_shot(support), blend))
    assert before < 0.6 and after > 0.95
    heads = [zero_shot, text_and_class_means]
    assert close(choose_head(support, heads)(test), text_and_class_means(support)(test))
    single = make_support(shots=1)[0]
    assert torch.equal(choose_head(single, heads)(test), zero_shot(single)(test)), "with one shot the first is taken"


# what is trained


def test_training_changes_what_is_trained_and_nothing_else():
    support, _, _ = make_support(noise=1.5, near=0.2)
    copies = {name: getattr(support, name).clone() for name in ("features", "labels", "text")}
    blend = tip_adapter(support)
    before = {name: value.clone() for name, value in blend.state_dict().items()}
    loss = F.cross_entropy(blend(support.features), support.labels)
    trained = tip_adapter_f(support, blend, steps=30)
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert all(torch.equal(value, before[name]) for name, value in blend.state_dict().items()), "the training-free one stays"
    assert changed == {"extra.keys"} and F.cross_entropy(trained(support.features), support.labels) < loss
    for make in (clip_adapter, low_rank_projection):
        head = make(support, steps=5)
        assert torch.equal(head.text, copies["text"]) and not any(p.requires_grad for p in head.parameters())
    text_probe(support)
    assert all(torch.equal(getattr(support, name), value) for name, value in copies.items())


def test_untrained_adapters_are_zero_shot():
    support, test, _ = make_support()
    start = Adapted(support, LowRank(24, 3, torch.Generator().manual_seed(0)))
    assert close(start(test), zero_shot(support)(test), 1e-6)
    weak = clip_adapter(support, ratio=1e-6, steps=1)
    assert close(weak(test), zero_shot(support)(test), 1e-4)


def test_clip_adapters_network_is_its_formula():
    network, x = Bottleneck(6, 3, 0.3, torch.Generator().manual_seed(0)), make_support(d=6)[1]
    up, down = network.up.detach(), network.down.detach()
    assert close(network(x), torch.stack([0.3 * (up @ (down @ row).clamp(min=0)).clamp(min=0) + 0.7 * row for row in x]))


def test_trained_adapters_depend_on_their_seed_alone():
    support, test, _ = make_support()
    torch.manual_seed(1)
    one = clip_adapter(support, steps=3)(test)
    torch.manual_seed(2)
    assert torch.equal(one, clip_adapter(support, steps=3)(test))
    assert not torch.equal(one, clip_adapter(support, steps=3, seed=1)(test))


def test_a_residual_folds_into_the_projection_of_a_real_model():
    torch.manual_seed(0)
    model, _ = random_clip(smoke=True)
    model.eval()
    pixels = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        features = encode_images(model, pixels)
        support = Support(features, torch.tensor([0, 0, 1, 1]), F.normalize(torch.randn(2, 512), dim=-1))
        head = low_rank_projection(support, rank=5, steps=20, rate=0.01)
        assert head.change.up.abs().max() > 0.01, "it was trained"
        beside = F.normalize(head.change(features), dim=-1)
        model.visual_projection.weight.copy_(head.change.folded(model.visual_projection.weight))
        assert close(encode_images(model, pixels), beside, 1e-5)


@pytest.mark.parametrize("make, said", [
    (partial(low_rank_projection, rank=25), "rank=25 .*width of the features, 24"), (partial(low_rank_projection, rank=0), "rank=0"),
    (partial(low_rank_projection, rank=2.0), "rank=2.0"), (partial(clip_adapter, ratio=0.0), "ratio"), (partial(clip_adapter, hidden=-1), "hidden"),
    (partial(clip_adapter, steps=0), "steps=0"), (partial(text_probe, penalty=0.0), "penalty=0.0"), (partial(text_probe, penalty=-1), "penalty"),
])
def test_numbers_that_are_not_allowed_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make(make_support()[0])


def test_the_probe_from_text_minimises_its_loss():
    support, test, _ = make_support(dtype=torch.float64, noise=1.5)
    assert close(text_probe(support, penalty=1e9)(test), zero_shot(support)(test), 1e-6), "an endless penalty leaves the text"
    weight = (text_probe(support, penalty=0.5, iterations=300).weight / 100).requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(100 * support.features @ weight.T, support.labels) + 0.5 * (weight - support.text).square().sum()
    (slope,) = torch.autograd.grad(loss, weight)
    assert slope.abs().max() < 1e-4
    assert close(text_probe(support)(test), text_probe(support, penalty=1 / 3)(test), 1e-6), "one over the shots, if not given"


# all methods


@pytest.fixture(scope="module")
def heads():
    support, test, truth = make_support(shots=3, noise=0.8)
    return support, test, truth, {name: make(support) for name, make in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_can_be_kept(name, heads):
    support, test, truth, made = heads
    logits = made[name](test)
    assert logits.shape == (80, 4) and logits.isfinite().all() and not logits.requires_grad
    assert (logits.argmax(-1) == truth).float().mean() > 0.9, "these classes are far apart"
    kept = {key: value.clone() for key, value in made[name].state_dict().items()}
    assert kept and torch.equal(made[name](test), logits)


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_shots_changes_nothing_and_that_of_classes_the_order_of_answers(name, heads):
    """Held-out folds are made in the order of the shots: with another order other shots are held out together."""
    support, test, _, made = heads
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    limit = 1e-4 if name in CLOSED else 2e-2  # sums in another order, amplified by training
    if name not in NEEDS_TWO | {"Tip-Adapter-F", "CLIP-Adapter"}:
        assert close(METHODS[name](support.part(order))(test), made[name](test), limit)
    renamed = torch.tensor([2, 0, 3, 1])  # class c becomes renamed[c]
    other = Support(support.features, renamed[support.labels], support.text[renamed.argsort()])
    assert close(METHODS[name](other)(test)[:, renamed], made[name](test), limit)


@pytest.mark.parametrize("name", METHODS)
def test_one_shot_works_where_nothing_is_held_out(name):
    support, test, _ = make_support(shots=1)
    if name in NEEDS_TWO:
        with pytest.raises(ValueError, match="at least 2"):
            METHODS[name](support)
    else:
        assert METHODS[name](support)(test).isfinite().all()


def test_double_precision_and_two_classes():
    support, test, truth = make_support(classes=2, dtype=torch.float64)
    for name in CLOSED:
        logits = METHODS[name](support)(test)
        assert logits.dtype == torch.float64 and logits.shape == (40, 2)


def test_a_blend_of_linear_scores_folds_into_one_head(heads):
    support, test, _, made = heads
    blend = choose_blend(support, [gaussian_scores])
    assert isinstance(blend, Blend) and close(made["GDA"](test), blend(test), 1e-5)
    assert sum(p.numel() for p in made["GDA"].parameters()) == 4 * 24 + 4, "as cheap as zero-shot"


# real images and models


def test_features_of_whole_and_pruned_encoders_mix():
    torch.manual_seed(0)
    model, _ = random_clip(smoke=True)
    model.eval()
    pixels = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        whole, half = (encode_images(model, pixels, reducer) for reducer in (None, reducer_for_budget("ours", 0.5, model)))
    assert not close(whole, half, 1e-3)
    labels = torch.arange(3).repeat(2)
    head = METHODS["GDA"](Support(half, labels, F.normalize(torch.randn(3, 512), dim=-1)))
    assert head(whole).shape == (6, 3)


def test_labelled_images_are_those_beside_the_test_images(tmp_path):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    for part, grey in dict(test_1k=10, train_4k=200).items():
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (grey + i,) * 3).save(tmp_path / part / name / f"{i}.png")
    pool = training_images(f"imagefolder:{tmp_path}/test_1k", 4, processor)
    assert len(pool) == 4 and pool.classes == ["cat", "dog"] and pool.labels.bincount().tolist() == [2, 2]
    assert pool.pixels.min() >= 200, "not the test images"
    with pytest.raises(ValueError, match="DATASET=.*a folder beside one of labelled training images, train…; found: none"):
        training_images(f"imagefolder:{tmp_path}/train_4k", 4, processor)
    (tmp_path / "train_more").mkdir()
    with pytest.raises(ValueError, match="train_4k.*train_more"):
        training_images(f"imagefolder:{tmp_path}/test_1k", 4, processor)
    with pytest.raises(ValueError, match="DATASET='photographs'.*have no labels"):
        training_images("photographs", 4, processor)


def test_cifar10_gives_its_training_split(monkeypatch):
    asked = []
    monkeypatch.setattr(labelled, "load_images", lambda *words, **options: asked.append((words, options)))
    training_images("cifar10", 40, "processor", seed=3)
    assert asked == [(("cifar10", 40, "processor", 3), dict(train=True))]


def test_digits_are_enlarged_as_any_picture_is():
    _, processor = random_clip(smoke=True)
    small = digit_images(0)[1].part([0, 1, 2])
    big = resized(small, processor)
    assert big.pixels.shape == (3, 3, 64, 64) and torch.equal(big.labels, small.labels) and big.mean == tuple(processor.image_mean)
    picture = Image.fromarray(np.moveaxis(small.pixels[1].numpy(), 0, -1))
    assert torch.equal(big.pixels[1], preprocess([picture], processor)[0][0])
    assert load_images("synthetic:64", 1, processor).scale == big.scale


def test_the_module_needs_no_more_than_torch():
    code = "import sys, effarch.few_shot; print([n for n in ('sklearn', 'matplotlib', 'pandas', 'transformers', 'effarch.bench') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32])
def test_labels_of_any_whole_type_are_taken(kind):
    text, labels = F.normalize(torch.randn(3, 8), dim=-1), torch.tensor([0, 1, 2, 0])
    support = Support(F.normalize(torch.randn(4, 8), dim=-1), labels.to(kind), text)
    assert support.one_hot().argmax(1).tolist() == labels.tolist() and support.counts().tolist() == [2, 1, 1]
    with pytest.raises(ValueError, match="labels"):
        Support(support.features, labels.bool(), text)
