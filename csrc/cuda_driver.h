// The part of the CUDA driver API that we use: types of our own, every prototype once. Nothing here needs a CUDA
// header; where one is installed, tests/fake_cuda/check_prototypes.cpp compares every line with it at compile time.
//
// Threads: declarations only; the driver's functions may be called from any thread.
#pragma once

#include <cstddef>

namespace shardsave::cuda {

using Result = int;                        // CUresult
using DeviceHandle = int;                  // CUdevice
using DevicePointer = unsigned long long;  // CUdeviceptr, 64 bits since CUDA 3.2: hence the _v2 names below
using Context = struct ContextTag*;        // CUcontext
using Stream = struct StreamTag*;          // CUstream
using Event = struct EventTag*;            // CUevent

inline constexpr Result success = 0;                // CUDA_SUCCESS
inline constexpr unsigned stream_non_blocking = 1;  // CU_STREAM_NON_BLOCKING
inline constexpr unsigned event_blocking_sync = 1;  // CU_EVENT_BLOCKING_SYNC
inline constexpr unsigned event_no_timing = 2;      // CU_EVENT_DISABLE_TIMING
inline constexpr unsigned register_portable = 1;    // CU_MEMHOSTREGISTER_PORTABLE
inline constexpr int capture_relaxed = 2;           // CU_STREAM_CAPTURE_MODE_RELAXED
inline constexpr int not_capturing = 0;             // CU_STREAM_CAPTURE_STATUS_NONE

// The names are the exported symbols, not cuda.h's macros: for some of them the plain name is an older function with
// other types (cuda.h, "API versioning"), and calling it truncates pointers and lengths to 32 bits.
#define SHARDSAVE_CUDA_CALLS(CALL)                                                                     \
  CALL(cuInit, unsigned flags)                                                                         \
  CALL(cuGetErrorName, Result error, const char** name)                                                \
  CALL(cuGetErrorString, Result error, const char** text)                                              \
  CALL(cuDeviceGet, DeviceHandle* device, int ordinal)                                                 \
  CALL(cuDevicePrimaryCtxRetain, Context* context, DeviceHandle device)                                \
  CALL(cuDevicePrimaryCtxRelease_v2, DeviceHandle device)                                              \
  CALL(cuCtxPushCurrent_v2, Context context)                                                           \
  CALL(cuCtxPopCurrent_v2, Context* context)                                                           \
  CALL(cuThreadExchangeStreamCaptureMode, int* mode)                                                   \
  CALL(cuStreamCreate, Stream* stream, unsigned flags)                                                 \
  CALL(cuStreamDestroy_v2, Stream stream)                                                              \
  CALL(cuStreamIsCapturing, Stream stream, int* status)                                                \
  CALL(cuStreamSynchronize, Stream stream)                                                             \
  CALL(cuStreamWaitEvent, Stream stream, Event event, unsigned flags)                                  \
  CALL(cuEventCreate, Event* event, unsigned flags)                                                    \
  CALL(cuEventDestroy_v2, Event event)                                                                 \
  CALL(cuEventRecord, Event event, Stream stream)                                                      \
  CALL(cuEventSynchronize, Event event)                                                                \
  CALL(cuMemcpyDtoHAsync_v2, void* host, DevicePointer device, std::size_t bytes, Stream stream)       \
  CALL(cuMemcpyHtoDAsync_v2, DevicePointer device, const void* host, std::size_t bytes, Stream stream) \
  CALL(cuMemHostRegister_v2, void* host, std::size_t bytes, unsigned flags)                            \
  CALL(cuMemHostUnregister, void* host)

struct Calls {
#define SHARDSAVE_DECLARE(name, ...) Result (*name)(__VA_ARGS__) = nullptr;
  SHARDSAVE_CUDA_CALLS(SHARDSAVE_DECLARE)
#undef SHARDSAVE_DECLARE
};

}  // namespace shardsave::cuda
