// Products with a matrix W of compressed rows, for the format "compiled".
//
// A block of positions, the columns of u, is copied so that each row of u is a few vectors. The
// sums of a row of W stay in registers while its kept values multiply these vectors.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 3;
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST = 6;
#else
constexpr int LANES = 4, MOST = 8;
#endif
constexpr int64_t WIDTH = LANES * MOST;  // positions of a block, at most
constexpr int64_t TILE = 16;             // floats of a cache line

typedef float Lanes __attribute__((vector_size(4 * LANES)));

struct Matrix {
  int64_t outputs, inputs;
  const int32_t *starts, *columns;
  const float *kept, *bias;
};

// sums[i][t] = bias[i] + sum over j of W[i][j] * u[j][t], at K * LANES positions t
template <int K>
void multiply(const Matrix& w, const Lanes* u, Lanes* sums) {
  for (int64_t i = 0; i < w.outputs; i++) {
    Lanes row[K];
    const float bias = w.bias ? w.bias[i] : 0;
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) row[k] = Lanes{} + bias;
    for (int32_t p = w.starts[i]; p < w.starts[i + 1]; p++) {
      const Lanes* from = u + int64_t{w.columns[p]} * MOST;
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) row[k] += w.kept[p] * from[k];
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) sums[i * MOST + k] = row[k];
  }
}

template <int K>
void multiply(int64_t vectors, const Matrix& w, const Lanes* u, Lanes* sums) {
  if (vectors == K) return multiply<K>(w, u, sums);
  if constexpr (K > 1) multiply<K - 1>(vectors, w, u, sums);
}

// Multiplies n positions in equal blocks: `load(u, start, count)`, then `store(sums, start, count)`.
template <class Load, class Store>
void in_blocks(const Matrix& w, int64_t n, int threads, Load load, Store store) {
  const int64_t vectors = (n + LANES - 1) / LANES;
  const int64_t blocks = std::max((vectors + MOST - 1) / MOST, std::min<int64_t>(vectors, threads));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = vectors * block / blocks, last = vectors * (block + 1) / blocks;
    const int64_t start = first * LANES, count = std::min(n, last * LANES) - start;
    std::unique_ptr<Lanes[]> u(new Lanes[w.inputs * MOST]), sums(new Lanes[w.outputs * MOST]);
    if (count % LANES) std::memset(u.get(), 0, w.inputs * MOST * sizeof(Lanes));
    load((float*)u.get(), start, count);
    multiply<MOST>(last - first, w, u.get(), sums.get());
    store((const float*)sums.get(), start, count);
  }
}

// out[t][i] = bias[i] + sum over j of W[i][j] * x[t][j]
extern "C" void parasparse_rows(
    int64_t outputs, int64_t inputs, const int32_t* starts, const int32_t* columns,
    const float* kept, const float* bias, const float* x, int64_t n, float* out, int threads) {
  auto load = [=](float* u, int64_t start, int64_t count) {
    for (int64_t first = 0; first < count; first += TILE)
      for (int64_t tile = 0; tile < inputs; tile += TILE)
        for (int64_t t = first; t < std::min(count, first + TILE); t++)
          for (int64_t j = tile; j < std::min(inputs, tile + TILE); j++)
            u[j * WIDTH + t] = x[(start + t) * inputs + j];
  };
  auto store = [=](const float* sums, int64_t start, int64_t count) {
    for (int64_t tile = 0; tile < outputs; tile += TILE)
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = tile; i < std::min(outputs, tile + TILE); i++)
          out[(start + t) * outputs + i] = sums[i * WIDTH + t];
  };
  in_blocks({outputs, inputs, starts, columns, kept, bias}, n, threads, load, store);
}

// out[i][t] = bias[i] + sum over j of W[i][j] * u[places[j] + t]
extern "C" void parasparse_columns(
    int64_t outputs, int64_t inputs, const int32_t* starts, const int32_t* columns,
    const float* kept, const float* bias, const float* u, const int64_t* places, int64_t n,
    float* out, int threads) {
  auto load = [=](float* block, int64_t start, int64_t count) {
    for (int64_t j = 0; j < inputs; j++)
      std::memcpy(block + j * WIDTH, u + places[j] + start, count * sizeof(float));
  };
  auto store = [=](const float* sums, int64_t start, int64_t count) {
    for (int64_t i = 0; i < outputs; i++)
      std::memcpy(out + i * n + start, sums + i * WIDTH, count * sizeof(float));
  };
  in_blocks({outputs, inputs, starts, columns, kept, bias}, n, threads, load, store);
}
