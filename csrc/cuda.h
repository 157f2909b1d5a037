// CUDA through the driver API, found at run time by dlopen("libcuda.so.1"): no headers, no toolkit, no libtorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "device.h"

namespace shardsave {

// Whether a driver is there and answers cuInit; asked of the system once per process. To be asked only when CUDA memory
// has come up: children forked after cuInit cannot use CUDA any more.
bool cuda_available();

// Why not, for messages ("libcuda.so.1: cannot open shared object file").
std::string cuda_unavailable_reason();

// A device for the CUDA ordinal `ordinal` whose copies come after all work queued so far on `caller_stream` (a CUstream
// as an integer; 0 is the default stream). To be called on the thread whose current stream that is: the ordering event
// is recorded here. `slots` is how many slot indices will be used. Throws DeviceError.
//
// To be destroyed when no worker uses it any more and before any slot that a failed worker held goes to another holder:
// the destructor waits for the copies that are still in flight. It neither throws nor hangs on a lost device.
std::unique_ptr<Device> make_cuda_device(int ordinal, std::uint64_t caller_stream, std::size_t slots);

// Pins host memory for every device (cuMemHostRegister, portable), under the primary context of `ordinal`, which is
// retained until cuda_unpin. Returns false with the driver's words in *why when it is refused. cuda_unpin does nothing
// for memory that is not pinned, and in a forked child.
bool cuda_pin(int ordinal, void* memory, std::size_t length, std::string* why);
void cuda_unpin(void* memory);

}  // namespace shardsave
