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
#define THRIFTY_POOL_NOTHING(...)

/* for every output pixel */
#define THRIFTY_POOL_EACH_PIXEL                                                                                        \
    for (oy = 0; oy < p->out_height; oy++)                                                                             \
        for (ox = 0; ox < p->out_width; ox++, y += channels)

/* what every pixel starts with: its window, the input from its first element on, the way from row to row */
#define THRIFTY_POOL_START(T)                                                                                          \
    const thrifty_window_t w = thrifty_window(p, oy, ox);                                                              \
    const int32_t rows = w.rows, columns = w.columns, skip = (p->in_width - columns) * channels;                       \
    const thrifty_##T *const from = x + (w.row * p->in_width + w.column) * channels;                                   \
    int32_t c = 0

/* for every element of the window: `at` points to it */
#define THRIFTY_POOL_EACH_TAP                                                                                          \
    for (i = rows; i > 0; i--, at += skip)                                                                             \
        for (j = columns; j > 0; j--, at += channels)

#if THRIFTY_DSP
#define THRIFTY_POOL_SPLAT(LANES, value)                                                                               \
    ((LANES) == 4 ? ((uint32_t)(value) & 0xFFu) * 0x01010101u : ((uint32_t)(value) & 0xFFFFu) * 0x00010001u)
#define THRIFTY_MAXPOOL_LIMITS(LANES, LEAST, MOST)                                                                     \
    const uint32_t lows = THRIFTY_POOL_SPLAT(LANES, low), highs = THRIFTY_POOL_SPLAT(LANES, high);                     \
    const int clip = low > (LEAST) || high < (MOST);
#define THRIFTY_MAXPOOL_STORE(T, LANES, n)                                                                             \
    thrifty_store4(y + c + (n) * (LANES), !clip ? top##n                                                               \
                   : thrifty_min##LANES##_##T(thrifty_max##LANES##_##T(top##n, lows), highs))

/* four words of channels at a time, then one word at a time */
#define THRIFTY_MAXPOOL_WORDS(T, LANES)                                                                                \
    for (; c + 4 * (LANES) <= channels; c += 4 * (LANES)) {                                                            \
        const thrifty_##T *at = from + c;                                                                              \
        uint32_t top0 = thrifty_load4(at), top1 = thrifty_load4(at + (LANES));                                         \
        uint32_t top2 = thrifty_load4(at + 2 * (LANES)), top3 = thrifty_load4(at + 3 * (LANES));                       \
        THRIFTY_POOL_EACH_TAP {                                                                                        \
            top0 = thrifty_max##LANES##_##T(top0, thrifty_load4(at));                                                  \
            top1 = thrifty_max##LANES##_##T(top1, thrifty_load4(at + (LANES)));                                        \
            top2 = thrifty_max##LANES##_##T(top2, thrifty_load4(at + 2 * (LANES)));                                    \
            top3 = thrifty_max##LANES##_##T(top3, thrifty_load4(at + 3 * (LANES)));                                    \
        }                                                                                                              \
        THRIFTY_MAXPOOL_STORE(T, LANES, 0);                                                                            \
        THRIFTY_MAXPOOL_STORE(T, LANES, 1);                                                                            \
        THRIFTY_MAXPOOL_STORE(T, LANES, 2);                                                                            \
        THRIFTY_MAXPOOL_STORE(T, LANES, 3);                                                                            \
    }                                                                                                                  \
    for (; c + (LANES) <= channels; c += (LANES)) {                                                                    \
        const thrifty_##T *at = from + c;                                                                              \
        uint32_t top0 = thrifty_load4(at);                                                                             \
        THRIFTY_POOL_EACH_TAP {                                                                                        \
            top0 = thrifty_max##LANES##_##T(top0, thrifty_load4(at));                                                  \
        }                                                                                                              \
        THRIFTY_MAXPOOL_STORE(T, LANES, 0);                                                                            \
    }

/* four channels at a time in two words of 16-bit sums: up to 256 additions of 8-bit numbers fit */
#define THRIFTY_AVGPOOL_WORDS(X, Y, SUM)                                                                               \
    const int32_t words = rows * columns <= 256 ? channels & ~3 : 0;                                                   \
    for (; c < words; c += 4) {                                                                                        \
        const thrifty_##X *at = from + c;                                                                              \
        uint32_t even = 0, odd = 0;                                                                                    \
        THRIFTY_POOL_EACH_TAP {                                                                                        \
            const uint32_t four = thrifty_load4(at);                                                                   \
            even = thrifty_add_even_##X(even, four);                                                                   \
            odd = thrifty_add_odd_##X(odd, four);                                                                      \
        }                                                                                                              \
        y[c] = (thrifty_##Y)thrifty_pool_mean((SUM)even, m);                                                           \
        y[c + 1] = (thrifty_##Y)thrifty_pool_mean((SUM)odd, m);                                                        \
        y[c + 2] = (thrifty_##Y)thrifty_pool_mean((SUM)(even >> 16), m);                                               \
        y[c + 3] = (thrifty_##Y)thrifty_pool_mean((SUM)(odd >> 16), m);                                                \
    }
#else
#define THRIFTY_MAXPOOL_LIMITS(LANES, LEAST, MOST)
#define THRIFTY_MAXPOOL_WORDS(T, LANES)
#define THRIFTY_AVGPOOL_WORDS(X, Y, SUM)
#endif

#define THRIFTY_MAXPOOL(T, LIMIT, LIMITS, WORDS, LANES, LEAST, MOST)                                                   \
    static inline void thrifty_maxpool_##T(const thrifty_pool_t *p, const thrifty_##T *x, thrifty_##T *y, LIMIT low,   \
                                           LIMIT high)                                                                 \
    {                                                                                                                  \
        const int32_t channels = p->channels;                                                                          \
        int32_t oy, ox, i, j;                                                                                          \
        LIMITS(LANES, LEAST, MOST)                                                                                     \
        THRIFTY_POOL_EACH_PIXEL {                                                                                      \
            THRIFTY_POOL_START(T);                                                                                     \
            WORDS(T, LANES)                                                                                            \
            for (; c < channels; c++) {                                                                                \
                const thrifty_##T *at = from + c;                                                                      \
                LIMIT top = *at;                                                                                       \
                THRIFTY_POOL_EACH_TAP {                                                                                \
                    top = *at > top ? *at : top;                                                                       \
                }                                                                                                      \
                y[c] = (thrifty_##T)THRIFTY_CLAMP(top, low, high);                                                     \
            }                                                                                                          \
        }                                                                                                              \
    }

THRIFTY_MAXPOOL(s8, int32_t, THRIFTY_MAXPOOL_LIMITS, THRIFTY_MAXPOOL_WORDS, 4, -128, 127)
THRIFTY_MAXPOOL(u8, int32_t, THRIFTY_MAXPOOL_LIMITS, THRIFTY_MAXPOOL_WORDS, 4, 0, 255)
THRIFTY_MAXPOOL(s16, int32_t, THRIFTY_MAXPOOL_LIMITS, THRIFTY_MAXPOOL_WORDS, 2, -32768, 32767)
THRIFTY_MAXPOOL(f32, float, THRIFTY_POOL_NOTHING, THRIFTY_POOL_NOTHING, 1, 0, 0)

#define THRIFTY_AVGPOOL(X, Y, WORDS, SUM)                                                                              \
    static inline void thrifty_avgpool_##X##_##Y(const thrifty_pool_t *p, const thrifty_pool_mean_t *m,                \
                                                 const thrifty_##X *x, thrifty_##Y *y)                                 \
    {                                                                                                                  \
        const int32_t channels = p->channels;                                                                          \
        int32_t oy, ox, i, j;                                                                                          \
        THRIFTY_POOL_EACH_PIXEL {                                                                                      \
            THRIFTY_POOL_START(X);                                                                                     \
            WORDS(X, Y, SUM)                                                                                           \
            for (; c < channels; c++) {                                                                                \
                const thrifty_##X *at = from + c;                                                                      \
                int32_t sum = 0;                                                                                       \
                THRIFTY_POOL_EACH_TAP {                                                                                \
                    sum += *at;                                                                                        \
                }                                                                                                      \
                y[c] = (thrifty_##Y)thrifty_pool_mean(sum, m);                                                         \
            }                                                                                                          \
        }                                                                                                              \
    }

#define THRIFTY_AVGPOOL_TO_ALL(X, WORDS, SUM)                                                                          \
    THRIFTY_AVGPOOL(X, s8, WORDS, SUM)                                                                                 \
    THRIFTY_AVGPOOL(X, u8, WORDS, SUM)                                                                                 \
    THRIFTY_AVGPOOL(X, s16, WORDS, SUM)

THRIFTY_AVGPOOL_TO_ALL(s8, THRIFTY_AVGPOOL_WORDS, int16_t)
THRIFTY_AVGPOOL_TO_ALL(u8, THRIFTY_AVGPOOL_WORDS, uint16_t)
THRIFTY_AVGPOOL_TO_ALL(s16, THRIFTY_POOL_NOTHING, int32_t)

static inline void thrifty_avgpool_f32(const thrifty_pool_t *p, const float *x, float *y, float count, float low,
                                       float high)
{
    const int32_t channels = p->channels;
    int32_t oy, ox, i, j;
    THRIFTY_POOL_EACH_PIXEL {
        THRIFTY_POOL_START(f32);
        for (; c < channels; c++) {
            const float *at = from + c;
            float sum = 0.0f;
            THRIFTY_POOL_EACH_TAP {
                sum += *at;
            }
            sum /= count;
            y[c] = THRIFTY_CLAMP(sum, low, high);
        }
    }
}
/* clang-format on */

#undef THRIFTY_POOL_NOTHING
#undef THRIFTY_POOL_EACH_PIXEL
#undef THRIFTY_POOL_START
#undef THRIFTY_POOL_EACH_TAP
#undef THRIFTY_MAXPOOL
#undef THRIFTY_AVGPOOL
#undef THRIFTY_AVGPOOL_TO_ALL

#endif
