"""Faults planted into the native kernels, one at a time, to see that the proofs find them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault: what it is, the file of `kernels/` with the text `old`, there once, that `new` replaces, and what finds
    it: "value" (the tolerance rule), "race", "memory" (an access that is not allowed), "barrier" or "launch"."""

    name: str
    found: str
    file: str
    old: str
    new: str


_FORWARD, _BACKWARD, _TILES = "attention_forward.cuh", "attention_backward.cuh", "tiles.cuh"
_LAUNCH, _API = "launch.h", "api.cu"

MUTANTS = (
    # ---- forward
    Mutant(
        "keys are loaded while others still read those before",
        "race",
        _FORWARD,
        "    __syncthreads();  // the keys and values before are used\n",
        "",
    ),
    Mutant(
        "keys are read while others still load them",
        "race",
        _FORWARD,
        "    __syncthreads();\n    if (first_row >= tokens) continue;",
        "    if (first_row >= tokens) continue;",
    ),
    Mutant(
        "logits are read before their warp has stored them",
        "race",
        _FORWARD,
        "    __syncwarp();\n    float s[kEach]",
        "    float s[kEach]",
    ),
    Mutant(
        "probabilities replace logits that the other lane still reads",
        "race",
        _FORWARD,
        "    __syncwarp();  // both lanes of a row have read it\n",
        "",
    ),
    Mutant(
        "probabilities are read before their warp has written them",
        "race",
        _FORWARD,
        "    __syncwarp();\n    scale_rows(mixed, of_row, row);\n    mix_rows",
        "    scale_rows(mixed, of_row, row);\n    mix_rows",
    ),
    Mutant(
        "row numbers are read before their warp has written them",
        "race",
        _FORWARD,
        "  __syncwarp();\n  Accumulator numbers;",
        "  Accumulator numbers;",
    ),
    Mutant(
        "an element's row is guessed from its place in the lane",
        "value",
        _FORWARD,
        "row[i] = static_cast<int>(numbers.x[i])",
        "row[i] = i + static_cast<int>(threadIdx.x) % 2 * 8",
    ),
    Mutant(
        "a key beyond the last takes part", "value", _FORWARD, "lane.column(i) < tokens", "lane.column(i) <= tokens"
    ),
    Mutant("logits are not scaled", "value", _FORWARD, "s[i] * (scale * kLog2E)", "s[i] * (0 * scale + kLog2E)"),
    Mutant("the last keys are left out", "value", _FORWARD, "first < tokens; first", "first + 16 < tokens; first"),
    Mutant(
        "the sum does not shrink under a larger maximum",
        "value",
        _FORWARD,
        "total * shrink + row_sum(sum)",
        "total + row_sum(sum)",
    ),
    Mutant(
        "what is mixed does not shrink under a larger maximum",
        "value",
        _FORWARD,
        "    scale_rows(mixed, of_row, row);\n    mix_rows",
        "    mix_rows",
    ),
    Mutant("the maximum is forgotten", "value", _FORWARD, "    top = new_top;\n", ""),
    Mutant("the log-sum-exp has no maximum", "value", _FORWARD, "(top + log2f(total))", "(log2f(total))"),
    Mutant("the output is not divided by the sum", "value", _FORWARD, "1.0f / total", "1.0f"),
    Mutant(
        "keys lie over the last queries",
        "value",
        _FORWARD,
        "queries + kRows * tile_pitch",
        "queries + (kRows - 8) * tile_pitch",
    ),
    # ---- tiles
    Mutant(
        "the maximum is that of half a row",
        "value",
        _TILES,
        "return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1))",
        "return value",
    ),
    Mutant(
        "the sum is that of half a row",
        "value",
        _TILES,
        "return value + __shfl_xor_sync(0xffffffffu, value, 1)",
        "return 2 * value",
    ),
    Mutant("a row beyond the last is loaded", "memory", _TILES, "if (row < left) value", "if (row <= left) value"),
    Mutant("a row beyond the last is stored", "memory", _TILES, "      if (row < left)\n", "      if (row <= left)\n"),
    Mutant("another sample's tokens are read", "memory", _TILES, "sample = own / heads", "sample = 0"),
    Mutant("another head's channels are read", "memory", _TILES, "place.head * D;", "0 * D;"),
    Mutant(
        "a strip is stored while others still read it",
        "race",
        _TILES,
        "    __syncwarp();  // the strip has been read\n",
        "",
    ),
    Mutant(
        "sums are read before their warp has stored them",
        "race",
        _TILES,
        "    __syncwarp();\n#pragma unroll\n    for (int row = lane / 4",
        "#pragma unroll\n    for (int row = lane / 4",
    ),
    Mutant(
        "the second half of the columns is the first", "value", _TILES, "columns + n * 16 * pitch + k", "columns + k"
    ),
    Mutant(
        "the second half of the rows is the first",
        "value",
        _TILES,
        "tile + k * (D + kTilePadding) + n * 16",
        "tile + n * 16",
    ),
    Mutant(
        "a product is rounded to 16 bit on the way",
        "value",
        _TILES,
        "#pragma unroll\n    for (int n = 0; n < D / 16; ++n) {\n      FragmentB<Stored::by_rows> b;",
        "    for (auto &sum : sums)\n      for (float &element : sum.x) element = to_float(to_half(element));\n"
        "#pragma unroll\n    for (int n = 0; n < D / 16; ++n) {\n      FragmentB<Stored::by_rows> b;",
    ),
    # ---- backward
    Mutant(
        "a missing key has an exponential",
        "value",
        _BACKWARD,
        "there = first + lane.column(i) < tokens",
        "there = first < tokens",
    ),
    Mutant(
        "a missing key has a gradient",
        "value",
        _BACKWARD,
        "p[i] = lane.row() < left ? exp2f(p[i] * (scale * kLog2E) - bases[lane.column(i)]) : 0.0f;",
        "p[i] = exp2f(p[i] * (scale * kLog2E) - bases[lane.column(i)]);",
    ),
    Mutant(
        "the softmax's own gradient is left out of dq",
        "value",
        _BACKWARD,
        "(ds[i] - own_delta)",
        "ds[i]",
    ),
    Mutant("the gradient of a logit is not scaled", "value", _BACKWARD, "own_delta) * scale", "own_delta)"),
    Mutant(
        "the gradient of a key is not scaled",
        "value",
        _BACKWARD,
        "deltas[lane.column(i)]) * scale",
        "deltas[lane.column(i)])",
    ),
    Mutant(
        "both lanes of a row write its delta",
        "memory",
        _BACKWARD,
        "if (threadIdx.x % 2 == 0 && lane.row() < left)",
        "if (lane.row() < left)",
    ),
    Mutant(
        "queries and gradients are read while others still load them",
        "race",
        _BACKWARD,
        "  __syncthreads();\n\n  // Without a row",
        "\n  // Without a row",
    ),
    Mutant(
        "probabilities replace the logits of keys that the other lane still reads",
        "race",
        _BACKWARD,
        "    __syncwarp();  // both lanes of a row have read it\n    lane.write(p);",
        "    lane.write(p);",
    ),
    Mutant(
        "gradients of logits replace what the other lane still reads",
        "race",
        _BACKWARD,
        "    __syncwarp();  // both lanes of a row have read it\n    lane.write(ds);",
        "    lane.write(ds);",
    ),
    Mutant(
        "a product is stored over probabilities that are still read",
        "race",
        _BACKWARD,
        "    mix_rows<D>(value_sums, lane.factor(), grads);\n    __syncwarp();",
        "    mix_rows<D>(value_sums, lane.factor(), grads);",
    ),
    Mutant(
        "queries are loaded while others still read those before",
        "race",
        _BACKWARD,
        "    __syncthreads();  // the queries and gradients before are used\n",
        "",
    ),
    Mutant(
        "column sums are written over keys that others still read",
        "race",
        _BACKWARD,
        "  __syncthreads();  // the keys are used: their memory is that of the column sums\n",
        "",
    ),
    Mutant(
        "column sums are added before all warps have written theirs",
        "race",
        _BACKWARD,
        "  __syncthreads();\n  store_partial<D>(partial, place, heads, 0, column_sums);",
        "  store_partial<D>(partial, place, heads, 0, column_sums);",
    ),
    Mutant(
        "a warp's column sums are left out", "value", _BACKWARD, "warp < kWarps; ++warp) sum", "warp < 3; ++warp) sum"
    ),
    Mutant(
        "blocks of other samples write the same partial sums",
        "memory",
        _BACKWARD,
        "(place.sample * place.blocks + place.block)",
        "place.block",
    ),
    Mutant(
        "shares of the bias are added before all are there",
        "race",
        _BACKWARD,
        "  __syncthreads();\n  if (group != 0) return;",
        "  if (group != 0) return;",
    ),
    Mutant("a share of the bias is left out", "value", _BACKWARD, "share = 0; share", "share = 1; share"),
    Mutant(
        "the gradients of keys and values change places",
        "value",
        _BACKWARD,
        "store_rows<D>(dk, pitch, left, key_sums",
        "store_rows<D>(dk, pitch, left, value_sums",
    ),
    Mutant(
        "some threads leave before the last barrier",
        "barrier",
        _BACKWARD,
        "== nullptr) return;\n  __syncthreads();\n  store_partial<D>(partial, place, heads, 1,",
        "== nullptr || left <= 0) return;\n  __syncthreads();\n  store_partial<D>(partial, place, heads, 1,",
    ),
    # ---- launches
    Mutant(
        "a launch asks for too little shared memory",
        "memory",
        _LAUNCH,
        "of_rows + 2 * of_columns + kStripBytes + kRows * 4",
        "of_rows + 2 * of_columns + kStripBytes",
    ),
    Mutant(
        "a block is missing",
        "value",
        _LAUNCH,
        "(tokens + kRows - 1) / kRows * heads",
        "(tokens + kRows - 2) / kRows * heads",
    ),
    Mutant("an output and its gradient change places", "value", _API, "stream, x, y, g, lse,", "stream, x, g, y, lse,"),
    Mutant(
        "the sums of the bias have a row too many",
        "memory",
        _API,
        "const int64_t rows = batch * ",
        "const int64_t rows = 1 + batch * ",
    ),
)
