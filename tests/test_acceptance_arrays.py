"""What is taken as an array, and from where; found by reading the contract as a stranger would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from tests.machines import Machine, normal, same_bits

X = np.zeros((2, 3, 8), np.float16)


class InCudaMemory:
    """An array interface of memory that no driver on this machine knows."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": X.shape, "typestr": "<f2", "data": (1 << 40, False), "version": 3}


class TensorWithHistory:
    """As PyTorch's on a GPU: DLPack tells where it is, the array interface raises."""

    def __dlpack__(self, **_: Any) -> Any:
        raise AssertionError("nothing may be imported before the check")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    @property
    def __cuda_array_interface__(self) -> Any:
        raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")


@pytest.mark.parametrize("stranger", [InCudaMemory, TensorWithHistory])
@pytest.mark.parametrize("place", range(3))
def test_mixed_arrays_are_a_TypeError_without_a_driver(stranger: Any, place: int) -> None:
    """Not CuPy's complaint about the driver, nor about itself being absent."""
    arrays: list[Any] = [X, X, X]
    arrays[place] = stranger()
    with pytest.raises(
        TypeError, match=r"is a CUDA array, q is a NumPy|is a NumPy array, q is a C"
    ):
        cuflash.attention(*arrays)
    with pytest.raises(TypeError, match="NumPy array"):
        cuflash.merge_attention([X, stranger()], [np.zeros((2, 3), np.float32)] * 2)


def views(x: Any) -> Any:
    """The same numbers in memory of other forms."""
    flipped = tuple(slice(None, None, -1) for _ in x.shape)
    spread = np.empty([2 * n for n in x.shape], x.dtype)[tuple(slice(1, None, 2) for _ in x.shape)]
    spread[...] = x
    odd = np.empty(x.nbytes + 64, np.uint8)[3 * x.itemsize :][: x.nbytes].view(x.dtype)
    odd = odd.reshape(x.shape)
    odd[...] = x
    return [np.asfortranarray(x), x[flipped].copy()[flipped], spread, odd]


def test_every_other_array_of_a_call_may_have_any_strides(backend: Machine) -> None:
    """out, lse, dlse, dout, bias, mask, slopes and sinks; q, k and v have tests of their own."""
    rng = np.random.default_rng(3)
    q, dout = normal(rng, 2, 4, 35, 32), normal(rng, 2, 4, 35, 32)
    k, v = normal(rng, 2, 2, 50, 32), normal(rng, 2, 2, 50, 32)
    options: dict[str, Any] = {
        "bias": normal(rng, 2, 4, 35, 50),
        "mask": rng.random((2, 4, 35, 50)) < 0.8,
        "alibi_slopes": rng.random((2, 4)).astype(np.float32),
        "sinks": rng.random(4).astype(np.float32),
    }
    out, lse = backend.attention(q, k, v, return_lse=True, **options)
    given = {"dout": dout, "out": out, "lse": lse, "dlse": normal(rng, 2, 4, 35, dtype="float32")}
    wrt = ("q", "k", "v", "bias", "alibi_slopes", "sinks")

    def gradients(given: dict[str, Any], options: dict[str, Any]) -> list[Any]:
        dout, out, lse, dlse = given.values()
        run = {"dlse": dlse, "wrt": wrt, "deterministic": True, **options}
        return list(backend.backward(dout, q, k, v, out, lse, **run)[:6])

    expected = gradients(given, options)
    for form in range(4):
        turned = {name: views(x)[form] for name, x in options.items()}
        again = backend.attention(q, k, v, return_lse=True, **turned)
        assert all(same_bits(a, b) for a, b in zip((out, lse), again, strict=True)), form
        found = gradients({name: views(x)[form] for name, x in given.items()}, turned)
        assert all(same_bits(a, b) for a, b in zip(expected, found, strict=True)), form


ODD = {
    "a class": np.float16,
    "the class of arrays": np.ndarray,
    "an array of no axes": np.array(1.0),
    "a number beyond 64 bits": 2**70,
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_what_nobody_would_pass_is_still_told_in_the_form_of_every_error(odd: Any) -> None:
    """Nothing of NumPy's or Python's own comes through: each message ends with the way out."""
    q, lse = np.ones((2, 3, 8), np.float16), np.zeros((2, 3), np.float32)
    dense = np.ones((3, 3), bool)
    calls = [
        *(
            lambda n=n: cuflash.attention(*(odd if n == i else q for i in range(3)))
            for n in range(3)
        ),
        *(lambda n=n: cuflash.attention(q, q, q, **{n: odd}) for n in ("sinks", "mask", "out")),
        lambda: cuflash.attention_backward(q, q, q, q, q, lse, wrt=odd),
        lambda: cuflash.merge_attention(odd, [lse]),
        lambda: cuflash.merge_attention([q], odd),
        lambda: cuflash.warmup(odd),
        lambda: cuflash.BlockMask.from_dense(dense, block_size=odd),
        lambda: cuflash.BlockMask.from_dense(odd),
        lambda: cuflash.BlockMask.from_function(
            lambda b, h, i, j: i == j, shape=(3, 3), heads=odd, batch=odd
        ),
    ]
    for number, call in enumerate(calls):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert "\n  Way out: " in str(caught.value), (number, str(caught.value))
