"""What we load and what we depend on: safetensors only, no remote code, pinned and permissively licensed packages."""

import ast
import importlib.util
import re
import subprocess
import sys
from importlib import metadata

import pytest
from conftest import ROOT

from lab import notebooks, sync_cells

LISTS = [ROOT / "requirements.txt", ROOT / "tests/requirements.txt"]
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|HPND|MPL|Unlicense|Python Software Foundation)\b", re.I)
RESTRICTIVE = re.compile(r"\b(A?GPL|LGPL|GNU|NonCommercial|CC-BY-NC|SSPL|Proprietary)\b", re.I)


def sources():
    """(name, Python code) of everything in the project that runs."""
    for path in [*sorted((ROOT / "lab").rglob("*.py")), *sorted((ROOT / "tests").glob("*.py"))]:
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sync_cells.sources():
        for i, cell in enumerate(notebooks.cells(path)):
            yield f"{path.relative_to(ROOT).as_posix()}, code cell {i}", cell.source


def calls(code):
    """(dotted name, keywords) of every call."""
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}


def test_no_remote_code_and_no_pickles():
    words = "trust_" + "remote_code"
    assert [name for name, code in sources() if words in code] == []
    for name, code in sources():
        for function, keywords in calls(code):
            assert function not in ("pickle.load", "pickle.loads", "joblib.load"), name
            assert function != "torch.load" or keywords.get("weights_only") == "True", name


def test_models_are_loaded_from_safetensors_only():
    for name, code in sources():
        for function, keywords in calls(code):
            owner, _, method = function.rpartition(".")
            if method == "from_pretrained" and not re.search(r"(Processor|Tokenizer\w*|Config|Extractor)$", owner):
                assert keywords.get("use_safetensors") == "True", f"{name}: {function}"


def requirements():
    """(package, version, list) of every line of the lists of requirements."""
    for path in LISTS:
        for line in path.read_text().splitlines():
            line = line.split("#")[0].strip()
            if line:
                package, pinned, version = line.partition("==")
                yield package, version if pinned else None, path.name


def test_every_requirement_is_pinned_and_listed_once():
    every = list(requirements())
    assert all(version for _, version, _ in every)
    assert len({package for package, *_ in every}) == len(every)


@pytest.mark.parametrize("package", [package for package, *_ in requirements()])
def test_licence_of_direct_dependency_is_permissive(package):
    try:
        facts = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed here")
    said = [facts.get("License-Expression") or "", (facts.get("License") or "")[:200]]
    said += [c for c in facts.get_all("Classifier") or [] if c.startswith("License")]
    said = " ".join(said)
    assert PERMISSIVE.search(said), f"{package}: {said!r}"
    assert not RESTRICTIVE.search(said), f"{package}: {said!r}"


@pytest.mark.parametrize("path", LISTS, ids=[p.parent.name for p in LISTS])
def test_no_known_vulnerability(path):
    if not importlib.util.find_spec("pip_audit"):
        pytest.skip("pip-audit is not installed")
    words = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--no-deps", "--disable-pip", "-r", str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        pytest.skip("the list of vulnerabilities does not answer")
    found = re.search(r"Found \d+ known vulnerabilit", done.stdout + done.stderr)
    if done.returncode and not found:  # no network, or an index that knows no advisories
        pytest.skip(f"no answer on vulnerabilities: {(done.stderr.strip().splitlines() or ['silent'])[-1][:150]}")
    assert not found, done.stdout + done.stderr
