// The operations of patch-affinity contrast and the uncertainty gate on host arrays.
#include "host/call_inputs.h"

namespace medcl::host {
namespace {

cuda::LabelMap label_map(const Array& y) {
  cuda::LabelMap map;
  map.data = y.data.get();
  switch (y.format) {
    case Format::u8:
      map.type = cuda::LabelType::u8;
      break;
    case Format::i8:
      map.type = cuda::LabelType::i8;
      break;
    case Format::i16:
      map.type = cuda::LabelType::i16;
      break;
    case Format::i32:
      map.type = cuda::LabelType::i32;
      break;
    default:
      map.type = cuda::LabelType::i64;
  }
  map.batch = y.shape.at(0);
  map.stride_b = y.strides[0];
  const size_t dims = y.shape.size() - 1;
  for (size_t axis = 0; axis < 3; ++axis) {
    const bool has = axis + dims >= 3;
    map.size[axis] = has ? y.shape[axis + dims - 2] : 1;
    map.stride[axis] = has ? y.strides[axis + dims - 2] : 0;
  }
  return map;
}

void ratios(const Call& call, std::map<std::string, Array>& out) {
  const Array &labels = need(call, "labels"), &centers = need(call, "centers"), &windows = need(call, "windows");
  const int num_classes = std::stoi(call.options.at("num_classes"));
  const bool wide = call.options.at("dtype") == "float64";
  const int64_t patches = windows.shape.at(0), count = centers.shape.at(0);
  Array& value = out["value"] =
      make_array(wide ? Format::f64 : Format::f32, {patches, labels.shape[0], num_classes - 1, count});
  HostWorkspace w;
  cuda::patch_class_ratio(w, label_map(labels), data<int64_t>(centers), count, static_cast<int>(centers.shape.at(1)),
                          data<int64_t>(windows), patches, num_classes, call.options.at("normalizer") == "full", wide,
                          value.data.get());
}

void reweight(const Call& call, std::map<std::string, Array>& out) {
  const Array &features = need(call, "features"), &logits = need(call, "logits");
  const auto like = [&](const std::string& name, const Array& x) {
    return rows(out[name] = make_array(x.format, x.shape, x.strides));
  };
  HostWorkspace w;
  if (call.operation == "uncertainty_reweight")
    return cuda::uncertainty_reweight(w, rows(features), rows(logits), like("value", features));
  const cuda::Rows d_features = like("d_features", features), d_logits = like("d_logits", logits);
  cuda::uncertainty_reweight_backward(w, rows(need(call, "d_out")), rows(features), rows(logits), d_features, d_logits);
}

void affinity(const Call& call, std::map<std::string, Array>& out) {
  cuda::Patches patches;
  patches.swapped = call.options.at("form") == "release2d";
  const Array &query = need(call, "query"), &ratios = need(call, "query_ratios");
  const Array* key = find(call, "key");
  patches.count = ratios.shape.at(0);
  patches.classes = ratios.shape.at(2);
  patches.query_ratios = data<const float>(ratios);
  patches.key_ratios = optional_data<float>(call, "key_ratios");
  patches.shift = optional_data<float>(call, "shift");
  cuda::Sides sides;
  sides.query = rows(query);
  if (key) sides.key = rows(*key);
  const cuda::Options o = parse_options(call, {"form"});
  HostWorkspace w;
  if (call.operation == "pair_affinity") {
    const std::vector<int64_t> shape{patches.count, query.shape[0], query.shape[2]};
    const Array log_z = out["log_z"] = make_array(Format::f32, shape);
    const Array linear = out["linear"] = make_array(Format::f32, shape);
    return pair_affinity(w, sides, o, patches, data<float>(log_z), data<float>(linear));
  }
  const auto gradient = [&](const std::string& name, const Array* of) {
    if (!of) return cuda::Rows{};
    return rows(out["d_" + name] = make_array(of->format, of->shape, of->strides));
  };
  const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
  if (patches.shift) out["d_shift"] = make_array(Format::f32, {});
  const auto values = [&](const std::string& name) { return data<const float>(need(call, name)); };
  pair_affinity_backward(w, sides, o, patches, values("d_log_z"), values("d_linear"), values("log_z"), d_query, d_key,
                         patches.shift ? data<float>(out["d_shift"]) : nullptr);
}

}  // namespace

bool run_patches(const Call& call, std::map<std::string, Array>& out) {
  if (call.operation == "patch_class_ratio")
    ratios(call, out);
  else if (call.operation.rfind("uncertainty_reweight", 0) == 0)
    reweight(call, out);
  else if (call.operation.rfind("pair_affinity", 0) == 0)
    affinity(call, out);
  else
    return false;
  return true;
}

}  // namespace medcl::host
