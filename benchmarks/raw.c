/* Measures the limits of the disk and the memory, with which the benchmark compares shardsave.
 *
 *   raw write  FILE BYTES THREADS   O_DIRECT: fallocate, pwrite of 8 MiB blocks with one copy into an aligned buffer, fsync
 *   raw read   FILE BYTES THREADS   O_DIRECT: pread into an aligned buffer, one copy from it to memory touched before
 *   raw fresh  FILE BYTES THREADS   the same to memory that was never touched, like that of new tensors
 *   raw warm   FILE BYTES THREADS   pread through the page cache directly into memory touched before
 *   raw memcpy -    BYTES THREADS   memory to memory, both touched before
 *
 * With a fifth argument, of whatever content, it prints "ready" once its memory is there and waits for a line of input, so that
 * several processes can begin together.
 *
 * Prints one line of JSON: the wall and processor seconds of the operation alone, and its begin and end on CLOCK_MONOTONIC. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 8 << 20, PAGE = 4096, MOST_THREADS = 64 };
enum kind { STAGING, TOUCHED, NEW };

static const char *operation;
static char *memory, *target;
static size_t total;
static int descriptor = -1;
static atomic_size_t next_block;

static void fail(const char *call) {
  fprintf(stderr, "%s: %s\n", call, strerror(errno));
  exit(1);
}

/* Staging memory has huge pages; the model's memory has ordinary pages, as torch allocates them. */
static void *map(size_t length, enum kind kind) {
  char *mapping = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) fail("mmap");
  if (kind == STAGING) madvise(mapping, length, MADV_HUGEPAGE);
  if (kind == TOUCHED) {
    uint64_t state = 88172645463325252u;
    for (size_t at = 0; at + 8 <= length; at += 8) {
      state ^= state << 13, state ^= state >> 7, state ^= state << 17;
      memcpy(mapping + at, &state, 8);
    }
  }
  return mapping;
}

static void transfer(int writing, char *buffer, size_t length, size_t needed, off_t offset) {
  for (size_t done = 0; done < needed;) {
    const ssize_t count = writing ? pwrite(descriptor, buffer + done, length - done, offset + (off_t)done)
                                  : pread(descriptor, buffer + done, length - done, offset + (off_t)done);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) fail(writing ? "pwrite" : "pread");
    done += (size_t)count;
  }
}

static void *work(void *unused) {
  (void)unused;
  char *buffer = NULL;
  const int writing = strcmp(operation, "write") == 0;
  const int reading = strcmp(operation, "read") == 0 || strcmp(operation, "fresh") == 0;
  if (writing || reading) buffer = map(BLOCK, STAGING);
  for (size_t n; (n = atomic_fetch_add(&next_block, 1)) * BLOCK < total;) {
    const size_t at = n * BLOCK, length = total - at < BLOCK ? total - at : BLOCK;
    const size_t padded = (length + PAGE - 1) / PAGE * PAGE;
    if (writing) {
      memcpy(buffer, memory + at, length);
      memset(buffer + length, 0, padded - length);
      transfer(1, buffer, padded, padded, (off_t)at);
    } else if (reading) {
      transfer(0, buffer, padded, length, (off_t)at);
      memcpy(memory + at, buffer, length);
    } else if (strcmp(operation, "warm") == 0) {
      transfer(0, memory + at, length, length, (off_t)at);
    } else {
      memcpy(target + at, memory + at, length);
    }
  }
  return NULL;
}

static double wall_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double processor_seconds(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
         1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
}

int main(int count, char **arguments) {
  if (count != 5 && count != 6) {
    fprintf(stderr, "usage: raw write|read|fresh|warm|memcpy FILE BYTES THREADS [together]\n");
    return 2;
  }
  operation = arguments[1];
  total = strtoull(arguments[3], NULL, 10);
  const int threads = atoi(arguments[4]);
  if (total == 0 || threads < 1 || threads > MOST_THREADS) return 2;
  const int writing = strcmp(operation, "write") == 0;
  const int copying = strcmp(operation, "memcpy") == 0;
  memory = map(total, strcmp(operation, "fresh") == 0 ? NEW : TOUCHED);
  if (copying) target = map(total, TOUCHED);
  if (count == 6) {
    puts("ready");
    fflush(stdout);
    if (getchar() == EOF) return 2;
  }

  const double start = wall_seconds(), start_processor = processor_seconds();
  if (writing) {
    descriptor = open(arguments[2], O_RDWR | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0666);
    if (descriptor < 0) fail("open");
    if (fallocate(descriptor, 0, 0, (off_t)((total + PAGE - 1) / PAGE * PAGE)) != 0) fail("fallocate");
  } else if (!copying) {
    descriptor = open(arguments[2], O_RDONLY | O_CLOEXEC | (strcmp(operation, "warm") == 0 ? 0 : O_DIRECT));
    if (descriptor < 0) fail("open");
  }
  pthread_t workers[MOST_THREADS];
  for (int n = 0; n < threads; ++n) {
    if (pthread_create(&workers[n], NULL, work, NULL) != 0) fail("pthread_create");
  }
  for (int n = 0; n < threads; ++n) pthread_join(workers[n], NULL);
  if (writing && (ftruncate(descriptor, (off_t)total) != 0 || fsync(descriptor) != 0)) fail("fsync");
  if (descriptor >= 0 && close(descriptor) != 0) fail("close");
  const double end = wall_seconds();
  printf("{\"wall\": %.6f, \"cpu\": %.6f, \"bytes\": %zu, \"begin\": %.6f, \"end\": %.6f}\n", end - start,
         processor_seconds() - start_processor, total, start, end);
  return 0;
}
