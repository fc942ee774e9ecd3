"""Which pairs of K and V types flash attention serves on the devices of this machine.

ggml is asked, device by device, with a flash-attention node as decoding has it; nothing is computed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from gguf.constants import GGMLQuantizationType

from pyfasa.machine import DEVICE_TYPES, Device, devices, libggml
from pyfasa.options import KvType

# "converted": K or V are copied to f16 for every token, which is served, and slow.
Service = Literal["served", "converted", "refused"]
Pair: TypeAlias = tuple[str, str]

HEAD_DIM, N_HEAD, N_CELL = 128, 8, 8192
N_BYTES_OF_NODES = 1 << 20  # of tensors without data: a few hundred bytes for each of 400


class _Params(ctypes.Structure):
    """struct ggml_init_params"""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def services() -> dict[Device, Mapping[Pair, Service]]:
    """What each CPU and GPU does with each pair (type of K, type of V) that pyfasa knows.

    Heads of 128 dims, and as many of them in K and V as in the query.
    Raises RuntimeError when ggml gives no memory for the nodes.
    """
    lib = _declared()
    context = lib.ggml_init(_Params(N_BYTES_OF_NODES, None, True))
    if not context:
        raise RuntimeError("ggml gives no memory to ask about flash attention")
    try:
        nodes = {
            (k, v): _node(lib, context, k, v)
            for k in (kind.value for kind in KvType)
            for v in (kind.value for kind in KvType)
        }
        return {
            device: {
                pair: _service(lib, lib.ggml_backend_dev_get(i), node)
                for pair, node in nodes.items()
            }
            for i, device in enumerate(devices())
            if device.type in DEVICE_TYPES[:3]
        }
    finally:
        lib.ggml_free(context)


def _node(lib: ctypes.CDLL, context: int, type_k: str, type_v: str) -> int:
    def tensor(name: str, *shape: int) -> int:
        kind = int(GGMLQuantizationType[name.upper()])
        made: int = lib.ggml_new_tensor_4d(context, kind, *shape, *[1] * (4 - len(shape)))
        return made

    node: int = lib.ggml_flash_attn_ext(
        context,
        tensor("f32", HEAD_DIM, 1, N_HEAD),
        tensor(type_k, HEAD_DIM, N_CELL, N_HEAD),
        tensor(type_v, HEAD_DIM, N_CELL, N_HEAD),
        tensor("f16", N_CELL, 1),
        HEAD_DIM**-0.5,
        0.0,
        0.0,
    )
    return node


def _service(lib: ctypes.CDLL, device: int, node: int) -> Service:
    if not lib.ggml_backend_dev_supports_op(device, node):
        return "refused"
    # A node whose K or V are converted asks for room for the copies behind its result.
    kind = lib.ggml_backend_dev_buffer_type(device)
    room = lib.ggml_backend_buft_get_alloc_size(kind, node) - lib.ggml_nbytes(node)
    return "converted" if room >= N_CELL * HEAD_DIM * N_HEAD * 2 else "served"


def _declared() -> ctypes.CDLL:
    lib = libggml()
    pointer, size, real = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_Params]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_4d": (pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 4]),
        "ggml_flash_attn_ext": (pointer, [*[pointer] * 5, *[real] * 3]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_backend_dev_get": (pointer, [size]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [pointer, pointer]),
        "ggml_backend_dev_buffer_type": (pointer, [pointer]),
        "ggml_backend_buft_get_alloc_size": (size, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
