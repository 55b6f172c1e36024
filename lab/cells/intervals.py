"""How certain a number is: intervals of shares and means, and what a method did to each single image."""

import numpy as np


def wilson(hits, n, z=1.96):
    """(share, low, high): Wilson's 95 % interval (JASA 22, 1927) of hits / n."""
    share, middle = hits / n, (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (n * share * (1 - share) + z * z / 4) ** 0.5
    return share, middle - half, middle + half


def bootstrap_mean(values, draws=2000):
    """(mean, low, high): bootstrap 95 % interval of a mean. For a paired comparison pass the differences."""
    values = np.asarray(values, float)
    pick = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[pick].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def with_interval(name, interval):
    """{name: …, name_low: …, name_high: …}, for a row of a table."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


def flags(hits):
    """A yes or no per image as compact text, 'yyny…'."""
    return "".join("ny"[int(hit)] for hit in hits)


def judge_images(features, dense, text, labels):
    """What became of each image, as text for one table cell each: cosine to the dense feature, whether the
    top-1 class is the dense model's, whether it is right. features, dense: (N, P); text: (C, P); labels: (N,).
    Features that are not finite are a row with status='nan' and empty cells: argmax would judge them anyway."""
    if not features.isfinite().all():
        return dict(status="nan", cosines="", agrees="", corrects="")
    predicted = (features @ text.T).argmax(-1)
    return dict(cosines=" ".join(f"{c:.4f}" for c in (features * dense).sum(-1).tolist()),
                agrees=flags(predicted == (dense @ text.T).argmax(-1)), corrects=flags(predicted == labels))


def per_image(rows):
    """Rows from `judge_images` (one per random draw) → {'cosine', 'agreement', 'accuracy': (N,) or None}; the
    draws' mean per image."""
    def values(column):
        parts = [[float(v) for v in row[column].split()] if column == "cosines" else [f == "y" for f in row[column]]
                 for row in rows if row[column]]
        return np.mean(parts, axis=0) if parts else None

    return dict(cosine=values("cosines"), agreement=values("agrees"), accuracy=values("corrects"))


def quality_columns(seen, baseline=None, name="baseline"):
    """Columns of a table from `per_image`: means with 95 % intervals, and paired differences to a baseline."""
    if seen["agreement"] is None:  # no draw gave finite features
        return dict(n_images=0, status="nan")
    n = len(seen["agreement"])
    row = dict(n_images=n)
    if seen["cosine"] is not None:
        row.update(with_interval("cosine_mean", bootstrap_mean(seen["cosine"])))
        row.update(cosine_p5=float(np.percentile(seen["cosine"], 5)))
    for short, column in (("agreement", "top1_agreement"), ("accuracy", "top1_accuracy")):
        row.update(with_interval(column, wilson(seen[short].sum(), n)))
    for short in ("cosine", "agreement", "accuracy") if baseline else ():
        if seen[short] is not None and baseline[short] is not None:
            difference = bootstrap_mean(seen[short] - baseline[short])
            row.update(with_interval(f"{short}_minus_{name}", difference))
    return row
