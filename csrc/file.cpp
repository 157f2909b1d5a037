#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

#include "mutex.h"

namespace shardsave {
namespace {

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x00002000U
#endif

// The kernel's layout of struct statx up to stx_dio_offset_align (linux/stat.h); that of older C libraries ends
// earlier.
struct StatxTail {
  alignas(8) unsigned char before[0x98];
  std::uint32_t memory_alignment;
  std::uint32_t offset_alignment;
  unsigned char after[0x60];
};
static_assert(sizeof(StatxTail) == 256);

enum class Support { unknown, refused, reported };

// What the file system reports about direct I/O; unknown on kernels before 6.1.
Support direct_support(int descriptor) {
  StatxTail answer{};
  if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, reinterpret_cast<struct statx*>(&answer)) != 0) {
    return Support::unknown;
  }
  std::uint32_t mask;
  __builtin_memcpy(&mask, answer.before, sizeof mask);
  if ((mask & STATX_DIOALIGN) == 0) return Support::unknown;
  if (answer.memory_alignment == 0 || answer.offset_alignment == 0) return Support::refused;
  const bool fits = answer.memory_alignment <= kAlignment && answer.offset_alignment <= kAlignment;
  return fits ? Support::reported : Support::refused;
}

// Whether so much of a file is in the page cache that reading through the cache is faster. The kernel may have evicted
// a few pages of a file that was read a moment ago; a missing page costs some seven times as much through the cache as
// past it, so a sixteenth of the pages may be missing. cachestat(2) may be refused to a user who neither owns the file
// nor may write to it; after any error a few pages are read without waiting instead (preadv2(2), RWF_NOWAIT).
bool mostly_cached(int descriptor) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || status.st_size == 0) return false;
  const auto size = static_cast<std::uint64_t>(status.st_size);
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
  struct {
    std::uint64_t offset, length;
  } range{0, 0};
  struct {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } pages_by_state{};
  const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  if (syscall(SYS_cachestat, descriptor, &range, &pages_by_state, 0) == 0) {
    const std::uint64_t pages = (size + page - 1) / page;
    return pages_by_state.cached >= pages - pages / 16;
  }
#ifdef RWF_NOWAIT
  constexpr std::uint64_t kProbes = 32;
  for (std::uint64_t probe = 0; probe < kProbes; ++probe) {
    char byte;
    struct iovec one = {&byte, 1};
    if (preadv2(descriptor, &one, 1, static_cast<off_t>((size - 1) / kProbes * probe), RWF_NOWAIT) != 1) return false;
  }
  return true;
#else
  return false;
#endif
}

std::size_t round_down(std::size_t length) { return length / kAlignment * kAlignment; }

}  // namespace

void File::prepare(Access access) {
  const int flags = fcntl(descriptor_, F_GETFL);
  if (flags < 0) throw Fault{index_, "fcntl", errno, 0, 0, ""};
  const bool wanted = access == Access::direct || (access == Access::automatic && !mostly_cached(descriptor_));
  const Support support = wanted ? direct_support(descriptor_) : Support::refused;
  if (support == Support::refused) {
    if ((flags & O_DIRECT) != 0) fcntl(descriptor_, F_SETFL, flags & ~O_DIRECT);
    return;
  }
  direct_ = fcntl(descriptor_, F_SETFL, flags | O_DIRECT) == 0;
  reported_ = support == Support::reported;
}

// Turns O_DIRECT off, since some file systems accept the flag and refuse the call. Several workers may come here at
// once: the first one turns it off. Returns false when that fails.
bool File::fall_back() {
  static Mutex one_at_a_time;
  MutexLock hold(one_at_a_time);
  if (!direct_) return true;
  const int flags = fcntl(descriptor_, F_GETFL);
  if (flags < 0 || fcntl(descriptor_, F_SETFL, flags & ~O_DIRECT) != 0) return false;
  direct_ = false;
  return true;
}

void File::write_at(const std::byte* memory, std::size_t length, std::uint64_t offset) {
  std::size_t done = 0;
  while (done < length) {
    const bool was_direct = direct();
    const ssize_t count = pwrite(descriptor_, memory + done, length - done, static_cast<off_t>(offset + done));
    if (count > 0) {
      auto moved = static_cast<std::size_t>(count);
      if (was_direct && done + moved < length) {
        moved = round_down(moved);  // the rest must start aligned; bytes that are written twice are the same
        if (moved == 0 && !fall_back()) throw Fault{index_, "fcntl", errno, offset + done, length - done, ""};
      }
      done += moved;
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EINVAL && was_direct && fall_back()) continue;
    throw Fault{index_, "pwrite", count < 0 ? errno : ENOSPC, offset + done, length - done, ""};
  }
}

void File::start_writeback(std::uint64_t offset, std::size_t length) {
  sync_file_range(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(length), SYNC_FILE_RANGE_WRITE);
}

void File::read_at(std::byte* memory, std::size_t length, std::size_t needed, std::uint64_t offset) {
  std::size_t done = 0;
  while (done < needed) {
    const bool was_direct = direct();
    const ssize_t count = pread(descriptor_, memory + done, length - done, static_cast<off_t>(offset + done));
    if (count > 0) {
      const std::size_t reached = done + static_cast<std::size_t>(count);
      if (reached >= needed) return;
      const std::size_t aligned = was_direct ? round_down(reached) : reached;
      if (aligned == done && !fall_back()) throw Fault{index_, "fcntl", errno, offset + done, length - done, ""};
      done = aligned;
      continue;
    }
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EINVAL && was_direct && fall_back()) continue;
    if (count == 0) throw Fault{index_, "pread", 0, offset + done, needed - done, "the file ends here"};
    throw Fault{index_, "pread", errno, offset + done, length - done, ""};
  }
}

}  // namespace shardsave
