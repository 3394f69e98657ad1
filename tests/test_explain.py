"""explain() says what would run; it shows the same Problem, refusals and Plan that the call itself uses."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _compile, _explain, _launch_merge
from tests.machines import Machine

Q = np.zeros((2, 8, 100, 64), np.float16)
K = np.zeros((2, 2, 300, 64), np.float16)


def test_docstring_example() -> None:
    failed, tried = doctest.testmod(_explain)
    assert tried and not failed


def test_forward_on_a_device(device_backend: Machine) -> None:
    q, k = device_backend.put(Q), device_backend.put(K)
    told = cuflash.explain(q, k, k, window=(3, None))
    text = str(told)
    assert text.startswith("forward · float16 · batch 2 · 8 heads, 2 of k and v · 100 queries")
    assert "row i sees keys j >= i + 197" in text
    assert told.refusals["forward"] == [] and told.refusals["backward"]
    (launch,) = told.plan.launches
    assert f"launch {launch.spec.name}\n    grid {launch.grid}, block {launch.block}" in text
    assert f"shared memory {launch.shared_memory} bytes" in text
    assert str(_compile.source_path(launch.spec)) in text


@pytest.mark.parametrize("layout", ["HLD", "LHD"])
def test_backward_explains_the_plan_that_runs(device_backend: Machine, layout: str) -> None:
    arrays: list[Any] = [Q, K, K]
    if layout == "LHD":
        arrays = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in arrays]
    q, k, v = map(device_backend.put, arrays)
    told = cuflash.explain(q, k, v, backward=True, causal=True, layout=layout, deterministic=True)
    assert "gradients of q, k, v, deterministic" in str(told)
    names = [launch.spec.kernel for launch in told.plan.launches]
    assert names == ["backward_prepare", "backward_dkdv", "backward_dq"]
    assert all("linear" in launch.spec.variant for launch in told.plan.launches)
    assert "workspace in all" in str(told)


def test_refusals_are_explained_not_raised(device_backend: Machine) -> None:
    q = device_backend.put(np.zeros((1, 5, 300), np.float16))
    told = cuflash.explain(q, q, q)
    assert told.plan is None
    assert told.refusals["forward"][0] == "head_dim 300 > 256"
    assert "head_dim 300 > 256" in str(told)
    assert str(told).splitlines()[-1].startswith("  Nearest supported: head dims up to 256")


def test_nothing_to_launch(device_backend: Machine) -> None:
    q = device_backend.put(np.zeros((1, 0, 64), np.float16))
    assert "nothing to launch: an extent is 0" in str(cuflash.explain(q, q, q))


def test_wrong_calls_are_refused_as_by_attention() -> None:
    with pytest.raises(ValueError, match=r"k has 300 heads|k has 2 heads"):
        cuflash.explain(Q[:, :3], K, K)
    with pytest.raises(TypeError, match="causal is an int"):
        cuflash.explain(Q, K, K, causal=1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "every row sees every key"),
        ({"causal": True}, "row i sees keys j <= i + 200"),
        ({"causal": True, "q_offset": 0}, "row i sees keys j <= i"),
        ({"window": (2, 1), "q_offset": -5}, "row i sees keys i - 7 <= j <= i - 4"),
    ],
)
def test_the_mask_in_words(options: dict[str, Any], line: str) -> None:
    assert str(cuflash.explain(Q, K, K, **options)).splitlines()[1] == f"  {line}"


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a", "sm_120"])
def test_registers_are_read_from_the_cubin(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number ptxas prints, for old and new cubin layouts."""
    from cupy.cuda import nvrtc

    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    spec = _launch_merge.specialization(arch, "f16")
    options = (*_compile.OPTIONS, f"-I{_compile.ROOT}", f"-arch={arch}", "--ptxas-options=-v")
    program = nvrtc.createProgram(_compile.source(spec), "merge.cu", (), ())
    nvrtc.compileProgram(program, options)
    (line,) = [x for x in nvrtc.getProgramLog(program).splitlines() if "registers" in x]
    assert f"Used {_explain.registers_of(nvrtc.getCUBIN(program))} registers" in line


def test_CUFLASH_EXPLAIN_prints_every_new_kind_of_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cuflash import _prepare

    _prepare.forget()
    monkeypatch.setenv("CUFLASH_EXPLAIN", "1")
    q = Q.astype(np.float32)[:, :, :5]
    cuflash.attention(q, q, q)
    cuflash.attention(q, q, q)
    assert capsys.readouterr().err.count("CPU backend (NumPy)") == 1
