"""What a method did to each single image, and how certain the averages are."""

import numpy as np

from effarch.bench.intervals import bootstrap_mean, wilson, with_interval


def flags(hits):
    """A yes or no per image as compact text, 'yyny…'."""
    return "".join("ny"[int(hit)] for hit in hits)


def judge_images(features, dense, text=None, labels=None):
    """What became of each image, as text for one table cell each: cosine to the dense feature, whether the top-1 class is
    the dense model's, whether it is right. features, dense: (N, P); text: (C, P) or None; labels: (N,) or None.

    Features that are not finite are a row with status='nan' and empty cells: argmax would judge them anyway."""
    row = dict(cosines="", agrees="", corrects="")
    features, dense = features.float(), dense.float()  # half precision would round a cosine to three digits
    if not features.isfinite().all():
        return dict(row, status="nan")
    row["cosines"] = " ".join(f"{c:.4f}" for c in (features * dense).sum(-1).tolist())
    if text is not None:
        predicted, expected = ((f @ text.float().T).argmax(-1) for f in (features, dense))
        row["agrees"] = flags(predicted == expected)
        row["corrects"] = flags(predicted == labels) if labels is not None else ""
    return row


def per_image(rows):
    """Rows from `judge_images` (one per random draw) → {'cosine', 'agreement', 'accuracy': (N,) or None}; the
    draws' mean per image."""
    def values(column):
        parts = [[float(v) for v in row[column].split()] if column == "cosines" else [f == "y" for f in row[column]]
                 for row in rows if row[column]]
        return np.mean(parts, axis=0) if parts else None

    return dict(cosine=values("cosines"), agreement=values("agrees"), accuracy=values("corrects"))


def quality_columns(seen, **baselines):
    """Columns of a table from `per_image`: means with 95 % intervals, and for each baseline={per_image of it} the
    differences paired by image (cosine_minus_<baseline>, agreement_minus_…, accuracy_minus_…)."""
    known = [values for values in seen.values() if values is not None]
    if not known:  # no draw gave finite features
        return dict(n_images=0, status="nan")
    n = len(known[0])
    row = dict(n_images=n)
    if seen["cosine"] is not None:
        row.update(with_interval("cosine_mean", bootstrap_mean(seen["cosine"])))
        row.update(cosine_p5=float(np.percentile(seen["cosine"], 5)), cosine_min=float(seen["cosine"].min()))
    for short, column in (("agreement", "top1_agreement"), ("accuracy", "top1_accuracy")):
        if seen[short] is not None:
            row.update(with_interval(column, wilson(seen[short].sum(), n)))
    for name, baseline in baselines.items():
        for short in ("cosine", "agreement", "accuracy"):
            if seen[short] is not None and baseline[short] is not None:
                row.update(with_interval(f"{short}_minus_{name}", bootstrap_mean(seen[short] - baseline[short])))
    return row
