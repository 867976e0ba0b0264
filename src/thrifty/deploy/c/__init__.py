"""C for microcontrollers: emit a program, build it, run it on emulated cores and on this computer.

`emit.emit` writes the C, `build.build` compiles it for a Cortex-M, `emulate.emulate` and `qemu.qemu` run the image,
`host.run_host` runs whole data sets on this computer. `ccall.CCall` is what an operator says about its C; kernels/ has
the C that does the work, runtime/ the start-up code, templates/ the text around both.
"""
