/* The row buffer: the part of the input that some output pixels need, widened to 16 bits, in the order of the weights.
 *
 * A column of the buffer holds what one input column shows to the filter, [ky][channel]; columns follow each other, so
 * that the window of one output pixel is one contiguous run of columns, and the next window starts a few columns on.
 * Taps outside the input are zeros. `LANES` buffers (of windows that are computed together) are interleaved word by
 * word where the fast kernels read them (one load-multiple fetches a word of each); the portable kernels read them one
 * behind the other.
 *
 * 8-bit channels in multiples of four are stored as channels 0,2,1,3 of each four: the order in which SXTB16 widens
 * them. All else is stored in natural order, and the weights are packed accordingly (pack.py). */
#ifndef THRIFTY_ROWS_H
#define THRIFTY_ROWS_H

#include "arith.h"

typedef struct {
    uint16_t in_h, in_w, in_c; /* input shape */
    uint16_t kernel_h;
    uint16_t column;  /* elements of a buffer column, even */
    uint16_t run;     /* adjacent input columns that are copied together */
    uint16_t runs;    /* how many such runs a buffer holds */
    uint16_t jump;    /* input columns from one run to the next */
} thrifty_rows_t;

/* Fill one lane: rows from `top` on, columns from `left` on (both may lie outside the input). */
typedef void thrifty_fill_t(const thrifty_rows_t *r, const void *x, int32_t top, int32_t left, thrifty_word_t *lane);

#if THRIFTY_DSP
#define THRIFTY_LANE_STEP(LANES) (LANES)
#define THRIFTY_LANE_START(words) 1
#else
#define THRIFTY_LANE_STEP(LANES) 1
#define THRIFTY_LANE_START(words) (words)
#endif

typedef struct {
    int32_t begin;   /* columns left of the input */
    int32_t columns; /* columns inside it; when there is none, `begin` covers all */
} thrifty_span_t;

/* Which of `count` columns, the first of them at `left`, lie inside an input of `width` columns. */
THRIFTY_INLINE thrifty_span_t thrifty_span(int32_t left, int32_t count, int32_t width)
{
    const int32_t begin = left < 0 ? -left : 0, end = width - left < count ? width - left : count;
    thrifty_span_t span = {count, 0};
    if (end > begin) {
        span.begin = begin;
        span.columns = end - begin;
    }
    return span;
}

/* `to` is the word that holds element `first` (0 or 1: its half) of the lane; returns nothing. */
THRIFTY_INLINE void thrifty_put_zeros(thrifty_word_t *to, int32_t first, int32_t count, const int32_t step)
{
    if (first && count > 0) {
        ((thrifty_half_t *)to)[1] = 0;
        to += step;
        count--;
    }
    for (; count >= 2; count -= 2, to += step)
        *to = 0;
    if (count > 0)
        *(thrifty_half_t *)to = 0;
}

/* Elements one by one, in natural order. */
#define THRIFTY_PUT_NATURAL(T)                                                                                         \
    if (first && count > 0) {                                                                                          \
        ((thrifty_half_t *)to)[1] = *from++;                                                                           \
        to += step;                                                                                                    \
        count--;                                                                                                       \
    }                                                                                                                  \
    for (; count >= 2; count -= 2, from += 2, to += step) {                                                            \
        ((thrifty_half_t *)to)[0] = from[0];                                                                           \
        ((thrifty_half_t *)to)[1] = from[1];                                                                           \
    }                                                                                                                  \
    if (count > 0)                                                                                                     \
        *(thrifty_half_t *)to = *from;

/* Fours of 8-bit elements, swizzled. */
#if THRIFTY_DSP
#define THRIFTY_PUT_FOUR(T)                                                                                            \
    {                                                                                                                  \
        const uint32_t four = *(const thrifty_word_t *)(const void *)from;                                             \
        to[0] = thrifty_even_##T(four);                                                                                \
        to[step] = thrifty_odd_##T(four);                                                                              \
        from += 4;                                                                                                     \
        to += 2 * step;                                                                                                \
    }
#else
#define THRIFTY_PUT_FOUR(T)                                                                                            \
    {                                                                                                                  \
        thrifty_half_t *half = (thrifty_half_t *)to;                                                                   \
        half[0] = from[0];                                                                                             \
        half[1] = from[2];                                                                                             \
        half[2] = from[1];                                                                                             \
        half[3] = from[3];                                                                                             \
        from += 4;                                                                                                     \
        to += 2;                                                                                                       \
    }
#endif
#define THRIFTY_PUT_SWIZZLED(T)                                                                                        \
    for (; count >= 16; count -= 16) {                                                                                 \
        THRIFTY_PUT_FOUR(T)                                                                                            \
        THRIFTY_PUT_FOUR(T)                                                                                            \
        THRIFTY_PUT_FOUR(T)                                                                                            \
        THRIFTY_PUT_FOUR(T)                                                                                            \
    }                                                                                                                  \
    for (; count > 0; count -= 4)                                                                                      \
        THRIFTY_PUT_FOUR(T)

/* Pairs of 16-bit elements. */
#define THRIFTY_PUT_WORDS(T)                                                                                           \
    for (; count >= 8; count -= 8, from += 8, to += 4 * step) {                                                        \
        const thrifty_word_t *words = (const thrifty_word_t *)(const void *)from;                                      \
        to[0] = words[0];                                                                                              \
        to[step] = words[1];                                                                                           \
        to[2 * step] = words[2];                                                                                       \
        to[3 * step] = words[3];                                                                                       \
    }                                                                                                                  \
    for (; count > 0; count -= 2, from += 2, to += step)                                                               \
        *to = *(const thrifty_word_t *)(const void *)from;

/* Define a thrifty_fill_t: T the input type (s8, u8 or s16), PUT one of NATURAL, SWIZZLED (8-bit, channels in fours), WORDS (16-bit,
 * channels in pairs), LANES the number of interleaved lanes. */
#define THRIFTY_FILL(name, T, PUT, LANES)                                                                              \
    THRIFTY_INLINE void name##_put(thrifty_word_t *to, int32_t first THRIFTY_UNUSED, const thrifty_##T *from, int32_t count)     \
    {                                                                                                                  \
        const int32_t step THRIFTY_UNUSED = THRIFTY_LANE_STEP(LANES);                                                  \
        THRIFTY_PUT_##PUT(T)                                                                                           \
    }                                                                                                                  \
                                                                                                                       \
    static void name(const thrifty_rows_t *r, const void *x, int32_t top, int32_t left, thrifty_word_t *lane)          \
    {                                                                                                                  \
        const int32_t step = THRIFTY_LANE_STEP(LANES), channels = r->in_c, next = (r->column >> 1) * step;             \
        for (int32_t run = r->runs; run > 0; run--, left += r->jump, lane += r->run * next) {                          \
            const thrifty_span_t span = thrifty_span(left, r->run, r->in_w);                                           \
            for (int32_t ky = 0, at = 0; ky < r->kernel_h; ky++, at += channels) {                                     \
                const int32_t row = top + ky, half = at & 1;                                                           \
                thrifty_word_t *to = lane + (at >> 1) * step;                                                          \
                int32_t zeros = r->run, columns = 0;                                                                   \
                if (row >= 0 && row < r->in_h) {                                                                       \
                    zeros = span.begin;                                                                                \
                    columns = span.columns;                                                                            \
                }                                                                                                      \
                for (int32_t i = 0; i < zeros; i++, to += next)                                                        \
                    thrifty_put_zeros(to, half, channels, step);                                                       \
                if (columns == 0)                                                                                      \
                    continue;                                                                                          \
                const thrifty_##T *from = (const thrifty_##T *)x + (row * r->in_w + left + zeros) * channels;                              \
                if (channels == r->column) {                                                                           \
                    name##_put(to, 0, from, columns * channels);                                                       \
                    to += columns * next;                                                                              \
                } else {                                                                                               \
                    for (int32_t i = 0; i < columns; i++, to += next, from += channels)                                \
                        name##_put(to, half, from, channels);                                                          \
                }                                                                                                      \
                for (int32_t i = zeros + columns; i < r->run; i++, to += next)                                         \
                    thrifty_put_zeros(to, half, channels, step);                                                       \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
