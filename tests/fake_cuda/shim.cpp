// csrc/cuda.h as C functions, so that tests can drive a Device without the engine around it. Errors are text in `why`.
#include <algorithm>
#include <cstring>

#include "../../csrc/cuda.h"

using shardsave::Device;
using shardsave::DeviceError;
using shardsave::Direction;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr std::size_t why_bytes = 512;

void say(char* why, const std::string& text) {
  const std::size_t length = std::min(text.size(), why_bytes - 1);
  std::memcpy(why, text.data(), length);
  why[length] = '\0';
}

template <class Action>
int attempt(char* why, Action action) {
  try {
    action();
    return 1;
  } catch (const DeviceError& error) {
    say(why, error.call + ": " + error.reason);
    return 0;
  }
}

}  // namespace

EXPORT int shim_available(char* why) {
  say(why, shardsave::cuda_unavailable_reason());
  return shardsave::cuda_available() ? 1 : 0;
}

EXPORT Device* shim_make(int ordinal, std::uint64_t stream, std::size_t slots, char* why) {
  Device* made = nullptr;
  attempt(why, [&] { made = shardsave::make_cuda_device(ordinal, stream, slots).release(); });
  return made;
}

EXPORT int shim_enter(Device* device, char* why) {
  return attempt(why, [&] { device->enter_thread(); });
}

EXPORT int shim_submit(Device* device, int to_slot, std::byte* slot, std::uint64_t address, std::size_t length,
                       std::size_t slot_index, char* why) {
  const Direction direction = to_slot != 0 ? Direction::to_slot : Direction::from_slot;
  std::uint64_t sum = 0;
  return attempt(why, [&] { device->submit(direction, slot, address, length, slot_index, false, &sum); });
}

EXPORT int shim_complete(Device* device, std::size_t slot_index, char* why) {
  return attempt(why, [&] { device->complete(slot_index); });
}

EXPORT void shim_destroy(Device* device) { delete device; }

EXPORT int shim_pin(int ordinal, void* memory, std::size_t length, char* why) {
  std::string reason;
  const bool pinned = shardsave::cuda_pin(ordinal, memory, length, &reason);
  say(why, reason);
  return pinned ? 1 : 0;
}

EXPORT void shim_unpin(void* memory) { shardsave::cuda_unpin(memory); }
