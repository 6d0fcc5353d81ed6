"""The two models of a pair and where they come from."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semalign.packaged import ModelUnavailable, converted_folder, load_whole
from semalign.profiles import Hub, Source, TrialSettings, load_profile, source_of
from semalign.vocabularies import LEAST_SHARE, shared_tokens


class VocabularyMismatch(ValueError):
    """Teacher and student do not give the same id to the same token, so that no basis of one has a partner."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student by their loaders, so that both need never be in memory together, and their one tokenizer.

    Where they have two tokenizers, ``tokenizer`` is the student's and ``teacher_tokenizer`` the teacher's.
    """

    name: str
    load_teacher: Callable[[], PreTrainedModel]
    load_student: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class _Opened:
    """A model that can be loaded: what errors call it, its tokenizer, the rows of its embedding, and its loader."""

    label: str
    tokenizer: PreTrainedTokenizerBase
    rows: int
    load: Callable[[torch.dtype], PreTrainedModel]


def load_pair(profile: TrialSettings | str | Path) -> Pair:
    """The pair of a profile (or of a profile's name or path), checked for one vocabulary; no weights are loaded yet.

    The tokenizer is the student's. A teacher may know more ids at the end (WizardCoder has 32,001, Llama-2 32,000).
    With ``vocabularies: shared`` the two may have different tokenizers, as long as they share enough tokens.

    Raises:
        ProfileError: the profile is unknown or malformed.
        ModelUnavailable: a model is gated, unreachable, missing, or does not fit on the disk.
        VocabularyMismatch: a token of the student has no teacher token of the same id; or with
            ``vocabularies: shared`` fewer than ``LEAST_SHARE`` of the student's tokens are the teacher's too.
    """
    p = profile if isinstance(profile, TrialSettings) else load_profile(profile)
    teacher, student = _open(p.teacher), _open(p.student)
    other = _check_vocabularies(teacher, student, shared=p.vocabularies == "shared")
    name = getattr(p, "name", "") or f"{teacher.label} to {student.label}"
    place = {"device": p.device, "dtype": p.dtype}
    return Pair(name, partial(_load, teacher, **place), partial(_load, student, **place), student.tokenizer, other)


def load_model(
    source: Mapping[str, Any] | Source, *, device: str = "auto", dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """One model by its source (a mapping as in a profile), in eval mode, with its tokenizer.

    Args:
        source: ``{source: hub, id, revision}``, ``{source: folder, path}``, ``{source: packaged, id}``,
            ``{source: pico, id}`` or ``{source: random, config, seed}``.
        device: ``auto`` takes a GPU where there is one.
        dtype: float32, bfloat16 or float16.

    Raises:
        ModelUnavailable: as for :func:`load_pair`.
    """
    opened = _open(source_of(source))
    return _load(opened, device=device, dtype=dtype), opened.tokenizer


def _load(source: _Opened, *, device: str, dtype: str) -> PreTrainedModel:
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelUnavailable(f"{source.label} is to go on {device}, and no GPU is visible: use device: auto or cpu")
    if device.startswith("cuda"):
        # PyTorch prefers it on an H100, and it plans anew for every length of a batch that it has not met: 8 padded
        # rows took a 7-billion model 480 ms there at each new length, and 47 by the kernel that is left.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return source.load(getattr(torch, dtype)).to(device).eval()  # type: ignore[arg-type]


def _open(source: Source) -> _Opened:
    openers: dict[str, Callable[..., _Opened]] = {
        "hub": _hub, "folder": _folder, "packaged": _packaged, "pico": _pico, "random": _random
    }  # fmt: skip
    opened = openers[source.source](**source.model_dump(exclude={"source"}, exclude_none=True))
    if opened.tokenizer.pad_token is None:  # Llama-2 has none, and batches need one
        opened.tokenizer.pad_token = opened.tokenizer.eos_token
    return opened


def _check_vocabularies(teacher: _Opened, student: _Opened, *, shared: bool) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer where it is another than the student's; refuses a pair that a profile does not allow."""
    theirs, ours = ({t: i for t, i in s.tokenizer.get_vocab().items() if i < s.rows} for s in (teacher, student))
    wrong = [(i, token) for token, i in ours.items() if theirs.get(token) != i]
    if not wrong:
        return None
    found = shared_tokens(teacher.tokenizer, student.tokenizer, teacher.rows, student.rows)
    if shared and found.share >= LEAST_SHARE:
        return teacher.tokenizer
    between = f"the vocabularies of {teacher.label} ({len(theirs)} tokens) and {student.label} ({len(ours)} tokens)"
    if shared:
        raise VocabularyMismatch(
            f"{between} have too little in common: {found}, and at least "
            f"{LEAST_SHARE:.0%} of the student's are needed; choose a pair of related languages"
        )
    i, token = min(wrong)
    other = next((repr(t) for t, j in theirs.items() if j == i), "nothing")
    raise VocabularyMismatch(
        f"{between} differ: id {i} is {other} for the teacher and {token!r} for the student; choose a pair of one "
        f"family, or set vocabularies: shared ({found})"
    )


def _pretrained(where: str, label: str, revision: str | None = None) -> _Opened:
    config = AutoConfig.from_pretrained(where, revision=revision).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
    load = partial(load_whole, where, label, revision=revision)
    return _Opened(label, tokenizer, config.vocab_size, lambda dtype: load(dtype=dtype))


def _hub(id: str, revision: str) -> _Opened:
    with _hub_trouble(id, revision):
        hf_hub_download(id, "config.json", revision=revision)  # fails in one place, before transformers guesses why
        opened = _pretrained(id, id, revision)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with _hub_trouble(id, revision):
            return opened.load(dtype)

    return _Opened(id, opened.tokenizer, opened.rows, load)


@contextmanager
def _hub_trouble(name: str, revision: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence that names the model and the fix."""
    elsewhere = "copy the model here and use `source: folder`, or fill the cache elsewhere and set HF_HUB_OFFLINE=1"
    try:
        yield
    except hub_errors.GatedRepoError:
        licence = f"accept its licence at https://huggingface.co/{name} and set HF_TOKEN to a token of that account"
        raise ModelUnavailable(f"{name} is gated: {licence}") from None
    except hub_errors.RevisionNotFoundError:
        raise ModelUnavailable(f"{name} has no revision {revision}: correct it in the profile") from None
    except hub_errors.RepositoryNotFoundError:
        raise ModelUnavailable(
            f"the hub has no model {name}, or it is private: correct the id in the profile, or set HF_TOKEN"
        ) from None
    except (OSError, ImportError, hub_errors.HTTPError) as error:  # a proxy can need a package that is not there
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ModelUnavailable(f"no space left for {name}: free some, or set HF_HOME to a larger disk") from None
        if isinstance(error, hub_errors.LocalEntryNotFoundError | ConnectionError):
            raise ModelUnavailable(
                f"the hub cannot be reached and {name} ({revision}) is not in its cache: {elsewhere}"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(f"{name} ({revision}) cannot be read from the hub ({reason}): {elsewhere}") from None


def download(source: Hub) -> Path:
    """Bring a model of the hub into the hub's cache, for machines that cannot reach it; returns where it lies there.

    Of a model in several formats the one that is loaded is taken: safetensors where there are any.

    Raises:
        ModelUnavailable: it is gated, unreachable or missing, or the disk is full.
    """
    with _hub_trouble(source.id, source.revision):
        names = HfApi().list_repo_files(source.id, revision=source.revision)
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
        wanted = [weights, "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(source.id, revision=source.revision, allow_patterns=wanted))


def _folder(path: str) -> _Opened:
    if not Path(path, "config.json").is_file():
        missing = "holds no config.json" if Path(path).is_dir() else "does not exist"
        raise ModelUnavailable(f"the model folder {path} {missing}: give the folder that save_pretrained wrote")
    with _folder_trouble(path):
        opened = _pretrained(path, path)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with _folder_trouble(path):
            return opened.load(dtype)

    return _Opened(path, opened.tokenizer, opened.rows, load)


@contextmanager
def _folder_trouble(path: str) -> Iterator[None]:
    """Turn what the readers of a folder raise, on several lines and without its name, into one sentence."""
    try:
        yield
    except ModelUnavailable:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        names = {file.name for file in Path(path).iterdir()}
        if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}:
            raise ModelUnavailable(
                f"the model folder {path} holds no tokenizer: write it there too, by the tokenizer's save_pretrained"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ModelUnavailable(
            f"the model folder {path} cannot be read ({reason}): write it anew by save_pretrained, model and tokenizer"
        ) from None


def _pico(id: str) -> _Opened:
    from semalign.classroom import load_pico, load_tokenizer, read_config

    return _Opened(id, load_tokenizer(), read_config(id).vocab_size, lambda dtype: load_pico(id)[0].to(dtype))  # type: ignore[arg-type]


def _packaged(id: str) -> _Opened:
    return _pretrained(str(converted_folder(id)), id)


def _random(config: Mapping[str, Any], seed: int) -> _Opened:
    tokenizer = byte_tokenizer()
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    # Wider than the usual 0.02, at which layers this narrow hardly move the stream.
    full = AutoConfig.for_model(**{"vocab_size": len(tokenizer), "initializer_range": 0.1, **ids, **config})

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(full).to(dtype)

    return _Opened(f"random {config['model_type']} (seed {seed})", tokenizer, full.vocab_size, load)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer that needs no training and no file: a token per byte and ``<pad>``, ``<s>``, ``</s>``; 259 in all."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tokenizer
