// The module _host: the CUDA kernels, unchanged, on NumPy arrays through the emulator. For tests; in no wheel.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/calls.h"
#include "host/fragments.h"

namespace py = pybind11;
using medcl::host::Array;
using medcl::host::Format;

namespace {

// uint16 carries the bits of bfloat16. No copy: strides are part of what is tested.
Array view(const py::array& x) {
  Array a;
  const py::dtype type = x.dtype();
  a.format = type.kind() == 'u'                ? Format::bf16
             : type.kind() == 'i'              ? Format::i64
             : type.is(py::dtype::of<float>()) ? Format::f32
                                               : Format::f16;
  if (static_cast<size_t>(type.itemsize()) != medcl::host::bytes_of(a.format))
    throw py::type_error("arrays are float32, float16, uint16 (bits of bfloat16) or int64");
  for (py::ssize_t i = 0; i < x.ndim(); ++i) {
    a.shape.push_back(x.shape(i));
    a.strides.push_back(x.strides(i) / type.itemsize());
  }
  a.data = {static_cast<unsigned char*>(const_cast<void*>(x.data())), [](unsigned char*) {}};
  return a;
}

py::array to_numpy(const Array& a) {
  const char* name = a.format == Format::f32   ? "float32"
                     : a.format == Format::f16 ? "float16"
                     : a.format == Format::i64 ? "int64"
                                               : "uint16";
  std::vector<py::ssize_t> strides;
  for (const int64_t stride : a.strides)
    strides.push_back(stride * static_cast<py::ssize_t>(medcl::host::bytes_of(a.format)));
  auto* hold = new std::shared_ptr<unsigned char>(a.data);
  const py::capsule owner(hold, [](void* p) { delete static_cast<std::shared_ptr<unsigned char>*>(p); });
  return py::array(py::dtype(name), a.shape, strides, a.data.get(), owner);
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
