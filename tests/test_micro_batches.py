"""The parts that a step is computed in change nothing but memory, and are found where memory runs out."""

import pytest
import torch
import torch.nn.functional as F
from test_training import arguments, assert_same_weights, fails_with
from test_training import fasta as fasta  # the module's fixture

from protformer.alphabet import FIRST_RESIDUE, LAST_RESIDUE, MASK
from protformer.cli import run
from protformer.config import FavorConfig, ModelConfig
from protformer.device import is_out_of_memory, memory_refused_in_time
from protformer.errors import ConfigError
from protformer.evaluation.masked_lm import IGNORE, MaskedBatch, masked_lm_loss_sum
from protformer.model.masked_lm_head import ProteinLanguageModel
from protformer.training import micro_batches
from protformer.training.micro_batches import MicroBatches

ROWS, LENGTH = 5, 24
DAMPED = FavorConfig(num_features=16, features="favor++", row_norms="chi", rescale=True)


def make_model(dropout=0.0, attention=DAMPED):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_size": 16, "feed_forward_size": 32}
    return ProteinLanguageModel(ModelConfig(attention=attention, dropout=dropout, **sizes), seed=0).train()


def make_batch():
    """Rows with very different numbers of asked positions; one has none."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(FIRST_RESIDUE, LAST_RESIDUE + 1, (ROWS, LENGTH), generator=generator)
    share = torch.tensor([0.9, 0.1, 0.0, 0.3, 0.5])[:, None]
    asked = torch.rand((ROWS, LENGTH), generator=generator) < share
    return MaskedBatch(
        inputs=tokens.masked_fill(asked, MASK),
        targets=tokens.masked_fill(~asked, IGNORE),
        segments=torch.ones_like(tokens),
    )


def parts_of(rows, accumulate_batches="auto", device="cpu"):
    parts = MicroBatches(accumulate_batches, step_rows=ROWS, row_tokens=LENGTH, device=torch.device(device))
    parts.rows = rows
    return parts


def gradients(model, parts, batch):
    torch.manual_seed(7)
    loss_sum = parts.backward(model, batch, num_asked=int((batch.targets != IGNORE).sum()))
    return loss_sum, [parameter.grad for parameter in model.parameters()]


def out_of_memory_above(rows, monkeypatch):
    """A device on which so many rows fit; it notices only when much of the work is done."""

    def loss_sum(model, batch):
        computed = masked_lm_loss_sum(model, batch)
        if len(batch.inputs) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return computed

    monkeypatch.setattr(micro_batches, "masked_lm_loss_sum", loss_sum)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_every_asked_position_of_a_step_weighs_the_same_whatever_its_part(rows):
    batch, model = make_batch(), make_model()
    asked = batch.targets != IGNORE
    logits = make_model()(batch.inputs, batch.segments)[asked]
    mean = F.cross_entropy(logits, batch.targets[asked])
    loss_sum, found = gradients(model, parts_of(rows), batch)
    torch.testing.assert_close(loss_sum / asked.sum(), mean.detach())
    reference = make_model()
    F.cross_entropy(reference(batch.inputs, batch.segments)[asked], batch.targets[asked]).backward()
    for parameter, gradient in zip(reference.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_step_without_asked_positions_has_a_gradient_of_zero():
    batch = make_batch()
    unasked = MaskedBatch(inputs=batch.inputs, targets=torch.full_like(batch.targets, IGNORE), segments=batch.segments)
    loss_sum, found = gradients(make_model(), parts_of(2), unasked)
    assert float(loss_sum) == 0
    assert all(not gradient.any() for gradient in found)


def test_a_step_that_ran_out_of_memory_is_redone_as_if_its_parts_had_been_small_all_along(monkeypatch, capsys):
    """With dropout, and with attention that gathers statistics as it goes."""
    batch, small, redone = make_batch(), make_model(dropout=0.3), make_model(dropout=0.3)
    _, expected = gradients(small, parts_of(2), batch)
    out_of_memory_above(2, monkeypatch)
    parts = parts_of(5)
    _, found = gradients(redone, parts, batch)
    assert parts.rows == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(redone.buffers(), small.buffers(), strict=True))
    assert capsys.readouterr().err.splitlines() == [
        "out of memory with 5 of a step's 5 rows at a time; going on with 3",
        "out of memory with 3 of a step's 5 rows at a time; going on with 2",
    ]


def test_memory_that_is_too_small_for_one_row_or_for_a_fixed_number_is_one_clear_error(monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(ConfigError, match=r"one row of 24 tokens .* data\.max_residues .*activation_checkpointing"):
        gradients(make_model(), parts_of(4), make_batch())
    with pytest.raises(ConfigError, match=r"3 rows of 24 tokens .*; raise training\.accumulate_batches .* auto"):
        gradients(make_model(), parts_of(3, accumulate_batches=2), make_batch())


def test_only_errors_about_memory_count_as_such(monkeypatch):
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))

    def fails(model, batch):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(micro_batches, "masked_lm_loss_sum", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        gradients(make_model(), parts_of(4), make_batch())


def test_a_cpu_takes_few_rows_at_once_and_a_gpu_all():
    def rows(device, row_tokens):
        return MicroBatches("auto", step_rows=64, row_tokens=row_tokens, device=torch.device(device)).rows

    assert [rows("cpu", 1024), rows("cpu", 100_000), rows("cuda", 1024)] == [16, 1, 64]
    assert parts_of(None, accumulate_batches=2).step_rows == ROWS
    assert MicroBatches(2, step_rows=ROWS, row_tokens=8, device=torch.device("cpu")).rows == 3


@pytest.mark.skipif("sys.platform != 'linux'")
def test_memory_beyond_what_is_free_is_refused_instead_of_granted():
    import resource

    from protformer.device import _available_bytes

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_refused_in_time(torch.device("cpu")):
        # Neither is ever touched, so Linux would grant both.
        first = torch.empty(int(0.6 * _available_bytes()), dtype=torch.uint8)
        with pytest.raises(RuntimeError) as refused:
            torch.empty(len(first), dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_run_goes_on_with_the_parts_that_it_found_also_where_there_is_more_memory(fasta, tmp_path, monkeypatch):
    automatic = {"training__accumulate_batches": "auto", "training__max_steps": 4}
    assert run(arguments(fasta, tmp_path / "fixed", training__accumulate_batches=4, training__max_steps=4)) == 0
    with monkeypatch.context() as scarce:
        out_of_memory_above(2, scarce)
        assert run(arguments(fasta, tmp_path / "found", "--max-steps", 2, **automatic)) == 0
    assert run(arguments(fasta, tmp_path / "found", "--resume", **automatic)) == 0
    assert_same_weights(tmp_path / "fixed", tmp_path / "found")


def test_a_run_that_no_row_fits_ends_with_one_line(fasta, tmp_path, monkeypatch, capsys):
    out_of_memory_above(0, monkeypatch)
    line = fails_with(capsys, arguments(fasta, tmp_path / "run", training__accumulate_batches="auto"))
    assert "out of memory with one row of 64 tokens at a time; lower data.max_residues" in line
    command = arguments(fasta, tmp_path / "other", training__accumulate_batches=9)
    assert "9 parts of a step, but a device has only 8 rows of it" in fails_with(capsys, command)
