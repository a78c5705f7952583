// Weights of M gradients from their Gram matrix, (T2) and (T3) of medcl_kernels/reference/mitigate_rows.py. One body
// for CPU and CUDA.
#pragma once
#include <cmath>
#include <cstdint>

#include "pairs/numbers.h"

namespace medcl {

constexpr int kPerspectives = 8;           // at most
constexpr double kSmallestSquare = 1e-12;  // of norms: below it a gradient is none
constexpr int kCompromiseRounds = 64;      // over all pairs of coordinates

struct Combination {
  int count = 1;  // M
  bool pcgrad = true;
  double strength = 0.5, factor = 1;                    // factor: 1 for the mean, M for the sum
  int8_t order[kPerspectives][kPerspectives - 1] = {};  // for each gradient the others, as it meets them
};

// entry a of gram v
MEDCL_HD double gram_times(const double* gram, const double* v, int m, int a) {
  double sum = 0;
  for (int b = 0; b < m; ++b) sum += gram[a * m + b] * v[b];
  return sum;
}

MEDCL_HD void project_conflicts(const Combination& how, const double* gram, double* w) {
  const int m = how.count;
  for (int b = 0; b < m; ++b) w[b] = 0;
  for (int a = 0; a < m; ++a) {
    double c[kPerspectives] = {};
    c[a] = 1;
    for (int k = 0; k + 1 < m; ++k) {
      const int b = how.order[a][k];
      double q = 0;
      for (int e = 0; e < m; ++e) q += c[e] * gram[e * m + b];
      const double norm = gram[b * m + b];
      if (q < 0 && norm > kSmallestSquare) c[b] -= q / (norm + kSmallestSquare);
    }
    for (int b = 0; b < m; ++b) w[b] += c[b] / m;
  }
}

MEDCL_HD double between(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

MEDCL_HD void compromise(const Combination& how, const double* gram, double* w) {
  const int m = how.count;
  double towards[kPerspectives], v[kPerspectives], plain[kPerspectives], norm = 0;
  for (int a = 0; a < m; ++a) plain[a] = v[a] = 1.0 / m;
  for (int a = 0; a < m; ++a) {
    towards[a] = gram_times(gram, plain, m, a);
    norm += towards[a] / m;
  }
  const double phi = how.strength * sqrt(norm > 0 ? norm : 0);
  for (int round = 0; round < (m == 2 ? 1 : kCompromiseRounds); ++round) {
    double moved = 0;
    for (int a = 0; a < m; ++a)
      for (int b = 0; b < a; ++b) {
        double kv[kPerspectives], A = 0;
        for (int e = 0; e < m; ++e) {
          kv[e] = gram_times(gram, v, m, e);
          A += kv[e] * v[e];
        }
        const double B = kv[a] - kv[b], C = gram[a * m + a] - 2 * gram[a * m + b] + gram[b * m + b];
        if (C <= kSmallestSquare) continue;
        const double slope = towards[a] - towards[b], steep = phi * phi * C - slope * slope, inside = A * C - B * B;
        double x = slope > 0 ? -1.0 : slope < 0 ? 1.0 : 0.0;
        if (steep > 0) x = (-slope * sqrt((inside > 0 ? inside : 0) / steep) - B) / C;
        x = between(x, -v[a], v[b]);
        v[a] += x;
        v[b] -= x;
        const double step = x < 0 ? -x : x;
        if (step > moved) moved = step;
      }
    if (moved < 1e-14) break;
  }
  double size = 0;
  for (int a = 0; a < m; ++a) size += gram_times(gram, v, m, a) * v[a];
  const double scale = size > kSmallestSquare ? phi / sqrt(size) : 0.0;
  for (int a = 0; a < m; ++a) w[a] = plain[a] + scale * v[a];
}

// w (M) of gram (M, M)
MEDCL_HD void combination_weights(const Combination& how, const double* gram, double* w) {
  if (how.pcgrad)
    project_conflicts(how, gram, w);
  else
    compromise(how, gram, w);
  for (int a = 0; a < how.count; ++a) w[a] *= how.factor;
}

}  // namespace medcl
