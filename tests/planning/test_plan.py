"""What a plan says, against counted tensors, published sizes, and every profile that ships."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

import nbformat
import pytest
import torch
from tiny import FAMILIES, tiny_llama
from transformers import PreTrainedModel

from semalign.lm.examples import mask_of
from semalign.methods import REGISTRY
from semalign.models import load_model, load_pair
from semalign.pipeline import book
from semalign.pipeline.notebooks import NOTEBOOKS, ORDER, chapters_of, trials_of
from semalign.planning import plan as planning
from semalign.profiles import FOLDER, Hub, ProfileError, load_profile
from semalign.training.config import TransferConfig
from semalign.training.loop import _attach

HUB_PROFILES = [p.stem for p in sorted(FOLDER.glob("*.yaml")) if load_profile(p).teacher.source == "hub"]


def saved(model: PreTrainedModel, tokens: int, batch: int) -> int:
    """Bytes that the decoder's forward pass keeps for a backward pass to its input, without the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    adapted = any(p.requires_grad for p in model.parameters())
    seen: dict[int, int] = {}
    alive = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    x = torch.randn(batch, tokens, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[0, -1] = 0  # a padded batch, as nearly all are
    mask = mask_of({"attention_mask": mask})
    # As the loop trains on a card: in bfloat16, what enters float32 adapters too.
    cast = torch.autocast("cpu", torch.bfloat16, enabled=adapted and model.dtype == torch.bfloat16)
    with cast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.get_decoder()(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state.sum()
    return sum(size for place, size in seen.items() if place not in own)


def shape(model: PreTrainedModel) -> planning.Shape:
    return planning._of_config(model.config.to_dict())


def per_layer(make: Callable[[int], PreTrainedModel], tokens: int = 24, batch: int = 3) -> float:
    two, three = (saved(make(n), tokens, batch) for n in (2, 3))
    return three - two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
def test_what_is_kept_for_a_backward_pass_is_what_torch_saves(name: str, dtype: torch.dtype) -> None:
    whole = FAMILIES[name]().config.to_dict()

    def make(layers: int) -> PreTrainedModel:
        config = FAMILIES[name]().config
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1] * layers
        return type(FAMILIES[name]())(config).to(dtype).requires_grad_(False).eval()

    counted = per_layer(make)
    said = planning.kept_for_backward(planning._of_config(whole), 72, dtype.itemsize, layers=1)
    assert said == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize(
    ("trained", "dtype"), [("lora", torch.float32), ("lora", torch.bfloat16), ("layer", torch.float32)]
)
def test_what_enters_the_trained_weights_is_kept_too(trained: str, dtype: torch.dtype) -> None:
    def make(layers: int) -> PreTrainedModel:
        model = tiny_llama(layers, hidden=64, intermediate_size=160).to(dtype)
        _attach(model, tuple(range(1, layers + 1)), TransferConfig(trained=trained))
        return model

    counted = per_layer(make)
    model = tiny_llama(1, hidden=64, intermediate_size=160)
    said = planning.kept_for_backward(shape(model), 72, dtype.itemsize, layers=1, trained=trained)
    assert said == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("name", sorted(planning.configurations()))
def test_the_kept_configurations_have_the_parameters_of_their_architecture(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    s = planning.shape_of(Hub(source="hub", id=name, revision="main"))
    config: Any = AutoConfig.for_model(
        s.type, hidden_size=s.width, intermediate_size=s.mlp, num_hidden_layers=s.layers, num_attention_heads=s.heads,
        num_key_value_heads=s.groups, head_dim=s.head, vocab_size=s.vocabulary, tie_word_embeddings=s.tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == s.parameters


def test_sizes_are_those_that_are_published() -> None:
    """Touvron et al. 2023 and the hub's own counts: 13.02 and 6.74 thousand million, 361.8 and 134.5 million."""
    published = {"meta-llama/Llama-2-13b-chat-hf": 13.02e9, "meta-llama/Llama-2-7b-chat-hf": 6.74e9}
    published |= {"HuggingFaceTB/SmolLM2-360M-Instruct": 361.8e6, "HuggingFaceTB/SmolLM2-135M-Instruct": 134.5e6}
    for name, size in published.items():
        assert planning.shape_of(Hub(source="hub", id=name, revision="main")).parameters == pytest.approx(
            size, rel=1e-3
        )


@pytest.mark.parametrize("name", HUB_PROFILES)
def test_every_profile_of_the_hub_has_a_page_of_its_needs(name: str) -> None:
    p = load_profile(name)
    found = planning.plan(p, chapters_of(p))
    page = planning.markdown(found)
    assert set(found.methods) == set(p.methods) and found.downloads > 0 and found.scratch > 0
    rows = [line for line in page.splitlines() if line.startswith("| method") or line.startswith("| chapter")]
    assert len(rows) == len(found.methods) + len(found.chapters)
    assert "GB are 10^9 bytes" in page
    for line in rows:
        gpu = float(line.split("|")[2])
        fits = [cell.strip() == "fits" for cell in line.split("|")[5:7]]
        assert fits[1] or not fits[0], "what fits 40 GB fits 80"
        assert fits == [gpu <= 40, gpu <= 80] or min(abs(gpu - 40), abs(gpu - 80)) < 0.1
    assert all(hours > 0 for hours in found.hours.values()) and found.hours["H100"] < found.hours["A100"]
    for said in found.mends:  # each sentence names what helps, or says that nothing does
        assert "does not fit" in said and any(w in said for w in (": set ", ": take ", "no setting mends it"))


def test_the_book_of_a_hub_profile_has_the_plan_as_a_page() -> None:
    for name in HUB_PROFILES:
        page = book.plan_page(load_profile(name))
        assert page.startswith("# What this profile needs\n") and "| chapter `04_alignment` |" in page
    assert book.plan_page(load_profile("smoke")) == ""


def test_a_mend_mends() -> None:
    p = load_profile("llama2")
    said = next(s for s in planning.plan(p).mends if s.startswith("method sft does not fit 40 GB"))
    batch = int(said.rpartition("eval_batch_size: ")[2])
    assert planning.method_memory(p, "sft").gpu > 40e9
    assert planning.method_memory(p.changed(eval_batch_size=batch), "sft").gpu <= 40e9
    many = p.changed(answer_batch_size=64)
    said = next(s for s in planning.plan(many).mends if s.startswith("method none does not fit 40 GB (answering)"))
    batch = int(said.rpartition("set answer_batch_size: ")[2])
    assert planning.method_memory(many.changed(answer_batch_size=batch), "none").gpu <= 40e9


@pytest.mark.parametrize("name", ["olmo2", "qwen3", "smollm2"])
def test_other_profiles_of_the_hub_fit_one_card_too(name: str) -> None:
    p = load_profile(name)
    found = planning.plan(p, chapters_of(p))
    assert max(need.gpu for need in [*found.chapters.values(), *found.methods.values()]) <= 80e9


@pytest.mark.parametrize("name", ["llama2", "codellama", "wizardcoder"])
def test_the_papers_profiles_fit_one_card(name: str) -> None:
    """80 GB hold every chapter, 40 GB the paper's method and its controls; an A100 takes 40 hours at most."""
    p = load_profile(name)
    found = planning.plan(p, chapters_of(p))
    assert max(need.gpu for need in [*found.chapters.values(), *found.methods.values()]) <= 80e9
    controls = [m for m in ("none", "semalign", "sft_layer", "random_target", "scrambled_tokens") if m in p.methods]
    assert len(controls) >= 4 and max(found.methods[m].gpu for m in controls) <= 40e9
    assert found.whole["A100"] <= 40 < planning.plan(p.changed(search={"examples": None})).whole["A100"]
    assert planning.plan(p.changed(answer_batch_size=8)).hours["A100"] > 40 > found.whole["H100"]
    larger = planning.plan(p.changed(search={"whole_layers": True}), ["14_search"])
    assert "14_search does not fit 80 GB (whole layers in training): set search: {whole_layers: false}" in str(
        larger.mends
    )


def test_the_plan_of_memory_is_what_a_card_counted() -> None:
    p, counted = load_profile("llama2"), planning._file()["measured"]
    found = planning.measured(p)
    assert len(found) >= 14 and set(found) <= set(REGISTRY)
    for name, gigabytes in found.items():
        steps = {step: size for step, size in planning.method_steps(p, name).items() if step != "answering"}
        assert max(steps.values()) == pytest.approx(1e9 * gigabytes, rel=0.06), name
    teacher = planning.shape_of(p.teacher)
    assert 2 * teacher.parameters + planning.attribution(teacher, 700, 2) == pytest.approx(
        1e9 * counted["attribution"], rel=0.02
    )
    writes = counted["writes"]
    for name, of in {"student": planning.shape_of(p.student), "teacher": teacher}.items():
        assert 2 * of.parameters + planning.cache(
            of, writes["answer_batch_size"], writes["tokens"], 2
        ) == pytest.approx(1e9 * writes[name], rel=0.1)
    for name, gigabytes in found.items():  # more than the plan where more was counted, with what CUDA takes on top
        planned = max(planning.method_steps(p, name).values())
        assert planning.method_memory(p, name).gpu == max(planned, 1e9 * gigabytes) + planning.SPARE
    page = planning.markdown(planning.plan(p, ["04_alignment"]))
    assert re.search(r"method `ted` \| 41.4 .* \*\*no\*\* \| fits \| 39.9 \|\n", page)
    assert "the larger of what is planned and what was counted, with 1.5 GB on top" in page
    assert "| 80 GB | counted |" in page and re.search(r"method `sft` .* fits \| 46.7 \|\n", page)
    for other in (
        p.changed(eval_batch_size=4),
        p.changed(dtype="float32"),
        p.changed(max_length=512),
        load_profile("olmo2"),
        load_profile("smoke"),
    ):
        assert not planning.measured(other) and "counted" not in planning.markdown(
            planning.plan(other, ["04_alignment"])
        )


def test_chapters_are_planned_with_what_they_hold_beside_a_method() -> None:
    """By hand, from the shapes alone: what a card and the host hold besides CUDA, Python and the data."""
    p = load_profile("llama2")
    t, s = (2 * planning.shape_of(source).parameters for source in (p.teacher, p.student))
    chapters = ("02_importance", "11_ablations", "16_below_the_layer", "17_causal")
    of = {name: planning.chapter_memory(p, name) for name in chapters}
    assert of["02_importance"].host == t + planning.HOST
    assert t + 4e9 < of["02_importance"].gpu < t + s  # the student is loaded when the teacher is gone
    assert of["16_below_the_layer"].gpu == of["02_importance"].gpu + s  # both are scored, and gone when others train
    states = 40 * 20 * 700 * 5120 * 2
    assert of["11_ablations"].gpu >= t + s + states + planning.SPARE
    more = planning.chapter_memory(p.changed(sizes={"extract": 60}), "11_ablations")
    assert more.gpu == pytest.approx(t + s + 3 * states + planning.SPARE) and more.step == "states of all layers"
    largest = max(planning.method_memory(p, m).gpu for m in ("semantic_and_causal", "sft_layer"))
    assert of["17_causal"].gpu == largest + s  # the planted teacher, which is a student
    for name in ("none", "sft"):  # and which waits while the judge is loaded
        assert planning.method_memory(p, name).host == t + s + planning.HOST
        assert planning.method_steps(p, name)["teacher's pass"] > t


def named_in(code: CodeType) -> set[str]:
    """All names that a function uses, those of the functions inside it too."""
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*(named_in(one) for one in inner))


def reached(names: set[str], known: dict[str, Any], seen: dict[int, Any]) -> None:
    """Add to ``seen``, by identity, the functions of ours that code with these names may call, and all that they may.

    ``known`` is what its names mean. What is an attribute of a module of ours that it names or imports counts as well,
    and of a class of ours every method.
    """
    found = [known[name] for name in names if name in known]
    for module in [importlib.import_module(name) for name in names if name.partition(".")[0] == "semalign"]:
        inside = {one.name for one in pkgutil.iter_modules(getattr(module, "__path__", []))}
        found += [module, *(importlib.import_module(f"{module.__name__}.{name}") for name in inside & names)]
    for one in found:  # grows as it goes on
        if isinstance(one, ModuleType) and one.__name__.startswith("semalign"):
            found += [getattr(one, name) for name in names if hasattr(one, name)]
    for one in found:
        of_ours = inspect.isclass(one) and one.__module__.startswith("semalign")
        for function in [one, *vars(one).values()] if of_ours else [one]:
            function = inspect.unwrap(function) if callable(function) else function
            ours = isinstance(function, FunctionType) and function.__module__.startswith("semalign")
            if ours and id(function) not in seen:
                seen[id(function)] = function
                reached(named_in(function.__code__), function.__globals__, seen)


def loads_models(name: str) -> bool:
    """Whether the code of a chapter, or what it calls, opens models other than Pico."""
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    seen: dict[int, Any] = {}
    code = compile(source, name, "exec")
    own = {one.co_name for one in code.co_consts if isinstance(one, CodeType)}  # functions that it defines itself
    reached(named_in(code) - own, {}, seen)
    return bool({load_model, load_pair} & set(seen.values()))


def test_every_method_is_planned() -> None:
    assert set(planning.WAYS) == set(REGISTRY)
    for held in planning.CHAPTERS.values():
        assert set(held.methods) <= {"*", *REGISTRY}


@pytest.mark.parametrize("name", ORDER)
def test_the_chapters_that_load_models_are_those_that_are_planned(name: str) -> None:
    assert loads_models(name) == (name in planning.CHAPTERS)


@pytest.mark.parametrize("name", ORDER)
def test_the_trials_that_a_chapter_shares_are_those_that_are_jobs(name: str) -> None:
    p = load_profile("llama2")
    assert p.trial_jobs and p.code_tasks
    said = {f"{task}/{m}-{s}.json" for task, m, n in planning.trials_shared(p, name) for s in p.seeds[:n]}
    assert said == set(trials_of(p, name))


def test_models_of_a_package_are_planned_where_they_are_looked_at() -> None:
    p = load_profile("llama2")
    first, second = (planning.chapter_memory(p, name) for name in ("01_semantics", "21_second_family"))
    student = planning.shape_of(p.student)
    assert first.gpu > 2 * student.parameters and first.host > 2 * student.parameters + planning.HOST
    assert second.gpu > first.gpu  # its layers are attributed
    two = planning.chapter_memory(p, "22_two_vocabularies")
    assert planning.HOST < two.host < first.host and two.gpu < 5e9  # no model of the profile
    smoke = planning.chapter_memory(load_profile("smoke"), "22_two_vocabularies")
    assert smoke.host == planning.HOST  # runs of random models leave Gemma out


def test_a_model_that_no_plan_knows_is_one_sentence() -> None:
    with pytest.raises(ProfileError, match=r"no configuration of someone/else: add .*configurations\.yaml"):
        planning.shape_of(Hub(source="hub", id="someone/else", revision="main"))


def test_a_plan_loads_no_model_library_and_is_printed() -> None:
    code = (
        "import sys; from semalign.pipeline.__main__ import main; code = main(['plan', 'llama2']); "
        "print('torch' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "False 0" and "| method `semalign`" in done.stdout
