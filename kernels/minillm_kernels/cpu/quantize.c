/* The int4 codes of a weight matrix, in the layout that linear.c multiplies.
 *
 * A few ranges are tried for each group of inputs, by squared error, and then the scale that fits the best one's codes
 * by least squares: minillm/load/quantize.py says why, and does the same in PyTorch. Here a group is read once and
 * stays in the first-level cache meanwhile. The results are the same to the bit: code times scale is exact (4 and 11
 * bits), so that a fused multiply-add changes nothing, and sums are float64, where the order hardly ever shows.
 *
 * Sixteen outputs side by side, a lane for each: the loops over lanes are written for the compiler to vectorise.
 */
#include "simd.h"
#include "threads.h"
#include "values.h"

enum { OUTPUTS = 16, MAX_GROUP = 128 };
#define EACH for (int n = 0; n < OUTPUTS; n++)

static const float SHRINKS[] = {1.0f, 0.7f, 0.75f, 0.8f, 0.85f, 0.9f, 0.95f, 1.0f, 1.05f, 1.1f};

CALL(quantize_int4, int64_t dtype, weight, rows, inputs, group_size, packed, scale, zero, threads;);

struct candidate { /* scales, zero points and squared errors of OUTPUTS groups */
    float scale[OUTPUTS], zero[OUTPUTS];
    double error[OUTPUTS];
};

/* To float16 and back, at least its smallest number; x is not negative */
INLINE float storable(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~(uint32_t)0x1fff;
    float normal, tiny = rintf(x * 0x1p24f) * 0x1p-24f;
    memcpy(&normal, &bits, 4);
    float value = x < 0x1p-14f ? tiny : x < 65520.0f ? normal : INFINITY;
    return value > 0x1p-24f ? value : 0x1p-24f;
}

INLINE float code(float weight, float scale, float zero) {
    int32_t value = (int32_t)rintf(weight / scale + zero);
    value = value > 0 ? value : 0;
    return (float)(value < 15 ? value : 15);
}

INLINE void keep_if_better(const float w[][OUTPUTS], int size, struct candidate *new, struct candidate *best) {
    double error[OUTPUTS] = {0};
    for (int k = 0; k < size; k++)
        EACH {
            float e = (code(w[k][n], new->scale[n], new->zero[n]) - new->zero[n]) * new->scale[n] - w[k][n];
            error[n] += (double)(e * e);
        }
    EACH {
        int better = error[n] < best->error[n];
        best->scale[n] = better ? new->scale[n] : best->scale[n];
        best->zero[n] = better ? new->zero[n] : best->zero[n];
        best->error[n] = better ? error[n] : best->error[n];
    }
}

INLINE void search(const float w[][OUTPUTS], int size, struct candidate *best) {
    float low[OUTPUTS] = {0}, high[OUTPUTS] = {0};
    struct candidate new;
    for (int k = 0; k < size; k++)
        EACH {
            low[n] = w[k][n] < low[n] ? w[k][n] : low[n];
            high[n] = w[k][n] > high[n] ? w[k][n] : high[n];
        }
    EACH best->error[n] = INFINITY;
    for (int i = 0; i < (int)(sizeof SHRINKS / sizeof *SHRINKS); i++) {
        EACH {
            new.scale[n] = storable(SHRINKS[i] * (high[n] - low[n]) / 15);
            float zero = rintf(-SHRINKS[i] * low[n] / new.scale[n]);
            new.zero[n] = zero > 15 ? 15 : zero;
        }
        keep_if_better(w, size, &new, best);
    }
    double product[OUTPUTS] = {0}, square[OUTPUTS] = {0}; /* of least squares: the best scale for these codes */
    for (int k = 0; k < size; k++)
        EACH {
            float centred = code(w[k][n], best->scale[n], best->zero[n]) - best->zero[n];
            product[n] += (double)(w[k][n] * centred);
            square[n] += (double)(centred * centred);
        }
    EACH {
        float fitted = (float)(product[n] / (square[n] < 1 ? 1 : square[n]));
        new.scale[n] = storable(fitted < 0 ? 0 : fitted);
        new.zero[n] = best->zero[n];
    }
    keep_if_better(w, size, &new, best);
}

/* OUTPUTS rows from `row` on */
INLINE void quantize_rows(const struct quantize_int4_call *c, int dtype, long row) {
    const void *weight = (const void *)(uintptr_t)c->weight;
    const long inputs = c->inputs, width = c->rows - row < OUTPUTS ? c->rows - row : OUTPUTS;
    const int size = (int)c->group_size;
    uint8_t *packed = (uint8_t *)(uintptr_t)c->packed, *zero = (uint8_t *)(uintptr_t)c->zero;
    uint16_t *scale = (uint16_t *)(uintptr_t)c->scale;
    for (long group = 0; group < inputs / size; group++) {
        float w[MAX_GROUP][OUTPUTS];
        EACH {
            long from = (row + (n < width ? n : 0)) * inputs + group * size;
            for (int k = 0; k < size; k++) w[k][n] = read_value(weight, from + k, dtype);
        }
        struct candidate best;
        search((const float(*)[OUTPUTS])w, size, &best);
        for (int k = 0; k < size; k++) EACH w[k][n] = code(w[k][n], best.scale[n], best.zero[n]);
        for (int n = 0; n < width; n++) {
            uint8_t *to = packed + ((row + n) * inputs + group * size) / 2;
            for (int k = 0; k < size / 2; k++) to[k] = (uint8_t)((int)w[k][n] | (int)w[k + size / 2][n] << 4);
            scale[(row + n) * (inputs / size) + group] = float_to_half(best.scale[n]);
            zero[(row + n) * (inputs / size) + group] = (uint8_t)best.zero[n];
        }
    }
}

static int piece(const void *call, long i, int thread) {
    const struct quantize_int4_call *c = call;
    (void)thread;
    if (c->dtype == FLOAT32) quantize_rows(c, FLOAT32, i * OUTPUTS);
    else if (c->dtype == BFLOAT16) quantize_rows(c, BFLOAT16, i * OUTPUTS);
    else quantize_rows(c, FLOAT16, i * OUTPUTS);
    return 0;
}

/* weight [rows, inputs], all of it finite -> packed [rows, inputs / 2], scale and zero [rows, inputs / group_size] */
int minillm_quantize_int4(const struct quantize_int4_call *c) {
    return minillm_parallel((c->rows + OUTPUTS - 1) / OUTPUTS, c->threads, piece, c);
}
