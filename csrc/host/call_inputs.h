// What the calls of operations on host arrays share: memory of exact sizes, arrays by name, options.
#pragma once
#include <algorithm>
#include <functional>
#include <numeric>
#include <set>
#include <sstream>

#include "host/calls.h"

namespace medcl::host {

// Poisoned memory of exact sizes; sorting on the host.
class HostWorkspace : public cuda::Workspace {
 public:
  void* allocate(size_t bytes) override { return held_.emplace_back(poisoned(bytes)).get(); }
  void sort(const int64_t* keys, int64_t lists, int64_t n, const int64_t** sorted, const int64_t** order) override {
    auto *values = take<int64_t>(lists * n), *places = take<int64_t>(lists * n);
    for (int64_t list = 0; list < lists; ++list) {
      const int64_t* own = keys + list * n;
      int64_t* place = places + list * n;
      std::iota(place, place + n, 0);
      std::stable_sort(place, place + n, [&](int64_t a, int64_t b) { return own[a] < own[b]; });
      for (int64_t i = 0; i < n; ++i) values[list * n + i] = own[place[i]];
    }
    *sorted = values;
    *order = places;
  }

 private:
  std::vector<std::shared_ptr<unsigned char>> held_;
};

inline const Array* find(const Call& call, const std::string& name) {
  const auto found = call.inputs.find(name);
  return found == call.inputs.end() ? nullptr : &found->second;
}
inline const Array& need(const Call& call, const std::string& name) {
  const Array* array = find(call, name);
  if (!array) throw std::invalid_argument(call.operation + " needs " + name);
  return *array;
}
template <class T>
T* data(const Array& array) {
  return reinterpret_cast<T*>(array.data.get());
}
template <class T>
const T* optional_data(const Call& call, const std::string& name) {
  const Array* array = find(call, name);
  return array ? data<const T>(*array) : nullptr;
}

inline cuda::Rows rows(const Array& array) {
  cuda::Rows r;
  r.data = array.data.get();
  r.type = array.format == Format::f32   ? cuda::Type::f32
           : array.format == Format::f16 ? cuda::Type::f16
                                         : cuda::Type::bf16;
  r.batch = array.shape.at(0);
  r.dim = array.shape.at(1);
  r.length = array.shape.at(2);
  r.stride_b = array.strides[0];
  r.stride_d = array.strides[1];
  r.stride_l = array.strides[2];
  return r;
}

// known: further options, of the operation itself
inline cuda::Options parse_options(const Call& call, const std::set<std::string>& known = {}) {
  cuda::Options o;
  for (const auto& [name, value] : call.options) {
    if (name == "product") {
      const std::vector<std::string> names{"bf16", "fp16", "tf32", "ieee"};
      const auto at = std::find(names.begin(), names.end(), value) - names.begin();
      if (at == 4) throw std::invalid_argument("product: bf16, fp16, tf32 or ieee");
      o.product = static_cast<cuda::Product>(at);
    } else if (name == "kinds") {
      std::stringstream words(value);
      o.selections = 0;
      for (std::string word; std::getline(words, word, ',');)
        o.kinds[o.selections++] = word == "all" ? cuda::kAll : word == "same" ? cuda::kSame : cuda::kDifferent;
    } else if (name == "ignore_index") {
      o.ignore_index = std::stoll(value);
    } else if (name == "temperature") {
      o.temperature = std::stof(value);
    } else if (name == "normalize") {
      o.normalize = value == "1";
    } else if (name == "across") {
      o.across = value == "1";
    } else if (name == "wgmma") {
      o.wgmma = value == "1";
    } else if (known.count(name)) {
      continue;
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  return o;
}

// Runs an operation of patch-affinity contrast; false: it is none (patch_calls.cpp).
bool run_patches(const Call&, std::map<std::string, Array>& out);

}  // namespace medcl::host
