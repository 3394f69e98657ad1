"""The kernels of `bench.triton_peer`, in the language of Triton.

Arrays are (batch * heads, length, DIM), contiguous. Scores are kept in base 2: `scale` of forward
includes log2(e). Rows are queries, columns keys.
"""

# mypy: ignore-errors
# Triton reads the annotations, and has no types of its own.
import triton
import triton.language as tl


@triton.jit
def tile(start, size: tl.constexpr, length, DIM: tl.constexpr):
    """Offsets (size, DIM) of a tile of rows, and which of them exist."""
    rows = start + tl.arange(0, size)
    return rows[:, None] * DIM + tl.arange(0, DIM)[None, :], rows[:, None] < length


@triton.jit
def absorb(
    acc, top, total, q, k, v, start, first, length_q, length_k, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running sums of a tile of queries."""
    at, there = tile(start, COLUMNS, length_k, DIM)
    if MASKED:
        keys = tl.load(k + at, mask=there, other=0.0)
        values = tl.load(v + at, mask=there, other=0.0)
    else:
        keys = tl.load(k + at)
        values = tl.load(v + at)
    s = tl.dot(q, tl.trans(keys)) * scale
    if MASKED:
        columns = start + tl.arange(0, COLUMNS)[None, :]
        seen = columns < length_k
        if CAUSAL:
            seen = seen & (columns <= first + tl.arange(0, ROWS)[:, None])
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype.element_ty), values, acc * shrink[:, None])
    return acc, higher, total


@triton.jit
def forward(
    q, k, v, out, lse, scale, length_q, length_k,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """softmax(scale q k^T) v for one tile of queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block  # those that see most keys first
    first = block * ROWS
    q += head * length_q * DIM
    out += head * length_q * DIM
    k += head * length_k * DIM
    v += head * length_k * DIM
    at, there = tile(first, ROWS, length_q, DIM)
    queries = tl.load(q + at, mask=there, other=0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # Tiles that every row sees whole, and then those that a bound cuts.
    whole = length_k // COLUMNS * COLUMNS
    end = length_k
    if CAUSAL:
        whole = tl.minimum(whole, first // COLUMNS * COLUMNS)
        end = tl.minimum(length_k, first + ROWS)
    for start in range(0, whole, COLUMNS):
        acc, top, total = absorb(
            acc, top, total, queries, k, v, start, first, length_q, length_k, scale,
            ROWS, COLUMNS, DIM, False, CAUSAL,
        )  # fmt: skip
    for start in range(whole, end, COLUMNS):
        acc, top, total = absorb(
            acc, top, total, queries, k, v, start, first, length_q, length_k, scale,
            ROWS, COLUMNS, DIM, True, CAUSAL,
        )  # fmt: skip
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=there)
    rows = first + tl.arange(0, ROWS)
    tl.store(lse + head * length_q + rows, top + tl.log2(total), mask=rows < length_q)


@triton.jit
def delta(dout, out, result, count, DIM: tl.constexpr, ROWS: tl.constexpr):
    """Row sums of dout * out."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    at, there = tile(start, ROWS, count, DIM)
    product = tl.load(dout + at, mask=there, other=0.0).to(tl.float32)
    product *= tl.load(out + at, mask=there, other=0.0).to(tl.float32)
    rows = start + tl.arange(0, ROWS)
    tl.store(result + rows, tl.sum(product, 1), mask=rows < count)


@triton.jit
def weights(q, k, lse, rows, columns, scale, length_q, length_k, CAUSAL: tl.constexpr):
    """Probabilities (rows, columns) again, from the saved sums."""
    s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
    p = tl.exp2(s - lse[:, None])
    seen = (rows < length_q)[:, None] & (columns < length_k)[None, :]
    if CAUSAL:
        seen = seen & (columns[None, :] <= rows[:, None])
    return tl.where(seen, p, 0.0)


@triton.jit
def backward_keys(
    q, k, v, dout, lse, sums, dk, dv, scale, length_q, length_k,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head."""
    head, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLUMNS
    q += head * length_q * DIM
    dout += head * length_q * DIM
    lse += head * length_q
    sums += head * length_q
    at, there = tile(start, COLUMNS, length_k, DIM)
    at += head * length_k * DIM
    keys = tl.load(k + at, mask=there, other=0.0)
    values = tl.load(v + at, mask=there, other=0.0)
    columns = start + tl.arange(0, COLUMNS)
    acc_k = tl.zeros((COLUMNS, DIM), tl.float32)
    acc_v = tl.zeros((COLUMNS, DIM), tl.float32)
    begin = 0
    if CAUSAL:
        begin = start // ROWS * ROWS
    for first in range(begin, length_q, ROWS):
        rows = first + tl.arange(0, ROWS)
        place, exists = tile(first, ROWS, length_q, DIM)
        queries = tl.load(q + place, mask=exists, other=0.0)
        dy = tl.load(dout + place, mask=exists, other=0.0)
        log = tl.load(lse + rows, mask=rows < length_q, other=0.0)
        p = weights(queries, keys, log, rows, columns, scale, length_q, length_k, CAUSAL)
        acc_v = tl.dot(tl.trans(p.to(dy.dtype)), dy, acc_v)
        ds = tl.dot(dy, tl.trans(values))
        ds -= tl.load(sums + rows, mask=rows < length_q, other=0.0)[:, None]
        acc_k = tl.dot(tl.trans((p * ds).to(queries.dtype)), queries, acc_k)
    tl.store(dk + at, (acc_k * scale).to(dk.dtype.element_ty), mask=there)
    tl.store(dv + at, acc_v.to(dv.dtype.element_ty), mask=there)


@triton.jit
def backward_queries(
    q, k, v, dout, lse, sums, dq, scale, length_q, length_k,
    DIM: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head."""
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS
    k += head * length_k * DIM
    v += head * length_k * DIM
    at, there = tile(first, ROWS, length_q, DIM)
    at += head * length_q * DIM
    queries = tl.load(q + at, mask=there, other=0.0)
    dy = tl.load(dout + at, mask=there, other=0.0)
    rows = first + tl.arange(0, ROWS)
    log = tl.load(lse + head * length_q + rows, mask=rows < length_q, other=0.0)
    sum = tl.load(sums + head * length_q + rows, mask=rows < length_q, other=0.0)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    end = length_k
    if CAUSAL:
        end = tl.minimum(length_k, first + ROWS)
    for start in range(0, end, COLUMNS):
        place, exists = tile(start, COLUMNS, length_k, DIM)
        keys = tl.load(k + place, mask=exists, other=0.0)
        values = tl.load(v + place, mask=exists, other=0.0)
        columns = start + tl.arange(0, COLUMNS)
        p = weights(queries, keys, log, rows, columns, scale, length_q, length_k, CAUSAL)
        ds = p * (tl.dot(dy, tl.trans(values)) - sum[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc)
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=there)
