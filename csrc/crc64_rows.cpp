#include <cstring>

#include "crc64.h"
#include "crc64_math.h"

namespace shardsave {
namespace {

// Rows of so many bytes are summed one by one: what joins them costs little then.
constexpr std::size_t kLongRow = 65536;

std::uint64_t sum_one_by_one(const unsigned char* row, std::size_t rows, std::size_t row_bytes, std::uint64_t step) {
  const std::uint64_t factor = crc64_shift(kOne, step);
  std::uint64_t sum = 0;
  for (; rows != 0; --rows, row += row_bytes) sum = multiply(sum, factor) ^ crc64_raw(row, row_bytes);
  return sum;
}

#ifdef SHARDSAVE_FOLDS
namespace narrow {

#define TARGET SHARDSAVE_FOLDS
using Register = Bytes16;

TARGET inline Register constants(Fold fold) { return constants16(fold); }
TARGET inline Register fold(Register sum, Register by, Register next) { return fold16(sum, by, next); }

TARGET inline Register load(const unsigned char* source) {
  Register loaded;
  std::memcpy(&loaded, source, sizeof loaded);
  return loaded;
}

TARGET inline Register load_last(const unsigned char* begin, const unsigned char* end, std::size_t length) {
  static constexpr unsigned char kMask[32] = {0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,
                                              0,    0,    0,    0,    0,    0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF,
                                              0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
  if (end - begin >= 16) return load(end - 16) & load(kMask + length);
  unsigned char bytes[16] = {};
  std::memcpy(bytes + 16 - length, end - length, length);
  return load(bytes);
}

#include "crc64_fold_rows.h"
#undef TARGET

}  // namespace narrow
#endif

#ifdef SHARDSAVE_WIDE_FOLDS
namespace wide {

#define TARGET SHARDSAVE_WIDE_FOLDS
using Register = Bytes64;

TARGET inline Register constants(Fold fold) { return constants64(fold); }
TARGET inline Register fold(Register sum, Register by, Register next) { return fold64(sum, by, next); }
TARGET inline Register load(const unsigned char* source) { return _mm512_loadu_si512(source); }

// Only bytes that the mask names are read.
TARGET inline Register load_last(const unsigned char*, const unsigned char* end, std::size_t length) {
  return _mm512_maskz_loadu_epi8(~std::uint64_t{0} << (64 - length), end - 64);
}

#include "crc64_fold_rows.h"
#undef TARGET

}  // namespace wide
#endif

}  // namespace

std::uint64_t crc64_raw_of_rows(const void* data, std::size_t rows, std::size_t row_bytes, std::uint64_t step) {
  const auto* first = static_cast<const unsigned char*>(data);
  if (rows == 0 || row_bytes == 0) return 0;
  if (rows == 1 || row_bytes >= kLongRow) return sum_one_by_one(first, rows, row_bytes, step);
  [[maybe_unused]] const char* name = crc64_implementation();
#ifdef SHARDSAVE_WIDE_FOLDS
  if (std::strcmp(name, "vpclmulqdq") == 0) return wide::sum_of_rows(first, rows, row_bytes, step);
#endif
#ifdef SHARDSAVE_FOLDS
  if (std::strcmp(name, "table") != 0) return narrow::sum_of_rows(first, rows, row_bytes, step);
#endif
  return sum_one_by_one(first, rows, row_bytes, step);
}

}  // namespace shardsave
