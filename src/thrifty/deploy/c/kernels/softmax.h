/* Softmax over all elements, in integers:
 *
 *     e[i] = table[max - x[i]];   y[i] = min(255, (e[i] * 256 + sum / 2) / sum)
 *
 * table[d] = floor(exp(-d * scale) * 2^20 + 0.5), 256 entries; at most 2047 elements, so that sums fit 32 bits.
 * y: uint8, scale 1/256. thrifty_softmax_<x>, x of s8, u8.
 *
 * thrifty_softmax_f32: y = exp32(x - max) / sum, with an exp32 of float32 steps in a fixed order, so that all machines
 * agree: k = floor(t / ln 2 + 1/2), r = t - k ln 2 in two steps, Taylor series of exp(r) up to r^7, times 2^k. */
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

THRIFTY_INLINE float thrifty_exp32(float t)
{
    static const float taylor[7] = {0.0013888889f, 0.008333334f, 0.041666668f, 0.16666667f, 0.5f, 1.0f, 1.0f};
    union {
        int32_t bits;
        float value;
    } power;
    float whole, r, p = 0.0001984127f;
    int32_t k, i;
    if (t < -87.0f) {
        return 0.0f;
    }
    whole = t * 1.442695f + 0.5f;
    k = (int32_t)whole; /* towards zero */
    k -= (float)k > whole;
    r = (t - (float)k * 0.6933594f) - (float)k * -0.00021219444f;
    for (i = 0; i < 7; i++) {
        p = p * r + taylor[i];
    }
    power.bits = (k + 127) * (1 << 23);
    return p * power.value;
}

static inline void thrifty_softmax_f32(const float *x, float *y, int32_t count)
{
    float top = x[0], sum = 0.0f;
    int32_t i;
    for (i = 1; i < count; i++) {
        top = x[i] > top ? x[i] : top;
    }
    for (i = 0; i < count; i++) {
        y[i] = thrifty_exp32(x[i] - top);
        sum += y[i];
    }
    for (i = 0; i < count; i++) {
        y[i] /= sum;
    }
}

#undef THRIFTY_SOFTMAX

#endif
