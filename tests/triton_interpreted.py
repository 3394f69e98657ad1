"""The benchmark's Triton peer in Triton's interpreter, against PyTorch: `python -m tests.triton_interpreted`.

A process of its own, since Triton decides between compiler and interpreter when it is imported.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
TILE = {"ROWS": 32, "COLUMNS": 16}


class Fixed:
    """A kernel with one tile instead of autotuning, which would need a GPU."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return lambda *a, **more: self.kernel[grid(TILE)](*a, **TILE, **more)


def main() -> None:
    """Forward and backward, with cut tiles, causal and not."""
    import torch
    import triton

    from bench import triton_kernels, triton_peer

    names = ("forward", "backward_keys", "backward_queries")
    tuned = {name: Fixed(getattr(triton_kernels, name)) for name in names}
    run = SimpleNamespace(**tuned, delta=triton_kernels.delta, cdiv=triton.cdiv)
    torch.manual_seed(0)
    for causal, length_q, length_k in ((False, 70, 50), (True, 70, 70), (True, 64, 64)):
        q, k, v = (torch.randn(1, 2, n, 32) for n in (length_q, length_k, length_k))
        dout = torch.randn_like(q)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        want = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)
        wanted = torch.autograd.grad(want, inputs, dout)
        out, lse = triton_peer.forward(q, k, v, causal, run)
        got = triton_peer.backward(dout, q, k, v, out, lse, causal, run)
        for a, b in zip((out, *got), (want, *wanted), strict=True):
            error = float((a - b).detach().abs().max())
            assert error < 1e-5, (causal, length_q, length_k, error)


if __name__ == "__main__":
    main()
