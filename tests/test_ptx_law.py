"""Every kernel against the laws of `ptx_law.py`, and the laws against planted mistakes."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest

from cuflash._compile import Specialization
from tests import compile_matrix as matrix
from tests import ptx_addresses, ptx_law
from tests.emulator.device import ptx
from tests.emulator.nvrtc import Nvrtc
from tests.emulator.ptx import parse
from tests.ptx_flow import Flow

# One of each family and class of variants; --thorough takes every kernel that the suite compiles.
CHOSEN = {
    "sm_75": ("forward_f16_d64_linear", "backward_dkdv_f16_d64_shaped", "backward_prepare_f16_d64"),
    "sm_80": (
        "forward_bf16_d64_linear_dense",
        "backward_dq_f16_d64_linear",
        "merge_f16",
        "forward_f16_d64_rows",
    ),
    "sm_90a": (
        "forward_sm90_f16_d64_linear",
        "backward_sm90_f16_d64_turns_linear",
        "backward_sm90_f16_d64_accumulate_linear_blocks",
        "mask_tiles_blocks",
        "packed_plan",
    ),
}


@functools.cache
def kernels(arch: str) -> dict[str, Specialization]:
    return {spec.name: spec for spec in matrix.kernels(arch)}


@pytest.mark.parametrize(("arch", "name"), [(a, n) for a, names in CHOSEN.items() for n in names])
def test_a_kernel_of_each_kind_obeys(arch: str, name: str) -> None:
    spec = next(s for n, s in sorted(kernels(arch).items()) if n.startswith(name))
    assert ptx_law.faults(spec, parse(ptx(spec))) == []


@pytest.mark.thorough
@pytest.mark.parametrize("arch", matrix.ARCHITECTURES)
def test_every_kernel_obeys(arch: str) -> None:
    found = []
    for spec in filter(matrix.in_tests, kernels(arch).values()):
        found += ptx_law.faults(spec, parse(ptx(spec)))
    assert found == []


# ---- the laws can fail


def flow_of(body: str, parameters: str = "float* x, int n") -> Flow:
    """The flow of a small kernel."""
    text = Nvrtc().ptx(f'extern "C" __global__ void k({parameters}) {{ {body} }}', "compute_80")
    return Flow(parse(text).functions[0])


LANE, SYNC, WARP_SYNC = "threadIdx.x % 32", "__syncthreads();", "__syncwarp();"
HALF_SYNC = 'asm volatile("bar.sync 1, 256;");'


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (f"if (n > 3) {SYNC}", False),
        (f"if (threadIdx.x / 32 == 2) {WARP_SYNC}", False),
        (f"if (threadIdx.x < 96) {WARP_SYNC}", False),
        (f"if (threadIdx.x < 95) {WARP_SYNC}", True),
        (f"if (threadIdx.x / 32 == 2) {SYNC}", True),
        (f"if (threadIdx.x < 256) {HALF_SYNC}", False),
        (f"if (threadIdx.x / 128 < 2) {HALF_SYNC}", False),
        (f"if (threadIdx.x < 128) {HALF_SYNC}", True),
        (f"if ({LANE} == 0) {SYNC}", True),
        (f"if (x[threadIdx.x] > 0) {SYNC}", True),
        (f"if (x[n] > 0) {SYNC}", False),
        (f"if (__any_sync(~0u, x[threadIdx.x] > 0)) {WARP_SYNC}", False),
        (f"if (__any_sync(~0u, x[threadIdx.x] > 0)) {SYNC}", True),
        (f"if (__syncthreads_or(x[threadIdx.x] > 0)) {SYNC}", False),
        (f"for (int i = 0; i < {LANE}; ++i) {SYNC}", True),
        (f"for (int i = threadIdx.x; i < n; i += 32) x[i] = 0; {SYNC}", False),
        (f"int i = 0; if ({LANE} > 3) i = n; if (i) {SYNC}", True),
        (f"if ({LANE} == 0) return; {SYNC}", True),
        (f"if ({LANE} < n) x[0] = __shfl_sync(~0u, n, 1);", True),
        ("x[0] = __shfl_sync(~0u, n, 1);", False),
    ],
)
def test_threads_that_may_part_before_a_step_of_all(body: str, wrong: bool) -> None:
    assert any("may part" in text for text in ptx_law.converged(flow_of(body))) == wrong


@pytest.mark.parametrize(
    ("condition", "wrong"),
    [
        ("threadIdx.x >= 256", False),
        ("threadIdx.x >= 224", True),
        ("threadIdx.x / 32 == 8", True),
        ("__any_sync(~0u, x[threadIdx.x] > 0)", True),
        ("__syncthreads_or(x[threadIdx.x] > 0)", False),
        ("__shfl_sync(~0u, threadIdx.x / 128, 0) == 2", False),
        ("__shfl_sync(~0u, threadIdx.x / 32, 0) == 8", True),
    ],
)
def test_warps_that_may_part_before_a_step_of_their_warpgroup(condition: str, wrong: bool) -> None:
    flow = flow_of(f'if ({condition}) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");')
    assert any("where 128 threads may part" in text for text in ptx_law.converged(flow)) == wrong
    assert not any("where lanes may part" in text for text in ptx_law.converged(flow))


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("x[n * m] = 1;", True),
        ("x[(long long)n * m] = 1;", False),
        ("x[n * 4 + m] = 1;", False),
        ("x[(n * m + 3) * 2] = 1;", True),
        ("x[threadIdx.x % n] = 1;", False),
    ],
)
def test_products_of_32_bits_in_addresses(body: str, wrong: bool) -> None:
    flow = flow_of(body, "float* x, int n, int m")
    assert any("part of an address" in text for text in ptx_addresses.wide_products(flow)) == wrong


@functools.cache
def warpgroups() -> tuple[Specialization, str]:
    spec = kernels("sm_90a")["forward_sm90_f16_d64_linear"]
    return spec, ptx(spec)


def without(pattern: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, "", text)


def instead(old: str, new: str, count: int = 0) -> Callable[[str], str]:
    return lambda text: re.sub(old, new, text, count=count)


def announced(text: str) -> str:
    """The bytes of a tile, as the kernel writes them."""
    (register,) = re.findall(r"expect_tx\S* _, \[%r\d+\], (%r\d+);", text)[:1]
    return re.findall(rf"mov\.u32\s+{register}, (\d+);", text)[0]


@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (without(r"wgmma\.fence\.sync\.aligned;"), "no fence behind what touched its registers"),
        (instead(r"(wgmma\.wait_group\S* )0;", r"\1 1;"), "reads a result that is under way"),
        (without(r"wgmma\.commit_group\.sync\.aligned;"), "before the products are committed"),
        (instead(r"(setmaxnreg\.inc\S* )\d+;", r"\1 248;"), "248 registers, of"),
        (instead(r"(setmaxnreg\.dec\S* )\d+;", r"\1 28;"), "not one of 24, 32"),
        (instead(r"\.maxntid \d+", ".maxntid 256"), "compiled for 256 threads"),
        (instead(r"\.param \.align 64", ".param .align 8"), "not on 64-byte boundaries"),
        (instead(r"bar\.sync(\s+)0;", r"bar.sync\g<1>16;"), "there are barriers 0 to 15"),
        (instead(r"bar\.sync(\s+)0;", r"bar.sync\g<1>1, 100;"), "no whole warps"),
        (lambda text: text.replace(announced(text), "1048576"), ": 1048576 bytes"),
        (instead(r"ld\.global\.u16", "ld.global.nc.u16"), "may be written"),
        (
            instead(r"st\.global\.(v\d\.)?(\w+)(\s+)\[(%rd\d+)\]", r"st.global.\1\2\3[\4+2]"),
            "multiple",
        ),
    ],
)
def test_planted_mistakes(plant: Callable[[str], str], words: str) -> None:
    spec, text = warpgroups()
    planted = plant(text)
    assert planted != text
    found = ptx_law.faults(spec, parse(planted), together=False)
    assert any(words in fault for fault in found), found


def test_shared_memory_and_parameters_beyond_the_limits() -> None:
    spec, text = warpgroups()
    static = text.replace("{\n", "{\n.shared .align 4 .b8 more[60000];\n", 1)
    assert any("60000 + " in fault for fault in ptx_law.faults(spec, parse(static), together=False))
    large = re.sub(r"(\.param \.align 64 \.b8 \w+)\[\d+\]", r"\1[4608]", text)
    assert any(
        "4608 bytes of parameters" in f for f in ptx_law.faults(spec, parse(large), together=False)
    )
