#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "crc64.h"
#include "cuda.h"
#include "device.h"
#include "ring.h"

namespace shardsave {
namespace {

// Through the page cache a slot is used in parts that stay in the processor's caches; smaller ones cost more calls.
constexpr std::size_t kCachedStep = 1 << 20;

// So that no ring's length, and no place in a slot, leaves its type.
constexpr std::size_t kMaxSlot = std::size_t{1} << 40;

// 64 MiB with the usual slots of 8 MiB, twice that with a device: at 50 GB/s a slot is copied in 0.17 ms, not much
// longer than a worker that waited for it takes to wake up, while others hold slots that are summed or written.
constexpr std::size_t kSlots = 8, kDeviceSlots = 16;

std::size_t slots_for(int pin_for) { return pin_for < 0 ? kSlots : kDeviceSlots; }

// How often the caller's thread is told how far the work is: at memory's speed some 50 MB, which a caller may want to
// let go.
constexpr std::chrono::milliseconds kTickInterval{10};

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void check(const Request& request) {
  const auto files = static_cast<std::int64_t>(request.files.size());
  const auto pieces = static_cast<std::int64_t>(request.piece_bytes.size());
  const auto segments = static_cast<std::int64_t>(request.segments.size());
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  require(request.slot_bytes > 0 && request.slot_bytes <= kMaxSlot && request.slot_bytes % kAlignment == 0,
          "slot_bytes must be a multiple of the alignment, and at most 1 TiB");
  const auto slot = static_cast<std::int64_t>(request.slot_bytes);
  require(request.workers >= 1, "workers must be at least one");
  require(request.blocks.empty() ? segments == 0 : request.blocks[0].first_segment == 0, "segments outside of blocks");
  for (std::int64_t bytes : request.piece_bytes) require(bytes >= 0, "piece_bytes must not be negative");
  for (std::size_t n = 0; n < request.blocks.size(); ++n) {
    const Block& block = request.blocks[n];
    const std::int64_t last = n + 1 < request.blocks.size() ? request.blocks[n + 1].first_segment : segments;
    require(block.file >= 0 && block.file < files, "block of a file that is not there");
    require(block.offset >= 0 && block.offset % static_cast<std::int64_t>(kAlignment) == 0, "block offset not aligned");
    require(block.length > 0 && block.length <= slot && block.length % static_cast<std::int64_t>(kAlignment) == 0,
            "block length not aligned or larger than a slot");
    require(block.offset <= most - block.length, "block behind the end of every file");
    require(block.first_segment >= 0 && block.first_segment < last && last <= segments,
            "segments of blocks not in order");
    std::int64_t end = 0;
    for (std::int64_t s = block.first_segment; s < last; ++s) {
      const Segment& segment = request.segments[static_cast<std::size_t>(s)];
      require(segment.length > 0 && segment.at >= end && segment.length <= block.length - segment.at,
              "segment outside of its block, or overlapping");
      end = segment.at + segment.length;
      require(segment.piece >= 0 && segment.piece < pieces, "segment of a piece that is not there");
      const std::int64_t size = request.piece_bytes[static_cast<std::size_t>(segment.piece)];
      require(
          segment.piece_offset >= 0 && segment.piece_offset <= size && segment.length <= size - segment.piece_offset,
          "segment outside of its piece");
      require(segment.memory >= kDiscard, "segment in unknown memory");
      require(segment.memory != kDiscard || !request.write, "nothing can be written from discarded memory");
      if (segment.memory == kDiscard || segment.memory == kLent) continue;
      require(segment.address > 0 && segment.address <= most - segment.length, "segment without an address");
      require(segment.memory == kHost || std::any_of(request.streams.begin(), request.streams.end(),
                                                     [&segment](const auto& s) { return s.first == segment.memory; }),
              "segment on a device without a stream");
    }
  }
}

// The page cache lets one writer at a time into a file (the inode's lock). Two keep it busy, one copying while the
// other writes; more would spin at the lock.
constexpr std::size_t kWritersAFile = 2;

// The order in which blocks are written through the page cache: as many files as there are workers take turns.
std::vector<std::size_t> in_turns(const std::vector<Block>& blocks, std::size_t files, std::size_t workers) {
  std::vector<std::size_t> order(blocks.size()), turn(blocks.size()), seen(files);
  for (std::size_t n = 0; n < blocks.size(); ++n) {
    order[n] = n;
    turn[n] = seen[static_cast<std::size_t>(blocks[n].file)]++;
  }
  const auto place = [&](std::size_t n) {
    return std::make_pair(static_cast<std::size_t>(blocks[n].file) / workers, turn[n]);
  };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return place(a) < place(b); });
  return order;
}

class Run {
 public:
  Run(const Request& request, const Hooks& hooks)
      : request_(request), hooks_(hooks), sums_(request.checksum ? request.piece_bytes.size() : 0) {
    for (std::size_t n = 0; n < request.files.size(); ++n) {
      files_.emplace_back(static_cast<int>(n), request.files[n]);
      files_.back().prepare(request.access);
    }
    const bool through_cache =
        std::none_of(files_.begin(), files_.end(), [](const File& file) { return file.direct(); });
    host_ = make_host_device(through_cache);
    const std::size_t wanted = std::max<std::size_t>(1, std::min(request.workers, request.blocks.size()));
    const int pin_for = request.streams.empty() ? -1 : request.streams.front().first;
    ring_ = Ring::shared(slots_for(pin_for), request.slot_bytes, pin_for);
    workers_ = std::min(wanted, ring_->slots());
    if (request.write && through_cache) {
      if (only_host(0, request.segments.size())) workers_ = std::min(workers_, kWritersAFile * request.files.size());
      order_ = in_turns(request.blocks, request.files.size(), workers_);
    }
    held_.reserve(workers_);
    for (const auto& [ordinal, stream] : request.streams) {
      cuda_[ordinal] = make_cuda_device(ordinal, stream, ring_->slots());
    }
  }

  Result run() {
    std::vector<std::thread> threads;
    try {
      for (std::size_t n = 0; n < workers_; ++n) threads.emplace_back([this] { work(false); });
    } catch (const std::exception&) {
      // No thread to be had, or no memory for one: fewer than wanted, or none, and then this thread does the work.
    }
    try {
      if (threads.empty()) {
        work(true);
      } else {
        wait(threads.size());
      }
    } catch (...) {
      fail(std::current_exception());
    }
    for (std::thread& thread : threads) thread.join();
    // Copies still in flight on a slot of a failed worker end here, before the slot can go to another run.
    cuda_.clear();
    if (error_) std::rethrow_exception(error_);
    hooks_.tick(done_);
    return result();
  }

 private:
  void wait(std::size_t threads) {
    std::unique_lock<std::mutex> hold(mutex_);
    while (ended_ < threads) {
      worker_ended_.wait_for(hold, kTickInterval);
      hold.unlock();
      if (!stop_) hooks_.tick(done_);
      hold.lock();
    }
  }

  void work(bool inline_work) {
    try {
      for (auto& [ordinal, device] : cuda_) device->enter_thread();
      const auto stop = [this] { return stop_.load(); };
      for (std::size_t n; !stop_ && (n = next_++) < request_.blocks.size();) {
        Slot slot = ring_->take(stop);
        if (!slot) break;
        try {
          move(order_.empty() ? n : order_[n], slot);
        } catch (...) {
          keep(std::move(slot));
          throw;
        }
        if (inline_work) hooks_.tick(done_);
      }
    } catch (...) {
      fail(std::current_exception());
    }
    std::lock_guard<std::mutex> hold(mutex_);
    ++ended_;
    worker_ended_.notify_one();
  }

  // A slot with copies perhaps in flight is held until the devices are closed.
  void keep(Slot slot) {
    std::lock_guard<std::mutex> hold(mutex_);
    held_.push_back(std::move(slot));
  }

  void move(std::size_t n, Slot& slot) {
    const Block& block = request_.blocks[n];
    const std::size_t last = n + 1 < request_.blocks.size()
                                 ? static_cast<std::size_t>(request_.blocks[n + 1].first_segment)
                                 : request_.segments.size();
    const auto first = static_cast<std::size_t>(block.first_segment);
    File& file = files_[static_cast<std::size_t>(block.file)];
    const auto length = static_cast<std::size_t>(block.length);
    const Segment& final = request_.segments[last - 1];
    const auto end = static_cast<std::size_t>(final.at + final.length);
    if (only_host(first, last) && !file.direct()) {
      move_through_cache(block, first, last, end, file, slot);
    } else if (request_.write) {
      transfer(Direction::to_slot, first, last, slot.memory(), 0, length, slot);
      fill_gaps(first, last, slot.memory(), length);
      file.write_at(slot.memory(), length, static_cast<std::uint64_t>(block.offset));
    } else {
      file.read_at(slot.memory(), length, end, static_cast<std::uint64_t>(block.offset));
      transfer(Direction::from_slot, first, last, slot.memory(), 0, length, slot);
    }
    // Direct I/O is asked for where an fsync will follow.
    if (request_.write && request_.access == Access::direct && !file.direct()) {
      file.start_writeback(static_cast<std::uint64_t>(block.offset), length);
    }
    for (std::size_t s = first; s < last; ++s) done_ += static_cast<std::uint64_t>(request_.segments[s].length);
  }

  bool only_host(std::size_t first, std::size_t last) const {
    return std::all_of(request_.segments.begin() + static_cast<std::ptrdiff_t>(first),
                       request_.segments.begin() + static_cast<std::ptrdiff_t>(last),
                       [](const Segment& segment) { return segment.memory == kHost || segment.memory == kDiscard; });
  }

  // The same in small steps, each in the first part of the slot, which so stays in the processor's cache.
  void move_through_cache(const Block& block, std::size_t first, std::size_t last, std::size_t end, File& file,
                          Slot& slot) {
    const auto length = static_cast<std::size_t>(block.length);
    for (std::size_t from = 0; from < length && !stop_; from += kCachedStep) {
      const std::size_t step = std::min(kCachedStep, length - from);
      const auto offset = static_cast<std::uint64_t>(block.offset) + from;
      if (request_.write) {
        transfer(Direction::to_slot, first, last, slot.memory(), from, step, slot);
        if (from + step > end) {
          const std::size_t zeros = std::max(end, from) - from;
          std::memset(slot.memory() + zeros, 0, step - zeros);
        }
        file.write_at(slot.memory(), step, offset);
      } else if (from < end) {
        file.read_at(slot.memory(), step, std::min(step, end - from), offset);
        transfer(Direction::from_slot, first, last, slot.memory(), from, step, slot);
      }
    }
  }

  // Moves what of the segments lies between `from` and `from + span` of the block, which is in memory at `window`.
  void transfer(Direction direction, std::size_t first, std::size_t last, std::byte* window, std::size_t from,
                std::size_t span, Slot& slot) {
    bool submitted = false;
    for (std::size_t s = first; s < last; ++s) {
      const Segment& segment = request_.segments[s];
      const auto at = static_cast<std::size_t>(segment.at), until = at + static_cast<std::size_t>(segment.length);
      if (until <= from || at >= from + span) continue;
      const std::size_t begin = std::max(at, from), length = std::min(until, from + span) - begin;
      const auto into = static_cast<std::int64_t>(begin - at);
      std::byte* memory = window + (begin - from);
      const bool saving = direction == Direction::to_slot;
      if (segment.memory == kHost) {
        std::uint64_t sum = 0;
        host_->submit(direction, memory, static_cast<std::uint64_t>(segment.address + into), length, slot.index(),
                      request_.checksum, &sum);
        if (request_.checksum) add(segment, segment.piece_offset + into, length, sum);
        continue;
      }
      if (segment.memory >= 0) {
        std::uint64_t unused;
        cuda_.at(static_cast<int>(segment.memory))
            ->submit(direction, memory, static_cast<std::uint64_t>(segment.address + into), length, slot.index(), false,
                     &unused);
        submitted = true;
      }
      if (!saving) add_from(segment, segment.piece_offset + into, memory, length);  // while it is copied to a device
      if (segment.memory == kLent) {
        hooks_.lend(segment.piece, segment.piece_offset + into, memory, length);
        if (saving) add_from(segment, segment.piece_offset + into, memory, length);
      }
    }
    if (!submitted) return;
    for (auto& [ordinal, device] : cuda_) device->complete(slot.index());
    if (direction == Direction::from_slot) return;
    for (std::size_t s = first; s < last; ++s) {
      const Segment& segment = request_.segments[s];
      if (segment.memory >= 0) {
        add_from(segment, segment.piece_offset, window + segment.at, static_cast<std::size_t>(segment.length));
      }
    }
  }

  void fill_gaps(std::size_t first, std::size_t last, std::byte* memory, std::size_t length) {
    std::size_t end = 0;
    for (std::size_t s = first; s < last; ++s) {
      const Segment& segment = request_.segments[s];
      const auto at = static_cast<std::size_t>(segment.at);
      std::memset(memory + end, 0, at - end);
      end = at + static_cast<std::size_t>(segment.length);
    }
    std::memset(memory + end, 0, length - end);
  }

  void add_from(const Segment& segment, std::int64_t piece_offset, const std::byte* memory, std::size_t length) {
    if (request_.checksum) add(segment, piece_offset, length, crc64_raw(memory, length));
  }

  void add(const Segment& segment, std::int64_t piece_offset, std::size_t length, std::uint64_t sum) {
    const auto piece = static_cast<std::size_t>(segment.piece);
    const std::int64_t behind = request_.piece_bytes[piece] - piece_offset - static_cast<std::int64_t>(length);
    sums_[piece].fetch_xor(crc64_shift(sum, static_cast<std::uint64_t>(behind)), std::memory_order_relaxed);
  }

  void fail(std::exception_ptr error) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (!error_) error_ = error;
    stop_ = true;
  }

  Result result() const {
    Result made;
    for (std::size_t piece = 0; piece < sums_.size(); ++piece) {
      made.sums.push_back(crc64_finish(sums_[piece], static_cast<std::uint64_t>(request_.piece_bytes[piece])));
    }
    for (const File& file : files_) made.direct.push_back(file.reported_direct());
    made.staging_bytes = ring_->bytes();
    made.pinned = ring_->pinned() && !request_.streams.empty();
    if (std::string note = ring_->note(); !note.empty() && !request_.streams.empty()) made.notes.push_back(note);
    return made;
  }

  const Request& request_;
  const Hooks& hooks_;
  std::deque<File> files_;
  std::unique_ptr<Device> host_;
  std::shared_ptr<Ring> ring_;
  std::size_t workers_ = 1;
  std::vector<std::size_t> order_;  // of the blocks, where it is not their own
  std::vector<std::atomic<std::uint64_t>> sums_;
  std::atomic<std::size_t> next_{0};
  std::atomic<std::uint64_t> done_{0};
  std::atomic<bool> stop_{false};

  std::mutex mutex_;  // guards ended_, error_ and held_
  std::condition_variable worker_ended_;
  std::size_t ended_ = 0;
  std::exception_ptr error_;
  std::vector<Slot> held_;
  std::map<int, std::unique_ptr<Device>> cuda_;  // after held_: devices are closed before their slots are given back
};

// What is thrown inside, as the Fault that callers know.
template <class Action>
auto faults_only(Action action) {
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
  check(request);
  return faults_only([&] { return Run(request, hooks).run(); });
}

std::size_t reserve_staging(std::size_t slot_bytes, int pin_for) {
  return faults_only([&] { return Ring::shared(slots_for(pin_for), slot_bytes, pin_for)->bytes(); });
}

}  // namespace shardsave
