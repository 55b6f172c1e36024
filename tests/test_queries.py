"""Learned queries and their rivals: masks, equality with transformers' BLIP-2, losses, resamplers, pooling, merging; and what they
are tried on: mosaics, captions, trainings without a schedule."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval, Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings

from effarch.bench.averaging import AveragedTraining
from effarch.clip.images import Images
from effarch.clip.mosaics import (
    CELLS,
    GRIDS,
    QUESTIONS,
    UNASKED,
    Captions,
    all_questions,
    compose_mosaics,
    draw_mosaics,
    first_question,
    picture_parts,
)
from effarch.queries import (
    OBJECTIVES,
    MultiHead,
    Objectives,
    PerceiverResampler,
    QFormer,
    contrast,
    contrastive_loss,
    from_blip2,
    hard_negatives,
    merge_patches,
    nearly_square,
    place_bias,
    place_code,
    pool_patches,
    query_mask,
    select_patches,
    shuffle_patches,
)

SHAPE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, encoder_hidden_size=24, vocab_size=50,
             max_position_embeddings=20)


def close(a, b, limit=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=limit)


def enlarge(module):
    """Random weights large enough that every part matters."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2 if p.ndim > 1 else 1).add_(0.1 * torch.randn_like(p) if p.ndim == 1 else 0)
    return module


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def pair():
    """(transformers' Q-Former, its text embeddings, its query tokens)."""
    config = Blip2QFormerConfig(**SHAPE, use_qformer_text_input=True)
    return enlarge(Blip2QFormerModel(config)).eval(), Blip2TextEmbeddings(config), 0.02 * torch.randn(1, 6, 32)


@pytest.fixture
def ours():
    """A small Q-Former that reads words."""
    return enlarge(QFormer(6, 32, 24, depth=4, vocabulary=50, longest=20)).eval()


def batch(b=3, n=10, t=7):
    """Pictures, words and which of the words are no padding."""
    words = torch.ones(b, t, dtype=torch.bool)
    words[1, t - 3:] = False
    return torch.randn(b, n, 24), torch.randint(1, 50, (b, t)), words


# the masks


def may_look(objective, row, column, queries, words):
    """What the paper says, for one pair of places."""
    if column >= queries and not words[column - queries]:
        return False
    if row < queries:
        return column < queries or objective == "itm"
    if column < queries:
        return objective != "itc"
    return objective != "itg" or column <= row


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_mask_is_what_the_paper_says_pair_by_pair(objective):
    words = torch.tensor([[True] * 4, [True, True, False, False]])
    mask = query_mask(objective, 3, words)
    for b in range(2):
        for row in range(7):
            assert mask[b, row].tolist() == [may_look(objective, row, column, 3, words[b]) for column in range(7)]
    assert mask.any(-1).all(), "a row that sees nothing has no softmax"


@pytest.mark.parametrize("objective, queries_see_words, words_see_queries", [("itc", False, False), ("itm", True, True), ("itg", False, True)])
def test_what_a_mask_forbids_does_not_change_anything_and_what_it_allows_does(ours, objective, queries_see_words, words_see_queries):
    picture, ids, words = batch()
    seen, text = ours(picture, ids, objective, words)
    other_seen, _ = ours(picture, ids % 49 + 1, objective, words)
    _, other_text = ours(torch.randn_like(picture), ids, objective, words)
    for changed, before, after in ((queries_see_words, seen, other_seen), (words_see_queries, text, other_text)):
        assert ((before - after).abs().max() > 1e-2) if changed else torch.equal(before, after)
    if not queries_see_words:
        close(seen, ours(picture)[0])


def test_writing_looks_back_only_and_comparing_looks_ahead(ours):
    picture, ids, words = batch()
    later = ids.clone()
    later[:, 4] = later[:, 4] % 49 + 1
    for objective, back in (("itg", True), ("itc", False), ("itm", False)):
        change = (ours(picture, ids, objective)[1] - ours(picture, later, objective)[1]).abs().amax(-1)
        assert change[:, 4:].min() > 0 and (change[:, :4].max() == 0) == back


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_is_as_if_it_were_not_there(ours, objective):
    picture, ids, words = batch()
    seen, text = ours(picture, ids, objective, words)
    short_seen, short_text = ours(picture[1:2], ids[1:2, :4], objective)
    close(seen[1:2], short_seen)
    close(text[1:2, :4], short_text)


# equality with transformers


@pytest.mark.parametrize("every", [1, 2, 3])
def test_copied_weights_give_what_transformers_gives_under_every_mask(every):
    config = Blip2QFormerConfig(**SHAPE, use_qformer_text_input=True, cross_attention_frequency=every)
    theirs, embeddings, queries = enlarge(Blip2QFormerModel(config)).eval(), Blip2TextEmbeddings(config), torch.randn(1, 6, 32)
    mine = from_blip2(theirs, queries, embeddings)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for m in (theirs, embeddings) for p in m.parameters()) + queries.numel()
    picture, ids, words = batch()
    wanted = theirs(queries.expand(3, -1, -1), query_length=6, encoder_hidden_states=picture).last_hidden_state
    close(mine(picture)[0], wanted)
    for objective in OBJECTIVES:
        x = embeddings(input_ids=ids, query_embeds=queries.expand(3, -1, -1))
        mask = query_mask(objective, 6, words)[:, None]
        wanted = theirs(x, query_length=6, attention_mask=mask, encoder_hidden_states=picture).last_hidden_state
        close(torch.cat(mine(picture, ids, objective, words), 1), wanted)


def test_a_q_former_without_words_is_copied_too(pair):
    config = Blip2QFormerConfig(**SHAPE)
    theirs, queries = enlarge(Blip2QFormerModel(config)).eval(), torch.randn(6, 32)
    mine, picture = from_blip2(theirs, queries), torch.randn(2, 5, 24)
    close(mine(picture)[0], theirs(queries.expand(2, -1, -1), encoder_hidden_states=picture).last_hidden_state)
    with pytest.raises(ValueError, match="ids='given' is not allowed"):
        mine(picture, torch.ones(2, 3, dtype=torch.long))


def test_copies_are_copies(pair):
    theirs, embeddings, queries = pair
    mine, before = from_blip2(theirs, queries, embeddings), queries.clone()
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(1)
    assert torch.equal(queries, before) and from_blip2(theirs, queries, embeddings).queries.sub(before[0]).abs().max() == 0


def retrieval_model():
    """A tiny random BLIP-2 for retrieval; its query tokens are zero until they are set."""
    config = Blip2Config(vision_config=dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7),
                         qformer_config=dict(SHAPE, use_qformer_text_input=True), num_query_tokens=6, image_text_hidden_size=16)
    return Blip2ForImageTextRetrieval(config).eval()


@torch.no_grad()
def test_matching_and_contrast_of_a_whole_blip2():
    model, pixels, ids = retrieval_model(), torch.randn(3, 3, 28, 28), torch.randint(1, 50, (3, 7))
    enlarge(model.qformer), model.query_tokens.normal_(std=0.02)
    mine, picture = from_blip2(model.qformer, model.query_tokens, model.embeddings), model.vision_model(pixels).last_hidden_state
    wanted = model(pixels, ids, torch.ones_like(ids), use_image_text_matching_head=True).logits_per_image
    close(model.itm_head(mine(picture, ids, "itm")[0]).mean(1), wanted)
    wanted = model(pixels, ids, torch.ones_like(ids), use_image_text_matching_head=False).logits_per_image
    seen, text = mine(picture, ids, "itc")
    close(contrast(model.vision_projection(seen), model.text_projection(text[:, 0])), wanted)


def test_query_tokens_of_zero_explode_and_ours_do_not():
    """transformers starts random models with zeros there: the LayerNorm of a constant has a gradient of 1 / √1e-12."""
    model = retrieval_model()
    assert model.query_tokens.abs().max() == 0, "it initialises them now: the notebook's warning can go"
    mine, picture, target = from_blip2(model.qformer, model.query_tokens), torch.randn(2, 9, 24), torch.randn(2, 6, 32)
    sizes = []
    for queries in (mine.queries, QFormer(6, 32, 24).queries):
        mine.queries.data = queries.data.clone()
        (gradient,) = torch.autograd.grad(F.mse_loss(mine(picture)[0], target), [mine.queries])
        sizes.append(gradient.norm().item())
    assert sizes[0] > 1e4 * sizes[1] and sizes[1] < 1e3
    assert torch.pdist(gradient).min() > 0, "every query has a gradient of its own"


# symmetries


@pytest.mark.parametrize("make", [lambda: QFormer(6, 32, 24, depth=3), lambda: PerceiverResampler(6, 32, 24, depth=3)], ids=["Q-Former", "perceiver"])
@torch.no_grad()
def test_patches_are_a_set_and_queries_are_interchangeable(make):
    net, picture = enlarge(make()).eval(), torch.randn(2, 12, 24)
    read = (lambda x: net(x)[0]) if isinstance(net, QFormer) else net
    before = read(picture)
    assert before.shape == (2, 6, 32) and before.std(1).min() > 1e-3
    close(read(picture[:, torch.randperm(12)]), before, 1e-4)
    order = torch.randperm(6)
    net.queries.data = net.queries.data[order]
    close(read(picture), before[:, order], 1e-4)
    close(read(picture[1:]), before[1:, order], 1e-4)


def test_given_queries_take_the_place_of_the_learned_ones():
    net, picture = QFormer(6, 32, 24), torch.randn(2, 12, 24)
    close(net(picture, queries=net.queries.expand(2, -1, -1))[0], net(picture)[0])
    assert net(picture, queries=torch.randn(2, 4, 32))[0].shape == (2, 4, 32)


@torch.no_grad()
def test_attention_is_the_formula():
    layer, x, source = enlarge(MultiHead(8, 2, 6)), torch.randn(1, 3, 8), torch.randn(1, 5, 6)
    mask = torch.rand(1, 3, 5) < 0.6
    mask[..., 0] = True
    q, k, v, mixed = layer.q(x)[0], layer.k(source)[0], layer.v(source)[0], torch.zeros(3, 8)
    for head in (slice(0, 4), slice(4, 8)):
        for i in range(3):
            weight = torch.softmax(torch.tensor([q[i, head] @ k[j, head] / 2 if mask[0, i, j] else -math.inf for j in range(5)]), 0)
            mixed[i, head] = weight @ v[:, head]
    close(layer(x, source, mask)[0], layer.out(mixed))


# the losses


def objectives(**options):
    return Objectives(QFormer(4, 32, 24, vocabulary=20, **options), 16)


def test_contrast_takes_the_query_that_fits_best():
    seen, text = torch.randn(3, 4, 5), torch.randn(3, 5)
    found = contrast(seen, text)
    for i in range(3):
        for j in range(3):
            close(found[i, j], max(F.cosine_similarity(query, text[j], dim=0) for query in seen[i]))


def test_the_contrastive_loss_is_the_formula():
    logits, loss = torch.randn(3, 3), 0
    for table in (logits, logits.T):
        for i, row in enumerate(table.log_softmax(1)):
            loss -= sum((0.9 * (i == j) + 0.1 / 3) * row[j] for j in range(3)) / 6
    close(contrastive_loss(logits), loss)


def test_negatives_are_never_the_match_and_mostly_what_is_alike():
    logits = torch.zeros(4, 4).fill_diagonal_(50)
    logits[0, 2] = logits[3, 1] = 60
    drawn = [hard_negatives(logits, torch.Generator().manual_seed(seed)) for seed in range(200)]
    pictures, texts = (torch.stack(part) for part in zip(*drawn, strict=True))
    assert (pictures != torch.arange(4)).all() and (texts != torch.arange(4)).all()
    assert (texts[:, 0] == 2).float().mean() > 0.95 and (pictures[:, 1] == 3).float().mean() > 0.95
    assert len(set(texts[:, 1].tolist())) == 3, "all alike: any of the others"


@torch.no_grad()
def test_writing_is_scored_word_by_word():
    net = enlarge(objectives()).eval()
    picture, ids = torch.randn(2, 6, 24), torch.tensor([[5, 6, 7, 3], [8, 3, 0, 0]])
    scores = []
    for image, text in ((0, [5, 6, 7, 3]), (1, [8, 3])):
        for i, word in enumerate(text):  # what stands before the word, after the start token 2
            _, states = net.qformer(picture[image : image + 1], torch.tensor([[2, *text[:i]]]), "itg")
            scores.append(net.writes(states[0, -1]).log_softmax(-1)[word])
    close(net(picture, ids)["itg"], -torch.stack(scores).mean(), 1e-4)


@torch.no_grad()
def test_matching_has_every_pair_once_and_two_wrong_ones(monkeypatch):
    net = enlarge(objectives()).eval()
    picture, ids = torch.randn(2, 6, 24), torch.randint(3, 20, (2, 4))
    loss = 0
    for image, text, label in ((0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 0), (1, 0, 0)):  # of two pairs the other is the negative
        seen, _ = net.qformer(picture[image : image + 1], F.pad(ids[text : text + 1], (1, 0), value=1), "itm")
        loss -= net.matches(seen).mean(1).log_softmax(-1)[0, label] / 6
    close(net(picture, ids)["itm"], loss, 1e-4)


def test_the_first_stage_learns_a_few_pairs_by_heart():
    net, generator = objectives(), torch.Generator().manual_seed(0)
    picture, ids = torch.randn(6, 5, 24), torch.randint(3, 20, (6, 4))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    first = {name: loss.item() for name, loss in net(picture, ids, generator).items()}
    for _ in range(130):
        optimizer.zero_grad()
        sum(net(picture, ids, generator).values()).backward()
        optimizer.step()
    last = net(picture, ids, generator)
    assert all(last[name] < 0.8 * first[name] for name in OBJECTIVES), (first, last)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


# fixed rules


def test_pooling_is_the_mean_of_rectangles():
    x = torch.randn(2, 6 * 8, 3)
    pooled, maps = pool_patches(x, (6, 8), 6), x.view(2, 6, 8, 3)  # two rows of three: 3 × (8 / 3) patches
    for row in range(2):
        for column in range(3):
            left, right = math.floor(column * 8 / 3), math.ceil((column + 1) * 8 / 3)
            close(pooled[:, row * 3 + column], maps[:, row * 3 : row * 3 + 3, left:right].mean((1, 2)))
    close(pool_patches(x, (6, 8), 48), x)
    close(pool_patches(x, (6, 8), 1)[:, 0], x.mean(1))


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (7, (1, 7)), (9, (3, 3)), (32, (4, 8)), (49, (7, 7))])
def test_counts_become_even_grids(count, shape):
    assert nearly_square(count) == shape


def test_pixel_shuffle_loses_nothing_and_fills_up_with_zeros():
    x = torch.randn(2, 6 * 4, 3)
    tokens = shuffle_patches(x, (6, 4), 2)
    assert tokens.shape == (2, 6, 12)
    for token in range(6):
        row, column = divmod(token, 2)
        there = [(2 * row + i) * 4 + 2 * column + j for i in range(2) for j in range(2)]
        close(tokens[:, token].view(2, 3, 4).transpose(1, 2), x[:, there])
    close(tokens.square().sum((1, 2)), x.square().sum((1, 2)), 1e-4)
    wide = shuffle_patches(x, (6, 4), 5)
    assert wide.shape == (2, 2, 75) and (wide[:, 1].view(2, 3, 5, 5)[:, :, 1:] == 0).all() and (wide.view(2, 2, 3, 5, 5)[..., 4] == 0).all()


def test_selection_takes_the_highest_scores_in_order():
    x, scores = torch.randn(2, 8, 3), torch.rand(2, 8)
    chosen = select_patches(x, scores, 3)
    for b in range(2):
        best = sorted(sorted(range(8), key=lambda i: -scores[b, i])[:3])
        assert torch.equal(chosen[b], x[b, best])
    assert torch.equal(select_patches(x, scores, 8), x)


@pytest.mark.parametrize("attended", [False, True])
def test_merging_keeps_the_mean_and_has_so_many_tokens(attended):
    x, attention = torch.randn(2, 13, 5), torch.rand(2, 13) if attended else None
    close(merge_patches(x, 1, attention)[:, 0], x.mean(1))
    for count in (2, 5, 12):
        assert merge_patches(x, count, attention).shape == (2, count, 5)
    assert torch.equal(merge_patches(x, 13, attention), x)


def test_what_is_the_same_merges_first_and_without_loss():
    kinds = torch.eye(4, 6)[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])]
    carried = torch.cat([kinds, torch.arange(8.0)[:, None]], -1)[None]
    merged = merge_patches(carried, 4, width=6)[0]
    assert sorted(map(tuple, merged.tolist())) == sorted((*row, 2 * i + 0.5) for i, row in enumerate(torch.eye(4, 6).tolist()))


def test_what_is_looked_at_merges_last():
    x, attention = F.normalize(torch.randn(1, 12, 4), dim=-1), torch.full((1, 12), 1e-3)
    attention[0, 4] = 1.0  # at an even place, where sources stand
    kept = merge_patches(x, 7, attention)
    assert (kept - x[:, 4:5]).abs().amax(-1).min() == 0


# places and mosaics


@pytest.mark.parametrize("grid, width", [((14, 14), 32), ((4, 6), 8), ((1, 2), 4)])
def test_every_place_has_a_code_of_its_own(grid, width):
    code = place_code(grid, width)
    assert code.shape == (grid[0] * grid[1], width) and code.abs().max() <= 1 and torch.pdist(code).min() > 0.05
    if grid == (14, 14):  # neighbours are alike, and no direction is preferred
        away = (code.view(14, 14, -1) - code.view(14, 14, -1)[6, 6]).norm(dim=-1)
        assert away[6, 7] < away[6, 10] and away[7, 6] < away[10, 6]
        close(away, away.T)


def test_a_query_with_a_place_begins_by_looking_there():
    bias = place_bias((2, 2), (4, 6))
    assert bias.shape == (4, 24) and bias.max() <= 0
    for query in range(4):
        row, column = divmod(query, 2)
        nearest = bias[query].view(4, 6)[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert nearest.min() > bias[query].view(4, 6)[:, 3 * (1 - column) : 3 * (1 - column) + 3].max()
        assert bias[query].argmax() in (row * 12 + 1 + 3 * column, row * 12 + 7 + 3 * column)
    net, x = QFormer(4, 32, 24, depth=1, grid=(4, 6)), torch.randn(1, 24, 24)
    free = QFormer(4, 32, 24, depth=1)
    free.load_state_dict({k: v for k, v in net.state_dict().items() if k not in ("sharpness", "nearness")})
    assert net.sharpness.requires_grad and "nearness" not in dict(net.named_parameters())
    net.sharpness.data.zero_()
    close(net(x)[0], free(x)[0])
    net.sharpness.data.fill_(1000.0)  # only the nearest patches are left
    far = x.clone()
    far[:, 12:] = 0  # the lower half of the patches: near the lower two queries
    change = (net(far)[0] - net(x)[0]).abs().amax(-1)[0]
    assert change[:2].max() == 0 < change[2:].min()


def test_a_mosaic_shows_its_pictures_in_their_cells():
    pictures = torch.arange(0, 250, 25, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 8, 8)
    for count in (1, 2, 3):
        index = torch.randint(10, (4, count * count))
        mosaics = compose_mosaics(pictures, index, 32)
        assert mosaics.shape == (4, 3, 32, 32) and mosaics.dtype == torch.uint8
        for cell in range(count * count):
            row, column = divmod(cell, count)
            middle = mosaics[:, :, int((row + 0.5) * 32 / count), int((column + 0.5) * 32 / count)]
            assert torch.equal(middle, (index[:, cell] * 25).to(torch.uint8)[:, None].expand(-1, 3))
    one = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(compose_mosaics(one, torch.zeros(1, 1, dtype=torch.long), 32), one)


def test_every_cell_of_every_grid_has_a_question_of_its_own():
    grid = torch.tensor(GRIDS)
    assert [int(first_question(g)) for g in GRIDS] == first_question(grid).tolist() == [0, 4, 13] and QUESTIONS == 29
    asked = all_questions(grid)
    numbers = [n for row, g in zip(asked.tolist(), GRIDS, strict=True) for n in row[: g * g]]
    assert numbers == list(range(QUESTIONS)) and asked.max() < QUESTIONS


def test_drawn_mosaics_have_the_answers_of_their_pictures():
    labels = torch.arange(50) % 7
    for (grid, index, answers), (_, again, _), wanted in zip(draw_mosaics(labels, 30, 5), draw_mosaics(labels, 30, 5), GRIDS, strict=True):
        assert grid == wanted and index.shape == (10, grid * grid) and answers.shape == (10, CELLS) and torch.equal(index, again)
        assert torch.equal(answers[:, : grid * grid], labels[index]) and (answers[:, grid * grid :] == UNASKED).all()
    assert [len(index) for _, index, _ in draw_mosaics(labels, 1, 0)] == [1, 1, 1]


def parts_of(train=None, dataset="imagefolder:there", smoke=False, count=24, side=16):
    """(picture_parts of a study whose picture number i is all i, its run)."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side)
    images = Images(pixels, torch.arange(count) % 2, ["cat", "dog"], dataset)
    study = SimpleNamespace(images=images, model=SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=side))),
                            checkpoint=SimpleNamespace(processor=None))
    run = SimpleNamespace(seed=0, smoke=smoke, inputs={})
    return picture_parts(study, run, dataset, train, 20, 3), run


def test_no_picture_is_in_two_parts():
    parts, _ = parts_of()
    assert list(parts) == ["fit", "choose", "test 0", "test 1", "test 2"]
    numbers = [picture[0, 0, 0].item() for pictures, _ in parts.values() for picture in pictures]
    assert sorted(numbers) == list(range(24)) and all(x.shape[1:] == (3, 8, 8) for x, _ in parts.values())
    assert all((x[:, 0, 0, 0] % 2 == labels).all() for x, labels in parts.values())


def test_pictures_to_train_with_come_from_their_own_folder_and_are_noted(monkeypatch):
    monkeypatch.setattr("effarch.clip.mosaics.load_images", lambda name, count, processor, seed, train: Images(
        torch.full((20, 3, 16, 16), 99, dtype=torch.uint8), torch.arange(20) % 2, ["cat", "dog"], name))
    parts, run = parts_of("imagefolder:elsewhere")
    assert (parts["fit"][0] == 99).all() and len(parts["fit"][0]) == 18 and len(parts["choose"][0]) == 2
    assert sum(len(x) for name, (x, _) in parts.items() if name.startswith("test")) == 24 and "training_images" in run.inputs
    _, smoke = parts_of("imagefolder:elsewhere", smoke=True)
    assert not smoke.inputs


def test_other_classes_and_too_few_pictures_are_refused(monkeypatch):
    monkeypatch.setattr("effarch.clip.mosaics.load_images", lambda *_, **__: Images(
        torch.zeros(20, 3, 16, 16, dtype=torch.uint8), torch.zeros(20, dtype=torch.long), ["horse"], "x"))
    with pytest.raises(ValueError, match="TRAIN=.*'horse'.* is not allowed; allowed: pictures of the same classes"):
        parts_of("imagefolder:elsewhere")
    with pytest.raises(ValueError, match="IMAGES=4 is not allowed"):
        parts_of(count=4)


# captions and who writes them


def test_a_caption_names_the_cells_row_by_row():
    captions = Captions(["cat", "fire engine", "dog"])
    ids, cells = captions.caption([0, 1, 2, 0, UNASKED], 2)
    assert captions.text(ids) == "cat , fire engine ; dog , cat"
    assert [captions.words[i] for i, cell in zip(ids, cells, strict=True) if cell == 1] == ["fire engine"] and sorted(c for c in cells if c >= 0) == [0, 1, 2, 3]
    ids, start = captions.notes([0, 1, 2, 0], 2, torch.Generator().manual_seed(0))
    told = [captions.words[i] for i in ids[1:start]]
    notes = {tuple(told[i : i + 3]) for i in range(0, 12, 3)}
    assert notes == {("1st", "1st", "cat"), ("1st", "2nd", "fire engine"), ("2nd", "1st", "dog"), ("2nd", "2nd", "cat")}
    assert ids[start:] == captions.caption([0, 1, 2, 0], 2)[0]


def test_captions_of_several_grids_are_padded():
    captions, answers = Captions("abc"), torch.tensor([[0, 1, 2, 0] + [UNASKED] * 12, [0, 1, 2] * 3 + [UNASKED] * 7])
    ids, cells = captions.tensors(answers, torch.tensor([2, 3]))
    assert ids.shape == cells.shape == (2, 19) and (ids[0, 9:] == 0).all() and (cells[0, 9:] == UNASKED).all() and (ids[1] > 0).all()


def test_the_language_model_learns_to_put_notes_into_a_caption():
    captions = Captions(["a", "b"])
    early, late = (captions.language_model([2], steps, 0, "cpu", positions=32) for steps in (2, 80))
    assert late[1] < 0.6 * early[1] and not any(p.requires_grad for p in late[0].parameters())
    again, loss = captions.language_model([2], 2, 0, "cpu", positions=32)
    assert loss == early[1] and all(torch.equal(a, b) for a, b in zip(again.parameters(), early[0].parameters(), strict=True))


# trainings without a schedule


def test_the_mean_of_the_weights_is_steadier_than_the_weights():
    """A noisy quadratic: the last weights wander about the minimum, their mean lies closer to it."""
    wandering, steady = [], []
    for seed in range(5):
        net, generator = nn.Linear(1, 8, bias=False), torch.Generator().manual_seed(seed)
        loss = lambda net=net, generator=generator: (net.weight - 1 - torch.randn(8, 1, generator=generator)).square().sum()
        training = AveragedTraining(net, loss, rate=0.3, decay=0.0)
        training.until(200)
        wandering.append((net.weight - 1).square().mean().item())
        steady.append((training.judged.weight - 1).square().mean().item())
    assert sum(steady) < 0.7 * sum(wandering)


def test_a_training_goes_on_where_it_was_and_the_judged_network_is_a_copy():
    def made():
        torch.manual_seed(0)
        net, generator = nn.Linear(3, 1), torch.Generator().manual_seed(0)
        return AveragedTraining(net, lambda: net(torch.randn(4, 3, generator=generator)).square().mean())

    whole, parts = made(), made()
    whole.until(12)
    for steps in (3, 7, 7, 12):
        loss = parts.until(steps)
    assert parts.steps == 12 and torch.isfinite(loss) and torch.isnan(parts.until(5))
    for a, b in ((whole.network, parts.network), (whole.judged, parts.judged)):
        assert torch.equal(a.weight, b.weight)
    assert not torch.equal(whole.judged.weight, whole.network.weight)


# faults


@pytest.mark.parametrize("fault, said", [
    (lambda: query_mask("vqa", 2, torch.ones(1, 2)), "objective='vqa' is not allowed; allowed: itc, itm, itg"),
    (lambda: QFormer(0, 32, 24), "queries=0 is not allowed"),
    (lambda: QFormer(4, 30, 24), "heads=4 is not allowed; allowed: a divisor of the width 30"),
    (lambda: PerceiverResampler(2.5, 32, 24), "queries=2.5 is not allowed"),
    (lambda: pool_patches(torch.ones(1, 4, 2), (2, 2), 0), "count=0 is not allowed"),
    (lambda: select_patches(torch.ones(1, 4, 2), torch.ones(1, 4), 5), "count=5 is not allowed; allowed: at most the 4 patches"),
    (lambda: merge_patches(torch.ones(1, 4, 2), 5), "count=5 is not allowed; allowed: 1 to 4, the patches"),
    (lambda: place_code((2, 2), 6), "width=6 is not allowed; allowed: a multiple of 4"),
    (lambda: from_blip2(Blip2QFormerModel(Blip2QFormerConfig(**SHAPE, hidden_act="relu")), torch.ones(6, 32)), "hidden_act='relu' is not allowed; allowed: gelu"),
    (lambda: compose_mosaics(torch.ones(3, 3, 4, 4), torch.zeros(1, 3, dtype=torch.long), 8), "allowed: (mosaics, a square number of cells)")])
def test_faults_are_told_in_one_line(fault, said):
    with pytest.raises(ValueError) as error:
        fault()
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mask", [torch.ones(4, 5, dtype=torch.bool), torch.ones(4, 1, 5, dtype=torch.int64)])
def test_a_mask_that_would_be_read_as_another_is_refused(mask):
    x = torch.randn(4, 3, 16)
    with pytest.raises(ValueError, match="mask="):
        MultiHead(16, 4)(x, torch.randn(4, 5, 16), mask)
