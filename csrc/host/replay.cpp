// Runs recorded calls (tests/emulator_cases.py writes them) and compares with their expected results, without Python:
// for sanitizers and for planted bugs.
//   replay FILE ORDER COPIES SEED [norace]      ORDER forward|reverse|random, COPIES eager|late
// Prints one line per failed call and a summary; exit status 0 right, 2 wrong, 3 the emulator stopped a kernel.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "host/calls.h"
#include "host/emulator/emulator.h"
#include "pairs/numbers.h"

namespace medcl::host {
namespace {

class Reader {
 public:
  explicit Reader(const char* path) : in_(path, std::ios::binary) {
    if (!in_) throw std::runtime_error(std::string("cannot read ") + path);
  }
  template <class T>
  T number() {
    T x;
    bytes(&x, sizeof x);
    return x;
  }
  std::string text() {
    std::string s(number<int64_t>(), ' ');
    bytes(s.data(), s.size());
    return s;
  }
  std::vector<int64_t> sizes() {
    std::vector<int64_t> v(number<int64_t>());
    for (auto& x : v) x = number<int64_t>();
    return v;
  }
  // name, format, shape, strides, storage
  std::pair<std::string, Array> array() {
    const std::string name = text();
    const auto format = static_cast<Format>(number<int64_t>());
    auto shape = sizes(), strides = sizes();
    Array a = make_array(format, shape, strides);
    bytes(a.data.get(), a.extent() * bytes_of(format));
    return {name, a};
  }

 private:
  void bytes(void* to, size_t n) {
    if (!in_.read(static_cast<char*>(to), static_cast<std::streamsize>(n))) throw std::runtime_error("file ends early");
  }
  std::ifstream in_;
};

double value(const Array& a, int64_t offset) {
  const unsigned char* p = a.data.get() + offset * static_cast<int64_t>(bytes_of(a.format));
  const auto as = [p](auto x) {
    std::memcpy(&x, p, sizeof x);
    return x;
  };
  switch (a.format) {
    case Format::f32:
      return as(float());
    case Format::f64:
      return as(double());
    case Format::f16:
      return half_to_float(as(Half()));
    case Format::bf16:
      return bf16_to_float(as(Bf16()));
    case Format::i64:
      return static_cast<double>(as(int64_t()));
    default:
      throw std::runtime_error("results are floats or int64");
  }
}

// the largest difference to the expected values (in order of the last axis); infinity where one of them is not finite
double difference(const Array& got, const Array& want) {
  double worst = 0;
  std::vector<int64_t> at(got.shape.size(), 0);
  const int64_t n = static_cast<int64_t>(want.extent());
  for (int64_t i = 0; i < n; ++i) {
    int64_t offset = 0;
    for (size_t d = 0; d < at.size(); ++d) offset += at[d] * got.strides[d];
    const double x = value(got, offset), y = value(want, i);
    const double off = x == y ? 0 : std::isfinite(x) && std::isfinite(y) ? std::fabs(x - y) : INFINITY;
    worst = std::max(worst, off);
    for (size_t d = at.size(); d-- > 0;) {
      if (++at[d] < got.shape[d]) break;
      at[d] = 0;
    }
  }
  return worst;
}

int replay(int count, char** arguments) {
  if (count < 5) throw std::runtime_error("replay FILE ORDER COPIES SEED [norace]");
  configure_emulator(arguments[2], arguments[3], static_cast<unsigned>(std::atoi(arguments[4])));
  emulator::config().stack = 256 << 10;
  emulator::config().race = count < 6;
  Reader file(arguments[1]);
  const auto calls = file.number<int64_t>();
  int wrong = 0;
  for (int64_t c = 0; c < calls; ++c) {
    const std::string name = file.text();
    Call call;
    call.operation = file.text();
    for (auto n = file.number<int64_t>(); n--;) {
      const std::string option = file.text();
      call.options[option] = file.text();
    }
    for (auto n = file.number<int64_t>(); n--;) call.inputs.insert(file.array());
    std::map<std::string, Array> got;
    try {
      got = run(call);
    } catch (const std::exception& error) {
      std::printf("STOPPED %s: %s\n", name.c_str(), error.what());
      return 3;
    }
    for (auto n = file.number<int64_t>(); n--;) {
      const auto [output, want] = file.array();
      const auto tolerance = file.number<double>();
      const double off = difference(got.at(output), want);
      if (off <= tolerance) continue;
      ++wrong;
      std::printf("WRONG %s %s: off by %.3g, allowed %.3g\n", name.c_str(), output.c_str(), off, tolerance);
    }
  }
  const auto statistics = emulator_statistics();
  std::printf("%lld calls, %d wrong", static_cast<long long>(calls), wrong);
  for (const auto& [name, n] : statistics) std::printf(", %s %lld", name.c_str(), static_cast<long long>(n));
  std::printf("\n");
  return wrong ? 2 : 0;
}

}  // namespace
}  // namespace medcl::host

int main(int count, char** arguments) {
  try {
    return medcl::host::replay(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
