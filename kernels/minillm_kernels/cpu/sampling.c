/* From logits to a token: the softmax and its filters, and the draw. ../sampling.py says what they mean.
 *
 * A row is passed over a few times and never sorted: which tokens the filters keep is found by partitioning, as in
 * quickselect, and of a vocabulary of 128,000 only those near the best one are partitioned. Sums are float64, in an
 * order that depends on the row alone.
 */
#include <stdlib.h>

#include "simd.h"
#include "threads.h"
#include "values.h"

/* logits, out [rows, vocabulary]; temperature float [rows]; top_p, min_p float and top_k int64 [rows], or NULL */
CALL(probabilities, int64_t logits, out, rows, vocabulary, temperature, top_k, top_p, min_p, threads;);

enum { SUMMED = 512, SIDE = 16 }; /* floats that are added up before they join a float64, SIDE of them side by side */

/* The sum of x where `logits` reach `floor`, and how many do */
static double mass_from(const float *logits, const float *x, long count, float floor, long *number) {
    double total = 0;
    *number = 0;
    for (long start = 0; start < count; start += SUMMED) {
        const long end = count < start + SUMMED ? count : start + SUMMED, whole = start + (end - start) / SIDE * SIDE;
        float sums[SIDE] = {0}, all = 0;
        int32_t seen[SIDE] = {0};
        for (long i = start; i < whole; i += SIDE)
            for (int j = 0; j < SIDE; j++) {
                sums[j] += logits[i + j] >= floor ? x[i + j] : 0;
                seen[j] += logits[i + j] >= floor;
            }
        for (int j = 0; j < SIDE; j++) all += sums[j], *number += seen[j];
        for (long i = whole; i < end; i++)
            if (logits[i] >= floor) all += x[i], ++*number;
        total += all;
    }
    return total;
}

static double sum_of(const float *x, long count) {
    long all;
    return mass_from(x, x, count, -INFINITY, &all);
}

/* Whole numbers that are ordered like floats, and of which a compiler knows how to find the largest many at a time;
 * `if_nan` for what is no number. */
INLINE int32_t order_of(float value, int32_t if_nan) {
    int32_t bits;
    value += 0.0f; /* -0 becomes 0 */
    memcpy(&bits, &value, 4);
    const int32_t is_nan = -((bits & 0x7fffffff) > 0x7f800000); /* a mask: a choice here would cost the loop its vectors */
    return (if_nan & is_nan) | ((bits ^ (bits >> 31 & 0x7fffffff)) & ~is_nan);
}

INLINE int32_t largest_order(const float *x, long count, int32_t if_nan) {
    int32_t largest = INT32_MIN;
    for (long i = 0; i < count; i++) {
        int32_t order = order_of(x[i], if_nan);
        largest = order > largest ? order : largest;
    }
    return largest;
}

static float largest_of(const float *x, long count) {
    int32_t largest = largest_order(x, count, INT32_MIN);
    if (largest == INT32_MIN) return -INFINITY;
    largest ^= largest >> 31 & 0x7fffffff; /* as it was before order_of */
    float value;
    memcpy(&value, &largest, 4);
    return value;
}

/* The first largest, or the first that is no number */
static long first_largest(const float *x, long count) {
    int32_t largest = INT32_MIN;
    long place = 0;
    for (long start = 0; start < count; start += SUMMED) {
        int32_t here = largest_order(x + start, count - start < SUMMED ? count - start : SUMMED, INT32_MAX);
        if (here > largest) largest = here, place = start;
    }
    while (place < count && order_of(x[place], INT32_MAX) != largest) place++;
    return place;
}

/* x float [rows, width], out int64 [rows] */
CALL(argmax, int64_t x, out, rows, width;);

int minillm_argmax(const struct argmax_call *c) {
    for (long row = 0; row < c->rows; row++)
        ((int64_t *)(uintptr_t)c->out)[row] = first_largest((const float *)(uintptr_t)c->x + row * c->width, c->width);
    return 0;
}

/* Larger for likelier tokens, and among equals for lower ids: no two are equal. */
static uint64_t rank_of(float value, long id) {
    const uint32_t order = (uint32_t)order_of(value, 0) ^ 0x80000000u;
    return (uint64_t)order << 32 | (0xffffffffu - (uint32_t)id);
}

static long id_of(uint64_t rank) { return (long)(0xffffffffu - (uint32_t)rank); }

/* Moves the likeliest to the front, and returns how many it takes until their mass reaches `limit`, or `most` of them. */
static long likeliest(uint64_t *ranks, long count, const float *probs, double limit, long most) {
    long low = 0, high = count; /* those before `low` are taken, those from `high` on are not */
    double mass = 0;            /* of those before `low` */
    while (high - low > 1) {
        uint64_t a = ranks[low], b = ranks[low + (high - low) / 2], c = ranks[high - 1];
        uint64_t pivot = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        long middle = low;
        double some = 0; /* mass of those above the pivot */
        for (long i = low; i < high; i++)
            if (ranks[i] > pivot) {
                uint64_t rank = ranks[i];
                ranks[i] = ranks[middle], ranks[middle++] = rank;
                some += probs[id_of(rank)];
            }
        if (middle > low && (mass + some >= limit || middle >= most)) {
            high = middle;
            continue;
        }
        for (long i = middle; i < high; i++) /* the pivot next */
            if (ranks[i] == pivot) ranks[i] = ranks[middle], ranks[middle] = pivot;
        mass += some;
        if (middle + 1 >= most || mass + probs[id_of(pivot)] >= limit) return middle + 1;
        mass += probs[id_of(pivot)];
        low = middle + 1;
    }
    return high;
}

static int row_probabilities(const void *call, long row, int thread) {
    const struct probabilities_call *c = call;
    const long V = c->vocabulary;
    const float *logits = (const float *)(uintptr_t)c->logits + row * V;
    float *out = (float *)(uintptr_t)c->out + row * V;
    const float temperature = ((const float *)(uintptr_t)c->temperature)[row];
    const float top_p = c->top_p ? ((const float *)(uintptr_t)c->top_p)[row] : 1;
    const float min_p = c->min_p ? ((const float *)(uintptr_t)c->min_p)[row] : 0;
    const int64_t top_k = c->top_k ? ((const int64_t *)(uintptr_t)c->top_k)[row] : V;
    (void)thread;
    if (temperature == 0) {
        memset(out, 0, V * sizeof(float));
        return out[first_largest(logits, V)] = 1, 0;
    }
    int unbounded = 0;
    for (long i = 0; i < V; i++) unbounded |= !(logits[i] < INFINITY);
    const float best = largest_of(logits, V), top = best / temperature;
    if (unbounded || !(temperature > 0) || !isfinite(top)) { /* as a softmax of them is */
        for (long i = 0; i < V; i++) out[i] = NAN;
        return 0;
    }
    for (long i = 0; i < V; i++) {
        out[i] = exp_negative(logits[i] / temperature - top);
    }
    const float all = (float)sum_of(out, V);
    for (long i = 0; i < V; i++) out[i] /= all;
    const int by_count = top_k < V, by_mass = top_p < 1;
    if (!by_count && !by_mass && !(min_p > 0)) return 0;

    uint64_t *ranks = malloc(V * sizeof *ranks);
    if (!ranks) return 1;
    long near = 0;
    /* Those within `depth` nats of the best, if that proves to be enough, else twice as deep: all from 64 on, where nothing
     * is left of a share. 1e-6 and 1.01 are far more than the rounding of shares. */
    for (float depth = 8; near == 0; depth += depth) {
        const float floor = depth < 64 ? best - depth * temperature : -INFINITY;
        long count;
        const double mass = mass_from(logits, out, V, floor, &count);
        const int proven = by_count  ? count > top_k
                           : by_mass ? mass > top_p + 1e-6
                                     : min_p > 1.01f * exp_negative(-depth);
        if (!proven && floor > -INFINITY) continue;
        for (long i = 0; i < V; i++)
            if (logits[i] >= floor && out[i] > 0) ranks[near++] = rank_of(logits[i] / temperature, i);
        if (floor == -INFINITY) break; /* that was all there is */
    }
    long kept = near;
    double left = 1; /* mass that top-k leaves */
    if (by_count && top_k < near) {
        kept = likeliest(ranks, near, out, INFINITY, top_k);
        uint64_t last = UINT64_MAX;
        for (long i = 0; i < kept; i++) last = ranks[i] < last ? ranks[i] : last;
        for (long i = kept; i < near; i++) /* ties with the last stay */
            if (ranks[i] >> 32 == last >> 32) {
                uint64_t rank = ranks[i];
                ranks[i] = ranks[kept], ranks[kept++] = rank;
            }
    }
    if (by_count) {
        left = 0;
        for (long i = 0; i < kept; i++) left += out[id_of(ranks[i])];
    }
    if (by_mass) kept = likeliest(ranks, kept, out, top_p * left, kept);
    float largest = 0;
    for (long i = 0; i < kept; i++) largest = out[id_of(ranks[i])] > largest ? out[id_of(ranks[i])] : largest;
    /* What stays is marked by its sign, the rest becomes 0; the sum runs in the order of ids. */
    for (long i = 0; i < kept; i++)
        if (out[id_of(ranks[i])] >= min_p * largest) out[id_of(ranks[i])] *= -1;
    free(ranks);
    for (long i = 0; i < V; i++) out[i] = out[i] < 0 ? -out[i] : 0;
    const float rest = (float)sum_of(out, V);
    for (long i = 0; i < V; i++) out[i] /= rest;
    return 0;
}

int minillm_probabilities(const struct probabilities_call *c) {
    return minillm_parallel(c->rows, c->rows * c->vocabulary > 1 << 14 ? c->threads : 1, row_probabilities, c);
}

/* ---- the draw ---- */

/* probs [rows, vocabulary]; seed, position: int64 [rows]; out: int64 [rows] */
CALL(draw, int64_t probs, out, rows, vocabulary, seed, position, stream;);

static uint64_t mix(uint64_t z) { /* SplitMix64's finaliser */
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static double uniform(uint64_t seed, uint64_t place, uint64_t stream) {
    return (double)(mix(mix(mix(seed) ^ place) ^ stream) >> 11) * 0x1p-53;
}

/* The token at which the running sum passes its u-th part; never one without mass, where any has some */
static long pick(const float *probs, long count, double u) {
    double total = 0, passed = 0;
    for (long i = 0; i < count; i++) total += probs[i];
    long token = 0;
    while (token < count - 1 && !((passed += probs[token]) > u * total)) token++;
    return token;
}

int minillm_draw(const struct draw_call *c) {
    for (long row = 0; row < c->rows; row++) {
        const float *probs = (const float *)(uintptr_t)c->probs + row * c->vocabulary;
        const uint64_t seed = ((const uint64_t *)(uintptr_t)c->seed)[row];
        const uint64_t place = ((const uint64_t *)(uintptr_t)c->position)[row];
        ((int64_t *)(uintptr_t)c->out)[row] = pick(probs, c->vocabulary, uniform(seed, place, c->stream));
    }
    return 0;
}

/* ---- drafts: kept or not, and what follows them; minillm/speculative/verify.py says why ---- */

/* drafted int64 [rows, drafts]; draft_probs [rows, drafts, draft_vocabulary] with two strides, in floats; target_probs
 * [rows, drafts + 1, vocabulary]; lengths, seed, position (of the first draft): int64 [rows] -> accepted, next: int64
 * [rows] */
CALL(verify, int64_t drafted, draft_probs, row_stride, draft_stride, draft_vocabulary, target_probs, lengths, seed,
     position, stream, rows, drafts, vocabulary, accepted, next;);

int minillm_verify(const struct verify_call *c) {
    float *residual = malloc(sizeof(float) * c->vocabulary);
    if (!residual) return 1;
    for (long row = 0; row < c->rows; row++) {
        const int64_t *drafted = (const int64_t *)(uintptr_t)c->drafted + row * c->drafts;
        const float *q = (const float *)(uintptr_t)c->draft_probs + row * c->row_stride;
        const float *p = (const float *)(uintptr_t)c->target_probs + row * (c->drafts + 1) * c->vocabulary;
        const int64_t length = ((const int64_t *)(uintptr_t)c->lengths)[row];
        const uint64_t seed = ((const uint64_t *)(uintptr_t)c->seed)[row];
        const uint64_t place = ((const uint64_t *)(uintptr_t)c->position)[row];
        long kept = 0;
        for (; kept < length; kept++, q += c->draft_stride, p += c->vocabulary)
            if (!(uniform(seed, place + kept, c->stream) * q[drafted[kept]] < p[drafted[kept]])) break;
        if (kept < length) { /* rejected: what is missing from p */
            int some = 0, spoilt = 0;
            for (long i = 0; i < c->vocabulary; i++) {
                const float missing = i < c->draft_vocabulary ? p[i] - q[i] : p[i];
                residual[i] = missing > 0 ? missing : 0;
                some |= missing > 0, spoilt |= missing != missing;
            }
            if (some && !spoilt) p = residual; /* else p and q are equal but for rounding, or q is no distribution */
        }
        ((int64_t *)(uintptr_t)c->accepted)[row] = kept;
        ((int64_t *)(uintptr_t)c->next)[row] = pick(p, c->vocabulary, uniform(seed, place + kept, 0));
    }
    free(residual);
    return 0;
}
