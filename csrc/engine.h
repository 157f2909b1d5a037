// The engine: moves blocks between memory and files, in one pass through the ring; or from memory to memory, without.
//
// Threads: run() may be called from any number of threads at once; they share the ring. Its workers are joined before
// it returns or throws. Hooks::tick is called on the calling thread, Hooks::lend on workers, several at a time.
// Ownership: a run owns its workers, devices and slots; the caller owns what the request and the hooks refer to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "request.h"

namespace shardsave {

struct Hooks {
  // Stores in `memory` (write) or takes from it (read) the `length` bytes of `piece` from `offset` on. An exception
  // ends the run.
  std::function<void(std::int64_t piece, std::int64_t offset, std::byte* memory, std::size_t length)> lend;
  // The memory of a block's window, aligned and as long as the block; null: not yet, it is asked for again. May wait
  // for a short time. Called on workers, several at a time, as is give_window; an exception ends the run.
  std::function<std::byte*(std::size_t block)> take_window;
  // The window has been written to the file, or the file has been read into it.
  std::function<void(std::size_t block)> give_window;
  // Called with the number of bytes moved so far: about every 10 ms, or after each block if the calling thread does the
  // work itself; and once at the end. An exception ends the run.
  std::function<void(std::uint64_t done)> tick;
};

struct Result {
  std::vector<std::uint64_t> sums;  // the checksum of each piece; empty without `checksum`
  std::vector<bool> direct;         // for each file, whether it is known to have bypassed the page cache
  std::size_t staging_bytes = 0;    // of the ring, if it was used
  bool pinned = false;
  std::vector<std::string> notes;
};

// Throws std::invalid_argument for tables that do not fit together, before anything is touched; a Fault; whatever a
// hook throws.
Result run(const Request& request, const Hooks& hooks);

// Creates the ring that the next run with such slots uses, so that a lack of memory is known before anything is
// written. Returns its size in bytes. `pin_for` is a CUDA ordinal or -1. Throws Fault.
std::size_t reserve_staging(std::size_t slot_bytes, int pin_for);

}  // namespace shardsave
