// Reads and writes a descriptor at offsets, past the page cache or through it.
//
// Threads: any number of workers may use one File at once; prepare() is called before they start.
// Ownership: the caller owns the descriptor. Its O_DIRECT flag may differ after a run.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace shardsave {

// The strictest alignment that O_DIRECT may require: memory, offset and length are multiples of it (open(2), NOTES).
constexpr std::size_t kAlignment = 4096;

// A failed call. `file` is an index into the run's list of files, or -1 for a call on no file. `number` is errno, or 0
// when `detail` describes the failure.
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
  // `index` is the one that a Fault names.
  File(int index, int descriptor) : index_(index), descriptor_(descriptor) {}

  // Turns O_DIRECT on if `access` asks for it and the file system supports it, otherwise off. Automatic: on for a file
  // that is not (almost) wholly cached.
  void prepare(Access access);

  // Writes all `length` bytes or throws a Fault. In direct mode `memory`, `offset` and `length` are aligned.
  void write_at(const std::byte* memory, std::size_t length, std::uint64_t offset);

  // Starts to write to the disk what the page cache holds of this range (sync_file_range(2)), so that the later fsync,
  // which no signal interrupts, is short. Errors are ignored: only fsync tells what is on the disk.
  void start_writeback(std::uint64_t offset, std::size_t length);

  // Reads at least `needed` of `length` bytes, or throws a Fault; the rest may lie after the end of the file.
  void read_at(std::byte* memory, std::size_t length, std::size_t needed, std::uint64_t offset);

  // Whether O_DIRECT is on; false again after a direct call was refused.
  bool direct() const { return direct_.load(std::memory_order_relaxed); }

  // Whether the file system reports support for direct I/O (statx STATX_DIOALIGN); tmpfs accepts the flag and ignores
  // it.
  bool reported_direct() const { return direct() && reported_; }

 private:
  bool fall_back();

  const int index_;
  const int descriptor_;
  std::atomic<bool> direct_{false};
  bool reported_ = false;  // set by prepare()
};

}  // namespace shardsave
