from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from semalign import semantics
from semalign.lm.parts import final_norm, head_weight, norm_gain
from semalign.semantics import (
    KINDS,
    canonical_correlations,
    decompose,
    fold_norm,
    hidden_map,
    map_report,
    recompose,
    semantic_bases,
    semantic_map,
)

ROOT = Path(__file__).parents[1]
FLOAT64 = torch.float64


def real_like(m: int, width: int, *, seed: int = 0, decay: float = 1.5, dtype: torch.dtype = FLOAT64) -> Tensor:
    """A head as language models have them: a decaying spectrum, and a mean that holds nearly half of the energy."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=FLOAT64)).Q
    rows = torch.randn(m, width, generator=generator, dtype=FLOAT64) * torch.logspace(
        0, -decay / 2, width, dtype=FLOAT64
    )
    mean = torch.randn(width, generator=generator, dtype=FLOAT64)
    return ((rows @ rotation) + 0.9 * mean / mean.norm() * rows.norm() / m**0.5).to(dtype)


def plain(m: int, width: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(m, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(columns: Tensor) -> Tensor:
    return columns / columns.norm(dim=0)


def pinv_bases(head: Tensor) -> Tensor:
    return unit(torch.linalg.pinv(head.double()))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small test heads take the route of large ones: several chunks and blocks, float32 passes for float32 heads."""
    monkeypatch.setattr(semantics, "_SMALL", 0)
    monkeypatch.setattr(semantics, "_CHUNK", 192)
    monkeypatch.setattr(semantics, "_BLOCK", 24)


@pytest.mark.parametrize(("dtype", "bound"), [(FLOAT64, 1e-10), (torch.float32, 1e-5)])
def test_bases_are_the_columns_of_the_pseudoinverse(dtype: torch.dtype, bound: float, large: None) -> None:
    head = real_like(900, 64, dtype=dtype)
    bases = semantic_bases(head)
    assert bases.shape == (64, 900)
    assert bases.dtype == dtype
    assert error(bases, pinv_bases(head)) < bound
    assert error(semantic_bases(head, unit=False), torch.linalg.pinv(head.double())) < bound


def test_primal_bases_are_rows_and_tight_bases_a_parseval_frame() -> None:
    head = real_like(500, 40)
    assert torch.allclose(semantic_bases(head, kind="primal", unit=False), head.T)
    assert error(semantic_bases(head, kind="primal"), unit(head.T)) < 1e-12
    tight = semantic_bases(head, kind="tight", unit=False)
    assert error(tight @ tight.T, torch.eye(40)) < 1e-10
    assert torch.allclose(semantic_bases(head, kind="tight").norm(dim=0), torch.ones(500, dtype=FLOAT64))


def test_a_token_without_a_row_has_a_zero_basis() -> None:
    head = plain(60, 8)
    head[7] = 0
    bases = semantic_bases(head)
    assert bases.isfinite().all()
    assert bases[:, 7].abs().max() == 0


@pytest.mark.parametrize("kind", ["dual", "tight"])
def test_the_gain_is_folded_with_its_sign(kind: str) -> None:
    head, gain = real_like(300, 24), plain(1, 24, 3)[0]
    assert (gain < 0).any()
    assert error(semantic_bases(head, gain=gain, kind=kind), semantic_bases(head * gain, kind=kind)) < 1e-10
    unfolded = semantic_bases(head, kind=kind, unit=False)
    assert error(semantic_bases(head, gain=gain, unit=False), torch.linalg.pinv(head) / gain[:, None]) < 1e-9
    assert error(semantic_bases(head, gain=gain, kind=kind, unit=False), unfolded) > 0.1


def reference_maps(t: Tensor, s: Tensor) -> dict[str, Tensor]:
    """Each map by its definition, with pseudoinverses and roots from singular value decompositions."""
    u_t, _, v_t = torch.linalg.svd(t, full_matrices=False)
    u_s, _, v_s = torch.linalg.svd(s, full_matrices=False)
    u, _, v = torch.linalg.svd(s.T @ t, full_matrices=False)
    centred_s, centred_t = s - s.mean(0), t - t.mean(0)
    return {
        "paper": pinv_bases(s) @ pinv_bases(t).T,
        "logit": torch.linalg.pinv(s) @ t,
        "logit_centred": torch.linalg.pinv(centred_s) @ centred_t,
        "tight": (u_s @ v_s).T @ (u_t @ v_t),
        "procrustes": u @ v,
    }


@pytest.mark.parametrize(("dtype", "bound"), [(FLOAT64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("widths", [(64, 40), (40, 64)])
@pytest.mark.parametrize("kind", ["paper", "logit", "logit_centred", "tight", "procrustes"])
def test_every_map_is_its_definition(
    kind: str, widths: tuple[int, int], dtype: torch.dtype, bound: float, large: None
) -> None:
    teacher, student = real_like(900, widths[0], seed=1, dtype=dtype), real_like(900, widths[1], seed=2, dtype=dtype)
    got = semantic_map(teacher, student, kind=kind)
    assert got.shape == (widths[1], widths[0])
    assert got.dtype == dtype
    assert error(got, reference_maps(teacher.double(), student.double())[kind]) < bound


def test_a_head_that_float32_would_spoil_is_multiplied_in_float64(large: None) -> None:
    good, bad = real_like(900, 64, dtype=torch.float32), real_like(900, 64, decay=8, dtype=torch.float32)
    assert semantics._gram(semantics._head(good, None, "head"), 0.0).dtype == torch.float32
    assert semantics._gram(semantics._head(bad, None, "head"), 0.0).dtype == FLOAT64
    assert error(semantic_map(good, bad, kind="logit"), torch.linalg.pinv(bad.double()) @ good.double()) < 1e-5


def test_half_precision_heads_are_read_as_float32() -> None:
    teacher, student = real_like(300, 24, seed=1).bfloat16(), real_like(300, 16, seed=2).bfloat16()
    got = semantic_map(teacher, student, kind="logit")
    assert got.dtype == torch.float32
    assert error(got, torch.linalg.pinv(student.double()) @ teacher.double()) < 1e-5


@pytest.mark.parametrize("kind", ["logit", "logit_centred", "tight", "procrustes"])
@pytest.mark.parametrize("decay", [1.5, 8.0])
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
def test_self_transfer_is_the_identity(kind: str, decay: float, dtype: torch.dtype, large: None) -> None:
    head = real_like(1200, 48, decay=decay, dtype=dtype)
    assert (semantic_map(head, head, kind=kind) - torch.eye(48)).abs().max() < 1e-5
    h = plain(5, 48, 9, dtype)
    assert torch.allclose(
        recompose(h, semantic_map(head, head, kind=kind)), h / h.norm(dim=-1, keepdim=True), atol=1e-5
    )


def test_self_transfer_of_the_papers_map_is_not_the_identity() -> None:
    """S S' of unit-norm dual bases has, up to the norms, the eigenvalues of G^-1: what G has most of, it has least of.

    Unit norms tame that, so the cosine is well below 1 and well above what random vectors would have. That random
    bases do better shows that the number measures how even a frame is.
    """
    head, h = real_like(4096, 64, decay=1.5), plain(400, 64, 5)
    bare = semantic_bases(head, unit=False)
    assert error(bare @ bare.T, torch.linalg.inv(head.T @ head)) < 1e-10
    measured = torch.cosine_similarity(h, recompose(h, semantic_map(head, head)), dim=-1).mean()
    assert measured == pytest.approx(0.741, abs=0.002)
    random = semantic_bases(plain(4096, 64, 6), kind="primal")
    at_random = torch.cosine_similarity(h, recompose(h, random @ random.T), dim=-1).mean()
    assert at_random == pytest.approx((4096 / (4096 + 64 - 1)) ** 0.5, abs=0.002)
    input_side = semantic_bases(head, kind="primal")
    assert torch.cosine_similarity(h, recompose(h, input_side @ input_side.T), dim=-1).mean() < measured - 0.2


def test_recompose_is_the_route_through_an_m_vector() -> None:
    teacher, student = real_like(900, 48, seed=1), real_like(900, 32, seed=2)
    h = plain(2 * 7, 48, 3).view(2, 7, 48)
    coefficients = (h / h.norm(dim=-1, keepdim=True)) @ pinv_bases(teacher)
    naive = coefficients @ pinv_bases(student).T
    got = recompose(h, semantic_map(teacher, student))
    assert got.shape == (2, 7, 32)
    assert (got - naive).abs().max() < 1e-5 * naive.abs().max()
    assert recompose(torch.zeros(1, 48), semantic_map(teacher, student)).abs().max() == 0
    values, tokens = decompose(h, semantic_bases(teacher), top=4)
    assert torch.allclose(values, coefficients.topk(4, dim=-1).values, atol=1e-9)
    assert torch.allclose(coefficients.gather(-1, tokens), values, atol=1e-9)
    everything, order = decompose(h, semantic_bases(teacher))
    assert error(torch.zeros_like(coefficients).scatter(-1, order, everything), coefficients) < 1e-9


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
def test_a_head_behind_a_layer_norm_gets_the_pseudoinverse(dtype: torch.dtype, large: None) -> None:
    weight, gain = real_like(800, 40, dtype=dtype), plain(1, 40, 4, dtype)[0]
    folded = fold_norm(weight, gain, layer_norm=True)
    centring = torch.eye(40, dtype=FLOAT64) - 1 / 40
    assert error(folded, weight.double() @ torch.diag(gain.double()) @ centring) < 1e-6
    bases = semantic_bases(folded, unit=False)
    assert error(bases, torch.linalg.pinv(folded.double(), rtol=1e-5)) < 1e-5
    other = real_like(800, 24, seed=3, dtype=dtype)
    to, of = semantic_map(other, folded, kind="logit"), semantic_map(folded, other, kind="logit")
    assert error(to, torch.linalg.pinv(folded.double(), rtol=1e-5) @ other.double()) < 1e-4
    assert error(of, torch.linalg.pinv(other.double()) @ folded.double()) < 1e-4
    for kind in ("logit", "tight", "procrustes"):  # the direction that the head cannot see is lost, the rest is kept
        assert (semantic_map(folded, folded, kind=kind) - centring).abs().max() < 1e-5
    assert semantic_map(folded, other).isfinite().all()


def test_a_vocabulary_smaller_than_the_width_gets_the_pseudoinverse() -> None:
    teacher, student = plain(12, 30, 1), plain(12, 20, 2)
    assert error(semantic_map(teacher, student, kind="logit"), torch.linalg.pinv(student) @ teacher) < 1e-9
    assert error(semantic_map(teacher, student), pinv_bases(student) @ pinv_bases(teacher).T) < 1e-9


def test_frequencies_weigh_the_tokens() -> None:
    teacher, student = real_like(500, 32, seed=1), real_like(500, 20, seed=2)
    p = plain(1, 500, 7)[0].exp()
    p[:3] = 0
    q = p / p.sum()
    for kind, weights in {"logit": torch.diag(q), "logit_centred": torch.diag(q) - q[:, None] * q}.items():
        wanted = torch.linalg.solve(student.T @ weights @ student, student.T @ weights @ teacher)
        assert error(semantic_map(teacher, student, kind=kind, frequency=p), wanted) < 1e-9
    rare = torch.cat([torch.ones(250), torch.zeros(250)])
    assert error(
        semantic_map(teacher, student, kind="logit", frequency=rare),
        semantic_map(teacher[:250], student[:250], kind="logit"),
    ) < 1e-9  # fmt: skip


@pytest.mark.parametrize("kind", ["paper", "logit", "logit_centred", "tight"])
def test_ridge_is_added_wherever_a_gram_matrix_is_inverted(kind: str) -> None:
    t, s, a = real_like(400, 28, seed=1), real_like(400, 20, seed=2), 3.0

    def power(head: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(head.T @ head + a * torch.eye(head.shape[1]))
        return vectors @ torch.diag(values**exponent) @ vectors.T

    centred = [w - w.mean(0) for w in (t, s)]
    wanted = {
        "paper": lambda: unit(power(s, -1) @ s.T) @ unit(power(t, -1) @ t.T).T,
        "logit": lambda: power(s, -1) @ s.T @ t,
        "logit_centred": lambda: power(centred[1], -1) @ centred[1].T @ centred[0],
        "tight": lambda: power(s, -0.5) @ s.T @ t @ power(t, -0.5),
    }[kind]()
    assert error(semantic_map(t, s, kind=kind, ridge=a), wanted) < 1e-9


def test_logit_fits_logits_best_and_procrustes_best_among_rotations() -> None:
    teacher, student = real_like(700, 40, seed=1), real_like(700, 28, seed=2)

    def misfit(matrix: Tensor) -> float:
        return float((student @ matrix - teacher).norm())

    procrustes = semantic_map(teacher, student, kind="procrustes")
    assert error(procrustes @ procrustes.T, torch.eye(28)) < 1e-10
    rotations = [semantic_map(teacher, student, kind="random", seed=i) for i in range(20)]
    u, _, v = torch.linalg.svd(semantic_map(teacher, student, kind="tight"), full_matrices=False)
    assert misfit(procrustes) < min(misfit(r) for r in [*rotations, u @ v])
    best = semantic_map(teacher, student, kind="logit")
    assert misfit(best) < misfit(procrustes)
    assert (student.T @ (student @ best - teacher)).abs().max() < 1e-8


def test_controls_keep_the_spectrum_and_lose_the_pairing() -> None:
    teacher, student = real_like(600, 32, seed=1), real_like(600, 20, seed=2)
    random = semantic_map(teacher, student, kind="random", seed=1)
    assert error(random @ random.T, torch.eye(20)) < 1e-10
    assert torch.equal(random, semantic_map(teacher, student, kind="random", seed=1))
    assert error(random, semantic_map(teacher, student, kind="random", seed=2)) > 0.5
    assert semantic_map(student, teacher, kind="random").shape == (32, 20)
    shuffled = semantic_map(teacher, student, kind="shuffled", seed=1)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    assert error(shuffled, semantic_map(teacher[order], student)) < 1e-12
    assert error(shuffled, semantic_map(teacher, student)) > 0.5
    logits = semantic_map(teacher, student, kind="shuffled", control_of="logit", seed=1)
    assert error(logits, semantic_map(teacher[order], student, kind="logit")) < 1e-12


def test_vocabularies_of_two_sizes_are_cut_to_the_shared_part_and_it_is_said() -> None:
    teacher, student = plain(130, 16, 1), plain(128, 12, 2)
    with pytest.warns(UserWarning, match=r"130 \(teacher\) and 128 \(student\).*only the 128"):
        got = semantic_map(teacher, student)
    assert torch.equal(got, semantic_map(teacher[:128], student))


def test_canonical_correlations_are_the_cosines_of_principal_angles() -> None:
    teacher = real_like(400, 24)
    student = torch.cat([teacher[:, :5] @ plain(5, 5, 2), plain(400, 11, 3)], dim=1)  # shares five directions exactly
    q_t, q_s = torch.linalg.qr(teacher).Q, torch.linalg.qr(student).Q
    got = canonical_correlations(teacher, student)
    assert torch.allclose(got, torch.linalg.svdvals(q_s.T @ q_t).clamp_max(1), atol=1e-9)
    assert torch.allclose(got[:5], torch.ones(5, dtype=FLOAT64))
    assert got[5] < 0.9


def test_the_report_says_what_a_map_keeps() -> None:
    student = real_like(5000, 24, seed=2)
    teacher, h = student @ plain(24, 36, 4), plain(9, 36, 5)  # every teacher logit is within the student's reach
    exact = map_report(teacher, student, h, kind="logit")
    assert exact["logit_error"] < 1e-6
    assert exact["logit_cosine"] == pytest.approx(1)
    paper = map_report(teacher, student, h, ridge=1.0)
    matrix = semantic_map(teacher, student, ridge=1.0)
    z, w = h @ matrix.T @ student.T, h @ teacher.T
    assert paper["logit_error"] == pytest.approx(float(((z - w).norm(dim=1) / w.norm(dim=1)).mean()))
    assert paper["logit_cosine"] == pytest.approx(float(torch.cosine_similarity(z, w).mean()))
    itself = recompose(h, semantic_map(teacher, teacher, ridge=1.0))
    assert paper["self_cosine"] == pytest.approx(float(torch.cosine_similarity(h, itself).mean()))


def test_the_data_driven_map_is_ridge_regression() -> None:
    x, y = plain(200, 20, 1), plain(200, 12, 2)
    wanted = torch.linalg.solve(x.T @ x + 5 * torch.eye(20), x.T @ y).T
    assert error(hidden_map(x, y, ridge=5.0), wanted) < 1e-10
    assert error(hidden_map(x[:9], y[:9]), (torch.linalg.pinv(x[:9]) @ y[:9]).T) < 1e-8  # fewer states than channels
    truth = plain(12, 20, 3)
    assert error(hidden_map(x, x @ truth.T), truth) < 1e-9
    with pytest.raises(ValueError, match="do not form pairs"):
        hidden_map(x, y[:9])


def gemma() -> Gemma2ForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "final_logit_softcapping": None}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90, n_positions=32)).eval()


@pytest.mark.parametrize(
    ("build", "layer_norm"),
    [(tiny_llama, False), (lambda: tiny_llama(tie_word_embeddings=True), False), (gemma, False), (gpt2, True)],
)
def test_the_folded_head_acts_on_states_before_the_final_norm(
    build: Callable[[], torch.nn.Module], layer_norm: bool
) -> None:
    """So that h* stands for the logits of h: those of the model, up to the scale and, behind a LayerNorm, its bias."""
    torch.manual_seed(0)
    model = build()
    norm = final_norm(model)
    with torch.no_grad():
        norm.weight.add_(0.5 * torch.randn_like(norm.weight))
        h = torch.randn(6, 32)
        logits = norm(h) @ head_weight(model).T
    folded = fold_norm(head_weight(model), norm_gain(model), layer_norm=layer_norm)
    assert torch.cosine_similarity(h @ folded.T, logits, dim=-1).min() > 1 - 1e-5
    matrix = semantic_map(folded, folded, kind="logit")
    assert torch.cosine_similarity(recompose(h, matrix) @ folded.T, logits, dim=-1).min() > 1 - 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, s: semantic_map(t.index_fill(0, torch.tensor([3]), torch.nan), s), "teacher head.*NaN"),
        (lambda t, s: semantic_map(t, s.index_fill(1, torch.tensor([3]), torch.inf), kind="random"), "student.*NaN"),
        (lambda t, s: semantic_map(t, s, teacher_gain=torch.ones(5)), r"gain of the teacher head has shape \(5,\)"),
        (lambda t, s: semantic_map(t, s, student_gain=torch.ones(5)), "gain of the student head"),
        (lambda t, s: semantic_map(t, s, kind="magic"), f"'magic'.*{', '.join(KINDS)}"),
        (lambda t, s: semantic_map(t, s, kind="shuffled", control_of="random"), "control of 'random'"),
        (lambda t, s: semantic_map(t[0], s), r"floating point matrix \(m, D\)"),
        (lambda t, s: semantic_map(t.long(), s), "int64"),
        (lambda t, s: semantic_map(t, s, kind="logit", frequency=torch.ones(9)), "50 finite numbers"),
        (lambda t, s: semantic_map(t, s, kind="logit", frequency=-torch.ones(50)), "none negative"),
        (lambda t, s: semantic_map(t, s, frequency=torch.ones(50)), "paper has no use for it"),
        (lambda t, s: semantic_bases(t, kind="dua"), "'dua'.*dual, primal, tight"),
        (lambda t, s: semantic_bases(t, gain=torch.ones(3)), "gain"),
        (lambda t, s: semantic_bases(t.fill_(torch.nan)), "NaN"),
    ],
)
def test_unusable_input_is_refused(change: Callable[[Tensor, Tensor], Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(plain(50, 12, 1), plain(50, 8, 2))


def test_inputs_are_left_as_they_were() -> None:
    teacher, student, gain = plain(300, 16, 1), plain(300, 12, 2), plain(1, 16, 3)[0]
    before = [x.clone() for x in (teacher, student, gain)]
    for kind in KINDS:
        semantic_map(teacher.requires_grad_(), student, kind=kind, teacher_gain=gain, ridge=0.1)
        assert not semantic_map(teacher, student, kind=kind).requires_grad
    semantic_bases(student, kind="primal", unit=False).zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (teacher, student, gain), strict=True))


def test_no_matrix_of_m_rows_is_made() -> None:
    """The peak of a map is set by the widths: a head of 80 MB costs far less than a second one of its kind."""
    script = """
import resource, torch
from semalign.semantics import semantic_map
torch.set_num_threads(1)
t, s = torch.randn(200_000, 100), torch.randn(200_000, 80)
semantic_map(t[:50_000], s[:50_000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
semantic_map(t, s)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) * (1024 if sys.platform == "linux" else 1) < 40e6  # kilobytes, on macOS bytes


def test_a_head_in_16_bits_loses_the_direction_that_a_layer_norm_takes_out() -> None:
    generator = torch.Generator().manual_seed(0)
    head = (torch.randn(2000, 48, generator=generator) * 0.02).bfloat16()
    gain = (1 + 0.3 * torch.randn(48, generator=generator)).bfloat16()
    exact = head.double() * gain.double()
    exact = exact - exact.mean(1, keepdim=True)
    reference = torch.linalg.pinv(exact)  # (D, m): a column each
    folded = fold_norm(head, gain, layer_norm=True)
    assert folded.dtype == torch.float32
    torch.testing.assert_close(folded.double(), exact, atol=1e-8, rtol=1e-6)
    cosine = torch.cosine_similarity(semantic_bases(folded).double(), reference, dim=0)
    assert (1 - cosine).abs().max() < 1e-5  # it was 0.09 on the mean
    assert fold_norm(head.double(), gain, layer_norm=True).dtype == torch.float64
    assert torch.equal(fold_norm(head), head.float())
