/* The few vector operations the kernels need, once per instruction set.
 *
 * LANES is the number of fp32 lanes in a register: 16 (AVX-512), 8 (AVX2), 4 (NEON) or 1 (plain C).
 *   vf   LANES floats          vi   LANES int32          vs   2 * LANES int16
 *
 * vi_dot multiplies 2 * LANES pairs of int16 and adds neighbours into LANES int32 sums; this
 * "multiply-add pairs" instruction is the one integer dot product that every x86 chip has.
 * vs_pair repeats two int16 in every lane. vi_load_columns reads 16 bytes of each of LANES rows, `stride`
 * bytes apart, and transposes: lane n of column[j] holds bytes 4j..4j+3 of row n. vs_nibbles(column, i)
 * takes two 4-bit codes of each lane as int16: the low (i = 0) or high (1) halves of bytes 0 and 2, or the
 * low (2) or high (3) halves of bytes 1 and 3.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

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
#include <immintrin.h>
#define LANES 16
#define MAX_ROWS 5 /* 4 x 5 sums, 4 weights and what they need in between fit the 32 registers */
typedef __m512 vf;
typedef __m512i vi, vs;
INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf vf_set(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
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
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vf vi_to_vf(vi a) { return _mm512_cvtepi32_ps(a); }
INLINE vs vs_load(const int16_t *p) { return _mm512_loadu_si512(p); }
INLINE vs vs_load_int8(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(p)); }
INLINE vs vs_pair(const int16_t *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
}
INLINE vs vs_nibbles(vi columns, int i) {
    return _mm512_and_si512(_mm512_srli_epi32(columns, 4 * i), _mm512_set1_epi32(0x000f000f));
}
INLINE void vi_load_columns(const uint8_t *p, size_t stride, vi column[4]) {
    vi rows[4]; /* rows[i]: the 16 bytes of rows i, i + 4, i + 8 and i + 12 */
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(p + i * stride)));
        rows[i] = _mm512_inserti32x4(rows[i], _mm_loadu_si128((const void *)(p + (i + 4) * stride)), 1);
        rows[i] = _mm512_inserti32x4(rows[i], _mm_loadu_si128((const void *)(p + (i + 8) * stride)), 2);
        rows[i] = _mm512_inserti32x4(rows[i], _mm_loadu_si128((const void *)(p + (i + 12) * stride)), 3);
    }
    vi low01 = _mm512_unpacklo_epi32(rows[0], rows[1]), high01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
    vi low23 = _mm512_unpacklo_epi32(rows[2], rows[3]), high23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    column[0] = _mm512_unpacklo_epi64(low01, low23), column[1] = _mm512_unpackhi_epi64(low01, low23);
    column[2] = _mm512_unpacklo_epi64(high01, high23), column[3] = _mm512_unpackhi_epi64(high01, high23);
}
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
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(MINILLM_PLAIN_C)
#include <immintrin.h>
#define LANES 8
#define MAX_ROWS 2 /* 16 registers */
typedef __m256 vf;
typedef __m256i vi, vs;
INLINE vf vf_zero(void) { return _mm256_setzero_ps(); }
INLINE void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf vf_set(float x) { return _mm256_set1_ps(x); }
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
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
INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
INLINE vf vi_to_vf(vi a) { return _mm256_cvtepi32_ps(a); }
INLINE vs vs_load(const int16_t *p) { return _mm256_loadu_si256((const void *)p); }
INLINE vs vs_load_int8(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(p)); }
INLINE vs vs_pair(const int16_t *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm256_set1_epi32(pair);
}
INLINE vs vs_nibbles(vi columns, int i) {
    return _mm256_and_si256(_mm256_srli_epi32(columns, 4 * i), _mm256_set1_epi32(0x000f000f));
}
INLINE void vi_load_columns(const uint8_t *p, size_t stride, vi column[4]) {
    vi rows[4]; /* rows[i]: the 16 bytes of rows i and i + 4 */
    for (int i = 0; i < 4; i++)
        rows[i] = _mm256_loadu2_m128i((const void *)(p + (i + 4) * stride), (const void *)(p + i * stride));
    vi low01 = _mm256_unpacklo_epi32(rows[0], rows[1]), high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    vi low23 = _mm256_unpacklo_epi32(rows[2], rows[3]), high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    column[0] = _mm256_unpacklo_epi64(low01, low23), column[1] = _mm256_unpackhi_epi64(low01, low23);
    column[2] = _mm256_unpacklo_epi64(high01, high23), column[3] = _mm256_unpackhi_epi64(high01, high23);
}
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
INLINE vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
INLINE vf vi_to_vf(vi a) { return vcvtq_f32_s32(a); }
INLINE vs vs_load(const int16_t *p) { return vld1q_s16(p); }
INLINE vs vs_load_int8(const void *p) { return vmovl_s8(vld1_s8(p)); }
INLINE vs vs_pair(const int16_t *p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return vreinterpretq_s16_s32(vdupq_n_s32(pair));
}
INLINE vs vs_nibbles(vi columns, int i) {
    vi shifted = vshlq_s32(columns, vdupq_n_s32(-4 * i));
    return vreinterpretq_s16_s32(vandq_s32(shifted, vdupq_n_s32(0x000f000f)));
}
INLINE void vi_load_columns(const uint8_t *p, size_t stride, vi column[4]) {
    vi rows[4];
    for (int i = 0; i < 4; i++) rows[i] = vreinterpretq_s32_u8(vld1q_u8(p + i * stride));
    vi low01 = vzip1q_s32(rows[0], rows[1]), high01 = vzip2q_s32(rows[0], rows[1]);
    vi low23 = vzip1q_s32(rows[2], rows[3]), high23 = vzip2q_s32(rows[2], rows[3]);
#define WIDE(a) vreinterpretq_s64_s32(a)
    column[0] = vreinterpretq_s32_s64(vzip1q_s64(WIDE(low01), WIDE(low23)));
    column[1] = vreinterpretq_s32_s64(vzip2q_s64(WIDE(low01), WIDE(low23)));
    column[2] = vreinterpretq_s32_s64(vzip1q_s64(WIDE(high01), WIDE(high23)));
    column[3] = vreinterpretq_s32_s64(vzip2q_s64(WIDE(high01), WIDE(high23)));
}
INLINE vi vi_dot(vi sum, vs a, vs b) {
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b)));
}

#else /* plain C: correct everywhere, one lane at a time */
#define LANES 1
#define MAX_ROWS 2
typedef float vf;
typedef int32_t vi;
typedef struct { int16_t first, second; } vs;
INLINE vf vf_zero(void) { return 0; }
INLINE void vf_store(float *p, vf a) { *p = a; }
INLINE vf vf_set(float x) { return x; }
INLINE vf vf_load(const float *p) { return *p; }
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE float vf_sum(vf a) { return a; }
INLINE vf vf_load_half(const uint16_t *p) { return half_to_float(*p); }
INLINE vf vf_load_bf16(const uint16_t *p) { return bf16_to_float(*p); }
INLINE vf vf_load_uint8(const uint8_t *p) { return *p; }
INLINE vi vi_zero(void) { return 0; }
INLINE vi vi_add(vi a, vi b) { return a + b; }
INLINE vf vi_to_vf(vi a) { return (float)a; }
INLINE vs vs_load(const int16_t *p) { return (vs){p[0], p[1]}; }
INLINE vs vs_load_int8(const void *p) { return (vs){((const int8_t *)p)[0], ((const int8_t *)p)[1]}; }
INLINE vs vs_pair(const int16_t *p) { return vs_load(p); }
INLINE vs vs_nibbles(vi columns, int i) {
    return (vs){(columns >> 4 * i) & 15, (columns >> (4 * i + 16)) & 15};
}
INLINE void vi_load_columns(const uint8_t *p, size_t stride, vi column[4]) {
    (void)stride; /* one row */
    for (int j = 0; j < 4; j++, p += 4)
        column[j] = (vi)(p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24);
}
INLINE vi vi_dot(vi sum, vs a, vs b) { return sum + a.first * b.first + a.second * b.second; }
#endif
