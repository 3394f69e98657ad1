"""How fast the machine could be: the tensor-core peak that "% of peak" refers to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

# 16-bit products with float32 sums: FLOP per multiprocessor and clock (NVIDIA's architecture white
# papers). GeForce chips of 8.6 run them at half the rate of their workstation siblings.
FLOP_PER_CLOCK = {"7.5": 1024, "8.0": 2048, "8.6": 1024, "8.9": 512, "9.0": 4096, "12.0": 512}
GEFORCE_86 = 512
# Chips whose data sheet quotes tensor throughput at a clock below the maximal one, in kHz.
QUOTED_CLOCK = {r"H100|H200": 1_830_000, r"A100": 1_410_000}


@dataclass(frozen=True, slots=True)
class Peak:
    """Ceilings of one GPU.

    Parameters
    ----------
    tflops : float
        16-bit tensor-core peak.
    source : str
        How it was arrived at.
    """

    tflops: float
    source: str


def peak(properties: dict[str, Any]) -> Peak | None:
    """The peak from CUDA's device properties; None for a chip that is not in the table."""
    name = properties["name"].decode()
    capability = f"{properties['major']}.{properties['minor']}"
    per_clock = FLOP_PER_CLOCK.get(capability)
    if per_clock is None:
        return None
    if capability == "8.6" and "GeForce" in name:
        per_clock = GEFORCE_86
    clock = int(properties.get("clockRate", 0))  # CUDA 13 has dropped it
    for pattern, quoted in QUOTED_CLOCK.items():
        if re.search(pattern, name):
            clock = quoted
    if not clock:
        return None
    sms = int(properties["multiProcessorCount"])
    return Peak(
        per_clock * sms * clock * 1e3 / 1e12,
        f"{sms} SM x {per_clock} FLOP/clock x {clock / 1e6:.3f} GHz",
    )
