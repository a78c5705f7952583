// Gradients of the rows from what every pair sends them, for any weights of the pairs.
#pragma once
#include "cuda/sides.cuh"

namespace medcl::cuda {

// The rows that own the result may be the anchors, the candidates, or (one tensor) both: the roles are swapped, the
// kernel is the same.
template <template <class> class Epilogue>
void pair_gradients(const PackedSides& s, const TermSource& anchors, float shift, const Rows& d_query,
                    const Rows& d_key) {
  const GradientScale gradient = s.scale({anchors});
  const Term* query_terms = s.terms(false, anchors, shift, gradient);
  const Term* key_terms = s.self() ? query_terms : s.terms(true, {}, shift, gradient);
  const auto into = [&](bool to_key, const Rows& d_x) {
    if (!d_x.data) return;
    const Packed& owned = to_key ? s.key() : s.query;
    float* d_z = gradient_rows(s.w, owned);
    each_share(s.o.selections, [&](int first, int count) {
      GradientArguments a{};
      a.owned_terms = (to_key ? key_terms : query_terms) + first * owned.groups * owned.padded;
      a.kinds = share_of(s.o, first, count);
      a.owned_anchors = !to_key;
      a.streamed_anchors = to_key || s.self();
      a.scale = score_scale(s.o);
      a.factor = 1.f / s.o.temperature;
      a.gradient = gradient;
      a.add = first > 0;
      a.out = d_z;
      run_gradient<Epilogue>(owned, s.pairs(to_key, !to_key, to_key ? query_terms : key_terms, first, count), a,
                             s.w.stream);
    });
    unpack(s.w, owned, to_key ? s.sides.key : s.sides.query, d_x, d_z, s.o);
  };
  into(false, d_query);
  if (!s.self()) into(true, d_key);
}

}  // namespace medcl::cuda
