#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace shardsave {

static_assert(sizeof(off_t) == 8, "offsets beyond 2 GiB");

namespace {

enum class DirectSupport { unknown, none, usable };

// What statx(2) says of direct I/O on this file. The two fields are younger than many C libraries, so they are taken
// from their place in the kernel's structure (linux/stat.h: stx_dio_mem_align at 152, stx_dio_offset_align at 156).
DirectSupport direct_support(int descriptor) {
  constexpr unsigned kStatxDioalign = 0x2000;
  struct statx status;
  std::memset(&status, 0, sizeof status);
  if (statx(descriptor, "", AT_EMPTY_PATH, kStatxDioalign, &status) != 0) return DirectSupport::unknown;
  if ((status.stx_mask & kStatxDioalign) == 0) return DirectSupport::unknown;
  std::uint32_t alignment[2];
  static_assert(sizeof status >= 160);
  std::memcpy(alignment, reinterpret_cast<const std::byte*>(&status) + 152, sizeof alignment);
  for (const std::uint32_t wanted : alignment) {
    if (wanted == 0 || kAlignment % wanted != 0) return DirectSupport::none;
  }
  return DirectSupport::usable;
}

bool refuses_direct(int error) { return error == EINVAL || error == EOPNOTSUPP; }

}  // namespace

void File::choose(Access access, std::uint64_t begin, std::uint64_t end) {
  flags_ = fcntl(descriptor_, F_GETFL);
  if (flags_ == -1) throw FileError{"fcntl", errno, 0, 0, "F_GETFL"};
  // A descriptor that comes with O_DIRECT is only used through the cache without it: the probes below need that too.
  if ((flags_ & O_DIRECT) != 0 && fcntl(descriptor_, F_SETFL, flags_ & ~O_DIRECT) == -1) {
    throw FileError{"fcntl", errno, 0, 0, "F_SETFL without O_DIRECT"};
  }
  if (access == Access::automatic) {
    access = in_page_cache(descriptor_, begin, end) ? Access::buffered : Access::direct;
  }
  direct_ = access == Access::direct && turn_direct_on();
}

bool File::turn_direct_on() {
  const DirectSupport support = direct_support(descriptor_);
  if (support == DirectSupport::none) return false;
  // Kernels before 6.1 report nothing for any file system: there O_DIRECT is used where it is taken, not claimed.
  reported_ = support == DirectSupport::usable;
  return fcntl(descriptor_, F_SETFL, flags_ | O_DIRECT) == 0;
}

// Other threads may be in a direct call or begin one that they think direct: their aligned calls are right either way.
void File::fall_back() {
  if (fcntl(descriptor_, F_SETFL, flags_ & ~O_DIRECT) == -1) {
    throw FileError{"fcntl", errno, 0, 0, "F_SETFL without O_DIRECT"};
  }
  direct_ = false;
}

void File::reset() noexcept {
  if (flags_ == -1) return;
  const int now = fcntl(descriptor_, F_GETFL);
  if (now != -1 && ((now ^ flags_) & O_DIRECT) != 0) (void)fcntl(descriptor_, F_SETFL, flags_);
}

void File::write(const std::byte* data, std::size_t length, std::uint64_t offset) {
  std::size_t done = 0;
  while (done < length) {
    const bool direct = this->direct();
    const ssize_t count = pwrite(descriptor_, data + done, length - done, static_cast<off_t>(offset + done));
    if (count < 0) {
      const int error = errno;
      if (error == EINTR) continue;
      if (direct && refuses_direct(error)) {
        fall_back();
        continue;
      }
      throw FileError{"pwrite", error, offset + done, length - done, ""};
    }
    std::size_t kept = static_cast<std::size_t>(count);
    if (done + kept < length) {
      if (count == 0) throw FileError{"pwrite", 0, offset + done, length - done, "it wrote nothing"};
      // A direct call must begin aligned: what lies past the last whole unit is written again.
      if (direct) kept -= (done + kept) % kAlignment;
      if (kept == 0) fall_back();  // less than a unit: only the cache can go on from there
    }
    done += kept;
  }
}

void File::read(std::byte* data, std::size_t length, std::uint64_t offset, std::size_t needed) {
  std::size_t done = 0;
  while (done < needed) {
    const bool direct = this->direct();
    const ssize_t count = pread(descriptor_, data + done, length - done, static_cast<off_t>(offset + done));
    if (count < 0) {
      const int error = errno;
      if (error == EINTR) continue;
      if (direct && refuses_direct(error)) {
        fall_back();
        continue;
      }
      throw FileError{"pread", error, offset + done, length - done, ""};
    }
    std::size_t kept = static_cast<std::size_t>(count);
    if (done + kept < needed) {
      if (count == 0) {
        throw FileError{"pread", 0, offset + done, needed - done, "the file ends here"};
      }
      if (direct) kept -= (done + kept) % kAlignment;
      if (kept == 0) fall_back();
    }
    done += kept;
  }
}

bool in_page_cache(int descriptor, std::uint64_t begin, std::uint64_t end) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || status.st_size < 0) return false;
  end = std::min(end, static_cast<std::uint64_t>(status.st_size));
  if (begin >= end) return true;

  // cachestat(2), Linux 6.5; its number is the same on every architecture but Alpha. glibc has no wrapper yet.
  constexpr long kCachestat = 451;
  struct {
    std::uint64_t offset, length;
  } range{begin, end - begin};
  struct {
    std::uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } found{};
  if (syscall(kCachestat, descriptor, &range, &found, 0U) == 0) {
    const auto page = static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
    return found.cached >= (end + page - 1) / page - begin / page;
  }

  // An older kernel, or a file that is not ours (EPERM): reads that must not wait, spread over the range.
  constexpr std::uint64_t kProbes = 64;
  for (std::uint64_t probe = 0; probe <= kProbes; ++probe) {
    const std::uint64_t at = begin + (end - 1 - begin) / kProbes * probe;
    std::byte byte;
    iovec target{&byte, 1};
    if (preadv2(descriptor, &target, 1, static_cast<off_t>(at), RWF_NOWAIT) != 1) return false;
  }
  return true;
}

}  // namespace shardsave
