// A device is a row in a table of submit/complete calls: it moves bytes between a ring slot and memory that it knows.
//
// Threads: one Device serves all workers of one run. enter_thread() is called first on each worker thread; submit() and
// complete() are called from any number of workers at once, each with a slot index that no other worker holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace shardsave {

enum class Direction { to_slot, from_slot };

class Device {
 public:
  virtual ~Device() = default;

  // Makes the device usable on the calling worker thread.
  virtual void enter_thread() = 0;

  // Starts moving `length` bytes between `slot` (inside ring slot number `slot_index`) and `address`. When the device
  // sums the bytes as it moves them it stores their raw CRC (crc64.h) in *raw_sum and returns true; when it returns
  // false the engine sums the slot itself. `want_sum` false means that nobody will look at the sum.
  virtual bool submit(Direction direction, std::byte* slot, std::uint64_t address, std::size_t length,
                      std::size_t slot_index, bool want_sum, std::uint64_t* raw_sum) = 0;

  // Returns once everything submitted with `slot_index` has been done. Throws DeviceError.
  virtual void complete(std::size_t slot_index) = 0;
};

// A call of a device's driver that failed: its name and what the driver says of it.
struct DeviceError {
  std::string call;
  std::string reason;
};

// `through_cache`: slots are written to the page cache right after they were filled.
std::unique_ptr<Device> make_host_device(bool through_cache);

}  // namespace shardsave
