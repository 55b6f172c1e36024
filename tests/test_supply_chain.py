"""What we load and what we depend on: safetensors only, no remote code, pinned and permissively licensed packages."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata

import nbformat
import pytest
from conftest import ROOT

from lab import build

LISTS = [ROOT / "requirements.txt", ROOT / "tests/requirements.txt"]
PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|ISC|PSF|HPND|MPL|Unlicense|CC0|Python Software Foundation)\b", re.I)
RESTRICTIVE = re.compile(r"\b(A?GPL|LGPL|GNU|NonCommercial|CC-BY-NC|SSPL|Proprietary)\b", re.I)


def sources():
    """(name, Python code) of everything in the project that runs."""
    for folder in ("effarch", "lab", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in build.sources():  # the support cells are those modules
        yield path.relative_to(ROOT).as_posix(), build.code_of(nbformat.read(path, as_version=4))


def calls(code):
    """(dotted name, keywords) of every call."""
    for node in ast.walk(ast.parse(code)):
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


def licence_text(facts):
    """The licence that a package's own licence file holds, where its metadata name none: BSD and MIT are known by their words."""
    files = [f for f in metadata.files(facts["Name"]) or [] if f.name in (facts.get_all("License-File") or [])]
    text = " ".join(" ".join(f.read_text() for f in files).split())
    bsd = "Redistribution and use in source and binary forms, with or without modification, are permitted"
    return "BSD" if bsd in text else "MIT" if "Permission is hereby granted, free of charge" in text else ""


@pytest.mark.parametrize("package", [package for package, *_ in requirements()])
def test_licence_of_direct_dependency_is_permissive(package):
    try:
        facts = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed here")
    said = [facts.get("License-Expression") or "", (facts.get("License") or "")[:200]]
    said += [c for c in facts.get_all("Classifier") or [] if c.startswith("License")]
    said = " ".join(said).strip() or licence_text(facts)
    assert PERMISSIVE.search(said), f"{package}: {said!r}"
    assert not RESTRICTIVE.search(said), f"{package}: {said!r}"


# what pip-audit's last words hold where the service of advisories cannot be reached or answers an error
NO_SERVICE = re.compile(r"(Connection|Proxy|SSL|HTTP|Service|JSONDecode)Error|Timeout|timed out|network may be blocking")


def audit(done):
    """(advisories, packages that were not looked up) in what pip-audit printed; None if its service gave no answer."""
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if not done.stdout.startswith("{"):
        assert NO_SERVICE.search(last), f"pip-audit failed: {done.stderr}"
        return None
    every = json.loads(done.stdout)["dependencies"]
    found = [f"{d['name']} {d['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'no version'}"
             for d in every for v in d.get("vulns", [])]
    return found, [d["name"] for d in every if "skip_reason" in d]


def judge(answer):
    """Skip, with the reason, unless every package was looked up and has no advisory."""
    if answer is None:
        pytest.skip("the service of advisories cannot be reached")
    found, unknown = answer
    if found:  # the code has not changed, the world has: not a failure, but told at the end of every test run
        warnings.warn("known vulnerabilities:\n" + "\n".join(found), stacklevel=1)
        pytest.skip(f"known vulnerabilities: {'; '.join(found)}")
    if unknown:
        pytest.skip(f"the index knows nothing of advisories for {', '.join(unknown)}")


def test_no_known_vulnerability():
    words = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json", "--desc", "off",
             "--no-deps", "--disable-pip", "--timeout", "5"]
    for path in LISTS:
        words += ["-r", str(path)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=50)
    except subprocess.TimeoutExpired:
        pytest.skip("the service of advisories does not answer within 50 seconds")
    judge(audit(done))


CLEAN = dict(name="a", version="1", vulns=[])
UNKNOWN = dict(name="b", skip_reason="Dependency not found on PyPI and could not be audited: b (2)")
BAD = dict(name="c", version="3", vulns=[dict(id="PYSEC-1", fix_versions=["4"]), dict(id="GHSA-2", fix_versions=[])])


@pytest.mark.parametrize("dependencies, reason", [
    ([CLEAN], None), ([CLEAN, UNKNOWN], "nothing of advisories for b"), ([UNKNOWN], "nothing of advisories for b"),
    ([CLEAN, UNKNOWN, BAD], "c 3: PYSEC-1, fixed in 4; c 3: GHSA-2, fixed in no version")])
def test_the_audit_passes_only_what_was_looked_up_and_is_clean(dependencies, reason):
    answer = audit(subprocess.CompletedProcess([], 1, json.dumps(dict(dependencies=dependencies)), ""))
    if reason is None:
        judge(answer)
        return
    with warnings.catch_warnings(record=True) as told, pytest.raises(pytest.skip.Exception, match=reason):
        warnings.simplefilter("always")
        judge(answer)
    assert len(told) == (BAD in dependencies) and all("PYSEC-1" in str(w.message) for w in told)


def test_an_audit_without_network_is_skipped_and_a_wrong_call_fails():
    nowhere = dict(os.environ, HTTPS_PROXY="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", NO_PROXY="", no_proxy="")
    words = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json", "--no-deps",
             "--disable-pip", "--timeout", "1", "-r", str(LISTS[1])]

    def answer(*more):
        return audit(subprocess.run([*words, *more], capture_output=True, text=True, env=nowhere, timeout=600))

    with tempfile.TemporaryDirectory() as cache:  # an old answer is none
        assert answer("--cache-dir", cache) is None
    with pytest.raises(AssertionError, match="unrecognized arguments"):
        answer("--no-such-option")
