"""Wrote the PyTorch files in this folder; needs PyTorch, which the tests do not. `python tests/ports/files/make.py`

Made with torch 2.13.0.
"""

import argparse
import collections
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent


def everything():
    """What training scripts save, and tensors of all kinds, from which tests/ports/test_port.py expects the same."""
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(6.0).reshape(2, 3))
        layer.bias.copy_(torch.tensor([10.0, 11.0]))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, weight_decay=0.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = {str(d).removeprefix("torch."): base.to(d) for d in (
        torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
        torch.uint16, torch.complex64, torch.float8_e4m3fn,
    )}  # fmt: skip
    return {
        "epoch": 3,
        "name": "run",
        "state_dict": collections.OrderedDict((f"module.{k}", v) for k, v in layer.state_dict().items()),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(lr=0.1, sizes=[1, 2]),
        "best": np.float64(0.5),
        "shape": torch.Size([1, 2]),
        "extra": {
            **kinds,
            "bool": base > 3,
            "view": base[1:, ::2],
            "transposed": base.t(),
            "expanded": torch.ones(1, 3).expand(2, 3),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "whole": base,
            "parameter": layer.weight,
            "half_view": base.bfloat16().t()[2:],
        },
    }


def main():
    torch.save(everything(), FOLDER / "zip.pt")
    torch.save(everything(), FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(everything(), FOLDER / "protocol5.pt", pickle_protocol=5)
    layer = torch.nn.Linear(3, 2)
    torch.save(layer, FOLDER / "module.pt")
    torch.jit.script(layer).save(FOLDER / "script.pt")
    torch.save({"a": torch.eye(2).to_sparse()}, FOLDER / "sparse.pt")
    torch.serialization.set_crc32_options(False)
    torch.save({"a": torch.arange(3.0)}, FOLDER / "no_checksums.pt")


if __name__ == "__main__":
    main()
