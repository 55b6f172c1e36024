"""Masked pre-training: the masks, what a mask may not change, losses for equal captions, one and several processes, captions, recipes."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_selection import KINDS, pictures
from test_smoke import FORKS

from effarch.clip.captions import Captions, captioned_images, pixel_facts
from effarch.clip.towers import make_tower
from effarch.masking import (
    MASKS,
    ContrastiveModel,
    KeepPatches,
    Pairs,
    Recipe,
    Trainer,
    check_processes,
    cluster_kept,
    contrastive_loss,
    cosine_rate,
    gathered,
    judge_captions,
    kept_randomly,
    random_kept,
    small_clip,
    standardised_patches,
    text_features,
    train,
    train_in_processes,
)
from effarch.token_reduction import encode_images, token_reduction
from effarch.token_reduction.encoder import trace_encoder

CLASSES = ("cat", "fire engine", "ship")


def close(a, b, limit=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=limit)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=24, side=16):
    """Images of three classes whose colours and bright places differ, as bytes, and their labels."""
    draw = seeded(5)
    pixels = torch.randint(0, 120, (count, 3, side, side), generator=draw)
    labels = torch.arange(count) % 3
    for i in range(count):
        pixels[i, i % 3] += 60
        pixels[i, :, : side // 2] += 50 * (i % 2)
    return pixels.byte(), labels


@pytest.fixture(scope="module")
def captions():
    return Captions(CLASSES, some_images()[0])


@pytest.fixture(scope="module")
def pairs(captions):
    pixels, labels = some_images()
    return Pairs(pixels, captions(pixels, labels), captions.tokens)


def new_model(captions, loss="softmax", seed=0):
    torch.manual_seed(seed)
    return ContrastiveModel(small_clip(captions, side=16, patch=4, width=32, layers=2), loss)


# masks


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keep, kept", [(1.0, 64), (0.5, 32), (0.3, 20), (0.001, 1)])
def test_every_mask_keeps_the_exact_number_of_different_patches_in_order(mask, keep, kept):
    index = MASKS[mask](pictures(5), 8, keep, seeded())
    assert index.shape == (5, kept)
    assert (index[:, 1:] > index[:, :-1]).all() and index.min() >= 0 and index.max() < 64
    assert (index == MASKS[mask](pictures(5), 8, keep, seeded())).all(), "the same seed, the same mask"


@pytest.mark.parametrize("mask", MASKS)
def test_masks_differ_between_images_and_draws(mask):
    x = pictures(1).expand(6, -1, -1, -1)
    first, second = (MASKS[mask](x, 8, 0.5, seeded(seed)) for seed in (0, 1))
    assert (first != first[:1]).any(1)[1:].all() and (first != second).any()


def test_random_masking_keeps_every_patch_equally_often():
    counts = torch.bincount(kept_randomly(4000, 16, 0.25, seeded()).flatten(), minlength=16)
    assert counts.sum() == 4000 * 4
    assert ((counts - 1000).abs() < 5 * (4000 * 0.25 * 0.75) ** 0.5).all()  # five standard deviations


def test_patches_are_standardised_as_the_tower_orders_them():
    x = pictures(2, 16)
    rows = standardised_patches(x, 8)
    patch = x[1, :, 8:, :8].flatten()  # the third of four
    close(rows[1, 2], (patch - patch.mean()) / (patch - patch.mean()).norm())
    flat = standardised_patches(torch.full((1, 3, 16, 16), 7.0), 8)
    assert (flat == 0).all()


def test_clusters_are_what_resembles_an_anchor():
    """Two kinds of patches: once an anchor has one of a kind, that kind leaves before the other."""
    kinds = torch.randn(2, 3, 8, 8, generator=seeded(3))
    where = torch.arange(64).reshape(8, 8) // 4 % 2  # halves of every row
    x = torch.stack([torch.cat([torch.cat([kinds[k] for k in row], 2) for row in where.tolist()], 1)])
    kept = cluster_kept(x + 0.01 * pictures(1), 8, 0.5, seeded(), anchors=0.001)[0]
    assert len(where.flatten()[kept].unique()) == 1, "a whole kind has left"


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_the_exact_count_equals_a_threshold_for_every_image(keep):
    x, fifth = pictures(4), 0.05
    kept, anchors = cluster_kept(x, 8, keep, seeded(7), fifth), kept_randomly(4, 64, fifth, seeded(7))
    rows = standardised_patches(x, 8)
    for i in range(4):
        alike = (rows[i] @ rows[i].T)[anchors[i]].amax(0)
        masked = torch.ones(64, dtype=torch.bool).index_fill(0, kept[i], False)
        assert masked[anchors[i]].all()
        assert alike[masked].min() >= alike[~masked].max() - 1e-6


def test_flat_images_and_more_kept_than_not_anchors_are_no_trouble():
    index = cluster_kept(torch.zeros(2, 3, 64, 64), 8, 0.99, seeded(), anchors=0.5)
    assert index.shape == (2, 64) and (index == torch.arange(64)).all()
    assert cluster_kept(torch.zeros(2, 3, 64, 64), 8, 0.5, seeded()).shape == (2, 32)


# what a mask may not change


@pytest.fixture(scope="module", params=list(KINDS))
def tower(request):
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def test_all_patches_kept_is_the_dense_tower_and_order_does_not_matter(tower):
    x = pictures()
    with torch.no_grad():
        dense = encode_images(tower, x)
        close(encode_images(tower, x, KeepPatches(random_kept(x, 8, 1.0))), dense)
        kept = random_kept(x, 8, 0.5, seeded())
        half = encode_images(tower, x, KeepPatches(kept))
        close(encode_images(tower, x, KeepPatches(kept.flip(1))), half)
        assert (half - dense).abs().max() > 1e-4


def test_special_tokens_stay_and_the_rest_is_gone(tower):
    x, kept = pictures(), random_kept(pictures(), 8, 0.25, seeded())
    traced = trace_encoder(tower, KeepPatches(kept), x)
    prefix = make_tower(tower).prefix
    assert traced.first == prefix + 16 and (traced.owner[:, :prefix] == torch.arange(prefix)).all()
    seen = (traced.owner[:, prefix:] >= 0).nonzero()[:, 1].view(3, 16)
    assert (seen == kept).all()


def test_masked_pixels_get_no_gradient_and_change_nothing(tower):
    x, kept = pictures().requires_grad_(), random_kept(pictures(), 8, 0.5, seeded())
    encode_images(tower, x, KeepPatches(kept))[:, 0].sum().backward()
    reached = F.unfold(x.grad, 8, stride=8).abs().amax(1)
    assert (reached.gather(1, kept) > 0).all() and (reached.scatter(1, kept, 0) == 0).all()


def test_a_mask_equals_transformers_own_layers_on_the_kept_patches():
    """A real CLIPVisionModelWithProjection, given the tokens by hand."""
    torch.manual_seed(0)
    model = KINDS["clip"]().eval()
    x, kept = pictures(), random_kept(pictures(), 8, 0.5, seeded())
    vision = model.vision_model
    with torch.no_grad():
        tokens = vision.embeddings(x)
        few = torch.stack([torch.cat([t[:1], t[1:][k]]) for t, k in zip(tokens, kept, strict=True)])
        out = vision.encoder(inputs_embeds=vision.pre_layrnorm(few)).last_hidden_state
        expected = F.normalize(model.visual_projection(vision.post_layernorm(out[:, 0])), dim=-1)
        close(encode_images(model, x, KeepPatches(kept)), expected)


def test_inference_is_unmasked_after_masked_training(captions, pairs):
    """The trained model is a plain CLIPModel: its features are transformers' own, and the package's other tools take it."""
    model = new_model(captions)
    train(model, pairs, Recipe("random", 0.5), 3, batch=8)
    x = pairs.images(torch.arange(5))
    with torch.no_grad():
        own = model.clip.get_image_features(pixel_values=x)
        own = F.normalize(getattr(own, "pooler_output", own), dim=-1)
        close(encode_images(model.clip, x), own)
        with token_reduction(model.clip, "ours", budget=1.0):
            merged = model.clip.get_image_features(pixel_values=x)
        close(F.normalize(getattr(merged, "pooler_output", merged), dim=-1), own, 1e-4)
    assert judge_captions(model, pairs, captions) == judge_captions(model, pairs, captions, batch=7)


# losses


def naive_loss(images, texts, captions, scale, bias=None):
    """Pair by pair, from the equations."""
    total, n = 0.0, len(images)
    for i in range(n):
        for j in range(n):
            same, logit = bool(captions[i] == captions[j]), scale * images[i] @ texts[j]
            if bias is not None:
                total += F.softplus(-(logit + bias) if same else logit + bias) / n
            elif same:
                share = 1 / (captions == captions[i]).sum() / (2 * n)
                total -= share * (logit - torch.logsumexp(scale * texts @ images[i], 0))
                total -= share * (scale * images[j] @ texts[i] - torch.logsumexp(scale * images @ texts[i], 0))
    return total


def some_features(n=12, equal=5, seed=1):
    draw = seeded(seed)
    features = [F.normalize(torch.randn(n, 8, generator=draw), dim=-1) for _ in range(2)]
    return *features, torch.randint(equal, (n,), generator=draw)


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0)])
def test_losses_equal_their_equations(bias):
    close(contrastive_loss(*some_features(), 7.0, bias), naive_loss(*some_features(), 7.0, bias))


def test_with_different_captions_it_is_clips_own_loss(captions, pairs):
    """That of transformers, from pixels and words."""
    model = new_model(captions)
    model.clip.logit_scale.data = model.log_scale.data
    index, numbers = torch.arange(6), torch.tensor([0, 7, 30, 55, 80, 107])
    own = model.clip(input_ids=captions.tokens[numbers], pixel_values=pairs.images(index), return_loss=True).loss
    close(model(pairs.images(index), captions.tokens[numbers], index, numbers), own)


@pytest.mark.parametrize("bias", [None, torch.tensor(-20.0)])
def test_equal_captions_are_no_negatives(bias):
    """Perfect features: the loss is its floor, the entropy of the targets (softmax) or 0 (sigmoid); calling equal ones negatives costs."""
    numbers = torch.tensor([0, 0, 0, 1])
    features = [torch.eye(4)[numbers]] * 2
    floor = (3 * math.log(3)) / 4 if bias is None else 0.0
    close(contrastive_loss(*features, numbers, 40.0, bias), torch.tensor(floor), 1e-4)
    assert contrastive_loss(*features, torch.arange(4), 40.0, bias) > floor + 0.1 or bias is None
    wrong = [torch.eye(4), torch.eye(4)]  # equal captions told apart
    assert contrastive_loss(*wrong, numbers, 40.0, bias) > floor + 1


@pytest.mark.parametrize("bias", [None, torch.tensor(-3.0)])
def test_pairs_in_another_order_have_the_same_loss(bias):
    images, texts, numbers = some_features()
    order = torch.randperm(12, generator=seeded())
    close(contrastive_loss(images[order], texts[order], numbers[order], 7.0, bias), contrastive_loss(images, texts, numbers, 7.0, bias))


def test_captions_that_occur_twice_are_encoded_once(captions, pairs):
    """The loss of a batch with each different caption encoded once is that of all encoded."""
    model = new_model(captions)
    drawn = Trainer(model, pairs, Recipe(), 4, batch=24).draw()
    assert len(drawn["tokens"]) < 24 and (pairs.tokens[drawn["captions"]] == drawn["tokens"][drawn["which"]]).all()
    texts = text_features(model.clip, pairs.tokens[drawn["captions"]])
    images = encode_images(model.clip, drawn["pixels"])
    close(model(**drawn), contrastive_loss(images, texts, drawn["captions"], model.log_scale.exp()))


# several processes

STEPS = 3


def gradients(model, drawn):
    """(loss, {name: gradient}) of a model on a batch."""
    loss = model(**drawn)
    loss.backward()
    return loss.detach(), {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_of_several(rank, world, folder, captions, pairs):
    """Gradients of one batch, and weights after some steps, as one of several gloo processes; written to a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    told = {}
    for loss in ("softmax", "sigmoid"):
        trainer = Trainer(new_model(captions, loss), pairs, Recipe("cluster", 0.5, tuned=0.4), STEPS, batch=8)
        told[f"{loss} loss"], told[f"{loss} gradients"] = gradients(trainer.model, trainer.draw())
        model = new_model(captions, loss)
        train(model, pairs, Recipe("random", 0.5, batch=0.5), STEPS, batch=16)
        told[f"{loss} weights"] = model.state_dict()
    rows = torch.full((2, 1), float(rank), requires_grad=True)
    everyone = gathered(rows)
    (everyone * torch.arange(1.0, 1 + len(everyone))[:, None] * (rank + 1)).sum().backward()
    told |= dict(gathered=everyone.detach(), back=rows.grad)
    torch.save(told, f"{folder}/{rank}.pt")
    del trainer, model  # before the group: DDP's reducer, if it is the last to hold it, waits for a thread that waits for Python's lock
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory, captions, pairs):
    """What two gloo processes told."""
    folder = tmp_path_factory.mktemp("two")
    running = [FORKS.Process(target=one_of_several, args=(rank, 2, folder, captions, pairs)) for rank in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join(300)  # a process that hangs is a failure, not a test without end
        process.kill()
    assert [process.exitcode for process in running] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_rows_are_gathered_in_order_and_gradients_come_back_from_all(two):
    for rank, told in enumerate(two):
        assert told["gathered"].flatten().tolist() == [0, 0, 1, 1]
        # weights 1 … 4 of the rows, times 1 in the first process and times 2 in the second
        assert told["back"].flatten().tolist() == [3 * (2 * rank + 1), 3 * (2 * rank + 2)]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_two_processes_have_the_loss_and_gradients_of_one(two, captions, pairs, loss):
    trainer = Trainer(new_model(captions, loss), pairs, Recipe("cluster", 0.5, tuned=0.4), STEPS, batch=8)
    value, expected = gradients(trainer.model, trainer.draw())
    close(sum(told[f"{loss} loss"] for told in two) / 2, value, 1e-6)
    assert abs(two[0][f"{loss} loss"] - two[1][f"{loss} loss"]) > 1e-4, "each has its own part"
    for told in two:
        assert told[f"{loss} gradients"].keys() == expected.keys()
        for name, gradient in told[f"{loss} gradients"].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()) + 1e-6, msg=name)
    assert any(name.startswith("clip.text_model") for name in expected) and "log_scale" in expected


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_two_processes_train_the_model_that_one_does(two, captions, pairs, loss):
    model = new_model(captions, loss)
    train(model, pairs, Recipe("random", 0.5, batch=0.5), STEPS, batch=16)
    for told in two:
        for name, weight in model.state_dict().items():
            if name.endswith("k_proj.bias"):  # its gradient is rounding alone, which Adam makes as large as any
                continue
            torch.testing.assert_close(told[f"{loss} weights"][name], weight, rtol=0, atol=1e-4, msg=name)


def test_one_process_gathers_nothing():
    rows = torch.randn(3, 2)
    assert gathered(rows) is rows


def test_without_accelerate_one_clear_line(monkeypatch, captions, pairs):
    model = new_model(captions)
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"^PROCESSES=2 is not allowed; allowed: 1 without the package accelerate; .*pip install"):
        train_in_processes(2, model, pairs, Recipe(), 2, batch=4)
    assert train_in_processes(1, model, pairs, Recipe(), 2, batch=4, at=(2,))[0]["step"] == 2


def test_accelerates_launcher_trains_as_one_process_does(captions, pairs):
    pytest.importorskip("accelerate")
    pytest.importorskip("joblib")
    alone, shared = new_model(captions), new_model(captions)
    options = dict(batch=8, at=(1, 2), judge=lambda model: judge_captions(model, pairs, captions))
    one = train_in_processes(1, alone, pairs, Recipe("random", 0.5), 2, **options)
    two = train_in_processes(2, shared, pairs, Recipe("random", 0.5), 2, **options)
    assert [row["step"] for row in two] == [1, 2]
    assert [row["caption_accuracy"] for row in two] == [row["caption_accuracy"] for row in one]
    for name, weight in alone.state_dict().items():
        if name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(shared.state_dict()[name], weight, rtol=0, atol=1e-4, msg=name)


# captions


def test_captions_name_what_is_in_the_pixels(captions):
    pixels = torch.full((1, 3, 16, 16), 90)
    pixels[:, 2] = 130  # more blue than in the others
    pixels[:, :, :, 8:] += 20
    said = captions.texts[captions(pixels.byte(), torch.tensor([1]))[0]]
    assert "bluish" in said and "one fire engine" in said and said.endswith("brightest at the right")
    brightness, colour, halves = pixel_facts(pixels.byte())
    close(brightness[0] * 255, torch.tensor((100 + 100 + 140) / 3), 1e-3)
    assert halves[0].argmax() == 3 and colour[0].argmax() == 2


def test_every_composition_is_one_caption_and_splits_into_its_parts(captions):
    assert len(captions.texts) == len(set(captions.texts)) == 3 * 3 * 3 * 4 == len(captions.tokens)
    for i, (what, light, tint, place) in enumerate(captions.split(torch.arange(len(captions.texts))).tolist()):
        words = [names[part] for names, part in zip(captions.parts, (what, light, tint, place), strict=True)]
        assert captions.texts[i] == "a {1} {2} photo of one {0} brightest at the {3}".format(*words)


def test_a_third_of_the_training_images_is_dark_medium_or_bright(captions):
    pixels, labels = some_images()
    assert torch.bincount(captions.split(captions(pixels, labels))[:, 1]).tolist() == [8, 8, 8]


def test_words_become_tokens_that_transformers_pools_at_their_end(captions):
    assert (captions.tokens[:, 0] == 0).all() and captions.tokens.max() == len(captions.words) + 1
    clip = small_clip(captions, 16, 4, 32, 1).eval()
    with torch.no_grad():
        features = text_features(clip, captions.tokens)
        longer = F.pad(captions.tokens[:3, :-1], (0, 1), value=1)  # what follows the end has no influence
        close(text_features(clip, longer), features[:3])
    ends = (captions.tokens == 1).int().argmax(1)
    assert {len(text.split()) + 1 for text in captions.texts} == set(ends.tolist())
    assert len(torch.unique((features * 1e4).round(), dim=0)) == len(features), "no two captions have the same feature"


class Size:
    """As an image processor: it leaves images as they are."""

    image_mean, image_std, rescale_factor = (0.5,) * 3, (0.5,) * 3, 1 / 255

    def __call__(self, picture, **_):
        return dict(pixel_values=[torch.tensor(np.array(picture)).permute(2, 0, 1)])


def folder_of(root, classes=CLASSES, each=5, value=0):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            Image.new("RGB", (8, 8), (value, 40 * i, 9 * j)).save(root / name / f"{j}.png")
    return f"imagefolder:{root}"


def test_training_images_lie_beside_the_test_images_or_are_part_of_them(tmp_path):
    alone, test = folder_of(tmp_path / "one/all"), folder_of(tmp_path / "two/test_some")
    folder_of(tmp_path / "two/train_more", each=7, value=200)
    learn, judge, why = captioned_images(alone, None, 100, 100, Size())
    assert (len(learn), len(judge), why) == (12, 3, "")
    assert not {p.numpy().tobytes() for p in learn.pixels} & {p.numpy().tobytes() for p in judge.pixels}
    learn, judge, _ = captioned_images(test, None, 100, 6, Size())
    assert len(learn) == 21 and (learn.pixels[:, 0] == 200).all() and len(judge) == 6 and (judge.pixels[:, 0] == 0).all()
    learn, judge, _ = captioned_images(test, alone, 9, 100, Size())
    assert len(learn) == 9 and len(judge) == 15 and (learn.pixels[:, 0] == 0).all()
    folder_of(tmp_path / "two/train_other")
    with pytest.raises(ValueError, match=r"^TRAIN_DATASET=None is not allowed; allowed: one of the folders beside .*: train_more, train_other$"):
        captioned_images(test, None, 100, 6, Size())
    for same in (test, f"imagefolder:{tmp_path}/one/../two/test_some/"):
        with pytest.raises(ValueError, match=r"^TRAIN_DATASET='imagefolder:.*' is not allowed; allowed: other images than those of "):
            captioned_images(test, same, 100, 6, Size())


def test_images_without_classes_or_with_others_are_refused(tmp_path):
    one, other = folder_of(tmp_path / "a/one"), folder_of(tmp_path / "b/two", ("dog", "cat"))
    with pytest.raises(ValueError, match=r"^TRAIN_DATASET='imagefolder:.*' is not allowed; allowed: the classes of .*: cat, fire engine, ship$"):
        captioned_images(one, other, 10, 10, Size())
    for dataset, learn in (("photographs", None), ("synthetic:32", None), (one, "photographs")):
        with pytest.raises(ValueError, match=r"^(TRAIN_)?DATASET='(photographs|synthetic:32)' is not allowed; allowed: cifar10, imagefolder"):
            captioned_images(dataset, learn, 10, 10, Size())


def test_offline_digits_in_three_colours_stand_in_and_say_so():
    learn, test, why = captioned_images("cifar10", None, 300, 50, None, offline=True)
    assert (len(learn), len(test)) == (300, 50) and why.startswith("coloured digits stand in for photographs: ")
    assert len(learn.classes) == 10 and learn.pixels.dtype == torch.uint8 and learn.pixels.shape[1:] == (3, 32, 32)
    captions = Captions(learn.classes, learn.pixels)
    said = captions.split(captions(learn.pixels, learn.labels))
    assert (said[:, 2] == torch.arange(300) % 3).float().mean() > 0.9 and (torch.bincount(said[:, 1]) - 100).abs().max() < 4


# recipes


class Watched(ContrastiveModel):
    """Notes what it is given."""

    def forward(self, pixels, tokens, which, captions, kept=None):
        self.seen.append((tuple(pixels.shape), None if kept is None else kept.shape[1], captions.tolist()))
        return super().forward(pixels, tokens, which, captions, kept)


def watched(captions, pairs, recipe, steps=10, **options):
    torch.manual_seed(0)
    model = Watched(small_clip(captions, 16, 4, 32, 1))
    model.seen = []
    told = train(model, pairs, recipe, steps, batch=8, at=(1, steps), **options)
    assert [row["step"] for row in told] == [1, steps] and all(math.isfinite(row["training_loss"]) for row in told)
    return model.seen


def test_recipes_do_what_they_say(captions, pairs):
    assert {seen[:2] for seen in watched(captions, pairs, Recipe())} == {((8, 3, 16, 16), None)}
    assert {seen[:2] for seen in watched(captions, pairs, Recipe("random", 0.25))} == {((8, 3, 16, 16), 4)}
    assert {seen[:2] for seen in watched(captions, pairs, Recipe(batch=0.5))} == {((4, 3, 16, 16), None)}
    tuned = [seen[:2] for seen in watched(captions, pairs, Recipe("cluster", 0.5, side=8, tuned=0.2))]
    assert tuned == [((8, 3, 8, 8), 2)] * 8 + [((8, 3, 16, 16), None)] * 2


def test_equal_seeds_see_the_same_images_whatever_the_mask(captions, pairs):
    seen = [[batch[2] for batch in watched(captions, pairs, recipe, seed=3)] for recipe in (Recipe(), Recipe("random", 0.5), Recipe(side=8))]
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != [batch[2] for batch in watched(captions, pairs, Recipe(), seed=4)]


def test_every_image_comes_once_before_any_comes_again(captions, pairs):
    numbered = Pairs(pairs.sizes[None], torch.arange(24), captions.tokens)
    trainer = Trainer(new_model(captions), numbered, Recipe(), 6, batch=8)
    epochs = [torch.cat([trainer.draw()["captions"] for _ in range(3)]).sort().values.tolist() for _ in range(2)]
    assert epochs == [list(range(24))] * 2


def test_the_same_seed_gives_the_same_weights_and_a_mask_of_your_own_is_used(captions, pairs):
    def first(pixels, patch, keep, generator):
        return torch.arange(3).expand(len(pixels), -1)

    models = [new_model(captions) for _ in range(2)]
    for model in models:
        train(model, pairs, Recipe(first, 0.2), 2, batch=4)
    assert all((a == b).all() for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    assert {seen[1] for seen in watched(captions, pairs, Recipe(first, 0.2), 2)} == {3}


def test_the_schedule_is_planned_for_its_number_of_steps():
    for steps in (1, 2, 10, 200):
        rates = [cosine_rate(step, steps) for step in range(steps)]
        top = rates.index(max(rates))
        assert max(rates) == 1 and top <= steps // 10 + 1
        assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert cosine_rate(200, 200) < 1e-9 and cosine_rate(250, 200) < 1e-9


def test_training_learns(captions, pairs):
    """On 24 images a model learns their captions by heart, masked or not, with either loss."""
    for recipe, loss in ((Recipe(), "softmax"), (Recipe("random", 0.5), "softmax"), (Recipe(), "sigmoid")):
        model = new_model(captions, loss)
        before = judge_captions(model, pairs, captions)
        told = train(model, pairs, recipe, 50, batch=24, rate=4e-3, at=(50,), judge=lambda m: judge_captions(m, pairs, captions))
        assert before["accuracy"] < 0.7 and told[0]["accuracy"] > 0.9, (recipe, loss, before, told)
        assert told[0]["caption_accuracy"] > before["caption_accuracy"], (recipe, loss, before, told)


def test_smaller_images_are_kept_as_bytes_and_judged_at_their_size(captions, pairs):
    pixels, labels = some_images()
    mine = Pairs(pixels, captions(pixels, labels), captions.tokens)
    mine.resize(8)
    assert mine.sizes[8].dtype == torch.uint8 and mine.images([0, 3], 8).shape == (2, 3, 8, 8)
    assert mine.images([0]).min() >= -1 and mine.images([0]).max() <= 1
    close(mine.images(range(24), 8).mean(), mine.images(range(24)).mean(), 0.02)
    model = new_model(captions)
    whole, small = judge_captions(model, mine, captions), judge_captions(model, mine, captions, Recipe(side=8))
    assert whole.keys() == small.keys() and all(0 <= value <= 1 for value in [*whole.values(), *small.values()])


def test_features_that_are_not_finite_are_no_right_answers(captions, pairs):
    model = new_model(captions)
    torch.nn.init.constant_(model.clip.visual_projection.weight, math.nan)
    assert all(math.isnan(value) for value in judge_captions(model, pairs, captions).values())


# faults


@pytest.mark.parametrize("wrong, said", [
    (lambda c, p: Recipe("blocks"), r"^mask='blocks' is not allowed; allowed: a function, random, cluster$"),
    (lambda c, p: Recipe(keep=0.0), r"^keep=0.0 is not allowed"),
    (lambda c, p: Recipe(batch=1.5), r"^batch=1.5 is not allowed"),
    (lambda c, p: Recipe(tuned=-0.1), r"^tuned=-0.1 is not allowed"),
    (lambda c, p: random_kept(pictures(1), 8, 2.0), r"^keep=2.0 is not allowed"),
    (lambda c, p: cluster_kept(pictures(1), 8, 0.5, anchors=0), r"^anchors=0 is not allowed"),
    (lambda c, p: small_clip(c, width=40), r"^width=40 is not allowed; allowed: a multiple of 32$"),
    (lambda c, p: small_clip(c, side=32, patch=5), r"^patch=5 is not allowed"),
    (lambda c, p: ContrastiveModel(small_clip(c), "triplet"), r"^loss='triplet' is not allowed; allowed: softmax, sigmoid$"),
    (lambda c, p: Captions(["cat"], some_images()[0]), r"^classes=\['cat'\] is not allowed"),
    (lambda c, p: check_processes(0), r"^PROCESSES=0 is not allowed; allowed: 1 to "),
    (lambda c, p: Trainer(new_model(c), p, Recipe(), 5, batch=1000), r"^batch=1000 is not allowed; allowed: .* at most 24 images$"),
    (lambda c, p: Trainer(new_model(c), p, Recipe(), 0, batch=4), r"^steps=0 is not allowed")])
def test_a_mistake_is_named_in_one_line(captions, pairs, wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong(captions, pairs)


@pytest.mark.parametrize("value", [2.1, -1.792, 0.3, 1e4])
def test_flat_patches_have_no_pattern(value):
    """What rounding leaves of one once had length 1, and all flat patches were alike."""
    rows = standardised_patches(torch.full((1, 3, 64, 64), value), 16)
    assert rows.abs().max() == 0
    mixed = torch.full((1, 3, 64, 64), value)
    mixed[..., :16, :16] += torch.randn(16, 16)
    assert standardised_patches(mixed, 16).norm(dim=-1)[0] == pytest.approx([1.0] + [0.0] * 15, abs=1e-5)


@pytest.mark.parametrize("kept, words", [
    (torch.ones(2, 64, dtype=torch.bool), "kept=torch.bool"), ([[0, 1]], "kept='list'"), (torch.tensor([[0, 64], [1, 2]]), r"kept=\(0, 64\)"),
    (torch.tensor([[0, -1], [1, 2]]), r"kept=\(-1, 2\)"), (torch.tensor([[0, 1]]), "kept.shape")])
def test_patches_that_are_not_there_are_refused(captions, kept, words):
    model = small_clip(captions)
    with pytest.raises(ValueError, match=words):
        encode_images(model, torch.randn(2, 3, 32, 32), KeepPatches(kept))
