"""Every instruction form the kernels use computes what the PTX manual says: in the emulator, and
with --gpu on hardware.

References are NumPy, written from the manual's tables. With `--gpu --record-goldens` the outputs of
the device are kept under tests/golden, and from then on every machine compares with those, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.emulator.codegen import EMITTERS, load_emitters
from tests.emulator.nvrtc import Nvrtc
from tests.emulator.tensormap import tensor_map
from tests.instructions import bulk, golden, handshakes
from tests.instructions.catalogue import BY_NAME, FORMS
from tests.instructions.form import Case, MapOf, blank, mismatch, unit_source
from tests.instructions.launch import OPTIONS, EmulatorRunner, GpuRunner, architecture

# Moves of a register to itself and of special registers: what they compute needs no table of the
# manual.
TRIVIAL = {"mov.u32", "mov.f64", "mov.b32"}
GROUPS = sorted({form.group for form in FORMS})
_EMULATOR = pytest.param(EmulatorRunner, id="emulator")
_GPU = pytest.param(GpuRunner, id="gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=[_EMULATOR, _GPU])
def runner(request: pytest.FixtureRequest) -> EmulatorRunner | GpuRunner:
    return request.param(FORMS)


@pytest.mark.parametrize("name", BY_NAME)
def test_form(
    name: str, runner: EmulatorRunner | GpuRunner, request: pytest.FixtureRequest
) -> None:
    form = BY_NAME[name]
    if not runner.supports(form):
        pytest.skip(f"this GPU is not {form.group}")
    case = form.case()
    outputs = runner.run(form, case)
    compare_with_reference(case, outputs)
    if runner.device and request.config.getoption("--record-goldens"):
        golden.record(form, case, outputs, runner.device)
    why = golden.compare(form, case, outputs)
    assert why is None, why


def test_asynchronous_forms_under_other_schedules() -> None:
    """mbarriers and bulk copies complete in another order with every seed; results must not change."""
    forms = [form for module in (handshakes, bulk) for form in module.FORMS]
    for seed in (1, 2):
        runner = EmulatorRunner(FORMS, seed)
        for form in forms:
            case = form.case()
            compare_with_reference(case, runner.run(form, case))


def compare_with_reference(case: Case, outputs: list[np.ndarray]) -> None:
    assert len(outputs) == len(case.expected)
    for i, (actual, expected) in enumerate(zip(outputs, case.expected, strict=True)):
        tolerance = case.tolerance[i] if i < len(case.tolerance) else None
        why = mismatch(np.asarray(actual), np.ascontiguousarray(expected), tolerance)
        assert why is None, f"output {i}: {why}"


@pytest.mark.parametrize("group", GROUPS)
def test_ptxas_accepts_every_form(group: str) -> None:
    """The emulator must not accept what the assembler of a real device refuses."""
    compiler = Nvrtc()
    source = unit_source([f for f in FORMS if f.group == group])
    assert compiler.cubin(source, f"sm_{architecture(group)}", OPTIONS)
    assert "serializ" not in compiler.log


def _opcodes(text: str) -> set[str]:
    """Dotted PTX opcodes in the string literals of CUDA source."""
    load_emitters()
    bases = {prefix.split(".")[0] for prefix in EMITTERS}
    literals = " ".join(re.findall(r'"((?:[^"\\]|\\.)*)"', text))
    words = re.findall(r"(?<![\w.%])[a-z]\w*(?:\.[A-Za-z][\w:]*)+", literals)
    return {w for w in words if w.split(".")[0] in bases}


def test_every_instruction_written_in_the_kernels_has_a_form() -> None:
    known = set().union(*(_opcodes("".join(form.functions) + form.source()) for form in FORMS))
    kernels = Path(__file__).resolve().parent.parent / "kernels_cu"
    missing = {
        f"{opcode} ({path.name})"
        for path in kernels.glob("*.cuh")
        for opcode in _opcodes(path.read_text()) - known - TRIVIAL
    }
    assert not missing, sorted(missing)


# ---- the suite's own machinery
@pytest.mark.parametrize("name", ["mma_m16n8k16_f32_f16_f16_f32", "bulk_store"])
def test_golden_files_are_recorded_and_compared(name: str, tmp_path: Path) -> None:
    form = BY_NAME[name]
    case = form.case()
    outputs = [np.ascontiguousarray(e) for e in case.expected]
    assert golden.compare(form, case, outputs, tmp_path) is None  # none recorded yet
    golden.record(form, case, outputs, "test device", tmp_path)
    assert golden.compare(form, case, outputs, tmp_path) is None
    wrong = [o.copy() for o in outputs]
    wrong[0].reshape(-1)[0] += 1
    assert "against test device" in str(golden.compare(form, case, wrong, tmp_path))
    other = form.make(np.random.default_rng(0))
    assert "record it again" in str(golden.compare(form, other, outputs, tmp_path))


@pytest.mark.parametrize("name", ["ldmatrix_x4", "tma_load_2d_swizzle_128"])
def test_gpu_runner_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the GPU path but the device: real cubins, and the emulator behind CuPy's names."""
    import cupy  # its names only; part of the test requirements

    form = BY_NAME[name]
    emulated = EmulatorRunner([form]).module(form.group)

    class Module:
        def load(self, cubin: bytes) -> None:
            assert cubin.startswith(b"\x7fELF")

        def get_function(self, symbol: str) -> Any:
            return lambda grid, block, args, shared_memory: emulated.launch(
                symbol, grid, block, shared_memory, list(args)
            )

    def encode(pointer: int, m: MapOf) -> np.void:
        return tensor_map(pointer, m.kind, m.dims, m.strides, m.box, swizzle=m.swizzle)

    class Array(np.ndarray):
        @property
        def data(self) -> SimpleNamespace:
            return SimpleNamespace(ptr=self.ctypes.data)

    device = {"name": b"no device"}
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceProperties", lambda _: device)
    monkeypatch.setattr(cupy.cuda, "Device", lambda: SimpleNamespace(compute_capability="90"))
    monkeypatch.setattr(cupy.cuda.function, "Module", Module)
    monkeypatch.setattr(cupy, "asarray", lambda x: emulated.memory.copy(x).view(Array))
    monkeypatch.setattr(cupy, "asnumpy", lambda x: x.view(np.ndarray))
    monkeypatch.setattr("tests.instructions.launch.encode_tensor_map", encode)
    runner = GpuRunner([form])
    assert runner.device == "no device"
    assert runner.supports(form)
    case = form.case()
    compare_with_reference(case, runner.run(form, case))


def test_cases_are_the_same_every_time() -> None:
    for form in FORMS:
        assert form.case().digest() == form.case().digest(), form.name


def test_mismatch_sees_one_bit_a_nan_and_a_tolerance() -> None:
    x = np.array([1.0, np.nan, np.inf, 0.0], np.float32)
    assert mismatch(x, x.copy(), None) is None
    assert mismatch(np.nextafter(x, np.float32(2)), x, None) is not None
    assert mismatch(np.array([-0.0], np.float32), np.array([0.0], np.float32), None) is not None
    assert mismatch(x + np.float32(1e-3), x, 1e-2) is None
    assert mismatch(x + np.float32(1e-1), x, 1e-2) is not None
    assert mismatch(np.array([np.nan]), np.array([1.0]), 1e9) is not None
    assert mismatch(np.array([np.inf]), np.array([1.0]), 1e9) is not None


def test_unwritten_output_is_seen() -> None:
    output = blank(4, np.float32)
    assert np.isnan(output.initial).all()
