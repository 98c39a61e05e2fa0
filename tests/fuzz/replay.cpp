// Runs a fuzz target on files: argv = threads, then paths. With several threads each of them runs every file, at the
// same time as the others: what race detectors are to see.
#include <fstream>
#include <iterator>
#include <thread>

#include "draw.hpp"

int main(int argc, char** argv) {
  const auto replay = [&] {
    for (int i = 2; i < argc; ++i) {
      std::ifstream file(argv[i], std::ios::binary);
      const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
      // A copy that ends where the input does.
      const std::vector<uint8_t> data(bytes.begin(), bytes.end());
      LLVMFuzzerTestOneInput(data.data(), data.size());
    }
  };
  std::vector<std::thread> others;
  fuzz::keeps_instruction_set = std::atoi(argv[1]) > 1;
  for (int i = 1; i < std::atoi(argv[1]); ++i) others.emplace_back(replay);
  replay();
  for (std::thread& other : others) other.join();
  std::printf("%d inputs\n", argc - 2);
}
