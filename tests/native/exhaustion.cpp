// Method: fail the N-th allocation, the N-th mmap and the N-th start of a thread, for N = 1, 2, … until a save, a load
// and a gathering need fewer calls; once only, and from the N-th call on. Each time the bytes must be right or a Fault
// must say ENOMEM, no thread may be left, and the next run must succeed. Under ASan, whose leak check finds what is not
// freed.
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
std::atomic<long> mapped{0};       // bytes, which the leak check does not see
std::atomic<bool> lasting{false};  // every call from the N-th on fails

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

// A request for two pieces, one in host memory and one lent; each has one half of every block.
struct World {
  std::vector<std::byte> pieces[2];
  int file;
  Request request, gathering;

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
      const std::int64_t offset = block * kSlot / 2;
      request.segments.push_back({kHost, 0, kSlot / 2, 0, 0, offset});
      request.segments.push_back({kLent, 0, kSlot / 2, kSlot / 2, 1, offset});
    }
    gathering = request;
    gathering.write = true;
    gathering.files.clear();
    for (Segment& segment : gathering.segments) {
      const auto address = reinterpret_cast<std::uintptr_t>(pieces[0].data());
      segment.address = segment.memory == kHost ? static_cast<std::int64_t>(address) + segment.piece_offset : 0;
    }
  }

  Result run_on(std::vector<std::byte> (&memory)[2], bool write) {
    request.write = write;
    request.access = write ? Access::direct : Access::automatic;
    for (Segment& segment : request.segments) {
      const auto address = reinterpret_cast<std::uintptr_t>(memory[0].data());
      segment.address = segment.memory == kHost ? static_cast<std::int64_t>(address) + segment.piece_offset : 0;
    }
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
      std::byte* lent = memory[piece].data() + offset;
      std::memcpy(write ? slot : lent, write ? lent : slot, length);
    };
    return run(request, hooks);
  }

  // Gathers the pieces into `memory`, as a file would hold them.
  Result gather(std::vector<std::byte>& memory) {
    gathering.into = Destination{memory.data(), memory.size()};
    Hooks hooks;
    hooks.tick = [](std::uint64_t) {};
    hooks.lend = [this](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
      std::memcpy(slot, pieces[piece].data() + offset, length);
    };
    return run(gathering, hooks);
  }
};

long thread_count() {
  const std::filesystem::directory_iterator tasks("/proc/self/task"), end;
  return std::distance(tasks, end);
}

struct Outcome {
  bool succeeded;
  std::size_t staging_bytes;
};

// A save, a load into fresh memory and a gathering, while calls of `kind` fail.
Outcome attempt(World& world, Kind kind) {
  std::vector<std::byte> copies[2] = {std::vector<std::byte>(kPiece), std::vector<std::byte>(kPiece)};
  std::vector<std::byte> memory(2 * kPiece);
  Outcome outcome{false, 0};
  calls = 0;
  armed = kind;
  try {
    const Result saved = world.run_on(world.pieces, true);
    const Result loaded = world.run_on(copies, false);
    const Result gathered = world.gather(memory);
    armed = kNone;
    outcome = {true, loaded.staging_bytes};
    CHECK(saved.sums == loaded.sums && saved.sums == gathered.sums);
    CHECK(std::memcmp(memory.data(), world.pieces[0].data(), kSlot / 2) == 0);
    CHECK(saved.sums[1] == crc64_finish(crc64_raw(world.pieces[1].data(), kPiece), kPiece));
    CHECK(copies[0] == world.pieces[0] && copies[1] == world.pieces[1]);
  } catch (const Fault& fault) {
    armed = kNone;
    CHECK(fault.file == -1 && fault.number == ENOMEM && !fault.call.empty());
  } catch (const std::bad_alloc&) {
    armed = kNone;
    CHECK(kind == kAllocation && lasting);  // there was no memory for the text of a Fault
  }
  return outcome;
}

// How many runs failed, and the size of the smallest ring with which one succeeded.
std::pair<long, std::size_t> fail_each_call(World& world, Kind kind) {
  long failed = 0;
  std::size_t smallest = SIZE_MAX;
  for (fail_at = 1;; ++fail_at) {
    Ring::release();
    CHECK(mapped == 0);
    const long threads = thread_count();
    const Outcome outcome = attempt(world, kind);
    const bool none_failed = calls < fail_at;
    // The system lists a joined thread a moment longer.
    for (int waits = 0; thread_count() != threads && waits < 5000; ++waits) usleep(1000);
    CHECK(thread_count() == threads);
    if (outcome.succeeded) smallest = std::min(smallest, outcome.staging_bytes);
    failed += outcome.succeeded ? 0 : 1;
    CHECK(attempt(world, kNone).succeeded);
    if (none_failed) {
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
  constexpr std::size_t kWholeRing = kSlots * kSlot;
  for (const bool from_there_on : {false, true}) {
    lasting = from_there_on;
    const auto [allocations, ring] = fail_each_call(world, kAllocation);
    CHECK(allocations > 10 && ring == kWholeRing);
    const auto [mappings, smaller_ring] = fail_each_call(world, kMapping);
    CHECK(mappings == (from_there_on ? 1 : 0) && smaller_ring == (from_there_on ? kWholeRing : kWholeRing / 2));
    const auto [starts, same_ring] = fail_each_call(world, kThread);
    CHECK(starts == 0 && same_ring == kWholeRing);
    std::printf("%s: %ld allocations\n", from_there_on ? "from the N-th on" : "the N-th", allocations);
  }
  Ring::release();
  CHECK(mapped == 0);
  std::fclose(scratch);
}
