// The request for one run: tables that say which bytes of which files move to or from which memory.
//
// Threads: constant while a run uses it.
// Ownership: the caller owns the descriptors, the streams, and the memory at the addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "file.h"

namespace shardsave {

// Values of Segment::memory that are not CUDA ordinals. Host memory has an address; lent memory is filled or drained by
// Hooks::lend; discarded bytes are only read and summed; bytes in a window are summed there (Request::windowed). Still
// memory is host memory that nobody changes, and whose sums the caller knows: a block that is there as in the file is
// written from there. What follows it up to the end of its last page must be readable, and is written too.
constexpr std::int64_t kHost = -1, kLent = -2, kDiscard = -3, kWindow = -4, kStill = -5;

// Consecutive bytes of one piece within one block. `at` counts from the start of the block, `piece_offset` from that of
// the piece. The columns are those of the caller's table; all numbers but `memory` and `piece` are bytes or addresses.
struct Segment {
  std::int64_t memory, address, length, at, piece, piece_offset;
};

// Aligned bytes of one file that move in one slot. The segments of a block end where those of the next one begin.
struct Block {
  std::int64_t file, offset, length, first_segment;
};

// The segments of one block, or of all blocks, in order.
class Segments {
 public:
  Segments(const Segment* begin, const Segment* end) : begin_(begin), end_(end) {}
  const Segment* begin() const { return begin_; }
  const Segment* end() const { return end_; }
  const Segment& back() const { return end_[-1]; }

 private:
  const Segment* begin_;
  const Segment* end_;
};

// Memory that takes the place of files: the block at offset o begins at `memory` + o. Without memory the bytes go
// nowhere and are only summed.
struct Destination {
  std::byte* memory = nullptr;
  std::size_t bytes = 0;
};

struct Request {
  bool write = false;
  Access access = Access::buffered;
  bool checksum = true;
  std::vector<int> files;
  std::vector<Block> blocks;
  std::vector<Segment> segments;
  std::vector<std::int64_t> piece_bytes;
  std::vector<std::pair<int, std::uint64_t>> streams;  // CUDA ordinal, the caller's stream on that device
  std::size_t workers = 1;
  std::size_t copiers = 0;  // of the workers, at most so many copy and sum at one time; 0: all
  std::size_t slot_bytes = 0;
  std::optional<Destination> into;  // in place of files, with `write`; the file of every block is then 0

  // With `write`, a counter for each piece, or null: the number of bytes that have been read from the piece's own
  // memory is added. Another thread that finds all bytes of a piece counted (with acquire semantics) may change that
  // memory.
  std::int64_t* taken = nullptr;

  // For each block, whether Hooks::take_window gives its memory, which takes the place of a slot; empty: none has any.
  // With windows, blocks are taken in the order of the table: whoever fills or empties the windows knows only that
  // order.
  std::vector<std::uint8_t> windowed;

  bool has_window(std::size_t block) const { return !windowed.empty() && windowed[block] != 0; }

  Segments all_segments() const { return {segments.data(), segments.data() + segments.size()}; }

  // Where a block is in still memory as it is to be in its file; null if it is not.
  std::byte* still_block(std::size_t block) const {
    const Segments segments = segments_of(block);
    const std::int64_t address = segments.begin()->address;
    std::int64_t end = 0;
    for (const Segment& segment : segments) {
      if (segment.memory != kStill || segment.at != end || segment.address != address + end) return nullptr;
      end += segment.length;
    }
    const bool aligned = address % static_cast<std::int64_t>(kAlignment) == 0;
    const bool whole = blocks[block].length - end < static_cast<std::int64_t>(kAlignment);
    return aligned && whole ? reinterpret_cast<std::byte*>(address) : nullptr;
  }

  // Of a checked request (request_check.h): never empty.
  Segments segments_of(std::size_t block) const {
    const auto first = static_cast<std::size_t>(blocks[block].first_segment);
    const bool is_last = block + 1 == blocks.size();
    const std::size_t end = is_last ? segments.size() : static_cast<std::size_t>(blocks[block + 1].first_segment);
    return {segments.data() + first, segments.data() + end};
  }
};

}  // namespace shardsave
