"""Headers of safetensors files: names, shapes and dtypes of tensors, without reading tensors or running code."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from pia_batch.errors import ConfigError, environment_remedy, printable, problem_of
from pia_batch.storage import file_kinds

SUFFIX = ".safetensors"

MAX_HEADER_BYTES = 100_000_000
"""Source: huggingface/safetensors, `MAX_HEADER_SIZE`."""

MAX_TENSORS = 100_000
"""Largest number of tensors of a file. A checkpoint of Stable Diffusion 1.5 has some 1,100, a LoRA of all its layers
some 3,000. To look at the names of millions would take minutes."""

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
"""Suffixes of files that can run code when opened."""


WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Dtypes that hold weights as they are. Integers are quantized weights, which need scales from other tensors."""

_BITS = {"BOOL": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "C64": 64}
_BITS |= {f"{sign}{bits}": bits for sign in "IU" for bits in (8, 16, 32, 64)}
"""Bits of an element by the dtype's name. Source: huggingface/safetensors, `Dtype`."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """Names and shapes of all tensors of a safetensors file.

    Attributes:
        path: Path of the file.
        shapes: Shapes by tensor name, in the file's order.
        dtypes: Dtypes by tensor name, as safetensors calls them, such as `F16`.
        metadata: Texts that the program that wrote the file left in it.
        positions: Position of each tensor's first byte in the file, by tensor name.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)

    def starting(self, *prefixes: str) -> list[str]:
        """Return the tensor names that begin with one of `prefixes`."""
        return [name for name in self.shapes if name.startswith(prefixes)]

    def shape_of(self, ending: str) -> tuple[int, ...] | None:
        """Return the shape of the first tensor whose name has this ending, or None."""
        return next((shape for name, shape in self.shapes.items() if name.endswith(ending)), None)


def second_side(shape: tuple[int, ...] | None) -> int | None:
    """Return the second side of a shape, such as the input channels of a layer; None if there is none."""
    return shape[1] if shape is not None and len(shape) > 1 else None


def refuse_pickle(name: str, key: str) -> None:
    """Refuse a file name with any other suffix than `.safetensors`.

    Args:
        name: Path, URI or file name.
        key: Key of the config, for the message.

    Raises:
        ConfigError: The name does not end in `.safetensors`.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PICKLED:
        raise ConfigError(
            f"{key}: {name} is a pickle, which is refused, because opening it runs its code. "
            "Convert it to safetensors, or use a safetensors file"
        )
    if suffix != SUFFIX:
        raise ConfigError(
            f"{key}: {name} is not a {SUFFIX} file; only {SUFFIX} files are opened: use the model's file in safetensors"
        )


def read(path: Path) -> SafetensorsHeader:
    """Read the header of a safetensors file and check it against the file's size.

    Raises:
        ConfigError: The file is a renamed pickle or zip, truncated, or not safetensors.
    """
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(num_bytes - 8, MAX_HEADER_BYTES):
                if file.read(1) == b"{" and 0 < length <= MAX_HEADER_BYTES:
                    raise ConfigError(
                        f"{path}: ends inside of its header (got {num_bytes} bytes, expected at least {8 + length}): "
                        "it was not copied in full; fetch it again"
                    )
                raise ConfigError(_why_invalid(path, num_bytes))
            text = file.read(length)
    except OSError as err:
        raise unreadable(path, err) from err
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise TypeError(f"it is {type(header).__name__}, expected an object")  # noqa: TRY301 - one message for all
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it names {len(header)} tensors, more than any model's {MAX_TENSORS}")  # noqa: TRY301
        metadata = {str(name): str(value) for name, value in (header.pop("__metadata__", None) or {}).items()}
        shapes = {name: tuple(int(side) for side in tensor["shape"]) for name, tensor in header.items()}
        dtypes = {name: str(tensor["dtype"]) for name, tensor in header.items()}
        spans = {
            name: (int(tensor["data_offsets"][0]), int(tensor["data_offsets"][1])) for name, tensor in header.items()
        }
        end = max((span[1] for span in spans.values()), default=0)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as err:
        raise ConfigError(f"{path} is not a safetensors file: its header cannot be read ({err})") from err
    if 8 + length + end != num_bytes:
        raise ConfigError(
            f"{path}: wrong size (got {num_bytes} bytes, expected {8 + length + end} by its header): "
            "it was not copied in full, or it is damaged; fetch it again"
        )
    _check_spans(path, shapes, dtypes, spans)
    _check_with_library(path)
    positions = {name: 8 + length + start for name, (start, _) in spans.items()}
    return SafetensorsHeader(path, shapes, dtypes, metadata, positions)


def numbers(header: SafetensorsHeader, names: Iterable[str]) -> dict[str, float]:
    """Read tensors of one element each; no other bytes of the file are read.

    Args:
        header: Header of the file, from `read`.
        names: Tensor names.

    Raises:
        ValueError: A dtype is not that of a number.
        ConfigError: The file cannot be read.
    """
    found = {}
    try:
        with header.path.open("rb") as file:
            for name in names:
                dtype = header.dtypes[name]
                if dtype not in _DECODERS:
                    msg = f"tensor {name} has dtype {dtype}, expected a number"
                    raise ValueError(msg)
                file.seek(header.positions[name])
                found[name] = _DECODERS[dtype](file.read(_BITS[dtype] // 8))
    except OSError as err:
        raise unreadable(header.path, err) from err
    return found


def _unpacked(code: str, before: bytes = b"") -> Callable[[bytes], float]:
    """Return a function that reads one number by its code in `struct`; `before`: lower bytes that the dtype lacks."""
    return lambda content: float(struct.unpack(f"<{code}", before + content)[0])


def _eight_bits(content: bytes) -> float:
    """Return a number of dtype F8_E4M3: one bit of sign, four of exponent, three of mantissa, and no infinity."""
    magnitude, sign = content[0] & 0x7F, -1.0 if content[0] & 0x80 else 1.0
    if magnitude == 0x7F:  # noqa: PLR2004 - the only NaN
        return math.nan
    exponent, mantissa = divmod(magnitude, 8)
    return sign * math.ldexp(mantissa + 8 * (exponent > 0), max(exponent, 1) - 10)


_DECODERS: dict[str, Callable[[bytes], float]] = {
    "F64": _unpacked("d"),
    "F32": _unpacked("f"),
    "F16": _unpacked("e"),
    "BF16": _unpacked("f", bytes(2)),
    "F8_E5M2": _unpacked("e", bytes(1)),
    "F8_E4M3": _eight_bits,
    "BOOL": _unpacked("?"),
    **{f"I{bits}": _unpacked(code) for bits, code in zip((8, 16, 32, 64), "bhiq", strict=True)},
    **{f"U{bits}": _unpacked(code) for bits, code in zip((8, 16, 32, 64), "BHIQ", strict=True)},
}
"""Functions that read one number, by its dtype. F8_E5M2 and BF16 are the upper halves of F16 and F32."""


def unreadable(path: Path, err: Exception) -> ConfigError:
    """Return the error of a file that the system, or the library, cannot read, with the remedy."""
    remedy = environment_remedy(err) or "correct the path, or fetch the file again"
    return ConfigError(f"cannot read {path}: {problem_of(err)}; {remedy}")


def _check_spans(
    path: Path, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str], spans: dict[str, tuple[int, int]]
) -> None:
    """Check that the tensors fill the file one after another, each with the bytes of its dtype and shape.

    The library that reads tensors refuses a file otherwise, but only when a GPU already waits for it.
    """
    position = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if dtypes[name] not in _BITS:
            raise ConfigError(f"{path}: tensor {name} has an unknown dtype {dtypes[name]}; convert it to F16 or F32")
        wanted = math.prod(shapes[name]) * _BITS[dtypes[name]] / 8
        if start != position or end - start != wanted or min(shapes[name], default=0) < 0:
            raise ConfigError(
                f"{path}: damaged header: tensor {name} is {dtypes[name]} of shape {list(shapes[name])} (got bytes "
                f"{start} to {end}, expected {position} to {position + wanted:.0f}); fetch the file again"
            )
        position = end


def _check_with_library(path: Path) -> None:
    """Open the file as the engine will: the library takes only some JSON, such as no fractions as sides of a shape."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as err:
        raise ConfigError(
            f"{path} is not a safetensors file: its header cannot be read ({err}); fetch it again"
        ) from err
    except OSError as err:
        raise unreadable(path, err) from err


def _why_invalid(path: Path, num_bytes: int) -> str:
    if num_bytes == 0:
        return f"{path} is empty; fetch the file again"
    with path.open("rb") as file:
        head = file.read(file_kinds.HEAD_BYTES)
    found = file_kinds.identify(head)
    if (found is not None and found.group == "pickle") or head[:1] == b"\x80" or _is_torch_archive(head):
        return (
            f"{path} has a safetensors name, but it is a pickle, which is refused, because opening it runs its "
            "code. Convert it to safetensors, or use a safetensors file"
        )
    if found is not None:
        return f"{path} is {found.what}, not a safetensors file; {REMEDIES[found.group]}"
    if not any(head):
        return f"{path} holds only zeros, as an interrupted copy leaves them; fetch the file again"
    if file_kinds.is_text(head):
        shown = printable(" ".join(head.decode("utf-8", "replace")[:_MOST_SHOWN].split()))
        return f"{path} is text ({shown!r}), not a safetensors file; {REMEDIES['page']}"
    return f"{path} is not a safetensors file, or it is truncated: it has {num_bytes} bytes; fetch the file again"


def _is_torch_archive(head: bytes) -> bool:
    """Return True for an archive of torch.save: a zip whose first member is a pickle, or a tar before torch 0.1.10."""
    is_tar = head.startswith((b"sys_info\0", b"pickle\0", b"storages\0", b"tensors\0"))
    return is_tar or (head.startswith(b"PK\x03\x04") and b"data.pkl" in head)


_MOST_SHOWN = 40
_DOWNLOAD = "download the file itself, which may need a login or a token"
_CONVERT = "use the model's file in safetensors"
REMEDIES: dict[file_kinds.Group, str] = {
    "archive": "unpack it, and name the file inside",
    "compressed": "unpack it, and name the file inside",
    "document": _DOWNLOAD,
    "image": _DOWNLOAD,
    "page": _DOWNLOAD,
    "pickle": _CONVERT,
    "pointer": "run `git lfs pull` in its repository, or download the file itself",
    "table": _CONVERT,
    "weights": _CONVERT,
    "zip": "unpack it, and name the file inside",
}
"""Remedies for other kinds of files in the place of a model's, by their groups."""
