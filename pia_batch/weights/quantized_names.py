"""Names of tensors that only quantized weights have: refuses files of these by name. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pia_batch.errors import ConfigError
from pia_batch.weights import spare_tensors

_QUANTIZED = re.compile(
    r"\.(\w*(scale|qdata|zero_point|qweight|qzeros|absmax)\w*|(nested_)?quant_(map|state)|SCB|weight_(format|packed)"
    r"|comfy_quant|g_idx|_data|_shift|codebooks|codes|smooth(_orig)?|svd_(up|down))(\..+)?$|^scaled_fp8$"
)
"""Names of what quantized weights need next to them: scales, tables and their state.

Sources: bitsandbytes, optimum-quanto, torchao, AWQ, GPTQ, compressed-tensors, nunchaku, SDNQ, ComfyUI.
"""


def refuse(names: Iterable[str], where: Path | str) -> None:
    """Refuse a file with quantized weights by its first tensor that only such files have.

    Args:
        names: Names of tensors.
        where: Path or name of the file or folder, for messages.

    Raises:
        ConfigError: There is such a tensor.
    """
    for name in names:
        if _QUANTIZED.search(name) and not spare_tensors.left_out(name)[0]:
            raise ConfigError(
                f"{where}: tensor {name} belongs to quantized weights, which are not supported; use a file in F16, "
                "BF16 or F32"
            )
