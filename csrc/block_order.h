// The order in which a save through the page cache takes its blocks, so that workers do not queue for one file.
//
// Threads: stateless; may be called from any thread.
#pragma once

#include <cstddef>
#include <vector>

#include "request.h"

namespace shardsave {

// The page cache admits one writer at a time to a file (the inode's lock). Two workers keep a file busy, one copying
// while the other writes; more would spin at the lock.
constexpr std::size_t kWritersPerFile = 2;

// Block numbers in an order in which as many files as there are workers take turns.
std::vector<std::size_t> interleave_files(const std::vector<Block>& blocks, std::size_t files, std::size_t workers);

}  // namespace shardsave
