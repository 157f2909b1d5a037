#include "host_copy.h"

#include <cstring>

namespace shardsave {

std::uint64_t host_copy(std::byte* destination, const std::byte* source, std::size_t length, Stores stores,
                        bool checksum) {
  if (checksum) return copy_crc64_raw(destination, source, length, stores);
  if (length != 0) std::memcpy(destination, source, length);
  return 0;
}

}  // namespace shardsave
