// Method: every implementation that this processor supports is compared with the table one, over lengths, misalignments
// and both kinds of stores. Sums of parts and of rows must combine, the copy must be exact, and nothing outside the
// destination may change. Under ASan and UBSan; make native-tests has the command.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "crc64.h"

using namespace shardsave;

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

int main() {
  std::mt19937_64 random(1);
  std::vector<unsigned char> data(70000), copy(data.size() + 64);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  int compared = 0;
  for (const char* name : {"vpclmulqdq", "pclmulqdq", "pmull", "table"}) {
    for (int round = 0; round < 3000; ++round) {
      const std::size_t length = round < 2000 ? random() % 5000 : random() % 60000;
      const std::size_t source = random() % 64, target = random() % 64;
      CHECK(crc64_force_implementation("table"));
      const std::uint64_t expected = crc64_raw(data.data() + source, length);
      if (!crc64_force_implementation(name)) break;
      CHECK(crc64_raw(data.data() + source, length) == expected);
      const std::size_t cut = length == 0 ? 0 : random() % length;
      const std::uint64_t left = crc64_raw(data.data() + source, cut);
      const std::uint64_t right = crc64_raw(data.data() + source + cut, length - cut);
      CHECK((crc64_shift(left, length - cut) ^ right) == expected);
      const std::size_t rows = 1 + random() % (round % 2 == 0 ? 9 : 300), row_bytes = length / rows;
      const std::size_t step = row_bytes + random() % 99;
      std::uint64_t apart = 0;
      for (std::size_t row = 0; row < rows; ++row) {
        apart = crc64_shift(apart, step) ^ crc64_raw(data.data() + source + row * row_bytes, row_bytes);
      }
      CHECK(crc64_raw_of_rows(data.data() + source, rows, row_bytes, step) == apart);
      for (Stores stores : {Stores::streaming, Stores::cached}) {
        std::memset(copy.data(), 0x5A, copy.size());
        CHECK(copy_crc64_raw(copy.data() + target, data.data() + source, length, stores) == expected);
        CHECK(std::memcmp(copy.data() + target, data.data() + source, length) == 0);
        for (std::size_t k = 0; k < target; ++k) CHECK(copy[k] == 0x5A);
        for (std::size_t k = target + length; k < copy.size(); ++k) CHECK(copy[k] == 0x5A);
      }
      ++compared;
    }
    if (crc64_force_implementation(name)) CHECK(crc64_finish(crc64_raw("123456789", 9), 9) == 0xAE8B14860A799888);
  }
  std::printf("%d comparisons ok\n", compared);
}
