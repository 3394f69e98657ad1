// hopper.h - mbarrier, bulk copies (TMA) and wgmma: what generated code calls, and the state these share per block.
//
// Asynchrony is made visible instead of fast. A bulk load fills its destination with 0xFF when it is issued and delivers only
// when somebody waits on its mbarrier; a bulk store reads shared memory only when its group is waited for; wgmma multiplies
// only in wait_group, with the registers named by address. So whoever is too early, or reuses something too soon, computes
// with garbage even where no rule below reports it.
#pragma once
#include "emu.h"

namespace emu {

enum ElementType : u8 { OPAQUE = 0, FLOAT16 = 1, BFLOAT16 = 2, FLOAT32 = 3, INT32 = 4, UINT32 = 5, FLOAT64 = 6 };

enum WgmmaType : u32 { WG_F16 = 0, WG_BF16 = 1, WG_TF32 = 2 };
// One wgmma.mma_async as a thread issues it.
struct Wgmma {
  u32 n, type;
  bool half_d;          // D is f16: registers hold pairs
  bool a_registers, accumulate, negate_a, negate_b, transpose_a, transpose_b;
  u64 a, b;             // descriptors (a unused when A is in registers)
  u32 site, group;
  void* d[128];         // registers of D
  void *lowest, *highest;  // smallest and largest of them
  u32* ar[4];           // registers of A
  u32 saved[128];       // D before this instruction
  bool chained[128];    // ... unless an earlier pending wgmma writes it
};

// ---- called by the core ---------------------------------------------------------------------------------------------------
void hopper_generic_write(Thread& t, u32 address, u32 bytes);  // an ordinary store to shared memory of the own block
void hopper_thread_exit(Thread& t);    // after the kernel function returned, while Block::alive still counts the thread
void hopper_block_end(Block& block);   // frees the state

// ---- called by generated code ---------------------------------------------------------------------------------------------
void hopper_begin(Thread& t);          // first statement of every kernel that uses any of these
void mbarrier_init(Thread& t, u32 address, u32 count);
void mbarrier_inval(Thread& t, u32 address);
u64 mbarrier_arrive(Thread& t, u32 address, u32 count, u32 expect, bool no_complete, bool drop);
void mbarrier_expect(Thread& t, u32 address, u32 bytes);
void mbarrier_complete(Thread& t, u32 address, u32 bytes);
bool mbarrier_test_parity(Thread& t, u32 address, u32 parity, bool may_block);
bool mbarrier_test_state(Thread& t, u32 address, u64 state, bool may_block);
inline u32 mbarrier_pending_count(u64 state) { return (u32)(state & 0xfffff); }
void cp_async_arrive(Thread& t, u32 address, bool noinc);

// `blocks`: bit per rank of the cluster that receives the copy (multicast), 0 for the address's own block only.
void bulk_load(Thread& t, u32 shared, u64 global, u32 bytes, u32 barrier, u32 blocks);
void bulk_store(Thread& t, u64 global, u32 shared, u32 bytes);
void bulk_reduce(Thread& t, u64 global, u32 shared, u32 bytes, u32 element);
void tensor_load(Thread& t, u32 shared, u64 map, u32 rank, const s32* coordinate, u32 barrier, u32 blocks);
void tensor_store(Thread& t, u64 map, u32 rank, const s32* coordinate, u32 shared, bool reduce);
void tensor_prefetch(Thread& t, u64 map, u32 rank);
void bulk_commit(Thread& t);
void bulk_wait(Thread& t, u32 keep, bool read_only);
void fence_proxy_async(Thread& t, bool shared);
void fence_mbarrier_init(Thread& t);

void wgmma_fence(Thread& t);
void wgmma_issue(Thread& t, Wgmma& w);
void wgmma_commit(Thread& t);
void wgmma_wait(Thread& t, u32 keep);
void setmaxnreg(Thread& t, u32 count, bool increase);
u32 elect(Thread& t, u32 mask);
void cluster_arrive(Thread& t, bool orders_memory);
void cluster_wait(Thread& t);
u32 map_shared(Thread& t, u32 address, u32 rank);  // mapa

}  // namespace emu
