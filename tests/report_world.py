"""A small world of invented results on three devices, to test the report with."""

import json

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from lab.cells.results import read_csv, write_csv
from lab.report import STATEMENTS

DEVICES = {
    ("ssm", "tesla-t4"): ("Tesla T4", "gpu", ""),
    ("ssm", "cpu-intel-xeon-2t"): ("Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu", ""),
    ("vlm", "cpu-intel-xeon-2t/clip-tiny"): ("Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu", "clip-tiny"),
}
VERDICT = ["supported", "not supported", "not testable here"]


def provenance(suite, device, mode, weights, notebook):
    """The columns that every row carries."""
    return dict(run_id=f"r-{notebook}", suite=suite, notebook=notebook, device=device, dtype="float32", torch="2.11.0",
                transformers="5.17.0", python="3.12.1", num_threads=2, weights=weights, git_commit="abc1234567",
                git_dirty=False, seed=0, utc_time="2026-01-02T03:04:05Z", mode=mode)


def write_figure(path, alt):
    """A PNG that looks like a plot, with its description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (1600, 900), "white")
    pen = ImageDraw.Draw(image)
    for i in range(12):
        pen.line([(100, 100 + 60 * i), (1500, 700 - 40 * i)], fill=(20 * i, 90, 200 - 10 * i), width=4)
    info = PngInfo()
    info.add_text("Description", alt)
    image.save(path, pnginfo=info)


def write_place(root, suite, name, mode=None):
    """Results, claims, provenance and figures of one device; mode overrides the device's."""
    device, kind, weights = DEVICES[suite, name]
    notebook, folder = f"{suite}_demo", root / "results" / suite / name
    base = provenance(suite, device, mode or kind, weights, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    facts = base | dict(seconds=90.0, finished_utc="2026-01-02T03:06:00Z", packages={}, facts={})
    (folder / f"{notebook}.env.json").write_text(json.dumps(facts))
    (folder / f"{notebook}.ipynb").write_text("{}")
    (folder / f"{notebook}.html").write_text("<p>executed</p>")
    random, table, raw = np.random.default_rng(1), [], []
    for variant, ms in (("slow", 30.0), ("fast", 10.0)):
        for length in (64, 128):
            times = random.normal(ms, 0.5, 25)
            key = dict(variant=variant, length=length)
            table.append(key | dict(latency_ms_median=np.median(times), n_runs=25, status="ok") | base)
            raw += [dict(run_id=base["run_id"], **key, i=i, latency_ms=t) for i, t in enumerate(times)]
    table.append(dict(variant="huge", length=64, status="oom") | base)
    write_csv(folder / "demo_speed.csv", pd.DataFrame(table))
    write_csv(folder / "demo_speed_raw.csv", pd.DataFrame(raw))
    statements = read_csv(STATEMENTS).assign(quantity="ratio", condition="invented", claimed="0.57|0.78", unit="ratio")
    mine = statements[statements["suite"] == suite].iloc[:12].to_dict("records")
    for i, row in enumerate(mine):
        verdict = VERDICT[i % 3]
        row |= dict(verdict=verdict, reason=f"because of row {i}", notebook=notebook,
                    **{k: base[k] for k in ("device", "weights", "mode", "git_commit", "utc_time", "run_id")})
        if verdict != VERDICT[2]:
            row |= dict(measured=1.2345 + i, low=1.1 + i, high=1.3 + i, n=25, source="demo_speed.csv: variant=slow, length=64")
    write_csv(folder / "claims.csv", pd.DataFrame(mine))
    for figure in ("overview.png", "detail.png"):
        write_figure(root / "figures" / suite / name / figure, f"An invented {figure[:-4]} of {suite} on {device}")


def timed(folder, name, base, rows):
    """A table and its raw times from dicts with `ms`; n rounds each, all the same."""
    table, raw = [], []
    for row in rows:
        ms = row.pop("ms")
        table.append(row | dict(latency_ms_median=ms, latency_ms_p20=0.9 * ms, latency_ms_p80=1.1 * ms, n_runs=9,
                                status="ok") | base)
        key = {k: v for k, v in row.items() if k in ("experiment", "variant", "pass", "batch", "seq_len", "length", "context",
                                                     "phase", "kernel", "method", "rank", "budget")}
        raw += [dict(key, i=i, latency_ms=ms) for i in range(9)]
    write_csv(folder / f"{name}.csv", pd.DataFrame(table))
    write_csv(folder / f"{name}_raw.csv", pd.DataFrame(raw))


def write_project_tables(root):
    """Invented CSVs with the names and columns that the project's own notebooks write."""
    write_world(root)
    place = root / "results/ssm/tesla-t4"
    base = provenance("ssm", "Tesla T4", "gpu", "", "ssm_demo")
    two = [("forward", 1), ("forward+backward", 3)]
    stock = [dict(experiment="original", variant=f"{name} (stock conv)", batch=8, seq_len=64, ms=ms, speedup=30 / ms,
                  speedup_low=29 / ms, speedup_high=31 / ms) | {"pass": "forward"}
             for name, ms in (("Baseline", 30), ("MRSS r=1", 63), ("MRSS r=2", 51), ("MRSS r=4", 45))]
    stock += [row | dict(variant=row["variant"].removesuffix(" (stock conv)"), ms=row["ms"] / 2) for row in stock]
    designs = [dict(experiment="designs", variant=name, batch=batch, seq_len=64, ms=ms * batch * times, speedup=24 / ms,
                    speedup_low=23 / ms, speedup_high=25 / ms) | {"pass": kind}
               for name, ms in (("Baseline", 24), ("SplitMRSS r=8 α=0.875", 8), ("SplitMRSS r=8 α=0.75", 9),
                                ("SplitMRSS r=16 α=0.875", 7), ("SparseMRSS r=32 ρ=0.125", 6))
               for kind, times in two for batch in (1, 8)]
    timed(place, "mrss_proxy_results", base, stock + designs)
    errors = [dict(task=task, variant=name, train_seed=seed, error=error * (1 + seed), status="ok") | base
              for task, half in (("multi-timescale", 0.5), ("short-timescale", 1.1), ("digits", 3.0)) for seed in (0, 1, 2)
              for name, error in (("Baseline", 0.2), ("SplitMRSS r=8 α=0.875", 0.2 * half), ("SplitMRSS r=8 α=0.75", 0.1 * half),
                                  ("SplitMRSS r=16 α=0.875", 0.4 * half), ("SparseMRSS r=32 ρ=0.125", 0.8 * half))]
    write_csv(place / "mrss_quality.csv", pd.DataFrame(errors))
    variants = {"attention (sdpa)": 0.01, "SSD transformers, Q=256": 0.1, "SSD (ours)": 0.02, "S6 (ours)": 0.05}
    timed(place, "scan_speed", base, [{"pass": "forward", "length": t, "variant": name, "ms": unit * t * (t / 256)**(name[0] == "a")}
                                      for name, unit in variants.items() for t in (128, 256, 512, 1024)])
    cross = dict(variant="SSD (ours)", crossover_length=512.0, low=500.0, high=530.0, from_length=128, to_length=1024)
    write_csv(place / "scan_crossover.csv", pd.DataFrame([cross | {"pass": "forward"}]))
    timed(place, "scan_layers", base, [dict(length=t, variant=name, ms=ms) for t in (256, 1024)
                                       for name, ms in (("attention", t / 64), ("Mamba-2 transformers", 80), ("Mamba-2 (ours)", 8))])
    timed(place, "scan_decode", base, [dict(context=t, variant=name, ms=ms) for t in (256, 1024)
                                       for name, ms in (("attention", t / 64), ("Mamba-2", 2), ("Mamba", 3))])
    forms = [("explicit", 0, 1, 200.0), ("explicit, bmm", 0, 1, 100.0), ("blocked", 64, 64, 640.0), ("hankel", 4, 1, 1.0),
             ("hankel", 16, 1, 2.0), ("hankel", 32, 1, 4.0)]
    timed(place, "kernel_distillation_latency", base,
          [dict(phase="decode", kernel="per channel", method=m, rank=r, tokens=t, taps=8192, us_per_token=1e3 * ms / t, ms=ms)
           for m, r, t, ms in forms])
    errors = [dict(task="mixing", kind="free", method="svd", seed=s, rank=r, saving=20 / r, output_error=0.05 / r + s / 1000)
              for s in (1, 2, 3) for r in (1, 2, 4)]
    write_csv(place / "kernel_distillation_quality.csv", pd.DataFrame(errors))
    orders = [dict(task="long", kind="projected", method="hankel", reached=True, modes=m) for m in (3, 9)]
    write_csv(place / "kernel_distillation_orders.csv", pd.DataFrame(orders))
    place = root / "results/vlm/cpu-intel-xeon-2t/clip-tiny"
    base = provenance("vlm", "Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu", "clip-tiny", "vlm_demo")
    rows = [dict(method=m, budget=b, macs_share=b - 0.01, top1_agreement=a, top1_agreement_low=a - 0.02,
                 top1_agreement_high=a + 0.02, agreement_minus_tome=a - 0.9, agreement_minus_tome_low=a - 0.92,
                 agreement_minus_tome_high=a - 0.88, n_images=1000, status="ok") | base
            for b in (0.5, 0.75) for m, a in (("ours", 0.94), ("tome", 0.9), ("cls_merge", 0.85), ("evit", 0.8), ("smaller_input", 0.75),
                                               ("vtp", 0.7))]
    equal = [dict(method=m, budget=b, tokens_mean=mean, tokens_last=last, share_of_dense_macs=b - 0.01, top1_agreement=a,
                  top1_agreement_low=a - 0.02, top1_agreement_high=a + 0.02, n_images=1000, status="ok") | base
             for m, b, mean, last, a in (("dense", 1.0, 197.0, 197, 1.0), ("ours", 0.5, 104.0, 32, 0.94),
                                         ("tome", 0.5, 110.0, 20, 0.9), ("vtp", 0.5, 99.0, 99, 0.7))]
    write_csv(place / "clip_equal_compute.csv", pd.DataFrame(equal))
    rows.append(dict(method="other_model", budget=0.5, status="not measured: no network") | base)
    write_csv(place / "token_reduction_methods.csv", pd.DataFrame(rows))
    timed(place, "token_reduction_latency", base, [dict(method=m, budget=0.5, batch=b, ms=ms * b, latency_vs_dense=ms / 80,
                                                        latency_vs_dense_low=ms / 81, latency_vs_dense_high=ms / 79) for b in (1, 8)
                                                   for m, ms in (("dense", 80.0), ("ours", 50.0), ("tome", 51.0), ("evit", 45.0),
                                                                  ("cls_merge", 60.0), ("vtp", 41.0))])


def write_world(root):
    """All devices, a smoke run beside them, and a README with every block."""
    for suite, name in DEVICES:
        write_place(root, suite, name)
    DEVICES["ssm", "smoke-device"] = ("Smoke", "smoke", "")
    write_place(root, "ssm", "smoke-device")
    del DEVICES["ssm", "smoke-device"]
    blocks = "\n\n".join(f"<!-- report:{n} -->\n<!-- /report:{n} -->" for n in ("figures", "findings", "claims", "runs"))
    (root / "README.md").write_text(f"# Title\n\nWords.\n\n{blocks}\n\nMore words.\n")
