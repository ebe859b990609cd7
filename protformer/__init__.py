"""Performer (FAVOR+) protein language models: train on FASTA, embed, predict contacts.

The map of the package, from the bottom up (each layer imports only those above it in this list):

- `alphabet`, `errors`: the 33 tokens; what a user's mistake looks like.
- `decoding`: trees of YAML and JSON to dataclasses, strictly. `whole_file`: files that appear whole or not at all.
- `config`: a whole run as such dataclasses. `run_status`: what a run says about itself while it goes on.
- `device`: the one place that asks about hardware. `model_description`: a model without its weights.
- `corpus`: sequences to arrays (NumPy). `attention`: one file a kind (torch).
- `model`: encoder and heads. `checkpoint`: the model folder on disk.
- `evaluation`: metrics and figures.
- `inference`: embeddings and contacts. `training`: Lightning. `benchmark`: time, memory and errors.
  `conversion`: pretrained weights of others in, models for transformers out.
- `cli`: one file a command.

Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
