/* The row buffer: the part of the input that some output pixels need, widened to 16 bits, in the order of the weights.
 *
 * A column of the buffer holds what one input column shows to the filter; columns follow each other, so that the window
 * of one output pixel is one contiguous run of columns, and the next window starts a few columns on. Taps outside the
 * input are zeros. `LANES` buffers (of windows that are computed together) are interleaved word by word where the fast
 * kernels read them (one load-multiple fetches a word of each); the portable kernels read them one behind the other.
 *
 * The order inside a column is the one that costs least; pack.py puts the weights in the same order:
 *   NATURAL   [ky][channel]
 *   SWIZZLED  [ky][channel], 8 bits, each four channels as 0,2,1,3: as SXTB16 widens them
 *   WORDS     [ky][channel], 16 bits, an even number of channels
 *   TRIPLES   8 bits, three channels: channels 0 and 2 of every row, then channel 1 of every row */
#ifndef THRIFTY_ROWS_H
#define THRIFTY_ROWS_H

#include "arith.h"

typedef struct {
    uint16_t in_h, in_w, in_c; /* input shape */
    uint16_t kernel_h;
    uint16_t column; /* elements of a buffer column, even */
    uint16_t run;    /* adjacent input columns that are copied together */
    uint16_t runs;   /* how many such runs a buffer holds */
    uint16_t jump;   /* input columns from one run to the next */
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

/* Zeros: `count` elements of `columns` columns, `next` words apart; the first element is half `first` of `to`. */
THRIFTY_SHARED void thrifty_put_zeros(thrifty_word_t *to, int32_t first, int32_t count, int32_t columns, int32_t next,
                                      int32_t step)
{
    for (; columns > 0; columns--, to += next) {
        thrifty_word_t *at = to;
        int32_t left = count;
        if (first) {
            ((thrifty_half_t *)at)[1] = 0;
            at += step;
            left--;
        }
        for (; left >= 2; left -= 2, at += step)
            *at = 0;
        if (left > 0)
            *(thrifty_half_t *)at = 0;
    }
}

/* Elements one by one, in natural order. */
#define THRIFTY_PUT_NATURAL(T)                                                                                         \
    if (first) {                                                                                                       \
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

/* Fours of 8-bit elements. */
#if THRIFTY_DSP
#define THRIFTY_PUT_FOUR(T, at)                                                                                        \
    {                                                                                                                  \
        const uint32_t four = ((const thrifty_word_t *)(const void *)from)[at];                                        \
        to[2 * (at) * step] = thrifty_even_##T(four);                                                                  \
        to[(2 * (at) + 1) * step] = thrifty_odd_##T(four);                                                             \
    }
#else
#define THRIFTY_PUT_FOUR(T, at)                                                                                        \
    {                                                                                                                  \
        thrifty_half_t *half = (thrifty_half_t *)(to + 2 * (at) * step);                                               \
        half[0] = from[4 * (at)];                                                                                      \
        half[1] = from[4 * (at) + 2];                                                                                  \
        half[2] = from[4 * (at) + 1];                                                                                  \
        half[3] = from[4 * (at) + 3];                                                                                  \
    }
#endif
#define THRIFTY_PUT_SWIZZLED(T)                                                                                        \
    for (; count >= 16; count -= 16, from += 16, to += 8 * step) {                                                     \
        THRIFTY_PUT_FOUR(T, 0)                                                                                         \
        THRIFTY_PUT_FOUR(T, 1)                                                                                         \
        THRIFTY_PUT_FOUR(T, 2)                                                                                         \
        THRIFTY_PUT_FOUR(T, 3)                                                                                         \
    }                                                                                                                  \
    if (count & 8) {                                                                                                   \
        THRIFTY_PUT_FOUR(T, 0)                                                                                         \
        THRIFTY_PUT_FOUR(T, 1)                                                                                         \
        from += 8;                                                                                                     \
        to += 4 * step;                                                                                                \
    }                                                                                                                  \
    if (count & 4)                                                                                                     \
        THRIFTY_PUT_FOUR(T, 0)

/* Pairs of 16-bit elements. */
#define THRIFTY_PUT_WORDS(T)                                                                                           \
    const thrifty_word_t *words = (const thrifty_word_t *)(const void *)from;                                          \
    for (; count >= 8; count -= 8, words += 4, to += 4 * step) {                                                       \
        to[0] = words[0];                                                                                              \
        to[step] = words[1];                                                                                           \
        to[2 * step] = words[2];                                                                                       \
        to[3 * step] = words[3];                                                                                       \
    }                                                                                                                  \
    if (count & 4) {                                                                                                   \
        to[0] = words[0];                                                                                              \
        to[step] = words[1];                                                                                           \
        words += 2;                                                                                                    \
        to += 2 * step;                                                                                                \
    }                                                                                                                  \
    if (count & 2)                                                                                                     \
        *to = *words;

/* Define a thrifty_fill_t: T the input type (s8, u8 or s16), PUT one of NATURAL, SWIZZLED, WORDS. */
#define THRIFTY_FILL(name, T, PUT, LANES)                                                                              \
    static void name(const thrifty_rows_t *r, const void *x, int32_t top, int32_t left, thrifty_word_t *lane)          \
    {                                                                                                                  \
        const int32_t step = THRIFTY_LANE_STEP(LANES), channels = r->in_c, next = (r->column >> 1) * step;             \
        for (int32_t run = r->runs; run > 0; run--, left += r->jump, lane += r->run * next) {                          \
            const thrifty_span_t span = thrifty_span(left, r->run, r->in_w);                                           \
            for (int32_t ky = 0, at = 0; ky < r->kernel_h; ky++, at += channels) {                                     \
                const int32_t row = top + ky, first THRIFTY_UNUSED = at & 1;                                           \
                const int32_t columns = row >= 0 && row < r->in_h ? span.columns : 0;                                  \
                const int32_t zeros = columns ? span.begin : r->run;                                                   \
                thrifty_word_t *place = lane + (at >> 1) * step;                                                       \
                if (zeros > 0)                                                                                         \
                    thrifty_put_zeros(place, first, channels, zeros, next, step);                                      \
                if (columns > 0) {                                                                                     \
                    const thrifty_##T *source = (const thrifty_##T *)x + (row * r->in_w + left + zeros) * channels;    \
                    const int32_t joined = channels == r->column ? columns : 1; /* columns without a gap */            \
                    place += zeros * next;                                                                             \
                    for (int32_t i = columns; i > 0; i -= joined) {                                                    \
                        const thrifty_##T *from = source;                                                              \
                        thrifty_word_t *to = place;                                                                    \
                        int32_t count = joined * channels;                                                             \
                        THRIFTY_PUT_##PUT(T)                                                                           \
                        place += joined * next;                                                                        \
                        source += joined * channels;                                                                   \
                    }                                                                                                  \
                    if (zeros + columns < r->run)                                                                      \
                        thrifty_put_zeros(place, first, channels, r->run - zeros - columns, next, step);               \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

/* One word of channels 0 and 2 for each row; behind them one of channel 1 for each two rows. A last single row has a
 * word of channel 1 by itself, whose upper half meets a zero weight. Four bytes are read for three, but at the end. */
#if THRIFTY_DSP
#define THRIFTY_TRIPLE(T, from, last) ((last) ? thrifty_triple_end((const uint8_t *)(from)) : thrifty_load4(from))
#define THRIFTY_TRIPLE_EVEN(T, v) thrifty_even_##T(v)
#define THRIFTY_TRIPLE_ODD(T, v) thrifty_odd_##T(v)
#define THRIFTY_TRIPLE_BOTH(a, b) thrifty_low_halves(a, b)
#else
#define THRIFTY_TRIPLE(T, from, last) thrifty_triple_end((const uint8_t *)(from))
#define THRIFTY_TRIPLE_EVEN(T, v)                                                                                      \
    ((uint32_t)(uint16_t)(thrifty_##T)((v) & 255u) | (uint32_t)(uint16_t)(thrifty_##T)(((v) >> 16) & 255u) << 16)
#define THRIFTY_TRIPLE_ODD(T, v) ((uint32_t)(uint16_t)(thrifty_##T)(((v) >> 8) & 255u))
#define THRIFTY_TRIPLE_BOTH(a, b) ((a) | (b) << 16)
#endif

THRIFTY_INLINE uint32_t thrifty_triple_end(const uint8_t *from)
{
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16;
}

#define THRIFTY_FILL_TRIPLES(name, T, LANES)                                                                           \
    static void name(const thrifty_rows_t *r, const void *x, int32_t top, int32_t left, thrifty_word_t *lane)          \
    {                                                                                                                  \
        static const thrifty_##T none[4] = {0, 0, 0, 0};                                                               \
        const int32_t step = THRIFTY_LANE_STEP(LANES), next = (r->column >> 1) * step;                                 \
        for (int32_t run = r->runs; run > 0; run--, left += r->jump, lane += r->run * next) {                          \
            const thrifty_span_t span = thrifty_span(left, r->run, r->in_w);                                           \
            const int32_t behind = r->run - span.begin - span.columns;                                                 \
            if (span.begin > 0)                                                                                        \
                thrifty_put_zeros(lane, 0, r->column, span.begin, next, step);                                         \
            if (behind > 0)                                                                                            \
                thrifty_put_zeros(lane + (r->run - behind) * next, 0, r->column, behind, next, step);                  \
            if (span.columns == 0)                                                                                     \
                continue;                                                                                              \
            thrifty_word_t *even = lane + span.begin * next, *odd = even + r->kernel_h * step;                         \
            for (int32_t ky = 0; ky < r->kernel_h; ky += 2, even += 2 * step, odd += step) {                           \
                const int32_t row = top + ky, single = ky + 1 == r->kernel_h;                                          \
                const thrifty_##T *a = none, *b = none;                                                                \
                int32_t step_a = 0, step_b = 0;                                                                        \
                if (row >= 0 && row < r->in_h) {                                                                       \
                    a = (const thrifty_##T *)x + (row * r->in_w + left + span.begin) * 3;                              \
                    step_a = 3;                                                                                        \
                }                                                                                                      \
                if (!single && row + 1 >= 0 && row + 1 < r->in_h) {                                                    \
                    b = (const thrifty_##T *)x + ((row + 1) * r->in_w + left + span.begin) * 3;                        \
                    step_b = 3;                                                                                        \
                }                                                                                                      \
                thrifty_word_t *to = even, *to_odd = odd;                                                              \
                if (single)                                                                                            \
                    for (int32_t i = span.columns; i > 0; i--, a += step_a, to += next, to_odd += next) {              \
                        const uint32_t va = THRIFTY_TRIPLE(T, a, i == 1);                                              \
                        *to = THRIFTY_TRIPLE_EVEN(T, va);                                                              \
                        *to_odd = THRIFTY_TRIPLE_ODD(T, va);                                                           \
                    }                                                                                                  \
                else                                                                                                   \
                    for (int32_t i = span.columns; i > 0; i--, a += step_a, b += step_b, to += next, to_odd += next) { \
                        const uint32_t va = THRIFTY_TRIPLE(T, a, i == 1), vb = THRIFTY_TRIPLE(T, b, i == 1);           \
                        to[0] = THRIFTY_TRIPLE_EVEN(T, va);                                                            \
                        to[step] = THRIFTY_TRIPLE_EVEN(T, vb);                                                         \
                        *to_odd = THRIFTY_TRIPLE_BOTH(THRIFTY_TRIPLE_ODD(T, va), THRIFTY_TRIPLE_ODD(T, vb));           \
                    }                                                                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }

#endif
