"""What can go wrong in an emulated launch, one class per kind of mistake.

Tests name the class they expect (`pytest.raises(DataRace)`), so a kernel that fails for another reason does not pass.
"""

from __future__ import annotations


class EmulatorError(RuntimeError):
    """A kernel, or its launch, did something that a GPU would not survive or not define."""


class OutOfBounds(EmulatorError):
    """An address outside every live allocation, or outside the shared memory of the launch."""


class Misaligned(EmulatorError):
    """An address that is not a multiple of the access size (or of what the instruction demands)."""


class DataRace(EmulatorError):
    """Two accesses of the same bytes, one of them a write, that no synchronisation orders."""


class Deadlock(EmulatorError):
    """No thread can ever go on."""


class Divergence(EmulatorError):
    """Lanes of a warp, or warps of a barrier, are at different places where they must be together."""


class Uninitialised(EmulatorError):
    """Shared memory was read before anything was written to it."""


class LaunchError(EmulatorError):
    """The launch itself is impossible: block, grid, shared memory or parameters do not fit the kernel."""


class Unsupported(EmulatorError):
    """PTX that the emulator does not know. It names the instruction; it never guesses."""


class Trap(EmulatorError):
    """The kernel executed `trap` or a failing `assert`."""


class AsyncMisuse(EmulatorError):
    """Rules of asynchronous copies, mbarriers or wgmma were broken."""


# The numbers are `enum Error` of runtime/emu.h.
BY_CODE: dict[int, type[EmulatorError]] = {
    1: OutOfBounds,
    2: Misaligned,
    3: DataRace,
    4: Deadlock,
    5: Divergence,
    6: Uninitialised,
    7: LaunchError,
    8: Unsupported,
    9: Trap,
    10: AsyncMisuse,
}
