// Vectors along one axis, and owed rows.

// Halves are added up until 16 bytes are left, and of those four vectors are summed at once.
#define PART(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
typedef float Floats __attribute__((vector_size(BYTES)));
typedef double Doubles __attribute__((vector_size(BYTES)));
#if BYTES == 64
INLINE auto short_of(Floats v) {
  const auto half = PART(v, 0, 1, 2, 3, 4, 5, 6, 7) + PART(v, 8, 9, 10, 11, 12, 13, 14, 15);
  return PART(half, 0, 1, 2, 3) + PART(half, 4, 5, 6, 7);
}
INLINE auto short_of(Doubles v) {
  const auto half = PART(v, 0, 1, 2, 3) + PART(v, 4, 5, 6, 7);
  return PART(half, 0, 1) + PART(half, 2, 3);
}
#elif BYTES == 32
INLINE auto short_of(Floats v) { return PART(v, 0, 1, 2, 3) + PART(v, 4, 5, 6, 7); }
INLINE auto short_of(Doubles v) { return PART(v, 0, 1) + PART(v, 2, 3); }
#else
INLINE auto short_of(Floats v) { return v; }
INLINE auto short_of(Doubles v) { return v; }
#endif
INLINE float total(Floats v) {
  const auto q = short_of(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
INLINE double total(Doubles v) {
  const auto half = short_of(v);
  return half[0] + half[1];
}
template <int U, class W> INLINE void totals(const W (&v)[U], Real* out) {
  if constexpr (U == 4 && std::is_same_v<W, Floats>) {
    const auto a = short_of(v[0]), b = short_of(v[1]), c = short_of(v[2]), d = short_of(v[3]);
    const auto ab = MIX(a, b, 0, 4, 1, 5) + MIX(a, b, 2, 6, 3, 7), cd = MIX(c, d, 0, 4, 1, 5) + MIX(c, d, 2, 6, 3, 7);
    const auto all = MIX(ab, cd, 0, 1, 4, 5) + MIX(ab, cd, 2, 3, 6, 7);
    std::memcpy(out, &all, sizeof all);
  } else {
    UNROLL for (int u = 0; u < U; ++u) out[u] = total(v[u]);
  }
}
inline Real sum(const Real* x, int64_t n) {
  Real out = 0;
#pragma omp simd reduction(+ : out)
  for (int64_t i = 0; i < n; ++i) out += x[i];
  return out;
}
inline Real mean(const Real* x, int64_t n) { return sum(x, n) / Real(n); }
inline Real largest(const Real* x, int64_t n) {
  Real out = x[0];
  for (int64_t i = 1; i < n; ++i) out = maximum(out, x[i]);
  return out;
}
inline Real smallest(const Real* x, int64_t n) {
  Real out = x[0];
  for (int64_t i = 1; i < n; ++i) out = minimum(out, x[i]);
  return out;
}
// out[j][m] = <a[m], x[j]>
template <int N, int R, class T>
INLINE void dots(const T* const* a, const Real* const (&x)[N], int64_t n, Real (&out)[N][R]) {
  Wide part[N][R] = {};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH)
    UNROLL for (int m = 0; m < R; ++m) {
      const Wide at = get<Wide>(a[m] + i);
      UNROLL for (int j = 0; j < N; ++j) part[j][m] += at * get<Wide>(x[j] + i);
    }
  UNROLL for (int j = 0; j < N; ++j) totals<R, Wide>(part[j], out[j]);
  for (; i < n; ++i)
    UNROLL for (int m = 0; m < R; ++m) UNROLL for (int j = 0; j < N; ++j) out[j][m] += get<Real>(a[m] + i) * x[j][i];
}
inline Real dot(const Real* a, const Real* b, int64_t n) {
  const Real* const x[1] = {b};
  Real out[1][1];
  dots<1, 1>(&a, x, n, out);
  return out[0][0];
}
template <class T> inline void convert(Real* out, const T* in, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + WIDTH <= n; i += WIDTH) put<Wide>(out + i, get<Wide>(in + i));
  for (; i < n; ++i) out[i] = Real(widen(in[i * stride]));
}
template <class T> inline void store(T* out, const Real* in, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + WIDTH <= n; i += WIDTH) put<Wide>(out + i, get<Wide>(in + i));
  for (; i < n; ++i) out[i * stride] = narrow<T>(in[i]);
}
// Asks for memory that is needed soon.
template <class T> INLINE void ask_for(const T* in, int64_t stride, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(in + i * stride, 0, 2);
}
// `in` itself where it can be used as it is, or a copy in `room`.
template <class To, class T> INLINE const To* fetch(To* room, const T* in, int64_t stride, int64_t n) {
  if constexpr (std::is_same_v<T, To>)
    if (stride == 1) return in;
  for (int64_t i = 0; i < n && stride != 1; ++i) room[i] = narrow<To>(Real(widen(in[i * stride])));
  if constexpr (std::is_same_v<To, Real>)
    if (stride == 1) convert(room, in, 1, n);
  return room;
}

// ------------------------------------------------------------------------------------------- owed rows

// Where the same rows of the next lane lie, most likely this thread's next item: elements behind those of left and right.
struct Next {
  int64_t met = 0, free = 0;
};
// y[j] += sum over R rows m of weight[m] <met[m], x[j]> free[m]
//
// Asks for the next lane's rows, a few at a time, so that memory is busy while these are computed with: rows are short, and
// the processor's own prefetcher finds no pattern in them. All at once, before the pass over the state, a read of 32 rows
// and no base took 1.2 to 1.3 times as long.
template <int N, int R, class Met, class Free>
INLINE void add_rows(const Real* weight, const Met* const* met, int64_t met_size, const Free* const* free,
                     int64_t free_size, const Real* const (&x)[N], Real* const (&y)[N], const Next& next) {
  if (next.met) UNROLL for (int m = 0; m < R; ++m) ask_for(met[m] + next.met, 1, met_size);
  if (next.free) UNROLL for (int m = 0; m < R; ++m) ask_for(free[m] + next.free, 1, free_size);
  Real scale[N][R];
  dots<N, R>(met, x, met_size, scale);
  UNROLL for (int j = 0; j < N; ++j) UNROLL for (int m = 0; m < R; ++m) scale[j][m] *= weight[m];
  int64_t c = 0;
  for (; c + WIDTH <= free_size; c += WIDTH) {
    Wide row[R];
    UNROLL for (int m = 0; m < R; ++m) row[m] = get<Wide>(free[m] + c);
    UNROLL for (int j = 0; j < N; ++j) {
      Wide out = get<Wide>(y[j] + c);
      UNROLL for (int m = 0; m < R; ++m) out += scale[j][m] * row[m];
      put(y[j] + c, out);
    }
  }
  for (; c < free_size; ++c)
    UNROLL for (int j = 0; j < N; ++j) UNROLL for (int m = 0; m < R; ++m) y[j][c] += scale[j][m] * get<Real>(free[m] + c);
}
template <int N, class Met, class Free>
inline void read_rows(int64_t count, const Real* weight, const Met* const* met, int64_t met_size, const Free* const* free,
                      int64_t free_size, const Real* const (&x)[N], Real* const (&y)[N], const Next& next) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) add_rows<N, 4>(weight + m, met + m, met_size, free + m, free_size, x, y, next);
  for (; m < count; ++m) add_rows<N, 1>(weight + m, met + m, met_size, free + m, free_size, x, y, next);
}
