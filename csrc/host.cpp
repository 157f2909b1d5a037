// The host's own memory as a device: a copy by the processor, which sums in the same loop.
#include "crc64.h"
#include "device.h"

namespace shardsave {
namespace {

// What is staged in pieces up to this size is written to the file right away, from the second-level cache; a larger
// area would push everything else out of it, so it is stored past the caches.
constexpr std::size_t kCachedBytes = std::size_t{256} << 10;

class HostDevice final : public Device {
 public:
  void enter_thread() override {}

  bool submit(Direction direction, std::byte* slot, std::uint64_t address, std::size_t length, std::size_t,
              bool want_sum, std::uint64_t* raw_sum) override {
    auto* memory = reinterpret_cast<std::byte*>(static_cast<std::uintptr_t>(address));
    const bool to_slot = direction == Direction::to_slot;
    std::byte* destination = to_slot ? slot : memory;
    const std::byte* source = to_slot ? memory : slot;
    const Stores stores = to_slot && length <= kCachedBytes ? Stores::cached : Stores::streaming;
    if (!want_sum) {
      copy_bytes(destination, source, length, stores);
      return false;
    }
    *raw_sum = copy_crc64_raw(destination, source, length, stores);
    return true;
  }

  void complete(std::size_t) override {}
};

}  // namespace

std::unique_ptr<Device> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace shardsave
