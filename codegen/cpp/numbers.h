// Numbers and vectors of them. The generated text defines before this point:
//   Real          the type of all arithmetic (float, or double for double states)
//   SIXTEEN_BIT   if Real is float and the state or rows are bfloat16 or float16

// Vectors are those of the processor: g++ 12 puts wider ones together from halves and quarters through the stack, and a
// read of the state took 3 times as long on a processor without AVX-512.
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef Real Wide __attribute__((vector_size(BYTES)));
typedef Real WideAny __attribute__((vector_size(BYTES), aligned(alignof(Real)), may_alias));
constexpr int WIDTH = BYTES / sizeof(Real);
constexpr int REGISTERS = BYTES == 64 ? 32 : 16;
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

// ---------------------------------------------------------------------------------------- conversions

// Loads and stores of one number (X = Real) or of WIDTH neighbours (X = Wide). Left to itself, g++ 12 converts 16-bit
// vectors element by element: a plain step on a float16 state took 13 times as long as a copy.
template <class T> INLINE Wide get_wide(const T* p) {
  Wide out;
  UNROLL for (int i = 0; i < WIDTH; ++i) out[i] = Real(widen(p[i]));
  return out;
}
template <class T> INLINE void put_wide(T* p, Wide x) {
  UNROLL for (int i = 0; i < WIDTH; ++i) p[i] = narrow<T>(x[i]);
}
template <> INLINE Wide get_wide(const Real* p) { return *reinterpret_cast<const WideAny*>(p); }
template <> INLINE void put_wide(Real* p, Wide x) { *reinterpret_cast<WideAny*>(p) = x; }
#if defined(SIXTEEN_BIT) && defined(__AVX512F__)
template <> INLINE Wide get_wide(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
template <> INLINE void put_wide(Bf16* p, Wide x) {
#ifdef __AVX512BF16__
  const __m256i out = (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
  const __m512i bits = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_EQ_OQ);  // a computed NaN stays one when cut
  const __m512i up = _mm512_maskz_add_epi32(number, odd, _mm512_set1_epi32(0x7fff));
  const __m256i out = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(bits, up), 16));
#endif
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
}
template <> INLINE Wide get_wide(const F16* p) {
  return (Wide)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <> INLINE void put_wide(F16* p, Wide x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(SIXTEEN_BIT) && defined(__AVX2__)
template <> INLINE Wide get_wide(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Wide)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
template <> INLINE void put_wide(Bf16* p, Wide x) {
  const __m256i bits = (__m256i)x, odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i number = (__m256i)_mm256_cmp_ps((__m256)x, (__m256)x, _CMP_EQ_OQ);
  const __m256i up = _mm256_and_si256(number, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);  // packs each half on its own
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
#ifdef __F16C__
template <> INLINE Wide get_wide(const F16* p) {
  return (Wide)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <> INLINE void put_wide(F16* p, Wide x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#endif
template <class X, class T> INLINE X get(const T* p) {
  if constexpr (std::is_same_v<X, Real>) return Real(widen(*p));
  else return get_wide(p);
}
template <class X, class T> INLINE void put(T* p, X x) {
  if constexpr (std::is_same_v<X, Real>) *p = narrow<T>(x);
  else put_wide(p, x);
}
template <class X> INLINE X splat(Real x) {
  if constexpr (std::is_same_v<X, Real>) return x;
  else return x - Wide{};
}
// Loads a value once: as an operand in memory of each instruction that uses it, it would take a load of every one.
template <class X> INLINE void in_register(X& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
}

// ------------------------------------------------------------------------------------------- pointwise

INLINE Real truth(bool x) { return x ? Real(1) : Real(0); }
INLINE Real maximum(Real a, Real b) { return a != a || a > b ? a : b; }  // NaN wins, as in torch
INLINE Real minimum(Real a, Real b) { return a != a || a < b ? a : b; }
inline Real modulo(Real a, Real b) {
  const Real rest = std::fmod(a, b);
  return rest != 0 && (rest < 0) != (b < 0) ? rest + b : rest;
}
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
