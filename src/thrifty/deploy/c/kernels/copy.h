/* Copies: all of a tensor (reshape), or with its axes in another order (permute). */
#ifndef THRIFTY_COPY_H
#define THRIFTY_COPY_H

#include "arith.h"

/* `bytes` bytes between 4-byte aligned addresses that do not overlap */
THRIFTY_INLINE void thrifty_copy(const void *x, void *y, int32_t bytes)
{
    const uint8_t *from = (const uint8_t *)x;
    uint8_t *to = (uint8_t *)y;
    int32_t i = 0;
#if THRIFTY_DSP
    for (; i < (bytes & ~3); i += 4) {
        thrifty_store4(to + i, thrifty_load4(from + i));
    }
#endif
    for (; i < bytes; i++) {
        to[i] = from[i];
    }
}

typedef uint8_t thrifty_item8; /* bits, whatever their type is */
typedef uint16_t __attribute__((may_alias)) thrifty_item16;
typedef uint32_t __attribute__((may_alias)) thrifty_item32;

/* clang-format off */
/* y (n0, n1, n2) in order; element (i, j, k) is x[i * s0 + j * s1 + k * s2]. thrifty_permute_<bits>, 8, 16 or 32 */
#define THRIFTY_PERMUTE(BITS)                                                                                          \
    THRIFTY_INLINE void thrifty_permute_##BITS(const void *x, void *y, int32_t n0, int32_t n1, int32_t n2, int32_t s0, \
                                               int32_t s1, int32_t s2)                                                 \
    {                                                                                                                  \
        const thrifty_item##BITS *from = (const thrifty_item##BITS *)x;                                                \
        thrifty_item##BITS *to = (thrifty_item##BITS *)y;                                                              \
        int32_t i, j, k;                                                                                               \
        for (i = 0; i < n0; i++) {                                                                                     \
            for (j = 0; j < n1; j++) {                                                                                 \
                for (k = 0; k < n2; k++) {                                                                             \
                    *to++ = from[i * s0 + j * s1 + k * s2];                                                            \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

THRIFTY_PERMUTE(8)
THRIFTY_PERMUTE(16)
THRIFTY_PERMUTE(32)
/* clang-format on */

#undef THRIFTY_PERMUTE

#endif
