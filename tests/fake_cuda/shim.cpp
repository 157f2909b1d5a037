// csrc/cuda.h as C functions, so that tests can use a Device without the engine. A function that fails returns 0 or
// null, with the error as text in `reason`.
//
// Threads: as csrc/cuda.h.
// Ownership: the caller destroys what shim_make returns, and unpins what it pinned.
#include <algorithm>
#include <cstring>

#include "../../csrc/cuda.h"

using shardsave::Device;
using shardsave::DeviceError;
using shardsave::Direction;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::size_t reason_bytes = 512;

void copy_text(char* reason, const std::string& text) {
  const std::size_t length = std::min(text.size(), reason_bytes - 1);
  std::memcpy(reason, text.data(), length);
  reason[length] = '\0';
}

template <class Action>
int attempt(char* reason, Action action) {
  try {
    action();
    return 1;
  } catch (const DeviceError& error) {
    copy_text(reason, error.call + ": " + error.reason);
    return 0;
  }
}

}  // namespace

EXPORT int shim_available(char* reason) {
  copy_text(reason, shardsave::cuda_unavailable_reason());
  return shardsave::cuda_available() ? 1 : 0;
}

EXPORT Device* shim_make(int ordinal, std::uint64_t stream, std::size_t slots, char* reason) {
  Device* device = nullptr;
  attempt(reason, [&] { device = shardsave::make_cuda_device(ordinal, stream, slots).release(); });
  return device;
}

EXPORT int shim_enter(Device* device, char* reason) {
  return attempt(reason, [&] { device->enter_thread(); });
}

EXPORT int shim_submit(Device* device, int to_slot, std::byte* slot, std::uint64_t address, std::size_t length,
                       std::size_t slot_index, char* reason) {
  const Direction direction = to_slot != 0 ? Direction::to_slot : Direction::from_slot;
  return attempt(reason, [&] { device->submit(direction, slot, address, length, slot_index); });
}

EXPORT int shim_complete(Device* device, std::size_t slot_index, char* reason) {
  return attempt(reason, [&] { device->complete(slot_index); });
}

EXPORT void shim_destroy(Device* device) { delete device; }

EXPORT int shim_pin(int ordinal, void* memory, std::size_t length, char* reason) {
  std::string text;
  const bool pinned = shardsave::cuda_pin(ordinal, memory, length, &text);
  copy_text(reason, text);
  return pinned ? 1 : 0;
}

EXPORT void shim_unpin(void* memory) { shardsave::cuda_unpin(memory); }
