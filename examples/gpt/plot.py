"""Loss curves as an SVG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .training import RUNNING, History

# Colours that stay apart for the colour-blind: Okabe, Ito, 2008.
COLOURS = {"plain": "#E69F00", "cuflash": "#0072B2"}


def loss_curves(path: Path, histories: Mapping[str, History], unigram_entropy: float) -> str:
    """Draw running and test loss by step.

    Parameters
    ----------
    path : Path
        Of the SVG file.
    histories : mapping of str to History
        By attention.
    unigram_entropy : float
        Of the test text; a dashed line.

    Returns
    -------
    str
        What was done, or how to get a curve where matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss curve: matplotlib is not installed.\n  Way out: pip install matplotlib"
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    # Curves that agree lie on each other: the first is wide, so that it shows under the second.
    for name, width in (("plain", 4), ("cuflash", 1.2)):
        if name in histories:
            history, colour = histories[name], COLOURS[name]
            steps = range(1, len(history.losses) + 1)
            axes.plot(steps, history.running, color=colour, linewidth=width, label=f"{name}, train")
            axes.plot(
                *np.transpose(history.tests), "o", color=colour, markersize=width + 2, label="test"
            )
    axes.axhline(unigram_entropy, color="grey", linestyle="--", label="unigram entropy")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss in nats per byte (train: mean of {RUNNING} steps)")
    axes.legend()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cuflash"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return f"loss curve: {path}"
