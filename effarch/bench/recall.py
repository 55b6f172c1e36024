"""Small trainings on three tasks that need memory: induction, selective copying, multi-query associative recall."""

import math
import time

import torch
import torch.nn.functional as F
from torch import nn

from effarch.bench.intervals import seed_ratio
from effarch.checks import check, check_count, is_count

UNASKED = -100  # the label where nothing is asked; cross_entropy leaves it out


def induction(batch, length=64, vocabulary=16, generator=None):
    """(ids, labels), both (B, T): token 0 is the trigger; at the end it comes again, and asks for what followed it."""
    check(length >= 3, "length", length, "at least 3: the trigger, what follows it, the trigger again")
    ids = torch.randint(1, vocabulary, (batch, length), generator=generator)
    labels = torch.full((batch, length), UNASKED)
    rows, at = torch.arange(batch), torch.randint(0, length - 2, (batch,), generator=generator)
    ids[rows, at], ids[:, -1] = 0, 0
    labels[:, -1] = ids[rows, at + 1]
    return ids, labels


def copying(batch, length=60, memory=4, vocabulary=8, generator=None):
    """(ids, labels), (B, length + memory): data tokens (from 2 on) among blanks 0; then markers 1, which ask for them in order."""
    check(is_count(memory) and memory <= length, "memory", memory, f"1 to length={length}, so that all are shown")
    at = torch.rand(batch, length, generator=generator).argsort(1)[:, :memory].sort(1).values
    data = torch.randint(2, 2 + vocabulary, (batch, memory), generator=generator)
    ids = torch.zeros(batch, length, dtype=torch.long).scatter(1, at, data)
    ids = torch.cat([ids, torch.ones(batch, memory, dtype=torch.long)], 1)
    labels = torch.full_like(ids, UNASKED)
    labels[:, -memory:] = data
    return ids, labels


def mqar(batch, length=32, pairs=4, vocabulary=64, generator=None):
    """(ids, labels), (B, T): keys 1…V/2-1 and values V/2…V-1 alternate first; each key comes again at an even place (Zoology)."""
    half = vocabulary // 2
    check(is_count(pairs) and 4 * pairs <= length and pairs < half, "pairs", pairs,
          f"1 to {min(length // 4, half - 1)}: each pair is shown and asked for in length={length}, its key is one of {half - 1}")
    keys = torch.rand(batch, half - 1, generator=generator).argsort(1)[:, :pairs] + 1
    values = torch.randint(half, vocabulary, (batch, pairs), generator=generator)
    places = torch.rand(batch, (length - 2 * pairs) // 2, generator=generator).argsort(1)[:, :pairs] * 2 + 2 * pairs
    ids = torch.randint(1, vocabulary, (batch, length), generator=generator)
    ids[:, :2 * pairs] = torch.stack([keys, values], 2).flatten(1)
    labels = torch.full_like(ids, UNASKED).scatter(1, places, values)
    return ids.scatter(1, places, keys), labels


RECALL = {"induction": (induction, 16), "copying": (copying, 10), "mqar": (mqar, 64)}  # name: (function, vocabulary)


@torch.no_grad()
def recall_counts(model, task, samples=512, seed=10**6):
    """(wrong, asked): how many of the asked tokens a model answers wrongly, on fixed fresh samples; NaN if it is not finite.

    model: ids (B, T) → (logits (B, T, vocabulary), anything); task: a name in RECALL."""
    ids, labels = RECALL[task][0](samples, generator=torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    logits, asked = model(ids.to(device))[0].cpu(), labels != UNASKED
    wrong = int((logits.argmax(-1) != labels)[asked].sum()) if logits.isfinite().all() else math.nan  # argmax hides NaN
    return wrong, int(asked.sum())


def learn_recall(model, task, steps, seed, extra_loss=None, batch=64, rate=3e-3, target=0.995, test_seed=10**6):
    """Train a model until `steps`, or until `target` of the asked tokens are right; returns columns of its row.

    Fresh data at every step, the same for every model of a seed. AdamW with a warm-up and a linear decay, gradients cut to
    norm 1. extra_loss(model) is added to the loss. `steps` says when it stopped; a diverged model has status 'nan'. It is
    tested on the samples of test_seed."""
    check(task in RECALL, "task", task, ", ".join(RECALL))
    check_count(steps, "steps")
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = min(50, max(1, steps // 5))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / warm) * (1 - 0.9 * i / steps))
    generator, begin, device = torch.Generator().manual_seed(seed), time.perf_counter(), next(model.parameters()).device
    for step in range(1, steps + 1):
        ids, labels = (v.to(device) for v in RECALL[task][0](batch, generator=generator))
        loss = F.cross_entropy(model(ids)[0].flatten(0, 1), labels.flatten(), ignore_index=UNASKED)
        loss = loss if extra_loss is None else loss + extra_loss(model)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            wrong, asked = recall_counts(model, task, 256, seed=7)
            if wrong <= (1 - target) * asked:
                break
    wrong, asked = recall_counts(model, task, seed=test_seed)
    return dict(accuracy=1 - wrong / asked, wrong=wrong, n_test=asked, steps=step, train_s=time.perf_counter() - begin,
                params=sum(p.numel() for p in model.parameters()), status="ok" if wrong == wrong else "nan")


def choose_rates(run, table, models, tasks, rates, steps, **options):
    """{(task, variant): learning rate}: of `rates`, the one with the fewest wrong answers, or the fewest steps to the target.

    Trained once for each rate, on a seed that no result uses, and judged on samples that no result uses; a row of each in
    `table`, whose key is task, variant, rate. With one rate nothing is trained. Other arguments as in `learn_all`."""
    best = {}
    for task, variant in ((t, v) for t in tasks for v in models):
        for rate in rates if len(rates) > 1 else ():
            key = dict(task=task, variant=variant, rate=rate)
            if not table.has(**key):
                seed = run.seed + 10**4
                torch.manual_seed(seed)
                model = models[variant](task).to(run.device)
                row = learn_recall(model, task, steps, seed, rate=rate, test_seed=8, **options)
                table.add(key | dict(most_steps=steps, seed_of_model=seed) | row)
                run.log(f"learning rate {rate:g} for {variant} on {task}: {row['accuracy']:.1%} right after {row['steps']} steps")
        found = [row for row in table.find(task=task, variant=variant) if row["status"] == "ok"]
        best[task, variant] = min(found, key=lambda row: (row["wrong"], row["steps"]))["rate"] if found else rates[0]
    table.save()
    return best


def learn_all(run, table, models, tasks, seeds, steps, describe=None, rates=None, keep=None, **options):
    """Train every model on every task with every seed and add a row of each to `table`, unless it is there; returns the models.

    models: {variant: function of the task's name that builds the model}; table: its key is task, variant, seed_of_model;
    seeds: how many, from the run's on; describe(model): further columns; rates: {(task, variant): learning rate}, see
    `choose_rates`; keep: a seed whose models are wanted: where only their rows are there, they are trained again, as before;
    options of `learn_recall`. → {key: model trained here}."""
    trained = {}
    for task, variant, i in run.steps([(t, v, i) for t in tasks for v in models for i in range(seeds)], "training"):
        key = dict(task=task, variant=variant, seed_of_model=run.seed + i)
        there = table.has(**key)
        if there and run.seed + i != keep:
            continue
        torch.manual_seed(run.seed + i)
        model = trained[tuple(key.values())] = models[variant](task).to(run.device)
        rate = dict(rate=rates[task, variant]) if rates else {}
        row = learn_recall(model, task, steps, run.seed + i, **rate, **options) | rate
        if not there:
            table.add(key | dict(most_steps=steps) | row | (describe(model) if describe else {}))
        run.log(f"{row['accuracy']:.1%} right after {row['steps']} steps")
    return trained


def error_ratio(table, mine, other, **where):
    """Estimate of one variant's share of errors over another's, paired by seed; half an error is added to each training.

    A lost training is NaN, so that `seed_ratio` tells."""
    share = lambda row: (row["wrong"] + 0.5) / row["n_test"] if row["status"] == "ok" else math.nan
    shares = [{row["seed_of_model"]: share(row) for row in table.find(variant=v, **where)} for v in (mine, other)]
    both = [seed for seed in shares[0] if seed in shares[1]]
    return seed_ratio(*([share[seed] for seed in both] for share in shares))
