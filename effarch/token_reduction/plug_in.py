"""Use a reducer through unmodified calls of transformers, timm and open_clip."""

import math
import warnings
from contextlib import contextmanager
from copy import copy

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from effarch.checks import check
from effarch.clip.towers import make_tower, sides_of
from effarch.clip.towers.base import (
    home_of,
    hooked,
    moved,
    patched,
    refuse_attention,
    refuse_settings,
    settings,
)
from effarch.token_reduction.encoder import (
    Reducer,
    continue_encoder,
    pooled_output,
    refuse_dropout,
    start_encoder,
    take,
)

# models of transformers that read the pooled output only, and those whose head reads the CLS token out of last_hidden_state
READ_POOLED = {"CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel"}
READ_FIRST = {"ViTForImageClassification"}
SHORT_OF_BUDGET = 0.02  # of the dense multiply-adds: where a method has no strength nearer to the budget, it is told
NOT_INSIDE = ("output_attentions", "bool_masked_pos", "noise", "attention_mask", "head_mask")


@contextmanager
def token_reduction(model, reducer, budget=None, patch_tokens=None, **options):
    """Within the `with` block every call of `model` by its own library runs its vision tower with fewer tokens.

        with token_reduction(model, "ours", budget=0.5):
            features = model.get_image_features(pixel_values=pixels)

    reducer: a name of REDUCERS with `budget`, the share of the dense multiply-adds it may use (and `options` of
    `reducer_for_budget`), or a Reducer. The budget holds for images of every size: the first call of a size fits the
    reducer to it (DINOv2's configuration says 518 pixels, its image processor 224), unless `image_size` says one for all.
    (Under torch.compile that call breaks the graph.) Calls of transformers (also pipelines), timm and open_clip work unchanged.
    patch_tokens: whether somebody reads the patches in `last_hidden_state`; None: everybody but CLIPModel, SiglipModel,
    CLIPVisionModelWithProjection, ViTForImageClassification and open_clip, which read the pooled output or the CLS
    token (a class of one's own with a forward of its own is somebody). Then all tokens are computed in the last layer, too, and
    every patch that was merged gets its group's token, so that a mean over patches stays right; dropped patches are missing, and
    the summary token of vtp_mean, vtp_learned and evit is one more, the last. Where nobody does, `last_hidden_state` is None, and
    reading it at place 0 of an output one line; where a head reads the CLS token there, it is that, with NaN in the place of every
    patch. With patch_tokens=False it is what is left, in an order of its own, or the same None or NaN if only the CLS token was computed.

    What works inside: `output_hidden_states=True` (every patch with its group's token; not with dropped patches; a budget holds for
    it, too: its last layer is whole), autocast, gradients, torch.compile (not with fullgraph=True: the reducer is copied at every
    call), calls from several threads (the model is reduced for all of them), deepcopy and pickle (of the model as it is outside),
    save_pretrained. A loop of one's own over the tower's layers would keep all tokens: calling a layer or its attention by itself is a
    ValueError inside, and a block that ends without any forward reduced (although tokens had to leave) warns. So does a budget
    that the method stays more than 2 % of the dense multiply-adds below, as it has few strengths in a shallow tower. What is checked
    at a call is not while it is compiled. Checkpointing of gradients saves nothing here, and nn.DataParallel's copies are not supported. On exit, also after an exception, the model is exactly what it was.

    Raises TypeError for an unsupported model (also one with a forward or a registered attention of its own in its tower, or with
    attention that is told to be causal, say) and for a reducer that is none, ValueError for an unknown name, a budget that cannot be
    reached, and for what is not available inside: attention maps, masks, dropout in attention, torch.jit.trace, offloaded weights, modules that were replaced or patched inside (an
    adapter of peft has to be there before), and hooks on what is not called, since of a layer only its norms, its MLP and the
    projections of its attention are."""
    check(patch_tokens is None or isinstance(patch_tokens, bool), "patch_tokens", patch_tokens, "None, True or False")
    tower, reads = make_tower(model), reader(model)
    first, shown = tower.prefix and (reads in READ_FIRST or not tower.pools), patch_tokens is not None
    check(not any(p.is_meta for p in tower.module.parameters()), "weights", "meta (offloaded)",
          "on a CPU or GPU: load the vision tower without offloading")
    if patch_tokens is None:
        inside = tower.library == "open_clip" and not tower.module.output_tokens
        patch_tokens = not (inside or reads in READ_POOLED | READ_FIRST)
    named, method = isinstance(reducer, str), reducer
    reducer = find_reducer(model, reducer, budget, patch_tokens, options)
    seen = tower.skipped(), tower.places(), settings(tower.attentions())
    refuse(tower, *seen)
    told = options.get("image_size") if named else None
    fitted_to = {(sides_of(told or tower.image_size), False): reducer}  # ((height, width), whole last layer) → whose budget holds for it

    @torch.compiler.disable
    def fit(sides, whole):
        last = dict(cls_only_last=False) if whole else {}
        fitted_to[sides, whole] = find_reducer(model, method, budget, patch_tokens, options | dict(image_size=sides) | last)

    def reducer_at(sides, hidden):
        if not named:
            return reducer
        at = sides if told is None else sides_of(told), hidden and reducer.cls_only_last
        if at not in fitted_to:
            fit(*at)
        return fitted_to[at]

    def reduce(pixels, interpolate=None, hidden=False):
        if not torch.compiler.is_compiling():
            refuse(tower, *seen)
        tower.check_pixels(pixels)
        own = reducer_at(tuple(pixels.shape[-2:]), hidden)
        own = copy(own) if named or hidden else own  # some remember their pass, which two threads must not share
        if hidden:
            own.cls_only_last = False
        return run(tower, pixels.to(tower.patch.weight.dtype), own, patch_tokens, interpolate, hidden)

    def last_of(last, tokens):
        only_first = tower.prefix == 1 and last.shape[1] == 1  # by the shortcut of the last layer
        if patch_tokens or shown and not only_first:
            return last
        return F.pad(last[:, :tower.prefix], (0, 0, 0, math.prod(tokens.grid)), value=math.nan) if first else None

    stand_ins = []
    try:
        for name, function in CALLS[tower.library](tower, reduce, last_of, patch_tokens).items():
            stand_ins.append(StandIn(tower.module, name, function))
        names = {part: name for name, part in tower.module.named_modules()}
        for part in dict.fromkeys(part for block in tower.blocks for part in (block.layer, *block.attentions())):
            stand_ins.append(StandIn(part, "forward", alone(names.get(part, type(part).__name__))))
        yield model
        warn_of_dense(model, tower, reducer, budget, any(stand_in.called for stand_in in stand_ins))
    finally:
        for stand_in in stand_ins:
            stand_in.leave()


def reader(model):
    """Name of the class of transformers whose forward a model has, whatever its own name is; None if it is written elsewhere."""
    model = getattr(model, "_orig_mod", model)  # inside what torch.compile made
    written = next(base for base in type(model).__mro__ if "forward" in vars(base))
    return written.__name__ if home_of(written) == home_of(written.forward) == "transformers" and not patched(model) else None


def find_reducer(model, reducer, budget, patch_tokens, options):
    """The Reducer that `token_reduction` uses: the one given, or the named one at its budget."""
    if isinstance(reducer, str):
        from effarch.token_reduction.selection import reducer_for_budget

        check(budget is not None, "budget", budget, f"a share of the multiply-adds, above 0 and at most 1, for {reducer!r}")
        whole = patch_tokens and options.get("cls_only_last")
        check(not whole, "cls_only_last", True, "None or False where the patches are read (patch_tokens=False if they are not)")
        options = dict(dict(cls_only_last=False if patch_tokens else None), **options)
        found = reducer_for_budget(reducer, budget, model, **options)
        if not idle(found) and budget - found.macs_share > SHORT_OF_BUDGET:
            warnings.warn(f"token_reduction: {reducer!r} takes {found.macs_share:.3f} of the dense multiply-adds for budget={budget}: "
                          "its next step in this tower is above", stacklevel=4)
        return found
    if not isinstance(reducer, Reducer):
        raise TypeError(f"reducer={reducer!r} is not supported; supported: a name of REDUCERS, or a Reducer")
    check(budget is None and not options, "budget and options", (budget, options), "those of a reducer given by its name")
    if patch_tokens and reducer.cls_only_last:
        reducer = copy(reducer)
        reducer.cls_only_last = False
    return reducer


def idle(reducer):
    """Whether a reducer removes no token: the base class, or one whose strength is none."""
    return type(reducer) is Reducer or getattr(reducer, "keep", None) == 1 or getattr(reducer, "r", None) == 0


def warn_of_dense(model, tower, reducer, budget, called):
    """At the end of a block: say so if no forward was reduced, or if another tower stands in its place."""
    inside = any(part is tower.module for part in model.modules())
    if not (called and inside or idle(reducer) or budget == 1):
        what = "no forward was reduced" if inside else "the vision tower was replaced, and what stands there now is not reduced"
        whole = type(model).__name__ + ("" if tower.module is model else f" or of the {type(tower.module).__name__} that is in it")
        warnings.warn(f"token_reduction: {what} in this block; expected: calls of {whole}, not of single parts or of a copy", stacklevel=4)


def alone(name):
    """What stands in for the forward of a layer, or of its attention."""
    def forward(*args, **kwargs):
        check(False, "call of", name, "the whole model or its vision tower inside token_reduction: a layer called by itself would keep all tokens")
    return forward


def refuse(tower, skipped, places, before):
    """ValueError for what the encoder loop would leave out without a word: dropout in attention, the user's hooks, parts patched or put in the
    place of others; TypeError for an attention of somebody else's, or with settings that the loop does not know."""
    refuse_dropout(tower)
    attentions = tower.attentions()
    refuse_attention([tower.module, *attentions])
    now = settings(attentions)
    if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
        refuse_settings(tower)
    check(not torch.jit.is_tracing(), "torch.jit.trace", "of a reduced model", "torch.compile: what is kept depends on the images")
    others = moved(places)
    check(not others, "modules replaced", others[:3], "none inside token_reduction: what stands there now would not be called")
    own = [name for name, part in skipped.items() if "forward" in vars(part) and not hasattr(part, "_orig_mod") and patched(part)]
    check(not own, "modules patched", own[:3], "none inside token_reduction: not they are called, but their parts")
    held = hooked(skipped)
    check(not held, "hooks on", held[:3], "inside token_reduction, hooks on the tower, or on single norms, linear layers "
          "and MLPs: whole layers are not called")


def run(tower, pixels, reducer, patch_tokens, interpolate, hidden):
    """(Tokens after the last layer, last hidden state, tuple of all hidden states or None) of a reduced pass."""
    tokens, states = start_encoder(tower, pixels, 0, reducer, patch_tokens or hidden, interpolate), []
    for layer in range(tokens.depth + 1):
        if hidden:
            states.append(every_patch(tokens.x, tokens, reducer, "hidden states"))
        if layer < tokens.depth:
            continue_encoder(tower, tokens, reducer, layer, until=layer + 1)
    last = tower.finish(tokens.x)
    return tokens, every_patch(last, tokens, reducer) if patch_tokens else last, tuple(states) if hidden else None


def every_patch(x, tokens, reducer, read="last_hidden_state"):
    """(B, N, D) → (B, prefix + P, D), every merged patch with its group's token, in the order of the image.

    Where patches were dropped: x as it is, without them; ValueError if others were merged or if `read` needs all."""
    lost = int((tokens.owner < 0).sum())
    if lost and tokens.sizes is None and read == "last_hidden_state":
        return x
    which = f"patches dropped by {type(reducer).__name__}" + (", which also merges," if tokens.sizes is not None else "")
    check(not lost, which, lost, f"0 where the patches in {read} are read (patch_tokens=False if they are not)")
    return take(x, tokens.owner)


class StandIn:
    """A function in the place of a module's method, which notes that it was called, also in the inner one of two blocks. A copy or
    pickle of the module has its own method there again."""

    def __init__(self, module, name, function):
        self.module, self.name, self.function, self.before, self.called = module, name, function, vars(module).get(name), False
        setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        one = self
        while isinstance(one, StandIn):
            one.called, one = True, one.before
        return self.function(*args, **kwargs)

    def __reduce__(self):
        return getattr, (self.module, self.name)

    def leave(self):
        """Give the place back; blocks that overlap, as in threads, may end in any order."""
        top = vars(self.module)[self.name]
        if top is self and self.before is None:
            delattr(self.module, self.name)
        elif top is self:
            setattr(self.module, self.name, self.before)
        else:
            while top.before is not self:
                top = top.before
            top.before = self.before


class PooledOnly(BaseModelOutputWithPooling):
    """An output without its last hidden state, whose place the next one does not take: [1] is the pooled output, [0] a ValueError."""

    def to_tuple(self):
        return None, *super().to_tuple()

    def __getitem__(self, place):
        check(place != 0, "last_hidden_state", None, "pooler_output inside token_reduction; patch_tokens=True where the patches are read")
        return super().__getitem__(place)


def calls_of_transformers(tower, reduce, last_of, patch_tokens):
    """{method: what stands in for it} of a module of transformers."""
    config = tower.module.config

    def forward(pixel_values=None, *, interpolate_pos_encoding=False, return_dict=None, output_hidden_states=None, **rest):
        wanted = {name: getattr(config, name, None) if rest.get(name) is None else rest[name] for name in NOT_INSIDE}
        for name, value in wanted.items():
            value = type(value).__name__ if isinstance(value, torch.Tensor) else value
            check(value is None or value is False, name, value, "None or False inside token_reduction")
        hidden = getattr(config, "output_hidden_states", False) if output_hidden_states is None else output_hidden_states
        check(isinstance(hidden, bool), "output_hidden_states", hidden, "True or False inside token_reduction")
        check(pixel_values is not None, "pixel_values", None, "images (B, 3, H, W)")
        tokens, last, states = reduce(pixel_values, bool(interpolate_pos_encoding), hidden)
        pooled, last = pooled_output(tower, tokens) if tower.pools else None, last_of(last, tokens)
        if tower.output is not None:
            output = tower.output(last, pooled, states, pixel_values)
        else:
            kind = PooledOnly if last is None else BaseModelOutputWithPooling
            output = kind(last_hidden_state=last, pooler_output=pooled, hidden_states=states)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    return dict(forward=forward)


def no_intermediates(*args, **kwargs):
    """Stands in for what would run whole layers."""
    raise ValueError("intermediate layers are not available inside token_reduction; allowed: forward, forward_features")


def calls_of_timm(tower, reduce, last_of, patch_tokens):
    """The same of a module of timm, whose own head pools what forward_features returns."""
    check(patch_tokens, "patch_tokens", patch_tokens, "None or True for a model of timm, whose own head pools")

    def forward_features(x, attn_mask=None, is_causal=False):
        check(attn_mask is None and not is_causal, "attn_mask", "given", "None inside token_reduction")
        return reduce(x)[1]

    others = ("forward_intermediates", "get_intermediate_layers")
    return dict({name: no_intermediates for name in others if hasattr(tower.module, name)}, forward_features=forward_features)


def calls_of_open_clip(tower, reduce, last_of, patch_tokens):
    """The same of open_clip's own ViT."""
    module = tower.module
    check(patch_tokens or not module.output_tokens, "patch_tokens", patch_tokens, "None or True with output_tokens=True")

    def forward(x):
        tokens, last, _ = reduce(x)
        pooled = pooled_output(tower, tokens)
        pooled = pooled if module.proj is None else pooled @ module.proj
        return (pooled, last[:, 1:]) if module.output_tokens else pooled

    return dict(forward=forward, forward_intermediates=no_intermediates)


CALLS = dict(transformers=calls_of_transformers, timm=calls_of_timm, open_clip=calls_of_open_clip)
