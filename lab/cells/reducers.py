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
    """x (B, N, D) at index (B, M) → (B, M, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


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


def merge(tokens, kept, rest, target, keep_norm=False):
    """Merge token rest[b, i] into kept[b, target[b, i]]: mean weighted by size, sizes add up.

    kept (B, M), rest and target (B, R). keep_norm=True gives a merged token the mean length of its parts
    instead of the shorter length of their mean. Sums in float32."""
    track(tokens, kept, rest, target)
    x = tokens.x.float()
    sizes = tokens.sizes if tokens.sizes is not None else x.new_ones(x.shape[:2])
    columns = [x, x.norm(dim=-1, keepdim=True)] if keep_norm else [x]
    weighted = torch.cat([*columns, torch.ones_like(x[..., :1])], -1) * sizes[..., None]
    total = take(weighted, kept)
    total.scatter_add_(1, target[..., None].expand(-1, -1, total.shape[-1]), take(weighted, rest))
    size, mean = total[..., -1:], total[..., : x.shape[-1]] / total[..., -1:]
    if keep_norm:
        mean = mean * (total[..., -2:-1] / size / mean.norm(dim=-1, keepdim=True).clamp(min=1e-6))
    tokens.x, tokens.sizes = mean.to(tokens.x.dtype), size[..., 0]
