#include "block_transfer.h"

#include <algorithm>
#include <cstring>

#include "host_copy.h"

namespace shardsave {

BlockTransfer::BlockTransfer(const Hooks& hooks, const Devices& devices, PieceSums& sums, std::int64_t* taken,
                             Stores stores)
    : hooks_(hooks), devices_(devices), sums_(sums), taken_(taken), stores_(stores) {}

template <class Action>
void BlockTransfer::for_each_part(const Segments& segments, const Window& window, Action action) {
  const std::size_t window_end = window.begin + window.length;
  for (const Segment& segment : segments) {
    const auto segment_begin = static_cast<std::size_t>(segment.at);
    const std::size_t segment_end = segment_begin + static_cast<std::size_t>(segment.length);
    if (segment_end <= window.begin || segment_begin >= window_end) continue;
    const std::size_t begin = std::max(segment_begin, window.begin), end = std::min(segment_end, window_end);
    action(Part{segment, static_cast<std::int64_t>(begin - segment_begin), end - begin,
                window.memory + (begin - window.begin)});
  }
}

void BlockTransfer::fill(const Segments& segments, const Window& window) const {
  std::byte* filled_to = window.memory;
  for_each_part(segments, window, [&](const Part& part) {
    std::memset(filled_to, 0, static_cast<std::size_t>(part.staged - filled_to));
    filled_to = part.staged + part.length;
  });
  std::memset(filled_to, 0, static_cast<std::size_t>(window.memory + window.length - filled_to));
  gather(segments, window);
}

void BlockTransfer::gather(const Segments& segments, const Window& window) const {
  take(segments, window, [this](const Part& part) { copy_host(Direction::to_slot, part); });
}

void BlockTransfer::sum(const Segments& segments, const Window& window) const {
  take(segments, window, [this](const Part& part) { add_sum(part, crc64_raw(part.host_memory(), part.length)); });
}

template <class HostAction>
void BlockTransfer::take(const Segments& segments, const Window& window, HostAction take_host) const {
  bool submitted = false;
  for_each_part(segments, window, [&](const Part& part) {
    if (part.on_device()) {
      submit(Direction::to_slot, part, window.slot_index);
      submitted = true;
    } else if (part.on_host()) {
      take_host(part);
    } else {
      if (part.segment.memory == kLent) lend(part);
      sum_staged(part);
    }
  });
  if (submitted) complete(window.slot_index);
  if (taken_ != nullptr) count_taken(segments, window);
  if (!submitted) return;
  for_each_part(segments, window, [&](const Part& part) {
    if (part.on_device()) sum_staged(part);
  });
}

// Release: whoever sees the count (with acquire semantics) knows that the bytes have been read.
void BlockTransfer::count_taken(const Segments& segments, const Window& window) const {
  for_each_part(segments, window, [this](const Part& part) {
    __atomic_fetch_add(&taken_[part.segment.piece], static_cast<std::int64_t>(part.length), __ATOMIC_RELEASE);
  });
}

void BlockTransfer::drain(const Segments& segments, const Window& window) const {
  bool submitted = false;
  for_each_part(segments, window, [&](const Part& part) {
    if (part.segment.memory == kHost) return copy_host(Direction::from_slot, part);
    if (part.on_device()) {
      submit(Direction::from_slot, part, window.slot_index);
      submitted = true;
    }
    sum_staged(part);  // summed while the device copies, and before the hook can change lent memory
    if (part.segment.memory == kLent) lend(part);
  });
  if (submitted) complete(window.slot_index);
}

void BlockTransfer::copy_host(Direction direction, const Part& part) const {
  const bool to_slot = direction == Direction::to_slot;
  std::byte* destination = to_slot ? part.staged : part.host_memory();
  const std::byte* source = to_slot ? part.host_memory() : part.staged;
  const Stores stores = to_slot ? stores_ : Stores::streaming;
  const std::uint64_t raw = host_copy(destination, source, part.length, stores, sums_.wanted());
  if (sums_.wanted()) add_sum(part, raw);
}

void BlockTransfer::lend(const Part& part) const {
  hooks_.lend(part.segment.piece, part.piece_offset(), part.staged, part.length);
}

void BlockTransfer::submit(Direction direction, const Part& part, std::size_t slot_index) const {
  const auto& device = devices_.at(static_cast<int>(part.segment.memory));
  device->submit(direction, part.staged, part.address(), part.length, slot_index);
}

void BlockTransfer::complete(std::size_t slot_index) const {
  for (const auto& [ordinal, device] : devices_) device->complete(slot_index);
}

void BlockTransfer::add_sum(const Part& part, std::uint64_t raw) const {
  sums_.add(static_cast<std::size_t>(part.segment.piece), part.piece_offset(), part.length, raw);
}

void BlockTransfer::sum_staged(const Part& part) const {
  if (sums_.wanted()) add_sum(part, crc64_raw(part.staged, part.length));
}

}  // namespace shardsave
