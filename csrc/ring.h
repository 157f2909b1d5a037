// The staging memory: one ring of aligned slots for the whole process, shared by all runs. Its size does not depend on
// the model's.
//
// Threads: all functions may be called from any thread, but a Slot is held by one worker at a time.
// Ownership: the process owns the ring. The first run creates it, and it is kept since pinning it is slow; release()
// frees it when no run uses it. take() lends a slot, and the Slot's destructor gives it back. A forked child neither
// unlocks nor unmaps its parent's ring (the memory is MADV_DONTFORK); its first run creates another.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace shardsave {

// How many slots a ring has, for host memory alone and with a device: 64 MiB with the usual slots of 8 MiB, twice that
// with a device. At 50 GB/s a device copies a slot in 0.17 ms, and the worker that waits for the copy needs almost as
// long to wake up. More slots keep the device busy during that time, and while other workers sum or write theirs.
constexpr std::size_t kSlots = 8, kDeviceSlots = 16;

class Ring;

// A slot held by one worker. Movable, not copyable.
class Slot {
 public:
  Slot() = default;
  Slot(std::shared_ptr<Ring> ring, std::size_t index, std::byte* memory);
  Slot(Slot&& other) noexcept;
  Slot& operator=(Slot&& other) noexcept;
  ~Slot();
  std::byte* memory() const { return memory_; }
  std::size_t index() const { return index_; }
  explicit operator bool() const { return memory_ != nullptr; }

 private:
  std::shared_ptr<Ring> ring_;
  std::size_t index_ = 0;
  std::byte* memory_ = nullptr;
};

class Ring : public std::enable_shared_from_this<Ring> {
 public:
  // The process's ring, with slots of `slot_bytes`. `pin_for` is a CUDA ordinal, or -1 for host memory alone; it
  // decides how many slots are wanted. With too little memory a ring has half as many, and so on down to one. A ring
  // that could not be pinned is used unpinned, and a later call tries to pin it again. Throws Fault (file.h) when there
  // is no memory for one slot.
  static std::shared_ptr<Ring> shared(std::size_t slot_bytes, int pin_for);

  // Frees the process's ring if no run uses it; the next run creates another.
  static void release();

  // Waits for a free slot; returns an empty Slot as soon as `stop` returns true.
  Slot take(const std::function<bool()>& stop);

  std::size_t slots() const;
  std::size_t bytes() const;
  bool pinned() const;
  std::string note() const;

  ~Ring();

 private:
  friend class Slot;
  struct State;
  explicit Ring(std::unique_ptr<State> state);
  static std::shared_ptr<Ring> make(std::size_t slot_bytes, int pin_for);
  void pin_again(int pin_for);
  void give_back(std::size_t index);
  std::unique_ptr<State> state_;
};

}  // namespace shardsave
