// Arithmetic of polynomials modulo that of CRC-64/NVME, and folding in the processor's registers. For crc64.cpp and
// crc64_rows.cpp.
//
// Threads: stateless; may be called from any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define SHARDSAVE_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define SHARDSAVE_ARM 1
#endif

namespace shardsave {

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
constexpr std::uint64_t power(std::uint64_t bits) {
  std::uint64_t result = kOne;
  for (std::size_t k = 0; bits != 0; bits >>= 1, ++k) {
    if (bits & 1) result = multiply(result, kSquares[k]);
  }
  return result;
}

// Folding (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ"): a 128-bit accumulator (low
// half: earlier bytes) represents low·x^64 + high. To shift it by `distance` bits, multiply low by x^(distance + 64)
// and high by x^distance. The carry-less product of reflected operands is the product divided by x, so each constant
// has one power of x less.
struct Fold {
  std::uint64_t low, high;
};
constexpr Fold fold_by(std::uint64_t distance) { return {power(distance + 63), power(distance - 1)}; }
constexpr Fold kBy16 = fold_by(128), kBy64 = fold_by(512), kBy256 = fold_by(2048);  // named by bytes

// fold16, fold64: `accumulator`, shifted by what `constants` were made of, and XORed with `next`; fold64 does so with
// four of 16 bytes.

#if SHARDSAVE_X86

#define SHARDSAVE_FOLDS __attribute__((target("pclmul,sse4.1")))
using Bytes16 = __m128i;

SHARDSAVE_FOLDS inline Bytes16 fold16(Bytes16 accumulator, Bytes16 constants, Bytes16 next) {
  const __m128i low = _mm_clmulepi64_si128(accumulator, constants, 0x00);
  const __m128i high = _mm_clmulepi64_si128(accumulator, constants, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

inline Bytes16 constants16(Fold fold) {
  return _mm_set_epi64x(static_cast<long long>(fold.high), static_cast<long long>(fold.low));
}

#define SHARDSAVE_WIDE_FOLDS __attribute__((target("avx512f,avx512dq,avx512bw,vpclmulqdq,pclmul,sse4.1")))
using Bytes64 = __m512i;

SHARDSAVE_WIDE_FOLDS inline Bytes64 fold64(Bytes64 accumulator, Bytes64 constants, Bytes64 next) {
  const __m512i low = _mm512_clmulepi64_epi128(accumulator, constants, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(accumulator, constants, 0x11);
  return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // three-way XOR
}

SHARDSAVE_WIDE_FOLDS inline Bytes64 constants64(Fold fold) {
  const auto low = static_cast<long long>(fold.low), high = static_cast<long long>(fold.high);
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

#elif SHARDSAVE_ARM

#define SHARDSAVE_FOLDS __attribute__((target("+crypto")))
using Bytes16 = uint64x2_t;

SHARDSAVE_FOLDS inline Bytes16 fold16(Bytes16 accumulator, Bytes16 constants, Bytes16 next) {
  const poly128_t low = vmull_p64(static_cast<poly64_t>(vgetq_lane_u64(accumulator, 0)),
                                  static_cast<poly64_t>(vgetq_lane_u64(constants, 0)));
  const poly128_t high = vmull_p64(static_cast<poly64_t>(vgetq_lane_u64(accumulator, 1)),
                                   static_cast<poly64_t>(vgetq_lane_u64(constants, 1)));
  return veorq_u64(veorq_u64(vreinterpretq_u64_p128(low), vreinterpretq_u64_p128(high)), next);
}

inline Bytes16 constants16(Fold fold) {
  const std::uint64_t both[2] = {fold.low, fold.high};
  return vld1q_u64(both);
}

#endif

}  // namespace shardsave
