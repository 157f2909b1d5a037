// Copies host memory to or from a slot of the ring, in one loop with the checksum.
//
// Threads: stateless; the copy runs on the calling thread and has ended on return.
#pragma once

#include <cstddef>
#include <cstdint>

#include "crc64.h"

namespace shardsave {

// Copies `length` bytes between memory that does not overlap. Returns their raw CRC (crc64.h) with `checksum`, else 0.
// `stores` only matters with `checksum`; without it this is memcpy, which decides itself how to store.
std::uint64_t host_copy(std::byte* destination, const std::byte* source, std::size_t length, Stores stores,
                        bool checksum);

}  // namespace shardsave
