// Method: random schedules of the core without Python: blocks with and without gaps, workers, lent and host memory,
// cancelled and failing runs, several at once. What was written is read back and compared byte for byte and sum for
// sum; gaps must be zeros. A thread changes every piece as soon as all of it was taken. The same bytes are gathered
// into memory, and written from windows and from still memory. Under ASan, UBSan and TSan. Usage: driver COUNT [SEED]
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "crc64.h"
#include "engine.h"
#include "ring.h"

using namespace shardsave;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

namespace {

struct Stop {};

constexpr std::size_t kSlotBytes = 64 * 1024;
constexpr auto kBlock = static_cast<std::int64_t>(kSlotBytes);

using Pieces = std::vector<std::vector<std::byte>>;

std::int64_t address_of(const std::vector<std::byte>& memory) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory.data()));
}

// One file, the pieces that a run writes to it, and a run that may be told to fail. For one thread.
class Schedule {
 public:
  Schedule(std::uint64_t seed, int file) : random_(seed), file_(file) {
    request_.files = {file};
    request_.workers = 1 + below(6);
    request_.copiers = below(4);
    request_.slot_bytes = kSlotBytes;
    request_.access = below(2) == 0 ? Access::direct : Access::buffered;
    request_.write = true;
    const bool with_gaps = below(2) == 0;
    pieces_.resize(1 + below(6));
    for (std::vector<std::byte>& piece : pieces_) {
      piece.resize(1 + below(200'000));
      for (std::byte& byte : piece) byte = static_cast<std::byte>(random_());
      if (with_gaps) end_ += static_cast<std::int64_t>(below(2 * kSlotBytes));
      add_segments(piece, below(3) == 0 ? kLent : kHost);
    }
    live_ = pieces_;
    taken_.resize(pieces_.size());
  }

  void run_and_compare() {
    const int failing_lend = below(4) == 0 ? static_cast<int>(below(6)) : -1;
    const bool cancelled = below(5) == 0;
    Result written;
    try {
      written = write(failing_lend, cancelled);
    } catch (const Stop&) {
      CHECK(cancelled || failing_lend >= 0);
      return;
    }
    compare_file();
    gather(written);
    write_from_windows(written);
    write_still();
    read_back(written);
  }

 private:
  std::size_t below(std::uint64_t bound) { return static_cast<std::size_t>(random_() % bound); }

  // Adds the piece at the end of the file: a segment for each block that it reaches.
  void add_segments(const std::vector<std::byte>& piece, std::int64_t memory) {
    const auto number = static_cast<std::int64_t>(request_.piece_bytes.size());
    const auto size = static_cast<std::int64_t>(piece.size());
    request_.piece_bytes.push_back(size);
    for (std::int64_t offset = 0; offset < size;) {
      const std::int64_t block_start = end_ / kBlock * kBlock;
      if (request_.blocks.empty() || request_.blocks.back().offset != block_start) {
        request_.blocks.push_back({0, block_start, kBlock, static_cast<std::int64_t>(request_.segments.size())});
      }
      const std::int64_t length = std::min(size - offset, block_start + kBlock - end_);
      request_.segments.push_back({memory, 0, length, end_ - block_start, number, offset});
      offset += length;
      end_ += length;
    }
  }

  // Makes `memory` that from which, or to which, segments in host memory move.
  void set_addresses(const Pieces& memory) {
    for (Segment& segment : request_.segments) {
      if (segment.memory != kHost) continue;
      segment.address = address_of(memory[static_cast<std::size_t>(segment.piece)]) + segment.piece_offset;
    }
  }

  // Overwrites each piece once it has been taken; returns when all have been, or the run has ended.
  void overwrite_taken(const std::atomic<bool>& ended) {
    std::vector<bool> overwritten(live_.size());
    while (!ended && std::count(overwritten.begin(), overwritten.end(), false) > 0) {
      for (std::size_t piece = 0; piece < live_.size(); ++piece) {
        const std::int64_t taken = __atomic_load_n(&taken_[piece], __ATOMIC_ACQUIRE);
        CHECK(taken >= 0 && taken <= request_.piece_bytes[piece]);
        if (overwritten[piece] || taken < request_.piece_bytes[piece]) continue;
        std::fill(live_[piece].begin(), live_[piece].end(), std::byte{0});
        overwritten[piece] = true;
      }
      std::this_thread::yield();
    }
  }

  Result write(int failing_lend, bool cancelled) {
    std::atomic<bool> ended{false};
    std::thread overwriting([&] { overwrite_taken(ended); });
    set_addresses(live_);
    request_.taken = taken_.data();
    try {
      const Result written = run_write(failing_lend, cancelled);
      ended = true;
      overwriting.join();
      CHECK(taken_ == request_.piece_bytes);
      request_.taken = nullptr;
      return written;
    } catch (const Stop&) {
      ended = true;
      overwriting.join();
      throw;
    }
  }

  Result run_write(int failing_lend, bool cancelled) {
    std::atomic<int> lends{0};
    Hooks hooks;
    hooks.tick = [cancelled](std::uint64_t) {
      if (cancelled) throw Stop{};
    };
    hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
      if (lends++ == failing_lend) throw Stop{};
      std::memcpy(slot, live_[static_cast<std::size_t>(piece)].data() + offset, length);
    };
    return run(request_, hooks);
  }

  // Gathers the pieces into memory, and nowhere. Bytes between them must not change.
  void gather(const Result& written) {
    set_addresses(pieces_);
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* memory, std::size_t length) {
      std::memcpy(memory, pieces_[static_cast<std::size_t>(piece)].data() + offset, length);
    };
    constexpr std::byte kUntouched{0xAA};
    std::vector<std::byte> memory(static_cast<std::size_t>(end_), kUntouched), expected = memory;
    for (std::size_t number = 0; number < request_.blocks.size(); ++number) {
      for (const Segment& segment : request_.segments_of(number)) {
        const std::byte* source = pieces_[static_cast<std::size_t>(segment.piece)].data() + segment.piece_offset;
        std::memcpy(expected.data() + request_.blocks[number].offset + segment.at, source,
                    static_cast<std::size_t>(segment.length));
      }
    }
    Request gathering = request_;
    gathering.files.clear();
    gathering.into = Destination{memory.data(), memory.size()};
    CHECK(run(gathering, hooks).sums == written.sums);
    CHECK(memory == expected);
    gathering.into = Destination{};
    CHECK(run(gathering, hooks).sums == written.sums);
  }

  // Writes the file again from an image of it in memory that nobody changes; blocks with gaps are copied all the same.
  void write_still() {
    const auto size = static_cast<std::size_t>((end_ + kBlock - 1) / kBlock * kBlock);
    auto* const image = static_cast<std::byte*>(std::aligned_alloc(kAlignment, size));
    std::memset(image, 0x5A, size);  // in a gap this must not be written
    Request writing = request_;
    std::size_t block = 0;
    for (std::size_t n = 0; n < writing.segments.size(); ++n) {
      if (block + 1 < writing.blocks.size() &&
          writing.blocks[block + 1].first_segment == static_cast<std::int64_t>(n)) {
        ++block;
      }
      Segment& segment = writing.segments[n];
      std::byte* const place = image + writing.blocks[block].offset + segment.at;
      std::memcpy(place, pieces_[static_cast<std::size_t>(segment.piece)].data() + segment.piece_offset,
                  static_cast<std::size_t>(segment.length));
      const auto end = static_cast<std::size_t>(writing.blocks[block].offset + segment.at + segment.length);
      std::memset(image + end, 0, (kAlignment - end % kAlignment) % kAlignment);
      segment.memory = kStill;
      segment.address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(place));
    }
    CHECK(ftruncate(file_, 0) == 0);
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    run(writing, hooks);
    compare_file();
    std::free(image);
  }

  // Writes the file again: what was lent is now in windows, of which there are fewer than blocks.
  void write_from_windows(const Result& written) {
    Request writing = request_;
    for (std::size_t number = 0; number < writing.blocks.size(); ++number) {
      const Segments segments = request_.segments_of(number);
      writing.windowed.push_back(std::any_of(segments.begin(), segments.end(),
                                             [](const Segment& segment) { return segment.memory == kLent; }));
    }
    for (Segment& segment : writing.segments) {
      if (segment.memory == kLent) segment.memory = kWindow;
    }
    std::mutex mutex;
    std::vector<void*> free_windows;
    for (int n = 0; n < 3; ++n) free_windows.push_back(std::aligned_alloc(kAlignment, kSlotBytes));
    std::map<std::size_t, void*> taken_windows;
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    hooks.take_window = [&](std::size_t block) -> std::byte* {
      std::lock_guard<std::mutex> hold(mutex);
      if (free_windows.empty()) return nullptr;
      auto* const window = static_cast<std::byte*>(free_windows.back());
      free_windows.pop_back();
      taken_windows[block] = window;
      for (const Segment& segment : writing.segments_of(block)) {
        const std::byte* source = pieces_[static_cast<std::size_t>(segment.piece)].data() + segment.piece_offset;
        if (segment.memory == kWindow)
          std::memcpy(window + segment.at, source, static_cast<std::size_t>(segment.length));
      }
      return window;
    };
    hooks.give_window = [&](std::size_t block) {
      std::lock_guard<std::mutex> hold(mutex);
      free_windows.push_back(taken_windows.at(block));
      taken_windows.erase(block);
    };
    CHECK(ftruncate(file_, 0) == 0);
    CHECK(run(writing, hooks).sums == written.sums);
    CHECK(taken_windows.empty() && free_windows.size() == 3);
    for (void* window : free_windows) std::free(window);
    compare_file();
  }

  // Every block that was written has the bytes of its segments, and zeros elsewhere.
  void compare_file() const {
    // A descriptor of its own, without the O_DIRECT that a run leaves on the other one: it would require aligned
    // memory.
    const int reader = open(("/proc/self/fd/" + std::to_string(file_)).c_str(), O_RDONLY | O_CLOEXEC);
    CHECK(reader >= 0);
    for (std::size_t number = 0; number < request_.blocks.size(); ++number) {
      std::vector<std::byte> expected(kSlotBytes), content(kSlotBytes);
      for (const Segment& segment : request_.segments_of(number)) {
        const std::byte* source = pieces_[static_cast<std::size_t>(segment.piece)].data() + segment.piece_offset;
        std::memcpy(expected.data() + segment.at, source, static_cast<std::size_t>(segment.length));
      }
      CHECK(pread(reader, content.data(), kSlotBytes, request_.blocks[number].offset) == kBlock);
      CHECK(content == expected);
    }
    close(reader);
  }

  void read_back(const Result& written) {
    Pieces copies(pieces_.size());
    for (std::size_t piece = 0; piece < pieces_.size(); ++piece) {
      const std::size_t size = pieces_[piece].size();
      CHECK(written.sums[piece] == crc64_finish(crc64_raw(pieces_[piece].data(), size), size));
      copies[piece].resize(size);
    }
    request_.write = false;
    request_.access = Access::automatic;
    set_addresses(copies);
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
      std::memcpy(copies[static_cast<std::size_t>(piece)].data() + offset, slot, length);
    };
    CHECK(run(request_, hooks).sums == written.sums);
    CHECK(copies == pieces_);
    read_cut_file(hooks);
  }

  void read_cut_file(const Hooks& hooks) {
    CHECK(ftruncate(file_, end_ / 2) == 0);
    try {
      run(request_, hooks);
      CHECK(end_ / 2 == end_);
    } catch (const Fault& fault) {
      CHECK(fault.file == 0 && fault.call == "pread" && fault.number == 0);
    }
  }

  std::mt19937_64 random_;
  const int file_;
  Pieces pieces_;
  Pieces live_;  // what a write reads; changed once it was taken
  std::vector<std::int64_t> taken_;
  Request request_;
  std::int64_t end_ = 0;  // of the file
};

void run_schedule(std::uint64_t seed, const std::string& folder) {
  const std::string path = folder + "/schedule-" + std::to_string(seed);
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  CHECK(file >= 0);
  Schedule(seed, file).run_and_compare();
  close(file);
  unlink(path.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  const int schedules = count > 1 ? std::atoi(arguments[1]) : 100;
  const std::uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  char folder[] = "driver-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (int n = 0; n < 3; ++n) {
    threads.emplace_back([&] {
      for (int k; (k = next++) < schedules;) run_schedule(seed + static_cast<std::uint64_t>(k), folder);
    });
  }
  for (std::thread& thread : threads) thread.join();
  Ring::release();
  rmdir(folder);
  std::printf("%d schedules ok\n", schedules);
}
