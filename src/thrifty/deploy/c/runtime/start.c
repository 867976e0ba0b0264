/* Start-up of a Cortex-M image without any library: vector table, FPU, memory, then main().
 * With SEMIHOSTING, the result of main() becomes the exit status of the emulator; without, the core waits for ever. */
#include <stdint.h>

int main(void);
void _start(void);

extern uint32_t _data_load, _data_start, _data_end, _bss_start, _bss_end, _stack_top;

#if defined(SEMIHOSTING)
static void leave(int code)
{
    const uint32_t block[2] = {0x20026u, (uint32_t)code}; /* ADP_Stopped_ApplicationExit */
    register uint32_t r0 __asm__("r0") = 0x20u;           /* SYS_EXIT_EXTENDED */
    register const uint32_t *r1 __asm__("r1") = block;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}
#endif

static void stop(void)
{
#if defined(SEMIHOSTING)
    leave(127); /* a fault: no result of main() */
#endif
    for (;;) {
    }
}

void _start(void)
{
    const uint32_t *from = &_data_load;
    uint32_t *to;
#if defined(__ARM_FP)
    *(volatile uint32_t *)0xE000ED88u |= 0xFu << 20; /* CPACR: full access to the FPU */
    __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
    for (to = &_data_start; to < &_data_end; to++) {
        *to = *from++;
    }
    for (to = &_bss_start; to < &_bss_end; to++) {
        *to = 0;
    }
#if defined(SEMIHOSTING)
    leave(main());
#else
    (void)main();
#endif
    stop();
}

typedef union {
    const void *stack;
    void (*handler)(void);
} vector;

/* Initial stack, reset, and one handler for the fourteen system exceptions. */
__attribute__((section(".vectors"), used)) static const vector vectors[16] = {
    {&_stack_top},     {.handler = _start}, {.handler = stop}, {.handler = stop}, {.handler = stop}, {.handler = stop},
    {.handler = stop}, {.handler = stop},   {.handler = stop}, {.handler = stop}, {.handler = stop}, {.handler = stop},
    {.handler = stop}, {.handler = stop},   {.handler = stop}, {.handler = stop},
};
