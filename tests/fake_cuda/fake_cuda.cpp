// A hostile libcuda.so.1 for tests: it keeps every promise of the driver API's documents and none beyond.
//
// - Device memory is an address range without access: whoever dereferences a device pointer crashes.
// - An asynchronous copy happens only when somebody waits for it, in stream order, as late as the API allows. Until
// then
//   its destination on the host is 0xA5; so is device memory that nobody has written.
// - Work that a test queues on a stream (fake_work) stays undone until something is ordered after it.
// - A call without a current context, on a handle that is not alive, on the symbol of an old API version, or with flags
//   that would cost us something is refused or noted in fake_violations().
// - The N-th call fails on request; the device is lost in the middle of a copy on request; pinning has a limit.
// - A ledger counts what is alive. Functions for tests begin with fake_ and are reached through ctypes.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

using Result = int;
using Handle = std::uint64_t;

enum : Result {
  ok = 0,
  invalid_value = 1,
  out_of_memory = 2,
  not_initialized = 3,
  no_device = 100,
  invalid_device = 101,
  invalid_context = 201,
  invalid_handle = 400,
  already_registered = 712,
  not_registered = 713,
  launch_failed = 719,
  capture_unsupported = 900,
};

struct Operation {
  enum Kind { to_host, to_device, wait, work } kind;
  std::uint64_t device = 0;
  std::byte* host = nullptr;
  std::size_t bytes = 0;
  std::vector<std::byte> content = {};  // of work: what it writes
  Handle stream = 0;                    // of wait: what it waits for
  std::uint64_t sequence = 0;
};

struct Stream {
  int device = 0;
  bool of_test = false;
  bool capturing = false;
  std::uint64_t queued = 0;
  std::uint64_t done = 0;
  std::deque<Operation> operations = {};
};

struct Event {
  int device = 0;
  Handle stream = 0;  // 0: never recorded, so waiting for it returns at once
  std::uint64_t sequence = 0;
};

struct Allocation {
  int device;
  std::vector<std::byte> bytes;
};

struct Device {
  int references = 0;    // by calls of the library under test
  bool of_test = false;  // torch holds the primary context for as long as it has memory there
  bool alive() const { return of_test || references > 0; }
};

constexpr Handle context_base = 0xC0DE0000;  // + device
constexpr std::size_t space_bytes = std::size_t{64} << 30;

std::uint64_t number_from(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

struct World {
  std::mutex mutex;  // guards all that follows; copies are carried out while it is held
  pid_t process = 0;
  bool lost = false;
  std::uint64_t calls = 0;
  std::uint64_t fail_at = number_from("FAKE_CUDA_FAIL_AT", 0);
  Result fail_code = static_cast<Result>(number_from("FAKE_CUDA_FAIL_CODE", launch_failed));
  std::uint64_t lose_at_call = 0;
  std::uint64_t lose_at_copy = 0;
  std::string failed_call;
  std::uint64_t pin_limit = number_from("FAKE_CUDA_PIN_LIMIT", ~std::uint64_t{0});
  bool capture_alive = false;
  pid_t capture_thread = 0;
  std::uint64_t copies = 0, pageable_copies = 0, pins = 0, waits = 0;
  std::string violations;
  std::vector<Device> devices = std::vector<Device>(number_from("FAKE_CUDA_DEVICES", 2));
  std::map<Handle, Stream> streams;
  std::map<Handle, Event> events;
  std::map<std::byte*, std::size_t> registrations;
  std::map<std::uint64_t, Allocation> allocations;
  Handle next_handle = 0xFA4E0000;  // not an address, so that dereferencing a handle crashes too
  std::uint64_t space = 0;
  std::uint64_t space_used = 0;

  void violated(const std::string& what) { violations += what + "\n"; }
};

World& world() {
  static World* const kept = new World;
  return *kept;
}

pid_t this_thread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

struct ThreadState {
  std::vector<Handle> contexts;
  int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL

  ~ThreadState() {
    if (this_thread() == getpid() || world().process != getpid()) return;
    const std::lock_guard<std::mutex> lock(world().mutex);
    if (world().lost) return;
    if (!contexts.empty()) world().violated("a thread ended with a context current");
    if (capture_mode != 0) world().violated("a thread ended in a changed capture mode");
  }
};
thread_local ThreadState thread_state;

// --- What every call goes through ---

enum class Needs { nothing, init, context };

// Counts the call and says how it fails before it does anything; ok: it may go on.
Result enter(const char* call, Needs needs) {
  World& w = world();
  ++w.calls;
  if (w.lose_at_call != 0 && w.calls >= w.lose_at_call) w.lost = true;
  if (w.fail_at != 0 && w.calls == w.fail_at) {
    w.failed_call = call;
    return w.fail_code;
  }
  if (needs == Needs::nothing) return ok;
  if (w.process != getpid()) {
    w.violated(std::string(call) + " in a process that has not called cuInit");
    return not_initialized;
  }
  if (w.lost) return launch_failed;
  if (w.capture_alive && w.capture_thread != this_thread() && thread_state.capture_mode != 2 &&
      std::strcmp(call, "cuThreadExchangeStreamCaptureMode") != 0) {
    w.capture_alive = false;
    w.violated(std::string(call) + " poisoned the capture of another thread");
    return capture_unsupported;
  }
  if (needs == Needs::context) {
    if (thread_state.contexts.empty() || !w.devices[thread_state.contexts.back() - context_base].alive()) {
      w.violated(std::string(call) + " without a current context");
      return invalid_context;
    }
  }
  return ok;
}

int current_device() { return static_cast<int>(thread_state.contexts.back() - context_base); }

// The handle of the stream meant: 0 and 1 are the current context's default stream, 2 that of the thread.
Handle resolve(Handle stream, const char* call) {
  World& w = world();
  if (stream <= 2) {
    const Handle own = stream == 2 ? (std::uint64_t(this_thread()) << 8) + 1 : 1;
    const Handle handle = (own << 16) + std::uint64_t(current_device());
    Stream& made = w.streams[handle];
    made.device = current_device();
    made.of_test = true;
    return handle;
  }
  const auto found = w.streams.find(stream);
  if (found == w.streams.end() || found->second.device != current_device()) {
    w.violated(std::string(call) + " on a stream that is not alive in the current context");
    return 0;
  }
  return stream;
}

Event* event_of(Handle event, const char* call) {
  const auto found = world().events.find(event);
  if (found == world().events.end() || found->second.device != current_device()) {
    world().violated(std::string(call) + " on an event that is not alive in the current context");
    return nullptr;
  }
  return &found->second;
}

std::byte* device_bytes(std::uint64_t address, std::size_t bytes, int device) {
  World& w = world();
  auto after = w.allocations.upper_bound(address);
  if (after == w.allocations.begin()) return nullptr;
  auto& [start, allocation] = *--after;
  if (address - start + bytes > allocation.bytes.size() || allocation.device != device) return nullptr;
  return allocation.bytes.data() + (address - start);
}

bool registered(const std::byte* host, std::size_t bytes) {
  for (const auto& [start, length] : world().registrations) {
    if (host >= start && host + bytes <= start + length) return true;
  }
  return false;
}

// --- Execution ---

void carry_out(const Operation& operation, int device) {
  World& w = world();
  std::size_t bytes = operation.bytes;
  std::byte* memory = device_bytes(operation.device, bytes, device);
  if (memory == nullptr) return w.violated("a copy or kernel touched device memory that was freed before it ran");
  if (operation.kind == Operation::work) {
    std::memcpy(memory, operation.content.data(), bytes);
    return;
  }
  ++w.copies;
  if (!registered(operation.host, bytes)) ++w.pageable_copies;
  if (w.lose_at_copy != 0 && w.copies == w.lose_at_copy) {
    w.lost = true;
    bytes /= 2;
  }
  if (operation.kind == Operation::to_host) {
    std::memcpy(operation.host, memory, bytes);
  } else {
    std::memcpy(memory, operation.host, bytes);
  }
}

void run_until(Handle handle, std::uint64_t sequence) {
  World& w = world();
  const auto found = w.streams.find(handle);
  if (found == w.streams.end()) return;
  Stream& stream = found->second;
  while (stream.done < sequence && !stream.operations.empty() && !w.lost) {
    const Operation operation = std::move(stream.operations.front());
    stream.operations.pop_front();
    ++stream.done;
    if (operation.kind == Operation::wait) {
      run_until(operation.stream, operation.sequence);
    } else {
      carry_out(operation, stream.device);
    }
  }
}

void enqueue(Handle stream, Operation operation) {
  Stream& target = world().streams[stream];
  target.operations.push_back(std::move(operation));
  ++target.queued;
}

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
    w.violated(std::string(call) + " outside of the allocations of the current context");
    return invalid_value;
  }
  if (kind == Operation::to_host) std::memset(host, 0xA5, bytes);  // undefined from now until it is waited for
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

#define EXPORT extern "C" __attribute__((visibility("default")))
#define LOCKED const std::lock_guard<std::mutex> lock(world().mutex)

// --- The driver API ---

EXPORT Result cuInit(unsigned flags) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuInit", Needs::nothing)) return failed;
  if (flags != 0) return invalid_value;
  if (w.process != 0 && w.process != getpid()) return not_initialized;
  if (w.devices.empty()) return no_device;
  if (w.space == 0) {
    void* space = mmap(nullptr, space_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return out_of_memory;
    w.space = reinterpret_cast<std::uint64_t>(space);
  }
  w.process = getpid();
  return ok;
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

// A call that gives something back does so even when it reports a failure, which may be that of earlier work; and
// giving back on a lost device is counted.
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
      if (stream.device == device && !stream.of_test) w.violated("a primary context went with a stream alive in it");
    }
    for (const auto& [handle, event] : w.events) {
      if (event.device == device) w.violated("a primary context went with an event alive in it");
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
  if (const Result failed = enter("cuThreadExchangeStreamCaptureMode", Needs::init)) return failed;
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
  const auto found = w.streams.find(stream);
  if (found == w.streams.end()) {
    w.violated("cuStreamDestroy on a stream that is not alive");
    return invalid_handle;
  }
  if (!found->second.operations.empty() && !w.lost) w.violated("a stream was destroyed with copies in flight");
  w.streams.erase(found);
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
  wait.stream = waited->stream;  // what the event stands for now; recording it again does not change that
  wait.sequence = waited->sequence;
  enqueue(handle, std::move(wait));
  return ok;
}

EXPORT Result cuEventCreate(Handle* event, unsigned flags) {
  LOCKED;
  World& w = world();
  if (const Result failed = enter("cuEventCreate", Needs::context)) return failed;
  if (flags != 3) w.violated("an event that spins while it waits, or that takes times");
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
  const auto found = w.registrations.find(static_cast<std::byte*>(host));
  if (found == w.registrations.end()) {
    w.violated("memory was unpinned that is not pinned");
    return not_registered;
  }
  for (const auto& [handle, stream] : w.streams) {
    for (const Operation& operation : stream.operations) {
      const bool inside = operation.host >= found->first && operation.host < found->first + found->second;
      if (inside && !w.lost) w.violated("memory was unpinned with a copy in flight");
    }
  }
  w.registrations.erase(found);
  return failed;
}

// Symbols of older API versions, which take 32-bit pointers and lengths.
#define OLD(name)                                                          \
  EXPORT Result name() {                                                   \
    LOCKED;                                                                \
    world().violated("the symbol " #name " of an old API version called"); \
    return invalid_value;                                                  \
  }
OLD(cuMemcpyDtoHAsync)
OLD(cuMemcpyHtoDAsync)
OLD(cuMemHostRegister)
OLD(cuEventDestroy)
OLD(cuStreamDestroy)
OLD(cuCtxPushCurrent)
OLD(cuCtxPopCurrent)
OLD(cuDevicePrimaryCtxRelease)

// --- For tests ---

// Device memory, undefined. Torch holds the primary context of a device where it has memory.
EXPORT std::uint64_t fake_alloc(int device, std::size_t bytes) {
  cuInit(0);
  LOCKED;
  World& w = world();
  w.devices[device].of_test = true;
  const std::uint64_t address = w.space + w.space_used + 512;
  w.space_used += (bytes + 4095) / 512 * 512;
  w.allocations[address] = {device, std::vector<std::byte>(bytes, std::byte{0xA5})};
  return address;
}

EXPORT void fake_free(std::uint64_t address) {
  LOCKED;
  world().allocations.erase(address);
}

// Reads device memory as it is at this moment, with whatever is still queued left undone.
EXPORT int fake_peek(int device, std::uint64_t address, void* host, std::size_t bytes) {
  LOCKED;
  const std::byte* memory = device_bytes(address, bytes, device);
  if (memory == nullptr) return invalid_value;
  std::memcpy(host, memory, bytes);
  return ok;
}

EXPORT Handle fake_stream(int device) {
  LOCKED;
  World& w = world();
  w.devices[device].of_test = true;
  w.streams[++w.next_handle].device = device;
  w.streams[w.next_handle].of_test = true;
  return w.next_handle;
}

// A kernel of the caller's: it will write `bytes` of `content` to `address`, once something waits for it. `stream` 0 is
// the default stream.
EXPORT int fake_work(int device, Handle stream, std::uint64_t address, const void* content, std::size_t bytes) {
  LOCKED;
  World& w = world();
  w.devices[device].of_test = true;
  thread_state.contexts.push_back(context_base + device);
  const Handle handle = resolve(stream, "fake_work");
  thread_state.contexts.pop_back();
  if (handle == 0) return invalid_handle;
  const std::byte* begin = static_cast<const std::byte*>(content);
  Operation work{Operation::work, address, nullptr, bytes, std::vector<std::byte>(begin, begin + bytes)};
  enqueue(handle, std::move(work));
  return ok;
}

// torch.cuda.synchronize() of everything.
EXPORT void fake_finish() {
  LOCKED;
  for (const auto& [handle, stream] : world().streams) run_until(handle, stream.queued);
}

// The calling thread begins to capture `stream` in the global mode.
EXPORT void fake_begin_capture(Handle stream) {
  LOCKED;
  world().streams[stream].capturing = true;
  world().capture_alive = true;
  world().capture_thread = this_thread();
}

// Ends it; whether the capture is still whole.
EXPORT int fake_end_capture(Handle stream) {
  LOCKED;
  const bool whole = world().capture_alive;
  world().streams[stream].capturing = false;
  world().capture_alive = false;
  return whole ? 1 : 0;
}

// The N-th call from now on fails with `code`; 0: none does. With `lost` every later one does, too.
EXPORT void fake_fail_at(std::uint64_t n, Result code, int lost) {
  LOCKED;
  World& w = world();
  w.fail_at = n == 0 || lost ? 0 : w.calls + n;
  w.lose_at_call = n != 0 && lost ? w.calls + n : 0;
  w.fail_code = code;
  w.failed_call.clear();
}

// The device is lost when the N-th copy from now on is half done; 0: it is not, and a lost one is as new.
EXPORT void fake_lose_at_copy(std::uint64_t n) {
  LOCKED;
  World& w = world();
  w.lose_at_copy = n == 0 ? 0 : w.copies + n;
  if (n != 0) return;
  w.lost = false;
  w.lose_at_call = 0;
}

EXPORT void fake_pin_limit(std::uint64_t bytes) {
  LOCKED;
  world().pin_limit = bytes;
}

EXPORT std::int64_t fake_count(const char* what) {
  LOCKED;
  const World& w = world();
  const std::string name = what;
  std::int64_t streams = 0, references = 0, pinned = 0;
  for (const auto& [handle, stream] : w.streams) streams += stream.of_test ? 0 : 1;
  for (const Device& device : w.devices) references += device.references;
  for (const auto& [start, bytes] : w.registrations) pinned += static_cast<std::int64_t>(bytes);
  if (name == "streams") return streams;
  if (name == "events") return static_cast<std::int64_t>(w.events.size());
  if (name == "context references") return references;
  if (name == "registrations") return static_cast<std::int64_t>(w.registrations.size());
  if (name == "pinned bytes") return pinned;
  if (name == "pins") return static_cast<std::int64_t>(w.pins);
  if (name == "copies") return static_cast<std::int64_t>(w.copies);
  if (name == "pageable copies") return static_cast<std::int64_t>(w.pageable_copies);
  if (name == "waits") return static_cast<std::int64_t>(w.waits);
  if (name == "calls") return static_cast<std::int64_t>(w.calls);
  if (name == "contexts of this thread") return static_cast<std::int64_t>(thread_state.contexts.size());
  if (name == "capture mode of this thread") return thread_state.capture_mode;
  return -1;
}

// Broken rules, one a line. The text is valid until the thread's next call.
EXPORT const char* fake_violations() {
  LOCKED;
  static thread_local std::string text;
  text = world().violations;
  return text.c_str();
}

// The call that fake_fail_at made fail; empty when none was.
EXPORT const char* fake_failed_call() {
  LOCKED;
  static thread_local std::string text;
  text = world().failed_call;
  return text.c_str();
}
