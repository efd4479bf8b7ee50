// Matrix products with fused loads and stores.
//
//   using tile = ke::Tile<float, /*MR*/ 14, /*NR*/ 32, /*KC*/ 512, /*MC*/ 112, /*NC*/ 0>;
//   ke::gemm<tile>({.batch = 1, .m = M, .n = N, .k = K}, ke::matrix(x, K, 1), ke::matrix(w, 1, K),
//                  [&](int64_t b, int64_t i, int64_t j, int64_t n, const float* acc) {
//                    for (int64_t c = 0; c < n; ++c) y[i * N + j + c] = acc[c] + bias[j + c];
//                  });
//
// The epilogue is called exactly once for every strip of a finished row: acc[0..n) are columns j..j+n of
// row i of product b. Calls run in parallel, except that with NC = 0 (and in gemm_stream never) one thread
// delivers all strips of a row, j ascending: then state kept per row needs no lock.
#pragma once

#include "stream.h"

namespace ke {

// Compute: float, double or bf16_pair. MR x NR: the register tile (NR a multiple of the vector length).
// KC: steps of k between two spills of the sums (also bounds their rounding error).
// MC: rows of one task (0: all), whose packed A should stay in L2. NC: columns of one task (0: all).
// An operand that several tasks read is packed once, by all threads together; otherwise each task packs its own.
template <class Compute_, int MR_, int NR_, int KC_ = 512, int MC_ = 112, int NC_ = 0>
struct Tile {
  using Compute = Compute_;
  using acc = typename arithmetic<Compute>::acc;
  using unit = typename arithmetic<Compute>::unit;
  static constexpr int MR = MR_, NR = NR_, KC = KC_, MC = MC_, NC = NC_;
  static constexpr int64_t strip = NR >= 128 ? NR : 128 / NR * NR;  // columns handed to the epilogue at once
  static constexpr int64_t block_rows = MC ? MC : 8 * MR;           // rows that share a strip's columns of B in L2
  static_assert(NR % lanes<acc> == 0, "NR must be a multiple of the vector length");
  static_assert(KC % 2 == 0 && MC % MR == 0 && NC % NR == 0, "blocks must be made of whole tiles");
};

namespace detail {

// Packed row panels `a` times the columns of B, `units` of k: strips of finished sums go to
// finish(row, col, width, sums). b_rows(col, p0) gives a function from p to the NR values of B at row p0 + p.
// `c` holds T::block_rows x T::strip sums.
template <class T, class BRows, class Finish>
inline void multiply_panels(const typename T::unit* a, BRows b_rows, int64_t units, int64_t rows, int64_t cols,
                            typename T::acc* c, Finish&& finish) {
  constexpr int MR = T::MR, NR = T::NR, L = lanes<typename T::acc>;
  constexpr int64_t KU = T::KC / arithmetic<typename T::Compute>::k_per_unit;
  for (int64_t i0 = 0; i0 < rows; i0 += T::block_rows) {
    const int64_t i1 = least(rows, i0 + T::block_rows);
    for (int64_t j = 0; j < cols; j += T::strip) {
      const int64_t width = least(T::strip, cols - j), panels = ceil_div(width, NR);
      int64_t p = 0;
      do {
        const int64_t step = least(KU, units - p);
        for (int64_t i = i0; i < i1; i += MR) {
          // With a single step of k the sums never leave this strip, which stays in L1.
          typename T::acc* sums = c + (units > KU ? (i - i0) * T::strip : 0);
          for (int64_t s = 0; s < panels; ++s) {
            micro_tile<typename T::Compute, MR, NR / L, 1, MR>(step, a + i * units + p * MR, b_rows(j + s * NR, p),
                                                               sums + s * NR, T::strip, p > 0);
          }
          if (p + step < units) continue;
          for (int64_t r = 0; r < least(MR, i1 - i); ++r) {
            finish(i + r, j, width, static_cast<const typename T::acc*>(sums + r * T::strip));
          }
        }
        p += step;
      } while (p < units);
    }
  }
}

// How the panels of one product are dealt out to tasks.
template <class T>
struct Blocks {
  int64_t row_panels, col_panels, row_blocks, col_blocks;
  explicit Blocks(const GemmSize& size) {
    row_panels = ceil_div(size.m, T::MR);
    col_panels = ceil_div(size.n, T::NR);
    row_blocks = T::MC ? ceil_div(size.m, T::MC) : 1;
    col_blocks = T::NC ? ceil_div(size.n, T::NC) : 1;
    const int64_t threads = omp_get_max_threads();
    // Equal shares: a whole number of blocks for each thread.
    if (T::MC && size.batch == 1) row_blocks = least(row_panels, ceil_div(row_blocks, threads) * threads);
    else if (T::NC && size.batch == 1) col_blocks = least(col_panels, ceil_div(col_blocks, threads) * threads);
  }
};

}  // namespace detail

// C[b] = A[b] * B[b] for b in [0, batch). A and B are ke::matrix(...) or loaders (see pack.h); the flags say
// that an operand is the same for the whole batch. `parallel` off runs on the calling thread alone.
template <class T, class A, class B, class Epilogue>
inline void gemm(GemmSize size, const A& a, const B& b, Epilogue&& epilogue, bool a_broadcast = false,
                 bool b_broadcast = false, bool parallel = true) {
  using unit = typename T::unit;
  using Compute = typename T::Compute;
  constexpr int MR = T::MR, NR = T::NR;
  if (size.batch <= 0 || size.m <= 0 || size.n <= 0) return;
  const int64_t units = ceil_div(size.k, arithmetic<Compute>::k_per_unit);
  const detail::Blocks<T> blocks(size);
  const bool share_a = blocks.col_blocks > 1 || (a_broadcast && size.batch > 1);
  const bool share_b = blocks.row_blocks > 1 || (b_broadcast && size.batch > 1);
  // Operands shared by the tasks of one product, but not by all products, are packed product by product.
  const bool by_product = size.batch > 1 && ((share_a && !a_broadcast) || (share_b && !b_broadcast));
  unit* shared_a = share_a ? scratch<0>().template reserve<unit>(blocks.row_panels * MR * units) : nullptr;
  unit* shared_b = share_b ? scratch<1>().template reserve<unit>(blocks.col_panels * NR * units) : nullptr;
  const int64_t rounds = by_product ? size.batch : 1, per_round = by_product ? 1 : size.batch;
  const int64_t tasks = per_round * blocks.row_blocks * blocks.col_blocks;

#pragma omp parallel if (parallel)
  {
    const int64_t max_rows = ceil_div(blocks.row_panels, blocks.row_blocks) * MR;
    const int64_t max_cols = ceil_div(blocks.col_panels, blocks.col_blocks) * NR;
    unit* own_a = share_a ? nullptr : scratch<2>().template reserve<unit>(max_rows * units);
    unit* own_b = share_b ? nullptr : scratch<3>().template reserve<unit>(max_cols * units);
    typename T::acc* c = scratch<4>().template reserve<typename T::acc>(T::block_rows * T::strip);
    for (int64_t round = 0; round < rounds; ++round) {
      if (share_a && (round == 0 || !a_broadcast)) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < blocks.row_panels; ++p) {
          detail::pack_a<Compute, MR>(a, round, p * MR, least(MR, size.m - p * MR), size.k,
                                      shared_a + p * MR * units);
        }
      }
      if (share_b && (round == 0 || !b_broadcast)) {
#pragma omp for schedule(static)
        for (int64_t p = 0; p < blocks.col_panels; ++p) {
          detail::pack_b<Compute, NR>(b, round, p * NR, least(NR, size.n - p * NR), size.k,
                                      shared_b + p * NR * units);
        }
      }
      int64_t packed_a = -1, packed_b = -1;  // which block this thread's own panels hold
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t product = round + task / (blocks.row_blocks * blocks.col_blocks);
        const int64_t row_block = task / blocks.col_blocks % blocks.row_blocks;
        const int64_t col_block = task % blocks.col_blocks;
        const int64_t p0 = row_block * blocks.row_panels / blocks.row_blocks;
        const int64_t p1 = (row_block + 1) * blocks.row_panels / blocks.row_blocks;
        const int64_t q0 = col_block * blocks.col_panels / blocks.col_blocks;
        const int64_t q1 = (col_block + 1) * blocks.col_panels / blocks.col_blocks;
        if (!share_a && packed_a != product * blocks.row_blocks + row_block) {
          packed_a = product * blocks.row_blocks + row_block;
          for (int64_t p = p0; p < p1; ++p) {
            detail::pack_a<Compute, MR>(a, product, p * MR, least(MR, size.m - p * MR), size.k,
                                        own_a + (p - p0) * MR * units);
          }
        }
        if (!share_b && packed_b != product * blocks.col_blocks + col_block) {
          packed_b = product * blocks.col_blocks + col_block;
          for (int64_t q = q0; q < q1; ++q) {
            detail::pack_b<Compute, NR>(b, product, q * NR, least(NR, size.n - q * NR), size.k,
                                        own_b + (q - q0) * NR * units);
          }
        }
        const unit* rows = share_a ? shared_a + p0 * MR * units : own_a;
        const unit* cols = share_b ? shared_b + q0 * NR * units : own_b;
        detail::multiply_panels<T>(
            rows,
            [=](int64_t col, int64_t u) {
              const unit* panel = cols + col * units + u * NR;
              return [=](int64_t p) { return panel + p * NR; };
            },
            units, least(size.m, p1 * MR) - p0 * MR, least(size.n, q1 * NR) - q0 * NR, c,
            [&](int64_t row, int64_t col, int64_t width, const typename T::acc* sums) {
              epilogue(product, p0 * MR + row, q0 * NR + col, width, sums);
            });
      }
    }
  }
}

}  // namespace ke
