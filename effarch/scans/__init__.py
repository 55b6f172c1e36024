"""Mamba's selective scans, blocks and language models, in pure PyTorch.

    from effarch.scans import ssd, Mamba2Block, model_from_transformers

scan     S6 and SSD: by their definitions, and fast (ssm/selective_scan.ipynb)
blocks   Mamba's and Mamba-2's blocks, language models, weights of transformers, attention (ssm/mamba_layers.ipynb)"""

from importlib import import_module

# names are looked up when they are first used, so that a notebook which defines one part loads only the other
_HOMES = dict(
    scan=("s6", "s6_sequential", "s6_step", "ssd", "ssd_minimal", "ssd_sequential", "ssd_step", "random_s6", "random_ssd"),
    blocks=("MambaBlock", "Mamba2Block", "MambaLM", "AttentionLayer", "block_from_transformers", "model_from_transformers"),
)
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
