"""How to quantise a network by hand, look at its integers, and run its C on an emulated Cortex-M4."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from thrifty import Quantize, load_task
from thrifty.capture import capture
from thrifty.deploy import deploy
from thrifty.deploy.lower import lower
from thrifty.deploy.run import predict
from thrifty.zoo import create


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="where the C goes; default: a temporary folder")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())

    torch.manual_seed(0)
    task = load_task("digits")
    model = create("lenet", input_shape=(1, 8, 8), classes=10)
    task.fit(model, epochs=15, lr=0.05, batch=32)
    print(f"float32            validation accuracy {task.score(model):.3f}")

    real = task.validation.x.numpy()
    techniques = {"int16": Quantize(bits=16), "int8": Quantize(bits=8), "int4 weights": Quantize(weight_bits=4)}
    for name, technique in techniques.items():
        small = technique.edit(model, task)  # a new module; `model` stays as it is
        program = lower(capture(small, task.example))  # integers and plain data
        made = deploy(program, out / name.replace(" ", "_"), "cortex-m4", samples=real, vectors=4)
        with torch.no_grad():
            hard = small(task.validation.x).numpy()
        same = np.array_equal(hard, predict(program, real)) and made.proven
        print(
            f"{name:18s} validation accuracy {task.score(small):.3f}, "
            f"flash {made.flash_bytes} B, RAM {made.ram_bytes} B, "
            f"{made.instructions} instructions, the same bits everywhere: {same}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
