"""CUDA C++ that is compiled when it is first needed and launched on torch's stream, by the libraries that torch itself brings.

NVRTC needs neither a toolkit nor headers; the driver takes what it made. Only what `gpu` asks for is bound here.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

import torch

_OVERLAPS = (9, 0)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute; its value is a union of 64 bytes, of which an int is used."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("blocks", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_OVERLAPPING = _Attribute(6, b"", 1)  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class CompilerError(RuntimeError):
    """NVRTC or the driver did not do what it was asked."""


class Module:
    """Compiled code, in the context of the device that was current."""

    def __init__(self, code: bytes) -> None:
        self._module = ctypes.c_void_p()
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._overlaps = torch.cuda.get_device_capability() >= _OVERLAPS
        _driver("cuModuleLoadData", ctypes.byref(self._module), code)

    def launch(self, name: str, blocks: int, threads: int, argument: ctypes.Structure, *, overlapping: bool = False) -> None:
        """Queue the kernel `name` on torch's current stream, with one argument.

        - `overlapping`: it may begin before the one queued before it is done, where the GPU can, and waits for that itself
        """
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = ctypes.c_void_p()
            _driver("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        how = _Launch((blocks, 1, 1), (threads, 1, 1), 0, torch.cuda.current_stream().cuda_stream)
        if overlapping and self._overlaps:
            how.attributes, how.count = ctypes.pointer(_OVERLAPPING), 1
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        _driver("cuLaunchKernelEx", ctypes.byref(how), function, arguments, None)


def compiled(source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
    """`source`, which includes `headers` by name, as machine code.

    Raises `CompilerError` with what the compiler says.
    """
    library, program = _library(), ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    words = (ctypes.c_char_p * len(options))(*(word.encode() for word in options))
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"lorafold.cu", len(headers), texts, names), "create")
    try:
        if library.nvrtcCompileProgram(program, len(options), words):
            raise CompilerError(_taken(library, program, "ProgramLog").decode(errors="replace").strip("\0\n"))
        return _taken(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    room = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, room), what)
    return room.raw


def _check(result: int, what: str) -> None:
    if result:
        raise CompilerError(f"NVRTC: {what}: error {result}")


def _driver(name: str, *arguments: object) -> None:
    result = getattr(_cuda(), name)(*arguments)
    if result:
        raise CompilerError(f"{name}: CUDA driver error {result}")


@cache
def _cuda() -> ctypes.CDLL:
    return _loaded(["libcuda.so.1"])


@cache
def _library() -> ctypes.CDLL:
    """NVRTC of the CUDA that torch was built for, or of any where torch has none, from where wheels put it."""
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0] if torch.version.cuda else '*'}"
    site = Path(torch.__file__).parents[1]
    beside = chain(site.glob(f"nvidia/*/lib/{name}"), site.glob(f"torch/lib/{name}"))
    return _loaded([name, *map(os.fspath, beside)])


def _loaded(names: Sequence[str]) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError as cause:
            error = cause
    raise CompilerError(f"{names[0]} was not found") from error
