"""What a model makes of given examples: its answers token by token, its layers' outputs, its distance from another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from semalign.lm.examples import Encoded, collate, mask_of, supervised
from semalign.lm.hooks import capture, float_logits
from semalign.lm.parts import Model, decoder, decoder_layers
from semalign.supervision import SupervisionCache
from semalign.training.losses import divergence


@torch.no_grad()
def read_out(
    model: Model,
    encoded: Sequence[Encoded],
    *,
    batch: int = 16,
    teacher: SupervisionCache | None = None,
    vocabulary: int | None = None,
) -> dict[str, Tensor]:
    """What a model makes of given answers, token by token, at the P supervised positions in order of ``encoded``.

    Args:
        teacher: another model's top log-probabilities for the same ``encoded``, over the first ``vocabulary`` tokens.

    Returns:
        ``loss`` (P,) cross-entropy in nats, ``predicted`` (P,) the most likely token, ``right`` (P,) whether it is the
        answer's, ``example`` (P,) the index of the example; with ``teacher`` also ``kl`` (P,), the divergence of this
        model's distribution from it in nats, and ``agree`` (P,), whether both predict the same. On the CPU.
    """
    names = ("loss", "predicted", "right", "example", *(("kl", "agree") if teacher else ()))
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    device = next(model.parameters()).device
    for start in range(0, len(encoded), batch):
        part = collate(encoded[start : start + batch], 0, device)
        places = supervised(part["labels"])
        targets = part["labels"][:, 1:][places[:, :-1]]
        final = decoder(model)(
            input_ids=part["input_ids"], attention_mask=mask_of(part), use_cache=False
        ).last_hidden_state
        logits = float_logits(model, final[places])
        predicted = logits.argmax(-1)
        columns["loss"].append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        columns["predicted"].append(predicted)
        columns["right"].append(predicted == targets)
        columns["example"].append(places.nonzero()[:, 0] + start)
        if teacher:
            rows = teacher.rows(range(start, min(start + batch, len(encoded))))
            top = [t.to(device) for t in teacher.teacher_top(rows)]
            columns["kl"].append(divergence("kl", logits[:, :vocabulary], *top))
            columns["agree"].append(top[1][:, 0] == predicted)
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}


def by_example(values: Tensor, example: Tensor) -> Tensor:
    """Means of ``values`` (P,) over the positions of each example: (n,), for ``example`` (P,) of indices 0 to n - 1."""
    n = int(example.max()) + 1
    sums = torch.zeros(n, dtype=torch.float64).index_add(0, example, values.double())
    return sums / torch.bincount(example, minlength=n)


@torch.no_grad()
def divergence_between(model: Model, other: Model, encoded: Sequence[Encoded]) -> Tensor:
    """KL(model, other) in nats, by the first one's probabilities: (n,) means over the supervised positions of each."""

    def logp(m: Model, e: Encoded) -> Tensor:
        final = decoder(m)(input_ids=e.input_ids[None].to(next(m.parameters()).device), use_cache=False)
        return float_logits(m, final.last_hidden_state[0, supervised(e.labels)]).log_softmax(-1).cpu()

    def of(e: Encoded) -> Tensor:
        one, two = logp(model, e), logp(other, e)
        return (one.exp() * (one - two)).sum(-1).mean()

    return torch.stack([of(e) for e in encoded]).double()


@torch.no_grad()
def layer_outputs(model: Model, encoded: Sequence[Encoded], point: str = "stream") -> list[Tensor]:
    """Every layer read at ``point``, layer 1 first, at each token of one batch of examples: (tokens, D), on the CPU."""
    batch = collate(encoded, 0, next(model.parameters()).device)
    taps = [(k, point) for k in range(1, len(decoder_layers(model)) + 1)]
    with capture(model, taps) as seen:
        decoder(model)(input_ids=batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)
    return [seen[tap][batch["attention_mask"].bool()].float().cpu() for tap in taps]
