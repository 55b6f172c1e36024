"""The findings: which rows of which table answer which question. One declarative table, FINDINGS, at the end.

A finding whose rows are missing is absent; if a notebook renames a table or a column, change it here."""

import re
import warnings
from dataclasses import dataclass, field

from effarch.bench.intervals import decide
from lab.report.select import (
    Ambiguous,
    Cell,
    Errors,
    Least,
    Missing,
    Start,
    Times,
    at_least,
    begins,
    differs,
)
from lab.report.text import short, with_span


@dataclass(frozen=True)
class Finding:
    """One question and its answer: a verdict, then a sentence with one number and its interval, then perhaps `more`.

    number: where the number comes from. limit: what its interval is compared with, by the one rule (`decide`): wholly
    below it the verdict is `below`, wholly above it `above`, else `undecided`; without a limit it is `above`.
    beside: further numbers by name. The texts may use {value} (with its interval), {short} (two digits, for the
    verdict), the names in `beside`, and the words of each number ({length}; of a number beside: {name_length}); a text
    that names a number which is not there is left out, with `more` first."""

    key: str
    notebook: str  # suite/name
    question: str
    number: object
    sentence: str
    above: str = ""
    below: str = ""
    undecided: str = "Undecided."
    limit: float | None = 1.0
    more: str = ""
    beside: dict = field(default_factory=dict)

    @property
    def suite(self):
        return self.notebook.split("/")[0]


def verdict(finding, estimate):
    """The template of the verdict that the interval gives."""
    if finding.limit is None:
        return finding.above
    return {True: finding.above, False: finding.below, None: finding.undecided}[decide(estimate, above=finding.limit)]


def find(number, place):
    """number.measure(place), or None where its rows are missing; an ambiguous selection or a column that is not there is
    told and gives None."""
    try:
        return number.measure(place)
    except Missing:
        return None
    except (Ambiguous, KeyError) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else error
        warnings.warn(f"{place.path}: {getattr(number, 'table', '')}: {what}", stacklevel=2)
        return None


def plain(value):
    """A word for a sentence: whole numbers without '.0'; percentages may be made of it by {name:.0%}."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def words_of(finding, main, place):
    """{name: value} of all that the finding's texts may use."""
    words = {k: plain(v) for k, v in main.words.items()}
    words |= dict(value=with_span(main.estimate, main.unit), short=short(main.estimate.value, main.unit))
    for name, number in finding.beside.items():
        found = find(number, place)
        if found is not None:
            words |= {name: with_span(found.estimate, found.unit), f"{name}_short": short(found.estimate.value, found.unit)}
            words |= {f"{name}_{k}": plain(v) for k, v in found.words.items()}
    return words


def written(template, words):
    """A template filled in; None if it names what is not there."""
    try:
        return re.sub(r"(\d)%", r"\1 %", template.format(**words))
    except KeyError:
        return None


def answer(finding, place):
    """The row of findings.csv (dict) of a finding at a place, or None."""
    main = find(finding.number, place)
    if main is None:
        return None
    words = words_of(finding, main, place)
    said, sentence, more = (written(t, words) for t in (verdict(finding, main.estimate), finding.sentence, finding.more))
    if said is None or sentence is None:
        return None
    used = [k for k in words if k not in ("value", "short")
            and re.search(rf"{{{k}[}}:]", "".join([verdict(finding, main.estimate), finding.sentence, finding.more]))]
    return dict(
        key=finding.key, suite=finding.suite, notebook=finding.notebook.split("/")[1], question=finding.question,
        answer=f"**{said}** {sentence}", more=more or "", value=main.estimate.value, low=main.estimate.low,
        high=main.estimate.high, n=main.n, n_of=main.n_of, unit=main.unit, mode="quick" if place.quick else "full",
        device=place.device, weights=place.weights, place=place.path, source=main.source,
        words="; ".join(f"{k}={words[k]}" for k in used))


def collect(places, findings=None):
    """One row (dict) per finding and place; those of quick runs only where no place has it published."""
    found = []
    for finding in FINDINGS if findings is None else findings:
        mine = [answer(finding, place) for place in places if place.suite == finding.suite]
        mine = [row for row in mine if row]
        published = [row for row in mine if row["mode"] != "quick"]
        found += published or mine
    return found


# Shorthands for the table below

MRSS, SIGNALS, SCAN, LAYERS, MULTI, DISTIL, SEES, SCAN_CLIP = (f"ssm/{name}" for name in (
    "mrss_proxy_experiment", "real_signals", "selective_scan", "mamba_layers", "multirate_scan", "distilled_kernels", "vision_mamba", "scan_clip"))
PRUNING, MERGING, REDUCTION, PHOTOS, SCALING, QWEN, HARDWARE, FUSION, SHOTS, MASKED, QUERIES, COMPRESSED = (f"vlm/{name}" for name in (
    "clip_pruning", "token_merging", "token_reduction", "photographs", "token_scaling", "qwen_pruning", "hardware", "low_rank_fusion", "few_shot",
    "masked_pretraining", "query_tokens", "distil_and_prune"))
BASELINE, SPLIT = dict(variant="Baseline"), dict(variant="SplitMRSS r=8 α=0.875")
EQUAL = dict(variant="LowRank D/16")  # as many multiply-adds as SPLIT, at full size
MILD, COARSE = dict(variant="SplitMRSS r=8 α=0.75"), dict(variant="SplitMRSS r=16 α=0.875")
ATTENTION, MAMBA2, FEW_STATES = (dict(variant=begins(name), latency_ms_median=min)  # each in its faster precision
                                 for name in ("attention", "Mamba-2 (ours)", "Mamba-2 N=64"))


def original(design, suffix=""):
    """Time of a design of the original experiment over its baseline's; suffix: which convolution both use."""
    return Times("mrss_proxy_results", dict(variant=f"{design}{suffix}"), dict(variant=f"Baseline{suffix}"),
                 {"experiment": "original", "pass": "forward"})


def design_speed(design, kind="forward", experiment="designs"):
    """Time of the baseline over that of one of our designs, at the largest batch; kind: the pass."""
    return Times("mrss_proxy_results", BASELINE, design, {"experiment": experiment, "pass": kind, "batch": max})


def design_error(task, design=SPLIT, other=BASELINE):
    """Error of one of our designs over another's, by default the baseline's."""
    return Errors("mrss_quality", design, other, dict(task=task), "error")


def signal_error(task, one="SplitMRSS α=0.875", other="Baseline"):
    """Error of one design over another's on a signal that nobody made for it."""
    return Errors("signals_quality", dict(variant=one), dict(variant=other), dict(task=task))


def scan_form(other="minimal, Q", ours="ours", kind="forward"):
    """Time of another form of SSD, with its best chunk length, over ours."""
    return Times("scan_chunks", dict(variant=begins(other), latency_ms_median=min), dict(variant=ours), {"pass": kind, "states": 64, "length": max}, words=("states",))


def s6_speed(length):
    """Time of mambapy's S6 over that of ours, with gradients."""
    return Times("scan_speed", dict(variant="S6 mambapy pscan"), dict(variant="S6 (ours)"), {"pass": "forward+backward", "length": length})


def layer_speed(one, other, length=max, **more):
    """Time of one whole layer over that of another."""
    return Times("scan_layers", one, other, dict(length=length), **more)


def layer_memory(one):
    """MiB at the peak of one whole layer, in the longest sequence."""
    return Cell("scan_layers", "peak_mem_mib", dict(length=max) | one, "MiB")


def decode_speed(one, other, context=max):
    """Time a token of one layer over that of another."""
    return Times("scan_decode", one, other, dict(context=context))


def copied(variant):
    """Errors of a block with heads at several rates over those of the full rate, on the copying task."""
    return Errors("scan_quality", dict(variant=variant), dict(variant="full rate"), dict(task="copying"), "accuracy", "seed_of_model", accuracy=True)


def routed(other):
    """Errors of the learned router over those of another choice of tokens, on the copying task."""
    return Errors("scan_router", dict(variant="learned router"), dict(variant=other), dict(task="copying"), "accuracy",
                  "seed_of_model", accuracy=True)


def decoding(other):
    """Time a token of another form over that of the state space that S4D is, at the longest kernel."""
    return Times("kernel_distillation_latency", other, dict(method="hankel", rank=8),
                 dict(phase="decode", kernel="per channel", taps=max), per="tokens", words=("rank",))


def distilled_error(task, kind="free", then="", unit="%"):
    """Output error at ten times fewer numbers, by the best method for each training; then: another column of its row."""
    return Least("kernel_distillation_quality", "output_error", dict(task=task, kind=kind, saving=at_least(10)), unit=unit, then=then)


def hybrid(column, mixing="scan", fit="end to end", unit=""):
    """A cell of the towers with a scan, or another mixing, in every second layer, by default after all training."""
    return Cell("scan_clip_quality", column, dict(layers="every second", variant=f"{mixing}, exact CLS row", fit=fit), unit)


def seeing_speed(length=max):
    """Time of a transformer layer over that of two Vision Mamba blocks with as many parameters, each in its faster precision."""
    return Times("vision_speed", *(dict(variant=begins(name), latency_ms_median=min) for name in ("transformer", "two directions")),
                 dict(length=length))


def seeing_error(other, mine="two directions"):
    """Errors of Vision Mamba over those of another network, on digits."""
    return Errors("vision_quality", dict(variant=mine), dict(variant=other), {}, "accuracy", "seed_of_model", accuracy=True)


def seeing_seconds(one="transformer, as long", other="two directions"):
    """Seconds of one training on digits over those of another."""
    return Errors("vision_quality", dict(variant=one), dict(variant=other), {}, "train_s", "seed_of_model")


def few_labels(method, shots=max):
    """Gain of a way to learn from a few labels over the head made of names, on the images themselves (not the far domain)."""
    return Cell("few_shot_methods", "gain_over_zero_shot", dict(domain=differs("digits"), method=method, shots=shots), "points", ("shots", "domain"))


def masked(variant):
    """Change of accuracy that a recipe brings to training a CLIP for equal seconds."""
    return Cell("masked_pretraining", "accuracy_minus_dense", dict(loss="softmax", variant=variant, budget="equal seconds"), "points", ("seconds", "accuracy"))


def queried(method):
    """Change of accuracy against average pooling to as many tokens, after the longest training, of equal seconds."""
    return Cell("query_curves", "accuracy_minus_pool", dict(method=method, moment=1.0), "points", ("tokens", "train_s"))


def compressed(method):
    """Change of accuracy of a compressed CLIP against a smaller one that was trained as long as it and its teacher."""
    return Cell("distil_and_prune", "accuracy_minus_smaller", dict(method=method), "points", ("n_trainings",))


def feature_kept(method):
    """Cosine of a method's image feature to the whole encoder's, at half the multiply-adds."""
    return Cell("clip_equal_compute", "cosine_mean", dict(method=method, budget=0.5), words=("share_of_dense_macs", "image_set"))


def reduced(column, method="ours", budget=0.5, unit="%"):
    """A cell of the comparison of token reductions at equal compute."""
    return Cell("token_reduction_methods", column, dict(method=method, budget=budget), unit, ("macs_share", "image_set", "tokens_last"))


def on_photographs(column, method="ours", unit="%"):
    """A cell of the comparison on photographs, at half the multiply-adds."""
    return Cell("photograph_methods", column, dict(method=method, budget=0.5), unit, ("macs_share",))


def reduced_time(method="ours", batch=max):
    """Time of the whole encoder over that of a method at half the multiply-adds."""
    return Times("token_reduction_latency", dict(method="dense"), dict(method=method), dict(budget=0.5, batch=batch))


def image_speed(side):
    """Time of the whole encoder over ours at half the multiply-adds, one image of one size."""
    return Times("token_scaling", dict(method="dense"), dict(method="ours"),
                 dict(shape=max, side=side, batch=1, dtype="float32", attention="sdpa"))


def form_speed(**form):
    """Time of the encoder in single precision with all tokens over that of another form, at the largest batch."""
    return Times("hardware_forms", dict(form="float32 · all tokens, CLS-only last layer"), form, dict(batch=max), words=("precision", "cosine_mean"))


def place_speed(one, other):
    """Time of a prompt whose tokens are dropped at one place over that with another place, a quarter kept."""
    return Times("qwen_places", dict(variant=f"{one} 0.25"), dict(variant=f"{other} 0.25"), dict(side=max))


def prompt_speed(where):
    """Time of a prompt with all vision tokens over that with a quarter of them, dropped at one place."""
    return Times("qwen_places", dict(variant="dense"), dict(variant=f"{where} 0.25"), dict(side=max))


FINDINGS = [
    Finding(
        "mrss", MRSS, "Is MRSS, a layer at two rates, faster than its baseline?", original("MRSS r=4", " (stock conv)"),
        "As proposed, with the second branch at every fourth step (the original's best), it takes {value} the time of its baseline, the same layer without that branch.",
        below="Yes: {short} the time.", above="No: {short} the time.",
        more="With a faster convolution in both: {fast}.", beside=dict(fast=original("MRSS r=4"))),
    Finding(
        "split", MRSS, "Is a layer with its channels split by rate faster than the full one?", design_speed(SPLIT),
        "SplitMRSS, seven eighths of the channels at an eighth of the rate, is {value} as fast as the baseline with the same "
        "fast convolution, and {equal} as fast as a low-rank mixing of as many multiply-adds.",
        below="No: {short} as fast.", above="Yes: {short} as fast.",
        more="In half precision {halved}. With gradients {training}. Three quarters at an eighth: {mild}; seven eighths at a sixteenth: {coarse}.",
        beside=dict(equal=Times("mrss_proxy_results", EQUAL, SPLIT, {"experiment": "designs", "pass": "forward", "batch": max}),
                    halved=design_speed(SPLIT, experiment="designs in half precision"), training=design_speed(SPLIT, "forward+backward"), mild=design_speed(MILD), coarse=design_speed(COARSE))),
    Finding(
        "split_error", MRSS, "What does that cost in quality?", design_error("digits"),
        "On digits read pixel by pixel, a task not made for it, the error after equal training is {value} the baseline's, and {equal} that of a low-rank mixing of "
        "as much compute.",
        below="Nothing: {short} the error.", above="{short} the error.", undecided="Undecided on data not made for it.",
        more="On several time scales {scales}; on short ones, where it cannot help, {control}. Digits with three quarters of the "
             "channels at an eighth: {mild}; with seven eighths at a sixteenth: {coarse}.",
        beside=dict(equal=design_error("digits", other=EQUAL), scales=design_error("multi-timescale"), control=design_error("short-timescale"),
                    mild=design_error("digits", MILD), coarse=design_error("digits", COARSE))),
    Finding(
        "signals", SIGNALS, "And on signals that nobody made for it?", signal_error("terrain"),
        "On the heights of a terrain, SplitMRSS with seven eighths of its channels slow has {value} the baseline's error, on text (the next byte of a library's source) "
        "{text}. Against a low-rank mixing of as much compute and as long a memory: {land} and {letters}; with twice its rank, {land8} and {letters8}.",
        below="{short} the baseline's error on a smooth one, {land_short} that of equal compute.",
        above="{short} the baseline's error on a smooth one, {land_short} that of equal compute.",
        beside=dict(text=signal_error("text"), land=signal_error("terrain", other="Dilated LowRank D/16"), letters=signal_error("text", other="Dilated LowRank D/16"),
                    land8=signal_error("terrain", other="Dilated LowRank D/8"), letters8=signal_error("text", other="Dilated LowRank D/8"))),
    Finding(
        "modalities", SIGNALS, "Should a slow modality be given the slow channels?",
        signal_error("airport", "SplitMRSS α=0.5, aligned", "SplitMRSS α=0.5, swapped"),
        "On an airport's year, with its departures (fast) and the weather of the hour (slow: it changes every eighth step, the slow channels' rate) in one sequence, that "
        "has {value} the error of the other way round, and {full} that of the same layer with all channels at the full rate.",
        below="Yes: {short} the error.", above="No: {short} the error.",
        beside=dict(full=signal_error("airport", "SplitMRSS α=0.5, aligned", "Dilated twin α=0.5, aligned"))),
    Finding(
        "scan_attention", LAYERS, "Mamba or attention at my length?", layer_speed(ATTENTION, MAMBA2),
        "At {length} tokens a whole Mamba-2 layer of {size_states} states, with the scan written here, is {value} as fast as an attention layer, each in its faster "
        "precision, and takes {memory} instead of {attention_memory}; at {early_length} attention is {early} as fast. With half as many states Mamba-2 leads {few_told}.",
        below="Attention, up to {length} tokens.", above="Our Mamba-2 {start_told}.", undecided="Undecided at {length} tokens.",
        more="Width {size_width}, one sequence; Mamba-2 then has {size_params_over_attention:.1f} times the parameters of attention, which has no "
             "MLP here.",
        beside=dict(start=Start("scan_layers", ATTENTION, MAMBA2, "length", "attention"), early=layer_speed(MAMBA2, ATTENTION, min),
                    memory=layer_memory(MAMBA2), attention_memory=layer_memory(ATTENTION),
                    size=layer_speed(ATTENTION, MAMBA2, words=("width", "states", "params_over_attention")),
                    few=Start("scan_layers", ATTENTION, FEW_STATES, "length", "attention"))),
    Finding(
        "scan_decode", LAYERS, "Does a state decode faster than a cache?", decode_speed(ATTENTION, dict(variant="Mamba-2")),
        "After {context} tokens, a Mamba-2 layer decodes {value} as fast as an attention layer; after {early_context} attention decodes {early} as fast.",
        below="No, up to {context} tokens.", above="Our Mamba-2 {start_told}.",
        beside=dict(start=Start("scan_decode", ATTENTION, dict(variant="Mamba-2"), "context", "attention"),
                    early=decode_speed(dict(variant="Mamba-2"), ATTENTION, min))),
    Finding(
        "scan_library", SCAN, "Is our scan faster than others in plain PyTorch?", scan_form(),
        "Mamba-2's scan of {length} tokens with {states} states is {value} as fast as the four sums of its paper, written plainly, with their best chunk "
        "length, both through torch.compile {compiled}; with gradients {training}, at {training_length}. S6, Mamba's scan, with gradients against mambapy: {s6} at "
        "{s6_length} tokens, {s6_short} at {s6_short_length}.",
        below="No: {short} as fast.", above="For Mamba-2 on this CPU, yes: {short} as fast.",
        more="Against the transformers library's PyTorch path, with its best chunk length, {library}.",
        beside=dict(training=scan_form(kind="forward+backward"), compiled=scan_form("minimal, compiled", "ours, compiled"), library=scan_form("transformers"),
                    s6=s6_speed(max), s6_short=s6_speed(min))),
    Finding(
        "multirate_error", MULTI, "Do several rates help a real scan?",
        copied("half at 1/4"),
        "With half the heads at a quarter of the rate, a Mamba-2 block makes {value} the errors of the full rate when it copies; with three quarters at an eighth {most}.",
        below="Yes: {short} the errors.", above="Not for free: {short} the errors.",
        more="At {speed_length} tokens it is {speed} as fast.",
        beside=dict(most=copied("three quarters at 1/8"), speed=Times("scan_multirate", dict(variant="full rate"), dict(variant="half at 1/4"),
                                {"pass": "forward", "length": max}))),
    Finding(
        "router", MULTI, "Does a learned router beat a fixed stride?", routed("every 4th token"),
        "A router that chooses which tokens enter the second layer, causally, makes {value} the errors of taking every fourth token, "
        "when it copies.",
        below="Yes: {short} the errors.", above="No: {short} the errors.", more="With all tokens in the second layer: {whole}.",
        beside=dict(whole=routed("all tokens"))),
    Finding(
        "distil_decode", DISTIL, "Does a long convolution decode faster as a state space?", decoding(dict(method="blocked", us_per_token=min)),
        "A kernel that is a state space of {rank} modes, such as an S4D of twice that order, decodes {value} as fast as the exact convolution of "
        "{taps} taps in blocks of the best size tried.",
        below="No: {short} as fast.", above="Yes, if the kernel is one: {short} as fast.",
        more="Next to the plain convolution it is {plain} as fast; with a whole prompt {prompt}, next to an FFT.",
        beside=dict(plain=decoding(dict(method=begins("explicit"), us_per_token=min)),
                    prompt=Times("kernel_distillation_latency", dict(method="explicit"), dict(method="hankel", rank=8),
                                 dict(phase="prefill", kernel="per channel", taps=max)))),
    Finding(
        "distil_error", DISTIL, "Can a trained long convolution be stored in ten times fewer numbers?", distilled_error("text"),
        "Convolutions trained on text with free taps and then stored in ten times fewer numbers have {value} relative output "
        "error, by the best method for each.",
        limit=0.01, below="Yes, within one per cent.", above="Not within one per cent: {short} output error.",
        more="The task's own error becomes {task} what it was. On digits {digits}; trained as state spaces, on text, {s4d}.",
        beside=dict(task=distilled_error("text", then="task_error_ratio", unit="×"), digits=distilled_error("digits"), s4d=distilled_error("text", "s4d"))),
    Finding(
        "vision_speed", SEES, "Is a scan over patches faster than attention?", seeing_speed(),
        "At {length} patches two Vision Mamba blocks are {value} as fast as a transformer layer with as many parameters, each in its faster "
        "precision, and {early} at {early_length}.",
        below="No, up to {length} patches: {short} as fast.", above="At {length} patches, {short} as fast; not at {early_length}.",
        beside=dict(early=seeing_speed(min))),
    Finding(
        "vision_error", SEES, "Does it see as well?", seeing_error("transformer, as long"),
        "On handwritten digits, with as many parameters, Vision Mamba (written here on Mamba-2's scan) makes {value} the errors of a transformer that is trained "
        "in more and cheaper steps, which take {seconds} as many seconds; with four directions, a tenth more parameters and {four_seconds} its seconds, {four}.",
        below="Better, on digits: {short} the errors.", above="No: {short} the errors.", undecided="Undecided on digits.",
        more="With as many steps: {same}.",
        beside=dict(same=seeing_error("transformer"), seconds=seeing_seconds(), four=seeing_error("transformer, as long", "four directions"),
                    four_seconds=seeing_seconds("four directions", "transformer, as long"))),
    Finding(
        "scan_clip", SCAN_CLIP, "Can a scan stand in for attention in a pretrained CLIP?", hybrid("cosine_mean"),
        "With a scan in every second layer, initialised from its queries, keys and values and distilled for minutes, the feature has a cosine of "
        "{value} to the original's (with the mean of values in its place, trained alike, {mean}), and {names} of the answers among ImageNet's names stay; the class token keeps its "
        "attention. Before the training end to end it is {scan}, linear attention's {linear}. At {speed_length} patches one such mixing is {speed} as fast as attention.",
        limit=0.93, below="Not closely: cosine {short}.", above="Nearly, in every second layer: cosine {short}.",
        more="The gain over the mean of values: {gain}.",
        beside=dict(gain=hybrid("cosine_minus_mean"), mean=hybrid("cosine_mean", "mean of values"), names=hybrid("names_agreement", unit="%"),
                    scan=hybrid("cosine_mean", fit="layer-wise"), linear=hybrid("cosine_mean", "linear attention", "layer-wise"),
                    speed=Times("scan_clip_speed", *(dict(variant=begins(name), latency_ms_median=min) for name in ("attention", "scan, n = 16, exact")), dict(length=min)))),
    Finding(
        "original", PRUNING, "Does the original token pruning keep the accuracy?",
        Cell("clip_vtp_results", "accuracy_minus_dense", dict(rule="drop", keep_ratio=0.7), "points", ("share_of_dense_macs", "image_set")),
        "On {image_set}, with {share_of_dense_macs:.0%} of the multiply-adds left, class-name accuracy changes by {value}.",
        limit=-0.01, below="No: {short} lost.", above="Yes: at most one point lost."),
    Finding(
        "merging", MERGING, "How much of the image's feature survives merging?", feature_kept("ours"),
        "On {image_set}, with {share_of_dense_macs:.0%} of the multiply-adds, our merging keeps the feature at a cosine of {value} to the whole "
        "encoder's; ToMe {tome}, the original rule {vtp}.",
        limit=None, above="Cosine {short}.",
        beside=dict(tome=feature_kept("tome"), vtp=feature_kept("vtp"))),
    Finding(
        "tokens_free", REDUCTION, "How many tokens can go without losing accuracy?", reduced("accuracy_minus_dense", budget=0.7, unit="points"),
        "On {image_set}, merging similar tokens our way until {macs_share:.0%} of the multiply-adds are left changes class-name accuracy by {value}, to {accuracy}; with the "
        "ImageNet names that belong to each class instead, by {clean}. Of the answers among all ImageNet's names {names} stay.",
        limit=-0.01, below="Fewer: {short} lost.", above="Down to {tokens_last} of {whole} tokens, seven tenths of the compute: less than one point lost.",
        more="{agreement} of the answers stay. At {half_macs_share:.0%} the change is {half}.",
        beside=dict(whole=Cell("token_reduction_methods", "tokens_last", dict(method="dense_cls", budget=min)), accuracy=reduced("top1_accuracy", budget=0.7), names=reduced("names_agreement", budget=0.7), clean=reduced("zero_shot_accuracy_minus_dense", budget=0.7, unit="points"), agreement=reduced("top1_agreement", budget=0.7),
                    half=reduced("accuracy_minus_dense", unit="points"))),
    Finding(
        "tokens_half", REDUCTION, "How many answers stay at half the compute?", reduced("top1_agreement"),
        "On {image_set}, with {macs_share:.0%} of the multiply-adds, our merging keeps {value} of the class-name answers and {names} of those among "
        "ImageNet's names; ToMe {tome} and {tome_names}, the original rule (largest patch norm) {vtp} and {vtp_names}.",
        limit=None, above="{short} among ten class names, {names_short} among ImageNet's.",
        beside=dict(names=reduced("names_agreement"), tome=reduced("top1_agreement", "tome"), tome_names=reduced("names_agreement", "tome"),
                    vtp=reduced("top1_agreement", "vtp"), vtp_names=reduced("names_agreement", "vtp"))),
    Finding(
        "tokens_tome", REDUCTION, "Is that better than ToMe?", reduced("agreement_minus_tome", unit="points"),
        "On the same {image_set}, with {macs_share:.0%} of the multiply-adds, {value} of class-name answers that stay; in accuracy the difference is {accuracy}, "
        "at {most_macs_share:.0%} of the multiply-adds {most}.",
        limit=0.0, below="No: {short} fewer answers stay.", above="Yes: {short} more answers stay.",
        beside=dict(accuracy=reduced("accuracy_minus_tome", unit="points"), most=reduced("accuracy_minus_tome", budget=0.7, unit="points"))),
    Finding(
        "photos", PHOTOS, "And on photographs?", on_photographs("names_agreement_minus_tome", unit="points"),
        "On photographs, with {macs_share:.0%} of the multiply-adds, {value} of answers that stay, compared with ToMe; the answers are ImageNet's names. Ours keeps "
        "{agreement} of them, ToMe {tome}, a smaller image, at {smaller_macs_share:.0%}, {smaller}.",
        limit=0.0, below="No: {short} fewer than ToMe.", above="Yes: {short} more than ToMe.",
        undecided="Undecided against ToMe.",
        more="The feature's cosine with ours: {cosine}.",
        beside=dict(agreement=on_photographs("names_agreement"), cosine=on_photographs("cosine_mean", unit=""),
                    tome=on_photographs("names_agreement", "tome"), smaller=on_photographs("names_agreement", "smaller_input"))),
    Finding(
        "tokens_time", REDUCTION, "Does the saving show on the clock?", reduced_time(),
        "At half the multiply-adds it is {value} as fast as the whole encoder with {batch} images at a time.",
        below="No: {short} as fast.", above="Yes, {batch} images at a time: {short} as fast.", more="With {small_batch} images: {small}.",
        beside=dict(small=reduced_time(batch=min))),
    Finding(
        "tokens_input", REDUCTION, "Would a smaller image do as well?", reduced("agreement_minus_ours", "smaller_input_over", unit="points"),
        "With {image_set} scaled down to {macs_share:.0%} of the multiply-adds, {value} of class-name answers that stay, compared with ours at half, in accuracy {accuracy}; to "
        "{under_macs_share:.0%}, the next size, {under} and {under_accuracy}.",
        limit=0.0, below="{short} fewer answers stay; in accuracy {accuracy}.", above="Yes: {short} more answers stay.", undecided="No difference from ours was found.",
        more="The smaller of the two is {speed} as fast as the whole encoder.",
        beside=dict(accuracy=reduced("accuracy_minus_ours", "smaller_input_over", unit="points"), under_accuracy=reduced("accuracy_minus_ours", "smaller_input", unit="points"),
                    under=reduced("agreement_minus_ours", "smaller_input", unit="points"), speed=reduced_time("smaller_input"))),
    Finding(
        "scaling", SCALING, "Does it pay more on larger images?", image_speed(max),
        "One image of {side} pixels a side, half the multiply-adds: {value} as fast as the whole encoder; {small} at "
        "{small_side}.",
        below="No: {short} as fast.", above="{short} as fast.", beside=dict(small=image_speed(min))),
    Finding(
        "crossing", SCALING, "When does attention's square take over?",
        Cell("token_scaling_fits", "crossing_tokens", dict(shape="random-vit-b-16", batch=1, dtype="float32", attention="sdpa",
                                                           method="dense"), "tokens", ("tokens_min", "tokens_max")),
        "In a whole encoder of ViT-B/16's shape the quadratic term overtakes the linear ones at {value}, by a fit to images of {tokens_min} to {tokens_max} tokens; as a rule "
        "its images have {tokens_min}.",
        limit=197, above="Not at the {tokens_min} tokens of its images.", below="Already at {tokens_min} tokens."),
    Finding(
        "hardware", HARDWARE, "What should be tried before dropping tokens?",
        form_speed(tokens="all tokens, CLS-only last layer", precision=differs("float32"), latency_ms_median=min),
        "With all tokens and {batch} images at a time, {precision} is {value} as fast as single precision, at a cosine of {cosine_mean:.4f}; merging half of the "
        "multiply-adds away in {both_precision}, {both}, at {both_cosine_mean:.3f}.",
        below="Nothing: {short} as fast.", above="{precision}, on this device: {short} as fast.", more="Merging alone: {merged}.",
        beside=dict(both=form_speed(tokens="merged", latency_ms_median=min), merged=form_speed(form="float32 · merged"))),
    Finding(
        "qwen", QWEN, "Where does dropping vision tokens save a Qwen2.5-VL-class model most time?",
        place_speed("inside", "before"),
        "With a quarter of the tokens kept, a prompt with a picture of {side} pixels is read {value} as fast if they go before the vision tower rather than inside it, and "
        "{behind} if inside rather than behind it "
        "(a small model of the same shape with random weights: answers are not judged). Over all tokens: before the tower {before}, inside {inside}, behind it {after}, in "
        "the language model {language}; a picture with a quarter of the pixels {image}.",
        below="Inside the vision tower, or behind it.", above="Before the vision tower: {short} as fast as inside it.",
        beside=dict(behind=place_speed("after", "inside")) | {where: prompt_speed(where) for where in ("before", "inside", "after", "language", "image")}),
    Finding(
        "fusion", FUSION, "At half the compute: thinner layers or fewer tokens?",
        Cell("low_rank_grid", "names_agreement_minus_ours", dict(budget=0.5, keep=1.0), "points", ("params_share", "image_set")),
        "On {image_set}, with heads and hidden layers thinned (and repaired) to half of the multiply-adds, {value} of answers that stay, compared with merging "
        "tokens to the same budget; the answers are ImageNet's names.",
        limit=0.0, below="Fewer tokens: thinning loses {short}.", above="Thinner layers: {short} more.", undecided="Undecided."),
    Finding(
        "few_shot", SHOTS, "What do a few labels add?", few_labels("GDA"),
        "On {domain}, with {shots} labelled images a class, Gaussian discriminant analysis answers {value} more than the head made of names alone.",
        limit=0.0, below="Nothing: {short}.", above="{short}.",
        more="With {one_shots} a class {one}; there, adding the class means to the texts brings {means}.",
        beside=dict(one=few_labels("GDA", shots=min), means=few_labels("text + class mean", shots=min))),
    Finding(
        "masked", MASKED, "Does masking pay when a CLIP is trained for equal time?", masked("random 50 %"),
        "A small CLIP from scratch that sees a random half of every image, trained for the {seconds:.0f} seconds that dense training takes, changes class accuracy by {value}, to {accuracy:.1%}; "
        "three quarters hidden {most}, half hidden by clusters {cluster}, half the batch instead {half}, a smaller image {smaller}.",
        limit=0.0, below="No: {short} lost.", above="Yes: {short} more.", undecided="Undecided for a random half; three quarters hidden: {most}.",
        beside=dict(most=masked("random 75 %"), half=masked("half the batch"), smaller=masked("smaller image"), cluster=masked("cluster 50 %"))),
    Finding(
        "queries", QUERIES, "Do learned queries beat pooling?", queried("qformer"),
        "After {train_s:.0f} seconds of training on two cores, a small Q-Former from a random start that hands on {tokens} tokens changes the right answers about mosaics by "
        "{value}, compared with average pooling to as many; with queries that start from a place {place}.",
        limit=0.0, below="No: {short} lost.", above="Yes: {short} more.", beside=dict(place=queried("place"))),
    Finding(
        "compressed", COMPRESSED, "Does compressing a CLIP beat training a smaller one?", compressed("two steps"),
        "A small CLIP distilled into fewer layers and then pruned by gates to half of its layers' weights has {value} of class accuracy, compared with a "
        "model of half the layers that was trained from the start for the time of both; the uncompressed teacher, which was trained for less, {teacher}.",
        limit=0.0, below="No: {short} lost.", above="Yes: {short} more.",
        more="Gates alone {gates}; half of the layers, distilled, {layers}; heads and channels chosen by chance {random}.",
        beside=dict(teacher=compressed("teacher"), gates=compressed("gates"), layers=compressed("everything"), random=compressed("random"))),
]
