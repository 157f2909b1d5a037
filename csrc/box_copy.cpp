#include "box_copy.h"

#include <cstddef>
#include <cstring>

namespace shardsave {
namespace {

// A constant length lets the compiler move each run with one instruction.
template <std::size_t kRun>
void copy_fixed(std::byte* to, const std::byte* from, const BoxCopy& copy) {
  for (std::int64_t n = 0; n < copy.inner; ++n) {
    std::memcpy(to, from, kRun);
    to += copy.inner_destination_stride;
    from += copy.inner_source_stride;
  }
}

void copy_inner(std::byte* to, const std::byte* from, const BoxCopy& copy) {
  switch (copy.run) {
    case 1:
      return copy_fixed<1>(to, from, copy);
    case 2:
      return copy_fixed<2>(to, from, copy);
    case 4:
      return copy_fixed<4>(to, from, copy);
    case 8:
      return copy_fixed<8>(to, from, copy);
    case 16:
      return copy_fixed<16>(to, from, copy);
    default:
      for (std::int64_t n = 0; n < copy.inner; ++n) {
        std::memcpy(to, from, static_cast<std::size_t>(copy.run));
        to += copy.inner_destination_stride;
        from += copy.inner_source_stride;
      }
  }
}

}  // namespace

void copy_boxes(const std::vector<BoxCopy>& copies) {
  for (const BoxCopy& copy : copies) {
    auto* to = reinterpret_cast<std::byte*>(copy.destination);
    const auto* from = reinterpret_cast<const std::byte*>(copy.source);
    for (std::int64_t n = 0; n < copy.outer; ++n) {
      copy_inner(to, from, copy);
      to += copy.outer_destination_stride;
      from += copy.outer_source_stride;
    }
  }
}

}  // namespace shardsave
