"""The measured differences of docs/models.md: python -m tests.parity.measure"""

import tempfile
from pathlib import Path

import torch

from tests.parity.families import FAMILIES, differences
from tests.parity.faults import FAULTS

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print("| family | alone | packed | against left padding | gradient |\n|---|---|---|---|---|")
        for name in FAMILIES:
            found = differences(name, Path(folder) / name)
            print(f"| {name} | " + " | ".join(f"{value:.1e}" for value in found[:4]) + " |")
        print("\n| transformers | its departure | ours |\n|---|---|---|")
        for fault in FAULTS:
            found = fault(Path(folder) / fault.__name__)
            print(f"| {fault.__name__.replace('_', ' ')} | {found.theirs:.2g} | {found.ours:.1e} |")
