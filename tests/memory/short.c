// Method: a library for LD_PRELOAD that simulates a lack of memory. After short_of_memory(N), every allocation or
// mapping of N bytes or more fails.
//
// Threads: short_of_memory() is called before other threads start.
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void* __libc_malloc(size_t bytes);
extern void* __libc_calloc(size_t count, size_t bytes);
extern void* __libc_realloc(void* memory, size_t bytes);

static size_t limit = SIZE_MAX;

void short_of_memory(size_t bytes) { limit = bytes; }

static int refused(size_t bytes) {
  if (bytes < limit) return 0;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t bytes) { return refused(bytes) ? NULL : __libc_malloc(bytes); }

void* calloc(size_t count, size_t bytes) {
  return bytes != 0 && refused(count > SIZE_MAX / bytes ? SIZE_MAX : count * bytes) ? NULL
                                                                                    : __libc_calloc(count, bytes);
}

void* realloc(void* memory, size_t bytes) { return refused(bytes) ? NULL : __libc_realloc(memory, bytes); }

void* mmap(void* address, size_t length, int protection, int flags, int file, off_t offset) {
  if ((flags & MAP_ANONYMOUS) != 0 && refused(length)) return MAP_FAILED;
  return (void*)syscall(SYS_mmap, address, length, protection, flags, file, offset);
}
