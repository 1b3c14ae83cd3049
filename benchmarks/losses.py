"""How long the losses of logits take on a CPU, by how many logits are read at once (`language_model.LOGITS_AT_ONCE`).

    python benchmarks/losses.py --vocabulary 49152 --dtype bfloat16

prints the least of `--repeats` times, taken in turn, in ms per 1,024 tokens.
"""

import argparse
import time

import torch

from prolu.activations import language_model

N_TOKENS = 2048
AT_ONCE = [2**n for n in (18, 19, 20, 21, 22, 24)] + [10**12]


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N_TOKENS // 128, 128, args.vocabulary, generator=generator).to(getattr(torch, args.dtype))
    tokens = torch.randint(args.vocabulary, logits.shape[:2], generator=generator)
    seconds: dict[int, list[float]] = {n: [] for n in AT_ONCE}
    for _ in range(args.repeats):
        for n, taken in seconds.items():
            language_model.LOGITS_AT_ONCE = n
            start = time.perf_counter()
            language_model.next_token_loss(logits, tokens)
            taken.append(time.perf_counter() - start)
    for n, taken in seconds.items():
        name = "all" if n == AT_ONCE[-1] else f"{n:,}"
        print(f"{name:>12} logits at once: {1e6 * min(taken) / N_TOKENS * 1.024:6.0f} ms")


if __name__ == "__main__":
    main()
