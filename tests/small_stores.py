"""Token stores of random proteins with given lengths and ids."""

import numpy as np

from protformer.corpus.token_store import TokenStore, build_token_store


def write_fasta(path, lengths, seed=0, names=None):
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number, length in enumerate(lengths):
            sequence = "".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), length))
            file.write(f">{names[number] if names else f'p{number}'}\n{sequence}\n")
    return path


def make_store(folder, lengths, seed=0, names=None):
    folder.mkdir(exist_ok=True)
    build_token_store([write_fasta(folder / "proteins.fa", lengths, seed, names)], folder / "store")
    return TokenStore.open(folder / "store")
