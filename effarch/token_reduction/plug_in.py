"""Use a reducer through unmodified Hugging Face calls."""

from contextlib import contextmanager

from transformers.modeling_outputs import BaseModelOutputWithPooling

from effarch.clip.towers import make_tower
from effarch.token_reduction.encoder import pooled_output, run_encoder


@contextmanager
def token_reduction(model, reducer):
    """Within the `with` block every Hugging Face call on `model` runs its vision tower with `reducer`.

    `get_image_features`, `model(**inputs)` and pipelines work unchanged; `last_hidden_state` then holds the
    tokens that are left. On exit, also after an exception, the model is exactly what it was.
    Raises TypeError for an unsupported model."""
    tower = make_tower(model)

    def forward(pixel_values=None, interpolate_pos_encoding=False, return_dict=True, **options):
        for name in ("output_attentions", "output_hidden_states", "bool_masked_pos"):
            if options.get(name) is not None and options.get(name) is not False:
                raise ValueError(f"{name} is not available inside token_reduction")
        pixel_values = pixel_values.to(tower.patch.weight.dtype)
        tokens = run_encoder(tower, pixel_values, reducer, interpolate=bool(interpolate_pos_encoding))
        output = BaseModelOutputWithPooling(
            last_hidden_state=tower.finish(tokens.x), pooler_output=pooled_output(tower, tokens))
        return output if return_dict else output.to_tuple()

    before = vars(tower.module).get("forward")
    tower.module.forward = forward
    try:
        yield model
    finally:
        if before is None:
            del tower.module.forward
        else:
            tower.module.forward = before
