"""Performer (FAVOR+) protein language models: train on FASTA, embed, predict contacts.

The map of the package, from the bottom up (each layer imports only those above it in this list):

- `alphabet`, `errors`: the 33 tokens; what a user's mistake looks like.
- `decoding`: trees of YAML and JSON to dataclasses, strictly. `config`: a whole run as such dataclasses.
- `device`: the one place that asks about hardware.
- `corpus`: sequences to arrays (NumPy). `attention`: one file a kind (torch).
- `model`: encoder and heads. `checkpoint`: the model folder on disk.
- `evaluation`: metrics and figures.
- `inference`: embeddings and contacts. `training`: Lightning. `benchmark`: time, memory and errors.
- `cli`: one file a command.

Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
