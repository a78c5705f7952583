"""The build: what the library is linked with, what a wheel holds, how wrong options fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from medcl_kernels import env

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("kept_build")


@pytest.fixture
def library() -> Path:
    """The built library; a test run without it is a failure, not a skip."""
    path = env.library_path()
    assert path.is_file(), f"{path} is missing: run `make build` before the tests"
    return path


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """One command in the checkout, with the output captured as text."""
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )


def python(code: str, cwd: Path, **variables: str) -> str:
    """Output of a snippet run by this interpreter outside of the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needed(library: Path) -> set[str]:
    """The NEEDED entries of a shared library."""
    out = run(["readelf", "-d", "-W", str(library)]).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", out))


def test_library_needs_no_python(library: Path) -> None:
    """No symbol of Python's C API: that is why one file serves every Python 3."""
    out = run(["nm", "-D", "--undefined-only", str(library)])
    assert out.returncode == 0 and "aoti_torch" in out.stdout
    assert re.findall(r"\bU (_?Py\w+)", out.stdout) == []
    assert not {name for name in needed(library) if name.startswith("libpython")}


def test_library_keeps_libtorch_needed(library: Path) -> None:
    """libtorch.so brings libtorch_cuda.so into scope, and with it the current CUDA stream."""
    assert "libtorch.so" in needed(library)
    # the C++ ABI of torch is out of bounds, and a CUDA runtime is linked statically or not at all
    assert not {name for name in needed(library) if re.match(r"libc10|libcudart|libtorch_p", name)}


def test_library_has_no_run_path(library: Path) -> None:
    """torch is loaded before the library; no folder of the build machine may be in it."""
    assert not re.search(r"R(UN)?PATH", run(["readelf", "-d", "-W", str(library)]).stdout)


def test_loading_leaves_denormals_alone(library: Path, tmp_path: Path) -> None:
    """A link with -ffast-math would set flush-to-zero in every process that loads the library."""
    out = python(
        "import sys, torch\n"
        "tiny = sys.float_info.min\n"
        "assert tiny / 2 > 0\n"
        f"torch.ops.load_library({str(library)!r})\n"
        "assert tiny / 2 > 0, 'denormals became zero'\n"
        "assert float(torch.full((64,), tiny, dtype=torch.float64).mul(0.5).min()) > 0\n"
        "print('kept')",
        tmp_path,
    )
    assert out.strip() == "kept"


def test_build_info_names_versions_and_configuration(library: Path) -> None:
    """The fields that `python -m medcl_kernels env` and bug reports rely on."""
    info = env.build_info()
    assert info["target_torch"] == "2.10"
    assert re.match(r"\d+\.\d+\.\d+", info["built_with_torch"])
    assert info["cpu"] in env.CPU_CAPABILITY.choices
    assert info["gemm"] in env.GEMM.choices
    assert re.fullmatch(r"none|(\d+[af]?(\+PTX)?,?)+", info["cuda_archs"])


@pytest.mark.parametrize(
    ("variable", "expected"), [("MEDCL_CUDA", "auto, 1, on"), ("MEDCL_SANITIZE", "1, on")]
)
def test_unknown_build_option_is_an_error(variable: str, expected: str) -> None:
    done = run([sys.executable, "setup.py", "--version"], **{variable: "maybe"})
    assert done.returncode != 0
    assert f"{variable}='maybe' is not one of {expected}" in done.stderr


def build_ext(target: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Compiles into `target/lib`, with its own CMake folder, away from the checkout's."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target / "lib")]
    command += ["--build-temp", str(target / "temp")]
    return run(command, MEDCL_BUILD_DIR=str(target / "cmake"), **variables)


def test_cuda_on_without_nvcc_fails_loudly(tmp_path: Path) -> None:
    """MEDCL_CUDA=1 must never give a CPU-only library in silence."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    nowhere = {"PATH": str(tools), "CUDACXX": "", "CUDA_HOME": str(tmp_path / "none")}
    done = build_ext(tmp_path, MEDCL_CUDA="1", **nowhere)
    assert done.returncode != 0
    assert "MEDCL_CUDA=1 asks for the CUDA kernels, but no nvcc was found" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_cuda_off_builds_a_library_that_computes(tmp_path: Path) -> None:
    """From an empty build folder: nvcc is not used, and the ops give numbers."""
    done = build_ext(tmp_path, MEDCL_CUDA="0", CUDACXX="/nonexistent/nvcc")
    assert done.returncode == 0, done.stderr
    library = tmp_path / "lib" / "medcl_kernels" / env.LIBRARY_NAME
    code = (
        "import torch; from medcl_kernels import env, info_nce\n"
        "x = torch.randn(1, 8, 5, 7, generator=torch.Generator().manual_seed(0))\n"
        "a, b = (info_nce(x, x.flip(-1), impl=impl).item() for impl in ('cpu', 'reference'))\n"
        "assert abs(a - b) < 1e-5 and a > 1, (a, b)\n"
        "assert env.build_info()['cuda_archs'] == 'none'\n"
        "print(env.library_path())"
    )
    used = python(code, tmp_path, MEDCL_LIBRARY=str(library), PYTHONPATH=str(ROOT))
    assert used.strip() == str(library)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout; it reuses the objects of the kept build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = run([*command, "-w", str(folder), str(ROOT)])
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_serves_every_python_and_holds_the_package_only(wheel: Path) -> None:
    assert re.fullmatch(r"medcl_kernels-[\d.]+-py3-none-linux_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        assert "Tag: py3-none-linux_x86_64" in archive.read(record).decode()
    packaged = {name for name in names if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "medcl_kernels").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert packaged == sources | {"medcl_kernels/py.typed", f"medcl_kernels/{env.LIBRARY_NAME}"}
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    done = run([*command, "--target", str(site), str(wheel)])
    assert done.returncode == 0, done.stderr
    code = (
        "import medcl_kernels as m, torch; from medcl_kernels import env\n"
        "reason = env.load_library(); assert reason is None, reason\n"
        "x = torch.randn(2, 4, 6, 6, requires_grad=True)\n"
        "m.info_nce(x, x.detach().flip(0), impl='cpu').backward()\n"
        "assert x.grad.isfinite().all() and x.grad.abs().max() > 0\n"
        "print(m.__version__, env.library_path())"
    )
    version, path = python(code, tmp_path, PYTHONPATH=str(site), MEDCL_LIBRARY="").split()
    assert version == wheel.name.split("-")[1]
    assert Path(path) == site / "medcl_kernels" / env.LIBRARY_NAME


@pytest.mark.slow
def test_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    """It holds all that a build needs, and no binary or data file."""
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "out")
    (top,) = (tmp_path / "out").iterdir()
    files = {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} | sources <= files
    assert not [name for name in files if re.search(r"\.(so|o|nii|gz|h5|pt|npz)$", name)]
