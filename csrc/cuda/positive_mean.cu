// positive_mean on the GPU by class sums (medcl_kernels/reference/positive_mean.py). Rows are those that the pair
// engine sees, rounded alike, so that the mean over positives never exceeds their log-sum-exp.
#include "cuda/segments.cuh"

namespace medcl::cuda {
namespace {

struct MeanArguments {
  Packed query, key;
  Sorted key_labels;  // one list per group
  const int64_t* labels;
  const float* class_sums;  // by sorted entry of the key
  int64_t ignore_index;
  float inverse_temperature;
  bool self;
  const float* upstream;  // null: forward
  float *mean, *weight;   // weight: upstream / number of positives
  int64_t* count;
};

// A warp per anchor: how many positives it has, and its mean similarity to them, or its weight on the way back.
__global__ void mean_kernel(MeanArguments a) {
  const WarpRow w(a.query.groups, a.query.count);
  if (w.group == a.query.groups) return;  // a whole warp
  const int64_t at = w.group * a.query.count + w.row, label = a.labels[at];
  const int64_t first = a.key_labels.lower(w.group, label), last = a.key_labels.upper(w.group, label);
  const int64_t positives = label == a.ignore_index ? 0 : last - first - (a.self ? 1 : 0);
  if (a.upstream) {
    if (w.lane == 0) a.weight[at] = positives > 0 ? a.upstream[at] / static_cast<float>(positives) : 0.f;
    return;
  }
  float dot = 0.f, own = 0.f;
  if (positives > 0)
    for (int d = w.lane; d < a.query.pitch; d += 32) {
      const float z = a.query.at(a.query.element(w.group, w.row, d));
      dot = fmaf(z, a.class_sums[(w.group * a.key_labels.length + first) * a.key.pitch + d], dot);
      own = fmaf(z, z, own);
    }
  dot = sum_over_warp(dot) - (a.self ? sum_over_warp(own) : 0.f);
  if (w.lane == 0) {
    a.count[at] = positives;
    a.mean[at] = positives > 0 ? dot * a.inverse_temperature / static_cast<float>(positives) : 0.f;
  }
}

struct MeanGradientArguments {
  Packed rows;            // of the side whose gradient is made
  const int64_t* labels;  // of that side
  int64_t ignore_index;
  float inverse_temperature;
  bool self, add;
  // as anchors: their weight, and the candidates' class sums
  const float *weight, *class_sums;
  Sorted key_labels;
  // as candidates: the anchors' rows, weighted and summed by class
  const float* pulled;
  Sorted query_labels;
  float* d_z;
};

__global__ void mean_gradient_kernel(MeanGradientArguments a) {
  const WarpRow w(a.rows.groups, a.rows.count);
  if (w.group == a.rows.groups) return;
  const int64_t at = w.group * a.rows.count + w.row, label = a.labels[at];
  if (label == a.ignore_index) {
    for (int d = w.lane; d < a.rows.pitch; d += 32)
      if (!a.add) a.d_z[a.rows.element(w.group, w.row, d)] = 0.f;
    return;
  }
  const float weight = a.weight ? a.weight[at] : 0.f;
  const int64_t mine = a.weight ? a.key_labels.lower(w.group, label) : 0;
  int64_t theirs = a.pulled ? a.query_labels.lower(w.group, label) : 0;
  // a candidate whose class has no anchor gets nothing
  const bool pulled = a.pulled && theirs < a.query_labels.length &&
                      a.query_labels.keys[w.group * a.query_labels.length + theirs] == label;
  for (int d = w.lane; d < a.rows.pitch; d += 32) {
    const int64_t element = a.rows.element(w.group, w.row, d);
    float sum = 0.f;
    if (weight != 0.f) sum = weight * a.class_sums[(w.group * a.key_labels.length + mine) * a.rows.pitch + d];
    if (pulled) sum += a.pulled[(w.group * a.query_labels.length + theirs) * a.rows.pitch + d];
    if (a.self) sum -= 2.f * weight * a.rows.at(element);  // pair (i, i), in both roles
    sum *= a.inverse_temperature;
    a.d_z[element] = a.add ? a.d_z[element] + sum : sum;
  }
}

// What both directions need: rows, and per selection the labels of a side in sorted lists.
struct Classes {
  Workspace& w;
  const PackedSides s;
  Sorted query, key;  // of all selections

  Classes(Workspace& w, const Sides& sides, const Options& o) : w(w), s(w, sides, o, false) {
    query = sorted(s.query, sides.query_labels);
    key = s.self() ? query : sorted(s.key_rows, sides.key_labels);
  }
  Sorted sorted(const Packed& p, const int64_t* labels) const {
    Sorted all;
    all.lists = p.groups;
    all.length = p.count;
    w.sort(labels, s.o.selections * p.groups, p.count, &all.keys, &all.order);
    return all;
  }
  static Sorted selection(Sorted all, int k) {
    all.keys += k * all.lists * all.length;
    all.order += k * all.lists * all.length;
    return all;
  }
  float* sums_buffer(const Packed& p) const { return w.take<float>(p.groups * p.count * p.pitch); }
  MeanArguments arguments(int k) const {
    MeanArguments a{};
    a.query = s.query;
    a.key = s.key();
    a.key_labels = selection(key, k);
    a.labels = s.sides.query_labels + k * s.query.groups * s.query.count;
    a.ignore_index = s.o.ignore_index;
    a.inverse_temperature = 1.f / s.o.temperature;
    a.self = s.self();
    return a;
  }
};

}  // namespace

void positive_mean(Workspace& w, const Sides& sides, const Options& o, float* mean, int64_t* count) {
  const Classes c(w, sides, o);
  float* sums = c.sums_buffer(c.s.key());
  for (int k = 0; k < o.selections; ++k) {
    MeanArguments a = c.arguments(k);
    sum_segments({a.key_labels, c.s.key(), nullptr, sums}, w.stream);
    a.class_sums = sums;
    a.mean = mean + k * c.s.query.groups * c.s.query.count;
    a.count = count + k * c.s.query.groups * c.s.query.count;
    launch_rows(mean_kernel, c.s.query, w.stream, a);
  }
}

void positive_mean_backward(Workspace& w, const Sides& sides, const Options& o, const float* d_mean,
                            const Rows& d_query, const Rows& d_key) {
  const Classes c(w, sides, o);
  const Packed &query = c.s.query, &key = c.s.key();
  const int64_t rows = query.groups * query.count;
  float *weight = w.take<float>(rows), *sums = c.sums_buffer(key), *pulled = c.sums_buffer(query);
  float* d_z = d_query.data ? gradient_rows(w, query) : nullptr;
  float* d_k = d_key.data && !c.s.self() ? gradient_rows(w, key) : nullptr;
  for (int k = 0; k < o.selections; ++k) {
    MeanArguments a = c.arguments(k);
    a.upstream = d_mean + k * rows;
    a.weight = weight;
    launch_rows(mean_kernel, query, w.stream, a);
    const Sorted query_labels = Classes::selection(c.query, k);
    if (d_z) sum_segments({a.key_labels, key, nullptr, sums}, w.stream);
    if (d_k || c.s.self()) sum_segments({query_labels, query, weight, pulled}, w.stream);
    MeanGradientArguments g{};
    g.ignore_index = o.ignore_index;
    g.inverse_temperature = a.inverse_temperature;
    g.add = k > 0;
    g.key_labels = a.key_labels;
    g.query_labels = query_labels;
    if (d_z) {
      g.rows = query;
      g.labels = a.labels;
      g.self = c.s.self();
      g.weight = weight;
      g.class_sums = sums;
      g.pulled = c.s.self() ? pulled : nullptr;
      g.d_z = d_z;
      launch_rows(mean_gradient_kernel, query, w.stream, g);
    }
    if (d_k) {
      g.rows = key;
      g.labels = sides.key_labels + k * key.groups * key.count;
      g.self = false;
      g.weight = nullptr;
      g.class_sums = nullptr;
      g.pulled = pulled;
      g.d_z = d_k;
      launch_rows(mean_gradient_kernel, key, w.stream, g);
    }
  }
  if (d_z) unpack(w, query, sides.query, d_query, d_z, o);
  if (d_k) unpack(w, key, sides.key, d_key, d_k, o);
}

}  // namespace medcl::cuda
