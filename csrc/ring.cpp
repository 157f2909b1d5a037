#include "ring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <system_error>
#include <thread>

#include "cuda.h"

namespace shardsave {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Fresh zeroed memory that begins at a huge page when it holds one; nullptr with errno when there is none.
std::byte* map_memory(std::size_t bytes) {
  const std::size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* memory = static_cast<std::byte*>(mapped);
  if (slack != 0) {
    const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(memory) % kHugePage) % kHugePage;
    if (before != 0) munmap(memory, before);
    memory += before;
    if (slack != before) munmap(memory + bytes, slack - before);
    (void)madvise(memory, bytes, MADV_HUGEPAGE);
  }
  // open(2): memory under direct I/O must not be shared with a child by copy-on-write.
  if (madvise(memory, bytes, MADV_DONTFORK) != 0) {
    const int error = errno;
    munmap(memory, bytes);
    errno = error;
    return nullptr;
  }
  return memory;
}

void unmap_slot(const Slot& slot) {
  if (slot.pinned) cuda_unpin(slot.memory);
  munmap(slot.memory, slot.bytes);
}

// Makes the pages present, a thread for each slot: that is most of the time that pinning takes.
void touch(const std::vector<Lease>& leases, std::size_t bytes) {
  const auto touch_one = [bytes](std::byte* memory) {
    for (std::size_t at = 0; at < bytes; at += 4096) reinterpret_cast<volatile std::byte*>(memory)[at] = std::byte{0};
  };
  std::vector<std::thread> threads;
  threads.reserve(leases.size());
  for (const Lease& lease : leases) {
    try {
      threads.emplace_back(touch_one, lease.memory());
    } catch (const std::system_error&) {
      touch_one(lease.memory());
    }
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

Ring& Ring::instance() {
  // No lock: one that another thread held at the time of a fork would stay locked in the child.
  static std::atomic<Ring*> current{nullptr};
  const long process = getpid();
  Ring* ring = current.load(std::memory_order_acquire);
  while (ring == nullptr || ring->process_ != process) {
    auto fresh = std::unique_ptr<Ring>(new Ring(process));
    if (current.compare_exchange_strong(ring, fresh.get(), std::memory_order_acq_rel)) ring = fresh.release();
  }
  return *ring;
}

std::optional<Lease> Ring::acquire(std::size_t bytes, bool pinned, std::chrono::milliseconds patience) {
  const auto end = std::chrono::steady_clock::now() + patience;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    if (Slot* slot = take(bytes, pinned)) return Lease(this, slot);
    const bool wait_for_pinned = pinned && std::any_of(slots_.begin(), slots_.end(), [bytes](const auto& slot) {
                                   return slot->pinned && slot->bytes >= bytes;
                                 });
    if (!wait_for_pinned) {
      if (Slot* slot = take(bytes, false)) return Lease(this, slot);
      int error = 0;
      if (Slot* slot = add(bytes, &error)) return Lease(this, slot);
      const bool all_free = std::all_of(slots_.begin(), slots_.end(),
                                        [](const auto& slot) { return slot->state == SlotState::free; });
      if (error != 0 && all_free) throw RingError{error, bytes};
    }
    if (freed_.wait_until(lock, end) == std::cv_status::timeout) return std::nullopt;
  }
}

// The slot used last comes first: its memory may still be in a cache.
Slot* Ring::take(std::size_t bytes, bool pinned) {
  for (auto slot = slots_.rbegin(); slot != slots_.rend(); ++slot) {
    if ((*slot)->state != SlotState::free || (*slot)->bytes < bytes || (pinned && !(*slot)->pinned)) continue;
    (*slot)->state = SlotState::held;
    return slot->get();
  }
  return nullptr;
}

// A new slot in the caller's hands; nullptr with *error 0 when the ring has no room, else with mmap's errno.
Slot* Ring::add(std::size_t bytes, int* error) {
  *error = 0;
  while (total_ + bytes > kRingBytes) {
    if (!drop_one_smaller_than(bytes)) return nullptr;
  }
  slots_.reserve(slots_.size() + 1);
  auto slot = std::make_unique<Slot>();
  slot->memory = map_memory(bytes);
  while (slot->memory == nullptr) {
    *error = errno;
    if (!drop_one_smaller_than(bytes)) return nullptr;
    slot->memory = map_memory(bytes);
  }
  slot->bytes = bytes;
  slot->state = SlotState::held;
  total_ += bytes;
  slots_.push_back(std::move(slot));
  return slots_.back().get();
}

bool Ring::drop_one_smaller_than(std::size_t bytes) {
  const auto found = std::find_if(slots_.begin(), slots_.end(), [bytes](const auto& slot) {
    return slot->state == SlotState::free && slot->bytes < bytes;
  });
  if (found == slots_.end()) return false;
  unmap_slot(**found);
  total_ -= (*found)->bytes;
  slots_.erase(found);
  return true;
}

std::size_t Ring::pin(std::size_t count, std::size_t bytes, int ordinal, std::string* why) {
  std::vector<Lease> leases;
  leases.reserve(count);  // under the lock nothing may throw that would give a lease back
  std::size_t pinned = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& slot : slots_) pinned += slot->pinned && slot->bytes >= bytes ? 1 : 0;
    while (pinned + leases.size() < count) {
      std::optional<Lease> lease = take_unpinned(bytes);
      if (!lease) break;
      leases.push_back(std::move(*lease));
    }
  }
  touch(leases, bytes);
  std::size_t wanted = pinned + leases.size();
  std::size_t next = 0;
  while (pinned < wanted && next < leases.size()) {
    Slot* slot = leases[next].slot_;
    if (cuda_pin(ordinal, slot->memory, slot->bytes, why)) {
      const std::lock_guard<std::mutex> lock(mutex_);
      slot->pinned = true;
      ++pinned;
      ++next;
    } else if (wanted == 1) {
      break;
    } else {
      wanted /= 2;
    }
  }
  if (pinned != 0) {
    for (std::size_t surplus = next; surplus < leases.size(); ++surplus) remove(&leases[surplus]);
  }
  return pinned;
}

std::optional<Lease> Ring::take_unpinned(std::size_t bytes) {
  for (const auto& slot : slots_) {
    if (slot->state != SlotState::free || slot->bytes < bytes || slot->pinned) continue;
    slot->state = SlotState::held;
    return Lease(this, slot.get());
  }
  int error = 0;
  Slot* slot = add(bytes, &error);
  return slot != nullptr ? std::optional<Lease>(Lease(this, slot)) : std::nullopt;
}

void Ring::remove(Lease* lease) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(slots_.begin(), slots_.end(), [lease](const auto& slot) { return slot.get() == lease->slot_; });
  unmap_slot(**found);
  total_ -= (*found)->bytes;
  slots_.erase(found);
  lease->slot_ = nullptr;
}

void Ring::give_back(Slot* slot) {
  if (getpid() != process_) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    slot->state = SlotState::free;
  }
  freed_.notify_all();
}

void Ring::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto kept = std::stable_partition(slots_.begin(), slots_.end(),
                                          [](const auto& slot) { return slot->state != SlotState::free; });
  std::for_each(kept, slots_.end(), [this](const auto& slot) {
    unmap_slot(*slot);
    total_ -= slot->bytes;
  });
  slots_.erase(kept, slots_.end());
}

std::size_t Ring::bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return total_;
}

Lease::~Lease() {
  if (slot_ != nullptr) ring_->give_back(slot_);
}

}  // namespace shardsave
