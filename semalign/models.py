"""The two models of a pair: where they come from, and where their parts are.

Layers are numbered from 1, as in the paper; a module list is indexed with ``k - 1`` at the point of use.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from semalign.packaged import ModelUnavailable, converted_folder, load_whole
from semalign.profiles import Profile, load_profile

Model = nn.Module
"""A causal language model with the parts that the functions below find (a transformers model)."""


def decoder(model: Model) -> Model:
    """The stack without the head: what maps token ids to normalised final states."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[operator, return-value]


def decoder_layers(model: Model) -> nn.ModuleList:
    """The layers 1..L of ``model`` in order (index 0 is layer 1).

    Raises:
        ValueError: the architecture keeps its layers under a name that is not known here.
    """
    stack = decoder(model)
    for name in ("layers", "h", "blocks"):
        found = getattr(stack, name, None)
        if isinstance(found, nn.ModuleList):
            return found
    raise ValueError(f"no layer list found in a {type(model).__name__}; known names are layers, h and blocks")


def sublayers(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The modules of one layer whose outputs are added to the residual stream: (attention, MLP).

    OLMo-2 and Gemma-2/3 normalise a sublayer's output before they add it; there the added vector, and so the
    sublayer output of section 4, is that norm's output.
    """
    if hasattr(layer, "post_feedforward_layernorm"):
        return layer.post_attention_layernorm, layer.post_feedforward_layernorm  # type: ignore[return-value]
    attention = next((getattr(layer, n) for n in ("self_attn", "attention", "attn") if hasattr(layer, n)), None)
    mlp = getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise ValueError(f"no attention and MLP found in a {type(layer).__name__}")
    return attention, mlp


def final_norm(model: Model) -> nn.Module:
    """The norm between the last layer and the head."""
    stack = decoder(model)
    for name in ("norm", "final_layer_norm", "ln_f"):
        if isinstance(getattr(stack, name, None), nn.Module):
            return getattr(stack, name)
    raise ValueError(f"no final norm found in a {type(model).__name__}")


def norm_gain(model: Model) -> Tensor:
    """The final norm's gain g (D,). Its sign is kept: entries can be negative.

    Some norms (Gemma's among them) store w = g - 1. Which is which shows in what the norm does to a vector of
    alternating signs, whose mean is 0 and whose variance is 1; the difference with its mirror image drops a bias.
    """
    norm = final_norm(model)
    weight: Tensor = norm.weight.detach()  # type: ignore[operator]
    signs = torch.ones_like(weight)
    signs[1::2] = -1
    with torch.no_grad():
        gain = (norm(signs) - norm(-signs)) / 2 * signs
    return weight + 1 if (gain - weight - 1).norm() < (gain - weight).norm() else weight


def head_weight(model: Model) -> Tensor:
    """The LM head W (m, D), detached; the embedding matrix where the two are tied."""
    return model.get_output_embeddings().weight.detach()  # type: ignore[operator]


def embedding_weight(model: Model) -> Tensor:
    """The input embeddings (m, D), detached."""
    return model.get_input_embeddings().weight.detach()  # type: ignore[operator]


class VocabularyMismatch(ValueError):
    """Teacher and student do not give the same id to the same token, so that no basis of one has a partner."""


@dataclass(frozen=True)
class Pair:
    """Teacher and student by their loaders, so that both need never be in memory together, and their one tokenizer."""

    name: str
    load_teacher: Callable[[], PreTrainedModel]
    load_student: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Source:
    """A model that can be loaded: what errors call it, its tokenizer, the rows of its embedding, and its loader."""

    label: str
    tokenizer: PreTrainedTokenizerBase
    rows: int
    load: Callable[[torch.dtype], PreTrainedModel]


def load_pair(profile: Profile | Mapping[str, Any] | str | Path) -> Pair:
    """The pair of a profile (or of a profile's name or path), checked for one vocabulary; no weights are loaded yet.

    A notebook, which has a profile's values as variables, gives ``{teacher, student, device, dtype}`` as a mapping.

    The tokenizer is the student's. A teacher may know more ids at the end (WizardCoder has 32,001, Llama-2 32,000).

    Raises:
        ProfileError: the profile is unknown or malformed.
        ModelUnavailable: a model is gated, unreachable, missing, or does not fit on the disk.
        VocabularyMismatch: a token of the student has no teacher token of the same id.
    """
    if not isinstance(profile, Mapping):
        profile = vars(profile if isinstance(profile, Profile) else load_profile(profile))
    teacher, student = _open(profile["teacher"]), _open(profile["student"])
    _check_vocabularies(teacher, student)
    name = profile.get("name") or f"{teacher.label} to {student.label}"
    place = {"device": profile["device"], "dtype": profile["dtype"]}
    return Pair(name, partial(_load, teacher, **place), partial(_load, student, **place), student.tokenizer)


def load_model(
    source: Mapping[str, Any], *, device: str = "auto", dtype: str = "float32"
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
    opened = _open(source)
    return _load(opened, device=device, dtype=dtype), opened.tokenizer


def describe(model: Model) -> dict[str, int | str | bool]:
    """What sets one model of a family apart: layers, width, vocabulary, parameters, tied heads, and the final norm."""
    head = head_weight(model)
    return {
        "architecture": type(model).__name__,
        "layers": len(decoder_layers(model)),
        "width": head.shape[1],
        "vocabulary": head.shape[0],
        "parameters": sum(p.numel() for p in model.parameters()),
        "tied head": head.data_ptr() == embedding_weight(model).data_ptr(),
        "final norm": type(final_norm(model)).__name__,
    }


def fingerprint(model: Model) -> str:
    """SHA-256 (hex) over a model's configuration and every parameter's name, type, shape and bytes.

    What only says where a model was read from, or by which version, is left out: equal weights are equal prints.
    """
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[operator, union-attr]
    for origin in ("_name_or_path", "architectures", "dtype", "transformers_version"):
        config.pop(origin, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(source: _Source, *, device: str, dtype: str) -> PreTrainedModel:
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelUnavailable(f"{source.label} is to go on {device}, and no GPU is visible: use device: auto or cpu")
    return source.load(getattr(torch, dtype)).to(device).eval()  # type: ignore[arg-type]


def _open(source: Mapping[str, Any]) -> _Source:
    openers: dict[str, Callable[..., _Source]] = {
        "hub": _hub, "folder": _folder, "packaged": _packaged, "pico": _pico, "random": _random
    }  # fmt: skip
    opened = openers[source["source"]](**{k: v for k, v in source.items() if k != "source"})
    if opened.tokenizer.pad_token is None:  # Llama-2 has none, and batches need one
        opened.tokenizer.pad_token = opened.tokenizer.eos_token
    return opened


def _check_vocabularies(teacher: _Source, student: _Source) -> None:
    theirs, ours = ({t: i for t, i in s.tokenizer.get_vocab().items() if i < s.rows} for s in (teacher, student))
    wrong = [(i, token) for token, i in ours.items() if theirs.get(token) != i]
    if wrong:
        i, token = min(wrong)
        other = next((repr(t) for t, j in theirs.items() if j == i), "nothing")
        raise VocabularyMismatch(
            f"the vocabularies of {teacher.label} ({len(theirs)} tokens) and {student.label} ({len(ours)} tokens) "
            f"differ: id {i} is {other} for the teacher and {token!r} for the student; choose a pair of one family"
        )


def _pretrained(where: str, label: str, revision: str | None = None) -> _Source:
    config = AutoConfig.from_pretrained(where, revision=revision).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
    load = partial(load_whole, where, label, revision=revision)
    return _Source(label, tokenizer, config.vocab_size, lambda dtype: load(dtype=dtype))


def _hub(id: str, revision: str) -> _Source:
    with _hub_trouble(id, revision):
        hf_hub_download(id, "config.json", revision=revision)  # fails in one place, before transformers guesses why
        opened = _pretrained(id, id, revision)

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with _hub_trouble(id, revision):
            return opened.load(dtype)

    return _Source(id, opened.tokenizer, opened.rows, load)


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
    except (OSError, hub_errors.HTTPError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise ModelUnavailable(f"no space left for {name}: free some, or set HF_HOME to a larger disk") from None
        if isinstance(error, hub_errors.LocalEntryNotFoundError | ConnectionError):
            raise ModelUnavailable(
                f"the hub cannot be reached and {name} ({revision}) is not in its cache: {elsewhere}"
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(f"{name} ({revision}) cannot be read from the hub ({reason}): {elsewhere}") from None


def _folder(path: str) -> _Source:
    if not Path(path, "config.json").is_file():
        missing = "holds no config.json" if Path(path).is_dir() else "does not exist"
        raise ModelUnavailable(f"the model folder {path} {missing}: give the folder that save_pretrained wrote")
    return _pretrained(path, path)


def _pico(id: str) -> _Source:
    from semalign.classroom import load_pico

    model, tokenizer = load_pico(id)
    return _Source(id, tokenizer, len(embedding_weight(model)), lambda dtype: load_pico(id)[0].to(dtype))  # type: ignore[arg-type]


def _packaged(id: str) -> _Source:
    return _pretrained(str(converted_folder(id)), id)


def _random(config: Mapping[str, Any], seed: int) -> _Source:
    tokenizer = byte_tokenizer()
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    # Wider than the usual 0.02, at which layers this narrow hardly move the stream.
    full = AutoConfig.for_model(**{"vocab_size": len(tokenizer), "initializer_range": 0.1, **ids, **config})

    def load(dtype: torch.dtype) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(full).to(dtype)

    return _Source(f"random {config['model_type']} (seed {seed})", tokenizer, full.vocab_size, load)


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
