/* A learner on this computer: requests from standard input, answers to standard output.
 * A request: 1 byte what, 4 bytes class, the input of the network; an answer: 4 bytes, then the bytes of the state.
 * With LAST_STATE defined, the state follows the last answer only. */
#include <stdint.h>
#include <stdio.h>
#include MODEL_HEADER

enum { WHAT_LEARN, WHAT_CLASSIFY, WHAT_NEW_CLASS, WHAT_RESET };

int main(void)
{
    uint8_t what;
    int32_t label;
    while (fread(&what, 1, 1, stdin) == 1) {
        int32_t answer = 1;
        if (fread(&label, sizeof label, 1, stdin) != 1 || fread(INPUT, INPUT_BYTES, 1, stdin) != 1) {
            return 1;
        }
        RUN();
        switch (what) {
        case WHAT_LEARN:
            answer = LEARN(label);
            break;
        case WHAT_CLASSIFY:
            answer = CLASSIFY();
            break;
        case WHAT_NEW_CLASS:
            answer = NEW_CLASS(label);
            break;
        default:
            RESET();
        }
        if (fwrite(&answer, sizeof answer, 1, stdout) != 1) {
            return 1;
        }
#if !defined(LAST_STATE)
        if (fwrite(&STATE, sizeof STATE, 1, stdout) != 1) {
            return 1;
        }
#endif
    }
#if defined(LAST_STATE)
    return fwrite(&STATE, sizeof STATE, 1, stdout) != 1;
#else
    return 0;
#endif
}
