"""targets.toml: cores, boards, near matches."""

import pytest

from thrifty.deploy.targets import target, targets
from thrifty.errors import NoMatch


def test_a_board_is_its_core_with_its_memory():
    board, core = target("nucleo-l452re"), target("cortex-m4")
    assert (board.flash_bytes, board.ram_bytes) == (512 * 1024, 160 * 1024)
    assert (core.flash_bytes, core.ram_bytes) == (None, None)
    assert (board.gcc_flags, board.zig_flags, board.unicorn, board.qemu) == (
        core.gcc_flags,
        core.zig_flags,
        core.unicorn,
        core.qemu,
    )


def test_unknown_names_are_refused_with_near_matches():
    with pytest.raises(NoMatch, match="nucleo-l452re"):
        target("nucleo-l452")


def test_a_target_is_its_own_name():
    assert all(target(name).name == name and target(t) is t for name, t in targets().items())


def test_isa_follows_the_core():
    assert {t.core for t in targets().values() if t.isa == "dsp"} == {"cortex-m4", "cortex-m7"}
