#!/bin/sh
# Installs the cross-compiler, QEMU and a second host compiler where this user may; says what is missing where not.
# Everything but the QEMU witness and the arm-none-eabi-gcc figures also works from pip alone (zig cc, Unicorn).
missing=""
for pair in arm-none-eabi-gcc:gcc-arm-none-eabi qemu-system-arm:qemu-system-arm clang:clang cc:gcc; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
[ -z "$missing" ] && exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing:$missing; the tests that need them are skipped and counted"
    exit 0
fi
run=""
if [ "$(id -u)" -ne 0 ]; then
    if sudo -n true 2>/dev/null; then run="sudo -n"; else
        echo "missing:$missing (no root here); the tests that need them are skipped and counted"
        exit 0
    fi
fi
echo "installing:$missing"
export DEBIAN_FRONTEND=noninteractive
$run apt-get update -qq >/dev/null 2>&1
# shellcheck disable=SC2086
$run apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 ||
    echo "could not install:$missing; the tests that need them are skipped and counted"
exit 0
