"""What importing the package must and must not do."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *, cwd: Path = ROOT) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_import_loads_no_transformers_triton_or_native_kernel() -> None:
    loaded = run(
        "import sys, wina; print([m for m in ('transformers', 'triton', 'matplotlib', 'typer') "
        "if m in sys.modules]); import torch; "
        "print(torch._C._dispatch_has_kernel_for_dispatch_key('wina::sparse_linear', 'CPU'))"
    )
    assert loaded.splitlines() == ["[]", "False"]


def test_public_names() -> None:
    import wina

    assert set(wina.__all__) == {
        "SparsityConfig", "SparsityPlan", "WinaConfig", "WinaError", "calibrate", "decode", "dense",
        "inspect", "restore", "rotate", "sparsify", "unrotate",
    }  # fmt: skip


def test_top_level_folders_shadow_nothing(tmp_path: Path) -> None:
    """A package called `kernels` elsewhere on the path wins over our folder of that name."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("origin = 'theirs'")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.origin)"
    assert run(code) == "theirs"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _pins() -> dict[str, str]:
    """Package → exact version, of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def test_ci_runs_pinned_versions_of_what_is_asked_for() -> None:
    """Every requirement but engines that only benches run, at one version that it admits."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(r for name in extras if name != "peers" for r in extras[name]),
    ]
    pins = _pins()
    for requirement in map(Requirement, asked):
        if requirement.name != "wina":
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_no_code_unpickles_evaluates_or_trusts_models() -> None:
    """By every import and call in the package."""
    forbidden = {"eval", "exec", "load_module"}
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    folders = [ROOT / name for name in ("wina", "kernels", "eval", "bench")]
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & modules, path
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {*forbidden, "torch.load", "yaml.load"}, (path, node.lineno)
                for word in node.keywords:
                    trusts = isinstance(word.value, ast.Constant) and word.value.value is True
                    assert not (word.arg == "trust_remote_code" and trusts), (path, node.lineno)
