"""What a method did to each single image, and how certain the averages are."""

import numpy as np
import torch.nn.functional as F

from effarch.bench.figures import OURS, PALETTE, PROPOSED, RIVAL
from effarch.bench.intervals import bootstrap_mean, wilson, with_interval


def flags(hits):
    """A yes or no per image as compact text, 'yyny…'."""
    return "".join("ny"[int(hit)] for hit in hits)


def judge_images(features, dense, text=None, labels=None, names=None, zero_shot=None):
    """What became of each image, as text for one table cell each: cosine to the dense feature, whether the top-1 class is
    the dense model's, whether it is right, the same of many `names` and of a zero-shot head.

    features, dense: (N, P); text, zero_shot: (C, P) or None; labels: (N,) or None; names: (M, P) or None. Where any
    of them is not finite: a row with status='nan' and empty cells, as argmax would judge them anyway."""
    row = dict(cosines="", agrees="", corrects="", names_agree="", zero_shot_corrects="")
    features, dense = features.float(), dense.float()  # half precision would round a cosine to three digits
    if not all(v.isfinite().all() for v in (features, dense, text, names, zero_shot) if v is not None):
        return dict(row, status="nan")
    features, dense = (F.normalize(v, dim=-1) for v in (features, dense))  # and lengths
    row["cosines"] = " ".join(f"{c:.4f}" for c in (features * dense).sum(-1).tolist())
    if text is not None:
        predicted, expected = ((f @ text.float().T).argmax(-1) for f in (features, dense))
        row["agrees"] = flags(predicted == expected)
        row["corrects"] = flags(predicted == labels) if labels is not None else ""
    if names is not None:
        row["names_agree"] = flags((features @ names.float().T).argmax(-1) == (dense @ names.float().T).argmax(-1))
    if zero_shot is not None and labels is not None:
        row["zero_shot_corrects"] = flags((features @ zero_shot.float().T).argmax(-1) == labels)
    return row


# colours of the ways to reduce tokens, the same in all figures; what is not here is grey
COLOURS = {"ours": OURS, "tome": RIVAL, "vtp": PROPOSED, "cls_merge": PALETTE[3], "evit": PALETTE[4], "grid": PALETTE[5],
           "smaller_input": "#000000", "pitome": "#8c510a", "diffrate": "#7a5195"}

# what is judged of each image → the column of `judge_images`, that of the mean over images
JUDGED = {"cosine": ("cosines", "cosine_mean"), "agreement": ("agrees", "top1_agreement"), "accuracy": ("corrects", "top1_accuracy"),
          "names_agreement": ("names_agree", "names_agreement"), "zero_shot_accuracy": ("zero_shot_corrects", "zero_shot_accuracy")}


def per_image(rows):
    """Rows from `judge_images` (one per random draw) → {what is judged: (N,) or None}; the draws' mean per image.

    One draw that was not finite leaves nothing to average: a mean of the others would hide it."""
    if any(row.get("status") == "nan" for row in rows):
        return dict.fromkeys(JUDGED)

    def values(column):
        parts = [[float(v) for v in row[column].split()] if column == "cosines" else [f == "y" for f in row[column]]
                 for row in rows if row.get(column)]
        return np.mean(parts, axis=0) if parts else None

    return {what: values(column) for what, (column, _) in JUDGED.items()}


def mean_of(values, groups=None, share=False):
    """Estimate of a mean over images. groups: (N,) which picture each image is cut from; then pictures are redrawn, not
    images, since crops of one picture are alike. share: 0 or 1 each, Wilson's interval."""
    if groups is not None:
        _, group = np.unique(groups, return_inverse=True)
        return bootstrap_mean(np.bincount(group, values) / np.bincount(group), weights=np.bincount(group))
    return wilson(values.sum(), len(values)) if share else bootstrap_mean(values)


def quality_columns(seen, groups=None, **baselines):
    """Columns of a table from `per_image`: means with 95 % intervals, and for each baseline={per_image of it} the
    differences paired by image (cosine_minus_<baseline>, agreement_minus_…, …). groups: see `mean_of`."""
    known = [values for values in seen.values() if values is not None]
    if not known:  # no draw gave finite features
        return dict(n_images=0, status="nan")
    row = dict(n_images=len(known[0])) | ({} if groups is None else dict(n_pictures=len(set(groups))))
    if seen["cosine"] is not None:
        row.update(cosine_p5=float(np.percentile(seen["cosine"], 5)), cosine_min=float(seen["cosine"].min()))
    for what, (_, column) in JUDGED.items():
        if seen.get(what) is not None:
            row.update(with_interval(column, mean_of(seen[what], groups, share=what != "cosine")))
            for name, baseline in baselines.items():
                if baseline.get(what) is not None:
                    row.update(with_interval(f"{what}_minus_{name}", mean_of(seen[what] - baseline[what], groups)))
    return row
