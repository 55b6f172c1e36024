"""Execute the notebooks and put their results in place; `./run_all.sh` is the front door.

A notebook runs in a staging folder of its own. Only a whole run is moved to results/ and figures/, so a
failing or interrupted one touches no earlier result; started again, it continues where it stopped.
With `--repeat N` it runs in N processes there, whose times `effarch.bench` pools.
"""

import argparse
import ast
import base64
import fcntl
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from lab.plan import QUICK_LIMIT, START_MINUTES, Cost, Plan, cost, this_device, told

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("ssm", "vlm")
MODES = ("auto", "quick", "full", "smoke")
CELL_TIMEOUT_S = {"smoke": 600}  # other modes: an hour a cell
REDRAW_MINUTES = 2.0  # of one notebook, about


class UsageError(Exception):
    """What the user asked for cannot be: one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message):
        raise UsageError(message)


def parse(argv):
    """Command line -> options."""
    parser = Parser(prog="./run_all.sh", description="Run every notebook, or `test`: lint and all tests.",
                    allow_abbrev=False)  # run_all.sh knows whole names only
    parser.add_argument("action", nargs="?", choices=["run", "test"], default="run")
    parser.add_argument("--mode", choices=MODES, default="auto",
                        help="how thorough: quick (the default on a CPU, all notebooks within 40 minutes), full (the "
                        "default on a GPU; what gets published), smoke (seconds; every path, no results)")
    parser.add_argument("--only", action="append", metavar="ssm|vlm|NAME", help="a suite or notebook; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="PARAM=VALUE", dest="settings",
                        help="a notebook parameter; repeatable")
    parser.add_argument("--out", metavar="DIR", help="where results/ and figures/ go (default: here; "
                        "smoke: .scratch)")
    parser.add_argument("--repeat", type=int, default=1, metavar="N",
                        help="processes of each notebook, whose times are pooled (published results: at least 3)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: make the figures, tables and executed copies "
                        "of published results again with today's code, from their rows (minutes)")
    parser.add_argument("--retime", action="store_true", help="measure only times: what was trained or computed is taken over "
                        "from published results of this device; with --repeat as for them")
    parser.add_argument("--python", metavar="PY", help="run in this interpreter's environment, without .venv")
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeat < 1:
        raise UsageError(f"--repeat {options.repeat}: a whole number of at least 1")
    if options.redraw and (options.repeat > 1 or options.retime):
        raise UsageError("--redraw: without --repeat and --retime, as nothing is measured")
    if (options.redraw or options.retime) and options.mode != "auto":
        raise UsageError(f"--mode {options.mode}: not with --redraw or --retime, which go on from published results")
    return options


def find_notebooks(only=None):
    """The notebooks chosen by suite or name, all of them by default."""
    every = [path for suite in SUITES for path in sorted((ROOT / suite).glob("*.ipynb"))]
    if not only:
        return every
    for word in only:
        if word not in SUITES and word not in [p.stem for p in every]:
            raise UsageError(f"--only {word}: no such notebook; there are: "
                             f"{', '.join([*SUITES, *(p.stem for p in every)])}")
    return [path for path in every if {path.stem, path.parent.name} & set(only)]


def read(path):
    """A notebook's JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def parameters(path):
    """{name: (default, annotation)} of the cell tagged `parameters`, read without running anything."""
    for cell in read(path)["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            body = ast.parse("".join(cell["source"])).body
            plain = {n.targets[0].id: (ast.literal_eval(n.value), None) for n in body if isinstance(n, ast.Assign)}
            typed = {n.target.id: (ast.literal_eval(n.value), ast.unparse(n.annotation))
                     for n in body if isinstance(n, ast.AnnAssign)}
            return plain | typed
    return {}


def parse_value(name, text, default, annotation):
    """The text of `--set name=text` as the type that the parameter has."""
    kinds = {part.strip().split("[")[0] for part in annotation.split("|")} if annotation else set()
    if default is not None:
        kinds.add(type(default).__name__)
    if "str" in kinds and kinds <= {"str", "None"}:
        return None if text == "None" and (default is None or "None" in kinds) else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kind = type(value).__name__
    fits = {kind, "None" if value is None else kind, "float" if kind == "int" else kind,
            "list" if kind == "tuple" else kind}
    if kinds and not kinds & fits:
        raise UsageError(f"--set {name}={text}: not a value of type {' or '.join(sorted(kinds))}")
    return list(value) if isinstance(value, tuple) else value


def from_here(name, value):
    """A folder given as MODEL_ID or DATASET, relative to the caller's folder, as the notebooks will find it from ROOT."""
    images = name.endswith("DATASET") or name == "TRAIN"
    kind, colon, path = value.partition(":") if isinstance(value, str) and images and ":" in value else ("", "", value)
    if not (colon if images else name.endswith("MODEL_ID")) or not path or not isinstance(path, str) or path[0] in "/~":
        return value
    given = kind == "imagefolder" or path[0] == "."  # else it may be a hub's id, or the name of a data set
    return kind + colon + os.path.relpath(path, ROOT) if given or os.path.isdir(path) else value


def settings_for(notebooks, settings):
    """[{name: value} of each notebook]; every setting must fit a parameter of at least one of them."""
    known = [parameters(path) for path in notebooks]
    chosen = [{} for _ in notebooks]
    for i, setting in enumerate(settings):
        name, equals, text = setting.partition("=")
        if name in [other.partition("=")[0] for other in settings[:i]]:
            raise UsageError(f"--set {setting}: {name} is set twice")
        if not equals:
            raise UsageError(f"--set {setting}: write PARAM=VALUE")
        if name in ("MODE", "OUT"):
            raise UsageError(f"--set {setting}: use --{name.lower()}")
        if not any(name in names for names in known):
            names = sorted({n for names in known for n in names} - {"MODE", "OUT"})
            raise UsageError(f"--set {setting}: no such parameter; there are: {', '.join(names)}")
        for names, values in zip(known, chosen, strict=True):
            if name in names:
                values[name] = from_here(name, parse_value(name, text, *names[name]))
    return chosen


def check_environment(options):
    """Everything that must be installed is."""
    wanted = ["torch", "papermill", "ipykernel", "matplotlib", "pandas", "scipy", "PIL"]
    if options.action == "test":
        wanted += ["pytest", "ruff"]
    probe = f"import importlib.util as u; print(*[m for m in {wanted} if not u.find_spec(m)])"
    missing = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.split()
    if missing:
        raise UsageError(f"{sys.executable} lacks {', '.join(missing)}; install requirements.txt there, "
                         "or leave --python out")


def lock(folder):
    """Hold the output folder for this process; a second run on it is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "lock", "w")
    except OSError as error:
        raise UsageError(f"--out: cannot write to {folder.parent}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another run is writing to {folder.parent}: wait for it, or use another --out") from None
    return file


def is_cell_output(record):
    """Whether a line of papermill's log is what a notebook printed, and not a report on papermill itself."""
    own = ("Executing ", "Ending Cell", "Input Notebook", "Output Notebook", "Working directory", "Passed unknown",
           "[IPKernelApp]", "<Figure size")
    return bool(record.getMessage().strip()) and not record.getMessage().startswith(own)


def execute(path, values, mode, staging):
    """Run one notebook in its staging folder. Returns (status, message)."""
    import papermill
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    names = parameters(path)
    place = os.path.relpath(staging, ROOT)  # the executed copy names no folder of this machine
    given = {k: v for k, v in dict(MODE=mode, OUT=place).items() if k in names} | values
    source, copy = (str(p).replace("{", "{{").replace("}", "}}") for p in (path, staging / path.name))  # it formats them
    try:
        papermill.execute_notebook(
            source, copy, parameters=given, cwd=str(ROOT), kernel_name="python3", progress_bar=False,
            log_output=True, execution_timeout=CELL_TIMEOUT_S.get(mode, 3600),
            extra_arguments=["--log-level=CRITICAL"])  # of the kernel itself: else it tells how its sockets ended, at Ctrl-C
    except papermill.PapermillExecutionError as error:
        return "failed", f"{error.ename}: {error.evalue}"
    except (DeadKernelError, CellTimeoutError, NoSuchKernel, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [""]
        return "failed", f"{type(error).__name__}: {lines[0]}"
    return "ok", ""


def tidy(copy):
    """Make the executed copy a thing to read: without what changes from run to run, folders of this machine, the support
    code, and the results at a glance, which are those of the run before this one."""
    import nbformat

    notebook = nbformat.read(copy, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "glance" not in cell.metadata.get("tags", [])]
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "widgets", "execution"):
            part.metadata.pop(key, None)
    for cell in notebook.cells:
        if "support" in cell.metadata.get("tags", []):
            title = cell.source.split("\n", 1)[0]
            cell.source = f"{title}\n# left out of this executed copy: the package effarch/ of the repository"
        for output in cell.get("outputs", []):
            shrink(output.get("data", {}))
            if "text" in output:  # a library's warning names its own file
                output.text = output.text.replace(f"{sys.prefix}{os.sep}", "").replace(f"{ROOT}{os.sep}", "")
    nbformat.write(notebook, copy)


def shrink(data):
    """Give an output's PNG a palette of 256 colours, or make a large one (photographs) a JPEG, where that is smaller."""
    from PIL import Image

    if "image/png" not in data:
        return
    raw = base64.b64decode(data["image/png"])
    image = Image.open(io.BytesIO(raw)).convert("RGB")
    packed, photo = io.BytesIO(), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(packed, format="PNG", optimize=True)
    image.save(photo, format="JPEG", quality=82, optimize=True)
    packed, photo = packed.getvalue(), photo.getvalue()
    if len(packed) > 150_000 and len(photo) < len(packed) / 2:
        del data["image/png"]
        data["image/jpeg"] = base64.b64encode(photo).decode()
    elif len(packed) < len(raw):
        data["image/png"] = base64.b64encode(packed).decode()


def files_of(staging, place=""):
    """What was written in staging to file: results and figures, of one place or of all; journals are hidden."""
    return [file for kind in ("results", "figures") for file in sorted((staging / kind / place).rglob("*"))
            if file.is_file() and not file.name.startswith(".")]


def move_into_place(staging, out, place):
    """Move finished results and figures of one place, such as 'ssm/tesla-t4', from staging to `out`: all or none.

    Other places in staging are of runs that did not finish."""
    kept = staging / "earlier"
    shutil.rmtree(kept, ignore_errors=True)
    moves = [(file, out / file.relative_to(staging), kept / file.relative_to(staging)) for file in files_of(staging, place)]
    for _, target, copy in moves:  # what needs room comes first: a full disk shows here
        for folder in (target.parent, copy.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if target.exists():
            shutil.copyfile(target, copy)
    done = []
    try:
        for file, target, copy in moves:
            os.replace(file, target)
            done.append((file, target, copy))
    except OSError:
        for file, target, copy in reversed(done):
            os.replace(target, file)
            if copy.exists():
                os.replace(copy, target)
        raise


def published(path, out):
    """The provenance file of a notebook's newest results below `out`, of a first look only where there are no others."""
    suite = out / "results" / path.parent.name
    found = list(suite.rglob(f"{path.stem}.env.json"))
    if not found:
        raise UsageError(f"--redraw, --retime: no results of {path.stem} in {out / 'results'}")
    return max(found, key=lambda p: (not p.relative_to(suite).parts[0].endswith("-quick"), read(p)["utc_time"]))


def run_one(path, values, mode, out, repeat=1):
    """Execute a notebook, in `repeat` processes one after the other, and file what it made.

    Returns (status, message, where)."""
    suite = path.parent.name
    staging = out / ".staging" / path.stem
    staging.mkdir(parents=True, exist_ok=True)
    for old in files_of(staging):
        target = staging / "before" / old.relative_to(staging)  # of an attempt whose code may have been another: not to be filed with this one's
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(old, target)
    for old in (out / "results" / suite).rglob("claims.csv"):  # the notebook keeps other notebooks' rows
        seed = staging / old.relative_to(out)
        seed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, seed)
    for i in range(repeat):
        os.environ["EFFARCH_PROCESS"] = f"{i}/{repeat}"
        if repeat > 1:
            print(f"-- process {i + 1}/{repeat} --", flush=True)
        status, message = execute(path, values, mode, staging)
        if status != "ok":
            break
    copy, failed = staging / path.name, out / "results" / suite / f"{path.stem}.failed.ipynb"
    if status != "ok":
        try:
            failed.parent.mkdir(parents=True, exist_ok=True)
            os.replace(copy, failed)
        except OSError:  # no room, or no copy yet: the message that matters is the notebook's own
            return status, message, staging
        return status, message, failed
    tidy(copy)
    where = next((p.parent for p in (staging / "results").rglob(f"{path.stem}.env.json")), staging / "results" / suite)
    where.mkdir(parents=True, exist_ok=True)
    os.replace(copy, where / path.name)
    move_into_place(staging, out, where.relative_to(staging / "results"))
    shutil.rmtree(staging)
    failed.unlink(missing_ok=True)
    return status, "", out / where.relative_to(staging)


def make_plan(options, notebooks, out):
    """(mode, Plan) of a run, printed."""
    if options.redraw:
        print(f"drawn again, nothing is measured: {', '.join(path.stem for path in notebooks)}")
        return "auto", Plan([Cost(0, REDRAW_MINUTES)] * len(notebooks), None)
    mode = "full" if options.retime or options.mode == "auto" and this_device()[2] else options.mode.replace("auto", "quick")
    costs = [cost(path, mode, {out, ROOT}) for path in notebooks]
    if options.retime:
        costs = [Cost(c.timing, 2 * START_MINUTES) for c in costs]
    costs = [Cost(*(options.repeat * minutes for minutes in c)) for c in costs]
    free = any(setting.startswith("SECONDS=") for setting in options.settings)
    plan = Plan(costs, QUICK_LIMIT * options.repeat if mode == "quick" and not free else None)
    pooled = f", {options.repeat} processes each" if options.repeat > 1 else ""
    print(f"{mode} mode{pooled}: {len(notebooks)} notebooks, about {told(sum(c.at(plan.share) for c in costs))}")
    for path, c in zip(notebooks, costs, strict=True):
        print(f"  {path.relative_to(ROOT).as_posix():<36} {told(c.at(plan.share)):>8}")
    if plan.share < 1:
        print(f"comparisons take {plan.share:.0%} of their usual time, so that all notebooks end within "
              f"{told(plan.limit)}: intervals are wider")
    return mode, plan


def run(options):
    """Run the chosen notebooks; returns the exit status."""
    notebooks = find_notebooks(options.only)
    chosen = settings_for(notebooks, options.settings)
    out = Path(options.out).expanduser().resolve() if options.out else ROOT
    if options.mode == "smoke" and not options.out:
        out = ROOT / ".scratch"
    results = [published(path, out) if options.redraw or options.retime else None for path in notebooks]
    held = lock(out / ".staging")
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    papermill_log = logging.getLogger("papermill")
    papermill_log.setLevel(logging.INFO)
    papermill_log.addFilter(is_cell_output)
    mode, plan = make_plan(options, notebooks, out)
    rows = []
    for i, (path, values) in enumerate(zip(notebooks, chosen, strict=True), 1):
        share, minutes, left = plan.next()
        os.environ["EFFARCH_SECONDS_SHARE"] = f"{share:.2f}"
        os.environ["EFFARCH_FROM"] = f"{'retime' if options.retime else 'redraw'}:{results[i - 1]}" if results[i - 1] else ""
        print(f"\n== {i}/{len(notebooks)} {path.relative_to(ROOT).as_posix()}: about {told(minutes)}, "
              f"{told(left)} left ==", flush=True)
        begin = time.monotonic()
        try:
            mode_now = read(results[i - 1])["mode"] if results[i - 1] else mode
            status, message, where = run_one(path, values, mode_now, out, options.repeat)
        except Exception as error:  # a full disk, say: what is finished lies in the staging folder, the others still run
            status, message, where = "failed", f"{type(error).__name__}: {error}", out / ".staging" / path.stem
        taken = f"{(time.monotonic() - begin) / 60:.1f}"
        rows.append((path.stem, status, taken, os.path.relpath(where)))
        if message:
            print(f"{path.stem} failed: {message}", file=sys.stderr, flush=True)
    held.close()
    print()
    for row in [("notebook", "status", "minutes", "where"), *rows]:
        print("{:<24} {:<8} {:>7}  {}".format(*row))
    failed = any(row[1] != "ok" for row in rows)
    if not failed and out == ROOT and mode != "smoke":
        failed = not write_report()
    return int(failed)


def write_report():
    """Bring README tables, page and poster up to date; True if that went well. Results stay as they are."""
    try:
        from lab import report

        written = report.write(ROOT)
    except Exception as error:
        print(f"the report was not written: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return False
    print("\nreport:", ", ".join(str(path.relative_to(ROOT)) for path in written))
    return True


def test():
    """Lint, then all tests; returns the exit status."""
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", "--quiet", "."], cwd=ROOT).returncode
    print(f"ruff: {'ok' if lint == 0 else 'failed'}", flush=True)
    return subprocess.run([sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal"], cwd=ROOT).returncode or lint


def stop(*received):
    """At Ctrl-C: end quietly, without what papermill and asyncio log of cells that were stopped midway; at a second one at once."""
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.default_int_handler(*received)


def main(argv=None):
    """Command line; returns the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where Ctrl-C is ignored, as in the background
        signal.signal(signal.SIGINT, stop)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows ASCII only still shows the rest
    try:
        options = parse(argv)
        if options.check_only:
            settings_for(find_notebooks(options.only), options.settings)
            return 0
        check_environment(options)
        os.environ.pop("MPLBACKEND", None)  # with agg, executed notebooks would hold no figures
        os.environ |= dict(JUPYTER_PREFER_ENV_PATH="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1",
                           TOKENIZERS_PARALLELISM="false")
        return test() if options.action == "test" else run(options)
    except UsageError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was overwritten; the same command continues the run", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
