// cluster.cpp - what blocks of one cluster share: their barrier and each other's shared memory.
#include "hopper_state.h"
#include "state.h"

namespace emu {
namespace {

// barrier.cluster of the blocks that run together.
struct ClusterBarrier {
  u32 run, phase, arrived;
  Clock clock[2];  // by phase; a later phase's arrivals are not for those who still leave the one before
  std::vector<Thread*> waiting;
} barrier;

ClusterBarrier& now() {
  if (barrier.run != run_id) barrier = ClusterBarrier{run_id, 1, 0, {}, {}};
  return barrier;
}

u32 alive() {
  u32 n = 0;
  for (Block* b : blocks) n += b->alive;
  return n;
}

void open_if_complete(u32 living) {
  if (!barrier.arrived || barrier.arrived < living) return;
  barrier.arrived = 0;
  barrier.phase++;
  for (Thread* t : barrier.waiting) wake(*t);
  barrier.waiting.clear();
  progress();
}

}  // namespace

void cluster_arrive(Thread& t, bool orders_memory) {
  ClusterBarrier& b = now();
  HopperThread& me = hopper_thread(t);
  if (me.cluster_phase) fail(ASYNC_MISUSE, "barrier.cluster.arrive twice without barrier.cluster.wait");
  me.cluster_phase = b.phase;
  if (orders_memory) release(t, b.clock[b.phase & 1]);
  b.arrived++;
  open_if_complete(alive());
}

void cluster_wait(Thread& t) {
  ClusterBarrier& b = now();
  HopperThread& me = hopper_thread(t);
  if (!me.cluster_phase) fail(ASYNC_MISUSE, "barrier.cluster.wait without barrier.cluster.arrive");
  while (b.phase == me.cluster_phase) {
    b.waiting.push_back(&t);
    park(t, "barrier.cluster");
  }
  acquire(t, b.clock[me.cluster_phase & 1]);
  me.cluster_phase = 0;
}

void cluster_thread_exit(Thread& t) {
  if (barrier.run != run_id) return;
  if (hopper_thread(t).cluster_phase == barrier.phase) barrier.arrived--;  // it had arrived, and counts no longer
  open_if_complete(alive() - 1);
}

void cluster_end() { barrier.run = 0; }  // numbers of runs begin again with the next launch

u32 map_shared(Thread& t, u32 address, u32 rank) {
  if (rank >= blocks.size()) fail(ASYNC_MISUSE, "mapa: rank %u in a cluster of %zu blocks", rank, blocks.size());
  shared_at(t, address, 1, 1);
  return cluster_address(*blocks[rank], address);
}

}  // namespace emu
