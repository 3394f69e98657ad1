"""Every form of the suite, by name."""

from __future__ import annotations

from . import (
    atomics,
    bulk,
    clusters,
    copies,
    elementwise,
    handshakes,
    memory,
    mma,
    shared_matrix,
    warp,
    warpgroups,
    wgmma,
)
from .form import Form

FORMS: list[Form] = [
    form
    for module in (
        mma,
        shared_matrix,
        copies,
        memory,
        elementwise,
        warp,
        atomics,
        handshakes,
        bulk,
        clusters,
        warpgroups,
        wgmma,
    )
    for form in module.FORMS
]
BY_NAME = {form.name: form for form in FORMS}
assert len(BY_NAME) == len(FORMS), "two forms share a name"
