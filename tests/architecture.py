"""The rules of the tree, as functions of source text, so that they can themselves be tested."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import PurePosixPath

FLOORS = {
    "errors": 0, "_version": 0, "formula": 0.25, "activations": 0.5, "quantization": 0.5, "config": 1,
    "contracts": 2, "checks": 2, "environment": 2, "codec": 2, "device": 2, "tokens": 2, "installation": 2.5,
    "ops": 3, "comm": 3, "ep_model": 3, "weight_and_reduce": 4, "prepare_finalize": 5, "experts": 5, "kernel": 6,
    "select": 7, "functional": 8, "checkpoint": 8, "dense": 7.5, "layer": 9, "catalogue": 9, "bench": 10, "cli": 10,
    "__main__": 11,
}  # fmt: skip
"""Floor of each module or package of pymoe; a module imports from lower floors only."""

# Within a floor some rooms stand on others: checks use environment and device; contracts stand on config alone.
SAME_FLOOR = {("checks", "environment"), ("checks", "device"), ("device", "environment"), ("device", "checks"),
              ("codec", "checks"), ("codec", "device"), ("tokens", "device"), ("experts", "contracts"),
              ("cli", "bench")}  # fmt: skip
OPTIONAL = {"cupy", "cupy_backends", "cuda", "numba", "mpi4py", "torch", "jax", "matplotlib", "llvmlite", "tqdm"}
READERS = {"environ", "environb", "getenv", "getenvb"}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
BANNED = {"top_k", "num_topk", "hidden_dim", "hidden_size", "d_model", "num_local_experts", "tmp2", "data", "info"}

# Signatures that api.md, vLLM or an agreement between stages binds; their parameter names are theirs as well.
BOUND = {
    "fused_experts", "select_experts", "fused_moe", "MoELayer.__init__", "MoELayer.__call__",
    "MoELayer.from_checkpoint", "FusedMoEKernel.apply", "FusedMoEKernel.apply_as", "FusedMoEKernel.apply_monolithic",
    "FusedMoEQuantConfig.make", "routing_config", "workspace_shapes", "apply", "prepare", "prepare_async", "finalize",
    "finalize_async", "_allocate_buffers", "_fused_experts", "_finalize", "moe_align_block_size",
    "batched_moe_align_block_size", "_kernel_for_call", "grouped_gemm",
}  # fmt: skip
SEED_NAMES = {"hidden_dim", "num_local_experts", "top_k"}
SEED_FILES = ("pymoe/config.py", "pymoe/contracts/", "pymoe/kernel/", "pymoe/prepare_finalize/", "pymoe/experts/",
              "pymoe/functional.py", "pymoe/layer/", "pymoe/checkpoint/", "pymoe/select.py")  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One import statement: the module it names, its line, and whether it runs when the file is loaded."""

    module: str
    line: int
    at_load: bool


def imports(source: str) -> list[Import]:
    """Return every import of a file, those inside functions included."""
    found: list[Import] = []

    def visit(node: ast.AST, at_load: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, at_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                found.extend(Import(f"{base}.{alias.name}", child.lineno, at_load) for alias in child.names)
            else:
                if (name := named_at_run_time(child)) is not None:
                    found.append(Import(name, child.lineno, at_load))  # type: ignore[attr-defined]
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                typing_only = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING",)
                visit(child, at_load and not inside and not typing_only)

    visit(ast.parse(source), True)
    return found


def named_at_run_time(node: ast.AST) -> str | None:
    """Return the module that ``import_module("...")`` or ``__import__("...")`` names, "?" where it is computed."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func).split(".")[-1] not in ("import_module", "__import__"):
        return None
    first = node.args[0] if node.args else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "?"


def room(module: str) -> tuple[str, str | None]:
    """Return (room, op) of a dotted pymoe module: ``pymoe.ops.route._numpy`` is ("ops", "route")."""
    parts = module.split(".")[1:] or ["__init__"]
    return parts[0], parts[1] if parts[0] == "ops" and len(parts) > 1 else None


def import_faults(path: str, source: str) -> list[str]:
    """Return the broken import rules of the file at `path` (relative to the tree's root)."""
    dotted = ".".join(PurePosixPath(path).with_suffix("").parts).removesuffix(".__init__")
    here, op = room(dotted)
    faults = []
    for entry in imports(source):
        where = f"{path}:{entry.line}: imports {entry.module}"
        top = entry.module.split(".")[0]
        if entry.module == "?":
            faults.append(f"{where}: a computed name hides the import")
        if entry.module.startswith("."):
            faults.append(f"{where}: relative imports hide the floor")
        if top in OPTIONAL and entry.at_load and not loaded_lazily(path):
            faults.append(f"{where}: optional libraries load inside functions or in backend files only")
        if top == "mpi4py" and here != "comm":
            faults.append(f"{where}: only comm imports mpi4py")
        if top != "pymoe" or here == "__init__":
            continue
        there, other_op = room(entry.module)
        if there == here:
            if here == "ops" and op is not None and other_op != op:
                faults.append(f"{where}: an op imports another op")
            continue
        if there not in FLOORS:
            if there != "__init__" and not (entry.module.count(".") == 1 and there == "__version__"):
                faults.append(f"{where}: {there} has no floor")
            elif here not in ("cli", "__main__"):
                faults.append(f"{where}: the package itself is above all floors")
            continue
        if here not in FLOORS:
            faults.append(f"{path}: {here} has no floor")
        elif FLOORS[there] >= FLOORS[here] and (here, there) not in SAME_FLOOR:
            faults.append(f"{where}: floor {FLOORS[there]} is not below {FLOORS[here]}")
    return faults


def loaded_lazily(path: str) -> bool:
    """Return whether a file is itself imported inside functions only: a backend of an op, or a Numba helper."""
    name = PurePosixPath(path).name
    return name in (
        "_numba.py",
        "_numba_cuda.py",
        "_cuda.py",
        "_lanes.py",
        "numba_cpu.py",
        "numba_gpu.py",
    ) or name.startswith("_numba")


def size_faults(path: str, source: str) -> list[str]:
    """Return the broken budgets: lines of the file, lines of a function's body, parameters."""
    faults = []
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        faults.append(f"{path}: {lines} lines, more than {FILE_LINES}")

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                visit(child, f"{child.name}.")
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                faults.extend(function_faults(path, child, prefix))
                visit(child, f"_{child.name}.")  # what is inside a function is nobody's interface

    visit(ast.parse(source), "")
    return faults


def function_faults(path: str, node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> list[str]:
    """Return the broken budgets of one function; the docstring does not count."""
    faults = []
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    if lines > FUNCTION_LINES:
        faults.append(f"{path}:{node.lineno}: {prefix}{node.name} has {lines} lines, more than {FUNCTION_LINES}")
    arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    count = len([a for a in arguments if a not in ("self", "cls", "typingctx")])
    bound = node.name in BOUND or prefix + node.name in BOUND or is_kernel(node)
    if count > PARAMETERS and not bound and not (prefix + node.name).startswith("_") and "._" not in prefix + node.name:
        faults.append(f"{path}:{node.lineno}: {prefix}{node.name} has {count} parameters, more than {PARAMETERS}")
    allowed = SEED_NAMES if path.startswith(SEED_FILES) else set()
    faults.extend(
        f"{path}:{node.lineno}: parameter {name} of {prefix}{node.name} is a banned name"
        for name in arguments
        if name in BANNED - allowed
    )
    return faults


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a GPU's: a launch has no keywords, no defaults and no structures."""
    return any(ast.unparse(decorator) == "kernel" for decorator in node.decorator_list)


def environment_faults(path: str, source: str) -> list[str]:
    """Return reads of the process environment outside the one module that may."""
    if path in ("pymoe/environment.py",):
        return []
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in READERS and ast.unparse(node.value) == "os":
            faults.append(f"{path}:{node.lineno}: reads os.{node.attr}")
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            faults += [f"{path}:{node.lineno}: imports {a.name}" for a in node.names if a.name in READERS]
    return faults
