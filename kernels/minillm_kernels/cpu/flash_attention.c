/* Attention of many tokens over the cache, for prefill: softmax(q k^T) v without ever holding all scores.
 *
 * FlashAttention (arXiv 2205.14135) with panel.h's products: WIDTH query rows, which share a key head, are a panel.
 * Block by block of KEYS positions their scores are made, [KEYS, WIDTH], so that the running maximum and sum of each
 * query are a lane of their own; then the weights are a panel that the block's values multiply. Blocks begin at
 * multiples of KEYS, whatever the queries: while values are finite, a query's result does not depend on which others
 * stand in its panel.
 */
#include "panel.h"

enum { KEYS = 2 * ROWS }; /* positions in a block */

CALL(flash_attention, int64_t q, k, v, position, slopes, out, batch, heads, kv_heads, tokens, head_dim, slots,
     row_stride, head_stride, dtype, window, threads; double scale, softcap;);

struct flash {
    struct flash_attention_call c;
    int pairs, size;                   /* whether units are pairs of bf16; bytes of an element */
    long group, panels;                /* query heads to a key head; panels of their rows */
    long units, key_units;             /* of a head and of a block's keys, filled up */
    long value_rows, wide;             /* channels, rounded up to ROWS and to LANES */
};

/* What a panel works with: memory of one piece */
struct work {
    unit *query, *weights;             /* panels: [units, columns], [key_units, columns] */
    unit *keys, *values;               /* [KEYS, units] where they cannot be read in place; [value_rows, key_units] */
    unit *lines;                       /* the block's values before they are turned: [key_units, wide] */
    float *scores, *sums;              /* [KEYS, WIDTH], [value_rows, WIDTH] */
    float largest[WIDTH], total[WIDTH], slope[WIDTH];
    float position[WIDTH], oldest[WIDTH]; /* counted from `origin`: exact, whatever the positions are */
    long origin, last;                 /* where the first block begins; the last position that a query sees */
    int registers;
};

/* Query row r of those that share a key head: token r / group, head kv * group + r % group. So neighbours in a panel
 * see about the same keys. */
static long start_of_query(const struct flash *f, long b, long kv, long row) {
    return ((b * f->c.heads + kv * f->group + row % f->group) * f->c.tokens + row / f->group) * f->c.head_dim;
}

INLINE void pack_queries(const struct flash *f, int pairs, int dtype, long b, long kv, long first, struct work *w) {
    const long rows = f->group * f->c.tokens, width = w->registers * LANES, D = f->c.head_dim;
    const void *q = (const void *)(uintptr_t)f->c.q;
    memset(w->query, 0, sizeof(unit) * f->units * width);
    for (long i = 0; i < width && first + i < rows; i++) {
        long start = start_of_query(f, b, kv, first + i);
        for (long d = 0; d < D; d++) {
            long place = pairs ? d / 2 * 2 * width + 2 * i + d % 2 : d * width + i;
            units_of(q, dtype, start + d, 1, pairs, (char *)w->query + place * (pairs ? 2 : 4));
        }
    }
}

/* Where each query of the panel stands, and the positions that any of them sees */
INLINE void find_positions(const struct flash *f, long b, long kv, long first, struct work *w) {
    const int64_t *position = (const int64_t *)(uintptr_t)f->c.position + b * f->c.tokens;
    const float *slopes = (const float *)(uintptr_t)f->c.slopes;
    const long rows = f->group * f->c.tokens;
    long newest = -1, first_seen = -1, places[WIDTH], from[WIDTH];
    w->last = -1;
    for (long t = 0; t < f->c.tokens; t++) newest = position[t] > newest ? position[t] : newest;
    for (long i = 0; i < WIDTH; i++) {
        long row = first + i, place = row < rows ? position[row / f->group] : -1;
        long oldest = f->c.window && place >= f->c.window ? place - f->c.window + 1 : 0;
        /* The slots hold the newest positions: past the end of a cache that is no ring a query sees no more. */
        if (newest - oldest >= f->c.slots) oldest = newest - f->c.slots + 1;
        places[i] = place, from[i] = oldest;
        w->slope[i] = slopes && row < rows ? slopes[kv * f->group + row % f->group] : 0;
        w->largest[i] = -1e30f, w->total[i] = 0;
        if (place < 0) continue;
        first_seen = first_seen < 0 || oldest < first_seen ? oldest : first_seen;
        w->last = place > w->last ? place : w->last;
    }
    w->origin = first_seen < 0 ? 0 : first_seen / KEYS * KEYS;
    for (long i = 0; i < WIDTH; i++) {
        w->position[i] = places[i] < 0 ? -1 : (float)(places[i] - w->origin);
        w->oldest[i] = (float)(from[i] - w->origin);
    }
}

/* The keys at positions `begin` to begin + KEYS - 1, as rows of units: in the cache if they lie there side by side. */
INLINE const unit *keys_of(const struct flash *f, int pairs, int dtype, long base, long begin, long last,
                           struct work *w, long *stride) {
    const void *k = (const void *)(uintptr_t)f->c.k;
    const long D = f->c.head_dim, slot = begin % f->c.slots;
    *stride = f->units;
    if ((pairs || dtype == FLOAT32) && D * f->size == f->units * 4 && slot + KEYS <= f->c.slots)
        return (const unit *)((const char *)k + (base + slot * D) * f->size);
    memset(w->keys, 0, sizeof(unit) * KEYS * f->units);
    for (long n = 0; n < KEYS && n <= last - begin; n++) {
        units_of(k, dtype, base + (begin + n) % f->c.slots * D, D, pairs, w->keys + n * f->units);
    }
    return w->keys;
}

/* The values there, turned: a row for each channel. Returns whether all of them are finite numbers. */
INLINE int values_of(const struct flash *f, int pairs, int dtype, long base, long begin, long last, struct work *w) {
    const void *v = (const void *)(uintptr_t)f->c.v;
    const long D = f->c.head_dim, wide = f->wide;
    const uint16_t exponent = dtype == BFLOAT16 ? 0x7f80 : 0x7c00;
    int unbounded = 0; /* whether a value is infinite or no number */
    memset(w->lines, 0, sizeof(unit) * f->key_units * wide);
    for (long n = 0; n < KEYS && n <= last - begin; n++) {
        long start = base + (begin + n) % f->c.slots * D;
        const float *wide_v = (const float *)v + start;
        if (dtype == FLOAT32) for (long d = 0; d < D; d++) unbounded |= !(fabsf(wide_v[d]) < INFINITY);
        else for (long d = 0; d < D; d++) unbounded |= (((const uint16_t *)v)[start + d] & exponent) == exponent;
        if (!pairs) units_of(v, dtype, start, D, 0, w->lines + n * wide);
        else { /* of an even position the low halves of units, of the one after it the high ones */
            uint32_t __attribute__((may_alias)) *line = (void *)(w->lines + n / 2 * wide);
            for (long d = 0; d < D; d++) line[d] |= (uint32_t)((const uint16_t *)v)[start + d] << n % 2 * 16;
        }
    }
    for (long k = 0; k < f->key_units; k += LANES)
        for (long d = 0; d < wide; d += LANES)
            turn(w->lines + k * wide + d, wide, w->values + d * f->key_units + k, f->key_units);
    return !unbounded;
}

/* Scores become weights: e^(score - the largest so far), 0 for what a query does not see. What was summed up with a
 * smaller `largest` is scaled down. The block begins at `begin`, counted from the origin. */
INLINE void weigh(const struct flash *f, int pairs, long begin, struct work *w) {
    const struct flash_attention_call *c = &f->c;
    const long width = w->registers * LANES;
    float largest[WIDTH], shrink[WIDTH], position[WIDTH], oldest[WIDTH]; /* copies: nothing else can lie there */
    memcpy(largest, w->largest, sizeof largest);
    memcpy(position, w->position, sizeof position);
    memcpy(oldest, w->oldest, sizeof oldest);
    int some = 0; /* whether a query does not see all of the block */
    for (long i = 0; i < width; i++) some |= (float)(begin + KEYS - 1) > position[i] || (float)begin < oldest[i];
    for (long n = 0; n < KEYS; n++) {
        float *row = w->scores + n * WIDTH, place = (float)(begin + n);
        for (long i = 0; i < width; i++) row[i] *= (float)c->scale;
        if (c->softcap > 0) for (long i = 0; i < width; i++) { /* tanh |z| = (1 - e^-2|z|) / (1 + e^-2|z|) */
            float e = exp_negative(-2 * fabsf(row[i] / (float)c->softcap));
            row[i] = copysignf((float)c->softcap * ((1 - e) / (1 + e)), row[i]);
        }
        if (c->slopes) for (long i = 0; i < width; i++) row[i] += w->slope[i] * (place - w->position[i]);
        if (some) for (long i = 0; i < width; i++)
            row[i] = place <= position[i] && place >= oldest[i] ? row[i] : -INFINITY;
        for (long i = 0; i < width; i++) largest[i] = row[i] > largest[i] ? row[i] : largest[i];
    }
    int grown = 0;
    for (long i = 0; i < width; i++) grown |= largest[i] != w->largest[i];
    for (long i = 0; i < width; i++) shrink[i] = exp_negative(w->largest[i] - largest[i]);
    if (grown) {
        for (long d = 0; d < c->head_dim; d++)
            for (long i = 0; i < width; i++) w->sums[d * WIDTH + i] *= shrink[i];
        for (long i = 0; i < width; i++) w->total[i] *= shrink[i];
        memcpy(w->largest, largest, sizeof largest);
    }
    for (long n = 0; n < KEYS; n++) {
        float *row = w->scores + n * WIDTH;
        /* 0 of what is not seen. A NaN stays: it is a query that sees one. */
        for (long i = 0; i < width; i++) row[i] = exp_negative(row[i] - largest[i]);
        for (long i = 0; i < width; i++) w->total[i] += row[i];
        if (!pairs) memcpy(w->weights + n * width, row, sizeof(float) * width);
    }
    for (long n = 0; pairs && n < KEYS; n += 2) {
        uint32_t __attribute__((may_alias)) *to = (void *)(w->weights + n / 2 * width);
        const float *even = w->scores + n * WIDTH, *odd = even + WIDTH;
        for (long i = 0; i < width; i++) to[i] = float_to_bf16(even[i]) | (uint32_t)float_to_bf16(odd[i]) << 16;
    }
}

/* What panel.h's product would do, but for queries that see only finite values: 0 * inf is no number. */
INLINE void add_seen_values(const struct flash *f, int dtype, long base, long begin, long last, struct work *w) {
    const void *v = (const void *)(uintptr_t)f->c.v;
    const long D = f->c.head_dim, width = w->registers * LANES;
    for (long n = 0; n < KEYS && n <= last - begin; n++) {
        const long start = base + (begin + n) % f->c.slots * D;
        for (long i = 0; i < width; i++)
            for (long d = 0; w->scores[n * WIDTH + i] != 0 && d < D; d++)
                w->sums[d * WIDTH + i] += w->scores[n * WIDTH + i] * read_value(v, start + d, dtype);
    }
}

INLINE int attend_panel(const struct flash *f, int pairs, int dtype, long piece) {
    const struct flash_attention_call *c = &f->c;
    /* The last panels see most: they come first, so that threads end together. */
    const long panel = f->panels - 1 - piece % f->panels, kv = piece / f->panels % c->kv_heads;
    const long b = piece / f->panels / c->kv_heads, first = panel * WIDTH, rows = f->group * c->tokens;
    const long base = b * c->row_stride + kv * c->head_stride, left = rows - first;
    struct work w = {.registers = left >= WIDTH ? REGISTERS : (int)((left + LANES - 1) / LANES)};
    const size_t sizes[] = {f->units * WIDTH, f->key_units * WIDTH, KEYS * f->units, f->value_rows * f->key_units,
                            f->key_units * f->wide, KEYS * WIDTH, f->value_rows * WIDTH};
    unit **parts[] = {&w.query, &w.weights, &w.keys, &w.values, &w.lines, (unit **)&w.scores, (unit **)&w.sums};
    size_t all = 0;
    for (int i = 0; i < 7; i++) all += (sizes[i] + 15) / 16 * 16;
    unit *memory = aligned_alloc(64, all * 4);
    if (!memory) return 1;
    for (size_t i = 0, at = 0; i < 7; at += (sizes[i] + 15) / 16 * 16, i++) *parts[i] = memory + at;
    find_positions(f, b, kv, first, &w);
    pack_queries(f, pairs, dtype, b, kv, first, &w);
    memset(w.weights, 0, sizeof(unit) * f->key_units * WIDTH);
    memset(w.values, 0, sizeof(unit) * f->value_rows * f->key_units);
    memset(w.sums, 0, sizeof(float) * f->value_rows * WIDTH);
    for (long passed = 0; passed <= w.last - w.origin; passed += KEYS) {
        const long begin = w.origin + passed;
        long stride;
        const unit *keys = keys_of(f, pairs, dtype, base, begin, w.last, &w, &stride);
        memset(w.scores, 0, sizeof(float) * KEYS * WIDTH);
        multiply(pairs, w.registers, keys, stride, KEYS, f->units, w.query, w.scores);
        weigh(f, pairs, passed, &w);
        if (values_of(f, pairs, dtype, base, begin, w.last, &w))
            multiply(pairs, w.registers, w.values, f->key_units, c->head_dim, f->key_units, w.weights, w.sums);
        else add_seen_values(f, dtype, base, begin, w.last, &w);
    }
    for (long i = 0; i < WIDTH && first + i < rows; i++) {
        const float share = w.total[i] == 0 ? 0 : 1 / w.total[i];
        const long t = (first + i) / f->group, head = kv * f->group + (first + i) % f->group;
        for (long d = 0; d < c->head_dim; d++)
            write_value((void *)(uintptr_t)c->out, ((b * c->tokens + t) * c->heads + head) * c->head_dim + d, dtype,
                        w.sums[d * WIDTH + i] * share);
    }
    free(memory);
    return 0;
}

static int attend_piece(const void *context, long i, int thread) {
    const struct flash *f = context;
    (void)thread;
    if (f->c.dtype == FLOAT32) return attend_panel(f, 0, FLOAT32, i);
    if (f->c.dtype == FLOAT16) return attend_panel(f, 0, FLOAT16, i);
#ifdef BF16_DOT
    return attend_panel(f, 1, BFLOAT16, i);
#else
    return attend_panel(f, 0, BFLOAT16, i);
#endif
}

/* Arguments and result as for minillm_decode_attention. */
int minillm_flash_attention(const struct flash_attention_call *c) {
    struct flash f = {.c = *c, .pairs = PAIRS(c->dtype, BFLOAT16), .size = c->dtype == FLOAT32 ? 4 : 2};
    f.group = c->heads / c->kv_heads;
    f.panels = (f.group * c->tokens + WIDTH - 1) / WIDTH;
    f.units = whole_units(f.pairs, c->head_dim);
    f.key_units = whole_units(f.pairs, KEYS);
    f.value_rows = (c->head_dim + ROWS - 1) / ROWS * ROWS;
    f.wide = (c->head_dim + LANES - 1) / LANES * LANES;
    return minillm_parallel(c->batch * c->kv_heads * f.panels, c->threads, attend_piece, &f);
}
