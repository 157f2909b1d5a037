// Copies boxes between tensors in host memory: rows of bytes, with strides on both sides.
//
// Threads: stateless; may be called from any thread. The caller owns the memory, and vouches for the addresses.
#pragma once

#include <cstdint>
#include <vector>

namespace shardsave {

// Runs of `run` consecutive bytes: `outer` times `inner` of them, each level with a stride at the source and one at the
// destination. All strides are in bytes.
struct BoxCopy {
  std::int64_t source, destination, run;
  std::int64_t inner, inner_source_stride, inner_destination_stride;
  std::int64_t outer, outer_source_stride, outer_destination_stride;
};

void copy_boxes(const std::vector<BoxCopy>& copies);

}  // namespace shardsave
