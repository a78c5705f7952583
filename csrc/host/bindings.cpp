// The module _host: the CUDA kernels, unchanged, on NumPy arrays through the emulator. For tests; in no wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>

#include "host/calls.h"
#include "host/fragments.h"

namespace py = pybind11;
using medcl::host::Array;
using medcl::host::Format;

namespace {

// NumPy's names in the order of Format; uint16 carries the bits of bfloat16.
constexpr const char* kNames[] = {"float32", "float16", "uint16", "int64", "float64",
                                  "int32",   "int16",   "int8",   "uint8"};

// No copy: strides are part of what is tested.
Array view(const py::array& x) {
  Array a;
  const py::dtype type = x.dtype();
  const auto* name =
      std::find_if(std::begin(kNames), std::end(kNames), [&](const char* n) { return type.equal(py::dtype(n)); });
  if (name == std::end(kNames)) throw py::type_error("no array of this type");
  a.format = static_cast<Format>(name - std::begin(kNames));
  for (py::ssize_t i = 0; i < x.ndim(); ++i) {
    a.shape.push_back(x.shape(i));
    a.strides.push_back(x.strides(i) / type.itemsize());
  }
  a.data = {static_cast<unsigned char*>(const_cast<void*>(x.data())), [](unsigned char*) {}};
  return a;
}

py::array to_numpy(const Array& a) {
  std::vector<py::ssize_t> strides;
  for (const int64_t stride : a.strides)
    strides.push_back(stride * static_cast<py::ssize_t>(medcl::host::bytes_of(a.format)));
  auto* hold = new std::shared_ptr<unsigned char>(a.data);
  const py::capsule owner(hold, [](void* p) { delete static_cast<std::shared_ptr<unsigned char>*>(p); });
  return py::array(py::dtype(kNames[static_cast<int>(a.format)]), a.shape, strides, a.data.get(), owner);
}

py::dict run(const std::string& operation, const std::map<std::string, py::array>& inputs,
             const std::map<std::string, std::string>& options) {
  medcl::host::Call call{operation, {}, options};
  for (const auto& [name, array] : inputs) call.inputs[name] = view(array);
  py::dict outputs;
  for (const auto& [name, array] : medcl::host::run(call)) outputs[name.c_str()] = to_numpy(array);
  return outputs;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "CUDA kernels of medcl_kernels on a host emulator";
  m.def("run", &run, py::arg("operation"), py::arg("inputs"), py::arg("options"));
  m.def("configure", &medcl::host::configure_emulator, py::arg("order"), py::arg("copies"), py::arg("seed"));
  m.def("statistics", &medcl::host::emulator_statistics);
  m.def("wrong_fragments", &medcl::host::wrong_fragments);
}
