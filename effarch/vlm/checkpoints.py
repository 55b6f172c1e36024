"""The Qwen2.5-VL (or Qwen2-VL) to measure: a folder, the Hugging Face hub, or a stand-in of the same shape with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from effarch.checks import check
from effarch.clip.checkpoints import Location, is_local, locate_checkpoint, unusable
from effarch.vlm.inputs import noise_prompt
from effarch.vlm.shapes import random_model

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


def locate_model(model_id, size, cuda, smoke=False):
    """Location of the weights: a local folder, a hub id (downloaded once), or none with the reason why.

    The default is not fetched where there is no GPU: 7 GB, and minutes a question. ValueError for a folder that holds no
    checkpoint, and for another hub id that cannot be had."""
    stand_in, default = f"random-qwen2.5-vl-{size}", model_id == DEFAULT_MODEL
    if not is_local(model_id) and (smoke or default and not cuda):
        return Location(None, stand_in, "a smoke run downloads nothing" if smoke else "no GPU for the default model")
    try:
        return locate_checkpoint(model_id, smoke)
    except ValueError as error:
        if not default:
            raise
        return Location(None, stand_in, str(error).split("(", 1)[-1].rstrip(")"))


def half_precision():
    """The half precision that this GPU computes: bfloat16 from capability 8.0 on, else (a T4) float16."""
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


@dataclass
class Study:
    """A model to measure. processor None: no weights, so that quality would mean nothing; `why_not` says the reason."""

    model: Any
    processor: Any
    slug: str
    why_not: str
    seed: int = 0

    @property
    def config(self):
        """The model's configuration."""
        return self.model.config

    def question(self, picture, text, max_units=256):
        """The model's inputs for one question about a picture, in its chat format; at most so many units of the picture."""
        unit = self.processor.image_processor.patch_size * self.processor.image_processor.merge_size
        message = [dict(role="user", content=[dict(type="image", image=picture), dict(type="text", text=text)])]
        return self.processor.apply_chat_template(
            message, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
            processor_kwargs=dict(images_kwargs=dict(min_pixels=4 * unit**2, max_pixels=max_units * unit**2))).to(self.model.device)

    def noise(self, side, text=40, images=1, seed=0):
        """Inputs of the same kind without a processor: images of side × side pixels of noise, and `text` random tokens."""
        patch = self.config.vision_config.patch_size
        return noise_prompt(self.config, [(1, side // patch, side // patch)] * images, text, seed).to(self.model.device)


def load_study(location, size, device, dtype, seed=0):
    """The Study at a Location in `dtype`; ValueError where its files cannot be used."""
    if location.folder is None:
        return Study(random_model(size, device, dtype, seed), None, location.slug, f"random weights ({location.why})", seed)
    files = dict(pretrained_model_name_or_path=location.folder, local_files_only=Path(location.folder).is_dir())
    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(**files, dtype=dtype, use_safetensors=True)
        processor = transformers.AutoProcessor.from_pretrained(**files)
    except Exception as error:
        raise unusable(location, error) from None
    kinds = ("Qwen2_5_VLForConditionalGeneration", "Qwen2VLForConditionalGeneration")
    check(type(model).__name__ in kinds, "MODEL_ID", type(model).__name__, "a Qwen2.5-VL or Qwen2-VL model")
    return Study(model.eval().requires_grad_(False).to(device), processor, location.slug, "", seed)
