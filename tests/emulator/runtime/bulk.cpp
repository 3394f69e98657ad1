// bulk.cpp - cp.async.bulk and cp.async.bulk.tensor: the copy engine of sm_90 (TMA).
#include <algorithm>

#include "hopper_state.h"
#include "state.h"

namespace emu {
namespace {

u32 box_bytes(const TensorMap& m) {
  u32 n = m.element_bytes;
  for (u32 i = 0; i < m.rank; ++i) n *= m.box[i];
  return n;
}

TensorMap read_map(Thread&, u64 address, u32 rank) {
  if (address % 64) fail(MISALIGNED, "the tensor map at %#llx is not 64-byte aligned", (unsigned long long)address);
  TensorMap m;
  std::memcpy(&m, (const void*)address, sizeof m);
  if (m.magic != TENSOR_MAP_MAGIC) fail(ASYNC_MISUSE, "there is no tensor map at %#llx", (unsigned long long)address);
  if (m.rank != rank) fail(ASYNC_MISUSE, "a tensor map of rank %u is used by an instruction of rank %u", m.rank, rank);
  return m;
}

// Calls row(shared offset of the row in the box, global address, first byte, end byte) for every innermost row of the box;
// bytes [first, end) of the row lie inside the tensor. A row wholly outside has first == end.
template <class F>
void for_rows(const TensorMap& m, const s32* coordinate, F row) {
  u32 bytes = m.box[0] * m.element_bytes, rows = 1;
  for (u32 i = 1; i < m.rank; ++i) rows *= m.box[i];
  s64 x0 = coordinate[0], x1 = x0 + m.box[0], width = (s64)m.dim[0];
  s64 first = std::clamp<s64>(-x0, 0, m.box[0]), end = std::clamp<s64>(std::min(x1, width) - x0, first, m.box[0]);
  for (u32 r = 0; r < rows; ++r) {
    u64 address = m.base + (u64)(x0 * m.element_bytes);
    bool inside = true;
    u32 rest = r;
    for (u32 i = 1; i < m.rank; ++i) {
      s64 c = (s64)coordinate[i] + rest % m.box[i];
      rest /= m.box[i];
      inside &= c >= 0 && c < (s64)m.dim[i];
      address += (u64)(c * (s64)m.stride[i - 1]);
    }
    row(r * bytes, address, inside ? (u32)first * m.element_bytes : 0u, inside ? (u32)end * m.element_bytes : 0u);
  }
}

u32 span_of(const TensorMap& m) { return m.swizzle; }

// Copies one box row between `line` (linear) and swizzled shared memory, 16 bytes at a time.
void move_row(Thread& t, u32 shared, u32 span, u8* line, u32 bytes, bool to_shared) {
  for (u32 b = 0; b < bytes; b += 16) {
    u8* p = shared_at(t, swizzle(shared + b, span), 16, 16);
    if (to_shared)
      std::memcpy(p, line + b, 16);
    else
      std::memcpy(line + b, p, 16);
  }
}

void fill_outside(const TensorMap& m, u8* line, u32 bytes) {
  if (!m.fill_nan) {
    std::memset(line, 0, bytes);
    return;
  }
  static const u16 half_nan = 0x7fff;
  static const u32 float_nan = 0x7fffffff;
  for (u32 b = 0; b < bytes; b += m.element_bytes)
    std::memcpy(line + b, m.element_bytes == 2 ? (const void*)&half_nan : (const void*)&float_nan, m.element_bytes);
}

void load_now(Thread& t, const BulkCopy& c) {
  if (!c.tensor) {
    std::memcpy(shared_at(t, c.shared, c.bytes, 16), (const void*)c.global, c.bytes);
    return;
  }
  std::vector<u8> line(c.map.box[0] * c.map.element_bytes);
  for_rows(c.map, c.coordinate, [&](u32 offset, u64 address, u32 first, u32 end) {
    fill_outside(c.map, line.data(), (u32)line.size());
    if (end > first) std::memcpy(line.data() + first, (const u8*)(address + first), end - first);
    move_row(t, c.shared + offset, span_of(c.map), line.data(), (u32)line.size(), true);
  });
}

void read_source(Thread& t, BulkCopy& c) {
  c.staged.resize(c.bytes);
  if (!c.tensor) {
    std::memcpy(c.staged.data(), shared_at(t, c.shared, c.bytes, 16), c.bytes);
  } else {
    u32 row = c.map.box[0] * c.map.element_bytes;
    for (u32 o = 0; o < c.bytes; o += row) move_row(t, c.shared + o, span_of(c.map), c.staged.data() + o, row, false);
  }
  c.source_read = true;
  async_end(t, c.shared, c.bytes, READ);
}

template <class T>
void add_elements(u8* to, const u8* from, u32 bytes) {
  for (u32 b = 0; b < bytes; b += sizeof(T)) {
    T x, y;
    std::memcpy(&x, to + b, sizeof x);
    std::memcpy(&y, from + b, sizeof y);
    x = (T)(x + y);
    std::memcpy(to + b, &x, sizeof x);
  }
}

float bfloat16_value(u16 bits) { return __builtin_bit_cast(float, (u32)bits << 16); }

void add_bfloat16(u8* to, const u8* from, u32 bytes) {
  for (u32 b = 0; b < bytes; b += 2) {
    u16 x, y;
    std::memcpy(&x, to + b, 2);
    std::memcpy(&y, from + b, 2);
    u32 sum = __builtin_bit_cast(u32, bfloat16_value(x) + bfloat16_value(y));
    bool nan = (sum & 0x7fffffff) > 0x7f800000;
    x = nan ? 0x7fff : (u16)((sum + 0x7fff + (sum >> 16 & 1)) >> 16);
    std::memcpy(to + b, &x, 2);
  }
}

void add(u32 element, u8* to, const u8* from, u32 bytes) {
  switch (element) {
    case FLOAT16: return add_elements<_Float16>(to, from, bytes);
    case BFLOAT16: return add_bfloat16(to, from, bytes);
    case FLOAT32: return add_elements<float>(to, from, bytes);
    case FLOAT64: return add_elements<double>(to, from, bytes);
    case INT32: case UINT32: return add_elements<u32>(to, from, bytes);
    default: fail(ASYNC_MISUSE, "bulk reduction over elements that cannot be added");
  }
}

void write_destination(const BulkCopy& c) {
  auto put = [&](u64 address, const u8* from, u32 bytes) {
    if (c.what == BulkCopy::REDUCE)
      add(c.tensor ? c.map.type : c.element, (u8*)address, from, bytes);
    else
      std::memcpy((u8*)address, from, bytes);
  };
  if (!c.tensor) return put(c.global, c.staged.data(), c.bytes);
  for_rows(c.map, c.coordinate, [&](u32 offset, u64 address, u32 first, u32 end) {
    if (end > first) put(address + first, c.staged.data() + offset + first, end - first);
  });
}

// Bounds and races of the global side, at issue: a later error would name the wrong line.
void check_global(Thread& t, const BulkCopy& c, u32 kind) {
  auto check = [&](u64 address, u32 bytes) {
    global_at(t, address, bytes, 1, kind);
    race_global(t, address, bytes, kind);
  };
  if (!c.tensor) return check(c.global, c.bytes);
  for_rows(c.map, c.coordinate, [&](u32, u64 address, u32 first, u32 end) {
    if (end > first) check(address + first, end - first);
  });
}

BulkCopy start(Thread& t, BulkCopy::What what, u32 shared, u32 bytes, u32 align) {
  if (shared % align) fail(MISALIGNED, "shared offset %u of a bulk copy is not %u-byte aligned", shared_offset(shared), align);
  if (bytes == 0 || bytes % 16) fail(MISALIGNED, "a bulk copy of %u bytes: the size must be a positive multiple of 16", bytes);
  shared_at(t, shared, bytes, 16);
  if (what != BulkCopy::LOAD) check_proxy(t, shared, bytes, "a bulk store reads");
  BulkCopy c{};
  c.what = what;
  c.shared = shared;
  c.bytes = bytes;
  c.thread = &t;
  c.site = t.site;
  return c;
}

BulkCopy start_plain(Thread& t, BulkCopy::What what, u32 shared, u64 global, u32 bytes) {
  BulkCopy c = start(t, what, shared, bytes, 16);
  if (global % 16) fail(MISALIGNED, "global address %#llx of a bulk copy is not 16-byte aligned", (unsigned long long)global);
  c.global = global;
  return c;
}

BulkCopy start_tensor(Thread& t, BulkCopy::What what, u32 shared, u64 map, u32 rank, const s32* coordinate) {
  TensorMap m = read_map(t, map, rank);
  BulkCopy c = start(t, what, shared, box_bytes(m), 128);
  // The swizzle pattern is a function of the address: a slab that does not begin where the pattern does is almost surely a bug.
  u32 pattern = m.swizzle * 8;
  if (pattern && shared % pattern)
    fail(MISALIGNED, "shared offset %u of a %u-byte swizzled box is not %u-byte aligned", shared_offset(shared), m.swizzle, pattern);
  c.tensor = true;
  c.map = m;
  std::copy(coordinate, coordinate + rank, c.coordinate);
  return c;
}

void issue_load_to(Thread& t, BulkCopy c, u32 barrier, Block& block) {
  HopperBlock& h = hopper(block);
  c.shared = cluster_address(block, c.shared);
  MBarrier& m = mbarrier_at(t, cluster_address(block, barrier));
  if (m.init_epoch == hopper_thread(*m.init_thread).proxy_epoch)
    fail(ASYNC_MISUSE, "a bulk load signals the mbarrier at shared offset %u, whose initialisation is not visible to the copy "
         "engine: fence.mbarrier_init or fence.proxy.async is missing after mbarrier.init", shared_offset(barrier));
  check_proxy(t, c.shared, c.bytes, "a bulk load overwrites");
  async_begin(t, c.shared, c.bytes, WRITE);
  mark_initialised(t, c.shared, c.bytes, false);
  std::memset(shared_at(t, c.shared, c.bytes, 16), 0xff, c.bytes);
  u32 first = shared_offset(c.shared) / 4;
  for (u32 i = 0; i < c.bytes / 4; ++i) h.writers[first + i] = {nullptr, 0};
  c.barrier = m.address;
  h.copies.push_back(c);
  mbarrier_nudge(m);
}

// One block, or with multicast the same place and the same barrier in each of them.
void issue_load(Thread& t, BulkCopy& c, u32 barrier, u32 ranks) {
  check_global(t, c, READ);
  count_warp(t);
  if (!ranks) {
    Block& block = block_of(t, c.shared, "bulk copy");
    if (&block_of(t, barrier, "mbarrier") != &block)
      fail(ASYNC_MISUSE, "the mbarrier of a bulk load is in another block than its destination");
    return issue_load_to(t, c, barrier, block);
  }
  if (ranks >> blocks.size()) fail(ASYNC_MISUSE, "multicast to ranks %#x of a cluster of %zu blocks", ranks, blocks.size());
  for (Block* block : blocks)
    if (ranks >> block->rank & 1) issue_load_to(t, c, barrier, *block);
}

void issue_store(Thread& t, BulkCopy& c) {
  HopperBlock& h = hopper(t);
  check_initialised(t, c.shared, c.bytes);
  check_global(t, c, c.what == BulkCopy::REDUCE ? WRITE | STRONG : WRITE);
  async_begin(t, c.shared, c.bytes, READ);
  c.group = hopper_thread(t).bulk_group;
  h.copies.push_back(c);
  count_warp(t);
}

}  // namespace

void bulk_load(Thread& t, u32 shared, u64 global, u32 bytes, u32 barrier, u32 blocks) {
  BulkCopy c = start_plain(t, BulkCopy::LOAD, shared, global, bytes);
  issue_load(t, c, barrier, blocks);
}

void bulk_store(Thread& t, u64 global, u32 shared, u32 bytes) {
  BulkCopy c = start_plain(t, BulkCopy::STORE, shared, global, bytes);
  issue_store(t, c);
}

void bulk_reduce(Thread& t, u64 global, u32 shared, u32 bytes, u32 element) {
  BulkCopy c = start_plain(t, BulkCopy::REDUCE, shared, global, bytes);
  c.element = element;
  issue_store(t, c);
}

void tensor_load(Thread& t, u32 shared, u64 map, u32 rank, const s32* coordinate, u32 barrier, u32 blocks) {
  BulkCopy c = start_tensor(t, BulkCopy::LOAD, shared, map, rank, coordinate);
  issue_load(t, c, barrier, blocks);
}

void tensor_store(Thread& t, u64 map, u32 rank, const s32* coordinate, u32 shared, bool reduce) {
  BulkCopy c = start_tensor(t, reduce ? BulkCopy::REDUCE : BulkCopy::STORE, shared, map, rank, coordinate);
  issue_store(t, c);
}

void tensor_prefetch(Thread& t, u64 map, u32 rank) {
  if (rank) read_map(t, map, rank);
}

bool bulk_deliver_one(Thread& t, u32 barrier) {
  HopperBlock& h = hopper(t);
  std::vector<size_t> mine;
  for (size_t i = 0; i < h.copies.size(); ++i)
    if (h.copies[i].what == BulkCopy::LOAD && h.copies[i].barrier == barrier) mine.push_back(i);
  if (mine.empty()) return false;
  // Copies may arrive in any order: with a seed, take any of them.
  size_t at = mine[launch.seed ? (launch.seed * 2654435761u + barrier + mine.size() * 97) % mine.size() : 0];
  BulkCopy c = h.copies[at];
  h.copies.erase(h.copies.begin() + at);
  load_now(t, c);
  MBarrier& m = mbarrier_at(t, barrier);
  mark_initialised(t, c.shared, c.bytes);
  async_end(*c.thread, c.shared, c.bytes, WRITE, &m.arriving);
  mbarrier_transaction(t, m, -(s64)c.bytes);
  progress();
  return true;
}

void bulk_commit(Thread& t) { hopper_thread(t).bulk_group++; }

void bulk_wait(Thread& t, u32 keep, bool read_only) {
  HopperBlock& h = hopper(t);
  u32 committed = hopper_thread(t).bulk_group;
  for (size_t i = 0; i < h.copies.size();) {
    BulkCopy& c = h.copies[i];
    if (c.what == BulkCopy::LOAD || c.thread != &t || c.group + keep >= committed) {
      ++i;
      continue;
    }
    if (!c.source_read) read_source(t, c);
    if (read_only) {
      ++i;
      continue;
    }
    write_destination(c);
    h.copies.erase(h.copies.begin() + i);
  }
}

}  // namespace emu
