"""Builds the op library through CMake and Ninja.

CMakeLists.txt is the only place that knows sources, flags and architectures; this file finds torch
and the tools, forwards the options, and tags the wheel.

Environment (the table with defaults is in README.md):
MEDCL_CUDA=auto|1|0  MEDCL_CUDA_ARCHS="80;90a;90+PTX"  MEDCL_SANITIZE=0|1  MEDCL_PYBIND=0|1
MEDCL_TORCH_DIR=<torch package>  MEDCL_BUILD_DIR=<folder>  MAX_JOBS=<n>  CMAKE_ARGS=<more arguments>
"""

import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_FOR_BUILD = "torch==2.13.0"  # only asked for where no torch with stable-ABI headers is found
ON_OFF = {"1": "ON", "on": "ON", "true": "ON", "0": "OFF", "off": "OFF", "false": "OFF"}


def option(name, default, choices):
    """Value of one environment variable, translated for CMake; an unknown value stops the build."""
    given = os.environ.get(name, default).lower()
    if given not in choices:
        raise SystemExit(f"{name}={given!r} is not one of {', '.join(choices)}")
    return choices[given]


CUDA = option("MEDCL_CUDA", "auto", {"auto": "AUTO", **ON_OFF})
SANITIZE = option("MEDCL_SANITIZE", "0", ON_OFF)
PYBIND = option("MEDCL_PYBIND", "0", ON_OFF) == "ON"  # the module _host, for tests


def torch_dir():
    """Folder of a torch package that has the stable-ABI headers, or None. Never imports torch."""
    found = []
    if os.environ.get("MEDCL_TORCH_DIR"):
        found.append(Path(os.environ["MEDCL_TORCH_DIR"]))
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        found.append(Path(list(spec.submodule_search_locations)[0]))
    # pip's isolated build keeps the caller's interpreter, so its site-packages are still known
    found += [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    for folder in found:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def nvcc():
    """Path of nvcc or None: $CUDACXX, then PATH, then $CUDA_HOME, then /usr/local/cuda."""
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    for name in (os.environ.get("CUDACXX"), "nvcc", str(home / "bin/nvcc")):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def cmake_arguments(debug):
    torch = torch_dir()
    if torch is None:
        raise SystemExit(
            "No torch with stable-ABI headers (torch >= 2.10) was found. Install it first, then "
            "build with --no-build-isolation, or point MEDCL_TORCH_DIR at the torch package."
        )
    compiler = nvcc() if CUDA != "OFF" else None
    if CUDA == "ON" and compiler is None:
        raise SystemExit(
            "MEDCL_CUDA=1 asks for the CUDA kernels, but no nvcc was found (looked at CUDACXX, "
            "PATH, CUDA_HOME, /usr/local/cuda). Install the CUDA toolkit, or use MEDCL_CUDA=0."
        )
    yield f"-DMEDCL_TORCH_DIR={torch}"
    yield f"-DMEDCL_CUDA={CUDA}"
    yield f"-DMEDCL_SANITIZE={SANITIZE}"
    yield f"-DMEDCL_PYBIND={'ON' if PYBIND else 'OFF'}"
    if PYBIND:
        yield f"-DPython_EXECUTABLE={sys.executable}"
    yield f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}"
    # named outright: a cached path may lie in an isolated build environment that is gone by now
    yield f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"
    # empty, not absent: else a kept build folder would go on using the list of the run before
    archs = os.environ.get("MEDCL_CUDA_ARCHS")
    yield f"-DMEDCL_CUDA_ARCHS={archs}" if archs else "-UMEDCL_CUDA_ARCHS"
    if compiler:
        yield f"-DCMAKE_CUDA_COMPILER={compiler}"
    yield from shlex.split(os.environ.get("CMAKE_ARGS", ""))


def cmake(*arguments):
    """Runs CMake; its own messages are the explanation, so no traceback is put below them."""
    try:
        subprocess.check_call(["cmake", *map(str, arguments)])
    except FileNotFoundError:
        raise SystemExit("cmake was not found on PATH: install it and build again") from None
    except subprocess.CalledProcessError as error:
        command = shlex.join(map(str, arguments[:3]))
        raise SystemExit(f"cmake {command} ... failed ({error.returncode}), see above") from None


def forget_moved_cache(folder):
    """CMake refuses a build folder that was configured for another source tree (a copy)."""
    cache = folder / "CMakeCache.txt"
    if cache.is_file() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        cache.unlink()
        shutil.rmtree(folder / "CMakeFiles", ignore_errors=True)


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        # a plain shared library: torch opens it, Python never imports it
        return os.path.join(*fullname.split(".")[:-1], "libmedcl_kernels.so")

    def build_extensions(self):
        # one folder for every kind of build (setuptools' own is temporary for an editable install),
        # so that a rebuild compiles only what changed
        folder = Path(os.environ.get("MEDCL_BUILD_DIR") or ROOT / "build" / "cmake").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two installs at once would ruin each other's objects
            forget_moved_cache(folder)
            cmake("-S", ROOT, "-B", folder, "-G", "Ninja", *cmake_arguments(self.debug))
            cmake("--build", folder, "-j", jobs)
            stage = folder / "stage"
            strip = [] if self.debug or SANITIZE == "ON" else ["--strip"]
            cmake("--install", folder, "--prefix", stage, "--component", "ops", *strip)
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # by rename: a process that has the old library open keeps its own intact copy
            fresh = target.with_name(target.name + ".tmp")
            shutil.copyfile(stage / "medcl_kernels" / target.name, fresh)
            os.replace(fresh, target)
            if PYBIND:
                cmake("--install", folder, "--prefix", stage, "--component", "host")
                for module in (stage / "medcl_kernels").glob("_host.*"):
                    shutil.copy2(module, target.parent)


class Build(build):
    def run(self):
        # else a module deleted from the source would come back from an earlier build into the wheel
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        # the library never touches Python's C API, so one file serves every Python 3; _host does
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if PYBIND else ("py3", "none", platform)


def build_requirements():
    """Reported to pip (get_requires_for_build_*): only what this machine does not have already."""
    wanted = [] if torch_dir() else [TORCH_FOR_BUILD]
    wanted += [] if shutil.which("cmake") else ["cmake>=3.22"]
    wanted += [] if shutil.which("ninja") else ["ninja"]
    wanted += ["pybind11"] if PYBIND else []
    return wanted


setup(
    ext_modules=[Extension("medcl_kernels._ops", sources=[])],
    cmdclass={"build": Build, "build_ext": CMakeBuild, "bdist_wheel": Wheel},
    setup_requires=build_requirements(),
)
