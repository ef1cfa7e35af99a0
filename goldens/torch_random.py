"""Writes the goldens of `hypergen-tensor`'s torch generator.

Run with the versions of `goldens/requirements.txt`:

    python goldens/torch_random.py

Each case is one generator and several draws in a row, so that the state between
draws is checked as well: the second normal that small draws keep, the
tail that large draws make twice.
"""

import json
from pathlib import Path

import torch

OUT = Path(__file__).resolve().parent.parent / "crates/hypergen-tensor/tests/fixtures/random.json"
SEEDS = [0, 1, 42, 2**32 - 1, 2**32, 2**32 + 42, 2**63, 2**64 - 1]
DRAWS = {
    "one": [1],
    "small": [4, 15, 1, 2],
    "block": [16, 16],
    "tail": [17, 31],
    "mixed": [1, 16, 3, 17, 64, 15, 4096 + 3, 1, 16384],
}


def main():
    cases = []
    for name, sizes in DRAWS.items():
        for seed in SEEDS if name == "mixed" else SEEDS[:3]:
            generator = torch.Generator("cpu").manual_seed(seed)
            draws = []
            for n in sizes:
                x = torch.randn(n, generator=generator, dtype=torch.float32)
                # float64 views of float32 numbers: exact in JSON.
                values = x.double()
                draws.append(
                    {
                        "n": n,
                        "head": values[:6].tolist(),
                        "tail": values[-18:].tolist() if name in ("tail", "block") else values[-4:].tolist(),
                        "sum": values.sum().item(),
                        "square_sum": values.square().sum().item(),
                    }
                )
            cases.append({"seed": seed, "draws": draws})
    rows = ",\n".join(json.dumps(c) for c in cases)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text('{"torch": "%s", "cases": [\n%s\n]}\n' % (torch.__version__.split("+")[0], rows))


if __name__ == "__main__":
    main()
