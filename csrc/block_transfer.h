// Moves the segments of a block between their memory and a window, which is in a slot or in the memory of a
// destination, and adds them to the checksums of their pieces.
//
// Threads: fill(), gather(), sum() and drain() may be called from any number of workers at once, each with a window
// that it holds. Ownership: owns nothing; the hooks, devices, sums and counters must outlive it.
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

// The bytes [begin, begin + length) of a block, which are at `memory`. `slot_index` is the number of the slot; in the
// memory of a destination it is a number that no other worker uses.
struct Window {
  std::byte* memory;
  std::size_t begin, length;
  std::size_t slot_index;
};

class BlockTransfer {
 public:
  // `taken`: null, or a counter for each piece (request.h). `stores`: for what is done with a window after fill() and
  // gather().
  BlockTransfer(const Hooks& hooks, const Devices& devices, PieceSums& sums, std::int64_t* taken, Stores stores);

  // Fills the whole window: with the segments' bytes (those of kWindow are there), and with zeros everywhere else.
  // Throws DeviceError, and whatever a hook throws.
  void fill(const Segments& segments, const Window& window) const;

  // As fill(), without the zeros: other bytes of the window stay as they are.
  void gather(const Segments& segments, const Window& window) const;

  // Sums the segments' bytes. Those that are not in host memory pass through the window.
  void sum(const Segments& segments, const Window& window) const;

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
    bool on_host() const { return segment.memory == kHost || segment.memory == kStill; }
  };

  template <class Action>
  static void for_each_part(const Segments& segments, const Window& window, Action action);

  template <class HostAction>
  void take(const Segments& segments, const Window& window, HostAction take_host) const;
  void count_taken(const Segments& segments, const Window& window) const;
  void copy_host(Direction direction, const Part& part) const;
  void lend(const Part& part) const;
  void submit(Direction direction, const Part& part, std::size_t slot_index) const;
  void complete(std::size_t slot_index) const;
  void add_sum(const Part& part, std::uint64_t raw) const;
  void sum_staged(const Part& part) const;

  const Hooks& hooks_;
  const Devices& devices_;
  PieceSums& sums_;
  std::int64_t* const taken_;
  const Stores stores_;
};

}  // namespace shardsave
