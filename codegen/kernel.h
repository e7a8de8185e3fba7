// What every generated kernel is made of. The generated text defines before this point:
//   Real   the type of all arithmetic (float, or double for double states)
//   LANES  how many lane axes a state has
//
// The state is seen as a block of outer x inner elements, inner being the axis that is contiguous in memory if any is.
// A read of it contracts the outer axis ("across": one sum per inner element) or the inner one ("along").

typedef Real Wide __attribute__((vector_size(64)));
typedef Real WideAny __attribute__((vector_size(64), aligned(alignof(Real)), may_alias));
constexpr int WIDTH = 64 / sizeof(Real);
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// ---------------------------------------------------------------------------------------------- dtypes

struct Bf16 { uint16_t bits; };
#ifdef __FLT16_MAX__
typedef _Float16 F16;
#else
struct F16 { uint16_t bits; };  // no such type here: the kernel refuses tensors of it
#endif
enum class Dtype { f32, f64, bf16, f16 };

INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
template <class T> INLINE T narrow(Real x) { return T(x); }
template <> INLINE Bf16 narrow<Bf16>(Real real) {  // to nearest, ties to even; NaN stays NaN
  const float x = float(real);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return Bf16{uint16_t(x == x ? rounded : (bits >> 16) | 0x40)};
}
#ifdef __FLT16_MAX__
INLINE float widen(F16 x) { return float(x); }
#else
INLINE float widen(F16) { return 0; }
template <> INLINE F16 narrow<F16>(Real) { return F16{0}; }
#endif

// Loads and stores of one number (X = Real) or of WIDTH neighbours (X = Wide).
template <class X, class T> INLINE X get(const T* p) {
  if constexpr (std::is_same_v<X, Real>) {
    return Real(widen(*p));
  } else if constexpr (std::is_same_v<T, Real>) {
    return *reinterpret_cast<const WideAny*>(p);
  } else if constexpr (std::is_same_v<T, Bf16> && sizeof(Real) == 4) {
    typedef uint16_t Bits __attribute__((vector_size(32), aligned(2), may_alias));
    typedef uint32_t Words __attribute__((vector_size(64)));
    return (Wide)(__builtin_convertvector(*reinterpret_cast<const Bits*>(p), Words) << 16);
  } else {
    Wide out;
    UNROLL for (int i = 0; i < WIDTH; ++i) out[i] = Real(widen(p[i]));
    return out;
  }
}
template <class X, class T> INLINE void put(T* p, X x) {
  if constexpr (std::is_same_v<X, Real>) {
    *p = narrow<T>(x);
  } else if constexpr (std::is_same_v<T, Real>) {
    *reinterpret_cast<WideAny*>(p) = x;
  } else if constexpr (std::is_same_v<T, Bf16> && sizeof(Real) == 4) {
    typedef uint16_t Bits __attribute__((vector_size(32), aligned(2), may_alias));
    typedef uint32_t Words __attribute__((vector_size(64)));
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words whole = x == x ? rounded : ((bits >> 16) | 0x40);
    *reinterpret_cast<Bits*>(p) = __builtin_convertvector(whole, Bits);
  } else {
    UNROLL for (int i = 0; i < WIDTH; ++i) p[i] = narrow<T>(x[i]);
  }
}
template <class X> INLINE X splat(Real x) {
  if constexpr (std::is_same_v<X, Real>) return x;
  else return x - Wide{};
}

// ------------------------------------------------------------------------------------------- pointwise

INLINE Real truth(bool x) { return x ? Real(1) : Real(0); }
INLINE Real maximum(Real a, Real b) { return a != a || a > b ? a : b; }  // NaN wins, as in torch
INLINE Real minimum(Real a, Real b) { return a != a || a < b ? a : b; }
// exp without branches, so that loops over it become vectors: 2^n e^r with |r| <= ln2 / 2, error below 1 ulp.
INLINE float exponential(float x) {
  const float clamped = x < -104.f ? -104.f : (x > 89.f ? 89.f : x);
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, clamped));
  float p = std::fma(r, 1.9875691e-4f, 1.3981999e-3f);
  p = std::fma(p, r, 8.3334519e-3f);
  p = std::fma(p, r, 4.1665796e-2f);
  p = std::fma(p, r, 1.6666665e-1f);
  p = std::fma(p, r, 5.0000001e-1f);
  p = std::fma(p * r, r, r) + 1.f;
  const int32_t half = int32_t(n) >> 1, rest = int32_t(n) - half;  // two steps: results may be subnormal or inf
  const uint32_t low = uint32_t(half + 127) << 23, high = uint32_t(rest + 127) << 23;
  float a, b;
  std::memcpy(&a, &low, 4);
  std::memcpy(&b, &high, 4);
  return p * a * b + (x != x ? x : 0.f);
}
INLINE double exponential(double x) { return std::exp(x); }
INLINE Real sigmoid(Real x) { return Real(1) / (Real(1) + exponential(-x)); }
INLINE Real softplus(Real x, Real beta, Real limit) {
  return x * beta > limit ? x : std::log1p(exponential(x * beta)) / beta;
}
INLINE Real gelu(Real x) { return Real(0.5) * x * (Real(1) + std::erf(x * Real(0.70710678118654752))); }

// --------------------------------------------------------------------------------- vectors of one axis

// Halves are added up until 16 bytes are left, and of those four vectors are summed at once.
#define PART(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
INLINE auto quarter(Floats v) {
  const auto half = PART(v, 0, 1, 2, 3, 4, 5, 6, 7) + PART(v, 8, 9, 10, 11, 12, 13, 14, 15);
  return PART(half, 0, 1, 2, 3) + PART(half, 4, 5, 6, 7);
}
INLINE float total(Floats v) {
  const auto q = quarter(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
INLINE double total(Doubles v) {
  const auto half = PART(v, 0, 1, 2, 3) + PART(v, 4, 5, 6, 7);
  return (half[0] + half[2]) + (half[1] + half[3]);
}
template <int U, class W> INLINE void totals(const W (&v)[U], Real* out) {
  if constexpr (U == 4 && std::is_same_v<W, Floats>) {
    const auto a = quarter(v[0]), b = quarter(v[1]), c = quarter(v[2]), d = quarter(v[3]);
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
template <int N, int R>
INLINE void dots(const Real* const* a, const Real* const (&x)[N], int64_t n, Real (&out)[N][R]) {
  Wide part[N][R] = {};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH)
    UNROLL for (int m = 0; m < R; ++m) {
      const Wide at = get<Wide>(a[m] + i);
      UNROLL for (int j = 0; j < N; ++j) part[j][m] += at * get<Wide>(x[j] + i);
    }
  UNROLL for (int j = 0; j < N; ++j) totals<R, Wide>(part[j], out[j]);
  for (; i < n; ++i) UNROLL for (int m = 0; m < R; ++m) UNROLL for (int j = 0; j < N; ++j) out[j][m] += a[m][i] * x[j][i];
}
inline Real dot(const Real* a, const Real* b, int64_t n) {
  const Real* const x[1] = {b};
  Real out[1][1];
  dots<1, 1>(&a, x, n, out);
  return out[0][0];
}
template <class T> inline void convert(Real* out, const T* in, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = Real(widen(in[i]));
  else
    for (int64_t i = 0; i < n; ++i) out[i] = Real(widen(in[i * stride]));
}
template <class T> inline void store(T* out, const Real* in, int64_t stride, int64_t n) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(in[i]);
  else
    for (int64_t i = 0; i < n; ++i) out[i * stride] = narrow<T>(in[i]);
}
// `in` itself where it can be used as it is, or a converted copy in `room`.
template <class T> INLINE const Real* fetch(Real* room, const T* in, int64_t stride, int64_t n) {
  if constexpr (std::is_same_v<T, Real>)
    if (stride == 1) return in;
  convert(room, in, stride, n);
  return room;
}

// ------------------------------------------------------------------------------------------- owed rows

// y[j] += sum over R rows m of weight[m] <met[m], x[j]> free[m]
template <int N, int R>
INLINE void add_rows(const Real* weight, const Real* const* met, int64_t met_size, const Real* const* free, int64_t free_size,
                     const Real* const (&x)[N], Real* const (&y)[N]) {
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
    UNROLL for (int j = 0; j < N; ++j) UNROLL for (int m = 0; m < R; ++m) y[j][c] += scale[j][m] * free[m][c];
}
template <int N>
inline void read_rows(int64_t count, const Real* weight, const Real* const* met, int64_t met_size, const Real* const* free,
                      int64_t free_size, const Real* const (&x)[N], Real* const (&y)[N]) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) add_rows<N, 4>(weight + m, met + m, met_size, free + m, free_size, x, y);
  for (; m < count; ++m) add_rows<N, 1>(weight + m, met + m, met_size, free + m, free_size, x, y);
}

// ----------------------------------------------------------------------------------------- the state

// `rows` x `columns` elements of the state. A bare block stands for zeros: it may be written but is not read.
// ahead: how far away the block is that this thread will most likely work on next, 0 if unknown.
template <class T> struct Block {
  T* data;
  int64_t row_stride, column_stride, rows, columns;
  bool bare;
  int64_t ahead;
};
// S <- keep_row[:, None] keep_column[None, :] S + sum over m < count of left[m] right[m]^T (left along rows).
// A null factor is 1.
struct Fold {
  int64_t count = 0;
  const Real* left = nullptr;
  int64_t left_stride = 0;
  const Real* right = nullptr;
  int64_t right_stride = 0;
  const Real* keep_row = nullptr;
  const Real* keep_column = nullptr;
};
// Runs body(i) for each item. Large work is handed out in pieces, because a flush makes some items slower and
// other programs take cores away; small work always meets the same core, which has it in its cache.
template <class F> inline void each_item(int64_t items, int threads, bool large, const F& body) {
  if (threads == 1) {
    for (int64_t i = 0; i < items; ++i) body(i);
  } else if (large) {
    const int64_t piece = std::max<int64_t>(1, items / (16 * threads));
#pragma omp parallel for schedule(dynamic, piece) num_threads(threads)
    for (int64_t i = 0; i < items; ++i) body(i);
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < items; ++i) body(i);
  }
}

enum class Mode { read, fold_then_read, read_then_fold };

// One pass over a block: ACROSS reads y[i] = S^T x[i] and ALONG reads w[i] = S z[i], and a fold before or after them.
// prefetch: which groups of four rows of the block ahead to ask for meanwhile, a bit for each of four in turn. Passes
// that find the block in the cache, or that are bound by arithmetic, leave the memory idle otherwise: asking for a half
// in each of two passes took a plain Gated DeltaNet step from 1.46 to 1.27 times the time of a copy; every second line
// is enough (lines come in pairs), and more of them only block the core.
template <class T, Mode MODE, int ACROSS, int ALONG> struct Pass {
  static constexpr int NX = ACROSS ? ACROSS : 1, NZ = ALONG ? ALONG : 1;
  static constexpr int COLUMNS = MODE == Mode::read ? 2 : 4;  // Wides per step: a fold re-uses its factors that often
  Block<T> s;
  unsigned prefetch;
  Fold fold;
  const Real* x[NX];
  Real* y[NX];
  const Real* z[NZ];
  Real* w[NZ];

  template <int U, int N, class X> INLINE void apply_fold(int64_t r, int64_t c, X (&v)[U][N]) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    UNROLL for (int u = 0; u < U; ++u)
      UNROLL for (int n = 0; n < N; ++n) {
        if (fold.keep_row) v[u][n] *= splat<X>(fold.keep_row[r + u]);
        if (fold.keep_column) v[u][n] *= get<X>(fold.keep_column + c + n * step);
      }
    for (int64_t m = 0; m < fold.count; ++m) {
      const Real *left = fold.left + m * fold.left_stride + r, *right = fold.right + m * fold.right_stride + c;
      X row[N];
      UNROLL for (int n = 0; n < N; ++n) row[n] = get<X>(right + n * step);
      UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) v[u][n] += splat<X>(left[u]) * row[n];
    }
  }
  template <int U, int N, class X> INLINE void apply_reads(int64_t r, int64_t c, const X (&v)[U][N], X (&sums)[NZ][U]) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    UNROLL for (int n = 0; n < N; ++n) {
      UNROLL for (int i = 0; i < ACROSS; ++i) {
        X out = get<X>(y[i] + c + n * step);
        UNROLL for (int u = 0; u < U; ++u) out += splat<X>(x[i][r + u]) * v[u][n];
        put(y[i] + c + n * step, out);
      }
      UNROLL for (int i = 0; i < ALONG; ++i) {
        const X at = get<X>(z[i] + c + n * step);
        UNROLL for (int u = 0; u < U; ++u) sums[i][u] += at * v[u][n];
      }
    }
  }
  template <int U, int N, class X> INLINE void cell(int64_t r, int64_t c, bool ask, X (&sums)[NZ][U]) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    T* at = s.data + r * s.row_stride + c * s.column_stride;
    X v[U][N];
    if (ask)
      UNROLL for (int u = 0; u < U; ++u)
        for (int n = 0; n < N; n += 2) __builtin_prefetch(at + u * s.row_stride + n * step + s.ahead, 0, 2);
    UNROLL for (int u = 0; u < U; ++u)
      UNROLL for (int n = 0; n < N; ++n) v[u][n] = s.bare ? X{} : get<X>(at + u * s.row_stride + n * step);
    if constexpr (MODE != Mode::fold_then_read) apply_reads<U, N, X>(r, c, v, sums);
    if constexpr (MODE == Mode::read) return;
    apply_fold<U, N, X>(r, c, v);
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) put(at + u * s.row_stride + n * step, v[u][n]);
    if constexpr (MODE == Mode::fold_then_read) apply_reads<U, N, X>(r, c, v, sums);
  }
  template <int U> INLINE void rows(int64_t r) const {
    const bool ask = s.ahead && (prefetch >> (r / 4 % 4) & 1);
    Wide wide[NZ][U] = {};
    Real tail[NZ][U] = {};
    const int64_t whole = s.column_stride == 1 ? s.columns : 0;
    int64_t c = 0;
    for (; c + COLUMNS * WIDTH <= whole; c += COLUMNS * WIDTH) cell<U, COLUMNS, Wide>(r, c, ask, wide);
    for (; c + WIDTH <= whole; c += WIDTH) cell<U, 1, Wide>(r, c, false, wide);
    for (; c < s.columns; ++c) cell<U, 1, Real>(r, c, false, tail);
    UNROLL for (int i = 0; i < ALONG; ++i) {
      totals<U, Wide>(wide[i], w[i] + r);
      UNROLL for (int u = 0; u < U; ++u) w[i][r + u] += tail[i][u];
    }
  }
  void run() const {
    for (int i = 0; i < ACROSS; ++i) std::memset(y[i], 0, s.columns * sizeof(Real));
    if (MODE == Mode::read && s.bare) {
      for (int i = 0; i < ALONG; ++i) std::memset(w[i], 0, s.rows * sizeof(Real));
      return;
    }
    int64_t r = 0;
    for (; r + 4 <= s.rows; r += 4) rows<4>(r);
    for (; r < s.rows; ++r) rows<1>(r);
  }
};

// A run-time number of reads in one pass over a block, after a fold if there is one. Query j is x + j * x_stride, its
// result y + j * y_stride. Every group of rows is fetched once and serves the reads four by four.
struct Reads {
  int64_t count;
  const Real* x;
  int64_t x_stride;
  Real* y;
  int64_t y_stride;
};
template <int U, class T, int ACROSS, int ALONG> INLINE void read_rows_of(const Block<T>& s, int64_t r, const Reads& reads, int64_t j) {
  constexpr int N = ACROSS + ALONG;
  Pass<T, Mode::read, ACROSS, ALONG> pass{s, 0, {}, {}, {}, {}, {}};
  UNROLL for (int i = 0; i < N; ++i) {
    (ACROSS ? pass.x : pass.z)[i] = reads.x + (j + i) * reads.x_stride;
    (ACROSS ? pass.y : pass.w)[i] = reads.y + (j + i) * reads.y_stride;
  }
  pass.template rows<U>(r);
}
template <int U, class T>
INLINE void read_group(const Block<T>& s, bool fold_first, const Fold& fold, int64_t r, const Reads& across, const Reads& along) {
  if (fold_first) Pass<T, Mode::fold_then_read, 0, 0>{s, 0b1111, fold, {}, {}, {}, {}}.template rows<U>(r);
  else if (s.bare) return;
  Block<T> written = s;
  written.bare = false;
  int64_t j = 0;
  for (; j + 4 <= across.count; j += 4) read_rows_of<U, T, 4, 0>(written, r, across, j);
  for (; j < across.count; ++j) read_rows_of<U, T, 1, 0>(written, r, across, j);
  for (j = 0; j + 2 <= along.count; j += 2) read_rows_of<U, T, 0, 2>(written, r, along, j);
  for (; j < along.count; ++j) read_rows_of<U, T, 0, 1>(written, r, along, j);
}
template <class T>
inline void read_many(const Block<T>& s, bool fold_first, const Fold& fold, const Reads& across, const Reads& along) {
  for (int64_t j = 0; j < across.count; ++j) std::memset(across.y + j * across.y_stride, 0, s.columns * sizeof(Real));
  for (int64_t j = 0; j < along.count; ++j) std::memset(along.y + j * along.y_stride, 0, s.rows * sizeof(Real));
  int64_t r = 0;
  for (; r + 4 <= s.rows; r += 4) read_group<4>(s, fold_first, fold, r, across, along);
  for (; r < s.rows; ++r) read_group<1>(s, fold_first, fold, r, across, along);
}
