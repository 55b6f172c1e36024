"""A small world of invented results on a few devices, to test the report with."""

import json
import math

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from effarch.bench.claims import statements
from effarch.bench.tables import write_csv

XEON = "Intel(R) Xeon(R) CPU @ 2.20GHz"
T4, CPU, VLM = ("ssm", "tesla-t4"), ("ssm", "cpu-intel-xeon-2t"), ("vlm", "cpu-intel-xeon-2t/clip-tiny")
DEVICES = {T4: ("Tesla T4", "full", ""), CPU: (XEON, "cpu", ""), VLM: (XEON, "full", "clip-tiny")}
VERDICT = ["supported", "not supported", "undecided", "not testable here"]


def provenance(suite, device, mode, weights, notebook):
    """The columns that every row carries."""
    return dict(run_id=f"r-{notebook}", suite=suite, notebook=notebook, device=device, dtype="float32", torch="2.11.0",
                compute_capability="7.5" if "T4" in device else "", transformers="5.17.0", python="3.12.1", num_threads=2,
                weights=weights, git_commit="abc1234567", git_dirty=False, seed=0, utc_time="2026-01-02T03:04:05Z", mode=mode)


def write_figure(path, alt):
    """A PNG or JPEG that looks like a plot, with its description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (800, 450), "white")
    pen = ImageDraw.Draw(image)
    for i in range(12):
        pen.line([(50, 50 + 30 * i), (750, 350 - 20 * i)], fill=(20 * i, 90, 200 - 10 * i), width=4)
    if path.suffix == ".jpg":
        exif = Image.Exif()
        exif[0x010E] = alt.encode()
        image.save(path, exif=exif)
    else:
        info = PngInfo()
        info.add_itxt("Description", alt)
        image.save(path, pnginfo=info)


def write_facts(folder, base):
    """The long provenance of one finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = base | dict(seconds=90.0, finished_utc="2026-01-02T03:06:00Z", packages={}, facts={})
    (folder / f"{base['notebook']}.env.json").write_text(json.dumps(facts))
    (folder / f"{base['notebook']}.ipynb").write_text("{}")


def write_place(root, suite, name, device, mode, weights="", notebook=None):
    """Results, claims, provenance and figures of one device."""
    notebook, folder = notebook or f"{suite}_demo", root / "results" / suite / name
    base = provenance(suite, device, mode, weights, notebook)
    write_facts(folder, base)
    random, table, raw = np.random.default_rng(1), [], []
    for variant, ms in (("slow", 30.0), ("fast", 10.0)):
        for length in (64, 128):
            key = dict(variant=variant, length=length)
            parts = [random.normal(ms, 0.5, n) for n in ((25,) if mode == "cpu" else (10, 15))]
            table.append(key | dict(latency_ms_median=np.median(np.concatenate(parts)), n_runs=25, status="ok") | base)
            raw += [dict(run_id=base["run_id"], **key, **({} if mode == "cpu" else dict(process=p)), i=i, latency_ms=t)
                    for p, part in enumerate(parts) for i, t in enumerate(part)]  # old results have no processes
    table.append(dict(variant="huge", length=64, status="oom") | base)
    write_csv(folder / "demo_speed.csv", pd.DataFrame(table))
    write_csv(folder / "demo_speed_raw.csv", pd.DataFrame(raw))
    write_claims(folder, suite, base)
    for figure in ("overview.png", "detail.jpg"):
        write_figure(root / "figures" / suite / name / figure, f"An invented {figure[:-4]} of {suite} × {device}")


def write_claims(folder, suite, base):
    """Verdicts of all four kinds on the first twelve statements of a suite."""
    known = statements()
    rows = []
    for i, name in enumerate([name for name in known if known[name]["suite"] == suite][:12]):
        row = {k: v for k, v in known[name].items() if k != "note"} | dict(id=name, verdict=VERDICT[i % 4], reason=f"because of row {i}", notebook=base["notebook"])
        row |= {k: base[k] for k in ("device", "weights", "mode", "git_commit", "utc_time", "run_id")}
        if row["verdict"] != VERDICT[3]:
            row |= dict(measured=1.2345 + i, low=1.1 + i, high=1.3 + i, n=25, n_of="rounds",
                        source="demo_speed.csv: variant=slow, length=64")
        rows.append(row)
    table = pd.DataFrame(rows)
    write_csv(folder / "claims.csv", table if base["mode"] != "cpu" else table.drop(columns="n_of"))


def spread(i, n=9, width=0.01):
    """n factors around 1 whose median is 1, in an order that depends on i."""
    return np.random.default_rng(i).permutation(1 + width * np.linspace(-1, 1, n))


def timed(folder, name, base, rows):
    """A table and its raw times from dicts with `ms`; nine rounds each, whose median is ms."""
    table, raw = [], []
    for i, row in enumerate(rows):
        ms = row.pop("ms")
        table.append(row | dict(latency_ms_median=ms, latency_ms_p20=0.9 * ms, latency_ms_p80=1.1 * ms, n_runs=9, status="ok") | base)
        key = {k: v for k, v in row.items() if k in ("experiment", "variant", "pass", "batch", "seq_len", "length", "context",
                                                     "phase", "kernel", "method", "rank", "taps", "budget", "shape", "side", "dtype",
                                                     "attention", "form")}
        raw += [dict(key, process=0, i=k, latency_ms=ms * f) for k, f in enumerate(spread(i))]
    write_csv(folder / f"{name}.csv", pd.DataFrame(table))
    write_csv(folder / f"{name}_raw.csv", pd.DataFrame(raw))


def write_project_tables(root):
    """Invented CSVs with the names and columns that the project's own notebooks write."""
    write_world(root)
    place = root / "results" / "/".join(T4)
    base = provenance("ssm", "Tesla T4", "full", "", "ssm_demo")
    two = [("forward", 1), ("forward+backward", 3)]
    stock = [dict(experiment="original", variant=f"{name} (stock conv)", batch=8, seq_len=64, ms=ms) | {"pass": "forward"}
             for name, ms in (("Baseline", 30), ("MRSS r=1", 63), ("MRSS r=2", 51), ("MRSS r=4", 45))]
    stock += [row | dict(variant=row["variant"].removesuffix(" (stock conv)"), ms=row["ms"] / 2) for row in stock]
    designs = [dict(experiment=experiment, variant=name, batch=batch, seq_len=64, ms=ms * batch * times) | {"pass": kind}
               for experiment in ("designs", "designs in half precision")
               for name, ms in (("Baseline", 24), ("LowRank D/16", 10), ("SplitMRSS r=8 α=0.875", 8), ("SplitMRSS r=8 α=0.75", 9),
                                ("SplitMRSS r=16 α=0.875", 7))
               for kind, times in two for batch in (1, 8)]
    timed(place, "mrss_proxy_results", base, stock + designs)
    errors = [dict(task=task, variant=name, train_seed=seed, error=error * (1 + seed), status="ok") | base
              for task, half in (("multi-timescale", 0.5), ("short-timescale", 1.1), ("digits", 3.0)) for seed in (0, 1, 2)
              for name, error in (("Baseline", 0.1), ("LowRank D/16", 0.12), ("SplitMRSS r=8 α=0.875", 0.1 * half * math.exp(0.05 * (seed - 1))),
                                  ("SplitMRSS r=8 α=0.75", 0.05 * half), ("SplitMRSS r=16 α=0.875", 0.2 * half))]
    write_csv(place / "mrss_quality.csv", pd.DataFrame(errors))
    errors = [dict(signal=task, task=task, variant=name, train_seed=seed, error=error * math.exp(0.05 * (seed - 1) * ("0" in name)), status="ok") | base
              for seed in (0, 1, 2) for task, variants in dict(
                  terrain={"Baseline": 0.2, "Dilated LowRank D/16": 0.15, "Dilated LowRank D/8": 0.125, "SplitMRSS α=0.875": 0.1},
                  text={"Baseline": 2.0, "Dilated LowRank D/16": 2.1, "Dilated LowRank D/8": 2.0, "SplitMRSS α=0.875": 2.2},
                  airport={"Baseline": 0.9, "Dilated twin α=0.5, aligned": 0.85, "SplitMRSS α=0.5, aligned": 0.8, "SplitMRSS α=0.5, swapped": 1.0}).items()
              for name, error in variants.items()]
    write_csv(place / "signals_quality.csv", pd.DataFrame(errors))
    variants = {"attention (sdpa)": 0.01, "S6 mambapy pscan": 0.2, "S6 (ours)": 0.1, "SSD (ours)": 0.02}
    timed(place, "scan_speed", base, [{"pass": kind, "length": t, "variant": name, "ms": times * unit * t * (t / 256)**(name[0] == "a")}
                                      for kind, times in two for name, unit in variants.items() for t in (128, 256, 512, 1024)])
    forms = {"ours": 2, "ours, compiled": 1.5, "minimal, Q=32": 5, "minimal, Q=64": 4, "minimal, compiled, Q=64": 3, "transformers, Q=64": 9}
    timed(place, "scan_chunks", base, [{"pass": kind, "states": n, "length": 1024, "variant": name, "ms": times * ms * n}
                                       for kind, times in two for name, ms in forms.items() for n in (16, 64)])
    timed(place, "scan_layers", base, [dict(length=t, variant=name, ms=ms, width=64, states=8, params_over_attention=1.8, peak_mem_mib=t / 8) for t in (256, 512, 1024)
                                       for name, ms in (("attention", 3 * (t / 128) ** 2), ("attention, bfloat16", (t / 128) ** 2),
                                                        ("Mamba-2 transformers", 80), ("Mamba-2 (ours)", 8), ("Mamba-2 (ours), bfloat16", 9),
                                                        ("Mamba-2 N=64 (ours)", 7))])
    timed(place, "scan_decode", base, [dict(context=t, variant=name, ms=ms) for t in (256, 1024)
                                       for name, ms in (("attention", t / 64), ("Mamba-2", 2), ("Mamba", 3))])
    answers = [dict(task="copying", variant=name, seed_of_model=seed, accuracy=1 - wrong * math.exp(0.1 * (seed - 1) * (name[0] == "h")),
                    status="ok") | base for seed in (0, 1, 2) for name, wrong in (("full rate", 0.1), ("half at 1/4", 0.2), ("three quarters at 1/8", 0.3))]
    write_csv(place / "scan_quality.csv", pd.DataFrame(answers))
    answers = [dict(task="copying", variant=name, seed_of_model=seed, accuracy=1 - wrong * math.exp(0.1 * (seed - 1) * (name[0] == "l")),
                    status="ok") | base for seed in (0, 1, 2)
               for name, wrong in (("learned router", 0.3), ("every 4th token", 0.1), ("all tokens", 0.05))]
    write_csv(place / "scan_router.csv", pd.DataFrame(answers))
    timed(place, "scan_multirate", base, [{"pass": "forward", "length": t, "variant": name, "ms": ms}
                                          for t in (64, 128) for name, ms in (("full rate", 9), ("half at 1/4", 6))])
    timed(place, "vision_speed", base, [dict(length=t, variant=name, ms=ms * t) for t in (196, 4096) for name, ms in (
        ("transformer", t / 2), ("transformer, bfloat16", t / 4), ("two directions", 512), ("two directions, bfloat16", 600))])
    answers = [dict(variant=name, seed_of_model=seed, accuracy=1 - wrong * math.exp(0.02 * (seed - 1) * (name[:2] == "tw")), train_s=10.0 + seed, status="ok") | base
               for seed in (0, 1, 2) for name, wrong in (("transformer", 0.4), ("transformer, as long", 0.1), ("one direction", 0.3), ("two directions", 0.2), ("four directions", 0.05))]
    write_csv(place / "vision_quality.csv", pd.DataFrame(answers))
    hybrids = [dict(layers=layers, variant=name, fit=fit, cosine_mean=cosine, cosine_mean_low=cosine - 0.01, cosine_mean_high=cosine + 0.01,
                    cosine_minus_mean=0.1, cosine_minus_mean_low=0.08, cosine_minus_mean_high=0.12, names_agreement=0.6, n_images=1000, status="ok") | base
               for layers, name, fit, cosine in (("every second", "scan, exact CLS row", "end to end", 0.9), ("all", "scan, exact CLS row", "end to end", 0.7),
                                                 ("every second", "scan, exact CLS row", "layer-wise", 0.8), ("every second", "linear attention, exact CLS row", "layer-wise", 0.75),
                                                 ("every second", "mean of values, exact CLS row", "end to end", 0.7), ("every second", "scan", "end to end", 0.85))]
    write_csv(place / "scan_clip_quality.csv", pd.DataFrame(hybrids))
    timed(place, "scan_clip_speed", base, [dict(length=t, variant=name, ms=ms) for t in (196, 784) for name, ms in (
        ("attention", 1.0), ("attention, bfloat16", 0.9), ("scan, n = 16, exact CLS row", 2.0))])
    forms = [("explicit", 0, 1, 200.0), ("explicit, bmm", 0, 1, 100.0), ("blocked", 64, 64, 640.0), ("blocked", 8, 8, 640.0),
             ("hankel", 4, 1, 1.0), ("hankel", 8, 1, 2.0), ("hankel", 16, 1, 4.0)]
    prompts = [dict(phase="prefill", kernel="per channel", method=m, rank=r, tokens=1, taps=8192, us_per_token=1e3 * ms, ms=ms)
               for m, r, ms in (("explicit", 0, 1.0), ("hankel", 8, 3.0))]
    timed(place, "kernel_distillation_latency", base, prompts +
          [dict(phase="decode", kernel="per channel", method=m, rank=r, tokens=t, taps=taps, us_per_token=1e3 * ms / t, ms=ms)
           for m, r, t, ms in forms for taps in (512, 8192)])
    errors = [dict(task=task, kind=kind, method=method, seed=s, rank=r, saving=20 / r, output_error=error * worse / r + s / 10000, task_error_ratio=1.1)
              for task, kind, error in (("text", "free", 0.4), ("digits", "free", 0.6), ("text", "s4d", 0.002))
              for method, worse in (("svd", 1), ("cut", 2)) for s in (1, 2, 3) for r in (1, 2, 4)]
    write_csv(place / "kernel_distillation_quality.csv", pd.DataFrame(errors))
    write_vision_tables(root)


def write_vision_tables(root):
    """The vision suite's part of write_project_tables."""
    place = root / "results" / "/".join(VLM)
    base = provenance("vlm", XEON, "full", "clip-tiny", "vlm_demo")

    def with_ends(**columns):
        return {k + end: v + step for k, v in columns.items() for end, step in (("", 0), ("_low", -0.005), ("_high", 0.005))}

    table = [dict(method=m, budget=b, macs_share=b - 0.01, n_images=1000, image_set="enlarged CIFAR-10 images", status="ok") | base | with_ends(
        top1_agreement=a, names_agreement=a - 0.2, agreement_minus_tome=a - 0.9, agreement_minus_ours=a - 0.94, accuracy_minus_tome=a / 10 - 0.09,
        top1_accuracy=a - 0.02, accuracy_minus_ours=a - 0.95, accuracy_minus_dense=(b - 0.7) / 10, zero_shot_accuracy_minus_dense=(b - 0.7) / 5)
        for b in (0.5, 0.7) for m, a in (("ours", 0.94), ("tome", 0.9), ("cls_merge", 0.85), ("evit", 0.8), ("smaller_input", 0.75),
                                         ("smaller_input_over", 0.79), ("vtp", 0.7))]
    photos = [dict(method=m, budget=0.5, macs_share=0.49, n_images=104, n_pictures=26, status="ok") | base | with_ends(
        cosine_mean=0.95, names_agreement=a, names_agreement_minus_tome=a - 0.7)
        for m, a in (("ours", 0.8), ("tome", 0.7), ("smaller_input", 0.6))]
    write_csv(place / "photograph_methods.csv", pd.DataFrame(photos))
    table = [row | dict(tokens_last=64.0) for row in table] + [dict(method="dense_cls", budget=0.5, tokens_last=197.0, status="ok") | base]
    table.append(dict(method="other_model", budget=0.5, status="not measured: no network") | base)
    write_csv(place / "token_reduction_methods.csv", pd.DataFrame(table))
    timed(place, "token_reduction_latency", base, [
        dict(method=m, budget=0.5, batch=b, ms=ms * b) | with_ends(latency_vs_dense=ms / 80) for b in (1, 8) for m, ms in (
            ("dense", 80.0), ("ours", 50.0), ("tome", 51.0), ("evit", 45.0), ("smaller_input", 40.0), ("vtp", 41.0))])
    original = dict(rule="drop", keep_ratio=0.7, share_of_dense_macs=0.68, n_images=1000, status="ok") | base
    write_csv(place / "clip_vtp_results.csv", pd.DataFrame([original | dict(image_set="enlarged CIFAR-10 images") | with_ends(accuracy_minus_dense=-0.05)]))
    equal = [dict(method=m, budget=0.5, share_of_dense_macs=0.49, n_images=1000, image_set="enlarged CIFAR-10 images", status="ok") | base | with_ends(cosine_mean=c)
             for m, c in (("ours", 0.95), ("tome", 0.9), ("vtp", 0.8))]
    write_csv(place / "clip_equal_compute.csv", pd.DataFrame(equal))
    timed(place, "token_scaling", base, [
        dict(shape=shape, side=side, batch=1, dtype="float32", attention="sdpa", method=m, ms=ms * side)
        for shape, methods in (("clip-tiny", (("dense", 0.4), ("ours", 0.2))), ("random-vit-b-16", (("dense", 4.0),)))
        for side in (224, 800) for m, ms in methods])
    timed(place, "qwen_places", base, [dict(side=side, variant=name, ms=ms * side) for side in (224, 448) for name, ms in (
        ("dense", 12), ("before 0.25", 4), ("inside 0.25", 6), ("after 0.25", 9), ("language 0.25", 10), ("image 0.25", 5))])
    timed(place, "hardware_forms", base, [
        dict(form=f"{precision} · {tokens}", precision=precision, tokens=tokens, compiled=False, cosine_mean=0.999, batch=batch, ms=ms * batch)
        for batch in (1, 8) for precision, tokens, ms in (("float32", "all tokens", 13), *((p, "all tokens, CLS-only last layer", ms) for p, ms in (
                                                              ("float32", 12), ("bfloat16", 6), ("int8", 15))),
                                                          ("float32", "merged", 7), ("bfloat16", "merged", 3))])
    grid = [dict(image_set="enlarged CIFAR-10 images", budget=budget, query_key=half, width_share=width, keep=keep, params_share=width, n_images=1000, status="ok") | base | with_ends(
                names_agreement_minus_ours=change) for budget in (0.35, 0.5) for half, width, keep, change in (
                    (1.0, 1.0, 0.6, 0.0), (0.5, 0.9, 0.7, -0.01), (0.5, budget, 1.0, -0.3))]
    write_csv(place / "low_rank_grid.csv", pd.DataFrame(grid))
    labels = [dict(domain=domain, method=method, shots=shots, n_images=1000, status="ok") | base | with_ends(gain_over_zero_shot=gain * (shots - 1))
              for domain, more in (("CIFAR-10", 1), ("digits", 5)) for shots in (1, 16) for method, gain in (("GDA", 0.004 * more), ("text + class mean", 0.003))]
    write_csv(place / "few_shot_methods.csv", pd.DataFrame(labels))
    recipes = [dict(loss=loss, variant=name, budget=budget, seconds=12.0, accuracy=0.25, n_trainings=3, status="ok") | base | with_ends(accuracy_minus_dense=change)
               for loss in ("softmax", "sigmoid") for budget in ("equal steps", "equal seconds") for name, change in (
                   ("random 50 %", 0.03), ("random 75 %", 0.05), ("smaller image", 0.04), ("half the batch", 0.02), ("cluster 50 %", 0.01))]
    write_csv(place / "masked_pretraining.csv", pd.DataFrame(recipes))
    connectors = [dict(method=name, tokens=16, moment=moment, train_s=14.4 * moment, n_trainings=3, status="ok") | base | with_ends(accuracy_minus_pool=change * moment)
                  for moment in (0.5, 1.0) for name, change in (("pool", 0.0), ("qformer", -0.2), ("place", -0.1))]
    write_csv(place / "query_curves.csv", pd.DataFrame(connectors))
    pruned = [dict(method=name, n_trainings=6, status="ok") | base | with_ends(accuracy_minus_smaller=change)
              for name, change in (("teacher", 0.05), ("two steps", 0.04), ("gates", 0.03), ("everything", 0.02), ("random", -0.04))]
    write_csv(place / "distil_and_prune.csv", pd.DataFrame(pruned))
    fit = dict(shape="random-vit-b-16", batch=1, dtype="float32", attention="sdpa", method="dense", tokens_min=197, tokens_max=2501,
               crossing_tokens=4000.0, crossing_tokens_low=3000.0, crossing_tokens_high=5000.0, status="ok")
    write_csv(place / "token_scaling_fits.csv", pd.DataFrame([fit | base]))


def write_world(root):
    """All devices, a smoke run beside them, quick runs of an old and of a new notebook, and a README with every block."""
    for (suite, name), (device, mode, weights) in DEVICES.items():
        write_place(root, suite, name, device, mode, weights)
    write_place(root, "ssm", "smoke-device", "Smoke", "smoke")
    write_place(root, "ssm", "cpu-intel-xeon-2t-quick", XEON, "quick")
    fresh = provenance("ssm", XEON, "quick", "", "ssm_fresh")
    write_facts(root / "results/ssm/cpu-intel-xeon-2t-quick", fresh)
    write_csv(root / "results/ssm/cpu-intel-xeon-2t-quick/fresh.csv", pd.DataFrame([dict(name="a", share=0.25, status="ok") | fresh]))
    blocks = "\n\n".join(f"<!-- report:{n} -->\n<!-- /report:{n} -->" for n in ("start", "answers", "findings", "claims", "runs"))
    (root / "README.md").write_text(f"# Title\n\nWords.\n\n{blocks}\n\nMore words.\n")
