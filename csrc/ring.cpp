#include "ring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "cuda.h"
#include "file.h"

namespace shardsave {

struct Ring::State {
  std::byte* memory = nullptr;
  std::size_t slots = 0;
  std::size_t slot_bytes = 0;
  pid_t owner = getpid();

  std::mutex mutex;  // guards the members below
  std::condition_variable given_back;
  std::vector<bool> taken;
  bool pinned = false;
  std::string note;

  ~State() {
    if (pinned) cuda_unpin(memory);
    if (memory != nullptr) munmap(memory, slots * slot_bytes);
  }
};

namespace {

struct Process {
  std::mutex mutex;  // guards the members below
  std::shared_ptr<Ring> ring;
  pid_t owner = 0;
};

// Replaced, never destroyed, in a forked child: a parent's thread may have held the mutex at the fork.
Process& process() {
  static Process* current = new Process;
  static pid_t made_in = getpid();
  if (made_in != getpid()) {
    current = new Process;
    made_in = getpid();
  }
  return *current;
}

struct Unmap {
  std::size_t length;
  void operator()(std::byte* memory) const { munmap(memory, length); }
};
using Mapping = std::unique_ptr<std::byte, Unmap>;

Mapping map(std::size_t length) {
  void* memory = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return {nullptr, Unmap{length}};
  madvise(memory, length, MADV_HUGEPAGE);
  // Direct I/O into private memory must not run while a fork makes it copy-on-write (open(2), NOTES).
  madvise(memory, length, MADV_DONTFORK);
  return {static_cast<std::byte*>(memory), Unmap{length}};
}

// In parallel: pinning pages that were never touched, one by one, is several times slower.
void touch(std::byte* memory, std::size_t slots, std::size_t slot_bytes) {
  std::vector<std::thread> touchers;
  for (std::size_t slot = 0; slot < slots; ++slot) {
    const auto touch_slot = [memory, slot, slot_bytes] {
      for (std::size_t at = 0; at < slot_bytes; at += kAlignment) memory[slot * slot_bytes + at] = std::byte{0};
    };
    try {
      touchers.emplace_back(touch_slot);
    } catch (const std::exception&) {  // no thread to be had, or no memory for one
      touch_slot();
    }
  }
  for (auto& toucher : touchers) toucher.join();
}

std::string not_pinned(const std::string& why) { return "staging memory could not be pinned (" + why + ")"; }

}  // namespace

Ring::Ring(std::unique_ptr<State> state) : state_(std::move(state)) {}

Ring::~Ring() {
  // A forked child's copy: its memory was never there, and a parent's thread may have held the mutex.
  if (state_->owner != getpid()) (void)state_.release();
}

std::shared_ptr<Ring> Ring::shared(std::size_t slots, std::size_t slot_bytes, int pin_for) {
  Process& here = process();
  std::lock_guard<std::mutex> hold(here.mutex);
  bool fits = here.ring && here.ring->state_->slot_bytes == slot_bytes;
  if (fits && pin_for >= 0 && !here.ring->pinned()) {
    fits = !here.ring->note().empty();  // it was refused once; a ring made for host memory is replaced
    if (fits && here.ring.use_count() == 1) here.ring->pin_again(pin_for);
  }
  if (!fits) {
    here.ring.reset();  // runs that still use it keep it alive
    here.ring = make(slots, slot_bytes, pin_for);
  }
  return here.ring;
}

// What was refused may be granted now: asked once a run, which costs one call, and only while no run uses the ring.
void Ring::pin_again(int pin_for) {
  std::string why;
  const bool pinned = cuda_pin(pin_for, state_->memory, bytes(), &why);
  std::lock_guard<std::mutex> hold(state_->mutex);
  state_->pinned = pinned;
  if (pinned) {
    state_->note.clear();
  } else {
    state_->note = not_pinned(why);
  }
}

std::shared_ptr<Ring> Ring::make(std::size_t slots, std::size_t slot_bytes, int pin_for) {
  auto state = std::make_unique<State>();
  state->slot_bytes = slot_bytes;
  std::string why;
  for (std::size_t count = slots; count >= 1 && !state->pinned; count /= 2) {
    Mapping memory = map(count * slot_bytes);
    if (!memory) continue;
    bool pinned = false;
    if (pin_for >= 0) {
      touch(memory.get(), count, slot_bytes);
      pinned = cuda_pin(pin_for, memory.get(), count * slot_bytes, &why);
    }
    if (state->memory == nullptr || pinned) {
      if (state->memory != nullptr) munmap(state->memory, state->slots * slot_bytes);
      state->memory = memory.release();
      state->slots = count;
      state->pinned = pinned;
    }
    if (pin_for < 0) break;
  }
  if (state->memory == nullptr) throw Fault{-1, "mmap of staging memory", ENOMEM, 0, slot_bytes, ""};
  if (pin_for >= 0 && !state->pinned) state->note = not_pinned(why);
  if (pin_for >= 0 && state->pinned && state->slots < slots) state->note = "less staging memory was pinned than wanted";
  state->taken.assign(state->slots, false);
  return std::shared_ptr<Ring>(new Ring(std::move(state)));
}

void Ring::release() {
  Process& here = process();
  std::lock_guard<std::mutex> hold(here.mutex);
  if (here.ring.use_count() == 1) here.ring.reset();
}

Slot Ring::take(const std::function<bool()>& stop) {
  std::unique_lock<std::mutex> hold(state_->mutex);
  while (!stop()) {
    for (std::size_t index = 0; index < state_->slots; ++index) {
      if (!state_->taken[index]) {
        state_->taken[index] = true;
        return Slot(shared_from_this(), index, state_->memory + index * state_->slot_bytes);
      }
    }
    state_->given_back.wait_for(hold, std::chrono::milliseconds(50));  // `stop` may turn true without a notice
  }
  return Slot();
}

void Ring::give_back(std::size_t index) {
  {
    std::lock_guard<std::mutex> hold(state_->mutex);
    state_->taken[index] = false;
  }
  state_->given_back.notify_one();
}

std::size_t Ring::slots() const { return state_->slots; }
std::size_t Ring::bytes() const { return state_->slots * state_->slot_bytes; }

bool Ring::pinned() const {
  std::lock_guard<std::mutex> hold(state_->mutex);
  return state_->pinned;
}

std::string Ring::note() const {
  std::lock_guard<std::mutex> hold(state_->mutex);
  return state_->note;
}

Slot::Slot(std::shared_ptr<Ring> ring, std::size_t index, std::byte* memory)
    : ring_(std::move(ring)), index_(index), memory_(memory) {}

Slot::Slot(Slot&& other) noexcept
    : ring_(std::move(other.ring_)), index_(other.index_), memory_(std::exchange(other.memory_, nullptr)) {}

Slot& Slot::operator=(Slot&& other) noexcept {
  std::swap(ring_, other.ring_);
  std::swap(index_, other.index_);
  std::swap(memory_, other.memory_);
  return *this;
}

Slot::~Slot() {
  if (memory_ != nullptr) ring_->give_back(index_);
}

}  // namespace shardsave
