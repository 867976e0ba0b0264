/* Softmax over all elements, in integers:
 *
 *     e[i] = table[max - x[i]];   y[i] = min(255, (e[i] * 256 + sum / 2) / sum)
 *
 * table[d] = floor(exp(-d * scale) * 2^20 + 0.5), 256 entries; at most 2047 elements, so that sums fit 32 bits.
 * y: uint8, scale 1/256. y may be x. thrifty_softmax_<x>, x of s8, u8. */
#ifndef THRIFTY_SOFTMAX_H
#define THRIFTY_SOFTMAX_H

#include "simd.h"

/* clang-format off */
#define THRIFTY_SOFTMAX(T)                                                                                             \
    THRIFTY_INLINE void thrifty_softmax_##T(const thrifty_##T *x, uint8_t *y, int32_t count, const int32_t *table)     \
    {                                                                                                                  \
        int32_t top = x[0];                                                                                            \
        uint32_t sum = 0;                                                                                              \
        int32_t i;                                                                                                     \
        for (i = 1; i < count; i++) {                                                                                  \
            top = x[i] > top ? x[i] : top;                                                                             \
        }                                                                                                              \
        for (i = 0; i < count; i++) {                                                                                  \
            sum += (uint32_t)table[top - x[i]];                                                                        \
        }                                                                                                              \
        for (i = 0; i < count; i++) {                                                                                  \
            const uint32_t share = ((uint32_t)table[top - x[i]] * 256u + (sum >> 1)) / sum;                            \
            y[i] = (uint8_t)(share > 255u ? 255u : share);                                                             \
        }                                                                                                              \
    }

THRIFTY_SOFTMAX(s8)
THRIFTY_SOFTMAX(u8)
/* clang-format on */

#undef THRIFTY_SOFTMAX

#endif
