"""Does `warmup` compile what later calls need, and nothing else? And does `show_config` tell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cuflash
from bench.host import NullDevice
from cuflash import _compile, _nvrtc, _system, _warmup
from cuflash._device import use_device

Q, KV = (2, 8, 100, 64), (2, 2, 300, 64)


class Recorder(NullDevice):
    """A device that notes which kernels are loaded."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.key = ("recorder", id(self))
        self.loaded: set[str] = set()

    def load(self, spec: _compile.Specialization) -> Any:
        self.loaded.add(spec.name)
        return super().load(spec)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deterministic": True},
        {"softcap": 5.0, "causal": True},
        {"window": (3, 0), "layout": "LHD"},
        {"wrt": ("q",)},
    ],
    ids=str,
)
def test_calls_find_every_kernel_warm(options: dict[str, Any]) -> None:
    shapes = [Q, KV, KV]
    if options.get("layout") == "LHD":
        shapes = [(b, n, h, d) for b, h, n, d in shapes]
    warm = Recorder("sm_86")
    with use_device(warm):
        done = cuflash.warmup([tuple(shapes)], dtype="float16", progress=False, **options)
    assert done.arch == "sm_86"
    assert {name for name, _ in done.kernels} == warm.loaded
    cold = Recorder("sm_86")
    with use_device(cold):
        arrays = [np.zeros(shape, np.float16) for shape in shapes]
        out, pullback = cuflash.attention_vjp(*arrays, **options)
        pullback(out)
    assert cold.loaded == warm.loaded


def test_slopes_and_several_dtypes() -> None:
    device = Recorder("sm_80")
    with use_device(device):
        cuflash.warmup(
            [(Q, KV, KV)], dtype=["float16", "bfloat16"], alibi_slopes=True, progress=False
        )
    assert any("_bf16_" in name for name in device.loaded)
    assert any(name.startswith("backward_slopes_f16") for name in device.loaded)


def test_a_cache_is_filled_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_compile, "_built", {})
    shape = (1, 1, 16, 32)
    done = cuflash.warmup([(shape, shape, shape)], backward=False, arch="sm_90a")
    assert [name for name, _ in done.kernels] == ["forward_sm90_f16_d64_linear"]
    assert len(list(tmp_path.glob("forward_sm90_f16_d64_linear-*.cubin"))) == 1
    assert str(done).startswith("1 kernel for sm_90a ready in ")
    assert "forward_sm90_f16_d64_linear" in capsys.readouterr().err  # the progress bar


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_warmup, "cupy_or_reason", lambda: (None, "no GPU in this test"))
    done = cuflash.warmup([(Q, KV, KV)])
    assert done.kernels == ()
    assert str(done) == "nothing to compile: no GPU in this test; NumPy arrays need no kernels"


def test_bad_shapes_are_refused_as_by_attention() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        cuflash.warmup([(Q, (2, 3, 300, 64), (2, 3, 300, 64))], arch="sm_80")
    with pytest.raises(cuflash.UnsupportedError, match="bfloat16"):
        cuflash.warmup([(Q, KV, KV)], dtype="bfloat16", arch="sm_75")


def test_show_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path / "not yet there"))
    config = cuflash.show_config()
    assert config.cuflash == cuflash.__version__
    assert config.cache == str(tmp_path / "not yet there")
    assert config.cache_writable
    assert dict(config.packages)["numpy"] == np.__version__
    assert str(config).splitlines()[0] == f"cuflash       {cuflash.__version__}"
    assert bool(config.gpus) != bool(config.no_gpu)


def test_config_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)  # importing it fails
    monkeypatch.setattr(_system, "_installed", lambda: [("numpy", np.__version__)])
    _system.cupy_or_reason.cache_clear()
    _nvrtc.binding.cache_clear()
    try:
        config = cuflash.show_config()
    finally:
        _system.cupy_or_reason.cache_clear()
        _nvrtc.binding.cache_clear()
    assert config.no_gpu is not None
    assert "CuPy is not installed" in config.no_gpu
    assert config.nvrtc is None


def test_nvrtc_is_of_cupys_generation() -> None:
    # Both generations are installed for the compile matrix; CuPy alone would take the newer.
    import cupy

    generation = cupy.cuda.driver.get_build_version() // 1000
    assert _nvrtc.binding().getVersion()[0] == generation


def test_nvrtc_finds_its_builtins_in_wheels_without_a_search_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The wheel 13.0.88 has none: every compilation failed with "failed to open libnvrtc-builtins.so.13.0"."""
    names = ("libnvrtc.so.13", "libnvrtc-builtins.so.13.0", "libnvrtc-builtins.alt.so.13.0")

    class File:
        def __init__(self, name: str) -> None:
            self.name = name

        def locate(self) -> Path:
            return tmp_path / self.name

    for name in names:
        (tmp_path / name).touch()
    loaded: list[str] = []
    monkeypatch.setattr("importlib.metadata.files", lambda _: [File(name) for name in names])
    monkeypatch.setattr("ctypes.CDLL", lambda path: loaded.append(Path(path).name))
    _nvrtc._preload("nvidia-cuda-nvrtc", "libnvrtc.so.13")
    assert loaded == ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0"]
