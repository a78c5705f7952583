"""Bugs to plant in the CUDA sources: one string each, changed in a copy. emulator_mutants.py tries
them."""

from __future__ import annotations

from dataclasses import dataclass

ENGINE, TILE, EPILOGUES = "cuda/engine.cuh", "cuda/tile.cuh", "cuda/epilogues.cuh"
SIDES, TERMS, PACKING = "cuda/sides.cu", "cuda/terms.cuh", "cuda/packing.cuh"
SEGMENTS, GRADIENTS, MEAN, LISTED = (
    "cuda/segments.cuh",
    "cuda/gradients.cuh",
    "cuda/positive_mean.cu",
    "cuda/listed.cu",
)
TOPK, SELECT, FILTER, FILTERED, MITIGATE = (
    "cuda/pair_topk.cu",
    "cuda/pair_select.cuh",
    "cuda/pair_filter.cuh",
    "cuda/pair_filtered_grad.cu",
    "cuda/mitigate_rows.cu",
)
AFFINITY, PAIR_AFFINITY = "cuda/affinity.cuh", "cuda/pair_affinity.cu"
RATIO, GATE = "cuda/patch_class_ratio.cu", "cuda/uncertainty_reweight.cu"
WGMMA = "cuda/wgmma.cuh"
WAIT = "    ptx::cp_async_wait<T::kStages - 2>();\n"
PUBLISH = "    T::publish_copies();\n"
BARRIER = "    __syncthreads();\n    const int next"


@dataclass(frozen=True)
class Mutant:
    """A bug.

    Attributes:
        name: what is wrong.
        file: under csrc.
        old, new: the change; every occurrence of `old`, which must be there.
        quick: whether each test run tries it.
    """

    name: str
    file: str
    old: str
    new: str
    quick: bool = False


MUTANTS = (
    # the pipeline
    Mutant("missing __syncthreads", ENGINE, BARRIER, "    const int next", True),
    Mutant("missing cp.async wait", ENGINE, WAIT, "", True),
    Mutant("one group too few awaited", ENGINE, "wait<T::kStages - 2>", "wait<T::kStages - 1>"),
    Mutant(
        "barrier before the wait",
        ENGINE,
        WAIT + PUBLISH + "    __syncthreads();\n",
        "    __syncthreads();\n" + WAIT + PUBLISH,
    ),
    Mutant(
        "missing commit in the loop",
        ENGINE,
        "next % T::kStages) * stage_bytes);\n    ptx::cp_async_commit();",
        "next % T::kStages) * stage_bytes);",
    ),
    Mutant(
        "prefetch into the stage being read",
        ENGINE,
        "stages + (next % T::kStages)",
        "stages + ((next + 1) % T::kStages)",
        True,
    ),
    Mutant(
        "shared memory one stage short",
        ENGINE,
        "T::kStages * (T::kStageBytes + terms)",
        "(T::kStages - 1) * (T::kStageBytes + terms)",
    ),
    Mutant(
        "barrier in a divergent branch",
        ENGINE,
        BARRIER,
        "    if (l.warp == 0) __syncthreads();\n    else __syncthreads();\n    const int next",
    ),
    Mutant(
        "warp 0 skips the barrier",
        ENGINE,
        BARRIER,
        "    if (l.warp) __syncthreads();\n    const int next",
    ),
    Mutant("scores not cleared between tiles", ENGINE, "s[m][n][r] = 0.f;", "(void)0;"),
    # who may pair with whom
    Mutant(
        "ragged edge off by one",
        ENGINE,
        "column >= p.streamed_count ||",
        "column > p.streamed_count ||",
    ),
    Mutant("self pair kept", ENGINE, "|| (p.self && column == row)) s", ") s", True),
    Mutant("edge test misses the diagonal", ENGINE, "&& (ragged || diagonal))", "&& ragged)"),
    Mutant(
        "owned rows past the padding read",
        TILE,
        "const bool ok = first + row < limit;",
        "const bool ok = first + row <= limit;",
    ),
    Mutant(
        "labels of the wrong selection",
        ENGINE,
        "(i / T::kColumns) * p.groups",
        "0 * p.groups",
    ),
    Mutant(
        "columns that are left out count", SIDES, "Term term{-INFINITY, 0.f", "Term term{0.f, 0.f"
    ),
    Mutant(
        "rows that are left out have a gradient", EPILOGUES, "own.code < 0 ? -INFINITY : 0.f", "0.f"
    ),
    Mutant("same and different confused", EPILOGUES, "(kind == kSame)", "(kind != kSame)"),
    Mutant(
        "labels compared by their low half",
        TERMS,
        "(int64_t label) const",
        "(int32_t label) const",
        True,
    ),
    # layouts
    Mutant(
        "wrong swizzle on a read",
        TILE,
        "streamed + T::at(n * 8 + (l.lane & 7) + (l.lane >> 4) * 8, k * 2 + (l.lane >> 3 & 1))",
        "streamed + (n * 8 + (l.lane & 7) + (l.lane >> 4) * 8) * T::kPitch + "
        "(((k * 2 + (l.lane >> 3 & 1)) ^ (l.lane & 3)) << 4)",
        True,
    ),
    Mutant(
        "no swizzle (slow, not wrong)", TILE, "((chunk ^ (row & 7)) << 4)", "(chunk << 4)", True
    ),
    Mutant("ldmatrix without .trans", TILE, "ldmatrix_x4_trans", "ldmatrix_x4"),
    Mutant(
        "A registers 1 and 2 swapped", TILE, "w[m][2 * j + (r >> 1)];", "w[m][2 * j + (r & 1)];"
    ),
    Mutant(
        "tf32 depth not permuted alike", TILE, "w[m][n][(r & 1) * 2 + (r >> 1)]", "w[m][n][r]", True
    ),
    Mutant("tf32 reads the neighbour's row", TILE, "T::at(row + 1, chunk)", "T::at(row, chunk)"),
    Mutant(
        "16-bit pair in the wrong order",
        TILE,
        "T::Product::pair(x[2 * (r & 1)], x[2 * (r & 1) + 1])",
        "T::Product::pair(x[2 * (r & 1) + 1], x[2 * (r & 1)])",
    ),
    Mutant(
        "result slab is not the last one",
        ENGINE,
        "(first_slab + 1 + turn)",
        "(first_slab + turn)",
        True,
    ),
    # epilogues
    Mutant(
        "one shuffle step missing", EPILOGUES, "  x += __shfl_xor_sync(0xffffffffu, x, 1);\n", ""
    ),
    Mutant(
        "shuffle in a divergent branch",
        EPILOGUES,
        "continue;\n        float* to",
        "continue;\n        __shfl_xor_sync(~0u, 0.f, 1);\n        float* to",
    ),
    Mutant(
        "result guard off by one",
        EPILOGUES,
        "row(m, h) < p.owned_count; }",
        "row(m, h) <= p.owned_count; }",
    ),
    Mutant(
        "running maximum not applied to the sum",
        EPILOGUES,
        "*= ptx::exp2(before - top[m][h]);",
        "*= 1.f;",
    ),
    Mutant("second launch overwrites the first", EPILOGUES, "add ? to[d * 8 + e] + x : x", "x"),
    Mutant(
        "a later one of equals wins",
        EPILOGUES,
        "if (!(x > best[m][r >> 1])) continue;",
        "if (!(x >= best[m][r >> 1])) continue;",
    ),
    Mutant(
        "tie between lanes goes to the larger index",
        EPILOGUES,
        "other_at < at[m][h]",
        "other_at > at[m][h]",
    ),
    Mutant(
        "only one direction of the symmetric form",
        EPILOGUES,
        "(own.weight + other.weight)",
        "(own.weight)",
        True,
    ),
    Mutant("no positive takes the tail", EPILOGUES, "(above > 0.f ? smaller : 1.f)", "(1.f)"),
    Mutant("factors of two rows in one", EPILOGUES, "factor[m][h] *= 1.f", "factor[m][0] *= 1.f"),
    Mutant(
        "a logarithm of the last factor only",
        EPILOGUES,
        "factor[m][h] *= 1.f + smaller;",
        "factor[m][h] = 1.f + smaller;",
    ),
    Mutant(
        "anchors and candidates confused",
        GRADIENTS,
        "a.owned_anchors = !to_key;",
        "a.owned_anchors = to_key;",
    ),
    # rows in and out
    Mutant(
        "NaN in rows that are left out",
        PACKING,
        "channel < x.dim && m.row[e.row] != 0.f;",
        "channel < x.dim;",
    ),
    Mutant("channels of the padding read", PACKING, "channel < x.dim && m.row", "m.row"),
    Mutant(
        "norm of a part of the row",
        PACKING,
        "c < kPackRows; c += kPackParts",
        "c + kPackParts < kPackRows; c += kPackParts",
    ),
    Mutant(
        "packing without its second barrier",
        PACKING,
        "m.tile[e.channel][e.row] * m.row[e.row]);\n    }\n    __syncthreads();",
        "m.tile[e.channel][e.row] * m.row[e.row]);\n    }",
    ),
    Mutant(
        "projection forgotten on the way back",
        PACKING,
        "static_cast<double>(inverse) * m.part",
        "0.0 * m.part",
    ),
    Mutant(
        "gradient of a row that nobody names", PACKING, "if (part == 0 && !moved)", "if (false)"
    ),
    # sums by class
    Mutant(
        "chunks of a run not joined",
        SEGMENTS,
        "sum += sums[i * a.rows.pitch + d];",
        "(void)i;",
        True,
    ),
    Mutant(
        "run joined by a chunk that does not own it",
        SEGMENTS,
        "keys[first - 1] == keys[first]) return;",
        "false) return;",
    ),
    Mutant(
        "row counts itself as a positive", MEAN, "last - first - (a.self ? 1 : 0)", "last - first"
    ),
    Mutant("negative index gathers", LISTED, "pair = i >= 0 && j >= 0", "pair = i >= 0"),
    Mutant("a warp's entries of a row left out", LISTED, "k < kListWarps; ++k)", "k < 1; ++k)"),
    # selections
    Mutant(
        "last run of a histogram lost", SELECT, "if (run) atomicAdd(words + bin, run);", "", True
    ),
    Mutant(
        "histogram without atomics",
        SELECT,
        "if (other != bin && run) atomicAdd(words + bin, run);",
        "if (other != bin && run) words[bin] += run;",
    ),
    Mutant("classes share a histogram", SELECT, "(second ? a.tile_units << a.digit_bits : 0)", "0"),
    Mutant("equal scores count as above", SELECT, "if (bits > known)", "if (bits >= known)", True),
    Mutant(
        "the last of equal scores are kept",
        SELECT,
        "mask ^= static_cast<uint64_t>(1) << ptx::highest_bit(mask);",
        "mask &= mask - 1;",
    ),
    Mutant(
        "equal scores of the rows before forgotten",
        TOPK,
        "(before[row] - before[a.units.of(row) * a.units.rows_each])",
        "0",
        True,
    ),
    Mutant(
        "a row's pairs in the order of lanes",
        SELECT,
        "x |= __shfl_xor_sync(0xffffffffu, x, 1);\n",
        "",
    ),
    Mutant("candidates that are left out ranked", SELECT, "other >= 0 && code", "code"),
    Mutant("norm of the row forgotten", FILTER, "0.f))), inverse_norm);", "0.f))), 1.f);"),
    Mutant("positives of the image before", FILTER, "row / length * image_columns", "0"),
    Mutant(
        "limits of the classes swapped",
        FILTERED,
        "positive ? anchor.limit : anchor.negative_limit",
        "positive ? anchor.negative_limit : anchor.limit",
    ),
    Mutant(
        "a pair kept for one of its rows only",
        FILTERED,
        "a.streamed_anchors = to_key || s.self();",
        "a.streamed_anchors = to_key;",
        True,
    ),
    # one gradient out of M
    Mutant(
        "Gram matrix before its channels are there",
        MITIGATE,
        "0.f;\n    }\n    __syncthreads();",
        "0.f;\n    }",
    ),
    Mutant("partial sums of one row", MITIGATE, "row < kBlockRows; ++row)", "row < 1; ++row)"),
    Mutant("opposite signs kept", MITIGATE, "above && below ? 0.f : ", ""),
)
PATCH_MUTANTS = (
    Mutant(
        "rows past the edge have an affinity",
        PAIR_AFFINITY,
        "if (row < a.count && !a.b",
        "if (!a.b",
    ),
    Mutant(
        "classes past the first forgotten", AFFINITY, "int record = 0;", "int record = 1;", True
    ),
    Mutant("form ignored", AFFINITY, "a.level.swapped ? 1.f - q[m][h]", "false ? 1.f - q[m][h]"),
    Mutant("maxima of affinities not kept", AFFINITY, "this->template raise<kValues>(k, top);", ""),
    Mutant(
        "one role of a pair in the affinity's gradient",
        AFFINITY,
        "(own[m][h].weight + other.weight)",
        "own[m][h].weight",
        True,
    ),
    Mutant(
        "ragged edge has an affinity gradient",
        AFFINITY,
        "s[m][n][r] == -INFINITY ? 0.f : w[m][r]",
        "w[m][r]",
    ),
    Mutant("shift meets a pair twice", PAIR_AFFINITY, "s.self() ? 0.5f : 1.f", "1.f"),
    Mutant("patch sizes of a later launch", PAIR_AFFINITY, "= first * p.groups", "= 0 * p.groups"),
    Mutant("warps of a large window not added", RATIO, "warp < a.team / 32", "warp < 1"),
    Mutant("classes of the second pass", RATIO, "label == k0 + k", "label == 1 + k", True),
    Mutant(
        "channels summed by fewer warps", GATE, "p < kPackParts; ++p", "p < kPackParts - 1; ++p"
    ),
    Mutant("weights of pixels not awaited", GATE, "a.per_log;\n  __syncthreads();", "a.per_log;"),
)
WGMMA_MUTANTS = (
    Mutant(
        "copies not handed to the async proxy", WGMMA, "{ ptx::fence_proxy_async(); }", "{}", True
    ),
    Mutant(
        "copies handed over behind the barrier",
        ENGINE,
        PUBLISH + "    __syncthreads();\n",
        "    __syncthreads();\n" + PUBLISH,
    ),
    Mutant("copies handed over before they are there", ENGINE, WAIT + PUBLISH, PUBLISH + WAIT),
    Mutant("accumulators not fenced", WGMMA, "    ptx::wgmma_fence(s[0]);\n", "", True),
    Mutant(
        "accumulators fenced for the first tile only",
        WGMMA,
        "    ptx::wgmma_fence(s[0]);\n",
        "    if (s[0][0][0] == 0.f) ptx::wgmma_fence(s[0]);\n",
    ),
    Mutant("wgmma not awaited", WGMMA, "    ptx::wgmma_wait<0>(s[0]);\n", ""),
    Mutant("one group of wgmma too few awaited", WGMMA, "wgmma_wait<0>(s", "wgmma_wait<1>(s"),
    Mutant("wgmma not committed", WGMMA, "    ptx::wgmma_commit();\n", ""),
    Mutant("rows of another stride", WGMMA, "(8 * kPitch >> 4) << 32", "(1024 >> 4) << 32", True),
    Mutant(
        "64-byte swizzle", WGMMA, "static_cast<uint64_t>(1) << 62", "static_cast<uint64_t>(2) << 62"
    ),
    Mutant("rows not swizzled", WGMMA, "((chunk ^ row) & 7)", "(chunk & 7)"),
    Mutant("swizzle of another row", WGMMA, "((chunk ^ row) & 7)", "((chunk ^ row >> 1) & 7)"),
    Mutant("atoms not at multiples of their size", WGMMA, "kAlign = kAtom;", "kAlign = 128;"),
    Mutant(
        "second atom of a row forgotten", WGMMA, "(k >> 2) * kAtom + (k & 3) * 32", "(k & 3) * 32"
    ),
    Mutant("step of the depth half as long", WGMMA, "(k & 3) * 32", "(k & 3) * 16"),
    Mutant("scores of the tile before kept", WGMMA, ", k > 0);", ", true);"),
    Mutant("both warpgroups multiply the same rows", WGMMA, "(l.warp >> 2) * 64", "0 * 64"),
    Mutant("warps multiply different rows", WGMMA, "(l.warp >> 2) * 64", "l.warp * 16"),
    Mutant(
        "terms past the padding read",
        ENGINE,
        "T::kColumns <= 64 || column0 + i % T::kColumns < p.streamed_padded);",
        "true);",
    ),
)
MUTANTS += PATCH_MUTANTS + WGMMA_MUTANTS

CONTROL = Mutant("none (control)", ENGINE, "epilogue.finish();", "epilogue.finish();")
