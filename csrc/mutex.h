// std::mutex and its scoped lock with the annotations that clang needs; those of libstdc++ have none.
//
// Threads: a Mutex may be used from any thread, a MutexLock only from the thread that created it.
// Ownership: a MutexLock does not own its Mutex, which must outlive it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

#include "thread_annotations.h"

namespace shardsave {

class CAPABILITY("mutex") Mutex {
 private:
  friend class MutexLock;
  std::mutex mutex_;
};

// Holds the mutex from construction to destruction, except between unlock() and lock().
class SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) ACQUIRE(mutex) : lock_(mutex.mutex_) {}
  ~MutexLock() RELEASE() = default;
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

  void lock() ACQUIRE() { lock_.lock(); }
  void unlock() RELEASE() { lock_.unlock(); }

  // Releases the mutex while it waits and holds it again on return; returns on a notice, after `timeout`, or spuriously
  // (std::condition_variable::wait_for).
  void wait_for(std::condition_variable& condition, std::chrono::milliseconds timeout) {
    condition.wait_for(lock_, timeout);
  }

  // As wait_for(), without a timeout.
  void wait(std::condition_variable& condition) { condition.wait(lock_); }

 private:
  std::unique_lock<std::mutex> lock_;
};

}  // namespace shardsave
