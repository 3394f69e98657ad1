"""Tuning without a GPU: which tiles are tried, what they take, and the row that is printed."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import report, resources, tune, tune_tables
from bench.cases import Case
from bench.tune_tables import TUNABLES
from cuflash import _plan, _tuning
from cuflash._tuning import Tile

# Large enough that no other family takes it, to fill a GPU with few blocks. No array of it is touched.
CASE = Case(8, 16, 16, 2048, 2048, 64, "float16")


def test_blocks_on_a_multiprocessor() -> None:
    blocks = resources.blocks_per_multiprocessor
    assert blocks("sm_80", 128, 48 << 10, 4) == 3  # shared memory: 3 of 49 KiB in 164
    assert blocks("sm_80", 255, 16 << 10, 4) == 2  # registers: 8 warps of 8192
    assert blocks("sm_80", 128, 81 << 10, 4) == 2
    assert blocks("sm_75", 64, 32 << 10, 4) == 2  # nothing is reserved on Turing
    assert blocks("sm_90a", 168, 226 << 10, 12) == 1
    assert blocks("sm_86", 32, 0, 16) == 3  # 48 warps
    assert blocks("sm_80", 64, 200 << 10, 4) == 0


def test_figures_of_ptxas_are_read() -> None:
    arch, dims = "sm_80", (64, 64)
    tile = _tuning.FORWARD[arch, dims]
    spec = tune.specialization(TUNABLES["forward"], arch, dims, tile, CASE)
    log = (
        "ptxas info : Compiling entry function 'other' for 'sm_80'\n"
        "    8 bytes stack frame, 9 bytes spill stores, 9 bytes spill loads\nUsed 9 registers\n"
        f"ptxas info : Compiling entry function '{spec.name}' for 'sm_80'\n"
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info : Used 168 registers, used 1 barriers\n"
    )
    used = resources.read(log, spec)
    assert (used.registers, used.spilled, used.warps, used.blocks) == (168, 12, 4, 3)
    assert used.shared == _tuning.forward_shared_bytes(tile, 64, 64)
    with pytest.raises(RuntimeError, match="no figures"):
        resources.read("", spec)


@pytest.mark.parametrize("name", TUNABLES)
def test_the_kernel_is_planned_with_the_tile(name: str) -> None:
    tunable = TUNABLES[name]
    arch = "sm_80" if tunable.portable else "sm_90a"
    dims = (128, 128)
    before = tunable.current(arch, dims)
    case = replace(CASE, head_dim=128, causal=True)
    assert before is not None
    assert (
        tune.specialization(tunable, arch, dims, before, case).constant("STAGES") == before.stages
    )
    others = [tile for tile in tunable.tiles(arch, dims) if tile != before]
    assert len(others) >= 5
    spec = tune.specialization(tunable, arch, dims, others[0], case)
    assert spec.kernel == tunable.kernel
    found = tuple(spec.constant(key) for key in ("BLOCK_Q", "BLOCK_K", "STAGES"))
    assert found == (others[0].block_q, others[0].block_k, others[0].stages)
    assert tunable.current(arch, dims) == before  # the table is as it was
    assert (
        tune.specialization(tunable, arch, dims, before, case).constant("STAGES") == before.stages
    )


def test_a_table_is_restored_after_an_error() -> None:
    tunable, dims = TUNABLES["forward"], (64, 64)
    before = dict(_tuning.FORWARD)
    with contextlib.suppress(ZeroDivisionError), tunable.using("sm_80", dims, Tile(64, 64, 4)):
        assert _tuning.FORWARD["sm_80", dims] == Tile(64, 64, 4)
        raise ZeroDivisionError
    assert before == _tuning.FORWARD
    assert _plan._plan.cache_info().currsize == 0


def test_turing_has_one_stage() -> None:
    for name in ("forward", "backward_dkdv", "backward_dq"):
        assert {tile.stages for tile in TUNABLES[name].tiles("sm_75", (64, 64))} == {1}


def test_the_row_is_python_of_the_table() -> None:
    tunable, tile = TUNABLES["forward"], Tile(128, 64, 4, stages=2, q_in_registers=True)
    row = tunable.row("sm_90", (64, 64), tile)
    assert row == '("sm_90", (64, 64)): Tile(128, 64, 4, stages=2, q_in_registers=True),'
    read = eval("{" + row + "}", {"Tile": Tile})
    assert read == {("sm_90", (64, 64)): tile}
    assert TUNABLES["backward_sm90"].row("sm_90a", (64, 64), tile).startswith("(64, 64): Tile(")


def test_verdict_names_the_gpu_and_what_was_before() -> None:
    fast, slow = Tile(128, 64, 4), Tile(64, 64, 4)
    rows: list[dict[str, Any]] = [
        {"value": fast, "current": False, "us": 10.0, "tflops": 371.4},
        {"value": slow, "current": True, "us": 12.0, "tflops": 309.5},
    ]
    text = tune.verdict(TUNABLES["forward"], "sm_90", (128, 128), rows, "NVIDIA H200")
    assert text.splitlines()[0] == "_tuning.py: FORWARD"
    assert "Tile(128, 64, 4),  # 20" in text
    assert text.endswith("NVIDIA H200: 371 TFLOP/s, Tile(64, 64, 4) 310")


def test_candidates_are_compiled_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    current = _tuning.FORWARD["sm_80", (32, 32)]
    # One that is too large for shared memory, and one that the kernel refuses.
    few = [current, Tile(64, 64, 4), Tile(128, 2048, 4, stages=2), Tile(64, 64, 4, stages=3)]
    monkeypatch.setitem(
        tune.TUNABLES,
        "forward",
        replace(TUNABLES["forward"], tiles=lambda arch, dims: iter(few)),
    )
    monkeypatch.setattr(tune, "cupy_or_reason", lambda: (None, "not in this test"))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert tune.main(["--head-dim", "32", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "no GPU: not in this test" in text
    (path,) = tmp_path.glob("*-tune-cpu.json")
    rows = {row["tile"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {tune_tables.shown_tile(tile) for tile in (few[0], few[1], few[3])}
    used = rows[tune_tables.shown_tile(current)]
    assert used["current"] and 64 <= used["registers"] <= 255 and used["blocks"] >= 2
    assert used["shared"] == _tuning.forward_shared_bytes(current, 32, 32)
    assert "static assertion" in rows["Tile(64, 64, 4, stages=3)"]["why"]


def test_no_row_no_tuning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "cupy_or_reason", lambda: (None, ""))
    assert tune.main(["--kernel", "forward_sm90", "--arch", "sm_90a", "--head-dim", "32"]) == 1
    assert "has no row for head dim 32" in capsys.readouterr().out
    assert tune.main(["--kernel", "forward_sm90", "--arch", "sm_80"]) == 1
    assert "forward_sm90 needs sm_90a, this is sm_80" in capsys.readouterr().out
