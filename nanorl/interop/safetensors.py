"""safetensors files, read and written without the library of that name. Nothing in a file is believed before it is checked.

    8 bytes      N, the length of the header, little-endian and unsigned
    N bytes      JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the rest     the tensors' bytes, at these offsets, one after the other without a gap
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanorl.errors import UserError
from nanorl.files import parse_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 2**24      # bytes: tens of thousands of tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. They are views of the mapped file: reading costs memory only where one is touched."""
    size = path.stat().st_size if path.is_file() else 0
    if size < 8:
        raise UserError(f"{path}: {size} bytes; expected a safetensors file")
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{path}: announces a header of {length} bytes; expected at most the {size - 8} that follow, and "
                            f"{LONGEST_HEADER}: this is no safetensors file, or part of one")
        header = parse_object(f.read(length), f"{path}, header", "an object that describes tensors")
    header.pop("__metadata__", None)
    start = 8 + length
    for name, entry in header.items():
        _check_entry(name, entry, path)
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, previous = entry["data_offsets"][0], end
        if begin != previous:
            raise UserError(f"{path}: {name!r:.80} begins at byte {begin} of the data; expected {previous}, where the tensor "
                            "before it ends")
        end = entry["data_offsets"][1]
    if end != size - start:
        raise UserError(f"{path}: its tensors have {end} bytes, and {size - start} follow the header; expected as many: the "
                        "file is cut off, or not what it says")
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {name: _view(mapped, start, entry) for name, entry in header.items()}


def _check_entry(name: str, entry: Any, path: Path) -> None:
    """UserError unless this describes a tensor, of a dtype that we know, with as many bytes as its shape takes."""
    def whole(numbers: Any, least: int) -> bool:
        return isinstance(numbers, list) and len(numbers) <= 8 and all(type(n) is int and least <= n < 2**63 for n in numbers)

    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"} and whole(entry["shape"], 1)
            and whole(entry["data_offsets"], 0) and len(entry["data_offsets"]) == 2):
        raise UserError(f"{path}: {name!r:.80} is {entry!r:.100}; expected a dtype, a shape of at most 8 numbers above 0, and "
                        "two data_offsets")
    if entry["dtype"] not in [*DTYPES]:
        raise UserError(f"{path}: {name!r:.80} has the dtype {entry['dtype']!r:.40}; expected one of {', '.join(DTYPES)}")
    (begin, end), wanted = entry["data_offsets"], math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    if end - begin != wanted:
        raise UserError(f"{path}: {name!r:.80} has {end - begin:.6g} bytes; its shape and dtype take {wanted:.6g}")


def _view(mapped: Tensor, start: int, entry: dict[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    data, dtype = mapped[start + begin : start + end], DTYPES[entry["dtype"]]
    if data.data_ptr() % dtype.itemsize:        # few files: a view must begin at a multiple of its items' size
        data = data.clone()
    return data.view(dtype).view(entry["shape"])


def write_safetensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write these tensors in this dtype. They are cast one at a time."""
    header, end = {"__metadata__": {"format": "pt"}}, 0     # which transformers asks for
    for name, x in tensors.items():
        begin, end = end, end + x.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                         # so that the data can be mapped as it is
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(x.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy())
