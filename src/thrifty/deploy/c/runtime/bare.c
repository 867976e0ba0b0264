/* What is measured: the model, a start-up, and the least that a caller does. */
#include MODEL_HEADER

int main(void)
{
    *(volatile unsigned char *)INPUT = 0;
    RUN();
#if defined(LEARN)
    if (LEARN(*(const volatile unsigned char *)OUTPUT)) {
        return CLASSIFY();
    }
    NEW_CLASS(0);
    RESET();
#endif
    return *(const volatile unsigned char *)OUTPUT;
}
