// Anonymous memory of the process: page aligned, absent in forked children, and pinned for CUDA on request.
//
// Threads: memory() and bytes() may be called from any thread, everything else from one thread at a time.
// Ownership: the object owns the memory. In a forked child, which does not have the memory, its destructor does
// nothing.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <string>

namespace shardsave {

enum class Pages { ordinary, huge };

class HostMemory {
 public:
  // memory() is null if the system does not have that much.
  HostMemory(std::size_t bytes, Pages pages);
  ~HostMemory();
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  std::byte* memory() const { return memory_; }
  std::size_t bytes() const { return bytes_; }

  // Touches every page, and pins the memory for the CUDA device `ordinal`. Returns whether it is pinned; if not,
  // refusal() says why.
  bool pin(int ordinal);
  bool pinned() const { return pinned_; }
  const std::string& refusal() const { return refusal_; }

 private:
  void touch() const;

  const std::size_t bytes_;
  const pid_t owner_;
  std::byte* memory_ = nullptr;
  bool pinned_ = false;
  std::string refusal_;
};

}  // namespace shardsave
