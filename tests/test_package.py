"""What importing the package must and must not do."""

import subprocess
import sys
from pathlib import Path

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
