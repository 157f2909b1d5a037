// CUDA through the driver API, found at run time by dlopen("libcuda.so.1"): no headers, no toolkit, no libtorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "device.h"

namespace shardsave {

// Whether a driver is there and answers cuInit; asked of the system once per process.
bool cuda_available();

// Why not, for messages ("libcuda.so.1: cannot open shared object file").
std::string cuda_unavailable_reason();

// A device for the CUDA ordinal `ordinal` whose copies come after all work queued so far on `caller_stream` (a CUstream
// as an integer; 0 is the default stream). To be called on the thread whose current stream that is: the ordering event
// is recorded here. `slots` is how many slot indices will be used. Throws DeviceError.
std::unique_ptr<Device> make_cuda_device(int ordinal, std::uint64_t caller_stream, std::size_t slots);

// Pins host memory for every device (cuMemHostRegister, portable), under the primary context of `ordinal`. Returns
// false with the driver's words in *why when it is refused.
bool cuda_pin(int ordinal, void* memory, std::size_t length, std::string* why);
void cuda_unpin(void* memory);

}  // namespace shardsave
