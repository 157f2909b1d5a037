#include "block_order.h"

#include <algorithm>
#include <utility>

namespace shardsave {

std::vector<std::size_t> interleave_files(const std::vector<Block>& blocks, std::size_t files, std::size_t workers) {
  std::vector<std::size_t> order(blocks.size()), place_in_file(blocks.size()), blocks_of_file(files);
  for (std::size_t n = 0; n < blocks.size(); ++n) {
    order[n] = n;
    place_in_file[n] = blocks_of_file[static_cast<std::size_t>(blocks[n].file)]++;
  }
  // Files form groups of as many as there are workers; within a group, first the first block of every file.
  const auto rank = [&](std::size_t n) {
    return std::make_pair(static_cast<std::size_t>(blocks[n].file) / workers, place_in_file[n]);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t left, std::size_t right) { return rank(left) < rank(right); });
  return order;
}

}  // namespace shardsave
