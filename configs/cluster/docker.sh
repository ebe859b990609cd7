#!/bin/bash
# Training in a container on all GPUs of one machine; build the image with `docker build -t protformer .`
#
#   DATA=/data FASTA=proteins.fasta.gz RUNS=$PWD/runs GPUS=8 bash configs/cluster/docker.sh
#
# `docker stop --time 300 protformer` saves before it stops. The same line goes on with a run that was stopped.
set -eu
: "${DATA:?the folder with the FASTA file}" "${FASTA:?its name in there}" "${RUNS:?the folder for run folders}"

resume=()
if [ -f "$RUNS/large/config.yaml" ]; then resume=(--resume); fi

exec docker run --rm --name protformer --gpus all --ipc=host --user "$(id -u):$(id -g)" \
    --volume "$DATA:/data:ro" --volume "$RUNS:/runs" protformer \
    train --fasta "/data/$FASTA" --out /runs/large --config "${CONFIG:-base}" --devices "${GPUS:-1}" "${resume[@]}"
