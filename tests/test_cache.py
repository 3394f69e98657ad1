"""The kernel cache: atomic, shared by processes, works where nothing can be written."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cuflash import _cache, _compile

SPEC = _compile.Specialization(
    "merge", "sm_80", "f16", 0, 0, "", constants=(("WARPS", 4), ("MIN_BLOCKS", 1))
)

BUILD = """
import sys
from cupy.cuda import nvrtc
from cuflash import _compile
calls = []
compile_program = nvrtc.compileProgram
nvrtc.compileProgram = lambda *a: (calls.append(1), compile_program(*a))[1]
spec = _compile.Specialization("merge", "sm_80", "f16", 0, 0, "", constants=(("WARPS", 4), ("MIN_BLOCKS", 1)))
cubin = _compile.build(spec)
import hashlib
print(len(calls), hashlib.sha256(cubin).hexdigest())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kernel cache ü"  # a space and a letter beyond ASCII
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(path))
    monkeypatch.setattr(_compile, "_built", {})
    monkeypatch.setattr(_cache, "_warned", set())
    return path


def run(folder: Path) -> subprocess.Popen:
    env = {**os.environ, "CUFLASH_CACHE_DIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", BUILD], env=env, stdout=subprocess.PIPE, text=True
    )


def test_an_entry_keeps_source_beside_cubin(folder: Path) -> None:
    cubin = _compile.build(SPEC)
    source = _compile.source_path(SPEC)
    assert source.parent == folder
    assert source.read_text() == _compile.source(SPEC)
    assert source.with_suffix(".cubin").read_bytes() == cubin
    assert sorted(p.suffix for p in folder.iterdir()) == [".cu", ".cubin"]


def test_a_second_process_compiles_nothing(folder: Path) -> None:
    first, _ = run(folder).communicate()
    second, _ = run(folder).communicate()
    assert first.split()[0] == "1" and second.split()[0] == "0"
    assert first.split()[1] == second.split()[1]


def test_processes_that_start_together_agree(folder: Path) -> None:
    processes = [run(folder) for _ in range(6)]
    outputs = [p.communicate()[0].split() for p in processes]
    assert all(p.returncode == 0 for p in processes)
    assert len({digest for _, digest in outputs}) == 1
    assert not list(folder.glob(".*.tmp"))
    assert _cache.is_whole_elf(next(folder.glob("*.cubin")).read_bytes())


def test_a_killed_process_leaves_a_usable_cache(folder: Path) -> None:
    killed = run(folder)
    killed.kill()
    killed.communicate()
    output, _ = run(folder).communicate()
    assert len(output.split()[1]) == 64


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_cubin_is_compiled_again(folder: Path, damage: str, monkeypatch) -> None:
    good = _compile.build(SPEC)
    path = _compile.source_path(SPEC).with_suffix(".cubin")
    path.write_bytes(
        {"truncated": good[: len(good) // 2], "empty": b"", "text": b"x" * 999}[damage]
    )
    monkeypatch.setattr(_compile, "_built", {})
    assert _compile.build(SPEC) == good
    assert path.read_bytes() == good


def test_where_nothing_can_be_written_kernels_stay_in_memory(tmp_path: Path, monkeypatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("a file where the folder should be")
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(blocker / "cache"))
    monkeypatch.setattr(_compile, "_built", {})
    monkeypatch.setattr(_cache, "_warned", set())
    with pytest.warns(RuntimeWarning, match="cannot write its kernel cache"):
        cubin = _compile.build(SPEC)
    assert _cache.is_whole_elf(cubin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one warning per folder, and the kernel is kept
        assert _compile.build(SPEC) == cubin


def test_a_full_disk_is_no_error(folder: Path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert _cache.is_whole_elf(_compile.build(SPEC))
    assert not list(folder.glob(".*.tmp"))


def test_everything_that_changes_a_kernel_changes_its_key(folder: Path) -> None:
    """Bug museum N1 and N9: a constant, a type, the architecture, a header each give another entry."""
    from dataclasses import replace

    variants = [
        SPEC,
        replace(SPEC, arch="sm_90a"),
        replace(SPEC, element="bf16"),
        replace(SPEC, head_dim=64),
        replace(SPEC, head_dim_v=64),
        replace(SPEC, constants=(("WARPS", 8), ("MIN_BLOCKS", 1))),
        replace(SPEC, constants=(("WARPS", 4), ("MIN_BLOCKS", 2))),
        replace(SPEC, types=(("Mask", "mask::Band"),)),
    ]
    assert len({_compile.source_path(v) for v in variants}) == len(variants)


def test_a_changed_header_changes_every_key(folder: Path, tmp_path: Path, monkeypatch) -> None:
    before = _compile.source_path(SPEC)
    copy = tmp_path / "kernels_cu"
    copy.mkdir()
    for path in _compile.ROOT.glob("*.cuh"):
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "params.cuh").write_text((copy / "params.cuh").read_text() + "\n")
    monkeypatch.setattr(_compile, "ROOT", copy)
    _compile.digest.cache_clear()
    try:
        assert _compile.source_path(SPEC) != before
    finally:
        monkeypatch.undo()
        _compile.digest.cache_clear()


def test_lost_performance_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NVRTC to come may serialise what today's does not: the kernel is right all the same."""
    from cupy.cuda import nvrtc

    line = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    monkeypatch.setattr(nvrtc, "getProgramLog", lambda program: f"one\n{line}\n")
    with pytest.warns(RuntimeWarning, match=r"for sm_80: ptxas info : \(C7510\)"):
        cubin = _compile.build(SPEC)
    assert cubin.startswith(b"\x7fELF")


def test_a_compile_error_names_kernel_source_and_log(folder: Path) -> None:
    with pytest.raises(_compile.CompileError) as caught:
        _compile.compile_cubin("int x = ;\n", "broken", "sm_80", folder / "broken.cu")
    message = str(caught.value)
    assert "broken" in message and "sm_80" in message and str(folder) in message
    assert "expected an expression" in message and len(message.splitlines()) < 50
