"""Fewer vision tokens in models of transformers, timm and open_clip, without training; effarch.clip.towers has the list.

    with token_reduction(model, "ours", budget=0.5):
        features = model.get_image_features(pixel_values=pixels)

encoder    the encoder loop, what a reducer is, the original pruning (vlm/clip_pruning.ipynb)
merging    ToMe, PiToMe and our recipe (vlm/token_merging.ipynb)
selection  the methods that select tokens, REDUCERS, budgets (vlm/token_reduction.ipynb)
plug_in    token_reduction, the context manager"""

from importlib import import_module

# names are looked up when they are first used, so that a notebook which defines one part loads only the others
_HOMES = dict(
    encoder=("Reducer", "Tokens", "InputPruning", "encode_images", "trace_encoder", "encoder_macs", "fit_budget"),
    merging=("MergeSimilar", "EnergyMerging", "ProtectedMerging"),
    selection=("REDUCERS", "reducer_for_budget", "reducer_kind"),
    plug_in=("token_reduction",),
)
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
