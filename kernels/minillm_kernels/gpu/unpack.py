"""Codes of weights become floats: the cheapest ways found, counted in instructions per weight.

An integer conversion (I2F) is made by a unit that takes 16 a clock, and at copy bandwidth an H200 multiprocessor
receives 16.5 int8 or 33 int4 weights a clock: half the speed of memory for int4. A float whose exponent fits has its
integer in the low bits of the mantissa, so a code dropped there *is* a float, of a known amount too much:

    0x4300qq00 << 8 = 128 + q   (q < 128)             0x4B0000qq = 2^23 + q   (q < 256)

One byte permutation (PRMT) per weight does it. Triton has no word for that, hence the assembly; its interpreter has no
assembly, hence the second form of each. tests/test_kernels_compile.py works the assembly through, instruction by
instruction, against the codes.
"""

import triton
import triton.language as tl

from minillm_kernels.gpu.softmax import INTERPRETED

# $0-$3: the floats of four bytes in $4. A signed byte with its top bit turned round is q + 128, so 2^23 + 128 too much.
INT8 = tl.constexpr("""{
    .reg .b32 u;
    xor.b32 u, $4, 0x80808080;
    prmt.b32 $0, u, 0x4B000000, 0x7540;
    prmt.b32 $1, u, 0x4B000000, 0x7541;
    prmt.b32 $2, u, 0x4B000000, 0x7542;
    prmt.b32 $3, u, 0x4B000000, 0x7543;
}""")
# $0-$3: 128 + the low halves of four bytes in $8; $4-$7: 128 + the high halves.
INT4 = tl.constexpr("""{
    .reg .b32 l, h;
    and.b32 l, $8, 0x0F0F0F0F;
    shr.b32 h, $8, 4;
    and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 $0, l, 0x43000000, 0x7044;
    prmt.b32 $1, l, 0x43000000, 0x7144;
    prmt.b32 $2, l, 0x43000000, 0x7244;
    prmt.b32 $3, l, 0x43000000, 0x7344;
    prmt.b32 $4, h, 0x43000000, 0x7044;
    prmt.b32 $5, h, 0x43000000, 0x7144;
    prmt.b32 $6, h, 0x43000000, 0x7244;
    prmt.b32 $7, h, 0x43000000, 0x7344;
}""")
# The same eight times $5-$8 and $9-$12, added up in $0. $1-$3 are -0, which an adder is spared: the compiler knows it.
INT4_DOT = tl.constexpr("""{
    .reg .b32 l, h, u;
    .reg .f32 f, p;
    and.b32 l, $4, 0x0F0F0F0F;
    shr.b32 h, $4, 4;
    and.b32 h, h, 0x0F0F0F0F;
    prmt.b32 u, l, 0x43000000, 0x7044; mov.b32 f, u; mul.rn.f32 p, f, $5;
    prmt.b32 u, l, 0x43000000, 0x7144; mov.b32 f, u; fma.rn.f32 p, f, $6, p;
    prmt.b32 u, l, 0x43000000, 0x7244; mov.b32 f, u; fma.rn.f32 p, f, $7, p;
    prmt.b32 u, l, 0x43000000, 0x7344; mov.b32 f, u; fma.rn.f32 p, f, $8, p;
    prmt.b32 u, h, 0x43000000, 0x7044; mov.b32 f, u; fma.rn.f32 p, f, $9, p;
    prmt.b32 u, h, 0x43000000, 0x7144; mov.b32 f, u; fma.rn.f32 p, f, $10, p;
    prmt.b32 u, h, 0x43000000, 0x7244; mov.b32 f, u; fma.rn.f32 p, f, $11, p;
    prmt.b32 u, h, 0x43000000, 0x7344; mov.b32 f, u; fma.rn.f32 $0, f, $12, p;
    mov.b32 $1, 0x80000000; mov.b32 $2, 0x80000000; mov.b32 $3, 0x80000000;
}""")


@triton.jit
def int8_to_float(codes):
    """int8 codes as float32, exactly."""
    if INTERPRETED:
        return codes.to(tl.float32)
    bits = tl.inline_asm_elementwise(INT8, "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def halves_plus_128(codes):
    """(128 + low half, 128 + high half) of uint8 codes as float32, exactly."""
    if INTERPRETED:
        return (codes & 15).to(tl.float32) + 128.0, (codes >> 4).to(tl.float32) + 128.0
    low, high = tl.inline_asm_elementwise(
        INT4, "=r,=r,=r,=r,=r,=r,=r,=r,r", [codes], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
    )
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def dot_plus_128(codes, a, b):
    """Something of the shape of `codes` whose sum along the last dimension, a multiple of 4 long, is that of
    (128 + low half) * a + (128 + high half) * b: one multiply-add per weight, where Triton by itself takes one and a
    half. a, b float32. Each thread has to hold stretches of 4 along that dimension; a test looks at the layout."""
    if INTERPRETED:
        low, high = halves_plus_128(codes)
        return low * a + high * b
    return tl.inline_asm_elementwise(
        INT4_DOT, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", [codes, a, b], dtype=tl.float32, is_pure=True, pack=4
    )
