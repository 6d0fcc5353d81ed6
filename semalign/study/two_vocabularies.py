"""Two models of different tokenizers: what their tokens share, what a map of these carries, and what it teaches."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from semalign import benchmarks, classroom, report, semantics
from semalign.classroom.training import train_tokenizer
from semalign.lm.examples import Encoded, Example, TaskData, encode, fitting, supervised
from semalign.lm.hooks import capture
from semalign.lm.parts import decoder, decoder_layers, embedding_weight, head_weight, norm_gain
from semalign.lm.positions import matched, spelling
from semalign.methods import REGISTRY
from semalign.methods.registry import run
from semalign.models import Pair
from semalign.pairing import depth_pairs
from semalign.profiles import TrialSettings
from semalign.study import analysis, reading
from semalign.training.config import TransferConfig
from semalign.vocabularies import SharedTokens, shared_tokens

REAL = TrialSettings.model_validate({
    "teacher": {"source": "packaged", "id": "gemma-3-270m"},
    "student": {"source": "packaged", "id": "smollm2-135m-instruct"},
    "vocabularies": "shared", "device": "cpu",
})  # fmt: skip
"""The real pair: 18 layers of width 640 teach 30 of width 576."""

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "states over shared tokens": ("across", {}),
    "states of other positions": ("across", {"targets": "scrambled"}),
    "random directions": ("across", {"targets": "random"}),
    "labels alone": ("sft_layer", {}),
}
"""What is compared: a method, and what differs from the common settings. All train the same layer as long."""

CHARACTERS = 420
"""Of a question with its answer: longer ones are left out of the real transfer, which a CPU has to afford."""

SETTINGS = TransferConfig(
    map="logit", fold_gain=True, interface="residual", output_loss="ce", layers=(25,), epochs=1, batch=8, micro_batch=8,
    lr=1e-3, max_length=192,
)  # fmt: skip
"""Of the real transfer: a late layer, so that five run above it, and one rate for every arm."""


def word_problems(n_train: int, n_held_out: int) -> TaskData | None:
    """Real GSM8K, as far as ``SEMALIGN_DATA`` names a folder with it: short examples to learn from, others held out.

    None without that variable: nothing is fetched here.
    """
    if not os.environ.get("SEMALIGN_DATA"):
        return None
    whole = benchmarks.task_data("gsm8k")

    def short(some: Sequence[Example], n: int) -> tuple[Example, ...]:
        return tuple(e for e in some if len(e.prompt) + len(e.response) <= CHARACTERS)[:n]

    return TaskData("gsm8k", short(whole.train, n_train), validation=short(whole.validation, n_held_out))


def held_out(pair: Pair, model: Any, data: TaskData, config: TransferConfig) -> Tensor:
    """Cross-entropy of each held-out response in the student's tokens, a mean over them, in nats: (examples,)."""
    encoded = encode(pair.tokenizer, data.validation, max_length=config.max_length)
    read = reading.read_out(model, encoded, batch=8)
    return reading.by_example(read["loss"].double(), read["example"])


def arms(
    pair: Pair, data: TaskData, config: TransferConfig, say: Callable[[str], None] = lambda _: None
) -> dict[str, Tensor]:
    """The held-out losses (examples,) of the untouched student and of every arm, trained by ``config``.

    The teacher is run once for all arms.
    """
    losses = {"untouched": held_out(pair, pair.load_student(), data, config)}
    say(f"untouched: {losses['untouched'].mean():.4f}")
    watched = replace(data, validation=())
    with tempfile.TemporaryDirectory() as folder:
        for name, (method, changes) in ARMS.items():
            own = replace(config, cache_folder=Path(folder), **changes)
            result = (
                REGISTRY[method].transfer(pair, watched, own)
                if method == "sft_layer"  # whose layer is named, so that no teacher is asked
                else run(REGISTRY[method], pair, watched, own, {})
            )
            losses[name] = held_out(pair, result.student, data, config)
            said = f"{losses[name].mean():.4f} after {result.cost['wall_s']:.0f} s"
            say(f"{name}: {said}; cos {result.log[0]['cos']:.3f} to {result.log[-1]['cos']:.3f}")
    return losses


def kept_transfer(path: Path = report.BOOK / "two_vocabularies.json") -> tuple[dict[str, Tensor], str]:
    """The held-out losses (examples,) of a kept real transfer by arm, and a sentence about it; empty where none is."""
    if not path.exists():
        return {}, (
            "No run of the real transfer is kept here: with Gemma installed and `SEMALIGN_DATA` set, "
            "`tests/real/two_vocabularies.py` makes one."
        )
    found, made = report.load_metrics(path)
    means = "; ".join(f"{name} {sum(of) / len(of):.4f}" for name, of in found["losses"].items())
    said = (
        f"{found['train']} examples, student layer {found['layer'][0]}, rate {found['lr']:g}. Held-out loss in nats, a "
        f"mean over {found['held_out']} answers: {means}. Made on {made['date']}."
    )
    return {name: torch.tensor(of, dtype=torch.float64) for name, of in found["losses"].items()}, said


def against(losses: Mapping[str, Tensor], arm: str = "states over shared tokens") -> dict[str, dict[str, float]]:
    """By how many nats an arm's held-out loss lies below each other's: estimates over examples, positive is better."""
    others = [name for name in losses if name != arm] if arm in losses else []
    return {
        f"minus {name}": analysis.over_seeds_and_items((losses[name] - losses[arm])[None])._asdict() for name in others
    }


@dataclass(frozen=True)
class Seen:
    """What is looked at of a pair, so that the two models are never in memory together.

    ``shared`` tokens and their rows of both heads, gains folded in, (n, D_T) and (n, D_S); the streams after every
    layer at the N positions that meet, (N, D) a layer; ``example`` (N,), whose they are. ``covered``: shares of the
    tokens in the texts that are shared, and of the student's supervised positions that have a partner.
    """

    shared: SharedTokens
    heads: tuple[Tensor, Tensor]
    states: tuple[list[Tensor], list[Tensor]]
    example: Tensor
    covered: dict[str, float]


def look(pair: Pair, examples: Sequence[Example], *, max_length: int = 256) -> Seen:
    """Read ``examples`` by both models of a pair, the teacher first, each in its own tokens."""
    tokenizers = (pair.teacher_tokenizer or pair.tokenizer, pair.tokenizer)
    for tokenizer in tokenizers:
        examples = fitting(tokenizer, examples, max_length=max_length)
    read = [encode(tokenizer, examples, max_length=max_length) for tokenizer in tokenizers]
    met = matched(examples, (tokenizers[0], read[0]), (tokenizers[1], read[1]))
    sides = [
        _one_side(load, encoded, [at[:, side] for at in met])
        for side, (load, encoded) in enumerate(zip((pair.load_teacher, pair.load_student), read, strict=True))
    ]
    shared = shared_tokens(*tokenizers, len(sides[0][0]), len(sides[1][0]))
    heads = (sides[0][0][shared.teacher], sides[1][0][shared.student])
    example = torch.cat([torch.full((len(at),), i) for i, at in enumerate(met)])
    return Seen(shared, heads, (sides[0][1], sides[1][1]), example, _covered(shared, read, met))


@torch.no_grad()
def _one_side(
    load: Callable[[], Any], encoded: Sequence[Encoded], positions: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The head with its norm's gain (m, D), and the streams (N, D) after every layer at ``positions``."""
    model = load().eval()
    taps, kept = [(k, "stream") for k in range(1, len(decoder_layers(model)) + 1)], []
    for e, at in zip(encoded, positions, strict=True):
        with capture(model, taps) as seen:
            decoder(model)(e.input_ids[None].to(model.device), use_cache=False)
        kept.append([seen[tap][0, at.to(model.device)].float().cpu() for tap in taps])
    head = semantics.fold_norm(head_weight(model).float().cpu(), norm_gain(model).float().cpu())
    del model
    gc.collect()
    return head, [torch.cat(layer) for layer in zip(*kept, strict=True)]


def _covered(shared: SharedTokens, read: Sequence[Sequence[Encoded]], met: Sequence[Tensor]) -> dict[str, float]:
    def share(encoded: Sequence[Encoded], ids: Tensor) -> float:
        return torch.isin(torch.cat([e.input_ids for e in encoded]), ids).double().mean().item()

    positions = sum(int(supervised(e.labels).sum()) for e in read[1])
    return {
        "of the teacher's tokens in the text": share(read[0], shared.teacher),
        "of the student's tokens in the text": share(read[1], shared.student),
        "of the student's positions that meet one": sum(map(len, met)) / positions,
    }


def carried(seen: Seen, kinds: Sequence[str], states: int = 200) -> pd.DataFrame:
    """What each kind of map keeps of the teacher's last states, over shared tokens: a row each.

    ``logit_cosine``: of W_S M h with W_T h; ``same_token``: how often both have the same token as the likeliest.
    """
    hidden, rows = seen.states[0][-1][:states], {}
    theirs, ours = seen.heads
    for kind in kinds:
        z, w = (hidden @ semantics.semantic_map(theirs, ours, kind=kind).T.float()) @ ours.T, hidden @ theirs.T
        cosine = F.cosine_similarity(z, w, dim=-1).mean().item()
        rows[kind] = {"logit_cosine": cosine, "same_token": (z.argmax(1) == w.argmax(1)).double().mean().item()}
    return pd.DataFrame(rows).T.rename_axis("map")


WAYS = {
    "mapped": "the logit map over shared tokens",
    "other positions": "mapped, against the state at another position",
    "other tokens": "mapped with the teacher's tokens permuted",
    "ridge on states": "fitted to states of the other half of the texts",
}
"""What :func:`by_layer` compares with the student's own states."""


def by_layer(seen: Seen, *, kind: str = "logit", seed: int = 0, ridge: float = 1e-2) -> dict[str, Tensor]:
    """Cosines with the student's own state, by the names of ``WAYS``: (layers, examples), means over positions.

    Student layer k stands beside teacher layer l(k). Both are taken less their means over positions, which two models
    share with any text. ``ridge`` is in units of the mean square of a teacher's channel times the number of states.
    """
    theirs, ours = seen.states
    maps = {
        "mapped": semantics.semantic_map(*seen.heads, kind=kind),
        "other tokens": semantics.semantic_map(*seen.heads, kind="shuffled", control_of=kind, seed=seed),
    }
    order = torch.randperm(len(seen.example), generator=torch.Generator().manual_seed(seed))
    half, found = seen.example % 2, dict[str, list[Tensor]]()
    for k, l in enumerate(depth_pairs(len(theirs), len(ours))):  # noqa: E741 - the paper's name of a layer
        h_t, h_s = (h - h.mean(0) for h in (theirs[l - 1], ours[k]))
        guesses = {name: h_t @ m.T.float() for name, m in maps.items()}
        guesses["other positions"] = guesses["mapped"][order]
        fitted = torch.empty_like(h_s)
        for test in (0, 1):
            fit, on = half != test, half == test
            a = ridge * h_t[fit].square().mean().item() * int(fit.sum())
            fitted[on] = h_t[on] @ semantics.hidden_map(h_t[fit], h_s[fit], ridge=a).T.float()
        guesses["ridge on states"] = fitted
        for name in WAYS:
            cosine = F.cosine_similarity(guesses[name], h_s, dim=-1).double()
            found.setdefault(name, []).append(reading.by_example(cosine, seen.example))
    return {name: torch.stack(layers) for name, layers in found.items()}


def second_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-pair vocabulary of 1,024 tokens, learned from Pico's own corpora; Pico's has 2,048."""
    return train_tokenizer(3_000, 1024)


def retokenised(model: Any, first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> Any:
    """The same model with another vocabulary: its body as it was, its rows given to the tokens of ``second``.

    What is known of it: a token of both, or with the same role, has the row that it had; another has the mean of the
    rows of the pieces that ``first`` reads its text in. So the two heads agree on shared tokens, to the bit.
    """
    texts, roles = spelling(second)
    pieces: dict[int, list[int]] = {i: [first.convert_tokens_to_ids(name.decode())] for i, name in roles.items()}  # type: ignore[list-item]
    shared = shared_tokens(first, second)
    pieces |= {s: [t] for t, s in zip(shared.teacher.tolist(), shared.student.tolist(), strict=True)}
    for i, text in texts.items():
        pieces.setdefault(i, first(text.decode(errors="replace"), add_special_tokens=False)["input_ids"])
    twin = copy.deepcopy(model)
    rows = [pieces[i] for i in range(len(second))]
    for get, place in ((embedding_weight, twin.get_input_embeddings), (head_weight, twin.get_output_embeddings)):
        weight = get(model)
        place().weight = torch.nn.Parameter(torch.stack([weight[of].mean(0) for of in rows]))
    twin.config.vocab_size = len(second)
    twin.tie_weights()
    return twin.eval()


def recovered(rows: Tensor, counts: Sequence[int], seed: int = 0) -> dict[str, list[float]]:
    """How well a map of n shared tokens finds a turn that is known, by n: |M - Q| / |Q|, for maps and a control.

    ``rows`` (m, D) are those of a head's shared tokens, gain folded in. The teacher has the same, turned by a random
    rotation Q: so M has to be Q.
    """
    draw = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1], generator=draw, dtype=torch.float64))[0]
    rows, found = rows.double(), dict[str, list[float]]()
    for n in counts:
        some = rows[torch.randperm(len(rows), generator=draw)[:n]]
        for kind in ("logit", "procrustes", "paper", "shuffled"):
            control: Any = {"control_of": "logit"} if kind == "shuffled" else {}
            m = semantics.semantic_map(some @ turn, some, kind=kind, **control)
            found.setdefault(kind, []).append(((m - turn).norm() / turn.norm()).item())
    return found


PLANTED = TransferConfig(layers=(2,), teacher_layers=(2,), batch=4, micro_batch=32, lr=3e-3, max_length=256)
"""How the planted teacher learns the labels, and how its states are learned: as long, at the same rate."""

KIN: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "one vocabulary": ("semalign", False, {}),
    "shared tokens": ("across", True, {}),
    "other positions": ("across", True, {"targets": "scrambled"}),
    "random directions": ("across", True, {"targets": "random"}),
}
"""Of the planted teacher: a method, whether the teacher reads in the second vocabulary, and what differs."""


def planted(
    student: str, n_train: int, n_held_out: int, second: PreTrainedTokenizerBase, *, epochs: int = 4
) -> dict[str, Tensor]:
    """Divergences (examples,) in nats from a planted teacher on held-out examples, untouched and after each of ``KIN``.

    The teacher is a copy of Pico's ``student`` with one layer trained on labels, and then given the second vocabulary.
    Fresh students learn from its states in that layer, the layer's contribution through the logit map, without a label
    or its outputs. What is measured is the distance from the teacher before it was given that vocabulary: the truth.
    """
    _, tokenizer = classroom.load_pico(student)
    whole = classroom.task_data("humaneval")
    data = TaskData("humaneval", whole.train[:n_train], validation=whole.validation[:n_held_out])
    blind, watched = replace(data, validation=()), encode(tokenizer, data.validation, max_length=PLANTED.max_length)

    def load() -> Any:
        return classroom.load_pico(student)[0]

    common = replace(PLANTED, epochs=epochs)
    labels = replace(common, layer_weight=0.0, output_loss="ce", teacher_layers=None)
    teacher = REGISTRY["sft_layer"].transfer(Pair("itself", load, load, tokenizer), blind, labels).student
    states = replace(common, interface="residual", map="logit", output_loss="none", fold_gain=True)
    found = {"untouched": reading.divergence_between(teacher, load(), watched)}
    for name, (method, reads_second, changes) in KIN.items():
        twin = retokenised(teacher, tokenizer, second) if reads_second else teacher
        pair = Pair(name, lambda twin=twin: copy.deepcopy(twin), load, tokenizer, second if reads_second else None)  # type: ignore[misc]
        taught = REGISTRY[method].transfer(pair, blind, replace(states, **changes)).student
        found[name] = reading.divergence_between(teacher, taught, watched)
    return found
