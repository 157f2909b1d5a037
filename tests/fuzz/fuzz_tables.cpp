// Method: the tables of a small, legal run, with some numbers replaced by hostile ones and with rows swapped, dropped
// and doubled. run() must refuse exactly what a second implementation of the contract, in 128-bit arithmetic, refuses:
// with std::invalid_argument and before any hook is called. What it accepts must succeed, or end with a Fault of a call
// on the file. Addresses that would be used are real. Under ASan and UBSan. Usage: fuzz_tables SECONDS [SEED]
#include <fcntl.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "ring.h"

using namespace shardsave;

namespace {

using Wide = __int128;

constexpr std::int64_t kSlot = 64 * 1024, kPage = 4096;
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

std::uint64_t current_case = 0;

void print_case() {
  std::fprintf(stderr, "fuzz_tables: case %" PRIu64 " (fuzz_tables 0 %" PRIu64 ")\n", current_case, current_case);
}

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      print_case();                                                        \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

struct Case {
  Request request;
  std::vector<std::vector<std::byte>> memory;  // of each piece; of still ones with the rest of the last page
  std::vector<std::byte*> starts;              // where each piece begins in its memory
  std::vector<std::int64_t> sizes;             // of each piece, before piece_bytes was changed
  std::vector<bool> still;                     // for each piece, whether it may be still memory
  std::vector<std::byte> destination;          // in place of the file, with the size that the blocks need
  std::vector<std::int64_t> taken;             // of each piece; a vector of its own, so that ASan knows its end
};

// Generates cases from a seed. For one thread.
class Generator {
 public:
  explicit Generator(std::uint64_t seed) : random_(seed) {}

  Case generate(int file) {
    Case hostile_case = legal(file);
    Request& request = hostile_case.request;
    if (below(50) == 0) {
      request.blocks.clear();
      if (below(2) == 0) request.segments.clear();
    }
    if (below(3) == 0) gather_instead(hostile_case);
    for (std::size_t changes = below(4); changes > 0; --changes) tamper(request);
    if (below(4) == 0) {
      hostile_case.taken.resize(request.piece_bytes.size());
      request.taken = hostile_case.taken.data();
    }
    set_addresses(hostile_case);
    return hostile_case;
  }

 private:
  std::size_t below(std::size_t bound) { return static_cast<std::size_t>(random_() % bound); }

  Case legal(int file) {
    Case legal_case;
    Request& request = legal_case.request;
    request.files.assign(1 + below(2), file);
    request.workers = 1 + below(3);
    request.slot_bytes = static_cast<std::size_t>(kSlot);
    request.access = static_cast<Access>(below(3));
    request.write = below(2) == 0;
    request.checksum = below(4) != 0;
    std::int64_t end = 0;
    const std::size_t pieces = 1 + below(4);
    for (std::size_t piece = 0; piece < pieces; ++piece) {
      const auto size = static_cast<std::int64_t>(1 + below(100'000));
      const std::int64_t kinds[] = {kHost, kLent, request.write ? kStill : kDiscard};
      const std::int64_t kind = kinds[below(std::size(kinds))];
      add_memory(legal_case, size, kind == kStill);
      request.piece_bytes.push_back(size);
      for (std::int64_t offset = 0; offset < size;) {
        const std::int64_t start = end / kSlot * kSlot;
        if (request.blocks.empty() || request.blocks.back().offset != start) {
          request.blocks.push_back({0, start, kSlot, static_cast<std::int64_t>(request.segments.size())});
        }
        const std::int64_t length = std::min(size - offset, start + kSlot - end);
        request.segments.push_back({kind, 0, length, end - start, static_cast<std::int64_t>(piece), offset});
        offset += length;
        end += length;
      }
    }
    return legal_case;
  }

  // Still memory begins with a page and may be read to the end of its last one. ASan knows the end of all other memory.
  static void add_memory(Case& legal_case, std::int64_t size, bool still) {
    std::vector<std::byte>& memory =
        legal_case.memory.emplace_back(static_cast<std::size_t>(still ? size + 2 * kPage : size));
    const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
    legal_case.starts.push_back(memory.data() + (still ? static_cast<std::size_t>(-start % kPage) : 0));
    legal_case.sizes.push_back(size);
    legal_case.still.push_back(still);
  }

  // Makes a run that gathers into memory, or nowhere, of a run over files. One time in four the memory is too small.
  void gather_instead(Case& gathering) {
    Request& request = gathering.request;
    if (!request.write || request.blocks.empty()) return;
    const Segment& last = request.segments.back();
    gathering.destination.resize(static_cast<std::size_t>(request.blocks.back().offset + last.at + last.length));
    request.files.clear();
    for (Segment& segment : request.segments) {
      if (segment.memory == kStill && below(8) != 0) segment.memory = kHost;
    }
    request.into = Destination{};
    if (below(3) == 0) return;
    const std::size_t needed = gathering.destination.size();
    request.into = Destination{gathering.destination.data(), below(4) == 0 ? below(needed) : needed};
  }

  std::int64_t hostile(std::int64_t old) {
    const std::int64_t interesting[] = {0,
                                        1,
                                        -1,
                                        -2,
                                        -3,
                                        -4,
                                        -5,
                                        -6,
                                        kPage,
                                        kPage - 1,
                                        kPage + 1,
                                        kSlot,
                                        kSlot - 1,
                                        kSlot + 1,
                                        -kPage,
                                        2 * kSlot,
                                        1LL << 31,
                                        1LL << 32,
                                        (1LL << 32) + 1,
                                        1LL << 40,
                                        kMost,
                                        kMost - 1,
                                        -kMost,
                                        ~kMost,
                                        ~kMost + 1,
                                        kMost / 2,
                                        1LL << 62,
                                        kMost / kPage * kPage,
                                        kMost - kSlot + 1};
    switch (below(4)) {
      case 0:
        return interesting[below(std::size(interesting))];
      case 1:
        return static_cast<std::int64_t>(static_cast<std::uint64_t>(old) + static_cast<std::uint64_t>(below(9)) - 4);
      case 2:
        return static_cast<std::int64_t>(static_cast<std::uint64_t>(old) ^ (std::uint64_t{1} << below(64)));
      default:
        return static_cast<std::int64_t>(random_());
    }
  }

  template <class Row>
  void tamper_rows(std::vector<Row>& rows) {
    if (rows.empty()) return;
    Row& row = rows[below(rows.size())];
    switch (below(8)) {
      case 0:
        std::swap(row, rows[below(rows.size())]);
        break;
      case 1:
        rows.erase(rows.begin() + static_cast<std::ptrdiff_t>(below(rows.size())));
        break;
      case 2: {
        const Row twice = row;
        rows.insert(rows.begin() + static_cast<std::ptrdiff_t>(below(rows.size() + 1)), twice);
        break;
      }
      default: {
        std::int64_t fields[sizeof(Row) / sizeof(std::int64_t)];
        std::memcpy(fields, &row, sizeof row);
        std::int64_t& field = fields[below(std::size(fields))];
        field = hostile(field);
        std::memcpy(&row, fields, sizeof row);
      }
    }
  }

  void tamper(Request& request) {
    switch (below(10)) {
      case 0:
        if (!request.piece_bytes.empty()) {
          std::int64_t& bytes = request.piece_bytes[below(request.piece_bytes.size())];
          bytes = hostile(bytes);
        }
        break;
      case 1:
        request.slot_bytes = static_cast<std::size_t>(hostile(kSlot));
        break;
      case 2:
        request.workers = static_cast<std::size_t>(below(3) == 0 ? 0 : hostile(1));
        break;
      case 3:
        if (below(2) == 0) request.files.clear();
        request.write = !request.write;
        break;
      case 4:
      case 5:
      case 6:
        tamper_rows(request.blocks);
        break;
      default:
        tamper_rows(request.segments);
    }
  }

  // Gives each segment of host or still memory its address in the piece's memory, or one that must be refused. A
  // segment outside the piece's memory becomes lent, and still memory that ends with its piece becomes host memory.
  void set_addresses(Case& hostile_case) {
    const auto pieces = static_cast<std::int64_t>(hostile_case.memory.size());
    for (Segment& segment : hostile_case.request.segments) {
      if (segment.memory != kHost && segment.memory != kStill) continue;
      const bool has_memory = segment.piece >= 0 && segment.piece < pieces;
      const auto piece = static_cast<std::size_t>(has_memory ? segment.piece : 0);
      if (!has_memory || segment.piece_offset < 0 || segment.length < 0 ||
          static_cast<Wide>(segment.piece_offset) + segment.length > hostile_case.sizes[piece]) {
        segment.memory = kLent;
        continue;
      }
      if (segment.memory == kStill && !hostile_case.still[piece]) segment.memory = kHost;
      const auto address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(hostile_case.starts[piece]));
      segment.address = address + segment.piece_offset;
      if (below(40) == 0) {
        constexpr std::int64_t bad[] = {0, -1, ~kMost, kMost};
        segment.address = bad[below(std::size(bad))];
      }
    }
  }

  std::mt19937_64 random_;
};

// The contract of request.h, a second time, in numbers that cannot overflow.
bool legal(const Request& request) {
  if (request.slot_bytes == 0 || request.slot_bytes % kPage != 0 || request.slot_bytes > (std::size_t{1} << 40))
    return false;
  if (request.workers == 0) return false;
  if (std::any_of(request.piece_bytes.begin(), request.piece_bytes.end(),
                  [](std::int64_t bytes) { return bytes < 0; })) {
    return false;
  }
  if (request.taken != nullptr && !request.write) return false;
  if (request.into && (!request.write || !request.files.empty())) return false;
  if (request.into && request.into->memory == nullptr && !request.checksum) return false;
  const Wide files = request.into ? 1 : static_cast<Wide>(request.files.size());
  const auto segments = static_cast<Wide>(request.segments.size());
  if (request.blocks.empty()) return segments == 0;
  if (request.blocks.front().first_segment != 0) return false;
  for (std::size_t n = 0; n < request.blocks.size(); ++n) {
    const Block& block = request.blocks[n];
    const Wide last = n + 1 < request.blocks.size() ? static_cast<Wide>(request.blocks[n + 1].first_segment) : segments;
    if (block.file < 0 || block.file >= files) return false;
    if (block.offset < 0 || block.offset % kPage != 0) return false;
    if (block.length <= 0 || block.length % kPage != 0 || block.length > static_cast<Wide>(request.slot_bytes))
      return false;
    if (static_cast<Wide>(block.offset) + block.length > kMost) return false;
    if (block.first_segment < 0 || block.first_segment >= last || last > segments) return false;
    Wide end = 0;
    for (Wide s = block.first_segment; s < last; ++s) {
      const Segment& segment = request.segments[static_cast<std::size_t>(s)];
      if (segment.length <= 0 || segment.at < end) return false;
      end = static_cast<Wide>(segment.at) + segment.length;
      if (end > block.length) return false;
      if (segment.piece < 0 || segment.piece >= static_cast<Wide>(request.piece_bytes.size())) return false;
      const Wide until = static_cast<Wide>(segment.piece_offset) + segment.length;
      if (segment.piece_offset < 0 || until > request.piece_bytes[static_cast<std::size_t>(segment.piece)])
        return false;
      const bool is_host = segment.memory == kHost || segment.memory == kStill;
      if (!is_host && segment.memory != kLent && segment.memory != kDiscard) return false;  // no devices, no windows
      if (segment.memory == kDiscard && request.write) return false;
      if (segment.memory == kStill && (!request.write || request.into)) return false;
      if (is_host && (segment.address <= 0 || static_cast<Wide>(segment.address) + segment.length > kMost)) {
        return false;
      }
    }
    const bool into_memory = request.into && request.into->memory != nullptr;
    if (into_memory && static_cast<Wide>(block.offset) + end > static_cast<Wide>(request.into->bytes)) return false;
  }
  return true;
}

struct Counts {
  std::uint64_t cases = 0, refused = 0, succeeded = 0, faults = 0;
};

void try_case(std::uint64_t seed, int file, Counts* counts) {
  current_case = seed;
  const Case hostile_case = Generator(seed).generate(file);
  const Request& request = hostile_case.request;
  std::atomic<std::uint64_t> hooks_called{0};
  Hooks hooks;
  hooks.tick = [&](std::uint64_t) { ++hooks_called; };
  hooks.lend = [&](std::int64_t piece, std::int64_t offset, std::byte* memory, std::size_t length) {
    ++hooks_called;
    CHECK(piece >= 0 && piece < static_cast<std::int64_t>(request.piece_bytes.size()) && offset >= 0);
    CHECK(static_cast<Wide>(offset) + static_cast<Wide>(length) <=
          request.piece_bytes[static_cast<std::size_t>(piece)]);
    CHECK(length <= request.slot_bytes);
    if (request.write) std::memset(memory, 0x5a, length);
  };
  ++counts->cases;
  const bool expected = legal(request);
  try {
    const Result result = run(request, hooks);
    CHECK(expected);
    CHECK(result.sums.size() == (request.checksum ? request.piece_bytes.size() : 0));
    ++counts->succeeded;
  } catch (const std::invalid_argument&) {
    CHECK(!expected);
    CHECK(hooks_called == 0);
    ++counts->refused;
  } catch (const Fault& fault) {
    CHECK(expected);
    CHECK(fault.call == "pread" || fault.call == "pwrite" || fault.call == "mmap of staging memory");
    CHECK(fault.number != EFAULT);  // all memory of a legal request is there
    ++counts->faults;
  }
}

}  // namespace

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 5;
  const std::uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  __sanitizer_set_death_callback(print_case);
  char path[] = "fuzz-tables-XXXXXX";
  const int file = mkstemp(path);
  CHECK(file >= 0 && unlink(path) == 0);
  Counts counts;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  do {
    CHECK(ftruncate(file, 300'000) == 0);
    try_case(first + counts.cases, file, &counts);
  } while (std::chrono::steady_clock::now() < end);
  close(file);
  Ring::release();
  std::printf("fuzz_tables: %" PRIu64 " cases from %" PRIu64 ": %" PRIu64 " refused, %" PRIu64 " succeeded, %" PRIu64
              " ended with a Fault of the file\n",
              counts.cases, first, counts.refused, counts.succeeded, counts.faults);
  CHECK(seconds == 0 || (counts.refused > 0 && counts.succeeded > 0));
}
