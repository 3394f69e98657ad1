"""Wrong input of BlockMask raises and says which two things disagree (museum J5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse

from cuflash import BlockMask
from tests.blockmask import raised

B = np.ones((2, 3), bool)
FN = lambda b, h, i, j: i >= j  # noqa: E731
SPARSE = scipy.sparse.csr_array(np.eye(4))


def blocks(*args: Any, **kwargs: Any) -> Any:
    return lambda: BlockMask.from_blocks(*args, **{"shape": (200, 300), **kwargs})


def function(fn: Any = FN, **kwargs: Any) -> Any:
    return lambda: BlockMask.from_function(fn, **{"shape": (20, 30), **kwargs})


WAYS_IN = {
    "blocks": lambda **kwargs: blocks(B, **kwargs)(),
    "dense": lambda **kwargs: BlockMask.from_dense(B, **kwargs),
    "sparse": lambda **kwargs: BlockMask.from_sparse(SPARSE, **kwargs),
    "function": lambda **kwargs: function(**kwargs)(),
    "regroup": lambda **kwargs: blocks(B)().with_block_size(**kwargs),
    "window": lambda **kwargs: BlockMask.sliding_window((1, 1), shape=(3, 3), **kwargs),
    "documents": lambda **kwargs: BlockMask.documents([1, 2], **kwargs),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(
    ("size", "kind", "start"),
    [
        (0, ValueError, "block_size is 0, and 0 is not a positive multiple of 16."),
        (-16, ValueError, "block_size is -16, and -16 is not a positive multiple of 16."),
        (100, ValueError, "block_size is 100, and 100 is not a positive multiple of 16."),
        ((16, 24), ValueError, "block_size is (16, 24), and 24 is not a positive multiple of 16."),
        ((16,), ValueError, "block_size has 1 entries, and must have 2."),
        ((16, 16, 16), ValueError, "block_size has 3 entries, and must have 2."),
        (16.0, TypeError, "block_size is a float, not an int."),
        (True, TypeError, "block_size is a bool, not an int."),
        ("128", TypeError, "block_size is a str, not an int."),
        (None, TypeError, "block_size is a NoneType, not an int."),
        ((16, 16.0), TypeError, "block_size is a float, not an int."),
        ({16, 32}, TypeError, "block_size is a set, not an int."),
    ],
)
def test_block_sizes_are_refused(way: str, size: Any, kind: type[Exception], start: str) -> None:
    assert raised(kind, WAYS_IN[way], block_size=size).startswith(start)


@pytest.mark.parametrize("way", [blocks, function])
@pytest.mark.parametrize(
    ("shape", "kind", "start"),
    [
        (None, TypeError, "shape is a NoneType, not a pair."),
        (200, TypeError, "shape is an int, not a pair."),
        ("ab", TypeError, "shape is a str, not a pair."),
        ((200,), ValueError, "shape has 1 entries, and must have 2."),
        ((1, 200, 300), ValueError, "shape has 3 entries, and must have 2."),
        ((200, 300.0), TypeError, "shape is a float, not an int."),
        ((200, True), TypeError, "shape is a bool, not an int."),
        ((200, -1), ValueError, "shape is (200, -1), and must be >= 0."),
    ],
)
def test_shapes_are_refused(way: Any, shape: Any, kind: type[Exception], start: str) -> None:
    argument = B if way is blocks else FN
    assert raised(kind, way(argument, shape=shape)).startswith(start)


def test_shape_is_needed() -> None:
    for call in (lambda: BlockMask.from_blocks(B), lambda: BlockMask.from_function(FN)):
        with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'shape'"):
            call()


Z = np.zeros
ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    # kinds and dtypes
    "blocks list": (blocks([[True]]), TypeError, "blocks is a list, not an array."),
    "blocks float": (blocks(Z((2, 3))), TypeError, "blocks is float64, and bool is needed."),
    "blocks int": (blocks(Z((2, 3), int)), TypeError, "blocks is int64, and bool is needed."),
    "blocks masked": (blocks(np.ma.masked_array(B)), TypeError, "blocks is a masked array"),
    "blocks axes": (blocks(Z(3, bool)), ValueError, "blocks has 1 axes, and needs at least 2."),
    "mask float": (
        lambda: BlockMask.from_dense(Z((2, 3))),
        TypeError,
        "mask is float64, and bool is needed.",
    ),
    "mask uint8": (
        lambda: BlockMask.from_dense(Z((2, 3), np.uint8)),
        TypeError,
        "mask is uint8, and bool is needed.",
    ),
    "mask none": (lambda: BlockMask.from_dense(None), TypeError, "mask is None, not an array."),
    "mask sparse": (
        lambda: BlockMask.from_dense(SPARSE),
        TypeError,
        "mask is a csr_array, not an array.",
    ),
    "mask axes": (
        lambda: BlockMask.from_dense(Z(5, bool)),
        ValueError,
        "mask has 1 axes, and needs at least 2.",
    ),
    "matrix dense": (
        lambda: BlockMask.from_sparse(B),
        TypeError,
        "matrix is a ndarray, not a sparse matrix.",
    ),
    "matrix none": (
        lambda: BlockMask.from_sparse(None),
        TypeError,
        "matrix is a NoneType, not a sparse matrix.",
    ),
    "matrix axes": (
        lambda: BlockMask.from_sparse(scipy.sparse.coo_array(Z(5))),
        ValueError,
        "matrix has 1 axes, and must have 2.",
    ),
    # patterns of the wrong size (museum J5)
    "J5 nQ": (
        blocks(Z((3, 3), bool)),
        ValueError,
        "blocks has 3 blocks of queries, and 200 queries in blocks of 128 are 2.",
    ),
    "J5 nQ short": (
        blocks(Z((2, 3), bool), shape=(300, 300)),
        ValueError,
        "blocks has 2 blocks of queries, and 300 queries in blocks of 128 are 3.",
    ),
    "J5 nK": (
        blocks(Z((4, 2, 2), bool)),
        ValueError,
        "blocks has 2 blocks of keys, and 300 keys in blocks of 128 are 3.",
    ),
    "J5 size": (
        blocks(B, block_size=64),
        ValueError,
        "blocks has 2 blocks of queries, and 200 queries in blocks of 64 are 4.",
    ),
    "J5 none": (
        blocks(B, shape=(0, 300)),
        ValueError,
        "blocks has 2 blocks of queries, and 0 queries",
    ),
    "J5 matrix": (
        lambda: BlockMask.from_sparse(SPARSE, shape=(200, 512)),
        ValueError,
        "matrix has (4, 4) entries, and (200, 512) in blocks of (128, 128) are (2, 4) blocks.",
    ),
    "J5 matrix of one": (
        lambda: BlockMask.from_sparse(scipy.sparse.eye_array(1), shape=(200, 300)),
        ValueError,
        "matrix has (1, 1) entries, and (200, 300) in blocks of (128, 128) are (2, 3) blocks.",
    ),
    # functions
    "fn": (function(None), TypeError, "fn is a NoneType, not callable."),
    "fn float": (
        function(lambda b, h, i, j: i * 1.0),
        TypeError,
        "fn returned float64, and bool is needed.",
    ),
    "fn none": (
        function(lambda b, h, i, j: None),
        TypeError,
        "fn returned object, and bool is needed.",
    ),
    "fn shape": (
        function(lambda b, h, i, j: np.ones(7, bool)),
        ValueError,
        "fn returned shape (7,) for b, h, i, j that broadcast to (1, 20, 30).",
    ),
    "fn axes": (
        function(lambda b, h, i, j: np.ones((2, 1, 20, 30), bool)),
        ValueError,
        "fn returned shape (2, 1, 20, 30) for",
    ),
    "heads": (function(heads=-1), ValueError, "heads is -1, and must be >= 0."),
    "heads float": (function(heads=2.0), TypeError, "heads is a float, not an int."),
    "batch": (function(batch=(2, -3)), ValueError, "batch is -3, and must be >= 0."),
    "batch none": (function(batch=None), TypeError, "batch is a NoneType, not an int."),
    "batch str": (function(batch="2"), TypeError, "batch is a str, not an int."),
    # algebra
    "and array": (
        lambda: blocks(B)() & B,
        TypeError,
        "BlockMask & a ndarray: & takes two BlockMasks.",
    ),
    "array and": (
        lambda: B & blocks(B)(),
        TypeError,
        "BlockMask & a ndarray: & takes two BlockMasks.",
    ),
    "or none": (
        lambda: blocks(B)() | None,
        TypeError,
        "BlockMask | a NoneType: | takes two BlockMasks.",
    ),
    "true or": (
        lambda: True | blocks(B)(),
        TypeError,
        "BlockMask | a bool: | takes two BlockMasks.",
    ),
    "J5 shapes": (
        lambda: blocks(B)() & blocks(B, shape=(200, 301))(),
        ValueError,
        "& of masks of shape (200, 300) and (200, 301).",
    ),
    "J5 heads": (
        lambda: blocks(Z((2, 1, 1), bool))() | blocks(Z((3, 1, 1), bool))(),
        ValueError,
        "| of masks of 2 and 3 heads.",
    ),
    "J5 batch": (
        lambda: blocks(Z((2, 4, 1, 1), bool))() | blocks(Z((3, 4, 1, 1), bool))(),
        ValueError,
        "| of masks of 2 and 3 batch entries.",
    ),
    "block sizes": (
        lambda: blocks(B)() & blocks(Z((1, 1), bool), block_size=64)(),
        ValueError,
        "& of masks in blocks of (128, 128) and (64, 64).",
    ),
    # the rest
    "constructor": (
        lambda: BlockMask(B, shape=(200, 300)),
        TypeError,
        "BlockMask takes no arguments of its own, and 2",
    ),
    "tile": (
        lambda: blocks(B)().visible_tiles(0, 64),
        ValueError,
        "tile_q is 0, and must be >= 1.",
    ),
    "tile float": (
        lambda: blocks(B)().visible_tiles(64, 6.4),
        TypeError,
        "tile_k is a float, not an int.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_input_is_refused(name: str) -> None:
    function, kind, start = ERRORS[name]
    assert raised(kind, function).startswith(start)


def test_messages_show_what_was_given() -> None:
    message = raised(
        ValueError, lambda: BlockMask.from_blocks(B, shape=(200, 400), block_size=(128, 64))
    )
    assert message.splitlines() == [
        "blocks has 3 blocks of keys, and 400 keys in blocks of 64 are 7.",
        "  blocks  (2, 3) bool",
        "  shape=(200, 400), block_size=(128, 64)",
        "  Way out: blocks of shape (..., 2, 7).",
    ]
    message = raised(ValueError, lambda: blocks(B)() & blocks(B, shape=(200, 299))())
    assert (
        "first=BlockMask(shape=(200, 300), block_size=(128, 128), batch=(), heads=1), second="
        in message
    )
