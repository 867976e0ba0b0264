/* Integer depthwise convolution, 3x3, stride 1: pairs of input rows, four channels at a time.
 *
 * Two input rows one above the other become one row of words, the upper element in the low half, so that one SMLAD
 * multiplies two taps of a column. Two output rows are computed together: a column of four input rows is two words p
 * and q, the column of the filter the words a = (w0, w1) and b = (w1, w2), and the sums gain
 *     upper: p.a + low(q) high(b)      lower: high(p) low(a) + q.b
 * The buffer holds, for each column, p and q of four channels side by side; the q of one row of pairs is the p of the
 * next, and is stored as both when it is made.
 *
 * Constants of a channel: bias, multiplier (unless requantisation is a shift), then for each column of the filter bytes
 * w0, w1, w1, w2 (W8: SXTB16 makes a and b of them) or a and b themselves (W16). */
#ifndef THRIFTY_DEPTHWISE_H
#define THRIFTY_DEPTHWISE_H

#include "block.h"
#include "rows.h"

/* `rows` rows of windows of four channels. end: behind the last window of the first row; pitch: bytes of a row of the
 * buffer; lower: bytes from an output row to the one below; pixel: bytes of an output pixel; next: bytes from the end
 * of an upper output row to the next upper one. */
typedef void thrifty_depthwise_rows_t(const thrifty_word_t *p, const uint32_t *stream, void *y, uint32_t rows,
                                      const thrifty_word_t *end, uint32_t pitch, uint32_t lower, uint32_t pixel,
                                      int32_t next, int32_t max_less_high, int32_t min_less_low, int32_t shift,
                                      uint32_t spare0, uint32_t spare1, uint32_t channels);

typedef struct thrifty_depthwise thrifty_depthwise_t;

/* Four channels from `channel` on. */
typedef void thrifty_depthwise_four_t(const thrifty_depthwise_t *k, const void *x, void *y, thrifty_word_t *buffer,
                                      uint32_t channel);

struct thrifty_depthwise {
    const uint32_t *stream;
    thrifty_depthwise_four_t *four; /* four channels */
    thrifty_depthwise_rows_t *rows; /* the inner kernel */
    thrifty_finish_t finish;
    uint16_t in_h, in_w, channels, out_h, out_w, top, left;
    uint16_t out_bytes;           /* of an element */
    uint16_t channel_words;       /* of the stream, for a channel */
    uint16_t columns;             /* of the buffer */
    uint16_t together;            /* rows of windows that the buffer holds for the inner kernel: 1, or all */
    uint16_t buffer_rows;
};

#define THRIFTY_PAIR_STORE(at, v)                                                                                      \
    p[2 * (at)] = v;                                                                                                   \
    q[2 * (at)] = v;
#if THRIFTY_DSP
#define THRIFTY_PAIR_8(T)                                                                                              \
    const uint32_t u = thrifty_load4(upper), l = thrifty_load4(lower);                                                 \
    const uint32_t u02 = thrifty_even_##T(u), u13 = thrifty_odd_##T(u);                                                \
    const uint32_t l02 = thrifty_even_##T(l), l13 = thrifty_odd_##T(l);                                                \
    THRIFTY_PAIR_STORE(0, thrifty_low_halves(u02, l02))                                                                \
    THRIFTY_PAIR_STORE(1, thrifty_low_halves(u13, l13))                                                                \
    THRIFTY_PAIR_STORE(2, thrifty_high_halves(u02, l02))                                                               \
    THRIFTY_PAIR_STORE(3, thrifty_high_halves(u13, l13))
#define THRIFTY_PAIR_16(T)                                                                                             \
    const uint32_t u01 = thrifty_load4(upper), u23 = thrifty_load4(upper + 2);                                         \
    const uint32_t l01 = thrifty_load4(lower), l23 = thrifty_load4(lower + 2);                                         \
    THRIFTY_PAIR_STORE(0, thrifty_low_halves(u01, l01))                                                                \
    THRIFTY_PAIR_STORE(1, thrifty_high_halves(u01, l01))                                                               \
    THRIFTY_PAIR_STORE(2, thrifty_low_halves(u23, l23))                                                                \
    THRIFTY_PAIR_STORE(3, thrifty_high_halves(u23, l23))
#else
#define THRIFTY_PAIR_8(T)                                                                                              \
    for (int channel = 0; channel < 4; channel++) {                                                                    \
        const uint32_t both = (uint32_t)(uint16_t)upper[channel] | (uint32_t)(uint16_t)lower[channel] << 16;           \
        THRIFTY_PAIR_STORE(channel, both)                                                                              \
    }
#define THRIFTY_PAIR_16(T) THRIFTY_PAIR_8(T)
#endif

#if THRIFTY_DSP
/* ---- r0 window, r1 output, r2 bias, r3 multiplier or shift, r4-r9 the filter, r10 r11 a column, r12 lr sums ---- */

#define THRIFTY_DW_WIDEN_W8                                                                                            \
    "sxtb16 r4, r5\n\tsxtb16 r5, r5, ror #8\n\tsxtb16 r6, r7\n\tsxtb16 r7, r7, ror #8\n\t"                             \
    "sxtb16 r8, r9\n\tsxtb16 r9, r9, ror #8\n\t"
#define THRIFTY_DW_LOAD_W8_MULT "ldmia.w r12!, {r2, r3, r5, r7, r9}\n\t" THRIFTY_DW_WIDEN_W8
#define THRIFTY_DW_LOAD_W8_PRE THRIFTY_DW_LOAD_W8_MULT
#define THRIFTY_DW_LOAD_W8_SHIFT "ldmia.w r12!, {r2, r5, r7, r9}\n\tldr r3, [sp, #80]\n\t" THRIFTY_DW_WIDEN_W8
#define THRIFTY_DW_LOAD_W16_MULT "ldmia.w r12!, {r2, r3, r4, r5, r6, r7, r8, r9}\n\t"
#define THRIFTY_DW_LOAD_W16_PRE THRIFTY_DW_LOAD_W16_MULT
#define THRIFTY_DW_LOAD_W16_SHIFT "ldmia.w r12!, {r2, r4, r5, r6, r7, r8, r9}\n\tldr r3, [sp, #80]\n\t"

#define THRIFTY_DW_UPPER(a, b, start) "smlad r12, r10, " a ", " start "\n\tsmlabt r12, r11, " b ", r12\n\t"
#define THRIFTY_DW_LOWER(a, b, start) "smlatb lr, r10, " a ", " start "\n\tsmlad lr, r11, " b ", lr\n\t"
#define THRIFTY_DW_BOTH(a, b, upper, lower) THRIFTY_DW_UPPER(a, b, upper) THRIFTY_DW_LOWER(a, b, lower)
#define THRIFTY_DW_SUMS                                                                                                \
    "ldrd r10, r11, [r0], #32\n\t" THRIFTY_DW_BOTH("r4", "r5", "r2", "r2") "ldrd r10, r11, [r0]\n\t"                   \
    THRIFTY_DW_BOTH("r6", "r7", "r12", "lr") "ldrd r10, r11, [r0, #32]\n\t" THRIFTY_DW_BOTH("r8", "r9", "r12", "lr")
#define THRIFTY_DW_EACH(op) op("r12") op("lr")
#define THRIFTY_DW_SCALE(r) "smmulr " r ", " r ", r3\n\t"
#define THRIFTY_DW_RIGHT(r) "asr.w " r ", " r ", r3\n\t"
#define THRIFTY_DW_LEFT(r) "lsl.w " r ", " r ", r10\n\t"
#define THRIFTY_DW_MULT THRIFTY_DW_EACH(THRIFTY_DW_SCALE)
#define THRIFTY_DW_PRE "ldr r10, [sp, #80]\n\t" THRIFTY_DW_EACH(THRIFTY_DW_LEFT) THRIFTY_DW_EACH(THRIFTY_DW_SCALE)
#define THRIFTY_DW_SHIFT THRIFTY_DW_EACH(THRIFTY_DW_RIGHT)
#define THRIFTY_DW_QADD(r)                                                                                             \
    "qadd " r ", " r ", r10\n\tsub.w " r ", " r ", r10\n\tqadd " r ", " r ", r11\n\tsub.w " r ", " r ", r11\n\t"
#define THRIFTY_DW_CLAMP_S8 THRIFTY_DW_EACH(THRIFTY_LIMIT_S8)
#define THRIFTY_DW_CLAMP_U8 THRIFTY_DW_EACH(THRIFTY_LIMIT_U8)
#define THRIFTY_DW_CLAMP_S16 THRIFTY_DW_EACH(THRIFTY_LIMIT_S16)
#define THRIFTY_DW_CLAMP_U15 THRIFTY_DW_EACH(THRIFTY_LIMIT_U15)
#define THRIFTY_DW_CLAMP_C8 "ldrd r10, r11, [sp, #72]\n\t" THRIFTY_DW_EACH(THRIFTY_DW_QADD)
#define THRIFTY_DW_CLAMP_C16 THRIFTY_DW_CLAMP_C8
/* the lower output first: where there is none, both have one address */
#define THRIFTY_DW_STORE(b)                                                                                            \
    "ldrd r10, r11, [sp, #60]\n\tstr" b ".w lr, [r1, r10]\n\tstr" b ".w r12, [r1]\n\tadd.w r1, r1, r11\n\t"
#define THRIFTY_DW_BYTES_S8 "b"
#define THRIFTY_DW_BYTES_U8 "b"
#define THRIFTY_DW_BYTES_C8 "b"
#define THRIFTY_DW_BYTES_S16 "h"
#define THRIFTY_DW_BYTES_U15 "h"
#define THRIFTY_DW_BYTES_C16 "h"
#define THRIFTY_DW_ITEM_S8 "1"
#define THRIFTY_DW_ITEM_U8 "1"
#define THRIFTY_DW_ITEM_C8 "1"
#define THRIFTY_DW_ITEM_S16 "2"
#define THRIFTY_DW_ITEM_U15 "2"
#define THRIFTY_DW_ITEM_C16 "2"

/* Stack: 0 p, 4 stream, 8 y, 12 rows, 16 saved registers, 52 end, 56 pitch, 60 lower, 64 pixel, 68 next, 72 limits,
 * 80 shift, 84 rows left, 88 end of this row, 92 channels left. */
#define THRIFTY_DEPTHWISE(name, W, REQUANT, STORE)                                                                     \
    THRIFTY_ASM_FUNCTION void name(                                                                                    \
        const thrifty_word_t *p THRIFTY_UNUSED, const uint32_t *stream THRIFTY_UNUSED, void *y THRIFTY_UNUSED,         \
        uint32_t rows THRIFTY_UNUSED, const thrifty_word_t *end THRIFTY_UNUSED, uint32_t pitch THRIFTY_UNUSED,         \
        uint32_t lower THRIFTY_UNUSED, uint32_t pixel THRIFTY_UNUSED, int32_t next THRIFTY_UNUSED,                     \
        int32_t max_less_high THRIFTY_UNUSED, int32_t min_less_low THRIFTY_UNUSED, int32_t shift THRIFTY_UNUSED,       \
        uint32_t spare0 THRIFTY_UNUSED, uint32_t spare1 THRIFTY_UNUSED, uint32_t channels THRIFTY_UNUSED)              \
    {                                                                                                                  \
        __asm__ volatile("push {r0-r11, lr}\n\t"                                                                       \
                         "1: ldr r12, [sp, #4]\n\t" THRIFTY_DW_LOAD_##W##_##REQUANT "str r12, [sp, #4]\n\t"            \
                         "ldr r0, [sp]\n\t"                                                                            \
                         "ldr r1, [sp, #8]\n\t"                                                                        \
                         "ldr r10, [sp, #12]\n\t"                                                                      \
                         "ldr r11, [sp, #52]\n\t"                                                                      \
                         "strd r10, r11, [sp, #84]\n\t"                                                                \
                         "2:\n\t" THRIFTY_DW_SUMS THRIFTY_DW_##REQUANT THRIFTY_DW_CLAMP_##STORE                        \
                             THRIFTY_DW_STORE(THRIFTY_DW_BYTES_##STORE)        "ldr r10, [sp, #88]\n\t"                \
                         "cmp r0, r10\n\t"                                                                             \
                         "bne.n 2b\n\t"                                                                                \
                         "ldrd r10, r11, [sp, #84]\n\t"                                                                \
                         "ldr r12, [sp, #56]\n\t"                                                                      \
                         "add r11, r11, r12\n\t"                                                                       \
                         "ldr r12, [sp, #68]\n\t"                                                                      \
                         "add r1, r1, r12\n\t"                                                                         \
                         "add r0, r0, #64\n\t"                                                                         \
                         "subs r10, r10, #1\n\t"                                                                       \
                         "strd r10, r11, [sp, #84]\n\t"                                                                \
                         "bne.n 2b\n\t"                                                                                \
                         "ldrd r0, r1, [sp, #4]\n\t"                                                                   \
                         "add r1, r1, #" THRIFTY_DW_ITEM_##STORE "\n\t"                                                \
                         "str r1, [sp, #8]\n\t"                                                                        \
                         "ldr r0, [sp]\n\t"                                                                            \
                         "add r0, r0, #8\n\t"                                                                          \
                         "str r0, [sp]\n\t"                                                                            \
                         "ldr r1, [sp, #52]\n\t"                                                                       \
                         "add r1, r1, #8\n\t"                                                                          \
                         "str r1, [sp, #52]\n\t"                                                                       \
                         "ldr r0, [sp, #92]\n\t"                                                                       \
                         "subs r0, r0, #1\n\t"                                                                         \
                         "str r0, [sp, #92]\n\t"                                                                       \
                         "bne.w 1b\n\t"                                                                                \
                         "add sp, sp, #16\n\t"                                                                         \
                         "pop {r4-r11, pc}\n\t");                                                                      \
    }

#else /* portable: the same walk in C */

#define THRIFTY_DW_TAPS_W8(at, kx, w)                                                                                  \
    const int32_t w0 = (int8_t)((at)[kx] & 255u), w1 = (int8_t)(((at)[kx] >> 8) & 255u), w2 = (int8_t)((at)[kx] >> 24);
#define THRIFTY_DW_TAPS_W16(at, kx, w)                                                                                 \
    const int32_t w0 = (int16_t)((at)[2 * (kx)] & 65535u), w1 = (int16_t)((at)[2 * (kx)] >> 16),                       \
                  w2 = (int16_t)((at)[2 * (kx) + 1] >> 16);
#define THRIFTY_DW_WORDS_W8 3
#define THRIFTY_DW_WORDS_W16 6

#define THRIFTY_DEPTHWISE(name, W, REQUANT, STORE)                                                                     \
    static void name(const thrifty_word_t *p, const uint32_t *stream, void *y, uint32_t rows,                          \
                     const thrifty_word_t *end, uint32_t pitch, uint32_t lower, uint32_t pixel, int32_t next,          \
                     int32_t max_less_high, int32_t min_less_low, int32_t shift, uint32_t spare0 THRIFTY_UNUSED,       \
                     uint32_t spare1 THRIFTY_UNUSED, uint32_t channels)                                                \
    {                                                                                                                  \
        const thrifty_finish_t finish = {max_less_high, min_less_low, shift};                                          \
        for (uint32_t channel = 0; channel < channels; channel++) {                                                    \
            const int32_t bias = (int32_t)stream[0];                                                                   \
            const uint32_t multiplier THRIFTY_UNUSED = stream[1];                                                      \
            const uint32_t *const filter = stream + 1 + THRIFTY_HAS_MULTIPLIER_##REQUANT;                              \
            uint8_t *out = (uint8_t *)y + channel * THRIFTY_BYTES_##STORE;                                             \
            for (uint32_t row = 0; row < rows; row++, out += next) {                                                   \
                const uint32_t from = row * (pitch / 4) + 2 * channel, to = from + (uint32_t)(end - p);                \
                for (uint32_t at = from; at < to; at += 8, out += pixel) {                                             \
                    int32_t upper_sum = bias, lower_sum = bias;                                                        \
                    for (uint32_t kx = 0; kx < 3; kx++) {                                                              \
                        const uint32_t pw = p[at + 8 * kx], qw = p[at + 8 * kx + 1];                                   \
                        const int32_t x0 = (int16_t)(pw & 65535u), x1 = (int16_t)(pw >> 16);                           \
                        const int32_t x2 = (int16_t)(qw & 65535u), x3 = (int16_t)(qw >> 16);                           \
                        THRIFTY_DW_TAPS_##W(filter, kx, w)                                                             \
                        upper_sum += x0 * w0 + x1 * w1 + x2 * w2;                                                      \
                        lower_sum += x1 * w0 + x2 * w1 + x3 * w2;                                                      \
                    }                                                                                                  \
                    thrifty_store(out + lower, THRIFTY_ONE_##REQUANT(lower_sum, 0, multiplier, shift), &finish,        \
                                  THRIFTY_BYTES_##STORE);                                                              \
                    thrifty_store(out, THRIFTY_ONE_##REQUANT(upper_sum, 0, multiplier, shift), &finish,                \
                                  THRIFTY_BYTES_##STORE);                                                              \
                }                                                                                                      \
            }                                                                                                          \
            stream = filter + THRIFTY_DW_WORDS_##W;                                                                    \
        }                                                                                                              \
    }
#endif

/* Run the inner kernel over `count` rows of windows that lie one behind the other in the buffer. */
THRIFTY_SHARED void thrifty_depthwise_run(const thrifty_depthwise_t *k, const thrifty_word_t *p, const uint32_t *stream,
                                         uint8_t *y, uint32_t count, uint32_t lower)
{
    const uint32_t pixel = (uint32_t)k->channels * k->out_bytes, row = pixel * k->out_w;
    if (count > 0)
        k->rows(p, stream, y, count, p + 8u * k->out_w, 32u * k->columns, lower, pixel,
                (int32_t)row, k->finish.max_less_high, k->finish.min_less_low, k->finish.shift, 0, 0,
                4);
}

#define THRIFTY_DEPTHWISE_FOUR(name, T, BITS)                                                                          \
    static void name(const thrifty_depthwise_t *k, const void *x, void *y, thrifty_word_t *buffer, uint32_t channel)   \
    {                                                                                                                  \
        static const thrifty_##T none[4] = {0, 0, 0, 0};                                                               \
        const uint32_t windows = (k->out_h + 1u) / 2u, whole = k->out_h / 2u; /* rows of windows; with two outputs */  \
        const uint32_t ring = k->together == 1 ? 2 : windows, row_words = 8u * k->columns;                             \
        const uint32_t row_bytes = (uint32_t)k->channels * k->out_bytes * k->out_w, pixel = k->channels;               \
        const thrifty_span_t span = thrifty_span(-(int32_t)k->left, k->columns, k->in_w);                              \
        const thrifty_##T *const from = (const thrifty_##T *)x + channel + (uint32_t)(span.begin - k->left) * pixel;   \
        const uint32_t *const stream = k->stream + channel * k->channel_words;                                         \
        thrifty_word_t *place = buffer + 8 * span.begin, *before = place;                                              \
        uint8_t *out = (uint8_t *)y + channel * k->out_bytes;                                                          \
        int32_t row = -(int32_t)k->top;                                                                                \
        for (uint32_t pair = 0, slot = 0; pair <= windows; pair++, row += 2) {                                         \
            /* the words are p of this row of windows and q of the one before; only one of them at the ends */         \
            thrifty_word_t *p = pair < windows ? place : before + 1, *q = pair > 0 ? before + 1 : place;               \
            const thrifty_##T *upper = none, *lower = none;                                                            \
            uint32_t upper_step = 0, lower_step = 0;                                                                   \
            if (row >= 0 && row < k->in_h) {                                                                           \
                upper = from + (uint32_t)row * k->in_w * pixel;                                                        \
                upper_step = pixel;                                                                                    \
            }                                                                                                          \
            if (row + 1 >= 0 && row + 1 < k->in_h) {                                                                   \
                lower = from + (uint32_t)(row + 1) * k->in_w * pixel;                                                  \
                lower_step = pixel;                                                                                    \
            }                                                                                                          \
            for (int32_t i = span.columns; i > 0; i--, upper += upper_step, lower += lower_step, p += 8, q += 8) {     \
                THRIFTY_PAIR_##BITS(T)                                                                                 \
            }                                                                                                          \
            if (k->together == 1 && pair > 0) {                                                                        \
                thrifty_depthwise_run(k, before - 8 * span.begin, stream, out, 1, pair <= whole ? row_bytes : 0);      \
                out += 2u * row_bytes;                                                                                 \
            }                                                                                                          \
            before = place;                                                                                            \
            slot = slot + 1 == ring ? 0 : slot + 1;                                                                    \
            place = buffer + slot * row_words + 8 * span.begin;                                                        \
        }                                                                                                              \
        if (k->together != 1) {                                                                                        \
            thrifty_depthwise_run(k, buffer, stream, out, whole, row_bytes);                                           \
            thrifty_depthwise_run(k, buffer + whole * row_words, stream, out + whole * 2u * row_bytes,                 \
                                  windows - whole, 0);                                                                 \
        }                                                                                                              \
    }

THRIFTY_SHARED void thrifty_depthwise(const thrifty_depthwise_t *k, const void *x, void *y, void *scratch)
{
    thrifty_word_t *const buffer = (thrifty_word_t *)scratch;
    const thrifty_span_t span = thrifty_span(-(int32_t)k->left, k->columns, k->in_w);
    const int32_t end = span.begin + span.columns, row = 8 * k->columns;
    for (int32_t i = 0; i < k->buffer_rows; i++) { /* columns outside the input are zeros for ever */
        thrifty_put_zeros(buffer + i * row, 0, 16 * span.begin, 1, 0, 1);
        thrifty_put_zeros(buffer + i * row + 8 * end, 0, 16 * (k->columns - end), 1, 0, 1);
    }
    for (uint32_t channel = 0; channel + 4 <= k->channels; channel += 4)
        k->four(k, x, y, buffer, channel);
    if (k->channels % 4) /* the last four overlap those before */
        k->four(k, x, y, buffer, k->channels - 4u);
}

#endif
