#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

namespace hh {
namespace {

// To sleep and be woken costs tens of microseconds, and an op is a few jobs one right after another: so wait awake for about as
// long first. No longer: beside other processes, or torch's own threads, waiting awake takes their time.
constexpr std::chrono::microseconds kAwake{30};

template <class F>
bool soon(F&& happened) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  do {
    for (int i = 0; i < 16; ++i) {
      if (happened()) return true;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
  } while (std::chrono::steady_clock::now() < end);
  return happened();
}

struct Pool {
  std::mutex busy;  // held by the caller whose job is running
  std::mutex m;
  std::condition_variable wake, done;
  std::atomic<uint64_t> job{0};  // written with `m` held, as `running` is
  std::atomic<int> running{0};
  int wanted = 0, workers = 0;
  Body body = nullptr;
  void* arg = nullptr;
  int64_t chunks = 0;
  std::atomic<int64_t> next{0};
  pid_t pid = getpid();

  void drain() {
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(arg, c);
  }

  void grow(int n) {  // called with `busy` held
    try {
      for (; workers < n; ++workers) {
        std::lock_guard<std::mutex> lock(m);  // a new worker must see the job count of now, not 0
        std::thread([this, i = workers, s = job.load()] { worker(i, s); }).detach();
      }
    } catch (...) {  // no more threads or memory to be had: go on with fewer
    }
  }

  void worker(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(m);
    for (;;) {
      lock.unlock();
      soon([&] { return job.load(std::memory_order_relaxed) != seen; });
      lock.lock();
      wake.wait(lock, [&] { return job != seen; });
      seen = job;
      if (index >= wanted) continue;
      lock.unlock();
      drain();
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }
};

std::atomic<Pool*> current{nullptr};

// Never destroyed: its threads may outlive static destruction. A forked child has none of the parent's threads, so it makes its own.
// Without a lock, which a child could inherit taken. Null when memory runs out.
Pool* pool() {
  Pool* p = current.load(std::memory_order_acquire);
  if (p && p->pid == getpid()) return p;
  Pool* fresh = new (std::nothrow) Pool;
  if (!fresh || current.compare_exchange_strong(p, fresh, std::memory_order_acq_rel, std::memory_order_acquire)) return fresh;
  delete fresh;  // another thread was first
  return p;
}

}  // namespace

void run_chunks(int64_t chunks, int n_threads, Body body, void* arg) {
  if (chunks <= 0) return;
  if (n_threads > chunks) n_threads = static_cast<int>(chunks);
  if (Pool* p = n_threads > 1 ? pool() : nullptr) {
    std::unique_lock<std::mutex> mine(p->busy, std::try_to_lock);
    if (mine) {  // two callers at once: the second works alone rather than wait
      p->grow(n_threads - 1);
      {
        std::lock_guard<std::mutex> lock(p->m);
        p->body = body, p->arg = arg, p->chunks = chunks;
        p->next.store(0, std::memory_order_relaxed);
        p->wanted = p->running = n_threads - 1 < p->workers ? n_threads - 1 : p->workers;
        ++p->job;
      }
      p->wake.notify_all();
      p->drain();
      soon([&] { return p->running.load(std::memory_order_relaxed) == 0; });
      std::unique_lock<std::mutex> lock(p->m);
      p->done.wait(lock, [&] { return p->running == 0; });
      return;
    }
  }
  for (int64_t c = 0; c < chunks; ++c) body(arg, c);
}

}  // namespace hh
