"""One execution of a notebook: mode, device, sizes, folders, and the provenance of every row."""

import hashlib
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
import uuid
import warnings
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports a missing GPU as an error,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and memory that is older than its own start as a warning
warnings.filterwarnings("ignore", message="IProgress not found")  # no notebook here shows a progress bar
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from effarch.bench.figures import STYLE  # noqa: E402
from effarch.bench.settings import MODES, number  # noqa: E402
from effarch.bench.timing import keep_freed_memory  # noqa: E402
from effarch.checks import check, is_count  # noqa: E402

SECONDS = number(0, above=True, quick=4.0, full=8.0, cuda=3.0, smoke=1.0)  # of one comparison; smoke ignores it


def start(name, parameters, weights="", **settings):
    """Check a notebook's parameters, fix the random state, make the folders, print the provenance; returns the Run.

    name: 'suite/notebook'. parameters: globals() of the notebook, which hold MODE ('auto', 'quick', 'full', 'smoke'),
    SEED, OUT, RESUME and one name for each of `settings` (see effarch.bench.settings); SECONDS, most seconds of one
    comparison, always is one. weights: names the checkpoint's folder below the device's. ValueError, one line, for a
    parameter that is not allowed. `run.settings.NAME` holds what is used."""
    run = Run(name, parameters, weights, dict(dict(SECONDS=SECONDS), **settings))
    # laying out takes most of the time of a figure
    plt.rcParams.update(STYLE | {"figure.constrained_layout.use": not run.smoke})
    random.seed(run.seed)
    np.random.seed(run.seed % 2**32)
    torch.manual_seed(run.seed)
    keep_freed_memory()
    where = "Colab" if "google.colab" in sys.modules else platform.system()
    if run.retimed:
        print(f"only times are measured: what was trained or computed before is taken over from {run.published.parent.name}")
    if run.redrawn:
        print(f"drawn again, at commit {run.drawn['git_commit'] or 'unknown'}, from rows that were measured before; what follows tells "
              f"of that run. Cells without a table, such as Try your own, ran on {run.drawn['device']}")
    print(f"{run.mode} mode on {run.row['device']} ({run.row['num_threads']} threads, {where}), torch {torch.__version__}, "
          f"python {run.row['python']}, seed {run.seed}, commit {run.row['git_commit'] or 'unknown'}"
          f"{' + local changes' if run.row['git_dirty'] else ''}")
    if run.mode == "quick" and not torch.cuda.is_available():
        print("no GPU: small sizes. In Colab: Runtime → Change runtime type → T4, then Run all")
    print(" ".join(f"{name}={value}" for name, value in vars(run.settings).items()))
    if not run.smoke:
        print(" · ".join(f"{kind} → {os.path.relpath(folder)}" for kind, folder in
                         (("results", run.results), ("figures", run.figures))))
    return run


class Run:
    """What `start` returns: mode, smoke, device, settings, seed, results and figures (folders), row (provenance)."""

    def __init__(self, name, parameters, weights, settings):
        self.suite, self.notebook = name.split("/")
        missing = [p for p in ("MODE", "SEED", "OUT", "RESUME", *settings) if p not in parameters]
        check(not missing, "parameters", missing, "a value for each, in the cell tagged parameters")
        mode, self.seed, out, self.resume = (parameters[p] for p in ("MODE", "SEED", "OUT", "RESUME"))
        check(mode in ("auto", *MODES), "MODE", mode, f"auto, {', '.join(MODES)}")
        check(is_count(self.seed, 0), "SEED", self.seed, "a whole number of at least 0")
        check(isinstance(self.resume, bool), "RESUME", self.resume, "True or False")
        check(out is None or isinstance(out, str) and out.strip(), "OUT", out, "None or a folder")
        cuda = torch.cuda.is_available()
        self.mode = mode if mode != "auto" else ("full" if cuda else "quick")
        # `run_all.sh --redraw` and `--retime` name the provenance of a run whose rows are taken over: all, or what has no times
        how, _, path = os.environ.get("EFFARCH_FROM", "").partition(":")
        self.redrawn, self.retimed, self.published = how == "redraw", how == "retime", Path(path) if path else None
        self.before = json.loads(self.published.read_text(encoding="utf-8")) if path else {}
        self.mode, self.seed = self.before.get("mode", self.mode), self.before.get("seed", self.seed)
        self.smoke, self.started = self.mode == "smoke", time.monotonic()
        if self.smoke:
            torch.set_num_threads(1)  # two threads on a busy machine take five times as long
        self.device = torch.device("cuda" if cuda else "cpu")
        self.settings = SimpleNamespace(**{
            name: setting.resolve(name, parameters[name], self.mode, cuda) for name, setting in settings.items()})
        vars(self.settings).update({k: v for k, v in self.before.get("settings", {}).items()
                                    if k in settings and (k != "SECONDS" or self.redrawn)})
        # `run_all.sh` shortens comparisons where all notebooks together would take too long …
        self.seconds_share = float(os.environ.get("EFFARCH_SECONDS_SHARE", 1)) if parameters["SECONDS"] is None else 1.0
        self.settings.SECONDS *= self.seconds_share
        # … and with `--repeat 3` runs a notebook in three processes, whose times are pooled
        self.process, self.processes = map(int, os.environ.get("EFFARCH_PROCESS", "0/1").split("/"))
        if self.redrawn:  # as the last of its processes would
            self.process, self.processes = self.before["processes"] - 1, self.before["processes"]
        self.slug = device_slug(self.device)
        self.root = output_root(out, self.mode)
        place = Path(self.suite) / (self.slug + ("-quick" if self.mode == "quick" else "")) / weights
        if self.published:
            *_, here = self.published.parent.as_posix().rpartition("results/")
            here = Path(here)
            check(here.parts[2:] == place.parts[2:], "--redraw, --retime", here.as_posix(), f"results of the same checkpoint, {weights or 'none'}")
            check(self.redrawn or here == place, "--retime", here.as_posix(), f"results of this device, {place.as_posix()}")
            place = here
        self.results, self.figures = self.root / "results" / place, self.root / "figures" / place
        for folder in (self.results, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        commit, dirty = git_state()
        now = datetime.now(timezone.utc)
        capability = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else ""
        self.row = dict(
            run_id=f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}", suite=self.suite, notebook=self.notebook,
            device=torch.cuda.get_device_name() if cuda else cpu_name(),
            compute_capability=capability, dtype="float32", torch=torch.__version__,
            cuda=torch.version.cuda if cuda else "", transformers=package_version("transformers"),
            python=platform.python_version(), num_threads=torch.get_num_threads(), weights=weights,
            git_commit=commit, git_dirty=dirty, seed=self.seed, utc_time=f"{now:%Y-%m-%dT%H:%M:%SZ}",
            mode=self.mode)
        self.drawn = {k: self.row[k] for k in ("device", "git_commit", "git_dirty", "utc_time")}
        self.row |= {k: v for k, v in self.before.items() if k in self.row and self.redrawn}
        self.comparing, self.continued = 0.0, False  # seconds spent in comparisons; whether an interrupted run goes on
        self.inputs = {}  # hashes of what is read (weights, images): with others a table begins anew
        self.facts = {}  # anything a notebook wants in the long provenance: checkpoint revision, templates, …

    @property
    def timing(self):
        """How long `compare` may measure here: keyword arguments. Smoke counts rounds, so that no result hangs on the clock."""
        return dict(rounds=2, warmup=1) if self.smoke else dict(seconds=self.settings.SECONDS)

    def log(self, text):
        """Print one progress line with the elapsed time, at once."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {text}", flush=True)

    def steps(self, items, what):
        """Go through `items`, printing a line before each: what, which of how many, and the time left."""
        items, begin = list(items), time.monotonic()
        for i, item in enumerate(items):
            left = (time.monotonic() - begin) / i * (len(items) - i) if i else None
            self.log(f"{what} {i + 1}/{len(items)}: {label(item)}" + ("" if left is None else f" (about {left:.0f} s left)"))
            yield item

    def finish(self):
        """Write `<notebook>.env.json`; after the last process drop the journals (nothing is left to continue)."""
        path, seconds = self.results / f"{self.notebook}.env.json", round(time.monotonic() - self.started, 1)
        if self.redrawn:
            write_atomically(path, json.dumps(self.before | dict(redrawn=self.drawn), indent=1) + "\n")
            print(f"drawn again in {seconds / 60:.1f} min")
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))["process_seconds"] if self.process and path.exists() else []
        trained = dict(trained={k: self.before[k] for k in ("run_id", "git_commit", "git_dirty", "utc_time")}) if self.retimed else {}
        packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
        long = dict(
            self.row, **trained, finished_utc=f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
            seconds=round(sum(earlier) + seconds, 1), processes=self.process + 1, process_seconds=[*earlier, seconds],
            comparing_seconds=round(self.comparing, 1), seconds_share=self.seconds_share, continued=self.continued,
            platform=platform.platform(),
            cudnn=torch.backends.cudnn.version(), cudnn_benchmark=torch.backends.cudnn.benchmark,
            tf32_matmul=torch.backends.cuda.matmul.allow_tf32, settings=vars(self.settings), facts=self.facts, inputs=self.inputs,
            packages=dict(sorted(packages.items(), key=lambda item: item[0].lower())))
        write_atomically(path, json.dumps(long, indent=1, default=str) + "\n")
        if self.process + 1 == self.processes:
            for journal in self.results.glob(f".{self.notebook}.*.journal"):
                journal.unlink()
        end = "" if not self.smoke else ": every path was run, nothing here is a result"
        print(f"done in {long['seconds'] / 60:.1f} min ({self.mode} mode{end})")

    def check_inputs(self):
        """ValueError where rows of a run that read other weights or images would be taken over."""
        before = self.before.get("inputs", {})
        other = [name for name, found in self.inputs.items() if before.get(name, found) != found]
        check(not other, "--redraw, --retime", f"other {', '.join(other)}", "what that run read: give its parameters with --set")


def label(item):
    """An item of a loop in a few words."""
    if isinstance(item, dict):
        return ", ".join(f"{k} {v}" for k, v in item.items())
    return ", ".join(map(str, item)) if isinstance(item, (tuple, list)) else str(item)


def device_slug(device):
    """Short folder name of a device, such as 'tesla-t4' or 'cpu-intel-xeon-2t'."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu-{cpu_name()}-{torch.get_num_threads()}t"
    name = re.sub(r"\(r\)|\(tm\)|\bcpu @.*?(?=-\d+t$)|@.*?(?=-\d+t$)|processor", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def cpu_name():
    """The processor's model name, as the operating system gives it."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else (platform.processor() or platform.machine())


def package_version(name):
    """Installed version of a package, or '' without it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def git_state():
    """(commit, dirty) of the code that runs; ('', '') outside a repository, as in Colab."""
    def git(*words):
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        # results and figures are what a run writes: they do not make its code dirty
        changed = git("status", "--porcelain", "--", ":/", ":!/results", ":!/figures", ":!/README.md")
        return (commit, bool(changed)) if commit else ("", "")
    except (OSError, subprocess.TimeoutExpired):
        return "", ""


def output_root(out, mode):
    """Folder for results/ and figures/: `out`, else the repository's root, else the working directory.

    A smoke run never writes beside real results: it goes to `.scratch/` there."""
    if out is not None:
        return Path(out).expanduser().resolve()
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "run_all.sh").exists()), here)
    return root / ".scratch" if mode == "smoke" else root


def code_fingerprint():
    """Hash of the code run in this kernel so far, cells and modules: only the same code continues an interrupted run."""
    files = {m.__file__ for n, m in list(sys.modules.items()) if n.split(".")[0] == "effarch" and getattr(m, "__file__", None)}
    parts = [cells_fingerprint(), *(Path(f).read_text(encoding="utf-8") for f in sorted(files))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def cells_fingerprint():
    """Hash of the cells run in this kernel so far, the running one among them; '' outside a notebook."""
    try:
        cells = sorted(set(get_ipython().user_ns["In"]))
    except NameError:
        return ""
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


def write_atomically(path, data):
    """Write text or bytes beside `path`, then move it into place: a crash leaves the old file whole."""
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
