/* Reading and writing one value of a given dtype. */
enum { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  /* weight formats; the first three also type activations */

INLINE float read_value(const void *p, long i, int dtype) {
    if (dtype == FLOAT32) return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return dtype == BFLOAT16 ? bf16_to_float(bits) : half_to_float(bits);
}

INLINE void write_value(void *p, long i, int dtype, float value) {
    if (dtype == FLOAT32) ((float *)p)[i] = value;
    else ((uint16_t *)p)[i] = dtype == BFLOAT16 ? float_to_bf16(value) : float_to_half(value);
}
