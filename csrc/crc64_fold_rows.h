// Folds rows that lie apart. No header of its own: crc64_rows.cpp includes it for each width of registers, in a
// namespace that has `Register`, TARGET, and for it `fold`, `constants`, `load`, and `load_last`: the `length` bytes
// before `end` with zeros before them, where memory begins at `begin`.

constexpr std::size_t kWidth = sizeof(Register);

// So many rows are folded side by side, since each fold waits for the one before it.
constexpr std::size_t kLanes = 4;

// A row is pieces of kWidth bytes, but that its first one may be shorter. So all rows end where a piece ends, and the
// gap between two of them only makes the fold from one to the next longer. `lanes`: of the rows that kRows lanes had
// before.
template <std::size_t kRows>
TARGET void fold_rows(Register (&lanes)[kRows], const unsigned char* begin, const unsigned char* row,
                      const unsigned char* end, std::size_t row_bytes, std::uint64_t step) {
  const std::size_t first = (row_bytes - 1) % kWidth + 1;
  const Register by_rows = constants(fold_by(8 * (kRows * step - row_bytes + first)));
  const Register by_width = constants(fold_by(8 * kWidth));
  Register sums[kRows];
  for (std::size_t k = 0; k < kRows; ++k) sums[k] = lanes[k];
  for (; row != end; row += kRows * row_bytes) {
    for (std::size_t k = 0; k < kRows; ++k) {
      sums[k] = fold(sums[k], by_rows, load_last(begin, row + k * row_bytes + first, first));
    }
    for (std::size_t at = first; at < row_bytes; at += kWidth) {
      for (std::size_t k = 0; k < kRows; ++k) sums[k] = fold(sums[k], by_width, load(row + k * row_bytes + at));
    }
  }
  for (std::size_t k = 0; k < kRows; ++k) lanes[k] = sums[k];
}

TARGET std::uint64_t sum_of_rows(const unsigned char* data, std::size_t rows, std::size_t row_bytes,
                                 std::uint64_t step) {
  const unsigned char* rest = data + rows % kLanes * row_bytes;
  Register alone[1] = {}, lanes[kLanes] = {};
  fold_rows(alone, data, data, rest, row_bytes, step);
  lanes[kLanes - 1] = alone[0];  // the last of these rows is kLanes rows before the first one of this lane
  fold_rows(lanes, data, rest, data + rows * row_bytes, row_bytes, step);
  const Register by_step = constants(fold_by(8 * step));
  Register sum = lanes[0];
  for (std::size_t k = 1; k < kLanes; ++k) sum = fold(sum, by_step, lanes[k]);
  unsigned char bytes[kWidth];
  std::memcpy(bytes, &sum, kWidth);
  return crc64_raw(bytes, kWidth);
}
