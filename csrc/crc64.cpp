#include "crc64.h"

#include <array>
#include <atomic>
#include <cstring>

#include "crc64_math.h"

namespace shardsave {
namespace {

constexpr std::array<std::array<std::uint64_t, 256>, 8> make_tables() {
  std::array<std::array<std::uint64_t, 256>, 8> tables{};
  for (std::size_t byte = 0; byte < 256; ++byte) {
    std::uint64_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = times_x(value);
    tables[0][byte] = value;
  }
  for (std::size_t k = 1; k < 8; ++k) {
    for (std::size_t byte = 0; byte < 256; ++byte) {
      const std::uint64_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  }
  return tables;
}
constexpr auto kTables = make_tables();

std::uint64_t table_update(std::uint64_t state, const unsigned char* data, std::size_t length) {
  for (; length >= 8; data += 8, length -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);  // every platform that torch runs on is little-endian
    word ^= state;
    state = kTables[7][word & 0xFF] ^ kTables[6][(word >> 8) & 0xFF] ^ kTables[5][(word >> 16) & 0xFF] ^
            kTables[4][(word >> 24) & 0xFF] ^ kTables[3][(word >> 32) & 0xFF] ^ kTables[2][(word >> 40) & 0xFF] ^
            kTables[1][(word >> 48) & 0xFF] ^ kTables[0][word >> 56];
  }
  for (; length != 0; ++data, --length) state = kTables[0][(state ^ *data) & 0xFF] ^ (state >> 8);
  return state;
}

// Sums `length` bytes of `source`, and copies them when `destination` is not null. Every implementation has this type.
using Update = std::uint64_t (*)(std::uint64_t state, unsigned char* destination, const unsigned char* source,
                                 std::size_t length, Stores stores);

std::uint64_t update_table(std::uint64_t state, unsigned char* destination, const unsigned char* source,
                           std::size_t length, Stores) {
  constexpr std::size_t kStep = 4096;
  unsigned char buffer[kStep];
  while (length != 0) {
    const std::size_t step = length < kStep ? length : kStep;
    // The source is read once, so that the sum is that of the copy even if another thread changes the source meanwhile.
    const unsigned char* summed = source;
    if (destination != nullptr) {
      std::memcpy(buffer, source, step);
      std::memcpy(destination, buffer, step);
      destination += step;
      summed = buffer;
    }
    state = table_update(state, summed, step);
    source += step;
    length -= step;
  }
  return state;
}

#if SHARDSAVE_X86

SHARDSAVE_FOLDS std::uint64_t update_pclmul(std::uint64_t state, unsigned char* destination,
                                            const unsigned char* source, std::size_t length, Stores stores) {
  if (length < 256) return update_table(state, destination, source, length, stores);
  const bool streaming = destination != nullptr && stores == Stores::streaming;
  if (streaming) {
    const std::size_t head = (16 - reinterpret_cast<std::uintptr_t>(destination) % 16) % 16;
    state = update_table(state, destination, source, head, stores);
    destination += head, source += head, length -= head;
  }
  const __m128i by_64 = constants16(kBy64), by_16 = constants16(kBy16);
  __m128i sums[4] = {};
  bool first = true;
  for (; length >= 64; source += 64, length -= 64) {
    for (int k = 0; k < 4; ++k) {
      const __m128i data = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16 * k));
      if (destination != nullptr) {
        auto* target = reinterpret_cast<__m128i*>(destination + 16 * k);
        streaming ? _mm_stream_si128(target, data) : _mm_storeu_si128(target, data);
      }
      sums[k] = first ? data : fold16(sums[k], by_64, data);
    }
    if (first) sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi64_si128(static_cast<long long>(state)));
    first = false;
    if (destination != nullptr) destination += 64;
  }
  if (streaming) _mm_sfence();
  __m128i sum = sums[0];
  for (int k = 1; k < 4; ++k) sum = fold16(sum, by_16, sums[k]);
  unsigned char bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), sum);
  return update_table(table_update(0, bytes, 16), destination, source, length, stores);
}

SHARDSAVE_WIDE_FOLDS std::uint64_t update_vpclmul(std::uint64_t state, unsigned char* destination,
                                                  const unsigned char* source, std::size_t length, Stores stores) {
  if (length < 1024) return update_pclmul(state, destination, source, length, stores);
  const bool streaming = destination != nullptr && stores == Stores::streaming;
  if (streaming) {
    const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(destination) % 64) % 64;
    state = update_table(state, destination, source, head, stores);
    destination += head, source += head, length -= head;
  }
  const __m512i by_256 = constants64(kBy256), by_64 = constants64(kBy64);
  __m512i sums[4] = {};
  bool first = true;
  for (; length >= 256; source += 256, length -= 256) {
    __m512i data[4];
    for (int k = 0; k < 4; ++k) data[k] = _mm512_loadu_si512(source + 64 * k);
    if (streaming) {
      for (int k = 0; k < 4; ++k) _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + 64 * k), data[k]);
      destination += 256;
    } else if (destination != nullptr) {
      for (int k = 0; k < 4; ++k) _mm512_storeu_si512(destination + 64 * k, data[k]);
      destination += 256;
    }
    if (first) {
      for (int k = 0; k < 4; ++k) sums[k] = data[k];
      sums[0] = _mm512_xor_si512(sums[0], _mm512_zextsi128_si512(_mm_cvtsi64_si128(static_cast<long long>(state))));
      first = false;
    } else {
      for (int k = 0; k < 4; ++k) sums[k] = fold64(sums[k], by_256, data[k]);
    }
  }
  if (streaming) _mm_sfence();
  __m512i sum = sums[0];
  for (int k = 1; k < 4; ++k) sum = fold64(sum, by_64, sums[k]);
  unsigned char bytes[64];
  _mm512_storeu_si512(bytes, sum);
  return update_table(table_update(0, bytes, 64), destination, source, length, stores);
}

#endif  // SHARDSAVE_X86

#if SHARDSAVE_ARM

SHARDSAVE_FOLDS std::uint64_t update_pmull(std::uint64_t state, unsigned char* destination, const unsigned char* source,
                                           std::size_t length, Stores stores) {
  if (length < 256) return update_table(state, destination, source, length, stores);
  const uint64x2_t by_64 = constants16(kBy64), by_16 = constants16(kBy16);
  uint64x2_t sums[4] = {};
  bool first = true;
  for (; length >= 64; source += 64, length -= 64) {
    for (int k = 0; k < 4; ++k) {
      const uint8x16_t data = vld1q_u8(source + 16 * k);
      if (destination != nullptr) vst1q_u8(destination + 16 * k, data);
      const uint64x2_t words = vreinterpretq_u64_u8(data);
      sums[k] = first ? words : fold16(sums[k], by_64, words);
    }
    if (first) sums[0] = veorq_u64(sums[0], vsetq_lane_u64(state, vdupq_n_u64(0), 0));
    first = false;
    if (destination != nullptr) destination += 64;
  }
  uint64x2_t sum = sums[0];
  for (int k = 1; k < 4; ++k) sum = fold16(sum, by_16, sums[k]);
  unsigned char bytes[16];
  vst1q_u8(bytes, vreinterpretq_u8_u64(sum));
  return update_table(table_update(0, bytes, 16), destination, source, length, stores);
}

#endif  // SHARDSAVE_ARM

struct Implementation {
  const char* name;
  Update update;
  bool (*supported)();
};

// The fastest first.
constexpr Implementation kImplementations[] = {
#if SHARDSAVE_X86
    {"vpclmulqdq", update_vpclmul,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("vpclmulqdq") &&
              __builtin_cpu_supports("pclmul");
     }},
    {"pclmulqdq", update_pclmul, [] { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }},
#endif
#if SHARDSAVE_ARM
    {"pmull", update_pmull, [] { return (getauxval(AT_HWCAP) & HWCAP_PMULL) != 0; }},
#endif
    {"table", update_table, [] { return true; }},
};

std::atomic<const Implementation*> chosen{nullptr};

const Implementation& implementation() {
  const Implementation* candidate = chosen.load(std::memory_order_acquire);
  if (candidate == nullptr) {
    candidate = kImplementations;
    while (!candidate->supported()) ++candidate;
    chosen.store(candidate, std::memory_order_release);
  }
  return *candidate;
}

}  // namespace

std::uint64_t crc64_raw(const void* data, std::size_t length) {
  return implementation().update(0, nullptr, static_cast<const unsigned char*>(data), length, Stores::cached);
}

std::uint64_t copy_crc64_raw(void* destination, const void* source, std::size_t length, Stores stores) {
  if (length == 0) return 0;
  return implementation().update(0, static_cast<unsigned char*>(destination), static_cast<const unsigned char*>(source),
                                 length, stores);
}

std::uint64_t crc64_shift(std::uint64_t raw, std::uint64_t bytes) {
  for (std::size_t k = 3; bytes != 0 && raw != 0; bytes >>= 1, ++k) {
    if (bytes & 1) raw = multiply(raw, kSquares[k]);
  }
  return raw;
}

std::uint64_t crc64_finish(std::uint64_t raw, std::uint64_t length) {
  return raw ^ crc64_shift(~std::uint64_t{0}, length) ^ ~std::uint64_t{0};
}

const char* crc64_implementation() { return implementation().name; }

bool crc64_force_implementation(const char* name) {
  for (const Implementation& candidate : kImplementations) {
    if (std::strcmp(candidate.name, name) == 0 && candidate.supported()) {
      chosen.store(&candidate, std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace shardsave
