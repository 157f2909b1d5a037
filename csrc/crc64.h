// CRC-64/NVME, alone or in one loop with a copy, and the arithmetic that makes it linear.
//
// "Raw" is the register arithmetic with no initial value and no final inversion: raw(A ‖ B) = shift(raw(A), |B|) ^
// raw(B). So blocks of one tensor can be summed by any worker in any order, each shifted by its distance from the
// tensor's end, and XORed together; finish() then adds the initial value and the inversion that the standard asks for.
//
// All functions may be called from any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shardsave {

// How the copying loop stores: `streaming` goes past the caches (for memory that is not read again soon), `cached`
// keeps the destination in them (for a small staging area that is).
enum class Stores { streaming, cached };

std::uint64_t crc64_raw(const void* data, std::size_t length);
std::uint64_t copy_crc64_raw(void* destination, const void* source, std::size_t length, Stores stores);

// raw · x^(8·bytes) mod P: what `raw` contributes when `bytes` more bytes follow.
std::uint64_t crc64_shift(std::uint64_t raw, std::uint64_t bytes);

// The standard checksum of `length` bytes whose raw sum is `raw`.
std::uint64_t crc64_finish(std::uint64_t raw, std::uint64_t length);

// Copies without a sum, with the same stores.
void copy_bytes(void* destination, const void* source, std::size_t length, Stores stores);

// "vpclmulqdq", "pclmulqdq", "pmull" or "table": the best of this processor, chosen at the first call, or as forced.
const char* crc64_implementation();

// For tests: use this implementation from now on; false (and no change) when the processor does not have it.
bool crc64_force_implementation(const char* name);

}  // namespace shardsave
