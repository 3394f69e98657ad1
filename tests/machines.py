"""What a test needs to know of the machine it runs on: how to bring arrays there and back, and which dtypes it takes.

Tests keep their data in NumPy arrays on the host. `machine.put` makes the array a user would pass,
with the same strides and the same address modulo 16, so that a test about strange memory is about
strange memory everywhere.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ml_dtypes
import numpy as np

import cuflash
from cuflash import _prepare
from cuflash._device import use_device
from tests import oracle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = ("float16", "bfloat16")


def dtype_of(name: str) -> np.dtype:
    """A NumPy dtype by cuflash's name."""
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


class Machine:
    """A place where cuflash runs; a context manager for the length of a test."""

    name: str
    dtypes: tuple[str, ...] = HALVES  # what its kernels take
    exact = "float16"  # the most precise of them

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def put(self, x: Any) -> Any:
        """The array a user would pass; None, and what is no array, stay as they are."""
        return x

    def get(self, x: Any) -> Any:
        """Back on the host."""
        return x

    # ---- the public API on host arrays

    def attention(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        """`cuflash.attention`; out, or (out, lse), on the host."""
        result = cuflash.attention(*map(self.put, (q, k, v)), **self._put_all(options))
        return tuple(map(self.get, result)) if isinstance(result, tuple) else self.get(result)

    def backward(
        self, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, **options: Any
    ) -> Any:
        """`cuflash.attention_backward` on the host."""
        arrays = map(self.put, (dout, q, k, v, out, lse))
        grads = cuflash.attention_backward(*arrays, **self._put_all(options))
        return self._got(grads)

    def vjp(self, q: Any, k: Any, v: Any, dout: Any, *, dlse: Any = None, **options: Any) -> Any:
        """(out, Gradients) by `cuflash.attention_vjp` and its pullback, on the host."""
        out, pullback = cuflash.attention_vjp(*map(self.put, (q, k, v)), **self._put_all(options))
        grads = pullback(self.put(dout), self.put(dlse))
        return self.get(out), self._got(grads)

    def varlen(self, q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, **options: Any) -> Any:
        """`cuflash.attention_varlen`; out, or (out, lse), on the host."""
        arrays = map(self.put, (q, k, v, cu_q, cu_k))
        result = cuflash.attention_varlen(*arrays, **self._put_all(options))
        return tuple(map(self.get, result)) if isinstance(result, tuple) else self.get(result)

    def varlen_backward(self, *arrays: Any, **options: Any) -> Any:
        """`cuflash.attention_varlen_backward` of (dout, q, k, v, out, lse, cu_q, cu_k) on the host."""
        put = map(self.put, arrays)
        return self._got(cuflash.attention_varlen_backward(*put, **self._put_all(options)))

    def merge(self, outs: Any, lses: Any, **options: Any) -> Any:
        """`cuflash.merge_attention` on the host."""
        parts = [self.put(x) for x in outs], [self.put(x) for x in lses]
        return tuple(map(self.get, cuflash.merge_attention(*parts, **self._put_all(options))))

    def _got(self, grads: Any) -> Any:
        """Gradients on the host, those of score parameters too."""
        params = grads.score_params
        if params is not None:
            params = {name: self.get(x) for name, x in params.items()}
        return cuflash._gradient.Gradients(*map(self.get, grads[:-1]), params)

    def _put_all(self, options: dict[str, Any]) -> dict[str, Any]:
        return {k: self.put(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}


class Numpy(Machine):
    """The CPU backend."""

    name = "numpy"
    dtypes = (*HALVES, "float32", "float64")
    exact = "float64"


class Emulator(Machine):
    """The kernels' PTX, executed on the CPU; NumPy arrays are its memory.

    Parameters
    ----------
    arch
        "sm_75", "sm_80", "sm_90a", ...
    seed
        Order in which its threads run.
    """

    name = "emulator"

    def __init__(self, arch: str = "sm_80", seed: int = 1) -> None:
        from tests.emulator.device import EmulatedDevice

        self.device = EmulatedDevice(arch, seed=seed)
        self.dtypes = ("float16",) if arch == "sm_75" else HALVES
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Machine:
        self._stack.enter_context(use_device(self.device))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        # Prepared calls would keep this device and its memory alive.
        _prepare.forget()


class Cupy(Machine):
    """A real GPU."""

    name = "cupy"

    def put(self, x: Any) -> Any:
        """A device array with the host array's strides and alignment."""
        if not isinstance(x, np.ndarray):
            return x
        import cupy

        from cuflash._arrays import Meta, address_of

        low, high = Meta(x.shape, x.strides, x.dtype).span()
        shift = (address_of(x) + low) % 16
        memory = cupy.full(shift + high - low + 16, 0xFF, cupy.uint8)
        if high > low:
            holder = _Bytes(address_of(x) + low, high - low)
            memory[shift : shift + high - low] = cupy.asarray(np.asarray(holder))
        at = memory.data + (shift - low)
        return cupy.ndarray(x.shape, x.dtype, memptr=at, strides=x.strides)

    def get(self, x: Any) -> Any:
        """Back on the host."""
        if x is None or isinstance(x, np.ndarray):
            return x
        import cupy

        return cupy.asnumpy(x)


class _Bytes:
    """A range of host memory as bytes."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, True),
            "version": 3,
        }


# ---- data, and comparison with the oracle


def normal(
    rng: np.random.Generator, *shape: int, dtype: Any = "float16", factor: float = 1.0
) -> Any:
    """Normal numbers rounded to `dtype`, a little off zero mean so that relative error means something."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    return (factor * (rng.standard_normal(shape) + 0.1)).astype(dtype_of(name))


def check_forward(machine: Machine, q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, Any]:
    """Run, compare out and lse with float64 by rule T, and return them."""
    out, lse = machine.attention(q, k, v, **options, return_lse=True)
    exact = oracle.exact(q, k, v, **options)
    honest = oracle.low_precision(q, k, v, **options)
    oracle.check_all(described(machine, q, k, v, options), exact, honest, q.dtype, out=out, lse=lse)
    return out, lse


def check_gradients(
    machine: Machine,
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    *,
    dlse: Any = None,
    deterministic: bool = False,
    **options: Any,
) -> Any:
    """Run forward and backward, compare out and gradients by rule T, and return the gradients."""
    wrt = (
        ("q", "k", "v") if options.get("alibi_slopes") is None else ("q", "k", "v", "alibi_slopes")
    )
    run: dict[str, Any] = {"wrt": wrt, "deterministic": deterministic, "dlse": dlse}
    out, grads = machine.vjp(q, k, v, dout, **run, **options)
    exact = oracle.exact(q, k, v, dout, dlse=dlse, **options)
    honest = oracle.low_precision(q, k, v, dout, dlse=dlse, **options)
    got = {name: getattr(grads, name) for name in wrt}
    case = described(machine, q, k, v, options)
    oracle.check_all(case, exact, honest, q.dtype, out=out, grads=got)
    return grads


def described(machine: Machine, q: Any, k: Any, v: Any, options: dict[str, Any]) -> str:
    """A case in one line."""
    shapes = f"q{q.shape} k{k.shape} v{v.shape}"
    return f"{machine.name} {q.dtype.name} {shapes} {shown(options)}"


def shown(options: dict[str, Any]) -> str:
    """Options in one line."""
    return " ".join(
        f"{k}={x.tolist() if isinstance(x, np.ndarray) else x}" for k, x in options.items()
    )


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays are equal bit by bit, NaN and the sign of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
