"""Give every buffer a place in one arena of memory: small, and none over another while both are needed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from thrifty.deploy.ops import OPS
from thrifty.deploy.program import ITEM_BYTES, Plan, Program

ALIGNMENT = 8  # bytes; of every offset
RESTARTS = 400  # attempts of the random search for up to 40 blocks; fewer for more
SEED = 0


@dataclass
class _Block:
    """Buffers that share one offset, one after the other; or the scratch memory of one call."""

    members: list[str]
    bytes_at: dict[int, int] = field(default_factory=dict)  # call -> bytes, rounded up, while alive

    @property
    def last(self) -> int:
        return max(self.bytes_at)

    def add(self, name: str, life: tuple[int, int], size: int) -> None:
        if name not in self.members:
            self.members.append(name)
        for t in range(life[0], life[1] + 1):
            self.bytes_at[t] = max(self.bytes_at.get(t, 0), -(-size // ALIGNMENT) * ALIGNMENT)

    @property
    def peak(self) -> int:
        return max(self.bytes_at.values())

    @property
    def area(self) -> int:
        return sum(self.bytes_at.values())


def plan(program: Program, scratch: Mapping[str, int] | None = None) -> Plan:
    """Return a place for every buffer, and for the scratch memory of the calls that need some.

    scratch: bytes by name of call. The output of an operator takes the place of an input where the operator
    allows it (`Operator.in_place`) and the input is not read later. Blocks are placed lowest-fit in several
    orders, then the best is varied at random (fixed seed) until the bound is met. The input is alive from the
    first call, the output to the last; a run destroys the input.

    >>> from thrifty.deploy.program import Buffer, Call
    >>> b = {n: Buffer(n, (1, 1, 10), "int8") for n in "xyz"}
    >>> calls = (Call("conv", "c", ("x",), "y"), Call("clamp", "r", ("y",), "z"))
    >>> p = plan(Program("p", b, calls, "x", "z"))
    >>> p.arena_bytes, p.bound_bytes, dict(p.offsets)
    (32, 32, {'x': 16, 'y': 0, 'z': 0})
    """
    needed = {name: size for name, size in (scratch or {}).items() if size > 0}
    lives = _lives(program, needed)
    sizes = {b.name: b.size_bytes for b in program.buffers.values()} | needed
    best: tuple[int, dict[str, int]] | None = None
    blocks = _blocks(program, lives, sizes, share=True)
    bound = max(_alive(blocks).values())
    for variant in (blocks, _blocks(program, lives, sizes, share=False)):
        found = _search(variant, bound)
        if best is None or found[0] < best[0]:
            best = found
        if best[0] == bound:
            break
    assert best is not None
    arena, offsets = best
    return Plan({name: offsets[name] for name in sizes}, arena, bound, lives, sizes)


def beside(program: Program, plan: Plan, size: int) -> tuple[Plan, int]:
    """Return a plan with room for `size` bytes beside the output, for what runs after the last call, and their offset.

    All other buffers are dead then: the arena grows only by what does not fit above or below the output.

    >>> from thrifty.deploy.program import Buffer, Call
    >>> b = {n: Buffer(n, (1, 1, 10), "int8") for n in "xyz"}
    >>> calls = (Call("conv", "c", ("x",), "y"), Call("clamp", "r", ("y",), "z"))
    >>> whole = Program("p", b, calls, "x", "z")
    >>> [(p.arena_bytes, offset) for p, offset in (beside(whole, plan(whole), 16), beside(whole, plan(whole), 24))]
    [(32, 16), (40, 16)]
    """
    start, held = plan.offsets[program.output], program.buffers[program.output].size_bytes
    end = -(-(start + held) // ALIGNMENT) * ALIGNMENT
    offset = 0 if size <= start else end
    bound = max(plan.bound_bytes, -(-held // ALIGNMENT) * ALIGNMENT + -(-size // ALIGNMENT) * ALIGNMENT)
    arena = max(plan.arena_bytes, -(-(offset + size) // ALIGNMENT) * ALIGNMENT)
    return replace(plan, arena_bytes=arena, bound_bytes=bound), offset


def _lives(program: Program, scratch: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Return the first and the last call at which each buffer, or the scratch of a call, is alive."""
    end = max(0, len(program.calls) - 1)
    born = {program.input: 0}
    last = {program.input: 0}
    for i, call in enumerate(program.calls):
        born[call.output] = last[call.output] = i
        for name in call.inputs:
            last[name] = i
    last[program.output] = end
    lives = {name: (born[name], last[name]) for name in program.buffers}
    return lives | {c.name: (i, i) for i, c in enumerate(program.calls) if c.name in scratch}


def _blocks(
    program: Program, lives: Mapping[str, tuple[int, int]], sizes: Mapping[str, int], share: bool
) -> list[_Block]:
    """Return the blocks; with share, outputs take the place of dying inputs; without it, only copies do."""
    block_of: dict[str, _Block] = {}

    def new(name: str) -> None:
        block_of[name] = _Block([name])
        block_of[name].add(name, lives[name], sizes[name])

    new(program.input)
    for i, call in enumerate(program.calls):
        for k in OPS[call.op].in_place(call) if share or call.op == "copy" else ():
            source = program.buffers[call.inputs[k]]
            wide = ITEM_BYTES[source.dtype] == ITEM_BYTES[program.buffers[call.output].dtype]
            block = block_of[source.name]
            if wide and block.last <= i:
                block.add(call.output, lives[call.output], sizes[call.output])
                block_of[call.output] = block
                break
        else:
            new(call.output)
        if call.name in sizes and call.name not in program.buffers:
            new(call.name)
    return list({id(b): b for b in block_of.values()}.values())


def _alive(blocks: Sequence[_Block]) -> dict[int, int]:
    """Return the bytes that are alive at each call."""
    total: dict[int, int] = {}
    for block in blocks:
        for t, size in block.bytes_at.items():
            total[t] = total.get(t, 0) + size
    return total


def _search(blocks: Sequence[_Block], bound: int) -> tuple[int, dict[str, int]]:
    """Return (arena bytes, offsets) of the best placement found."""
    rooms = _rooms(blocks)
    n = len(blocks)
    live = _alive(blocks)
    keys = (
        lambda i: (-blocks[i].peak, -blocks[i].area, i),
        lambda i: (-blocks[i].area, i),
        lambda i: (-max(live[t] for t in blocks[i].bytes_at), -blocks[i].peak, i),
        lambda i: (-len(blocks[i].bytes_at), -blocks[i].peak, i),
        lambda i: (min(blocks[i].bytes_at), -blocks[i].peak, i),
        lambda i: (-blocks[i].last, -blocks[i].peak, i),
    )
    tried = [(_place(order, rooms, blocks), order) for order in (sorted(range(n), key=key) for key in keys)]
    (arena, offsets), order = min(tried, key=lambda found: found[0][0])
    rng = random.Random(SEED)
    for _ in range(RESTARTS if n <= 40 else RESTARTS * 1600 // n**2 + 4):
        if arena <= bound or n < 2:
            break
        fresh = _varied(order, blocks, arena, offsets, rng)
        found = _place(fresh, rooms, blocks)
        if found[0] <= arena:
            (arena, offsets), order = found, fresh
    return arena, {name: offsets[i] for i, block in enumerate(blocks) for name in block.members}


def _rooms(blocks: Sequence[_Block]) -> list[dict[int, int]]:
    """Return for each block, by the index of every block alive with it, the bytes it needs below that one."""
    return [
        {
            j: max(size for t, size in a.bytes_at.items() if t in b.bytes_at)
            for j, b in enumerate(blocks)
            if b is not a and not a.bytes_at.keys().isdisjoint(b.bytes_at)
        }
        for a in blocks
    ]


def _place(
    order: Sequence[int], rooms: Sequence[Mapping[int, int]], blocks: Sequence[_Block]
) -> tuple[int, dict[int, int]]:
    """Return (arena bytes, offset by block) when each block in turn goes to the lowest place free for it."""
    offsets: dict[int, int] = {}
    arena = 0
    for i in order:
        placed = [(j, room) for j, room in rooms[i].items() if j in offsets]
        others = [(offsets[j], offsets[j] + rooms[j][i], room) for j, room in placed]
        # `others`: where each other begins, where this one may begin above it, what this one needs below it
        for place in sorted({0, *(end for _, end, _ in others)}):
            if all(place >= end or place + room <= start for start, end, room in others):
                break
        offsets[i] = place
        arena = max(arena, place + blocks[i].peak)
    return arena, offsets


def _varied(
    order: Sequence[int], blocks: Sequence[_Block], arena: int, offsets: Mapping[int, int], rng: random.Random
) -> list[int]:
    """Return another order: two blocks swapped, or a block at the top of the arena moved forward."""
    fresh = list(order)
    if rng.random() < 0.5:
        a, b = rng.sample(range(len(fresh)), 2)
        fresh[a], fresh[b] = fresh[b], fresh[a]
        return fresh
    top = rng.choice([i for i in fresh if offsets[i] + blocks[i].peak == arena])
    place = fresh.index(top)
    fresh.insert(rng.randrange(place + 1), fresh.pop(place))
    return fresh
