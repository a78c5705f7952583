// pair_logsumexp on the GPU (medcl_kernels/reference/pair_logsumexp.py).
#include "cuda/gradients.cuh"
#include "cuda/wgmma.cuh"

namespace medcl::cuda {
namespace {

bool compares_labels(const Options& o) {
  for (int k = 0; k < o.selections; ++k)
    if (o.kinds[k] != kAll) return true;
  return false;
}

}  // namespace

void pair_logsumexp(Workspace& w, const Sides& sides, const Options& o, float* lse) {
  const PackedSides s(w, sides, o, compares_labels(o));
  const float scale = score_scale(o), shift = bounded(o) ? scale : 0.f;
  const Term* query_terms = s.terms(false, {}, shift, {});
  const Term* key_terms = s.self() ? query_terms : s.terms(true, {}, shift, {});
  each_share(o.selections, [&](int first, int count) {
    LogSumExpArguments a{};
    a.owned_terms = query_terms + first * s.query.groups * s.query.padded;
    a.kinds = share_of(o, first, count);
    a.scale = scale;
    a.shift = shift;
    a.bounded = bounded(o);
    a.lse = lse + first * s.query.groups * s.query.count;
    run_row_statistic<LogSumExp>(s, s.pairs(false, true, key_terms, first, count), a);
  });
}

void pair_logsumexp_backward(Workspace& w, const Sides& sides, const Options& o, const float* d_lse, const float* lse,
                             const Rows& d_query, const Rows& d_key) {
  const PackedSides s(w, sides, o, compares_labels(o));
  TermSource anchors;
  anchors.level = lse;
  anchors.upstream = d_lse;
  anchors.needs_level = true;
  anchors.weight_by_level = bounded(o);
  const float shift = bounded(o) ? score_scale(o) : 0.f;
  if (bounded(o))
    pair_gradients<BoundedSoftmaxGradient>(s, anchors, shift, d_query, d_key);
  else
    pair_gradients<SoftmaxGradient>(s, anchors, shift, d_query, d_key);
}

}  // namespace medcl::cuda
