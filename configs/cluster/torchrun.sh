#!/bin/bash
# Training with torchrun, the same line on every node; on one node, the defaults will do.
#
#   NODES=2 HEAD=node1:29500 GPUS=8 FASTA=proteins.fasta.gz RUN=runs/large bash configs/cluster/torchrun.sh
#
# FASTA and RUN lie on a file system that all nodes see. The same line goes on with a run that was stopped.
set -eu
: "${FASTA:?a FASTA file or a token store}" "${RUN:?the run folder}"

resume=()
if [ -f "$RUN/config.yaml" ]; then resume=(--resume); fi

exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id protformer \
    -m protformer train --fasta "$FASTA" --out "$RUN" --config "${CONFIG:-base}" "${resume[@]}"
