// Waits until the disk has the contents of several open files or directories, for all of them at the same time.
//
// Threads: any; those that it starts have ended when it returns.
// Ownership: the caller owns the descriptors.
#pragma once

#include <vector>

namespace shardsave {

// Calls fsync(2) once for each of `descriptors`, whatever becomes of the others. Returns the errno of each, 0 for
// success. There is no second try: after an error the kernel has dropped the pages, and would report success.
std::vector<int> sync_files(const std::vector<int>& descriptors);

}  // namespace shardsave
