// CUDA through the driver API, loaded at run time by dlopen("libcuda.so.1"): no headers, no toolkit, no libtorch.
//
// Threads: all functions may be called from any thread; the Device is as device.h says.
// Ownership: the process keeps the driver loaded; a Device owns its stream and events and holds a reference to torch's
// context; whoever pins memory unpins it before unmapping it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "device.h"

namespace shardsave {

// Whether a driver is installed and cuInit succeeds; this is found out once per process. To be called only if there is
// CUDA memory to move: children forked after cuInit can no longer use CUDA.
bool cuda_available();

// Why CUDA is not available, for messages ("libcuda.so.1: cannot open shared object file"); empty when it is.
std::string cuda_unavailable_reason();

// A device for the CUDA ordinal `ordinal`. Its copies come after all work queued so far on `caller_stream` (a CUstream
// as an integer; 0 is the default stream). To be called on the thread whose current stream that is: the ordering event
// is recorded here. Slot indices are smaller than `slots`. Throws DeviceError.
//
// To be destroyed after the last worker has used it, and before a failed worker's slot is given to another worker: the
// destructor waits for the copies that are still in flight. It neither throws nor hangs on a lost device.
std::unique_ptr<Device> make_cuda_device(int ordinal, std::uint64_t caller_stream, std::size_t slots);

// Pins host memory for every device (cuMemHostRegister, portable), under the primary context of `ordinal`, which is
// retained until cuda_unpin. If the driver refuses, returns false and stores its description in *reason. cuda_unpin
// does nothing for memory that is not pinned, and nothing in a forked child.
bool cuda_pin(int ordinal, void* memory, std::size_t length, std::string* reason);
void cuda_unpin(void* memory);

}  // namespace shardsave
