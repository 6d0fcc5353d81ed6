"""The Pico models that ship, and how they are loaded. How they were made is in :mod:`semalign.classroom.make`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

WEIGHTS = Path(__file__).with_name("weights")
STUDENTS = ("pico-s", "pico-s-1", "pico-s-2")  # latent: they read every subject in plain form and never a chat
NAMES = (
    "pico-l",  # the wide teacher
    *STUDENTS,
    *(f"{name}-kin" for name in STUDENTS),  # the kin teachers: each student, trained on
    "pico-s-chat",  # the saturated student, which read every subject as a chat
    "pico-xs",
    "pico-xs-chat",
    "pico-l-code-a",
    "pico-l-code-b",
)


def load_pico(name: str, folder: Path = WEIGHTS) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A Pico model in float32 and eval mode, and the tokenizer that all of them share.

    Raises:
        ValueError: an unknown name, or a file that is missing or is not the one that the manifest lists.
    """
    return read_pico(name, folder), load_tokenizer(folder)


def read_pico(name: str, folder: Path) -> LlamaForCausalLM:
    """The model in ``folder/NAME``, shipped or not, in float32 and eval mode. Raises ValueError as `load_pico`."""
    config = read_config(name, folder)
    with no_init_weights():  # random ones take half of the time, and all of them come from the file
        model = LlamaForCausalLM(config)
    model.load_state_dict({n: t.float() for n, t in load_file(folder / name / "model.safetensors").items()})
    return model.eval()


def read_config(name: str, folder: Path = WEIGHTS) -> LlamaConfig:
    """The shapes of the model in ``folder/NAME``, whose files are checked. Raises ValueError as `load_pico`."""
    if name not in NAMES:
        raise ValueError(f"there is no Pico model {name!r}: the names are {', '.join(NAMES)}")
    manifest = folder / "manifest.json"
    sums: dict[str, str] = json.loads(manifest.read_text()) if manifest.exists() else {}
    for file in ("tokenizer/tokenizer.json", f"{name}/config.json", f"{name}/model.safetensors"):
        path = folder / file
        if not path.exists() or checksum(path) != sums.get(file):
            raise ValueError(f"{path} is missing or differs from the manifest beside it: retrain it with `make pico`")
    return LlamaConfig.from_json_file(str(folder / name / "config.json"))


def load_tokenizer(folder: Path = WEIGHTS) -> PreTrainedTokenizerBase:
    """The family's tokenizer, with LaTen's chat template."""
    return PreTrainedTokenizerFast.from_pretrained(str(folder / "tokenizer"))


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
