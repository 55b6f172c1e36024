"""Mosaics of labelled pictures, questions about their cells, captions of them, and a small language model that knows such captions."""

import math

import torch
import torch.nn.functional as F
import transformers

from effarch.checks import check
from effarch.clip.images import load_images
from effarch.clip.labelled import check_apart

GRIDS = (2, 3, 4)  # cells a side
CELLS = max(GRIDS) ** 2
QUESTIONS = sum(grid * grid for grid in GRIDS)  # 'what is in this cell?', for every cell of every grid
UNASKED = -100  # the answer where a small grid has no cell; cross_entropy leaves it out


def compose_mosaics(pictures, index, side):
    """Mosaics of pictures (n, 3, s, s) uint8: index (M, g²) → (M, 3, side, side) uint8, cell by cell in rows of g."""
    count = math.isqrt(index.shape[1])
    check(count**2 == index.shape[1], "index", tuple(index.shape), "(mosaics, a square number of cells)")
    edges = [round(side * i / count) for i in range(count + 1)]
    mosaics = torch.empty(len(index), 3, side, side, dtype=torch.uint8, device=pictures.device)
    for cell, chosen in enumerate(index.T):
        (top, bottom), (left, right) = (edges[i : i + 2] for i in divmod(cell, count))
        small = F.interpolate(pictures[chosen].float(), size=(bottom - top, right - left), mode="bilinear", antialias=True)
        mosaics[:, :, top:bottom, left:right] = small.round().clamp(0, 255).to(torch.uint8)
    return mosaics


def draw_mosaics(labels, many, seed):
    """`many` mosaics, of every grid as many: [(grid, index of pictures (M, g²), answers (M, CELLS))], at least one of each."""
    generator, drawn = torch.Generator().manual_seed(seed), []
    for grid in GRIDS:
        index = torch.randint(len(labels), (max(1, many // len(GRIDS)), grid * grid), generator=generator)
        drawn.append((grid, index, F.pad(labels[index], (0, CELLS - grid * grid), value=UNASKED)))
    return drawn


def first_question(grid):
    """Number of the question for the first cell of a grid; the others follow. grid: an int or a tensor of them."""
    return sum((grid > smaller) * smaller**2 for smaller in GRIDS)


def all_questions(grid):
    """grid (M,) → (M, CELLS): numbers of the questions for all cells; where a small grid has no cell, any."""
    cells = torch.arange(CELLS, device=grid.device)
    return (cells + first_question(grid)[:, None]).clamp(max=QUESTIONS - 1)


def picture_parts(study, run, dataset, train, count, tests):
    """{part: (pictures (n, 3, side / 2, side / 2) uint8, labels (n,))} for mosaics: 'fit', 'choose' (a tenth of the pictures to train
    with) and 'test 0', 'test 1', … of the study's images, in so many parts without a picture in common.

    train: pictures to train with as DATASET names them, `count` at most. None: CIFAR-10's training part for 'cifar10', else every
    second picture of the study, and the others are for the test. ValueError where the classes differ."""
    side, learn, test = study.model.config.vision_config.image_size // 2, None, study.images
    check_apart("TRAIN", train, dataset)
    train = train or (dataset if dataset == test.source == "cifar10" else None)
    if train is None or run.smoke:
        learn, test = test.part(slice(0, None, 2)), test.part(slice(1, None, 2))
    else:
        learn = load_images(train, count, study.checkpoint.processor, run.seed, train=True)
        run.inputs.update(training_images=learn.digest())
    check(learn.classes == test.classes, "TRAIN", learn.classes, f"pictures of the same classes as the test's: {test.classes}")
    parts = {"fit": learn.part(slice(len(learn) // 10, None)), "choose": learn.part(slice(0, len(learn) // 10))}
    parts |= {f"test {i}": test.part(slice(i, None, tests)) for i in range(tests)}
    check(all(map(len, parts.values())), "IMAGES", len(study.images), "more pictures: some part of them is empty")

    def small(images):
        return torch.cat([F.interpolate(x.float(), size=side, mode="area").round().to(torch.uint8) for x in images.pixels.split(200)])

    return {name: (small(part), torch.zeros(len(part), dtype=torch.long) if part.labels is None else part.labels)
            for name, part in parts.items()}


class Captions:
    """Captions such as ': dog , ship ; cat , truck .' of mosaics, word by word; 0 pads, 1 starts, 2 starts what is written."""

    def __init__(self, classes):
        self.classes, marks = list(classes), ["<pad>", "<start>", "<write>", ":", ",", ";", ".", "1st", "2nd", "3rd", "4th"]
        self.words, self.first_class = [*marks, *self.classes], len(marks)
        self.number = {word: i for i, word in enumerate(marks)}

    def caption(self, labels, grid):
        """[ids] and [cell that a word names, or -1] for the labels of a grid, row by row."""
        ids, cells = [self.number[":"]], [-1]
        for cell in range(grid * grid):
            end = "." if cell + 1 == grid * grid else "," if (cell + 1) % grid else ";"
            ids += [self.first_class + labels[cell], self.number[end]]
            cells += [cell, -1]
        return ids, cells

    def notes(self, labels, grid, generator):
        """([ids], where the caption begins): the start, a note for each cell in random order ('1st 2nd ship': row, column, class), and
        the caption."""
        numbers, ids = [self.number[word] for word in ("1st", "2nd", "3rd", "4th")], [1]
        for cell in torch.randperm(grid * grid, generator=generator).tolist():
            ids += [numbers[cell // grid], numbers[cell % grid], self.first_class + labels[cell]]
        return ids + self.caption(labels, grid)[0], len(ids)

    def tensors(self, answers, grid):
        """(ids, cells), both (M, L), of mosaics with answers (M, CELLS) and grid (M,); cells are UNASKED where ids are padding."""
        rows = [self.caption(labels, g) for labels, g in zip(answers.tolist(), grid.tolist(), strict=True)]
        return tuple(pad([row[i] for row in rows], value).to(answers.device) for i, value in enumerate((0, UNASKED)))

    def text(self, ids):
        """The words of a caption without its ':', up to the full stop."""
        words = [self.words[i] for i in ids]
        return " ".join(words[words[:1] == [":"] : words.index(".") if "." in words else None])

    def language_model(self, grids, steps, seed, device, positions=128):
        """(a small GPT-2 that learned from `steps` batches of 32 notes with their captions, its last loss); frozen."""
        torch.manual_seed(seed)
        shape = dict(vocab_size=len(self.words), n_positions=positions, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
        config = transformers.GPT2Config(**shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        model, generator = transformers.GPT2LMHeadModel(config).to(device), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, steps))
        for _ in range(steps):
            rows = []
            for i in torch.randint(len(grids), (32,), generator=generator).tolist():
                labels = torch.randint(len(self.classes), (grids[i] ** 2,), generator=generator)
                rows.append(self.notes(labels.tolist(), grids[i], generator))
            ids = pad([row for row, _ in rows], 0)
            asked = (torch.arange(ids.shape[1]) > torch.tensor([[at] for _, at in rows])) & (ids > 0)
            logits, labels = model(ids.to(device)).logits[:, :-1], ids.where(asked, UNASKED)[:, 1:].to(device)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNASKED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return model.eval().requires_grad_(False), loss.item()


def pad(rows, value):
    """Lists of numbers as one tensor (rows, longest)."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
