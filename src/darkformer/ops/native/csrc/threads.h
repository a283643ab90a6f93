// Work divided among threads.
#pragma once
#include <atomic>
#include <exception>
#include <functional>
#include <thread>

#include "amx.h"
#include "call.h"

// Calls body(0 … workers-1), each once, on up to `workers` threads: those of torch's OpenMP pool where there is one.
// Throws std::bad_alloc if one of them did.
static void parallel(void* omp_parallel, int workers, const std::function<void(int)>& body) {
  struct Work { const std::function<void(int)>* body; std::atomic<int> next; int workers; std::atomic<bool> out_of_memory; };
  Work work{&body, {0}, workers, {false}};
  auto run = [](void* p) {
    Work& w = *(Work*)p;
    const unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040);  // denormal numbers count as 0: they cost hundreds of cycles and carry nothing here
    try {
      [[maybe_unused]] const TileConfig tiles;
      for (int s; (s = w.next.fetch_add(1)) < w.workers;) {
        scratch().reset();
        (*w.body)(s);
      }
    } catch (const std::bad_alloc&) {  // may not leave a thread of the pool
      w.out_of_memory = true;
    }
    _mm_setcsr(control);
  };
  if (workers == 1) run(&work);
  else if (omp_parallel) ((void (*)(void (*)(void*), void*, unsigned, unsigned))omp_parallel)(run, &work, workers, 0);
  else {
    std::vector<std::thread> threads;
    try {
      for (int i = 1; i < workers; i++) threads.emplace_back(run, &work);
    } catch (const std::exception&) {  // no more threads: those that exist do all of the work
    }
    run(&work);
    for (auto& t : threads) t.join();
  }
  if (work.out_of_memory) throw std::bad_alloc();
}

// The tokens [begin, end) of one (batch row, kv head) pair, which one thread computes.
struct Task {
  int b, g, begin, end, segment, segments;
  long pair(const Call& c) const { return (long)b * c.G + g; }
};

// Whole pairs where they divide evenly among the threads; the remaining ones are cut into segments.
static std::vector<Task> plan(const Call& c, int& workers) {
  const int pairs = c.B * c.G, T = std::max<int64_t>(1, c.threads);
  int rest = pairs % T, segments = 1;
  if (rest) {  // T / gcd(rest, T)
    int a = rest, b = T;
    while (b) std::swap(a %= b, b);
    segments = T / a;
  }
  std::vector<Task> tasks;
  for (int i = 0; i < pairs; i++) {
    const int b = i / c.G, g = i % c.G, n = c.lengths[b];
    const int S = i < pairs - rest ? 1 : std::max(1, std::min(segments, n / (4 * CHUNK)));
    const int chunks = (n + CHUNK - 1) / CHUNK;
    for (int s = 0; s < S; s++)
      tasks.push_back({b, g, chunks * s / S * CHUNK, s + 1 < S ? chunks * (s + 1) / S * CHUNK : n, s, S});
  }
  workers = std::min<int>(T, tasks.size());
  return tasks;
}
