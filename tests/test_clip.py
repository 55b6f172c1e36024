"""effarch.clip: images of every sort, checkpoints, the class-name head, quality per image, and the real checkpoint's regression,
where EA_CLIP_CHECKPOINT and EA_CIFAR10 say where it is."""

import json
import os
import re
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from test_encoder import build, close, library_feature

from effarch.clip.checkpoints import hub_slug, load_checkpoint, locate_checkpoint, reachable
from effarch.clip.digits import DIGITS, digit_images, spell, train_digits_clip
from effarch.clip.images import (
    CIFAR_CLASSES,
    Images,
    folder_images,
    load_images,
    photo_files,
    preprocess,
    scaling,
    stratified,
    to_rgb,
)
from effarch.clip.labelled import check_apart
from effarch.clip.photographs import from_patches, paint_groups, paint_kept, photographs, to_patches
from effarch.clip.quality import judge_images, per_image, quality_columns
from effarch.clip.study import prepare
from effarch.clip.towers import make_tower
from effarch.clip.zero_shot import (
    FROM_IMAGENET,
    encode_texts,
    image_features,
    imagenet_names,
    prompt_templates,
    text_features,
    zero_shot_features,
)
from effarch.token_reduction import encode_images, reducer_for_budget


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def clip():
    return build("CLIP")


@pytest.fixture(scope="module")
def processor():
    return transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64)


def image_folder(root, classes=("cat", "dog"), each=3):
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            Image.new("RGB", (20, 30), (40 * i, 60 * j, 90)).save(root / name / f"{j}.png")
    return root


# images


def test_images_are_what_the_processor_makes(processor, tmp_path):
    root = image_folder(tmp_path / "x")
    images = load_images(f"imagefolder:{root}", 4, processor)
    assert len(images) == 4 and images.classes == ["cat", "dog"] and images.labels.bincount().tolist() == [2, 2]
    paths = folder_images(root)[0]
    expected = processor([Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
    pixels, good = preprocess(paths, processor)
    close(Images(pixels, None, [], "", **scaling(processor)).batch(slice(None)), expected)
    assert good == list(range(6))


@pytest.mark.parametrize("settings", [dict(do_normalize=False), dict(rescale_factor=1 / 127.5), dict(do_rescale=False),
                                      dict(do_rescale=False, do_normalize=False), dict(image_mean=[0.1, 0.2, 0.3])])
def test_the_processors_settings_are_followed(settings, tmp_path):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, **settings)
    images = load_images(f"imagefolder:{image_folder(tmp_path / 'x')}", 6, processor)
    found = images.batch(slice(None))
    expected = processor([Image.open(p) for p in folder_images(tmp_path / "x")[0]], return_tensors="pt")["pixel_values"]
    order = [min(range(6), key=lambda j: (expected[j] - image).abs().sum()) for image in found]
    assert sorted(order) == list(range(6))
    close(found, expected[order], 1e-4 * expected.abs().max())


def test_images_are_known_by_their_contents(processor, tmp_path):
    """Same folder, same number: one pixel, one label or one class name more is another digest."""
    images = load_images(f"imagefolder:{image_folder(tmp_path)}", 6, processor)
    again = load_images(f"imagefolder:{tmp_path}", 6, processor)
    assert images.digest() == again.digest()
    again.pixels[0, 0, 0, 0] ^= 1
    others = [again, replace(images, labels=images.labels.flip(0)), replace(images, classes=["cat", "dogs"]), replace(images, scale=1.0)]
    assert len({one.digest() for one in (images, *others, images.part(slice(3)))}) == 6


def test_photos_need_no_labels_and_parts_of_a_picture_are_a_group(processor, tmp_path):
    image_folder(tmp_path, ("holiday", "holiday/deeper"), each=2)
    for i in range(3):
        Image.new("RGB", (20, 30), (90, 40 * i, 10)).save(tmp_path / f"big wave-{i}.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    images = load_images(f"photos:{tmp_path}", 100, processor)
    assert len(images) == 7 and images.labels is None and images.classes == [] and images.source == "photos"
    assert sorted(images.groups) == ["big wave"] * 3 + ["holiday/0", "holiday/1", "holiday/deeper/0", "holiday/deeper/1"]
    some = images.part(slice(2, 5))
    assert some.groups == images.groups[2:5] and len(load_images(f"photos:{tmp_path}", 4, processor).groups) == 4
    again = load_images(f"photos:{tmp_path}", 100, processor)
    assert again.groups == images.groups and again.digest() == images.digest(), "the same seed, the same order"


def test_photographs_are_split_by_whole_pictures():
    groups = list("abacbdacbd")
    images = Images(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 2, 2), None, [], "photos:x", groups=groups)
    for count in range(1, 8):
        first, rest = images.split(count)
        assert len(first) >= count and not set(first.groups) & set(rest.groups) and rest.groups
        assert sorted([*first.pixels[:, 0, 0, 0], *rest.pixels[:, 0, 0, 0]]) == list(range(10))
    plain = Images(images.pixels, None, [], "x")
    assert [len(part) for part in plain.split(4)] == [4, 6]
    with pytest.raises(ValueError, match="^DATASET='photos:x' is not allowed; allowed: photographs of more pictures"):
        images.part([0, 2, 6]).split(2)


def test_a_part_of_the_images_keeps_labels_and_scaling():
    images = Images(torch.arange(48, dtype=torch.uint8).view(4, 3, 2, 2), torch.arange(4), ["a"], "x", scale=1.0)
    part = images.part([2, 3])
    assert part.labels.tolist() == [2, 3] and torch.equal(part.batch(slice(None)), images.batch([2, 3]))
    assert [len(batch) for batch in images.batches(3)] == [3, 1] and Images(images.pixels, None, [], "").part([1]).labels is None


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 6).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(to_rgb(Image.open(tmp_path / "x.png")))[..., 0], np.rot90(np.asarray(picture), -1))


def test_grey_of_sixteen_bits_and_floats_are_neither_white_nor_black(tmp_path):
    values = np.linspace(0, 1, 64).reshape(8, 8)
    expected = (values * 255).round().astype(np.uint8)
    Image.fromarray((values * 65535).astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray((values * 255).astype(np.float32)).save(tmp_path / "bytes.tif")
    Image.fromarray((values * 255).astype(np.int32)).save(tmp_path / "ints.tif")
    for name in ("grey.png", "unit.tif", "bytes.tif", "ints.tif"):
        found = np.asarray(to_rgb(Image.open(tmp_path / name)))
        assert found.shape == (8, 8, 3) and np.abs(found[..., 1].astype(int) - expected).max() <= 1, name


def test_a_float_picture_with_a_pixel_without_data_keeps_its_greys():
    picture = to_rgb(Image.fromarray(np.float32([[0, 0.5], [1, np.nan]])))
    assert np.asarray(picture)[..., 0].tolist() == [[0, 128], [255, 0]]


def png_of(width, height):
    """A PNG header that promises width × height pixels, and little behind it."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_undecodable_files_are_skipped_and_counted(processor, tmp_path):
    root = image_folder(tmp_path / "x")
    (root / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n not really")
    (root / "dog" / "empty.jpg").write_bytes(b"")
    (root / "dog" / "bomb.png").write_bytes(png_of(40_000, 40_000))
    images = load_images(f"imagefolder:{root}", 9, processor)
    assert len(images) == 6 and images.skipped == 3
    for name in ("cat", "dog"):
        for path in (root / name).iterdir():
            path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="none of 9 could"):
        load_images(f"imagefolder:{root}", 9, processor)


@pytest.mark.parametrize("dataset", ["imagefolder:/nowhere/at/all", "photos:/nowhere/at/all", "photos:", "imagenet", "synthetic:x", "synthetic:4", ""])
def test_bad_datasets_are_one_clear_line(processor, dataset):
    with pytest.raises(ValueError, match="DATASET"):
        load_images(dataset, 4, processor)


def test_folders_that_are_no_class(tmp_path):
    root = image_folder(tmp_path / "x", ("golden_retriever", "Katze"))
    for name in (".cache", "__MACOSX"):
        (root / name).mkdir()
    (root / "Katze" / "._0.png").write_bytes(b"resource fork")
    (root / "Katze/.ipynb_checkpoints").mkdir()
    Image.new("RGB", (9, 9)).save(root / "Katze/.ipynb_checkpoints/0-checkpoint.png")
    assert len(photo_files(root)[0]) == 6
    paths, labels, classes = folder_images(root)
    assert classes == ["Katze", "golden retriever"] and len(paths) == 6 and sorted(labels) == [0] * 3 + [1] * 3
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="without: \\['empty'\\]"):
        folder_images(root)
    (root / "empty").rmdir()
    image_folder(root, ("golden retriever",))
    with pytest.raises(ValueError, match="names differ by more"):
        folder_images(root)


def test_links_and_unusual_endings(processor, tmp_path):
    root = image_folder(tmp_path / "x", ("cat",))
    image_folder(tmp_path / "y", ("dog",))
    (root / "dog").symlink_to(tmp_path / "y/dog")
    (root / "cat/gone.png").symlink_to("nowhere.png")
    images = load_images(f"imagefolder:{root}", 9, processor)
    assert len(images) == 6 and images.skipped == 1 and images.classes == ["cat", "dog"]
    for i, (end, kind) in enumerate((("JPG", "JPEG"), ("jfif", "JPEG"), ("PNG", "PNG"))):
        Image.new("RGB", (9, 9)).save(root / f"cat/{i}-more.{end}", format=kind)
    assert len(folder_images(root)[0]) == 4 + 3 + 3


def test_synthetic_images_have_the_models_size(processor):
    for side in (64, 128):
        assert load_images(f"synthetic:{side}", 3, processor).pixels.shape == (3, 3, 64, 64)


def test_a_stratified_sample_is_balanced_as_far_as_it_goes():
    labels = [0] * 10 + [1] * 3 + [2] * 10
    index = stratified(labels, 12, 0)
    assert sorted(np.bincount([labels[i] for i in index]).tolist()) == [3, 4, 5] and len(set(index)) == 12
    assert len(stratified(labels, 99, 0)) == 23 and stratified(labels, 5, 1).tolist() == stratified(labels, 5, 1).tolist()


# the class-name head


@pytest.mark.parametrize("train, dataset, apart", [
    ("a/train", "a/val", True), ("a/train", "a/train2", True), ("a", "a", False), ("a", "a/val", False), ("a/train/more", "a/train", False)])
def test_images_to_learn_from_lie_neither_in_the_folder_that_judges_nor_around_it(tmp_path, train, dataset, apart):
    names = f"imagefolder:{tmp_path / train}", f"photos:{tmp_path / dataset}"
    if apart:
        check_apart("TRAIN", *names)
    else:
        with pytest.raises(ValueError, match="TRAIN='imagefolder.* is not allowed; allowed: other images"):
            check_apart("TRAIN", *names)
    check_apart("TRAIN", None, names[1]), check_apart("TRAIN", "cifar10", names[1])


def test_class_names_that_no_prompt_fits_are_refused():
    assert len(prompt_templates(list(CIFAR_CLASSES))) == 18
    assert prompt_templates(["tabby cat", "mountain", "猫", "犬"]) == ["a photo of a {}."]
    for bad in ("0012", "n01440764", "7", "x", "…"):
        with pytest.raises(ValueError, match="class names"):
            prompt_templates(["cat", bad])


class Fake:
    """A checkpoint whose tokenizer spells the last letters of a text, or, blind, nothing."""

    def __init__(self, model, blind=False):
        self.model, self.blind = model, blind

    def tokenize(self, texts):
        ids = [[0, *(2 if self.blind else ord(c) % 90 + 5 for c in t[-4:]), 1] for t in texts]
        return transformers.BatchEncoding({"input_ids": torch.tensor(ids)})


class Padded(Fake):
    """The same with texts of any length, padded as CLIP's tokenizer pads: with the end token, to one length."""

    def tokenize(self, texts):
        ids = [[0, *(ord(c) % 90 + 5 for c in t[-8:]), 1] for t in texts]
        full, mask = ([[*row, *[fill] * (12 - len(row))] for row in rows] for rows, fill in ((ids, 1), ([[1] * len(i) for i in ids], 0)))
        return transformers.BatchEncoding({"input_ids": torch.tensor(full), "attention_mask": torch.tensor(mask)})


def test_text_is_pooled_at_the_end_token(clip):
    text = text_features(Fake(clip), ["zebra", "horse", "plane"], ["a photo of a {}", "one {}"])
    assert text.shape == (3, 24) and (text @ text.T - 2 * torch.eye(3)).max() < 0.9999
    close(text.norm(dim=-1), torch.ones(3))
    states = clip.text_model(**Fake(clip).tokenize(["zebra", "horse"])).last_hidden_state
    close(states[0, 0], states[1, 0])  # the start token of a causal encoder sees nothing


def test_texts_are_the_models_own_however_they_are_batched_and_shortened(clip):
    fake, texts = Padded(clip), ["zebra", "horse", "plane", "a small horse in the rain", "cat"]
    with torch.no_grad():
        own = [getattr(out, "pooler_output", out) for out in (clip.get_text_features(**fake.tokenize([text])) for text in texts)]
    for batch in (1, 2, 64):
        close(encode_texts(fake, texts, batch), F.normalize(torch.cat(own), dim=-1))


def test_imagenets_names_are_a_thousand_words():
    names = imagenet_names()
    assert len(names) == len({name.lower() for name in names}) == 999 and {"tench", "tabby", "toilet tissue"} <= set(names)


def test_the_zero_shot_head_knows_imagenets_names_only(clip):
    assert list(FROM_IMAGENET) == list(CIFAR_CLASSES) and {w for part in FROM_IMAGENET.values() for w in part} <= set(imagenet_names())
    fake = Padded(clip)
    head = zero_shot_features(fake)
    horses = encode_texts(fake, ["a photo of a sorrel.", "a photo of the sorrel."])
    close(head[7], F.normalize(horses.mean(0), dim=-1))
    row = judge_images(head, head, None, torch.arange(10), zero_shot=head)
    assert row["zero_shot_corrects"] == "y" * 10 and row["corrects"] == ""


def test_texts_that_are_all_alike_and_a_single_class_are_refused(clip):
    with pytest.raises(ValueError, match="class texts=\\['zebra', 'horse'\\] is not allowed.*tells apart"):
        text_features(Fake(clip, blind=True), ["zebra", "horse"], ["a {}"])
    with pytest.raises(ValueError, match="at least two"):
        text_features(Fake(clip), ["zebra"], ["a {}"])


def test_class_names_that_the_tokenizer_cannot_spell_are_refused(clip, tmp_path):
    """Unknown words in different numbers have different features, so likeness alone does not tell; nor do no tokenizer files at all."""
    from test_encoder import word_tokenizer

    folder = save_clip(tmp_path / "x", clip)
    word_tokenizer().save_pretrained(folder)
    checkpoint = load_checkpoint(locate_checkpoint(str(folder)), torch.device("cpu"))
    with pytest.raises(ValueError, match="class names=.*zebra.* is not allowed; allowed: names that the tokenizer can spell"):
        text_features(checkpoint, ["zebra", "grey zebra"], ["this is a {}"])
    assert text_features(checkpoint, ["cat", "dog"], ["this is a {}"]).isfinite().all()
    with pytest.raises(ValueError):
        bare = load_checkpoint(locate_checkpoint(str(save_clip(tmp_path / "bare", clip))), torch.device("cpu"))
        text_features(bare, ["zebra", "horse"], ["a {}"])


# checkpoints


def save_clip(folder, clip):
    clip.save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    return folder


def test_checkpoint_folders_that_cannot_be_used(clip, tmp_path):
    with pytest.raises(ValueError, match="MODEL_ID.*config.json"):
        locate_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="MODEL_ID"):
        locate_checkpoint(str(tmp_path / "missing"))
    folder = save_clip(tmp_path / "My CLIP", clip)
    location = locate_checkpoint(str(folder))
    assert location.slug == f"my-clip-{location.digest[:6]}"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_checkpoint(location, torch.device("cpu"))


def test_a_config_that_names_fewer_layers_than_the_weights_hold_is_refused(tmp_path, clip):
    folder = save_clip(tmp_path / "short", clip)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="as many layers in config.json as in the weights"):
        load_checkpoint(locate_checkpoint(str(folder)), torch.device("cpu"))


def test_a_checkpoint_is_known_by_its_contents(clip, tmp_path):
    """Folders of one name, names without a letter of ASCII, a file that was replaced: each has results of its own."""
    one, two, other = (save_clip(tmp_path / name, clip) for name in ("a/clip", "b/clip", "模型"))
    slugs = [locate_checkpoint(str(folder)).slug for folder in (one, two, other)]
    assert slugs[0] == slugs[1] and re.fullmatch("checkpoint-[0-9a-f]{6}", slugs[2]), "the same contents, the same name"
    for name, change in (("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])), ("config.json", lambda data: data + b" "),
                         ("preprocessor_config.json", lambda data: data + b" "), ("vocab.txt", lambda data: b"a")):
        file, before = two / name, locate_checkpoint(str(two)).slug
        file.write_bytes(change(file.read_bytes() if file.exists() else b""))
        assert locate_checkpoint(str(two)).slug != before, name


def test_two_hub_models_never_share_a_folder():
    names = ["openai/clip-vit-base-patch16", "a-b/c", "a/b-c", "o/clip_v1", "o/clip-v1", "o/clip.v1", "o/clip--v1"]
    slugs = [hub_slug(name) for name in names]
    assert slugs[0] == "openai-clip-vit-base-patch16" and len(set(slugs)) == len(names)
    assert all(re.fullmatch("[a-z0-9-]+", slug) for slug in slugs)


def test_texts_are_padded_to_the_text_towers_length_even_if_the_tokenizer_does_not_know_it(clip, tmp_path):
    from test_encoder import word_tokenizer

    folder, tokenizer = save_clip(tmp_path / "x", clip), word_tokenizer()
    tokenizer.model_max_length = int(1e30)  # what a tokenizer without that setting says
    tokenizer.save_pretrained(folder)
    checkpoint = load_checkpoint(locate_checkpoint(str(folder)), torch.device("cpu"))
    assert checkpoint.tokenize(["a cat", "this is a dog"])["input_ids"].shape == (2, clip.config.text_config.max_position_embeddings)
    assert checkpoint.pretrained and checkpoint.facts["sha256"]


def test_without_a_network_a_stand_in_or_a_clear_refusal(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    location = locate_checkpoint("openai/clip-vit-base-patch16")
    assert location.folder is None and location.why
    assert locate_checkpoint("openai/clip-vit-base-patch16", smoke=True).slug == "random-tiny"
    with pytest.raises(ValueError, match="MODEL_ID"):
        locate_checkpoint("some-body/some-clip")
    for smoke in (True, False):
        with pytest.raises(ValueError, match="MODEL_ID='weights' is not allowed; allowed: a folder that exists, or a hub id"):
            locate_checkpoint("weights", smoke)
        with pytest.raises(ValueError, match="MODEL_ID='weights/clip/tiny' is not allowed"):
            locate_checkpoint("weights/clip/tiny", smoke)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="MODEL_ID='weights/clp' is not allowed; allowed: a folder that exists in weights"):
        locate_checkpoint("weights/clp", smoke=True)
    checkpoint = load_checkpoint(location, torch.device("cpu"), smoke=True)
    assert not checkpoint.pretrained and checkpoint.tokenize is None
    assert reachable("http://127.0.0.1:9", 2) is False


def a_run(smoke):
    return SimpleNamespace(smoke=smoke, device=torch.device("cpu"), seed=0, facts={}, inputs={})


def test_a_study_without_weights_says_why_nothing_is_judged(capsys):
    location = locate_checkpoint("openai/clip-vit-base-patch16", smoke=True)
    for smoke, measurable in ((True, True), (False, False)):
        run = a_run(smoke)
        location.why = "no answer from the hub"
        if not smoke:  # the tiny stand-in again, in a run that is meant
            study = prepare_tiny(run, location)
        else:
            study = prepare(run, location, "cifar10", 6)
        assert study.measurable is measurable and len(study.images) == 6
        assert "no answer from the hub" in study.why_not and run.facts["quality"] == study.why_not
        assert (study.text is None) is not smoke
    assert "random numbers, no result" in capsys.readouterr().out


def prepare_tiny(run, location):
    """`prepare` for a run that is no smoke run, with the small random model instead of the large one."""
    import effarch.clip.study as study

    load, study.load_checkpoint = study.load_checkpoint, lambda where, device, smoke: load_checkpoint(where, device, True)
    try:
        return prepare(run, location, "synthetic:64", 6)
    finally:
        study.load_checkpoint = load


# quality


def test_quality_is_exact_on_known_features():
    dense = F.normalize(torch.tensor([[1.0, 0], [0, 1.0], [1.0, 1.0], [1.0, 0.1]]), dim=-1)
    moved = dense.clone()
    moved[1] = torch.tensor([1.0, 0])
    labels = torch.tensor([0, 1, 0, 0])
    whole, seen = (per_image([judge_images(f, dense, torch.eye(2), labels)]) for f in (dense, moved))
    row = quality_columns(seen, dense=whole)
    assert row["top1_agreement"] == 0.75 and row["cosine_mean"] == pytest.approx(0.75)
    assert row["accuracy_minus_dense"] == pytest.approx(-0.25) and row["n_images"] == 4
    assert row["top1_agreement_low"] < 0.75 < row["top1_agreement_high"] < 1
    assert "top1_agreement" not in quality_columns(per_image([judge_images(moved, dense)]))


def test_many_names_are_harder_to_agree_on():
    dense = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=-1)
    moved = F.normalize(torch.tensor([[0.9, 0.3], [0.9, 0.3], [0.1, 1.0]]), dim=-1)
    names = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=-1)
    row = quality_columns(per_image([judge_images(moved, dense, torch.eye(2), None, names)]))
    assert row["top1_agreement"] == 1 and row["names_agreement"] == pytest.approx(2 / 3) and "top1_accuracy" not in row


def test_parts_of_one_picture_count_as_one():
    """Four copies of each image say no more than one of each; as images of their own they would seem to."""
    random = np.random.default_rng(0)
    once = dict(cosine=random.random(12), agreement=(random.random(12) < 0.5).astype(float), accuracy=None, names_agreement=None)
    base = once | dict(cosine=random.random(12), agreement=np.ones(12))
    single = quality_columns(once, list(range(12)), base=base)
    four = [{k: None if v is None else np.repeat(v, 4) for k, v in one.items()} for one in (once, base)]
    grouped = quality_columns(four[0], np.repeat(range(12), 4).tolist(), base=four[1])
    compared = [{k: v for k, v in row.items() if k not in ("n_images", "cosine_p5")} for row in (grouped, single)]
    assert compared[0] == pytest.approx(compared[1])
    assert (grouped["n_images"], grouped["n_pictures"]) == (48, 12)
    loose = quality_columns(four[0], base=four[1])
    for column in ("cosine_mean", "cosine_minus_base", "top1_agreement"):
        width = [row[f"{column}_high"] - row[f"{column}_low"] for row in (grouped, loose)]
        assert width[0] > 1.5 * width[1] and grouped[column] == pytest.approx(loose[column]), column


def test_a_picture_with_more_parts_counts_more():
    seen = dict(cosine=np.array([1.0] * 7 + [0.0] * 8), agreement=None, accuracy=None, names_agreement=None)
    row = quality_columns(seen, [0] * 7 + list(range(1, 9)))
    assert row["cosine_mean"] == pytest.approx(7 / 15) and (row["n_images"], row["n_pictures"]) == (15, 9)


def test_features_that_are_not_finite_are_a_status_and_no_number():
    good, text = F.normalize(torch.randn(3, 4), dim=-1), torch.eye(4)
    bad = good.clone()
    bad[1, 2] = float("nan")
    row = judge_images(bad, good, text, torch.zeros(3))
    assert row["status"] == "nan" and quality_columns(per_image([row])) == dict(n_images=0, status="nan")
    for where in ("dense", "text", "names", "zero_shot"):
        given = dict(features=good, dense=good, text=text, names=text, zero_shot=text, labels=torch.zeros(3))
        given[where] = torch.where(torch.eye(*given[where].shape) > 0, float("nan"), given[where])
        assert judge_images(**given)["status"] == "nan", where
    draws = [judge_images(good, good, text), row]  # one bad draw is not averaged away
    assert quality_columns(per_image(draws)) == dict(n_images=0, status="nan")


def test_half_precision_features_are_judged_in_float32():
    features = F.normalize(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    row = judge_images(features.bfloat16(), features, torch.eye(64), torch.zeros(9))
    assert per_image([row])["cosine"].min() > 0.9999
    other = judge_images(F.normalize(features.flip(0), dim=-1).bfloat16(), features, torch.eye(64))
    assert len(set(other["cosines"].split())) > 3, "in bfloat16 cosines would have three digits"
    x = torch.randn(99, 64, generator=torch.Generator().manual_seed(0))
    seen = per_image([judge_images(F.normalize(x.bfloat16(), dim=-1), F.normalize(x, dim=-1))])["cosine"]
    assert 0.9999 < seen.min() and seen.max() <= 1, "a length of bfloat16 is not 1"


# digits and photographs


def test_the_digits_model_learns_in_seconds():
    train, test = digit_images()
    assert len(train) == 1297 and len(test) == 500 and train.pixels.shape[1:] == (3, 32, 32)
    with torch.enable_grad():
        checkpoint, test = train_digits_clip(torch.device("cpu"), steps=100, log=lambda text: None)
    text = text_features(checkpoint, DIGITS, ["a photo of a {}."])
    encode = lambda x: library_feature(checkpoint.model, x)
    accuracy = ((image_features(encode, test) @ text.T).argmax(-1) == test.labels).float().mean()
    assert accuracy > 0.3 and spell(["a", "abc"])["input_ids"].shape == (2, 5)


def test_patches_and_back_and_what_is_painted():
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_patches(to_patches(image, 16), 3), image.permute(1, 2, 0))
    owner = torch.tensor([0, -1, 1, 2, 3, 4])
    kept = paint_kept(image, owner, 16)
    assert torch.equal(kept[:16, :16], image.permute(1, 2, 0)[:16, :16])
    for plain in (torch.zeros(3, 32, 48), torch.ones(3, 32, 48)):  # stripes show on black and on white
        hatched = paint_kept(plain, owner, 16)[:16, 16:32]
        assert hatched.std() > 0.1 and (hatched.mean() - plain.mean()).abs() > 0.2
    painted = paint_groups(image, torch.tensor([0, 0, 1, 2, 3, 4]), 16)
    assert painted[2:14, 2:14].flatten(0, 1).std(0).max() < 1e-6, "a group has one colour"
    assert torch.equal(painted[18:30, 2:14], image.permute(1, 2, 0)[18:30, 2:14]), "a single patch stays as it is"


def test_photographs_or_the_studys_own_images_where_there_are_none(processor, monkeypatch, capsys):
    import sys

    study = SimpleNamespace(checkpoint=SimpleNamespace(processor=processor), images=load_images("synthetic:64", 9, processor))
    names, photos = photographs(study, most=3)
    assert len(names) == len(photos) == 3 and photos.pixels.shape[1:] == (3, 64, 64) and names[0] == "astronaut"
    monkeypatch.setitem(sys.modules, "skimage", None)
    names, photos = photographs(study, most=3)
    assert names == ["image 1", "image 2", "image 3"] and "not installed" in capsys.readouterr().out


def test_towers_say_whether_they_pool():
    for family, pools in {"CLIP": True, "SigLIP": True, "SigLIP without head": False, "ViT": True, "ViT classifier": False}.items():
        assert make_tower(build(family)).pools is pools, family


# the real checkpoint


@pytest.fixture(scope="module")
def real():
    """(checkpoint, test images, text features, dense features) of the real CLIP on CIFAR-10."""
    folder, data = os.environ.get("EA_CLIP_CHECKPOINT"), os.environ.get("EA_CIFAR10")
    if not folder or not data:
        pytest.skip("EA_CLIP_CHECKPOINT and EA_CIFAR10 do not name a checkpoint and a CIFAR-10 folder")
    with torch.no_grad():
        checkpoint = load_checkpoint(locate_checkpoint(folder), torch.device("cpu"))
        images = load_images(f"imagefolder:{data}/test_1k", 250, checkpoint.processor)
        text = text_features(checkpoint, images.classes, prompt_templates(images.classes))
        return checkpoint, images, text, image_features(lambda x: encode_images(checkpoint.model, x), images)


@pytest.mark.checkpoint
def test_real_class_name_accuracy(real):
    checkpoint, images, text, dense = real
    assert ((dense @ text.T).argmax(-1) == images.labels).float().mean() >= 0.92
    close(encode_images(checkpoint.model, images.batch([0, 1])), library_feature(checkpoint.model, images.batch([0, 1])))


@pytest.mark.checkpoint
def test_real_target_at_half_of_the_compute(real):
    checkpoint, images, text, dense = real
    reducer = reducer_for_budget("ours", 0.5, checkpoint.model)
    reduced = image_features(lambda x: encode_images(checkpoint.model, x, reducer), images)
    whole, seen = (per_image([judge_images(f, dense, text, images.labels)]) for f in (dense, reduced))
    row = quality_columns(seen, dense=whole)
    assert row["cosine_mean"] >= 0.973 and row["top1_agreement"] >= 0.955 and row["accuracy_minus_dense"] >= -0.03
