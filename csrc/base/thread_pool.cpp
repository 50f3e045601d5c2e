#include "base/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <system_error>

#include "base/denormals.h"
#include "base/spin.h"

namespace dynprune {
namespace {

// How long a helper looks for the next job after one, before it sleeps, and for one that it was told to expect: longer than the Python code
// between two calls of a small model, and before a call of a large one, which finds no cache warm. Shorter than a time slice.
constexpr int64_t kSpinNs = 100'000;
constexpr int64_t kExpectNs = 250'000;

// More would only wait for a core.
constexpr int kMaxHelpers = 255;

// A forked child has none of the parent's threads, and a mutex may be held by one of them: it starts with a fresh pool.
ThreadPool* g_pool = nullptr;

}  // namespace

ThreadPool& ThreadPool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    g_pool = new ThreadPool();
    pthread_atfork(nullptr, nullptr, [] { g_pool = new ThreadPool(); });
  });
  return *g_pool;
}

void ThreadPool::ensure_helpers(int count) {
  try {
    for (; num_helpers_ < std::min(count, kMaxHelpers); ++num_helpers_) std::thread([this] { help(); }).detach();
  } catch (const std::system_error&) {
    // Those that there are, if any, and the caller do the work.
  }
}

void ThreadPool::run(const std::shared_ptr<Job>& job, int num_threads) {
  if (num_threads <= 1) {
    job->work(0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ensure_helpers(num_threads - 1);
    job->wanted_helpers_ = num_threads - 1;
    job->joined_ = 0;
    jobs_.push_back(job);
    published_.fetch_add(1, std::memory_order_release);
    if (sleeping_ > 0) wake_.notify_all();
  }
  job->work(0);
  std::lock_guard<std::mutex> lock(mutex_);
  jobs_.erase(std::find(jobs_.begin(), jobs_.end(), job));
}

void ThreadPool::expect_job() {
  published_.fetch_add(1, std::memory_order_release);
  std::lock_guard<std::mutex> lock(mutex_);
  if (sleeping_ > 0) wake_.notify_all();
}

std::shared_ptr<Job> ThreadPool::join(int* slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const std::shared_ptr<Job>& job : jobs_) {
    if (job->joined_ < job->wanted_helpers_) {
      *slot = ++job->joined_;
      return job;
    }
  }
  return nullptr;
}

void ThreadPool::help() {
  const FlushDenormals flush;
  int64_t awake_until = now_ns() + kSpinNs;
  for (;;) {
    const uint64_t seen = published_.load(std::memory_order_acquire);
    int slot = 0;
    if (std::shared_ptr<Job> job = join(&slot)) {
      job->work(slot);
      awake_until = now_ns() + kSpinNs;
      continue;
    }
    while (published_.load(std::memory_order_acquire) == seen) {
      if (now_ns() < awake_until) {
        pause();
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      ++sleeping_;
      wake_.wait(lock, [&] { return published_.load(std::memory_order_acquire) != seen; });
      --sleeping_;
    }
    awake_until = now_ns() + kExpectNs;
  }
}

}  // namespace dynprune
