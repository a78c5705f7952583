// pair_positive_log on the GPU (medcl_kernels/reference/pair_positive_log.py).
#include "cuda/gradients.cuh"
#include "cuda/wgmma.cuh"

namespace medcl::cuda {

void pair_positive_log(Workspace& w, const Sides& sides, const Options& o, const float* lse_negative, float* sum,
                       float* tail) {
  const PackedSides s(w, sides, o, true);
  TermSource anchors;
  anchors.level = lse_negative;
  const Term* query_terms = s.terms(false, anchors, 0.f, {});
  const Term* key_terms = s.self() ? query_terms : s.terms(true, {}, 0.f, {});
  each_share(o.selections, [&](int first, int count) {
    PositiveLogArguments a{};
    a.owned_terms = query_terms + first * s.query.groups * s.query.padded;
    a.scale = score_scale(o);
    const int64_t at = first * s.query.groups * s.query.count;
    a.sum = sum + at;
    a.tail = tail + at;
    run_row_statistic<PositiveLog>(s, s.pairs(false, true, key_terms, first, count), a);
  });
}

void pair_positive_log_backward(Workspace& w, const Sides& sides, const Options& o, const float* d_sum,
                                const float* lse_negative, const Rows& d_query, const Rows& d_key) {
  Options same = o;
  for (Kind& kind : same.kinds) kind = kSame;
  const PackedSides s(w, sides, same, true);
  TermSource anchors;
  anchors.level = lse_negative;
  anchors.upstream = d_sum;
  pair_gradients<SigmoidGradient>(s, anchors, 0.f, d_query, d_key);
}

}  // namespace medcl::cuda
