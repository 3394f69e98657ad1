"""A FlashAttention in Triton, as a peer: the algorithm written down plainly, tiles chosen by autotuning.

Forward, and backward in two passes (keys and values, then queries) without atomics. It is what a good
programmer gets from Triton in an afternoon, not the best that Triton can do. Equal head dims, a power
of two; equal numbers of heads; causal masks for equal lengths. Imported only where Triton is.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from bench.baselines import Calls, Inputs, NotHere, from_cupy
from bench.cases import Case

LOG2_E = 1.4426950408889634


def configurations(triton: Any, direction: str, head_dim: int) -> list[Any]:
    """Tiles to try: (rows, columns, warps, stages). Few, since each is compiled for seconds."""
    if direction == "forward":
        tried = [(128, 64, 4, 3), (128, 128, 8, 2)] if head_dim <= 128 else [(128, 64, 8, 2)]
    elif direction == "keys":
        tried = [(64, 128, 8, 2)] if head_dim <= 128 else [(32, 64, 8, 1)]
    else:
        tried = [(128, 64, 8, 2)] if head_dim <= 128 else [(64, 32, 8, 1)]
    return [
        triton.Config({"ROWS": rows, "COLUMNS": columns}, num_warps=warps, num_stages=stages)
        for rows, columns, warps, stages in tried
    ]


@functools.cache
def kernels(head_dim: int) -> SimpleNamespace:
    """The jitted kernels, autotuned for a head dim."""
    import triton

    from bench import triton_kernels

    def tuned(kernel: Any, direction: str) -> Any:
        key = ["length_q", "length_k", "CAUSAL"]
        return triton.autotune(configurations(triton, direction, head_dim), key=key)(kernel)

    return SimpleNamespace(
        forward=tuned(triton_kernels.forward, "forward"),
        delta=triton_kernels.delta,
        backward_keys=tuned(triton_kernels.backward_keys, "keys"),
        backward_queries=tuned(triton_kernels.backward_queries, "queries"),
        cdiv=triton.cdiv,
    )


def forward(q: Any, k: Any, v: Any, causal: bool, run: SimpleNamespace) -> tuple[Any, Any]:
    """out, and the logarithm to base 2 of every row's sum of exp, of tensors (batch, heads, length, dim)."""
    import torch

    batch, heads, length_q, dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, length_q), dtype=torch.float32, device=q.device)
    run.forward[lambda meta: (run.cdiv(length_q, meta["ROWS"]), batch * heads)](
        *(q, k, v, out, lse, dim**-0.5 * LOG2_E, length_q, k.shape[2]), DIM=dim, CAUSAL=causal
    )
    return out, lse


def backward(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, run: SimpleNamespace
) -> tuple[Any, Any, Any]:
    """dq, dk, dv."""
    import torch

    batch, heads, length_q, dim = q.shape
    length_k, scale = k.shape[2], dim**-0.5
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    run.delta[(run.cdiv(delta.numel(), 64),)](dout, out, delta, delta.numel(), DIM=dim, ROWS=64)
    run.backward_keys[lambda meta: (run.cdiv(length_k, meta["COLUMNS"]), batch * heads)](
        *(q, k, v, dout, lse, delta, dk, dv, scale, length_q, length_k), DIM=dim, CAUSAL=causal
    )
    run.backward_queries[lambda meta: (run.cdiv(length_q, meta["ROWS"]), batch * heads)](
        *(q, k, v, dout, lse, delta, dq, scale, length_q, length_k), DIM=dim, CAUSAL=causal
    )
    return dq, dk, dv


def peer(case: Case, x: Inputs) -> Calls:
    """The calls of a case; see `baselines.PEERS`."""
    import torch
    import triton  # noqa: F401

    if case.heads != case.heads_kv:
        raise NotHere("grouped heads")
    if case.causal and case.len_q != case.len_k:
        raise NotHere("causal with unequal lengths")
    if case.len_q < 16:
        raise NotHere("fewer queries than a tile of tensor cores has rows")
    q, k, v, dout = (from_cupy(torch, array, case.dtype) for array in x)
    run = kernels(case.head_dim)
    out, lse = forward(q, k, v, case.causal, run)
    return {
        "forward": lambda: forward(q, k, v, case.causal, run),
        "backward": lambda: backward(dout, q, k, v, out, lse, case.causal, run),
    }
