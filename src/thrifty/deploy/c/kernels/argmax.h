/* Index of the first largest element. thrifty_argmax_<type> with s8, u8, s16, s32, f32. */
#ifndef THRIFTY_ARGMAX_H
#define THRIFTY_ARGMAX_H

#include "simd.h"

/* clang-format off */
#define THRIFTY_ARGMAX(T)                                                                                              \
    THRIFTY_INLINE void thrifty_argmax_##T(const thrifty_##T *x, int32_t *y, int32_t count)                            \
    {                                                                                                                  \
        int32_t best = 0;                                                                                              \
        int32_t i;                                                                                                     \
        for (i = 1; i < count; i++) {                                                                                  \
            if (x[i] > x[best]) {                                                                                      \
                best = i;                                                                                              \
            }                                                                                                          \
        }                                                                                                              \
        *y = best;                                                                                                     \
    }

THRIFTY_ARGMAX(s8)
THRIFTY_ARGMAX(u8)
THRIFTY_ARGMAX(s16)
THRIFTY_ARGMAX(s32)
THRIFTY_ARGMAX(f32)
/* clang-format on */

#undef THRIFTY_ARGMAX

#endif
