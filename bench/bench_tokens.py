"""Trains a small character Llama on a text and measures what thresholds on single tokens cost it, token by token with a cache.

    python bench/bench_tokens.py ../shared/data/text/sst2_train.tsv ../shared/data/text/sst2_dev.tsv --steps 400

Printed is the loss on the held-out text in nats per character, by level: with the thresholds of `calibrate`, and with the gates that
choose neurons, heads and branches for whole sequences in their place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dynprune import DynamicModel, calibrate
from dynprune.cli.models import declare_torchvision_operators, positive_int
from dynprune.cli.table import format_table

LENGTH, PROMPT = 64, 16
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def read(path: Path, letters: str | None = None) -> tuple[Tensor, str]:
    """Returns a text as numbers of its characters, and the characters; those that `letters` lacks are left out."""
    text = path.read_text()
    letters = letters or "".join(sorted({letter for letter in text if letter.isascii()}))
    return torch.tensor([letters.index(letter) for letter in text if letter in letters]), letters


def trained(text: Tensor, letters: str, steps: int):
    """Returns a Llama of three layers after so many steps of AdamW."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=len(letters), max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, **sizes
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (32,))
        x = torch.stack([text[i : i + LENGTH] for i in starts.tolist()])
        optimizer.zero_grad()
        model(input_ids=x, labels=x, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def loss(dm: DynamicModel, x: Tensor, level: float) -> float:
    """Returns the mean loss behind the prompt, one token a call."""
    dm.level = level
    cache, total = dm(input_ids=x[:, :PROMPT], use_cache=True, past_key_values=_empty_cache()).past_key_values, 0.0
    for i in range(PROMPT, LENGTH - 1):
        logits = dm(input_ids=x[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        total += F.cross_entropy(logits, x[:, i + 1]).item()
    return total / (LENGTH - 1 - PROMPT)


def _empty_cache():
    import transformers

    return transformers.DynamicCache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--steps", type=positive_int, default=400)
    args = parser.parse_args()
    declare_torchvision_operators()
    text, letters = read(args.text)
    held_out, _ = read(args.held_out, letters)
    model = trained(text, letters, args.steps)
    sequences = text[: LENGTH * 96].view(-1, LENGTH)
    dm = DynamicModel(model, {"input_ids": sequences[:1], "use_cache": False})
    calibrate(dm, [{"input_ids": part, "use_cache": False} for part in sequences.split(32)], levels=9)
    mlps = [dm.gate(site.name) for site in dm.sites if getattr(dm.gate(site.name), "token_curves", torch.empty(0)).numel()]
    x = held_out[: LENGTH * 48].view(-1, LENGTH)
    shares = [1.0 if level == 0 else sum(gate.frequency(level).mean().item() for gate in mlps) / len(mlps) for level in LEVELS]
    by_tokens = [loss(dm, x, level) for level in LEVELS]
    for gate in mlps:
        gate.token_curves = gate.token_curves[:, :0]
    dm.refresh()
    by_sequences = [loss(dm, x, level) for level in LEVELS]
    rows = [
        [f"{n:.2f}" for n in row] + [f"{a:.3f}", f"{b:.3f}"] for *row, a, b in zip(LEVELS, shares, by_tokens, by_sequences, strict=True)
    ]
    print(format_table(["level", "share kept", "loss, thresholds", "loss, all gates"], rows))


if __name__ == "__main__":
    main()
