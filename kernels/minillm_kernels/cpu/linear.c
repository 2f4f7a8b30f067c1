/* y = x W^T for weights in fp32, bf16, fp16, int8 or int4, and act(x Wg^T) * (x Wu^T) for gated MLPs.
 *
 * With few rows every weight is used a few times and then forgotten, so the time is the time to read W
 * from memory. The loop is built around that:
 *
 *   - four output rows (a tile; int4: WIDE) are multiplied side by side, a cache line of each per step,
 *     while the next tile is being prefetched;
 *   - every activation row multiplies a weight while it sits in a register, so W moves once;
 *   - 32 output rows (a block) are the unit that threads take;
 *   - more than MAX_ROWS activation rows go in passes over a block that the first pass left in cache.
 *
 * Quantized weights multiply activations held as int16 (one scale per row: 32767 / largest): products
 * and sums are then integers, four times as many per instruction as fp32 and exact. The rounding of x
 * is at most 1.5e-5 of its largest element, far below the 4e-3 step of an int8 weight. Every sum is
 * formed in the same order whatever the number of rows or threads, so a row never depends on them.
 */
#include <stdlib.h>

#include "simd.h"
#include "values.h"

#define UNROLL_4 _Pragma("GCC unroll 4")

enum { NO_GATE, SILU, GELU_TANH };
enum { TILE = 4, WIDE = 2 * LANES, BLOCK = 32 }; /* output rows */
enum { LINE = 64, MAX_GROUP = 128 };             /* bytes of a weight row per step; largest int4 group */
enum { FLUSH = 4 * LANES };  /* lines until int32 sums move to fp32: 256 products of 2^15 * 2^7 per lane */
enum { AHEAD = 8 * 1024 };   /* bytes to prefetch ahead at least: what arrives while memory answers once */
enum { CACHED_ACTIVATIONS = 256 * 1024 };  /* bytes of activations that stay in L2 beside the weights */

/* Weights in a line (not int4, which works in columns) and bytes of a prepared activation */
#define WEIGHTS_PER_LINE(format) ((format) == FLOAT32 ? 16 : (format) <= FLOAT16 ? 32 : 64)
#ifdef BF16_DOT
#define ACTIVATION_BYTES(format) ((format) == FLOAT32 || (format) == FLOAT16 ? 4 : 2)
#else
#define ACTIVATION_BYTES(format) ((format) >= INT8 ? 2 : 4)
#endif

struct problem {
    const char *weight;    /* [weight_rows, weight_stride bytes]; weight_rows = outputs, or 2 * outputs if gated */
    const void *scale;     /* int8: float [weight_rows]; int4: half [groups, weight_rows] */
    const uint8_t *zero;   /* int4: [groups, weight_rows] */
    const void *bias;      /* [outputs] in dtype, or NULL */
    void *y;               /* [rows, outputs] in dtype */
    char *x;               /* prepared activations: [rows, x_stride bytes], zero-padded to whole lines */
    float *x_scale;        /* [rows], int8 and int4 */
    float *x_sums;         /* [rows, groups] sums of the int16 activations, int4 */
    uint8_t *last_rows;    /* int4: copy of the weight's rows from last_rows_from on, then rows of zeros */
    long last_rows_from, rows, inputs, outputs, weight_rows, groups;
    size_t weight_stride, x_stride;
    int format, dtype, group_size, gate;
};

/* ---- activations: into the form the inner loop multiplies ---- */

INLINE void widen_row(const void *x, int dtype, long inputs, float *wide) {
    for (long k = 0; k < inputs; k++) wide[k] = read_value(x, k, dtype);
}

INLINE float largest_magnitude(const void *x, int dtype, long inputs) {
    uint32_t largest = 0; /* as bits: for floats >= 0 they order like the numbers, with inf and nan on top */
    for (long k = 0; k < inputs; k++) {
        float value = read_value(x, k, dtype);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float value;
    memcpy(&value, &largest, 4);
    return value;
}

INLINE void quantize(const void *x, int dtype, long start, long count, float inverse, int16_t *codes) {
    for (long k = 0; k < count; k++) codes[k] = (int16_t)(int32_t)rintf(read_value(x, start + k, dtype) * inverse);
}

/* A group's codes in the order in which vs_nibbles deals out the weights, as pairs; returns their sum. Byte i of
 * a group holds elements i (low half) and i + group_size / 2 (high half). */
INLINE float order_as_nibbles(const int16_t *codes, int group_size, int16_t *ordered) {
    for (int byte = 0; byte < group_size / 2; byte += 4)
        for (int i = 0; i < 4; i++, ordered += 2) {
            const int16_t *from = codes + byte + i / 2 + i % 2 * (group_size / 2);
            ordered[0] = from[0], ordered[1] = from[2];
        }
    int32_t sum = 0;
    for (int i = 0; i < group_size; i++) sum += codes[i];
    return (float)sum;
}

INLINE void prepare_row_of(const struct problem *p, const void *x, int dtype, long row) {
    char *target = p->x + row * p->x_stride;
    memset(target, 0, p->x_stride);
    if (p->format < INT8) {
        if (ACTIVATION_BYTES(p->format) == 4) widen_row(x, dtype, p->inputs, (float *)target);
        else memcpy(target, x, (size_t)p->inputs * 2);
        return;
    }
    float largest = largest_magnitude(x, dtype, p->inputs), inverse = 32767.0f / largest;
    p->x_scale[row] = largest / 32767.0f;
    if (!isfinite(inverse) || !isfinite(largest) ) { /* all zero or as good as; or inf or nan */
        p->x_scale[row] = largest < 1 ? 0.0f : NAN;
        memset(p->x_sums + row * p->groups, 0, sizeof(float) * p->groups);
        return;
    }
    if (p->format == INT8) {
        quantize(x, dtype, 0, p->inputs, inverse, (int16_t *)target);
        return;
    }
    for (long group = 0; group < p->groups; group++) {
        int16_t codes[MAX_GROUP];
        long start = group * p->group_size;
        quantize(x, dtype, start, p->group_size, inverse, codes);
        p->x_sums[row * p->groups + group] = order_as_nibbles(codes, p->group_size, (int16_t *)target + start);
    }
}

static void prepare_row(const struct problem *p, const void *x, long row) {
    const char *source = (const char *)x + row * p->inputs * (p->dtype == FLOAT32 ? 4 : 2);
    if (p->dtype == FLOAT32) prepare_row_of(p, source, FLOAT32, row);
    else if (p->dtype == BFLOAT16) prepare_row_of(p, source, BFLOAT16, row);
    else prepare_row_of(p, source, FLOAT16, row);
}

/* ---- the inner loops: `lines` lines of TILE weight rows against `rows` activation rows ---- */

/* Weight rows lie one behind the other, so the lines of the tiles to come are fetched in the order of memory:
 * that suits DRAM and the hardware's own prefetcher, which four streams per thread would confuse. */
INLINE void prefetch_line(const char *const *weight, long line, size_t ahead) {
    for (int n = 0; n < TILE; n++) __builtin_prefetch(weight[0] + (line * TILE + n) * LINE + ahead);
}

INLINE vf load_weights(int format, const char *p) {
    if (format == FLOAT32) return vf_load((const float *)p);
    return format == BFLOAT16 ? vf_load_bf16((const uint16_t *)p) : vf_load_half((const uint16_t *)p);
}

INLINE void float_lines(int format, int rows, const char *const *weight, const char *x, size_t x_stride,
                        long lines, size_t ahead, vf sum[TILE][MAX_ROWS]) {
    const int weights = format == FLOAT32 ? 16 : 32; /* in a line */
    for (long line = 0; line < lines; line++) {
        prefetch_line(weight, line, ahead);
        for (int k = 0; k < weights; k += LANES) {
            vf w[TILE];
            for (int n = 0; n < TILE; n++)
                w[n] = load_weights(format, weight[n] + line * LINE + k * (LINE / weights));
            for (int r = 0; r < rows; r++) {
                vf a = vf_load((const float *)(x + r * x_stride) + line * weights + k);
                for (int n = 0; n < TILE; n++) sum[n][r] = vf_fma(w[n], a, sum[n][r]);
            }
        }
    }
}

#ifdef BF16_DOT
INLINE void bf16_lines(int rows, const char *const *weight, const char *x, size_t x_stride, long lines,
                       size_t ahead, vf sum[TILE][MAX_ROWS]) {
    for (long line = 0; line < lines; line++) {
        prefetch_line(weight, line, ahead);
        vs w[TILE];
        for (int n = 0; n < TILE; n++) w[n] = vs_load((const int16_t *)(weight[n] + line * LINE));
        for (int r = 0; r < rows; r++) {
            vs a = vs_load((const int16_t *)(x + r * x_stride + line * LINE));
            for (int n = 0; n < TILE; n++) sum[n][r] = vf_dot_bf16(sum[n][r], w[n], a);
        }
    }
}
#endif

INLINE void int8_lines(int rows, const char *const *weight, const char *x, size_t x_stride, long lines,
                       size_t ahead, vf sum[TILE][MAX_ROWS]) {
    for (long start = 0; start < lines; start += FLUSH) {
        long end = start + FLUSH < lines ? start + FLUSH : lines;
        vi dots[TILE][MAX_ROWS];
        for (int n = 0; n < TILE; n++)
            for (int r = 0; r < rows; r++) dots[n][r] = vi_zero();
        for (long line = start; line < end; line++) {
            prefetch_line(weight, line, ahead);
            for (long k = line * LINE; k < (line + 1) * LINE; k += 2 * LANES) {
                vs w[TILE];
                for (int n = 0; n < TILE; n++) w[n] = vs_load_int8(weight[n] + k);
                for (int r = 0; r < rows; r++) {
                    vs a = vs_load((const int16_t *)(x + r * x_stride) + k);
                    for (int n = 0; n < TILE; n++) dots[n][r] = vi_dot(dots[n][r], w[n], a);
                }
            }
        }
        for (int n = 0; n < TILE; n++)
            for (int r = 0; r < rows; r++) sum[n][r] = vf_fma(vi_to_vf(dots[n][r]), vf_set(1), sum[n][r]);
    }
}

INLINE void tile_lines(const struct problem *p, int format, int rows, const char *const *weight, const char *x,
                       long lines, size_t ahead, vf sum[TILE][MAX_ROWS]) {
#ifdef BF16_DOT
    if (format == BFLOAT16) return bf16_lines(rows, weight, x, p->x_stride, lines, ahead, sum);
#endif
    if (format == INT8) return int8_lines(rows, weight, x, p->x_stride, lines, ahead, sum);
    float_lines(format, rows, weight, x, p->x_stride, lines, ahead, sum);
}

/* ---- BLOCK outputs against `rows` activation rows: out [rows, BLOCK], scaled, before bias and gate ---- */

/* float and int8: tile by tile, whole lines first, then the rest of each row through a zero-padded copy */
INLINE void tiles(const struct problem *p, int format, int rows, long output, long row, size_t ahead,
                  float out[MAX_ROWS][BLOCK]) {
    long lines = p->inputs / WEIGHTS_PER_LINE(format);
    size_t rest = p->weight_stride % LINE, x_line = ACTIVATION_BYTES(format) * WEIGHTS_PER_LINE(format);
    const char *x = p->x + row * p->x_stride;
    for (long first = 0; first < BLOCK && output + first < p->weight_rows; first += TILE) {
        const char *weight[TILE];
        vf sum[TILE][MAX_ROWS];
        for (int n = 0; n < TILE; n++) {
            long clamped = output + first + n < p->weight_rows ? output + first + n : p->weight_rows - 1;
            weight[n] = p->weight + clamped * p->weight_stride;
            for (int r = 0; r < rows; r++) sum[n][r] = vf_zero();
        }
        tile_lines(p, format, rows, weight, x, lines, ahead, sum);
        if (rest) {
            char copy[TILE][LINE] = {{0}};
            for (int n = 0; n < TILE; n++) weight[n] = memcpy(copy[n], weight[n] + lines * LINE, rest);
            tile_lines(p, format, rows, weight, x + lines * x_line, 1, 0, sum);
        }
        for (int n = 0; n < TILE && output + first + n < p->weight_rows; n++) {
            float scale = format == INT8 ? ((const float *)p->scale)[output + first + n] : 1;
            for (int r = 0; r < rows; r++)
                out[r][first + n] = vf_sum(sum[n][r]) * (format == INT8 ? scale * p->x_scale[row + r] : 1);
        }
    }
}

/* int4, WIDE outputs: a lane per output, so that a group's scales and zero points, [groups, outputs], are plain
 * vectors. The dots multiply bare codes; sum((q - zero) x) = sum(q x) - zero * sum(x) settles the zero points. */
INLINE void int4_lanes(const struct problem *p, int rows, long output, long row, size_t ahead,
                       float out[MAX_ROWS][BLOCK]) {
    const int width = p->weight_rows - output < WIDE ? (int)(p->weight_rows - output) : WIDE;
    const uint8_t *weight = (const uint8_t *)p->weight + output * p->weight_stride;
    const uint16_t *scale = (const uint16_t *)p->scale + output;
    const uint8_t *zero = p->zero + output;
    const int chains = rows == 1 ? 2 : 1; /* the dots of one row alone would wait for each other */
    const int16_t *x[MAX_ROWS];
    vf sum[2][MAX_ROWS]; /* of the first LANES outputs and of the other LANES: x is loaded once for both */
    for (int r = 0; r < rows; r++) {
        x[r] = (const int16_t *)(p->x + (row + r) * p->x_stride);
        sum[0][r] = sum[1][r] = vf_zero();
    }
    if (width < WIDE) weight = p->last_rows + (output - p->last_rows_from) * p->weight_stride;
    for (long group = 0, byte = 0; group < p->groups; group++, scale += p->weight_rows, zero += p->weight_rows) {
        vi dots[2][2][MAX_ROWS];
        for (int chain = 0; chain < chains; chain++)
            for (int r = 0; r < rows; r++) dots[0][chain][r] = dots[1][chain][r] = vi_zero();
        for (int piece = 0; piece < p->group_size / 32; piece++, byte += 16) {
            if (byte % LINE == 0) /* the next WIDE rows to the second-level cache, the next line to the first */
                for (int n = 0; n < WIDE; n++) {
                    __builtin_prefetch(weight + byte * WIDE + n * LINE + ahead, 0, 2);
                    __builtin_prefetch(weight + byte + n * p->weight_stride + LINE);
                }
            vi column[2][4];
            vi_load_columns(weight + byte, p->weight_stride, column[0]);
            vi_load_columns(weight + LANES * p->weight_stride + byte, p->weight_stride, column[1]);
            UNROLL_4 for (int j = 0; j < 4; j++)
                UNROLL_4 for (int i = 0; i < 4; i++) {
                    vs codes[2] = {vs_nibbles(column[0][j], i), vs_nibbles(column[1][j], i)};
                    for (int r = 0; r < rows; r++) {
                        vs a = vs_pair(x[r] + 2 * byte + 8 * j + 2 * i);
                        for (int half = 0; half < 2; half++)
                            dots[half][i % chains][r] = vi_dot(dots[half][i % chains][r], codes[half], a);
                    }
                }
        }
        uint16_t scale_copy[WIDE] = {0};
        uint8_t zero_copy[WIDE] = {0};
        if (width < WIDE) { /* do not read past the tensors */
            memcpy(scale_copy, scale, width * 2);
            memcpy(zero_copy, zero, width);
        }
        for (int half = 0; half < 2; half++) {
            vf s = vf_load_half((width < WIDE ? scale_copy : scale) + half * LANES);
            vf z = vf_load_uint8((width < WIDE ? zero_copy : zero) + half * LANES);
            for (int r = 0; r < rows; r++) {
                vf minus_x = vf_set(-p->x_sums[(row + r) * p->groups + group]);
                vi dot = chains == 2 ? vi_add(dots[half][0][r], dots[half][1][r]) : dots[half][0][r];
                sum[half][r] = vf_fma(vf_fma(z, minus_x, vi_to_vf(dot)), s, sum[half][r]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++)
            vf_store(out[r] + half * LANES, vf_fma(sum[half][r], vf_set(p->x_scale[row + r]), vf_zero()));
}

INLINE void block_of(const struct problem *p, int format, int rows, long output, long row, size_t ahead,
                     float out[MAX_ROWS][BLOCK]) {
    if (format != INT4) return tiles(p, format, rows, output, row, ahead, out);
    for (int n = 0; n < BLOCK && output + n < p->weight_rows; n += WIDE)
        int4_lanes(p, rows, output + n, row, ahead, (float(*)[BLOCK])&out[0][n]);
}

#define ROWS_CASE(r) case r: block_of(p, format, r <= MAX_ROWS ? r : 1, output, row, ahead, out); break;
INLINE void block_of_rows(const struct problem *p, int format, int rows, long output, long row, size_t ahead,
                          float out[MAX_ROWS][BLOCK]) {
    switch (rows) { /* a constant number of rows lets the sums live in registers */
        ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5)
    }
}

static void block_values(const struct problem *p, int rows, long output, long row, size_t ahead,
                         float out[MAX_ROWS][BLOCK]) {
    switch (p->format) {
        case FLOAT32: block_of_rows(p, FLOAT32, rows, output, row, ahead, out); break;
        case BFLOAT16: block_of_rows(p, BFLOAT16, rows, output, row, ahead, out); break;
        case FLOAT16: block_of_rows(p, FLOAT16, rows, output, row, ahead, out); break;
        case INT8: block_of_rows(p, INT8, rows, output, row, ahead, out); break;
        case INT4: block_of_rows(p, INT4, rows, output, row, ahead, out); break;
    }
}

INLINE float gated(int gate, float g, float up) {
    if (gate == SILU) return g / (1.0f + expf(-g)) * up;
    return 0.5f * g * (1.0f + tanhf(0.7978845608f * (g + 0.044715f * g * g * g))) * up;
}

/* BLOCK outputs from `output` on, `rows` rows from `row` on, in passes of at most MAX_ROWS */
static void block(const struct problem *p, long output, long row, long rows) {
    long passes = (rows + MAX_ROWS - 1) / MAX_ROWS, pass_rows = (rows + passes - 1) / passes;
    long width = p->outputs - output < BLOCK ? p->outputs - output : BLOCK;
    size_t tile_bytes = (p->format == INT4 ? WIDE : TILE) * p->weight_stride;
    for (long done = 0; done < rows; done += pass_rows) {
        int count = (int)(rows - done < pass_rows ? rows - done : pass_rows);
        size_t ahead = done ? 0 : tile_bytes > AHEAD ? tile_bytes : AHEAD;
        float out[MAX_ROWS][BLOCK], up[MAX_ROWS][BLOCK];
        block_values(p, count, output, row + done, ahead, out);
        if (p->gate) block_values(p, count, output + p->outputs, row + done, ahead, up);
        for (int r = 0; r < count; r++)
            for (long n = 0; n < width; n++) {
                float value = out[r][n];
                if (p->gate) value = gated(p->gate, value, up[r][n]);
                if (p->bias) value += read_value(p->bias, output + n, p->dtype);
                write_value(p->y, (row + done + r) * p->outputs + output + n, p->dtype, value);
            }
    }
}

/* ---- the whole product ---- */

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/* What the caller says, as 64-bit integers in this order (pointers included): one packed argument costs
 * a Python caller half of what fourteen do. `outputs` is F when gated: the weight then has 2F rows. */
struct call {
    int64_t format, dtype, x, rows, inputs, weight, outputs, scale, zero, group_size, bias, y, gate, threads;
};

/* Returns 0, or 1 when memory for the activations could not be had. Shapes as in struct problem. */
int minillm_linear(const struct call *c) {
    const void *x = (const void *)(uintptr_t)c->x;
    long rows = c->rows, inputs = c->inputs, outputs = c->outputs;
    int format = (int)c->format, threads = c->threads > 1 ? (int)c->threads : 1;
    struct problem p = {
        .weight = (const char *)(uintptr_t)c->weight, .scale = (const void *)(uintptr_t)c->scale,
        .zero = (const uint8_t *)(uintptr_t)c->zero, .bias = (const void *)(uintptr_t)c->bias,
        .y = (void *)(uintptr_t)c->y, .rows = rows, .inputs = inputs, .outputs = outputs,
        .weight_rows = c->gate ? 2 * outputs : outputs, .format = format, .dtype = (int)c->dtype,
        .group_size = (int)c->group_size, .gate = (int)c->gate,
    };
    p.groups = format == INT4 ? inputs / p.group_size : 0;
    p.weight_stride = format == INT4 ? inputs / 2 : inputs * (format == FLOAT32 ? 4 : format == INT8 ? 1 : 2);
    p.x_stride = round_up(inputs, format == INT4 ? 32 : WEIGHTS_PER_LINE(format)) * ACTIVATION_BYTES(format);

    size_t x_bytes = rows * p.x_stride, scale_bytes = round_up(rows * 4, 64);
    size_t sums_bytes = round_up(rows * p.groups * 4, 64), last_bytes = format == INT4 ? 2 * WIDE * p.weight_stride : 0;
    p.x = aligned_alloc(64, round_up(x_bytes + scale_bytes + sums_bytes + last_bytes + 64, 64));
    if (!p.x) return 1;
    p.x_scale = (float *)(p.x + x_bytes);
    p.x_sums = (float *)(p.x + x_bytes + scale_bytes);
    if (format == INT4 && outputs % WIDE) { /* the last lanes read past the last row: let them read zeros */
        p.last_rows = (uint8_t *)p.x + x_bytes + scale_bytes + sums_bytes;
        p.last_rows_from = p.weight_rows < WIDE ? 0 : p.weight_rows - WIDE + 1;
        size_t held = (p.weight_rows - p.last_rows_from) * p.weight_stride;
        memcpy(p.last_rows, p.weight + p.last_rows_from * p.weight_stride, held);
        memset(p.last_rows + held, 0, last_bytes - held);
    }

    long row_block = rows; /* rows whose activations fit the cache beside the weights */
    if (x_bytes > CACHED_ACTIVATIONS && rows > 16) {
        row_block = CACHED_ACTIVATIONS / p.x_stride / MAX_ROWS * MAX_ROWS;
        if (row_block < 2 * MAX_ROWS) row_block = 2 * MAX_ROWS;
    }
    long blocks = (outputs + BLOCK - 1) / BLOCK;
    if ((size_t)p.weight_rows * p.weight_stride * rows < 64 * 1024) threads = 1; /* waking a thread costs more */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows >= 16)
    for (long r = 0; r < rows; r++) prepare_row(&p, x, r);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (long row = 0; row < rows; row += row_block) {
        long count = rows - row < row_block ? rows - row : row_block;
#pragma omp for schedule(static) nowait
        for (long b = 0; b < blocks; b++) block(&p, b * BLOCK, row, count);
    }
    free(p.x);
    return 0;
}
