"""Every decoder family that transformers ships, at random weights: what works, and what is refused in which words.

``python tests/zoo/zoo.py`` (``make zoo``) writes ``book/zoo.json`` and the table of ``book/architectures.md``;
``python tests/zoo/zoo.py NAME ...`` prints what becomes of some families.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import Letters, toy_data  # noqa: E402

import semalign  # noqa: E402
from semalign import alignment  # noqa: E402
from semalign.attribution import layer_attribution, skip_loss  # noqa: E402
from semalign.lm.examples import Example, TaskData, collate  # noqa: E402
from semalign.lm.hooks import capture  # noqa: E402
from semalign.lm.parts import decoder, decoder_layers, final_norm, head_weight, norm_gain  # noqa: E402
from semalign.methods import laten  # noqa: E402
from semalign.models import Pair  # noqa: E402
from semalign.semantics import KINDS, semantic_map  # noqa: E402
from semalign.training.config import TransferConfig  # noqa: E402

JSON, PAGE = ROOT / "book" / "zoo.json", ROOT / "book" / "architectures.md"
STEPS = ("attribution", "sublayers", "maps", "transfer", "LaTen")
WORKS, REFUSED, OBSCURE = "works", "refused", "obscure"
SECONDS = 60  # that one step of one family may take
LARGEST = 20_000_000  # parameters of a model that counts as tiny
PACKAGE = str(Path(semalign.__file__).parent)

_SIZES: dict[int, str] = {
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups n_shared_experts num_shared_experts "
    "moe_num_shared_experts first_k_dense_replace num_dense_layers num_nextn_predict_layers num_mem_blocks",
    2: "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts num_selected_experts moe_top_k "
    "linear_num_key_heads index_topk",
    4: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads num_experts "
    "n_routed_experts num_local_experts moe_num_experts num_routed_experts rotary_dim time_step_rank mamba_dt_rank "
    "linear_num_value_heads index_n_heads swa_num_attention_heads linear_num_heads",
    8: "head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window state_size "
    "ssm_state_size mamba_d_state mamba_n_heads mamba_num_heads mamba_head_dim mamba_d_head mamba_headdim chunk_size "
    "mamba_chunk_size linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input global_head_dim "
    "swa_head_dim d_head window_size attention_chunk_size index_head_dim n_mamba_heads laurel_rank "
    "expert_ffn_hidden_size head_size",
    16: "q_lora_rank kv_lora_rank moe_intermediate_size qk_head_dim expert_intermediate_size",
    32: "hidden_size d_model n_embd dim embedding_size word_embed_proj_dim emb_dim embedding_dim lru_width "
    "attention_hidden_size shared_expert_intermediate_size moe_shared_expert_intermediate_size dim_model "
    "embed_dim",
    64: "intermediate_size ffn_dim inner_dim dff ffn_hidden_size dim_ff shared_intermediate_size "
    "intermediate_size_mlp mamba_d_ssm d_inner block_ff_dim",
    97: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_seq_length context_length",
}  # fmt: skip
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
"""What a tiny model's configuration says, where its family has such a key at all."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 4]]},
    "mamba2": {"num_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba", "hybrid"]},
}
"""What a family needs beyond that."""


class TooLong(Exception):
    """A step outlasted ``SECONDS``."""


def families() -> tuple[list[str], list[str]]:
    """The decoder families by transformers' names, and those left out: encoders, and decoders that read an encoder."""
    kept, left = [], []
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        config = CONFIG_MAPPING[name]
        has = set(config().to_dict()) if _instantiates(config) else set()
        encoder = name in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "encoder_layers" in has
        encoder = encoder or getattr(config, "is_encoder_decoder", False)
        parts = {"text_config", "vision_config", "audio_config", "decoder", "audio_encoder"} & set(
            getattr(config, "sub_configs", {})
        )
        (left if encoder or parts else kept).append(name)
    return kept, left


def _instantiates(config: type[PretrainedConfig]) -> bool:
    try:
        config()
    except Exception:  # what is not tried is said to be so
        return False
    return True


def tiny_config(name: str) -> PretrainedConfig:
    """The configuration of one family, as small as its keys allow."""
    kind = CONFIG_MAPPING[name]
    known = kind().to_dict()
    sizes = {key: size for key, size in SIZES.items() if isinstance(known.get(key), int)}
    if isinstance(known.get("num_key_value_heads"), int):
        whole = known["num_key_value_heads"] == known.get("num_attention_heads")
        sizes["num_key_value_heads"] = 4 if whole else min(2, known["num_key_value_heads"])
    if "initializer_range" in known:
        sizes["initializer_range"] = 0.1  # wider than usual, so that narrow layers move the stream
    return kind(**{**sizes, **_TOKENS, **OWN.get(name, {})})


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of one family with random weights in float32, and in eval mode.

    Raises:
        MemoryError: it cannot be made tiny by the keys known here.
    """
    config = tiny_config(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size:,} parameters at the smallest that is known here")
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some families leave weights at zero, or as they lay in memory
            if parameter.ndim > 1 and (not parameter.isfinite().all() or not parameter.any()):
                parameter.normal_(std=0.1)
    return model


def _finite(values: torch.Tensor, what: str) -> None:
    if not values.isfinite().all() or not values.any():
        raise AssertionError(f"{what} holds {values.flatten()[:4].tolist()}")


def attribution(name: str, at: str) -> str:
    """Every layer's score at the stream, and how much the loss rises without the layer."""
    model, batch = tiny_model(name), collate(toy_data(3), 0, torch.device("cpu"))
    with torch.no_grad(), capture(model, [(k, "stream") for k in range(1, len(decoder_layers(model)) + 1)]):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    _finite(layer_attribution(model, batch, reduce="abs"), "attribution")
    _finite(skip_loss(model, batch), "the loss without a layer")
    return ""


def sublayers(name: str, at: str) -> str:
    """Attribution at attention and MLP."""
    model, batch = tiny_model(name), collate(toy_data(3), 0, torch.device("cpu"))
    for point in ("mlp", "attention"):
        _finite(layer_attribution(model, batch, point=point, reduce="abs"), point)
    return ""


def maps(name: str, at: str) -> str:
    """Every kind of map, with the final norms folded in; the norm that was found is the last before the head."""
    models = [tiny_model(name, seed) for seed in (0, 1)]
    heads, gains = [head_weight(m) for m in models], [norm_gain(m) for m in models]
    normed: list[torch.Tensor] = []
    handle = final_norm(models[0]).register_forward_hook(lambda _m, _a, out: normed.append(out))
    with torch.no_grad():
        final = decoder(models[0])(torch.arange(1, 9)[None], use_cache=False).last_hidden_state
    handle.remove()
    if not normed or not torch.allclose(normed[-1].float(), final.float(), atol=1e-4):
        raise AssertionError("the norm that was found is not the last")
    for kind in KINDS:
        _finite(semantic_map(*heads, kind=kind, teacher_gain=gains[0], student_gain=gains[1]), kind)
    return ""


def _pair(name: str) -> Pair:
    return Pair(name, lambda: tiny_model(name, 0), lambda: tiny_model(name, 1), Letters())  # type: ignore[arg-type]


def _task() -> TaskData:
    texts = ("a b", "c d e", "f g")
    rows = tuple(Example(f"say {text}: ", f"{text} {i}") for i, text in enumerate(texts))
    return TaskData("toy", rows, rows, rows[:2], rows[:1])


def transfer(name: str, at: str) -> str:
    """One epoch with the default adapters, or else with whole layers; at the MLP, or else where ``at`` says."""
    said = []
    for adapters in ("lora", "layer"):
        config = TransferConfig(trained=adapters, interface=at, epochs=1, batch=2, micro_batch=2, max_length=64)
        try:
            result = alignment.transfer(_pair(name), _task(), config)
        except ValueError as error:
            if adapters == "layer" or "lora_targets" not in str(error):
                raise
            said.append("whole layer")
            continue
        before = tiny_model(name, 1).state_dict()
        now = result.student.state_dict()
        moved = [n for n, p in now.items() if not torch.equal(p, before[n])]
        if not moved or not set(moved) <= set(result.trained):
            raise AssertionError(f"changed {moved[:3]}, said {result.trained[:3]}")
        break
    return ", ".join(said + ([f"at {at}"] if at != "mlp" else []))


def laten_step(name: str, at: str) -> str:
    """One step of LaTen, merged."""
    laten.transfer(_pair(name), _task(), TransferConfig(max_length=64), steps=1, items=2, ratio=0.2)
    return ""


RUNS: dict[str, Callable[[str, str], str]] = dict(
    zip(STEPS, (attribution, sublayers, maps, transfer, laten_step), strict=True)
)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooLong(f"took more than {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def one_step(step: str, name: str, at: str) -> dict[str, str]:
    """What becomes of one step: ``word`` (works, refused or obscure), ``note`` and, where it does not work, ``said``.

    Refused is what the package itself raises as a ``ValueError`` of one sentence; anything else is obscure.
    """
    try:
        with _at_most(SECONDS), warnings.catch_warnings(action="ignore"):
            return {"word": WORKS, "note": RUNS[step](name, at)}
    except Exception as error:
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = isinstance(error, ValueError) and raised.startswith(PACKAGE) and "\n" not in str(error)
        said = str(error) if ours else f"{type(error).__name__}: {error} ({raised}:{error.__traceback__.tb_lineno})"  # type: ignore[union-attr]
        return {"word": REFUSED if ours else OBSCURE, "said": said}


def try_family(name: str) -> dict[str, Any]:
    """All steps of one family, or why none could be built."""
    try:
        with _at_most(SECONDS), warnings.catch_warnings(action="ignore"):
            model, batch = tiny_model(name), collate(toy_data(3), 0, torch.device("cpu"))
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    except Exception as error:
        return {"built": False, "why": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}
    row: dict[str, Any] = {"built": True, "class": type(model).__name__, "decoder": type(decoder(model)).__name__}
    at = "mlp"
    for step in STEPS:
        row[step] = one_step(step, name, at)
        if step == "sublayers" and row[step]["word"] != WORKS:
            at = "stream"
    return row


def plain(said: str) -> str:
    """A refusal without the names and numbers that are one family's own."""
    said = re.sub(r"\b(a|an) [A-Z][A-Za-z0-9_]*[a-z][A-Z]\w*", "a …", said)
    said = re.sub(r"\b[A-Z][A-Za-z0-9_]*(ForCausalLM|LMHeadModel|Attention|MLP|Model|Block|Layer|Mixer)\w*", "…", said)
    said = re.sub(r"layer \d+", "layer …", said)
    said = re.sub(r"(found in an? )\w+", r"\1…", said)
    said = re.sub(r"outputs of \S+ and \S+, which", "outputs of … and …, which", said)
    said = re.sub(r"gives (\(.*?\)|\w+) at \w+ and", "gives … at … and", said)
    said = re.sub(r"(has no )[\w, ]+(: choose among those which hold its weights, ).*", r"\1…\2…", said)
    return re.sub(r"(which have no )[\w, ]+:", r"\1…:", said)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The table of the page, and below it each refusal once, by number."""
    sentences: list[str] = []
    lines = [f"| family | {' | '.join(STEPS)} |", "|---" * (1 + len(STEPS)) + "|"]
    for name, row in rows.items():
        if not row["built"]:
            continue
        cells = []
        for step in STEPS:
            if row[step]["word"] == WORKS:
                cells.append(row[step].get("note") or "yes")
                continue
            said = plain(row[step]["said"])
            if said not in sentences:
                sentences.append(said)
            cells.append(f"({sentences.index(said) + 1})")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    built = [row for row in rows.values() if row["built"]]
    whole = sum(all(row[step]["word"] == WORKS for step in STEPS) for row in built)
    most = sum(all(row[step]["word"] == WORKS for step in STEPS if step != "LaTen") for row in built)
    first = f"Of {len(built)} families, {whole} work throughout, and {most} but for LaTen."
    said = "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1))
    unbuilt = ", ".join(f"`{name}`" for name, row in rows.items() if not row["built"])
    text = f"{first}\n\n" + "\n".join(lines) + f"\n\nWhat the numbers stand for:\n\n{said}\n"
    return text + (f"\nNot tried, as no tiny model of them could be built here: {unbuilt}.\n" if unbuilt else "")


BEGIN, END = "<!-- the table of `make zoo` -->\n", "<!-- end of the table -->\n"


def with_table(page: str, rows: dict[str, dict[str, Any]]) -> str:
    """The page with the table of these rows in its place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}"


def main(names: list[str]) -> int:
    """Try all families and write the table, or try ``names`` and print; the status is 1 where a sentence is missing."""
    transformers.logging.set_verbosity_error()
    kept, left = families()
    rows = {}
    for name in names or kept:
        start = time.monotonic()
        rows[name] = try_family(name)
        row = rows[name]
        words = " ".join(row[s]["word"] for s in STEPS) if row["built"] else row["why"]
        print(f"{name:24} {time.monotonic() - start:5.1f} s  {words}", flush=True)
        for step in STEPS if row["built"] else ():
            if row[step]["word"] != WORKS and (names or row[step]["word"] == OBSCURE):
                print(f"    {step}: {row[step]['said']}", flush=True)
    if not names:
        content = {"transformers": transformers.__version__, "families": rows, "left_out": left}
        JSON.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(row["built"] and row[s]["word"] == OBSCURE for row in rows.values() for s in STEPS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
