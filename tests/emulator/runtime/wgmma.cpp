// wgmma.cpp - warpgroup matrix multiply, setmaxnreg, elect: the rest of what sm_90a adds.
#include <algorithm>

#include "hopper_state.h"

namespace emu {
namespace {

struct Lane {
  Thread* t;
  Wgmma* w;
};

u32 depth(const Wgmma& w) { return w.type == WG_TF32 ? 8 : 16; }
u32 registers_of_d(const Wgmma& w) { return w.half_d ? w.n / 4 : w.n / 2; }

float half_value(u16 bits) { return (float)__builtin_bit_cast(_Float16, bits); }

float element(u32 type, const u8* p) {
  if (type == WG_TF32) {
    u32 bits;
    std::memcpy(&bits, p, 4);
    return __builtin_bit_cast(float, bits & 0xffffe000u);  // the hardware ignores the low 13 bits
  }
  u16 bits;
  std::memcpy(&bits, p, 2);
  return type == WG_F16 ? half_value(bits) : __builtin_bit_cast(float, (u32)bits << 16);
}

// Calls chunk(address, index) for every 16-byte chunk of `count` rows (or columns) that start at `first`.
template <class F>
void for_chunks(const Wgmma& w, u64 descriptor, bool transposed, u32 first, u32 count, F chunk) {
  MatrixDescriptor m(descriptor);
  if (transposed) {
    for (u32 c = 0; c < count / 8; ++c)
      for (u32 k = 0; k < depth(w); ++k) chunk(m.mn_major(first / 8 + c, k), c * 16 + k);
  } else {
    for (u32 r = 0; r < count; ++r)
      for (u32 j = 0; j < 2; ++j) chunk(m.k_major(first + r, j), r * 2 + j);
  }
}

// out[row][k] of `count` rows (columns for B).
void read_matrix(Thread& t, const Wgmma& w, u64 descriptor, bool transposed, u32 first, u32 count, float (*out)[16]) {
  u32 bytes = w.type == WG_TF32 ? 4 : 2, per_chunk = 16 / bytes;
  for_chunks(w, descriptor, transposed, first, count, [&](u32 address, u32 index) {
    const u8* p = shared_at(t, address, 16, 16);
    for (u32 e = 0; e < per_chunk; ++e) {
      if (transposed)
        out[index / 16 * 8 + e][index % 16] = element(w.type, p + e * bytes);
      else
        out[index / 2][index % 2 * per_chunk + e] = element(w.type, p + e * bytes);
    }
  });
}

void check_matrix(Thread& t, const Wgmma& w, u64 descriptor, bool transposed, u32 first, u32 count, bool at_issue) {
  if (descriptor >> 49 & 7) fail(UNSUPPORTED, "wgmma: a descriptor with a base offset; let the slab begin where its pattern does");
  for_chunks(w, descriptor, transposed, first, count, [&](u32 address, u32) {
    shared_at(t, address, 16, 16);
    race_shared(t, address, 16, READ);
    if (!at_issue) return;
    check_proxy(t, address, 16, "wgmma reads");
    check_initialised(t, address, 16);
  });
}

// Both when the instruction is issued (whoever wrote the operands must be ordered before) and when it is waited for (whoever
// overwrites them must be ordered after).
void check_operands(Thread& t, const Wgmma& w, bool at_issue) {
  if (!w.a_registers) check_matrix(t, w, w.a, w.transpose_a, t.warp % 4 * 16, 16, at_issue);
  check_matrix(t, w, w.b, w.transpose_b, 0, w.n, at_issue);
}

void issue_leader(void** lanes, u32) {
  Lane& first = *(Lane*)lanes[0];
  const Wgmma& w = *first.w;
  for (u32 i = 1; i < 32; ++i) {
    const Wgmma& o = *((Lane*)lanes[i])->w;
    if (o.a != w.a || o.b != w.b || o.accumulate != w.accumulate)
      fail(DIVERGENCE, "wgmma: descriptors or scale-d differ within the warp (lanes 0 and %u)", i);
  }
  auto& log = hopper(*first.t).wgmma_log[first.t->warp];
  log[0]++;
  for (u64 x : {w.a_registers ? 0 : w.a, w.b, (u64)w.n << 8 | (u64)w.type << 1 | w.accumulate})
    log[1] = (log[1] ^ x) * 0x100000001b3ull;
  check_operands(*first.t, w, true);
}

// D of one warp as a matrix; element i of a lane sits at row g + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 t + i % 2.
template <class F>
void for_accumulators(u32 n, F at) {
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 i = 0; i < n / 2; ++i) at(lane, i, lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2);
}

float d_value(const Wgmma& w, u32 i) {
  u32 r = w.half_d ? i / 2 : i, bits = w.saved[r];
  if (w.chained[r]) std::memcpy(&bits, w.d[r], 4);
  return w.half_d ? half_value((u16)(bits >> (i % 2 * 16))) : __builtin_bit_cast(float, bits);
}

void set_d(const Wgmma& w, u32 i, double value) {
  u8* p = (u8*)w.d[w.half_d ? i / 2 : i];
  if (w.half_d) {
    _Float16 h = (_Float16)value;
    std::memcpy(p + i % 2 * 2, &h, 2);
  } else {
    float f = (float)value;
    std::memcpy(p, &f, 4);
  }
}

void read_register_a(const Lane* lanes, const Wgmma& w, float (*a)[16]) {
  for (u32 lane = 0; lane < 32; ++lane)
    for (u32 r = 0; r < 4; ++r) {
      u32 row = lane / 4 + 8 * (r % 2), bits = *lanes[lane].w->ar[r];
      if (w.type == WG_TF32) {
        a[row][lane % 4 + 4 * (r / 2)] = element(w.type, (const u8*)&bits);
        continue;
      }
      for (u32 e = 0; e < 2; ++e) a[row][2 * (lane % 4) + 8 * (r / 2) + e] = element(w.type, (const u8*)&bits + 2 * e);
    }
}

// The multiplication of one warp's 16 rows. Sums are made in double and rounded once: the hardware's order is unspecified.
void multiply(Lane* lanes) {
  Lane& first = lanes[0];
  const Wgmma& w = *first.w;
  Thread& t = *first.t;
  static float a[16][16], b[256][16];
  static double d[16][256];
  check_operands(t, w, false);
  if (w.a_registers)
    read_register_a(lanes, w, a);
  else
    read_matrix(t, w, w.a, w.transpose_a, t.warp % 4 * 16, 16, a);
  read_matrix(t, w, w.b, w.transpose_b, 0, w.n, b);
  double sign = w.negate_a != w.negate_b ? -1.0 : 1.0;
  for_accumulators(w.n, [&](u32 lane, u32 i, u32 row, u32 column) {
    d[row][column] = w.accumulate ? d_value(*lanes[lane].w, i) : 0.0;
  });
  for (u32 row = 0; row < 16; ++row)
    for (u32 column = 0; column < w.n; ++column) {
      double sum = 0;
      for (u32 k = 0; k < depth(w); ++k) sum += (double)a[row][k] * b[column][k];
      d[row][column] += sign * sum;
    }
  for_accumulators(w.n, [&](u32 lane, u32 i, u32 row, u32 column) { set_d(*lanes[lane].w, i, d[row][column]); });
}

// What a lane brings to wait_group: its oldest `count` instructions are to complete.
struct Retire {
  Thread* t;
  Wgmma* first;
  size_t count;
};

void retire_leader(void** waiting, u32) {
  Lane lanes[32];
  const Retire& first = *(Retire*)waiting[0];
  for (u32 i = 1; i < 32; ++i)
    if (((Retire*)waiting[i])->count != first.count) fail(DIVERGENCE, "wgmma.wait_group: lanes 0 and %u issued different groups", i);
  for (size_t k = 0; k < first.count; ++k) {
    for (u32 i = 0; i < 32; ++i) lanes[i] = {((Retire*)waiting[i])->t, ((Retire*)waiting[i])->first + k};
    multiply(lanes);
  }
}

bool written_by(const Wgmma& p, void* reg, u32 r) {
  if (r < registers_of_d(p) && p.d[r] == reg) return true;  // the usual chain over k
  if (reg < p.lowest || reg > p.highest) return false;
  return std::find(p.d, p.d + registers_of_d(p), reg) != p.d + registers_of_d(p);
}

// Registers of D become garbage until the result arrives; remembers what was in them.
void take_d(HopperThread& me, Wgmma& w) {
  u32 n = registers_of_d(w);
  w.lowest = *std::min_element(w.d, w.d + n);
  w.highest = *std::max_element(w.d, w.d + n);
  bool untouched = true;
  for (u32 r = 0; r < n; ++r) {
    w.chained[r] = std::any_of(me.pending.rbegin(), me.pending.rend(), [&](auto& p) { return written_by(p, w.d[r], r); });
    untouched &= w.chained[r];
    if (w.chained[r]) continue;
    std::memcpy(&w.saved[r], w.d[r], 4);
    std::memset(w.d[r], 0xff, 4);
  }
  if (!untouched && !me.wgmma_fenced)
    fail(ASYNC_MISUSE, "wgmma on registers that ordinary code may have touched: wgmma.fence is missing before it");
}

}  // namespace

void wgmma_fence(Thread& t) {
  collective(t, 0xffffffffu, "wgmma.fence", nullptr, nullptr);
  hopper_thread(t).wgmma_fenced = true;
}

void wgmma_issue(Thread& t, Wgmma& w) {
  HopperThread& me = hopper_thread(t);
  if (t.block->nthreads % 128 && t.warp / 4 * 4 + 4 > t.block->nwarps)
    fail(DIVERGENCE, "wgmma: warp %u is not in a complete warpgroup of four warps", t.warp);
  w.site = t.site;
  w.group = me.wgmma_group;
  Lane lane{&t, &w};
  collective(t, 0xffffffffu, "wgmma.mma_async", &lane, issue_leader);
  take_d(me, w);
  me.pending.push_back(w);
}

void wgmma_commit(Thread& t) {
  collective(t, 0xffffffffu, "wgmma.commit_group", nullptr, nullptr);
  hopper_thread(t).wgmma_group++;
}

void wgmma_wait(Thread& t, u32 keep) {
  HopperThread& me = hopper_thread(t);
  size_t done = 0;
  while (done < me.pending.size() && me.pending[done].group + keep < me.wgmma_group) ++done;
  Retire mine{&t, me.pending.data(), done};
  collective(t, 0xffffffffu, "wgmma.wait_group", &mine, retire_leader);
  me.pending.erase(me.pending.begin(), me.pending.begin() + done);
  if (done) me.wgmma_fenced = false;
}

void setmaxnreg(Thread& t, u32 count, bool increase) {
  HopperBlock& h = hopper(t);
  if (count < 24 || count > 256 || count % 8) fail(ASYNC_MISUSE, "setmaxnreg: %u is not a multiple of 8 in 24 .. 256", count);
  u32 groups = (t.block->nwarps + 3) / 4;
  // One block per multiprocessor: 64 Ki registers over the launched threads, in steps of 8 per thread.
  u32 entry = std::min(65536 / (groups * 128) / 8 * 8, 256u);
  if (h.registers.empty()) h.registers.assign(t.block->nwarps, entry);
  u32& mine = h.registers[t.warp];
  if (t.lane != 0) {  // lane 0 does the arithmetic for its warp
    collective(t, 0xffffffffu, "setmaxnreg (waits for registers of other warps)", nullptr, nullptr);
    return;
  }
  if (increase ? count < mine : count > mine)
    fail(ASYNC_MISUSE, "setmaxnreg.%s %u, but the warp has %u registers per thread", increase ? "inc" : "dec", count, mine);
  auto total = [&] {
    u32 n = 0;
    for (u32 r : h.registers) n += r;
    return n;
  };
  while (total() - mine + count > groups * 4 * entry) yield(t);
  mine = count;
  progress();
  collective(t, 0xffffffffu, "setmaxnreg (waits for registers of other warps)", nullptr, nullptr);
}

// The leader of a mask is always the same lane, but the manual does not say which: with a seed it is not the first.
u32 elect(Thread& t, u32 mask) {
  if (!(mask >> t.lane & 1)) fail(DIVERGENCE, "elect.sync: the executing lane is not in its own mask %#x", mask);
  collective(t, mask, "elect.sync", nullptr, nullptr);
  u32 skip = launch.seed % __builtin_popcount(mask), rest = mask;
  while (skip--) rest &= rest - 1;
  return (u32)__builtin_ctz(rest);
}

}  // namespace emu
