// Products with a matrix W of compressed rows, for the format "compiled".
//
// A few positions, the columns of u, are multiplied at a time, and of these one part of the rows of
// u after the other, copied so that it stays in the caches. The sums of a row of W stay in registers
// while its kept values in this part multiply vectors of u. `starts` has the rows of the first part,
// then those of the second: the values are read in the order in which they are stored.
//
// With groups, each group of rows of W has a u of its own. Where W has few values in a column, as in
// depthwise convolutions, u is not copied.

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
constexpr int64_t DIRECT = 1;  // values in a column up to which u is not copied
constexpr int64_t CACHED = 1 << 15;  // floats of several groups that are padded at once

typedef float Lanes __attribute__((vector_size(4 * LANES)));

// The structures are those of the same names in Python.
struct Matrix {
  int64_t outputs, inputs, part;
  const int32_t *starts, *columns;
  const float* kept;
};

struct Windows {
  int64_t batch, groups, channels, sizes[3], stride[3], padding[3], within[3];
  const int64_t* places;
  int64_t length;
  const int64_t* runs;
  int64_t number_of_runs, length_of_runs;
};

struct Activation {
  float slope, shift, least, most;
  int gate;
};

// Rows of a matrix that multiply the same u.
struct Rows {
  int64_t first, count;
};

// What the product of up to MOST * LANES positions needs.
struct Memory {
  Memory(const Matrix& w, const Rows& rows)
      : u(new Lanes[w.part * MOST]()), sums(new Lanes[rows.count * MOST]) {}
  std::unique_ptr<Lanes[]> u, sums;
};

// Calls `store(i, row)` for each row[k] = bias[i] + sum over j of W[i][j] * u[j][k], where k < K.
// `load(first, last)` prepares the rows of u from `first` to `last`. For row i of W, row j of u is at
// `from(i) + at(j)`.
template <int K, class Load, class From, class At, class Store>
void multiply(
    const Matrix& w, const Rows& rows, const float* biases, Lanes* sums, Load load, From from, At at,
    Store store) {
  const int32_t* starts = w.starts + rows.first;
  for (int64_t first = 0; first == 0 || first < w.inputs; first += w.part, starts += w.outputs) {
    const int64_t last = std::min(w.inputs, first + w.part);
    load(first, last);
    for (int64_t i = 0; i < rows.count; i++) {
      const float* const u = from(i);
      Lanes row[K], values;
      const float bias = biases ? biases[rows.first + i] : 0;
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) row[k] = first ? sums[i * K + k] : Lanes{} + bias;
      for (int32_t p = starts[i]; p < starts[i + 1]; p++) {
        const int64_t j = at(w.columns[p]);
#pragma GCC unroll 8
        for (int k = 0; k < K; k++) {
          std::memcpy(&values, u + j + k * LANES, sizeof(values));
          row[k] += w.kept[p] * values;
        }
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
void in_blocks(const Matrix& w, const Rows& rows, int64_t n, int threads, Call call) {
  const int64_t vectors = (n + LANES - 1) / LANES;
  const int64_t blocks = std::max((vectors + MOST - 1) / MOST, std::min<int64_t>(vectors, threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Memory memory(w, rows);
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
  const Rows rows{0, w.outputs};
  in_blocks(w, rows, n, threads, [=](auto k, const Memory& memory, int64_t start, int64_t count) {
    constexpr int64_t width = decltype(k)::value * LANES;
    float *const u = (float*)memory.u.get(), *const sums = (float*)memory.sums.get();
    int64_t part = 0;
    auto load = [=, &part](int64_t begin, int64_t end) {
      part = begin;
      for (int64_t first = 0; first < count; first += TILE)
        for (int64_t tile = begin; tile < end; tile += TILE)
          for (int64_t t = first; t < std::min(count, first + TILE); t++)
            for (int64_t j = tile; j < std::min(end, tile + TILE); j++)
              u[(j - begin) * width + t] = x[(start + t) * w.inputs + j];
    };
    auto from = [=](int64_t) { return u; };
    auto at = [=, &part](int64_t j) { return (j - part) * width; };
    auto store = [=](int64_t i, const float* row) {
      std::memcpy(sums + i * width, row, width * sizeof(float));
    };
    multiply<k>(w, rows, bias, memory.sums.get(), load, from, at, store);
    for (int64_t tile = 0; tile < w.outputs; tile += TILE)
      for (int64_t t = 0; t < count; t++)
        for (int64_t i = tile; i < std::min(w.outputs, tile + TILE); i++)
          out[(start + t) * w.outputs + i] = sums[i * width + t];
  });
}

// Copies floats that are too few for a call of memcpy to pay; the last N may be copied twice.
template <int N = LANES>
inline void copy(const float* from, int64_t count, float* out) {
  if (count < N) {
    if constexpr (N > 1) copy<N / 2>(from, count, out);
    return;
  }
  for (int64_t t = 0; t < count - N; t += N) std::memcpy(out + t, from + t, N * sizeof(float));
  std::memcpy(out + count - N, from + count - N, N * sizeof(float));
}

// out[t] = from[t * step]
inline void copy(const float* __restrict from, int64_t step, int64_t count, float* __restrict out) {
  if (step == 1)
    copy(from, count, out);
  else if (step == 2)  // with a constant, the loop is vectorized
    for (int64_t t = 0; t < count; t++) out[t] = from[t * 2];
  else
    for (int64_t t = 0; t < count; t++) out[t] = from[t * step];
}

// Copies channels into padded ones, split into phases, one for each residue of the place.
void split(const Windows& v, const float* x, int64_t channels, float* out, int threads) {
  const int64_t *sizes = v.sizes, *s = v.stride, *within = v.within;
  const int64_t phases = s[0] * s[1] * s[2], size = within[0] * within[1] * within[2];
  for (int64_t phase = 0; phase < phases; phase++) {
    // Along a dimension, place t reads x at t * s + at, where t goes from `first` to `last`.
    const int64_t residue[3] = {phase / (s[1] * s[2]), phase / s[2] % s[1], phase % s[2]};
    int64_t at[3], first[3], last[3];
    for (int i = 0; i < 3; i++) {
      at[i] = residue[i] - v.padding[i];
      first[i] = std::max<int64_t>(0, (s[i] - 1 - at[i]) / s[i]);
      last[i] = std::max(first[i], std::min(within[i], (sizes[i] - at[i] + s[i] - 1) / s[i]));
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < channels; c++) {
      const float* const from = x + c * sizes[0] * sizes[1] * sizes[2] + first[2] * s[2] + at[2];
      float* const to = out + (c * phases + phase) * size;
      std::fill(to, to + size, 0.0f);
      for (int64_t d = first[0]; d < last[0]; d++)
        for (int64_t h = first[1]; h < last[1]; h++) {
          const int64_t row = (d * s[0] + at[0]) * sizes[1] + h * s[1] + at[1];
          float* const to_row = to + (d * within[1] + h) * within[2] + first[2];
          copy(from + row * sizes[2], s[2], last[2] - first[2], to_row);
        }
    }
  }
}

// out = f(row + added) for K vectors
template <int K>
inline void finish(const float* row, const float* added, const Activation f, float* out) {
  const Lanes least = Lanes{} + f.least, most = Lanes{} + f.most;
  for (int k = 0; k < K; k++) {
    Lanes sum, more = {};
    std::memcpy(&sum, row + k * LANES, sizeof(sum));
    if (added) std::memcpy(&more, added + k * LANES, sizeof(more));
    sum += more;
    Lanes y = f.slope * sum + f.shift;
    y = y < least ? least : y;
    y = y > most ? most : y;
    if (f.gate) y *= sum;
    std::memcpy(out + k * LANES, &y, sizeof(y));
  }
}

// A convolution of some groups of channels of one image; see `parasparse_convolution`.
void convolve(
    const Matrix& w, const Windows& v, int64_t group, int64_t groups, bool copied, bool direct,
    float* memory, const float* x, const float* bias, const float* added, const Activation& f,
    float* out, int threads) {
  const int64_t *const runs = v.runs, number = v.number_of_runs, length = v.length_of_runs;
  const int64_t *const s = v.stride, *const within = v.within, outputs = w.outputs / v.groups;
  const int64_t size = s[0] * within[0] * s[1] * within[1] * s[2] * within[2];
  const float* const image = copied ? memory : x;
  const Rows rows{group * outputs, groups * outputs};
  if (copied) split(v, x, groups * v.channels, memory, threads);
  in_blocks(w, rows, v.length, threads, [=](auto k, const Memory& m, int64_t start, int64_t count) {
    constexpr int64_t width = decltype(k)::value * LANES;
    const int64_t run = std::upper_bound(runs, runs + number, start) - runs - 1;
    const bool whole = start + width <= runs[run] + length;
    // Calls `call(t, n, place)` for the n values of the output that are at t in a row.
    auto in_runs = [=](auto call) {
      for (int64_t r = run; r < number && runs[r] < start + count; r++) {
        const int64_t first = std::max<int64_t>(0, runs[r] - start);
        const int64_t last = std::min(count, runs[r] + length - start);
        if (first < last) call(first, last - first, r * length + start + first - runs[r]);
      }
    };
    auto store = [=](int64_t i, const float* row) {
      float* const to = out + i * number * length;
      const float* const more = added ? added + i * number * length : nullptr;
      if (whole) {
        const int64_t at = run * length + start - runs[run];
        return finish<k>(row, more ? more + at : nullptr, f, to + at);
      }
      float sums[width] = {}, done[width];
      if (more)
        in_runs([=, &sums](int64_t t, int64_t n, int64_t at) {
          copy(more + at, n, sums + t);
        });
      finish<k>(row, more ? sums : nullptr, f, done);
      in_runs([=, &done](int64_t t, int64_t n, int64_t at) {
        copy(done + t, n, to + at);
      });
    };
    if (direct) {
      auto from = [=](int64_t i) { return image + i / outputs * v.channels * size + start; };
      auto at = [=](int64_t j) { return v.places[j]; };
      return multiply<k>(w, rows, bias, m.sums.get(), [](int64_t, int64_t) {}, from, at, store);
    }
    float* const u = (float*)m.u.get();
    int64_t part = 0;
    auto load = [=, &part](int64_t first, int64_t last) {
      part = first;
      for (int64_t j = first; j < last; j++)
        if (count == width)
          std::memcpy(u + (j - first) * width, image + v.places[j] + start, width * sizeof(float));
        else
          std::memcpy(u + (j - first) * width, image + v.places[j] + start, count * sizeof(float));
    };
    auto from = [=](int64_t) { return u; };
    auto at = [=, &part](int64_t j) { return (j - part) * width; };
    multiply<k>(w, rows, bias, m.sums.get(), load, from, at, store);
  });
}

// sum[i][t] = bias[i] + sum over j of W[i][j] * u[places[j] + t], where u is an image, padded and
// split. The output has the sums at the places t of the runs; `added` is added to it, if any, and
// may be `out`.
extern "C" void parasparse_convolution(
    const Matrix* matrix, const Windows* windows, const float* x, const float* bias,
    const float* added, const Activation* activation, float* out, int threads) {
  const Matrix w = *matrix;
  const Windows v = *windows;
  int64_t from_size = v.channels, size = v.channels, copied = 0;
  for (int dim = 0; dim < 3; dim++) {
    from_size *= v.sizes[dim];
    size *= v.stride[dim] * v.within[dim];
    copied |= v.stride[dim] > 1 || v.padding[dim] > 0;
  }
  const int64_t kept = w.starts[(w.inputs + w.part - 1) / w.part * w.outputs];
  const bool direct = kept <= DIRECT * v.groups * w.inputs;
  copied |= direct;  // it reads some floats beyond the end
  const int64_t together = direct ? std::clamp<int64_t>(CACHED / size, 1, v.groups) : 1;
  const int64_t parts = (v.groups + together - 1) / together, jobs = v.batch * parts;
  const int64_t to_size = w.outputs / v.groups * v.number_of_runs * v.length_of_runs;
  const auto memory = [=] {
    return std::unique_ptr<float[]>(copied ? new float[together * size + MOST * LANES]() : nullptr);
  };
  const auto run = [=](int64_t job, float* memory, int threads) {
    const int64_t group = job % parts * together, at = job / parts * v.groups + group;
    const float* const to_add = added ? added + at * to_size : nullptr;
    convolve(
        w, v, group, std::min(together, v.groups - group), copied, direct, memory,
        x + at * from_size, bias, to_add, *activation, out + at * to_size, threads);
  };
  if (jobs < threads) {  // all threads share a job; in a region of one, OpenMP would start others
    const auto shared = memory();
    for (int64_t job = 0; job < jobs; job++) run(job, shared.get(), threads);
  } else {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const auto own = memory();
#pragma omp for
      for (int64_t job = 0; job < jobs; job++) run(job, own.get(), 1);
    }
  }
}
