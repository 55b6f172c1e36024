"""Use a reducer through unmodified Hugging Face calls."""

from contextlib import contextmanager
from copy import copy

from transformers.modeling_outputs import BaseModelOutputWithPooling

from effarch.checks import check
from effarch.clip.towers import make_tower
from effarch.token_reduction.encoder import Reducer, pooled_output, run_encoder, take

POOLED = {"CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "ViTForImageClassification"}


@contextmanager
def token_reduction(model, reducer, budget=None, patch_tokens=None, **options):
    """Within the `with` block every Hugging Face call on `model` runs its vision tower with fewer tokens.

        with token_reduction(model, "ours", budget=0.5):
            features = model.get_image_features(pixel_values=pixels)

    reducer: a name of REDUCERS with `budget`, the share of the dense multiply-adds it may use (and `options` of
    `reducer_for_budget`), or a Reducer. `get_image_features`, `model(**inputs)` and pipelines work unchanged.
    patch_tokens: whether somebody reads the patches in `last_hidden_state`; None: everybody but CLIPModel,
    SiglipModel, ViTForImageClassification and CLIPVisionModelWithProjection, which read the pooled output. Then all
    tokens are computed in the last layer, too, and every patch that was merged gets its group's token, so that a mean
    over patches stays right; dropped patches are missing.

    On exit, also after an exception, the model is exactly what it was. Raises TypeError for an unsupported model and
    for a reducer that is none, ValueError for an unknown name, a budget that cannot be reached, and for what is not
    available inside: attention maps, hidden states, dropout in attention."""
    tower = make_tower(model)
    if patch_tokens is None:
        patch_tokens = not POOLED & {base.__name__ for base in type(model).__mro__}
    reducer = find_reducer(model, reducer, budget, patch_tokens, options)
    config = tower.module.config
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attention_probs_dropout_prob", 0.0)
    check(not (tower.module.training and dropout), "attention dropout", dropout, "0 in training; or call model.eval()")

    def forward(pixel_values=None, interpolate_pos_encoding=False, return_dict=None, **rest):
        for name in ("output_attentions", "output_hidden_states", "bool_masked_pos"):
            wanted = rest.get(name, getattr(config, name, None))
            check(wanted is None or wanted is False, name, wanted, "None or False inside token_reduction")
        pixel_values = pixel_values.to(tower.patch.weight.dtype)
        tokens = run_encoder(tower, pixel_values, reducer, patch_tokens, interpolate=bool(interpolate_pos_encoding))
        last = tower.finish(tokens.x)
        output = BaseModelOutputWithPooling(
            last_hidden_state=every_patch(last, tokens, reducer) if patch_tokens else last,
            pooler_output=pooled_output(tower, tokens) if tower.pools else None)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    before = vars(tower.module).get("forward")
    tower.module.forward = forward
    try:
        yield model
    finally:
        if before is None:
            del tower.module.forward
        else:
            tower.module.forward = before


def find_reducer(model, reducer, budget, patch_tokens, options):
    """The Reducer that `token_reduction` uses: the one given, or the named one at its budget."""
    if isinstance(reducer, str):
        from effarch.token_reduction.selection import reducer_for_budget

        check(budget is not None, "budget", budget, f"a share of the multiply-adds, above 0 and at most 1, for {reducer!r}")
        return reducer_for_budget(reducer, budget, model, **dict(dict(cls_only_last=False if patch_tokens else None), **options))
    if not isinstance(reducer, Reducer):
        raise TypeError(f"reducer={reducer!r} is not supported; supported: a name of REDUCERS, or a Reducer")
    check(budget is None and not options, "budget and options", (budget, options), "those of a reducer given by its name")
    if patch_tokens and reducer.cls_only_last:
        reducer = copy(reducer)
        reducer.cls_only_last = False
    return reducer


def every_patch(x, tokens, reducer):
    """(B, N, D) → (B, prefix + P, D), every merged patch with its group's token; x as it is where nothing was merged."""
    if tokens.sizes is None:
        return x
    lost = int((tokens.owner < 0).sum())
    check(not lost, f"patches dropped by {type(reducer).__name__}, which also merges,", lost,
          "0 where the patches in last_hidden_state are read (patch_tokens=False if they are not)")
    return take(x, tokens.owner)
