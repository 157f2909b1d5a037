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
  bool pinned = false;
  std::string note;
  pid_t owner = 0;

  std::mutex mutex;  // guards `taken`
  std::condition_variable given_back;
  std::vector<bool> taken;
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

std::byte* map(std::size_t length) {
  void* memory = mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  madvise(memory, length, MADV_HUGEPAGE);
  // Direct I/O into private memory must not run while a fork makes it copy-on-write (open(2), NOTES).
  madvise(memory, length, MADV_DONTFORK);
  return static_cast<std::byte*>(memory);
}

}  // namespace

Ring::Ring(std::unique_ptr<State> state) : state_(std::move(state)) {}

Ring::~Ring() {
  if (state_->owner != getpid()) {
    (void)state_.release();  // a forked child's copy: its memory was never there
    return;
  }
  if (state_->pinned) cuda_unpin(state_->memory);
  munmap(state_->memory, state_->slots * state_->slot_bytes);
}

std::shared_ptr<Ring> Ring::shared(std::size_t slots, std::size_t slot_bytes, int pin_for) {
  Process& here = process();
  std::lock_guard<std::mutex> hold(here.mutex);
  const bool fits = here.ring && here.ring->state_->slot_bytes == slot_bytes &&
                    (pin_for < 0 || here.ring->state_->pinned || !here.ring->state_->note.empty());
  if (!fits) {
    here.ring.reset();  // runs that still use it keep it alive
    here.ring = make(slots, slot_bytes, pin_for);
  }
  return here.ring;
}

std::shared_ptr<Ring> Ring::make(std::size_t slots, std::size_t slot_bytes, int pin_for) {
  auto state = std::make_unique<State>();
  state->owner = getpid();
  state->slot_bytes = slot_bytes;
  std::string refused;
  for (std::size_t count = slots; count >= 1 && !state->pinned; count /= 2) {
    std::byte* memory = map(count * slot_bytes);
    if (memory == nullptr) continue;
    std::string why;
    if (pin_for >= 0) {
      // Touched first, and in parallel: pinning fresh pages one by one is several times slower.
      std::vector<std::thread> touchers;
      for (std::size_t slot = 0; slot < count; ++slot) {
        const auto touch = [memory, slot, slot_bytes] {
          for (std::size_t at = 0; at < slot_bytes; at += kAlignment) memory[slot * slot_bytes + at] = std::byte{0};
        };
        try {
          touchers.emplace_back(touch);
        } catch (const std::system_error&) {
          touch();
        }
      }
      for (auto& toucher : touchers) toucher.join();
      state->pinned = cuda_pin(pin_for, memory, count * slot_bytes, &why);
      if (!state->pinned) refused = why;
    }
    if (state->memory == nullptr || state->pinned) {
      if (state->memory != nullptr) munmap(state->memory, state->slots * slot_bytes);
      state->memory = memory;
      state->slots = count;
    } else {
      munmap(memory, count * slot_bytes);
    }
    if (pin_for < 0) break;
  }
  if (state->memory == nullptr) throw Fault{-1, "mmap of staging memory", ENOMEM, 0, slot_bytes, ""};
  if (pin_for >= 0 && !state->pinned) state->note = "staging memory could not be pinned (" + refused + ")";
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
bool Ring::pinned() const { return state_->pinned; }
const std::string& Ring::note() const { return state_->note; }

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
