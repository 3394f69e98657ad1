// mbarrier.cpp - the arrival / transaction barrier of sm_80 and sm_90, and the per-block state it shares with TMA and wgmma.
#include <algorithm>
#include <cstdio>

#include "hopper_state.h"
#include "state.h"

namespace emu {
namespace {

constexpr s64 TX_LIMIT = (1 << 20) - 1;

// The eight bytes in shared memory. The layout is the emulator's own (the hardware's is opaque, too).
struct Word {
  u32 phase, expected, pending;
  s64 tx;
  explicit Word(u64 w) : phase(w >> 63), expected(w >> 43 & 0xfffff), pending(w >> 23 & 0xfffff), tx((s64)(w << 41) >> 41) {}
  u64 bits() const { return (u64)phase << 63 | (u64)expected << 43 | (u64)pending << 23 | ((u64)tx & 0x7fffff); }
};

u32 offset(u32 address) { return shared_offset(address); }

MBarrier* find(HopperBlock& h, u32 address) {
  for (MBarrier* m : h.barriers)
    if (m->address == address) return m;
  return nullptr;
}

u8* bytes_of(Thread& t, u32 address) { return shared_at(t, address, 8, 8); }

Word load(Thread& t, MBarrier& m, u32 kind) {
  u64 word;
  std::memcpy(&word, shared_access(t, m.address, 8, kind | STRONG), 8);
  if (word != m.word)
    fail(ASYNC_MISUSE, "the mbarrier at shared offset %u was overwritten by something else since its last operation",
         offset(m.address));
  return Word(word);
}

void store(Thread& t, MBarrier& m, const Word& w) {
  m.word = w.bits();
  std::memcpy(bytes_of(t, m.address), &m.word, 8);
}

// Arrivals count for the waiters of their own phase and all later ones, not for those who look late at the phase before.
void publish(MBarrier& m) {
  if (!m.arriving.time) return;
  m.completed_time.resize(clocks(), 0);
  for (u32 i = 0; i < clocks(); ++i) m.completed_time[i] = std::max(m.completed_time[i], m.arriving.time[i]);
}

// After every change: when nothing is pending the phase completes.
void settle(Thread& t, MBarrier& m, Word& w) {
  if (w.tx > TX_LIMIT || w.tx < -TX_LIMIT)
    fail(ASYNC_MISUSE, "mbarrier at shared offset %u: %lld pending bytes are more than the 2^20 - 1 it can count",
         offset(m.address), (long long)w.tx);
  if (w.pending == 0 && w.tx == 0) {
    w.phase ^= 1;
    w.pending = w.expected;
    publish(m);
    for (Thread* p : m.parked) wake(*p);
    m.parked.clear();
    progress();
  }
  store(t, m, w);
}

bool complete(Thread& t, MBarrier& m, u32 parity) {
  if (load(t, m, READ).phase == parity) return false;
  if (!m.completed_time.empty()) {
    Clock completed{m.completed_time.data(), 0};
    acquire(t, completed);
  }
  return true;
}

// Lets one thing happen that this barrier waits for.
bool deliver_one(Thread& t, u32 address) {
  HopperBlock& h = hopper(t);  // only a block's own threads wait on its mbarriers
  for (size_t i = 0; i < h.arrivals.size(); ++i) {
    if (h.arrivals[i].barrier != address) continue;
    CopyArrival a = h.arrivals[i];
    h.arrivals.erase(h.arrivals.begin() + i);
    cp_async_deliver(*a.thread, a.before);
    MBarrier& m = mbarrier_at(t, address);
    release(*a.thread, m.arriving);
    Word w = load(t, m, READ);
    if (w.pending == 0) fail(ASYNC_MISUSE, "mbarrier at shared offset %u: more arrivals than the %u expected", offset(address), w.expected);
    w.pending--;
    settle(t, m, w);
    return true;
  }
  return bulk_deliver_one(t, address);
}

void describe(MBarrier& m, u32 parity) {
  Word w(m.word);
  std::snprintf(m.why, sizeof m.why, "mbarrier at shared offset %u, phase %u: %u of %u arrivals and %lld bytes are missing",
                offset(m.address), parity, w.pending, w.expected, (long long)w.tx);
}

bool test(Thread& t, u32 address, u32 parity, bool may_block) {
  HopperThread& me = hopper_thread(t);
  MBarrier& m = mbarrier_at(t, address);
  address = m.address;
  bool done = complete(t, m, parity);
  if (!done && deliver_one(t, address)) done = complete(t, m, parity);
  if (done) {
    me.last_poll = 0;
    return true;
  }
  // The first try may fail although the phase will complete, as on hardware: code that does not loop shows. A second try
  // sleeps, so that a wait that can never end is recognised as such.
  if (!may_block || me.last_poll != address) {
    me.last_poll = address;
    yield(t);
    return false;
  }
  while (!complete(t, m, parity)) {
    if (deliver_one(t, address)) {
      yield(t);
      continue;
    }
    describe(m, parity);
    m.parked.push_back(&t);
    park(t, m.why);
    if (find(hopper(t), address) != &m) fail(ASYNC_MISUSE, "the mbarrier at shared offset %u was invalidated while waited for", offset(address));
  }
  me.last_poll = 0;
  return true;
}

}  // namespace

extern void (*const block_end_hook)(Block&) = hopper_block_end;

void hopper_begin(Thread& t) { hopper(t); }

HopperBlock& hopper(Block& block) {
  if (!block.hopper) {
    auto* h = new HopperBlock;
    h->writers.resize((block.shared_bytes + 3) / 4, HopperBlock::Writer{nullptr, 0});
    h->threads.resize(block.nthreads);
    h->wgmma_log.resize(block.nwarps, {0, 0});
    block.hopper = h;
  }
  return *(HopperBlock*)block.hopper;
}

MBarrier& mbarrier_at(Thread& t, u32 address) {
  bytes_of(t, address);
  Block& block = block_of(t, address, "mbarrier");
  if (!block.alive) fail(ASYNC_MISUSE, "an mbarrier of block %u of the cluster, whose threads have all ended", block.rank);
  MBarrier* m = find(hopper(block), cluster_address(block, address));
  if (!m) fail(ASYNC_MISUSE, "no mbarrier was initialised at shared offset %u", offset(address));
  return *m;
}

void mbarrier_init(Thread& t, u32 address, u32 count) {
  HopperBlock& h = hopper(t);
  bytes_of(t, address);
  if (count == 0 || count > 0xfffff) fail(ASYNC_MISUSE, "mbarrier.init: count %u is not in 1 .. 2^20 - 1", count);
  if (&block_of(t, address, "mbarrier") != t.block) fail(ASYNC_MISUSE, "mbarrier.init in another block of the cluster");
  MBarrier* m = find(h, cluster_address(*t.block, address));
  if (m) fail(ASYNC_MISUSE, "mbarrier.init: the mbarrier at shared offset %u is in use; invalidate it first", offset(address));
  m = new MBarrier{};
  m->address = cluster_address(*t.block, address);
  m->init_thread = &t;
  m->init_epoch = hopper_thread(t).proxy_epoch;
  h.barriers.push_back(m);
  shared_access(t, address, 8, WRITE);
  Word w(0);
  w.expected = w.pending = count;
  store(t, *m, w);
}

void mbarrier_inval(Thread& t, u32 address) {
  HopperBlock& h = hopper(t);
  MBarrier& m = mbarrier_at(t, address);
  Word w = load(t, m, READ);
  if (w.tx) fail(ASYNC_MISUSE, "mbarrier.inval: %lld bytes are still expected at shared offset %u", (long long)w.tx, offset(address));
  shared_access(t, address, 8, WRITE);
  h.barriers.erase(std::find(h.barriers.begin(), h.barriers.end(), &m));
  for (Thread* p : m.parked) wake(*p);
  delete &m;
}

u64 mbarrier_arrive(Thread& t, u32 address, u32 count, u32 expect, bool no_complete, bool drop) {
  MBarrier& m = mbarrier_at(t, address);
  Word w = load(t, m, WRITE);
  u64 state = (u64)w.phase << 63 | w.pending;  // the phase and the pending count before this arrival
  if (count == 0 || count > w.pending)
    fail(ASYNC_MISUSE, "mbarrier at shared offset %u: arrival of %u, but only %u of %u arrivals are pending in this phase",
         offset(address), count, w.pending, w.expected);
  release(t, m.arriving);
  w.pending -= count;
  w.tx += expect;
  if (drop) w.expected -= count;
  if (no_complete && w.pending == 0 && w.tx == 0)
    fail(ASYNC_MISUSE, "mbarrier at shared offset %u: .noComplete arrival completes the phase", offset(address));
  settle(t, m, w);
  return state;
}

void mbarrier_expect(Thread& t, u32 address, u32 bytes) {
  MBarrier& m = mbarrier_at(t, address);
  Word w = load(t, m, WRITE);
  w.tx += bytes;
  settle(t, m, w);
}

void mbarrier_complete(Thread& t, u32 address, u32 bytes) {
  MBarrier& m = mbarrier_at(t, address);
  release(t, m.arriving);
  mbarrier_transaction(t, m, -(s64)bytes);
}

void mbarrier_transaction(Thread& t, MBarrier& m, s64 bytes) {
  Word w = load(t, m, READ);  // not an access of thread t: the copy engine does it
  w.tx += bytes;
  settle(t, m, w);
}

void mbarrier_nudge(MBarrier& m) {
  for (Thread* p : m.parked) wake(*p);
  m.parked.clear();
  progress();
}

bool mbarrier_test_parity(Thread& t, u32 address, u32 parity, bool may_block) { return test(t, address, parity & 1, may_block); }
bool mbarrier_test_state(Thread& t, u32 address, u64 state, bool may_block) { return test(t, address, (u32)(state >> 63), may_block); }

void cp_async_arrive(Thread& t, u32 address, bool noinc) {
  HopperBlock& h = hopper(t);
  MBarrier& m = mbarrier_at(t, address);
  Word w = load(t, m, WRITE);
  if (!noinc) {
    if (w.pending == 0xfffff) fail(ASYNC_MISUSE, "mbarrier at shared offset %u: pending count overflows", offset(address));
    w.pending++;
    store(t, m, w);
  }
  h.arrivals.push_back({&t, t.copy_seq, m.address});
  mbarrier_nudge(m);
}

void fence_mbarrier_init(Thread& t) {
  HopperBlock& h = hopper(t);
  for (MBarrier* m : h.barriers)
    if (m->init_thread == &t) m->init_epoch = 0;  // visible to the copy engine from now on
}

void fence_proxy_async(Thread& t, bool shared) {
  if (shared) hopper(t).threads[t.index].proxy_epoch++;
}

void hopper_generic_write(Thread& t, u32 address, u32 bytes) {
  HopperBlock& h = hopper(block_of(t, address, "shared"));
  u32 first = offset(address) / 4, last = (offset(address) + bytes - 1) / 4;
  for (u32 i = first; i <= last; ++i) h.writers[i] = {&t, hopper_thread(t).proxy_epoch};
}

void check_proxy(Thread& t, u32 address, u32 bytes, const char* what) {
  HopperBlock& h = hopper(block_of(t, address, "shared"));
  u32 first = offset(address) / 4, last = (offset(address) + bytes - 1) / 4;
  for (u32 i = first; i <= last; ++i) {
    HopperBlock::Writer w = h.writers[i];
    if (w.thread && hopper_thread(*w.thread).proxy_epoch == w.epoch)
      fail(ASYNC_MISUSE, "%s shared offset %u, which thread %u wrote by ordinary stores without fence.proxy.async since", what,
           4 * i, w.thread->index);
  }
}

namespace {

// What must be true of the whole block when its last thread ends.
void check_block(Thread& t, HopperBlock& h) {
  for (BulkCopy& c : h.copies)
    if (c.what == BulkCopy::LOAD) {
      t.site = c.site;
      fail(ASYNC_MISUSE, "the block ended with a bulk load in flight that nobody waited for");
    }
  for (MBarrier* m : h.barriers)
    if (s64 tx = Word(m->word).tx)
      fail(ASYNC_MISUSE, "the block ended while the mbarrier at shared offset %u expected %lld more bytes", offset(m->address),
           (long long)tx);
  for (u32 w = 0; w < h.wgmma_log.size(); ++w)
    if (h.wgmma_log[w] != h.wgmma_log[w / 4 * 4])
      fail(DIVERGENCE, "warps %u and %u of one warpgroup did not execute the same wgmma instructions (%llu and %llu of them)",
           w / 4 * 4, w, (unsigned long long)h.wgmma_log[w / 4 * 4][0], (unsigned long long)h.wgmma_log[w][0]);
}

}  // namespace

void hopper_thread_exit(Thread& t) {
  if (!t.block->hopper) return;
  HopperBlock& h = hopper(t);
  if (!h.threads[t.index].pending.empty()) {
    t.site = h.threads[t.index].pending[0].site;
    fail(ASYNC_MISUSE, "the thread ended with a wgmma that was never waited for");
  }
  for (BulkCopy& c : h.copies)
    if (c.what != BulkCopy::LOAD && c.thread == &t && !c.source_read) {
      t.site = c.site;
      fail(ASYNC_MISUSE, "the thread ended while its bulk store may still read shared memory: wait_group.read is missing");
    }
  bulk_wait(t, 0, false);  // stores whose source was read complete by themselves
  cluster_thread_exit(t);
  if (t.block->alive <= 1) check_block(t, h);
}

void hopper_block_end(Block& block) {
  cluster_end();
  auto* h = (HopperBlock*)block.hopper;
  if (!h) return;
  block.hopper = nullptr;
  for (MBarrier* m : h->barriers) delete m;
  delete h;
}

}  // namespace emu
