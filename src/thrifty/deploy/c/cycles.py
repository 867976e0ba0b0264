"""Cycles of a Cortex-M4, modelled from executed basic blocks; never measured.

The rules are those of the core's Technical Reference Manual for memory without wait states: most instructions take 1
cycle; a load 2, or 1 right behind another load whose result it does not need (always 2 when it changes its base
register); several registers 1 + n; a branch 1, and 2 more when taken; a division 7 (of 2 to 12); VMLA 3, VDIV and VSQRT
14; 1 more when a load or store needs the result of the instruction before it, or floating-point code that of the one
before. Left out: wait states of the flash, its cache, contention, unaligned accesses, the exact cost of a refill. Real
boards took 1.2 times (convolutions) to 1.4 times (fully connected nets) as many at 120 MHz.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from thrifty.deploy.c.counting import Block
from thrifty.errors import need

LOADS = ("LDR", "LDRB", "LDRH", "LDRSB", "LDRSH", "VLDR")
STORES = ("STR", "STRB", "STRH", "VSTR")
MULTIPLE = ("LDM", "LDMDB", "STM", "STMDB", "PUSH", "POP", "LDRD", "STRD", "VLDMIA", "VSTMIA", "VPUSH", "VPOP")
TAKES = {"SDIV": 7, "UDIV": 7, "VMLA": 3, "VMLS": 3, "VNMLA": 3, "VNMLS": 3, "VFMA": 3, "VFMS": 3, "VDIV": 14,
         "VSQRT": 14}  # fmt: skip
REFILL = 2  # cycles of a taken branch, besides its own


def modelled_cycles(code: bytes, blocks: Iterable[Block]) -> int:
    """Return the cycles that all executions of these blocks take. code: the image, from address 0."""
    capstone = need("capstone", extra="deploy")
    reader = capstone.Cs(capstone.CS_ARCH_ARM, capstone.CS_MODE_THUMB | capstone.CS_MODE_MCLASS)
    reader.detail = True
    total = 0
    for block in blocks:
        body = code[block.address : block.address + block.size]
        total += block.executed * block_cycles(list(reader.disasm(body, block.address))) + block.left * REFILL
    return total


def block_cycles(instructions: Iterable[Any]) -> int:
    """Return the cycles of a run of disassembled instructions, no branch taken."""
    total, before, written = 0, "", frozenset[int]()
    for instruction in instructions:
        name = instruction.insn_name().upper()
        read, now_written = (frozenset(registers) for registers in instruction.regs_access())
        memory = name in LOADS or name in STORES
        address = _address_registers(instruction) if memory else frozenset[int]()
        total += _alone(instruction, name)
        if name in LOADS and before in LOADS and not address & written and not instruction.writeback:
            total -= 1
        stalls_address = memory and address & written and before not in (*LOADS, *STORES, *MULTIPLE, "")
        stalls_float = name.startswith("V") and before.startswith("V") and before not in LOADS and read & written
        total += bool(stalls_address or stalls_float)
        before, written = name, now_written
    return total


def _alone(instruction: Any, name: str) -> int:
    if name in MULTIPLE:
        return 1 + _registers(instruction, name)
    if name in LOADS:
        return 2
    if name in STORES:
        return 2 if _register_offset(instruction) else 1
    return TAKES.get(name, 1)


def _registers(instruction: Any, name: str) -> int:
    listed = re.search(r"\{(.*)\}", instruction.op_str)
    return 2 if name in ("LDRD", "STRD") or listed is None else len(listed[1].split(","))


def _memory_operand(instruction: Any) -> Any:
    arm = need("capstone.arm", extra="deploy")
    return next((o.mem for o in instruction.operands if o.type == arm.ARM_OP_MEM), None)


def _address_registers(instruction: Any) -> frozenset[int]:
    memory = _memory_operand(instruction)
    return frozenset() if memory is None else frozenset({memory.base, memory.index}) - {0}


def _register_offset(instruction: Any) -> bool:
    memory = _memory_operand(instruction)
    return memory is not None and memory.index != 0
