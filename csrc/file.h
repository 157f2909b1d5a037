// An open file as the engine uses it: whole reads and writes at an offset, past the page cache where the file system
// can do that and through it where it cannot.
//
// Threads: choose() is called by one thread before any other call and reset() after all of them; write(), read() and
// direct() may be called by many threads at once. The descriptor stays the caller's: it is neither opened nor closed
// here, and its flags are given back by reset() as they were found.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace shardsave {

// Memory, offset and length of a direct operation are multiples of this many bytes: the most that we ever ask to be
// enough (open(2), statx(2)). A file that wants more is read and written through the cache.
constexpr std::size_t kAlignment = 4096;

enum class Access {
  automatic,  // for reading: through the cache when the range is in it, else direct
  buffered,
  direct,
};

// A system call that failed, or did what it must not (then `error` is 0 and `detail` says what).
struct FileError {
  std::string call;
  int error;
  std::uint64_t offset;
  std::uint64_t length;
  std::string detail;
};

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  // Decides how the bytes from `begin` to `end` will be read or written. Throws FileError.
  void choose(Access access, std::uint64_t begin, std::uint64_t end);

  // Writes all `length` bytes. Everything is aligned (see kAlignment). Throws FileError.
  void write(const std::byte* data, std::size_t length, std::uint64_t offset);

  // Reads `length` bytes, of which at least the first `needed` must be there: the file may end in the rest, which is
  // then undefined. Everything but `needed` is aligned. Throws FileError, also when the file ends too early.
  void read(std::byte* data, std::size_t length, std::uint64_t offset, std::size_t needed);

  // Whether transfers go past the cache at this moment; a refused one turns that off for good.
  bool direct() const { return direct_.load(std::memory_order_relaxed); }

  // Whether they do and the file system says so itself. tmpfs takes O_DIRECT and means nothing by it.
  bool reported_direct() const { return direct() && reported_; }

  // Gives the descriptor its flags back. Does not fail.
  void reset() noexcept;

 private:
  bool turn_direct_on();
  void fall_back();

  const int descriptor_;
  int flags_ = -1;  // as found by choose(); -1 before it
  bool reported_ = false;
  std::atomic<bool> direct_{false};
};

// Whether every page of the file from `begin` to `end` is in the page cache, as far as the kernel tells: a refusal to
// tell is a no.
bool in_page_cache(int descriptor, std::uint64_t begin, std::uint64_t end);

}  // namespace shardsave
