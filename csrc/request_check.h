// Validates the tables of a request before a run touches a file or memory.
//
// Threads: stateless; may be called from any thread.
#pragma once

#include "request.h"

namespace shardsave {

// Throws std::invalid_argument when the tables do not fit together.
void check_request(const Request& request);

}  // namespace shardsave
