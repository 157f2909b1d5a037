// Method: a library for LD_PRELOAD between the process and libc. It sees every call on the files of one folder, from
// the C++ core, Python's os module or ctypes. The N-th call can fail, be shortened, be interrupted, end the process, or
// cut the file system off from its disk; all fsyncs can be skipped; all calls can be recorded. Python uses it through
// faults/beneath.py.
//
// Threads: any. Recorded calls run under one lock, so the order of the records is that in which the calls took effect.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

// The values are those of Fate in faults/beneath.py.
enum fate {
  PASS,
  FAIL,
  FAIL_AFTER,
  SHORTEN,
  KILL,
  KILL_AFTER,
  INTERRUPT,
  INTERRUPT_AFTER,
  FAIL_FROM_HERE,
  CUT,
  NO_SYNC,
  STOP
};

static struct {
  char folder[PATH_MAX];     // empty: nothing is watched
  size_t length;             // of the folder's path
  atomic_long number, seen;  // of the call that meets `fate`; of the last call so far
  int fate, error;
  char hit[2 * PATH_MAX];  // the name and the path of the call that met `fate`
  int record;              // descriptor of the record, or -1
  int data;                // descriptor of the file for written bytes, or -1
  long data_length;
} plan = {.record = -1, .data = -1};

static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;

typedef struct {
  char path[PATH_MAX];
  int fate;
  bool recorded;
} Call;

static long raw(long number, long a, long b, long c, long d) {
  static long (*real)(long, ...);
  if (real == NULL) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  return real(number, a, b, c, d, 0L, 0L);
}

// Shuts the file system down with NOLOGFLUSH: changes that its journal has not committed are lost, and every later call
// fails.
static void cut(void) {
  unsigned no_log_flush = 2;
  const long shutdown = 0x8004587d;  // FS_IOC_SHUTDOWN, _IOR('X', 125, __u32)
  const long fd = raw(SYS_openat, AT_FDCWD, (long)plan.folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
  if (fd < 0 || raw(SYS_ioctl, fd, shutdown, (long)&no_log_flush, 0) != 0) abort();
  raw(SYS_close, fd, 0, 0, 0);
}

static bool path_of(int fd, char* path) {
  char link[32];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const int saved_errno = errno;
  const long length = raw(SYS_readlinkat, AT_FDCWD, (long)link, (long)path, PATH_MAX - 1);
  errno = saved_errno;
  if (length < 0) return false;
  path[length] = '\0';
  return true;
}

static bool inside(const char* path) {
  return strncmp(path, plan.folder, plan.length) == 0 && (path[plan.length] == '/' || path[plan.length] == '\0');
}

// Writes to `path` the absolute path of `name` relative to the descriptor `fd`; without a name, the path of `fd`.
static bool resolve(int fd, const char* name, char* path) {
  if (name == NULL || name[0] == '\0') return fd >= 0 && path_of(fd, path);
  if (name[0] == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
  if (fd == AT_FDCWD) {
    if (raw(SYS_getcwd, (long)path, PATH_MAX, 0, 0) <= 0) return false;
  } else if (!path_of(fd, path)) {
    return false;
  }
  const size_t length = strlen(path);
  return snprintf(path + length, PATH_MAX - length, "/%s", name) < (int)(PATH_MAX - length);
}

static bool begins(Call* call, const char* name, int fd, const char* path) {
  call->fate = PASS;
  call->recorded = false;
  if (plan.length == 0 || !resolve(fd, path, call->path) || !inside(call->path)) return false;
  const long place = atomic_fetch_add(&plan.seen, 1) + 1, number = atomic_load(&plan.number);
  if (plan.fate == FAIL_FROM_HERE && number > 0 && place > number) call->fate = FAIL;
  if (place == number) {
    call->fate = plan.fate == FAIL_FROM_HERE ? FAIL : plan.fate;
    snprintf(plan.hit, sizeof plan.hit, "%s %s", name, call->path);
    if (call->fate == KILL) raw(SYS_kill, getpid(), SIGKILL, 0, 0);
    if (call->fate == INTERRUPT) raw(SYS_kill, getpid(), SIGINT, 0, 0);
    if (call->fate == STOP) raw(SYS_kill, getpid(), SIGSTOP, 0, 0);
    if (call->fate == CUT) cut();
  }
  if (plan.record >= 0) {
    pthread_mutex_lock(&recording);
    call->recorded = true;
  }
  return true;
}

static bool refused(const Call* call) {
  if (call->fate == FAIL) errno = plan.error;
  return call->fate == FAIL;
}

// How many of `length` bytes a call may move; direct I/O requires whole sectors.
static size_t allowed(const Call* call, size_t length) {
  if ((call->fate != SHORTEN && call->fate != KILL_AFTER) || length < 2) return length;
  const size_t half = length / 2;
  return half >= 512 ? half / 512 * 512 : half;
}

// Ends a call and records it. Returns true when the call must report an error although it succeeded.
static bool ends(Call* call, const char* name, long result, bool failed, const char* other, long a, long b) {
  const int saved_errno = errno;
  if (call->recorded) {
    char line[3 * PATH_MAX];
    const int length = snprintf(line, sizeof line, "%s\t%ld\t%s\t%s\t%ld\t%ld\t%ld\n", name,
                                failed ? -saved_errno : result, call->path, other ? other : "", a, b, plan.data_length);
    if (raw(SYS_write, plan.record, (long)line, length, 0) != length) abort();
    pthread_mutex_unlock(&recording);
  }
  if (call->fate == KILL_AFTER) raw(SYS_kill, getpid(), SIGKILL, 0, 0);
  if (call->fate == INTERRUPT_AFTER) raw(SYS_kill, getpid(), SIGINT, 0, 0);
  errno = call->fate == FAIL_AFTER && !failed ? plan.error : saved_errno;
  return call->fate == FAIL_AFTER && !failed;
}

static void record_bytes(const Call* call, const void* data, ssize_t length) {
  if (!call->recorded || length <= 0) return;
  if (raw(SYS_write, plan.data, (long)data, length, 0) != length) abort();
  plan.data_length += length;
}

#define REAL(name) ((__typeof__(&name))real_function(#name))

static void* real_function(const char* name) {
  void* function = dlsym(RTLD_NEXT, name);
  if (function == NULL) abort();
  return function;
}

// Defines a watched function that returns `bad` on failure: WATCH(return type, name, parameters, arguments, bad,
// descriptor, path, other path, two numbers for the record). A call that returns a handle fails before it runs, never
// after: the caller would not know the handle and could not close it.
#define WATCH(type, name, parameters, arguments, bad, fd, path, other, a, b)                    \
  type name parameters {                                                                        \
    Call call;                                                                                  \
    if (!begins(&call, #name, fd, path)) return REAL(name) arguments;                           \
    if (sizeof(type) > sizeof(int) && call.fate == FAIL_AFTER) call.fate = FAIL; /* a handle */ \
    type result = refused(&call) ? bad : REAL(name) arguments;                                  \
    return ends(&call, #name, (long)result, result == bad, other, a, b) ? bad : result;         \
  }
#define ALSO_CALLED(name, other) __asm__(".globl " #other "\n.type " #other ", @function\n.set " #other ", " #name);

WATCH(int, rename, (const char* from, const char* to), (from, to), -1, AT_FDCWD, from, to, 0, 0)
WATCH(int, unlink, (const char* path), (path), -1, AT_FDCWD, path, NULL, 0, 0)
WATCH(int, unlinkat, (int fd, const char* path, int flags), (fd, path, flags), -1, fd, path, NULL, flags, 0)
WATCH(int, rmdir, (const char* path), (path), -1, AT_FDCWD, path, NULL, 0, 0)
WATCH(int, mkdir, (const char* path, mode_t mode), (path, mode), -1, AT_FDCWD, path, NULL, 0, 0)
WATCH(int, mkdirat, (int fd, const char* path, mode_t mode), (fd, path, mode), -1, fd, path, NULL, 0, 0)
WATCH(int, link, (const char* from, const char* to), (from, to), -1, AT_FDCWD, from, to, 0, 0)
WATCH(int, symlink, (const char* to, const char* path), (to, path), -1, AT_FDCWD, path, to, 0, 0)
WATCH(int, ftruncate, (int fd, off_t length), (fd, length), -1, fd, NULL, NULL, length, 0)
WATCH(int, fallocate, (int fd, int mode, off_t offset, off_t length), (fd, mode, offset, length), -1, fd, NULL, NULL,
      offset + length, mode)
WATCH(int, sync_file_range, (int fd, off_t offset, off_t length, unsigned flags), (fd, offset, length, flags), -1, fd,
      NULL, NULL, offset, length)
WATCH(int, flock, (int fd, int operation), (fd, operation), -1, fd, NULL, NULL, operation, 0)
WATCH(int, fstat, (int fd, struct stat* status), (fd, status), -1, fd, NULL, NULL, 0, 0)
WATCH(int, stat, (const char* path, struct stat* status), (path, status), -1, AT_FDCWD, path, NULL, 0, 0)
WATCH(int, lstat, (const char* path, struct stat* status), (path, status), -1, AT_FDCWD, path, NULL, 0, 0)
WATCH(int, fstatat, (int fd, const char* path, struct stat* status, int flags), (fd, path, status, flags), -1, fd, path,
      NULL, 0, 0)
WATCH(int, statx, (int fd, const char* path, int flags, unsigned mask, struct statx* status),
      (fd, path, flags, mask, status), -1, fd, path, NULL, 0, 0)
WATCH(int, fchmod, (int fd, mode_t mode), (fd, mode), -1, fd, NULL, NULL, mode, 0)
WATCH(int, fchown, (int fd, uid_t user, gid_t group), (fd, user, group), -1, fd, NULL, NULL, user, group)
WATCH(ssize_t, getxattr, (const char* path, const char* name, void* value, size_t size), (path, name, value, size), -1,
      AT_FDCWD, path, NULL, 0, 0)
WATCH(ssize_t, fgetxattr, (int fd, const char* name, void* value, size_t size), (fd, name, value, size), -1, fd, NULL,
      NULL, 0, 0)
WATCH(int, fsetxattr, (int fd, const char* name, const void* value, size_t size, int flags),
      (fd, name, value, size, flags), -1, fd, NULL, NULL, 0, 0)
WATCH(int, fremovexattr, (int fd, const char* name), (fd, name), -1, fd, NULL, NULL, 0, 0)
WATCH(int, access, (const char* path, int mode), (path, mode), -1, AT_FDCWD, path, NULL, 0, 0)
WATCH(int, fstatvfs, (int fd, struct statvfs* status), (fd, status), -1, fd, NULL, NULL, 0, 0)
WATCH(DIR*, opendir, (const char* path), (path), NULL, AT_FDCWD, path, NULL, 0, 0)
WATCH(DIR*, fdopendir, (int fd), (fd), NULL, fd, NULL, NULL, 0, 0)
WATCH(void*, mmap, (void* at, size_t length, int protection, int flags, int fd, off_t offset),
      (at, length, protection, flags, fd, offset), MAP_FAILED, fd, NULL, NULL, 0, 0)

#define WATCH_SYNC(name)                                                                \
  int name(int fd) {                                                                    \
    Call call;                                                                          \
    if (!begins(&call, #name, fd, NULL)) return REAL(name)(fd);                         \
    const int result = refused(&call) ? -1 : plan.fate == NO_SYNC ? 0 : REAL(name)(fd); \
    return ends(&call, #name, result, result == -1, NULL, 0, 0) ? -1 : result;          \
  }

WATCH_SYNC(fsync)
WATCH_SYNC(fdatasync)

int renameat(int from_fd, const char* from, int to_fd, const char* to) {
  Call call;
  char target[PATH_MAX];
  if (!begins(&call, "renameat", from_fd, from)) return REAL(renameat)(from_fd, from, to_fd, to);
  if (!resolve(to_fd, to, target)) abort();
  const int result = refused(&call) ? -1 : REAL(renameat)(from_fd, from, to_fd, to);
  return ends(&call, "renameat", result, result == -1, target, 0, 0) ? -1 : result;
}

int linkat(int from_fd, const char* from, int to_fd, const char* to, int flags) {
  Call call;
  char target[PATH_MAX];
  if (!begins(&call, "linkat", from_fd, from)) return REAL(linkat)(from_fd, from, to_fd, to, flags);
  if (!resolve(to_fd, to, target)) abort();
  const int result = refused(&call) ? -1 : REAL(linkat)(from_fd, from, to_fd, to, flags);
  return ends(&call, "linkat", result, result == -1, target, 0, 0) ? -1 : result;
}

int openat(int fd, const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  Call call;
  if (!begins(&call, "openat", fd, path)) return REAL(openat)(fd, path, flags, mode);
  const int result = refused(&call) ? -1 : REAL(openat)(fd, path, flags, mode);
  if (!ends(&call, "openat", result, result == -1, NULL, flags, 0)) return result;
  raw(SYS_close, result, 0, 0, 0);  // the caller never learns this descriptor; a file that the call created stays
  return -1;
}

int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  return openat(AT_FDCWD, path, flags, mode);
}

// Always closes: a close that fails has still closed the descriptor (close(2)).
int close(int fd) {
  Call call;
  if (!begins(&call, "close", fd, NULL)) return REAL(close)(fd);
  if (call.fate == FAIL) call.fate = FAIL_AFTER;
  const int result = REAL(close)(fd);
  return ends(&call, "close", result, result == -1, NULL, 0, 0) ? -1 : result;
}

int closedir(DIR* folder) {
  Call call;
  if (!begins(&call, "closedir", dirfd(folder), NULL)) return REAL(closedir)(folder);
  if (call.fate == FAIL) call.fate = FAIL_AFTER;
  const int result = REAL(closedir)(folder);
  return ends(&call, "closedir", result, result == -1, NULL, 0, 0) ? -1 : result;
}

// A call of the OS for the first entry and for the end; the entries in between come from libc's buffer and are no
// calls.
struct dirent* readdir(DIR* folder) {
  const bool first = telldir(folder) == 0;
  struct dirent* result = REAL(readdir)(folder);
  const int saved_errno = errno;
  Call call;
  if ((!first && result != NULL) || !begins(&call, "readdir", dirfd(folder), NULL)) {
    errno = saved_errno;
    return result;
  }
  errno = saved_errno;
  if (refused(&call)) result = NULL;
  return ends(&call, "readdir", 0, false, NULL, 0, 0) ? NULL : result;
}

int fcntl(int fd, int command, ...) {
  va_list more;
  va_start(more, command);
  void* argument = va_arg(more, void*);
  va_end(more);
  Call call;
  if (!begins(&call, "fcntl", fd, NULL)) return REAL(fcntl)(fd, command, argument);
  const bool duplicates = command == F_DUPFD || command == F_DUPFD_CLOEXEC;
  if (duplicates && call.fate == FAIL_AFTER) call.fate = FAIL;  // the caller would never learn the descriptor
  const int result = refused(&call) ? -1 : REAL(fcntl)(fd, command, argument);
  return ends(&call, "fcntl", result, result == -1, NULL, command, 0) ? -1 : result;
}

// Copies the file `from` into the empty file `into`, as FICLONE does on file systems that have clones. Returns the
// length.
static long copy(const Call* call, int from, int into) {
  char block[1 << 16];
  long at = 0, length;
  while ((length = raw(SYS_pread64, from, (long)block, sizeof block, at)) > 0) {
    if (raw(SYS_pwrite64, into, (long)block, length, at) != length) abort();
    record_bytes(call, block, length);
    at += length;
  }
  return at;
}

// With SHARDSAVE_FAULTS_CLONES in the environment, every file system has clones. They are recorded with their bytes.
int ioctl(int fd, unsigned long request, ...) {
  va_list more;
  va_start(more, request);
  void* argument = va_arg(more, void*);
  va_end(more);
  Call call;
  const char* wanted = getenv("SHARDSAVE_FAULTS_CLONES");
  const bool clones = request == FICLONE && wanted != NULL && wanted[0] != '\0';
  const bool watched = begins(&call, "ioctl", fd, NULL);
  if (watched && refused(&call)) return ends(&call, "ioctl", -1, true, NULL, 0, 0), -1;
  int result = 0;
  if (clones) {
    copy(&call, (int)(long)argument, fd);
  } else {
    result = REAL(ioctl)(fd, request, argument);
  }
  return watched && ends(&call, "ioctl", result, result == -1, NULL, 0, 0) ? -1 : result;
}

// cachestat(2) has no function in libc.
long syscall(long number, ...) {
  long a[6];
  va_list more;
  va_start(more, number);
  for (int n = 0; n < 6; ++n) a[n] = va_arg(more, long);
  va_end(more);
  Call call;
  const bool watched = number == 451 && begins(&call, "cachestat", (int)a[0], NULL);
  if (watched && refused(&call)) return ends(&call, "cachestat", -1, true, NULL, 0, 0), -1;
  static long (*real)(long, ...);
  if (real == NULL) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  const long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
  return watched && ends(&call, "cachestat", result, result == -1, NULL, 0, 0) ? -1 : result;
}

#define WATCH_TRANSFER(name, memory, parameters, arguments, fd, offset, is_write)          \
  ssize_t name parameters {                                                                \
    Call call;                                                                             \
    if (!begins(&call, #name, fd, NULL)) return REAL(name) arguments;                      \
    length = allowed(&call, length);                                                       \
    const long at = (long)(offset);                                                        \
    const ssize_t result = refused(&call) ? -1 : REAL(name) arguments;                     \
    if (is_write) record_bytes(&call, memory, result);                                     \
    return ends(&call, #name, result, result == -1, NULL, at, (long)length) ? -1 : result; \
  }

WATCH_TRANSFER(read, memory, (int fd, void* memory, size_t length), (fd, memory, length), fd, -1, false)
WATCH_TRANSFER(pread, memory, (int fd, void* memory, size_t length, off_t offset), (fd, memory, length, offset), fd,
               offset, false)
WATCH_TRANSFER(write, memory, (int fd, const void* memory, size_t length), (fd, memory, length), fd,
               lseek(fd, 0, SEEK_CUR), true)
WATCH_TRANSFER(pwrite, memory, (int fd, const void* memory, size_t length, off_t offset), (fd, memory, length, offset),
               fd, offset, true)

// Callers use one vector; a call with more is watched, but never shortened.
#define WATCH_VECTORS(name, parameters, arguments)                                                  \
  ssize_t name parameters {                                                                         \
    Call call;                                                                                      \
    if (!begins(&call, #name, fd, NULL)) return REAL(name) arguments;                               \
    struct iovec one = vectors[0];                                                                  \
    if (count == 1) one.iov_len = allowed(&call, one.iov_len), vectors = &one;                      \
    const ssize_t result = refused(&call) ? -1 : REAL(name) arguments;                              \
    return ends(&call, #name, result, result == -1, NULL, offset, (long)one.iov_len) ? -1 : result; \
  }

WATCH_VECTORS(preadv, (int fd, const struct iovec* vectors, int count, off_t offset), (fd, vectors, count, offset))
WATCH_VECTORS(preadv2, (int fd, const struct iovec* vectors, int count, off_t offset, int flags),
              (fd, vectors, count, offset, flags))

ALSO_CALLED(open, open64)
ALSO_CALLED(openat, openat64)
ALSO_CALLED(stat, stat64)
ALSO_CALLED(lstat, lstat64)
ALSO_CALLED(fstat, fstat64)
ALSO_CALLED(fstatat, fstatat64)
ALSO_CALLED(fstatvfs, fstatvfs64)
ALSO_CALLED(ftruncate, ftruncate64)
ALSO_CALLED(fallocate, fallocate64)
ALSO_CALLED(pread, pread64)
ALSO_CALLED(pwrite, pwrite64)
ALSO_CALLED(preadv, preadv64)
ALSO_CALLED(preadv2, preadv64v2)
ALSO_CALLED(readdir, readdir64)
ALSO_CALLED(fcntl, fcntl64)
ALSO_CALLED(mmap, mmap64)

// From now on watches `folder` (an empty string: nothing); its N-th call meets `fate`.
void beneath_arm(const char* folder, long number, int fate, int error) {
  plan.length = 0;
  snprintf(plan.folder, sizeof plan.folder, "%s", folder);
  atomic_store(&plan.seen, 0);
  atomic_store(&plan.number, number);
  plan.fate = fate;
  plan.error = error;
  plan.hit[0] = '\0';
  plan.length = strlen(plan.folder);
}

long beneath_seen(void) { return atomic_load(&plan.seen); }
const char* beneath_hit(void) { return plan.hit; }

// Appends a record of every call to the file `path`, and the bytes written to `path`.data; NULL stops it.
void beneath_record(const char* path) {
  if (plan.record >= 0) {
    raw(SYS_close, plan.record, 0, 0, 0);
    raw(SYS_close, plan.data, 0, 0, 0);
    plan.record = plan.data = -1;
  }
  if (path == NULL) return;
  char data[PATH_MAX];
  snprintf(data, sizeof data, "%s.data", path);
  const long flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
  plan.data = (int)raw(SYS_openat, AT_FDCWD, (long)data, flags, 0600);
  plan.data_length = raw(SYS_lseek, plan.data, 0, SEEK_END, 0);
  plan.record = (int)raw(SYS_openat, AT_FDCWD, (long)path, flags, 0600);
  if (plan.record < 0 || plan.data < 0) abort();
}
