/* Second witness: the model on QEMU's MPS2 boards. Reads inputs from the file "inputs", writes to the file "outputs"
 * for each of them the output and how far the board's 25 MHz counter went meanwhile. By semihosting, without libraries. */
#include <stdint.h>
#include MODEL_HEADER

#define SYS_OPEN 0x01u
#define SYS_CLOSE 0x02u
#define SYS_WRITE 0x05u
#define SYS_READ 0x06u
#define READ_BINARY 1u
#define WRITE_BINARY 5u
#define COUNTER (*(volatile uint32_t *)0x40028018u)

static uint32_t semihosting(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static uint32_t file(const char *name, uint32_t length, uint32_t mode)
{
    const uint32_t block[3] = {(uint32_t)(uintptr_t)name, mode, length};
    return semihosting(SYS_OPEN, block);
}

/* returns how many bytes were not transferred */
static uint32_t transfer(uint32_t operation, uint32_t handle, const void *data, uint32_t bytes)
{
    const uint32_t block[3] = {handle, (uint32_t)(uintptr_t)data, bytes};
    return semihosting(operation, block);
}

int main(void)
{
    const uint32_t in = file("inputs", 6, READ_BINARY);
    const uint32_t out = file("outputs", 7, WRITE_BINARY);
    if (in == 0xFFFFFFFFu || out == 0xFFFFFFFFu) {
        return 2;
    }
    while (transfer(SYS_READ, in, INPUT, INPUT_BYTES) == 0) {
        uint32_t ticks = COUNTER;
        RUN();
        ticks = COUNTER - ticks;
        if (transfer(SYS_WRITE, out, OUTPUT, OUTPUT_BYTES) != 0 || transfer(SYS_WRITE, out, &ticks, sizeof ticks) != 0) {
            return 3;
        }
    }
    (void)semihosting(SYS_CLOSE, &out);
    return 0;
}
