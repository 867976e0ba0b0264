/* y[i] = table[x[i] - lowest x]: any function of one 8-bit number, 256 entries. y may be x when it has the same type.
 * thrifty_lookup_<x>_<y>, x of s8, u8, y of s8, u8, s16. */
#ifndef THRIFTY_LOOKUP_H
#define THRIFTY_LOOKUP_H

#include "simd.h"

/* clang-format off */
#define THRIFTY_LOOKUP(X, Y, LOWEST)                                                                                   \
    THRIFTY_INLINE void thrifty_lookup_##X##_##Y(const thrifty_##X *x, thrifty_##Y *y, int32_t count,                  \
                                                 const thrifty_##Y *table)                                             \
    {                                                                                                                  \
        int32_t i;                                                                                                     \
        for (i = 0; i < count; i++) {                                                                                  \
            y[i] = table[x[i] - (LOWEST)];                                                                             \
        }                                                                                                              \
    }

THRIFTY_LOOKUP(s8, s8, -128)
THRIFTY_LOOKUP(s8, u8, -128)
THRIFTY_LOOKUP(s8, s16, -128)
THRIFTY_LOOKUP(u8, s8, 0)
THRIFTY_LOOKUP(u8, u8, 0)
THRIFTY_LOOKUP(u8, s16, 0)
/* clang-format on */

#undef THRIFTY_LOOKUP

#endif
