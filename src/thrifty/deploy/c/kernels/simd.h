/* What the small kernels share. Four 8-bit or two 16-bit numbers in one word: the DSP instructions of Cortex-M4 and M7 that the kernels use.
 *
 * THRIFTY_DSP is 1 where they exist; every kernel has a portable body with the same results for everything else.
 * Lanes are numbered from the least significant; the cores are little-endian. */
#ifndef THRIFTY_SIMD_H
#define THRIFTY_SIMD_H

#include <stdint.h>

#if defined(__GNUC__)
#define THRIFTY_INLINE static inline __attribute__((always_inline))
#else
#define THRIFTY_INLINE static inline
#endif

typedef int8_t thrifty_s8; /* so that macros can make both a type and a name from one word */
typedef uint8_t thrifty_u8;
typedef int16_t thrifty_s16;
typedef int32_t thrifty_s32;
typedef float thrifty_f32;

/* low..high for any type */
#define THRIFTY_CLAMP(value, low, high) ((value) < (low) ? (low) : (value) > (high) ? (high) : (value))

#if defined(__GNUC__)
#define THRIFTY_INFINITY __builtin_inff()
#else
#define THRIFTY_INFINITY (1.0f / 0.0f)
#endif

#if defined(__ARM_FEATURE_DSP) && defined(__GNUC__) && !defined(THRIFTY_PORTABLE)
#define THRIFTY_DSP 1

/* A word at any address: the cores load and store unaligned words. */
THRIFTY_INLINE uint32_t thrifty_load4(const void *from)
{
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    return word;
}

THRIFTY_INLINE void thrifty_store4(void *to, uint32_t word)
{
    __builtin_memcpy(to, &word, 4);
}

#define THRIFTY_UNARY(name, instruction)                                                                               \
    THRIFTY_INLINE uint32_t name(uint32_t a)                                                                           \
    {                                                                                                                  \
        uint32_t r;                                                                                                    \
        __asm__(instruction : "=r"(r) : "r"(a));                                                                       \
        return r;                                                                                                      \
    }

#define THRIFTY_BINARY(name, instruction)                                                                              \
    THRIFTY_INLINE uint32_t name(uint32_t a, uint32_t b)                                                               \
    {                                                                                                                  \
        uint32_t r;                                                                                                    \
        __asm__(instruction : "=r"(r) : "r"(a), "r"(b));                                                               \
        return r;                                                                                                      \
    }

/* max or min of each lane: the subtraction sets one flag per lane, SEL picks by the flags */
#define THRIFTY_SELECT(name, subtract, order)                                                                          \
    THRIFTY_INLINE uint32_t name(uint32_t a, uint32_t b)                                                               \
    {                                                                                                                  \
        uint32_t r;                                                                                                    \
        __asm__(subtract " %0, %1, %2\n\tsel %0, " order : "=&r"(r) : "r"(a), "r"(b) : "cc");                          \
        return r;                                                                                                      \
    }

THRIFTY_UNARY(thrifty_even_s8, "sxtb16 %0, %1")          /* lanes 0 and 2 of four, widened to 16 bits */
THRIFTY_UNARY(thrifty_odd_s8, "sxtb16 %0, %1, ror #8")   /* lanes 1 and 3 */
THRIFTY_UNARY(thrifty_even_u8, "uxtb16 %0, %1")
THRIFTY_UNARY(thrifty_odd_u8, "uxtb16 %0, %1, ror #8")
THRIFTY_BINARY(thrifty_add_even_s8, "sxtab16 %0, %1, %2") /* a + lanes 0 and 2 of b */
THRIFTY_BINARY(thrifty_add_odd_s8, "sxtab16 %0, %1, %2, ror #8")
THRIFTY_BINARY(thrifty_add_even_u8, "uxtab16 %0, %1, %2")
THRIFTY_BINARY(thrifty_add_odd_u8, "uxtab16 %0, %1, %2, ror #8")
THRIFTY_BINARY(thrifty_low_halves, "pkhbt %0, %1, %2, lsl #16")  /* lower half of a below lower half of b */
THRIFTY_BINARY(thrifty_high_halves, "pkhtb %0, %2, %1, asr #16") /* upper half of a below upper half of b */
THRIFTY_SELECT(thrifty_max4_s8, "ssub8", "%1, %2")
THRIFTY_SELECT(thrifty_min4_s8, "ssub8", "%2, %1")
THRIFTY_SELECT(thrifty_max4_u8, "usub8", "%1, %2")
THRIFTY_SELECT(thrifty_min4_u8, "usub8", "%2, %1")
THRIFTY_SELECT(thrifty_max2_s16, "ssub16", "%1, %2")
THRIFTY_SELECT(thrifty_min2_s16, "ssub16", "%2, %1")

/* acc + a.lane0 * b.lane0 + a.lane1 * b.lane1, signed 16-bit lanes */
THRIFTY_INLINE int32_t thrifty_dot2(uint32_t a, uint32_t b, int32_t acc)
{
    int32_t r;
    __asm__("smlad %0, %1, %2, %3" : "=r"(r) : "r"(a), "r"(b), "r"(acc) : "cc");
    return r;
}

/* GCC makes branches of a clamp that LLVM turns into one instruction: the shift and the saturation, said in assembly */
#if !defined(__clang__) && defined(__OPTIMIZE__)
#define THRIFTY_SATURATE(name, instruction)                                                                            \
    THRIFTY_INLINE int32_t name(int32_t value, int shift)                                                              \
    {                                                                                                                  \
        int32_t r;                                                                                                     \
        if (__builtin_constant_p(shift) && shift > 0) {                                                                \
            __asm__(instruction ", asr %2" : "=r"(r) : "r"(value), "i"(shift) : "cc");                                 \
        } else {                                                                                                       \
            __asm__(instruction : "=r"(r) : "r"(value >> shift) : "cc");                                               \
        }                                                                                                              \
        return r;                                                                                                      \
    }

THRIFTY_SATURATE(thrifty_saturate_s8, "ssat %0, #8, %1")
THRIFTY_SATURATE(thrifty_saturate_u8, "usat %0, #8, %1")
THRIFTY_SATURATE(thrifty_saturate_s16, "ssat %0, #16, %1")
THRIFTY_SATURATE(thrifty_saturate_positive_s8, "usat %0, #7, %1") /* what a ReLU leaves of the type */
THRIFTY_SATURATE(thrifty_saturate_positive_u8, "usat %0, #8, %1")
THRIFTY_SATURATE(thrifty_saturate_positive_s16, "usat %0, #15, %1")
#undef THRIFTY_SATURATE
#define THRIFTY_HAS_SATURATE
#endif

#undef THRIFTY_UNARY
#undef THRIFTY_BINARY
#undef THRIFTY_SELECT
#else
#define THRIFTY_DSP 0
#endif

/* value / 2^shift rounded down, clamped to low..high, which lie within the type; all but `value` are constants */
#if defined(THRIFTY_HAS_SATURATE)
#define THRIFTY_NARROW(T, LEAST, MOST)                                                                                 \
    THRIFTY_INLINE thrifty_##T thrifty_narrow_##T(int32_t value, int shift, int32_t low, int32_t high)                 \
    {                                                                                                                  \
        const int32_t y = value >> shift;                                                                              \
        if (high == (MOST) && low == (LEAST)) {                                                                        \
            return (thrifty_##T)thrifty_saturate_##T(value, shift);                                                    \
        }                                                                                                              \
        if (high == (MOST) && low == 0) {                                                                              \
            return (thrifty_##T)thrifty_saturate_positive_##T(value, shift);                                           \
        }                                                                                                              \
        return (thrifty_##T)THRIFTY_CLAMP(y, low, high);                                                               \
    }
#undef THRIFTY_HAS_SATURATE
#else
#define THRIFTY_NARROW(T, LEAST, MOST)                                                                                 \
    THRIFTY_INLINE thrifty_##T thrifty_narrow_##T(int32_t value, int shift, int32_t low, int32_t high)                 \
    {                                                                                                                  \
        const int32_t y = value >> shift;                                                                              \
        return (thrifty_##T)THRIFTY_CLAMP(y, low, high);                                                               \
    }
#endif

THRIFTY_NARROW(s8, -128, 127)
THRIFTY_NARROW(u8, 0, 255)
THRIFTY_NARROW(s16, -32768, 32767)
#undef THRIFTY_NARROW

#endif
