// The process's helper threads. They join jobs that callers publish, spin briefly when there is none, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace dynprune {

// Work that several threads may join and any of them can bring to its end alone.
class Job {
 public:
  virtual ~Job() = default;
  // Works until the job is done. `slot` is 0 for the caller, 1, 2, ... for helpers in the order they joined.
  virtual void work(int slot) = 0;

 private:
  friend class ThreadPool;
  int wanted_helpers_ = 0;
  int joined_ = 0;
};

class ThreadPool {
 public:
  // The one pool of the process; never destroyed, so that threads may run until the process is gone.
  static ThreadPool& instance();

  // Runs `job` on the calling thread and up to `num_threads` - 1 helpers. Returns when the caller's work() does; a helper that was
  // put aside may still be inside job->work() then, and keeps the job alive.
  void run(const std::shared_ptr<Job>& job, int num_threads);

  // Wakes the helpers that there are, for a job that follows at once: to wake takes as long as the first steps of a small model.
  void expect_job();

 private:
  ThreadPool() = default;
  // Starts helpers until there are `count`, or until the system gives no more threads.
  void ensure_helpers(int count);
  void help();
  std::shared_ptr<Job> join(int* slot);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::shared_ptr<Job>> jobs_;
  std::atomic<uint64_t> published_{0};  // counts jobs, those expected too; a change tells helpers to look
  int num_helpers_ = 0;
  int sleeping_ = 0;
};

}  // namespace dynprune
