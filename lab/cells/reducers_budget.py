"""All methods by name, and the strength of each that fits a compute budget."""

from functools import partial

from lab.cells.encoder import encoder_macs, trace_encoder
from lab.cells.environment import check
from lab.cells.reducers_attention import AttentionPruning, PruMergeLike, RatioSchedule
from lab.cells.reducers_input import ClusterMasking, Grid, InputPruning, Random
from lab.cells.reducers_merge import MergeSimilar, ProtectedMerging

REDUCERS = {  # name → factory(strength, **options); strength: keep ratio, or mean tokens merged per layer
    "vtp": InputPruning,
    "vtp_mean": partial(InputPruning, rest="mean"),
    "vtp_learned": partial(InputPruning, rest="learned"),
    "random": Random,
    "grid": Grid,
    "cluster": ClusterMasking,
    "evit": partial(AttentionPruning, rest="fuse"),
    "cls_drop": AttentionPruning,
    "cls_merge": partial(AttentionPruning, rest="merge"),
    "dynamicvit": RatioSchedule,
    "prumerge": PruMergeLike,
    "tome": MergeSimilar,
    "ours": ProtectedMerging,
}


def reducer_kind(name):
    """'keep' or 'merge': what the strength of a method means."""
    check(name in REDUCERS, "reducer", name, ", ".join(REDUCERS))
    factory = REDUCERS[name]
    return getattr(factory, "func", factory).kind


def reducer_for_budget(name, budget, model, image_size=None, cls_only_last=None, **options):
    """The strongest-quality reducer `name` whose multiply-adds are at most `budget` × the dense encoder's.

    budget: share in (0, 1]. cls_only_last: the exact shortcut of the last layer, for a method of any kind; None:
    as the method has it. options go to the factory. The search bisects the strength, counting
    a blank image each time: about a dozen forward passes. ValueError if the budget cannot be reached."""
    kind = reducer_kind(name)
    number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    check(number and 0 < budget <= 1, "budget", budget, "a share above 0 and at most 1")
    dense = trace_encoder(model, image_size=image_size)
    limit, patches = budget * dense.macs, dense.x.shape[1]
    make = partial(REDUCERS[name], **options)

    def fits(position):
        """position 0 = strongest reduction … 1 = none."""
        reducer = make(max(position, 1 / patches) if kind == "keep" else (1 - position) * patches / 2)
        reducer.cls_only_last = reducer.cls_only_last if cls_only_last is None else cls_only_last
        return reducer, encoder_macs(model, reducer, image_size) <= limit

    best, ok = fits(1.0)
    if ok:
        return best
    best, ok = fits(0.0)
    check(ok, f"budget for {name}", budget, f"at least {encoder_macs(model, best, image_size) / dense.macs:.3f}")
    low, high = 0.0, 1.0
    for _ in range(11):
        middle = (low + high) / 2
        reducer, ok = fits(middle)
        low, high, best = (middle, high, reducer) if ok else (low, middle, best)
    return best
