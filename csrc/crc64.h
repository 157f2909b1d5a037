// CRC-64/NVME, alone or in one loop with a copy, and the arithmetic that combines checksums of parts.
//
// "Raw" is the register arithmetic with no initial value and no final inversion: raw(A ‖ B) = shift(raw(A), |B|) ^
// raw(B). So workers can sum the blocks of one tensor in any order: each sum is shifted by its distance from the
// tensor's end, and all are XORed. crc64_finish() adds the initial value and the inversion that the standard requires.
//
// Threads: all functions may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shardsave {

// How the copying loop stores: `streaming` writes past the processor's caches (for memory that is not read again soon),
// `cached` leaves the destination in them (for a small staging area that is read again at once).
enum class Stores { streaming, cached };

std::uint64_t crc64_raw(const void* data, std::size_t length);
std::uint64_t copy_crc64_raw(void* destination, const void* source, std::size_t length, Stores stores);

// raw · x^(8·bytes) mod P: what `raw` contributes when `bytes` more bytes follow.
std::uint64_t crc64_shift(std::uint64_t raw, std::uint64_t bytes);

// The raw sum of `rows` rows of `row_bytes` bytes each, which follow one another in `data` and begin `step` bytes apart
// in what is summed; the bytes between them count as zero.
std::uint64_t crc64_raw_of_rows(const void* data, std::size_t rows, std::size_t row_bytes, std::uint64_t step);

// The standard checksum of `length` bytes whose raw sum is `raw`.
std::uint64_t crc64_finish(std::uint64_t raw, std::uint64_t length);

// "vpclmulqdq", "pclmulqdq", "pmull" or "table": the fastest that this processor supports, chosen at the first call, or
// the forced one.
const char* crc64_implementation();

// For tests: uses this implementation from now on. Returns false, and changes nothing, when the processor does not
// support it.
bool crc64_force_implementation(const char* name);

}  // namespace shardsave
