#include "ring.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <utility>
#include <vector>

#include "file.h"
#include "host_memory.h"
#include "mutex.h"

namespace shardsave {

struct Ring::State {
  const std::size_t slot_bytes;
  const pid_t owner = getpid();
  std::size_t slots = 0;  // constant after acquire()

  Mutex mutex;
  std::condition_variable given_back;
  std::vector<bool> taken GUARDED_BY(mutex);
  std::unique_ptr<HostMemory> memory GUARDED_BY(mutex);
  std::string note GUARDED_BY(mutex);

  explicit State(std::size_t slot_bytes) : slot_bytes(slot_bytes) {}

  void acquire(int pin_for) REQUIRES(mutex);
};

namespace {

// The ring of one process.
struct Process {
  const pid_t owner = getpid();
  Mutex mutex;
  std::shared_ptr<Ring> ring GUARDED_BY(mutex);
};

// Replaced, never destroyed, in a forked child: a thread of the parent may have held the mutex at the fork. Several
// threads of the child may come here at once; the first one to store its Process wins.
Process& process() {
  static std::atomic<Process*> shared{new Process};
  Process* current = shared.load();
  while (current->owner != getpid()) {
    auto replacement = std::make_unique<Process>();
    if (shared.compare_exchange_strong(current, replacement.get())) current = replacement.release();
  }
  return *current;
}

std::string not_pinned(const std::string& reason) { return "staging memory could not be pinned (" + reason + ")"; }

}  // namespace

Ring::Ring(std::unique_ptr<State> state) : state_(std::move(state)) {}

Ring::~Ring() {
  // In a forked child the memory was never mapped, and a thread of the parent may have held the mutex.
  if (state_->owner != getpid()) (void)state_.release();
}

std::shared_ptr<Ring> Ring::shared(std::size_t slot_bytes, int pin_for) {
  Process& here = process();
  MutexLock hold(here.mutex);
  bool fits = here.ring && here.ring->state_->slot_bytes == slot_bytes;
  if (fits && pin_for >= 0 && !here.ring->pinned()) {
    fits = !here.ring->note().empty();  // pinning was refused before; a ring for host memory alone is replaced
    if (fits && here.ring.use_count() == 1) here.ring->pin_again(pin_for);
  }
  if (!fits) {
    here.ring.reset();  // runs that still use it keep it alive
    here.ring = make(slot_bytes, pin_for);
  }
  return here.ring;
}

// A driver that refused to pin the ring may accept it now. This costs one call for each run, and is tried only while no
// run uses the ring.
void Ring::pin_again(int pin_for) {
  MutexLock hold(state_->mutex);
  const bool pinned = state_->memory->pin(pin_for);
  state_->note = pinned ? "" : not_pinned(state_->memory->refusal());
}

std::shared_ptr<Ring> Ring::make(std::size_t slot_bytes, int pin_for) {
  auto state = std::make_unique<State>(slot_bytes);
  {
    MutexLock hold(state->mutex);
    state->acquire(pin_for);
  }
  return std::shared_ptr<Ring>(new Ring(std::move(state)));
}

// Maps as many of the wanted slots as there is memory for, and pins them for a device. If that many cannot be pinned,
// tries with fewer; if none can be pinned, keeps the largest mapping.
void Ring::State::acquire(int pin_for) {
  const std::size_t wanted = pin_for < 0 ? kSlots : kDeviceSlots;
  std::string reason;
  bool pinned = false;
  for (std::size_t count = wanted; count >= 1 && !pinned; count /= 2) {
    auto mapping = std::make_unique<HostMemory>(count * slot_bytes, Pages::huge);
    if (mapping->memory() == nullptr) continue;
    if (pin_for >= 0) {
      pinned = mapping->pin(pin_for);
      if (!pinned) reason = mapping->refusal();
    }
    if (memory == nullptr || pinned) {
      memory = std::move(mapping);
      slots = count;
    }
    if (pin_for < 0) break;
  }
  if (memory == nullptr) throw Fault{-1, "mmap of staging memory", ENOMEM, 0, slot_bytes, ""};
  if (pin_for >= 0 && !pinned) note = not_pinned(reason);
  if (pin_for >= 0 && pinned && slots < wanted) note = "less staging memory was pinned than wanted";
  taken.assign(slots, false);
}

void Ring::release() {
  Process& here = process();
  MutexLock hold(here.mutex);
  if (here.ring.use_count() == 1) here.ring.reset();
}

Slot Ring::take(const std::function<bool()>& stop) {
  MutexLock hold(state_->mutex);
  while (!stop()) {
    for (std::size_t index = 0; index < state_->slots; ++index) {
      if (!state_->taken[index]) {
        state_->taken[index] = true;
        return Slot(shared_from_this(), index, state_->memory->memory() + index * state_->slot_bytes);
      }
    }
    hold.wait_for(state_->given_back, std::chrono::milliseconds(50));  // `stop` may turn true without a notice
  }
  return Slot();
}

void Ring::give_back(std::size_t index) {
  {
    MutexLock hold(state_->mutex);
    state_->taken[index] = false;
  }
  state_->given_back.notify_one();
}

std::size_t Ring::slots() const { return state_->slots; }
std::size_t Ring::bytes() const { return state_->slots * state_->slot_bytes; }

bool Ring::pinned() const {
  MutexLock hold(state_->mutex);
  return state_->memory->pinned();
}

std::string Ring::note() const {
  MutexLock hold(state_->mutex);
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
