// Method: random schedules of the core without Python: blocks, workers, lent and host memory, cancelled and failing
// runs, several at once. What was written is read back and compared byte for byte and sum for sum. Under ASan, UBSan
// and TSan. driver COUNT [SEED]
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "crc64.h"
#include "engine.h"
#include "ring.h"

using namespace shardsave;

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                               \
    }                                                             \
  } while (false)

namespace {

struct Stop {};

constexpr std::size_t kSlot = 64 * 1024;

std::int64_t place(const std::vector<std::byte>& memory) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(memory.data()));
}

void one_schedule(std::uint64_t seed, const std::string& folder) {
  std::mt19937_64 random(seed);
  const auto below = [&random](std::uint64_t bound) { return static_cast<std::size_t>(random() % bound); };
  const std::string path = folder + "/schedule-" + std::to_string(seed);
  const int file = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  CHECK(file >= 0);

  std::vector<std::vector<std::byte>> pieces(1 + below(6));
  for (auto& piece : pieces) {
    piece.resize(1 + below(200'000));
    for (auto& byte : piece) byte = static_cast<std::byte>(random());
  }
  std::vector<std::int64_t> memory(pieces.size());
  for (auto& kind : memory) kind = below(3) == 0 ? kLent : kHost;

  Request request;
  request.files = {file};
  request.workers = 1 + below(6);
  request.slot_bytes = kSlot;
  request.access = below(2) == 0 ? Access::direct : Access::buffered;
  request.write = true;
  std::int64_t end = 0;
  for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
    const auto size = static_cast<std::int64_t>(pieces[piece].size());
    request.piece_bytes.push_back(size);
    for (std::int64_t done = 0; done < size;) {
      const std::int64_t block_start = end / static_cast<std::int64_t>(kSlot) * static_cast<std::int64_t>(kSlot);
      if (request.blocks.empty() || request.blocks.back().offset != block_start) {
        request.blocks.push_back({0, block_start, kSlot, static_cast<std::int64_t>(request.segments.size())});
      }
      const std::int64_t length = std::min(size - done, block_start + static_cast<std::int64_t>(kSlot) - end);
      const std::int64_t address = memory[piece] == kHost ? place(pieces[piece]) + done : 0;
      request.segments.push_back(
          {memory[piece], address, length, end - block_start, static_cast<std::int64_t>(piece), done});
      done += length;
      end += length;
    }
  }
  Hooks hooks;
  std::atomic<int> lends{0};
  const int fail_at = below(4) == 0 ? static_cast<int>(below(6)) : -1;
  const bool cancel = below(5) == 0;
  hooks.tick = [&](std::uint64_t) {
    if (cancel) throw Stop{};
  };
  hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
    if (lends++ == fail_at) throw Stop{};
    std::memcpy(slot, pieces[static_cast<std::size_t>(piece)].data() + offset, length);
  };
  try {
    const Result written = run(request, hooks);
    std::vector<std::vector<std::byte>> back(pieces.size());
    for (std::size_t piece = 0; piece < pieces.size(); ++piece) {
      CHECK(written.sums[piece] ==
            crc64_finish(crc64_raw(pieces[piece].data(), pieces[piece].size()), pieces[piece].size()));
      back[piece].resize(pieces[piece].size());
    }
    request.write = false;
    request.access = Access::automatic;
    for (Segment& segment : request.segments) {
      const auto piece = static_cast<std::size_t>(segment.piece);
      segment.address = segment.memory == kHost ? place(back[piece]) + segment.piece_offset : 0;
    }
    hooks.tick = [](std::uint64_t) {};
    hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* slot, std::size_t length) {
      std::memcpy(back[static_cast<std::size_t>(piece)].data() + offset, slot, length);
    };
    const Result read = run(request, hooks);
    CHECK(read.sums == written.sums);
    CHECK(back == pieces);
    CHECK(ftruncate(file, end / 2) == 0);
    try {
      run(request, hooks);
      CHECK(end / 2 == end);
    } catch (const Fault& fault) {
      CHECK(fault.file == 0 && fault.call == "pread" && fault.number == 0);
    }
  } catch (const Stop&) {
    CHECK(cancel || fail_at >= 0);
  }
  close(file);
  unlink(path.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  const int schedules = count > 1 ? std::atoi(arguments[1]) : 100;
  const std::uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  char folder[] = "driver-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (int n = 0; n < 3; ++n) {
    threads.emplace_back([&] {
      for (int k; (k = next++) < schedules;) one_schedule(seed + static_cast<std::uint64_t>(k), folder);
    });
  }
  for (auto& thread : threads) thread.join();
  Ring::release();
  rmdir(folder);
  std::printf("%d schedules ok\n", schedules);
}
