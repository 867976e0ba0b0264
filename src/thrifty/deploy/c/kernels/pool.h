/* Largest value and mean over windows, channels last. Windows are cut at the border of the input.
 *
 *     maxpool   y = clamp(max, low, high)
 *     avgpool   y = clamp(requantise(sum), low, high), where the sum of a window is
 *               multiplied: ((sum << pre_shift) * multiplier + 2^31) >> 32,   or, when multiplier is 0,
 *               shifted:    (sum + half) >> shift, half = 2^(shift - 1) or 0; a negative shift multiplies
 *     float     y = clamp(max, low, high), y = clamp(sum / count, low, high), summed row by row
 *
 * thrifty_maxpool_<type>, s8, u8, s16, f32; thrifty_avgpool_<x>_<y>, each of s8, u8, s16; thrifty_avgpool_f32. */
#ifndef THRIFTY_POOL_H
#define THRIFTY_POOL_H

#include "arith.h"

typedef struct {
    int32_t in_height, in_width, channels, out_height, out_width;
    int32_t kernel_height, kernel_width, stride_height, stride_width, top, left;
} thrifty_pool_t;

typedef struct {
    int32_t multiplier, pre_shift, half, shift, low, high;
} thrifty_pool_mean_t;

/* one output pixel sees rows `row`, `row` + 1, ... and columns `column`, ... of the input */
typedef struct {
    int32_t row, rows, column, columns;
} thrifty_window_t;

THRIFTY_INLINE int32_t thrifty_window_cut(int32_t *start, int32_t count, int32_t limit)
{
    const int32_t end = *start + count < limit ? *start + count : limit;
    *start = *start < 0 ? 0 : *start;
    return end - *start;
}

static inline thrifty_window_t thrifty_window(const thrifty_pool_t *p, int32_t oy, int32_t ox)
{
    thrifty_window_t w;
    w.row = oy * p->stride_height - p->top;
    w.column = ox * p->stride_width - p->left;
    w.rows = thrifty_window_cut(&w.row, p->kernel_height, p->in_height);
    w.columns = thrifty_window_cut(&w.column, p->kernel_width, p->in_width);
    return w;
}

THRIFTY_INLINE int32_t thrifty_pool_mean(int32_t sum, const thrifty_pool_mean_t *m)
{
    int32_t y;
    if (m->multiplier != 0) {
        y = thrifty_scale(sum, m->multiplier, m->pre_shift);
    } else if (m->shift >= 0) {
        y = (sum + m->half) >> m->shift;
    } else {
        y = sum * (int32_t)(1u << -m->shift);
    }
    return THRIFTY_CLAMP(y, m->low, m->high);
}

/* clang-format off */
#define THRIFTY_POOL_LOOP(p)                                                                                           \
    for (oy = 0; oy < (p)->out_height; oy++)                                                                           \
        for (ox = 0; ox < (p)->out_width; ox++, y += (p)->channels)

#if THRIFTY_DSP
/* LANES channels at a time, one word of the input per step */
#define THRIFTY_MAXPOOL_WORDS(T, LANES)                                                                                \
    for (; c + (LANES) <= p->channels; c += (LANES)) {                                                                 \
        const thrifty_##T *at = from + c;                                                                              \
        uint32_t top = thrifty_load4(at);                                                                              \
        int32_t i, j;                                                                                                  \
        for (i = w.rows; i > 0; i--, at += skip) {                                                                     \
            for (j = w.columns; j > 0; j--, at += p->channels) {                                                       \
                top = thrifty_max##LANES##_##T(top, thrifty_load4(at));                                                \
            }                                                                                                          \
        }                                                                                                              \
        thrifty_store4(y + c, thrifty_min##LANES##_##T(thrifty_max##LANES##_##T(top, lows), highs));                   \
    }
#define THRIFTY_POOL_SPLAT(LANES, value)                                                                               \
    ((LANES) == 4 ? ((uint32_t)(value) & 0xFFu) * 0x01010101u : ((uint32_t)(value) & 0xFFFFu) * 0x00010001u)
#define THRIFTY_MAXPOOL_LIMITS(LANES)                                                                                  \
    const uint32_t lows = THRIFTY_POOL_SPLAT(LANES, low), highs = THRIFTY_POOL_SPLAT(LANES, high);

/* four channels at a time in two words of 16-bit sums: up to 256 additions of 8-bit numbers fit */
#define THRIFTY_AVGPOOL_WORDS(X, Y)                                                                                    \
    for (; c + 4 <= p->channels && w.rows * w.columns <= 256; c += 4) {                                                \
        const thrifty_##X *at = from + c;                                                                              \
        uint32_t even = 0, odd = 0;                                                                                    \
        int32_t i, j;                                                                                                  \
        for (i = w.rows; i > 0; i--, at += skip) {                                                                     \
            for (j = w.columns; j > 0; j--, at += p->channels) {                                                       \
                const uint32_t four = thrifty_load4(at);                                                               \
                even = thrifty_add_even_##X(even, four);                                                               \
                odd = thrifty_add_odd_##X(odd, four);                                                                  \
            }                                                                                                          \
        }                                                                                                              \
        y[c] = (thrifty_##Y)thrifty_pool_mean((THRIFTY_POOL_SUM_##X)even, m);                                          \
        y[c + 1] = (thrifty_##Y)thrifty_pool_mean((THRIFTY_POOL_SUM_##X)odd, m);                                       \
        y[c + 2] = (thrifty_##Y)thrifty_pool_mean((THRIFTY_POOL_SUM_##X)(even >> 16), m);                              \
        y[c + 3] = (thrifty_##Y)thrifty_pool_mean((THRIFTY_POOL_SUM_##X)(odd >> 16), m);                               \
    }
#define THRIFTY_POOL_SUM_s8 int16_t
#define THRIFTY_POOL_SUM_u8 uint16_t
#else
#define THRIFTY_MAXPOOL_WORDS(T, LANES)
#define THRIFTY_MAXPOOL_LIMITS(LANES)
#define THRIFTY_AVGPOOL_WORDS(X, Y)
#endif

#define THRIFTY_MAXPOOL(T, LIMIT, WORDS, LIMITS, LANES)                                                                \
    static inline void thrifty_maxpool_##T(const thrifty_pool_t *p, const thrifty_##T *x, thrifty_##T *y, LIMIT low,   \
                                           LIMIT high)                                                                 \
    {                                                                                                                  \
        int32_t oy, ox;                                                                                                \
        LIMITS(LANES)                                                                                                  \
        THRIFTY_POOL_LOOP(p)                                                                                           \
        {                                                                                                              \
            const thrifty_window_t w = thrifty_window(p, oy, ox);                                                      \
            const thrifty_##T *const from = x + (w.row * p->in_width + w.column) * p->channels;                        \
            const int32_t skip = (p->in_width - w.columns) * p->channels;                                              \
            int32_t c = 0;                                                                                             \
            WORDS(T, LANES)                                                                                            \
            for (; c < p->channels; c++) {                                                                             \
                const thrifty_##T *at = from + c;                                                                      \
                thrifty_##T top = *at;                                                                                 \
                int32_t i, j;                                                                                          \
                for (i = w.rows; i > 0; i--, at += skip) {                                                             \
                    for (j = w.columns; j > 0; j--, at += p->channels) {                                               \
                        top = *at > top ? *at : top;                                                                   \
                    }                                                                                                  \
                }                                                                                                      \
                y[c] = (thrifty_##T)THRIFTY_CLAMP(top, low, high);                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }

#define THRIFTY_NOTHING(...)

THRIFTY_MAXPOOL(s8, int32_t, THRIFTY_MAXPOOL_WORDS, THRIFTY_MAXPOOL_LIMITS, 4)
THRIFTY_MAXPOOL(u8, int32_t, THRIFTY_MAXPOOL_WORDS, THRIFTY_MAXPOOL_LIMITS, 4)
THRIFTY_MAXPOOL(s16, int32_t, THRIFTY_MAXPOOL_WORDS, THRIFTY_MAXPOOL_LIMITS, 2)
THRIFTY_MAXPOOL(f32, float, THRIFTY_NOTHING, THRIFTY_NOTHING, 1)

#define THRIFTY_AVGPOOL(X, Y, WORDS)                                                                                   \
    static inline void thrifty_avgpool_##X##_##Y(const thrifty_pool_t *p, const thrifty_pool_mean_t *m,                \
                                                 const thrifty_##X *x, thrifty_##Y *y)                                 \
    {                                                                                                                  \
        int32_t oy, ox;                                                                                                \
        THRIFTY_POOL_LOOP(p)                                                                                           \
        {                                                                                                              \
            const thrifty_window_t w = thrifty_window(p, oy, ox);                                                      \
            const thrifty_##X *const from = x + (w.row * p->in_width + w.column) * p->channels;                        \
            const int32_t skip = (p->in_width - w.columns) * p->channels;                                              \
            int32_t c = 0;                                                                                             \
            WORDS(X, Y)                                                                                                \
            for (; c < p->channels; c++) {                                                                             \
                const thrifty_##X *at = from + c;                                                                      \
                int32_t sum = 0;                                                                                       \
                int32_t i, j;                                                                                          \
                for (i = w.rows; i > 0; i--, at += skip) {                                                             \
                    for (j = w.columns; j > 0; j--, at += p->channels) {                                               \
                        sum += *at;                                                                                    \
                    }                                                                                                  \
                }                                                                                                      \
                y[c] = (thrifty_##Y)thrifty_pool_mean(sum, m);                                                         \
            }                                                                                                          \
        }                                                                                                              \
    }

#define THRIFTY_AVGPOOL_TO_ALL(X, WORDS)                                                                               \
    THRIFTY_AVGPOOL(X, s8, WORDS)                                                                                      \
    THRIFTY_AVGPOOL(X, u8, WORDS)                                                                                      \
    THRIFTY_AVGPOOL(X, s16, WORDS)

THRIFTY_AVGPOOL_TO_ALL(s8, THRIFTY_AVGPOOL_WORDS)
THRIFTY_AVGPOOL_TO_ALL(u8, THRIFTY_AVGPOOL_WORDS)
THRIFTY_AVGPOOL_TO_ALL(s16, THRIFTY_NOTHING)
/* clang-format on */

static inline void thrifty_avgpool_f32(const thrifty_pool_t *p, const float *x, float *y, float count, float low,
                                       float high)
{
    int32_t oy, ox, c, i, j;
    THRIFTY_POOL_LOOP(p)
    {
        const thrifty_window_t w = thrifty_window(p, oy, ox);
        for (c = 0; c < p->channels; c++) {
            const float *at = x + (w.row * p->in_width + w.column) * p->channels + c;
            float sum = 0.0f;
            for (i = w.rows; i > 0; i--, at += (p->in_width - w.columns) * p->channels) {
                for (j = w.columns; j > 0; j--, at += p->channels) {
                    sum += *at;
                }
            }
            sum /= count;
            y[c] = THRIFTY_CLAMP(sum, low, high);
        }
    }
}

#undef THRIFTY_POOL_LOOP
#undef THRIFTY_MAXPOOL
#undef THRIFTY_AVGPOOL
#undef THRIFTY_AVGPOOL_TO_ALL
#undef THRIFTY_NOTHING

#endif
