"""Outputs of a real GPU, kept so that machines without one can still compare the emulator with
hardware.

`pytest --gpu --record-goldens tests/test_instructions.py` writes them; a golden file knows which
inputs it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .form import Case, Form, mismatch

DIRECTORY = Path(__file__).resolve().parent.parent / "golden"


def path(form: Form, directory: Path = DIRECTORY) -> Path:
    """Where the golden outputs of `form` are, or would be."""
    return directory / f"{form.name}.npz"


def record(
    form: Form, case: Case, outputs: Sequence[np.ndarray], device: str, directory: Path = DIRECTORY
) -> None:
    """Keep `outputs` as what `device` computes for `case`."""
    directory.mkdir(exist_ok=True)
    raw = {
        f"out{i}": np.ascontiguousarray(o).reshape(-1).view(np.uint8) for i, o in enumerate(outputs)
    }
    np.savez_compressed(
        path(form, directory), inputs=np.array(case.digest()), device=np.array(device), **raw
    )


def compare(
    form: Form, case: Case, outputs: Sequence[np.ndarray], directory: Path = DIRECTORY
) -> str | None:
    """None when the outputs agree with the golden file, or when there is none; else what differs.

    The tolerance is the one the form states against its reference: the hardware is inside it on one
    side, the outputs on the other, so two results may be twice as far apart.
    """
    file = path(form, directory)
    if not file.exists():
        return None
    with np.load(file) as golden:
        if str(golden["inputs"]) != case.digest():
            return f"{file.name} was recorded for other inputs: record it again on a GPU"
        device = str(golden["device"])
        for i, actual in enumerate(outputs):
            recorded = golden[f"out{i}"].view(actual.dtype).reshape(actual.shape)
            tolerance = case.tolerance[i] if i < len(case.tolerance) else None
            why = mismatch(
                actual, recorded, None if tolerance is None else 2 * np.asarray(tolerance)
            )
            if why:
                return f"output {i}, against {device}: {why}"
    return None
