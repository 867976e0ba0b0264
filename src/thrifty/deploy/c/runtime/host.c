/* The model on this computer: a batch per call as a shared library, or from standard input to standard output. */
#include <stddef.h>
#include <stdint.h>
#include MODEL_HEADER

void run_batch(const uint8_t *inputs, uint8_t *outputs, size_t count);

void run_batch(const uint8_t *inputs, uint8_t *outputs, size_t count)
{
    uint8_t *const in = (uint8_t *)INPUT;
    const uint8_t *const out = (const uint8_t *)OUTPUT;
    size_t i;
    for (; count > 0; count--, inputs += INPUT_BYTES, outputs += OUTPUT_BYTES) {
        for (i = 0; i < INPUT_BYTES; i++) {
            in[i] = inputs[i];
        }
        RUN();
        for (i = 0; i < OUTPUT_BYTES; i++) {
            outputs[i] = out[i];
        }
    }
}

#if defined(WITH_MAIN)
#include <stdio.h>

int main(void)
{
    static uint8_t input[INPUT_BYTES];
    static uint8_t output[OUTPUT_BYTES];
    while (fread(input, 1, INPUT_BYTES, stdin) == INPUT_BYTES) {
        run_batch(input, output, 1);
        if (fwrite(output, 1, OUTPUT_BYTES, stdout) != OUTPUT_BYTES) {
            return 1;
        }
    }
    return 0;
}
#endif
