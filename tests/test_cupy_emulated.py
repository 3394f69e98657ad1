"""What a CuPy user does, through CuPy itself, on a machine without a GPU (tests/emulator/cupy_driver.py).

Another process, because CuPy finds its device when it is imported, and elsewhere in the tests it finds none.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Hopper differs in tensor maps and in the size of its launches' arguments; the rest is the same code.
RUNS = {
    "sm_80": ("tests/test_cupy_arrays.py", "tests/test_errors_devices.py", "tests/test_recipes.py"),
    "sm_90a": ("tests/test_cupy_arrays.py", "-k", "float16 or strided or thread or wait or graphs"),
}


def through_cupy(arch: str, *arguments: str) -> str:
    """The last line of a run of tests on an emulated device that CuPy takes for a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "--gpu", "-p", "tests.emulator.cupy_driver"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"CUFLASH_EMULATED_ARCH": arch, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("arch", RUNS)
def test_cupy_on_the_emulator(arch: str) -> None:
    last = through_cupy(arch, *RUNS[arch])
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None and int(passed[1]) >= 6, last


def test_a_fault_inside_a_launch_fails_its_test(tmp_path: Path) -> None:
    """C code cannot pass an exception on; it must not be lost."""
    path = tmp_path / "test_wrong.py"
    path.write_text(
        "import pytest\n"
        "@pytest.mark.small_gpu\n"
        "def test_wrong():\n"
        "    import cupy\n"
        "    code = 'extern \"C\" __global__ void f(float* x) { x[threadIdx.x + 200] = 1; }'\n"
        "    x = cupy.zeros(8, 'f4')\n"
        "    cupy.RawModule(code=code).get_function('f')((1,), (32,), (x,))\n"
    )
    with pytest.raises(AssertionError, match="OutOfBounds"):
        through_cupy("sm_80", "-c", "pyproject.toml", "-p", "tests.conftest", str(path))
