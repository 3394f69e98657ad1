"""`python -m cuflash`: does it tell what it found, does it pass, and can it fail?"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import _selfcheck
from cuflash.__main__ import main


def test_quick_run_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick"]) == 0
    text = capsys.readouterr().out
    for label in ("device", "CUDA driver", "NVRTC", "kernel cache", "packages"):
        assert f"\n{label} " in text
    assert text.count("  ok\n") == 4  # forward and backward, full and causal
    assert "TFLOP/s" in text
    assert " MB " in text
    assert "all checks passed" in text


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "cuflash", "--config"]
    environment = {**os.environ, "CUFLASH_CACHE_DIR": "/nonexistent/cuflash"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cuflash       {cuflash.__version__}\n")
    assert "/nonexistent/cuflash" in done.stdout


def wrong_forward(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, lse = cuflash.attention(q, k, v, **options)
    out[0, -1, 0] += 1e-3
    return out, lse


def wrong_lse(q: Any, k: Any, v: Any, **options: Any) -> Any:
    out, lse = cuflash.attention(q, k, v, **options)
    return out, lse + np.float32(1e-3)


def nan_gradient(*arrays: Any, **options: Any) -> Any:
    grads = cuflash.attention_backward(*arrays, **options)
    grads.k[0, 0, 0] = np.nan
    return grads


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("attention", wrong_forward),
        ("attention", wrong_lse),
        ("attention_backward", nan_gradient),
    ],
)
def test_a_wrong_result_fails(
    name: str, broken: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        """cuflash with one function replaced."""

        attention = staticmethod(cuflash.attention)
        attention_backward = staticmethod(cuflash.attention_backward)

    setattr(Broken, name, staticmethod(broken))
    monkeypatch.setattr(_selfcheck, "cuflash", Broken)
    small = _selfcheck.Case(2, 64, 16, "float32", True)
    monkeypatch.setattr(_selfcheck, "cases", lambda quick: [small])
    monkeypatch.setattr(_selfcheck, "cupy_or_reason", lambda: (None, "not in this test"))
    assert main(["--quick"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_products_without_cublas_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CuPy imports without cuBLAS, and fails at its first matrix product."""

    class NoProducts:
        def __matmul__(self, other: object) -> None:
            raise ImportError('Failure finding "libcublasLt.so.12"\n  a long list of folders')

    driver = SimpleNamespace(get_build_version=lambda: 12090)
    cupy = SimpleNamespace(ones=lambda shape: NoProducts(), cuda=SimpleNamespace(driver=driver))
    monkeypatch.setattr(_selfcheck, "cupy_or_reason", lambda: (cupy, None))
    assert main(["--quick"]) == 1
    text = capsys.readouterr().err
    assert "pip install nvidia-cublas-cu12" in text and "long list" not in text


def test_plain_formula_without_memory_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    row = _selfcheck.Row("forward", "plain", None, None, None, 1e-6, "")
    assert "does not fit into memory" in str(row)

    def exhausted() -> Any:
        raise MemoryError

    assert _selfcheck.Machine(np).try_measure(exhausted) is None


def test_operations_are_counted_as_published() -> None:
    full = _selfcheck.Case(16, 8192, 128, "float16", causal=False)
    causal = _selfcheck.Case(16, 8192, 128, "float16", causal=True)
    assert full.flops(backward=False) == 4 * 16 * 8192**2 * 128
    assert causal.flops(backward=False) == full.flops(backward=False) / 2
    assert full.flops(backward=True) == 2.5 * full.flops(backward=False)
