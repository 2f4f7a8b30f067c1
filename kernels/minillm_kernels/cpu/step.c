/* What a decode step does between its matrix products: norms, activations, rotation with the cache write, attention.
 *
 * Each handles a few KB, so what costs is not arithmetic but getting started: in eager PyTorch a norm is
 * eight operator calls, a rotation twelve, at some microseconds each. Here each is one call. Arithmetic is
 * float32; values are rounded where PyTorch's own code rounds them. A row's result depends on no other row.
 */
#include <stdlib.h>

#include "simd.h"
#include "threads.h"
#include "values.h"

enum { SERIAL_WORK = 1 << 15 }; /* multiply-adds below which waking another thread takes longer */

INLINE vf load_lanes(const void *p, long i, int dtype) {
    if (dtype == FLOAT32) return vf_load((const float *)p + i);
    return dtype == BFLOAT16 ? vf_load_bf16((const uint16_t *)p + i) : vf_load_half((const uint16_t *)p + i);
}

INLINE void widen(const void *p, long start, long count, int dtype, float *wide) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) vf_store(wide + i, load_lanes(p, start + i, dtype));
    for (; i < count; i++) wide[i] = read_value(p, start + i, dtype);
}

INLINE float dot(const float *a, const float *b, long count) {
    vf sum = vf_zero();
    long i = 0;
    for (; i + LANES <= count; i += LANES) sum = vf_fma(vf_load(a + i), vf_load(b + i), sum);
    float total = vf_sum(sum);
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

INLINE float total(const float *a, long count) {
    vf sum = vf_zero();
    long i = 0;
    for (; i + LANES <= count; i += LANES) sum = vf_fma(vf_load(a + i), vf_set(1.0f), sum);
    float total = vf_sum(sum);
    for (; i < count; i++) total += a[i];
    return total;
}

INLINE void narrow(const float *wide, long count, int dtype, void *p, long start) {
    uint16_t *bits = (uint16_t *)p + start;
    if (dtype == FLOAT32) memcpy((float *)p + start, wide, count * sizeof(float));
    else if (dtype == BFLOAT16) for (long i = 0; i < count; i++) bits[i] = float_to_bf16(wide[i]);
    else for (long i = 0; i < count; i++) bits[i] = float_to_half(wide[i]);
}

/* ---- RMSNorm, or with `center` LayerNorm; the residual is added first if there is one ---- */

/* group: rows of x that lie side by side; group_stride: elements from one such group to the next */
CALL(rms_norm, int64_t x, residual, weight, bias, out, sum, rows, width, dtype, multiply_in_fp32, center, threads,
     group, group_stride; double eps, offset;);

enum { NORM_ROWS = 8 }; /* that share a widened weight: a piece of the work */

static int norm_rows(const void *call, long piece, int thread) {
    const struct rms_norm_call *c = call;
    const void *x = (const void *)(uintptr_t)c->x, *residual = (const void *)(uintptr_t)c->residual;
    const void *weight = (const void *)(uintptr_t)c->weight, *bias = (const void *)(uintptr_t)c->bias;
    void *out = (void *)(uintptr_t)c->out, *sum = (void *)(uintptr_t)c->sum;
    const long width = c->width, first = piece * NORM_ROWS;
    const long end = c->rows < first + NORM_ROWS ? c->rows : first + NORM_ROWS;
    const int dtype = (int)c->dtype;
    const float offset = (float)c->offset;
    (void)thread;
    float *wide = malloc(sizeof(float) * 4 * width), *w = wide + width, *other = w + width, *b = other + width;
    if (!wide) return 1;
    widen(weight, 0, width, dtype, w);
    if (bias) widen(bias, 0, width, dtype, b);
    for (long row = first; row < end; row++) {
        long start = row * width;
        widen(x, row / c->group * c->group_stride + row % c->group * width, width, dtype, wide);
        if (residual) {
            widen(residual, start, width, dtype, other);
            for (long i = 0; i < width; i++) wide[i] += other[i];
            narrow(wide, width, dtype, sum, start);
            widen(sum, start, width, dtype, wide); /* rounded: this is what the next layer will see */
        }
        if (c->center) {
            float mean = total(wide, width) / (float)width;
            for (long i = 0; i < width; i++) wide[i] -= mean;
        }
        float scale = 1.0f / sqrtf(dot(wide, wide, width) / (float)width + (float)c->eps);
        for (long i = 0; i < width; i++) wide[i] *= scale;
        if (!c->multiply_in_fp32 && dtype != FLOAT32) { /* rounded before the weight, too */
            narrow(wide, width, dtype, out, start);
            widen(out, start, width, dtype, wide);
        }
        for (long i = 0; i < width; i++) wide[i] *= c->multiply_in_fp32 ? offset + w[i] : w[i];
        if (bias) for (long i = 0; i < width; i++) wide[i] += b[i];
        narrow(wide, width, dtype, out, start);
    }
    free(wide);
    return 0;
}

int minillm_rms_norm(const struct rms_norm_call *c) {
    long threads = c->rows * c->width > SERIAL_WORK ? c->threads : 1;
    return minillm_parallel((c->rows + NORM_ROWS - 1) / NORM_ROWS, threads, norm_rows, c);
}

/* ---- x + y, rounded to their dtype ---- */

CALL(add, int64_t x, y, out, count, dtype, threads;);

enum { ADDED = 1024 }; /* elements in a piece of the work */

static int add_piece(const void *call, long i, int thread) {
    const struct add_call *c = call;
    long start = i * ADDED, count = c->count - start < ADDED ? c->count - start : ADDED;
    float x[ADDED], y[ADDED];
    (void)thread;
    widen((const void *)(uintptr_t)c->x, start, count, (int)c->dtype, x);
    widen((const void *)(uintptr_t)c->y, start, count, (int)c->dtype, y);
    for (long k = 0; k < count; k++) x[k] += y[k];
    narrow(x, count, (int)c->dtype, (void *)(uintptr_t)c->out, start);
    return 0;
}

int minillm_add(const struct add_call *c) {
    return minillm_parallel((c->count + ADDED - 1) / ADDED, c->count > SERIAL_WORK ? c->threads : 1, add_piece, c);
}

/* ---- activations: of each element, or of a first half of `width` elements times the second ---- */

CALL(activate, int64_t x, out, rows, width, kind, gated, dtype, threads;);

/* erf to 2e-7 (Abramowitz and Stegun 7.1.26), in a loop that the compiler vectorises */
INLINE float erf_near(float x) {
    float a = fabsf(x), t = 1.0f / (1.0f + 0.3275911f * a);
    float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1.0f - p * exp_negative(-a * a), x);
}

/* Written out per kind, so that each is one loop. 1 + tanh(z) = 2 sigmoid(2 z). */
INLINE void activate_values(float *x, long count, int kind) {
    if (kind == RELU) for (long i = 0; i < count; i++) x[i] = x[i] < 0 ? 0 : x[i];
    else if (kind == RELU2) for (long i = 0; i < count; i++) x[i] = x[i] < 0 ? 0 : x[i] * x[i];
    else if (kind == GELU) for (long i = 0; i < count; i++) x[i] *= 0.5f * (1.0f + erf_near(x[i] * 0.7071067812f));
    else for (long i = 0; i < count; i++) {
        float z = kind == SILU ? x[i] : 1.5957691216f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        float e = exp_negative(-fabsf(z));
        x[i] *= (z < 0 ? e : 1.0f) / (1.0f + e);
    }
}

static int activate_piece(const void *call, long i, int thread) {
    const struct activate_call *c = call;
    const long pieces = (c->width + ADDED - 1) / ADDED, row = i / pieces, start = i % pieces * ADDED;
    const long count = c->width - start < ADDED ? c->width - start : ADDED;
    const void *from = (const void *)(uintptr_t)c->x;
    const long first = row * c->width * (c->gated ? 2 : 1) + start;
    float x[ADDED], up[ADDED];
    (void)thread;
    widen(from, first, count, (int)c->dtype, x);
    switch (c->kind) {
        case SILU: activate_values(x, count, SILU); break;
        case GELU_TANH: activate_values(x, count, GELU_TANH); break;
        case GELU: activate_values(x, count, GELU); break;
        case RELU: activate_values(x, count, RELU); break;
        case RELU2: activate_values(x, count, RELU2); break;
    }
    if (c->gated) {
        widen(from, first + c->width, count, (int)c->dtype, up);
        for (long k = 0; k < count; k++) x[k] *= up[k];
    }
    narrow(x, count, (int)c->dtype, (void *)(uintptr_t)c->out, row * c->width + start);
    return 0;
}

int minillm_activate(const struct activate_call *c) {
    long pieces = c->rows * ((c->width + ADDED - 1) / ADDED);
    return minillm_parallel(pieces, 8 * c->rows * c->width > SERIAL_WORK ? c->threads : 1, activate_piece, c);
}

/* ---- rotate queries and keys, put keys and values into their cache slots ---- */

/* q_row to v_token: strides in elements; heads lie side by side */
CALL(rope_and_cache_write, int64_t q, k, v, cos, sin, k_cache, v_cache, position, out, batch, tokens, heads, kv_heads,
     head_dim, half, slots, dtype, q_row, q_token, k_row, k_token, v_row, v_token, threads;);

INLINE void rotate_head(const void *from, long start, void *to, long target, const float *cos, const float *sin,
                        long half, long head_dim, int dtype) {
    float wide[2 * head_dim], *turned = wide + head_dim;
    widen(from, start, head_dim, dtype, wide);
    for (long j = 0; j < half; j++) turned[j] = wide[j] * cos[j] - wide[half + j] * sin[j];
    for (long j = 0; j < half; j++) turned[half + j] = wide[half + j] * cos[j] + wide[j] * sin[j];
    for (long j = 2 * half; j < head_dim; j++) turned[j] = wide[j];
    narrow(turned, head_dim, dtype, to, target);
}

static int rotate_token(const void *call, long token, int thread) {
    const struct rope_and_cache_write_call *c = call;
    const int64_t position = ((const int64_t *)(uintptr_t)c->position)[token];
    const long D = c->head_dim, size = c->dtype == FLOAT32 ? 4 : 2, b = token / c->tokens, t = token % c->tokens;
    const long slot = position < 0 ? c->slots : position % c->slots; /* padding goes to the bin */
    const float *cos = (const float *)(uintptr_t)c->cos + token * c->half;
    const float *sin = (const float *)(uintptr_t)c->sin + token * c->half;
    (void)thread;
    for (long h = 0; h < c->heads; h++)
        rotate_head((const void *)(uintptr_t)c->q, b * c->q_row + t * c->q_token + h * D,
                    (void *)(uintptr_t)c->out, ((b * c->heads + h) * c->tokens + t) * D, cos, sin, c->half, D,
                    (int)c->dtype);
    for (long h = 0; h < c->kv_heads; h++) {
        long target = ((b * c->kv_heads + h) * (c->slots + 1) + slot) * D;
        rotate_head((const void *)(uintptr_t)c->k, b * c->k_row + t * c->k_token + h * D,
                    (void *)(uintptr_t)c->k_cache, target, cos, sin, c->half, D, (int)c->dtype);
        memcpy((char *)(uintptr_t)c->v_cache + target * size,
               (const char *)(uintptr_t)c->v + (b * c->v_row + t * c->v_token + h * D) * size, D * size);
    }
    return 0;
}

int minillm_rope_and_cache_write(const struct rope_and_cache_write_call *c) {
    long tokens = c->batch * c->tokens, work = tokens * (c->heads + 2 * c->kv_heads) * c->head_dim;
    return minillm_parallel(tokens, work > SERIAL_WORK ? c->threads : 1, rotate_token, c);
}

/* ---- attention of a few tokens over the cache ---- */

/* q [batch, heads, tokens, head_dim], out [batch, tokens, heads, head_dim]; window 0, softcap 0: none */
CALL(decode_attention, int64_t q, k, v, position, slopes, out, batch, heads, kv_heads, tokens, head_dim, slots,
     row_stride, head_stride, dtype, window, threads; double scale, softcap;);

enum { TOGETHER = 4 }; /* keys, or values, in a piece of the work */

/* Widen what stands at up to TOGETHER positions from `position` on, `count` of them at most, into rows of `wide`. */
INLINE void widen_slots(const struct decode_attention_call *c, const void *from, long base, long position, long count,
                        long wide_D, float *wide) {
    long slot = position % c->slots;
    for (long j = 0; j < TOGETHER && j < count; j++, slot = slot + 1 == c->slots ? 0 : slot + 1) {
        const long start = base + slot * c->head_dim;
        if (c->dtype == FLOAT32) widen(from, start, c->head_dim, FLOAT32, wide + j * wide_D);
        else if (c->dtype == BFLOAT16) widen(from, start, c->head_dim, BFLOAT16, wide + j * wide_D);
        else widen(from, start, c->head_dim, FLOAT16, wide + j * wide_D);
    }
}

/* `count` query rows from `first` on, of those that share key head `kv` of batch row `b`; query row r is
 * head kv * group + r / tokens at token r % tokens. Returns 1 if there is no memory for the scores. */
static int attend_rows(const struct decode_attention_call *c, long b, long kv, long first, long count) {
    const int64_t *position = (const int64_t *)(uintptr_t)c->position + b * c->tokens;
    const void *k = (const void *)(uintptr_t)c->k, *v = (const void *)(uintptr_t)c->v;
    const float *slopes = (const float *)(uintptr_t)c->slopes;
    long D = c->head_dim, T = c->tokens, group = c->heads / c->kv_heads, base = b * c->row_stride + kv * c->head_stride;
    int dtype = (int)c->dtype;
    long last = -1, lowest = -1; /* positions that any of the rows sees */
    for (long t = 0; t < T; t++) {
        if (position[t] < 0) continue;
        long low = c->window && position[t] >= c->window ? position[t] - c->window + 1 : 0;
        last = position[t] > last ? position[t] : last;
        lowest = lowest < 0 || low < lowest ? low : lowest;
    }
    /* The slots hold the newest positions. A position past the end of a cache that is no ring sees no more than they. */
    if (last - lowest >= c->slots) lowest = last - c->slots + 1;
    long keys = last < 0 ? 0 : last - lowest + 1, stride = keys + LANES;
    long wide_D = (D + LANES - 1) / LANES * LANES; /* with zeros behind, so that no loop has an end of its own */
    float *scores = malloc(sizeof(float) * (count * stride + (2 * count + TOGETHER) * wide_D));
    if (!scores) return 1;
    float *query = scores + count * stride, *sums = query + count * wide_D, *wide = sums + count * wide_D;
    memset(query, 0, sizeof(float) * (2 * count + TOGETHER) * wide_D);
    for (long r = 0; r < count; r++) {
        long head = kv * group + (first + r) / T, t = (first + r) % T;
        widen((const void *)(uintptr_t)c->q, ((b * c->heads + head) * T + t) * D, D, dtype, query + r * wide_D);
    }
    for (long n = 0; n < keys; n += TOGETHER) { /* keys are read once for all rows */
        widen_slots(c, k, base, lowest + n, keys - n, wide_D, wide);
        for (long r = 0; r < count; r++) {
            vf products[TOGETHER] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
            for (long i = 0; i < wide_D; i += LANES) {
                vf q = vf_load(query + r * wide_D + i);
                for (int j = 0; j < TOGETHER; j++) products[j] = vf_fma(q, vf_load(wide + j * wide_D + i), products[j]);
            }
            vf_store_quad(scores + r * stride + n, vf_quads(products)); /* past the last key: there is room */
        }
    }
    for (long r = 0; r < count; r++) {
        float *row = scores + r * stride, largest = -INFINITY, total = 0;
        long place = position[(first + r) % T], head = kv * group + (first + r) / T;
        long from = c->window && place >= c->window ? place - c->window + 1 - lowest : 0;
        long end = place < 0 ? 0 : place - lowest + 1; /* it sees [from, end) */
        from = from < 0 ? 0 : from;
        end = end < 0 ? 0 : end;
        for (long n = from; n < end; n++) {
            float score = row[n] * (float)c->scale;
            if (c->softcap > 0) score = (float)c->softcap * tanhf(score / (float)c->softcap);
            if (slopes) score += slopes[head] * (float)(lowest + n - place);
            row[n] = score;
            largest = score > largest ? score : largest;
        }
        for (long n = 0; n < from; n++) row[n] = 0;
        for (long n = from; n < end; n++) row[n] = exp_negative(row[n] - largest);
        for (long n = from; n < end; n++) total += row[n];
        for (long n = from; n < end; n++) row[n] /= total;
        for (long n = end; n < keys; n++) row[n] = 0;
    }
    for (long n = 0; n < keys; n += TOGETHER) {
        long some = keys - n < TOGETHER ? keys - n : TOGETHER;
        widen_slots(c, v, base, lowest + n, some, wide_D, wide);
        for (long r = 0; r < count; r++) {
            const float *weights = scores + r * stride + n;
            int seen[TOGETHER], number = 0; /* what a row does not see may be no number: it is left out */
            for (int j = 0; j < some; j++)
                if (weights[j] != 0) seen[number++] = j;
            for (long i = 0; number && i < wide_D; i += LANES) {
                vf sum = vf_load(sums + r * wide_D + i);
                for (int s = 0; s < number; s++)
                    sum = vf_fma(vf_set(weights[seen[s]]), vf_load(wide + seen[s] * wide_D + i), sum);
                vf_store(sums + r * wide_D + i, sum);
            }
        }
    }
    for (long r = 0; r < count; r++) {
        long head = kv * group + (first + r) / T, t = (first + r) % T;
        for (long i = 0; i < D; i++)
            write_value((void *)(uintptr_t)c->out, ((b * T + t) * c->heads + head) * D + i, dtype,
                        sums[r * wide_D + i]);
    }
    free(scores);
    return 0;
}

struct split { /* with fewer key heads than threads, the query rows of each are split */
    const struct decode_attention_call *c;
    long rows, parts;
};

static int attend_part(const void *context, long i, int thread) {
    const struct split *split = context;
    const long each = (split->rows + split->parts - 1) / split->parts, first = i % split->parts * each;
    const long count = split->rows - first < each ? split->rows - first : each, head = i / split->parts;
    (void)thread;
    if (count <= 0) return 0;
    return attend_rows(split->c, head / split->c->kv_heads, head % split->c->kv_heads, first, count);
}

int minillm_decode_attention(const struct decode_attention_call *c) {
    long heads = c->batch * c->kv_heads, rows = c->heads / c->kv_heads * c->tokens, longest = 0;
    struct split split = {c, rows, (c->threads + heads - 1) / heads};
    if (split.parts > rows) split.parts = rows;
    for (long i = 0; i < c->batch * c->tokens; i++) {
        int64_t place = ((const int64_t *)(uintptr_t)c->position)[i];
        longest = place > longest ? place : longest;
    }
    longest = longest > c->slots ? c->slots : longest;
    long threads = heads * rows * longest * c->head_dim > SERIAL_WORK ? c->threads : 1;
    return minillm_parallel(heads * split.parts, threads, attend_part, &split);
}
