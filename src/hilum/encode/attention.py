"""Attention where torch's own is slow: half precision on a CPU.

Axes in names: B batch, H heads, N tokens, D width of a head, M = B·H.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT_SEQUENCE = 128  # tokens; below, torch's fused CPU kernel loses to its plain one in fp32
PRODUCTS_UP_TO = 640  # tokens; above, training's weights (B, H, N, N) cost more memory than they save time
BLOCK_BYTES = 4 << 20  # of weights at a time: they stay in the cache, and memory is not fetched anew for each


def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v, (B, H, N, D)."""
    num_tokens, device = q_BHND.shape[2], q_BHND.device.type
    if device == "cpu" and q_BHND.dtype == torch.bfloat16:
        if not torch.is_grad_enabled():
            return attend_in_blocks(q_BHND, k_BHND, v_BHND)
        if num_tokens <= PRODUCTS_UP_TO:
            out: Tensor = _Products.apply(q_BHND, k_BHND, v_BHND)  # type: ignore[no-untyped-call]
            return out
    short = device == "cpu" and num_tokens <= SHORT_SEQUENCE
    with sdpa_kernel(SDPBackend.MATH) if short else contextlib.nullcontext():
        return functional.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND)


def attend_in_blocks(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
    """The same without gradient, as matrix products over a few heads or a few rows at a time.

    Keys are taken relative to the mean of every 16th, which changes no weight (each row's scores move by one number) and makes
    scores small where bf16 rounds them least.
    """
    middle = k_BHND[:, :, ::16].mean(2, keepdim=True, dtype=torch.float32).to(k_BHND.dtype)
    q, v, keys = q_BHND.flatten(0, 1), v_BHND.flatten(0, 1), (k_BHND - middle).flatten(0, 1).mT
    num_heads, num_tokens, width = q.shape
    rows = min(num_tokens, max(BLOCK_BYTES // (2 * num_tokens), 1))
    heads = max(BLOCK_BYTES // (2 * num_tokens * rows), 1)
    out, nothing = torch.empty_like(q), q.new_empty(())
    for h in range(0, num_heads, heads):
        for n in range(0, num_tokens, rows):
            some = slice(h, h + heads), slice(n, n + rows)
            scores = torch.baddbmm(nothing, q[some], keys[h : h + heads], beta=0, alpha=width**-0.5)
            torch.bmm(torch.softmax(scores, -1), v[h : h + heads], out=out[some])
    return out.view(q_BHND.shape)


class _Products(torch.autograd.Function):
    """Attention as batched matrix products, whose bf16 kernels run at the processor's full rate: for 261 tokens forward and
    backward take a quarter of the fused kernel's time (docs/log.md). Scores are rounded to bf16, as by torch's plain kernel."""

    @staticmethod
    def forward(ctx: Any, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> Tensor:
        scale = q_BHND.shape[-1] ** -0.5
        q, k, v = (x.flatten(0, 1) for x in (q_BHND * scale, k_BHND, v_BHND))
        weights_MNN = torch.softmax(torch.bmm(q, k.mT), -1)
        out = torch.bmm(weights_MNN, v)
        ctx.save_for_backward(q, k, v, weights_MNN, out)
        ctx.scale = scale
        return out.view(q_BHND.shape)

    @staticmethod
    def backward(ctx: Any, grad_BHND: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights, out = ctx.saved_tensors
        grad = grad_BHND.flatten(0, 1)
        by_score = torch.bmm(grad, v.mT).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
        by_q = torch.bmm(by_score, k).mul_(ctx.scale)
        by_k = torch.bmm(by_score.mT, q)
        by_v = torch.bmm(weights.mT, grad)
        return by_q.view_as(grad_BHND), by_k.view_as(grad_BHND), by_v.view_as(grad_BHND)
