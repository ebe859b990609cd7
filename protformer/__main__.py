"""`python -m protformer` is the same as the `protformer` command."""

from protformer.cli import main

main()
