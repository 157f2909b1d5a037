#include "request_check.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace shardsave {
namespace {

// Keeps the length of every ring, and every offset in a slot, within its type.
constexpr std::size_t kMaxSlotBytes = std::size_t{1} << 40;

// The largest file offset and the largest address. Checks subtract from it, since a sum could overflow.
constexpr std::int64_t kMaximum = std::numeric_limits<std::int64_t>::max();

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

bool is_aligned(std::int64_t bytes) { return bytes % static_cast<std::int64_t>(kAlignment) == 0; }

void check_sizes(const Request& request) {
  require(request.slot_bytes > 0 && request.slot_bytes <= kMaxSlotBytes && request.slot_bytes % kAlignment == 0,
          "slot_bytes must be a multiple of the alignment, and at most 1 TiB");
  require(request.workers >= 1, "workers must be at least one");
  for (const std::int64_t bytes : request.piece_bytes) require(bytes >= 0, "piece_bytes must not be negative");
}

void check_destination(const Request& request) {
  require(request.taken == nullptr || request.write, "only what is written is counted as taken");
  if (!request.into) return;
  require(request.write && request.files.empty(), "memory takes the place of files that are written");
  require(request.into->memory != nullptr || request.checksum, "bytes that go nowhere are only summed");
}

void check_block(const Request& request, const Block& block, std::int64_t end_segment) {
  const std::size_t files = request.into ? 1 : request.files.size();
  require(block.file >= 0 && block.file < static_cast<std::int64_t>(files),
          "a block's file is not in the list of files");
  require(block.offset >= 0 && is_aligned(block.offset), "a block's offset is not aligned");
  require(block.length > 0 && block.length <= static_cast<std::int64_t>(request.slot_bytes) && is_aligned(block.length),
          "a block's length is not aligned, or larger than a slot");
  require(block.offset <= kMaximum - block.length, "a block ends after the largest file offset");
  require(block.first_segment >= 0 && block.first_segment < end_segment &&
              end_segment <= static_cast<std::int64_t>(request.segments.size()),
          "the segments of the blocks are not in order");
}

void check_memory(const Request& request, const Segment& segment) {
  require(segment.memory >= kStill, "a segment is in unknown memory");
  require(segment.memory != kDiscard || !request.write, "discarded memory cannot be written to a file");
  require(segment.memory != kStill || (request.write && !request.into), "still memory is only written to files");
  if (segment.memory < kHost && segment.memory != kStill) return;
  require(segment.address > 0 && segment.address <= kMaximum - segment.length, "a segment has no valid address");
  const auto is_its_stream = [&segment](const auto& stream) { return stream.first == segment.memory; };
  require(segment.memory < 0 || std::any_of(request.streams.begin(), request.streams.end(), is_its_stream),
          "a segment is on a device without a stream");
}

// `previous_end`: where the previous segment of the block ends.
void check_segment(const Request& request, const Block& block, bool has_window, const Segment& segment,
                   std::int64_t previous_end) {
  require(segment.length > 0 && segment.at >= previous_end && segment.length <= block.length - segment.at,
          "a segment is outside its block, or overlaps another");
  require(segment.piece >= 0 && segment.piece < static_cast<std::int64_t>(request.piece_bytes.size()),
          "a segment's piece is not in the list of pieces");
  const std::int64_t bytes = request.piece_bytes[static_cast<std::size_t>(segment.piece)];
  require(segment.piece_offset >= 0 && segment.piece_offset <= bytes && segment.length <= bytes - segment.piece_offset,
          "a segment is outside its piece");
  check_memory(request, segment);
  require(segment.memory != kWindow || has_window, "a segment is in the window of a block that has none");
}

// `end`: where the last segment of the block ends. Bytes after it are not written.
void check_is_inside(const Destination& into, const Block& block, std::int64_t end) {
  if (into.memory == nullptr) return;
  require(static_cast<std::uint64_t>(block.offset + end) <= into.bytes, "a block is outside the destination");
}

}  // namespace

void check_request(const Request& request) {
  check_sizes(request);
  check_destination(request);
  const std::vector<Block>& blocks = request.blocks;
  require(request.windowed.empty() || (request.windowed.size() == blocks.size() && !request.into),
          "windows are for the blocks of files, one entry each");
  require(blocks.empty() ? request.segments.empty() : blocks.front().first_segment == 0,
          "there are segments outside the blocks");
  for (std::size_t n = 0; n < blocks.size(); ++n) {
    const bool is_last = n + 1 == blocks.size();
    const std::int64_t end_segment =
        is_last ? static_cast<std::int64_t>(request.segments.size()) : blocks[n + 1].first_segment;
    check_block(request, blocks[n], end_segment);
    std::int64_t previous_end = 0;
    for (const Segment& segment : request.segments_of(n)) {
      check_segment(request, blocks[n], request.has_window(n), segment, previous_end);
      previous_end = segment.at + segment.length;
    }
    if (request.into) check_is_inside(*request.into, blocks[n], previous_end);
  }
}

}  // namespace shardsave
