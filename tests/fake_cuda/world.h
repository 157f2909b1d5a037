// The state of a hostile libcuda.so.1 for tests, which keeps every promise of the driver API's documents, and no other.
//
// - Device memory is an address range without access: dereferencing a device pointer crashes.
// - An asynchronous copy happens only when something waits for it, in stream order, as late as the API allows.
//   Until then its destination on the host holds 0xA5; so does device memory that was never written.
// - Work that a test queues on a stream (fake_work) stays undone until something is ordered after it.
// - A call is refused, or noted in fake_violations(), when it has no current context, a handle that is not alive, a
//   symbol of an old API version, or flags that would make it slower.
// - On request the N-th call fails, the device is lost in the middle of a copy, or pinning has a limit.
// - fake_count() says what is alive. Functions for tests begin with fake_ and are called through ctypes.
//
// Threads: one World for the process; functions that use it are called with its mutex locked (LOCKED).
// Ownership: the World is never destroyed, since threads may use it while the process exits.
#pragma once

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

namespace fake {

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
  std::vector<std::byte> content = {};  // of work: the bytes that it writes
  Handle stream = 0;                    // of wait: the stream that it waits for
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

inline constexpr Handle context_base = 0xC0DE0000;  // + device
inline constexpr std::size_t space_bytes = std::size_t{64} << 30;

inline std::uint64_t environment_number(const char* name, std::uint64_t default_number) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : default_number;
}

struct World {
  std::mutex mutex;  // guards all fields below, and all device memory
  pid_t process = 0;
  bool lost = false;
  std::uint64_t calls = 0;
  std::uint64_t fail_at = environment_number("FAKE_CUDA_FAIL_AT", 0);
  Result fail_code = static_cast<Result>(environment_number("FAKE_CUDA_FAIL_CODE", launch_failed));
  std::uint64_t lose_at_call = 0;
  std::uint64_t lose_at_copy = 0;
  std::string failed_call;
  std::uint64_t pin_limit = environment_number("FAKE_CUDA_PIN_LIMIT", ~std::uint64_t{0});
  bool capture_alive = false;
  pid_t capture_thread = 0;
  std::uint64_t copies = 0, pageable_copies = 0, pins = 0, waits = 0;
  std::string violations;
  std::vector<Device> devices = std::vector<Device>(environment_number("FAKE_CUDA_DEVICES", 2));
  std::map<Handle, Stream> streams;
  std::map<Handle, Event> events;
  std::map<std::byte*, std::size_t> registrations;
  std::map<std::uint64_t, Allocation> allocations;
  Handle next_handle = 0xFA4E0000;  // not an address, so that dereferencing a handle crashes too
  std::uint64_t space = 0;
  std::uint64_t space_used = 0;

  // What cuInit does for this process; tests may call it earlier.
  bool start() {
    if (space == 0) {
      void* memory = mmap(nullptr, space_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) return false;
      space = reinterpret_cast<std::uint64_t>(memory);
      process = getpid();
    }
    return process == getpid();
  }

  void violated(const std::string& what) { violations += what + "\n"; }
};

inline World& world() {
  static World* const process_world = new World;
  return *process_world;
}

inline pid_t this_thread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

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
inline thread_local ThreadState thread_state;

// --- Checks at the start of every call ---

// `thread`: only the calling thread's own state, which a lost device does not affect.
enum class Needs { nothing, thread, init, context };

// Counts the call. Returns the error with which it fails at once, or ok.
inline Result enter(const char* call, Needs needs) {
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
  if (needs == Needs::thread) return ok;
  if (w.lost) return launch_failed;
  if (w.capture_alive && w.capture_thread != this_thread() && thread_state.capture_mode != 2) {
    w.capture_alive = false;
    w.violated(std::string(call) + " invalidated the capture of another thread");
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

inline int current_device() { return static_cast<int>(thread_state.contexts.back() - context_base); }

// The handle of a stream: 0 and 1 stand for the current context's default stream, 2 for the thread's; 0 on failure.
inline Handle resolve(Handle stream, const char* call) {
  World& w = world();
  if (stream <= 2) {
    const Handle own = stream == 2 ? (std::uint64_t(this_thread()) << 8) + 1 : 1;
    const Handle handle = (own << 16) + std::uint64_t(current_device());
    Stream& default_stream = w.streams[handle];
    default_stream.device = current_device();
    default_stream.of_test = true;
    return handle;
  }
  const auto entry = w.streams.find(stream);
  if (entry == w.streams.end() || entry->second.device != current_device()) {
    w.violated(std::string(call) + " on a stream that is not alive in the current context");
    return 0;
  }
  return stream;
}

inline Event* event_of(Handle event, const char* call) {
  const auto entry = world().events.find(event);
  if (entry == world().events.end() || entry->second.device != current_device()) {
    world().violated(std::string(call) + " on an event that is not alive in the current context");
    return nullptr;
  }
  return &entry->second;
}

inline std::byte* device_bytes(std::uint64_t address, std::size_t bytes, int device) {
  World& w = world();
  auto after = w.allocations.upper_bound(address);
  if (after == w.allocations.begin()) return nullptr;
  auto& [start, allocation] = *--after;
  if (address - start + bytes > allocation.bytes.size() || allocation.device != device) return nullptr;
  return allocation.bytes.data() + (address - start);
}

inline bool registered(const std::byte* host, std::size_t bytes) {
  for (const auto& [start, length] : world().registrations) {
    if (host >= start && host + bytes <= start + length) return true;
  }
  return false;
}

// --- Execution ---

inline void carry_out(const Operation& operation, int device) {
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

inline void run_until(Handle handle, std::uint64_t sequence) {
  World& w = world();
  const auto entry = w.streams.find(handle);
  if (entry == w.streams.end()) return;
  Stream& stream = entry->second;
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

inline void enqueue(Handle stream, Operation operation) {
  Stream& target = world().streams[stream];
  target.operations.push_back(std::move(operation));
  ++target.queued;
}

}  // namespace fake

#define EXPORT extern "C" __attribute__((visibility("default")))
#define LOCKED const std::lock_guard<std::mutex> lock(world().mutex)
