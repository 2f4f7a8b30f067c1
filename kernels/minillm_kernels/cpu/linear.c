/* y = x W^T for weights in fp32, bf16, fp16, int8 or int4, and act(x Wg^T) * (x Wu^T) for gated MLPs.
 *
 * With few rows every weight is used a few times and then forgotten, so the time is the time to read W
 * from memory. The loop is built around that:
 *
 *   - four output rows (a tile) are multiplied side by side, a cache line of each per step, while the
 *     next tile is being prefetched;
 *   - every activation row multiplies a weight while it sits in a register, so W moves once;
 *   - 32 output rows (a block) are the unit that threads take;
 *   - more than MAX_ROWS activation rows go in passes over a block that the first pass left in cache.
 *
 * Quantized weights multiply activations held as int16 (one scale per row: 32767 / largest): products
 * and sums are then integers, four times as many per instruction as fp32 and exact. The rounding of x
 * is at most 1.5e-5 of its largest element, far below the 4e-3 step of an int8 weight. Only where that
 * element dwarfs the others is it too much for them: such a row is multiplied as two, its codes and those
 * of what their rounding has left over, and the results are added. int4 keeps up with
 * memory by unpacking whole registers: two bytes are an int16 of four codes, and one AND, one shift, or both
 * leave one of them; the activations lie in the order in which the codes come out.
 *
 * Every sum is formed in the same order whatever the number of rows or threads: a row never depends on them.
 */
#include <stdlib.h>

#include "simd.h"
#include "threads.h"
#include "values.h"


enum { TILE = 4, BLOCK = 32 };                /* output rows side by side, and taken by a thread */
enum { LINE = 64, MAX_GROUP = 128 };          /* bytes of a weight row per step; largest int4 group */
enum { WORDS = 2 * LANES, STEP = 2 * WORDS }; /* int16 and bytes in a register */
enum { FLUSH = 4 * LANES };  /* lines until int32 sums move to fp32: 256 products of 2^15 * 2^7 per lane */
enum { AHEAD = 8 * 1024 };   /* bytes to prefetch ahead at least: what arrives while memory answers once */

/* Weights in a line and bytes of a prepared activation */
#define WEIGHTS_PER_LINE(format) ((format) == FLOAT32 ? 16 : (format) <= FLOAT16 ? 32 : (format) == INT8 ? 64 : 128)
#ifdef BF16_DOT
#define ACTIVATION_BYTES(format) ((format) == FLOAT32 || (format) == FLOAT16 ? 4 : 2)
#else
#define ACTIVATION_BYTES(format) ((format) >= INT8 ? 2 : 4)
#endif

struct problem {
    const char *weight;    /* [weight_rows, weight_stride bytes]; weight_rows = outputs, or 2 * outputs if gated */
    const void *scale;     /* int8: float [weight_rows]; int4: half [weight_rows, groups] */
    const uint8_t *zero;   /* int4: [weight_rows, groups] */
    const void *bias;      /* [outputs] in dtype, or NULL */
    void *y;               /* [rows, outputs] in dtype */
    const void *given;     /* activations: [rows, inputs] in dtype */
    long *first;           /* [rows + 1] the first part of each row, and the number of parts: one or two for a row */
    float *largest;        /* [rows] magnitudes, int8 and int4 */
    char *x;               /* prepared activations: [parts, x_stride bytes], zero-padded to whole lines */
    float *x_scale;        /* [parts], int8 and int4 */
    float *x_sums;         /* [parts, padded_groups] sums of the int16 activations, int4; zeros behind them */
    long padded_groups;    /* in whole registers */
    long rows, inputs, outputs, weight_rows, groups;
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

/* Whether most of what is not zero is less than 1/256 of the largest: codes below 128, with errors as those of bf16 */
INLINE int dwarfed(const void *x, int dtype, long inputs, float largest) {
    const float small = largest / 256;
    int32_t more = 0;
    for (long k = 0; k < inputs; k++) {
        float value = fabsf(read_value(x, k, dtype));
        more += (value > 0 && value < small) - (value >= small);
    }
    return more > 0;
}

/* The codes of part 0 are x / scale, rounded, and those of part 1 what that leaves over, in steps of scale / 2^15. */
INLINE void quantize(const void *x, int dtype, long start, long count, float scale, float inverse, int part,
                     int16_t *codes) {
    for (long k = 0; k < count; k++) {
        float value = read_value(x, start + k, dtype), code = rintf(value * inverse);
        codes[k] = (int16_t)(int32_t)(part ? rintf((value - code * scale) * inverse * 0x1p15f) : code);
    }
}

/* A group's codes in the order in which vs_nibbles deals out the weights; returns their sum. Two bytes of weights, a
 * word, hold elements i, i + group_size / 2, i + 1 and i + 1 + group_size / 2, low bits first: the codes for the
 * first nibble of all words in a register come first, then those for the second, and so on. */
INLINE float order_as_nibbles(const int16_t *codes, long start, int group_size, int16_t *ordered) {
    enum { RUN = WORDS < 8 ? WORDS : 8 }; /* the smallest group has 8 words */
    for (int run = 0; run < group_size / 4; run += RUN) {
        long word = start / 4 + run;
        int16_t *to = ordered + word / WORDS * 4 * WORDS + word % WORDS;
        const int16_t *low = codes + 2 * run, *high = low + group_size / 2;
        for (int i = 0; i < RUN; i++) {
            to[i] = low[2 * i], to[i + WORDS] = high[2 * i];
            to[i + 2 * WORDS] = low[2 * i + 1], to[i + 3 * WORDS] = high[2 * i + 1];
        }
    }
    int32_t sum = 0;
    for (int i = 0; i < group_size; i++) sum += codes[i];
    return (float)sum;
}

INLINE void prepare_part(const struct problem *p, const void *x, int dtype, long row, int part) {
    const long place = p->first[row] + part;
    char *target = p->x + place * p->x_stride;
    memset(target, 0, p->x_stride);
    if (p->format < INT8) {
        if (ACTIVATION_BYTES(p->format) == 4) widen_row(x, dtype, p->inputs, (float *)target);
        else memcpy(target, x, (size_t)p->inputs * 2);
        return;
    }
    float largest = p->largest[row], inverse = 32767.0f / largest, scale = largest / 32767.0f;
    float *sums = p->x_sums + place * p->padded_groups;
    memset(sums, 0, sizeof(float) * p->padded_groups);
    p->x_scale[place] = part ? scale * 0x1p-15f : scale;
    if (!isfinite(inverse) || !isfinite(largest)) { /* all zero or as good as; or inf or nan */
        p->x_scale[place] = largest < 1 ? 0.0f : NAN;
        return;
    }
    if (p->format == INT8) {
        quantize(x, dtype, 0, p->inputs, scale, inverse, part, (int16_t *)target);
        return;
    }
    for (long group = 0; group < p->groups; group++) {
        int16_t codes[MAX_GROUP];
        long start = group * p->group_size;
        quantize(x, dtype, start, p->group_size, scale, inverse, part, codes);
        sums[group] = order_as_nibbles(codes, start, p->group_size, (int16_t *)target);
    }
}

INLINE void prepare_row_of(const struct problem *p, const void *x, int dtype, long row) {
    for (int part = 0; part < p->first[row + 1] - p->first[row]; part++) prepare_part(p, x, dtype, row, part);
}

INLINE long parts_of(const struct problem *p, const void *x, int dtype, long row) {
    if (p->format < INT8) return 1;
    p->largest[row] = largest_magnitude(x, dtype, p->inputs);
    return 1 + dwarfed(x, dtype, p->inputs, p->largest[row]);
}

static const void *given_row(const struct problem *p, long row) {
    return (const char *)p->given + row * p->inputs * (p->dtype == FLOAT32 ? 4 : 2);
}

/* Two piece_functions, see threads.h: first the number of each row's parts is found, then they are filled. */
static int count_parts(const void *context, long row, int thread) {
    const struct problem *p = context;
    const void *x = given_row(p, row);
    (void)thread;
    if (p->dtype == FLOAT32) p->first[row + 1] = parts_of(p, x, FLOAT32, row);
    else if (p->dtype == BFLOAT16) p->first[row + 1] = parts_of(p, x, BFLOAT16, row);
    else p->first[row + 1] = parts_of(p, x, FLOAT16, row);
    return 0;
}

static int prepare_row(const void *context, long row, int thread) {
    const struct problem *p = context;
    const void *x = given_row(p, row);
    (void)thread;
    if (p->dtype == FLOAT32) prepare_row_of(p, x, FLOAT32, row);
    else if (p->dtype == BFLOAT16) prepare_row_of(p, x, BFLOAT16, row);
    else prepare_row_of(p, x, FLOAT16, row);
    return 0;
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
                        long lines, size_t ahead, vf sum[MAX_ROWS][TILE]) {
    const int weights = format == FLOAT32 ? 16 : 32; /* in a line */
    for (long line = 0; line < lines; line++) {
        prefetch_line(weight, line, ahead);
        for (int k = 0; k < weights; k += LANES) {
            vf w[TILE];
            for (int n = 0; n < TILE; n++)
                w[n] = load_weights(format, weight[n] + line * LINE + k * (LINE / weights));
            for (int r = 0; r < rows; r++) {
                vf a = vf_load((const float *)(x + r * x_stride) + line * weights + k);
                for (int n = 0; n < TILE; n++) sum[r][n] = vf_fma(w[n], a, sum[r][n]);
            }
        }
    }
}

#ifdef BF16_DOT
INLINE void bf16_lines(int rows, const char *const *weight, const char *x, size_t x_stride, long lines,
                       size_t ahead, vf sum[MAX_ROWS][TILE]) {
    for (long line = 0; line < lines; line++) {
        prefetch_line(weight, line, ahead);
        vs w[TILE];
        for (int n = 0; n < TILE; n++) w[n] = vs_load((const int16_t *)(weight[n] + line * LINE));
        for (int r = 0; r < rows; r++) {
            vs a = vs_load((const int16_t *)(x + r * x_stride + line * LINE));
            for (int n = 0; n < TILE; n++) sum[r][n] = vf_dot_bf16(sum[r][n], w[n], a);
        }
    }
}
#endif

INLINE void int8_lines(int rows, const char *const *weight, const char *x, size_t x_stride, long lines,
                       size_t ahead, vf sum[MAX_ROWS][TILE]) {
    for (long start = 0; start < lines; start += FLUSH) {
        long end = start + FLUSH < lines ? start + FLUSH : lines;
        vi dots[MAX_ROWS][TILE];
        for (int n = 0; n < TILE; n++)
            for (int r = 0; r < rows; r++) dots[r][n] = vi_zero();
        for (long line = start; line < end; line++) {
            prefetch_line(weight, line, ahead);
            for (long k = line * LINE; k < (line + 1) * LINE; k += 2 * LANES) {
                vs w[TILE];
                for (int n = 0; n < TILE; n++) w[n] = vs_load_int8(weight[n] + k);
                for (int r = 0; r < rows; r++) {
                    vs a = vs_load((const int16_t *)(x + r * x_stride) + k);
                    for (int n = 0; n < TILE; n++) dots[r][n] = vi_dot(dots[r][n], w[n], a);
                }
            }
        }
        for (int n = 0; n < TILE; n++)
            for (int r = 0; r < rows; r++) sum[r][n] = vf_fma(vi_to_vf(dots[r][n]), vf_set(1), sum[r][n]);
    }
}

/* What belongs to the weights of a tile in int4 */
struct groups {
    const uint16_t *scale[TILE]; /* halves of each output, one per group */
    const uint8_t *zero[TILE];
    const float *x_sums; /* [rows, padded_groups] */
    long count, padded_groups;
    int shift;      /* a group has 2^shift bytes */
    size_t further; /* elements to prefetch ahead */
    float scales[LANES * TILE + LANES]; /* of LANES groups, a quad for each; a register is read where a quad begins */
};

/* Lays out the scales of LANES groups from `group` on as the dots want them, and subtracts what their zero points amount
 * to: the dots multiply bare codes, sum((q - zero) x) = sum(q x) - zero * sum(x), and the second part is a small product
 * of its own, with a lane per group. That this stands between the dots, and not before them, keeps memory busy. */
INLINE void int4_groups(struct groups *g, int rows, long group, vf sum[MAX_ROWS][TILE]) {
    const long count = g->count - group < LANES ? g->count - group : LANES;
    vf scales[TILE], offsets[TILE];
    for (int n = 0; n < TILE; n++) {
        const uint16_t *scale = g->scale[n] + group;
        const uint8_t *zero = g->zero[n] + group;
        uint16_t scale_copy[LANES] = {0};
        uint8_t zero_copy[LANES] = {0};
        __builtin_prefetch(scale + g->further);
        __builtin_prefetch(zero + g->further);
        if (count < LANES) { /* do not read past the tensors */
            scale = memcpy(scale_copy, scale, count * 2);
            zero = memcpy(zero_copy, zero, count);
        }
        scales[n] = vf_load_half(scale);
        offsets[n] = vf_mul(scales[n], vf_load_uint8(zero));
    }
    vf_store_columns(g->scales, scales);
    for (int r = 0; r < rows; r++) {
        const vf x_sums = vf_load(g->x_sums + r * g->padded_groups + group);
        vf products[TILE];
        for (int n = 0; n < TILE; n++) products[n] = vf_mul(offsets[n], x_sums);
        sum[r][0] = vf_fma(vf_quads(products), vf_set(-1), sum[r][0]);
    }
}

/* A register of weights is unpacked once for all rows; four dots per row multiply it. The sums of four outputs then
 * meet in one register, quad i holding those of the i-th 16 bytes: 32 products, 2^24 at most, exact in fp32. There
 * they take the scales of their groups; sum[r][0] stays in that form. The first line is the start-th of the weights. */
INLINE void int4_lines(int rows, const char *const *weight, const char *x, size_t x_stride, long lines, long start,
                       struct groups *g, size_t ahead, vf sum[MAX_ROWS][TILE]) {
    const quads order = quads_of_groups(g->shift);
    for (long line = 0; line < lines; line++) {
        const long group = (start + line) * LINE >> g->shift;
        if (group % LANES == 0) int4_groups(g, rows, group, sum);
        prefetch_line(weight, line, ahead);
        for (long k = 0; k < LINE; k += STEP) {
            vi dots[MAX_ROWS][TILE];
            for (int r = 0; r < rows; r++)
                for (int n = 0; n < TILE; n++) dots[r][n] = vi_zero();
            UNROLL for (int i = 0; i < 4; i++) {
                vs w[TILE];
                for (int n = 0; n < TILE; n++)
                    w[n] = vs_nibbles(vs_load((const int16_t *)(weight[n] + line * LINE + k)), i);
                for (int r = 0; r < rows; r++) {
                    vs a = vs_load((const int16_t *)(x + r * x_stride) + 2 * (line * LINE + k) + i * WORDS);
                    for (int n = 0; n < TILE; n++) dots[r][n] = vi_dot(dots[r][n], w[n], a);
                }
            }
            vf scale = vf_load_quads(g->scales + (group % LANES + (k >> g->shift)) * TILE, order);
            for (int r = 0; r < rows; r++) sum[r][0] = vf_fma(vi_to_vf(vi_quads(dots[r])), scale, sum[r][0]);
        }
    }
}

INLINE void tile_lines(const struct problem *p, int format, int rows, const char *const *weight, const char *x,
                       long lines, long start, struct groups *g, size_t ahead, vf sum[MAX_ROWS][TILE]) {
#ifdef BF16_DOT
    if (format == BFLOAT16) return bf16_lines(rows, weight, x, p->x_stride, lines, ahead, sum);
#endif
    if (format == INT8) return int8_lines(rows, weight, x, p->x_stride, lines, ahead, sum);
    if (format == INT4) return int4_lines(rows, weight, x, p->x_stride, lines, start, g, ahead, sum);
    float_lines(format, rows, weight, x, p->x_stride, lines, ahead, sum);
}

/* ---- BLOCK outputs against `rows` activation rows: out [rows, BLOCK], scaled, before bias and gate ---- */

/* Tile by tile, whole lines first, then the rest of each row through a zero-padded copy */
INLINE void block_of(const struct problem *p, int format, int rows, long output, long row, size_t ahead,
                     float out[MAX_ROWS][BLOCK]) {
    const long lines = p->weight_stride / LINE;
    const size_t rest = p->weight_stride % LINE;
    const char *x = p->x + row * p->x_stride, *x_rest = x + lines * ACTIVATION_BYTES(format) * WEIGHTS_PER_LINE(format);
    struct groups g = {.count = p->groups, .padded_groups = p->padded_groups};
    if (format == INT4) {
        g.x_sums = p->x_sums + row * p->padded_groups;
        g.shift = __builtin_ctz(p->group_size / 2);
        g.further = ahead / p->weight_stride * p->groups; /* of the outputs whose weights are fetched meanwhile */
    }
    for (long first = 0; first < BLOCK && output + first < p->weight_rows; first += TILE) {
        const char *weight[TILE];
        vf sum[MAX_ROWS][TILE];
        for (int n = 0; n < TILE; n++) {
            long clamped = output + first + n < p->weight_rows ? output + first + n : p->weight_rows - 1;
            weight[n] = p->weight + clamped * p->weight_stride;
            if (format == INT4) {
                g.scale[n] = (const uint16_t *)p->scale + clamped * p->groups;
                g.zero[n] = p->zero + clamped * p->groups;
            }
            for (int r = 0; r < rows; r++) sum[r][n] = vf_zero();
        }
        tile_lines(p, format, rows, weight, x, lines, 0, &g, ahead, sum);
        if (rest) {
            char copy[TILE][LINE] = {{0}};
            for (int n = 0; n < TILE; n++) weight[n] = memcpy(copy[n], weight[n] + lines * LINE, rest);
            tile_lines(p, format, rows, weight, x_rest, 1, lines, &g, 0, sum);
        }
        for (int r = 0; r < rows; r++) {
            float total[TILE];
            vf_store_quad(total, format == INT4 ? sum[r][0] : vf_quads(sum[r]));
            for (int n = 0; n < TILE && output + first + n < p->weight_rows; n++) {
                float scale = format >= INT8 ? p->x_scale[row + r] : 1;
                if (format == INT8) scale *= ((const float *)p->scale)[output + first + n];
                out[r][first + n] = total[n] * scale;
            }
        }
    }
}

/* A constant number of rows lets the sums live in registers; a function for each leaves the compiler room to see it. */
typedef void block_function(const struct problem *p, long output, long row, size_t ahead, float out[MAX_ROWS][BLOCK]);
#define ROWS_FUNCTION(format, rows)                                                                       \
    static __attribute__((noinline)) void format##_##rows(const struct problem *p, long output, long row, \
                                                          size_t ahead, float out[MAX_ROWS][BLOCK])       \
    {                                                                                                     \
        block_of(p, format, rows <= MAX_ROWS ? rows : 1, output, row, ahead, out);                        \
    }
#define FUNCTIONS(format) \
    ROWS_FUNCTION(format, 1) ROWS_FUNCTION(format, 2) ROWS_FUNCTION(format, 3) ROWS_FUNCTION(format, 4) \
    ROWS_FUNCTION(format, 5)
FUNCTIONS(FLOAT32) FUNCTIONS(BFLOAT16) FUNCTIONS(FLOAT16) FUNCTIONS(INT8) FUNCTIONS(INT4)
#define NAMES(format) {format##_1, format##_2, format##_3, format##_4, format##_5}
static block_function *const block_functions[][5] = {
    NAMES(FLOAT32), NAMES(BFLOAT16), NAMES(FLOAT16), NAMES(INT8), NAMES(INT4),
};

INLINE void finish_row(const struct problem *p, int dtype, long output, long row, long width, const float *out,
                       const float *up) { /* of all parts added up */
    float value[BLOCK];
    if (p->gate == SILU) for (long n = 0; n < width; n++) value[n] = gated(SILU, out[n], up[n]);
    else if (p->gate) for (long n = 0; n < width; n++) value[n] = gated(GELU_TANH, out[n], up[n]);
    else memcpy(value, out, width * sizeof(float));
    if (p->bias) for (long n = 0; n < width; n++) value[n] += read_value(p->bias, output + n, dtype);
    for (long n = 0; n < width; n++) write_value(p->y, row * p->outputs + output + n, dtype, value[n]);
}

/* The i-th BLOCK of outputs for all rows, in passes of at most MAX_ROWS parts; a piece_function, see threads.h */
static int block(const void *context, long i, int thread) {
    const struct problem *p = context;
    const long output = i * BLOCK, *first = p->first;
    (void)thread;
    long parts = first[p->rows], passes = (parts + MAX_ROWS - 1) / MAX_ROWS;
    long width = p->outputs - output < BLOCK ? p->outputs - output : BLOCK;
    size_t tile_bytes = TILE * p->weight_stride;
    for (long row = 0, next; row < p->rows; row = next) {
        next = row + 1; /* whole rows: what does not fit any more is for the next pass */
        while (next < p->rows && first[next + 1] - first[row] <= (parts + passes - 1) / passes) next++;
        size_t ahead = row > 0 ? 0 : tile_bytes > AHEAD ? tile_bytes : AHEAD;
        float out[MAX_ROWS][BLOCK], up[MAX_ROWS][BLOCK];
        block_function *values = block_functions[p->format][first[next] - first[row] - 1];
        values(p, output, first[row], ahead, out);
        if (p->gate) values(p, output + p->outputs, first[row], ahead, up);
        for (long r = row; r < next; r++) {
            long part = first[r] - first[row];
            if (first[r + 1] - first[r] == 2) {
                for (long n = 0; n < width; n++) out[part][n] += out[part + 1][n];
                if (p->gate) for (long n = 0; n < width; n++) up[part][n] += up[part + 1][n];
            }
            switch (p->dtype) {
                case FLOAT32: finish_row(p, FLOAT32, output, r, width, out[part], up[part]); break;
                case BFLOAT16: finish_row(p, BFLOAT16, output, r, width, out[part], up[part]); break;
                case FLOAT16: finish_row(p, FLOAT16, output, r, width, out[part], up[part]); break;
            }
        }
    }
    return 0;
}

/* ---- the whole product ---- */

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/* `outputs` is F when gated: the weight then has 2F rows. */
CALL(linear, int64_t format, dtype, x, rows, inputs, weight, outputs, scale, zero, group_size, bias, y, gate, threads;);

/* Returns 0, or 1 when memory for the activations could not be had. Shapes as in struct problem. */
int minillm_linear(const struct linear_call *c) {
    long rows = c->rows, inputs = c->inputs, outputs = c->outputs;
    int format = (int)c->format, threads = c->threads > 1 ? (int)c->threads : 1;
    struct problem p = {
        .weight = (const char *)(uintptr_t)c->weight, .scale = (const void *)(uintptr_t)c->scale,
        .zero = (const uint8_t *)(uintptr_t)c->zero, .bias = (const void *)(uintptr_t)c->bias,
        .y = (void *)(uintptr_t)c->y, .given = (const void *)(uintptr_t)c->x, .rows = rows, .inputs = inputs, .outputs = outputs,
        .weight_rows = c->gate ? 2 * outputs : outputs, .format = format, .dtype = (int)c->dtype,
        .group_size = (int)c->group_size, .gate = (int)c->gate,
    };
    p.groups = format == INT4 ? inputs / p.group_size : 0, p.padded_groups = round_up(p.groups, LANES);
    p.weight_stride = format == INT4 ? inputs / 2 : inputs * (format == FLOAT32 ? 4 : format == INT8 ? 1 : 2);
    p.x_stride = round_up(inputs, WEIGHTS_PER_LINE(format)) * ACTIVATION_BYTES(format);

    long blocks = (outputs + BLOCK - 1) / BLOCK;
    if ((size_t)p.weight_rows * p.weight_stride * rows < 64 * 1024) threads = 1; /* waking a thread costs more */

    p.first = malloc(sizeof(long) * (rows + 1) + sizeof(float) * rows);
    if (!p.first) return 1;
    p.largest = (float *)(p.first + rows + 1);
    p.first[0] = 0;
    int row_threads = rows * inputs < 16 * 1024 ? 1 : threads; /* fewer values are converted before others begin */
    minillm_parallel(rows, format < INT8 ? 1 : row_threads, count_parts, &p);
    for (long row = 0; row < rows; row++) p.first[row + 1] += p.first[row];
    long parts = p.first[rows];

    size_t x_bytes = parts * p.x_stride, scale_bytes = round_up(parts * 4, 64);
    size_t sums_bytes = round_up(parts * p.padded_groups * 4, 64);
    p.x = aligned_alloc(64, x_bytes + scale_bytes + sums_bytes + 64);
    if (!p.x) return free(p.first), 1;
    p.x_scale = (float *)(p.x + x_bytes);
    p.x_sums = (float *)(p.x + x_bytes + scale_bytes);

    minillm_parallel(rows, row_threads, prepare_row, &p);
    minillm_parallel(blocks, threads, block, &p);
    free(p.x);
    free(p.first);
    return 0;
}
