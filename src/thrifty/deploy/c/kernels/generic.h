/* Integer convolution, one multiplication at a time: groups, and whatever the fast kernels refuse.
 *
 * Weights lie in natural order, [co][ky][kx][ci]; 4-bit ones two per byte, the first in the low nibble, each channel
 * starting a byte. THRIFTY_GENERIC instantiates it for the types of input, weights (W8, W16, W4) and output. */
#ifndef THRIFTY_GENERIC_H
#define THRIFTY_GENERIC_H

#include "arith.h"

typedef enum { THRIFTY_REQUANT_MULTIPLIER, THRIFTY_REQUANT_HALF_UP, THRIFTY_REQUANT_FLOOR } thrifty_requant_t;

typedef struct {
    const void *weight;
    const int32_t *bias;
    const int32_t *multiplier;  /* per channel, or NULL */
    const int8_t *shift;        /* per channel, or NULL */
    int32_t low, high;
    thrifty_requant_t requant;
    int32_t pre_shift;
    uint16_t in_h, in_w, in_c, out_h, out_w, channels;
    uint16_t kernel_h, kernel_w, stride_h, stride_w, top, left;
    uint16_t group_in, group_out; /* channels of a group */
} thrifty_generic_t;

THRIFTY_INLINE int32_t thrifty_generic_requantise(const thrifty_generic_t *k, int32_t sum, uint32_t channel)
{
    if (k->requant == THRIFTY_REQUANT_MULTIPLIER)
        sum = thrifty_scale(sum, k->multiplier[channel], k->pre_shift);
    else if (k->requant == THRIFTY_REQUANT_FLOOR && k->shift[channel] > 0)
        sum = thrifty_floor_shift(sum, k->shift[channel]);
    else
        sum = thrifty_round_shift(sum, k->shift[channel]);
    return thrifty_clamp(sum, k->low, k->high);
}

#define THRIFTY_WEIGHT_W8(weights, i) ((const int8_t *)(weights))[i]
#define THRIFTY_WEIGHT_W16(weights, i) ((const int16_t *)(weights))[i]
#define THRIFTY_WEIGHT_W4(weights, i) thrifty_nibble((const uint8_t *)(weights), i)
#define THRIFTY_CHANNEL_W8(count) (count)
#define THRIFTY_CHANNEL_W16(count) (count)
#define THRIFTY_CHANNEL_W4(count) (((count) + 1u) & ~1u)

THRIFTY_INLINE int32_t thrifty_nibble(const uint8_t *weights, uint32_t i)
{
    const int32_t v = (weights[i >> 1] >> (i & 1u ? 4 : 0)) & 15;
    return v > 7 ? v - 16 : v;
}

#define THRIFTY_GENERIC(name, X, W, Y)                                                                                 \
    static void name(const thrifty_generic_t *k, const void *x, void *y, void *scratch THRIFTY_UNUSED)                 \
    {                                                                                                                  \
        const uint32_t window = THRIFTY_CHANNEL_##W((uint32_t)k->kernel_h * k->kernel_w * k->group_in);                \
        thrifty_##Y *out = (thrifty_##Y *)y;                                                                           \
        for (int32_t row = -(int32_t)k->top, rows = k->out_h; rows > 0; rows--, row += k->stride_h)                    \
            for (int32_t column = -(int32_t)k->left, left_w = k->out_w; left_w > 0; left_w--, column += k->stride_w)   \
                for (uint32_t channel = 0, start = 0, first = 0, left = k->group_out; channel < k->channels;           \
                     channel++, start += window) {                                                                     \
                    int32_t sum = k->bias[channel];                                                                    \
                    for (int32_t ky = 0; ky < k->kernel_h; ky++) {                                                     \
                        if (row + ky < 0 || row + ky >= k->in_h)                                                       \
                            continue;                                                                                  \
                        for (int32_t kx = 0; kx < k->kernel_w; kx++) {                                                 \
                            if (column + kx < 0 || column + kx >= k->in_w)                                             \
                                continue;                                                                              \
                            const uint32_t pixel = (uint32_t)((row + ky) * k->in_w + column + kx);                     \
                            const thrifty_##X *from = (const thrifty_##X *)x + pixel * k->in_c + first;                \
                            const uint32_t at = start + (uint32_t)(ky * k->kernel_w + kx) * k->group_in;               \
                            for (uint32_t i = 0; i < k->group_in; i++)                                                 \
                                sum += from[i] * THRIFTY_WEIGHT_##W(k->weight, at + i);                                \
                        }                                                                                              \
                    }                                                                                                  \
                    *out++ = (thrifty_##Y)thrifty_generic_requantise(k, sum, channel);                                 \
                    if (--left == 0) {                                                                                 \
                        left = k->group_out;                                                                           \
                        first += k->group_in;                                                                          \
                    }                                                                                                  \
                }                                                                                                      \
    }

#endif
