/* What PyTorch computes between the kernels of a pass, to the bit (glue.py), and the angles of rotary embedding. */
#include "simd.h"
#include "threads.h"
#include "values.h"

/* Rows of a table. An id outside of it reads the first or the last one. */
CALL(lookup, int64_t ids, table, out, count, rows, bytes;);

int minillm_lookup(const struct lookup_call *c) {
    for (long i = 0; i < c->count; i++) {
        int64_t id = ((const int64_t *)(uintptr_t)c->ids)[i];
        id = id < 0 ? 0 : id < c->rows ? id : c->rows - 1;
        memcpy((char *)(uintptr_t)c->out + i * c->bytes, (const char *)(uintptr_t)c->table + id * c->bytes, c->bytes);
    }
    return 0;
}

CALL(scale, int64_t x, out, count, dtype; double factor;);

int minillm_scale(const struct scale_call *c) {
    const void *x = (const void *)(uintptr_t)c->x;
    for (long i = 0; i < c->count; i++)
        write_value((void *)(uintptr_t)c->out, i, (int)c->dtype, read_value(x, i, (int)c->dtype) * (float)c->factor);
    return 0;
}

CALL(widen, int64_t x, out, count, dtype;);

int minillm_widen(const struct widen_call *c) {
    const void *x = (const void *)(uintptr_t)c->x;
    float *out = (float *)(uintptr_t)c->out;
    if (c->dtype == BFLOAT16) for (long i = 0; i < c->count; i++) out[i] = read_value(x, i, BFLOAT16);
    else for (long i = 0; i < c->count; i++) out[i] = read_value(x, i, (int)c->dtype);
    return 0;
}

CALL(at_least, int64_t x, out, count, least;);

int minillm_at_least(const struct at_least_call *c) {
    for (long i = 0; i < c->count; i++) {
        int64_t value = ((const int64_t *)(uintptr_t)c->x)[i];
        ((int64_t *)(uintptr_t)c->out)[i] = value < c->least ? c->least : value;
    }
    return 0;
}

/* Elements of so many bytes into the order of their indices; n0 to n3 sizes, s0 to s3 strides in bytes */
CALL(arrange, int64_t from, to, bytes, n0, n1, n2, n3, s0, s1, s2, s3;);

int minillm_arrange(const struct arrange_call *c) {
    char *to = (char *)(uintptr_t)c->to;
    for (long a = 0; a < c->n0; a++)
        for (long b = 0; b < c->n1; b++)
            for (long d = 0; d < c->n2; d++) {
                const char *row = (const char *)(uintptr_t)c->from + a * c->s0 + b * c->s1 + d * c->s2;
                if (c->s3 == c->bytes) {
                    memcpy(to, row, c->n3 * c->bytes);
                    to += c->n3 * c->bytes;
                } else for (long e = 0; e < c->n3; e++, to += c->bytes) memcpy(to, row + e * c->s3, c->bytes);
            }
    return 0;
}

/* ---- cosine and sine of position * frequency ---- */

/* position int64 [batch, tokens]; frequency float [batch, half], or one row of it for all; cos, sin float */
CALL(angles, int64_t position, frequency, cos, sin, batch, tokens, half, shared, threads; double scale;);

enum { ANGLES_ALONE = 1 << 12 }; /* angles below which waking another thread takes longer */

static int token_angles(const void *call, long token, int thread) {
    const struct angles_call *c = call;
    const float position = (float)((const int64_t *)(uintptr_t)c->position)[token], scale = (float)c->scale;
    const float *frequency = (const float *)(uintptr_t)c->frequency + (c->shared ? 0 : token / c->tokens * c->half);
    float *cos = (float *)(uintptr_t)c->cos + token * c->half, *sin = (float *)(uintptr_t)c->sin + token * c->half;
    (void)thread;
    for (long j = 0; j < c->half; j++) {
        const float angle = position * frequency[j];
        cos[j] = cosf(angle) * scale;
        sin[j] = sinf(angle) * scale;
    }
    return 0;
}

int minillm_angles(const struct angles_call *c) {
    const long count = c->batch * c->tokens;
    return minillm_parallel(count, count * c->half > ANGLES_ALONE ? c->threads : 1, token_angles, c);
}
