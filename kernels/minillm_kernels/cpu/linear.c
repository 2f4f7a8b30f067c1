/* y = x W^T for weights in fp32, bf16, fp16, int8 or int4, and act(x Wg^T) * (x Wu^T) for gated MLPs.
 *
 * With few rows every weight is used a few times and then forgotten, so the time is the time to read W
 * from memory. The loop is built around that:
 *
 *   - four output rows (a tile) are multiplied side by side, one cache line of each per step, while the
 *     next tile is being prefetched;
 *   - every activation row multiplies a weight while it sits in a register, so W moves once;
 *   - sixteen output rows (a block) are the unit that threads take;
 *   - more than MAX_ROWS activation rows go in passes over a tile that the first pass left in cache.
 *
 * Quantized weights multiply activations held as int16 (one scale per row: 32767 / largest): products
 * and sums are then integers, four times as many per instruction as fp32 and exact. The rounding of x
 * is at most 1.5e-5 of its largest element, far below the 4e-3 step of an int8 weight. Every sum is
 * formed in the same order whatever the number of rows or threads, so a row never depends on them.
 */
#include <stdlib.h>

#include "simd.h"
#include "values.h"

enum { NO_GATE, SILU, GELU_TANH };
enum { TILE = 4, BLOCK = 16, LINE = 64 };  /* output rows, output rows, bytes of a weight row per step */
enum { RUN = 2 * LANES };                  /* int8 weights or int4 bytes that one vector instruction takes */
enum { FLUSH = 4 * LANES };  /* lines until int32 sums move to fp32: 256 products of 2^15 * 2^7 per lane */
enum { AHEAD = 8 * 1024 };   /* bytes to prefetch ahead at least: what arrives while memory answers once */
enum { CACHED_ACTIVATIONS = 256 * 1024 };  /* bytes of activations that stay in L2 beside the weights */

/* Weights in a line; int4: bytes. And bytes of a prepared activation. */
#define UNITS_PER_LINE(format) ((format) == FLOAT32 ? 16 : (format) <= FLOAT16 ? 32 : 64)
#ifdef BF16_DOT
#define ACTIVATION_BYTES(format) ((format) == FLOAT32 || (format) == FLOAT16 ? 4 : 2)
#else
#define ACTIVATION_BYTES(format) ((format) >= INT8 ? 2 : 4)
#endif

struct problem {
    const char *weight;    /* [outputs (x 2 if gated), weight_stride bytes] */
    const void *scale;     /* int8: float [outputs]; int4: half [groups, outputs] */
    const uint8_t *zero;   /* int4: [groups, outputs] */
    const void *bias;      /* [outputs] in dtype, or NULL */
    char *x;               /* prepared activations: [rows, x_stride bytes], zero-padded to whole lines */
    float *x_scale;        /* [rows], int8 and int4 */
    float *x_sums;         /* [rows, groups] sums of the int16 activations, int4 */
    void *y;               /* [rows, outputs] in dtype */
    size_t weight_stride, x_stride;
    long rows, inputs, outputs, weight_rows, row_units, groups;  /* row_units: weights, int4: bytes */
    int format, dtype, group_size, gate;
};

/* ---- activations: into the form the inner loop multiplies ---- */

static void widen_row(const void *x, int dtype, long inputs, float *wide) {
    for (long k = 0; k < inputs; k++) wide[k] = read_value(x, k, dtype);
}

/* int16 codes of a row and the scale that gives it back; a row with inf or nan gets the scale nan */
static float quantize_row(const float *x, long inputs, int16_t *codes) {
    uint32_t largest = 0; /* as bits: for floats >= 0 they order like the numbers, nan and inf on top */
    for (long k = 0; k < inputs; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float maximum;
    memcpy(&maximum, &largest, 4);
    float inverse = 32767.0f / maximum;
    if (largest >= 0x7f800000 || inverse > 3e38f) { /* not finite, or all zero (or as good as) */
        memset(codes, 0, (size_t)inputs * 2);
        return largest >= 0x7f800000 ? NAN : 0.0f;
    }
    for (long k = 0; k < inputs; k++) codes[k] = (int16_t)(int32_t)rintf(x[k] * inverse);
    return maximum / 32767.0f;
}

/* RUN bytes of int4 give RUN weights in their low halves and RUN in their high halves: put the activations
 * in that order too, [run, 2, RUN], and sum them over each group */
static void order_as_nibbles(const struct problem *p, const int16_t *codes, int16_t *ordered, float *sums) {
    long half = p->group_size / 2, piece = RUN < 16 ? RUN : 16; /* divides both RUN and half a group */
    for (long group = 0; group < p->groups; group++, codes += p->group_size) {
        for (long i = 0; i < half; i += piece) {
            long byte = group * half + i;
            int16_t *to = ordered + byte / RUN * 2 * RUN + byte % RUN;
            memcpy(to, codes + i, (size_t)piece * 2);
            memcpy(to + RUN, codes + half + i, (size_t)piece * 2);
        }
        int32_t sum = 0;
        for (long i = 0; i < p->group_size; i++) sum += codes[i];
        sums[group] = (float)sum;
    }
}

static void prepare_row(const struct problem *p, const void *x, long row, float *wide, int16_t *codes) {
    const char *source = (const char *)x + row * p->inputs * (p->dtype == FLOAT32 ? 4 : 2);
    char *target = p->x + row * p->x_stride;
    memset(target, 0, p->x_stride);
    if (p->format < INT8) {
        if (ACTIVATION_BYTES(p->format) == 4) widen_row(source, p->dtype, p->inputs, (float *)target);
        else memcpy(target, source, (size_t)p->inputs * 2);
        return;
    }
    widen_row(source, p->dtype, p->inputs, wide);
    if (p->format == INT8) {
        p->x_scale[row] = quantize_row(wide, p->inputs, (int16_t *)target);
    } else {
        p->x_scale[row] = quantize_row(wide, p->inputs, codes);
        order_as_nibbles(p, codes, (int16_t *)target, p->x_sums + row * p->groups);
    }
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
            for (long k = line * LINE; k < (line + 1) * LINE; k += RUN) {
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

/* scale: [groups + 1, BLOCK] floats, at this tile's column and the group of the first line */
INLINE void int4_lines(int rows, int group_size, const char *const *weight, const char *x, size_t x_stride,
                       long lines, const float *scale, size_t ahead, vf sum[TILE][MAX_ROWS]) {
    enum { PAIR = 2 }; /* outputs at a time: more codes than that do not fit the registers */
    const int group_bytes = group_size / 2, bytes = group_bytes < RUN ? RUN : group_bytes; /* per scale */
    for (long line = 0; line < lines; line++) {
        prefetch_line(weight, line, ahead);
        for (long k = line * LINE; k < (line + 1) * LINE; k += bytes) {
            const float *group_scale = scale + k / group_bytes * BLOCK;
            for (int first = 0; first < TILE; first += PAIR) {
                vs low[PAIR][LINE / RUN], high[PAIR][LINE / RUN];
                vf w_scale[PAIR];
                for (int n = 0; n < PAIR; n++) {
                    for (int i = 0; i < bytes / RUN; i++)
                        vs_load_nibbles(weight[first + n] + k + i * RUN, &low[n][i], &high[n][i]);
                    w_scale[n] = vf_set(group_scale[first + n]);
#if LANES == 16 /* a run of 32 bytes holds two groups of 32 */
                    if (group_size == 32) w_scale[n] = vf_halves(group_scale[first + n], group_scale[BLOCK + first + n]);
#endif
                }
                for (int r = 0; r < rows; r++) {
                    const int16_t *a = (const int16_t *)(x + r * x_stride) + 2 * k;
                    vi dot[PAIR];
                    for (int i = 0; i < bytes / RUN; i++, a += 2 * RUN) {
                        vs a_low = vs_load(a), a_high = vs_load(a + RUN);
                        for (int n = 0; n < PAIR; n++) {
                            dot[n] = i ? vi_dot(dot[n], low[n][i], a_low) : vi_dot_first(low[n][i], a_low);
                            dot[n] = vi_dot(dot[n], high[n][i], a_high);
                        }
                    }
                    for (int n = 0; n < PAIR; n++)
                        sum[first + n][r] = vf_fma(vi_to_vf(dot[n]), w_scale[n], sum[first + n][r]);
                }
            }
        }
    }
}

/* ---- one tile: whole lines, then the rest of each row through a zero-padded copy ---- */

INLINE void tile_lines(const struct problem *p, int format, int rows, int group_size, const char *const *weight,
                       const char *x, long lines, const float *scale, size_t ahead, vf sum[TILE][MAX_ROWS]) {
#ifdef BF16_DOT
    if (format == BFLOAT16) return bf16_lines(rows, weight, x, p->x_stride, lines, ahead, sum);
#endif
    if (format < INT8) return float_lines(format, rows, weight, x, p->x_stride, lines, ahead, sum);
    if (format == INT8) return int8_lines(rows, weight, x, p->x_stride, lines, ahead, sum);
    int4_lines(rows, group_size, weight, x, p->x_stride, lines, scale, ahead, sum);
}

INLINE void tile(const struct problem *p, int format, int rows, int group_size, long output, long row,
                 const float *scale, float out[TILE][MAX_ROWS]) {
    size_t x_line = ACTIVATION_BYTES(format) * (format == INT4 ? 2 * LINE : UNITS_PER_LINE(format));
    long lines = p->row_units / UNITS_PER_LINE(format);
    size_t rest = p->weight_stride % LINE; /* bytes */
    size_t tile_bytes = TILE * p->weight_stride, ahead = tile_bytes > AHEAD ? tile_bytes : AHEAD;
    const char *x = p->x + row * p->x_stride, *weight[TILE];
    vf sum[TILE][MAX_ROWS];
    for (int n = 0; n < TILE; n++) {
        long clamped = output + n < p->weight_rows ? output + n : p->weight_rows - 1;
        weight[n] = p->weight + clamped * p->weight_stride;
        for (int r = 0; r < rows; r++) sum[n][r] = vf_zero();
    }
    tile_lines(p, format, rows, group_size, weight, x, lines, scale, ahead, sum);
    if (rest) {
        char copy[TILE][LINE] = {{0}};
        for (int n = 0; n < TILE; n++) weight[n] = memcpy(copy[n], weight[n] + lines * LINE, rest);
        const float *last_scale = format == INT4 ? scale + lines * LINE / (group_size / 2) * BLOCK : NULL;
        tile_lines(p, format, rows, group_size, weight, x + lines * x_line, 1, last_scale, 0, sum);
    }
    for (int n = 0; n < TILE; n++)
        for (int r = 0; r < rows; r++) out[n][r] = vf_sum(sum[n][r]);
}

#define ROWS_CASE(r) case r: tile(p, format, r <= MAX_ROWS ? r : 1, group_size, output, row, scale, out); break;
INLINE void tile_rows(const struct problem *p, int format, int group_size, int rows, long output, long row,
                      const float *scale, float out[TILE][MAX_ROWS]) {
    switch (rows) { /* a constant number of rows lets the sums live in registers */
        ROWS_CASE(1) ROWS_CASE(2) ROWS_CASE(3) ROWS_CASE(4) ROWS_CASE(5)
    }
}

/* y of TILE outputs from `output` on, `rows` rows from `row` on, before bias and gate */
static void tile_values(const struct problem *p, int rows, long output, long row, const float *scale,
                        const float *offset, float out[TILE][MAX_ROWS]) {
    switch (p->format) {
        case FLOAT32: tile_rows(p, FLOAT32, 0, rows, output, row, scale, out); return;
        case BFLOAT16: tile_rows(p, BFLOAT16, 0, rows, output, row, scale, out); return;
        case FLOAT16: tile_rows(p, FLOAT16, 0, rows, output, row, scale, out); return;
        case INT8: tile_rows(p, INT8, 0, rows, output, row, scale, out); break;
        default:
            if (p->group_size == 32) tile_rows(p, INT4, 32, rows, output, row, scale, out);
            else if (p->group_size == 64) tile_rows(p, INT4, 64, rows, output, row, scale, out);
            else tile_rows(p, INT4, 128, rows, output, row, scale, out);
    }
    for (int n = 0; n < TILE && output + n < p->weight_rows; n++)
        for (int r = 0; r < rows; r++) {
            if (p->format == INT8) out[n][r] *= ((const float *)p->scale)[output + n];
            else out[n][r] -= offset[r * BLOCK + n];
            out[n][r] *= p->x_scale[row + r];
        }
}

/* ---- one block of BLOCK outputs ---- */

/* int4: the scales of a block as floats [groups + 4, BLOCK], and what its zero points take away from
 * every output: offset [rows, BLOCK] = sum over groups of scale * zero * (sum of the activations) */
static void block_scales(const struct problem *p, long output, long row, long rows, float *scale, float *shift,
                         float *offset) {
    long width = p->weight_rows - output < BLOCK ? p->weight_rows - output : BLOCK;
    for (long group = 0; group < p->groups; group++) {
        const uint16_t *half = (const uint16_t *)p->scale + group * p->weight_rows + output;
        const uint8_t *zero = p->zero + group * p->weight_rows + output;
        uint16_t half_copy[BLOCK] = {0};
        uint8_t zero_copy[BLOCK] = {0};
        if (width < BLOCK) { /* the last block: do not read past the tensors */
            half = memcpy(half_copy, half, width * 2);
            zero = memcpy(zero_copy, zero, width);
        }
        __builtin_prefetch(half + BLOCK);
        __builtin_prefetch(zero + BLOCK);
        for (int n = 0; n < BLOCK; n += LANES) {
            vf s = vf_load_half(half + n);
            vf_store(scale + group * BLOCK + n, s);
            vf_store(shift + group * BLOCK + n, vf_fma(s, vf_load_uint8(zero + n), vf_zero()));
        }
    }
    memset(scale + p->groups * BLOCK, 0, sizeof(float) * 4 * BLOCK); /* a last line may end in mid-group */
    for (long first = 0; first < rows; first += 4) /* four rows at a time: one sum alone would wait for itself */
        for (int n = 0; n < BLOCK; n += LANES) {
            const float *x_sum[4];
            vf total[4];
            for (int i = 0; i < 4; i++) {
                x_sum[i] = p->x_sums + (row + (first + i < rows ? first + i : first)) * p->groups;
                total[i] = vf_zero();
            }
            for (long group = 0; group < p->groups; group++)
                for (int i = 0; i < 4; i++)
                    total[i] = vf_fma(vf_load(shift + group * BLOCK + n), vf_set(x_sum[i][group]), total[i]);
            for (int i = 0; i < 4 && first + i < rows; i++) vf_store(offset + (first + i) * BLOCK + n, total[i]);
        }
}

INLINE float gated(int gate, float g, float up) {
    if (gate == SILU) return g / (1.0f + expf(-g)) * up;
    return 0.5f * g * (1.0f + tanhf(0.7978845608f * (g + 0.044715f * g * g * g))) * up;
}

static void block(const struct problem *p, long output, long row, long rows, float *scratch) {
    long table = (p->groups + 4) * BLOCK, halves = p->gate ? 2 : 1;
    float *scale[2] = {scratch, scratch + table}, *shift = scratch + 2 * table, *offset[2];
    for (long h = 0; h < halves; h++) {
        offset[h] = scratch + 3 * table + h * rows * BLOCK;
        if (p->format == INT4) block_scales(p, output + h * p->outputs, row, rows, scale[h], shift, offset[h]);
    }
    long passes = (rows + MAX_ROWS - 1) / MAX_ROWS, pass_rows = (rows + passes - 1) / passes;
    for (long first = 0; first < BLOCK && output + first < p->outputs; first += TILE)
        for (long done = 0; done < rows; done += pass_rows) {
            int count = (int)(rows - done < pass_rows ? rows - done : pass_rows);
            float out[2][TILE][MAX_ROWS];
            for (long h = 0; h < halves; h++)
                tile_values(p, count, output + first + h * p->outputs, row + done, scale[h] + first,
                            offset[h] + done * BLOCK + first, out[h]);
            for (long n = 0; n < TILE && output + first + n < p->outputs; n++)
                for (int r = 0; r < count; r++) {
                    float value = out[0][n][r];
                    if (p->gate) value = gated(p->gate, value, out[1][n][r]);
                    if (p->bias) value += read_value(p->bias, output + first + n, p->dtype);
                    write_value(p->y, (row + done + r) * p->outputs + output + first + n, p->dtype, value);
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
    int format = (int)c->format, threads = (int)c->threads;
    struct problem p = {
        .weight = (const char *)(uintptr_t)c->weight, .scale = (const void *)(uintptr_t)c->scale,
        .zero = (const uint8_t *)(uintptr_t)c->zero, .bias = (const void *)(uintptr_t)c->bias,
        .y = (void *)(uintptr_t)c->y, .rows = rows, .inputs = inputs, .outputs = outputs,
        .weight_rows = c->gate ? 2 * outputs : outputs, .format = format, .dtype = (int)c->dtype,
        .group_size = (int)c->group_size, .gate = (int)c->gate,
    };
    p.row_units = format == INT4 ? inputs / 2 : inputs;
    p.groups = format == INT4 ? inputs / p.group_size : 0;
    p.weight_stride = (size_t)p.row_units * (format == FLOAT32 ? 4 : format <= FLOAT16 ? 2 : 1);
    p.x_stride = round_up(p.row_units, UNITS_PER_LINE(format)) * ACTIVATION_BYTES(format) * (format == INT4 ? 2 : 1);

    size_t x_bytes = rows * p.x_stride, scale_bytes = round_up(rows * 4, 64);
    p.x = aligned_alloc(64, x_bytes + scale_bytes + round_up(rows * p.groups * 4, 64) + 64);
    if (!p.x) return 1;
    p.x_scale = (float *)(p.x + x_bytes);
    p.x_sums = (float *)(p.x + x_bytes + scale_bytes);

    long row_block = rows;
    if (x_bytes > CACHED_ACTIVATIONS && rows > 16) {
        row_block = CACHED_ACTIVATIONS / p.x_stride / MAX_ROWS * MAX_ROWS;
        if (row_block < 2 * MAX_ROWS) row_block = 2 * MAX_ROWS;
    }
    size_t block_scratch = sizeof(float) * BLOCK * (3 * (p.groups + 4) + 2 * row_block);
    size_t row_scratch = round_up(inputs * 6, 64);
    long blocks = (outputs + BLOCK - 1) / BLOCK;
    int small = (size_t)p.weight_rows * p.weight_stride * rows < 64 * 1024;
    int failed = 0;
    if (rows < 16) {
        char *row_buffer = malloc(row_scratch);
        for (long r = 0; row_buffer && r < rows; r++)
            prepare_row(&p, x, r, (float *)row_buffer, (int16_t *)(row_buffer + inputs * 4));
        failed = !row_buffer;
        free(row_buffer);
    } 
#pragma omp parallel num_threads(threads) if (!small && threads > 1)
    {
        char *scratch = malloc(block_scratch > row_scratch ? block_scratch : row_scratch);
        if (!scratch) failed = 1;
        if (rows >= 16) {
#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++)
                if (scratch) prepare_row(&p, x, r, (float *)scratch, (int16_t *)(scratch + inputs * 4));
        }
        for (long row = 0; row < rows; row += row_block) {
            long count = rows - row < row_block ? rows - row : row_block;
#pragma omp for schedule(static) nowait
            for (long b = 0; b < blocks; b++)
                if (scratch && !failed) block(&p, b * BLOCK, row, count, (float *)scratch);
        }
        free(scratch);
    }
    free(p.x);
    return failed;
}
