"""The source tree keeps its law: layers, no print, what loads without torch, no copies of what must be one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "thrifty"
WITHOUT_TORCH = (
    "thrifty", "thrifty.arith", "thrifty.errors", "thrifty.graph", "thrifty.integer", "thrifty.ties", "thrifty.cost",
    "thrifty.budget", "thrifty.report", "thrifty.deploy", "thrifty.deploy.lower", "thrifty.deploy.plan",
    "thrifty.deploy.run", "thrifty.deploy.fidelity", "thrifty.deploy.targets", "thrifty.deploy.c.emit",
    "thrifty.deploy.c.build", "thrifty.deploy.c.emulate", "thrifty.deploy.c.host", "thrifty.deploy.c.qemu",
    "thrifty.associative", "thrifty.deploy.learner", "thrifty.deploy.c.stream_learner",
    "thrifty.fewshot", "thrifty.fewshot.generalization",
)  # fmt: skip
OPTIONAL = ("optuna", "unicorn", "elftools", "capstone", "ziglang", "sklearn", "scipy", "PIL", "matplotlib", "onnx",
            "transformers", "peft", "accelerate", "gguf", "lm_eval", "tokenizers")


def sources():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 60
    return files


def trees():
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sources()]


def test_import_law():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": "src"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


def test_only_the_command_line_prints():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in trees()
        if path.name != "cli.py" and "cli" not in path.relative_to(PACKAGE).parts
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not found


def run_hidden(hidden, code):
    """Run code in a fresh process in which importing the hidden packages fails."""
    hide = (  # a finder and not sys.modules[name] = None: SciPy looks into sys.modules
        "import sys\nclass Hide:\n def find_spec(self, name, path=None, target=None):\n"
        f"  if name.split('.')[0] in {hidden!r}: raise ModuleNotFoundError('hidden: ' + name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip


def test_what_must_load_without_torch_does():
    code = "import importlib, json\ndone = {}\n" + "".join(
        f"try: importlib.import_module({name!r}); done[{name!r}] = ''\n"
        f"except Exception as err: done[{name!r}] = repr(err)\n"
        for name in WITHOUT_TORCH
    )
    done = run_hidden(["torch"], code + "print(json.dumps(done))")
    assert done.returncode == 0, done.stderr
    failed = {name: err for name, err in json.loads(done.stdout).items() if err}
    assert not failed
    assert len(json.loads(done.stdout)) == len(WITHOUT_TORCH)


def test_a_graph_is_deployed_without_torch(tmp_path):
    code = f"""
import numpy as np
from thrifty.graph import Graph, Node
from thrifty.deploy import deploy
w = np.ones((2, 3), np.float32)
x = Node("x", "input", shape=(3,))
y = Node("y", "linear", ("x",), shape=(2,), constants={{"weight": w}})
done = deploy(Graph((x, y), ("y",)), {str(tmp_path / "c")!r}, "host")
assert done.proven
print(sorted(done.parity.samples))
"""
    done = run_hidden(["torch"], code)
    assert done.returncode == 0, done.stderr
    assert "program" in done.stdout


def test_optional_packages_are_imported_inside_functions():
    found = []
    for path, tree in trees():
        for node in tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            found += [f"{path.name}: {n}" for n in names if n.split(".")[0] in OPTIONAL]
    assert not found


def test_everything_loads_without_the_optional_packages():
    code = "import importlib\n" + "".join(
        f"importlib.import_module({m!r})\n" for m in ("thrifty.search", "thrifty.store", "thrifty.zoo", "thrifty.data")
    )
    done = run_hidden(list(OPTIONAL), code)
    assert done.returncode == 0, done.stderr


def test_a_missing_package_is_named_with_its_extra():
    code = """
from thrifty.errors import MissingExtra
from thrifty.search.sample import Sampler
try: Sampler.need()
except MissingExtra as err: print(err)
"""
    done = run_hidden(["optuna"], code)
    assert "pip install 'thrifty[search]'" in done.stdout, done.stderr


def test_every_public_function_and_class_says_what_it_does():
    bare = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path, tree in trees()
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
        and "overload" not in [ast.unparse(d) for d in node.decorator_list]
    ]
    assert not bare


def narrows_a_type(test):
    """`assert isinstance(x, T)` and `assert x is not None` tell the type checker what our own code made sure of."""
    if isinstance(test, ast.BoolOp):
        return all(narrows_a_type(v) for v in test.values)
    if isinstance(test, ast.Compare):
        return isinstance(test.ops[0], ast.IsNot)
    return isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance"


def test_assert_is_for_the_type_checker_only():
    """What a user gives is refused with a ThriftyError."""
    places = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and not narrows_a_type(node.test)
    ]
    assert not places


@pytest.mark.parametrize("word", ["torch.ao", "symbolic_trace", "pickle.load", "pickle.loads", "pickle.dump"])
def test_what_the_design_forbids_is_absent(word):
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{a.name}" for a in node.names]
            elif isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            found += [f"{path.name}: {n}" for n in names if f".{word}." in f".{n}."]
    assert not found


def test_every_number_of_the_pages_comes_from_a_result():
    done = subprocess.run(
        [sys.executable, "experiments/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
