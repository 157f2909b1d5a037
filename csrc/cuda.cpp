#include "cuda.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "mutex.h"

namespace shardsave {
namespace {

using cuda::Result;

// The driver, loaded at the first use and kept for the life of the process: dlclose would unmap code in which the
// driver's own threads run. Constant once constructed, so any thread may use it.
struct Driver {
  cuda::Calls calls;
  pid_t owner = getpid();
  std::string unavailable;  // why the driver cannot be used; empty when it can

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* error = dlerror();
      unavailable = error != nullptr ? error : "libcuda.so.1 cannot be loaded";
      return;
    }
#define SHARDSAVE_FIND(name, ...)                                              \
  calls.name = reinterpret_cast<decltype(calls.name)>(dlsym(library, #name));  \
  if (calls.name == nullptr && unavailable.empty()) {                          \
    unavailable = "libcuda.so.1 has no " #name ": the CUDA driver is too old"; \
  }
    SHARDSAVE_CUDA_CALLS(SHARDSAVE_FIND)
#undef SHARDSAVE_FIND
    if (!unavailable.empty()) return;
    const Result result = calls.cuInit(0);
    if (result != cuda::success) unavailable = "cuInit: " + describe(result);
  }

  std::string describe(Result result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    if (calls.cuGetErrorName(result, &name) != cuda::success || name == nullptr) name = "unknown CUDA error";
    if (calls.cuGetErrorString(result, &text) != cuda::success || text == nullptr) text = "no description";
    return std::string(name) + " (" + std::to_string(result) + "): " + text;
  }

  // A fork does not copy the driver's contexts: in the child its calls fail, hang or crash.
  bool forked() const { return getpid() != owner; }
};

const Driver& driver() {
  // Never destroyed: threads may still run while the process exits.
  static const Driver* const loaded = new Driver;
  return *loaded;
}

// The driver's calls for one device. Errors name the device, since the driver's own descriptions never do.
class Checked {
 public:
  Checked(const Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {}

  void check(const char* call, Result result) const {
    if (result != cuda::success) fail(call, driver_.describe(result));
  }

  [[noreturn]] void fail(const char* call, const std::string& reason) const {
    throw DeviceError{call, reason + ", on cuda:" + std::to_string(ordinal_)};
  }

  void require_usable() const {
    if (!driver_.unavailable.empty()) fail("dlopen", driver_.unavailable);
    if (driver_.forked()) {
      fail("cuInit", "CUDA was initialised by process " + std::to_string(driver_.owner) +
                         " before the fork, and a forked child cannot use it (start children with the spawn method)");
    }
  }

  const cuda::Calls* operator->() const { return &driver_.calls; }

 private:
  const Driver& driver_;
  const int ordinal_;
};

// Sets this thread's capture mode to relaxed during its lifetime. Another thread may be capturing a CUDA graph in the
// global mode: then most of our calls would fail on this thread and invalidate that capture
// (cuThreadExchangeStreamCaptureMode), although none of our work is part of it.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Checked& cuda) : cuda_(cuda) {
    cuda_.check("cuThreadExchangeStreamCaptureMode", cuda_->cuThreadExchangeStreamCaptureMode(&previous_));
  }
  ~RelaxedCapture() {
    int mode = previous_;
    if (cuda_->cuThreadExchangeStreamCaptureMode(&mode) == cuda::success) return;
    mode = previous_;  // a second attempt: the thread may be the caller's, and must not be left in a changed mode
    cuda_->cuThreadExchangeStreamCaptureMode(&mode);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  const Checked& cuda_;
  int previous_ = cuda::capture_relaxed;  // the call exchanges it for the thread's own mode
};

// Makes a context current during its lifetime; then the previous one is current again.
class CurrentContext {
 public:
  CurrentContext(const Checked& cuda, cuda::Context context) : cuda_(cuda) {
    cuda_.check("cuCtxPushCurrent", cuda_->cuCtxPushCurrent_v2(context));
  }
  ~CurrentContext() {
    cuda::Context popped = nullptr;
    cuda_->cuCtxPopCurrent_v2(&popped);
  }
  CurrentContext(const CurrentContext&) = delete;

 private:
  const Checked& cuda_;
};

// Both scopes for releasing resources, which must not throw. When the first attempt to open them fails, the error may
// be that of earlier asynchronous work, which any call may return; hence a second attempt. When that fails too, the
// device is lost.
class ReleaseScopes {
 public:
  ReleaseScopes(const Checked& cuda, cuda::Context context) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      try {
        if (!relaxed_) relaxed_.emplace(cuda);
        current_.emplace(cuda, context);
        return;
      } catch (const DeviceError&) {
      }
    }
  }
  // To be called before the context is released, since that may destroy it.
  void leave_context() { current_.reset(); }

 private:
  std::optional<RelaxedCapture> relaxed_;
  std::optional<CurrentContext> current_;
};

// Copies on one stream of its own, with one event for each slot.
//
// Every function opens its own scopes, rather than enter_thread() once: one worker uses several devices in a run, and
// the thread that creates and destroys a device is the caller's, whose context and capture mode must not change. Both
// scopes together cost well below a microsecond.
class CudaDevice final : public Device {
 public:
  CudaDevice(const Driver& driver, int ordinal, std::size_t slots) : cuda_(driver, ordinal), slots_(slots) {}

  // Separate from the constructor, so that the destructor releases what was acquired before a call failed.
  void open(int ordinal, cuda::Stream caller_stream) {
    RelaxedCapture relaxed(cuda_);
    cuda_.check("cuDeviceGet", cuda_->cuDeviceGet(&device_, ordinal));
    // torch's own context: a context of ours could use neither its memory nor its streams and events.
    cuda_.check("cuDevicePrimaryCtxRetain", cuda_->cuDevicePrimaryCtxRetain(&context_, device_));
    CurrentContext current(cuda_, context_);
    refuse_capturing(caller_stream);
    // Non-blocking: else every copy would wait for the default stream's kernels, and they for our copies.
    cuda_.check("cuStreamCreate", cuda_->cuStreamCreate(&stream_, cuda::stream_non_blocking));
    cuda_.check("cuEventCreate", cuda_->cuEventCreate(&ordering_, cuda::event_no_timing | cuda::event_blocking_sync));
    // On a save, queued work may still compute the tensors. On a load, queued work may still use their memory, since
    // torch's caching allocator hands it out again at once. So every copy comes after the caller's work queued so far.
    cuda_.check("cuEventRecord", cuda_->cuEventRecord(ordering_, caller_stream));
    cuda_.check("cuStreamWaitEvent", cuda_->cuStreamWaitEvent(stream_, ordering_, 0));
    for (Slot& slot : slots_) {
      // Blocking: else every waiting worker would spin on a processor of its own.
      const unsigned flags = cuda::event_no_timing | cuda::event_blocking_sync;
      cuda_.check("cuEventCreate", cuda_->cuEventCreate(&slot.done, flags));
    }
  }

  // The engine destroys the device after its workers have ended and before a slot is used again or unmapped. A failed
  // worker may have left copies in flight between its slot and the tensors: the destructor waits for them.
  ~CudaDevice() override {
    if (context_ == nullptr || driver().forked()) return;
    ReleaseScopes scopes(cuda_, context_);
    if (stream_ != nullptr) {
      // Two attempts, as in ReleaseScopes; a device that fails both is lost, and a lost device no longer copies.
      if (cuda_->cuStreamSynchronize(stream_) != cuda::success) cuda_->cuStreamSynchronize(stream_);
    }
    // One attempt each: a destroy call that reports an earlier failure has still destroyed its object.
    for (const Slot& slot : slots_) {
      if (slot.done != nullptr) cuda_->cuEventDestroy_v2(slot.done);
    }
    if (ordering_ != nullptr) cuda_->cuEventDestroy_v2(ordering_);
    if (stream_ != nullptr) cuda_->cuStreamDestroy_v2(stream_);
    scopes.leave_context();
    cuda_->cuDevicePrimaryCtxRelease_v2(device_);
  }

  void enter_thread() override { cuda_.require_usable(); }

  void submit(Direction direction, std::byte* slot, std::uint64_t address, std::size_t length,
              std::size_t slot_index) override {
    if (length == 0) return;
    RelaxedCapture relaxed(cuda_);
    CurrentContext current(cuda_, context_);
    slots_[slot_index].busy = true;
    if (direction == Direction::to_slot) {
      cuda_.check("cuMemcpyDtoHAsync", cuda_->cuMemcpyDtoHAsync_v2(slot, address, length, stream_));
    } else {
      cuda_.check("cuMemcpyHtoDAsync", cuda_->cuMemcpyHtoDAsync_v2(address, slot, length, stream_));
    }
  }

  // Records the event here, not after each copy: a block of many small tensors needs only one.
  void complete(std::size_t slot_index) override {
    Slot& slot = slots_[slot_index];
    if (!slot.busy) return;
    RelaxedCapture relaxed(cuda_);
    CurrentContext current(cuda_, context_);
    cuda_.check("cuEventRecord", cuda_->cuEventRecord(slot.done, stream_));
    cuda_.check("cuEventSynchronize", cuda_->cuEventSynchronize(slot.done));
    slot.busy = false;
  }

 private:
  struct Slot {
    cuda::Event done = nullptr;
    bool busy = false;  // has copies that were not waited for; only the worker that holds the slot uses it
  };

  // An event recorded on a capturing stream becomes part of the graph, and waiting for it would add our stream as well.
  void refuse_capturing(cuda::Stream caller_stream) const {
    int status = cuda::not_capturing;
    cuda_.check("cuStreamIsCapturing", cuda_->cuStreamIsCapturing(caller_stream, &status));
    if (status != cuda::not_capturing) {
      cuda_.fail("cuStreamIsCapturing",
                 "the current stream is being captured into a CUDA graph, which cannot hold a save or a load");
    }
  }

  const Checked cuda_;
  cuda::DeviceHandle device_ = 0;
  cuda::Context context_ = nullptr;
  cuda::Stream stream_ = nullptr;
  cuda::Event ordering_ = nullptr;
  std::vector<Slot> slots_;
};

// The device whose primary context is retained while memory is pinned: when the last reference to that context is
// released, the memory is no longer pinned.
struct Pin {
  cuda::DeviceHandle device = 0;
  cuda::Context context = nullptr;
};

// All memory that is pinned now. The ring that pinned it owns the entry.
struct Pins {
  Mutex mutex;
  std::map<void*, Pin> by_memory GUARDED_BY(mutex);
};

Pins& pins() {
  static Pins* const process_pins = new Pins;
  return *process_pins;
}

}  // namespace

bool cuda_available() { return driver().unavailable.empty(); }

std::string cuda_unavailable_reason() { return driver().unavailable; }

std::unique_ptr<Device> make_cuda_device(int ordinal, std::uint64_t caller_stream, std::size_t slots) {
  Checked(driver(), ordinal).require_usable();
  auto device = std::make_unique<CudaDevice>(driver(), ordinal, slots);
  device->open(ordinal, reinterpret_cast<cuda::Stream>(caller_stream));
  return device;
}

bool cuda_pin(int ordinal, void* memory, std::size_t length, std::string* reason) {
  const Checked cuda(driver(), ordinal);
  Pin pin;
  std::map<void*, Pin> entry;
  entry[memory];  // allocated first: memory that is registered must get its entry
  try {
    cuda.require_usable();
    RelaxedCapture relaxed(cuda);
    cuda.check("cuDeviceGet", cuda->cuDeviceGet(&pin.device, ordinal));
    cuda.check("cuDevicePrimaryCtxRetain", cuda->cuDevicePrimaryCtxRetain(&pin.context, pin.device));
    try {
      CurrentContext current(cuda, pin.context);
      cuda.check("cuMemHostRegister", cuda->cuMemHostRegister_v2(memory, length, cuda::register_portable));
    } catch (const DeviceError&) {
      cuda->cuDevicePrimaryCtxRelease_v2(pin.device);
      throw;
    }
  } catch (const DeviceError& error) {
    *reason = error.call + ": " + error.reason;
    return false;
  }
  entry[memory] = pin;
  Pins& all = pins();
  MutexLock hold(all.mutex);
  all.by_memory.merge(entry);
  return true;
}

void cuda_unpin(void* memory) {
  if (!cuda_available() || driver().forked()) return;
  Pin pin;
  {
    Pins& all = pins();
    MutexLock hold(all.mutex);
    const auto entry = all.by_memory.find(memory);
    if (entry == all.by_memory.end()) return;
    pin = entry->second;
    all.by_memory.erase(entry);
  }
  // Failures are not reported: on a lost device, or after the driver has shut down at the end of the process, nothing
  // is pinned any more.
  const Checked cuda(driver(), pin.device);
  ReleaseScopes scopes(cuda, pin.context);
  cuda->cuMemHostUnregister(memory);
  scopes.leave_context();
  cuda->cuDevicePrimaryCtxRelease_v2(pin.device);
}

}  // namespace shardsave
