"""Figures that others have published, to be printed beside ours: value, GPU, source, and how it was read.

They were measured on other machines by other programs. They say what was reported, not what this
machine should reach.
"""

from __future__ import annotations

from dataclasses import dataclass

SEEN = "read in the source"
BARS = "heights of bars, read in the source"
RECALLED = "to be checked against the source before it is quoted"

FA1 = 'Dao et al., "FlashAttention", arXiv:2205.14135 (2022)'
FA1_CHARTS = "charts of the FlashAttention repository (assets/), version 1"
FA2_CHARTS = "charts of the FlashAttention repository (assets/), version 2"


@dataclass(frozen=True, slots=True)
class Published:
    """Where a figure comes from.

    Parameters
    ----------
    source, gpu : str
    read : str
        SEEN, BARS or RECALLED.
    """

    source: str
    gpu: str
    read: str

    def __str__(self) -> str:
        return f"{self.source}; {self.gpu}; {self.read}"


# (a) batch 32, 8 heads, L 2048, d 64, fp16, dropout 0.2, ten trials: seconds.
DROPOUT = Published("a published run of standard against flash attention", "T4", RECALLED)
DROPOUT_SECONDS = {"standard": 1.0446, "flash": 0.3437}
# Forward and backward with dropout and a mask, with a mask, with neither: times as fast as PyTorch.
T4_SPEEDUP = Published(FA1_CHARTS, "T4", BARS)
T4_SPEEDUPS = {2048: (3.15, 2.85, 1.5)}

# (b) attention of GPT-2 medium: L 1024, d 64, 16 heads, batch 64, forward + backward.
GPT2 = Published(f"{FA1}, figure 2 left", "A100", RECALLED)
GPT2_MILLISECONDS = {"standard": 41.7, "flash": 7.3}
GPT2_TRAFFIC_GB = {"standard": 40.3, "flash": 4.4}

# (c) memory of forward + backward in MB: batch 16, 8 heads, d 64. None: out of memory.
MEMORY = Published(f"{FA1}, table in appendix", "A100 40GB", RECALLED)
MEMORY_MB: dict[str, dict[int, float]] = {
    "flash": dict(
        zip(
            (2**n for n in range(7, 17)),
            (22, 44, 104, 209, 418, 836, 1672, 3344, 6690, 13384),
            strict=True,
        )
    ),
    "standard": {128: 36, 256: 104, 512: 336, 1024: 1184, 2048: 4416, 4096: 17024},
}
SAVING = Published(FA1_CHARTS, "A100", SEEN)
SAVINGS = {128: 1.5, 256: 2.3, 512: 3.2, 1024: 5.6, 2048: 10.5, 4096: 20.3}

# (d) block-sparse: time falls in proportion to the share of blocks that is kept.
SPARSE = Published(f"{FA1}, figure 2 right, L 4096", "A100", RECALLED)

# (e) forward + backward in TFLOP/s, heads * d = 2048, batch * L = 16384. By (d, causal), lengths 512 to 16k;
# None: the label is hidden in the chart.
FA2 = Published(FA2_CHARTS, "A100 80GB SXM4", SEEN)
FA2_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
FA2_TFLOPS: dict[tuple[int, bool], tuple[float | None, ...]] = {
    (64, False): (132, 153, 162, 171, 175, 176),
    (64, True): (88, 119, 140, 156, 165, 171),
    (128, False): (None, None, 187, 196, 201, 203),
    (128, True): (99, 133, 155, 173, 182, 189),
}
