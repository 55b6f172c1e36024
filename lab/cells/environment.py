"""Where we run, with what, and where results go."""

import ctypes
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

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports a missing GPU as an error,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and memory that is older than its own start as a warning
warnings.filterwarnings("ignore", message="IProgress not found")  # no notebook here shows a progress bar
import torch  # noqa: E402


def check(ok, name, value, allowed):
    """Raise ValueError naming the parameter, its value and what is allowed, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {allowed}")


def is_count(value, least=1):
    """True for a whole number (not a bool) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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


def keep_freed_memory():
    """Let a Linux process keep the memory it frees, as PyTorch's allocator does on a GPU.

    Else every large tensor is new memory that the system clears page by page, and a benchmark of large layers
    measures that instead of the layers."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: leave it as it is
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own for large tensors
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back


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
    """Hash of all code run in this kernel so far: an interrupted run is only continued by the same code."""
    try:
        cells = sorted(set(get_ipython().user_ns["In"]))
    except NameError:  # not in a notebook
        cells = []
    return hashlib.sha256("\0".join(cells).encode()).hexdigest()[:16]


class Run:
    """One execution of a notebook: `mode`, `device`, folders, and the provenance of every row (`row`)."""

    def __init__(self, suite, notebook, mode, seed, out, resume, weights):
        check(mode in ("auto", "gpu", "cpu", "smoke"), "MODE", mode, "auto, gpu, cpu, smoke")
        check(is_count(seed, 0), "SEED", seed, "a whole number of at least 0")
        check(isinstance(resume, bool), "RESUME", resume, "True or False")
        check(mode != "gpu" or torch.cuda.is_available(), "MODE", mode, "cpu or smoke: no CUDA device found")
        cuda = torch.cuda.is_available() and mode != "cpu"
        self.mode = mode if mode != "auto" else ("gpu" if cuda else "cpu")
        self.suite, self.notebook, self.seed, self.resume = suite, notebook, seed, resume
        self.device = torch.device("cuda" if cuda else "cpu")
        self.smoke, self.started = self.mode == "smoke", time.monotonic()
        self.slug = device_slug(self.device)
        self.root, place = output_root(out, self.mode), Path(suite) / self.slug / weights
        self.results, self.figures = self.root / "results" / place, self.root / "figures" / place
        for folder in (self.results, self.figures):
            folder.mkdir(parents=True, exist_ok=True)
        commit, dirty = git_state()
        now = datetime.now(timezone.utc)
        capability = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else ""
        self.row = dict(
            run_id=f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}", suite=suite, notebook=notebook,
            device=torch.cuda.get_device_name() if cuda else cpu_name(),
            compute_capability=capability, dtype="float32", torch=torch.__version__,
            cuda=torch.version.cuda if cuda else "", transformers=package_version("transformers"),
            python=platform.python_version(), num_threads=torch.get_num_threads(), weights=weights,
            git_commit=commit, git_dirty=dirty, seed=seed, utc_time=f"{now:%Y-%m-%dT%H:%M:%SZ}",
            mode=self.mode,
        )
        self.facts = {}  # anything a notebook wants in the long provenance: checkpoint revision, templates, …

    def preset(self, **values):
        """The value for this run's mode: `run.preset(gpu=…, cpu=…, smoke=…)`."""
        return values[self.mode]

    def log(self, text):
        """Print one progress line with the elapsed time, at once."""
        seconds = time.monotonic() - self.started
        print(f"[{seconds // 60:3.0f}:{seconds % 60:02.0f}] {text}", flush=True)

    def finish(self):
        """Write `<notebook>.env.json`, drop the journals (nothing is left to continue), say where all is."""
        packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
        long = dict(
            self.row, finished_utc=f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
            seconds=round(time.monotonic() - self.started, 1), platform=platform.platform(),
            cudnn=torch.backends.cudnn.version(), cudnn_benchmark=torch.backends.cudnn.benchmark,
            tf32_matmul=torch.backends.cuda.matmul.allow_tf32, facts=self.facts,
            packages=dict(sorted(packages.items(), key=lambda item: item[0].lower())),
        )
        write_atomically(self.results / f"{self.notebook}.env.json", json.dumps(long, indent=1) + "\n")
        for journal in self.results.glob(f".{self.notebook}.*.journal"):
            journal.unlink()
        print(f"done in {long['seconds'] / 60:.1f} min ({self.mode} mode)")
        for folder in (self.results, self.figures):
            print(f"  {folder.relative_to(self.root)}: {len(list(folder.glob('[!.]*')))} files")


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


def start_run(suite, notebook, mode, seed, out=None, resume=True, weights=""):
    """Validate, seed every generator, print the provenance; returns the Run."""
    run = Run(suite, notebook, mode, seed, out, resume, weights)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    keep_freed_memory()
    where = "Colab" if "google.colab" in sys.modules else platform.system()
    print(f"{run.mode} mode on {run.row['device']} ({run.row['num_threads']} threads, {where})")
    print(f"torch {torch.__version__} · python {run.row['python']} · seed {seed} · "
          f"commit {run.row['git_commit'] or 'unknown'}{' + local changes' if run.row['git_dirty'] else ''}")
    print(" · ".join(f"{kind} → {folder.relative_to(run.root)}" for kind, folder in
                     (("results", run.results), ("figures", run.figures))))
    return run
