// Working memory of a thread. It is kept between calls: touching fresh pages costs more time than a short call.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef GUARD_PAGES
#include <sys/mman.h>
constexpr size_t PAGE = 4096;
#endif

class Scratch {
  struct Block { float* p; size_t size; };
  std::vector<Block> blocks;
  Block large{};
  size_t block = 0, used = 0;  // the block in use, and the floats of it that are taken
  static Block allocate(size_t n) {
    n = (n + 15) & ~size_t(15);  // whole cache lines
#ifdef GUARD_PAGES  // for tests: the page behind the block may not be touched
    const size_t bytes = n * sizeof(float), pages = (bytes + PAGE - 1) / PAGE * PAGE;
    char* start = (char*)mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + pages, PAGE, PROT_NONE)) throw std::bad_alloc();
    float* p = (float*)(start + pages - bytes);
#else
    float* p = (float*)aligned_alloc(64, n * sizeof(float));
    if (!p) throw std::bad_alloc();
#endif
    return {p, n};
  }
  static void deallocate(Block b) {
#ifdef GUARD_PAGES
    const uintptr_t start = (uintptr_t)b.p & ~(PAGE - 1);
    if (b.p) munmap((void*)start, (uintptr_t)(b.p + b.size) - start + PAGE);
#else
    free(b.p);
#endif
  }
  static float* poisoned(float* p, size_t n) {
#ifdef POISON  // for tests: whatever is read before it is written becomes NaN
    memset((void*)p, 0xff, n * sizeof(float));
#endif
    return p;
  }
  // The scratch of every thread, so that all of it can be released by one of them.
  struct Registry { std::mutex lock; std::vector<Scratch*> threads; };
  static Registry& registry() { static Registry* r = new Registry; return *r; }  // never destroyed: threads may outlive main
  void clear() {
    for (auto& b : blocks) deallocate(b);
    deallocate(large);
    blocks.clear(), large = {}, block = used = 0;
  }

 public:
  Scratch() {
    std::lock_guard<std::mutex> guard(registry().lock);
    registry().threads.push_back(this);
  }
  ~Scratch() {
    std::lock_guard<std::mutex> guard(registry().lock);
    auto& threads = registry().threads;
    threads.erase(std::find(threads.begin(), threads.end(), this));
    clear();
  }
  // Returns the memory of all threads to the system. Must not run during a call.
  static void release_all() {
    std::lock_guard<std::mutex> guard(registry().lock);
    for (Scratch* s : registry().threads) s->clear();
  }
  void reset() { release({0, 0}); }
  // Everything taken since a mark can be released together.
  std::pair<size_t, size_t> mark() const { return {block, used}; }
  void release(std::pair<size_t, size_t> m) {
    block = m.first, used = m.second;
#ifdef SEPARATE_BUFFERS
    for (; blocks.size() > block; blocks.pop_back()) deallocate(blocks.back());
#endif
  }
  float* take(size_t n) {
#ifdef SEPARATE_BUFFERS  // for tests: a block for each buffer, so that what lies beside one is nobody's
    blocks.push_back(allocate(n)), block++;
    return poisoned(blocks.back().p, n);
#endif
    const size_t size = (n + 31) / 16 * 16;  // one cache line extra, so that two buffers never share one
    while (block < blocks.size() && used + size > blocks[block].size) block++, used = 0;
    if (block == blocks.size()) blocks.push_back(allocate(std::max<size_t>(size, 1 << 18))), used = 0;
    float* p = blocks[block].p + used;
    used += size;
    return poisoned(p, n);
  }
  // A single buffer that `reset` leaves alone; its previous contents are lost.
  float* take_persistent(size_t n) {
    if (n > large.size) {
      deallocate(large), large = {};  // before the new one is allocated, so that both never exist together
      large = allocate(n);
    }
    return poisoned(large.p, n);
  }
};

static inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}
