"""How a kernel is built: Specialization -> a dozen lines of generated source -> NVRTC -> cubin.

Nothing is pre-instantiated. Equal Specializations share one binary, and a length never enters one,
so a new length never recompiles. The cubin is made for the exact architecture ("sm_90a" too, which
CuPy's own path cannot name) by the NVRTC that CuPy loads; neither nvcc nor a GPU is needed.
"""

from __future__ import annotations

import functools
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from cuflash import _cache, _nvrtc
from cuflash._errors import CompileError

_HERE = Path(__file__).parent
# In a wheel the sources sit inside the package, in a checkout beside it.
ROOT = next(
    (p for p in (_HERE / "kernels_cu", _HERE.parent / "kernels_cu") if p.is_dir()),
    _HERE / "kernels_cu",
)

OPTIONS = ("-std=c++17", "-lineinfo")

# Kernel header -> the struct it takes. The function has the header's name.
PARAMS = {
    "forward": "ForwardParams",
    "forward_sm90": "ForwardSm90Params",
    "backward_sm90": "BackwardSm90Params",
    "backward_prepare": "BackwardParams",
    "backward_dkdv": "BackwardParams",
    "backward_dq": "BackwardParams",
    "backward_convert": "BackwardParams",
    "backward_slopes": "BackwardParams",
    "backward_sinks": "BackwardParams",
    "backward_bias": "BackwardParams",
    "backward_score": "BackwardParams",
    "backward_score_sums": "ScoreSumsParams",
    "mask_tiles": "MaskTilesParams",
    "packed_plan": "PackedPlanParams",
    "merge": "MergeParams",
}


@dataclass(frozen=True, slots=True)
class Specialization:
    """The compile-time half of a kernel: equal specializations share one binary.

    Parameters
    ----------
    kernel : str
        "forward" -> kernels_cu/forward.cuh, device function `forward<Config>`.
    arch : str
        "sm_86", "sm_90a".
    element : {"f16", "bf16", ""}
        Trait in kernels_cu/element.cuh; "" for kernels that touch no elements.
    head_dim, head_dim_v : int
        Compiled extents, at least the true ones.
    variant : str
        Last word of the name: which of the scores, loads and accumulations this is.
    types : tuple of (str, str)
        `using` members of Config.
    constants : tuple of (str, int or bool)
        Named constants of Config.
    preamble : str
        Source that stands between the include and Config: types of its own.
    """

    kernel: str
    arch: str
    element: str
    head_dim: int
    head_dim_v: int
    variant: str
    types: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, int], ...] = ()
    preamble: str = ""

    @property
    def name(self) -> str:
        """The CUDA symbol: what profilers, errors and the bench table show."""
        dims = f"d{self.head_dim}" if self.head_dim else ""
        if self.head_dim_v != self.head_dim:
            dims += f"v{self.head_dim_v}"
        parts = [self.kernel, self.element, dims, self.variant]
        return "_".join(part for part in parts if part)

    def constant(self, name: str) -> int:
        """The value of one named constant."""
        return dict(self.constants)[name]


@functools.cache
def digest() -> str:
    """Digest of every kernel source: relative path, length and bytes, in sorted order."""
    parts: list[str | bytes] = []
    for path in sorted(ROOT.rglob("*.cuh")):
        parts += [path.relative_to(ROOT).as_posix(), path.read_bytes()]
    if not parts:
        raise RuntimeError(f"cuflash is installed without its CUDA sources: {ROOT} has no .cuh")
    return _cache.key(*parts)


def source(spec: Specialization) -> str:
    """The generated translation unit of one kernel."""
    members = [f"using Element = {spec.element};"] if spec.element else []
    members += [f"using {name} = {value};" for name, value in spec.types]
    dims = (("HEAD_DIM", spec.head_dim), ("HEAD_DIM_V", spec.head_dim_v))
    for name, value in (dims if spec.head_dim else ()) + spec.constants:
        kind, text = ("bool", str(value).lower()) if isinstance(value, bool) else ("int", value)
        members.append(f"static constexpr {kind} {name} = {text};")
    body = "\n".join(f"    {member}" for member in members)
    return (
        f"// {spec.name}   for {spec.arch}   kernels_cu digest {digest()}\n"
        f'#include "{spec.kernel}.cuh"\n'
        f"{spec.preamble}"
        f"struct Config {{\n{body}\n}};\n"
        'extern "C" __global__ __launch_bounds__(Config::WARPS * 32, Config::MIN_BLOCKS)\n'
        f"void {spec.name}(const __grid_constant__ {PARAMS[spec.kernel]} p) {{\n"
        f"    {spec.kernel}<Config>(p);\n}}\n"
    )


_lock = threading.Lock()
_built: dict[tuple[Specialization, tuple[int, int]], bytes] = {}


def build(spec: Specialization) -> bytes:
    """The cubin of a specialization, from memory, from disk, or compiled now.

    Raises
    ------
    CompileError
        NVRTC refused.
    """
    nvrtc = _nvrtc.binding()
    version = nvrtc.getVersion()
    with _lock:
        found = _built.get((spec, version))
    if found is not None:
        return found
    text = source(spec)
    entry = _cache.key(text, " ".join(OPTIONS), spec.arch, f"nvrtc {version}")
    cubin = _cache.read(spec.name, entry)
    if cubin is None:
        path = _cache.write_source(spec.name, entry, text)
        cubin = compile_cubin(text, spec.name, spec.arch, path)
        _cache.write(spec.name, entry, cubin)
    with _lock:
        return _built.setdefault((spec, version), cubin)


def source_path(spec: Specialization) -> Path:
    """Where the generated source of `spec` is (or will be) kept."""
    nvrtc = _nvrtc.binding()
    entry = _cache.key(source(spec), " ".join(OPTIONS), spec.arch, f"nvrtc {nvrtc.getVersion()}")
    return _cache.paths(spec.name, entry)[0]


def compile_cubin(text: str, name: str, arch: str, path: Path | None) -> bytes:
    """Compile a translation unit with CuPy's NVRTC; `path` is where its text is kept, for messages."""
    nvrtc = _nvrtc.binding()
    options = (*OPTIONS, f"-I{ROOT}", f"-arch={arch}")
    program = nvrtc.createProgram(text, str(path or f"{name}.cu"), (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(_report(name, arch, path, f"{error}\n{log}")) from None
        log = nvrtc.getProgramLog(program)
        for line in log.splitlines():
            # Serialised wgmma or an ignored setmaxnreg: right, and several times too slow. Tests refuse it
            # for the compilers they have; with another one a slow result is better than none.
            if "C75" in line:
                warnings.warn(f"{name} for {arch}: {line.strip()}", RuntimeWarning, stacklevel=2)
        cubin = nvrtc.getCUBIN(program)
        # CuPy takes the cubin for a C string and drops its last byte, a zero inside the program table.
        return cubin.ljust(_cache.elf_length(cubin) or 0, b"\0")
    finally:
        nvrtc.destroyProgram(program)


def _report(name: str, arch: str, path: Path | None, log: str) -> str:
    where = path or "memory only: the cache directory cannot be written"
    lines = log.strip().splitlines()
    shown = "\n".join(lines[:40]) + ("\n..." if len(lines) > 40 else "")
    return (
        f"NVRTC could not build {name} for {arch}.\n  source  {where}\n"
        f"  options {' '.join(OPTIONS)}\n{shown}"
    )
