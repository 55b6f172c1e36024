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
    statements = read_csv(STATEMENTS).drop(columns="note")
    mine = statements[statements["suite"] == suite].iloc[:12].to_dict("records")
    for i, row in enumerate(mine):
        verdict = VERDICT[i % 3]
        row |= dict(verdict=verdict, reason=f"because of row {i}", notebook=notebook,
                    **{k: base[k] for k in ("device", "weights", "mode", "git_commit", "utc_time", "run_id")})
        if verdict != VERDICT[2]:
            row |= dict(measured=1.2345 + i, low=1.1 + i, high=1.3 + i, n=25, source=f"demo_speed.csv: variant=slow, i={i}")
    write_csv(folder / "claims.csv", pd.DataFrame(mine))
    for figure in ("overview.png", "detail.png"):
        write_figure(root / "figures" / suite / name / figure, f"An invented {figure[:-4]} of {suite} on {device}")


def write_world(root):
    """All devices, a smoke run beside them, and a README with every block."""
    for suite, name in DEVICES:
        write_place(root, suite, name)
    DEVICES["ssm", "smoke-device"] = ("Smoke", "smoke", "")
    write_place(root, "ssm", "smoke-device")
    del DEVICES["ssm", "smoke-device"]
    blocks = "\n\n".join(f"<!-- report:{n} -->\n<!-- /report:{n} -->" for n in ("figures", "findings", "claims", "runs"))
    (root / "README.md").write_text(f"# Title\n\nWords.\n\n{blocks}\n\nMore words.\n")
