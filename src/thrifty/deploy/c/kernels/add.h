/* Sum of two tensors that have scales of their own:
 *
 *     y[i] = clamp((a[i] * ma + b[i] * mb + half) >> shift, low, high),   half = 2^(shift - 1), or 0 when shift is 0
 *
 * ma, mb: at most 32767 for 8-bit inputs and 16383 when an input has 16 bits, so that no sum leaves int32.
 * y may be a or b when it has the same type. thrifty_add_<a>_<b>_<y>, each of s8, u8, s16; thrifty_add_f32. */
#ifndef THRIFTY_ADD_H
#define THRIFTY_ADD_H

#include "simd.h"

/* clang-format off */
#define THRIFTY_ADD_STORE(Y, index, sum) y[index] = thrifty_narrow_##Y(sum, shift, low, high)

/* the body for any two types */
#define THRIFTY_ADD_ANY(A, B, Y)

#if THRIFTY_DSP
/* four elements of 8 bits: widened to 16 bits, each a paired with its b, one SMLAD per element */
#define THRIFTY_ADD_8(A, B, Y)                                                                                         \
    const uint32_t both = ((uint32_t)ma & 0xFFFFu) | ((uint32_t)mb << 16);                                             \
    for (; i < (count & ~3); i += 4) {                                                                                 \
        const uint32_t wa = thrifty_load4(a + i), wb = thrifty_load4(b + i);                                           \
        const uint32_t a02 = thrifty_even_##A(wa), a13 = thrifty_odd_##A(wa);                                          \
        const uint32_t b02 = thrifty_even_##B(wb), b13 = thrifty_odd_##B(wb);                                          \
        THRIFTY_ADD_STORE(Y, i, thrifty_dot2(thrifty_low_halves(a02, b02), both, half));                               \
        THRIFTY_ADD_STORE(Y, i + 1, thrifty_dot2(thrifty_low_halves(a13, b13), both, half));                           \
        THRIFTY_ADD_STORE(Y, i + 2, thrifty_dot2(thrifty_high_halves(a02, b02), both, half));                          \
        THRIFTY_ADD_STORE(Y, i + 3, thrifty_dot2(thrifty_high_halves(a13, b13), both, half));                          \
    }
/* two elements of 16 bits */
#define THRIFTY_ADD_16(A, B, Y)                                                                                        \
    const uint32_t both = ((uint32_t)ma & 0xFFFFu) | ((uint32_t)mb << 16);                                             \
    for (; i < (count & ~1); i += 2) {                                                                                 \
        const uint32_t wa = thrifty_load4(a + i), wb = thrifty_load4(b + i);                                           \
        THRIFTY_ADD_STORE(Y, i, thrifty_dot2(thrifty_low_halves(wa, wb), both, half));                                 \
        THRIFTY_ADD_STORE(Y, i + 1, thrifty_dot2(thrifty_high_halves(wa, wb), both, half));                            \
    }
#else
#define THRIFTY_ADD_8(A, B, Y)
#define THRIFTY_ADD_16(A, B, Y)
#endif

#define THRIFTY_ADD(A, B, Y, BODY)                                                                                     \
    THRIFTY_INLINE void thrifty_add_##A##_##B##_##Y(const thrifty_##A *a, const thrifty_##B *b, thrifty_##Y *y,        \
                                                    int32_t count, int32_t ma, int32_t mb, int shift, int32_t low,     \
                                                    int32_t high)                                                      \
    {                                                                                                                  \
        const int32_t half = (int32_t)((1u << shift) >> 1);                                                            \
        int32_t i = 0;                                                                                                 \
        BODY(A, B, Y)                                                                                                  \
        for (; i < count; i++) {                                                                                       \
            THRIFTY_ADD_STORE(Y, i, a[i] * ma + b[i] * mb + half);                                                     \
        }                                                                                                              \
    }

#define THRIFTY_ADD_TO_ALL(A, B, BODY)                                                                                 \
    THRIFTY_ADD(A, B, s8, BODY)                                                                                        \
    THRIFTY_ADD(A, B, u8, BODY)                                                                                        \
    THRIFTY_ADD(A, B, s16, BODY)

THRIFTY_ADD_TO_ALL(s8, s8, THRIFTY_ADD_8)
THRIFTY_ADD_TO_ALL(s8, u8, THRIFTY_ADD_8)
THRIFTY_ADD_TO_ALL(u8, s8, THRIFTY_ADD_8)
THRIFTY_ADD_TO_ALL(u8, u8, THRIFTY_ADD_8)
THRIFTY_ADD_TO_ALL(s16, s16, THRIFTY_ADD_16)
THRIFTY_ADD_TO_ALL(s8, s16, THRIFTY_ADD_ANY)
THRIFTY_ADD_TO_ALL(u8, s16, THRIFTY_ADD_ANY)
THRIFTY_ADD_TO_ALL(s16, s8, THRIFTY_ADD_ANY)
THRIFTY_ADD_TO_ALL(s16, u8, THRIFTY_ADD_ANY)
/* clang-format on */

THRIFTY_INLINE void thrifty_add_f32(const float *a, const float *b, float *y, int32_t count, float low, float high)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        const float sum = a[i] + b[i];
        y[i] = THRIFTY_CLAMP(sum, low, high);
    }
}

#undef THRIFTY_ADD
#undef THRIFTY_ADD_TO_ALL
#undef THRIFTY_ADD_STORE
#undef THRIFTY_ADD_ANY
#undef THRIFTY_ADD_8
#undef THRIFTY_ADD_16

#endif
