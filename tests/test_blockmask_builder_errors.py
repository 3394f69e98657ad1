"""Wrong input of the builders of BlockMask raises and says which two things disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cuflash import BlockMask
from tests.blockmask import raised

BUILDERS = {
    "sliding_window": lambda **o: BlockMask.sliding_window((1, 1), **o),
    "dilated_window": lambda **o: BlockMask.dilated_window((1, 1), 2, **o),
    "strided": lambda **o: BlockMask.strided(4, **o),
    "fixed": lambda **o: BlockMask.fixed(4, 1, **o),
    "global_window": lambda **o: BlockMask.global_window((1, 1), [0], **o),
    "bigbird": lambda **o: BlockMask.bigbird(seed=0, **o),
    "butterfly": lambda **o: BlockMask.butterfly(**o),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_checks_its_frame(name: str) -> None:
    build = BUILDERS[name]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'shape'"):
        build()
    assert raised(ValueError, build, shape=(3, 4, 5)).startswith("shape has 3 entries")
    assert raised(TypeError, build, shape=7).startswith("shape is an int, not a pair.")
    assert raised(ValueError, build, shape=(64, 64), block_size=8).startswith(
        "block_size is 8, and 8 is not"
    )
    if name in ("bigbird", "butterfly"):
        message = raised(ValueError, build, shape=(64, 64), block_size=(16, 32))
        assert message.startswith("block_size is (16, 32), and this pattern has square blocks.")
    else:
        assert raised(TypeError, build, shape=(64, 64), q_offset=1.5).startswith(
            "q_offset is a float"
        )
        assert raised(ValueError, build, shape=(64, 64), q_offset=10**30).startswith(
            f"q_offset is {10**30}, and"
        )


S = {"shape": (64, 64)}
ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "window int": (
        lambda: BlockMask.sliding_window(3, **S),
        TypeError,
        "window is an int, not a pair.",
    ),
    "window three": (
        lambda: BlockMask.sliding_window((1, 2, 3), **S),
        ValueError,
        "window has 3 entries",
    ),
    "window negative": (
        lambda: BlockMask.sliding_window((-1, 0), **S),
        ValueError,
        "window left is -1, and",
    ),
    "window float": (
        lambda: BlockMask.global_window((1, 0.5), [], **S),
        TypeError,
        "window right is a float",
    ),
    "dilation 0": (
        lambda: BlockMask.dilated_window((1, 1), 0, **S),
        ValueError,
        "dilation is 0, and must be >= 1.",
    ),
    "dilation bool": (
        lambda: BlockMask.dilated_window((1, 1), True, **S),
        TypeError,
        "dilation is a bool",
    ),
    "stride 0": (lambda: BlockMask.strided(0, **S), ValueError, "stride is 0, and must be >= 1."),
    "stride float": (
        lambda: BlockMask.strided(4.0, **S),
        TypeError,
        "stride is a float, not an int.",
    ),
    "causal": (
        lambda: BlockMask.strided(4, causal=1, **S),
        TypeError,
        "causal is an int, not a bool.",
    ),
    "summary 0": (
        lambda: BlockMask.fixed(4, 0, **S),
        ValueError,
        "summary is 0, and must be >= 1.",
    ),
    "summary": (
        lambda: BlockMask.fixed(4, 5, **S),
        ValueError,
        "summary is 5, and a chunk has 4 keys.",
    ),
    "fixed causal": (
        lambda: BlockMask.fixed(4, 1, causal=None, **S),
        TypeError,
        "causal is a NoneType, not a bool.",
    ),
    "global after": (
        lambda: BlockMask.global_window((1, 1), [0, 64], **S),
        ValueError,
        "global_positions holds 64, and there are 64 keys.",
    ),
    "global before": (
        lambda: BlockMask.global_window((1, 1), [-1], **S),
        ValueError,
        "global_positions holds -1",
    ),
    "global float": (
        lambda: BlockMask.global_window((1, 1), [0.5], **S),
        TypeError,
        "global_positions is float64, and an integer dtype is needed.",
    ),
    "global int": (
        lambda: BlockMask.global_window((1, 1), 0, **S),
        TypeError,
        "global_positions is an int, not an array.",
    ),
    "seed": (lambda: BlockMask.bigbird(seed=-1, **S), ValueError, "seed is -1, and must be >= 0."),
    "seed none": (
        lambda: BlockMask.bigbird(seed=None, **S),
        TypeError,
        "seed is a NoneType, not an int.",
    ),
    "random": (
        lambda: BlockMask.bigbird(seed=0, random=-1, **S),
        ValueError,
        "random is -1, and must be >= 0.",
    ),
    "even": (
        lambda: BlockMask.bigbird(seed=0, window=4, **S),
        ValueError,
        "window is 4 blocks, and a window with equal sides has an odd number.",
    ),
    "heads": (
        lambda: BlockMask.bigbird(seed=0, heads=1.0, **S),
        TypeError,
        "heads is a float, not an int.",
    ),
    "max_stride": (
        lambda: BlockMask.butterfly(max_stride=6, **S),
        ValueError,
        "max_stride is 6, and must be a power of two.",
    ),
    "max_stride 0": (
        lambda: BlockMask.butterfly(max_stride=0, **S),
        ValueError,
        "max_stride is 0, and must be >= 1.",
    ),
    "global_blocks": (
        lambda: BlockMask.butterfly(global_blocks=-2, **S),
        ValueError,
        "global_blocks is -2, and",
    ),
    "no documents": (
        lambda: BlockMask.documents(),
        ValueError,
        "documents are given by nothing, and one way is needed.",
    ),
    "two ways": (
        lambda: BlockMask.documents([0], lengths=[1]),
        ValueError,
        "documents are given by ids and lengths, and one way is needed.",
    ),
    "keys alone": (
        lambda: BlockMask.documents(ids_k=[0]),
        ValueError,
        "documents are given by ids, and one way",
    ),
    "ids float": (
        lambda: BlockMask.documents([0.0, 1.0]),
        TypeError,
        "ids is float64, and an integer dtype is needed.",
    ),
    "ids bool": (
        lambda: BlockMask.documents(np.ones(3, bool)),
        TypeError,
        "ids is bool, and an integer dtype is needed.",
    ),
    "ids number": (
        lambda: BlockMask.documents(np.array(3)),
        ValueError,
        "ids has 0 axes, and needs at least 1.",
    ),
    "ids large": (
        lambda: BlockMask.documents(np.array([2**63], np.uint64)),
        ValueError,
        "ids goes beyond int64.",
    ),
    "ids shape": (
        lambda: BlockMask.documents([0, 0, 1], shape=(3, 4)),
        ValueError,
        "ids is of 3 elements, and shape says 4.",
    ),
    "lengths axes": (
        lambda: BlockMask.documents(lengths=[[1, 2]]),
        ValueError,
        "lengths has 2 axes, and needs 1.",
    ),
    "lengths negative": (
        lambda: BlockMask.documents(lengths=[3, -1]),
        ValueError,
        "lengths holds -1, and must be >= 0.",
    ),
    "lengths shape": (
        lambda: BlockMask.documents(lengths=[3, 4], shape=(7, 6)),
        ValueError,
        "lengths are 7 elements together, and shape says 6.",
    ),
    "lengths counts": (
        lambda: BlockMask.documents(lengths=[3, 4], lengths_k=[1]),
        ValueError,
        "lengths has 2 documents, and lengths_k has 1.",
    ),
    "cu start": (
        lambda: BlockMask.documents(cu_seqlens=[1, 4]),
        ValueError,
        "cu_seqlens starts at 1, and must start at 0.",
    ),
    "cu empty": (
        lambda: BlockMask.documents(cu_seqlens=[]),
        ValueError,
        "cu_seqlens is empty, and must start at 0.",
    ),
    "cu falls": (
        lambda: BlockMask.documents(cu_seqlens=[0, 3], cu_seqlens_k=[0, 4, 3]),
        ValueError,
        "cu_seqlens_k falls from 4 to 3 at entry 2.",
    ),
    "cu float": (
        lambda: BlockMask.documents(cu_seqlens=np.array([0.0, 3.0])),
        TypeError,
        "cu_seqlens is float64, and an integer dtype is needed.",
    ),
}


def test_messages_tell_long_lists_by_kind() -> None:
    message = raised(ValueError, BlockMask.documents, lengths=[1] * 1000, cu_seqlens=np.arange(9))
    assert message.splitlines()[1:4] == [
        "  lengths     a list",
        "  cu_seqlens  (9,) int64",
        "  block_size=128",
    ]
    message = raised(ValueError, BlockMask.global_window, (1, 1), [99] * 1000, shape=(7, 9))
    assert message.splitlines() == [
        "global_positions holds 99, and there are 9 keys.",
        "  global_positions  a list",
        "  window=(1, 1), shape=(7, 9), block_size=128",
        "  Way out: positions from 0 to 8.",
    ]


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_input_is_refused(name: str) -> None:
    function, kind, start = ERRORS[name]
    assert raised(kind, function).startswith(start)
