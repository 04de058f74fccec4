"""How often tests of a slope find one that is not there: permutations alone, and the stricter of two tests.

    python benchmarks/slope_level.py

Prints shares of 3,000 simulated comparisons without a slope at levels of 5% and 1.25% (Holm's first step of four).
"""

from __future__ import annotations

import numpy as np

from thence.stats.typical import one_sided, slope_sides, slope_weights

SETS, DRAWS = 3000, 4000
PILOT = [0.0, 0.01, 0.2, 0.14, 0.28, 0.35, 0.2, 0.61]
SPREADS = {
    "same": lambda z: np.full_like(z, 0.1),
    "growing": lambda z: 0.02 + 0.3 * np.abs(z),
    "doubled above": lambda z: np.where(z > z.max() / 2, 0.2, 0.1),
    "largest in the middle": lambda z: 0.02 + 0.3 * np.exp(-(((z - 0.3) / 0.1) ** 2)),
}


def main() -> None:
    rng = np.random.default_rng(0)
    print("blocks  skills  spread                  permutations      stricter of two")
    for blocks in (6, 10, 16, 24, 64):
        few = np.resize(PILOT, blocks) + rng.normal(0, 0.02, blocks)
        for skills, z in (("pilot", few), ("even", np.linspace(0, 0.65, blocks))):
            weights, same = slope_weights(z, DRAWS)
            for name, spread in SPREADS.items():
                d = rng.normal(size=(blocks, SETS)) * spread(z)[:, None]
                found = [one_sided(weights, d, 0.0, same), slope_sides(z, d, 0.0, DRAWS)]
                shares = [[np.mean(2 * np.minimum(*sides) <= level) for level in (0.05, 0.0125)] for sides in found]
                cells = "   ".join(f"{100 * five:5.1f}% {100 * one:5.2f}%" for five, one in shares)
                print(f"{blocks:6}  {skills:6}  {name:22}  {cells}")


if __name__ == "__main__":
    main()
