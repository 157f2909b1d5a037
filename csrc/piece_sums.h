// The checksums of a run's pieces, gathered from segments in any order.
//
// Threads: add() may be called from any number of workers at once; finished() once they have been joined.
// Ownership: refers to the request's table of pieces, which must outlive it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crc64.h"

namespace shardsave {

class PieceSums {
 public:
  // Without `wanted` nothing is summed: add() must not be called, and finished() returns nothing.
  PieceSums(const std::vector<std::int64_t>& piece_bytes, bool wanted)
      : piece_bytes_(piece_bytes), wanted_(wanted), raw_(wanted ? piece_bytes.size() : 0) {}

  bool wanted() const { return wanted_; }

  // Adds `length` bytes of `piece` from `offset` on, whose raw CRC is `raw`.
  void add(std::size_t piece, std::int64_t offset, std::size_t length, std::uint64_t raw) {
    const std::int64_t bytes_after = piece_bytes_[piece] - offset - static_cast<std::int64_t>(length);
    raw_[piece].fetch_xor(crc64_shift(raw, static_cast<std::uint64_t>(bytes_after)), std::memory_order_relaxed);
  }

  std::vector<std::uint64_t> finished() const {
    std::vector<std::uint64_t> sums;
    for (std::size_t piece = 0; piece < raw_.size(); ++piece) {
      sums.push_back(crc64_finish(raw_[piece], static_cast<std::uint64_t>(piece_bytes_[piece])));
    }
    return sums;
  }

 private:
  const std::vector<std::int64_t>& piece_bytes_;
  const bool wanted_;
  std::vector<std::atomic<std::uint64_t>> raw_;
};

}  // namespace shardsave
