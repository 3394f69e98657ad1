"""The element types cuflash computes with, one row each: whatever depends on a dtype asks here."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Parameters
    ----------
    name
        As in `Problem.dtype`.
    numpy
        The NumPy dtype; CuPy uses the same objects.
    lse
        Dtype of lse and dlse: the one in which scores are kept.
    eps
        Distance from 1 to the next number, for tolerances.
    """

    name: str
    numpy: np.dtype
    lse: np.dtype
    eps: float


FLOAT32 = np.dtype(np.float32)
_FLOAT64 = np.dtype(np.float64)

ALL: tuple[Dtype, ...] = (
    Dtype("float16", np.dtype(np.float16), FLOAT32, 2.0**-10),
    Dtype("bfloat16", np.dtype(ml_dtypes.bfloat16), FLOAT32, 2.0**-7),
    Dtype("float32", FLOAT32, FLOAT32, 2.0**-23),
    Dtype("float64", _FLOAT64, _FLOAT64, 2.0**-52),
)

# Byte-swapped dtypes are not equal to these and so are not found.
BY_NUMPY = {row.numpy: row for row in ALL}
BY_NAME = {row.name: row for row in ALL}
NAMES = ", ".join(row.name for row in ALL)
