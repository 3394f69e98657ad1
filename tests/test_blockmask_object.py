"""BlockMask as an object to hold, to copy and to look at."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import pickle
import sys
import weakref
from typing import Any

import numpy as np
import pytest

from cuflash import BlockMask
from tests.blockmask import dense_mask, raised, same


def test_immutable_and_compared_by_identity() -> None:
    mask = BlockMask.from_dense(np.tri(40, dtype=bool), block_size=16)
    other = BlockMask.from_dense(np.tri(40, dtype=bool), block_size=16)
    assert mask != other and mask == mask and len({mask, other, mask}) == 2
    for array in (mask.slots, mask.bits):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for name in ("shape", "slots", "anything"):
        with pytest.raises(AttributeError):
            setattr(mask, name, None)
    watch = weakref.ref(mask)
    del mask
    gc.collect()
    assert watch() is None


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies(again: Any) -> None:
    dense = dense_mask((2, 3), (70, 50), 1)
    same(again(BlockMask.from_dense(dense, block_size=32)), dense)


def test_repr() -> None:
    dense = np.tri(64, 96, 32, dtype=bool)
    assert repr(
        BlockMask.from_dense(np.stack([dense, dense]), block_size=(32, 16))
    ).splitlines() == [
        "BlockMask(shape=(64, 96), block_size=(32, 16), batch=(), heads=2), density 0.672",
        "  2 x 2 x 6 blocks: 12 full, 8 partial (2 distinct), 4 absent",
        "    ##++..",
        "    ####++",
    ]
    lines = repr(BlockMask.sliding_window((5000, 0), shape=(50000, 60000))).splitlines()
    assert len(lines) <= 2 + 16 and max(map(len, lines)) <= 100
    assert {len(line) for line in lines[2:]} == {len(lines[2])}
    empty = repr(BlockMask.from_blocks(np.zeros((1, 1), bool), shape=(0, 7)))
    assert empty.startswith(
        "BlockMask(shape=(0, 7), block_size=(128, 128), batch=(), heads=1), density 0\n"
    )


class Axes:
    """Takes what matplotlib's Axes would draw."""

    def __init__(self) -> None:
        self.calls: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.update({name: (args, kwargs)})


def test_plot_draws_the_share_of_each_block() -> None:
    dense = dense_mask((2, 3), (100, 70), 4)
    mask = BlockMask.from_dense(dense, block_size=(32, 16))
    axes = Axes()
    assert mask.plot(axes, index=(1, 2)) is axes
    (image,), options = axes.calls["imshow"]
    for a in range(4):
        for c in range(5):
            block = dense[1, 2, a * 32 : a * 32 + 32, c * 16 : c * 16 + 16]
            assert image[a, c] == block.mean()
    assert options["extent"] == (0, 80, 128, 0)
    assert axes.calls["set_xlim"] == ((0, 70), {}) and axes.calls["set_ylim"] == ((100, 0), {})
    mask.plot(axes)
    assert axes.calls["imshow"][0][0][0, 0] == dense[0, 0, :32, :16].mean()
    empty = Axes()
    BlockMask.from_dense(np.zeros((0, 5), bool)).plot(empty)
    assert "imshow" not in empty.calls
    assert raised(ValueError, mask.plot, axes, index=(2, 0)).startswith("index (2, 0) is outside")
    assert raised(ValueError, mask.plot, axes, index=(0,)).startswith("index (0,) is outside")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    mask = BlockMask.from_dense(np.tri(40, dtype=bool))
    assert raised(ImportError, mask.plot).startswith(
        "plot needs matplotlib, which cannot be imported"
    )


def test_plot_with_matplotlib() -> None:
    import matplotlib

    matplotlib.use("Agg")
    axes = BlockMask.from_dense(np.tri(100, dtype=bool), block_size=16).plot()
    axes.figure.canvas.draw()
    assert axes.get_ylim() == (100, 0) and axes.get_xlabel() == "key"


def test_docstring_examples() -> None:
    tried = 0
    for module in ("", "_builders", "_convert", "_grid", "_patterns"):
        failed, count = doctest.testmod(importlib.import_module(f"cuflash._blockmask{module}"))
        assert failed == 0 and count > 0
        tried += count
    assert tried > 20
