#include "cuda.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "cuda_driver.h"

namespace shardsave {
namespace {

using cuda::Result;

// The driver, loaded at the first question and kept for the life of the process: dlclose would unmap code in which the
// driver's own threads run.
struct Driver {
  cuda::Calls calls;
  pid_t owner = getpid();
  std::string unavailable;  // why it cannot be used; empty when it can

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

  // A fork does not carry the driver's contexts over: in the child its calls fail, hang or crash.
  bool forked() const { return getpid() != owner; }
};

const Driver& driver() {
  static const Driver* const loaded =
      new Driver;  // not destroyed: threads may still be at work while the process exits
  return *loaded;
}

// The driver's calls on behalf of one device; an error names it, since the driver's own words never do.
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

// Another thread may be capturing a CUDA graph in the global mode: then most of our calls would fail on this thread and
// invalidate that capture (cuThreadExchangeStreamCaptureMode), although nothing we do is part of it.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Checked& cuda) : cuda_(cuda) {
    cuda_.check("cuThreadExchangeStreamCaptureMode", cuda_->cuThreadExchangeStreamCaptureMode(&before_));
  }
  ~RelaxedCapture() {
    int mode = before_;
    if (cuda_->cuThreadExchangeStreamCaptureMode(&mode) == cuda::success) return;
    mode = before_;  // the thread may be the caller's: once more, rather than leave it changed
    cuda_->cuThreadExchangeStreamCaptureMode(&mode);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  const Checked& cuda_;
  int before_ = cuda::capture_relaxed;  // exchanged: holds the thread's own mode from then on
};

// The context is current while this lives, and what was current before is so again afterwards.
class Current {
 public:
  Current(const Checked& cuda, cuda::Context context) : cuda_(cuda) {
    cuda_.check("cuCtxPushCurrent", cuda_->cuCtxPushCurrent_v2(context));
  }
  ~Current() {
    cuda::Context popped = nullptr;
    cuda_->cuCtxPopCurrent_v2(&popped);
  }
  Current(const Current&) = delete;

 private:
  const Checked& cuda_;
};

// Both scopes for giving things back, which must not throw. Opened at the second try where the first fails, which may
// be the failure of earlier asynchronous work: any call may return one. When both fail the device is lost.
class Closing {
 public:
  Closing(const Checked& cuda, cuda::Context context) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      try {
        if (!relaxed_) relaxed_.emplace(cuda);
        current_.emplace(cuda, context);
        return;
      } catch (const DeviceError&) {
      }
    }
  }
  // Before the context is released, which may destroy it.
  void leave_context() { current_.reset(); }

 private:
  std::optional<RelaxedCapture> relaxed_;
  std::optional<Current> current_;
};

// Every entry opens its own scopes, rather than enter_thread() once: one worker serves several devices in a run, and
// the thread that makes and destroys a device is the caller's, whose context and capture mode are not ours to change.
// Both together cost well below a microsecond.
class CudaDevice final : public Device {
 public:
  CudaDevice(const Driver& driver, int ordinal, std::size_t slots) : cuda_(driver, ordinal), slots_(slots) {}

  // Apart from the constructor, so that the destructor gives back what was acquired before a call failed.
  void open(int ordinal, cuda::Stream caller_stream) {
    RelaxedCapture relaxed(cuda_);
    cuda_.check("cuDeviceGet", cuda_->cuDeviceGet(&device_, ordinal));
    // torch's own context: a context of ours would neither know its memory nor share its streams and events.
    cuda_.check("cuDevicePrimaryCtxRetain", cuda_->cuDevicePrimaryCtxRetain(&context_, device_));
    Current current(cuda_, context_);
    refuse_capturing(caller_stream);
    // Non-blocking, or every copy would wait for the default stream's kernels, and they for our copies.
    cuda_.check("cuStreamCreate", cuda_->cuStreamCreate(&stream_, cuda::stream_non_blocking));
    cuda_.check("cuEventCreate", cuda_->cuEventCreate(&ordering_, cuda::event_no_timing | cuda::event_blocking_sync));
    // On a save the tensors may still be being computed, on a load their memory may still be in use by work queued
    // before torch's caching allocator handed it out again: every copy comes after what the caller has queued so far.
    cuda_.check("cuEventRecord", cuda_->cuEventRecord(ordering_, caller_stream));
    cuda_.check("cuStreamWaitEvent", cuda_->cuStreamWaitEvent(stream_, ordering_, 0));
    for (Slot& slot : slots_) {
      // Blocking: without it, every waiting worker spins on a processor of its own.
      const unsigned flags = cuda::event_no_timing | cuda::event_blocking_sync;
      cuda_.check("cuEventCreate", cuda_->cuEventCreate(&slot.done, flags));
    }
  }

  // The engine destroys the device when its workers have ended and before a slot is used for anything else or unmapped.
  // A worker that failed may have left copies in flight between its slot and the tensors: they are waited for here.
  ~CudaDevice() override {
    if (context_ == nullptr || driver().forked()) return;
    Closing scopes(cuda_, context_);
    if (stream_ != nullptr) {
      // Twice, as in Closing; a device that fails both is lost, and a lost device copies nothing any more.
      if (cuda_->cuStreamSynchronize(stream_) != cuda::success) cuda_->cuStreamSynchronize(stream_);
    }
    // Once each: a destroy that reports an earlier failure has destroyed all the same.
    for (const Slot& slot : slots_) {
      if (slot.done != nullptr) cuda_->cuEventDestroy_v2(slot.done);
    }
    if (ordering_ != nullptr) cuda_->cuEventDestroy_v2(ordering_);
    if (stream_ != nullptr) cuda_->cuStreamDestroy_v2(stream_);
    scopes.leave_context();
    cuda_->cuDevicePrimaryCtxRelease_v2(device_);
  }

  void enter_thread() override { cuda_.require_usable(); }

  bool submit(Direction direction, std::byte* slot, std::uint64_t address, std::size_t length, std::size_t slot_index,
              bool /*want_sum*/, std::uint64_t* /*raw_sum*/) override {
    if (length == 0) return false;
    RelaxedCapture relaxed(cuda_);
    Current current(cuda_, context_);
    slots_[slot_index].busy = true;
    if (direction == Direction::to_slot) {
      cuda_.check("cuMemcpyDtoHAsync", cuda_->cuMemcpyDtoHAsync_v2(slot, address, length, stream_));
    } else {
      cuda_.check("cuMemcpyHtoDAsync", cuda_->cuMemcpyHtoDAsync_v2(address, slot, length, stream_));
    }
    return false;  // the bytes are summed in the slot
  }

  // The event is recorded here and not after each copy: a block of many small tensors needs only one.
  void complete(std::size_t slot_index) override {
    Slot& slot = slots_[slot_index];
    if (!slot.busy) return;
    RelaxedCapture relaxed(cuda_);
    Current current(cuda_, context_);
    cuda_.check("cuEventRecord", cuda_->cuEventRecord(slot.done, stream_));
    cuda_.check("cuEventSynchronize", cuda_->cuEventSynchronize(slot.done));
    slot.busy = false;
  }

 private:
  struct Slot {
    cuda::Event done = nullptr;
    bool busy = false;  // has copies that nobody has waited for; only the slot's worker looks at it
  };

  // An event recorded on a capturing stream becomes part of the graph, and waiting for it would draw our stream in too.
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

// Memory that is pinned now, and the device whose primary context is retained for as long: with the last reference to
// that context the registration would go too. The ring that asked for the pinning owns the entry.
struct Pins {
  std::mutex mutex;
  std::map<void*, std::pair<cuda::DeviceHandle, cuda::Context>> of;  // guarded by mutex
};

Pins& pins() {
  static Pins* const kept = new Pins;
  return *kept;
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

bool cuda_pin(int ordinal, void* memory, std::size_t length, std::string* why) {
  const Checked cuda(driver(), ordinal);
  cuda::DeviceHandle device = 0;
  cuda::Context context = nullptr;
  decltype(Pins::of) made;
  made[memory];  // now, since what is registered must find its entry
  try {
    cuda.require_usable();
    RelaxedCapture relaxed(cuda);
    cuda.check("cuDeviceGet", cuda->cuDeviceGet(&device, ordinal));
    cuda.check("cuDevicePrimaryCtxRetain", cuda->cuDevicePrimaryCtxRetain(&context, device));
    try {
      Current current(cuda, context);
      cuda.check("cuMemHostRegister", cuda->cuMemHostRegister_v2(memory, length, cuda::register_portable));
    } catch (const DeviceError&) {
      cuda->cuDevicePrimaryCtxRelease_v2(device);
      throw;
    }
  } catch (const DeviceError& error) {
    *why = error.call + ": " + error.reason;
    return false;
  }
  made[memory] = {device, context};
  const std::lock_guard<std::mutex> lock(pins().mutex);
  pins().of.merge(made);
  return true;
}

void cuda_unpin(void* memory) {
  if (!cuda_available() || driver().forked()) return;
  std::pair<cuda::DeviceHandle, cuda::Context> pin;
  {
    const std::lock_guard<std::mutex> lock(pins().mutex);
    const auto found = pins().of.find(memory);
    if (found == pins().of.end()) return;
    pin = found->second;
    pins().of.erase(found);
  }
  // Failures are not reported: on a lost device, or when the driver has shut down before us at the end of the process,
  // nothing is pinned any more.
  const Checked cuda(driver(), pin.first);
  Closing scopes(cuda, pin.second);
  cuda->cuMemHostUnregister(memory);
  scopes.leave_context();
  cuda->cuDevicePrimaryCtxRelease_v2(pin.first);
}

}  // namespace shardsave
