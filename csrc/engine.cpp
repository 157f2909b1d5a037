#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <utility>

#include "block_order.h"
#include "block_transfer.h"
#include "cuda.h"
#include "mutex.h"
#include "piece_sums.h"
#include "request_check.h"
#include "ring.h"

namespace shardsave {
namespace {

// Through the page cache a slot is used in steps that stay in the processor's caches; smaller steps cost more calls.
constexpr std::size_t kCachedStep = 1 << 20;

// How often the tick hook is called. At the speed of memory some 50 MB are moved in between, and the hook may release
// the mapped pages of these.
constexpr std::chrono::milliseconds kTickInterval{10};

// The ring, unless all bytes go straight into the memory of a destination.
std::shared_ptr<Ring> ring_for(const Request& request) {
  if (request.into && request.into->memory != nullptr) return nullptr;
  return Ring::shared(request.slot_bytes, request.streams.empty() ? -1 : request.streams.front().first);
}

// Whether no segment has to wait for a device or for the caller.
bool needs_no_wait(const Segments& segments) {
  return std::all_of(segments.begin(), segments.end(), [](const Segment& segment) {
    return segment.memory == kHost || segment.memory == kDiscard || segment.memory == kStill;
  });
}

// Lets at most `number` workers copy and sum at one time.
class Copiers {
 public:
  explicit Copiers(std::size_t number) : free_(number) {}

  // One of them, until end() or the destructor; waits until it may copy.
  class Turn {
   public:
    explicit Turn(Copiers& copiers) : copiers_(&copiers) { copiers.take(); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { end(); }
    void end() {
      if (copiers_ != nullptr) std::exchange(copiers_, nullptr)->give_back();
    }

   private:
    Copiers* copiers_;
  };

 private:
  void take() {
    MutexLock hold(mutex_);
    while (free_ == 0) hold.wait(given_back_);
    --free_;
  }

  void give_back() {
    {
      MutexLock hold(mutex_);
      ++free_;
    }
    given_back_.notify_one();
  }

  Mutex mutex_;
  std::condition_variable given_back_;
  std::size_t free_ GUARDED_BY(mutex_);
};

std::deque<File> prepared_files(const Request& request) {
  std::deque<File> files;
  for (std::size_t n = 0; n < request.files.size(); ++n) {
    files.emplace_back(static_cast<int>(n), request.files[n]);
    files.back().prepare(request.access);
  }
  return files;
}

// One call of run(). Its fields are constant while workers run, except the atomic ones and those under the mutex.
class Run {
 public:
  Run(const Request& request, const Hooks& hooks)
      : request_(request),
        hooks_(hooks),
        files_(prepared_files(request)),
        through_cache_(!request.into &&
                       std::none_of(files_.begin(), files_.end(), [](const File& file) { return file.direct(); })),
        ring_(ring_for(request)),
        workers_(worker_count()),
        copiers_(request.copiers == 0 ? workers_ : request.copiers),
        sums_(request.piece_bytes, request.checksum),
        // A slot that goes to the page cache is read again at once, so its bytes should stay in the processor's caches;
        // otherwise they should not take up room there.
        transfer_(hooks, devices_, sums_, request.taken, through_cache_ ? Stores::cached : Stores::streaming) {
    if (request.write && through_cache_ && request.windowed.empty())
      order_ = interleave_files(request.blocks, files_.size(), workers_);
    held_.reserve(workers_);
    for (const auto& [ordinal, stream] : request.streams) {
      devices_[ordinal] = make_cuda_device(ordinal, stream, ring_ ? ring_->slots() : workers_);
    }
  }

  Result run() {
    std::vector<std::thread> threads;
    try {
      for (std::size_t n = 0; n < workers_; ++n) threads.emplace_back([this, n] { work(n, false); });
    } catch (const std::exception&) {
      // The system has no more threads, or no memory for one: the run goes on with fewer, or on this thread alone.
    }
    try {
      if (threads.empty()) {
        work(0, true);
      } else {
        wait(threads.size());
      }
    } catch (...) {
      fail(std::current_exception());
    }
    for (std::thread& thread : threads) thread.join();
    // Copies still in flight on a slot of a failed worker end here, before another run can take the slot.
    devices_.clear();
    if (const std::exception_ptr error = first_error()) std::rethrow_exception(error);
    hooks_.tick(done_);
    return result();
  }

 private:
  std::size_t worker_count() const {
    // Through the page cache a write is a copy.
    const bool all_copy = request_.copiers != 0 && (through_cache_ || request_.into);
    const std::size_t wanted = all_copy ? std::min(request_.workers, request_.copiers) : request_.workers;
    const std::size_t useful = std::max<std::size_t>(1, std::min(wanted, request_.blocks.size()));
    const std::size_t workers = ring_ ? std::min(useful, ring_->slots()) : useful;
    if (!request_.write || !through_cache_ || !needs_no_wait(request_.all_segments())) return workers;
    return std::min(workers, kWritersPerFile * files_.size());
  }

  // Calls the tick hook until `threads` workers have ended.
  void wait(std::size_t threads) {
    MutexLock hold(mutex_);
    while (ended_ < threads) {
      hold.wait_for(worker_ended_, kTickInterval);
      hold.unlock();
      if (!stop_) hooks_.tick(done_);
      hold.lock();
    }
  }

  // One worker: moves one block after another until none is left or the run has failed.
  void work(std::size_t worker, bool on_calling_thread) {
    try {
      for (auto& [ordinal, device] : devices_) device->enter_thread();
      const auto stop = [this] { return stop_.load(); };
      for (std::size_t n; !stop_ && (n = next_++) < request_.blocks.size();) {
        const std::size_t number = order_.empty() ? n : order_[n];
        // The window first: other processes may keep a worker waiting for one, which must not hold a slot meanwhile.
        std::byte* const window = request_.has_window(number) ? take_window(number) : nullptr;
        if (request_.has_window(number) && window == nullptr) break;
        std::byte* const still = request_.still_block(number);
        Slot slot = ring_ && still == nullptr ? ring_->take(stop) : Slot();
        if (ring_ && still == nullptr && !slot) break;
        try {
          move_block(number, {window, still}, slot, worker);
        } catch (...) {
          keep(std::move(slot));
          throw;
        }
        if (on_calling_thread) hooks_.tick(done_);
      }
    } catch (...) {
      fail(std::current_exception());
    }
    MutexLock hold(mutex_);
    ++ended_;
    worker_ended_.notify_one();
  }

  // Null if the run has failed meanwhile.
  std::byte* take_window(std::size_t block) {
    while (!stop_) {
      if (std::byte* const memory = hooks_.take_window(block)) return memory;
    }
    return nullptr;
  }

  // A failed worker's slot may have copies in flight: it is held until the devices are closed.
  void keep(Slot slot) {
    MutexLock hold(mutex_);
    held_.push_back(std::move(slot));
  }

  // Memory that takes the place of a slot; null if a block has none.
  struct Places {
    std::byte* window;
    std::byte* still;
  };

  void move_block(std::size_t number, Places places, const Slot& slot, std::size_t worker) {
    const Block& block = request_.blocks[number];
    const Segments segments = request_.segments_of(number);
    std::byte* const window = places.window;
    if (request_.into) {
      gather_block(block, segments, slot, worker);
    } else if (places.still != nullptr) {
      write_still_block(block, places.still);
    } else {
      move_file_block(block, segments, window != nullptr ? window : slot.memory(), slot.index());
    }
    if (window != nullptr) hooks_.give_window(number);
    for (const Segment& segment : segments) done_ += static_cast<std::uint64_t>(segment.length);
  }

  // Without a ring, the worker's number takes the place of the slot's.
  void gather_block(const Block& block, const Segments& segments, const Slot& slot, std::size_t worker) {
    const auto length = static_cast<std::size_t>(block.length);
    if (std::byte* const memory = request_.into->memory) {
      transfer_.gather(segments, {memory + block.offset, 0, length, worker});
    } else {
      transfer_.sum(segments, {slot.memory(), 0, length, slot.index()});
    }
  }

  void write_still_block(const Block& block, const std::byte* memory) {
    File& file = files_[static_cast<std::size_t>(block.file)];
    file.write_at(memory, static_cast<std::size_t>(block.length), static_cast<std::uint64_t>(block.offset));
    start_writeback(file, block);
  }

  // A caller that requests direct I/O will fsync the file.
  void start_writeback(File& file, const Block& block) const {
    if (!request_.write || request_.access != Access::direct || file.direct()) return;
    file.start_writeback(static_cast<std::uint64_t>(block.offset), static_cast<std::size_t>(block.length));
  }

  void move_file_block(const Block& block, const Segments& segments, std::byte* memory, std::size_t slot_index) {
    File& file = files_[static_cast<std::size_t>(block.file)];
    const auto length = static_cast<std::size_t>(block.length);
    // Every step uses the same first part of the slot, so this stays in the processor's caches. Blocks that use direct
    // I/O, or memory that has to be waited for, move in one step.
    const bool in_steps = needs_no_wait(segments) && !file.direct();
    const std::size_t step = in_steps ? std::min(kCachedStep, length) : length;
    for (std::size_t begin = 0; begin < length && !stop_; begin += step) {
      move_window(block, segments, file, {memory, begin, std::min(step, length - begin), slot_index});
    }
    start_writeback(file, block);
  }

  void move_window(const Block& block, const Segments& segments, File& file, const Window& window) {
    const std::uint64_t offset = static_cast<std::uint64_t>(block.offset) + window.begin;
    if (request_.write) {
      Copiers::Turn turn(copiers_);
      transfer_.fill(segments, window);
      if (file.direct()) turn.end();  // whoever waits for the disk copies nothing
      file.write_at(window.memory, window.length, offset);
      return;
    }
    const auto end = static_cast<std::size_t>(segments.back().at + segments.back().length);
    if (window.begin >= end) return;
    file.read_at(window.memory, window.length, std::min(window.length, end - window.begin), offset);
    transfer_.drain(segments, window);
  }

  void fail(std::exception_ptr error) {
    MutexLock hold(mutex_);
    if (!error_) error_ = error;
    stop_ = true;
  }

  std::exception_ptr first_error() {
    MutexLock hold(mutex_);
    return error_;
  }

  Result result() const {
    Result result;
    result.sums = sums_.finished();
    for (const File& file : files_) result.direct.push_back(file.reported_direct());
    if (!ring_) return result;
    result.staging_bytes = ring_->bytes();
    result.pinned = ring_->pinned() && !request_.streams.empty();
    if (std::string note = ring_->note(); !note.empty() && !request_.streams.empty()) result.notes.push_back(note);
    return result;
  }

  const Request& request_;
  const Hooks& hooks_;
  std::deque<File> files_;
  const bool through_cache_;
  const std::shared_ptr<Ring> ring_;  // null if no slots are needed
  const std::size_t workers_;
  Copiers copiers_;
  std::vector<std::size_t> order_;  // block numbers; empty: the order of the table
  PieceSums sums_;
  const BlockTransfer transfer_;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> stop_{false};

  Mutex mutex_;
  std::condition_variable worker_ended_;
  std::size_t ended_ GUARDED_BY(mutex_) = 0;
  std::exception_ptr error_ GUARDED_BY(mutex_);
  std::vector<Slot> held_ GUARDED_BY(mutex_);
  Devices devices_;  // after held_: devices are closed before their slots are given back
};

// Turns the exceptions of devices and of the C++ library into a Fault, which callers handle.
template <class Action>
auto with_faults(Action action) {
  try {
    return action();
  } catch (const DeviceError& error) {
    throw Fault{-1, error.call, 0, 0, 0, error.reason};
  } catch (const std::bad_alloc&) {
    throw Fault{-1, "allocation of working memory", ENOMEM, 0, 0, ""};
  }
}

}  // namespace

Result run(const Request& request, const Hooks& hooks) {
  check_request(request);
  return with_faults([&] { return Run(request, hooks).run(); });
}

std::size_t reserve_staging(std::size_t slot_bytes, int pin_for) {
  return with_faults([&] { return Ring::shared(slot_bytes, pin_for)->bytes(); });
}

}  // namespace shardsave
