"""The package as others get it: a wheel in a fresh environment, outside the checkout, and the README's snippets."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
from conftest import ROOT, clean_environment

import effarch

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, built with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "effarch", source / "effarch", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lab", "tests", "ssm"):  # nothing of these belongs into it
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    done = subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(source)],
                          capture_output=True, text=True, env=clean_environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """run(code) in a fresh environment that has the wheel, and torch and the like from the present one."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env/bin/python"
    done = subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
                          capture_output=True, text=True, env=clean_environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    (packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    place = folder / "elsewhere"
    place.mkdir()

    def run(code):
        done = subprocess.run([str(python), "-c", code], cwd=place, capture_output=True, text=True,
                              env=clean_environment(), timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (facts,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
        assert any(name.endswith("LICENSE") for name in archive.namelist())
        assert not [name for name in archive.namelist() if str(ROOT).encode() in archive.read(name)]
    expected = [p.relative_to(ROOT).as_posix() for end in ("py", "csv") for p in (ROOT / "effarch").rglob(f"*.{end}")]
    assert sorted(names) == sorted(expected) and "effarch/bench/original_claims.csv" in names
    assert f"\nVersion: {effarch.__version__}\n" in facts and "\nLicense-Expression: MIT\n" in facts
    assert "Project-URL" not in facts and "Home-page" not in facts, "no address is known"
    needs = re.findall(r"^Requires-Dist: ([\w-]+)(.*)$", facts, re.M)
    runtime = {name: rest for name, rest in needs if "extra ==" not in rest}
    assert set(runtime) == {"torch", "transformers", "numpy", "pandas", "matplotlib", "pillow", "scipy"}
    assert all(re.fullmatch(r">=[\d.]+", rest) for rest in runtime.values()), "lower bounds only: Colab's own packages do"
    assert {m for m in re.findall(r"^Provides-Extra: (.*)$", facts, re.M)} == {"lab", "test"}


def test_requirements_hold_what_the_package_needs():
    """The exact set that is tested lies within the bounds that are promised."""
    import tomllib

    from packaging.requirements import Requirement

    pinned = {}
    for path in (ROOT / "requirements.txt", ROOT / "tests/requirements.txt"):
        for line in path.read_text().splitlines():
            if line.split("#")[0].strip():
                name, _, version = line.split("#")[0].strip().partition("==")
                pinned[name] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.name in pinned or requirement.name == "nbformat", f"{requirement.name}: papermill brings nbformat only"
            assert requirement.name not in pinned or pinned[requirement.name] in requirement.specifier, str(requirement)


# three lines of each method module, as in a user's own code
USES = {
    "multirate": """from effarch.multirate import Baseline, SplitMRSS
y = SplitMRSS(16, 7, r=4, low_fraction=0.75)(torch.randn(2, 33, 16))
assert y.shape == Baseline(16, 7)(torch.randn(2, 33, 16)).shape""",
    "hierarchical": """from effarch.hierarchical import HierarchicalMRSS
y = HierarchicalMRSS(16, 7, rates=(1, 2, 8), shares=(0.25, 0.25, 0.5))(torch.randn(2, 33, 16))
assert y.shape == (2, 33, 16)""",
    "scans": """from effarch.scans import ssd
A, B = -torch.rand(4), torch.randn(1, 32, 1, 8)
y, state = ssd(torch.randn(1, 32, 4, 8), torch.rand(1, 32, 4), A, B, B)
assert y.shape == (1, 32, 4, 8)""",
    "multirate_scan": """from effarch.multirate_scan import DynamicBlock
from effarch.scans import Mamba2Block
y, state = DynamicBlock(32, Mamba2Block(32), target=0.25)(torch.randn(2, 40, 32))
assert y.shape == (2, 40, 32)""",
    "vision_ssm": """from effarch.vision_ssm import VisionMambaBlock, scan_orders
y = VisionMambaBlock(32)(torch.randn(2, 50, 32), scan_orders(7, 7)[None])
assert y.shape == (2, 50, 32)""",
    "scan_clip": """from effarch.clip.checkpoints import random_clip
from effarch.clip.towers import make_tower
from effarch.scan_clip import ScanMixer, landmark_maps, replaced_attention
model = random_clip(smoke=True)[0].eval()
block, x = make_tower(model).blocks[3], torch.randn(4, 65, 48)
with torch.no_grad(), replaced_attention(model, {3: ScanMixer(block, 3, landmark_maps(block, 3, x, states=16))}):
    model.get_image_features(pixel_values=torch.randn(1, 3, 64, 64))""",
    "distillation": """from effarch.distillation import distill
kernel = 0.9 ** torch.arange(64.)[:, None] * torch.ones(4)
assert distill(kernel, "hankel", rank=2)(64).shape == (64, 4)""",
    "decoding": """from effarch.decoding import BlockedConvolution, RingBuffer
kernel, x = torch.randn(32, 4), torch.randn(40, 4)
exact, blocked = RingBuffer(kernel), BlockedConvolution(kernel, 8)
assert all(torch.allclose(exact.step(v), blocked.step(v), atol=1e-4) for v in x)""",
    "token_reduction": """from transformers import CLIPVisionConfig, CLIPVisionModel
from effarch.token_reduction import token_reduction, reducer_for_budget, REDUCERS
model = CLIPVisionModel(CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                         num_attention_heads=2, image_size=64, patch_size=8)).eval()
x = torch.randn(1, 3, 64, 64)
with torch.no_grad(), token_reduction(model, "tome", budget=0.5, patch_tokens=False):
    few = model(pixel_values=x).last_hidden_state
assert few.shape[1] < model(pixel_values=x).last_hidden_state.shape[1] and "ours" in REDUCERS""",
    "masking": """from effarch.masking import KeepPatches, cluster_kept, contrastive_loss, random_kept
from effarch.clip.checkpoints import random_clip
from effarch.token_reduction import encode_images
model, x = random_clip(smoke=True)[0], torch.randn(4, 3, 64, 64)
images = encode_images(model, x, KeepPatches(cluster_kept(x, patch=8, keep=0.5)))  # in a training step; at inference without
texts = torch.nn.functional.normalize(torch.randn(4, images.shape[1]), dim=-1)
contrastive_loss(images, texts, captions=torch.tensor([0, 1, 1, 2]), scale=14.0).backward()
assert model.visual_projection.weight.grad.abs().sum() > 0 and random_kept(x, 8, 0.25).shape == (4, 16)""",
    "few_shot": """from effarch.few_shot import METHODS, Support
features, text = (torch.nn.functional.normalize(torch.randn(n, 16), dim=-1) for n in (12, 3))
head = METHODS["GDA"](Support(features, torch.arange(3).repeat(4), text))
assert head(features).shape == (12, 3)""",
    "low_rank": """from effarch.clip.checkpoints import random_clip
from effarch.low_rank import collect_moments, slim_attention, slim_mlp
from effarch.token_reduction import encoder_macs
tower = random_clip(smoke=True)[0].eval()
moments = collect_moments(tower, [torch.randn(2, 3, 64, 64)])
thin = slim_mlp(slim_attention(tower, moments, qk=8, vo=12), moments, 0.75)
assert encoder_macs(thin) < 0.8 * encoder_macs(tower)""",
    "compression": """from effarch.clip.checkpoints import random_clip
from effarch.compression import Gates, gate_value, kept_anywhere, slice_units
model = random_clip(smoke=True)[0].eval()
gates = Gates(model)  # in training: gates.draw(generator) before each step, a Pressure(gates, 0.5, steps) beside the loss
kept = kept_anywhere(gates.log_alpha + torch.randn(len(gates.costs)), gates.groups, 0.5)
gates.remove()
small = slice_units(model, kept, gates.groups, gate_value(gates.log_alpha.detach()))
assert small.get_image_features(pixel_values=torch.randn(2, 3, 64, 64)) is not None""",
    "queries": """from effarch.queries import QFormer, pool_patches
patches, words = torch.randn(2, 196, 48), torch.randint(30, (2, 5))
queries, states = QFormer(16, 32, 48, vocabulary=30)(patches, words, "itg")
assert queries.shape == pool_patches(patches, (14, 14), 16)[..., :32].shape and states.shape == (2, 5, 32)""",
    "bench": """from effarch.bench import compare, ratio_interval, statements
rows = compare({"a": lambda: x + 1, "b": lambda: x + 2}, rounds=3) if (x := torch.zeros(9)) is not None else None
assert rows["a"]["n_runs"] == 3 and len(statements()) > 30""",
    "clip": """from effarch.clip.checkpoints import random_clip
model, processor = random_clip(smoke=True)
assert model.config.vision_config.image_size == 64""",
    "vlm": """from effarch.vlm.shapes import cache_bytes, prefill_macs, shape_config
seven = shape_config("7b")  # one image of 448 × 448 pixels, 40 tokens of text
assert 0 < cache_bytes(seven, (1, 32, 32), 40) < sum(prefill_macs(seven, (1, 32, 32), 40))""",
    "qwen": """from effarch.qwen import reduce_vision_tokens
from effarch.vlm.inputs import noise_prompt
from effarch.vlm.shapes import random_model
reader = random_model("tiny").eval()
prompt = noise_prompt(reader.config, [(1, 8, 8)])
with torch.no_grad(), reduce_vision_tokens(reader, "divprune", keep=0.5, where="after"):
    assert torch.isfinite(reader(**prompt).logits).all()""",
}


def test_the_installed_package_works_outside_the_checkout(installed):
    said = installed("import effarch, sys; print(effarch.__file__, effarch.__version__, 'torch' in sys.modules)")
    assert "/site-packages/effarch/" in said and str(ROOT) not in said.split()[0]
    assert said.split()[1:] == [effarch.__version__, "False"]


def test_three_lines_of_your_own(installed):
    """Each in names of its own, all in one process: importing torch takes longer than any of them."""
    parts = {p.stem for p in (ROOT / "effarch").iterdir() if not p.stem.startswith("_") and p.stem != "checks"}
    assert parts <= set(USES), f"each part needs three lines here: {parts - set(USES)}"
    there = {part: code for part, code in USES.items() if part in parts}
    installed(f"import torch\nfor part, code in {there!r}.items():\n"
              "    torch.manual_seed(0)\n    exec(compile(code, part, 'exec'), dict(torch=torch))")


SECTION = "## Use it in your own code"


def snippets():
    """The Python blocks of the README's section for users of the package."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(SECTION + "\n")[2].partition("\n## ")[0]
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


def test_the_readme_has_snippets():
    assert len(snippets()) >= 3


@pytest.mark.parametrize("i", range(len(snippets())))
def test_readme_snippets_run_as_they_stand(installed, i):
    """Outside the checkout, in a process of its own, without a network; no machine is too slow for them."""
    installed(snippets()[i])
