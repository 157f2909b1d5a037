// The staging memory: one pool of aligned slots in this process, shared by all runs, of a fixed size whatever the
// model's.
//
// Owner: the process. It is made at the first run and kept, since pinning it is slow; release() frees it when idle.
// Slots are free or taken, under the ring's mutex. Lent out by take(), which waits, and given back by the Slot's
// destructor. In a forked child the parent's ring is left alone, neither unlocked nor unmapped (it is MADV_DONTFORK),
// and a new one is made at the first run.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

namespace shardsave {

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
  // The process's ring, with slots of `slot_bytes`, `slots` of them if that many can be had, else half, and so on down
  // to one. `pin_for` is a CUDA ordinal or -1. A ring that could not be pinned is used as it is, and asked for again.
  // Throws Fault (file.h) when not one slot can be had.
  static std::shared_ptr<Ring> shared(std::size_t slots, std::size_t slot_bytes, int pin_for);

  // Frees the process's ring if no run holds it; the next run makes another.
  static void release();

  // Waits for a free slot; an empty Slot as soon as `stop` answers true.
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
  static std::shared_ptr<Ring> make(std::size_t slots, std::size_t slot_bytes, int pin_for);
  void pin_again(int pin_for);
  void give_back(std::size_t index);
  std::unique_ptr<State> state_;
};

}  // namespace shardsave
