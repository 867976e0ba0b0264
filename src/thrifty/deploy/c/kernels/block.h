/* The inner kernels of conv.h and linear.h: two channels times three lanes, or four channels times one lane.
 *
 * How weights are stored in the stream (pack.py), for each channel of the block in turn, per step:
 *   W8   four taps a word, bytes (0,2,1,3): SXTB16 gives taps 0,1 and, rotated by eight bits, taps 2,3
 *   W16  two taps a word, two words a step
 *   W4   eight taps a word. AND with 0xF000F000 leaves two nibbles at the top of their halves, a factor of 2^12 with
 *        their sign in place; the word shifted left by 4, 8, 12 bits gives the next pairs. Sums carry the factor.
 *   W4X  the same words; AND with 0xF0F0F0F0, then SXTB16: a factor of 2^4, for sums that 2^12 would overflow
 *
 * Registers of the pair kernel: r0 window, r1 stream (W4: the mask), r2 r3 weights, r4 widened weights, r5-r7 two taps
 * of three lanes, r8-r10 and r11-lr the sums of the two channels. All else lives on the stack. The first pass through
 * the four unrolled steps enters where (steps mod 4) are left. Instructions of a step are all four bytes long. */
#ifndef THRIFTY_BLOCK_H
#define THRIFTY_BLOCK_H

#include "arith.h"

#define THRIFTY_LANES 3

/* Widths of a step: taps, and words of each channel. */
#define THRIFTY_TAPS_W8 4
#define THRIFTY_TAPS_W16 4
#define THRIFTY_TAPS_W4 8
#define THRIFTY_TAPS_W4X 8
#define THRIFTY_WORDS_W8 1
#define THRIFTY_WORDS_W16 2
#define THRIFTY_WORDS_W4 1
#define THRIFTY_WORDS_W4X 1

/* Limits in the form that the saturating additions of the kernels want, and what requantisation needs besides. */
typedef struct {
    int32_t max_less_high; /* INT32_MAX - high */
    int32_t min_less_low;  /* INT32_MIN - low */
    int32_t shift;         /* SHIFT: the right shift, the factor of W4 included; PRE: the left shift */
} thrifty_finish_t;

/* All pairs of channels for each of `pixels` windows in three lanes.
 * window, window_end: first word and the word behind the last step; advance: bytes to the next window;
 * stream, stream_end: the pairs; steps: per window; y0, y1, y2: output of the first pixel of each lane;
 * skip: bytes of a last odd channel; lane, pixel: bytes of a lane, of an output pixel (portable only). */
typedef void thrifty_pairs_t(const thrifty_word_t *window, const uint32_t *stream, const uint32_t *stream_end,
                             uint32_t pixels, uint32_t advance, const thrifty_word_t *window_end, void *y0, void *y1,
                             void *y2, uint32_t skip, uint32_t steps, int32_t max_less_high, int32_t min_less_low,
                             int32_t shift, uint32_t lane, uint32_t pixel);

/* All fours of channels for one window. */
typedef void thrifty_fours_t(const thrifty_word_t *window, const uint32_t *stream, const uint32_t *stream_end, void *y,
                             uint32_t steps, int32_t max_less_high, int32_t min_less_low, int32_t shift,
                             const thrifty_word_t *window_end);

/* One channel for each of `pixels` windows, in one or three lanes; y: one pointer for each lane. Returns the stream
 * behind it. */
typedef const uint32_t *thrifty_single_t(const thrifty_word_t *window, const uint32_t *stream, uint32_t pixels,
                                         uint32_t advance, uint32_t steps, uint8_t *const *y, uint32_t pixel_bytes,
                                         const thrifty_finish_t *finish, uint32_t lane);

/* ---- requantise, clamp, store: one sum, in C ---- */

#define THRIFTY_FACTOR_W8 0
#define THRIFTY_FACTOR_W16 0
#define THRIFTY_FACTOR_W4 12
#define THRIFTY_FACTOR_W4X 4

#define THRIFTY_ONE_MULT(sum, factor, multiplier, shift) thrifty_scale((sum) >> (factor), (int32_t)(multiplier), 0)
#define THRIFTY_ONE_PRE(sum, factor, multiplier, shift) thrifty_scale((sum) >> (factor), (int32_t)(multiplier), shift)
#define THRIFTY_ONE_SHIFT(sum, factor, multiplier, shift) thrifty_floor_shift(sum, shift)
#define THRIFTY_HAS_MULTIPLIER_MULT 1
#define THRIFTY_HAS_MULTIPLIER_PRE 1
#define THRIFTY_HAS_MULTIPLIER_SHIFT 0

#define THRIFTY_BYTES_S8 1
#define THRIFTY_BYTES_U8 1
#define THRIFTY_BYTES_C8 1
#define THRIFTY_BYTES_S16 2
#define THRIFTY_BYTES_U15 2
#define THRIFTY_BYTES_C16 2

THRIFTY_INLINE void thrifty_store(void *y, int32_t v, const thrifty_finish_t *f, const int bytes)
{
    v = thrifty_clamp(v, INT32_MIN - f->min_less_low, INT32_MAX - f->max_less_high);
    if (bytes == 1)
        *(uint8_t *)y = (uint8_t)v;
    else
        *(thrifty_half_t *)y = (int16_t)v;
}

#if THRIFTY_DSP

/* ---- assembly: the parts of both kernels ---- */

#define THRIFTY_MAC3A(w) "smlad r8, " w ", r5, r8\n\tsmlad r9, " w ", r6, r9\n\tsmlad r10, " w ", r7, r10\n\t"
#define THRIFTY_MAC3B(w) "smlad r11, " w ", r5, r11\n\tsmlad r12, " w ", r6, r12\n\tsmlad lr, " w ", r7, lr\n\t"
#define THRIFTY_LANES_IN "ldmia.w r0!, {r5, r6, r7}\n\t"

#define THRIFTY_PAIR_STEP_W8                                                                                           \
    "ldmia.w r1!, {r2, r3}\n\t" THRIFTY_LANES_IN                                                                       \
    "sxtb16 r4, r2\n\t" THRIFTY_MAC3A("r4") "sxtb16 r4, r3\n\t" THRIFTY_MAC3B("r4") THRIFTY_LANES_IN                   \
    "sxtb16 r2, r2, ror #8\n\t" THRIFTY_MAC3A("r2") "sxtb16 r3, r3, ror #8\n\t" THRIFTY_MAC3B("r3")
#define THRIFTY_PAIR_BYTES_W8 "76"

#define THRIFTY_PAIR_STEP_W16                                                                                          \
    "ldmia.w r1!, {r2, r3}\n\t" THRIFTY_LANES_IN THRIFTY_MAC3A("r2") THRIFTY_MAC3B("r3")                               \
    "ldmia.w r1!, {r2, r3}\n\t" THRIFTY_LANES_IN THRIFTY_MAC3A("r2") THRIFTY_MAC3B("r3")
#define THRIFTY_PAIR_BYTES_W16 "64"

#define THRIFTY_PAIR_WORDS_W4 "ldr.w r4, [sp, #92]\n\tldmia.w r4!, {r2, r3}\n\tstr.w r4, [sp, #92]\n\t"
#define THRIFTY_PAIR_NIBBLES_W4(shifted)                                                                               \
    THRIFTY_LANES_IN "and.w r4, r1, r2" shifted "\n\t" THRIFTY_MAC3A("r4")                                             \
    "and.w r4, r1, r3" shifted "\n\t" THRIFTY_MAC3B("r4")
#define THRIFTY_PAIR_STEP_W4                                                                                           \
    THRIFTY_PAIR_WORDS_W4 THRIFTY_PAIR_NIBBLES_W4("") THRIFTY_PAIR_NIBBLES_W4(", lsl #4")                              \
    THRIFTY_PAIR_NIBBLES_W4(", lsl #8") THRIFTY_PAIR_NIBBLES_W4(", lsl #12")
#define THRIFTY_PAIR_BYTES_W4 "156"

#define THRIFTY_PAIR_NIBBLES_W4X(shifted, rotated)                                                                     \
    THRIFTY_LANES_IN "and.w r4, r1, r2" shifted "\n\tsxtb16 r4, r4" rotated "\n\t" THRIFTY_MAC3A("r4")                 \
    "and.w r4, r1, r3" shifted "\n\tsxtb16 r4, r4" rotated "\n\t" THRIFTY_MAC3B("r4")
#define THRIFTY_PAIR_STEP_W4X                                                                                          \
    THRIFTY_PAIR_WORDS_W4 THRIFTY_PAIR_NIBBLES_W4X("", ", ror #8") THRIFTY_PAIR_NIBBLES_W4X(", lsl #4", ", ror #8")    \
    THRIFTY_PAIR_NIBBLES_W4X("", "") THRIFTY_PAIR_NIBBLES_W4X(", lsl #4", "")
#define THRIFTY_PAIR_BYTES_W4X "188"

/* W4 keeps the stream on the stack and the mask in r1. */
#define THRIFTY_PAIR_BEGIN_W8 ""
#define THRIFTY_PAIR_BEGIN_W16 ""
#define THRIFTY_PAIR_BEGIN_W4 "str r1, [sp, #92]\n\tmov.w r1, #0xF000F000\n\t"
#define THRIFTY_PAIR_BEGIN_W4X "str r1, [sp, #92]\n\tmov.w r1, #0xF0F0F0F0\n\t"
#define THRIFTY_PAIR_END_W8 ""
#define THRIFTY_PAIR_END_W16 ""
#define THRIFTY_EACH6(op) op("r8") op("r9") op("r10") op("r11") op("r12") op("lr")
#define THRIFTY_DIVIDE_W4(r) "asr.w " r ", " r ", #12\n\t"
#define THRIFTY_DIVIDE_W4X(r) "asr.w " r ", " r ", #4\n\t"
#define THRIFTY_PAIR_END_W4 "ldr r1, [sp, #92]\n\t"
#define THRIFTY_PAIR_END_W4X "ldr r1, [sp, #92]\n\t"

#define THRIFTY_DIVIDED_W8(each) ""
#define THRIFTY_DIVIDED_W16(each) ""
#define THRIFTY_DIVIDED_W4(each) each(THRIFTY_DIVIDE_W4)
#define THRIFTY_DIVIDED_W4X(each) each(THRIFTY_DIVIDE_W4X)

#define THRIFTY_SCALE_PAIR                                                                                             \
    "smmulr r8, r8, r2\n\tsmmulr r9, r9, r2\n\tsmmulr r10, r10, r2\n\t"                                                \
    "smmulr r11, r11, r3\n\tsmmulr r12, r12, r3\n\tsmmulr lr, lr, r3\n\t"
#define THRIFTY_SHIFT_LEFT(r) "lsl.w " r ", " r ", r4\n\t"
#define THRIFTY_SHIFT_RIGHT(r) "asr.w " r ", " r ", r2\n\t"
#define THRIFTY_PAIR_MULT(W) THRIFTY_DIVIDED_##W(THRIFTY_EACH6) "ldmia.w r1!, {r2, r3}\n\t" THRIFTY_SCALE_PAIR
#define THRIFTY_PAIR_PRE(W)                                                                                            \
    THRIFTY_DIVIDED_##W(THRIFTY_EACH6) "ldmia.w r1!, {r2, r3}\n\tldr r4, [sp, #88]\n\t"                                \
    THRIFTY_EACH6(THRIFTY_SHIFT_LEFT) THRIFTY_SCALE_PAIR
#define THRIFTY_PAIR_SHIFT(W) "ldr r2, [sp, #88]\n\t" THRIFTY_EACH6(THRIFTY_SHIFT_RIGHT)

/* Clamp: to the limits of a type in one instruction, to others by two saturating additions. */
#define THRIFTY_LIMIT_S8(r) "ssat " r ", #8, " r "\n\t"
#define THRIFTY_LIMIT_U8(r) "usat " r ", #8, " r "\n\t"
#define THRIFTY_LIMIT_S16(r) "ssat " r ", #16, " r "\n\t"
#define THRIFTY_LIMIT_U15(r) "usat " r ", #15, " r "\n\t"
#define THRIFTY_LIMIT_C8(r)                                                                                            \
    "qadd " r ", " r ", r2\n\tsub.w " r ", " r ", r2\n\tqadd " r ", " r ", r3\n\tsub.w " r ", " r ", r3\n\t"
#define THRIFTY_LIMIT_C16(r) THRIFTY_LIMIT_C8(r)
#define THRIFTY_LIMITS_S8(at) ""
#define THRIFTY_LIMITS_U8(at) ""
#define THRIFTY_LIMITS_S16(at) ""
#define THRIFTY_LIMITS_U15(at) ""
#define THRIFTY_LIMITS_C8(at) "ldrd r2, r3, [sp, #" at "]\n\t"
#define THRIFTY_LIMITS_C16(at) "ldrd r2, r3, [sp, #" at "]\n\t"
#define THRIFTY_PUT_BYTE(r, y) "strb " r ", [" y "], #1\n\t"
#define THRIFTY_PUT_HALF(r, y) "strh " r ", [" y "], #2\n\t"
#define THRIFTY_PUT_S8(r, y) THRIFTY_PUT_BYTE(r, y)
#define THRIFTY_PUT_U8(r, y) THRIFTY_PUT_BYTE(r, y)
#define THRIFTY_PUT_C8(r, y) THRIFTY_PUT_BYTE(r, y)
#define THRIFTY_PUT_S16(r, y) THRIFTY_PUT_HALF(r, y)
#define THRIFTY_PUT_U15(r, y) THRIFTY_PUT_HALF(r, y)
#define THRIFTY_PUT_C16(r, y) THRIFTY_PUT_HALF(r, y)

/* Stack of the pair kernel: 0 window, 4 stream, 8 stream_end, 12 pixels, 16 saved registers, 52 advance, 56 window_end,
 * 60 y0, 64 y1, 68 y2, 72 skip, 76 steps (then: where to enter), 80 limits, 88 shift, 92 spare. */
#define THRIFTY_PAIRS(name, W, REQUANT, STORE)                                                                         \
    THRIFTY_ASM_FUNCTION void name##_pairs(                                                                            \
        const thrifty_word_t *window THRIFTY_UNUSED, const uint32_t *stream THRIFTY_UNUSED,                            \
        const uint32_t *stream_end THRIFTY_UNUSED, uint32_t pixels THRIFTY_UNUSED, uint32_t advance THRIFTY_UNUSED,    \
        const thrifty_word_t *window_end THRIFTY_UNUSED, void *y0 THRIFTY_UNUSED, void *y1 THRIFTY_UNUSED,             \
        void *y2 THRIFTY_UNUSED, uint32_t skip THRIFTY_UNUSED, uint32_t steps THRIFTY_UNUSED,                          \
        int32_t max_less_high THRIFTY_UNUSED, int32_t min_less_low THRIFTY_UNUSED, int32_t shift THRIFTY_UNUSED,       \
        uint32_t spare THRIFTY_UNUSED, uint32_t pixel THRIFTY_UNUSED)                                                  \
    {                                                                                                                  \
        __asm__ volatile("push {r0-r11, lr}\n\t"                                                                       \
                         "ldr r4, [sp, #76]\n\t"                                                                       \
                         "rsb r4, r4, #0\n\t"                                                                          \
                         "and r4, r4, #3\n\t"                                                                          \
                         "movs r5, #" THRIFTY_PAIR_BYTES_##W "\n\t"                                                    \
                         "mul r4, r4, r5\n\t"                                                                          \
                         "adr.w r5, 3f\n\t"                                                                            \
                         "add r4, r4, r5\n\t"                                                                          \
                         "orr r4, r4, #1\n\t"                                                                          \
                         "str r4, [sp, #76]\n\t"                                                                       \
                         "1: ldr r1, [sp, #4]\n\t"                                                                     \
                         "2: ldmia.w r1!, {r8, r11}\n\t"                                                               \
                         "mov r9, r8\n\t"                                                                              \
                         "mov r10, r8\n\t"                                                                             \
                         "mov r12, r11\n\t"                                                                            \
                         "mov lr, r11\n\t"                                                                             \
                         "ldr r0, [sp]\n\t" THRIFTY_PAIR_BEGIN_##W "ldr pc, [sp, #76]\n\t"                             \
                         ".p2align 2\n\t"                                                                              \
                         "3: .rept 4\n\t" THRIFTY_PAIR_STEP_##W ".endr\n\t"                                            \
                         "ldr r4, [sp, #56]\n\t"                                                                       \
                         "cmp r0, r4\n\t"                                                                              \
                         "bne.w 3b\n\t" THRIFTY_PAIR_END_##W THRIFTY_PAIR_##REQUANT(W) THRIFTY_LIMITS_##STORE("80")    \
                             THRIFTY_EACH6(THRIFTY_LIMIT_##STORE) "ldrd r5, r6, [sp, #60]\n\t"                         \
                         "ldr r7, [sp, #68]\n\t" THRIFTY_PUT_##STORE("r8", "r5") THRIFTY_PUT_##STORE("r11", "r5")      \
                             THRIFTY_PUT_##STORE("r9", "r6") THRIFTY_PUT_##STORE("r12", "r6")                          \
                                 THRIFTY_PUT_##STORE("r10", "r7") THRIFTY_PUT_##STORE("lr", "r7")                      \
                         "strd r5, r6, [sp, #60]\n\t"                                                                  \
                         "str r7, [sp, #68]\n\t"                                                                       \
                         "ldr r4, [sp, #8]\n\t"                                                                        \
                         "cmp r1, r4\n\t"                                                                              \
                         "bne.w 2b\n\t"                                                                                \
                         "ldr r4, [sp, #72]\n\t"                                                                       \
                         "add r5, r5, r4\n\t"                                                                          \
                         "add r6, r6, r4\n\t"                                                                          \
                         "add r7, r7, r4\n\t"                                                                          \
                         "strd r5, r6, [sp, #60]\n\t"                                                                  \
                         "str r7, [sp, #68]\n\t"                                                                       \
                         "ldrd r4, r5, [sp, #52]\n\t"                                                                  \
                         "add r5, r5, r4\n\t"                                                                          \
                         "str r5, [sp, #56]\n\t"                                                                       \
                         "ldr r0, [sp]\n\t"                                                                            \
                         "add r0, r0, r4\n\t"                                                                          \
                         "str r0, [sp]\n\t"                                                                            \
                         "ldr r4, [sp, #12]\n\t"                                                                       \
                         "subs r4, r4, #1\n\t"                                                                         \
                         "str r4, [sp, #12]\n\t"                                                                       \
                         "bne.w 1b\n\t"                                                                                \
                         "add sp, sp, #16\n\t"                                                                         \
                         "pop {r4-r11, pc}\n\t");                                                                      \
    }

/* ---- four channels times one lane: r0 window, r1 stream, r2-r5 weights, r6 r7 taps, r8-r11 sums, r12 widened weights,
 * lr steps left in fours (W4: the mask) ---- */

#define THRIFTY_MAC_FOUR(a, b, c, d, x)                                                                                \
    "smlad r8, " a ", " x ", r8\n\tsmlad r9, " b ", " x ", r9\n\tsmlad r10, " c ", " x ", r10\n\t"                     \
    "smlad r11, " d ", " x ", r11\n\t"
#define THRIFTY_FOUR_IN "ldmia.w r1!, {r2, r3, r4, r5}\n\tldmia.w r0!, {r6, r7}\n\t"
#define THRIFTY_FOUR_ONE_W8(w, sum)                                                                                    \
    "sxtb16 r12, " w "\n\tsmlad " sum ", r12, r6, " sum "\n\tsxtb16 " w ", " w ", ror #8\n\t"                          \
    "smlad " sum ", " w ", r7, " sum "\n\t"
#define THRIFTY_FOUR_STEP_W8                                                                                           \
    THRIFTY_FOUR_IN THRIFTY_FOUR_ONE_W8("r2", "r8") THRIFTY_FOUR_ONE_W8("r3", "r9") THRIFTY_FOUR_ONE_W8("r4", "r10")   \
        THRIFTY_FOUR_ONE_W8("r5", "r11")
#define THRIFTY_FOUR_BYTES_W8 "72"
#define THRIFTY_FOUR_STEP_W16                                                                                          \
    THRIFTY_FOUR_IN THRIFTY_MAC_FOUR("r2", "r3", "r4", "r5", "r6") "ldmia.w r1!, {r2, r3, r4, r5}\n\t"                 \
    THRIFTY_MAC_FOUR("r2", "r3", "r4", "r5", "r7")
#define THRIFTY_FOUR_BYTES_W16 "44"
#define THRIFTY_FOUR_NIBBLES(w, sum, x, shifted, widen)                                                                \
    "and.w r12, lr, " w shifted "\n\t" widen "smlad " sum ", r12, " x ", " sum "\n\t"
#define THRIFTY_FOUR_PAIR(x, shifted, widen)                                                                           \
    THRIFTY_FOUR_NIBBLES("r2", "r8", x, shifted, widen) THRIFTY_FOUR_NIBBLES("r3", "r9", x, shifted, widen)            \
    THRIFTY_FOUR_NIBBLES("r4", "r10", x, shifted, widen) THRIFTY_FOUR_NIBBLES("r5", "r11", x, shifted, widen)
#define THRIFTY_FOUR_STEP_W4                                                                                           \
    THRIFTY_FOUR_IN THRIFTY_FOUR_PAIR("r6", "", "") THRIFTY_FOUR_PAIR("r7", ", lsl #4", "")                            \
    "ldmia.w r0!, {r6, r7}\n\t" THRIFTY_FOUR_PAIR("r6", ", lsl #8", "") THRIFTY_FOUR_PAIR("r7", ", lsl #12", "")
#define THRIFTY_FOUR_BYTES_W4 "140"
#define THRIFTY_FOUR_STEP_W4X                                                                                          \
    THRIFTY_FOUR_IN THRIFTY_FOUR_PAIR("r6", "", "sxtb16 r12, r12, ror #8\n\t")                                         \
    THRIFTY_FOUR_PAIR("r7", ", lsl #4", "sxtb16 r12, r12, ror #8\n\t") "ldmia.w r0!, {r6, r7}\n\t"                     \
    THRIFTY_FOUR_PAIR("r6", "", "sxtb16 r12, r12\n\t") THRIFTY_FOUR_PAIR("r7", ", lsl #4", "sxtb16 r12, r12\n\t")
#define THRIFTY_FOUR_BYTES_W4X "204"
#define THRIFTY_FOUR_BEGIN_W8 "ldr.w lr, [sp, #68]\n\t"
#define THRIFTY_FOUR_BEGIN_W16 "ldr.w lr, [sp, #68]\n\t"
#define THRIFTY_FOUR_BEGIN_W4 "mov.w lr, #0xF000F000\n\t"
#define THRIFTY_FOUR_BEGIN_W4X "mov.w lr, #0xF0F0F0F0\n\t"
#define THRIFTY_FOUR_LOOP_W8 "subs.w lr, lr, #1\n\t"
#define THRIFTY_FOUR_LOOP_W16 "subs.w lr, lr, #1\n\t"
#define THRIFTY_FOUR_LOOP_W4 "ldr.w r12, [sp, #68]\n\tcmp r0, r12\n\t"
#define THRIFTY_FOUR_LOOP_W4X "ldr.w r12, [sp, #68]\n\tcmp r0, r12\n\t"
/* what 68 holds: (steps + 3) / 4, or window_end as it comes */
#define THRIFTY_FOUR_COUNT_W8 "adds r5, r4, #3\n\tlsrs r5, r5, #2\n\tstr r5, [sp, #68]\n\t"
#define THRIFTY_FOUR_COUNT_W16 THRIFTY_FOUR_COUNT_W8
#define THRIFTY_FOUR_COUNT_W4 ""
#define THRIFTY_FOUR_COUNT_W4X ""
#define THRIFTY_EACH4(op) op("r8") op("r9") op("r10") op("r11")
#define THRIFTY_SCALE_FOUR                                                                                             \
    "smmulr r8, r8, r2\n\tsmmulr r9, r9, r3\n\tsmmulr r10, r10, r4\n\tsmmulr r11, r11, r5\n\t"
#define THRIFTY_SHIFT_LEFT_FOUR(r) "lsl.w " r ", " r ", r6\n\t"
#define THRIFTY_FOUR_MULT(W) THRIFTY_DIVIDED_##W(THRIFTY_EACH4) "ldmia.w r1!, {r2, r3, r4, r5}\n\t" THRIFTY_SCALE_FOUR
#define THRIFTY_FOUR_PRE(W)                                                                                            \
    THRIFTY_DIVIDED_##W(THRIFTY_EACH4) "ldmia.w r1!, {r2, r3, r4, r5}\n\tldr r6, [sp, #64]\n\t"                        \
    THRIFTY_EACH4(THRIFTY_SHIFT_LEFT_FOUR) THRIFTY_SCALE_FOUR
#define THRIFTY_FOUR_SHIFT(W) "ldr r2, [sp, #64]\n\t" THRIFTY_EACH4(THRIFTY_SHIFT_RIGHT)

/* Stack: 0 window, 4 stream, 8 stream_end, 12 y, 16 saved registers, 52 steps (then: where to enter), 56 limits,
 * 64 shift, 68 window_end or steps in fours. */
#define THRIFTY_FOURS(name, W, REQUANT, STORE)                                                                         \
    THRIFTY_ASM_FUNCTION void name##_fours(                                                                            \
        const thrifty_word_t *window THRIFTY_UNUSED, const uint32_t *stream THRIFTY_UNUSED,                            \
        const uint32_t *stream_end THRIFTY_UNUSED, void *y THRIFTY_UNUSED, uint32_t steps THRIFTY_UNUSED,              \
        int32_t max_less_high THRIFTY_UNUSED, int32_t min_less_low THRIFTY_UNUSED, int32_t shift THRIFTY_UNUSED,       \
        const thrifty_word_t *window_end THRIFTY_UNUSED)                                                               \
    {                                                                                                                  \
        __asm__ volatile("push {r0-r11, lr}\n\t"                                                                       \
                         "ldr r4, [sp, #52]\n\t" THRIFTY_FOUR_COUNT_##W "rsb r4, r4, #0\n\t"                           \
                         "and r4, r4, #3\n\t"                                                                          \
                         "movs r5, #" THRIFTY_FOUR_BYTES_##W "\n\t"                                                    \
                         "mul r4, r4, r5\n\t"                                                                          \
                         "adr.w r5, 3f\n\t"                                                                            \
                         "add r4, r4, r5\n\t"                                                                          \
                         "orr r4, r4, #1\n\t"                                                                          \
                         "str r4, [sp, #52]\n\t"                                                                       \
                         "2: ldmia.w r1!, {r8, r9, r10, r11}\n\t"                                                      \
                         "ldr r0, [sp]\n\t" THRIFTY_FOUR_BEGIN_##W "ldr pc, [sp, #52]\n\t"                             \
                         ".p2align 2\n\t"                                                                              \
                         "3: .rept 4\n\t" THRIFTY_FOUR_STEP_##W ".endr\n\t"                                            \
                         THRIFTY_FOUR_LOOP_##W "bne.w 3b\n\t" THRIFTY_FOUR_##REQUANT(W)                                \
                                 THRIFTY_LIMITS_##STORE("56") THRIFTY_EACH4(THRIFTY_LIMIT_##STORE)                     \
                         "ldr r6, [sp, #12]\n\t" THRIFTY_PUT_##STORE("r8", "r6") THRIFTY_PUT_##STORE("r9", "r6")       \
                             THRIFTY_PUT_##STORE("r10", "r6") THRIFTY_PUT_##STORE("r11", "r6") "str r6, [sp, #12]\n\t" \
                         "ldr r7, [sp, #8]\n\t"                                                                        \
                         "cmp r1, r7\n\t"                                                                              \
                         "bne.w 2b\n\t"                                                                                \
                         "add sp, sp, #16\n\t"                                                                         \
                         "pop {r4-r11, pc}\n\t");                                                                      \
    }

/* ---- one channel ---- */

#define THRIFTY_SINGLE_STEP_W8(LANES)                                                                                  \
    const uint32_t w = *at++, even = thrifty_even_s8(w), odd = thrifty_odd_s8(w);                                      \
    for (int lane = 0; lane < (LANES); lane++) {                                                                       \
        sum[lane] = thrifty_dot2(even, from[lane], sum[lane]);                                                         \
        sum[lane] = thrifty_dot2(odd, from[lane + (LANES)], sum[lane]);                                                \
    }                                                                                                                  \
    from += 2 * (LANES);
#define THRIFTY_SINGLE_STEP_W16(LANES)                                                                                 \
    const uint32_t w0 = at[0], w1 = at[1];                                                                             \
    at += 2;                                                                                                           \
    for (int lane = 0; lane < (LANES); lane++) {                                                                       \
        sum[lane] = thrifty_dot2(w0, from[lane], sum[lane]);                                                           \
        sum[lane] = thrifty_dot2(w1, from[lane + (LANES)], sum[lane]);                                                 \
    }                                                                                                                  \
    from += 2 * (LANES);
#define THRIFTY_SINGLE_PAIR(LANES, expanded, which)                                                                    \
    for (int lane = 0; lane < (LANES); lane++)                                                                         \
        sum[lane] = thrifty_dot2(expanded, from[lane + (which) * (LANES)], sum[lane]);
#define THRIFTY_SINGLE_STEP_W4(LANES)                                                                                  \
    const uint32_t w = *at++;                                                                                          \
    THRIFTY_SINGLE_PAIR(LANES, w & 0xF000F000u, 0)                                                                     \
    THRIFTY_SINGLE_PAIR(LANES, (w << 4) & 0xF000F000u, 1)                                                              \
    THRIFTY_SINGLE_PAIR(LANES, (w << 8) & 0xF000F000u, 2)                                                              \
    THRIFTY_SINGLE_PAIR(LANES, (w << 12) & 0xF000F000u, 3)                                                             \
    from += 4 * (LANES);
#define THRIFTY_SINGLE_STEP_W4X(LANES)                                                                                 \
    const uint32_t w = *at++, high = w & 0xF0F0F0F0u, low = (w << 4) & 0xF0F0F0F0u;                                    \
    THRIFTY_SINGLE_PAIR(LANES, thrifty_odd_s8(high), 0)                                                                \
    THRIFTY_SINGLE_PAIR(LANES, thrifty_odd_s8(low), 1)                                                                 \
    THRIFTY_SINGLE_PAIR(LANES, thrifty_even_s8(high), 2)                                                               \
    THRIFTY_SINGLE_PAIR(LANES, thrifty_even_s8(low), 3)                                                                \
    from += 4 * (LANES);

#define THRIFTY_SINGLE(name, W, REQUANT, STORE, LANES)                                                                 \
    static THRIFTY_UNUSED const uint32_t *name##_single##LANES(                                                        \
        const thrifty_word_t *window, const uint32_t *stream, uint32_t pixels, uint32_t advance, uint32_t steps,       \
        uint8_t *const *y, uint32_t pixel_bytes, const thrifty_finish_t *finish, uint32_t lane_bytes THRIFTY_UNUSED)   \
    {                                                                                                                  \
        const uint32_t *at = stream;                                                                                   \
        for (uint32_t pixel = 0; pixel < pixels; pixel++, window += advance / 4) {                                     \
            int32_t sum[LANES];                                                                                        \
            const thrifty_word_t *from = window;                                                                       \
            at = stream;                                                                                               \
            for (int lane = 0; lane < (LANES); lane++)                                                                 \
                sum[lane] = (int32_t)*at;                                                                              \
            at++;                                                                                                      \
            for (uint32_t step = steps; step > 0; step--) {                                                            \
                THRIFTY_SINGLE_STEP_##W(LANES)                                                                         \
            }                                                                                                          \
            const uint32_t multiplier THRIFTY_UNUSED = THRIFTY_HAS_MULTIPLIER_##REQUANT ? *at++ : 0;                   \
            for (int lane = 0; lane < (LANES); lane++)                                                                 \
                thrifty_store(y[lane] + pixel * pixel_bytes,                                                           \
                              THRIFTY_ONE_##REQUANT(sum[lane], THRIFTY_FACTOR_##W, multiplier, finish->shift), finish, \
                              THRIFTY_BYTES_##STORE);                                                                  \
        }                                                                                                              \
        return at;                                                                                                     \
    }

#else /* portable */

/* ---- the same in C, for any number of channels and lanes: weights of 64 taps at a time are widened, then used for all
 * windows, whose sums wait in an array ---- */

#define THRIFTY_CHUNK 64
#define THRIFTY_MAX_PIXELS 16

/* Widen one step of a channel; `at` its first word, `apart` the words of all channels between its own. */
#define THRIFTY_WIDEN_W8(at, apart, to)                                                                                \
    to[0] = (int8_t)((at)[0] & 255u), to[1] = (int8_t)(((at)[0] >> 16) & 255u);                                        \
    to[2] = (int8_t)(((at)[0] >> 8) & 255u), to[3] = (int8_t)((at)[0] >> 24);
#define THRIFTY_WIDEN_W16(at, apart, to)                                                                               \
    to[0] = (int16_t)((at)[0] & 65535u), to[1] = (int16_t)((at)[0] >> 16);                                             \
    to[2] = (int16_t)((at)[apart] & 65535u), to[3] = (int16_t)((at)[apart] >> 16);
#define THRIFTY_WIDEN_W4(at, apart, to)                                                                                \
    for (int pair = 0; pair < 4; pair++) {                                                                             \
        to[2 * pair] = (int16_t)((int16_t)((((at)[0] << (4 * pair)) & 0xF000u)) >> 12);                                \
        to[2 * pair + 1] = (int16_t)((int16_t)((((at)[0] << (4 * pair)) >> 16) & 0xF000u) >> 12);                      \
    }
#define THRIFTY_WIDEN_W4X(at, apart, to) THRIFTY_WIDEN_W4(at, apart, to)

/* Widened weights of a chunk, and adding its taps to the sums of all channels of one window at `from`. Small cores keep
 * them as words of two taps, channel beside channel, and load each word of the window once; elsewhere each channel has
 * its own row, of which a compiler makes vector code. */
#if defined(__arm__)
#define THRIFTY_WIDE(CHANNELS) uint32_t wide[THRIFTY_CHUNK / 2 * (CHANNELS)]
#define THRIFTY_WIDE_PUT(CHANNELS, channel, tap, from, count)                                                          \
    for (uint32_t i = 0; i < (count); i += 2)                                                                          \
        wide[((tap) + i) / 2 * (CHANNELS) + (uint32_t)(channel)] =                                                     \
            (uint32_t)(uint16_t)(from)[i] | (uint32_t)(uint16_t)(from)[i + 1] << 16;
#define THRIFTY_DOT(CHANNELS, sums, from)                                                                              \
    {                                                                                                                  \
        const uint32_t *w = wide, *const end = wide + count / 2 * (CHANNELS);                                          \
        const thrifty_word_t *x = (const thrifty_word_t *)(const void *)(from);                                        \
        int32_t s[CHANNELS];                                                                                           \
        for (int channel = 0; channel < (CHANNELS); channel++)                                                         \
            s[channel] = (sums)[channel];                                                                              \
        do {                                                                                                           \
            const uint32_t two = *x++;                                                                                 \
            const int32_t x0 = (int16_t)two, x1 = (int32_t)two >> 16;                                                  \
            for (int channel = 0; channel < (CHANNELS); channel++) {                                                   \
                const uint32_t both = *w++;                                                                            \
                s[channel] += (int16_t)both * x0;                                                                      \
                s[channel] += ((int32_t)both >> 16) * x1;                                                              \
            }                                                                                                          \
        } while (w != end);                                                                                            \
        for (int channel = 0; channel < (CHANNELS); channel++)                                                         \
            (sums)[channel] = s[channel];                                                                              \
    }
#else
#define THRIFTY_WIDE(CHANNELS) int16_t wide[CHANNELS][THRIFTY_CHUNK]
#define THRIFTY_WIDE_PUT(CHANNELS, channel, tap, from, count)                                                          \
    for (uint32_t i = 0; i < (count); i++)                                                                             \
        wide[channel][(tap) + i] = (from)[i];
#define THRIFTY_DOT(CHANNELS, sums, from)                                                                              \
    for (int channel = 0; channel < (CHANNELS); channel++) {                                                           \
        int32_t s = (sums)[channel];                                                                                   \
        for (uint32_t tap = 0; tap < count; tap++)                                                                     \
            s += wide[channel][tap] * (from)[tap];                                                                     \
        (sums)[channel] = s;                                                                                           \
    }
#endif

#define THRIFTY_PORTABLE_BLOCK(name, W, REQUANT, STORE, CHANNELS, LANES)                                               \
    static THRIFTY_UNUSED const uint32_t *name##_block##CHANNELS##LANES(                                               \
        const thrifty_word_t *window, const uint32_t *stream, uint32_t pixels, uint32_t advance, uint32_t steps,       \
        uint8_t *const *y, uint32_t pixel_bytes, const thrifty_finish_t *finish, uint32_t lane_bytes)                  \
    {                                                                                                                  \
        const uint32_t taps = THRIFTY_TAPS_##W, words = THRIFTY_WORDS_##W * (CHANNELS);                                \
        int32_t sum[THRIFTY_MAX_PIXELS][LANES][CHANNELS];                                                              \
        THRIFTY_WIDE(CHANNELS);                                                                                        \
        for (uint32_t pixel = 0; pixel < pixels; pixel++)                                                              \
            for (int lane = 0; lane < (LANES); lane++)                                                                 \
                for (int channel = 0; channel < (CHANNELS); channel++)                                                 \
                    sum[pixel][lane][channel] = (int32_t)stream[channel] >> THRIFTY_FACTOR_##W;                        \
        stream += (CHANNELS);                                                                                          \
        for (uint32_t done = 0; done < steps * taps; done += THRIFTY_CHUNK) {                                          \
            const uint32_t left = steps * taps - done, count = left < THRIFTY_CHUNK ? left : THRIFTY_CHUNK;            \
            for (uint32_t tap = 0; tap < count; tap += taps, stream += words)                                          \
                for (int channel = 0; channel < (CHANNELS); channel++) {                                               \
                    int16_t to[THRIFTY_TAPS_##W];                                                                      \
                    THRIFTY_WIDEN_##W(stream + channel, CHANNELS, to)                                                  \
                    THRIFTY_WIDE_PUT(CHANNELS, channel, tap, to, taps)                                                 \
                }                                                                                                      \
            for (uint32_t pixel = 0; pixel < pixels; pixel++)                                                          \
                for (uint32_t lane = 0; lane < (LANES); lane++) {                                                      \
                    const thrifty_half_t *from = (const thrifty_half_t *)window +                                      \
                                                 (lane * lane_bytes + pixel * advance) / 2 + done;                     \
                    THRIFTY_DOT(CHANNELS, sum[pixel][lane], from)                                                      \
                }                                                                                                      \
        }                                                                                                              \
        for (uint32_t pixel = 0; pixel < pixels; pixel++)                                                              \
            for (int lane = 0; lane < (LANES); lane++)                                                                 \
                for (int channel = 0; channel < (CHANNELS); channel++) {                                               \
                    const int32_t v = THRIFTY_ONE_##REQUANT(sum[pixel][lane][channel], 0, stream[channel],             \
                                                            finish->shift - THRIFTY_SHIFT_FACTOR_##REQUANT(W));        \
                    thrifty_store(y[lane] + pixel * pixel_bytes + channel * THRIFTY_BYTES_##STORE, v, finish,          \
                                  THRIFTY_BYTES_##STORE);                                                              \
                }                                                                                                      \
        return stream + (THRIFTY_HAS_MULTIPLIER_##REQUANT ? (CHANNELS) : 0);                                           \
    }
#define THRIFTY_SHIFT_FACTOR_MULT(W) 0
#define THRIFTY_SHIFT_FACTOR_PRE(W) 0
#define THRIFTY_SHIFT_FACTOR_SHIFT(W) THRIFTY_FACTOR_##W

#define THRIFTY_PAIRS(name, W, REQUANT, STORE)                                                                         \
    THRIFTY_PORTABLE_BLOCK(name, W, REQUANT, STORE, 2, 3)                                                              \
    static THRIFTY_UNUSED void name##_pairs(const thrifty_word_t *window, const uint32_t *stream,                      \
                                            const uint32_t *stream_end, uint32_t pixels, uint32_t advance,             \
                                            const thrifty_word_t *window_end THRIFTY_UNUSED, void *y0, void *y1,       \
                                            void *y2, uint32_t skip THRIFTY_UNUSED, uint32_t steps,                    \
                                            int32_t max_less_high, int32_t min_less_low, int32_t shift, uint32_t lane, \
                                            uint32_t pixel)                                                            \
    {                                                                                                                  \
        const thrifty_finish_t finish = {max_less_high, min_less_low, shift};                                          \
        uint8_t *y[3] = {(uint8_t *)y0, (uint8_t *)y1, (uint8_t *)y2};                                                 \
        while (stream != stream_end) {                                                                                 \
            stream = name##_block23(window, stream, pixels, advance, steps, y, pixel, &finish, lane);                  \
            for (int i = 0; i < 3; i++)                                                                                \
                y[i] += 2 * THRIFTY_BYTES_##STORE;                                                                     \
        }                                                                                                              \
    }

#define THRIFTY_FOURS(name, W, REQUANT, STORE)                                                                         \
    THRIFTY_PORTABLE_BLOCK(name, W, REQUANT, STORE, 4, 1)                                                              \
    static THRIFTY_UNUSED void name##_fours(const thrifty_word_t *window, const uint32_t *stream,                      \
                                            const uint32_t *stream_end, void *y, uint32_t steps,                       \
                                            int32_t max_less_high, int32_t min_less_low, int32_t shift,                \
                                            const thrifty_word_t *window_end THRIFTY_UNUSED)                           \
    {                                                                                                                  \
        const thrifty_finish_t finish = {max_less_high, min_less_low, shift};                                          \
        uint8_t *out = (uint8_t *)y;                                                                                   \
        for (; stream != stream_end; out += 4 * THRIFTY_BYTES_##STORE)                                                 \
            stream = name##_block41(window, stream, 1, 0, steps, &out, 0, &finish, 0);                                 \
    }

#define THRIFTY_SINGLE(name, W, REQUANT, STORE, LANES)                                                                 \
    THRIFTY_PORTABLE_BLOCK(name, W, REQUANT, STORE, 1, LANES)                                                          \
    static THRIFTY_UNUSED const uint32_t *name##_single##LANES(                                                        \
        const thrifty_word_t *window, const uint32_t *stream, uint32_t pixels, uint32_t advance, uint32_t steps,       \
        uint8_t *const *y, uint32_t pixel_bytes, const thrifty_finish_t *finish, uint32_t lane_bytes)                  \
    {                                                                                                                  \
        return name##_block1##LANES(window, stream, pixels, advance, steps, y, pixel_bytes, finish, lane_bytes);       \
    }
#endif

#endif
