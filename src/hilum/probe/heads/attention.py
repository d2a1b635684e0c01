"""Heads that learn where to look: attention over the patch tokens of a case.

attention        Curia's block (self- and cross-attention, one head, post-norm), in the layout of the released heads
cross-attention  VoxelFM's one learned query over a projection of the tokens (Linear, 4-head attention, Linear)

A query asks every token the same question, so that the question, not the tokens, is put through the key weights:
q · (W x + b) = (Wᵀ q) · x + const, and the constant falls out of the softmax. Likewise Σ a (V x + b) = V Σ a x + b. One product
with the tokens then serves all lanes and heads, and nothing of the size tokens × tokens or tokens × hidden is made.
Axes in names: M lanes, B cases, L tokens, Q queries or heads, D width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hilum.errors import UsageError
from hilum.probe.heads.head import Array, Task
from hilum.probe.heads.lanes import Draws, Weights
from hilum.probe.heads.token_head import TokenHead
from hilum.probe.heads.tokens import TokenBatch

NORM_EPS = 1e-5
MOST_SELF = 4096  # tokens that a self block compares each with each; longer cases are averaged plane by plane first
TASKS: tuple[Task, ...] = ("classification", "multilabel", "regression", "survival")
Padding = Literal["hidden", "leaks"]


def lane_linear(x: Tensor, weight_MOD: Tensor, bias_MO: Tensor) -> Tensor:
    """(M, B, Q, D) → (M, B, Q, O), each lane with its own weights."""
    found: Tensor = x @ weight_MOD.mT[:, None] + bias_MO[:, None, None]
    return found


def slice_codes(num: int, width: int) -> Tensor:
    """(num, D) sines and cosines of the place in the list of chosen slices (Vaswani 2017, base 10000)."""
    rates = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10000) / width))
    angles = torch.arange(num)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def pool_tokens(
    directions: Tensor, tokens: Tensor, seen: Tensor | None, keep: Tensor | None = None, extra: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ a x with a = softmax(direction · x) over the tokens of each case.

    directions  (M, B, Q, D), or 1 for B
    tokens      (B, L, D) of all lanes, or (M, B, L, D)
    seen        (B, L) False: padding; None: all are tokens
    keep        (M, B, Q, L) dropout of the weights a
    extra       (M, B, Q) logit of one more token that the caller adds himself
    returns     (M, B, Q, D), and the sum of the weights (M, B, Q), 1 but for dropout and `extra`
    """
    lanes, queries = directions.shape[0], directions.shape[2]
    if tokens.ndim == 3:  # one product with the tokens for all lanes and queries
        asked = directions.expand(-1, len(tokens), -1, -1).transpose(0, 1).flatten(1, 2)
        scores = (asked @ tokens.mT).reshape(len(tokens), lanes, queries, -1).transpose(0, 1)
    else:
        scores = directions @ tokens.mT
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if extra is not None:
        scores = torch.cat([scores, extra[..., None]], -1)
    weights = scores.softmax(-1)[..., : tokens.shape[-2]]
    if keep is not None:
        weights = weights * keep
    if tokens.ndim == 3:
        pooled = weights.transpose(0, 1).flatten(1, 2) @ tokens
        pooled = pooled.reshape(len(tokens), lanes, queries, -1).transpose(0, 1)
    else:
        pooled = weights @ tokens
    return pooled, weights.sum(-1)


def self_block(part: Weights, tokens: Tensor, seen: Tensor | None) -> Tensor:
    """LayerNorm(x + attention(x, x, x)), one head; (B, L, D) or (M, B, L, D) → (M, B, L, D). Padding is not attended to.

    part  in_proj_weight (M, 3D, D), … of the names of a released head
    """
    q, k, v = lane_linear(tokens, part["in_proj_weight"], part["in_proj_bias"]).chunk(3, -1)
    mask = None if seen is None else seen[:, None]  # (B, 1, L): no token sees padding
    return _after(part, tokens, functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def cross_block(
    part: Weights, queries: Tensor, tokens: Tensor, seen: Tensor | None, padding: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """LayerNorm(query + attention(query, tokens, tokens)), one head; (M, 1, Q, D) and tokens → (M, B, Q, D).

    padding  (M, 1, 1, D) a token that stands behind each case, and (B,) how many times
    """
    w_q, w_k, w_v = part["in_proj_weight"].chunk(3, 1)
    b_q, _, b_v = part["in_proj_bias"].chunk(3, 1)
    asked = lane_linear(queries, w_q, b_q) @ w_k[:, None] / math.sqrt(queries.shape[-1])
    if padding is None:
        pooled, _ = pool_tokens(asked, tokens, seen)
    else:
        token, times = padding
        extra = (asked * token).sum(-1) + times.log()[None, :, None]
        pooled, total = pool_tokens(asked, tokens, seen, extra=extra)
        pooled = pooled + (1 - total)[..., None] * token
    return _after(part, queries, lane_linear(pooled, w_v, b_v))


def _after(part: Weights, asking: Tensor, seen: Tensor) -> Tensor:
    """Output projection, residual, LayerNorm."""
    x = asking + lane_linear(seen, part["out_proj.weight"], part["out_proj.bias"])
    normed = functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return normed * part["norm.weight"][:, None, None] + part["norm.bias"][:, None, None]


def block_part(weights: Mapping[str, Tensor], block: str) -> dict[str, Tensor]:
    """The tensors of one block of a released head, under short names."""
    front = f"attention_module.{block}_attention.attention."
    own = {name.removeprefix(front): tensor for name, tensor in weights.items() if name.startswith(front)}
    return {name.removeprefix("multihead_attn."): tensor for name, tensor in own.items()}


class CuriaPooling:
    """Curia's attention pooling: blocks in order, mean over queries, linear. A `Network` of `hilum.probe.heads.lanes`.

    padding  "hidden", or "leaks": the zeros behind the tokens of a batch pass the self block among themselves, are zero no
             longer, and the cross block takes them for tokens (the public code). All are the same token then, so they are
             one more term of the softmax with the logarithm of their number
    """

    def __init__(
        self, width: int, outputs: int, blocks: Sequence[str], queries: int, codes: bool, padding: Padding
    ) -> None:
        self.width, self.num_outputs, self.blocks, self.queries = width, outputs, tuple(blocks), queries
        self.codes, self.padding = codes, padding

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        D, found = self.width, {}
        for block in self.blocks:
            front = f"attention_module.{block}_attention"
            bound, small = math.sqrt(6 / (4 * D)), 1 / math.sqrt(D)  # Xavier of (3D, D); torch's default of (D, D)
            found[f"{front}.attention.multihead_attn.in_proj_weight"] = uniform((3 * D, D), bound, generator)
            found[f"{front}.attention.multihead_attn.in_proj_bias"] = torch.zeros(3 * D)
            found[f"{front}.attention.multihead_attn.out_proj.weight"] = uniform((D, D), small, generator)
            found[f"{front}.attention.multihead_attn.out_proj.bias"] = torch.zeros(D)
            found[f"{front}.attention.norm.weight"] = torch.ones(D)
            found[f"{front}.attention.norm.bias"] = torch.zeros(D)
            if block == "cross":
                found[f"{front}.learned_queries"] = torch.randn(self.queries, D, generator=generator)
        found["classifier.weight"] = 0.01 * torch.randn(self.num_outputs, D, generator=generator)
        return found | {"classifier.bias": torch.zeros(self.num_outputs)}

    def outputs(self, weights: Weights, batch: TokenBatch, draws: Draws | None) -> Tensor:
        tokens, seen = batch.tokens, None if bool(batch.seen.all()) else batch.seen
        if self.codes:
            codes = slice_codes(int(batch.planes.max()) + 1, self.width).to(tokens.device)
            tokens = tokens + codes[batch.planes] * batch.seen[..., None]
        leak: tuple[Tensor, Tensor] | None = None
        for block in self.blocks:
            part = block_part(weights, block)
            if block == "self":
                tokens = self_block(part, tokens, seen)
                if self.padding == "leaks" and seen is not None:
                    token = self_block(part, tokens.new_zeros(1, 1, self.width), None)
                    leak = token, (~batch.seen).sum(1).float()
            else:
                queries = weights["attention_module.cross_attention.learned_queries"][:, None]
                tokens, seen = cross_block(part, queries, tokens, seen, leak), None
                leak = None
        pooled = _mean(tokens, seen, leak)
        return lane_linear(pooled[:, :, None], weights["classifier.weight"], weights["classifier.bias"])[:, :, 0]


def _mean(tokens: Tensor, seen: Tensor | None, leak: tuple[Tensor, Tensor] | None) -> Tensor:
    """(M, B, D) mean over queries, or over tokens where no cross block came last."""
    if seen is None:
        return tokens.mean(-2)
    total = (tokens * seen[..., None]).sum(-2)
    if leak is None:
        return total / seen.sum(1)[:, None]
    token, times = leak
    return (total + token[:, :, 0] * times[:, None]) / seen.shape[1]


class OneQuery:
    """VoxelFM's Q-Former probe: Linear D → hidden, one query over 4 heads, Linear. A `Network` of `hilum.probe.heads.lanes`.

    dropout  .5 after the first layer, .1 of the attention weights, .5 twice before the last layer
    upstream the first dropout draws for each token, which needs tokens × hidden numbers; else one draw serves a whole case
    """

    def __init__(self, width: int, outputs: int, hidden: int, heads: int, upstream: bool) -> None:
        if hidden % heads:
            raise UsageError(f"hidden must be a multiple of the {heads} heads; found {hidden}")
        self.width, self.num_outputs, self.hidden, self.heads, self.upstream = width, outputs, hidden, heads, upstream

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        D, H = self.width, self.hidden
        return {
            "project.weight": uniform((H, D), 1 / math.sqrt(D), generator),
            "project.bias": uniform((H,), 1 / math.sqrt(D), generator),
            "query": torch.randn(H, generator=generator),
            "in_proj_weight": uniform((3 * H, H), math.sqrt(6 / (4 * H)), generator),
            "in_proj_bias": torch.zeros(3 * H),
            "out_proj.weight": uniform((H, H), 1 / math.sqrt(H), generator),
            "out_proj.bias": torch.zeros(H),
            "classifier.weight": uniform((self.num_outputs, H), 1 / math.sqrt(H), generator),
            "classifier.bias": uniform((self.num_outputs,), 1 / math.sqrt(H), generator),
        }

    def outputs(self, weights: Weights, batch: TokenBatch, draws: Draws | None) -> Tensor:
        tokens, seen = batch.tokens, batch.seen
        w_q, w_k, w_v = weights["in_proj_weight"].chunk(3, 1)
        b_q, _, b_v = weights["in_proj_bias"].chunk(3, 1)
        query = lane_linear(weights["query"][:, None, None], w_q, b_q)[:, 0, 0]  # (M, H)
        size = self.hidden // self.heads
        split = (len(query), self.heads, size)
        by_head = query.reshape(*split[:2], 1, size) @ w_k.reshape(*split, self.hidden)
        asked = by_head.transpose(1, 2) / math.sqrt(size)  # (M, 1, heads, H)
        attention_keep = None
        project, bias = weights["project.weight"], weights["project.bias"][:, None, None]
        lengths = seen.sum(1).tolist()
        if draws is not None and self.upstream:
            hidden = lane_linear(tokens, project, weights["project.bias"])
            hidden = hidden * draws.keep_tokens(self.hidden, lengths, seen.shape[1], 0.5).mT
            attention_keep = draws.keep_tokens(self.heads, lengths, seen.shape[1], 0.1)
            pooled, total = pool_tokens(asked, hidden, seen, attention_keep)
        else:
            if draws is None:
                kept: Tensor | float = 1.0
            else:
                kept = draws.keep((1, self.hidden), 0.5)
                attention_keep = draws.keep_tokens(self.heads, lengths, seen.shape[1], 0.1)
            pooled, total = pool_tokens((asked * kept) @ project[:, None], tokens, seen, attention_keep)
            pooled = (pooled @ project.mT[:, None] + bias * total[..., None]) * kept
        values = (pooled[..., None, :] @ w_v.reshape(*split, self.hidden).mT[:, None])[..., 0, :]
        values = values + b_v.reshape(split)[:, None] * total[..., None]
        x = lane_linear(values.flatten(2)[:, :, None], weights["out_proj.weight"], weights["out_proj.bias"])
        if draws is not None:
            x = x * draws.keep((1, self.hidden), 0.5) * draws.keep((1, self.hidden), 0.5)
        return lane_linear(x, weights["classifier.weight"], weights["classifier.bias"])[:, :, 0]


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return nn.init.uniform_(torch.empty(shape), -bound, bound, generator=generator)


class AttentionHead(TokenHead):
    """Curia's attention pooling (`CuriaPooling`) over slices or patches.

    task, seed … device  of every head on tokens, see `TokenHead`
    blocks               "self" and "cross" in order
    num_queries          of the cross block, drawn from N(0, 1)
    per_plane            tokens are averaged over each slice (or plane of a 3D encoder) first; "auto": when a self block would
                         compare more than 4,096 tokens with each other
    encode_slices        add the sine code of the slice's place among those of the case, to tokens of slice encoders
    match_upstream       the padding leak of the public code: a case is then judged by what shares its batch

    Defaults are the public trainer's: SGD, cosine, clipped at 1; its learning rate is `lr × batch / 256`.
    """

    def __init__(
        self,
        task: Task = "classification",
        *,
        seed: int = 0,
        seeds: int = 5,
        learning_rates: tuple[float, ...] = (1e-3, 5e-3, 2e-2, 1e-1),
        epochs: int = 30,
        batch_size: int = 16,
        optimiser: Literal["adamw", "sgd"] = "sgd",
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine"] = "cosine",
        clip: float | None = 1.0,
        blocks: tuple[str, ...] = ("self", "cross"),
        num_queries: int = 1,
        per_plane: bool | Literal["auto"] = "auto",
        encode_slices: bool = True,
        match_upstream: bool = False,
        max_floats: int = 64_000_000,
        device: str = "cpu",
    ) -> None:
        self.task, self.seed, self.seeds, self.learning_rates = task, seed, seeds, learning_rates
        self.epochs, self.batch_size, self.optimiser, self.weight_decay = epochs, batch_size, optimiser, weight_decay
        self.schedule, self.clip, self.blocks, self.num_queries = schedule, clip, blocks, num_queries
        self.per_plane, self.encode_slices, self.match_upstream = per_plane, encode_slices, match_upstream
        self.max_floats, self.device = max_floats, device

    def _prepare(self, X: Any) -> None:
        unknown = set(self.blocks) - {"self", "cross"}
        if unknown or not self.blocks or len(set(self.blocks)) != len(self.blocks):
            raise UsageError(f"blocks are self and cross, each once at most; found {list(self.blocks)}")
        long = "self" in self.blocks and int(X.lengths.max()) > MOST_SELF
        self.pooled_ = long if self.per_plane == "auto" else self.per_plane
        self.whole_batches_ = self.match_upstream and "self" in self.blocks
        self.planar_ = bool(X[0].planar)

    def _network(self, width: int, num_outputs: int) -> CuriaPooling:
        codes = self.encode_slices and self.planar_
        padding: Padding = "leaks" if self.match_upstream else "hidden"
        return CuriaPooling(width, num_outputs, self.blocks, self.num_queries, codes, padding)

    def _floats(self, width: int) -> int:
        return 12 * width if "self" in self.blocks else 6 * self.num_queries

    def tensors(self, seed: int = 0) -> dict[str, Tensor]:
        """One fitted network in the layout of the released heads: attention_module.*, classifier.*.

        seed  the number of the head seed in `outputs`
        """
        return {name: tensor[seed].clone() for name, tensor in self.weights_.items()}

    def load_tensors(self, tensors: Sequence[Mapping[str, Tensor]], classes: Array | None = None) -> "AttentionHead":
        """Fitted by the weights of released heads, one a seed; they must be of this head's blocks and queries. Returns itself.

        classes  names of the outputs in order; None: their numbers
        """
        self.planar_, self.pooled_ = True, self.per_plane is True
        self.whole_batches_ = self.match_upstream and "self" in self.blocks
        num_outputs, width = tensors[0]["classifier.weight"].shape
        wanted = self._network(width, num_outputs).init(torch.Generator())
        for found in tensors:
            wrong = [n for n in wanted if n not in found or found[n].shape != wanted[n].shape] + sorted(
                found.keys() - wanted.keys()
            )
            if wrong:
                raise UsageError(f"these tensors do not fit blocks {self.blocks}, {self.num_queries} queries: {wrong}")
        stacked = {n: torch.stack([found[n].float() for found in tensors]) for n in wanted}
        self._take(stacked, width, num_outputs, classes)
        return self


class QFormerHead(TokenHead):
    """VoxelFM's one-query cross-attention (`OneQuery`): 5,086,209 weights at width 864, hidden 1024, one output.

    task, seed … device  of every head on tokens, see `TokenHead`
    hidden, num_heads    of the attention
    match_upstream       dropout of the projected tokens draws for each token, as in the public code; else once for a case,
                         which needs no tokens × hidden numbers

    Defaults are the public probe's: AdamW without decay, constant learning rate.
    """

    def __init__(
        self,
        task: Task = "classification",
        *,
        seed: int = 0,
        seeds: int = 5,
        learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3),
        epochs: int = 20,
        batch_size: int = 16,
        optimiser: Literal["adamw", "sgd"] = "adamw",
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine"] = "constant",
        clip: float | None = None,
        hidden: int = 1024,
        num_heads: int = 4,
        match_upstream: bool = False,
        max_floats: int = 64_000_000,
        device: str = "cpu",
    ) -> None:
        self.task, self.seed, self.seeds, self.learning_rates = task, seed, seeds, learning_rates
        self.epochs, self.batch_size, self.optimiser, self.weight_decay = epochs, batch_size, optimiser, weight_decay
        self.schedule, self.clip, self.hidden, self.num_heads = schedule, clip, hidden, num_heads
        self.match_upstream, self.max_floats, self.device = match_upstream, max_floats, device

    def _network(self, width: int, num_outputs: int) -> OneQuery:
        return OneQuery(width, num_outputs, self.hidden, self.num_heads, self.match_upstream)

    def _floats(self, width: int) -> int:
        return 4 * self.hidden if self.match_upstream else 8 * self.num_heads
