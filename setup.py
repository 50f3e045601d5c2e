"""Builds `dynprune.runtime._C`: one extension for plan and bindings, one static library per instruction set.

Only the files in csrc/isa/ see -m flags, so nothing else can contain an instruction that some CPU lacks. Metadata is in pyproject.toml.
Set DYNPRUNE_SANITIZE=address to build with the address and undefined-behaviour sanitizers, =thread with the thread sanitizer;
DYNPRUNE_BUILD_JOBS bounds the parallel compiles.
"""

import os
import platform
from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup

ISA_FLAGS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [f"-mavx512{group}" for group in ("f", "cd", "bw", "dq", "vl")] + ["-mfma", "-mprefer-vector-width=512"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]

SANITIZERS = {"address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"], "thread": ["-fsanitize=thread"]}
SANITIZE = os.environ.get("DYNPRUNE_SANITIZE")
if SANITIZE and SANITIZE not in SANITIZERS:
    raise SystemExit(f"DYNPRUNE_SANITIZE={SANITIZE!r} is unknown; choose one of {', '.join(SANITIZERS)}.")
SANITIZER_FLAGS = SANITIZERS[SANITIZE] if SANITIZE else []
OPTIMISE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-g0"]
CFLAGS = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", *OPTIMISE_FLAGS, *SANITIZER_FLAGS]

headers = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True))
isa_sources = {isa: f"csrc/isa/{isa}.cpp" for isa in ISA_FLAGS}
newest_header = max(os.path.getmtime(header) for header in headers)


def needs_recompile(object_file: str, source: str) -> bool:
    """Returns whether an object file is missing, or older than its source or than any header."""
    return not os.path.exists(object_file) or os.path.getmtime(object_file) < max(os.path.getmtime(source), newest_header)


ParallelCompile("DYNPRUNE_BUILD_JOBS", needs_recompile=needs_recompile).install()

libraries = [
    (
        f"dynprune_{isa}",
        {"sources": [isa_sources[isa]], "obj_deps": {"": headers}, "cflags": [*CFLAGS, *flags], "include_dirs": ["csrc"]},
    )
    for isa, flags in ISA_FLAGS.items()
]

extension = Extension(
    "dynprune.runtime._C",
    sources=sorted(
        glob("csrc/bindings/*.cpp") + glob("csrc/plan/**/*.cpp", recursive=True) + glob("csrc/base/*.cpp") + glob("csrc/dispatch.cpp")
    ),
    include_dirs=["csrc", pybind11.get_include()],
    define_macros=[(f"DYNPRUNE_HAVE_{isa.upper()}", "1") for isa in ISA_FLAGS if isa != "scalar"],
    depends=headers + list(isa_sources.values()),
    extra_compile_args=CFLAGS,
    extra_link_args=["-pthread", *SANITIZER_FLAGS],
    language="c++",
)

setup(libraries=libraries, ext_modules=[extension])
