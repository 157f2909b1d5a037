// The ring: the process's one bounded pool of staging memory, of which every run's workers take slots for a while.
//
// Threads: every function may be called from any thread at any time. Ring::mutex_ guards the list of slots and each
// slot's state; a slot's memory belongs to the holder of its Lease alone.
//
// Processes: the memory is MADV_DONTFORK, so a forked child does not have it (and a device or the kernel may be writing
// into it still). A child gets a fresh ring from instance() and what it inherited is inert: nothing of it is unmapped,
// unlocked or waited for. The ring is never destroyed, so that nothing depends on the order of exit.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace shardsave {

// The most that all slots take together.
constexpr std::size_t kRingBytes = 256'000'000;

enum class SlotState {
  free,    // in nobody's hands
  held,    // its holder's alone
  device,  // copies of a device into it or out of it may be under way
};

struct Slot {
  std::byte* memory = nullptr;
  std::size_t bytes = 0;
  bool pinned = false;
  std::atomic<SlotState> state{SlotState::free};  // leaves `free` only under Ring::mutex_
};

class Ring;

// A slot in someone's hands; goes back to the ring when this is destroyed.
class Lease {
 public:
  Lease(Ring* ring, Slot* slot) : ring_(ring), slot_(slot) {}
  Lease(Lease&& other) noexcept : ring_(other.ring_), slot_(other.slot_) { other.slot_ = nullptr; }
  Lease& operator=(Lease&&) = delete;
  ~Lease();

  std::byte* memory() const { return slot_->memory; }
  bool pinned() const { return slot_->pinned; }
  void mark(SlotState state) { slot_->state = state; }
  SlotState state() const { return slot_->state; }

 private:
  friend class Ring;
  Ring* ring_;
  Slot* slot_;
};

// No memory for even one slot.
struct RingError {
  int error;
  std::size_t bytes;
};

class Ring {
 public:
  // The ring of this process.
  static Ring& instance();

  // A free slot of at least `bytes`; a new one is mapped when none is free and there is room. With `pinned` only a pinned
  // one, as long as the ring has any. Nothing when `patience` is over: others hold them all. Throws RingError when nobody holds any and none can be had.
  std::optional<Lease> acquire(std::size_t bytes, bool pinned, std::chrono::milliseconds patience);

  // Sees to it that `count` slots of `bytes` are pinned for devices, as far as the driver lets it: each refusal halves
  // what is asked for. Returns how many there are, with the driver's words in *why after a refusal; with 0 the caller
  // goes on with pageable memory.
  std::size_t pin(std::size_t count, std::size_t bytes, int ordinal, std::string* why);

  // Gives back the memory of all slots that are free.
  void release();

  // What all slots take.
  std::size_t bytes();

 private:
  friend class Lease;
  explicit Ring(long process) : process_(process) {}
  Slot* take(std::size_t bytes, bool pinned);
  Slot* add(std::size_t bytes, int* error);
  bool drop_one_smaller_than(std::size_t bytes);
  std::optional<Lease> take_unpinned(std::size_t bytes);
  void remove(Lease* lease);
  void give_back(Slot* slot);

  const long process_;
  std::mutex mutex_;
  std::condition_variable freed_;
  std::vector<std::unique_ptr<Slot>> slots_;  // guarded by mutex_, like the two below
  std::size_t total_ = 0;
};

}  // namespace shardsave
