#include "host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

#include "cuda.h"
#include "file.h"

namespace shardsave {
namespace {

// Pages are touched by one thread for each 8 MiB, at most by 16.
constexpr std::size_t kTouchedBytes = std::size_t{8} << 20, kMaxTouchers = 16;

}  // namespace

HostMemory::HostMemory(std::size_t bytes, Pages pages) : bytes_(bytes), owner_(getpid()) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return;
  if (pages == Pages::huge) madvise(memory, bytes, MADV_HUGEPAGE);
  // Direct I/O into private memory must not run while a fork makes it copy-on-write (open(2), NOTES).
  madvise(memory, bytes, MADV_DONTFORK);
  memory_ = static_cast<std::byte*>(memory);
}

HostMemory::~HostMemory() {
  if (memory_ == nullptr || owner_ != getpid()) return;
  if (pinned_) cuda_unpin(memory_);
  munmap(memory_, bytes_);
}

bool HostMemory::pin(int ordinal) {
  if (refusal_.empty()) touch();  // else an earlier attempt has
  refusal_.clear();
  pinned_ = cuda_pin(ordinal, memory_, bytes_, &refusal_);
  return pinned_;
}

// Pinning pages that were never touched is several times slower.
void HostMemory::touch() const {
  const std::size_t touchers = std::clamp<std::size_t>(bytes_ / kTouchedBytes, 1, kMaxTouchers);
  std::vector<std::thread> threads;
  for (std::size_t n = 0; n < touchers; ++n) {
    const std::size_t pages = (bytes_ + kAlignment - 1) / kAlignment;
    const auto touch_part = [memory = memory_, begin = pages * n / touchers, end = pages * (n + 1) / touchers] {
      for (std::size_t page = begin; page < end; ++page) memory[page * kAlignment] = std::byte{0};
    };
    try {
      threads.emplace_back(touch_part);
    } catch (const std::exception&) {  // the system has no more threads, or no memory for one
      touch_part();
    }
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace shardsave
