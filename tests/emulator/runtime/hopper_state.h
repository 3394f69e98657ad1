// hopper_state.h - what mbarrier.cpp, bulk.cpp and wgmma.cpp share: layouts as pure functions, and the state of one block.
#pragma once
#include <array>
#include <vector>

#include "hopper.h"

namespace emu {

// ---- swizzle ----------------------------------------------------------------------------------------------------------
// XOR of 16-byte column bits (from 4) with row bits (from 7) of the shared address; span 32, 64 or 128 bytes, 0 for none.
inline u32 swizzle(u32 address, u32 span) {
  return address ^ ((address >> 3) & (span == 128 ? 0x70u : span == 64 ? 0x30u : span == 32 ? 0x10u : 0u));
}

// ---- tensor maps --------------------------------------------------------------------------------------------------------
// The emulator's own encoding of the 128 bytes; written by tests/emulator/tensormap.py, which checks the limits.
constexpr u64 TENSOR_MAP_MAGIC = 0x50414d524f534e54ull;  // "TNSORMAP"
struct TensorMap {
  u64 magic, base;
  u64 dim[5];      // elements, innermost first
  u64 stride[4];   // bytes, of dim 1, 2, ...
  u16 box[5];
  u8 rank, element_bytes, type, swizzle, fill_nan, reserved[25];
};
static_assert(sizeof(TensorMap) == 128);

// ---- wgmma operands -------------------------------------------------------------------------------------------------------
// Where the 16-byte chunks of an operand lie. `mn` counts rows of A or columns of B.
struct MatrixDescriptor {
  u32 start, leading, stride, span;
  explicit MatrixDescriptor(u64 d)
      : start((u32)(d & 0x3fff) << 4), leading((u32)(d >> 16 & 0x3fff) << 4), stride((u32)(d >> 32 & 0x3fff) << 4) {
    static const u32 spans[4] = {0, 128, 64, 32};
    span = spans[d >> 62];
  }
  // K-major: chunk `j` (of two) of row `mn`.
  u32 k_major(u32 mn, u32 j) const {
    if (!span) return start + mn / 8 * stride + mn % 8 * 16 + j * leading;
    return swizzle(start + mn / 8 * stride + mn % 8 * span + j * 16, span);
  }
  // MN-major: the chunk of 8 elements mn = 8c .. 8c + 7 at depth `k`.
  u32 mn_major(u32 c, u32 k) const {
    if (!span) return start + c * stride + k / 8 * leading + k % 8 * 16;
    u32 chunks = span / 16;
    return swizzle(start + c / chunks * leading + k / 8 * stride + k % 8 * span + c % chunks * 16, span);
  }
};

// ---- state of one block -------------------------------------------------------------------------------------------------
struct MBarrier {
  u32 address;                 // with the block's rank, so that every thread of the cluster can use it
  u64 word;                    // what the eight bytes in shared memory must still be
  Clock arriving;              // who has arrived so far
  std::vector<u32> completed_time;  // who had when the last phase completed (a vector clock)
  Thread* init_thread;
  u32 init_epoch;
  std::vector<Thread*> parked;
  char why[160];
};

struct BulkCopy {
  enum What : u8 { LOAD, STORE, REDUCE } what;
  bool tensor, source_read;
  u32 element;                 // ElementType of a plain (not tensor) reduction
  TensorMap map;
  s32 coordinate[5];
  u32 shared, bytes, barrier, group, site;
  Thread* thread;
  u64 global;
  std::vector<u8> staged;      // source bytes once they are read
};

// An arrival that waits for the cp.async of its thread.
struct CopyArrival {
  Thread* thread;
  u64 before;                  // complete the copies with a smaller sequence number first
  u32 barrier;
};

struct HopperThread {
  u32 proxy_epoch = 1;         // number of fence.proxy.async so far + 1
  u32 bulk_group = 0;          // bulk groups committed so far
  u32 wgmma_group = 0;
  u32 cluster_phase = 0;       // barrier.cluster: phase it arrived in + 1
  bool wgmma_fenced = false;
  u32 last_poll = 0;           // mbarrier of the last failed try_wait
  std::vector<Wgmma> pending;
};

struct HopperBlock {
  // Per 4-byte word of shared memory: last generic writer (null when none) and its epoch at that time.
  struct Writer {
    Thread* thread;
    u32 epoch;
  };
  std::vector<Writer> writers;
  std::vector<HopperThread> threads;
  std::vector<MBarrier*> barriers;
  std::vector<BulkCopy> copies;
  std::vector<CopyArrival> arrivals;
  std::vector<u32> registers;                 // setmaxnreg: registers per thread of each warpgroup
  std::vector<std::array<u64, 2>> wgmma_log;  // per warp: number of wgmma, hash of what they were
};
HopperBlock& hopper(Block& block);  // created on first use
inline HopperBlock& hopper(Thread& t) { return hopper(*t.block); }
inline HopperThread& hopper_thread(Thread& t) { return hopper(t).threads[t.index]; }
// The same shared address as every thread of the cluster sees it, and the offset within the window.
inline u32 cluster_address(Block& block, u32 address) { return (address & 0xffffffu) | (block.rank + 1) << 24; }
inline u32 shared_offset(u32 address) { return (address & 0xffffffu) - SHARED_BASE; }

// ---- shared by mbarrier.cpp, bulk.cpp and wgmma.cpp -----------------------------------------------------------------------
MBarrier& mbarrier_at(Thread& t, u32 address);
void mbarrier_transaction(Thread& t, MBarrier& m, s64 bytes);  // adds to the tx-count
void mbarrier_nudge(MBarrier& m);                              // something that can complete it is now on its way
bool bulk_deliver_one(Thread& t, u32 barrier);                 // completes one load that reports to the barrier
void cluster_end();
void cluster_thread_exit(Thread& t);                           // barrier.cluster does not wait for it any more
void check_proxy(Thread& t, u32 address, u32 bytes, const char* what);

}  // namespace emu
