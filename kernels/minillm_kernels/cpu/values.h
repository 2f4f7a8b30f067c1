/* What the C files share: reading and writing one value of a given dtype, e^x, and how they are called. */
enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  /* weight formats; the first three also type activations */
enum { NO_GATE, SILU, GELU_TANH, GELU, RELU, RELU2 };

INLINE float read_value(const void *p, long i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == BFLOAT16 ? bf16_to_float(bits) : half_to_float(bits);
}

INLINE void write_value(void *p, long i, int dtype, float value) {
    if (dtype == FLOAT32) ((float *)p)[i] = value;
    else ((uint16_t *)p)[i] = dtype == BFLOAT16 ? float_to_bf16(value) : float_to_half(value);
}

/* e^x for x <= 0 to about 1e-7 of its value, and 0 below e^-87; unlike expf it is a loop that the compiler vectorises */
INLINE float exp_negative(float x) {
    const float all = x < -87.0f ? 0.0f : 1.0f;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693145752f - n * 1.42860677e-6f; /* x = n ln 2 + r, ln 2 in two parts */
    float e = 0.041666667f + r * (0.0083333333f + r * 0.0013888889f);
    e = 1.0f + r * (1.0f + r * (0.5f + r * (0.16666667f + r * e)));
    uint32_t bits = ((uint32_t)(int32_t)n + 127) << 23; /* unsigned: of a NaN it is nonsense, and multiplies a NaN */
    float power;
    memcpy(&power, &bits, 4);
    return e * power * all;
}

/* Both activations are g times a sigmoid: 1 + tanh(z) = 2 sigmoid(2 z). */
INLINE float gated(int gate, float g, float up) {
    float z = gate == SILU ? g : 1.5957691216f * (g + 0.044715f * g * g * g);
    float e = exp_negative(-fabsf(z)); /* in 0..1: nothing overflows */
    return g * ((z < 0 ? e : 1.0f) / (1.0f + e)) * up;
}

/* Declares `struct NAME_call`, through which minillm_NAME takes its arguments (pointers as 64-bit integers: one packed
 * struct costs a Python caller half of what a list of arguments does), and exports the declaration as text, which
 * cpu/__init__.py compares with what it packs. */
#define CALL(name, ...)                 \
    struct name##_call { __VA_ARGS__ }; \
    const char minillm_##name##_layout[] = #__VA_ARGS__
