"""Shows what a CUDA source needs from the emulator: opcodes with their counts, and those it does not know.

python -m tests.emulator kernel.cu --arch compute_90a -D HEAD_DIM=64
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from . import build
from .errors import Unsupported
from .nvrtc import Nvrtc
from .ptx import parse
from .translate import translate, unknown_opcodes


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns 1 when the source holds something that the emulator does not know."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("source", type=Path, help="CUDA source, or PTX if its name ends in .ptx")
    parser.add_argument("--arch", default="compute_80")
    parser.add_argument("--cuda", type=int, default=12, help="major version of NVRTC")
    parser.add_argument("-D", action="append", default=[], dest="defines")
    parser.add_argument("--cpp", type=Path, help="write the generated C++ here")
    options = parser.parse_args(arguments)
    text = options.source.read_text()
    if options.source.suffix != ".ptx":
        start = time.perf_counter()
        defines = tuple(f"-D{d}" for d in options.defines) + (
            f"-I{options.source.resolve().parent}",
        )
        text = Nvrtc(options.cuda).ptx(text, options.arch, defines, options.source.name)
        print(f"NVRTC {time.perf_counter() - start:.2f} s")
    module = parse(text)
    for opcode, n in Counter(i.full_opcode for i in module.instructions()).most_common():
        print(f"{n:7d}  {opcode}")
    unknown = unknown_opcodes(module)
    for opcode, n in unknown.most_common():
        print(f"{n:7d}  {opcode}  UNKNOWN")
    if unknown:
        return 1
    try:
        start = time.perf_counter()
        translation = translate(text)
        print(f"translated in {time.perf_counter() - start:.2f} s")
    except Unsupported as error:
        print(f"UNKNOWN: {error}")
        return 1
    if options.cpp:
        options.cpp.write_text(translation.source)
    start = time.perf_counter()
    build.kernel_library(translation.source)
    print(
        f"g++ {build.optimisation(translation.source)}: {time.perf_counter() - start:.2f} s (0 when cached)"
    )
    for kernel in translation.kernels.values():
        print(
            f"kernel {kernel.name}: {kernel.instructions} instructions, "
            f"{kernel.static_shared} bytes of static shared memory"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
