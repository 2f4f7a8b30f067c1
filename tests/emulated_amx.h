/* Stands in for the AMX instructions where the CPU has none: `cc -D__AMX_BF16__ -include emulated_amx.h`. What the
 * kernels do with tiles is then compiled and tested as it is; Intel's manual says what each instruction does. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static _Thread_local struct {
    int configured;
    uint8_t rows[8][16][64];
} emulated;

static float emulated_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline void emulated_configure(const uint8_t *configuration) {
    emulated.configured = configuration[0] == 1;
    for (int i = 0; i < 8; i++) /* bytes of a row and rows, of each tile: all of them whole */
        if (configuration[16 + 2 * i] != 64 || configuration[48 + i] != 16) emulated.configured = 0;
}

static inline void emulated_move(int number, uint8_t *memory, long stride, int store) {
    if (!emulated.configured) __builtin_trap();
    for (int row = 0; row < 16; row++) {
        if (store) memcpy(memory + row * stride, emulated.rows[number][row], 64);
        else memcpy(emulated.rows[number][row], memory + row * stride, 64);
    }
}

static inline void emulated_multiply(int sum, int a, int b) {
    if (!emulated.configured) __builtin_trap();
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 16; n++) {
                float total;
                uint16_t left[2], right[2];
                memcpy(&total, emulated.rows[sum][m] + 4 * n, 4);
                memcpy(left, emulated.rows[a][m] + 4 * k, 4);
                memcpy(right, emulated.rows[b][k] + 4 * n, 4);
                total += emulated_bf16(left[0]) * emulated_bf16(right[0]);
                total += emulated_bf16(left[1]) * emulated_bf16(right[1]);
                memcpy(emulated.rows[sum][m] + 4 * n, &total, 4);
            }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(configuration) emulated_configure((const uint8_t *)(configuration))
#define _tile_release() (emulated.configured = 0)
#define _tile_loadd(number, memory, stride) emulated_move(number, (uint8_t *)(memory), stride, 0)
#define _tile_stored(number, memory, stride) emulated_move(number, (uint8_t *)(memory), stride, 1)
#define _tile_dpbf16ps(sum, a, b) emulated_multiply(sum, a, b)
#define syscall(...) 0 /* the system's permission */
