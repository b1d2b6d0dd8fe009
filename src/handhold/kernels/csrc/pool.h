// A small thread pool that blocks while idle: a spinning pool beside torch's own starves both.
#pragma once
#include <cstdint>

namespace hh {

// Bodies must not throw: there is nobody to catch in a worker, so `noexcept` ends the process. Allocate before `parallel`.
using Body = void (*)(void* arg, int64_t chunk) noexcept;

// Runs body(arg, 0..chunks-1) on up to n_threads threads, the caller among them. Chunks are handed out in ascending
// order; how work is cut into chunks must not depend on n_threads, so that results do not either.
void run_chunks(int64_t chunks, int n_threads, Body body, void* arg);

template <class F>
void parallel(int64_t chunks, int n_threads, F&& f) {
  run_chunks(chunks, n_threads, [](void* arg, int64_t c) noexcept { (*static_cast<F*>(arg))(c); }, &f);
}

// parallel over [0,n) in ranges of `grain`: f(begin, end)
template <class F>
void parallel_ranges(int64_t n, int64_t grain, int n_threads, F&& f) {
  parallel((n + grain - 1) / grain, n_threads, [&](int64_t c) {
    int64_t b = c * grain, e = b + grain < n ? b + grain : n;
    f(b, e);
  });
}

}  // namespace hh
