// The engine: moves the bytes of blocks between memory and files in one pass through the ring, and sums them on the way.
//
// It knows files, memory and devices; nothing of models, formats or Python.
//
// Threads: run() may be called from several threads at once; the runs share the ring. One run has its calling thread,
// which only waits and ticks, and workers, which do everything else. Hooks::tick is called on the calling thread alone,
// Hooks::lend on any number of workers at once. All workers have ended when run() returns or throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "file.h"

namespace shardsave {

// Where the bytes of a segment are: the ordinal of a CUDA device, or one of these.
enum Memory : std::int64_t {
  kHost = -1,
  kLent = -2,     // Hooks::lend fills them or takes them
  kDiscard = -3,  // nowhere: read and summed only
};

// An aligned range of one file. Its segments are those from `first_segment` to the next block's first.
struct Block {
  std::int64_t file;
  std::int64_t offset;
  std::int64_t length;
  std::int64_t first_segment;
};

// `length` bytes that lie `at` bytes into their block and `piece_offset` bytes into their piece. Those of one block are
// in order and do not overlap.
struct Segment {
  std::int64_t memory;
  std::int64_t address;
  std::int64_t length;
  std::int64_t at;
  std::int64_t piece;
  std::int64_t piece_offset;
};

// A CUDA device that takes part, and the stream whose work so far comes before the copies.
struct DeviceStream {
  int ordinal;
  std::uint64_t stream;
};

struct RunRequest {
  bool write = false;
  Access access = Access::buffered;
  std::vector<int> files;  // open descriptors
  std::vector<Block> blocks;
  std::vector<Segment> segments;
  std::vector<std::int64_t> piece_bytes;
  bool checksum = true;
  std::vector<DeviceStream> streams;
  std::size_t workers = 1;
  std::size_t slot_bytes = 0;
};

struct Hooks {
  // Moves `length` bytes of `piece`, from `piece_offset`, into `slot` (writing) or out of it (reading).
  std::function<void(std::int64_t piece, std::int64_t piece_offset, std::byte* slot, std::size_t length)> lend;
  // Called at least every 100 ms with the bytes of segments done so far.
  std::function<void(std::uint64_t bytes_done)> tick;
};

struct RunResult {
  std::vector<std::uint64_t> sums;  // the CRC-64/NVME of every piece; empty without `checksum`
  std::vector<bool> direct;         // for every file, whether it went past the page cache to the end
  std::size_t staging_bytes = 0;    // the size of the whole ring
  bool pinned = false;              // whether all staging memory that was used was pinned
  std::vector<std::string> notes;   // what was done otherwise than asked, for the user to read
};

// A call that failed. `file` is an index into RunRequest::files, or -1.
struct Fault : std::exception {
  Fault(std::int64_t file, std::string call, int error, std::uint64_t offset, std::uint64_t length, std::string detail)
      : file(file), call(std::move(call)), error(error), offset(offset), length(length), detail(std::move(detail)) {}
  const char* what() const noexcept override { return call.c_str(); }

  std::int64_t file;
  std::string call;
  int error;
  std::uint64_t offset;
  std::uint64_t length;
  std::string detail;
};

// Does all blocks, in any order. Throws std::invalid_argument for tables that do not fit together, before anything
// happens; Fault for a call that failed; and what a hook throws. The first error ends the run; nothing is undone.
RunResult run(const RunRequest& request, const Hooks& hooks);

// Throws std::invalid_argument unless every number in the tables is in its range.
void validate(const RunRequest& request, const Hooks& hooks);

}  // namespace shardsave
