"""Does every kernel that planning can choose compile, everywhere, without spilling?

For six architectures, in one of two element types and by one of two generations of NVRTC each
(`python -m tests.compile_matrix --both` runs both on everything); no GPU is needed. The figures
are compared with `tests/data/registers.json`.
"""

from __future__ import annotations

import pytest

from tests import compile_matrix as matrix

TASKS = [
    pytest.param(arch, group, id=f"{arch}-{group.replace(' ', '-')}")
    for arch in matrix.ARCHITECTURES
    for group in matrix.groups(arch)
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "group"), TASKS)
def test_compiles_without_spills(arch: str, group: str) -> None:
    found = matrix.compile_group(arch, group, ())
    assert not found.wrong, "\n".join(found.wrong)
    assert found.compiled == len(matrix.groups(arch)[group])


def test_both_compilers_and_elements_see_every_kernel() -> None:
    """The half that runs here leaves out no kernel, head dim, compiler, or element of an architecture."""
    for arch in matrix.ARCHITECTURES:
        chosen = [spec for specs in matrix.groups(arch).values() for spec in specs]
        names = {spec.name.replace("_bf16", "_f16") for spec in matrix.kernels(arch)}
        assert {spec.name.replace("_bf16", "_f16") for spec in chosen} == names
        generations: dict[tuple[str, int], set[int]] = {}
        elements: dict[str, set[str]] = {}
        for spec in chosen:
            if spec.kernel in ("merge", "backward_slopes"):  # one variant per element
                continue
            if spec.element.startswith(("f32", "f64")):  # a share of them is compiled
                continue
            elements.setdefault(spec.kernel, set()).add(spec.element)
            key = spec.kernel, spec.head_dim
            generations.setdefault(key, set()).add(matrix.generation_of(spec))
        assert all(seen == set(matrix.GENERATIONS) for seen in generations.values())
        both = {"f16"} if arch == "sm_75" else {"f16", "bf16"}
        assert all(seen == both for seen in elements.values())


def test_the_table_has_the_kernels_that_planning_can_choose() -> None:
    for arch in matrix.ARCHITECTURES:
        assert set(matrix.table()[arch]) == {spec.name for spec in matrix.kernels(arch)}


def test_names_are_unique() -> None:
    # The cache, the table and profilers know a kernel by its name.
    for arch in matrix.ARCHITECTURES:
        specs = matrix.kernels(arch)
        assert len({spec.name for spec in specs}) == len(specs)


def test_what_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = next(s for s in matrix.kernels("sm_80") if s.head_dim == 64 and s.kernel == "forward")
    clean = matrix.Usage(registers=128, spill_stores=0, spill_loads=0, stack=0)
    monkeypatch.setattr(matrix, "table", lambda: {"sm_80": {spec.name: list(clean)}})
    generation = matrix.generation_of(spec)
    assert matrix.complaints(spec, generation, clean, "") == []
    assert matrix.complaints(spec, generation, clean._replace(registers=121), "") == []
    for worse in (
        clean._replace(spill_stores=4),
        clean._replace(stack=8),
        clean._replace(registers=129),
    ):
        assert matrix.complaints(spec, generation, worse, "")
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions"
    assert matrix.complaints(spec, generation, clean, warning)


def test_the_log_of_ptxas_is_read() -> None:
    log = """ptxas info    : Compiling entry function 'other' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers
ptxas info    : Compiling entry function 'kernel' for 'sm_80'
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size"""
    assert matrix.usage_in(log, "kernel") == matrix.Usage(255, 8, 4, 16)
    with pytest.raises(ValueError, match="no entry missing"):
        matrix.usage_in(log, "missing")
