// Moves the segments of a block between their memory and a slot, and adds them to the checksums of their pieces.
//
// Threads: fill() and drain() may be called from any number of workers at once, each with a slot that it holds.
// Ownership: owns nothing; the hooks, devices and sums must outlive it.
#pragma once

#include <cstddef>
#include <map>
#include <memory>

#include "device.h"
#include "engine.h"
#include "piece_sums.h"
#include "request.h"

namespace shardsave {

using Devices = std::map<int, std::unique_ptr<Device>>;  // by CUDA ordinal

// The bytes [begin, begin + length) of a block, which are at `memory` in the slot number `slot_index`.
struct Window {
  std::byte* memory;
  std::size_t begin, length;
  std::size_t slot_index;
};

class BlockTransfer {
 public:
  // `through_cache`: slots go to the page cache right after fill().
  BlockTransfer(const Hooks& hooks, const Devices& devices, PieceSums& sums, bool through_cache);

  // Fills the whole window: with the segments' bytes, and with zeros everywhere else. Throws DeviceError, and whatever
  // a hook throws.
  void fill(const Segments& segments, const Window& window) const;

  // Copies the segments' bytes out of the window. Throws the same.
  void drain(const Segments& segments, const Window& window) const;

 private:
  // The part of a segment that is in a window.
  struct Part {
    const Segment& segment;
    std::int64_t offset;  // in the segment
    std::size_t length;
    std::byte* staged;  // its place in the slot

    std::uint64_t address() const { return static_cast<std::uint64_t>(segment.address + offset); }
    std::byte* host_memory() const { return reinterpret_cast<std::byte*>(address()); }
    std::int64_t piece_offset() const { return segment.piece_offset + offset; }
    bool on_device() const { return segment.memory >= 0; }
  };

  template <class Action>
  static void for_each_part(const Segments& segments, const Window& window, Action action);

  void copy_host(Direction direction, const Part& part) const;
  void lend(const Part& part) const;
  void submit(Direction direction, const Part& part, std::size_t slot_index) const;
  void complete(std::size_t slot_index) const;
  void add_sum(const Part& part, std::uint64_t raw) const;
  void sum_staged(const Part& part) const;

  const Hooks& hooks_;
  const Devices& devices_;
  PieceSums& sums_;
  const Stores stores_to_slot_;
};

}  // namespace shardsave
