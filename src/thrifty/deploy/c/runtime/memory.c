/* The four functions that compilers may call on their own even in freestanding code. Words at a time where aligned. */
#include <stddef.h>
#include <stdint.h>

void *memcpy(void *restrict to, const void *restrict from, size_t count);
void *memmove(void *to, const void *from, size_t count);
void *memset(void *to, int value, size_t count);
int memcmp(const void *a, const void *b, size_t count);

typedef uint32_t __attribute__((may_alias)) word;

static void copy_up(uint8_t *to, const uint8_t *from, size_t count)
{
    if ((((uintptr_t)to | (uintptr_t)from) & 3u) == 0) {
        for (; count >= 4; count -= 4, to += 4, from += 4) {
            *(word *)(void *)to = *(const word *)(const void *)from;
        }
    }
    for (; count > 0; count--) {
        *to++ = *from++;
    }
}

__attribute__((weak)) void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
    copy_up(to, from, count);
    return to;
}

__attribute__((weak)) void *memmove(void *to, const void *from, size_t count)
{
    uint8_t *t = to;
    const uint8_t *f = from;
    if (t <= f) {
        copy_up(t, f, count);
        return to;
    }
    for (; count > 0; count--) {
        t[count - 1] = f[count - 1];
    }
    return to;
}

__attribute__((weak)) void *memset(void *to, int value, size_t count)
{
    uint8_t *t = to;
    const uint32_t byte = (uint8_t)value;
    if (((uintptr_t)t & 3u) == 0) {
        for (; count >= 4; count -= 4, t += 4) {
            *(word *)(void *)t = byte * 0x01010101u;
        }
    }
    for (; count > 0; count--) {
        *t++ = (uint8_t)byte;
    }
    return to;
}

__attribute__((weak)) int memcmp(const void *a, const void *b, size_t count)
{
    const uint8_t *p = a;
    const uint8_t *q = b;
    for (; count > 0; count--, p++, q++) {
        if (*p != *q) {
            return *p < *q ? -1 : 1;
        }
    }
    return 0;
}
