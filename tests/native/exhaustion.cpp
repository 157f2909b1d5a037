// Method: fail the N-th allocation, the N-th mmap and the N-th start of a thread, for N = 1, 2, … until a save and a
// load succeed untouched; once only, and from the N-th on. What must hold each time: right bytes or a Fault that says
// ENOMEM, no thread left, the next run as if nothing had been. Under ASan, whose leak check sees what is not given
// back.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <new>
#include <string>
#include <vector>

#include "crc64.h"
#include "engine.h"
#include "ring.h"

using namespace shardsave;

#define CHECK(condition)                                                                              \
  do {                                                                                                \
    if (!(condition)) {                                                                               \
      std::fprintf(stderr, "%s:%d: %s (call %ld)\n", __FILE__, __LINE__, #condition, fail_at.load()); \
      std::abort();                                                                                   \
    }                                                                                                 \
  } while (false)

namespace {

constexpr std::int64_t kSlot = 64 * 1024;

enum Kind { kNone, kAllocation, kMapping, kThread };

std::atomic<int> armed{kNone};
std::atomic<long> calls{0}, fail_at{0};
std::atomic<long> mapped{0};  // bytes, which the leak check does not see
std::atomic<bool> lasting{false};

bool refused(Kind kind) {
  if (armed.load() != kind) return false;
  const long call = ++calls;
  return lasting ? call >= fail_at : call == fail_at;
}

}  // namespace

void* operator new(std::size_t bytes) {
  if (refused(kAllocation)) throw std::bad_alloc();
  void* memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" void* mmap(void* address, std::size_t length, int protection, int flags, int file, off_t offset) noexcept {
  if (refused(kMapping)) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  if (length % kSlot == 0) mapped += static_cast<long>(length);
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, length, protection, flags, file, offset));
}

extern "C" int munmap(void* address, std::size_t length) noexcept {
  if (length % kSlot == 0) mapped -= static_cast<long>(length);
  return static_cast<int>(syscall(SYS_munmap, address, length));
}

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) noexcept {
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return refused(kThread) ? EAGAIN : real(thread, attributes, start, argument);
}

namespace {

constexpr std::int64_t kBlocks = 12, kPiece = kBlocks * kSlot / 2;

// Two pieces, one in host memory and one lent, in turn half a block each.
struct World {
  std::vector<std::byte> pieces[2];
  int file;
  Request request;

  explicit World(int descriptor) : file(descriptor) {
    unsigned state = 1;
    for (auto& piece : pieces) {
      piece.resize(kPiece);
      for (auto& byte : piece) byte = static_cast<std::byte>((state = state * 1103515245 + 12345) >> 16);
    }
    request.files = {file};
    request.workers = 4;
    request.slot_bytes = kSlot;
    request.piece_bytes = {kPiece, kPiece};
    for (std::int64_t block = 0; block < kBlocks; ++block) {
      request.blocks.push_back({0, block * kSlot, kSlot, 2 * block});
      const std::int64_t done = block * kSlot / 2;
      request.segments.push_back({kHost, 0, kSlot / 2, 0, 0, done});
      request.segments.push_back({kLent, 0, kSlot / 2, kSlot / 2, 1, done});
    }
  }

  Result run_on(std::vector<std::byte> (&memory)[2], bool write) {
    request.write = write;
    request.access = write ? Access::direct : Access::automatic;
    for (Segment& segment : request.segments) {
      const auto begin = reinterpret_cast<std::uintptr_t>(memory[0].data());
      segment.address = segment.memory == kHost ? static_cast<std::int64_t>(begin) + segment.piece_offset : 0;
    }
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
      std::byte* lent = memory[piece].data() + offset;
      std::memcpy(write ? slot : lent, write ? lent : slot, length);
    };
    return run(request, hooks);
  }
};

long threads() {
  const std::filesystem::directory_iterator tasks("/proc/self/task"), end;
  return std::distance(tasks, end);
}

struct Outcome {
  bool succeeded;
  std::size_t staging_bytes;
};

// A save and a load into fresh memory, armed; and whether both came through.
Outcome attempt(World& world, Kind kind) {
  std::vector<std::byte> back[2] = {std::vector<std::byte>(kPiece), std::vector<std::byte>(kPiece)};
  Outcome outcome{false, 0};
  calls = 0;
  armed = kind;
  try {
    const Result saved = world.run_on(world.pieces, true);
    const Result loaded = world.run_on(back, false);
    armed = kNone;
    outcome = {true, loaded.staging_bytes};
    CHECK(saved.sums == loaded.sums);
    CHECK(saved.sums[1] == crc64_finish(crc64_raw(world.pieces[1].data(), kPiece), kPiece));
    CHECK(back[0] == world.pieces[0] && back[1] == world.pieces[1]);
  } catch (const Fault& fault) {
    armed = kNone;
    CHECK(fault.file == -1 && fault.number == ENOMEM && !fault.call.empty());
  } catch (const std::bad_alloc&) {
    armed = kNone;
    CHECK(kind == kAllocation && lasting);  // not even the words of a Fault could be had
  }
  return outcome;
}

// How many runs failed, and the smallest ring that one made do with.
std::pair<long, std::size_t> until_it_succeeds(World& world, Kind kind) {
  long failed = 0;
  std::size_t smallest = SIZE_MAX;
  for (fail_at = 1;; ++fail_at) {
    Ring::release();
    CHECK(mapped == 0);
    const long before = threads();
    const Outcome outcome = attempt(world, kind);
    const bool untouched = calls < fail_at;
    for (int waited = 0; threads() != before && waited < 5000; ++waited)
      usleep(1000);  // joined, and listed a moment longer
    CHECK(threads() == before);
    if (outcome.succeeded) smallest = std::min(smallest, outcome.staging_bytes);
    failed += outcome.succeeded ? 0 : 1;
    CHECK(attempt(world, kNone).succeeded);
    if (untouched) {
      CHECK(outcome.succeeded && fail_at > 1);
      return {failed, smallest};
    }
  }
}

}  // namespace

int main() {
  std::FILE* scratch = std::tmpfile();
  CHECK(scratch != nullptr);
  World world(fileno(scratch));
  mapped = 0;
  constexpr std::size_t kWhole = 8 * kSlot;
  for (const bool from_then_on : {false, true}) {
    lasting = from_then_on;
    const auto [allocations, ring] = until_it_succeeds(world, kAllocation);
    CHECK(allocations > 10 && ring == kWhole);
    const auto [mappings, smaller] = until_it_succeeds(world, kMapping);
    CHECK(mappings == (from_then_on ? 1 : 0) && smaller == (from_then_on ? kWhole : kWhole / 2));
    const auto [starts, same] = until_it_succeeds(world, kThread);
    CHECK(starts == 0 && same == kWhole);
    std::printf("%s: %ld allocations\n", from_then_on ? "from the N-th on" : "the N-th", allocations);
  }
  Ring::release();
  CHECK(mapped == 0);
  std::fclose(scratch);
}
