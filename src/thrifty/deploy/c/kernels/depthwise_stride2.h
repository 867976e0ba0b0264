/* Integer depthwise convolution, 3x3, stride 2: pairs of input rows, four channels of one output pixel at a time.
 *
 * Two input rows one above the other become one row of words, four channels side by side, the upper element in the low
 * half, so that one SMLAD multiplies two taps of a column. An output pixel takes three columns of two such rows; the
 * filter's columns are the words (w0, w1) for the first and (w2, 0) for the second. Each row of words is made once.
 *
 * Constants of a channel: bias, multiplier (unless requantisation is a shift), then for each column of the filter bytes
 * w0, w2, w1, 0 (W8) or the two words themselves (W16). They are widened for four channels at a time. */
#ifndef THRIFTY_DEPTHWISE_STRIDE2_H
#define THRIFTY_DEPTHWISE_STRIDE2_H

#include "block.h"
#include "rows.h"

#define THRIFTY_DW2_WORDS 32 /* widened constants of four channels: biases, 2 x 3 columns, multipliers */

/* `rows` output rows of four channels. p: first window; row: the same; y, pixel: output and bytes of an output pixel;
 * end: behind the first output row; row_bytes: of an output row; jump: bytes from the end of the first row of words of
 * a window to the second; pitch: from a window to the one below. */
typedef void thrifty_dw2_rows_t(const thrifty_word_t *p, const uint32_t *constants, uint32_t rows,
                                const thrifty_word_t *row, uint8_t *y, uint32_t pixel, const uint8_t *end,
                                uint32_t row_bytes, int32_t jump, int32_t max_less_high, int32_t min_less_low,
                                int32_t shift, uint32_t pitch);

typedef struct thrifty_dw2 thrifty_dw2_t;
typedef void thrifty_dw2_four_t(const thrifty_dw2_t *k, const void *x, void *y, uint32_t *scratch, uint32_t channel);

struct thrifty_dw2 {
    const uint32_t *stream;
    thrifty_dw2_four_t *four; /* four channels */
    thrifty_dw2_rows_t *rows; /* the inner kernel */
    thrifty_finish_t finish;
    uint16_t in_h, in_w, channels, out_h, out_w, top, left;
    uint16_t out_bytes;     /* of an element */
    uint16_t channel_words; /* of the stream, for a channel */
    uint16_t columns;       /* of the buffer */
    uint16_t buffer_rows;   /* out_h + 1: all rows of words at once; or 2 */
};

#define THRIFTY_DW2_WIDEN_W8(from, to)                                                                                 \
    for (int kx = 0; kx < 3; kx++) {                                                                                   \
        (to)[4 * kx] = thrifty_dw2_pair((from)[kx]);                                                                   \
        (to)[12 + 4 * kx] = thrifty_dw2_pair((from)[kx] >> 8);                                                         \
    }
#define THRIFTY_DW2_WIDEN_W16(from, to)                                                                                \
    for (int kx = 0; kx < 3; kx++) {                                                                                   \
        (to)[4 * kx] = (from)[2 * kx];                                                                                 \
        (to)[12 + 4 * kx] = (from)[2 * kx + 1];                                                                        \
    }

/* Bytes 0 and 2 as two 16-bit numbers. */
THRIFTY_INLINE uint32_t thrifty_dw2_pair(uint32_t v)
{
#if THRIFTY_DSP
    return thrifty_even_s8(v);
#else
    return (uint32_t)(uint16_t)(int8_t)(v & 255u) | (uint32_t)(uint16_t)(int8_t)((v >> 16) & 255u) << 16;
#endif
}

/* Four words of a column from an upper and a lower row. */
#if THRIFTY_DSP
#define THRIFTY_DW2_COLUMN_8(T)                                                                                        \
    const uint32_t u = thrifty_load4(upper), l = thrifty_load4(lower);                                                 \
    const uint32_t u02 = thrifty_even_##T(u), u13 = thrifty_odd_##T(u);                                                \
    const uint32_t l02 = thrifty_even_##T(l), l13 = thrifty_odd_##T(l);                                                \
    thrifty_dw2_store(p, thrifty_low_halves(u02, l02), thrifty_low_halves(u13, l13), thrifty_high_halves(u02, l02),    \
                      thrifty_high_halves(u13, l13));
#define THRIFTY_DW2_COLUMN_16(T)                                                                                       \
    const uint32_t u01 = thrifty_load4(upper), u23 = thrifty_load4(upper + 2);                                         \
    const uint32_t l01 = thrifty_load4(lower), l23 = thrifty_load4(lower + 2);                                         \
    thrifty_dw2_store(p, thrifty_low_halves(u01, l01), thrifty_high_halves(u01, l01), thrifty_low_halves(u23, l23),    \
                      thrifty_high_halves(u23, l23));

THRIFTY_INLINE void thrifty_dw2_store(thrifty_word_t *p, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    p[0] = a;
    p[1] = b;
    p[2] = c;
    p[3] = d;
}
#else
#define THRIFTY_DW2_COLUMN_8(T)                                                                                        \
    for (int i = 0; i < 4; i++)                                                                                        \
        p[i] = (uint32_t)(uint16_t)upper[i] | (uint32_t)(uint16_t)lower[i] << 16;
#define THRIFTY_DW2_COLUMN_16(T) THRIFTY_DW2_COLUMN_8(T)
#endif

#if THRIFTY_DSP
/* ---- r0 window, r1 constants, r2-r5 a column, r6 r7 r12 lr its weights, r8-r11 sums ---- */

#define THRIFTY_DW2_STEP                                                                                               \
    "ldmia.w r0!, {r2, r3, r4, r5}\n\tldmia.w r1!, {r6, r7, r12, lr}\n\tsmlad r8, r2, r6, r8\n\t"                      \
    "smlad r9, r3, r7, r9\n\tsmlad r10, r4, r12, r10\n\tsmlad r11, r5, lr, r11\n\t"
#define THRIFTY_DW2_LEFT(r) "lsl.w " r ", " r ", r6\n\t"
#define THRIFTY_DW2_MULT "ldmia.w r1!, {r2, r3, r4, r5}\n\t" THRIFTY_SCALE_FOUR
#define THRIFTY_DW2_PRE "ldr r6, [sp, #80]\n\t" THRIFTY_EACH4(THRIFTY_DW2_LEFT) THRIFTY_DW2_MULT
#define THRIFTY_DW2_SHIFT "ldr r2, [sp, #80]\n\t" THRIFTY_EACH4(THRIFTY_SHIFT_RIGHT)
#define THRIFTY_DW2_PUT_8                                                                                              \
    "strb r8, [r6]\n\tstrb r9, [r6, #1]\n\tstrb r10, [r6, #2]\n\tstrb r11, [r6, #3]\n\t"
#define THRIFTY_DW2_PUT_16                                                                                             \
    "strh r8, [r6]\n\tstrh r9, [r6, #2]\n\tstrh r10, [r6, #4]\n\tstrh r11, [r6, #6]\n\t"
#define THRIFTY_DW2_PUT_S8 THRIFTY_DW2_PUT_8
#define THRIFTY_DW2_PUT_U8 THRIFTY_DW2_PUT_8
#define THRIFTY_DW2_PUT_C8 THRIFTY_DW2_PUT_8
#define THRIFTY_DW2_PUT_S16 THRIFTY_DW2_PUT_16
#define THRIFTY_DW2_PUT_U15 THRIFTY_DW2_PUT_16
#define THRIFTY_DW2_PUT_C16 THRIFTY_DW2_PUT_16

/* Stack: 0 p, 4 constants, 8 rows, 12 row, 16 saved registers, 52 y, 56 pixel, 60 end, 64 row_bytes, 68 jump,
 * 72 limits, 80 shift, 84 pitch. */
#define THRIFTY_DEPTHWISE_STRIDE2(name, REQUANT, STORE)                                                                \
    THRIFTY_ASM_FUNCTION void name(                                                                                    \
        const thrifty_word_t *p THRIFTY_UNUSED, const uint32_t *constants THRIFTY_UNUSED,                              \
        uint32_t rows THRIFTY_UNUSED, const thrifty_word_t *row THRIFTY_UNUSED, uint8_t *y THRIFTY_UNUSED,             \
        uint32_t pixel THRIFTY_UNUSED, const uint8_t *end THRIFTY_UNUSED, uint32_t row_bytes THRIFTY_UNUSED,           \
        int32_t jump THRIFTY_UNUSED, int32_t max_less_high THRIFTY_UNUSED, int32_t min_less_low THRIFTY_UNUSED,        \
        int32_t shift THRIFTY_UNUSED, uint32_t pitch THRIFTY_UNUSED)                                                   \
    {                                                                                                                  \
        __asm__ volatile("push {r0-r11, lr}\n\t"                                                                       \
                         "2: ldr r1, [sp, #4]\n\t"                                                                     \
                         "ldmia.w r1!, {r8, r9, r10, r11}\n\t" THRIFTY_DW2_STEP THRIFTY_DW2_STEP THRIFTY_DW2_STEP      \
                         "ldr r2, [sp, #68]\n\t"                                                                       \
                         "add r0, r0, r2\n\t" THRIFTY_DW2_STEP THRIFTY_DW2_STEP THRIFTY_DW2_STEP                       \
                             THRIFTY_DW2_##REQUANT THRIFTY_LIMITS_##STORE("72") THRIFTY_EACH4(THRIFTY_LIMIT_##STORE)   \
                         "ldrd r6, r7, [sp, #52]\n\t" THRIFTY_DW2_PUT_##STORE "add r6, r6, r7\n\t"                     \
                         "str r6, [sp, #52]\n\t"                                                                       \
                         "ldr r0, [sp]\n\t"                                                                            \
                         "ldr r7, [sp, #60]\n\t"                                                                       \
                         "adds r0, r0, #32\n\t"                                                                        \
                         "str r0, [sp]\n\t"                                                                            \
                         "cmp r6, r7\n\t"                                                                              \
                         "bne.w 2b\n\t"                                                                                \
                         "ldr r6, [sp, #64]\n\t"                                                                       \
                         "add r7, r7, r6\n\t"                                                                          \
                         "str r7, [sp, #60]\n\t"                                                                       \
                         "ldrd r2, r0, [sp, #8]\n\t"                                                                   \
                         "ldr r3, [sp, #84]\n\t"                                                                       \
                         "add r0, r0, r3\n\t"                                                                          \
                         "str r0, [sp]\n\t"                                                                            \
                         "subs r2, r2, #1\n\t"                                                                         \
                         "strd r2, r0, [sp, #8]\n\t"                                                                   \
                         "bne.w 2b\n\t"                                                                                \
                         "add sp, sp, #16\n\t"                                                                         \
                         "pop {r4-r11, pc}\n\t");                                                                      \
    }

#else /* portable: the same walk in C */

#define THRIFTY_DEPTHWISE_STRIDE2(name, REQUANT, STORE)                                                                \
    static void name(const thrifty_word_t *p THRIFTY_UNUSED, const uint32_t *constants, uint32_t rows,                 \
                     const thrifty_word_t *row, uint8_t *y, uint32_t pixel, const uint8_t *end, uint32_t row_bytes,    \
                     int32_t jump, int32_t max_less_high, int32_t min_less_low, int32_t shift, uint32_t pitch)         \
    {                                                                                                                  \
        const thrifty_finish_t finish = {max_less_high, min_less_low, shift};                                          \
        for (; rows > 0; rows--, row += pitch / 4, end += row_bytes)                                                   \
            for (const thrifty_word_t *at = row; y != end; at += 8, y += pixel)                                        \
                for (int channel = 0; channel < 4; channel++) {                                                        \
                    int32_t sum = (int32_t)constants[channel];                                                         \
                    for (int i = 0; i < 6; i++) {                                                                      \
                        const uint32_t v = i < 3 ? at[4 * i + channel] : at[jump / 4 + 4 * i + channel];               \
                        const uint32_t w = constants[4 + 4 * i + channel];                                             \
                        sum += (int16_t)(v & 65535u) * (int16_t)(w & 65535u);                                          \
                        sum += (int16_t)(v >> 16) * (int16_t)(w >> 16);                                                \
                    }                                                                                                  \
                    const uint32_t multiplier THRIFTY_UNUSED = constants[28 + channel];                                \
                    thrifty_store(y + channel * THRIFTY_BYTES_##STORE,                                                 \
                                  THRIFTY_ONE_##REQUANT(sum, 0, multiplier, shift), &finish, THRIFTY_BYTES_##STORE);   \
                }                                                                                                      \
    }
#endif

/* Define a thrifty_dw2_four_t: T and BITS of the input, W of the stream, MULTIPLIERS 1 unless it has none. */
#define THRIFTY_DW2_FOUR(name, T, BITS, W, MULTIPLIERS)                                                                \
    static void name(const thrifty_dw2_t *k, const void *x, void *y, uint32_t *scratch, uint32_t channel)              \
    {                                                                                                                  \
        static const thrifty_##T none[4] = {0, 0, 0, 0};                                                               \
        thrifty_word_t *const buffer = (thrifty_word_t *)(scratch + THRIFTY_DW2_WORDS);                                \
        const thrifty_span_t span = thrifty_span(-(int32_t)k->left, k->columns, k->in_w);                              \
        const uint32_t channels = k->channels, pitch = 4u * k->columns, pixel = channels * k->out_bytes;               \
        const uint32_t skipped = (uint32_t)(span.begin - k->left) * channels;                                          \
        const thrifty_##T *const from = (const thrifty_##T *)x + channel + skipped;                                    \
        const uint32_t *stream = k->stream + channel * k->channel_words;                                               \
        uint8_t *out = (uint8_t *)y + channel * k->out_bytes;                                                          \
        const uint32_t row_bytes = pixel * k->out_w;                                                                   \
        for (int i = 0; i < 4; i++, stream += k->channel_words) {                                                      \
            scratch[i] = stream[0];                                                                                    \
            if (MULTIPLIERS)                                                                                           \
                scratch[28 + i] = stream[1];                                                                           \
            THRIFTY_DW2_WIDEN_##W(stream + 1 + (MULTIPLIERS), scratch + 4 + i)                                         \
        }                                                                                                              \
        int32_t row = -(int32_t)k->top;                                                                                \
        uint32_t slot = 0;                                                                                             \
        for (uint32_t made = 0; made <= k->out_h; made++, row += 2) {                                                  \
            const thrifty_##T *upper = none, *lower = none;                                                            \
            uint32_t upper_step = 0, lower_step = 0;                                                                   \
            if (row >= 0 && row < k->in_h) {                                                                           \
                upper = from + (uint32_t)row * k->in_w * channels;                                                     \
                upper_step = channels;                                                                                 \
            }                                                                                                          \
            if (row + 1 >= 0 && row + 1 < k->in_h) {                                                                   \
                lower = from + (uint32_t)(row + 1) * k->in_w * channels;                                               \
                lower_step = channels;                                                                                 \
            }                                                                                                          \
            thrifty_word_t *p = buffer + slot * pitch + 4 * span.begin;                                                \
            for (int32_t i = span.columns; i > 0; i--, upper += upper_step, lower += lower_step, p += 4) {             \
                THRIFTY_DW2_COLUMN_##BITS(T)                                                                           \
            }                                                                                                          \
            if (++slot == k->buffer_rows)                                                                              \
                slot = 0;                                                                                              \
            if (k->buffer_rows == 2 && made > 0) { /* the row before is in the slot that is next */                    \
                const int32_t jump = slot ? -4 * (int32_t)pitch : 4 * (int32_t)pitch;                                  \
                k->rows(buffer + slot * pitch, scratch, 1, buffer + slot * pitch, out, pixel, out + row_bytes,         \
                        row_bytes, jump - 48, k->finish.max_less_high, k->finish.min_less_low, k->finish.shift, 0);    \
                out += row_bytes;                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        if (k->buffer_rows != 2)                                                                                       \
            k->rows(buffer, scratch, k->out_h, buffer, out, pixel, out + row_bytes, row_bytes,                         \
                    4 * (int32_t)pitch - 48, k->finish.max_less_high, k->finish.min_less_low, k->finish.shift,         \
                    4 * pitch);                                                                                        \
    }

THRIFTY_SHARED void thrifty_depthwise_stride2(const thrifty_dw2_t *k, const void *x, void *y, void *scratch)
{
    thrifty_word_t *const buffer = (thrifty_word_t *)scratch + THRIFTY_DW2_WORDS;
    const thrifty_span_t span = thrifty_span(-(int32_t)k->left, k->columns, k->in_w);
    const int32_t end = span.begin + span.columns, row = 4 * k->columns;
    for (int32_t i = 0; i < k->buffer_rows; i++) { /* columns outside the input are zeros for ever */
        thrifty_put_zeros(buffer + i * row, 0, 8 * span.begin, 1, 0, 1);
        thrifty_put_zeros(buffer + i * row + 4 * end, 0, 8 * (k->columns - end), 1, 0, 1);
    }
    for (uint32_t channel = 0; channel + 4 <= k->channels; channel += 4)
        k->four(k, x, y, (uint32_t *)scratch, channel);
    if (k->channels % 4) /* the last four overlap those before */
        k->four(k, x, y, (uint32_t *)scratch, k->channels - 4u);
}

#endif
