// Compiled with -fsyntax-only where a real cuda.h is installed: every prototype and constant of csrc/cuda_driver.h must
// equal the header's. A wrong one would silently truncate a pointer or pass an argument in the wrong register.
#include <cuda.h>

#include <type_traits>

#include "../../csrc/cuda_driver.h"

namespace ours = shardsave::cuda;

// Maps the header's types to ours.
template <class T>
struct Spelled {
  using type = T;
};
template <class T>
using Ours = typename Spelled<T>::type;
template <class T>
struct Spelled<T*> {
  using type = Ours<T>*;
};
template <>
struct Spelled<CUresult> {
  using type = ours::Result;
};
template <>
struct Spelled<CUstreamCaptureMode> {
  using type = int;
};
template <>
struct Spelled<CUstreamCaptureStatus> {
  using type = int;
};
template <>
struct Spelled<CUcontext> {
  using type = ours::Context;
};
template <>
struct Spelled<CUstream> {
  using type = ours::Stream;
};
template <>
struct Spelled<CUevent> {
  using type = ours::Event;
};
template <class Result, class... Arguments>
struct Spelled<Result(Arguments...)> {
  using type = Ours<Result>(Ours<Arguments>...);
};

#define SAME(name, ...)                                                               \
  static_assert(std::is_same_v<Ours<decltype(&::name)>, decltype(ours::Calls::name)>, \
                #name " has other types than in cuda.h");
SHARDSAVE_CUDA_CALLS(SAME)
#undef SAME

static_assert(std::is_same_v<CUdeviceptr, ours::DevicePointer> && std::is_same_v<CUdevice, ours::DeviceHandle>);
static_assert(sizeof(CUresult) == sizeof(ours::Result) && sizeof(CUstreamCaptureMode) == sizeof(int) &&
              sizeof(CUstreamCaptureStatus) == sizeof(int));
static_assert(CUDA_SUCCESS == ours::success);
static_assert(CU_STREAM_NON_BLOCKING == ours::stream_non_blocking);
static_assert(CU_EVENT_BLOCKING_SYNC == ours::event_blocking_sync);
static_assert(CU_EVENT_DISABLE_TIMING == ours::event_no_timing);
static_assert(CU_MEMHOSTREGISTER_PORTABLE == ours::register_portable);
static_assert(CU_STREAM_CAPTURE_MODE_RELAXED == ours::capture_relaxed);
static_assert(CU_STREAM_CAPTURE_STATUS_NONE == ours::not_capturing);

// Where the plain symbol is an older function, the header's macro must lead to the symbol that we use.
#define TEXT_OF(name) #name
#define TEXT(name) TEXT_OF(name)
constexpr bool same(const char* left, const char* right) {
  for (; *left != '\0' && *left == *right; ++left, ++right) {
  }
  return *left == *right;
}
static_assert(same(TEXT(cuMemcpyDtoHAsync), "cuMemcpyDtoHAsync_v2"));
static_assert(same(TEXT(cuMemcpyHtoDAsync), "cuMemcpyHtoDAsync_v2"));
static_assert(same(TEXT(cuMemHostRegister), "cuMemHostRegister_v2"));
static_assert(same(TEXT(cuDevicePrimaryCtxRelease), "cuDevicePrimaryCtxRelease_v2"));
static_assert(same(TEXT(cuCtxPushCurrent), "cuCtxPushCurrent_v2"));
static_assert(same(TEXT(cuCtxPopCurrent), "cuCtxPopCurrent_v2"));
static_assert(same(TEXT(cuStreamDestroy), "cuStreamDestroy_v2"));
static_assert(same(TEXT(cuEventDestroy), "cuEventDestroy_v2"));
