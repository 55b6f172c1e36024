"""The CLIP to measure: from a folder, the Hugging Face hub, or a stand-in of the same shape when offline."""

import errno
import hashlib
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

for name, value in dict(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1", TQDM_DISABLE="1",
                        HF_HUB_ETAG_TIMEOUT="5", HF_HUB_DOWNLOAD_TIMEOUT="15").items():
    os.environ.setdefault(name, value)  # read when transformers is imported

import torch  # noqa: E402
import transformers  # noqa: E402

from effarch.checks import check  # noqa: E402

transformers.logging.set_verbosity_error()
DEFAULT_MODEL = "openai/clip-vit-base-patch16"
FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")  # of a checkpoint: configurations, vocabularies, weights


def reachable(url, seconds=6):
    """Whether a server answers at all within some seconds, whatever its status; never hangs (nor does DNS)."""
    answer = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answer.append(True)
        except urllib.error.HTTPError:
            answer.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answer)


@dataclass
class Location:
    """Where weights come from. folder None: no weights, `why` says the reason, a stand-in takes their place."""

    folder: str | None  # or a hub id
    slug: str  # the name of the results' folder: no two checkpoints share one
    why: str = ""
    digest: str = ""  # of all that the checkpoint is: a hash of its files, or the hub's revision


def safe_slug(text):
    """A file name of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def hub_slug(model_id):
    """A file name for owner/name: `safe_slug`, and six digits of its hash where another name could have the same one."""
    owner, _, name = model_id.lower().partition("/")
    only = re.fullmatch("[a-z0-9]+", owner) and re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)
    return safe_slug(model_id) + ("" if only else f"-{hashlib.sha256(model_id.lower().encode()).hexdigest()[:6]}")


def is_local(model_id, smoke=False):
    """Whether MODEL_ID means a folder here (else a hub id); ValueError for neither, a misspelt folder say: smoke runs ask no hub."""
    check(isinstance(model_id, str) and model_id.strip(), "MODEL_ID", model_id, "a folder or a hub id")
    local = Path(model_id).expanduser().is_dir() or model_id[0] in "/.~"
    check(local or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model_id), "MODEL_ID", model_id,
          "a folder that exists, or a hub id: owner/name")
    check(local or not smoke or not Path(model_id).parent.is_dir(), "MODEL_ID", model_id, f"a folder that exists in {Path(model_id).parent}")
    return local


def locate_checkpoint(model_id, smoke=False):
    """Find the checkpoint `model_id`: a local folder, or a hub id (downloaded once, safetensors only).

    A smoke run downloads nothing. ValueError for a folder without config.json and safetensors weights, and
    for a hub id other than the default that cannot be had."""
    if is_local(model_id, smoke):
        folder = Path(model_id).expanduser()
        good = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
        check(good, "MODEL_ID", model_id, "a folder with config.json and *.safetensors, or a hub id")
        digest = folder_hash(folder)
        return Location(str(folder), f"{safe_slug(folder.resolve().name) or 'checkpoint'}-{digest[:6]}", digest=digest)
    slug, why = hub_slug(model_id), "a smoke run downloads nothing"
    if not smoke:
        from huggingface_hub import snapshot_download

        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            online = reachable(hub)
            folder = snapshot_download(model_id, allow_patterns=list(FILES), local_files_only=not online)
            converted = any(Path(folder).glob("*.safetensors"))  # else transformers looks for a converted copy
            return Location(folder if converted else model_id, slug, digest=Path(folder).name)
        except OSError as error:
            full = error.errno == errno.ENOSPC
            why = "the disk of the download cache is full" if full else f"no answer from {hub}" \
                if not online else f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        except Exception as error:  # the hub's own error types differ between versions
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        check(model_id == DEFAULT_MODEL, "MODEL_ID", model_id, f"a checkpoint that can be had ({why})")
    return Location(None, "random-vit-b-16" if not smoke else "random-tiny", why)


@dataclass
class Checkpoint:
    """A CLIP or SigLIP model ready to use. pretrained False: random weights, only cost can be measured."""

    model: Any
    processor: Any  # the image processor
    tokenize: Any  # list of texts → dict for get_text_features; None without a tokenizer
    slug: str
    pretrained: bool
    facts: dict  # for the provenance: source, revision, class of the image processor


def random_clip(smoke=False):
    """A CLIP with the vision tower of ViT-B/16 (in a smoke run a tiny one), random weights, small text tower."""
    vision = dict(patch_size=16, image_size=224)
    if smoke:
        vision = dict(patch_size=8, image_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=12,
                      num_attention_heads=3)
    text = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": config.vision_config.image_size}, crop_size=config.vision_config.image_size)
    return transformers.CLIPModel(config), processor


def unusable(location, error):
    """The ValueError, one line, for a checkpoint that transformers cannot load."""
    reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:160]}"
    return ValueError(f"MODEL_ID: the checkpoint {location.folder} cannot be loaded ({reason})")


def load_checkpoint(location, device, smoke=False):
    """The Checkpoint at a Location, in float32 on the device; ValueError where its files cannot be used."""
    if location.folder is None:
        model, processor = random_clip(smoke)
        facts = dict(checkpoint="random weights", why=location.why, image_processor=type(processor).__name__)
        return Checkpoint(model.eval().to(device), processor, None, location.slug, False, facts)
    local = Path(location.folder).is_dir()
    files = dict(pretrained_model_name_or_path=location.folder, local_files_only=local)
    try:
        model, report = transformers.AutoModel.from_pretrained(
            **files, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        processor = transformers.AutoImageProcessor.from_pretrained(**files)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**files)
    except Exception as error:
        raise unusable(location, error) from None
    missing = list(report["missing_keys"])
    check(not missing, "MODEL_ID", location.folder, f"complete weights; {len(missing)} missing, e.g. {missing[:2]}")
    layers = [name for name in report["unexpected_keys"] if re.search(r"\blayers?\.\d+\.", name)]
    check(not layers, "MODEL_ID", location.folder, f"as many layers in config.json as in the weights; {len(layers)} more there, e.g. {layers[:2]}")
    check(hasattr(model, "get_text_features"), "MODEL_ID", type(model).__name__, "a CLIP or SigLIP model")

    length = model.config.get_text_config().max_position_embeddings  # tokenizers do not always know it

    def tokenize(texts):
        return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

    tokenize.spell = lambda text: tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    weights = sorted(Path(location.folder).glob("*.safetensors")) if local else []
    revision = getattr(model.config, "_commit_hash", None) or Path(location.folder).resolve().name
    facts = dict(checkpoint=location.slug, revision=revision, image_processor=type(processor).__name__,
                 sha256={f.name: file_hash(f) for f in weights})
    return Checkpoint(model.eval().to(device), processor, tokenize, location.slug, True, facts)


def folder_hash(folder):
    """SHA-256 of a checkpoint's files, names and contents, as hexadecimal text."""
    files = sorted(file for pattern in FILES for file in Path(folder).glob(pattern))
    return hashlib.sha256("\n".join(f"{file.name} {file_hash(file)}" for file in files).encode()).hexdigest()


def file_hash(path):
    """SHA-256 of a file, as hexadecimal text; weights are gigabytes, so it is looked at again only where it has changed."""
    facts = os.stat(path)
    return _file_hash(str(path), facts.st_size, facts.st_mtime_ns)


@cache
def _file_hash(path, size, changed):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
