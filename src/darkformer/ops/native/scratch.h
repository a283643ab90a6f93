// Memory that a thread works in. It is kept between calls: fresh pages cost more time than a short call.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

class Scratch {
  struct Block { float* p; size_t size; };
  std::vector<Block> blocks;
  Block large{};
  size_t block = 0, used = 0;  // numbers
  static Block make(size_t n) {
    n = (n + 15) & ~size_t(15);  // whole lines of the cache
    return {(float*)aligned_alloc(64, n * sizeof(float)), n};
  }
  static float* fresh(float* p, size_t n) {
#ifdef POISON  // in tests: what is read before it is written spoils the result
    memset((void*)p, 0xff, n * sizeof(float));
#endif
    return p;
  }
  // Those of all threads, so that one can give all of it back.
  struct All { std::mutex lock; std::vector<Scratch*> threads; };
  static All& all() { static All* a = new All; return *a; }  // never destroyed: threads may end after main
  void clear() {
    for (auto& b : blocks) free(b.p);
    free(large.p);
    blocks.clear(), large = {}, block = used = 0;
  }
 public:
  Scratch() {
    std::lock_guard<std::mutex> one(all().lock);
    all().threads.push_back(this);
  }
  ~Scratch() {
    std::lock_guard<std::mutex> one(all().lock);
    auto& known = all().threads;
    known.erase(std::find(known.begin(), known.end(), this));
    clear();
  }
  // Gives the memory of all threads back to the system. Not while a call runs.
  static void release() {
    std::lock_guard<std::mutex> one(all().lock);
    for (Scratch* s : all().threads) s->clear();
  }
  void reset() { block = used = 0; }
  // What is taken after a mark is given back together.
  std::pair<size_t, size_t> mark() const { return {block, used}; }
  void release(std::pair<size_t, size_t> m) { block = m.first, used = m.second; }
  float* take(size_t n) {
    const size_t size = (n + 31) / 16 * 16;  // a line more: neighbours are never in one
    while (block < blocks.size() && used + size > blocks[block].size) block++, used = 0;
    if (block == blocks.size()) blocks.push_back(make(std::max<size_t>(size, 1 << 18))), used = 0;
    float* p = blocks[block].p + used;
    used += size;
    return fresh(p, n);
  }
  // One block more, which a reset leaves alone; what it held is lost.
  float* lasting(size_t n) {
    if (n > large.size) {
      free(large.p), large = {};  // not both at a time
      large = make(n);
    }
    return fresh(large.p, n);
  }
};

static inline Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}
