"""The cycle model against the table of the Cortex-M4 reference manual, instruction by instruction."""

import subprocess

import capstone
import pytest
from c_programs import batch, network

from thrifty.deploy.c.counting import Block
from thrifty.deploy.c.cycles import block_cycles, modelled_cycles
from thrifty.deploy.c.emulate import emulate

CASES = {
    "add r0, r1, r2": 1,
    "smlad r0, r1, r2, r0": 1,
    "it eq; addeq r0, r1, r2": 2,
    "ldr r0, [r1]": 2,
    "ldr r0, [r1]; ldr r2, [r3]": 3,
    "ldr r0, [r1]; ldr r2, [r0]": 4,
    "ldr r0, [r1], #4; ldr r2, [r3], #4": 4,
    "add r1, r1, #4; ldr r0, [r1]": 4,
    "add r1, r1, #4; ldr r0, [r2]": 3,
    "str r0, [r1]": 1,
    "str r0, [r1, r2]": 2,
    "ldm r0!, {r1, r2, r3, r4}": 5,
    "push {r4, r5, lr}": 4,
    "ldrd r0, r1, [r2]": 3,
    "sdiv r0, r1, r2": 7,
    "vmul.f32 s0, s1, s2; vadd.f32 s3, s4, s5": 2,
    "vmul.f32 s0, s1, s2; vadd.f32 s3, s0, s4": 3,
    "vmla.f32 s0, s1, s2": 3,
    "vdiv.f32 s0, s1, s2": 14,
}


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """Return the machine code of every case, from one run of the assembler."""
    folder = tmp_path_factory.mktemp("asm")
    flags = ["-mcpu=cortex-m4", "-mthumb", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard", "-c", "-x", "assembler", "-"]
    text = "".join(f"{source}\n.balign 64, 0\n" for source in CASES)
    source = f".syntax unified\n.thumb\n{text}"
    subprocess.run(["arm-none-eabi-gcc", *flags, "-o", folder / "a.o"], input=source, text=True, check=True)
    subprocess.run(["arm-none-eabi-objcopy", "-O", "binary", folder / "a.o", folder / "a.bin"], check=True)
    code = (folder / "a.bin").read_bytes()
    return dict(zip(CASES, (code[i : i + 64] for i in range(0, len(code), 64))))


@pytest.mark.parametrize("source", CASES)
def test_instructions_take_what_the_manual_says(source, assembled):
    reader = capstone.Cs(capstone.CS_ARCH_ARM, capstone.CS_MODE_THUMB | capstone.CS_MODE_MCLASS)
    reader.detail = True
    instructions = list(reader.disasm(assembled[source], 0))[: source.count(";") + 1]
    assert block_cycles(instructions) == CASES[source]


def test_a_taken_branch_takes_two_cycles_more():
    code = bytes.fromhex("fee7")  # b .
    assert modelled_cycles(code, [Block(0, 2, executed=10, left=0)]) == 10
    assert modelled_cycles(code, [Block(0, 2, executed=10, left=4)]) == 18


def test_cycles_are_modelled_for_the_m4_alone(built):
    x = batch(network("int8"), 2)
    m4 = emulate(built("int8"), x)
    assert m4.instructions < m4.cycles < 2 * m4.instructions
    assert emulate(built("int8", "cortex-m7"), x).cycles is None
    assert emulate(built("int8"), x, count=False).cycles is None
