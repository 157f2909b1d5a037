// Host memory as a device: the copy is made, and summed, by the worker itself, so there is nothing to wait for.
#include "crc64.h"
#include "device.h"

namespace shardsave {
namespace {

class HostDevice final : public Device {
 public:
  explicit HostDevice(bool through_cache) : through_cache_(through_cache) {}

  void enter_thread() override {}

  bool submit(Direction direction, std::byte* slot, std::uint64_t address, std::size_t length, std::size_t,
              bool want_sum, std::uint64_t* raw_sum) override {
    auto* memory = reinterpret_cast<std::byte*>(address);
    const bool saving = direction == Direction::to_slot;
    std::byte* to = saving ? slot : memory;
    const std::byte* from = saving ? memory : slot;
    // What goes on to the page cache is read again at once and should stay in the processor's; the rest should not.
    const Stores stores = saving && through_cache_ ? Stores::cached : Stores::streaming;
    if (want_sum) {
      *raw_sum = copy_crc64_raw(to, from, length, stores);
    } else {
      copy_bytes(to, from, length, stores);
    }
    return true;
  }

  void complete(std::size_t) override {}

 private:
  bool through_cache_;
};

}  // namespace

std::unique_ptr<Device> make_host_device(bool through_cache) { return std::make_unique<HostDevice>(through_cache); }

}  // namespace shardsave
