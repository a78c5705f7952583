#include "cuda/pair_filter.cuh"

namespace medcl::cuda {
namespace {

struct AnchorArguments {
  Packed rows;
  const int64_t* labels;  // or null
  LabelTable table;
  int64_t ignore_index, candidates, columns;  // candidates: key rows of all groups, columns: of one
  bool anchors;
  Form form;
  const float* statistics;  // (3, rows)
  AnchorSource from;
};

MEDCL_DEVICE float in_log2(float x) { return static_cast<float>(x * 1.4426950408889634); }

// Where ties of a row end: the last column of its group, -1 for none.
MEDCL_DEVICE int32_t last_column(const AnchorArguments& a, int64_t group, int64_t row, bool positive) {
  if (!a.from.cut) return -1;
  const int64_t last = a.from.cut[a.from.units.cell(row, positive)] - row * a.candidates - group * a.columns;
  return static_cast<int32_t>(last < 0 ? -1 : last < a.columns ? last : a.columns - 1);
}

__global__ void anchor_kernel(AnchorArguments a, Term* terms) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, n = a.rows.groups * a.rows.padded;
  if (i >= n) return;
  const int64_t group = i / a.rows.padded, own = i % a.rows.padded, row = group * a.rows.count + own;
  const float none = a.form == Form::in ? INFINITY : 0.f;
  Term constants{INFINITY, none, INFINITY, -1}, rule{0.f, 0.f, INFINITY, bit_copy<int32_t>(INFINITY)};
  Term ties{bit_copy<float>(-1), bit_copy<float>(-1), 0.f, 0};
  if (own < a.rows.count && (!a.labels || a.labels[row] != a.ignore_index)) {
    constants.code = a.table.slots ? a.table.code(a.labels[row]) : 0;
    if (a.anchors) {
      const int64_t all = a.rows.groups * a.rows.count;
      constants.bias = in_log2(a.statistics[row]);
      constants.weight = a.statistics[all + row];
      if (a.form == Form::in) constants.weight = in_log2(constants.weight);
      constants.level = in_log2(a.statistics[2 * all + row]);
      rule.bias = a.rows.inverse[i];
      if (a.from.upstream) rule.weight = a.from.upstream[row] * power_of_two(a.from.gradient.exponent());
      if (a.from.threshold) {
        rule.level = a.from.threshold[a.from.units.cell(row, true)];
        rule.code = bit_copy<int32_t>(a.from.threshold[a.from.units.cell(row, false)]);
      }
      ties.bias = bit_copy<float>(last_column(a, group, row, true));
      ties.weight = bit_copy<float>(last_column(a, group, row, false));
    }
  }
  terms[i] = constants;
  terms[n + i] = rule;
  terms[2 * n + i] = ties;
}

Term* make_terms(const PackedSides& s, const Packed& rows, AnchorArguments a) {
  const int64_t n = rows.groups * rows.padded;
  a.rows = rows;
  a.table = s.table;
  a.ignore_index = s.o.ignore_index;
  a.columns = s.key().count;
  a.candidates = s.key().groups * s.key().count;
  Term* terms = s.w.take<Term>(kAnchorTerms * n);
  launch_each(anchor_kernel, n, s.w.stream, a, terms);
  return terms;
}

}  // namespace

Units::Units(Scope scope, const Packed& query, int classes)
    : rows_each(scope == Scope::anchor  ? 1
                : scope == Scope::image ? query.length
                                        : query.groups * query.count),
      count(query.groups * query.count / (rows_each > 0 ? rows_each : 1)),
      classes(classes) {}

PairScores pair_scores(const PackedSides& s, const Filter& f) {
  PairScores scores{f.form, f.representation, score_scale(s.o), {}};
  scores.named.column = f.positives;
  scores.named.several = static_cast<int>(f.several);
  scores.named.length = s.query.length;
  scores.named.image_columns = s.o.across ? s.key().length : 0;
  return scores;
}

Term* anchor_terms(const PackedSides& s, const Filter& f, const AnchorSource& from) {
  AnchorArguments a{};
  a.labels = s.sides.query_labels;
  a.anchors = true;
  a.form = f.form;
  a.statistics = f.statistics;
  a.from = from;
  return make_terms(s, s.query, a);
}

Term* candidate_terms(const PackedSides& s) {
  AnchorArguments a{};
  a.labels = s.sides.key_labels;
  return make_terms(s, s.key(), a);
}

}  // namespace medcl::cuda
