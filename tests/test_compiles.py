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
    """The half of the plain kernels that runs here leaves out no kernel, head dim, compiler, or element."""
    everywhere: dict[str, set[int]] = {}
    for arch in matrix.ARCHITECTURES:
        plain = [spec for spec in matrix.kernels(arch) if not matrix.is_optional(spec)]
        chosen = [spec for spec in plain if matrix.in_tests(spec)]
        names = {spec.name.replace("_bf16", "_f16") for spec in plain}
        assert {spec.name.replace("_bf16", "_f16") for spec in chosen} == names
        generations: dict[tuple[str, int], set[int]] = {}
        elements: dict[str, set[str]] = {}
        for spec in chosen:
            everywhere.setdefault(spec.kernel, set()).add(matrix.generation_of(spec))
            if spec.kernel in ("forward", "backward_dkdv", "backward_dq"):
                elements.setdefault(spec.kernel, set()).add(spec.element)
                key = spec.kernel, spec.head_dim
                generations.setdefault(key, set()).add(matrix.generation_of(spec))
        assert all(seen == set(matrix.GENERATIONS) for seen in generations.values())
        both = {"f16"} if arch == "sm_75" else {"f16", "bf16"}
        assert all(seen == both for seen in elements.values())
    assert all(seen == set(matrix.GENERATIONS) for seen in everywhere.values())


def test_the_share_of_optional_kernels_sees_every_option_and_element() -> None:
    chosen = [
        spec
        for arch in matrix.ARCHITECTURES
        for spec in matrix.kernels(arch)
        if matrix.is_optional(spec) and matrix.in_tests(spec)
    ]
    words = {word for spec in chosen for word in spec.name.split("_")}
    options = {"blocks", "dense", "bias", "general", "sinks", "dropout", "packed"}
    assert words >= options | {"f32", "f32tf32", "f64"}


def test_the_table_has_the_kernels_that_are_compiled_here_and_no_strangers() -> None:
    for arch in matrix.ARCHITECTURES:
        recorded = set(matrix.table()[arch])
        specs = matrix.kernels(arch)
        assert recorded >= {spec.name for spec in specs if matrix.in_tests(spec)}
        assert recorded <= {spec.name for spec in specs}


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


def test_wide_gradients_of_keys_must_not_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = next(
        s
        for s in matrix.kernels("sm_80")
        if s.name.startswith("backward_dkdv_f64_d128_general") and s.head_dim_v == 128
    )
    monkeypatch.setattr(matrix, "table", lambda: {"sm_80": {wide.name: [255, 8, 8, 8]}})
    clean = matrix.Usage(registers=128, spill_stores=0, spill_loads=0, stack=0)
    generation = matrix.generation_of(wide)
    assert matrix.complaints(wide, generation, clean, "") == []
    assert matrix.complaints(wide, generation, clean._replace(spill_loads=8), "")


def test_the_slowest_kernels_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(matrix, "compile_one", lambda spec, generation: compiled.append(spec.name))
    table = matrix.slowest({"quick": 0.5, "slow": 3.0, "middle": 1.0}, 2).splitlines()
    assert [line.split()[-1] for line in table[:2]] == ["slow", "middle"]
    assert len(table) == 3 and "yardstick" in table[2]
    assert set(compiled) == {matrix.YARDSTICK[1]}


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
