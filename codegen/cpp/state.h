// The state. It is seen as rows x columns, columns being the axis that is contiguous in memory if any is. A read of
// it contracts the rows ("across": one sum for each column) or the columns ("along": one sum for each row).

// `rows` x `columns` elements of the state. A bare block stands for zeros: it may be written but is not read.
template <class T> struct Block {
  T* data;
  int64_t row_stride, column_stride, rows, columns;
  bool bare;
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
// While it lives, this thread takes subnormal numbers for zero: an operation on one costs a hundred others, and products
// of strong decays are full of them (a step with 32 owed rows took 5 times as long).
struct NoSubnormals {
#ifdef __SSE__
  unsigned saved = __builtin_ia32_stmxcsr();
  NoSubnormals() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
  ~NoSubnormals() { __builtin_ia32_ldmxcsr(saved); }
#endif
};
// Runs body(i) for each item. Large work is handed out in pieces, because a flush makes some items slower and
// other programs take cores away; small work always meets the same core, which has it in its cache.
template <class F> inline void each_item(int64_t items, int threads, bool large, const F& body) {
  if (threads == 1) {  // a team of one costs a system call, 0.7 us
    const NoSubnormals scope;
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
  const int64_t piece = std::max<int64_t>(1, items / (16 * threads));
#pragma omp parallel num_threads(threads)
  {
    const NoSubnormals scope;
    if (large) {
#pragma omp for schedule(dynamic, piece) nowait
      for (int64_t i = 0; i < items; ++i) body(i);
    } else {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < items; ++i) body(i);
    }
  }
}

// Every pass asks for memory this many bytes ahead, in the order of addresses, at the end of a block for the first lines
// of the next one. Left to the prefetcher of the processor, which stops at every page, on a state of 67 MB a buffered read
// took 1.56 times as long as a mere read, a plain Gated DeltaNet step 1.6 times as long as a copy. In the order of the
// arithmetic, four rows side by side, a read from memory took 1.4 times as long (EPYC).
constexpr int64_t AHEAD = 8192;
// Asks for some bytes, and will ask for those behind them.
INLINE void ask(const char*& next, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line, 0, 2);
  next += bytes;
}

enum class Mode { read, fold_then_read, read_then_fold };
// What a pass asks for: what lies AHEAD; or, where an item passes twice over its block and finds it in a near cache the
// second time, half of the next block in each pass, so that memory is busy all the time (plain GDN: 1.86 -> 1.56 ms).
enum class Ask { ahead, first_half, second_half };

// One pass over a block: ACROSS reads y[i] = S^T x[i] and ALONG reads w[i] = S z[i], and a fold before or after them.
//
// RANK: the rows of the fold where their number is known, -1 where it is not.
template <class T, Mode MODE, int ACROSS, int ALONG, Ask ASK = Ask::ahead, int RANK = -1> struct Pass {
  static constexpr int NX = ACROSS ? ACROSS : 1, NZ = ALONG ? ALONG : 1;
  // Wides per step: a fold re-uses its factors that often, while four rows of them and the factors stay in registers.
  static constexpr int COLUMNS = MODE == Mode::read || REGISTERS < 32 ? 2 : 4;
  Block<T> s;
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
    const int64_t count = RANK < 0 ? fold.count : RANK;
    for (int64_t m = 0; m < count; ++m) {
      const Real *left = fold.left + m * fold.left_stride + r, *right = fold.right + m * fold.right_stride + c;
      X row[N];
      UNROLL for (int n = 0; n < N; ++n) in_register(row[n] = get<X>(right + n * step));
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
  template <int U, int N, class X> INLINE void cell(int64_t r, int64_t c, X (&sums)[NZ][U], const char*& next) const {
    constexpr int step = sizeof(X) / sizeof(Real);
    T* at = s.data + r * s.row_stride + c * s.column_stride;
    X v[U][N];
    if constexpr (!std::is_same_v<X, Real>) ask(next, U * N * step * sizeof(T) / (ASK == Ask::ahead ? 1 : 2));
    UNROLL for (int u = 0; u < U; ++u)
      UNROLL for (int n = 0; n < N; ++n) v[u][n] = s.bare ? X{} : get<X>(at + u * s.row_stride + n * step);
    if constexpr (MODE != Mode::fold_then_read) apply_reads<U, N, X>(r, c, v, sums);
    if constexpr (MODE == Mode::read) return;
    apply_fold<U, N, X>(r, c, v);
    UNROLL for (int u = 0; u < U; ++u) UNROLL for (int n = 0; n < N; ++n) put(at + u * s.row_stride + n * step, v[u][n]);
    if constexpr (MODE == Mode::fold_then_read) apply_reads<U, N, X>(r, c, v, sums);
  }
  template <int U> INLINE void rows(int64_t r, const char*& next) const {
    Wide wide[NZ][U] = {};
    Real tail[NZ][U] = {};
    const int64_t whole = s.column_stride == 1 ? s.columns : 0;
    int64_t c = 0;
    for (; c + COLUMNS * WIDTH <= whole; c += COLUMNS * WIDTH) cell<U, COLUMNS, Wide>(r, c, wide, next);
    for (; c + WIDTH <= whole; c += WIDTH) cell<U, 1, Wide>(r, c, wide, next);
    for (; c < s.columns; ++c) cell<U, 1, Real>(r, c, tail, next);
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
    run(0, s.rows);
  }
  // Where it begins to ask: bytes of the block from r on, or of the next one.
  INLINE const char* asks_from(int64_t r) const {
    const int64_t bytes = s.rows * s.row_stride * int64_t(sizeof(T));
    const char* const block = reinterpret_cast<const char*>(s.data);
    if (ASK != Ask::ahead) return block + bytes + (ASK == Ask::second_half ? bytes / 2 : 0);
    return block + r * s.row_stride * int64_t(sizeof(T)) + AHEAD;
  }
  // Rows of N Wides, with all sums in registers: nothing but the state and the factors of a fold is loaded. With sums in
  // memory, loaded and stored for every four rows, steps took 1.1 to 1.26 times as long on states in cache (AVX-512).
  template <int N> static constexpr bool FITS = ACROSS > 0 && ALONG == 0 && (MODE == Mode::read || RANK == 1) &&
                                                (NX + 1) * N <= REGISTERS - 4;
  template <int N> INLINE void whole_rows(int64_t r, int64_t end, const char* next) const {
    constexpr int64_t down = ASK == Ask::second_half;  // what the first pass met last is in the nearest cache
    Wide sums[NX][N] = {};
    int64_t at_row = down ? end - 1 : r;
    _Pragma("GCC unroll 2") for (int64_t left = end - r; left > 0; --left, at_row += 1 - 2 * down) {
      T* const at = s.data + at_row * s.row_stride;
      Wide v[N];
      ask(next, N * WIDTH * int64_t(sizeof(T)) / (ASK == Ask::ahead ? 1 : 2));
      UNROLL for (int n = 0; n < N; ++n) in_register(v[n] = s.bare ? Wide{} : get<Wide>(at + n * WIDTH));
      if constexpr (MODE != Mode::fold_then_read) add_row<N>(at_row, v, sums);
      if constexpr (MODE == Mode::read) continue;
      Wide one[1][N];
      UNROLL for (int n = 0; n < N; ++n) one[0][n] = v[n];
      apply_fold<1, N, Wide>(at_row, 0, one);
      UNROLL for (int n = 0; n < N; ++n) put(at + n * WIDTH, one[0][n]);
      if constexpr (MODE == Mode::fold_then_read) add_row<N>(at_row, one[0], sums);
    }
    UNROLL for (int i = 0; i < ACROSS; ++i) UNROLL for (int n = 0; n < N; ++n) put(y[i] + n * WIDTH, sums[i][n]);
  }
  template <int N> INLINE void add_row(int64_t r, const Wide (&v)[N], Wide (&sums)[NX][N]) const {
    UNROLL for (int i = 0; i < ACROSS; ++i) {
      const Wide by = splat<Wide>(x[i][r]);
      UNROLL for (int n = 0; n < N; ++n) sums[i][n] += by * v[n];
    }
  }
  template <int N> bool whole(int64_t r, int64_t end) const {
    if constexpr (FITS<N>)
      if (s.column_stride == 1 && s.columns == N * WIDTH && r == 0 && end == s.rows)
        return whole_rows<N>(r, end, asks_from(r)), true;
    return false;
  }
  void run(int64_t r, int64_t end) const {
    if (whole<8>(r, end) || whole<4>(r, end) || whole<2>(r, end)) return;
    const char* next = asks_from(r);
    if (ASK == Ask::second_half) {  // backwards: what the first pass met last is in the nearest cache
      for (; (end - r) % 4; --end) rows<1>(end - 1, next);
      for (; r < end; end -= 4) rows<4>(end - 4, next);
      return;
    }
    for (; r + 4 <= end; r += 4) rows<4>(r, next);
    for (; r < end; ++r) rows<1>(r, next);
  }
};

// A run-time number of reads in one pass over a block, after a fold if there is one. Query j is x + j * x_stride, its
// result y + j * y_stride. Sixteen rows at a time are fetched once and, from the first-level cache, serve the
// reads four by four with all sums in registers.
struct Reads {
  int64_t count = 0;
  const Real* x = nullptr;
  int64_t x_stride = 0;
  Real* y = nullptr;
  int64_t y_stride = 0;
  // Which of several groups of reads over the same rows asks for what is needed next: each a share of the rows, in turn, so
  // that memory is busy all the time. All of it in the first group: 4 tokens of GDN took 2.08 ms instead of 1.57.
  INLINE int64_t shares() const { return count < 8 ? 1 : count < 16 ? 2 : 4; }
};
// R reads across, N times sizeof(X) of columns from c on, rows [r, end).
template <int R, int N, class X, class T>
INLINE void tile_across(const Block<T>& s, const Reads& reads, int64_t j, int64_t r, int64_t end, int64_t c, const char*& next) {
  constexpr int step = sizeof(X) / sizeof(Real);
  const Real* const x = reads.x + j * reads.x_stride;
  Real* const y = reads.y + j * reads.y_stride + c;
  const int64_t shares = reads.shares(), turn = j / R;
  X sums[R][N];
  UNROLL for (int i = 0; i < R; ++i) UNROLL for (int n = 0; n < N; ++n) sums[i][n] = get<X>(y + i * reads.y_stride + n * step);
  for (; r < end; ++r) {
    X v[N];
    if (N == 4 && (r & (shares - 1)) == turn) ask(next, N * step * sizeof(T));
    UNROLL for (int n = 0; n < N; ++n) v[n] = get<X>(s.data + r * s.row_stride + (c + n * step) * s.column_stride);
    UNROLL for (int i = 0; i < R; ++i) {
      const X at = splat<X>(x[i * reads.x_stride + r]);
      UNROLL for (int n = 0; n < N; ++n) sums[i][n] += at * v[n];
    }
  }
  UNROLL for (int i = 0; i < R; ++i) UNROLL for (int n = 0; n < N; ++n) put(y + i * reads.y_stride + n * step, sums[i][n]);
}
// R reads along, U rows from r on.
template <int R, int U, class T>
INLINE void tile_along(const Block<T>& s, const Reads& reads, int64_t j, int64_t r, const char*& next) {
  const Real* const z = reads.x + j * reads.x_stride;
  const int64_t shares = reads.shares(), turn = j / R;
  Wide sums[R][U] = {};
  Real tail[R][U] = {}, out[U];
  const int64_t whole = s.column_stride == 1 ? s.columns / WIDTH * WIDTH : 0;
  for (int64_t c = 0; c < whole; c += WIDTH) {
    Wide v[U];
    UNROLL for (int u = 0; u < U; ++u)
      if (((r + u) & (shares - 1)) == turn) ask(next, WIDTH * sizeof(T));
    UNROLL for (int u = 0; u < U; ++u) v[u] = get<Wide>(s.data + (r + u) * s.row_stride + c);
    UNROLL for (int i = 0; i < R; ++i) {
      const Wide at = get<Wide>(z + i * reads.x_stride + c);
      UNROLL for (int u = 0; u < U; ++u) sums[i][u] += at * v[u];
    }
  }
  for (int64_t c = whole; c < s.columns; ++c)
    for (int i = 0; i < R; ++i)
      for (int u = 0; u < U; ++u)
        tail[i][u] += z[i * reads.x_stride + c] * get<Real>(s.data + (r + u) * s.row_stride + c * s.column_stride);
  for (int i = 0; i < R; ++i) {
    totals<U, Wide>(sums[i], out);
    for (int u = 0; u < U; ++u) reads.y[(j + i) * reads.y_stride + r + u] = out[u] + tail[i][u];
  }
}
template <int R, class T>
INLINE void read_tiles(const Block<T>& s, const Reads& across, int64_t j, int64_t r, int64_t end, const char*& next) {
  const int64_t whole = s.column_stride == 1 ? s.columns : 0;
  int64_t c = 0;
  for (; c + 4 * WIDTH <= whole; c += 4 * WIDTH) tile_across<R, 4, Wide>(s, across, j, r, end, c, next);
  for (; c + WIDTH <= whole; c += WIDTH) tile_across<R, 1, Wide>(s, across, j, r, end, c, next);
  for (; c < s.columns; ++c) tile_across<R, 1, Real>(s, across, j, r, end, c, next);
}
template <int R, class T>
INLINE void read_rows_along(const Block<T>& s, const Reads& along, int64_t j, int64_t r, int64_t end, const char*& next) {
  for (; r + 4 <= end; r += 4) tile_along<R, 4>(s, along, j, r, next);
  for (; r < end; ++r) tile_along<R, 1>(s, along, j, r, next);
}
template <class T>
inline void read_many(Block<T> s, bool fold_first, const Fold& fold, const Reads& across, const Reads& along) {
  const Pass<T, Mode::fold_then_read, 0, 0> write{s, fold, {}, {}, {}, {}};
  const bool nothing = s.bare && !fold_first;
  s.bare = false;
  for (int64_t j = 0; j < across.count; ++j) std::memset(across.y + j * across.y_stride, 0, s.columns * sizeof(Real));
  for (int64_t j = 0; nothing && j < along.count; ++j) std::memset(along.y + j * along.y_stride, 0, s.rows * sizeof(Real));
  for (int64_t r = 0; r < s.rows && !nothing; r += 16) {
    const int64_t end = std::min(r + 16, s.rows);
    if (fold_first) write.run(r, end);
    const char* const ahead = reinterpret_cast<const char*>(s.data + r * s.row_stride) + AHEAD;
    const char* next = ahead;
    int64_t j = 0;
    for (; j + 4 <= across.count; j += 4) read_tiles<4>(s, across, j, r, end, next);
    for (; j < across.count; ++j) read_tiles<1>(s, across, j, r, end, next);
    next = ahead;
    for (j = 0; j + 4 <= along.count; j += 4) read_rows_along<4>(s, along, j, r, end, next);
    for (; j < along.count; ++j) read_rows_along<1>(s, along, j, r, end, next);
  }
}
