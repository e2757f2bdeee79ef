// Products with a matrix W of compressed rows, for the format "compiled".
//
// A few positions, the columns of u, are multiplied at a time, and of these one part of the rows of
// u after the other, copied so that it stays in the caches. The sums of a row of W stay in registers
// while its kept values in this part multiply vectors of u. `starts` has the rows of the first part,
// then those of the second: the values are read in the order in which they are stored.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST = 8;
#else
constexpr int LANES = 4, MOST = 8;
#endif
constexpr int64_t TILE = 16;  // floats of a cache line

typedef float Lanes __attribute__((vector_size(4 * LANES)));

// The structures are those of the same names in Python.
struct Matrix {
  int64_t outputs, inputs, part;
  const int32_t *starts, *columns;
  const float* kept;
};

struct Windows {
  int64_t batch, channels, sizes[3], stride[3], padding[3], within[3];
  const int64_t* places;
  int64_t length;
  const int64_t* runs;
  int64_t number_of_runs, length_of_runs;
};

// What the product of up to MOST * LANES positions needs.
struct Memory {
  explicit Memory(const Matrix& w)
      : u(new Lanes[w.part * MOST]()), sums(new Lanes[w.outputs * MOST]) {}
  std::unique_ptr<Lanes[]> u, sums;
};

// Calls `store(i, row)` for each row[k] = bias[i] + sum over j of W[i][j] * u[j][k], where k < K.
// `load(u, first, last)` copies the rows of u from `first` to `last`.
template <int K, class Load, class Store>
void multiply(
    const Matrix& w, const float* biases, const Memory& memory, Load load, Store store) {
  Lanes *const u = memory.u.get(), *const sums = memory.sums.get();
  const int32_t* starts = w.starts;
  for (int64_t first = 0; first == 0 || first < w.inputs; first += w.part) {
    const int64_t last = std::min(w.inputs, first + w.part);
    load((float*)u, first, last);
    for (int64_t i = 0; i < w.outputs; i++, starts++) {
      Lanes row[K];
      const float bias = biases ? biases[i] : 0;
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) row[k] = first ? sums[i * K + k] : Lanes{} + bias;
      for (int32_t p = starts[0]; p < starts[1]; p++) {
        const Lanes* from = u + (w.columns[p] - first) * K;
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) row[k] += w.kept[p] * from[k];
      }
      if (last == w.inputs) {
        store(i, (const float*)row);
      } else {
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) sums[i * K + k] = row[k];
      }
    }
  }
}

// Calls `call` with `vectors` as a constant.
template <int K, class Call>
void with_constant(int64_t vectors, Call call) {
  if (vectors == K) return call(std::integral_constant<int, K>());
  if constexpr (K > 1) with_constant<K - 1>(vectors, call);
}

// Divides n positions into equal blocks: `call(K, memory, start, count)`, where count <= K * LANES.
template <class Call>
void in_blocks(const Matrix& w, int64_t n, int threads, Call call) {
  const int64_t vectors = (n + LANES - 1) / LANES;
  const int64_t blocks = std::max((vectors + MOST - 1) / MOST, std::min<int64_t>(vectors, threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Memory memory(w);
#pragma omp for
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t first = vectors * block / blocks, last = vectors * (block + 1) / blocks;
      const int64_t start = first * LANES, count = std::min(n, last * LANES) - start;
      with_constant<MOST>(last - first, [&](auto k) { call(k, memory, start, count); });
    }
  }
}

// out[t][i] = bias[i] + sum over j of W[i][j] * x[t][j]
extern "C" void parasparse_rows(
    const Matrix* matrix, const float* bias, const float* x, int64_t n, float* out, int threads) {
  const Matrix w = *matrix;
  in_blocks(w, n, threads, [=](auto k, const Memory& memory, int64_t start, int64_t count) {
    constexpr int64_t width = decltype(k)::value * LANES;
    auto load = [=](float* u, int64_t begin, int64_t end) {
      for (int64_t first = 0; first < count; first += TILE)
        for (int64_t tile = begin; tile < end; tile += TILE)
          for (int64_t t = first; t < std::min(count, first + TILE); t++)
            for (int64_t j = tile; j < std::min(end, tile + TILE); j++)
              u[(j - begin) * width + t] = x[(start + t) * w.inputs + j];
    };
    float* const sums = (float*)memory.sums.get();
    auto store = [=](int64_t i, const float* row) {
      std::memcpy(sums + i * width, row, width * sizeof(float));
    };
    multiply<k>(w, bias, memory, load, store);
    for (int64_t tile = 0; tile < w.outputs; tile += TILE)
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = tile; i < std::min(w.outputs, tile + TILE); i++)
          out[(start + t) * w.outputs + i] = sums[i * width + t];
  });
}

// Copies a channel into a padded one that is split into phases, one for each residue of the place.
void split(const Windows& v, const float* x, float* out) {
  const int64_t *sizes = v.sizes, *s = v.stride, *p = v.padding, *within = v.within;
  for (int64_t phase = 0; phase < s[0] * s[1] * s[2]; phase++)
    for (int64_t d = 0; d < within[0]; d++)
      for (int64_t h = 0; h < within[1]; h++, out += within[2]) {
        const int64_t z = d * s[0] + phase / (s[1] * s[2]) - p[0];
        const int64_t y = h * s[1] + phase / s[2] % s[1] - p[1];
        const int64_t before = p[2] - phase % s[2];  // place t reads t * s[2] - before
        const bool inside = 0 <= z && z < sizes[0] && 0 <= y && y < sizes[1];
        const int64_t first = std::clamp<int64_t>((before + s[2] - 1) / s[2], 0, within[2]);
        const int64_t end = std::min(within[2], (sizes[2] + before + s[2] - 1) / s[2]);
        const int64_t last = inside ? std::max(first, end) : first;
        const float* from = x + (z * sizes[1] + y) * sizes[2] - before;
        std::fill(out, out + first, 0.0f);
        if (s[2] == 1)
          std::copy(from + first, from + last, out + first);
        else
          for (int64_t t = first; t < last; t++) out[t] = from[t * s[2]];
        std::fill(out + last, out + within[2], 0.0f);
      }
}

// out = row + added, but not less than `least`
inline void finish(
    const float* __restrict row, const float* __restrict added, float least, int64_t count,
    float* __restrict out) {
  for (int64_t t = 0; t < count; t++) {
    const float sum = row[t] + added[t];
    out[t] = sum < least ? least : sum;
  }
}

// sum[i][t] = bias[i] + sum over j of W[i][j] * u[places[j] + t], where u is an image, padded and
// split. The output has the sums at the places t of the runs; `added` is added to it, if any.
extern "C" void parasparse_convolution(
    const Matrix* matrix, const Windows* windows, const float* x, const float* bias,
    const float* added, int relu, float* out, int threads) {
  const Matrix w = *matrix;
  const Windows v = *windows;
  int64_t from_size = v.channels, size = v.channels, copied = 0;
  for (int dim = 0; dim < 3; dim++) {
    from_size *= v.sizes[dim];
    size *= v.stride[dim] * v.within[dim];
    copied |= v.stride[dim] > 1 || v.padding[dim] > 0;
  }
  const std::unique_ptr<float[]> memory(copied ? new float[size] : nullptr);
  static const float zeros[LANES * MOST] = {};
  const float least = relu ? 0 : -std::numeric_limits<float>::infinity();
  const int64_t *const runs = v.runs, number = v.number_of_runs, length = v.length_of_runs;
  for (int64_t b = 0; b < v.batch; b++, x += from_size) {
    const float* u = copied ? memory.get() : x;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < (copied ? v.channels : 0); c++)
      split(v, x + c * from_size / v.channels, memory.get() + c * size / v.channels);
    in_blocks(w, v.length, threads, [=](auto k, const Memory& m, int64_t start, int64_t count) {
      constexpr int64_t width = decltype(k)::value * LANES;
      auto load = [=](float* block, int64_t first, int64_t last) {
        for (int64_t j = first; j < last; j++, block += width)
          if (count == width)
            std::memcpy(block, u + v.places[j] + start, width * sizeof(float));
          else
            std::memcpy(block, u + v.places[j] + start, count * sizeof(float));
      };
      const int64_t run = std::upper_bound(runs, runs + number, start) - runs - 1;
      auto store = [=](int64_t i, const float* row) {
        for (int64_t r = run; r < number && runs[r] < start + count; r++) {
          const int64_t first = std::max<int64_t>(0, runs[r] - start);
          const int64_t last = std::min(count, runs[r] + length - start);
          const int64_t to = ((b * w.outputs + i) * number + r) * length + start - runs[r];
          if (last - first == width)
            finish(row, added ? added + to : zeros, least, width, out + to);
          else
            finish(row + first, added ? added + to + first : zeros, least, last - first, out + to + first);
        }
      };
      multiply<k>(w, bias, m, load, store);
    });
  }
}
