// An asynchronous device: copies bytes between a slot of the ring and memory of its own, while the worker continues.
// Host memory is no device; host_copy.h copies it.
//
// Threads: all workers of one run share one Device. Each worker calls enter_thread() first. submit() and complete() may
// then be called from any number of workers at once, each with the index of a slot that it holds.
// Ownership: a Device owns neither the slots nor the memory at the addresses; both must outlive it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace shardsave {

enum class Direction { to_slot, from_slot };

class Device {
 public:
  virtual ~Device() = default;

  // Makes the device usable on the calling worker thread. Throws DeviceError.
  virtual void enter_thread() = 0;

  // Starts to copy `length` bytes between `slot`, which is in slot number `slot_index`, and `address`. Until
  // complete() the bytes at the destination are undefined, and those at the source must not change. Throws DeviceError;
  // earlier copies of the slot may then still be in flight.
  virtual void submit(Direction direction, std::byte* slot, std::uint64_t address, std::size_t length,
                      std::size_t slot_index) = 0;

  // Returns when every copy submitted with `slot_index` has ended. Throws DeviceError.
  virtual void complete(std::size_t slot_index) = 0;
};

// A failed call of a device's driver: its name, and the driver's description of the failure.
struct DeviceError {
  std::string call;
  std::string reason;
};

}  // namespace shardsave
