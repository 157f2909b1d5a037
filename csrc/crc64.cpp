#include "crc64.h"

#include <array>
#include <atomic>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define SHARDSAVE_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define SHARDSAVE_ARM 1
#endif

namespace shardsave {
namespace {

// The polynomial of CRC-64/NVME in reflected order: bit 63 is the coefficient of x^0.
constexpr std::uint64_t kReflected = 0x9A6C9329AC4BC9B5;
constexpr std::uint64_t kOne = std::uint64_t{1} << 63;

constexpr std::uint64_t times_x(std::uint64_t value) { return (value >> 1) ^ ((value & 1) ? kReflected : 0); }

constexpr std::uint64_t multiply(std::uint64_t left, std::uint64_t right) {
  std::uint64_t product = 0;
  for (; left != 0; left <<= 1, right = times_x(right)) product ^= (left & kOne) ? right : 0;
  return product;
}

// x^(2^k) mod P for every k.
constexpr std::array<std::uint64_t, 67> make_squares() {
  std::array<std::uint64_t, 67> squares{};
  squares[0] = kOne >> 1;
  for (std::size_t k = 1; k < squares.size(); ++k) squares[k] = multiply(squares[k - 1], squares[k - 1]);
  return squares;
}
constexpr auto kSquares = make_squares();

// x^bits mod P.
[[maybe_unused]] constexpr std::uint64_t power(std::uint64_t bits) {
  std::uint64_t result = kOne;
  for (std::size_t k = 0; bits != 0; bits >>= 1, ++k) {
    if (bits & 1) result = multiply(result, kSquares[k]);
  }
  return result;
}

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

// Folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ"): a 128-bit accumulator (low
// half: earlier bytes) represents low·x^64 + high. To shift it by `distance` bits, multiply low by x^(distance + 64)
// and high by x^distance. The carry-less product of reflected operands is the product divided by x, so each constant
// has one power of x less.
struct Fold {
  std::uint64_t low, high;
};
constexpr Fold fold_by(std::uint64_t distance) { return {power(distance + 63), power(distance - 1)}; }
[[maybe_unused]] constexpr Fold kBy16 = fold_by(128), kBy64 = fold_by(512), kBy256 = fold_by(2048);  // named by bytes

#if SHARDSAVE_X86

__attribute__((target("pclmul,sse4.1"))) inline __m128i fold_sse(__m128i accumulator, __m128i constants, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(accumulator, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(accumulator, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

inline __m128i constants_sse(Fold fold) {
  return _mm_set_epi64x(static_cast<long long>(fold.high), static_cast<long long>(fold.low));
}

__attribute__((target("pclmul,sse4.1"))) std::uint64_t update_pclmul(std::uint64_t state, unsigned char* destination,
                                                                     const unsigned char* source, std::size_t length,
                                                                     Stores stores) {
  if (length < 256) return update_table(state, destination, source, length, stores);
  const bool streaming = destination != nullptr && stores == Stores::streaming;
  if (streaming) {
    const std::size_t head = (16 - reinterpret_cast<std::uintptr_t>(destination) % 16) % 16;
    state = update_table(state, destination, source, head, stores);
    destination += head, source += head, length -= head;
  }
  const __m128i by_64 = constants_sse(kBy64), by_16 = constants_sse(kBy16);
  __m128i sums[4] = {};
  bool first = true;
  for (; length >= 64; source += 64, length -= 64) {
    for (int k = 0; k < 4; ++k) {
      const __m128i data = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16 * k));
      if (destination != nullptr) {
        auto* target = reinterpret_cast<__m128i*>(destination + 16 * k);
        streaming ? _mm_stream_si128(target, data) : _mm_storeu_si128(target, data);
      }
      sums[k] = first ? data : fold_sse(sums[k], by_64, data);
    }
    if (first) sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi64_si128(static_cast<long long>(state)));
    first = false;
    if (destination != nullptr) destination += 64;
  }
  if (streaming) _mm_sfence();
  __m128i sum = sums[0];
  for (int k = 1; k < 4; ++k) sum = fold_sse(sum, by_16, sums[k]);
  unsigned char bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), sum);
  return update_table(table_update(0, bytes, 16), destination, source, length, stores);
}

#define SHARDSAVE_AVX512 target("avx512f,avx512dq,avx512bw,vpclmulqdq,pclmul,sse4.1")

__attribute__((SHARDSAVE_AVX512)) inline __m512i fold_avx512(__m512i accumulator, __m512i constants, __m512i next) {
  const __m512i low = _mm512_clmulepi64_epi128(accumulator, constants, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(accumulator, constants, 0x11);
  return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // three-way XOR
}

__attribute__((SHARDSAVE_AVX512)) inline __m512i four_times(Fold fold) {
  const auto low = static_cast<long long>(fold.low), high = static_cast<long long>(fold.high);
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

__attribute__((SHARDSAVE_AVX512)) std::uint64_t update_vpclmul(std::uint64_t state, unsigned char* destination,
                                                               const unsigned char* source, std::size_t length,
                                                               Stores stores) {
  if (length < 1024) return update_pclmul(state, destination, source, length, stores);
  const bool streaming = destination != nullptr && stores == Stores::streaming;
  if (streaming) {
    const std::size_t head = (64 - reinterpret_cast<std::uintptr_t>(destination) % 64) % 64;
    state = update_table(state, destination, source, head, stores);
    destination += head, source += head, length -= head;
  }
  const __m512i by_256 = four_times(kBy256), by_64 = four_times(kBy64);
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
      for (int k = 0; k < 4; ++k) sums[k] = fold_avx512(sums[k], by_256, data[k]);
    }
  }
  if (streaming) _mm_sfence();
  __m512i sum = sums[0];
  for (int k = 1; k < 4; ++k) sum = fold_avx512(sum, by_64, sums[k]);
  unsigned char bytes[64];
  _mm512_storeu_si512(bytes, sum);
  return update_table(table_update(0, bytes, 64), destination, source, length, stores);
}

#endif  // SHARDSAVE_X86

#if SHARDSAVE_ARM

__attribute__((target("+crypto"))) inline uint64x2_t fold_arm(uint64x2_t accumulator, uint64x2_t constants,
                                                              uint64x2_t next) {
  const poly128_t low = vmull_p64(static_cast<poly64_t>(vgetq_lane_u64(accumulator, 0)),
                                  static_cast<poly64_t>(vgetq_lane_u64(constants, 0)));
  const poly128_t high = vmull_p64(static_cast<poly64_t>(vgetq_lane_u64(accumulator, 1)),
                                   static_cast<poly64_t>(vgetq_lane_u64(constants, 1)));
  return veorq_u64(veorq_u64(vreinterpretq_u64_p128(low), vreinterpretq_u64_p128(high)), next);
}

__attribute__((target("+crypto"))) std::uint64_t update_pmull(std::uint64_t state, unsigned char* destination,
                                                              const unsigned char* source, std::size_t length,
                                                              Stores stores) {
  if (length < 256) return update_table(state, destination, source, length, stores);
  const std::uint64_t far[2] = {kBy64.low, kBy64.high}, near[2] = {kBy16.low, kBy16.high};
  const uint64x2_t by_64 = vld1q_u64(far), by_16 = vld1q_u64(near);
  uint64x2_t sums[4] = {};
  bool first = true;
  for (; length >= 64; source += 64, length -= 64) {
    for (int k = 0; k < 4; ++k) {
      const uint8x16_t data = vld1q_u8(source + 16 * k);
      if (destination != nullptr) vst1q_u8(destination + 16 * k, data);
      const uint64x2_t words = vreinterpretq_u64_u8(data);
      sums[k] = first ? words : fold_arm(sums[k], by_64, words);
    }
    if (first) sums[0] = veorq_u64(sums[0], vsetq_lane_u64(state, vdupq_n_u64(0), 0));
    first = false;
    if (destination != nullptr) destination += 64;
  }
  uint64x2_t sum = sums[0];
  for (int k = 1; k < 4; ++k) sum = fold_arm(sum, by_16, sums[k]);
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

std::uint64_t crc64_raw_of_rows(const void* data, std::size_t rows, std::size_t row_bytes, std::uint64_t step) {
  const std::uint64_t factor = crc64_shift(kOne, step);
  const auto* row = static_cast<const unsigned char*>(data);
  std::uint64_t sum = 0;
  for (; rows != 0; --rows, row += row_bytes) sum = multiply(sum, factor) ^ crc64_raw(row, row_bytes);
  return sum;
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
