// The fake's functions of the driver API. world.h says what they promise, and in which ways they are hostile.
//
// Threads: any; each function locks the world.
#include "world.h"

using namespace fake;

namespace {

Result copy(const char* call, Operation::Kind kind, std::uint64_t device, std::byte* host, std::size_t bytes,
            Handle stream) {
  const std::lock_guard<std::mutex> lock(world().mutex);
  World& w = world();
  if (const Result failed = enter(call, Needs::context)) return failed;
  const Handle handle = resolve(stream, call);
  if (handle == 0) return invalid_handle;
  const std::uint64_t address = reinterpret_cast<std::uint64_t>(host);
  if (device_bytes(device, bytes, current_device()) == nullptr ||
      (address >= w.space && address < w.space + space_bytes)) {
    w.violated(std::string(call) + " outside the allocations of the current context");
    return invalid_value;
  }
  if (kind == Operation::to_host) std::memset(host, 0xA5, bytes);  // undefined until something waits for the copy
  enqueue(handle, {kind, device, host, bytes});
  return ok;
}

struct Name {
  Result code;
  const char* name;
  const char* text;
};
constexpr Name names[] = {
    {ok, "CUDA_SUCCESS", "no error"},
    {invalid_value, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {out_of_memory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {not_initialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {no_device, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {invalid_device, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {invalid_context, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {invalid_handle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {launch_failed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {capture_unsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
};

}  // namespace

EXPORT Result cuInit(unsigned flags) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuInit", Needs::nothing)) return failed;
  if (flags != 0) return invalid_value;
  if (w.devices.empty()) return no_device;
  return w.start() ? ok : not_initialized;
}

EXPORT Result cuGetErrorName(Result error, const char** name) {
  for (const Name& known : names) {
    if (known.code == error) return *name = known.name, ok;
  }
  *name = nullptr;
  return invalid_value;
}

EXPORT Result cuGetErrorString(Result error, const char** text) {
  for (const Name& known : names) {
    if (known.code == error) return *text = known.text, ok;
  }
  *text = nullptr;
  return invalid_value;
}

EXPORT Result cuDeviceGet(int* device, int ordinal) {
  LOCKED;
  if (const Result failed = enter("cuDeviceGet", Needs::init)) return failed;
  if (ordinal < 0 || ordinal >= static_cast<int>(world().devices.size())) return invalid_device;
  *device = ordinal;
  return ok;
}

EXPORT Result cuDevicePrimaryCtxRetain(Handle* context, int device) {
  LOCKED;
  if (const Result failed = enter("cuDevicePrimaryCtxRetain", Needs::init)) return failed;
  if (device < 0 || device >= static_cast<int>(world().devices.size())) return invalid_device;
  ++world().devices[device].references;
  *context = context_base + device;
  return ok;
}

// A call that releases something does so even when it reports a failure, which may be that of earlier work. Releases on
// a lost device count as well.
EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
  LOCKED;
  World& w = world();
  const Result failed = enter("cuDevicePrimaryCtxRelease", Needs::init);
  if (failed == not_initialized) return failed;
  if (w.devices[device].references == 0) {
    w.violated("a primary context was released more often than retained");
    return invalid_context;
  }
  --w.devices[device].references;
  if (!w.devices[device].alive()) {
    for (const auto& [handle, stream] : w.streams) {
      if (stream.device == device && !stream.of_test) w.violated("a primary context ended with a stream alive in it");
    }
    for (const auto& [handle, event] : w.events) {
      if (event.device == device) w.violated("a primary context ended with an event alive in it");
    }
  }
  return failed;
}

EXPORT Result cuCtxPushCurrent_v2(Handle context) {
  LOCKED;
  if (const Result failed = enter("cuCtxPushCurrent", Needs::init)) return failed;
  const Handle device = context - context_base;
  if (device >= world().devices.size() || !world().devices[device].alive()) return invalid_context;
  thread_state.contexts.push_back(context);
  return ok;
}

EXPORT Result cuCtxPopCurrent_v2(Handle* context) {
  LOCKED;
  const Result failed = enter("cuCtxPopCurrent", Needs::init);
  if (thread_state.contexts.empty()) return invalid_context;
  *context = thread_state.contexts.back();
  thread_state.contexts.pop_back();
  return failed;
}

EXPORT Result cuCtxGetCurrent(Handle* context) {
  LOCKED;
  *context = thread_state.contexts.empty() ? 0 : thread_state.contexts.back();
  return ok;
}

EXPORT Result cuThreadExchangeStreamCaptureMode(int* mode) {
  LOCKED;
  if (const Result failed = enter("cuThreadExchangeStreamCaptureMode", Needs::thread)) return failed;
  if (*mode < 0 || *mode > 2) return invalid_value;
  std::swap(*mode, thread_state.capture_mode);
  return ok;
}

EXPORT Result cuStreamCreate(Handle* stream, unsigned flags) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuStreamCreate", Needs::context)) return failed;
  if (flags != 1) w.violated("a stream that waits for the default stream, and makes it wait");
  *stream = ++w.next_handle;
  w.streams[*stream].device = current_device();
  return ok;
}

EXPORT Result cuStreamDestroy_v2(Handle stream) {
  LOCKED;
  World& w = world();
  const Result failed = enter("cuStreamDestroy", Needs::context);
  const auto entry = w.streams.find(stream);
  if (entry == w.streams.end()) {
    w.violated("cuStreamDestroy on a stream that is not alive");
    return invalid_handle;
  }
  if (!entry->second.operations.empty() && !w.lost) w.violated("a stream was destroyed with copies in flight");
  w.streams.erase(entry);
  return failed;
}

EXPORT Result cuStreamIsCapturing(Handle stream, int* status) {
  LOCKED;
  if (const Result failed = enter("cuStreamIsCapturing", Needs::context)) return failed;
  const Handle handle = resolve(stream, "cuStreamIsCapturing");
  if (handle == 0) return invalid_handle;
  *status = world().streams[handle].capturing ? 1 : 0;
  return ok;
}

EXPORT Result cuStreamSynchronize(Handle stream) {
  std::this_thread::yield();
  LOCKED;
  if (const Result failed = enter("cuStreamSynchronize", Needs::context)) return failed;
  const Handle handle = resolve(stream, "cuStreamSynchronize");
  if (handle == 0) return invalid_handle;
  run_until(handle, world().streams[handle].queued);
  return world().lost ? launch_failed : ok;
}

EXPORT Result cuStreamWaitEvent(Handle stream, Handle event, unsigned flags) {
  LOCKED;
  if (const Result failed = enter("cuStreamWaitEvent", Needs::context)) return failed;
  const Handle handle = resolve(stream, "cuStreamWaitEvent");
  const Event* waited = event_of(event, "cuStreamWaitEvent");
  if (handle == 0 || waited == nullptr) return invalid_handle;
  if (flags != 0) return invalid_value;
  ++world().waits;
  Operation wait{Operation::wait};
  wait.stream = waited->stream;  // what the event refers to now; a later record does not change the wait
  wait.sequence = waited->sequence;
  enqueue(handle, std::move(wait));
  return ok;
}

EXPORT Result cuEventCreate(Handle* event, unsigned flags) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuEventCreate", Needs::context)) return failed;
  if (flags != 3) w.violated("an event that spins while it waits, or that records times");
  *event = ++w.next_handle;
  w.events[*event].device = current_device();
  return ok;
}

EXPORT Result cuEventDestroy_v2(Handle event) {
  LOCKED;
  const Result failed = enter("cuEventDestroy", Needs::context);
  if (world().events.erase(event) == 0) {
    world().violated("cuEventDestroy on an event that is not alive");
    return invalid_handle;
  }
  return failed;
}

EXPORT Result cuEventRecord(Handle event, Handle stream) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuEventRecord", Needs::context)) return failed;
  const Handle handle = resolve(stream, "cuEventRecord");
  Event* recorded = event_of(event, "cuEventRecord");
  if (handle == 0 || recorded == nullptr) return invalid_handle;
  if (w.streams[handle].capturing) {
    w.capture_alive = false;
    w.violated("an event was recorded on a capturing stream");
  }
  recorded->stream = handle;
  recorded->sequence = w.streams[handle].queued;
  return ok;
}

EXPORT Result cuEventSynchronize(Handle event) {
  std::this_thread::yield();
  LOCKED;
  if (const Result failed = enter("cuEventSynchronize", Needs::context)) return failed;
  const Event* waited = event_of(event, "cuEventSynchronize");
  if (waited == nullptr) return invalid_handle;
  run_until(waited->stream, waited->sequence);
  return world().lost ? launch_failed : ok;
}

EXPORT Result cuMemcpyDtoHAsync_v2(void* host, std::uint64_t device, std::size_t bytes, Handle stream) {
  return copy("cuMemcpyDtoHAsync", Operation::to_host, device, static_cast<std::byte*>(host), bytes, stream);
}

EXPORT Result cuMemcpyHtoDAsync_v2(std::uint64_t device, const void* host, std::size_t bytes, Handle stream) {
  std::byte* source = static_cast<std::byte*>(const_cast<void*>(host));
  return copy("cuMemcpyHtoDAsync", Operation::to_device, device, source, bytes, stream);
}

EXPORT Result cuMemHostRegister_v2(void* host, std::size_t bytes, unsigned flags) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuMemHostRegister", Needs::context)) return failed;
  if (flags != 1) w.violated("memory was pinned for one context only");
  std::byte* start = static_cast<std::byte*>(host);
  std::size_t total = bytes;
  for (const auto& [other, length] : w.registrations) {
    if (start < other + length && other < start + bytes) return already_registered;
    total += length;
  }
  if (bytes == 0) return invalid_value;
  if (total > w.pin_limit) return out_of_memory;
  w.registrations[start] = bytes;
  ++w.pins;
  return ok;
}

EXPORT Result cuMemHostUnregister(void* host) {
  LOCKED;
  World& w = world();
  const Result failed = enter("cuMemHostUnregister", Needs::context);
  const auto entry = w.registrations.find(static_cast<std::byte*>(host));
  if (entry == w.registrations.end()) {
    w.violated("memory that is not pinned was unpinned");
    return not_registered;
  }
  for (const auto& [handle, stream] : w.streams) {
    for (const Operation& operation : stream.operations) {
      const bool inside = operation.host >= entry->first && operation.host < entry->first + entry->second;
      if (inside && !w.lost) w.violated("memory was unpinned with a copy in flight");
    }
  }
  w.registrations.erase(entry);
  return failed;
}

// Symbols of older API versions, which take 32-bit pointers and lengths.
#define OLD(name)                                                            \
  EXPORT Result name() {                                                     \
    LOCKED;                                                                  \
    world().violated("a call of " #name ", a symbol of an old API version"); \
    return invalid_value;                                                    \
  }
OLD(cuMemcpyDtoHAsync)
OLD(cuMemcpyHtoDAsync)
OLD(cuMemHostRegister)
OLD(cuEventDestroy)
OLD(cuStreamDestroy)
OLD(cuCtxPushCurrent)
OLD(cuCtxPopCurrent)
OLD(cuDevicePrimaryCtxRelease)
