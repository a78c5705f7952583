#include "host/calls.h"

#include <cstdlib>
#include <cstring>

#include "host/call_inputs.h"
#include "host/emulator/emulator.h"

namespace medcl::host {
namespace {

int position(const std::vector<std::string>& names, const std::string& name) {
  const auto at = std::find(names.begin(), names.end(), name);
  if (at == names.end()) throw std::invalid_argument("no option " + name);
  return static_cast<int>(at - names.begin());
}

const std::set<std::string> kFilterOptions{"form", "score", "scope", "capacity"};

cuda::Filter parse_filter(const Call& call) {
  cuda::Filter f;
  f.form = static_cast<Form>(position({"out", "in", "pixel"}, call.options.at("form")));
  f.representation = call.options.at("score") == "representation";
  f.scope = static_cast<cuda::Scope>(position({"global", "image", "anchor"}, call.options.at("scope")));
  f.positives = optional_data<int64_t>(call, "positives");
  if (f.positives) f.several = need(call, "positives").shape.at(2);
  f.statistics = data<const float>(need(call, "statistics"));
  return f;
}

std::map<std::string, Array> run_topk(cuda::Workspace& w, const Call& call, const cuda::Sides& sides,
                                      const cuda::Options& o) {
  const Array& k = need(call, "k");
  cuda::Filter f = parse_filter(call);
  f.classes = static_cast<int>(k.shape.at(0));
  cuda::SelectedPairs to;
  to.capacity = std::stoll(call.options.at("capacity"));
  std::map<std::string, Array> out{{"anchor", make_array(Format::i64, {to.capacity})},
                                   {"candidate", make_array(Format::i64, {to.capacity})},
                                   {"gradient", make_array(Format::f32, {to.capacity})},
                                   {"threshold", make_array(Format::f32, k.shape)},
                                   {"cut", make_array(Format::i64, k.shape)}};
  to.anchor = data<int64_t>(out["anchor"]);
  to.candidate = data<int64_t>(out["candidate"]);
  to.gradient = data<float>(out["gradient"]);
  to.threshold = data<float>(out["threshold"]);
  to.cut = data<int64_t>(out["cut"]);
  pair_topk(w, sides, o, f, data<const int64_t>(k), to);
  return out;
}

// Gradients (M, B, D, L); the result lies as one of them does.
std::map<std::string, Array> run_mitigate_rows(const Call& call) {
  HostWorkspace w;
  const Array& gradients = need(call, "gradients");
  Array one = gradients;
  one.shape.erase(one.shape.begin());
  one.strides.erase(one.strides.begin());
  cuda::Stack stack{rows(one), gradients.shape[0], gradients.strides[0]};
  cuda::Mitigation o;
  o.method =
      static_cast<cuda::Method>(position({"pcgrad", "cagrad", "consensus", "mean", "sum"}, call.options.at("method")));
  o.flat = call.options.at("unit") == "flat";
  o.how.count = static_cast<int>(stack.count);
  o.how.pcgrad = o.method == cuda::Method::pcgrad;
  o.how.strength = std::stod(call.options.at("strength"));
  o.how.factor = call.options.at("reduction") == "sum" ? static_cast<double>(stack.count) : 1.0;
  o.order = data<const int64_t>(need(call, "order"));
  const Array value = make_array(one.format, one.shape, one.strides);
  mitigate_rows(w, stack, o, rows(value));
  return {{"value", value}};
}

}  // namespace

size_t Array::extent() const {
  int64_t last = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == 0) return 0;
    last += (shape[i] - 1) * strides[i];
  }
  return static_cast<size_t>(last) + 1;
}

std::shared_ptr<unsigned char> poisoned(size_t bytes) {
  void* raw = nullptr;
  if (posix_memalign(&raw, 256, bytes)) throw std::bad_alloc();
  std::memset(raw, 0xff, bytes);
  return {static_cast<unsigned char*>(raw), [](unsigned char* p) { std::free(p); }};
}

Array make_array(Format format, std::vector<int64_t> shape, std::vector<int64_t> strides) {
  Array array;
  array.format = format;
  array.shape = std::move(shape);
  array.strides = std::move(strides);
  if (array.strides.empty()) {
    array.strides.resize(array.shape.size());
    int64_t stride = 1;
    for (size_t i = array.shape.size(); i-- > 0; stride *= array.shape[i]) array.strides[i] = stride;
  }
  array.data = poisoned(array.extent() * bytes_of(format));
  return array;
}

std::map<std::string, Array> run(const Call& call) {
  if (call.operation == "mitigate_rows") return run_mitigate_rows(call);
  std::map<std::string, Array> out;
  if (run_patches(call, out)) return out;
  HostWorkspace w;
  cuda::Options o = parse_options(call, kFilterOptions);
  cuda::Sides sides;
  const Array& query = need(call, "query");
  const Array* key = find(call, "key");
  sides.query = rows(query);
  if (key) sides.key = rows(*key);
  sides.query_labels = optional_data<int64_t>(call, "query_labels");
  sides.key_labels = optional_data<int64_t>(call, "key_labels");
  if (call.operation.rfind("positive_mean", 0) == 0 || call.operation.rfind("pair_positive_log", 0) == 0) {
    o.selections = static_cast<int>(need(call, "query_labels").shape.at(0));
    std::fill_n(o.kinds, o.selections, cuda::kSame);
  }

  const auto per_row = [&](const std::string& name, Format format) {
    return out[name] = make_array(format, {o.selections, query.shape[0], query.shape[2]});
  };
  const auto gradient = [&](const std::string& name, const Array* of) {
    if (!of) return cuda::Rows{};
    return rows(out["d_" + name] = make_array(of->format, of->shape, of->strides));
  };
  const auto values = [&](const std::string& name) { return data<const float>(need(call, name)); };

  if (call.operation == "pair_logsumexp") {
    pair_logsumexp(w, sides, o, data<float>(per_row("value", Format::f32)));
  } else if (call.operation == "pair_logsumexp_backward") {
    const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
    pair_logsumexp_backward(w, sides, o, values("d_lse"), values("lse"), d_query, d_key);
  } else if (call.operation == "pair_positive_log") {
    const Array sum = per_row("value", Format::f32), tail = per_row("tail", Format::f32);
    pair_positive_log(w, sides, o, values("lse_negative"), data<float>(sum), data<float>(tail));
  } else if (call.operation == "pair_positive_log_backward") {
    const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
    pair_positive_log_backward(w, sides, o, values("d_sum"), values("lse_negative"), d_query, d_key);
  } else if (call.operation == "pair_argmax") {
    const Array index = per_row("index", Format::i64), value = per_row("value", Format::f32);
    pair_argmax(w, sides, o, data<int64_t>(index), data<float>(value));
  } else if (call.operation == "positive_mean") {
    const Array mean = per_row("mean", Format::f32), count = per_row("count", Format::i64);
    positive_mean(w, sides, o, data<float>(mean), data<int64_t>(count));
  } else if (call.operation == "positive_mean_backward") {
    const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
    positive_mean_backward(w, sides, o, values("d_mean"), d_query, d_key);
  } else if (call.operation == "positive_at" || call.operation == "positive_at_backward") {
    const Array& positives = need(call, "positives");
    const int64_t several = positives.shape.size() == 3 ? positives.shape[2] : 1;
    const auto* index = data<const int64_t>(positives);
    if (call.operation == "positive_at") {
      out["value"] = make_array(Format::f32, positives.shape);
      positive_at(w, sides, o, index, several, data<float>(out["value"]));
    } else {
      const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
      positive_at_backward(w, sides, o, index, several, values("d_out"), d_query, d_key);
    }
  } else if (call.operation == "pair_topk") {
    return run_topk(w, call, sides, o);
  } else if (call.operation == "pair_filtered_grad_backward") {
    const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
    if (const Array* anchor = find(call, "anchor")) {
      const cuda::PairList list{anchor->shape[0], data<const int64_t>(*anchor),
                                data<const int64_t>(need(call, "candidate"))};
      listed_grad_backward(w, sides, o, list, values("gradient"), values("d_value"), d_query, d_key);
    } else {
      cuda::Filter f = parse_filter(call);
      f.classes = static_cast<int>(need(call, "threshold").shape.at(0));
      pair_filtered_grad_backward(w, sides, o, f, values("d_value"), values("threshold"),
                                  data<const int64_t>(need(call, "cut")), d_query, d_key);
    }
  } else if (call.operation == "pair_at" || call.operation == "pair_at_backward") {
    const Array& anchor = need(call, "anchor");
    const cuda::PairList list{anchor.shape[0], data<const int64_t>(anchor),
                              data<const int64_t>(need(call, "candidate"))};
    if (call.operation == "pair_at") {
      pair_at(w, sides, o, list, data<float>(out["value"] = make_array(Format::f32, anchor.shape)));
    } else {
      const cuda::Rows d_query = gradient("query", &query), d_key = gradient("key", key);
      pair_at_backward(w, sides, o, list, values("d_at"), d_query, d_key);
    }
  } else {
    throw std::invalid_argument("no operation " + call.operation);
  }
  return out;
}

void configure_emulator(const std::string& order, const std::string& copies, unsigned seed) {
  auto& c = emulator::config();
  c.order = order == "forward"   ? emulator::Order::forward
            : order == "reverse" ? emulator::Order::reverse
                                 : emulator::Order::random;
  c.copies = copies == "eager" ? emulator::CopyMode::eager : emulator::CopyMode::late;
  c.seed = seed;
  emulator::stats() = {};
}

std::map<std::string, int64_t> emulator_statistics() {
  const auto& s = emulator::stats();
  return {{"launches", s.launches}, {"blocks", s.blocks},
          {"barriers", s.barriers}, {"mma", s.mma},
          {"ldmatrix", s.ldmatrix}, {"shared_loads", s.shared_loads},
          {"wgmma", s.wgmma},       {"copies", s.copies},
          {"switches", s.switches}, {"bank_conflicts", s.bank_conflicts}};
}

}  // namespace medcl::host
