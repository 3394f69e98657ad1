"""The peers: whatever else on this machine computes attention, each in its own best layout.

Every entry of `PEERS` is a function of a case and the inputs that returns calls by direction. What
cannot be imported, or refuses the case, is left out of the table with its reason. Inputs are CuPy
arrays (batch, heads, length, head dim); peers see the same memory through DLPack.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cuflash
from bench.cases import Case
from bench.timing import OwnStream
from cuflash import _plain

Calls = dict[str, Callable[[], Any]]  # direction -> call


class Inputs(NamedTuple):
    """CuPy arrays of one case."""

    q: Any
    k: Any
    v: Any
    dout: Any


class NotHere(Exception):
    """A peer cannot run a case; the message says why."""


def make_inputs(case: Case, cupy: Any) -> Inputs:
    """Normally distributed (zeros or small integers would draw less power and run faster)."""
    from cuflash._dtypes import BY_NAME

    rng = cupy.random.default_rng(0)
    dtype = BY_NAME[case.dtype].numpy
    q_shape = (case.batch, case.heads, case.len_q, case.head_dim)
    kv_shape = (case.batch, case.heads_kv, case.len_k, case.head_dim)
    shapes = (q_shape, kv_shape, kv_shape, q_shape)
    return Inputs(*(rng.standard_normal(s, dtype=cupy.float32).astype(dtype) for s in shapes))


def ours(case: Case, x: Inputs, deterministic: bool = False) -> Calls:
    """cuflash, with the lse that the backward pass needs."""
    causal = case.causal
    out, lse = cuflash.attention(x.q, x.k, x.v, causal=causal, return_lse=True)

    def backward() -> Any:
        return cuflash.attention_backward(
            x.dout, x.q, x.k, x.v, out, lse, deterministic=deterministic, causal=causal
        )

    def forward() -> Any:
        return cuflash.attention(x.q, x.k, x.v, causal=causal, return_lse=True)

    return {"forward": forward, "backward": backward}


def ours_deterministic(case: Case, x: Inputs) -> Calls:
    """cuflash with deterministic=True; forward is the same call."""
    return {"backward": ours(case, x, deterministic=True)["backward"]}


def plain_cupy(case: Case, x: Inputs) -> Calls:
    """Three lines of CuPy with the whole matrix of scores."""
    import cupy

    if case.heads != case.heads_kv:
        raise NotHere("grouped heads")
    out, _, weights = _plain.forward(cupy, x.q, x.k, x.v, case.causal)
    return {
        "forward": lambda: _plain.forward(cupy, x.q, x.k, x.v, case.causal),
        "backward": lambda: _plain.backward(cupy, x.dout, x.q, x.k, x.v, out, weights),
    }


def torch_sdpa(backend: str) -> Callable[[Case, Inputs], Calls]:
    """torch.nn.functional.scaled_dot_product_attention, held to one backend."""

    def peer(case: Case, x: Inputs) -> Calls:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention

        if case.causal and case.len_q != case.len_k:
            raise NotHere("torch aligns causal masks at the top left")
        chosen = getattr(SDPBackend, backend)
        q, k, v, dout = (from_cupy(torch, array, case.dtype) for array in x)
        for tensor in (q, k, v):
            tensor.requires_grad_(True)

        def forward() -> Any:
            with sdpa_kernel(chosen):
                return scaled_dot_product_attention(
                    q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.heads_kv
                )

        out = forward()

        def backward() -> Any:
            return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

        return {"forward": forward, "backward": backward}

    return peer


def from_cupy(torch: Any, array: Any, dtype: str) -> Any:
    """A tensor on the same memory; bfloat16 travels as its 16 bits."""
    if dtype == "bfloat16":
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def flash_attn(case: Case, x: Inputs) -> Calls:
    """The flash-attn package, in its layout (batch, length, heads, head dim)."""
    import torch
    from flash_attn import flash_attn_func

    q, k, v, dout = (
        from_cupy(torch, array, case.dtype).transpose(1, 2).contiguous() for array in x
    )
    for tensor in (q, k, v):
        tensor.requires_grad_(True)
    out = flash_attn_func(q, k, v, causal=case.causal)
    return {
        "forward": lambda: flash_attn_func(q, k, v, causal=case.causal),
        "backward": lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True),
    }


def jax_attention(implementation: str) -> Callable[[Case, Inputs], Calls]:
    """jax.nn.dot_product_attention, in its layout (batch, length, heads, head dim), compiled."""

    def peer(case: Case, x: Inputs) -> Calls:
        # By default JAX would take three quarters of the memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        if case.causal and case.len_q != case.len_k:
            raise NotHere("jax aligns causal masks at the top left")
        kind = {"bfloat16": jax.numpy.bfloat16, "float16": jax.numpy.float16}[case.dtype]
        arrays = [
            jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(a.view("int16")), kind) for a in x
        ]
        q, k, v, dout = (jax.numpy.swapaxes(array, 1, 2) for array in arrays)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=case.causal, implementation=implementation
            )

        # What backward needs of forward goes from one compiled function to the other.
        compiled = jax.jit(lambda q, k, v: jax.vjp(attend, q, k, v))
        gradient = jax.jit(lambda pullback, dout: pullback(dout))
        _, pullback = compiled(q, k, v)
        wait = jax.block_until_ready
        return {
            "forward": OwnStream(lambda: compiled(q, k, v), wait),
            "backward": OwnStream(lambda: gradient(pullback, dout), wait),
        }

    return peer


def cudnn_frontend(case: Case, x: Inputs) -> Calls:
    """cuDNN's own graph of attention, forward, through its Python frontend."""
    import cudnn
    import cupy

    if case.causal and case.len_q != case.len_k:
        raise NotHere("not built here for unequal lengths")
    kind = {"bfloat16": cudnn.data_type.BFLOAT16, "float16": cudnn.data_type.HALF}[case.dtype]
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=cupy.cuda.get_current_stream().ptr)
    graph = cudnn.pygraph(
        io_data_type=kind,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )

    def tensor(name: str, array: Any) -> Any:
        strides = [step // array.itemsize for step in array.strides]
        return graph.tensor(name=name, dim=list(array.shape), stride=strides, data_type=kind)

    q, k, v = (tensor(n, a) for n, a in zip("qkv", x[:3], strict=True))
    out = cupy.empty_like(x.q)
    lse = cupy.empty((*x.q.shape[:-1], 1), cupy.float32)
    o, stats = graph.sdpa(
        name="sdpa",
        q=q,
        k=k,
        v=v,
        generate_stats=True,
        attn_scale=case.head_dim**-0.5,
        use_causal_mask=case.causal,
    )
    o.set_output(True).set_dim(list(out.shape)).set_stride([s // 2 for s in out.strides])
    stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = cupy.empty(max(1, graph.get_workspace_size()), cupy.uint8)
    # Memory is handed over by DLPack, which need not know bfloat16: as 16-bit integers.
    memory = {t: a.view("int16") for t, a in ((q, x.q), (k, x.k), (v, x.v), (o, out))}
    memory[stats] = lse
    return {"forward": lambda: graph.execute(memory, workspace, handle=handle)}


def triton(case: Case, x: Inputs) -> Calls:
    """A plain FlashAttention of our own in Triton."""
    from bench import triton_peer

    return triton_peer.peer(case, x)


PEERS: dict[str, Callable[[Case, Inputs], Calls]] = {
    "cuflash": ours,
    "cuflash deterministic": ours_deterministic,
    "plain CuPy": plain_cupy,
    "torch flash": torch_sdpa("FLASH_ATTENTION"),
    "torch cuDNN": torch_sdpa("CUDNN_ATTENTION"),
    "torch efficient": torch_sdpa("EFFICIENT_ATTENTION"),
    "torch math": torch_sdpa("MATH"),
    "flash-attn": flash_attn,
    "cuDNN frontend": cudnn_frontend,
    "Triton": triton,
    "JAX cuDNN": jax_attention("cudnn"),
    "JAX XLA": jax_attention("xla"),
}


def collect(
    case: Case, x: Inputs, peers: Mapping[str, Callable[[Case, Inputs], Calls]] = PEERS
) -> tuple[dict[str, dict[str, Callable[[], Any]]], dict[str, str]]:
    """Calls by direction and peer, and the reasons of those that are missing.

    cuflash itself may be missing only where it says so itself: an error of it ends the run.
    """
    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    missing = {}
    for name, peer in peers.items():
        try:
            found = peer(case, x)
            for call in found.values():
                call()  # some refuse only when they run
        except NotHere as error:
            missing[name] = str(error)
            continue
        except Exception as error:
            if name.startswith("cuflash"):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            continue
        for direction, call in found.items():
            calls.setdefault(direction, {})[name] = call
    return calls, missing


def free_torch() -> None:
    """Give back the memory that PyTorch keeps, if it is in use at all."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
