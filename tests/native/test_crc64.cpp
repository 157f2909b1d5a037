// Method: every implementation that this processor has is compared with the table one over lengths, misalignments and
// both kinds of stores; the sum must be linear, the copy exact, and nothing outside the destination touched. g++
// -std=c++17 -g -fsanitize=address,undefined -Icsrc tests/native/test_crc64.cpp csrc/crc64.cpp -o test_crc64
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "crc64.h"

using namespace shardsave;

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                               \
    }                                                             \
  } while (false)

int main() {
  std::mt19937_64 random(1);
  std::vector<unsigned char> data(70000), copy(data.size() + 64);
  for (auto& byte : data) byte = static_cast<unsigned char>(random());
  int compared = 0;
  for (const char* name : {"vpclmulqdq", "pclmulqdq", "pmull", "table"}) {
    for (int round = 0; round < 3000; ++round) {
      const std::size_t length = round < 2000 ? random() % 5000 : random() % 60000;
      const std::size_t from = random() % 64, to = random() % 64;
      CHECK(crc64_force_implementation("table"));
      const std::uint64_t expected = crc64_raw(data.data() + from, length);
      if (!crc64_force_implementation(name)) break;
      CHECK(crc64_raw(data.data() + from, length) == expected);
      const std::size_t cut = length == 0 ? 0 : random() % length;
      const std::uint64_t left = crc64_raw(data.data() + from, cut);
      const std::uint64_t right = crc64_raw(data.data() + from + cut, length - cut);
      CHECK((crc64_shift(left, length - cut) ^ right) == expected);
      for (Stores stores : {Stores::streaming, Stores::cached}) {
        std::memset(copy.data(), 0x5A, copy.size());
        CHECK(copy_crc64_raw(copy.data() + to, data.data() + from, length, stores) == expected);
        CHECK(std::memcmp(copy.data() + to, data.data() + from, length) == 0);
        for (std::size_t k = 0; k < to; ++k) CHECK(copy[k] == 0x5A);
        for (std::size_t k = to + length; k < copy.size(); ++k) CHECK(copy[k] == 0x5A);
      }
      ++compared;
    }
    if (crc64_force_implementation(name)) CHECK(crc64_finish(crc64_raw("123456789", 9), 9) == 0xAE8B14860A799888);
  }
  std::printf("%d comparisons ok\n", compared);
}
