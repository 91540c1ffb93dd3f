"""A file imports only from the layers below it, and importing has no side effects."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "configs": {"configs"},
    "kernels": {"configs", "kernels"},
    "data": {"configs", "data"},
    "model": {"configs", "kernels"},
    "optim": {"configs", "kernels", "optim"},
    "train_gpt": {"configs", "data", "kernels", "model", "optim"},
    "scripts": {"configs", "data", "kernels", "model", "optim", "scripts"},
    "benchmarks": {"benchmarks", "configs", "data", "kernels", "model", "optim", "scripts", "train_gpt"},
}
SOURCES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0].removesuffix(".py") in MAY_IMPORT)


def imported_modules(path: Path) -> list[str]:
    """Return the full names of all modules that a file imports, also inside functions."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules.append(node.module)
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_layers_below(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = {name.split(".")[0] for name in imported_modules(path)} & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package]


def test_there_are_no_import_cycles():
    graph = {_module(p): {m for m in imported_modules(p) if (ROOT / Path(*m.split("."))).with_suffix(".py").exists()}
             for p in SOURCES}
    done: set[str] = set()
    while graph:
        free = [m for m, needs in graph.items() if not (needs - {m}) & set(graph)]
        assert free, f"import cycle among {sorted(graph)}"
        done.update(free)
        graph = {m: needs for m, needs in graph.items() if m not in done}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_only_comm_imports_torch_distributed():
    importers = {str(p.relative_to(ROOT)) for p in SOURCES if "torch.distributed" in imported_modules(p)}
    assert importers == {"optim/comm.py"}


def test_importing_any_module_has_no_side_effects(tmp_path):
    """No process group, no folder, no wandb, no heavy optional package."""
    names = [_module(p) for p in SOURCES if p.name not in ("__main__.py",) and "benchmarks" not in p.parts]
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
for name in {names!r}:
    __import__(name)
import torch.distributed as dist
assert not dist.is_initialized()
assert not {{"wandb", "datasets", "rustbpe"}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("flags", "zoo"), [
    ([], set()),
    (["--optim.matrix.rule", "soap", "--optim.matrix.graft.rule", "sm3", "--optim.embed.constraint", "sphere",
      "--optim.head.extra.row_floor", "0.3"], {"soap", "shampoo", "graft", "sm3", "sphere", "radial"})])
def test_the_zoo_is_imported_only_where_a_role_names_it(flags, zoo):
    """Muon and Adam import none of it; another rule imports its own file and the files that it is built from."""
    code = f"""
import sys
import torch
import train_gpt
from configs.cli import parse
from model import GPT
from optim.comm import Comm
from optim.groups import build_groups
from optim.sharded import ShardedOptimizer
run = parse(["bytes", "--model.no_zero_init_projections", *{flags!r}])
model = GPT(run.model, vocab_size=257, max_tokens=64)
ShardedOptimizer(build_groups(dict(model.named_parameters()), model.roles(), run.optim, model.axes()), Comm())
print(*sorted(name.removeprefix("optim.zoo.") for name in sys.modules if name.startswith("optim.zoo.")))
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and set(done.stdout.split()) == zoo, done.stdout + done.stderr
