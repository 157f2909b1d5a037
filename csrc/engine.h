// The engine: moves blocks between memory and files, in one pass through the ring.
//
// Threads: run() may be called from any number of threads at once; they share the ring. Its workers are joined before
// it returns, whatever happens. Hooks::tick is called on the calling thread, Hooks::lend on workers, several at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "file.h"

namespace shardsave {

// Values of Segment::memory that are not CUDA ordinals.
constexpr std::int64_t kHost = -1, kLent = -2, kDiscard = -3;

// Rows of the tables as they come from the caller; bytes throughout.
struct Segment {
  std::int64_t memory, address, length, at, piece, piece_offset;
};
struct Block {
  std::int64_t file, offset, length, first_segment;
};

struct Request {
  bool write = false;
  Access access = Access::buffered;
  bool checksum = true;
  std::vector<int> files;
  std::vector<Block> blocks;
  std::vector<Segment> segments;
  std::vector<std::int64_t> piece_bytes;
  std::vector<std::pair<int, std::uint64_t>> streams;  // CUDA ordinal, the caller's stream there
  std::size_t workers = 1;
  std::size_t slot_bytes = 0;
};

struct Hooks {
  // Fills (write) or drains (read) `length` bytes of `piece` from `offset` on. Throws to end the run.
  std::function<void(std::int64_t piece, std::int64_t offset, std::byte* memory, std::size_t length)> lend;
  // Called every 10 ms or so with the bytes moved so far, and once at the end; where the calling thread has to do the
  // work itself, after each block. Throws to end the run.
  std::function<void(std::uint64_t done)> tick;
};

struct Result {
  std::vector<std::uint64_t> sums;  // of each piece, finished; empty without checksum
  std::vector<bool> direct;         // of each file
  std::size_t staging_bytes = 0;
  bool pinned = false;
  std::vector<std::string> notes;
};

// Throws std::invalid_argument for tables that do not fit together, before anything is touched; Fault; what a hook
// threw.
Result run(const Request& request, const Hooks& hooks);

// Makes the ring that the next run with such slots uses, so that want of memory is known before anything is written;
// how many bytes it has. `pin_for` is a CUDA ordinal or -1. Throws Fault.
std::size_t reserve_staging(std::size_t slot_bytes, int pin_for);

}  // namespace shardsave
