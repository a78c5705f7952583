// The GPU operations by name, on host arrays: what the Python module and the stand-alone driver share.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/operations.h"

namespace medcl::host {

enum class Format { f32, f16, bf16, i64, f64, i32, i16, i8, u8 };
inline size_t bytes_of(Format f) {
  constexpr size_t bytes[] = {4, 2, 2, 8, 8, 4, 2, 1, 1};
  return bytes[static_cast<int>(f)];
}

struct Array {
  Format format = Format::f32;
  std::vector<int64_t> shape, strides;  // in elements
  std::shared_ptr<unsigned char> data;  // at the first element
  size_t extent() const;                // elements from the first to the last one, both included
};

// Memory of exactly this size, so that ASan sees the element behind it, filled with 0xff (NaN).
std::shared_ptr<unsigned char> poisoned(size_t bytes);
Array make_array(Format format, std::vector<int64_t> shape, std::vector<int64_t> strides = {});

struct Call {
  std::string operation;
  std::map<std::string, Array> inputs;         // by the names of medcl_kernels/reference
  std::map<std::string, std::string> options;  // product, kinds, ignore_index, temperature, normalize, across
};

// Outputs by name; gradients have the layout of their input.
std::map<std::string, Array> run(const Call&);

void configure_emulator(const std::string& order, const std::string& copies, unsigned seed);
std::map<std::string, int64_t> emulator_statistics();  // since configure_emulator

}  // namespace medcl::host
