/* The integer rule in C: rounding, shifting, clamping. Its meaning is thrifty/arith.py.
 *
 * To divide by a power of two, add half of it and shift right; then clamp. `>>` of a negative number is arithmetic on
 * every compiler that thrifty supports (GCC, Clang); nothing here shifts a negative number to the left. */
#ifndef THRIFTY_ARITH_H
#define THRIFTY_ARITH_H

#include "simd.h"
#include <stddef.h>

#define THRIFTY_UNUSED __attribute__((unused))
#if defined(__clang__)
#define THRIFTY_ALONE noinline
#define THRIFTY_UNTOUCHED noinline
#else
#define THRIFTY_ALONE noinline, noclone
#define THRIFTY_UNTOUCHED noipa
#endif
/* One copy: what is not worth inlining. */
#define THRIFTY_SHARED static __attribute__((THRIFTY_ALONE, unused))
/* The body is assembly: the compiler must neither inline nor clone it nor change its parameters. */
#define THRIFTY_ASM_FUNCTION static __attribute__((naked, THRIFTY_UNTOUCHED, unused, aligned(4)))

/* A word of memory that other types may share. */
typedef uint32_t __attribute__((may_alias)) thrifty_word_t;
typedef int16_t __attribute__((may_alias)) thrifty_half_t;

THRIFTY_INLINE int32_t thrifty_clamp(int32_t v, int32_t low, int32_t high)
{
    return v < low ? low : v > high ? high : v;
}

/* v / 2^shift, ties up; a negative shift multiplies. The result is cut to int32. */
THRIFTY_INLINE int32_t thrifty_round_shift(int32_t v, int shift)
{
    if (shift > 0)
        return shift > 32 ? 0 : (int32_t)((v + ((int64_t)1 << (shift - 1))) >> shift);
    const int64_t wide = v * ((int64_t)1 << (shift < -31 ? 31 : -shift));
    return wide < INT32_MIN ? INT32_MIN : wide > INT32_MAX ? INT32_MAX : (int32_t)wide;
}

/* v / 2^shift, rounded down; shift at least 0. */
THRIFTY_INLINE int32_t thrifty_floor_shift(int32_t v, int shift)
{
    return v >> (shift > 31 ? 31 : shift);
}

/* ((acc << pre_shift) * multiplier + 2^31) >> 32 */
THRIFTY_INLINE int32_t thrifty_scale(int32_t acc, int32_t multiplier, int pre_shift)
{
    const int32_t wide = (int32_t)((uint32_t)acc << pre_shift);
#if THRIFTY_DSP
    int32_t y;
    __asm__("smmulr %0, %1, %2" : "=r"(y) : "r"(wide), "r"(multiplier));
    return y;
#else
    return (int32_t)(((int64_t)wide * multiplier + ((int64_t)1 << 31)) >> 32);
#endif
}

#endif
