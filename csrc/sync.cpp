#include "sync.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <exception>
#include <thread>

namespace shardsave {
namespace {

// How many files are synced at one time. Each wait is for the disk, which serves those that come together as one.
constexpr std::size_t kAtOneTime = 16;

int sync_file(int descriptor) {
  while (fsync(descriptor) != 0) {
    if (errno != EINTR) return errno;
  }
  return 0;
}

}  // namespace

std::vector<int> sync_files(const std::vector<int>& descriptors) {
  std::vector<int> errors(descriptors.size());
  std::atomic<std::size_t> next{0};
  const auto work = [&] {
    for (std::size_t n; (n = next++) < descriptors.size();) errors[n] = sync_file(descriptors[n]);
  };
  std::vector<std::thread> threads;
  try {
    for (std::size_t n = 1; n < std::min(kAtOneTime, descriptors.size()); ++n) threads.emplace_back(work);
  } catch (const std::exception&) {
    // The system has no more threads, or no memory for one: fewer files are synced at one time.
  }
  work();
  for (std::thread& thread : threads) thread.join();
  return errors;
}

}  // namespace shardsave
