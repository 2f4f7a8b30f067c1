/* y = x W^T for many rows of x, and act(x Wg^T) * (x Wu^T) for gated MLPs: what prefill is made of.
 *
 * Threads take BLOCKs of ROWS outputs. Weights that are not what panel.h multiplies are made so, a block at a time, in
 * L2: int8 codes become bf16 or fp32 as they are, and the finished sums get the scale; int4 becomes
 * (q - zero) * scale, rounded to what it is multiplied as. So a quantized prompt takes little more than a dense one.
 *
 * A result depends on its own row of x and its own row of W, never on how many others there are.
 */
#include "panel.h"

enum { AT_ONCE = 512 }; /* units of a panel that a thread packs */

CALL(gemm, int64_t format, dtype, x, rows, inputs, weight, outputs, scale, zero, group_size, bias, y, gate, threads;);

struct gemm {
    struct gemm_call c;
    int pairs;
    long units, panels, blocks, shares; /* shares: of the panels, which the threads that take a block divide */
    unit *panel;                        /* all panels, one behind the other: [units, its columns] */
    char *scratch;                      /* of each thread: `wide`, the sums, and finished rows */
    size_t scratch_bytes;
};

static long registers_of(const struct gemm *g, long panel) { /* of columns */
    long left = g->c.rows - panel * WIDTH;
    return left >= WIDTH ? REGISTERS : (left + LANES - 1) / LANES;
}

/* ---- x into panels ---- */

INLINE void pack(const struct gemm *g, int dtype, long panel, long first) {
    const struct gemm_call *c = &g->c;
    const int pairs = g->pairs, per_unit = 1 + pairs;
    const long registers = registers_of(g, panel), width = registers * LANES;
    const long end = g->units < first + AT_ONCE ? g->units : first + AT_ONCE;
    const void *x = (const void *)(uintptr_t)c->x;
    unit *to = g->panel + panel * WIDTH * g->units;
    for (long column = 0; column < width; column += LANES) {
        for (long k = first; k < end; k += LANES) {
            float square[LANES][LANES] = {{0}};
            for (long i = 0; i < LANES && panel * WIDTH + column + i < c->rows; i++) {
                long row = panel * WIDTH + column + i, left = c->inputs - k * per_unit;
                long count = left < LANES * per_unit ? left : LANES * per_unit;
                if (count > 0) units_of(x, dtype, row * c->inputs + k * per_unit, count, pairs, square[i]);
            }
            float turned[LANES][LANES];
            turn(square[0], LANES, turned[0], LANES);
            for (long j = 0; j < LANES && k + j < end; j++)
                memcpy(to + (k + j) * width + column, turned[j], sizeof turned[j]);
        }
    }
}

static int pack_piece(const void *context, long i, int thread) {
    const struct gemm *g = context;
    (void)thread;
    long panel = i % g->panels, first = i / g->panels * AT_ONCE;
    if (g->c.dtype == FLOAT32) pack(g, FLOAT32, panel, first);
    else if (g->c.dtype == BFLOAT16) pack(g, BFLOAT16, panel, first);
    else pack(g, FLOAT16, panel, first);
    return 0;
}

/* ---- weights, `count` rows from `row` on, as units ---- */

INLINE uint16_t whole_to_bf16(int8_t code) { /* exact */
    float value = code;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16);
}

INLINE void widen_int4(const struct gemm_call *c, int pairs, long row, char *to) {
    const long half = c->group_size / 2, groups = c->inputs / c->group_size;
    const uint8_t *bytes = (const uint8_t *)(uintptr_t)c->weight + row * (c->inputs / 2);
    for (long group = 0; group < groups; group++, bytes += half) {
        const float scale = half_to_float(((const uint16_t *)(uintptr_t)c->scale)[row * groups + group]);
        const float zero = ((const uint8_t *)(uintptr_t)c->zero)[row * groups + group];
        char *low = to + group * c->group_size * (pairs ? 2 : 4), *high = low + half * (pairs ? 2 : 4);
#ifdef BF16_DOT
        if (pairs) {
            unpack_int4(bytes, half, scale, zero, (uint16_t *)low, (uint16_t *)high);
            continue;
        }
#endif
        for (long k = 0; k < half; k++) ((float *)low)[k] = ((float)(bytes[k] & 15) - zero) * scale;
        for (long k = 0; k < half; k++) ((float *)high)[k] = ((float)(bytes[k] >> 4) - zero) * scale;
    }
}

INLINE void widen_row(const struct gemm_call *c, int pairs, long row, char *to) {
    const void *weight = (const void *)(uintptr_t)c->weight;
    const long start = row * c->inputs;
    const int8_t *codes = (const int8_t *)weight + start;
    switch (c->format) {
        case FLOAT32: units_of(weight, FLOAT32, start, c->inputs, 0, to); break;
        case BFLOAT16: units_of(weight, BFLOAT16, start, c->inputs, pairs, to); break;
        case FLOAT16: units_of(weight, FLOAT16, start, c->inputs, 0, to); break;
        case INT8:
            if (pairs) for (long k = 0; k < c->inputs; k++) ((uint16_t *)to)[k] = whole_to_bf16(codes[k]);
            else for (long k = 0; k < c->inputs; k++) ((float *)to)[k] = codes[k];
            break;
        case INT4: widen_int4(c, pairs, row, to); break;
    }
}

/* Returns the rows from `row` on, `stride` units apart, ROWS of which may be read: in place if that will do. */
INLINE const unit *block_of(const struct gemm *g, int pairs, long row, long count, unit *wide, long *stride) {
    const struct gemm_call *c = &g->c;
    const long bytes = c->inputs * (pairs ? 2 : 4);
    const int same = c->format == FLOAT32 || (c->format == BFLOAT16 && pairs);
    *stride = g->units;
    if (same && bytes == g->units * 4 && count == ROWS)
        return (const unit *)((const char *)(uintptr_t)c->weight + row * bytes);
    for (long n = 0; n < ROWS; n++) {
        char *to = (char *)(wide + n * g->units);
        if (n < count) widen_row(c, pairs, row + n, to);
        size_t written = n < count ? bytes : 0;
        memset(to + written, 0, g->units * 4 - written);
    }
    return wide;
}

/* ---- a block of outputs for some of the panels ---- */

INLINE void finish(const struct gemm *g, int dtype, long output, long count, long panel, float *sum, float *up,
                   float *rows) {
    const struct gemm_call *c = &g->c;
    const long registers = registers_of(g, panel), first = panel * WIDTH;
    const float *scale = (const float *)(uintptr_t)c->scale;
    for (long n = 0; n < count; n++) {
        float *a = sum + n * WIDTH, *b = up + n * WIDTH;
        if (c->format == INT8) {
            for (long i = 0; i < WIDTH; i++) a[i] *= scale[output + n];
            if (c->gate) for (long i = 0; i < WIDTH; i++) b[i] *= scale[c->outputs + output + n];
        }
        if (c->gate == SILU) for (long i = 0; i < WIDTH; i++) a[i] = gated(SILU, a[i], b[i]);
        else if (c->gate) for (long i = 0; i < WIDTH; i++) a[i] = gated(GELU_TANH, a[i], b[i]);
        if (c->bias) {
            float bias = read_value((const void *)(uintptr_t)c->bias, output + n, dtype);
            for (long i = 0; i < WIDTH; i++) a[i] += bias;
        }
    }
    for (long n = 0; n < count; n += LANES)
        for (long i = 0; i < registers * LANES; i += LANES) turn(sum + n * WIDTH + i, WIDTH, rows + i * ROWS + n, ROWS);
    for (long i = 0; i < WIDTH && first + i < c->rows; i++)
        for (long n = 0; n < count; n++)
            write_value((void *)(uintptr_t)c->y, (first + i) * c->outputs + output + n, dtype, rows[i * ROWS + n]);
}

INLINE int multiply_block(const struct gemm *g, int pairs, long piece, int thread) {
    const struct gemm_call *c = &g->c;
    const long output = piece / g->shares * ROWS, share = piece % g->shares;
    const long count = c->outputs - output < ROWS ? c->outputs - output : ROWS;
    unit *wide = (unit *)(g->scratch + thread * g->scratch_bytes);
    float *sum = wide + (c->gate ? 2 : 1) * ROWS * g->units, *up = sum + ROWS * WIDTH, *rows = up + ROWS * WIDTH;
    long stride, up_stride = 0;
    const unit *up_weight = NULL, *weight = block_of(g, pairs, output, count, wide, &stride);
    if (c->gate) up_weight = block_of(g, pairs, c->outputs + output, count, wide + ROWS * g->units, &up_stride);
    for (long panel = share * g->panels / g->shares; panel < (share + 1) * g->panels / g->shares; panel++) {
        const unit *x = g->panel + panel * WIDTH * g->units;
        const int registers = (int)registers_of(g, panel);
        memset(sum, 0, sizeof(float) * ROWS * WIDTH * (c->gate ? 2 : 1));
        multiply(pairs, registers, weight, stride, count, g->units, x, sum);
        if (c->gate) multiply(pairs, registers, up_weight, up_stride, count, g->units, x, up);
        if (c->dtype == FLOAT32) finish(g, FLOAT32, output, count, panel, sum, up, rows);
        else if (c->dtype == BFLOAT16) finish(g, BFLOAT16, output, count, panel, sum, up, rows);
        else finish(g, FLOAT16, output, count, panel, sum, up, rows);
    }
    return 0;
}

static int block_piece(const void *context, long i, int thread) {
    const struct gemm *g = context;
#ifdef BF16_DOT
    if (g->pairs) return multiply_block(g, 1, i, thread);
#endif
    return multiply_block(g, 0, i, thread);
}

/* Arguments and result as for minillm_linear. */
int minillm_gemm(const struct gemm_call *c) {
    if (!c->outputs) return 0; /* nothing to share out */
    struct gemm g = {.c = *c, .pairs = PAIRS(c->dtype, c->format)};
    const long threads = c->threads > 1 ? c->threads : 1;
    g.units = whole_units(g.pairs, c->inputs);
    g.panels = (c->rows + WIDTH - 1) / WIDTH;
    g.blocks = (c->outputs + ROWS - 1) / ROWS;
    g.shares = g.blocks < 4 * threads ? (4 * threads + g.blocks - 1) / g.blocks : 1; /* or some threads have no work */
    if (g.shares > g.panels) g.shares = g.panels;
    size_t wide = (size_t)(c->gate ? 2 : 1) * ROWS * g.units, panels = (size_t)g.panels * WIDTH * g.units;
    g.scratch_bytes = 4 * (wide + 3 * ROWS * WIDTH);
    g.panel = minillm_borrow(4 * panels + threads * g.scratch_bytes);
    if (!g.panel) return 1;
    g.scratch = (char *)(g.panel + panels);
    minillm_parallel(g.panels * ((g.units + AT_ONCE - 1) / AT_ONCE), threads, pack_piece, &g);
    minillm_parallel(g.blocks * g.shares, threads, block_piece, &g);
    minillm_give_back(g.panel);
    return 0;
}

/* ---- AMX ---- */

int minillm_amx = 0;

#if defined(__AMX_BF16__) && defined(BF16_DOT) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Linux has a process ask for AMX's registers (8 KiB in each thread's context) before it uses them. What the
 * instructions give is looked at once: whole numbers, whose sums are exact in any order. */
__attribute__((constructor)) static void ask_for_amx(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA)) return;
    unit weight[ROWS * 16], panel[16 * WIDTH];
    static float out[ROWS * WIDTH], expected[ROWS * WIDTH];
    for (long i = 0; i < 2 * ROWS * 16; i++) ((uint16_t *)weight)[i] = float_to_bf16((float)(i * 7 % 13 - 6));
    for (long i = 0; i < 2 * 16 * WIDTH; i++) ((uint16_t *)panel)[i] = float_to_bf16((float)(i * 5 % 11 - 5));
    multiply(1, REGISTERS, weight, 16, ROWS, 16, panel, expected);
    amx_multiply(REGISTERS, weight, 16, ROWS, 16, panel, out);
    minillm_amx = !memcmp(out, expected, sizeof out);
}
#endif
