/* Change of scale, element by element, and its place in a larger tensor (concatenation):
 *
 *     y[o * stride + i] = clamp((x[o * inner + i] * m + half) >> shift, low, high),   o < outer, i < inner
 *
 * half = 2^(shift - 1), or 0 when shift is 0. m: at most 32767 for 8-bit inputs, 16383 for 16-bit inputs.
 * thrifty_rescale_<x>_<y>, each of s8, u8, s16; with outer = 1, y may be x when it has the same type. */
#ifndef THRIFTY_RESCALE_H
#define THRIFTY_RESCALE_H

#include "simd.h"

/* clang-format off */
#define THRIFTY_RESCALE(X, Y)                                                                                          \
    THRIFTY_INLINE void thrifty_rescale_##X##_##Y(const thrifty_##X *x, thrifty_##Y *y, int32_t outer, int32_t inner,  \
                                                  int32_t stride, int32_t m, int shift, int32_t low, int32_t high)     \
    {                                                                                                                  \
        const int32_t half = (int32_t)((1u << shift) >> 1);                                                            \
        int32_t o, i;                                                                                                  \
        for (o = 0; o < outer; o++, x += inner, y += stride) {                                                         \
            for (i = 0; i < inner; i++) {                                                                              \
                y[i] = thrifty_narrow_##Y(x[i] * m + half, shift, low, high);                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

THRIFTY_RESCALE(s8, s8)
THRIFTY_RESCALE(s8, u8)
THRIFTY_RESCALE(s8, s16)
THRIFTY_RESCALE(u8, s8)
THRIFTY_RESCALE(u8, u8)
THRIFTY_RESCALE(u8, s16)
THRIFTY_RESCALE(s16, s8)
THRIFTY_RESCALE(s16, u8)
THRIFTY_RESCALE(s16, s16)
/* clang-format on */

/* floats have no scales: they are clamped and put in their place */
THRIFTY_INLINE void thrifty_rescale_f32_f32(const float *x, float *y, int32_t outer, int32_t inner, int32_t stride,
                                            float low, float high)
{
    int32_t o, i;
    for (o = 0; o < outer; o++, x += inner, y += stride) {
        for (i = 0; i < inner; i++) {
            y[i] = THRIFTY_CLAMP(x[i], low, high);
        }
    }
}

#undef THRIFTY_RESCALE

#endif
