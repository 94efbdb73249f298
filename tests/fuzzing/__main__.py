from __future__ import annotations

import argparse
import os
import time
from collections import Counter

import fuzzing

BACKENDS = ("portable", "auto", "triton", "reference")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fuzzing", description=fuzzing.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="other seeds make other cases")
    parser.add_argument("--first", type=int, default=0, help="the index of the first case")
    parser.add_argument("--count", type=int, default=1000, help="how many cases")
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="portable",
        help="auto takes native in float32; triton is interpreted",
    )
    given = parser.parse_args()
    interpreted = given.backend == "triton"
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.install()
    # Not above: Triton reads the variable when it is imported.
    from fuzzing.arguments import draw_case
    from fuzzing.judgement import judge

    started, kinds = time.monotonic(), Counter()
    for index in range(given.first, given.first + given.count):
        case = draw_case(given.seed, index, interpreted)
        found = judge(case, given.backend, given.seed, index)
        if found:
            kind = "excused" if all(each.excused for each in found) else "beyond the rule"
            kinds[kind] += 1
            print(f"--seed {given.seed} --first {index} --count 1: {kind}: {case}")
            print(*(f"    {each}" for each in found), sep="\n", flush=True)
    print(
        f"{given.count} cases in {time.monotonic() - started:.0f} s: {kinds['beyond the rule']} beyond the rule, "
        f"{kinds['excused']} excused"
    )


if __name__ == "__main__":
    main()
