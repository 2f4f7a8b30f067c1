/* The few vector operations the kernels need, once per instruction set.
 *
 * LANES is the number of fp32 lanes in a register: 16 (AVX-512), 8 (AVX2) or 4 (NEON and plain C).
 *   vf   LANES floats          vi   LANES int32          vs   2 * LANES int16
 *
 * vi_dot multiplies 2 * LANES pairs of int16 and adds them into LANES int32 sums, each product into some lane of
 * its own quarter register; the "multiply-add pairs" of x86 is the one integer dot product that every chip there
 * has. vs_nibbles(words, i) takes the i-th four bits of each int16, lowest first.
 *
 * A quad is four lanes. vf_quads and vi_quads add up the quads of four registers: lane 4 i + n of the result is the
 * sum of a[n]'s i-th quad. vf_store_quad adds up the quads of that and stores the four sums of whole registers.
 * vf_store_columns stores lane i of four registers as quad i.
 * vf_load_quads loads a quad of floats for each 16 bytes of int4 weights: p holds a quad per group of 2^shift bytes,
 * and the order of quads_of_groups(shift) repeats each as often as its group fills quads.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && !defined(MINILLM_PLAIN_C)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

INLINE float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t float_to_bf16(float value) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float half_to_float(uint16_t bits) {
#if defined(__F16C__) && !defined(MINILLM_PLAIN_C)
    return _cvtsh_ss(bits);
#endif
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    if (exponent == 0) { /* zero and subnormals: mantissa * 2^-24 */
        float value = (float)mantissa * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t wide = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | mantissa << 13;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

INLINE uint16_t float_to_half(float value) { /* round to nearest even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00; /* 65520 and above round to infinity */
    if (bits < 0x38800000) {                      /* below 2^-14: a multiple of 2^-24 */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        return sign | (uint16_t)rintf(magnitude * 0x1p24f);
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return sign | (uint16_t)((bits - 0x38000000) >> 13);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && !defined(MINILLM_PLAIN_C)
#define LANES 16
#define MAX_ROWS 5 /* 4 x 5 sums, 4 weights and what they need in between fit the 32 registers */
typedef __m512 vf;
typedef __m512i vi, vs;
INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE vf vf_load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf vf_load_uint8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p)));
}
INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vf vi_to_vf(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vs vs_load(const int16_t *p) { return _mm512_loadu_si512(p); }
INLINE vs vs_load_int8(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(p)); }
INLINE vs vs_nibbles(vs words, int i) {
    vs shifted = i ? _mm512_srli_epi16(words, 4 * i) : words;
    return i < 3 ? _mm512_and_si512(shifted, _mm512_set1_epi16(15)) : shifted;
}
INLINE vf vf_quads(const vf a[4]) {
    vf ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1])); /* quads of a b a b */
    vf cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}
INLINE vi vi_quads(const vi a[4]) {
    vi ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    vi cd = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}
INLINE void vf_store_quad(float *p, vf a) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
INLINE void vf_store_columns(float *p, const vf a[4]) {
    vf low[2] = {_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpacklo_ps(a[2], a[3])};  /* lanes 0 and 1 of each quad, */
    vf high[2] = {_mm512_unpackhi_ps(a[0], a[1]), _mm512_unpackhi_ps(a[2], a[3])}; /* lanes 2 and 3 */
    vf of[4] = {_mm512_shuffle_ps(low[0], low[1], 0x44), _mm512_shuffle_ps(low[0], low[1], 0xee),
                _mm512_shuffle_ps(high[0], high[1], 0x44), _mm512_shuffle_ps(high[0], high[1], 0xee)};
    vf first[2] = {_mm512_shuffle_f32x4(of[0], of[1], 0x44), _mm512_shuffle_f32x4(of[2], of[3], 0x44)};
    vf last[2] = {_mm512_shuffle_f32x4(of[0], of[1], 0xee), _mm512_shuffle_f32x4(of[2], of[3], 0xee)};
    vf_store(p, _mm512_shuffle_f32x4(first[0], first[1], 0x88));
    vf_store(p + 16, _mm512_shuffle_f32x4(first[0], first[1], 0xdd));
    vf_store(p + 32, _mm512_shuffle_f32x4(last[0], last[1], 0x88));
    vf_store(p + 48, _mm512_shuffle_f32x4(last[0], last[1], 0xdd));
}
typedef __m512i quads;
INLINE quads quads_of_groups(int shift) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    __m512i byte = _mm512_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16, 32, 32, 32, 32, 48, 48, 48, 48);
    return _mm512_add_epi32(_mm512_slli_epi32(_mm512_srli_epi32(byte, shift), 2), lane);
}
INLINE vf vf_load_quads(const float *p, quads order) { return _mm512_permutexvar_ps(order, vf_load(p)); }
/* Spelled in assembly: through the intrinsics gcc 12 copies every sum before and after, and reloads b. */
#ifdef __AVX512VNNI__
INLINE vi vi_dot(vi sum, vs a, vs b) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
#else
INLINE vi vi_dot(vi sum, vs a, vs b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
#endif
#ifdef __AVX512BF16__
#define BF16_DOT 1 /* multiplies pairs of bf16 by itself, so activations stay bf16 */
INLINE vf vf_dot_bf16(vf sum, vs a, vs b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
/* A group of int4 weights as bf16, (q - zero) * scale rounded: the low halves of `half` bytes, and the high ones */
INLINE void unpack_int4(const uint8_t *bytes, long half, float scale, float zero, uint16_t *low, uint16_t *high) {
    __m512 code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i all = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_sub_ps(code, vf_set(zero)), vf_set(scale)));
    for (long k = 0; k < half; k += 16) {
        __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)(bytes + k)));
        _mm256_storeu_si256((void *)(low + k), _mm256_permutexvar_epi16(words, all)); /* looks at four bits */
        _mm256_storeu_si256((void *)(high + k), _mm256_permutexvar_epi16(_mm256_srli_epi16(words, 4), all));
    }
}
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(MINILLM_PLAIN_C)
#define LANES 8
#define MAX_ROWS 2 /* 16 registers */
typedef __m256 vf;
typedef __m256i vi, vs;
INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float vf_sum(vf a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
INLINE vf vf_load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
INLINE vf vf_load_uint8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p)));
}
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vf vi_to_vf(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vs vs_load(const int16_t *p) { return _mm256_loadu_si256((const void *)p); }
INLINE vs vs_load_int8(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(p)); }
INLINE vs vs_nibbles(vs words, int i) {
    vs shifted = i ? _mm256_srli_epi16(words, 4 * i) : words;
    return i < 3 ? _mm256_and_si256(shifted, _mm256_set1_epi16(15)) : shifted;
}
INLINE vf vf_quads(const vf a[4]) {
    vf ab = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1])); /* quads of a b a b */
    vf cd = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
    return _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
}
INLINE vi vi_quads(const vi a[4]) {
    vi ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
    vi cd = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}
INLINE void vf_store_quad(float *p, vf a) {
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
}
INLINE void vf_store_columns(float *p, const vf a[4]) {
    vf low[2] = {_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpacklo_ps(a[2], a[3])};  /* lanes 0 and 1 of each quad, */
    vf high[2] = {_mm256_unpackhi_ps(a[0], a[1]), _mm256_unpackhi_ps(a[2], a[3])}; /* lanes 2 and 3 */
    vf of[4] = {_mm256_shuffle_ps(low[0], low[1], 0x44), _mm256_shuffle_ps(low[0], low[1], 0xee),
                _mm256_shuffle_ps(high[0], high[1], 0x44), _mm256_shuffle_ps(high[0], high[1], 0xee)};
    for (int i = 0; i < 2; i++) {
        vf_store(p + 8 * i, _mm256_permute2f128_ps(of[2 * i], of[2 * i + 1], 0x20));
        vf_store(p + 16 + 8 * i, _mm256_permute2f128_ps(of[2 * i], of[2 * i + 1], 0x31));
    }
}
typedef __m256i quads;
INLINE quads quads_of_groups(int shift) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3), byte = _mm256_setr_epi32(0, 0, 0, 0, 16, 16, 16, 16);
    return _mm256_add_epi32(_mm256_slli_epi32(_mm256_srli_epi32(byte, shift), 2), lane);
}
INLINE vf vf_load_quads(const float *p, quads order) { return _mm256_permutevar8x32_ps(vf_load(p), order); }
INLINE vi vi_dot(vi sum, vs a, vs b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(MINILLM_PLAIN_C)
#include <arm_neon.h>
#define LANES 4
#define MAX_ROWS 5
typedef float32x4_t vf;
typedef int32x4_t vi;
typedef int16x8_t vs;
INLINE vf vf_zero(void) { return vdupq_n_f32(0); }
INLINE void vf_store(float *p, vf a) { vst1q_f32(p, a); }
INLINE vf vf_set(float x) { return vdupq_n_f32(x); }
INLINE vf vf_load(const float *p) { return vld1q_f32(p); }
INLINE vf vf_mul(vf a, vf b) { return vmulq_f32(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE float vf_sum(vf a) { return vaddvq_f32(a); }
INLINE vf vf_load_half(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE vf vf_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE vf vf_load_uint8(const uint8_t *p) {
    uint32_t bytes;
    memcpy(&bytes, p, 4);
    uint16x8_t wide = vmovl_u8(vcreate_u8(bytes));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}
INLINE vi vi_zero(void) { return vdupq_n_s32(0); }
INLINE vf vi_to_vf(vi a) { return vcvtq_f32_s32(a); }
INLINE vs vs_load(const int16_t *p) { return vld1q_s16(p); }
INLINE vs vs_load_int8(const void *p) { return vmovl_s8(vld1_s8(p)); }
INLINE vs vs_nibbles(vs words, int i) {
    uint16x8_t shifted = vshlq_u16(vreinterpretq_u16_s16(words), vdupq_n_s16(-4 * i));
    return vreinterpretq_s16_u16(vandq_u16(shifted, vdupq_n_u16(15)));
}
INLINE vf vf_quads(const vf a[4]) { return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])); }
INLINE vi vi_quads(const vi a[4]) { return vpaddq_s32(vpaddq_s32(a[0], a[1]), vpaddq_s32(a[2], a[3])); }
INLINE void vf_store_quad(float *p, vf a) { vst1q_f32(p, a); }
INLINE void vf_store_columns(float *p, const vf a[4]) { vst4q_f32(p, (float32x4x4_t){{a[0], a[1], a[2], a[3]}}); }
typedef int quads; /* one quad, one group: nothing to spread */
INLINE quads quads_of_groups(int shift) { return shift; }
INLINE vf vf_load_quads(const float *p, quads order) { return (void)order, vf_load(p); }
INLINE vi vi_dot(vi sum, vs a, vs b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}

#else /* plain C: correct everywhere; whether the loops become vectors is up to the compiler */
/* Not whether a product is rounded before it is added: here it would be, there not, and a row's bits would depend on how
 * many rows there are. */
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#define LANES 4
#define MAX_ROWS 2
typedef struct { float lane[4]; } vf;
typedef struct { int32_t lane[4]; } vi;
typedef struct { int16_t lane[8]; } vs;
#define EACH_LANE(type, value)                                                       \
    type v;                                                                          \
    for (int i = 0; i < (int)(sizeof v / sizeof *v.lane); i++) v.lane[i] = (value); \
    return v
INLINE vf vf_set(float x) { EACH_LANE(vf, x); }
INLINE vf vf_zero(void) { return vf_set(0); }
INLINE void vf_store(float *p, vf a) { memcpy(p, a.lane, sizeof a); }
INLINE vf vf_load(const float *p) { EACH_LANE(vf, p[i]); }
INLINE vf vf_mul(vf a, vf b) { EACH_LANE(vf, a.lane[i] * b.lane[i]); }
INLINE vf vf_fma(vf a, vf b, vf c) { EACH_LANE(vf, a.lane[i] * b.lane[i] + c.lane[i]); }
INLINE float vf_sum(vf a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
INLINE vf vf_load_half(const uint16_t *p) { EACH_LANE(vf, half_to_float(p[i])); }
INLINE vf vf_load_bf16(const uint16_t *p) { EACH_LANE(vf, bf16_to_float(p[i])); }
INLINE vf vf_load_uint8(const uint8_t *p) { EACH_LANE(vf, p[i]); }
INLINE vi vi_zero(void) { EACH_LANE(vi, 0); }
INLINE vf vi_to_vf(vi a) { EACH_LANE(vf, (float)a.lane[i]); }
INLINE vs vs_load(const int16_t *p) { EACH_LANE(vs, p[i]); }
INLINE vs vs_load_int8(const void *p) { EACH_LANE(vs, ((const int8_t *)p)[i]); }
INLINE vs vs_nibbles(vs words, int n) { EACH_LANE(vs, (uint16_t)words.lane[i] >> 4 * n & 15); }
INLINE vi vi_dot(vi sum, vs a, vs b) {
    EACH_LANE(vi, sum.lane[i] + a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1]);
}
INLINE vf vf_quads(const vf a[4]) { EACH_LANE(vf, vf_sum(a[i])); }
INLINE vi vi_quads(const vi a[4]) {
    EACH_LANE(vi, a[i].lane[0] + a[i].lane[1] + a[i].lane[2] + a[i].lane[3]);
}
INLINE void vf_store_quad(float *p, vf a) { vf_store(p, a); }
INLINE void vf_store_columns(float *p, const vf a[4]) {
    for (int i = 0; i < LANES; i++) for (int n = 0; n < 4; n++) p[4 * i + n] = a[n].lane[i];
}
typedef int quads;
INLINE quads quads_of_groups(int shift) { return shift; }
INLINE vf vf_load_quads(const float *p, quads order) { return (void)order, vf_load(p); }
#endif
