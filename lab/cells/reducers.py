"""What every token reducer is made of: its three places in the encoder, scores, dropping and merging."""

import torch

from lab.cells.environment import check


class Reducer:
    """Base class; does nothing. Subclasses override one of the three places where tokens may leave.

    kind: 'keep' (its strength is a keep ratio in (0, 1]) or 'merge' (mean tokens merged per layer, >= 0).
    cls_only_last: compute only the CLS row of the last layer, which is exact where the CLS token is read.
    size_bias: weight of the log size on attention's logits; 1 lets a merged token count as often as its parts."""

    kind = "keep"
    cls_only_last = False
    size_bias = 1.0

    def at_input(self, tokens):
        """Before the first layer (and CLIP's first norm), positions already added."""

    def before_layer(self, tokens):
        """Before layer `tokens.layer`; q, k, v are those of the layer before."""

    def after_attention(self, tokens):
        """Inside layer `tokens.layer`: its attention is done, its MLP is next."""


def check_keep(keep):
    """Validate a keep ratio."""
    ok = isinstance(keep, (int, float)) and not isinstance(keep, bool) and 0 < keep <= 1
    check(ok, "keep ratio", keep, "a number above 0 and at most 1")
    return float(keep)


def kept_count(keep, n):
    """Tokens that remain of n: rounded up, at least one."""
    return min(n, max(1, -int(-keep * n // 1)))


def importance(tokens, by_value=False, samples=16):
    """(B, N - prefix): attention that the CLS token pays to every other token, mean over heads.

    by_value: times the length of the token's value vector. Without a CLS token: the mean over `samples`
    evenly spaced queries. Reuses the layer's q, k and v."""
    n = tokens.q.shape[2]
    rows = slice(0, 1) if tokens.prefix else slice(0, n, max(1, n // samples))
    q = tokens.q[:, :, rows]
    logits = q @ tokens.k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits if tokens.logits_bias is None else logits + tokens.logits_bias
    tokens.macs += q.shape[1] * q.shape[2] * tokens.k.shape[2] * q.shape[3]
    attention = torch.softmax(logits.float(), dim=-1).mean(2)
    attention = attention * tokens.v.float().norm(dim=-1) if by_value else attention
    return attention.mean(1)[:, tokens.prefix:]


def top_indices(scores, count):
    """(B, count) indices of the highest scores, in ascending order, so that tokens keep their order."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def split_kept(tokens, scores, count):
    """Indices into all N tokens: (B, prefix + count) kept, prefix first, and (B, rest) in token order."""
    order = scores.argsort(dim=1, descending=True, stable=True) + tokens.prefix
    front = torch.arange(tokens.prefix, device=order.device).repeat(len(order), 1)
    kept, rest = order[:, :count].sort(1).values, order[:, count:].sort(1).values
    return torch.cat([front, kept], 1), rest


def take(x, index):
    """x (B, N, D) at index (B, M) → (B, M, D); whole rows are copied, which is faster than gather."""
    batch, n, width = x.shape
    rows = index + torch.arange(0, batch * n, n, device=x.device)[:, None]
    return x.reshape(-1, width).index_select(0, rows.flatten()).view(batch, -1, width)


def track(tokens, kept, rest=None, target=None):
    """Record where every patch went: `rest` joins `target` (positions among the kept), else it is dropped."""
    if tokens.owner is None:
        return
    where = torch.full(tokens.x.shape[:2], -1, device=kept.device)
    where.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
    if rest is not None:
        where.scatter_(1, rest, target)
    moved = where.gather(1, tokens.owner.clamp(min=0))
    tokens.owner = torch.where(tokens.owner < 0, tokens.owner, moved)


def drop(tokens, kept):
    """Keep the tokens `kept` (B, M), prefix included; the others are gone."""
    track(tokens, kept)
    if tokens.sizes is not None:
        tokens.sizes = tokens.sizes.gather(1, kept)
    tokens.x = take(tokens.x, kept)


def append(tokens, token, size=None):
    """Add one token (B, D) at the end; size: (B,) patches that it stands for, or None for a plain token."""
    if tokens.sizes is not None or size is not None:
        sizes = tokens.x.new_ones(tokens.x.shape[:2]) if tokens.sizes is None else tokens.sizes
        tokens.sizes = torch.cat([sizes, torch.ones_like(sizes[:, :1]) if size is None else size[:, None]], 1)
    tokens.x = torch.cat([tokens.x, token[:, None]], 1)


def merge_naive(tokens, kept, rest, target, keep_norm=False):
    """What `merge` computes, one image and one group at a time: the definition, to check the fast one."""
    sizes = tokens.sizes if tokens.sizes is not None else torch.ones_like(tokens.x[..., 0])
    x, size = take(tokens.x, kept), sizes.gather(1, kept)
    for image, i in [(b, t) for b in range(len(x)) for t in set(target[b].tolist())]:
        group = torch.cat([kept[image, i : i + 1], rest[image, target[image] == i]])
        share = sizes[image, group] / sizes[image, group].sum()
        mean = share @ tokens.x[image, group]
        length = (share @ tokens.x[image, group].norm(dim=-1)) / mean.norm() if keep_norm else 1.0
        x[image, i], size[image, i] = mean * length, sizes[image, group].sum()
    return x, size


def merge(tokens, kept, rest, target, keep_norm=False):
    """Merge token rest[b, i] into kept[b, target[b, i]]: mean weighted by size, sizes add up.

    kept (B, M), rest and target (B, R). keep_norm=True gives a merged token the mean length of its parts
    instead of the shorter length of their mean. Sums in float32. Only rows that change are computed with."""
    track(tokens, kept, rest, target)
    x = tokens.x.float()
    sizes = tokens.sizes if tokens.sizes is not None else x.new_ones(x.shape[:2])
    new, parts, before = take(x, kept), take(x, rest), take(x, kept.gather(1, target))
    part_sizes = sizes.gather(1, rest)
    tokens.sizes = sizes.gather(1, kept).scatter_add_(1, target, part_sizes)
    share = part_sizes / tokens.sizes.gather(1, target)
    rows = (target + torch.arange(0, kept.numel(), kept.shape[1], device=x.device)[:, None]).flatten()
    flat = new.view(-1, x.shape[-1])
    flat.index_add_(0, rows, ((parts - before) * share[..., None]).flatten(0, 1))
    if keep_norm:
        length = before.norm(dim=-1)
        longer = torch.zeros_like(tokens.sizes).scatter_add_(1, target, (parts.norm(dim=-1) - length) * share)
        merged = flat.index_select(0, rows)
        wanted = (length + longer.gather(1, target)).flatten() / merged.norm(dim=-1).clamp(min=1e-6)
        flat.index_copy_(0, rows, merged * wanted[:, None])
    tokens.x = new.to(tokens.x.dtype)
