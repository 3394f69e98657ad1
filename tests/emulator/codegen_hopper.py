"""Emitters of the Hopper instructions: mbarrier, bulk copies, wgmma, clusters (runtime/hopper.h
says what they do)."""

from __future__ import annotations

from .codegen import SPECIAL, Emitter, Modifiers, emits
from .codegen_wgmma import begin
from .syntax import Address, Instruction, Name, Operand, Vector

_CLUSTER = "(emu::launch.cluster.x * emu::launch.cluster.y * emu::launch.cluster.z)"
SPECIAL.update(
    {
        "%cluster_ctarank": "t.block->rank",
        "%cluster_nctarank": _CLUSTER,
        "%is_explicit_cluster": f"(u32)({_CLUSTER} > 1u)",
        **{f"%cluster_ctaid.{c}": f"(t.ctaid.{c} % emu::launch.cluster.{c})" for c in "xyz"},
        **{f"%cluster_nctaid.{c}": f"emu::launch.cluster.{c}" for c in "xyz"},
        **{f"%clusterid.{c}": f"(t.ctaid.{c} / emu::launch.cluster.{c})" for c in "xyz"},
        **{f"%nclusterid.{c}": f"(t.nctaid.{c} / emu::launch.cluster.{c})" for c in "xyz"},
    }
)

REDUCED = {
    "f16": "FLOAT16",
    "bf16": "BFLOAT16",
    "f32": "FLOAT32",
    "f64": "FLOAT64",
    "s32": "INT32",
    "u32": "UINT32",
}
SHARED = ("shared", "shared::cta", "shared::cluster")


# ---- fences and clusters
@emits("fence.mbarrier_init")
def fence_mbarrier_init(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("release", "cluster")
    begin(e)
    e.line("emu::fence_mbarrier_init(t);")


@emits("fence.proxy.async")
def fence_proxy_async(e: Emitter, i: Instruction, m: Modifiers) -> None:
    only_global = m.flag("global")
    m.flag(*SHARED)
    begin(e)
    e.line(f"emu::fence_proxy_async(t, {'false' if only_global else 'true'});")


@emits("fence.proxy.alias", "fence.proxy.tensormap::generic")
def fence_proxy_other(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """Tensor maps are read when a copy is issued and memory has one address each: nothing to
    order."""
    m.flag("release", "acquire", "sync_restrict::shared::cta", "cta", "cluster", "gpu", "sys")
    e.line("(void)0;")


@emits("prefetch.tensormap", "prefetch.param.tensormap", "prefetch.const.tensormap")
def prefetch_tensormap(e: Emitter, i: Instruction, m: Modifiers) -> None:
    e.line("(void)0;")


@emits("barrier.cluster")
def barrier_cluster(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("aligned", "acquire")
    relaxed = m.flag("relaxed")
    m.flag("release")
    what = m.one_of("arrive", "wait")
    begin(e)
    if what == "wait":
        e.line("emu::cluster_wait(t);")
    else:
        e.line(f"emu::cluster_arrive(t, {'false' if relaxed else 'true'});")


# ---- mbarrier
@emits("mbarrier")
def mbarrier(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """mbarrier.{init, inval, arrive, arrive_drop, expect_tx, complete_tx, test_wait, try_wait,
    pending_count}."""
    begin(e)
    m.flag("b64", *SHARED)
    m.flag("release", "acquire", "relaxed", "cta", "cluster")
    what = m.one_of("init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait",
                    "pending_count")  # fmt: skip
    ops = i.operands
    if what == "init":
        e.line(f"emu::mbarrier_init(t, {_at(e, ops[0])}, {e.read(ops[1], 'u32')});")
    elif what == "inval":
        e.line(f"emu::mbarrier_inval(t, {_at(e, ops[0])});")
    elif what in ("expect_tx", "complete_tx"):
        call = "mbarrier_expect" if what == "expect_tx" else "mbarrier_complete"
        e.line(f"emu::{call}(t, {_at(e, ops[0])}, {e.read(ops[1], 'u32')});")
    elif what in ("arrive", "arrive_drop"):
        _arrive(e, ops, m, drop=what == "arrive_drop")
    elif what == "pending_count":
        e.write(ops[0], "u32", f"emu::mbarrier_pending_count({e.read(ops[1], 'b64')})")
    else:
        _wait(e, ops, m, may_block=what == "try_wait")


def _at(e: Emitter, operand: Operand) -> str:
    """Shared address of an mbarrier; a 64-bit register holds a generic address."""
    if isinstance(operand, Address) and e.register_type(operand.base) in ("u64", "s64"):
        return f"(u32)({e.address(operand, 'generic')} & 0xffffffffull)"
    return e.address(operand, "shared")


def _arrive(e: Emitter, ops: tuple[Operand, ...], m: Modifiers, *, drop: bool) -> None:
    has_state = not isinstance(ops[0], Address)
    state, address, *rest = ops if has_state else (Name("_"), *ops)
    value = e.read(rest[0], "u32") if rest else "1u"
    expects = m.flag("expect_tx")
    no_complete = "true" if m.flag("noComplete") else "false"
    count, expect = ("1u", value) if expects else (value, "0u")
    call = f"emu::mbarrier_arrive(t, {_at(e, address)}, {count}, {expect}, {no_complete}, {str(drop).lower()})"
    e.write(state, "b64", call)


def _wait(e: Emitter, ops: tuple[Operand, ...], m: Modifiers, *, may_block: bool) -> None:
    block = str(may_block).lower()
    if m.flag("parity"):
        call = f"emu::mbarrier_test_parity(t, {_at(e, ops[1])}, {e.read(ops[2], 'u32')}, {block})"
    else:
        call = f"emu::mbarrier_test_state(t, {_at(e, ops[1])}, {e.read(ops[2], 'b64')}, {block})"
    e.write(ops[0], "pred", call)


# ---- bulk copies
@emits("cp.async.mbarrier.arrive")
def cp_async_mbarrier(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b64", *SHARED)
    noinc = "true" if m.flag("noinc") else "false"
    begin(e)
    e.line(f"emu::cp_async_arrive(t, {_at(e, i.operands[0])}, {noinc});")


@emits("cp.async.bulk", "cp.reduce.async.bulk")
def bulk(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """Bulk copies and reductions, plain and by tensor map, with their groups."""
    ops = i.operands
    begin(e)
    if m.flag("commit_group"):
        e.line("emu::bulk_commit(t);")
        return
    if m.flag("wait_group"):
        read = "true" if m.flag("read") else "false"
        e.line(f"emu::bulk_wait(t, {e.read(ops[0], 'u32')}, {read});")
        return
    multicast = m.flag("multicast::cluster")
    m.flag("L2::cache_hint", "mbarrier::complete_tx::bytes", "bulk_group")
    reduce = i.modifiers[0] == "reduce"
    prefetch = m.flag("prefetch")
    if m.flag("tensor"):
        _tensor(e, ops, m, reduce=reduce, prefetch=prefetch, multicast=multicast)
    elif prefetch:
        m.flag("L2", "global")
        e.line("(void)0;")
    else:
        _plain(e, ops, m, reduce=reduce, multicast=multicast)


def _to_shared(e: Emitter, m: Modifiers) -> bool:
    """Direction from the order of the state spaces: destination first."""
    spaces = [x for x in m.left if x in (*SHARED, "global")]
    m.flag(*SHARED, "global")
    if len(spaces) != 2 or (spaces[0] == "global") == (spaces[1] == "global"):
        raise e.fail("copies between these state spaces are not known")
    return spaces[0] != "global"


def _plain(
    e: Emitter, ops: tuple[Operand, ...], m: Modifiers, *, reduce: bool, multicast: bool
) -> None:
    to_shared = _to_shared(e, m)
    shared = e.address(ops[0 if to_shared else 1], "shared")
    glob = e.address(ops[1 if to_shared else 0], "global")
    size = e.read(ops[2], "u32")
    if to_shared and not reduce:
        blocks = e.read(ops[4], "u16") if multicast else "0u"
        e.line(f"emu::bulk_load(t, {shared}, {glob}, {size}, {_at(e, ops[3])}, {blocks});")
    elif to_shared:
        raise e.fail("reductions into shared memory are not known")
    elif reduce:
        m.flag("noftz")
        m.one_of("add")
        element = REDUCED[m.one_of(*REDUCED)]
        e.line(f"emu::bulk_reduce(t, {glob}, {shared}, {size}, emu::{element});")
    else:
        e.line(f"emu::bulk_store(t, {glob}, {shared}, {size});")


def _tensor(
    e: Emitter,
    ops: tuple[Operand, ...],
    m: Modifiers,
    *,
    reduce: bool,
    prefetch: bool,
    multicast: bool,
) -> None:
    rank = int(m.match(r"[1-5]d")[0])
    m.flag("tile")
    if prefetch:
        m.flag("L2", "global")
        e.line(f"emu::tensor_prefetch(t, {_map(e, ops[0], rank)[0]}, {rank});")
        return
    to_shared = _to_shared(e, m)
    the_map, coordinates = _map(e, ops[1 if to_shared else 0], rank)
    e.line(f"s32 coordinate[5] = {{{coordinates}}};")
    shared = e.address(ops[0 if to_shared else 1], "shared")
    if to_shared:
        barrier, blocks = _at(e, ops[2]), e.read(ops[3], "u16") if multicast else "0u"
        e.line(
            f"emu::tensor_load(t, {shared}, {the_map}, {rank}, coordinate, {barrier}, {blocks});"
        )
        return
    if reduce:
        m.one_of("add")
    e.line(f"emu::tensor_store(t, {the_map}, {rank}, coordinate, {shared}, {str(reduce).lower()});")


def _map(e: Emitter, operand: Operand, rank: int) -> tuple[str, str]:
    """Address expression and coordinate list of `[map, {x, y}]`."""
    if (
        not isinstance(operand, Address)
        or not operand.extra
        or not isinstance(operand.extra[0], Vector)
    ):
        raise e.fail("expected [tensor map, {coordinates}]")
    coordinates = operand.extra[0].elements
    if len(coordinates) != rank:
        raise e.fail(f"{len(coordinates)} coordinates for a tensor of rank {rank}")
    address = e.address(Address(operand.base, operand.offset), "generic")
    return address, ", ".join(e.read(c, "s32") for c in coordinates)


# ---- launches and clusters
@emits("griddepcontrol")
def griddepcontrol(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """Launches run one after the other, so nothing is left to wait for."""
    m.flag("launch_dependents", "wait")
    e.line("(void)0;")


@emits("mapa")
def mapa(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """mapa{.shared::cluster} d, address, rank: the same place in another block of the cluster."""
    begin(e)
    shared = m.flag(*SHARED)
    kind = m.type()
    address = f"(u32){e.read(i.operands[1], kind)}"
    mapped = f"emu::map_shared(t, {address}, {e.read(i.operands[2], 'u32')})"
    e.write(i.operands[0], kind, mapped if shared else f"(emu::SHARED_WINDOW + {mapped})")


@emits("getctarank")
def getctarank(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """Rank of the block that a shared address belongs to."""
    m.flag(*SHARED)
    kind = m.type()
    address = f"(u32){e.read(i.operands[1], kind)}"
    e.write(i.operands[0], "u32", f"(({address} >> 24) ? ({address} >> 24) - 1 : t.block->rank)")
