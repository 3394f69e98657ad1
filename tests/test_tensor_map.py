"""A tensor map that cuTensorMapEncodeTiled would refuse is refused without a GPU, with the figures."""

from __future__ import annotations

import re

import pytest

from tests.emulator.tensormap import tensor_map

GOOD = {
    "pointer": 256,
    "kind": "float16",
    "dims": (64, 10),
    "strides": (128,),
    "box": (64, 8),
    "swizzle": 128,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pointer": 264}, "not a multiple of 16"),
        ({"kind": "float8"}, "element type 'float8'"),
        ({"dims": (64,) * 6, "strides": (128,) * 5, "box": (1,) * 6}, "rank 1 to 5, not 6"),
        ({"strides": (128, 256)}, "needs 1 strides, not 2"),
        ({"strides": (136,)}, "strides[0] = 136"),
        ({"dims": (0, 10)}, "dims[0] = 0"),
        ({"box": (64, 257)}, "box[1] = 257"),
        ({"box": (64,)}, "box has 1 extents for rank 2"),
        ({"box": (4, 8), "swizzle": 0}, "box row of 8 bytes"),
        ({"box": (128, 8)}, "wider than the swizzle span of 128"),
        ({"swizzle": 16}, "swizzle 16 is none of"),
        ({"kind": "int32", "swizzle": 0, "fill_nan": True}, "NaN fill"),
    ],
)
def test_tensor_map_limits(change: dict[str, object], words: str) -> None:
    tensor_map(**GOOD)
    with pytest.raises(ValueError, match=re.escape(words)):
        tensor_map(**{**GOOD, **change})
