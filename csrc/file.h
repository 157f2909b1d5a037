// Reading and writing a descriptor at offsets, past the page cache or through it.
//
// Threads: any number of workers may call write_at and read_at on one File at once; prepare_* is called before they
// start.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace shardsave {

// What O_DIRECT asks for at most: memory, offset and length are multiples of this (open(2), NOTES).
constexpr std::size_t kAlignment = 4096;

// A call that failed. `file` is the place in the run's list, -1 where no file is concerned; `number` is errno, or 0
// where `detail` says it all.
struct Fault {
  int file = -1;
  std::string call;
  int number = 0;
  std::uint64_t offset = 0;
  std::uint64_t length = 0;
  std::string detail;
};

enum class Access { buffered, direct, automatic };

class File {
 public:
  File(int place, int descriptor) : place_(place), descriptor_(descriptor) {}

  // Turns O_DIRECT on where it is wanted and the file system has it. Automatic: only for a file that is not
  // (almost) wholly cached.
  void prepare(Access access);

  // Whole lengths or a Fault. In direct mode `memory`, `offset` and `length` are aligned.
  void write_at(const std::byte* memory, std::size_t length, std::uint64_t offset);

  // Lets the disk begin with what was written here through the page cache (sync_file_range(2)), so that the fsync to
  // come, which no signal ends, is short. An error means nothing: only fsync says what is on disk.
  void start_writeback(std::uint64_t offset, std::size_t length);

  // At least `needed` of `length` bytes: the rest may lie behind the end of the file.
  void read_at(std::byte* memory, std::size_t length, std::size_t needed, std::uint64_t offset);

  // Whether O_DIRECT is on; false again when the first direct call was refused.
  bool direct() const { return direct_.load(std::memory_order_relaxed); }

  // Whether the file system says that direct means direct (statx STATX_DIOALIGN); tmpfs takes the flag and ignores it.
  bool reported_direct() const { return direct() && reported_; }

 private:
  bool fall_back();

  int place_;
  int descriptor_;
  std::atomic<bool> direct_{false};
  bool reported_ = false;
};

}  // namespace shardsave
