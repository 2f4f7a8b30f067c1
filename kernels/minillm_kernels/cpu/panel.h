/* Many activation vectors times a weight matrix: the inner loop of gemm.c and flash_attention.c.
 *
 * With many vectors the arithmetic is what costs, so a register must do work with every instruction. Activations
 * lie in panels: WIDTH vectors side by side, so that a register holds the same input of LANES vectors, and a weight,
 * broadcast, multiplies all of them. Sums of some weight rows by WIDTH vectors stay in registers; no sum crosses
 * lanes, and weights are read as they lie in the model.
 *
 * What is multiplied at a time is a unit of 4 bytes: one fp32, or two bf16 where the CPU multiplies such pairs by
 * itself. With AMX, where the system lets us have it, a unit of 16 rows x 16 vectors x 16 units is one instruction.
 *
 * Every sum runs over the inputs in order, whatever stands beside it: it depends on no other vector or row.
 */
#include <stdlib.h>

#include "simd.h"
#include "threads.h"
#include "values.h"

typedef float __attribute__((may_alias, aligned(2))) unit; /* a float, or the bits of two bf16, as they lie */

#if LANES == 8
enum { REGISTERS = 2 }; /* of activations in a panel; sums of 6 rows, they and a weight fit 16 registers */
#else
enum { REGISTERS = 4 };
#endif
enum { WIDTH = REGISTERS * LANES };
enum { ROWS = 48 };   /* of W in a block: a multiple of every tile's (6, 8, 12, AMX's 16), so that none reads past it */
enum { SPAN = 256 };  /* units until the next rows: so many of a panel stay in L1 */

#ifdef BF16_DOT
#define PAIRS(dtype, format) ((dtype) == BFLOAT16 && (format) != FLOAT32 && (format) != FLOAT16)
#else
#define PAIRS(dtype, format) 0
#endif

extern int minillm_amx; /* whether AMX may be used: gemm.c */

/* Units of a row, as many as multiplying takes at a time; rows of weights and panels are filled up with zeros. */
INLINE long whole_units(int pairs, long inputs) {
    long units = pairs ? (inputs + 1) / 2 : inputs, step = pairs && minillm_amx ? 16 : 1;
    return (units + step - 1) / step * step;
}

/* `count` elements from `start` on as units: bf16 as they are where pairs of them are multiplied, else fp32 */
INLINE void units_of(const void *from, int dtype, long start, long count, int pairs, void *to) {
    if (pairs) memcpy(to, (const uint16_t *)from + start, count * 2);
    else for (long k = 0; k < count; k++) ((float *)to)[k] = read_value(from, start + k, dtype);
}

INLINE vf multiply_unit(int pairs, const unit *weight, vf x, vf sum) {
#ifdef BF16_DOT
    if (pairs) return vf_dot_bf16(sum, _mm512_castps_si512(vf_set(*weight)), _mm512_castps_si512(x));
#endif
    return (void)pairs, vf_fma(vf_set(*weight), x, sum);
}

/* out [rows, WIDTH] += weight [rows, units] * panel [units, registers * LANES]; `stride` units from row to row */
INLINE void tile(int pairs, int rows, int registers, const unit *weight, long stride, long units, const unit *panel,
                 float *out) {
    vf sum[12][REGISTERS];
    UNROLL for (int n = 0; n < rows; n++)
        UNROLL for (int c = 0; c < registers; c++) sum[n][c] = vf_load(out + n * WIDTH + c * LANES);
    for (long k = 0; k < units; k++) {
        vf x[REGISTERS];
        UNROLL for (int c = 0; c < registers; c++) x[c] = vf_load(panel + (k * registers + c) * LANES);
        UNROLL for (int n = 0; n < rows; n++)
            UNROLL for (int c = 0; c < registers; c++)
                sum[n][c] = multiply_unit(pairs, weight + n * stride + k, x[c], sum[n][c]);
    }
    UNROLL for (int n = 0; n < rows; n++)
        UNROLL for (int c = 0; c < registers; c++) vf_store(out + n * WIDTH + c * LANES, sum[n][c]);
}

#if defined(__AMX_BF16__) && defined(BF16_DOT)
enum { TILE_ROWS = 16, TILE_UNITS = 16 };

/* The same for 16 or 32 rows and 16 or 32 columns of a panel; tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 the
 * panel's units */
INLINE void amx_tile(int tall, int wide, const unit *weight, long stride, long units, const unit *panel, long width,
                     float *out) {
    float *low = out + TILE_ROWS * WIDTH;
    _tile_loadd(0, out, WIDTH * 4);
    if (wide) _tile_loadd(1, out + TILE_ROWS, WIDTH * 4);
    if (tall) _tile_loadd(2, low, WIDTH * 4);
    if (tall && wide) _tile_loadd(3, low + TILE_ROWS, WIDTH * 4);
    for (long k = 0; k < units; k += TILE_UNITS) {
        _tile_loadd(4, weight + k, stride * 4);
        _tile_loadd(6, panel + k * width, width * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) {
            _tile_loadd(7, panel + k * width + TILE_ROWS, width * 4);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!tall) continue;
        _tile_loadd(5, weight + TILE_ROWS * stride + k, stride * 4);
        _tile_dpbf16ps(2, 5, 6);
        if (wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, WIDTH * 4);
    if (wide) _tile_stored(1, out + TILE_ROWS, WIDTH * 4);
    if (tall) _tile_stored(2, low, WIDTH * 4);
    if (tall && wide) _tile_stored(3, low + TILE_ROWS, WIDTH * 4);
}

static void amx_multiply(int registers, const unit *weight, long stride, long rows, long units, const unit *panel,
                         float *out) {
    static const struct { /* of all eight tiles: 16 rows of 64 bytes */
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    const long width = registers * LANES;
    _tile_loadconfig(&configuration);
    __asm__ volatile("" ::: "memory"); /* gcc does not know that tile loads read memory */
    for (long n = 0; n < rows; n += 2 * TILE_ROWS)
        for (long c = 0; c < width; c += 2 * TILE_ROWS) {
            const unit *w = weight + n * stride, *x = panel + c;
            float *to = out + n * WIDTH + c;
            int tall = n + TILE_ROWS < rows, wide = c + TILE_ROWS < width;
            if (tall && wide) amx_tile(1, 1, w, stride, units, x, width, to);
            else if (tall) amx_tile(1, 0, w, stride, units, x, width, to);
            else if (wide) amx_tile(0, 1, w, stride, units, x, width, to);
            else amx_tile(0, 0, w, stride, units, x, width, to);
        }
    _tile_release(); /* a thread that holds no tiles is switched faster */
}
#endif

INLINE void multiply_as(int pairs, int registers, const unit *weight, long stride, long rows, long units,
                     const unit *panel, float *out) {
    for (long k = 0; k < units; k += SPAN) {
        const long some = units - k < SPAN ? units - k : SPAN;
        const unit *x = panel + k * registers * LANES;
        for (long n = 0, step; n < rows; n += step) {
            const unit *w = weight + n * stride + k;
            float *to = out + n * WIDTH;
            switch (registers) { /* as many rows as sums fit into registers, and no fewer than hide their latency */
                case 1: tile(pairs, step = REGISTERS == 2 ? 8 : 12, 1, w, stride, some, x, to); break;
                case 2: tile(pairs, step = REGISTERS == 2 ? 6 : 12, 2, w, stride, some, x, to); break;
#if LANES != 8
                case 3: tile(pairs, step = 8, 3, w, stride, some, x, to); break;
                default: tile(pairs, step = 6, 4, w, stride, some, x, to); break;
#endif
            }
        }
    }
}

static __attribute__((noinline)) void multiply_floats(int registers, const unit *weight, long stride, long rows,
                                                      long units, const unit *panel, float *out) {
    multiply_as(0, registers, weight, stride, rows, units, panel, out);
}

#ifdef BF16_DOT
static __attribute__((noinline)) void multiply_pairs(int registers, const unit *weight, long stride, long rows,
                                                     long units, const unit *panel, float *out) {
    multiply_as(1, registers, weight, stride, rows, units, panel, out);
}
#endif

/* out [rows, WIDTH] += weight [rows, units] * panel, where up to the next multiple of ROWS rows may be read and
 * written. The panel has as many registers of columns as its vectors need. */
INLINE void multiply(int pairs, int registers, const unit *weight, long stride, long rows, long units,
                     const unit *panel, float *out) {
#if defined(__AMX_BF16__) && defined(BF16_DOT)
    if (pairs && minillm_amx) return amx_multiply(registers, weight, stride, rows, units, panel, out);
#endif
#ifdef BF16_DOT
    if (pairs) return multiply_pairs(registers, weight, stride, rows, units, panel, out);
#endif
    (void)pairs;
    multiply_floats(registers, weight, stride, rows, units, panel, out);
}

/* A square of LANES x LANES, `from_stride` and `to_stride` from row to row, turned over its diagonal */
INLINE void turn(const unit *from, long from_stride, unit *to, long to_stride) {
#if LANES == 16
    __m512 a[16], b[16];
    UNROLL for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * from_stride);
    UNROLL for (int i = 0; i < 16; i += 2)
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    UNROLL for (int i = 0; i < 16; i += 4) { /* lane group g of a[i + j]: column 4 g + j of rows i to i + 3 */
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL for (int j = 0; j < 4; j++) {
        __m512 even = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
        __m512 even2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
        __m512 odd2 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
        _mm512_storeu_ps(to + j * to_stride, _mm512_shuffle_f32x4(even, even2, 0x88));
        _mm512_storeu_ps(to + (j + 8) * to_stride, _mm512_shuffle_f32x4(even, even2, 0xdd));
        _mm512_storeu_ps(to + (j + 4) * to_stride, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        _mm512_storeu_ps(to + (j + 12) * to_stride, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
#else
    for (int j = 0; j < LANES; j++)
        for (int i = 0; i < LANES; i++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}
