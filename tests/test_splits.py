"""The hash split holds out a share of the sequences, the same in any file and order, and never both sides of one."""

import numpy as np
import pytest

from protformer.corpus.splits import HashSplit, build_split_stores
from protformer.corpus.token_store import TokenStore


def write_fasta(path, sequences):
    path.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


def random_sequences(count):
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(1, 60))) for _ in range(count)]


def split(tmp_path, name, sequences, fraction=0.2):
    fasta = write_fasta(tmp_path / f"{name}.fa", sequences)
    train, validation = tmp_path / f"{name}_train", tmp_path / f"{name}_validation"
    held_out = build_split_stores([fasta], train=train, validation=validation, divide=HashSplit(fraction=fraction))
    return proteins(train), proteins(validation) if validation.exists() else [], held_out


def proteins(path):
    store = TokenStore.open(path)
    return [(store.id(i), store.protein(i).tobytes()) for i in range(len(store))]


def test_every_protein_is_on_one_side_with_its_own_id(tmp_path):
    sequences = random_sequences(1000)
    train, validation, held_out = split(tmp_path, "a", sequences)
    assert held_out == len(validation)
    everything = dict(train) | dict(validation)
    assert len(train) + len(validation) == len(everything) == 1000
    whole = TokenStore.open(tmp_path / "a_train").manifest
    assert whole.num_proteins == len(train)
    assert sum(len(tokens) for _, tokens in train) == whole.num_residues
    # Four standard errors of a binomial share.
    assert abs(held_out - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5


def test_identical_sequences_fall_on_the_same_side_whatever_the_order(tmp_path):
    sequences = random_sequences(300)
    _, validation, _ = split(tmp_path, "a", sequences)
    train_again, validation_again, _ = split(tmp_path, "b", [*sequences[::-1], *sequences])
    assert {tokens for _, tokens in validation} == {tokens for _, tokens in validation_again}
    assert not {tokens for _, tokens in validation_again} & {tokens for _, tokens in train_again}


@pytest.mark.parametrize("fraction", [0.0, 1e-9])
def test_with_nothing_to_hold_out_there_is_no_validation_store(tmp_path, fraction):
    train, validation, held_out = split(tmp_path, "a", random_sequences(20), fraction)
    assert (len(train), validation, held_out) == (20, [], 0)
