/* y[i] = clamp(x[i], low, high). y may be x. thrifty_clamp_<type> with s8, u8, s16, f32. */
#ifndef THRIFTY_CLAMP_H
#define THRIFTY_CLAMP_H

#include "simd.h"

/* clang-format off */
#if THRIFTY_DSP
#define THRIFTY_CLAMP_WORDS(T, WIDE, LANES, ONES)                                                                      \
    const uint32_t lows = ((uint32_t)low & (0xFFFFFFFFu / (ONES))) * (ONES);                                           \
    const uint32_t highs = ((uint32_t)high & (0xFFFFFFFFu / (ONES))) * (ONES);                                         \
    for (; i < (count & ~((LANES) - 1)); i += (LANES)) {                                                               \
        thrifty_store4(y + i, thrifty_min##WIDE##_##T(thrifty_max##WIDE##_##T(thrifty_load4(x + i), lows), highs));    \
    }
#else
#define THRIFTY_CLAMP_WORDS(T, WIDE, LANES, ONES)
#endif

#define THRIFTY_CLAMP_INTEGERS(T, WIDE, ONES)                                                                          \
    THRIFTY_INLINE void thrifty_clamp_##T(const thrifty_##T *x, thrifty_##T *y, int32_t count, int32_t low,            \
                                          int32_t high)                                                                \
    {                                                                                                                  \
        int32_t i = 0;                                                                                                 \
        THRIFTY_CLAMP_WORDS(T, WIDE, WIDE, ONES)                                                                       \
        for (; i < count; i++) {                                                                                       \
            y[i] = (thrifty_##T)THRIFTY_CLAMP(x[i], low, high);                                                        \
        }                                                                                                              \
    }

THRIFTY_CLAMP_INTEGERS(s8, 4, 0x01010101u)
THRIFTY_CLAMP_INTEGERS(u8, 4, 0x01010101u)
THRIFTY_CLAMP_INTEGERS(s16, 2, 0x00010001u)
/* clang-format on */

THRIFTY_INLINE void thrifty_clamp_f32(const float *x, float *y, int32_t count, float low, float high)
{
    int32_t i;
    for (i = 0; i < count; i++) {
        y[i] = THRIFTY_CLAMP(x[i], low, high);
    }
}

#undef THRIFTY_CLAMP_WORDS
#undef THRIFTY_CLAMP_INTEGERS

#endif
