// The functions with which tests control and observe the fake, through ctypes.
//
// Threads: any; each function locks the world.
#include "world.h"

using namespace fake;

// Allocates device memory with undefined content. Torch holds the primary context of a device where it has memory.
EXPORT std::uint64_t fake_alloc(int device, std::size_t bytes) {
  LOCKED;
  World& w = world();
  w.start();
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

// Reads device memory as it is now; queued work stays undone.
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

// Queues a kernel of the caller's, which writes `bytes` of `content` to `address` as soon as something waits for it.
// `stream` 0 is the default stream.
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

// torch.cuda.synchronize() for every device.
EXPORT void fake_finish() {
  LOCKED;
  for (const auto& [handle, stream] : world().streams) run_until(handle, stream.queued);
}

// Begins a capture of `stream` by the calling thread, in the global mode.
EXPORT void fake_begin_capture(Handle stream) {
  LOCKED;
  world().streams[stream].capturing = true;
  world().capture_alive = true;
  world().capture_thread = this_thread();
}

// Ends the capture; returns 1 if it is still valid.
EXPORT int fake_end_capture(Handle stream) {
  LOCKED;
  const bool valid = world().capture_alive;
  world().streams[stream].capturing = false;
  world().capture_alive = false;
  return valid ? 1 : 0;
}

// The N-th call from now on fails with `code`; with 0 none fails. With `lost` every later call fails too.
EXPORT void fake_fail_at(std::uint64_t n, Result code, int lost) {
  LOCKED;
  World& w = world();
  w.fail_at = n == 0 || lost ? 0 : w.calls + n;
  w.lose_at_call = n != 0 && lost ? w.calls + n : 0;
  w.fail_code = code;
  w.failed_call.clear();
}

// The device is lost in the middle of the N-th copy from now on; with 0 no copy loses it, and a lost device works
// again.
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

// The violations, one per line. The text is valid until the thread's next call.
EXPORT const char* fake_violations() {
  LOCKED;
  static thread_local std::string text;
  text = world().violations;
  return text.c_str();
}

// The call that failed because of fake_fail_at; empty when none did.
EXPORT const char* fake_failed_call() {
  LOCKED;
  static thread_local std::string text;
  text = world().failed_call;
  return text.c_str();
}
